"""Sampling and whole answers: seeds, penalties, ends, log-probabilities, and several answers to a prompt."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest

from flightline.torch_engine.core.request import (
    Code,
    FinishReason,
    GenerationRequest,
    RequestOutput,
    SamplingParams,
)
from flightline.torch_engine.core.sampling_state import SamplingState
from flightline.torch_engine.engine import Engine
from flightline.torch_engine.text.bad_words import BadWords
from tests.torch_engine.test_engine import PROMPT, one, run
from tests.torch_engine.test_speculation import eager

Make = Callable[..., Engine]
WARM = SamplingParams(temperature=1.3, top_p=1.0, seed=11)
KINDS = [
    WARM,
    SamplingParams(temperature=0.9, top_k=20, seed=12),
    SamplingParams(temperature=1.5, top_p=0.9, seed=2**64 - 1, repetition_penalty=1.4),
    SamplingParams(temperature=1.2, min_p=0.02, seed=0, presence_penalty=0.5, frequency_penalty=0.3),
    SamplingParams(),
]


def requests() -> list[GenerationRequest]:
    prompts = [[3 + (n * 7 + step * 5) % 90 for step in range(6 + 5 * n)] for n in range(len(KINDS))]
    return [
        GenerationRequest(
            prompt, 40, kind, end_id=-1, bad_ids=((5, 6), (9,)), min_tokens=3, return_log_probs=True
        )
        for prompt, kind in zip(prompts, KINDS, strict=True)
    ]


def answers(engine: Engine, asked: list[GenerationRequest]) -> list[list[int]]:
    outputs = [output.token_ids for output in engine.generate(asked)]
    engine.audit()
    return outputs


@pytest.mark.parametrize("compiled", [False, True])
def test_a_seeded_answer_is_what_it_is(make_engine: Make, library: str, compiled: bool) -> None:
    """Alone or in company, chunked, preempted, from cached blocks, and from another engine (as after a restart or with
    DP)."""
    if compiled and not library:
        pytest.skip("no C++ compiler")
    kernels = {"kernel_dir": library, "kernels": "native"} if compiled else {"kernels": "pytorch"}
    alone = [answers(make_engine(max_num_tokens=128, **kernels), [request])[0] for request in requests()]
    engine = make_engine(max_num_tokens=128, **kernels)
    assert answers(engine, requests()) == alone
    assert answers(engine, [*requests(), *requests()][::-1])[::-1] == alone + alone, (
        "from the prefix cache, too"
    )
    assert answers(make_engine(max_num_tokens=7, max_batch_size=5, **kernels), requests()) == alone, (
        "in chunks"
    )
    tight = make_engine(
        max_num_tokens=64, num_kv_blocks=32, batch_scheduler_policy="max_utilization", **kernels
    )
    assert answers(tight, requests()) == alone
    assert tight.scheduler.num_preemptions > 0


def test_guesses_do_not_change_what_is_drawn(make_engine: Make, parrot) -> None:
    """A guess is right if it is what would have been drawn: of every kind, with penalties, bad words, ends, stop words
    and log-probabilities; in chunks, preempted, from cached blocks, and with siblings."""
    asked = [
        GenerationRequest(
            [8, 7] * (4 + number),
            50,
            dataclasses.replace(kind, temperature=0.3 * kind.temperature, **penalties),
            end_id=end_id,
            bad_ids=((4, 5, 6), (8, 7, 8, 9)),
            min_tokens=20,
            stop_ids=stop_ids,
            stop=stop,
            return_log_probs=True,
            top_log_probs=number % 3,
        )
        for number, (kind, (penalties, end_id, stop_ids, stop)) in enumerate(
            itertools.product(
                KINDS,
                [
                    (
                        {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
                        -1,
                        (),
                        (),
                    ),
                    ({"repetition_penalty": 1.1, "frequency_penalty": 0.1}, 3, (9,), (b"%%%%",)),
                ],
            )
        )
    ]
    asked += GenerationRequest([8, 7] * 20, 40, SamplingParams(temperature=0.3, top_p=1.0, seed=3)).siblings(
        3
    )

    def told(engine: Engine) -> tuple[list[tuple], list[float]]:
        outputs = engine.generate(asked)
        engine.audit()
        answers = [(output.token_ids, output.text, output.finish_reason) for output in outputs]
        tops = [log_prob for output in outputs for top in output.top_log_probs for _, log_prob in top]
        return answers, [log_prob for output in outputs for log_prob in output.log_probs] + tops

    answers, log_probs = told(make_engine(parrot, block_size=16, max_num_tokens=64))
    assert {reason for *_, reason in answers} == {FinishReason.LENGTH, FinishReason.END_ID, FinishReason.STOP}
    engine = eager(make_engine(parrot, block_size=16, max_num_tokens=64, speculation_tokens=4))
    tight = {"num_kv_blocks": 12, "max_num_tokens": 20, "batch_scheduler_policy": "max_utilization"}
    preempted = eager(make_engine(parrot, block_size=16, speculation_tokens=4, **tight))
    for each in (engine, engine, preempted):
        assert told(each) == (answers, pytest.approx(log_probs, abs=1e-4))
    assert engine.stats.kv_blocks_reused > 0 and preempted.scheduler.num_preemptions > 0
    assert min(each.stats.accepted_tokens for each in (engine, preempted)) > 50


def test_top_log_probs_are_told_with_their_tokens(make_engine: Make) -> None:
    engine = make_engine(enable_kv_cache_reuse=False)
    asked = GenerationRequest(PROMPT, 12, WARM, end_id=-1, return_log_probs=True, top_log_probs=4)
    (streamed,) = engine.generate([asked])
    (whole,) = engine.generate([dataclasses.replace(asked, stream=False)])
    assert streamed.top_log_probs == whole.top_log_probs
    assert len(whole.top_log_probs) == len(whole.token_ids) == 12
    for token, log_prob, top in zip(whole.token_ids, whole.log_probs, whole.top_log_probs, strict=True):
        assert len(top) == 4 and sorted((value for _, value in top), reverse=True) == [
            value for _, value in top
        ]
        assert dict(top).get(token, log_prob) == pytest.approx(log_prob, abs=1e-5)
        assert top[0][1] >= log_prob
    only = engine.generate([dataclasses.replace(asked, return_log_probs=False)])[0]
    assert only.top_log_probs == whole.top_log_probs and only.log_probs == []


def test_stop_ids_end_the_output_beside_the_end_id(make_engine: Make) -> None:
    engine = make_engine()
    free = one(engine, max_tokens=20).token_ids
    stop = free[6]
    first = free.index(stop)
    for end_id in (-1, None, 10**6):
        output = one(engine, max_tokens=20, end_id=end_id, stop_ids=(stop, 10**7))
        assert output.token_ids == free[:first] and output.finish_reason is FinishReason.END_ID
    longer = one(engine, max_tokens=20, end_id=-1, stop_ids=(stop,), min_tokens=15)
    assert len(longer.token_ids) >= 15 and stop not in longer.token_ids[:15]


def test_a_row_without_logits_ends_that_request_alone(
    make_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(max_num_tokens=128, num_kv_blocks=128)
    good = requests()
    expected = answers(engine, good)
    forward = engine.model.forward

    def broken(step, caches):
        logits = forward(step, caches)
        logits[-1] = math.nan
        return logits

    for number, request in enumerate(good):
        engine.add(number, request)
    outputs: dict[object, RequestOutput] = {}
    engine.add("bad", GenerationRequest([1, 2, 3], 5, WARM))
    monkeypatch.setattr(engine.model, "forward", broken)  # the step's last row: of the youngest request
    for key, output in engine.step():
        outputs.setdefault(key, RequestOutput()).extend(output)
    monkeypatch.setattr(engine.model, "forward", forward)
    for key, output in run(engine).items():
        outputs.setdefault(key, RequestOutput()).extend(output)
    assert outputs["bad"].finish_reason is FinishReason.ERROR
    assert outputs["bad"].error is not None and outputs["bad"].error.code is Code.INTERNAL
    assert "finite" in outputs["bad"].error.message
    assert [outputs[number].token_ids for number in range(len(good))] == expected


# State ---------------------------------------------------------------------------------------------------------


def test_bad_words_are_matched_as_by_comparing_each() -> None:
    """Words that overlap, contain and continue each other; many of them."""
    words = [word for length in (1, 2, 3, 4) for word in itertools.product((1, 2), repeat=length)][2::3]
    words += [(), (99,), (5, -1), (7, 1, 7), (1, 7)]
    automaton, state, said = BadWords(words, 50), 0, []
    for step in range(400):
        token = (1, 2, 7, 1, 1, 2, 2, 3)[(step * step + step // 5) % 8]
        said.append(token)
        state = automaton.advance(state, token)
        expected = {word[-1] for word in words if len(word) > 1 and tuple(said[1 - len(word) :]) == word[:-1]}
        assert set(automaton.banned[state].tolist()) == {token for token in expected if token >= 0}
    assert set(automaton.always.tolist()) == {word[0] for word in words if len(word) == 1 and word[0] < 50}


def test_a_step_looks_at_the_new_token_only() -> None:
    """Whatever has been said, and however many words are bad."""

    class Counting(list):
        looked_at = 0

        def __getitem__(self, index):
            found = super().__getitem__(index)
            Counting.looked_at += len(found) if isinstance(index, slice) else 1
            return found

    words = tuple((3, 4 + n % 5, n) for n in range(2000))
    params = SamplingParams(repetition_penalty=1.1, frequency_penalty=0.1)
    tokens = Counting(range(10, 3010))
    state = SamplingState(GenerationRequest(list(tokens), 99, params, bad_ids=words), frozenset(), 0, 5000)
    state.catch_up(tokens)
    Counting.looked_at = 0
    for token in range(50):
        tokens.append(token)
        state.catch_up(tokens)
    assert Counting.looked_at == 50


# Several answers to a prompt -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("policy", ["guaranteed_no_evict", "max_utilization"])
def test_siblings_compute_their_prompt_once(make_engine: Make, reuse: bool, policy: str) -> None:
    """18 tokens in blocks of 4: four blocks are shared, and two tokens are computed by each."""
    prompt = list(range(20, 38))
    settings = {
        "enable_kv_cache_reuse": reuse,
        "batch_scheduler_policy": policy,
        "max_num_tokens": 8,
        "max_batch_size": 8,
    }
    asked = GenerationRequest(prompt, 10, WARM, end_id=-1)
    expected = [
        answers(
            make_engine(**settings),
            [dataclasses.replace(asked, sampling=dataclasses.replace(WARM, seed=11 + n))],
        )[0]
        for n in range(4)
    ]
    engine = make_engine(**settings)
    computed = []
    build = engine.runner.steps.build
    engine.runner.steps.build = lambda chunks: (
        computed.append(sum(c.num_tokens for c in chunks)) or build(chunks)
    )
    outputs = engine.generate(asked.siblings(4))
    assert [output.token_ids for output in outputs] == expected
    assert [output.sequence_index for output in outputs] == [0, 1, 2, 3]
    assert sum(computed) == 18 + 3 * 2 + 4 * 9
    assert [output.metrics.kv_cache_reused_blocks for output in outputs] == [0, 4, 4, 4]
    assert [output.metrics.num_cached_tokens for output in outputs] == [0, 16, 16, 16]
    engine.audit()
    assert not len(engine.siblings) and engine.stats.kv_blocks_free == engine.stats.kv_blocks_max


def test_siblings_outlive_each_other(make_engine: Make) -> None:
    """The first is cancelled before its prompt is computed, another while it waits; neighbours need not wait."""
    engine = make_engine(max_num_tokens=8, max_batch_size=8, enable_kv_cache_reuse=False)
    asked = GenerationRequest(list(range(20, 60)), 5, end_id=-1)
    for number, request in enumerate(asked.siblings(4)):
        engine.add(number, request)
    engine.add("neighbour", GenerationRequest(PROMPT, 3, end_id=-1))
    assert engine.stats.waiting_requests == 5
    engine.step()
    engine.cancel(0)
    engine.cancel(2)
    outputs = run(engine)
    assert outputs[1].token_ids == outputs[3].token_ids == engine.generate([asked])[0].token_ids
    assert outputs[3].metrics.kv_cache_reused_blocks == 9 and outputs[1].metrics.kv_cache_reused_blocks == 0
    assert len(outputs["neighbour"].token_ids) == 3


def test_siblings_seeds_follow_the_requests() -> None:
    asked = GenerationRequest([1], 5, SamplingParams(top_p=1.0, seed=2**64 - 2))
    siblings = asked.siblings(3)
    assert [sibling.sampling.seed for sibling in siblings] == [2**64 - 2, 2**64 - 1, 0]
    assert len({sibling.group for sibling in siblings}) == 1 and siblings[0].group
    assert GenerationRequest([1], 5).siblings(1)[0].group == ""
    drawn = [sibling.sampling.seed for sibling in GenerationRequest([1], 5).siblings(3)]
    assert None not in drawn and len(set(drawn)) == 3
