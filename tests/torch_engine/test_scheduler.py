"""Chunks of prompts: sized so that streams keep their gap, and shared so that no prompt starves."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from flightline.torch_engine.core.config import ConfigError
from flightline.torch_engine.core.request import GenerationRequest
from flightline.torch_engine.core.step_times import NOTHING, StepTimes, Work
from flightline.torch_engine.engine import Engine

ROOM = {"max_seq_len": 2048, "num_kv_blocks": 1600, "max_num_tokens": 512, "enable_kv_cache_reuse": False}
A, B, C = 0.004, 2e-5, 2e-8
"""Seconds of a step, of a token and of a token's sight of another one, on the device that is told of here."""


def seconds(work: Work, slower: float = 1.0) -> float:
    return slower * (A + B * work.tokens + C * work.pairs)


def test_the_times_of_steps_are_learned() -> None:
    times, chance = StepTimes(), random.Random(2)
    assert times.fitting(NOTHING, 0, 0.05) == 64, "a careful beginning"
    for _ in range(200):
        decodes = Work(8, 8 * chance.randrange(100, 4000))
        times.observe(decodes, seconds(decodes) * chance.uniform(0.95, 1.05), prompts=False)
    for begin in range(0, 20_000, 700):
        work = Work(8, 16_000) + Work.of(begin, chance.randrange(16, 700))
        times.observe(work, seconds(work) * chance.uniform(0.95, 1.05), prompts=True)
    decodes = Work(8, 16_000)
    for begin in (0, 1_000, 30_000):
        for bound in (0.01, 0.05, 0.2):
            for _ in range(8):  # each step may be larger than those before
                count = times.fitting(decodes, begin, bound)
                step = decodes + Work.of(begin, count)
                times.observe(step, seconds(step), prompts=True)
            assert 0.85 * bound < seconds(decodes + Work.of(begin, count)) < 1.15 * bound
    assert times.fitting(decodes, 0, 0.001) <= 0
    work = Work.of(0, 256)
    for _ in range(100):  # something else takes half of the device
        times.observe(work, seconds(work, 2.0), prompts=True)
    assert times.expected(work) == pytest.approx(seconds(work, 2.0), rel=0.05)


def test_steps_that_take_as_long_whatever_they_compute_say_nothing_of_larger_ones() -> None:
    """So are a GPU's up to some hundred tokens: it reads the weights once."""

    def gpu(work: Work) -> float:
        return max(3.4e-3, 1.8e-5 * work.tokens) + 8e-10 * work.pairs

    times, streams = StepTimes(), Work(32, 32 * 500)
    for _ in range(100):
        times.observe(streams, gpu(streams), prompts=False)
    for _ in range(3):  # prompts, one after the other
        begin, worst, steps = 0, 0.0, 0
        while begin < 30_000:
            count = min(8192, max(16, times.fitting(streams, begin, 0.045)), 30_000 - begin)
            step = streams + Work.of(begin, count)
            worst = max(worst, gpu(step))
            times.observe(step, gpu(step), prompts=True)
            begin, steps = begin + count, steps + 1
        assert worst < 0.060
        assert steps < 40, "and the time there is, is used"


def test_one_step_that_was_held_up_teaches_little() -> None:
    times = StepTimes()
    for count in range(20, 60):
        times.observe(Work.of(0, count), seconds(Work.of(0, count)), prompts=True)
    before = times.expected(Work.of(0, 100))
    times.observe(Work.of(0, 40), 3600.0, prompts=True)
    assert times.expected(Work.of(0, 100)) < 2 * before


def test_a_step_that_was_held_up_does_not_make_others_look_short() -> None:
    """The tokens of two steps came together, since the host compiled something: the second seems to take no time."""
    times, streams = StepTimes(), Work(32, 9000)
    for _ in range(50):
        times.observe(streams, seconds(streams), prompts=False)
    for begin in range(0, 9000, 3000):
        work = streams + Work.of(begin, 1500)
        times.observe(work, seconds(work), prompts=True)
    work = streams + Work.of(0, 4000)
    times.observe(work, 0.6, prompts=True)
    times.observe(work, 0.004, prompts=True)
    count = times.fitting(streams, 0, 0.05)
    assert seconds(streams + Work.of(0, count)) < 0.075


def test_times_that_are_the_hosts_are_not_learned_but_allowed_for() -> None:
    times, chance = StepTimes(), random.Random(3)
    for _ in range(40):
        work = Work.of(0, chance.randrange(100, 900))
        times.observe(work, seconds(work), prompts=True)
    assert times.margin == 1.1
    expected = times.expected(Work.of(0, 500))
    for slower, margin in ((1.4, 1.1), (0.2, 1.1), (1.3, 1.3)):  # one that was held up is none
        times.observe(Work.of(0, 500), seconds(Work.of(0, 500), slower), prompts=True, sure=False)
        assert times.margin == pytest.approx(margin, rel=0.01)
    assert times.expected(Work.of(0, 500)) == expected
    for _ in range(2):
        times.observe(Work.of(0, 500), 60.0, prompts=True, sure=False)
    assert times.margin == 1.5
    for _ in range(48):
        times.observe(Work.of(0, 500), seconds(Work.of(0, 500)), prompts=True)
    assert times.margin == 1.1, "what is long past is forgotten"


