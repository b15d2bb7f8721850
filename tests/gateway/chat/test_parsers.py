"""The model's text, taken apart: whatever the cuts between its pieces, the result is the same."""

from __future__ import annotations

import json
import random

import pytest

from flightline.gateway.chat.guides import Reasoning
from flightline.gateway.chat.parsers import FORMATS, Delta, OutputParser

TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g", "get-weather")]
A = '{"k": "v \\" } \\u00e9 </tool_call>", "n": [1, {"x": null}]}'
B = "{}"


def hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


WHOLE = {
    # format, text: what is said, what is called
    "plain": ("hermes", "Hello <b>you</b> \n\n", "Hello <b>you</b> \n\n", []),
    "nothing": ("hermes", "", "", []),
    "space": ("hermes", " \n", " \n", []),
    "one": ("hermes", hermes("f", A), "", [("f", A)]),
    "two": ("hermes", hermes("f", A) + "\n" + hermes("g", B), "", [("f", A), ("g", B)]),
    "text around": ("hermes", f"I look.\n\n{hermes('f', A)}\n Done. ", "I look.Done. ", [("f", A)]),
    "near misses": (
        "hermes",
        "a <tool_cal <<tool_ca </tool_call> < ",
        "a <tool_cal <<tool_ca </tool_call> < ",
        [],
    ),
    "no end mark": ("hermes", hermes("f", A).removesuffix("\n</tool_call>"), "", [("f", A)]),
    "no end mark, two": ("hermes", hermes("f", A)[:-13] + "\n" + hermes("g", B), "", [("f", A), ("g", B)]),
    "arguments first": (
        "hermes",
        '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>',
        "",
        [("f", '{"a": 1}')],
    ),
    "no arguments": ("hermes", '<tool_call>\n{"name": "f"}\n</tool_call>', "", [("f", "{}")]),
    "null arguments": ("hermes", hermes("f", "null"), "", [("f", "{}")]),
    "quoted arguments": ("hermes", hermes("f", '"{\\"a\\": 1}"'), "", [("f", '{"a": 1}')]),
    "other keys": (
        "hermes",
        '<tool_call>{"id": 5, "type": "function", "name": "f", "arguments": {"a": 1}, "x": {"y": "}"}}</tool_call>',
        "",
        [("f", '{"a": 1}')],
    ),
    "no JSON": ("hermes", "<tool_call>\nhm</tool_call>", "<tool_call>\nhm</tool_call>", []),
    "no name": ("hermes", '<tool_call>{"a": 1}</tool_call>', '<tool_call>{"a": 1}</tool_call>', []),
    "unknown name": ("hermes", hermes("zzz", B), "", [("zzz", B)]),  # the application knows what to say
    "llama": ("llama3_json", f'{{"name": "f", "parameters": {A}}}', "", [("f", A)]),
    "llama tagged": ("llama3_json", f'<|python_tag|>{{"name": "f", "parameters": {A}}}', "", [("f", A)]),
    "llama typed": (
        "llama3_json",
        f'\n{{"type": "function", "name": "f", "parameters": {A}}}',
        "",
        [("f", A)],
    ),
    "llama two": (
        "llama3_json",
        f'{{"name": "f", "parameters": {A}}}; {{"name": "g", "parameters": {B}}}',
        "",
        [("f", A), ("g", B)],
    ),
    "llama answer in JSON": ("llama3_json", '{"name": "Ann", "age": 5}', '{"name": "Ann", "age": 5}', []),
    "llama other JSON": ("llama3_json", '{"city": {"name": "f"}}', '{"city": {"name": "f"}}', []),
    "llama text": ("llama3_json", ' Well: {"name": "f"}', ' Well: {"name": "f"}', []),
    "llama text after": (
        "llama3_json",
        '{"name": "f", "parameters": {}} and more',
        "and more",
        [("f", "{}")],
    ),
    "pythonic": (
        "pythonic",
        "[f(a=1, b=\"x)]\", c=[True, None, false], d={'k': 'it\\'s'}), g()]",
        "",
        [("f", '{"a": 1, "b": "x)]", "c": [true, null, false], "d": {"k": "it\'s"}}'), ("g", "{}")],
    ),
    "pythonic marked": (
        "pythonic",
        "<|python_start|>[get-weather(x=-1.5)]<|python_end|>",
        "",
        [("get-weather", '{"x": -1.5}')],
    ),
    "pythonic list": ("pythonic", " [1, 2]", " [1, 2]", []),
    "pythonic names": ("pythonic", "[f, g]", "[f, g]", []),
    "pythonic unknown": ("pythonic", "[print(1)]", "[print(1)]", []),
    "pythonic code": ("pythonic", "[f(a=open('x'))]", "[f(a=open('x'))]", []),
    "pythonic positional": ("pythonic", "[f(1)]", "[f(1)]", []),
    "pythonic link": ("pythonic", "[f](https://x.org) is", "[f](https://x.org) is", []),
    "mistral": (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "f", "arguments": {A}, "id": "abcdefghi"}}, {{"name": "g", "arguments": {B}}}]',
        "",
        [("f", A), ("g", B)],
    ),
    "mistral tight": ("mistral", f'ok[TOOL_CALLS][{{"name": "f", "arguments": {A}}}]', "ok", [("f", A)]),
    "mistral near": ("mistral", "[TOOL] [[TOOL_CALLS [1]", "[TOOL] [[TOOL_CALLS [1]", []),
    "mistral bad": ("mistral", "[TOOL_CALLS] [1]", "[TOOL_CALLS][1]", []),
    "v11": ("mistral_v11", f"[TOOL_CALLS]f[ARGS]{A}[TOOL_CALLS]g[ARGS]{B}", "", [("f", A), ("g", B)]),
    "v11 bare": ("mistral_v11", f"Look. [TOOL_CALLS]f{A}", "Look.", [("f", A)]),
    "v11 id": ("mistral_v11", f"[TOOL_CALLS]f[CALL_ID]abcDEF123[ARGS]{A}", "", [("f", A)]),
    "v11 text": ("mistral_v11", "[TOOL_CALLS]" + "x" * 300, "[TOOL_CALLS]" + "x" * 300, []),
}


