"""The live page's figures: a page that is opened in the middle of a run shows what has been."""

from __future__ import annotations

import itertools

import pytest

from loadtest import live
from loadtest.records import ClientSample


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when a test says so."""
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    return now


def sample() -> ClientSample:
    return ClientSample(worker=0, time_ns=0, wall_ns=0, cpu_s=0.0, in_flight=1, lags_ms=[])


def answer(endpoint: str, tokens: int) -> dict:
    times = {"delay_s": 0.0, "ttft_s": 0.2, "tpot_s": 0.01, "e2e_s": 0.5}
    return {"endpoint": endpoint, "tokens": tokens, "problem": None, "error": False, **times}


def run(clock, seconds: int) -> dict:
    """``fast`` answers every second, ``slow`` not once."""
    figures = live.Live()
    figures.start(["fast", "slow"])
    for _ in range(seconds):
        clock[0] += 1.0
        figures.add(answer("fast", 50))
        figures.sample(sample())
    return figures.snapshot()


def test_a_page_opened_late_has_the_whole_history_of_all_contestants(clock):
    seen = run(clock, 30)
    assert list(seen["endpoints"]) == ["fast", "slow"]
    assert seen["endpoints"]["slow"]["answered"] == 0
    for name in ("fast", "slow"):
        assert [point["t"] for point in seen["history"][name]] == list(range(1, 31))
    last = seen["history"]["fast"][-1]
    assert 45 <= last["tokens_per_s"] <= 55 and last["ttft_s"] == pytest.approx(0.2, rel=0.01)
    assert seen["history"]["slow"][-1] == {"t": 30, "tokens_per_s": 0, "ttft_s": None, "tpot_s": None}


def test_a_long_run_is_kept_in_bounds_from_its_start_to_now(clock):
    points = run(clock, 4000)["history"]["fast"]
    assert 200 <= len(points) <= live.HISTORY_POINTS
    assert points[0]["t"] == 1 and points[-1]["t"] > 3950
    steps = [later["t"] - earlier["t"] for earlier, later in itertools.pairwise(points)]
    assert max(steps) < 40


def test_a_new_run_starts_anew(clock):
    figures = live.Live()
    figures.start(["old"])
    clock[0] += 2
    figures.sample(sample())
    figures.start(["new"])
    assert figures.snapshot()["history"] == {} and list(figures.snapshot()["endpoints"]) == ["new"]
