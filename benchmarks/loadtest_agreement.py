"""Does the load test agree with somebody else's client? With Triton's own, on a real server under the same load.

``python3 benchmarks/loadtest_agreement.py [--url HOST:PORT] [--out FILE.md]``

``flightline loadtest run`` and ``tests/loadtest/independent.py``, which uses tritonclient and nothing of ours, send
prompts of the same kind in turns, A B, B A, A B, ... The median of the rounds' ratios must be within 5 % of 1.
Without ``--url`` the built server is started. Takes about eight minutes. Exit status: 0 they agree, 1 they do not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flightline.loadtest.prompts import Prompts  # noqa: E402
from flightline.loadtest.target import TargetError, target  # noqa: E402

ENDPOINT, CONCURRENCY, TOKENS = "text_generation", 4, 32
LIMIT = 0.05
ENOUGH_PROMPTS = 5_000
FIGURES = (("output, tokens/s", 1.0), ("TTFT p50, ms", 1e3), ("E2E p50, ms", 1e3))


def ours(url: str, seconds: int, seed: int, folder: Path) -> list[float]:
    """Tokens/s, median TTFT and median end-to-end latency (s)."""
    options = ["--url", url, "--concurrency", str(CONCURRENCY), "--output-tokens", str(TOKENS)]
    options += [
        "--seconds",
        str(seconds),
        "--seed",
        str(seed),
        "--reports",
        str(folder),
        "--calibrate-s",
        "0",
    ]
    status = subprocess.run(
        [sys.executable, "-m", "flightline.loadtest", "run", *options], cwd=ROOT, stdout=subprocess.DEVNULL
    ).returncode
    report = json.loads((folder / "latest" / "report.json").read_text())
    if status:
        print(f"seed {seed}: INVALID: {'; '.join(report['reasons'])}", flush=True)
    summary = report["cells"][0]["summary"]
    return [summary["output_tokens_per_s"], summary["ttft_s"]["p50"], summary["e2e_s"]["p50"]]


def theirs(url: str, seconds: int, seed: int, folder: Path) -> list[float]:
    """The same, by the other client."""
    prompts = Prompts(seed)
    lines = folder / "prompts.txt"
    lines.write_text("\n".join(" ".join(prompts[i].split()) for i in range(ENOUGH_PROMPTS)))
    script = ROOT / "tests" / "loadtest" / "independent.py"
    load = [url, ENDPOINT, str(CONCURRENCY), str(TOKENS), str(seconds), str(lines)]
    told = subprocess.run([sys.executable, str(script), *load], check=True, capture_output=True, text=True)
    return [float(word) for word in told.stdout.split()[:3]]


def table(rounds: list[tuple[list[float], list[float]]]) -> tuple[str, bool]:
    """Medians over the rounds, and whether all ratios are near enough to 1."""
    lines = ["| | python -m flightline.loadtest run | tritonclient | ratio, median | of each round | |"]
    lines += ["| --- | --: | --: | --: | --: | --- |"]
    agree = True
    for index, (name, scale) in enumerate(FIGURES):
        a, b = ([side[index] * scale for side in sides] for sides in zip(*rounds, strict=True))
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        ratio = statistics.median(ratios)
        each = ", ".join(f"{one:.3f}" for one in ratios)
        ok = abs(ratio - 1) <= LIMIT
        agree &= ok
        medians = f"{statistics.median(a):.2f} | {statistics.median(b):.2f}"
        lines.append(f"| {name} | {medians} | {ratio:.3f} | {each} | {'agree' if ok else '**differ**'} |")
    return "\n".join(lines), agree


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="", help="gRPC address of a running server")
    parser.add_argument("--build-dir", default="build")
    parser.add_argument("--seconds", type=int, default=14)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--out", type=Path, help="also write the table there, as Markdown")
    options = parser.parse_args()
    rounds = []
    with (
        tempfile.TemporaryDirectory() as work,
        target(
            options.url, options.build_dir, lambda line: print(line, flush=True), baseline=False
        ) as server,
    ):
        theirs(server.url, 5, 0, Path(work))  # neither shall get the server cold
        for number in range(options.rounds):
            found = {}
            for side in (ours, theirs) if number % 2 == 0 else (theirs, ours):
                seed = 1 + 2 * number + (side is theirs)
                found[side] = side(server.url, options.seconds, seed, Path(work))
                print(f"round {number + 1}, {side.__name__}: {found[side]}", flush=True)
            rounds.append((found[ours], found[theirs]))
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
