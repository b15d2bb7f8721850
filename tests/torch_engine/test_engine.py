"""The engine's promises: in-flight batching, both scheduler policies, limits, sampling, failures."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest

from flightline.torch_engine.core.config import ConfigError, EngineConfig
from flightline.torch_engine.core.request import (
    Code,
    FinishReason,
    GenerationRequest,
    RequestError,
    RequestOutput,
    SamplingParams,
)
from flightline.torch_engine.engine import Engine
from tests.tiny import tiny_checkpoint

PROMPT = [10, 20, 30, 40, 50]


def run(engine: Engine) -> dict[object, RequestOutput]:
    whole: dict[object, RequestOutput] = {}
    while engine.busy:
        for key, output in engine.step():
            whole.setdefault(key, RequestOutput()).extend(output)
    engine.audit()
    assert engine.stats.kv_blocks_free == engine.stats.kv_blocks_max
    return whole


def one(
    engine: Engine, prompt: list[int] | None = None, max_tokens: int = 8, **fields: object
) -> RequestOutput:
    request = GenerationRequest(prompt or PROMPT, max_tokens, **{"end_id": -1, **fields})
    return engine.generate([request])[0]


def test_requests_join_and_leave_at_every_step(make_engine) -> None:
    engine = make_engine()
    alone = {n: one(engine, [n + 5, n + 6], n + 1).token_ids for n in range(8)}
    outputs: dict[object, RequestOutput] = {}
    waiting = list(alone)
    seen = set()
    while waiting or engine.busy:
        if waiting:
            n = waiting.pop()
            engine.add(n, GenerationRequest([n + 5, n + 6], n + 1, end_id=-1))
        for key, output in engine.step():
            outputs.setdefault(key, RequestOutput()).extend(output)
        seen.add(engine.stats.active_requests)
    assert {n: output.token_ids for n, output in outputs.items()} == alone
    assert len(seen) > 2


@pytest.mark.parametrize("policy", ["guaranteed_no_evict", "max_utilization"])
@pytest.mark.parametrize("reuse", [True, False])
def test_too_little_memory_changes_no_output(make_engine, policy: str, reuse: bool) -> None:
    chance = random.Random(3)
    requests = [
        GenerationRequest([chance.randrange(3, 250) for _ in range(chance.randrange(1, 20))], 20, end_id=-1)
        for _ in range(12)
    ]
    expected = [output.token_ids for output in make_engine(num_kv_blocks=256).generate(requests)]
    tight = make_engine(
        num_kv_blocks=12, max_seq_len=48, batch_scheduler_policy=policy, enable_kv_cache_reuse=reuse
    )
    for number, request in enumerate(requests):
        tight.add(number, request)
    whole = run(tight)
    assert [whole[number].token_ids for number in range(12)] == expected
    # What a request finds again of its own was not cached when it began.
    assert not any(whole[number].metrics.num_cached_tokens for number in range(12))
    if policy == "guaranteed_no_evict":
        assert tight.scheduler.num_preemptions == 0
    else:
        assert tight.scheduler.num_preemptions > 0


def test_a_long_prompt_does_not_stop_the_streams(make_engine) -> None:
    engine = make_engine(max_num_tokens=16)
    engine.add("stream", GenerationRequest(PROMPT, 60, end_id=-1))
    for _ in range(3):
        engine.step()
    engine.add("long", GenerationRequest([7] * 100, 4, end_id=-1))
    while "long" in engine.sequences and engine.sequences["long"].num_generated == 0:
        outputs = dict(engine.step())
        assert outputs["stream"].token_ids, "every step gives the stream its token"
    run(engine)


def test_chunked_context_can_be_switched_off(make_engine) -> None:
    with pytest.raises(ConfigError, match="max_num_tokens"):
        make_engine(enable_chunked_context=False, max_num_tokens=16)
    engine = make_engine(enable_chunked_context=False, max_num_tokens=128)
    engine.add("x", GenerationRequest([7] * 100, 2, end_id=-1))
    engine.step()
    assert engine.sequences["x"].num_generated == 1
    run(engine)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_ids": []}, "prompt is empty"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": -3}, "max_tokens is -3"),
        ({"prompt_ids": [1] * 120}, r"120 tokens and max_tokens is 20.*max_seq_len=128"),
        ({"prompt_ids": [1, 999]}, r"999 is outside the vocabulary"),
        ({"min_tokens": -1}, "min_tokens is -1"),
    ],
)
def test_impossible_requests_are_refused_by_field_and_limit(make_engine, fields: dict, message: str) -> None:
    engine = make_engine()
    with pytest.raises(RequestError, match=message) as caught:
        engine.add("x", GenerationRequest(**{"prompt_ids": PROMPT, "max_tokens": 20, **fields}))
    assert caught.value.code is Code.INVALID_ARG
    assert not engine.busy


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": math.nan}, {"temperature": -1.0}, {"temperature": math.inf}, {"top_k": -1},
        {"top_p": 1.5}, {"top_p": math.nan}, {"repetition_penalty": 0.0}, {"presence_penalty": math.nan},
        {"frequency_penalty": math.inf}, {"seed": -1}, {"seed": 2**64},
    ],
)  # fmt: skip
def test_impossible_sampling_is_refused_by_field(field: dict) -> None:
    with pytest.raises(RequestError, match=next(iter(field))):
        SamplingParams(**field)


def test_the_queue_has_a_limit_and_a_deadline(make_engine) -> None:
    engine = make_engine(max_queue_size=2)
    engine.add(1, GenerationRequest(PROMPT, 4))
    engine.add(2, GenerationRequest(PROMPT, 4))
    with pytest.raises(RequestError, match="max_queue_size=2") as caught:
        engine.add(3, GenerationRequest(PROMPT, 4))
    assert caught.value.code is Code.UNAVAILABLE
    run(engine)
    engine = make_engine(max_queue_delay_ms=50)
    engine.add("late", GenerationRequest(PROMPT, 4), arrival_ns=1)
    output = run(engine)["late"]
    assert output.error.code is Code.UNAVAILABLE and "max_queue_delay_ms=50" in output.error.message


def test_cancelling_frees_the_blocks_at_once(make_engine) -> None:
    engine = make_engine()
    engine.add("x", GenerationRequest(PROMPT, 100, end_id=-1))
    for _ in range(5):
        engine.step()
    assert engine.stats.kv_blocks_free < engine.stats.kv_blocks_max
    output = engine.cancel("x")
    assert output.finish_reason is FinishReason.CANCELLED
    assert engine.stats.kv_blocks_free == engine.stats.kv_blocks_max
    assert engine.cancel("x") is None
    engine.audit()


def test_a_failing_step_ends_its_requests_and_no_others(make_engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    expected = one(engine).token_ids
    forward = engine.model.forward
    monkeypatch.setattr(engine.model, "forward", lambda *_: (_ for _ in ()).throw(RuntimeError("boom")))
    engine.add("a", GenerationRequest(PROMPT, 8, end_id=-1))
    output = run(engine)["a"]
    assert output.error.code is Code.INTERNAL and "boom" in output.error.message
    monkeypatch.setattr(engine.model, "forward", forward)
    assert one(engine).token_ids == expected


def test_end_ids_end_the_output_and_are_not_part_of_it(make_engine) -> None:
    engine = make_engine()
    free = one(engine, max_tokens=20)
    end = free.token_ids[5]
    first = free.token_ids.index(end)
    output = one(engine, max_tokens=20, end_id=end)
    assert output.token_ids == free.token_ids[:first]
    assert output.finish_reason is FinishReason.END_ID
    assert output.num_output_tokens == first
    longer = one(engine, max_tokens=20, end_id=end, min_tokens=12)
    assert longer.num_output_tokens >= 12 and end not in longer.token_ids[:12]


def test_the_models_own_ends_wait_for_the_least_length(make_engine, tmp_path) -> None:
    """Alone, beside a request that may end at once, and beside one that is sampled otherwise."""
    end = one(make_engine(tiny_checkpoint(tmp_path / "first")), max_tokens=6).token_ids[2]
    engine = make_engine(tiny_checkpoint(tmp_path / "second", eos_token_id=end))
    ends_early = GenerationRequest(PROMPT, 12)
    held = dataclasses.replace(ends_early, min_tokens=8)
    sampled = dataclasses.replace(ends_early, sampling=SamplingParams(repetition_penalty=1.5))
    early, late = engine.generate([ends_early, held])
    assert len(early.token_ids) == 2 and early.finish_reason is FinishReason.END_ID
    assert len(late.token_ids) >= 8 and end not in late.token_ids
    assert engine.generate([held])[0].token_ids == late.token_ids
    assert engine.generate([held, sampled])[0].token_ids == late.token_ids


def test_stop_words_end_the_output(make_engine) -> None:
    engine = make_engine()
    free = one(engine, max_tokens=30)
    text = engine.tokens.bytes_of(free.token_ids)
    word = text[10:14]
    output = one(engine, max_tokens=30, stop=(word,))
    assert output.finish_reason is FinishReason.STOP
    assert output.text == text[: text.find(word)].decode(errors="replace")
    assert output.num_output_tokens == len(output.token_ids)


def test_a_stop_word_inside_a_token_leaves_ids_and_log_probs_in_agreement(make_engine) -> None:
    engine = make_engine()
    free = one(engine, max_tokens=30, return_log_probs=True)
    pieces = [engine.tokens[token] for token in free.token_ids]
    number = next(n for n, piece in enumerate(pieces) if n and len(piece) > 2 and piece.isascii())
    output = one(engine, max_tokens=30, return_log_probs=True, stop=(pieces[number][2:],))
    assert output.finish_reason is FinishReason.STOP
    assert output.num_output_tokens == len(output.token_ids) == len(output.log_probs)
    kept = len(output.token_ids) - len(engine.tokens.spell(pieces[number][:2]))
    assert output.log_probs[: kept + 1] == pytest.approx(free.log_probs[: kept + 1], abs=1e-4)
    assert output.cum_log_prob == pytest.approx(sum(output.log_probs))


def test_bad_words_never_appear(make_engine) -> None:
    engine = make_engine()
    free = one(engine, max_tokens=10).token_ids
    assert free[3] not in one(engine, max_tokens=10, bad_ids=((free[3],),)).token_ids
    pair = tuple(free[3:5])
    output = one(engine, max_tokens=10, bad_ids=(pair,)).token_ids
    assert output[:4] == free[:4] and pair not in itertools.pairwise(output)


def test_log_probs_are_the_models_own(make_engine) -> None:
    engine = make_engine()
    output = one(engine, return_log_probs=True)
    assert len(output.log_probs) == len(output.token_ids) == 8
    assert output.cum_log_prob == pytest.approx(sum(output.log_probs))
    again = one(
        engine, return_log_probs=True, sampling=SamplingParams(repetition_penalty=3.0, temperature=0.5)
    )
    assert (
        again.log_probs[0] == pytest.approx(output.log_probs[0], abs=1e-5)
        or again.token_ids[0] != output.token_ids[0]
    )
    assert one(engine).log_probs == []


def test_seeds_decide_and_neighbours_do_not(make_engine) -> None:
    engine = make_engine()

    def request(seed: int | None) -> GenerationRequest:
        return GenerationRequest(PROMPT, 20, SamplingParams(top_p=1.0, seed=seed), end_id=-1)

    alone = engine.generate([request(1)])[0].token_ids
    crowd = [output.token_ids for output in engine.generate([request(n) for n in (5, 1, 2, 1)])]
    assert crowd[1] == crowd[3] == alone
    assert len({tuple(tokens) for tokens in crowd}) == 3
    assert engine.generate([request(None)])[0].token_ids != engine.generate([request(None)])[0].token_ids


@pytest.mark.parametrize(
    ("params", "greedy"),
    [
        ({}, True), ({"temperature": 0.7}, True), ({"temperature": 0.0, "top_p": 0.9}, True),
        ({"top_k": 1, "top_p": 0.9}, True), ({"top_k": 0}, True), ({"top_k": 5}, False), ({"top_p": 0.9}, False),
        ({"top_k": 0, "top_p": 1.0}, False),
    ],
)  # fmt: skip
def test_greedy_unless_top_k_or_top_p_ask(params: dict, greedy: bool) -> None:
    assert SamplingParams(**params).greedy is greedy


def test_a_cache_that_one_sequence_does_not_fit_is_refused(make_engine) -> None:
    with pytest.raises(ConfigError, match=r"num_kv_blocks=2 .*max_seq_len=128 needs 8 blocks of 16"):
        make_engine(num_kv_blocks=2, block_size=16)


def test_config_errors_name_field_value_and_remedy(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"batch_scheduler_policy='best'.*guaranteed_no_evict"):
        EngineConfig(model_dir="x", batch_scheduler_policy="best")
    with pytest.raises(ConfigError, match=r"num_host_kv_blocks=5 .*enable_kv_cache_reuse"):
        EngineConfig(model_dir="x", num_host_kv_blocks=5, enable_kv_cache_reuse=False)
    with pytest.raises(ConfigError, match="make build-engines"):
        EngineConfig.load(tmp_path)
    EngineConfig(model_dir="../m", num_kv_blocks=999).save(tmp_path)
    loaded = EngineConfig.load(tmp_path, block_size=8)
    assert loaded.num_kv_blocks == 999 and loaded.block_size == 8
    assert loaded.model_dir == str(tmp_path.parent / "m")
    (tmp_path / "engine.json").write_text('{"model_dir": "x", "speed": 11}')
    with pytest.raises(ConfigError, match="speed"):
        EngineConfig.load(tmp_path)
