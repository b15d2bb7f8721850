"""Tools: what is refused, what is planned, and grammars that let through what the parsers read, and nothing else."""

from __future__ import annotations

import json

import jsonschema
import pytest

from flightline.client.chat_template import ChatTemplate as Renderer
from flightline.gateway.chat.guides import Reasoning
from flightline.gateway.chat.parsers import FORMATS
from flightline.gateway.chat.template import ChatTemplate
from flightline.gateway.chat.tools import parse_tools
from flightline.torch_engine.core import grammar, request
from flightline.torch_engine.core.request import Code, RequestError
from tests.gateway.chat import templates
from tests.gateway.chat.matching import accepts, words
from tests.gateway.chat.test_parsers import told

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "where": {"$ref": "#/$defs/place"},
        "now": {"type": "boolean"},
    },
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
}


def tool(name: str, parameters: dict | None = None, **more) -> dict:
    function = {"name": name, **more} | ({} if parameters is None else {"parameters": parameters})
    return {"type": "function", "function": function}


TOOLS = [tool("get_weather", WEATHER), tool("ping")]
TEMPLATE_OF = {
    "hermes": "qwen_3",
    "llama3_json": "llama_3",
    "pythonic": "pythonic",
    "mistral": "mistral",
    "mistral_v11": "mistral_v11",
}


def template_of(form: str) -> ChatTemplate:
    special = words(templates.MISTRAL_TOKENS)[1] if form.startswith("mistral") else {}
    return ChatTemplate(
        Renderer(templates.ALL[TEMPLATE_OF[form]], {"bos_token": "<s>", "eos_token": "</s>"}), special
    )


QWEN = template_of("hermes")


def plan(form: str = "hermes", **body):
    return parse_tools({"tools": TOOLS, **body}, template_of(form))


def allowed(mode, *names):
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_only_allowed_tools_are_called_and_all_are_seen():
    auto, required = plan(tool_choice=allowed("auto", "ping")), plan(tool_choice=allowed("required", "ping"))
    assert (auto.choice, required.choice) == ("auto", "required")
    assert [len(each.tools) for each in (auto, required)] == [2, 2]
    assert not auto.optional, "without its guide another tool could be called"
    assert plan(tool_choice=allowed("auto", "ping", "get_weather")) == plan()
    ping, weather = (written("hermes", call) for call in (("ping", "{}"), ("get_weather", CITY)))
    for each, text in ((auto, "Hello."), (auto, ping), (required, ping)):
        assert accepts(each.guide, text, specials("hermes"))
    for each, text in ((auto, weather), (required, weather), (required, "Hello.")):
        assert not accepts(each.guide, text, specials("hermes"))
    assert accepts(plan().guide, weather, specials("hermes"))


@pytest.mark.parametrize("form", ["hermes", "mistral", "mistral_v11"])
def test_a_tool_that_cannot_be_enforced_leaves_the_others_guarded(form):
    """Its own arguments are any object."""
    odd = tool("odd", {"properties": {"a": {"not": {"type": "string"}}}})

    def enforces(guide):
        try:
            grammar.check(request.Guide(guide.type, guide.text))
        except RequestError:
            return False
        return True

    made = plan(form, tools=[*TOOLS, odd])
    assert made.optional and not enforces(made.guide)
    looser = made.loosened(enforces)
    assert enforces(looser)
    for call in (("get_weather", CITY), ("odd", '{"a": 5, "b": [1]}')):
        assert accepts(looser, written(form, call), specials(form))
    for call in (("get_weather", '{"place": 5}'), ("odd", "5"), ("nobody", "{}")):
        assert not accepts(looser, written(form, call), specials(form))
    assert parse_tools({}, QWEN).loosened(enforces) is None
    with pytest.raises(RequestError, match=r"tools\[2\]\.function\.parameters is not enforced"):
        made.refuse_by_name(lambda guide: "" if enforces(guide) else "is not enforced")
    plan(form).refuse_by_name(lambda guide: "" if enforces(guide) else "is not enforced")


def test_the_formats_have_grammars_and_templates():
    assert [*TEMPLATE_OF, "harmony"] == list(FORMATS)  # which test_harmony.py has
    for form in TEMPLATE_OF:
        assert plan(form).format == template_of(form).tool_format == form


