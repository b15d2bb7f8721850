"""What ``response_format`` and its kin become, checked in llguidance as the engine will run it."""

from __future__ import annotations

import json

import llguidance
import pytest

from flightline.gateway.chat.guides import Guide, Reasoning, response_format
from flightline.torch_engine.core.request import Code, RequestError
from tests.gateway.chat.matching import accepts

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
JSON = Guide("json_schema", json.dumps(SCHEMA))


@pytest.mark.parametrize(
    ("body", "guide"),
    [
        ({}, None),
        ({"response_format": None, "guided_json": None}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Guide("json_schema", '{"type": "object"}')),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, JSON),
        ({"response_format": {"type": "text"}, "guided_json": SCHEMA}, JSON),
        ({"guided_json": json.dumps(SCHEMA)}, JSON),
        ({"structured_outputs": {"json": SCHEMA, "regex": None, "disable_any_whitespace": False}}, JSON),
        ({"structured_outputs": {"json_object": True}}, Guide("json_schema", '{"type": "object"}')),
        ({"structured_outputs": {"regex": "a+"}}, Guide("regex", "a+")),
        ({"guided_choice": ["a.b", "c|d"]}, Guide("regex", r"a\.b|c\|d")),
        ({"guided_grammar": 'root ::= "a"'}, Guide("ebnf_grammar", 'root ::= "a"')),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Guide("lark", 'start: "a"')),
        (
            {"structured_outputs": {"structural_tag": {"triggers": ["<f"]}}},
            Guide("structural_tag", '{"triggers": ["<f"]}'),
        ),
    ],
)
def test_every_form(body, guide):
    assert response_format(body) == guide


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"response_format": "json"}, "response_format.type is None"),
        ({"response_format": {"type": "xml"}}, "response_format.type is 'xml'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema is missing"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, "schema is 5"),
        ({"guided_json": "{"}, "guided_json is no JSON"),
        ({"guided_regex": ""}, "guided_regex is ''"),
        ({"guided_choice": []}, "guided_choice is []"),
        ({"guided_choice": ["a", 1]}, "guided_choice[1] is 1"),
        ({"structured_outputs": {}}, "structured_outputs has nothing"),
        ({"structured_outputs": []}, "structured_outputs is []"),
        ({"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs has json, regex"),
        (
            {"structured_outputs": {"regex": "a", "whitespace_pattern": " "}},
            "structured_outputs.whitespace_pattern",
        ),
        ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object is 1"),
        ({"structured_outputs": {"structural_tag": 1}}, "structured_outputs.structural_tag is 1"),
        (
            {"response_format": {"type": "json_object"}, "guided_regex": "a"},
            "response_format and guided_regex are given",
        ),
    ],
)
def test_bad_forms_are_refused_by_name(body, told):
    with pytest.raises(RequestError) as caught:
        response_format(body)
    assert caught.value.code is Code.INVALID_ARG and told in caught.value.message


GUIDES = [
    (JSON, '{"a": 1}', '{"a": "x"}'),
    (Guide("regex", "a/b|c\\/d"), "a/b", "b"),
    (response_format({"guided_choice": ["a.b", "x y\n[z]"]}), "x y\n[z]", "a-b"),
    (Guide("lark", 'start: "a" rest\nrest: "b" start | "c"\n'), "abac", "ab"),
]


@pytest.mark.parametrize(("guide", "good", "bad"), GUIDES)
def test_a_guide_behind_thoughts(guide, good, bad):
    assert guide.beside(Reasoning.NONE) is guide
    opened, possible = guide.beside(Reasoning.OPEN), guide.beside(Reasoning.POSSIBLE)
    assert opened.type == possible.type == "lark"
    thoughts = "hm, <b>x</b> é\n\n"
    for answer, fits in ((good, True), (bad, False)):
        for space in ("", "\n\n"):
            assert accepts(opened, f"{thoughts}</think>{space}{answer}") is fits
            assert accepts(possible, f"<think>{thoughts}</think>{space}{answer}") is fits
        assert accepts(possible, answer) is fits
        assert not accepts(opened, answer)
    assert not accepts(opened, thoughts)


def test_what_asks_for_nothing_is_no_obstacle_behind_thoughts():
    schema = {"type": "array", "uniqueItems": False, "items": {"type": "string", "format": "password"}}
    guide = response_format({"guided_json": schema})
    assert guide is not None
    assert accepts(guide.beside(Reasoning.OPEN), 'hm</think>["ü"]')
    named = {"type": "object", "properties": {"format": {"enum": ["password"]}}, "required": ["format"]}
    named["additionalProperties"] = False
    guide = response_format({"guided_json": named})
    assert guide is not None
    assert accepts(guide.beside(Reasoning.OPEN), 'hm</think>{"format": "password"}')
    assert not accepts(guide.beside(Reasoning.OPEN), 'hm</think>{"format": "x"}')


@pytest.mark.parametrize("kind", ["ebnf_grammar", "structural_tag"])
def test_a_guide_that_cannot_stand_behind_thoughts_says_so(kind):
    with pytest.raises(RequestError, match=f"{kind} cannot follow thoughts"):
        Guide(kind, "x").beside(Reasoning.OPEN)


def test_the_matcher_of_these_tests_can_refuse():
    assert llguidance.__version__
    assert accepts(Guide("regex", "ab"), "ab") and not accepts(Guide("regex", "ab"), "abc")
    with pytest.raises(ValueError, match="no grammar"):
        accepts(Guide("lark", "start: nothing"), "a")
