"""Does the load test report what a server did? Against the null server, whose times are set.

``python3 benchmarks/loadtest_accuracy.py [--out FILE.md]``

64 requests in flight, closed and open loop, one and two worker processes: every figure of the report is held
against the times that the server was told to take, within 1 ms or 1 %. Then a load generator that is stopped for
half of the time, and whose run must be called INVALID. Takes three and a half minutes and needs two cores that are
otherwise idle. Exit status: 0 all of it holds, 1 something does not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
STREAMS, TOKENS = 64, 33
OUTSIDE_S, SERVER_TTFT_S, TPOT_S, PAUSE_S = 0.500, 0.300, 0.040, 0.200
"""On the way to the server; from there to the first token; between tokens; a stall in the middle."""
TTFT_S = OUTSIDE_S + SERVER_TTFT_S
E2E_S = TTFT_S + (TOKENS - 1) * TPOT_S + PAUSE_S
RATE = STREAMS / E2E_S
"""Requests/s that keep 64 in flight."""
MEASURED_S = 24.0
RAMP_S = 16.0
"""Users of the closed loop start four a second: 64 at once would stay in step for ever."""
LIMIT_S, LIMIT_SHARE = 0.001, 0.01
STOPPED_S, RUNNING_S = 0.060, 0.060


@dataclass(frozen=True)
class Row:
    """One figure of one run; times in seconds."""

    name: str
    injected: float
    reported: float | None
    unit: str = "ms"

    @property
    def allowed(self) -> float:
        share = LIMIT_SHARE * self.injected
        return max(LIMIT_S, share) if self.unit == "ms" else share

    @property
    def ok(self) -> bool:
        return self.reported is not None and abs(self.reported - self.injected) <= self.allowed

    def cells(self) -> list[str]:
        scale = 1e3 if self.unit == "ms" else 1.0

        def shown(value: float | None, sign: str = "") -> str:
            return "" if value is None else f"{value * scale:{sign}.2f}"

        difference = None if self.reported is None else self.reported - self.injected
        figures = [shown(self.injected), shown(self.reported), shown(difference, "+")]
        return [f"{self.name}, {self.unit}", *figures, shown(self.allowed), "pass" if self.ok else "**FAIL**"]


HEAD = ["", "injected", "reported", "difference", "allowed", ""]


def table(rows: list[Row]) -> str:
    lines = [HEAD, ["---", *["--:"] * (len(HEAD) - 1)], *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


@contextmanager
def null_server() -> Iterator[str]:
    """Its address; a process of its own."""
    times = {"ttft": SERVER_TTFT_S, "tpot": TPOT_S, "outside": OUTSIDE_S, "pause": PAUSE_S}
    options = [f"--{name}-ms={1e3 * seconds:g}" for name, seconds in times.items()]
    command = [sys.executable, "-m", "flightline.loadtest.null_server", "--port=0", *options]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield server.stdout.readline().rpartition(" ")[2].strip()
    finally:
        server.kill()
        server.wait()


def run(url: str, folder: Path, *load: str) -> tuple[int, dict]:
    """The command as a user types it: its exit status and its report."""
    options = ["--url", url, "--reports", str(folder), "--output-tokens", str(TOKENS), "--calibrate-s", "0"]
    command = [sys.executable, "-m", "flightline.loadtest", "run", *options, *load]
    status = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode
    return status, json.loads((folder / "latest" / "report.json").read_text())


def loop_options(loop: str) -> list[str]:
    if loop == "closed":
        seconds = RAMP_S + E2E_S + MEASURED_S
        return ["--concurrency", str(STREAMS), "--ramp-s", str(RAMP_S), "--seconds", str(seconds)]
    settled_s = 2 * E2E_S
    load = ["--rate", f"{RATE:.6f}", "--arrivals", "constant", "--discard-s", str(settled_s)]
    return [*load, "--seconds", str(settled_s + MEASURED_S)]


def compare(report: dict) -> list[Row]:
    """The report's figures beside what they must be."""
    (cell,) = report["cells"]
    summary = cell["summary"]

    def p50(name: str) -> float | None:
        return summary[name]["p50"]

    return [
        Row("TTFT p50", TTFT_S, p50("ttft_s")),
        Row("the server's own TTFT p50", SERVER_TTFT_S, p50("server_ttft_s")),
        Row("outside the server's own TTFT p50", OUTSIDE_S, p50("outside_s")),
        Row("TPOT p50", (E2E_S - TTFT_S) / (TOKENS - 1), p50("tpot_s")),
        Row("gap p50", TPOT_S, p50("gap_s")),
        Row("worst stall p50", TPOT_S + PAUSE_S, p50("stall_s")),
        Row("E2E p50", E2E_S, p50("e2e_s")),
        Row("requests sent late p50", 0.0, p50("schedule_delay_s")),
        Row("output", STREAMS * TOKENS / E2E_S, summary["output_tokens_per_s"], unit="tokens/s"),
        Row("requests", RATE, summary["requests_per_s"], unit="1/s"),
    ]


