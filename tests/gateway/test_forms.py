"""Parameters and forms that need no server."""

from __future__ import annotations

from typing import Any

import pytest

from flightline.gateway import errors
from flightline.gateway.forms import Counts
from flightline.gateway.job import Job
from flightline.gateway.logprobs import FLOOR, CompletionLogprobs, TokenNames, chat_entries
from flightline.gateway.params import CHAT, COMPLETIONS, TABLE, Rule, parse
from flightline.gateway.upstream import Piece
from flightline.torch_engine.text.stream import TokenBytes

TOKENS = TokenBytes([b"ab", "é".encode(), b"\xf0\x9f", b"\x99\x82", b""], special={4: b"<end>"})


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
def test_every_parameter_is_handled(endpoint: str) -> None:
    """Neutral values pass, others of refused fields do not, null is nothing; what is in no table is refused."""
    for parameter in TABLE:
        if endpoint not in parameter.endpoints:
            continue
        assert parse({parameter.name: None}, endpoint).get(parameter.name) == parameter.default
        if parameter.rule is Rule.REFUSED:
            for value in parameter.neutral:
                parse({parameter.name: value}, endpoint)
            with pytest.raises(errors.ApiError, match=f"^{parameter.name} is not supported") as refused:
                parse({parameter.name: "nonsense"}, endpoint)
            assert (refused.value.status, refused.value.param) == (400, parameter.name)
    with pytest.raises(errors.ApiError, match="nonsense is not a parameter"):
        parse({"nonsense": 1}, endpoint)


@pytest.mark.parametrize(
    "body",
    [
        {"temperature": True},
        {"temperature": float("nan")},
        {"top_p": 1.1},
        {"n": 129},
        {"n": 1.0},
        {"stop": [1]},
        {"stop": ["a"] * 65},
        {"stop_token_ids": [-1]},
        {"stop_token_ids": "1"},
        {"logit_bias": {"-1": 1}},
        {"logit_bias": {"1": 101}},
        {"logit_bias": {"9" * 5000: 1}},
        {"logit_bias": {"²": 1}},
        {"best_of": True},
        {"best_of": 2},
        {"stream": 1},
        {"seed": 2**64},
        {"model": 5},
        {"stream_options": []},
    ],
)
def test_wrong_values(body: dict[str, Any]) -> None:
    (name,) = body
    with pytest.raises(errors.ApiError) as refused:
        parse(body, COMPLETIONS)
    assert (refused.value.status, refused.value.param) == (400, name)
    assert len(refused.value.message) <= errors.MOST_SHOWN


def test_best_of_as_many_as_there_are_passes() -> None:
    """LangChain sends it along with ``n``."""
    assert parse({"n": 3, "best_of": 3}, COMPLETIONS) == parse({"n": 3}, COMPLETIONS)
    with pytest.raises(errors.ApiError, match=r"^best_of is not supported"):
        parse({"n": 2, "best_of": 3}, COMPLETIONS)


def test_a_models_own_defaults_come_before_ours() -> None:
    assert parse({}, CHAT, {"temperature": 0.6})["temperature"] == 0.6
    assert parse({"temperature": 0.1}, CHAT, {"temperature": 0.6})["temperature"] == 0.1


def test_log_probabilities_have_the_bytes_of_their_tokens() -> None:
    piece = Piece(0, "abé🙂", 4, "stop", [0, 1, 2, 3, 4], [-0.5, -1.0, -2.0, float("-inf"), 0.0])
    entries = chat_entries(piece, 0, TokenNames(TOKENS, as_ids=False))
    assert [entry["token"] for entry in entries] == ["ab", "é", r"bytes:\xf0\x9f", r"bytes:\x99\x82", "<end>"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries[:4]).decode() == piece.text
    assert entries[3]["logprob"] == FLOOR
    logprobs = CompletionLogprobs(0, TokenNames(TOKENS, as_ids=True))
    made = logprobs.entries(piece)
    assert made["text_offset"] == [0, 2, 3, 3, 4] and made["tokens"][1] == "token_id:1"
    assert logprobs.entries(Piece(0, token_ids=[0], log_probs=[-1.0]))["text_offset"] == [9]


def test_a_prompts_log_probabilities_stand_before_all_others() -> None:
    """The special token before the text is none of it; one that was written there is."""
    piece = Piece(
        0, "ab", token_ids=[0], log_probs=[-1.0], top_ids=[0], top_log_probs=[-1.0],
        prompt_log_probs=[-0.5, -2.0, -3.0], prompt_top_ids=[0, 0, -1], prompt_top_log_probs=[-0.5, -0.25, 0.0],
    )  # fmt: skip
    logprobs = CompletionLogprobs(1, TokenNames(TOKENS, as_ids=False))
    made = logprobs.prompt([4, 0, 1, 4], "abé<end>", piece)
    assert made["tokens"] == ["<end>", "ab", "é", "<end>"] and made["token_logprobs"] == [
        None,
        -0.5,
        -2.0,
        -3.0,
    ]
    assert made["top_logprobs"] == [None, {"ab": -0.5}, {"ab": -0.25, "é": -2.0}, {"<end>": -3.0}]
    assert made["text_offset"] == [0, 0, 2, 3] and logprobs.entries(piece)["text_offset"] == [8]
    with pytest.raises(errors.ApiError, match="no log-probabilities of the prompt"):
        logprobs.prompt([0, 1], "abé", Piece(0))


@pytest.mark.parametrize(
    ("ids", "text", "offsets"),
    [
        ([3, 0, 1], "\ufffd\ufffdabé", [0, 2, 4]),
        ([0, 2, 1], "ab\ufffdé", [0, 2, 3]),
        ([2, 2, 3], "\ufffd🙂", [0, 1, 1]),
    ],
)
def test_offsets_beside_characters_that_are_cut(ids: list[int], text: str, offsets: list[int]) -> None:
    """As harnesses cut contexts: where a token ends."""
    assert TOKENS.decode(ids) == text
    piece = Piece(0, prompt_log_probs=[-1.0] * (len(ids) - 1))
    made = CompletionLogprobs(0, TokenNames(TOKENS, as_ids=False)).prompt(ids, text, piece)
    assert made["text_offset"] == offsets


def test_tokens_are_counted_by_pieces_until_their_number_is_told() -> None:
    """A client may leave before."""
    counts = Counts(Job("m", [[1, 2]], [], 1, True), TokenBytes([]))
    for piece, count in (
        (Piece(0, "a"), 1),
        (Piece(0, ""), 1),
        (Piece(0, "bc"), 2),
        (Piece(0, "", 7, "stop"), 7),
    ):
        counts.note(piece)
        assert counts.generated == count


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("the queue is full: 256 requests are waiting", 429),
        ("sequence_index 1: the engine process ended while this request was in flight", 503),
        ("the server is stopping and takes no new requests", 503),
        ("temperature is 9: it must be finite", 400),
        ("the grammar cannot go on: no token of this model can follow", 400),
        ("something broke\nTraceback: secret", 500),
        ("Request timeout expired", 504),
    ],
)
def test_tritons_texts_get_a_status(text: str, status: int) -> None:
    error = errors.of_triton(text)
    assert error.status == status and "Traceback" not in error.message
