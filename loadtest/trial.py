"""One stretch of load on one endpoint: a headless Locust in a process of its own, and what it recorded."""

from __future__ import annotations

import itertools
import json
import math
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from flightline.loadtest.conditions import PROJECT
from flightline.loadtest.metrics import Window, steady_window
from flightline.loadtest.options import IN_LOCUST, Arm, LoadOptions
from flightline.loadtest.records import (
    CLIENTS,
    RECORDS_FULL_STATUS,
    WORKERS,
    ClientSample,
    RequestRecord,
    read_clients,
    read_records,
)
from flightline.loadtest.schedule import Profile, unit_times
from flightline.loadtest.workload import read_trace

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
USER_CLASSES = {"text_generation": "TextGeneration", "ensemble": "Ensemble", "hf_baseline": "HfBaseline"}
OPENAI_USER = "OpenAi"
RECORDS, LOCUST_LOG = "records.jsonl", "locust.log"
PROGRESS_S = 10.0
START_S = 240.0
"""Longest that Locust may take beyond the load itself: its start, its workers', its end."""


class LoadError(Exception):
    """The run cannot go on; one line that says why."""


@dataclass(frozen=True)
class Level:
    """How hard: exactly one of the three."""

    concurrency: int = 0
    rate: str = ""
    trace: str = ""
    trace_speed: float = 1.0

    @property
    def closed(self) -> bool:
        return self.concurrency > 0

    @property
    def label(self) -> str:
        if self.closed:
            return f"{self.concurrency} in flight"
        return f"trace {Path(self.trace).name}" if self.trace else f"{self.rate} requests/s"

    @property
    def x(self) -> float | None:
        """Its place on the axis of loads."""
        if self.closed:
            return float(self.concurrency)
        try:
            return float(self.rate)
        except ValueError:
            return None


@dataclass(frozen=True)
class Trial:
    """What is to be done."""

    name: str
    arm: Arm
    level: Level
    seconds: float
    round: int = 1
    first_prompt: int = 0


@dataclass
class Outcome:
    """What was recorded."""

    trial: Trial
    records: list[RequestRecord] = field(default_factory=list)
    clients: list[ClientSample] = field(default_factory=list)
    window: Window | None = None
    """The part that counts; None if there is none."""
    expected: float | None = None
    """Requests that an open loop was to send in the window."""
    failure: str | None = None


def run_trial(
    trial: Trial, options: LoadOptions, work: Path, say: Callable[[str], None], locustfile: Path = LOCUSTFILE
) -> Outcome:
    """Runs Locust to its end and reads what it left in ``work``; a failure is told and not raised."""
    failure = None
    try:
        _run_locust(trial, options, work, say, locustfile)
    except LoadError as error:
        failure = str(error)
    except KeyboardInterrupt:
        failure = "stopped by Ctrl-C"
    return read_outcome(trial, options, work, failure)


def read_outcome(trial: Trial, options: LoadOptions, work: Path, failure: str | None = None) -> Outcome:
    """The trial's part of the files."""
    records = [record for record in read_records(work / RECORDS) if record.block == trial.name]
    clients = [sample for sample in read_clients(work / CLIENTS) if sample.block == trial.name]
    ended = _workers(work / WORKERS, trial.name)
    if failure is None and ended is None:
        failure = "the load generator did not say that it had ended"
    if ended is not None and ended["finished"] < ended["expected"]:
        lost = ended["expected"] - ended["finished"]
        failure = (
            failure or f"{lost} of {ended['expected']} workers went missing, and their last records with them"
        )
    # An open loop's schedule starts when all workers were told it would, a closed one with its first request.
    start_ns = min((record.start_ns for record in records), default=0)
    if ended is not None and not trial.level.closed:
        start_ns = ended["start_ns"]
    window, expected = _window(trial, options, records, start_ns)
    return Outcome(trial, records, clients, window, expected, failure)


def _window(
    trial: Trial, options: LoadOptions, records: list[RequestRecord], start_ns: int
) -> tuple[Window | None, float | None]:
    settled_s = options.ramp_s + options.discard_s
    if trial.level.closed:
        return steady_window(records, start_ns + int(settled_s * 1e9)), None
    if trial.level.trace:
        times = [row.at_s / trial.level.trace_speed for row in read_trace(trial.level.trace, options.seed)]
        end_s = min(trial.seconds, max(times) + 1e-3)
    else:
        profile = Profile.parse(trial.level.rate, trial.seconds, options.ramp_s)
        end_s = min(trial.seconds, profile.seconds)
        # The schedule's own number and not its mean: chance is no fault of the client.
        arrivals = profile.times(unit_times(options.arrivals, options.seed, options.burstiness))
        times = list(itertools.takewhile(lambda at_s: at_s < end_s, arrivals))
    expected = float(sum(settled_s <= at_s < end_s for at_s in times))
    if end_s <= settled_s:
        return None, expected
    return Window(start_ns + int(settled_s * 1e9), start_ns + int(end_s * 1e9)), expected


