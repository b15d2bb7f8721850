"""Does the load test agree with somebody else's client? With Triton's own, on a real server under the same load.

``python3 benchmarks/loadtest_agreement.py [--url HOST:PORT] [--out FILE.md]``

``flightline loadtest run`` and ``tests/loadtest/independent.py``, which uses tritonclient and nothing of ours, put half
of the load on the server each, with prompts of the same kind and in the same seconds: in turns the one that needs less
of the machine for itself would meet a faster server on two cores. The median of the rounds' ratios must be within 5 %
of 1. Without ``--url`` the built server is started. Takes about four minutes, and says how much of a core each client
needed. Exit status: 0 they agree, 1 they do not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flightline.loadtest.prompts import Prompts  # noqa: E402
from flightline.loadtest.target import TargetError, target  # noqa: E402

ENDPOINT, CONCURRENCY, TOKENS = "text_generation", 2, 32
"""Requests in flight of each client."""
LIMIT = 0.05
ENOUGH_PROMPTS = 5_000
FIGURES = (("output, tokens/s", 1.0), ("TTFT p50, ms", 1e3), ("E2E p50, ms", 1e3))


@dataclass(frozen=True)
class Found:
    figures: list[float]
    """Tokens/s, median TTFT and median end-to-end latency (s)."""
    core: float
    """CPU seconds a second."""


def ours(url: str, seconds: int, seed: int, folder: Path) -> Found:
    load = {"url": url, "concurrency": CONCURRENCY, "output-tokens": TOKENS, "seconds": seconds, "seed": seed}
    options = load | {"reports": folder, "calibrate-s": 0}
    asked = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    status, _, core = run([sys.executable, "-m", "flightline.loadtest", "run", *asked])
    report = json.loads((folder / "latest" / "report.json").read_text())
    if status:
        print(f"seed {seed}: INVALID: {'; '.join(report['reasons'])}", flush=True)
    summary = report["cells"][0]["summary"]
    return Found([summary["output_tokens_per_s"], summary["ttft_s"]["p50"], summary["e2e_s"]["p50"]], core)


def theirs(url: str, seconds: int, seed: int, folder: Path) -> Found:
    """The same, by the other client."""
    prompts = Prompts(seed)
    lines = folder / "prompts.txt"
    lines.write_text("\n".join(" ".join(prompts[i].split()) for i in range(ENOUGH_PROMPTS)))
    script = ROOT / "tests" / "loadtest" / "independent.py"
    load = [url, ENDPOINT, str(CONCURRENCY), str(TOKENS), str(seconds), str(lines)]
    status, told, core = run([sys.executable, str(script), *load])
    if status:
        raise SystemExit(f"error: {script.name} ended with {status}")
    return Found([float(word) for word in told.split()[:3]], core)


def run(command: list[str]) -> tuple[int, str, float]:
    """Exit status, what it said, and how much of a core it and its processes needed."""
    started = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        told = process.stdout.read() if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    used = usage.ru_utime + usage.ru_stime
    return process.returncode, told, used / (time.monotonic() - started)


def table(rounds: list[tuple[Found, Found]]) -> tuple[str, bool]:
    """Medians over the rounds, and whether all ratios are near enough to 1."""
    lines = ["| | python -m flightline.loadtest run | tritonclient | ratio, median | of each round | |"]
    lines += ["| --- | --: | --: | --: | --: | --- |"]
    agree = True
    for index, (name, scale) in enumerate(FIGURES):
        a, b = ([side.figures[index] * scale for side in sides] for sides in zip(*rounds, strict=True))
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        ratio = statistics.median(ratios)
        each = ", ".join(f"{one:.3f}" for one in ratios)
        ok = abs(ratio - 1) <= LIMIT
        agree &= ok
        medians = f"{statistics.median(a):.2f} | {statistics.median(b):.2f}"
        lines.append(f"| {name} | {medians} | {ratio:.3f} | {each} | {'agree' if ok else '**differ**'} |")
    cores = [statistics.median(side.core for side in sides) for sides in zip(*rounds, strict=True)]
    lines += [
        f"| of a core, with its start | {cores[0]:.2f} | {cores[1]:.2f} | {cores[0] / cores[1]:.3f} | | |"
    ]
    return "\n".join(lines), agree


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="", help="gRPC address of a running server")
    parser.add_argument("--build-dir", default="build")
    parser.add_argument("--seconds", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, help="also write the table there, as Markdown")
    options = parser.parse_args()
    rounds: list[tuple[Found, Found]] = []
    with (
        tempfile.TemporaryDirectory() as work,
        target(
            options.url, options.build_dir, lambda line: print(line, flush=True), baseline=False
        ) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        theirs(server.url, 5, 0, Path(work))  # neither shall get the server cold
        for number in range(options.rounds):
            running = [
                pool.submit(side, server.url, options.seconds, 1 + 2 * number + place, Path(work))
                for place, side in enumerate((ours, theirs))
            ]
            one, other = (each.result() for each in running)
            print(f"round {number + 1}: {one}, {other}", flush=True)
            rounds.append((one, other))
    text, agree = table(rounds)
    print(f"\n{text}")
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    return 0 if agree else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TargetError as error:
        sys.exit(f"error: {error}")
