"""What a chat is, between OpenAI's JSON and the model's text: pure functions and small classes, no I/O, no event loop.

::

    messages = parse_messages(body["messages"])
    plan = parse_tools(body, template)                    # tools, tool_choice, parallel_tool_calls
    prompt = template.render(messages, tools=plan.tools)
    reasoning = template.reasoning(prompt)
    guide = plan.guide or response_format(body)
    if guide: guide = guide.beside(reasoning)
    parser = plan.parser(reasoning)                       # one for each choice
    deltas = parser.feed(text) ...; more, finish_reason = parser.finish("stop")

Whatever a client got wrong is a ``RequestError`` with ``Code.INVALID_ARG`` whose text names the field.
"""
