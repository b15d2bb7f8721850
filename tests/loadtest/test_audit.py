from __future__ import annotations

import pytest

from flightline.loadtest.assertions import parse_all
from flightline.loadtest.audit import (
    Ceiling,
    ClientHealth,
    client_reasons,
    overload_reasons,
    request_reasons,
    sent_reasons,
)
from flightline.loadtest.confidence import bootstrap_ratio, ratio_of_rounds, samples_needed
from flightline.loadtest.histogram import Histogram
from flightline.loadtest.metrics import Window, summarise
from flightline.loadtest.records import ClientSample
from flightline.loadtest.slo import PRESETS, Slo
from flightline.settings import SettingsError
from tests.loadtest.traces import TOKENS, batch_server, record, serial_server

RECORDS = batch_server(4, 1.0, 20.0)
WINDOW = Window(0, 20_000_000_000)


def samples(cpu=0.1, lag_ms=0.5, step_s=0.0) -> list[ClientSample]:
    return [
        ClientSample(
            0, i * 10**9, (i * 10**9 if i < 10 else int((i + step_s) * 1e9)), i * cpu, 4, [lag_ms] * 50
        )
        for i in range(20)
    ]


def judged(**changes) -> list[str]:
    health = ClientHealth.of(samples(**changes), RECORDS, [WINDOW])
    return client_reasons(health, summarise("a", [RECORDS]), Ceiling(10_000, 60, 64, 5000, 1.0))


def test_a_fast_client_is_not_seen():
    assert judged() == []


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"cpu": 0.7}, "70 % of a core"), ({"lag_ms": 30.0}, "30 ms late"), ({"step_s": 3.0}, "moved by 3.0 s")],
)
def test_a_client_that_could_be_seen_is_told(changes, why):
    (reason,) = judged(**changes)
    assert why in reason


def test_a_late_time_stamp_does_not_spoil_a_throughput_without_latencies():
    summary = summarise("a", [serial_server(16, 2.0, 20.0)])
    health = ClientHealth.of(samples(lag_ms=30.0), RECORDS, [WINDOW])
    assert summary.output_tokens_per_s and summary.ttft_s.n == 0
    assert client_reasons(health, summary, None) == []


def test_a_load_near_the_ceiling_is_told():
    health = ClientHealth.of(samples(), RECORDS, [WINDOW])
    (reason,) = client_reasons(health, summarise("a", [RECORDS]), Ceiling(50, 60, 64, 40, 1.0))
    assert "60 % of what 1 worker(s) can take in" in reason


def test_requests_that_were_sent_late_are_told():
    late = [record(i + 0.05, [i + 0.5], intended_ns=i * 10**9) for i in range(20)]
    health = ClientHealth.of(samples(), late, [WINDOW])
    assert "requests were sent 50 ms late" in client_reasons(health, summarise("a", [late]), None)[0]
    assert late[0].ttft_s == 0.5  # from the intended time


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (record(1.0, [], error="gone"), "requests failed: gone"),
        (record(1.0, [2.0] * 7), "wrong length"),
        (
            record(
                1.0, [2.0] * TOKENS, server_times_ns={"arrival_time_ns": 0, "first_token_time_ns": 2 * 10**9}
            ),
            "one of the clocks was set",
        ),
    ],
)
def test_requests_that_must_not_be_believed(bad, why):
    assert request_reasons("a", RECORDS, unique=True) == []
    (reason,) = request_reasons("a", [*RECORDS, bad], unique=True)
    assert why in reason


def test_help_of_a_prefix_cache_is_told_where_no_prompt_shares_a_prefix():
    times = {"arrival_time_ns": 0, "first_token_time_ns": 0, "kv_cache_reused_blocks": 3}
    reused = [record(1.0, [2.0] * TOKENS, server_times_ns=times)]
    assert "prefix cache" in request_reasons("a", reused, unique=True)[0]
    assert request_reasons("a", reused, unique=False) == []


def open_loop(wait_s) -> list:
    """A request a second tenth; ``wait_s`` of its number until all of its tokens come."""
    return [record(i / 10, [i / 10 + wait_s(i)] * TOKENS) for i in range(200)]