def read(pieces, *options, end="stop", **more) -> tuple[list[Delta], str]:
    parser = OutputParser(*options, **more)
    deltas = [delta for piece in pieces for delta in parser.feed(piece)]
    rest, reason = parser.finish(end)
    return deltas + rest, reason


def told(deltas: list[Delta]) -> tuple[str, str, list[tuple[str, str]]]:
    """Thoughts, text and calls, put together as clients do; ids are checked on the way."""
    calls: list[list[str]] = []
    ids = set()
    for delta in deltas:
        if delta.kind == "tool_start":
            assert delta.index == len(calls) and delta.name and delta.call_id not in ids
            ids.add(delta.call_id)
            calls.append([delta.name, ""])
        elif delta.kind == "tool_arguments":
            assert delta.index == len(calls) - 1 and delta.text
            calls[-1][1] += delta.text
        else:
            assert delta.text
    thoughts, text = ("".join(d.text for d in deltas if d.kind == kind) for kind in ("reasoning", "text"))
    return thoughts, text, [(name, arguments) for name, arguments in calls]


@pytest.mark.parametrize("name", WHOLE)
def test_any_cutting_gives_the_same(name):
    form, whole, text, calls = WHOLE[name]
    reason = "tool_calls" if calls else "stop"
    cuts = [[whole], list(whole), *([whole[:at], whole[at:]] for at in range(len(whole)))]
    generator = random.Random(0)
    for _ in range(20):
        at = sorted(generator.sample(range(len(whole) + 1), min(3, len(whole))))
        cuts.append([whole[a:b] for a, b in zip([0, *at], [*at, len(whole)], strict=True)])
    for pieces in cuts:
        deltas, ended = read(pieces, form, TOOLS)
        assert (told(deltas), ended) == (("", text, calls), reason)
    for _, arguments in calls:
        json.loads(arguments)


