"""What Dynamo's frontend asks, as the engine is asked; nothing that changes an answer is dropped."""

from __future__ import annotations

from typing import Any

import pytest

from flightline.dynamo_worker.request import FINISH, chunk, request_of
from flightline.gateway.logprobs import FLOOR, TokenNames
from flightline.torch_engine.core.request import FinishReason, RequestError, RequestOutput
from flightline.torch_engine.text.stream import TokenBytes

NAMES = TokenNames(TokenBytes([b"a", b"\xc3", b" b"]), as_ids=False)


def body(sampling: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"token_ids": [5, 6, 7], "sampling_options": sampling or {}, **more}


def test_openais_defaults() -> None:
    asked = request_of(body(), 100)
    assert (asked.prompt_ids, asked.max_tokens, asked.end_id) == ([5, 6, 7], 97, None)
    assert not asked.sampling.greedy and asked.sampling.temperature == 1.0 and asked.guide is None


def test_everything_at_once() -> None:
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "seed": -1}
    sampling |= {"presence_penalty": 0.1, "frequency_penalty": 0.2, "repetition_penalty": 1.1, "n": 1}
    stop = {"max_tokens": 9, "min_tokens": 2, "stop": ["END"], "stop_token_ids": [3]}
    stop |= {"stop_token_ids_hidden": [2]}
    asked = request_of(body(sampling, stop_conditions=stop, output_options={"logprobs": 4}), 100)
    assert (asked.max_tokens, asked.min_tokens, asked.stop, asked.stop_ids) == (9, 2, (b"END",), (2, 3))
    drawn = asked.sampling
    assert (drawn.temperature, drawn.top_p, drawn.top_k, drawn.min_p) == (0.5, 0.9, 40, 0.1)
    assert (drawn.presence_penalty, drawn.frequency_penalty, drawn.repetition_penalty) == (0.1, 0.2, 1.1)
    assert drawn.seed == 2**64 - 1
    assert (asked.return_log_probs, asked.top_log_probs) == (True, 4)


def test_greedy_and_no_end() -> None:
    asked = request_of(
        body({"temperature": 0}, stop_conditions={"ignore_eos": True, "stop_token_ids_hidden": [2]}), 9
    )
    assert asked.sampling.greedy and asked.end_id == -1 and asked.stop_ids == ()


@pytest.mark.parametrize(
    ("guided", "kind"),
    [
        ({"json": {"type": "object"}}, "json_schema"),
        ({"regex": "[ab]+", "backend": "xgrammar"}, "regex"),
        ({"choice": ["yes", "no"]}, "regex"),
        ({"grammar": 'root ::= "a"'}, "ebnf_grammar"),
    ],
)
def test_guides_are_enforced(guided: dict[str, Any], kind: str) -> None:
    guide = request_of(body({"guided_decoding": guided}), 100).guide
    assert guide is not None and guide.type == kind


@pytest.mark.parametrize(
    ("asks", "says"),
    [
        (body({"guided_decoding": {"json": {"type": "array", "uniqueItems": True}}}), "uniqueItems"),
        (body({"guided_decoding": {"regex": "a", "whitespace_pattern": " "}}), "whitespace_pattern"),
        (body({"guided_decoding": {"regex": "a", "choice": ["b"]}}), "exactly one"),
        (body({"n": 2}), "ask n times"),
        (body({"use_beam_search": True}), "no beam search"),
        (body({"best_of": 3}), "best_of"),
        (body(output_options={"prompt_logprobs": 1}), "prompt_logprobs"),
        (body({"temperature": -1.0}), "temperature is -1.0"),
        (body({"presence_penalty": float("nan")}), "presence_penalty"),
        (body(multi_modal_data={"image": [1]}), "text only"),
        ({"token_ids": list(range(100))}, "the prompt has 100 tokens and the context 100"),
    ],
)
def test_the_rest_is_refused_by_name(asks: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        request_of(asks, 100)


def test_every_reason_has_a_word() -> None:
    assert set(FINISH) == set(FinishReason) - {FinishReason.ERROR}


def test_answers() -> None:
    piece = RequestOutput([0, 1], log_probs=[-0.5, float("-inf")], num_input_tokens=3, num_output_tokens=2)
    piece.top_log_probs = [[(0, -0.5)], [(2, -0.1), (1, float("-inf"))]]
    assert chunk(piece, None) == {"token_ids": [0, 1], "index": 0}
    piece.finish_reason = FinishReason.END_ID
    made = chunk(piece, NAMES)
    assert made["log_probs"] == [-0.5, FLOOR] and made["finish_reason"] == "stop"
    assert [[each["token"] for each in place] for place in made["top_logprobs"]] == [
        ["a"],
        [" b", "bytes:\\xc3"],
    ]
    assert made["top_logprobs"][1][1] == {
        "rank": 2,
        "token_id": 1,
        "token": "bytes:\\xc3",
        "logprob": FLOOR,
        "bytes": [0xC3],
    }
    assert made["completion_usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
