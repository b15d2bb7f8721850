"""Our rendering against Transformers', what is told from a template, and templates that go on for too long."""

from __future__ import annotations

import json
import threading

import pytest
from transformers import AutoTokenizer

from flightline.client import template_sandbox
from flightline.client.chat_template import ChatTemplate as Renderer
from flightline.gateway.chat.guides import Reasoning
from flightline.gateway.chat.messages import parse_messages
from flightline.gateway.chat.template import ChatTemplate
from flightline.torch_engine.core.request import Code, RequestError
from tests.gateway.chat import templates

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'The weather, "now" <b>&</b> \u00e9\u4f60',
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
CALL = {
    "id": "abcDEF123",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Z\u00fcrich", "days": 2}},
}
SIMPLE = [{"role": "user", "content": "  Hello <b>you</b> & 'them' \u00e9\u4f60\U0001f600 "}]
LONG = [
    {"role": "system", "content": " Be brief.\n"},
    {"role": "user", "content": "1 < 2?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes. "},
    {"role": "user", "content": "Why?"},
]
CALLED = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcDEF123", "content": '{"degrees": 20}'},
    {"role": "user", "content": "Thanks"},
]
CASES = {
    "simple": (SIMPLE, {}),
    "long": (LONG, {}),
    "no prompt": (LONG, {"add_generation_prompt": False}),
    "tools": (SIMPLE, {"tools": TOOLS}),
    "called": (CALLED, {"tools": TOOLS}),
    "continued": (LONG[:3], {"continue_final_message": True, "add_generation_prompt": False}),
    "variables": (SIMPLE, {"kwargs": {"enable_thinking": False, "date_string": "1 Jan 2030"}}),
}


def by_transformers(tokenizer, messages, kwargs=None, add_generation_prompt=True, **options) -> str | None:
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options, **(kwargs or {})
        )
    except Exception:  # whatever the template raises
        return None


def by_us(template, messages, **options) -> str | None:
    try:
        return template.render(messages, **options)
    except RequestError as error:
        assert error.code is Code.INVALID_ARG and error.message.startswith("messages: ")
        return None


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Our template and Transformers' tokenizer, for each of the texts."""
    found = {}
    for name, text in templates.ALL.items():
        folder = tmp_path_factory.mktemp(name)
        specials = templates.MISTRAL_TOKENS if name.startswith("mistral") else ()
        templates.save(folder, text, specials)
        found[name] = ChatTemplate.load(folder), AutoTokenizer.from_pretrained(folder)
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", templates.ALL)
def test_equals_transformers(saved, name, case):
    ours, tokenizer = saved[name]
    messages, options = CASES[case]
    assert by_us(ours, messages, **options) == by_transformers(tokenizer, messages, **options)


def test_both_refuse_what_a_template_refuses(saved):
    ours, tokenizer = saved["gemma"]
    assert by_transformers(tokenizer, LONG) is None
    with pytest.raises(RequestError, match=r"messages: .*System role not supported"):
        ours.render(LONG)


def test_equals_transformers_for_a_real_model(smollm2_folder):
    ours, tokenizer = ChatTemplate.load(smollm2_folder), AutoTokenizer.from_pretrained(smollm2_folder)
    for messages in (SIMPLE, LONG):
        for prompt in (True, False):
            theirs = by_transformers(tokenizer, messages, add_generation_prompt=prompt)
            assert theirs and by_us(ours, messages, add_generation_prompt=prompt) == theirs
    assert not ours.supports_tools and ours.tool_format is None and not ours.opens_reasoning


def test_named_templates_and_files(tmp_path):
    named = {"default": "no tools {{ messages[0].content }}", "tool_use": "tools {{ tools | length }}"}
    tokenizer = templates.save(tmp_path, named)
    for _ in range(2):
        ours, theirs = ChatTemplate.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        for tools in (None, TOOLS):
            assert ours.render(SIMPLE, tools=tools) == by_transformers(theirs, SIMPLE, tools=tools)
        (tmp_path / "chat_template.jinja").unlink(
            missing_ok=True
        )  # and now the list form, in the older place
        for path in (tmp_path / "additional_chat_templates").glob("*"):
            path.unlink()
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenizer.chat_template == named


def test_no_template_and_a_file_instead(tmp_path):
    templates.save(tmp_path, None)
    assert ChatTemplate.load(tmp_path) is None
    file = tmp_path / "mine.jinja"
    file.write_text("{{ bos_token }}{{ messages[0].content }}")
    assert ChatTemplate.load(tmp_path, file).render(SIMPLE) == "<s>" + SIMPLE[0]["content"]
    with pytest.raises(RequestError, match="cannot be read"):
        ChatTemplate.load(tmp_path, tmp_path / "absent")
    file.write_text(" \n")
    with pytest.raises(RequestError, match=r"mine\.jinja is empty"):
        ChatTemplate.load(tmp_path, file)
    file.write_text("{% for %}")
    with pytest.raises(RequestError, match="not valid"):
        ChatTemplate.load(tmp_path, file)
    with pytest.raises(RequestError, match="must be one of hermes"):
        ChatTemplate.load(tmp_path, tool_format="xml")


