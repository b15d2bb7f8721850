from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from flightline.loadtest.schedule import Profile, unit_times
from flightline.settings import SettingsError


def times(text: str, seconds: float, pattern="constant", ramp_s=0.0, seed=1, burstiness=1.0) -> np.ndarray:
    return np.array(list(Profile.parse(text, seconds, ramp_s).times(unit_times(pattern, seed, burstiness))))


def test_constant_arrivals_are_evenly_spaced():
    assert times("4", 2.0) == pytest.approx(np.arange(8) / 4)


@pytest.mark.parametrize(
    ("pattern", "burstiness", "cv"), [("poisson", 1, 1.0), ("gamma", 0.25, 2.0), ("gamma", 4, 0.5)]
)
def test_random_arrivals_have_the_rate_and_the_burstiness(pattern, burstiness, cv):
    gaps = np.diff(times("50", 400.0, pattern, burstiness=burstiness))
    assert np.mean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert np.std(gaps) / np.mean(gaps) == pytest.approx(cv, rel=0.08)


def test_ramps_and_stages_have_the_requests_that_the_rate_adds_up_to():
    ramp = times("10", 20.0, ramp_s=10.0)
    assert len(ramp) == 150 and np.sum(ramp < 10) == 50
    assert np.sum(ramp < 5) == pytest.approx(12.5, abs=1)  # a quarter of the ramp's
    stages = times("2@10,8@5", 99.0)
    assert (np.sum(stages < 10), len(stages)) == (20, 60)
    rising = times("1-9", 10.0)
    assert len(rising) == 50 and np.all(np.diff(np.diff(rising)) < 0)


def test_the_same_seed_is_the_same_schedule_and_another_one_is_not():
    assert list(times("5", 9.0, "poisson", seed=3)) == list(times("5", 9.0, "poisson", seed=3))
    assert list(times("5", 9.0, "poisson", seed=3)) != list(times("5", 9.0, "poisson", seed=4))


def test_a_rate_without_an_end_goes_on():
    endless = Profile.parse("3", math.inf).times(unit_times("poisson", 0))
    assert len(list(itertools.islice(endless, 500))) == 500


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "1-", "2@0", "4@x", "1,,2"])
def test_a_rate_that_cannot_be_is_told(text):
    with pytest.raises(SettingsError, match="RATE="):
        Profile.parse(text, 10.0)