def test_choices():
    named = {"type": "function", "function": {"name": "ping"}}
    assert parse_tools({}, QWEN) == parse_tools({"tools": None, "tool_choice": "none"}, QWEN)
    assert parse_tools({}, QWEN).format is None and parse_tools({}, QWEN).guide is None
    hidden = plan(tool_choice="none")
    assert (hidden.tools, hidden.format, hidden.choice) == (None, None, "none")
    auto, required, chosen = (
        plan(),
        plan(tool_choice="required"),
        plan(tool_choice=named, parallel_tool_calls=False),
    )
    assert (auto.choice, auto.optional, auto.parallel, auto.name) == ("auto", True, True, None)
    assert (required.choice, required.optional) == ("required", False)
    assert (chosen.choice, chosen.name, chosen.parallel) == ("named", "ping", False)
    assert len(chosen.tools) == 2  # the model sees all
    assert auto.tools[1]["function"]["parameters"] == {"type": "object", "properties": {}}
    assert not plan(tools=[tool("f", strict=True), tool("g")]).optional
    assert not auto.keep_special_tokens and plan("mistral").keep_special_tokens
    parser = chosen.parser(Reasoning.OPEN)
    deltas = parser.feed('hm</think><tool_call>{"name": "ping"}</tool_call>')
    assert (told(deltas), parser.finish("stop")) == (("hm", "", [("ping", "{}")]), ([], "stop"))


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "ping"}}])
def test_a_form_of_the_content_says_nothing_about_a_call_that_is_demanded(choice):
    """instructor sends both, the tool and its schema."""
    layout = {"type": "json_schema", "json_schema": {"name": "ping", "schema": {"type": "object"}}}
    assert plan(tool_choice=choice, response_format=layout) == plan(tool_choice=choice)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"tools": []}, "tools is []: it must be a list of 1 to 128"),
        ({"tools": {}}, "tools is {}"),
        ({"tools": [tool(f"f{i}") for i in range(129)]}, "1 to 128"),
        ({"tools": ["f"]}, "tools[0].type is None"),
        ({"tools": [{"type": "custom"}]}, "tools[0].type is 'custom'"),
        ({"tools": [{"type": "function"}]}, "tools[0].function is None"),
        ({"tools": [tool("a b")]}, "tools[0].function.name is 'a b'"),
        ({"tools": [tool("f"), tool("")]}, "tools[1].function.name is ''"),
        ({"tools": [tool("x" * 65)]}, "tools[0].function.name"),
        ({"tools": [tool("f\n")]}, "tools[0].function.name"),
        ({"tools": [tool("f", description=5)]}, "description is 5: it must be text"),
        ({"tools": [tool("f", [1])]}, "parameters is [1]: it must be an object"),
        ({"tools": [tool("f", {"type": "array"})]}, "parameters.type is 'array'"),
        ({"tools": [tool("f", {"properties": [1]})]}, "parameters.properties is [1]"),
        ({"tools": [tool("f", {"required": "a"})]}, "parameters.required is 'a'"),
        ({"tools": [tool("f", strict="yes")]}, "strict is 'yes'"),
        ({"tools": [tool("f"), tool("f")]}, "two functions named f"),
        ({"tool_choice": "any"}, "tool_choice is 'any'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice is {"),
        (
            {"tool_choice": {"type": "function", "function": {"name": "h"}}},
            "names 'h': it must be one of get_weather",
        ),
        ({"tool_choice": {"type": "custom"}}, "tool_choice is {"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools.mode is None"),
        ({"tool_choice": allowed("any", "ping")}, "allowed_tools.mode is 'any': it must be auto or required"),
        ({"tool_choice": allowed("auto")}, "allowed_tools.tools is []: it must be a list of tools"),
        ({"tool_choice": allowed("auto", "ping", "h")}, "names 'h': it must be one of get_weather, ping"),
        ({"tool_choice": allowed("auto", 5)}, "allowed_tools.tools[0] is {"),
        (
            {"tool_choice": "required", "structured_outputs": {"json_object": True}},
            "tool_choice 'required' asks",
        ),
        (
            {"tool_choice": "required", "response_format": {"type": "structural_tag", "format": {}}},
            "tool_choice 'required' asks",
        ),
        ({"tool_choice": "required", "response_format": {"type": "xml"}}, "response_format.type is 'xml'"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls is 'no'"),
        ({"functions": []}, "functions is not supported"),
        ({"tools": None, "tool_choice": "auto"}, "but there are no tools"),
    ],
)
def test_bad_tools_are_refused_by_name(body, message):
    with pytest.raises(RequestError) as caught:
        plan(**body)
    assert caught.value.code is Code.INVALID_ARG and message in caught.value.message


