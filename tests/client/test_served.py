"""The client against real Triton and the real engine (a tiny random model)."""

from __future__ import annotations

import asyncio

import pytest

from flightline.client import AsyncClient, Client, DeadlineExceeded, InvalidRequest, ServerUnavailable
from flightline.client.wire import ENDPOINTS
from tests.client.waiting import eventually
from tests.serving import CONTEXT

pytestmark = pytest.mark.slow

LONG = {"max_tokens": CONTEXT - 100, "min_tokens": CONTEXT - 100}
PROMPT = "How far is it?"


@pytest.mark.parametrize("model", ENDPOINTS)
def test_stream_and_answer_are_the_same(served, model):
    with Client(served.settings.grpc_url, model) as llm:
        llm.check_ready()
        answer = llm.generate(PROMPT, max_tokens=12, min_tokens=12)
        chunks = list(llm.generate_stream(PROMPT, max_tokens=12, min_tokens=12))
    assert "".join(map(str, chunks)) == answer.text
    assert answer.num_output_tokens == chunks[-1].num_output_tokens == 12
    assert answer.num_input_tokens == chunks[-1].num_input_tokens > 0
    assert answer.finish_reason == "length"
    assert answer.log_probs == [] and answer.cum_log_prob is None
    times = answer.perf_metrics
    assert times.arrival_time_ns <= times.first_scheduled_time_ns <= times.first_token_time_ns
    assert times.first_token_time_ns < times.last_token_time_ns


@pytest.mark.parametrize("model", ENDPOINTS)
def test_parameters_reach_the_engine(served, model):
    with Client(served.settings.grpc_url, model) as llm:
        text = llm.generate(PROMPT, max_tokens=8, min_tokens=8).text
        sampled = [
            llm.generate(PROMPT, max_tokens=8, min_tokens=8, temperature=2.0, seed=s).text for s in (1, 1, 2)
        ]
        with_prompt = llm.generate(PROMPT, max_tokens=8, min_tokens=8, exclude_input_in_output=False)
    assert (with_prompt.text, with_prompt.num_output_tokens) == (PROMPT + text, 8)
    assert sampled[0] == sampled[1] != text  # a temperature alone samples, and a seed repeats
    assert sampled[2] != sampled[0]


@pytest.mark.parametrize("model", ["text_generation", "ensemble"])
def test_log_probs(served, model):
    with Client(served.settings.grpc_url, model) as llm:
        answer = llm.generate(PROMPT, max_tokens=6, min_tokens=6, return_log_probs=True)
        chunks = list(llm.generate_stream(PROMPT, max_tokens=6, min_tokens=6, return_log_probs=True))
    assert len(answer.log_probs) == 6
    assert answer.cum_log_prob == pytest.approx(sum(answer.log_probs), rel=1e-3)
    assert [p for chunk in chunks for p in chunk.log_probs] == pytest.approx(answer.log_probs, rel=1e-3)


def test_what_text_generation_adds(served):
    """Each field of its own arrives, and what it asks for comes back."""
    asked = {"max_tokens": 8, "temperature": 1.5, "seed": 3, "ignore_eos": True, "min_p": 0.01}
    told = {
        "return_token_ids": True,
        "return_finish_reason": True,
        "return_log_probs": True,
        "top_logprobs": 3,
    }
    with Client(served.settings.grpc_url) as llm:
        answer = llm.generate(PROMPT, **asked, **told)
        chunks = list(llm.generate_stream(PROMPT, **asked, **told))
        ends = {"stop_token_ids": answer.token_ids[4:5], "return_token_ids": True}
        stopped = llm.generate(PROMPT, **asked, **ends, return_finish_reason=True)
        bias = {"logit_bias_ids": [1], "logit_bias_weights": [100.0], "skip_special_tokens": False}
        spelled = llm.generate(PROMPT, **{**asked, "max_tokens": 2}, **bias)
    assert len(answer.token_ids) == len(answer.top_log_probs) == 8
    assert answer.finish_reason == chunks[-1].finish_reason == "length"
    assert [token for chunk in chunks for token in chunk.token_ids] == answer.token_ids
    assert [top for chunk in chunks for top in chunk.top_log_probs] == answer.top_log_probs
    for top, log_prob in zip(answer.top_log_probs, answer.log_probs, strict=True):
        assert len(top) == 3 and top[0][1] >= log_prob
    assert stopped.token_ids == answer.token_ids[: answer.token_ids.index(answer.token_ids[4])]
    assert stopped.finish_reason == "stop"
    assert spelled.text == "</s></s>"
    assert answer.perf_metrics.total_draft_tokens == answer.perf_metrics.acceptance_rate == 0


