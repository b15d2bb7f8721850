"""What this machine's load generator can take in, found against a server that costs it nothing to wait for.

A run that comes near this ceiling measures its own client. The null server runs beside the client, on the
same machine, so the ceiling is a careful one.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from loadtest.audit import Ceiling
from loadtest.options import Arm, LoadOptions
from loadtest.trial import Level, LoadError, Trial, run_trial

STREAMS = 64
STEP_S = 0.020
TTFT_S = 0.100


def calibrate(seconds: float, work: Path, say: Callable[[str], None]) -> Ceiling:
    """Measures one worker under 64 streams of 50 tokens/s, and extrapolates its CPU time per token.

    The null server runs in a process of its own.

    Raises:
        LoadError: the load generator did not run.
    """
    folder = work / "calibration"
    folder.mkdir()
    server = subprocess.Popen(
        [sys.executable, "-m", "loadtest.null_server", "--port=0", "--step", f"--ttft-ms={1e3 * TTFT_S:g}",
         f"--tpot-ms={1e3 * STEP_S:g}"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        url = server.stdout.readline().rpartition(" ")[2].strip()
        tokens = max(8, round(min(seconds, 2.0) / 2 / STEP_S))
        options = LoadOptions(output_tokens=str(tokens))
        trial = Trial("calibration", Arm("null", url, "text_generation"), Level(STREAMS), math.ceil(seconds))
        outcome = run_trial(trial, options, folder, lambda line: None)
    finally:
        server.terminate()
        server.wait()
    window = outcome.window
    if outcome.failure or window is None:
        raise LoadError(f"calibration: {outcome.failure or 'the load generator measured nothing'}")
    ceiling = ceiling_of(outcome)
    say(
        f"calibration: one worker of this load generator takes in {ceiling.tokens_per_s:.0f} tokens/s "
        f"({ceiling.us_per_token:.0f} us each, {ceiling.delay_p99_ms:.1f} ms late at p99 with {STREAMS} streams)"
    )
    return ceiling


def ceiling_of(outcome) -> Ceiling:
    """From a run against the null server, whose answers carry the times at which they were sent."""
    window = outcome.window
    inside = [s for s in outcome.clients if window.start_ns <= s.time_ns <= window.end_ns] or outcome.clients
    first, last = inside[0], inside[-1]
    cpu_s, seconds = last.cpu_s - first.cpu_s, (last.time_ns - first.time_ns) / 1e9
    arrived = sum(first.time_ns < at <= last.time_ns for record in outcome.records for at in record.chunk_ns)
    delays = [
        (
            record.chunk_ns[-1]
            + record.sent_unix_ns
            - record.sent_ns
            - record.server_times_ns["last_token_time_ns"]
        )
        / 1e6
        for record in outcome.records
        if record.complete and record.server_times_ns
    ]
    if not arrived or seconds <= 0 or cpu_s <= 0 or not delays:
        raise LoadError("calibration: the load generator measured nothing")
    per_token_s = cpu_s / arrived
    return Ceiling(
        tokens_per_s=1 / per_token_s,
        us_per_token=1e6 * per_token_s,
        streams=STREAMS,
        delay_p99_ms=float(np.percentile(delays, 99)),
    )


def main(arguments: list[str]) -> int:
    """``python -m loadtest calibrate [--seconds 10]``: prints the ceiling."""
    parser = argparse.ArgumentParser(prog="python -m loadtest calibrate", description=__doc__)
    parser.add_argument("--seconds", type=float, default=8.0)
    seconds = parser.parse_args(arguments).seconds
    with tempfile.TemporaryDirectory() as folder:
        try:
            calibrate(seconds, Path(folder), lambda line: print(line, flush=True))
        except LoadError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0
