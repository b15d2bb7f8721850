from __future__ import annotations

import pytest

from loadtest.metrics import summarise
from loadtest.plan import (
    MIN_BLOCK_S,
    MIN_SAMPLES,
    SHORT_SAMPLES,
    Pace,
    neighbours,
    plan_blocks,
    planned_s,
    too_short,
)
from tests.loadtest.traces import batch_server, serial_server


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
def test_the_budget_is_used_and_kept(budget_s):
    paces = {"a": Pace(1.0, 1.0), "b": Pace(0.5, 8.0)}
    blocks = plan_blocks("a", "b", paces, 16, budget_s)
    assert [block.endpoint for block in blocks][:3] == ["a", "b", "a"]
    assert len({block.name for block in blocks}) == len(blocks) <= 11
    assert planned_s(blocks) == pytest.approx(budget_s, rel=0.1)
    assert len(neighbours(blocks, "a")) == len(blocks) - 1
    assert all((a.endpoint, b.endpoint) == ("a", "b") for a, b in neighbours(blocks, "a"))


def test_more_budget_means_more_rounds():
    paces = {"a": Pace(1.0, 1.0), "b": Pace(0.5, 8.0)}
    counts = [len(plan_blocks("a", "b", paces, 16, budget)) for budget in (60, 100, 200, 900)]
    assert counts == sorted(counts) and counts[0] < counts[-1]


@pytest.mark.parametrize(
    ("budget_s", "candidate_samples", "latency_is_measured"),
    [(165, 32, True), (145, 16, True), (120, 16, False)],
)
def test_a_tight_budget_shortens_the_candidates_blocks_and_then_the_baselines(
    budget_s, candidate_samples, latency_is_measured
):
    paces = {"a": Pace(9.8, 10.0), "b": Pace(3.0, 48.0)}
    blocks = plan_blocks("a", "b", paces, 16, budget_s)
    assert [block.endpoint for block in blocks] == ["a", "b", "a"]
    assert planned_s(blocks) <= budget_s + 1
    slower_s = 11.5  # than in warm-up
    sample = summarise("text_generation", [batch_server(16, slower_s, blocks[0].seconds)]).e2e_s
    assert sample.n >= candidate_samples
    baseline = summarise("text_generation", [serial_server(16, 3.0, blocks[1].seconds)])
    assert (baseline.e2e_s.p50 is not None) == latency_is_measured
    assert baseline.output_tokens_per_s == pytest.approx(8 / 3.0)
    assert too_short(blocks, paces) == ([] if latency_is_measured else ["b"])


def test_a_short_round_is_done_even_if_the_budget_is_too_small():
    blocks = plan_blocks("a", "b", {"a": Pace(0.1, 0.2), "b": Pace(3.0, 48.0)}, 16, 10)
    assert [block.endpoint for block in blocks] == ["a", "b", "a"]
    assert blocks[0].seconds == MIN_BLOCK_S
    summary = summarise("text_generation", [serial_server(16, 3.0, blocks[1].seconds)])
    assert summary.completed == SHORT_SAMPLES + 1