def _workers(path: Path, block: str) -> dict | None:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return None
    return next((line for line in reversed(lines) if line["block"] == block), None)


def command(trial: Trial, options: LoadOptions, work: Path, locustfile: Path) -> list[str]:
    """Locust's command line."""
    level, arm = trial.level, trial.arm
    closed, run_s = level.closed, trial.seconds
    users = level.concurrency if closed else max(1, options.processes, options.workers)
    ramp_s = options.ramp_s if closed else 0.0
    values = {
        "-f": locustfile,
        "--host": trial.arm.url,
        "-u": users,
        "-r": round(users / ramp_s, 3) if ramp_s else users,
        "-t": math.ceil(run_s if closed else run_s + options.drain_s),
        "--model": arm.endpoint if arm.openai else "",
        "--first-prompt": trial.first_prompt,
        "--records": work / RECORDS,
        "--block": trial.name,
        "--exit-code-on-error": 0,  # the records tell what failed
    }
    given = vars(options) | vars(level) | {"openai_api": arm.api, "token_ids": arm.token_ids}
    given |= {name: Path(given[name]).resolve() for name in ("prompts", "trace") if given[name]}
    switches = []
    for name in IN_LOCUST:  # each of them: what is left out, Locust would take from the environment
        flag = "--" + name.replace("_", "-")
        if isinstance(given[name], bool):
            switches += [flag] * given[name]
        else:
            values[flag] = given[name]
    if not closed:
        values["--arrive-for"] = run_s
    if options.workers:
        values |= {
            "--master-bind-port": options.master_port,
            "--expect-workers": options.workers,
            "--expect-workers-max-wait": 60,
        }
    elif options.processes > 1:
        port = free_port()  # several runs may go on at once on a machine
        values |= {"--processes": options.processes, "--master-bind-port": port, "--master-port": port}
    words = [
        f"{name}={value}" if name.startswith("--") else f"{name}{value}" for name, value in values.items()
    ]
    words += switches
    words += ["--master"] if options.workers else []
    program = [sys.executable, "-m", "flightline.loadtest.locust_main", "--headless", "--only-summary"]
    return [*program, *words, OPENAI_USER if arm.openai else USER_CLASSES[arm.endpoint]]


def free_port() -> int:
    """A TCP port that nothing listens on now."""
    with closing(socket.socket()) as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


def _run_locust(
    trial: Trial, options: LoadOptions, work: Path, say: Callable[[str], None], locustfile: Path
) -> None:
    limit_s = START_S + trial.seconds + (0 if trial.level.closed else options.drain_s)
    with (work / LOCUST_LOG).open("a", encoding="utf-8") as log:
        log_start = log.tell()
        locust = subprocess.Popen(
            command(trial, options, work, locustfile), cwd=PROJECT, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            status = _wait(locust, trial, work, limit_s, say)
        except BaseException:
            _end(locust)
            raise
    if status is None:
        raise LoadError("Locust did not end in time")
    if status != 0:
        last = _last_line(work / LOCUST_LOG, log_start)
        if status == RECORDS_FULL_STATUS:
            raise LoadError(last)
        raise LoadError(f"Locust ended with status {status}: {last}")


def _wait(
    locust: subprocess.Popen, trial: Trial, work: Path, limit_s: float, say: Callable[[str], None]
) -> int | None:
    """Its exit status, or None if it did not end in time; says how it goes on meanwhile."""
    start, answered = time.monotonic(), 0
    seen = (work / RECORDS).stat().st_size if (work / RECORDS).exists() else 0  # those of earlier trials
    while (passed := time.monotonic() - start) < limit_s:
        try:
            return locust.wait(timeout=PROGRESS_S)
        except subprocess.TimeoutExpired:
            pass
        try:
            with (work / RECORDS).open("rb") as records:
                records.seek(seen)
                new = records.read()
        except FileNotFoundError:
            new = b""
        seen, answered = seen + len(new), answered + new.count(b"\n")
        say(
            f"{trial.name}: {passed + PROGRESS_S:.0f} s of about {trial.seconds + 3:.0f}, {answered} requests ended"
        )
    _end(locust)
    return None


def _end(locust: subprocess.Popen) -> None:
    """Gives it the time to write what it has."""
    if locust.poll() is None:
        locust.send_signal(signal.SIGTERM)
        try:
            locust.wait(timeout=25)
        except subprocess.TimeoutExpired:
            locust.kill()
            locust.wait()


def _last_line(log: Path, start: int) -> str:
    """The last error that Locust logged, without its time stamp, else its last line."""
    lines = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
    told = [line for line in lines if "/ERROR/" in line or line.startswith("error:")]
    line = (told or lines or [""])[-1]
    return line.split(": ", 1)[1] if "/ERROR/" in line and ": " in line else line.removeprefix("error: ")
