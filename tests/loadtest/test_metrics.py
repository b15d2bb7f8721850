from __future__ import annotations

import re

import numpy as np
import pytest

from flightline.loadtest.audit import request_reasons, shape_reasons
from flightline.loadtest.metrics import Distribution, steady_window, summarise
from tests.loadtest.traces import TOKENS, batch_server, record, serial_server


@pytest.mark.parametrize("block_s", [46.0, 47.3, 58.9])
def test_a_serial_server_is_measured_without_its_ramp(block_s):
    records = serial_server(concurrency=16, service_s=2.0, block_s=block_s)
    summary = summarise("text_generation", [records])
    assert summary.output_tokens_per_s == pytest.approx(TOKENS / 2.0)
    assert summary.requests_per_s == pytest.approx(0.5)
    assert summary.e2e_s.p50 == pytest.approx(32.0)  # the queue is 16 long for all but the first burst
    assert summary.e2e_s.worst == pytest.approx(32.0)
    with_ramp = np.median([r.e2e_s for r in records if r.complete])
    assert with_ramp < 31.0  # what counting the burst would have shown


@pytest.mark.parametrize("block_s", [20.0, 23.9, 21.0])
def test_a_batching_server_is_measured_in_whole_waves(block_s):
    summary = summarise("text_generation", [batch_server(concurrency=16, answer_s=4.0, block_s=block_s)])
    assert summary.output_tokens_per_s == pytest.approx(16 * TOKENS / 4.0)
    assert summary.e2e_s.p50 == pytest.approx(4.0)
    assert summary.tpot_s.p50 == pytest.approx(0.5)
    assert summary.requests_per_s == pytest.approx(16 / 4.0)


def test_blocks_pool_raw_samples_and_never_average():
    fast = batch_server(4, 1.0, 20.0)
    slow = batch_server(4, 9.0, 29.0)
    summary = summarise("text_generation", [fast, slow])
    assert summary.e2e_s.p50 == pytest.approx(1.0)  # the mean of the two medians would be 5
    assert summary.output_tokens_per_s == pytest.approx((4 * TOKENS * 19 + 4 * TOKENS * 2) / (19 + 18))


def test_slow_requests_that_were_cut_off_do_not_flatter():
    """Of two users one always gets quick answers; the other's slow one is lost when the block ends."""
    quick = [record(float(s), [s + 0.5] * TOKENS) for s in range(0, 20)]
    slow = [record(0.0, [9.0] * TOKENS), record(9.0, [], cut_off=True)]
    sample = summarise("text_generation", [quick + slow]).e2e_s
    assert sample.n == 8  # sent from 1.0 to 8.0: nothing after 9.0, when the lost one was sent


def test_tokens_per_chunk_come_from_the_server():
    one = record(0.0, [1.0, 2.0, 4.0], chunk_tokens=[2, 3, 8], num_output_tokens=8)
    assert (one.ttft_s, one.e2e_s) == (1.0, 4.0)
    assert one.tpot_s == pytest.approx(3.0 / 6)


def test_ttft_is_the_first_text_and_an_answer_in_one_piece_has_no_tpot():
    assert record(0.0, [1.0, 2.0, 3.0], first_text_chunk=1).ttft_s == 2.0
    assert record(0.0, [3.0], chunk_tokens=[8], num_output_tokens=8).tpot_s is None


def test_client_against_model_clock():
    times = {"arrival_time_ns": 7_000_000_000, "first_token_time_ns": 7_900_000_000}
    assert record(0.0, [1.0], server_times_ns=times).outside_s == pytest.approx(0.1)


def test_percentiles_need_samples():
    few, some, many = (Distribution.of(range(count)) for count in (5, 661, 662))
    assert (few.n, few.p50, few.p99, few.worst) == (5, None, None, 4)
    assert (some.n, some.p50, some.p99, some.worst) == (661, 330, None, 660)
    assert many.p99 == pytest.approx(654.39)
    assert Distribution.of(range(63)).p90 is None and Distribution.of(range(64)).p90 == pytest.approx(56.7)
    assert Distribution.of([None]) == Distribution(0, None, None, None)


def check(records) -> list[str]:
    summary = summarise("text_generation", [records])
    return request_reasons("it", records, unique=True) + shape_reasons("it", summary)


def test_a_good_run_has_no_problem():
    assert check(batch_server(4, 1.0, 10.0)) == []


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (record(1.0, [2.0], error="queue full"), r"1 of \d+ requests failed: queue full"),
        (record(1.0, [2.0] * 7), "1 answers of the wrong length: 7 output tokens instead of 8"),
        (record(1.0, [2.0] * 8, num_output_tokens=None), "wrong length: None output tokens"),
    ],
)
def test_one_bad_answer_spoils_the_run(bad, reason):
    (problem,) = check([*batch_server(4, 1.0, 10.0), bad])
    assert re.search(reason, problem)


def test_too_short_a_run_is_told():
    assert "BUDGET_S" in check(batch_server(4, 9.0, 10.0))[0]
    assert steady_window([]) is None


def test_a_block_shorter_than_a_latency_shows_the_throughput_and_says_what_it_does_not_show():
    records = serial_server(16, 2.0, 20.0)
    summary = summarise("text_generation", [records])
    assert check(records) == []
    assert summary.output_tokens_per_s == pytest.approx(TOKENS / 2.0)
    assert (summary.e2e_s.n, summary.e2e_s.p50, summary.ttft_s.p50) == (0, None, None)
    enough = summarise("text_generation", [serial_server(16, 2.0, 44.5)])
    assert enough.e2e_s.n == 6 and enough.e2e_s.p50 is not None