def test_templates_without_a_place_for_tools_refuse_them():
    for name, message in (("plain", "no place for tools"), ("odd", "form that is not known here")):
        template = ChatTemplate(Renderer(templates.ALL[name]))
        with pytest.raises(RequestError, match=message):
            parse_tools({"tools": TOOLS}, template)
        assert parse_tools({"tools": TOOLS, "tool_choice": "none"}, template).tools is None
    told_by_hand = ChatTemplate(Renderer(templates.ALL["odd"]), tool_format="hermes")
    assert parse_tools({"tools": TOOLS}, told_by_hand).format == "hermes"


CITY = '{"city": "Z\u00fcrich \\"\u20ac\\"", "days": 2, "where": {"x": 1.5}, "now": true}'


def written(form: str, *calls: tuple[str, str]) -> str:
    """Calls as a model of this family writes them."""
    if form == "hermes":
        return "\n".join(f'<tool_call>\n{{"name": "{n}", "arguments": {a}}}\n</tool_call>' for n, a in calls)
    if form == "llama3_json":
        return "; ".join(f'{{"name": "{n}", "parameters": {a}}}' for n, a in calls)
    if form == "mistral":
        return "[TOOL_CALLS] [" + ", ".join(f'{{"name": "{n}", "arguments": {a}}}' for n, a in calls) + "]"
    if form == "mistral_v11":
        return "".join(f"[TOOL_CALLS]{n}[ARGS]{a}" for n, a in calls)
    listed = (
        f"{n}({', '.join(f'{key}={json.dumps(value, ensure_ascii=False)}' for key, value in json.loads(a).items())})"
        for n, a in calls
    )
    return "[" + ", ".join(listed) + "]"


def specials(form: str) -> tuple[str, ...]:
    return templates.MISTRAL_TOKENS if form.startswith("mistral") else ()


@pytest.mark.parametrize("form", TEMPLATE_OF)
def test_required_lets_good_calls_through_and_nothing_else(form):
    guide = plan(form, tool_choice="required").guide
    one, two = ("get_weather", CITY), ("ping", "{}")
    good = [
        written(form, one),
        written(form, two),
        written(form, one, two),
        written(form, ("get_weather", '{"city": "x"}')),
    ]
    bad = [
        "Hello",
        "",
        written(form, ("other", "{}")),
        written(form, ("get_weather", '{"days": 2}')),  # the city is missing
        written(form, ("get_weather", '{"city": 5}')),
        written(form, ("get_weather", '{"city": "x", "days": 10}')),
        written(form, ("get_weather", '{"city": "x", "more": 1}')),
        written(form, one)[:-1] if form != "mistral_v11" else written(form, one)[:-2],
        written(form, one) + " and more",
    ]
    for text in good:
        assert accepts(guide, text, specials(form)), text
        parser = plan(form, tool_choice="required").parser()
        deltas = parser.feed(text)
        rest, reason = parser.finish("stop")
        _, said, calls = told(deltas + rest)
        assert not said and reason == "tool_calls"
        for name, arguments in calls:
            jsonschema.validate(
                json.loads(arguments), WEATHER if name == "get_weather" else {"type": "object"}
            )
    for text in bad:
        assert not accepts(guide, text, specials(form)), text


@pytest.mark.parametrize("form", TEMPLATE_OF)
def test_one_call_where_only_one_is_wanted(form):
    named = {"type": "function", "function": {"name": "ping"}}
    for body in ({"tool_choice": named}, {"tool_choice": "required", "parallel_tool_calls": False}):
        guide = plan(form, **body).guide
        assert accepts(guide, written(form, ("ping", "{}")), specials(form))
        assert not accepts(guide, written(form, ("ping", "{}"), ("ping", "{}")), specials(form))
    assert not accepts(
        plan(form, tool_choice=named).guide, written(form, ("get_weather", CITY)), specials(form)
    )