@pytest.mark.parametrize("name", WHOLE)
def test_every_beginning_of_an_answer_is_one(name):
    """Cut by a limit anywhere: nothing hangs, nothing is said twice, and the reason stays."""
    form, whole, _, calls = WHOLE[name]
    for end in range(len(whole)):
        deltas, reason = read([whole[:end]], form, TOOLS, end="length")
        assert reason == "length"
        _, _, begun = told(deltas)
        for (known, arguments), (wanted, complete) in zip(begun, calls, strict=False):
            assert known == wanted and (complete.startswith(arguments) or form == "pythonic")


MARKERS = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<|python_start|>", "<|python_end|>")
BEGINNINGS = {marker[:length] for marker in MARKERS for length in range(len(marker))}


@pytest.mark.parametrize("name", [name for name, (_, _, _, calls) in WHOLE.items() if calls])
@pytest.mark.parametrize("end", ["length", "stop"])
def test_half_a_call_is_neither_text_nor_finished(name, end):
    """Whatever cuts it, a limit or a stop word: what is said is the answer's text, but for a marker's own beginning."""
    form, whole, text, _ = WHOLE[name]
    for at in range(len(whole)):
        deltas, reason = read([whole[:at]], form, TOOLS, end=end)
        _, said, calls = told(deltas)
        if reason == "tool_calls":
            assert all(isinstance(json.loads(arguments), dict) for _, arguments in calls)
        elif reason == "stop":
            assert not calls
        if end == "length" or reason == "length":
            assert any(text.startswith(said.removesuffix(part).rstrip()) for part in BEGINNINGS), whole[:at]


@pytest.mark.parametrize(
    ("form", "text", "said"),
    [
        ("hermes", 'Look. <tool_call>\n{"name": "f', "Look."),
        ("hermes", '<tool_call>\n{"name": "f"', ""),
        ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": "x', ""),
        ("llama3_json", '{"name": "f", "parameters": {"a": ', ""),
        ("llama3_json", '<|python_tag|>{"name": "', ""),
        ("pythonic", "[f(a=1), g(b=", ""),
        ("mistral", "Look.\n[TOOL_CALLS] [{", "Look."),
        ("mistral_v11", '[TOOL_CALLS]f[ARGS]{"a"', ""),
    ],
)
@pytest.mark.parametrize("named", [True, False])
def test_a_call_that_a_stop_word_cuts_is_not_to_be_made(form, text, said, named):
    deltas, reason = read([text], form, TOOLS, named=named)
    assert (told(deltas)[1], reason) == (said, "length")


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", "It is <tool_call>"),
        ("llama3_json", '{"name": "'),
        ("llama3_json", "{"),
        ("pythonic", "[f"),
    ],
)
def test_what_ends_by_itself_before_it_is_a_call_is_text(form, text):
    deltas, reason = read([text], form, TOOLS)
    assert (told(deltas), reason) == (("", text, []), "stop")
    assert told(read([text], form, TOOLS, end="length")[0])[1] in ("", "It is")


def test_json_that_was_cut_is_shown_unless_it_could_be_a_call():
    for text in ('{"name": "Ann', '{"type": "a long', '{"id": "5', "[1, 2", "[print(", "[x"):
        form = "pythonic" if text.startswith("[") else "llama3_json"
        assert told(read([text], form, TOOLS, end="length")[0]) == ("", text, [])


@pytest.mark.parametrize("form", FORMATS)
def test_noise_never_breaks_a_parser(form):
    generator = random.Random(1)
    words = ["<tool_call>", "</tool_call>", '{"name": "f"', ', "arguments": ', "{", "}", "[", "]", '"', "\\"]
    words += [",", ":", "f(", ")", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "</think>", "<think>"]
    words += [" ", "\n", "x", "f", "1", ";", "="]
    for _ in range(500):
        text = "".join(generator.choices(words, k=generator.randrange(12)))
        for reasoning in Reasoning:
            whole = told(read([text], form, TOOLS, reasoning)[0])
            assert told(read(text, form, TOOLS, reasoning)[0]) == whole
            said = whole[0] + whole[1] + "".join(name + arguments for name, arguments in whole[2])
            assert (
                len(said) <= len(text) + 2 * len(whole[2]) + 8
            )  # "{}" for a call without arguments, JSON's spaces


