"""Guided decoding through every endpoint of a real server: NVIDIA's two tensors, and what each endpoint refuses."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
import pytest

from flightline.supervisor.serve import Server
from tests.model_repository.endpoints import Call, GrpcError, ask, idle, in_pieces, post, wait_until
from tests.torch_engine.test_guided import SCHEMA

pytestmark = pytest.mark.slow
ENDPOINTS = ["ensemble", "text_generation", "tensorrt_llm_bls"]
WILD = {"temperature": 1.0, "top_p": 1.0}


def guide(kind: str | bytes, text: str | bytes | None = None) -> dict[str, Any]:
    made = {"guided_decoding_guide_type": kind, "guided_decoding_guide": text}
    return {name: value for name, value in made.items() if value is not None}


HELD = guide("json_schema", json.dumps(SCHEMA))


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_answers_keep_to_a_schema(served: Server, endpoint: str) -> None:
    for seed in range(4):
        answer = ask(served, endpoint, "the fox", 120, seed=seed, **WILD, **HELD)
        jsonschema.validate(json.loads(answer.text), SCHEMA)
    streamed = in_pieces(served, endpoint, 2, prompt="the fox", max_tokens=120, seed=0, **WILD, **HELD)
    assert streamed.text == ask(served, endpoint, "the fox", 120, seed=0, **WILD, **HELD).text


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize(
    ("kind", "text", "pattern"),
    [
        ("regex", "[a-f]{3,9}z", "[a-f]{3,9}z"),
        ("ebnf_grammar", 'root ::= "ab" | "cd" [0-9]', "ab|cd[0-9]"),
        ("lark", 'start: "<" /[0-9]{2}/ ">"', "<[0-9]{2}>"),
    ],
)
def test_other_guides(served: Server, endpoint: str, kind: str, text: str, pattern: str) -> None:
    assert re.fullmatch(pattern, ask(served, endpoint, "the fox", 40, **WILD, **guide(kind, text)).text)


def test_how_it_ended_and_how_many(served: Server) -> None:
    """Several answers; each is told to have ended by itself, with ``ignore_eos`` too."""
    asked = {"return_finish_reason": True, "return_num_output_tokens": True, "num_return_sequences": 3}
    for extra in ({}, {"ignore_eos": True}, {"min_tokens": 100}):
        answer = ask(served, "text_generation", "the fox", 120, **asked, **WILD, **HELD, **extra)
        assert [reason.ravel()[0] for reason in answer.column("finish_reason")] == [b"end_id"] * 3
        for text in answer.texts:
            jsonschema.validate(json.loads(text), SCHEMA)


BAD = [
    (guide("xml", "x"), "guided_decoding_guide_type is 'xml': it must be one of json, json_schema, regex"),
    (guide("regex"), "guided_decoding_guide is empty: regex needs one"),
    ({"guided_decoding_guide": "{}"}, "guided_decoding_guide_type is missing: it must be one of json"),
    (
        guide("json_schema", '{"uniqueItems": true}'),
        "guided_decoding_guide has the keyword 'uniqueItems' at #",
    ),
    (guide("json_schema", '{"name": "x", "schema": {}}'), "guided_decoding_guide is OpenAI's wrapper"),
    (guide("json_schema", "{"), "guided_decoding_guide is not JSON"),
    (guide("regex", "("), "guided_decoding_guide cannot be enforced"),
    (guide("regex", b"\xff"), "guided_decoding_guide is not UTF-8"),
    (guide("regex", "a" * 20_000), "guided_decoding_guide has more than 16384 bytes"),
]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize(("change", "message"), BAD)
def test_what_cannot_be_enforced(served: Server, endpoint: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(GrpcError, match=re.escape(message)):
        Call(served, endpoint, {"text_input": "the dog", "max_tokens": 4, **change}).read()
    wait_until(lambda: idle(served))


@pytest.mark.parametrize("endpoint", ["ensemble", "text_generation"])
def test_over_http(served: Server, endpoint: str) -> None:
    body = {"text_input": "the fox", "max_tokens": 120, "exclude_input_in_output": True, "seed": 3, **WILD}
    answer = post(served, endpoint, {**body, **HELD})
    assert answer.status == 200
    jsonschema.validate(json.loads(answer.text), SCHEMA)
    bad = post(served, endpoint, {**body, **BAD[3][0]})
    assert (bad.status, "'uniqueItems'" in bad.error) == (400, True)


def test_empty_tensors_ask_for_nothing(served: Server) -> None:
    free = ask(served, "text_generation", "the fox", 12).text
    assert ask(served, "text_generation", "the fox", 12, **guide("", "")).text == free


def test_the_baseline_refuses(served: Server) -> None:
    with pytest.raises(GrpcError, match="guided_decoding_guide is given: the baseline is plain generate"):
        ask(served, "hf_baseline", "the fox", 4, **HELD)