def test_a_queue_that_grows_is_over_capacity_and_one_that_breathes_is_not():
    assert overload_reasons("a", open_loop(lambda i: 0.2 + 0.1 * (i % 7)), WINDOW) == []
    (reason,) = overload_reasons("a", open_loop(lambda i: 0.2 + i * 0.03), WINDOW)
    assert "the queue grew" in reason
    (lost,) = overload_reasons("a", [*RECORDS, record(1.0, [], cut_off=True)], WINDOW)
    assert "not answered before the run ended" in lost


def test_requests_that_were_not_sent_are_missed():
    assert sent_reasons("a", open_loop(lambda i: 0.2), WINDOW, 200.0) == []
    assert "only 200 of 300" in sent_reasons("a", open_loop(lambda i: 0.2), WINDOW, 300.0)[0]


def test_slo_and_goodput():
    slo = Slo.parse("ttft=700ms,tpot=100ms,p=50")
    fast = [record(i, [i + 0.5 + 0.05 * k for k in range(TOKENS)]) for i in range(10)]
    slow = [record(i, [i + 0.8 + 0.05 * k for k in range(TOKENS)]) for i in range(10)]
    lost = [record(3, [], error="x")]
    summary = summarise("a", [[*fast, *slow, *lost]], [Window(0, 10 * 10**9)], slo)
    assert summary.attained == pytest.approx(10 / 21)
    assert summary.goodput_per_s == pytest.approx(summary.attained * summary.requests_per_s)
    assert PRESETS["mlperf-interactive"].tpot_s == 0.030
    for text in ("fast", "ttft=1s", "ttft=1s,tpot=0ms", "ttft=1s,tpot=5%", "ttft=1s,tpot=1ms,p=101"):
        with pytest.raises(SettingsError, match="SLO="):
            Slo.parse(text)


def test_samples_that_percentiles_need_are_mlperfs():
    assert [samples_needed(p) for p in (90, 99, 99.9)] == [64, 662, 6636]


def test_intervals_hold_the_truth_and_are_narrow_when_the_repeats_agree():
    even = ratio_of_rounds([[(10.0, 1.0)], [(10.1, 1.0)], [(9.9, 1.0)]])
    assert 1 < even.low < 10 < even.high and even.high - even.low < 1
    none = ratio_of_rounds([[(1.1, 1.0)], [(0.9, 1.0)], [(1.0, 1.0)]])
    assert none.low < 1 < none.high
    same = bootstrap_ratio([1.0, 2.0, 3.0] * 50, [1.0, 2.0, 3.0] * 50)
    assert same.low <= 1.0 <= same.high


def test_a_lone_round_has_no_interval_but_the_spread_of_its_pairs():
    lone = ratio_of_rounds([[(90.0, 10.0), (110.0, 10.0), (None, 1.0), (5.0, None)]])
    assert (lone.low, lone.high, lone.n) == (pytest.approx(9.0), pytest.approx(11.0), 1)
    assert lone.value == pytest.approx(99**0.5)
    assert ratio_of_rounds([[(2.0, 1.0)]]).low is None
    assert ratio_of_rounds([[(None, 1.0)], []]).value is None


def test_histograms_are_exact_to_one_percent():
    values = [*(0.001 * i for i in range(1, 500)), *(0.5 + 0.002 * i for i in range(500))]
    for percent in (50, 90, 99):
        true = values[int(len(values) * percent / 100)]
        assert Histogram(values).percentile(percent) == pytest.approx(true, rel=0.01)
    assert Histogram().percentile(50) is None


def test_assertions_are_read_with_their_units():
    first, second, third = parse_all("ttft_p99<500ms, ratio>=6,attained >= 99%")
    assert (first.name, first.limit, second.limit, third.limit) == ("ttft_p99", 0.5, 6.0, 0.99)
    assert first.holds(0.4) and not first.holds(0.6) and not first.holds(None)
    for text in ("ttft_p99", "speed>3", "ttft_p99<5", "ratio>3ms", "ratio=3"):
        with pytest.raises(SettingsError, match="ASSERT="):
            parse_all(text)