def steal_share(before, after) -> float:
    """Of the CPU time between, what a virtual machine's host gave to others (psutil.cpu_times)."""
    return (getattr(after, "steal", 0.0) - getattr(before, "steal", 0.0)) / (sum(after) - sum(before))


def about(report: dict) -> str:
    hardware = report["conditions"]["hardware"]
    machine = f"{hardware['cores']} cores, {hardware['cpu']}"
    return (
        f"{STREAMS} requests in flight, {TOKENS} tokens each, {STREAMS * TOKENS / E2E_S:.0f} tokens/s, from a server "
        f"in Python on the same machine ({machine}); {MEASURED_S:.0f} s are measured of each run. "
        f"Commit {report['conditions']['git_commit'][:7]}."
    )


def slow_client(url: str, folder: Path) -> tuple[int, str]:
    """A run whose processes get the CPU only half of the time: its exit status and its verdict."""
    over = threading.Event()

    def stop_and_go() -> None:
        while not over.wait(RUNNING_S):
            workers = [
                process for process in psutil.Process().children(recursive=True) if is_load_generator(process)
            ]
            for act in ("suspend", "resume"):
                for process in workers:
                    with suppress(psutil.Error):
                        getattr(process, act)()
                time.sleep(STOPPED_S if act == "suspend" else 0.0)

    jerks = threading.Thread(target=stop_and_go)
    jerks.start()
    try:
        status, report = run(url, folder, "--concurrency", "16", "--seconds", "10")
    finally:
        over.set()
        jerks.join()
    return status, "; ".join([report["verdict"], *report["reasons"]])


def is_load_generator(process: psutil.Process) -> bool:
    try:
        return "flightline.loadtest.locust_main" in process.cmdline()
    except psutil.Error:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write the tables there, as Markdown")
    out = parser.parse_args().out
    parts, failures = [], []

    def tell(text: str) -> None:
        parts.append(text)
        print(text + "\n", flush=True)

    with tempfile.TemporaryDirectory() as folder, null_server() as url:
        for loop in ("closed", "open"):
            for processes in (1, 2):
                name = f"{loop} loop, {processes} process{'es' if processes > 1 else ''}"
                work = Path(folder) / name.replace(" ", "-")
                seed = str(len(parts))
                load = [*loop_options(loop), "--processes", str(processes), "--seed", seed]
                before = psutil.cpu_times()
                status, report = run(url, work, *load)
                stolen = steal_share(before, psutil.cpu_times())
                rows = compare(report)
                summary = report["cells"][0]["summary"]
                if not parts:
                    tell(about(report))
                tell(f"### {name}")
                tell(table(rows))
                verdict = "; ".join([report["verdict"], *report["reasons"]])
                late = ", ".join(
                    f"{what} {1e3 * value:.2f} ms" if value is not None else f"{what} n/a"
                    for what, value in (
                        ("TTFT p99", summary["ttft_s"]["p99"]),
                        ("sent late p99", summary["schedule_delay_s"]["p99"]),
                        ("outside p99", summary["outside_s"]["p99"]),
                    )
                )
                tell(
                    f"{verdict}; n = {summary['e2e_s']['n']}; for information: {late}; "
                    f"{100 * stolen:.1f} % of the machine went to others (steal)."
                )
                failures += [f"{name}: {row.name}" for row in rows if not row.ok]
                failures += [f"{name}: {verdict}"] if status else []
        status, verdict = slow_client(url, Path(folder) / "slow")
        tell(
            f"### A client that is stopped for {1e3 * STOPPED_S:.0f} ms after every {1e3 * RUNNING_S:.0f} ms"
        )
        tell(f"Exit status {status}. {verdict}.")
        if status != 1 or "load generator" not in verdict:
            failures.append("the slow client was not called slow")
    tell("All of it holds." if not failures else "Does not hold: " + "; ".join(failures) + ".")
    if out:
        out.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