@pytest.mark.parametrize("model", ENDPOINTS)
def test_several_answers(served, model):
    asked = {"max_tokens": 6, "min_tokens": 6, "temperature": 2.0}
    with Client(served.settings.grpc_url, model) as llm:
        answers = llm.generate_all(PROMPT, seed=5, num_return_sequences=2, **asked)
        stream = list(llm.generate_stream(PROMPT, seed=5, num_return_sequences=2, **asked))
        assert [answer.sequence_index for answer in answers] == [0, 1]
        for index, answer in enumerate(answers):
            assert answer.text == llm.generate(PROMPT, seed=5 + index, **asked).text
            assert answer.text == "".join(chunk.text for chunk in stream if chunk.sequence_index == index)
            assert answer.num_output_tokens == 6
        with pytest.raises(InvalidRequest, match=r"num_return_sequences is 2: .* call generate_all"):
            llm.generate(PROMPT, num_return_sequences=2)

    async def go():
        async with AsyncClient(served.settings.grpc_url, model) as llm:
            return await llm.generate_all(PROMPT, seed=5, num_return_sequences=2, **asked)

    assert [answer.text for answer in asyncio.run(go())] == [answer.text for answer in answers]


@pytest.mark.parametrize("model", ENDPOINTS)
def test_errors_name_the_field(served, model):
    with Client(served.settings.grpc_url, model) as llm:
        with pytest.raises(InvalidRequest, match="max_tokens"):
            llm.generate(PROMPT, max_tokens=0)
        with pytest.raises(InvalidRequest, match="temperature"):
            llm.generate(PROMPT, temperature=float("nan"))
        assert llm.generate(PROMPT, max_tokens=2).text
    with Client(served.settings.grpc_url, "nonsense") as llm:
        with pytest.raises(InvalidRequest, match="nonsense"):
            llm.generate(PROMPT)
        with pytest.raises(ServerUnavailable, match="nonsense"):
            llm.check_ready()


@pytest.mark.parametrize("model", ["text_generation", "ensemble"])
def test_leaving_a_stream_frees_the_engine(served, model):
    stats = lambda: served.engine.stats  # noqa: E731
    assert eventually(lambda: stats().active_requests == 0)
    with Client(served.settings.grpc_url, model) as llm:
        stream = llm.generate_stream(PROMPT, **LONG)
        next(stream)
        assert eventually(lambda: stats().active_requests == 1)
        stream.close()
        assert eventually(lambda: stats().active_requests == 0 and stats().kv_blocks_used == 0)


@pytest.mark.parametrize("model", ["text_generation", "ensemble"])
def test_a_deadline_frees_the_engine(served, model):
    stats = lambda: served.engine.stats  # noqa: E731

    assert eventually(lambda: stats().active_requests == 0)
    before = stats().generated_tokens
    with Client(served.settings.grpc_url, model) as llm, pytest.raises(DeadlineExceeded):
        llm.generate(PROMPT, **LONG, timeout_s=0.3)
    assert eventually(lambda: stats().active_requests == 0 and stats().kv_blocks_used == 0)
    assert stats().generated_tokens - before < LONG["max_tokens"]


def test_many_streams_on_one_async_client(served):
    async def go():
        async with AsyncClient(served.settings.grpc_url) as llm:
            return await asyncio.gather(
                *(llm.generate(f"{i} apples", max_tokens=10, min_tokens=10) for i in range(24))
            )

    answers = asyncio.run(go())
    assert [answer.num_output_tokens for answer in answers] == [10] * 24