@pytest.fixture
def clocked(make_engine, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """An engine whose steps take what :func:`seconds` says, by its own clock; ``engine.now()`` reads it."""

    def make(**settings: object) -> Engine:
        engine = make_engine(**ROOM, **settings)
        clock = SimpleNamespace(ns=10**9)
        monkeypatch.setattr("time.monotonic_ns", lambda: int(clock.ns))
        launch = engine.runner.launch

        def timed(chunks, sampling):
            work = NOTHING
            for chunk in chunks:
                work += chunk.work
            clock.ns += 1e9 * seconds(work)
            return launch(chunks, sampling)

        engine.runner.launch = timed
        engine.now = lambda: clock.ns / 1e9
        return engine

    return make


def prompt(length: int, seed: int = 1) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(3, 250) for _ in range(length)]


def test_streams_keep_their_gap_beside_long_prompts(clocked) -> None:
    bound, gaps, prompts = 0.010, {}, {}
    for max_gap_ms in (0, int(1000 * bound)):
        engine = clocked(max_gap_ms=max_gap_ms)
        engine.generate([GenerationRequest(prompt(600), 2, end_id=-1)])  # it has seen a prompt
        for number in range(3):
            engine.add(number, GenerationRequest([5, 6, number + 7], 400, end_id=-1))
        engine.step()
        engine.add("long", GenerationRequest(prompt(1500, 3), 1, end_id=-1))
        last, worst, steps = engine.now(), 0.0, 0
        while "long" in engine.sequences:
            before = [engine.sequences[number].num_generated for number in range(3)]
            engine.step()
            after = [engine.sequences[number].num_generated for number in range(3)]
            assert after == [count + 1 for count in before], "every step gives each stream its token"
            worst, last, steps = max(worst, engine.now() - last), engine.now(), steps + 1
        gaps[max_gap_ms], prompts[max_gap_ms] = worst, steps
        for number in range(3):
            engine.cancel(number)
        engine.audit()
    assert gaps[0] > 1.5 * bound, "without a bound they wait longer"
    assert 0.7 * bound < gaps[10] <= 1.05 * bound
    assert prompts[0] < prompts[10] < 20, "and the time there is, is used"


def test_a_prompt_goes_on_even_where_decodes_alone_take_too_long(clocked) -> None:
    engine = clocked(max_gap_ms=1)
    engine.add("stream", GenerationRequest([5, 6, 7], 200, end_id=-1))
    engine.step()
    engine.add("long", GenerationRequest(prompt(300), 1, end_id=-1))
    for _ in range(300 // 16 + 2):
        engine.step()
    assert "long" not in engine.sequences


@pytest.mark.parametrize("max_gap_ms", [0, 10])
def test_a_question_does_not_wait_for_a_book(clocked, max_gap_ms: int) -> None:
    engine = clocked(max_gap_ms=max_gap_ms, max_batch_size=8)
    engine.generate([GenerationRequest(prompt(600), 2, end_id=-1)])  # it has seen a prompt
    engine.add("stream", GenerationRequest([5, 6, 7], 400, end_id=-1))
    engine.step()
    books = [f"book {number}" for number in range(3)]
    for number, name in enumerate(books):
        engine.add(name, GenerationRequest(prompt(1800, number), 1, end_id=-1))
    engine.step()
    engine.add("question", GenerationRequest(prompt(60, 9), 1, end_id=-1))
    first, steps = engine.sequences["book 0"], 0
    while "question" in engine.sequences:
        before = first.num_computed
        engine.step()
        steps += 1
        assert first.num_computed > before, "and the oldest one goes on"
    assert steps <= 6
    ends = {}
    for _ in range(400):
        ends |= {name: engine.now() for name in books if name not in engine.sequences and name not in ends}
        if len(ends) == 3:
            break
        engine.step()
    assert ends["book 0"] <= ends["book 1"] <= ends["book 2"], "of equal ones each in its turn"
    engine.cancel("stream")
    engine.audit()


def test_what_is_left_for_those_who_cannot_start_is_not_lost(clocked) -> None:
    engine = clocked(max_batch_size=2)
    engine.add("stream", GenerationRequest([5, 6, 7], 40, end_id=-1))
    engine.step()
    engine.add("book", GenerationRequest(prompt(1800), 1, end_id=-1))
    engine.add("question", GenerationRequest(prompt(60, 9), 1, end_id=-1))
    engine.step()
    assert engine.sequences["book"].num_computed == 511


def test_a_prompt_that_is_not_cut_has_no_bound(make_engine) -> None:
    with pytest.raises(ConfigError, match=r"max_gap_ms=50 is not valid.*enable_chunked_context"):
        make_engine(max_gap_ms=50, enable_chunked_context=False, max_num_tokens=256)
