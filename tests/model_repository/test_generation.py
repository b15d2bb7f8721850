"""What is told about tokens is the same whichever engine has generated them."""

from __future__ import annotations

import pytest
import torch

from flightline.model_repository.shared import responses
from flightline.model_repository.shared.generation import Progress
from flightline.model_repository.shared.tensors import Options
from flightline.torch_engine.core.request import (
    Code,
    FinishReason,
    GenerationRequest,
    PerfMetrics,
    RequestOutput,
)
from flightline.torch_engine.core.sequence import Sequence
from flightline.torch_engine.text.stream import TokenBytes

TOKENS = TokenBytes([b"a", b"b", b"say STOP", b"sa", b"s", b"y", b" ", b"ST", b"OP"])


def by_sequence(request: GenerationRequest, ids: list[int]) -> RequestOutput:
    sequence, whole = Sequence.start("key", request, (), TOKENS, 1), RequestOutput()
    for token in ids:
        output = sequence.append(token, -1.0 - token, 2)
        if output is not None:
            whole.extend(output)
    return whole


def by_progress(request: GenerationRequest, ids: list[int]) -> RequestOutput:
    whole = RequestOutput()
    progress = Progress(request, whole.extend, TOKENS, frozenset(), PerfMetrics())
    for token in ids:
        progress.take(token, -1.0 - token)
    return whole


@pytest.mark.parametrize(
    ("ids", "text", "count"),
    [([0, 2], "asay ", 4), ([0, 1, 7, 8], "ab", 2), ([0, 7, 1], "aSTb", 3)],
    ids=["a word inside a token", "a word of two tokens", "no word"],
)
@pytest.mark.parametrize("stream", [True, False])
def test_counts_ids_and_log_probs_agree(ids: list[int], text: str, count: int, stream: bool) -> None:
    request = GenerationRequest([1], 9, stop=(b"STOP",), return_log_probs=True, stream=stream)
    if text == "aSTb":
        request = GenerationRequest([1], 3, stop=(b"STOP",), return_log_probs=True, stream=stream)
    for whole in (by_sequence(request, ids), by_progress(request, ids)):
        assert whole.finish_reason is (FinishReason.LENGTH if text == "aSTb" else FinishReason.STOP)
        assert whole.text == text == TOKENS.decode(whole.token_ids)
        assert whole.num_output_tokens == len(whole.token_ids) == len(whole.log_probs) == count
        assert whole.cum_log_prob == pytest.approx(sum(whole.log_probs))


def test_a_row_of_the_baseline_that_fails_leaves_the_others_theirs() -> None:
    from flightline.model_repository.shared.transformers_engine import _Watcher

    outputs: list[RequestOutput] = [RequestOutput(), RequestOutput()]
    jobs = [
        Progress(GenerationRequest([1], 2), output.extend, TOKENS, frozenset(), PerfMetrics())
        for output in outputs
    ]
    jobs[0]._output = None  # type: ignore[assignment]
    watcher = _Watcher(jobs, None)
    assert watcher(torch.tensor([[0], [0]]), None).tolist() == [True, False]
    assert watcher(torch.tensor([[0, 1], [0, 1]]), None).tolist() == [True, True]
    assert outputs[0].error is not None and outputs[0].error.code is Code.INTERNAL
    assert outputs[1].text == "ab" and outputs[1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("at_end", [False, True])
def test_a_count_may_be_left_to_the_last_response(at_end: bool) -> None:
    options = Options(stream=True, num_output_tokens=True, counts_at_end=at_end)
    told = [
        "num_output_tokens" in responses.details(RequestOutput([1], "b", finish_reason=reason), options, 0, 1)
        for reason in (None, FinishReason.LENGTH)
    ]
    assert told == [not at_end, True]


def test_a_prompts_log_probabilities_have_tensors_of_their_own() -> None:
    output = RequestOutput([1], "b", prompt_log_probs=[-1.0, -2.0], prompt_top_log_probs=[[(5, -0.5)], []])
    made = responses.details(output, Options(prompt_log_probs=True, top_log_probs=1), 0, 1)
    assert made["prompt_log_probs"]().tolist() == [[-1.0, -2.0]]
    assert made["prompt_top_token_ids"]().tolist() == [[[5], [responses.NO_TOKEN]]]
    assert made["prompt_top_log_probs"]().tolist() == [[[-0.5], [0.0]]]
    assert "prompt_log_probs" not in responses.details(output, Options(top_log_probs=1), 0, 1)
    assert "prompt_log_probs" not in responses.details(RequestOutput(), Options(prompt_log_probs=True), 0, 1)