KNOWN = {
    "plain": (False, None),
    "llama_3": (True, "llama3_json"),
    "qwen_3": (True, "hermes"),
    "deepseek_r1": (False, None),
    "mistral": (True, "mistral"),
    "mistral_v11": (True, "mistral_v11"),
    "gemma": (False, None),
    "pythonic": (True, "pythonic"),
    "odd": (True, None),
}


@pytest.mark.parametrize("name", KNOWN)
def test_tools_are_told_from_the_template(saved, name):
    assert (saved[name][0].supports_tools, saved[name][0].tool_format) == KNOWN[name]


def test_reasoning_is_told_from_the_prompt(saved):
    qwen, r1, llama = (saved[name][0] for name in ("qwen_3", "deepseek_r1", "llama_3"))
    assert r1.opens_reasoning and not qwen.opens_reasoning
    assert r1.reasoning(r1.render(SIMPLE)) is Reasoning.OPEN
    assert qwen.reasoning(qwen.render(SIMPLE)) is Reasoning.POSSIBLE
    assert qwen.reasoning(qwen.render(SIMPLE, kwargs={"enable_thinking": False})) is Reasoning.NONE
    assert llama.reasoning(llama.render(SIMPLE)) is Reasoning.NONE


def test_variables_may_not_replace_fields(saved):
    with pytest.raises(RequestError, match="chat_template_kwargs sets messages"):
        saved["plain"][0].render(SIMPLE, kwargs={"messages": []})
    with pytest.raises(RequestError, match="one of them must be false"):
        saved["plain"][0].render(LONG, continue_final_message=True)


def test_what_the_parser_of_messages_returns_can_be_rendered(saved):
    messages = parse_messages(
        [
            {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{**CALL, "function": {"name": "f", "arguments": "{}"}}],
            },
            {"role": "tool", "tool_call_id": "abcDEF123", "content": "20"},
        ]
    )
    for name in ("llama_3", "qwen_3", "mistral_v11", "pythonic"):
        assert "Be brief." in saved[name][0].render(messages, tools=TOOLS)


BOMBS = {
    "loop": "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}",
    "recursive macro": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "recursive loop": "{% for x in [1, 1] recursive %}{% if loop.depth < 60 %}{{ loop([1, 1]) }}{% endif %}"
    "{% endfor %}",
    "range": "{{ range(10000000000) | list }}",
    "times": "{{ 'a' * 10000000000 }}",
    "times list": "{{ [1] * 10000000000 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "square": "{% set n = namespace(x=9) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "plus": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "plus list": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "tilde": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "block": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% set n.x = y %}{% endfor %}",
    "output": "{% for a in range(90000) %}{{ messages[0].content * 1000 }}{% endfor %}",
    "center": "{{ 'a' | center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "format": "{{ '{:>9999999999}'.format('a') }}",
    "format star": "{{ '%*d' % (9999999999, 1) }}",
    "format nested": "{{ '{:{}}'.format('a', 9999999999) }}",
    "format filter": "{{ '%9999999999s' | format('a') }}",
    "replace": "{% set a = 'a' * 1000000 %}{{ a.replace('a', a) }}",
    "join": "{{ range(90000) | join('a' * 1000000) }}",
    "indent": "{{ messages | tojson(indent=10000000000) }}",
    "lipsum": "{{ lipsum(n=10000000000) }}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_template_that_does_not_end_is_ended(name, monkeypatch):
    monkeypatch.setattr(template_sandbox, "MOST_STEPS", 100_000)
    failures = []

    def render():  # in a thread, as in the gateway: nothing here may need the main one
        with pytest.raises(RequestError) as caught:
            ChatTemplate(Renderer(BOMBS[name])).render(SIMPLE)
        failures.append(caught.value)

    thread = threading.Thread(target=render)
    thread.start()
    thread.join(60)
    assert failures and failures[0].code is Code.INVALID_ARG


def test_time_is_limited_too(monkeypatch):
    monkeypatch.setattr(template_sandbox, "MOST_SECONDS", 0.0)
    with pytest.raises(RequestError, match="longer than 0 s"):
        ChatTemplate(Renderer("{% for m in messages %}{% endfor %}")).render(SIMPLE)
    assert ChatTemplate(Renderer("fine")).render(SIMPLE) == "fine"


def test_a_huge_template_is_refused(tmp_path):
    templates.save(tmp_path, "a" * 2**20 + "b")
    with pytest.raises(RequestError, match="1,048,576 at most"):
        ChatTemplate.load(tmp_path)
