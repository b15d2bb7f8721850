from __future__ import annotations

import pytest

from flightline.loadtest.metrics import summarise
from flightline.loadtest.plan import MIN_BLOCK_S, MIN_SAMPLES, SHORT_SAMPLES, Pace, Plan, plan
from tests.loadtest.traces import batch_server, serial_server

USERS, LEVEL = 16, "16 in flight"
FAST, QUICK, SLOW = Pace(1.0, 1.0), Pace(9.8, 10.0), Pace(3.0, 48.0)


def made(budget_s: float, paces: dict[str, Pace], rounds: int = 5, full_rounds: int = 1) -> Plan:
    """The baseline ``b`` first; by default the rules of ``make bench``."""
    lengths = {(name, LEVEL): (p.block_s(USERS), p.block_s(USERS, short=True)) for name, p in paces.items()}
    return plan(lengths, rounds, full_rounds, budget_s)


def test_pace_of_a_wave_that_was_finished_or_cut_off():
    assert Pace.of([4.8, 4.9, 5.0, 5.0], concurrency=4) == Pace(4.8, 5.0)
    assert Pace.of([3.0, 6.0, 9.0], concurrency=16) == Pace(3.0, 48.0)  # one by one
    assert Pace.of([5.0, 5.1, 5.2], concurrency=16) == Pace(5.0, pytest.approx(6.5))  # all at once
    assert Pace.of([2.0], concurrency=1) == Pace(2.0, 2.0)


@pytest.mark.parametrize("service_s", [0.5, 3.0, 6.0])
def test_a_block_is_long_enough_for_the_slowest_server(service_s):
    length = Pace(service_s, 16 * service_s).block_s(16)
    sample = summarise("text_generation", [serial_server(16, service_s, length)]).e2e_s
    assert sample.n >= MIN_SAMPLES


def test_a_block_holds_two_waves_after_the_ramp():
    length = Pace(5.0, 5.2).block_s(16)
    assert summarise("text_generation", [batch_server(16, 5.2, length)]).e2e_s.n == 32


@pytest.mark.parametrize("budget_s", [60, 140, 300, 900])
def test_the_budget_is_kept_and_can_be_used_up(budget_s):
    found = made(budget_s, {"b": Pace(0.5, 8.0), "a": FAST})
    assert found.total_s <= budget_s
    assert 0.9 * budget_s <= found.stretched(budget_s).total_s <= budget_s


def test_more_budget_means_more_rounds():
    counts = [made(budget, {"b": Pace(0.5, 8.0), "a": FAST}).rounds for budget in (60, 100, 200, 900)]
    assert counts == sorted(counts) and counts[0] < counts[-1] == 5


def test_rounds_go_back_and_forth_and_a_lone_one_has_the_last_contestant_on_either_side():
    seconds = {("b", LEVEL): 8, ("a", LEVEL): 8}
    assert Plan(3, seconds).orders(["b", "a"]) == [["b", "a"], ["a", "b"], ["b", "a"]]
    assert Plan(1, seconds).orders(["b", "a"]) == [["a", "b", "a"]]
    assert Plan(1, seconds).total_s == 3 * 10.5 and Plan(2, seconds).total_s == 4 * 10.5


@pytest.mark.parametrize(
    ("budget_s", "candidate_samples", "latency_is_measured"),
    [(165, 32, True), (145, 16, True), (120, 16, False)],
)
def test_a_tight_budget_shortens_the_fast_ones_blocks_and_then_the_slow_ones(
    budget_s, candidate_samples, latency_is_measured
):
    found = made(budget_s, {"b": SLOW, "a": QUICK}).stretched(budget_s)
    assert found.rounds == 1 and found.total_s <= budget_s + 1
    slower_s = 11.5  # than in warm-up
    sample = summarise("text_generation", [batch_server(16, slower_s, found.seconds["a", LEVEL])]).e2e_s
    assert sample.n >= candidate_samples
    length = found.seconds["b", LEVEL]
    baseline = summarise("text_generation", [serial_server(16, 3.0, length)])
    assert (baseline.e2e_s.p50 is not None) == latency_is_measured == SLOW.shows_latency(length)
    assert baseline.output_tokens_per_s == pytest.approx(8 / 3.0)


def test_a_short_round_is_done_even_if_the_budget_is_too_small():
    found = made(10, {"b": SLOW, "a": Pace(0.1, 0.2)})
    assert found.rounds == 1 and found.seconds["a", LEVEL] == MIN_BLOCK_S
    assert found.stretched(10) == found
    summary = summarise("text_generation", [serial_server(16, 3.0, found.seconds["b", LEVEL])])
    assert summary.completed == SHORT_SAMPLES + 1


@pytest.mark.parametrize(
    ("budget_s", "rounds", "full"), [(300, 3, True), (260, 3, False), (80, 2, False), (9, 2, False)]
)
def test_a_comparison_with_intervals_has_shorter_blocks_before_fewer_rounds_and_never_one(
    budget_s, rounds, full
):
    found = made(budget_s, {"b": SLOW, "a": FAST}, rounds=3, full_rounds=3)
    assert found.rounds == rounds
    assert SLOW.shows_latency(found.seconds["b", LEVEL]) == full
