"""What this machine's load generator can take in, found against a server that costs it nothing to wait for.

A run that comes near this ceiling measures its own client. The null server runs beside the client, on the
same machine, so the ceiling is a careful one.
"""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flightline.client import wire
from flightline.loadtest.audit import Ceiling
from flightline.loadtest.conditions import PROJECT
from flightline.loadtest.null_openai import MODEL
from flightline.loadtest.options import Arm, CalibrateOptions, LoadOptions
from flightline.loadtest.trial import Level, LoadError, Outcome, Trial, run_trial
from flightline.loadtest.words import number
from flightline.settings import load

STREAMS = 256
STEP_S = 0.020
TTFT_S = 0.100
LENGTHS = "uniform:60:140"
"""So that answers end one by one."""
SETTLED_S = 1.0


def calibrate(seconds: float, work: Path, say: Callable[[str], None], openai: bool = False) -> Ceiling:
    """Measures one worker under 256 streams of 50 tokens/s that come in steps; the server is a process of its own.

    Args:
        openai: Over HTTP, and not over gRPC.

    Raises:
        LoadError: the load generator did not run.
    """
    folder = work / ("calibration-openai" if openai else "calibration")
    folder.mkdir()
    program, step = ("null_openai", "--step --tpot-ms") if openai else ("burst_server", "--step-ms")
    options = [f"--ttft-ms={1e3 * TTFT_S:g}", *f"{step}={1e3 * STEP_S:g}".split()]
    server = subprocess.Popen(
        [sys.executable, "-m", f"flightline.loadtest.{program}", *options],
        stdout=subprocess.PIPE,
        text=True,
        cwd=PROJECT,
    )
    try:
        assert server.stdout is not None
        url = server.stdout.readline().rpartition(" ")[2].strip()
        arm = Arm("null", url, MODEL if openai else wire.TEXT_GENERATION, token_ids=openai)
        trial = Trial("calibration", arm, Level(STREAMS), math.ceil(seconds) + SETTLED_S)
        outcome = run_trial(trial, LoadOptions(output_tokens=LENGTHS), folder, lambda line: None)
    finally:
        server.terminate()
        server.wait()
    if outcome.failure:
        raise LoadError(f"calibration: {outcome.failure}")
    ceiling = ceiling_of(outcome)
    late = (
        f", tokens are {number(ceiling.delay_p99_ms)} ms late at p99"
        if ceiling.delay_p99_ms is not None
        else ""
    )
    say(
        f"calibration{' over HTTP' if openai else ''}: one worker of this load generator takes in "
        f"{ceiling.tokens_per_s:.0f} tokens/s at a full core ({ceiling.us_per_token:.0f} us each; "
        f"at {ceiling.measured_per_s:.0f} tokens/s from {STREAMS} streams{late})"
    )
    return ceiling


def ceiling_of(outcome: Outcome) -> Ceiling:
    """From a run against a null server, whose answers carry the times at which they were sent."""
    first_ns = min((record.sent_ns for record in outcome.records), default=0) + int(SETTLED_S * 1e9)
    inside = [sample for sample in outcome.clients if sample.time_ns >= first_ns][:-1]
    if len(inside) < 2:
        raise LoadError("calibration: it was too short: raise CALIBRATE_S")
    first, last = inside[0], inside[-1]
    seconds = (last.time_ns - first.time_ns) / 1e9
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
        if record.complete and record.server_times_ns and first.time_ns < record.chunk_ns[-1] <= last.time_ns
    ]
    if not arrived:
        raise LoadError("calibration: the load generator measured nothing")
    per_token_s = (last.cpu_s - first.cpu_s) / arrived
    return Ceiling(
        tokens_per_s=1 / per_token_s,
        us_per_token=1e6 * per_token_s,
        streams=STREAMS,
        measured_per_s=arrived / seconds,
        delay_p99_ms=float(np.percentile(delays, 99)) if delays else None,
    )


def main(arguments: list[str]) -> int:
    """``flightline loadtest calibrate [--seconds 10] [--openai]``: prints the ceiling."""
    options = load(CalibrateOptions, "flightline loadtest calibrate", arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            calibrate(options.seconds, Path(folder), lambda line: print(line, flush=True), options.openai)
        except LoadError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0