@pytest.mark.parametrize("form", TEMPLATE_OF)
def test_auto_leaves_text_free(form):
    guide = plan(form).guide
    if form in ("llama3_json", "pythonic"):
        assert guide is None  # nothing tells a call from text before it is one
        return
    bad = written(form, ("other", "{}"))
    for text in (
        "",
        "Hello <tool> [TOOL] {\n",
        written(form, ("get_weather", CITY)),
        f"I look.\n{written(form, ('ping', '{}'))}",
    ):
        assert accepts(guide, text, specials(form)), text
        assert not accepts(guide, text + bad, specials(form))
    assert accepts(guide, written(form, ("ping", "{}"), ("get_weather", CITY)) + "\nDone", specials(form))


@pytest.mark.parametrize("form", TEMPLATE_OF)
def test_auto_with_a_form_for_the_answer_is_either(form):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    made = plan(form, guided_json=schema)
    assert not made.optional
    for text in ('{"a": 1}', written(form, ("get_weather", CITY))):
        assert accepts(made.guide, text, specials(form)), text
    for text in ("Hello", '{"a": "x"}', '{"a":  1}', written(form, ("other", "{}"))):
        assert not accepts(made.guide, text, specials(form)), text
    with pytest.raises(RequestError, match="stand beside tool calls"):
        plan(form, guided_grammar='root ::= "a"')


@pytest.mark.parametrize("form", TEMPLATE_OF)
def test_calls_behind_thoughts(form):
    guide = plan(form, tool_choice="required").guide
    call = written(form, ("ping", "{}"))
    assert accepts(guide.beside(Reasoning.OPEN), f"hm\n</think>\n\n{call}", specials(form))
    assert accepts(guide.beside(Reasoning.POSSIBLE), f"<think>hm</think>{call}", specials(form))
    assert accepts(guide.beside(Reasoning.POSSIBLE), call, specials(form))
    assert not accepts(guide.beside(Reasoning.OPEN), "hm</think>Hello", specials(form))


@pytest.mark.parametrize("form", TEMPLATE_OF)
@pytest.mark.parametrize("count", [1, 10])
def test_the_endpoints_let_these_grammars_in(form, count):
    """Their check knows no vocabulary, so it must not stumble over the ids of Mistral's markers."""
    tools = [tool(f"f{i}", WEATHER) for i in range(count)]
    for body in ({}, {"tool_choice": "required"}, {"guided_json": WEATHER}):
        guide = plan(form, tools=tools, **body).guide
        for reasoning in Reasoning:
            if guide is not None:
                behind = guide.beside(reasoning)
                grammar.check(request.Guide(behind.type, behind.text))


def test_white_space_in_arguments_has_an_end():
    guide = plan(tool_choice="required").guide
    assert not accepts(guide, written("hermes", ("get_weather", '{"city":     "x"}')))


def test_a_clients_own_options_for_the_grammar_are_not_taken():
    loose = {"whitespace_flexible": True, "lenient": True}
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "x-guidance": loose}
    guide = plan(tools=[tool("f", schema)], tool_choice="required").guide
    assert accepts(guide, written("hermes", ("f", '{"a": 1}')))
    assert not accepts(guide, written("hermes", ("f", '{"a":  1}')))


def test_grammars_that_are_too_large_are_said_to_be():
    many = [tool(f"f{i}", WEATHER) for i in range(128)]
    auto = plan(tools=many)
    assert auto.optional and accepts(auto.guide, written("hermes", ("f127", CITY)))
    for body in (
        {"tool_choice": "required"},
        {"guided_json": WEATHER},
        {"tools": [*many[1:], tool("g", strict=True)]},
    ):
        with pytest.raises(RequestError, match=r"tools: their parameters make a grammar of \d+ bytes"):
            plan(**{"tools": many, **body})


def test_remarks_are_left_out_of_grammars_and_names_are_not():
    remarks = {"description": "d" * 50_000, "title": "t", "default": {"a": 1}}
    properties = {"description": {"type": "string", **remarks}, "title": {"enum": [{"title": 1}], **remarks}}
    schema = {"type": "object", "properties": properties, "required": ["description", "title"], **remarks}
    guide = plan(tools=[tool("f", {**schema, "additionalProperties": False})], tool_choice="required").guide
    assert len(guide.text) < 1000
    assert accepts(guide, written("hermes", ("f", '{"description": "x", "title": {"title": 1}}')))
    assert not accepts(guide, written("hermes", ("f", '{"description": "x", "title": {}}')))