@pytest.mark.parametrize(
    ("text", "reasoning", "wanted"),
    [
        ("<think>\nhm < 5\n</think>\n\nYes", Reasoning.POSSIBLE, ("hm < 5\n", "Yes", [])),
        ("\n<think>hm</think>" + hermes("f", A), Reasoning.POSSIBLE, ("hm", "", [("f", A)])),
        ("<think>\n\n</think>\n\nYes", Reasoning.POSSIBLE, ("", "Yes", [])),
        ("Yes <think>", Reasoning.POSSIBLE, ("", "Yes <think>", [])),
        ("<thin", Reasoning.POSSIBLE, ("", "<thin", [])),
        ("<think>hm", Reasoning.POSSIBLE, ("hm", "", [])),
        ("", Reasoning.POSSIBLE, ("", "", [])),
        ("hm </thin </think>\nYes\n", Reasoning.OPEN, ("hm </thin ", "Yes\n", [])),
        ("hm", Reasoning.OPEN, ("hm", "", [])),
        ("</think>Yes", Reasoning.OPEN, ("", "Yes", [])),
        (f"I could {hermes('f', A)}</think>Yes", Reasoning.OPEN, (f"I could {hermes('f', A)}", "Yes", [])),
        ("<think>hm</think>Yes", Reasoning.NONE, ("", "<think>hm</think>Yes", [])),
    ],
)
def test_thoughts(text, reasoning, wanted):
    for pieces in ([text], text, *([text[:at], text[at:]] for at in range(len(text)))):
        assert told(read(pieces, "hermes", TOOLS, reasoning)[0]) == wanted
        if not wanted[2] and "<tool_call>" not in text:
            assert told(read(pieces, None, None, reasoning)[0]) == wanted


def test_finish_reasons():
    call = hermes("f", B)
    assert read([call], "hermes", TOOLS)[1] == "tool_calls"
    assert read([call], "hermes", TOOLS, named=True)[1] == "stop"
    assert read([call], "hermes", TOOLS, end="length")[1] == "length"
    assert read(["Yes"], "hermes", TOOLS)[1] == "stop"
    assert read(["Yes"], None, None, end="cancelled")[1] == "cancelled"


def test_one_call_only_if_so_asked():
    deltas, reason = read([hermes("f", A) + "\n" + hermes("g", B)], "hermes", TOOLS, parallel=False)
    assert (told(deltas), reason) == (("", "", [("f", A)]), "tool_calls")


def test_text_is_not_held_back_without_need():
    parser = OutputParser("hermes", TOOLS, Reasoning.POSSIBLE)
    assert [delta.text for delta in parser.feed("Hello")] == ["Hello"]
    assert [delta.text for delta in parser.feed(" <b")] == [" <b"]
    assert parser.feed("<tool_c") == []
    assert [delta.text for delta in parser.feed("o")] == ["<tool_co"]
    start, arguments = parser.feed('<tool_call>{"name": "f", "arguments": {"a"')
    assert (start.kind, start.name, arguments.text) == ("tool_start", "f", '{"a"')
    assert [delta.text for delta in parser.feed(': "b')] == [': "b']


def test_ids_have_the_form_that_the_family_takes_back():
    for form, text, length in (("hermes", hermes("f", B), 29), ("mistral_v11", "[TOOL_CALLS]f[ARGS]{}", 9)):
        ids = {delta.call_id for _ in range(50) for delta in read([text], form, TOOLS)[0] if delta.call_id}
        assert len(ids) == 50 and {len(call_id) for call_id in ids} == {length}
