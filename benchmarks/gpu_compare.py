"""Ours and a peer on one GPU, in turns: ``python3 benchmarks/gpu_compare.py --peer 'python3 peer_vllm.py'``.

The peer is any command that takes ``--cases C:I:O,...`` and prints a line of JSON a case with ``concurrency``,
``isl``, ``osl`` and ``output_tokens_per_s``, and ``sampling`` if it takes ``--sampling`` and ``--greedy-cases``
(``peer_vllm.py`` does). Each side runs in processes of its own, ours first, ``--rounds`` times; what follows ``--``
goes to ``benchmarks/gpu.py``; ``--shape`` and ``--precision`` go to both. Prints medians, spreads and ratios.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from kinds import ALL

GPU = Path(__file__).with_name("gpu.py")
CASES = "1:128:128,8:128:128,32:128:128,64:128:128,256:128:128,1024:128:128,1:1000:1,512:1000:500"
REPEATED_UP_TO = 50_000
"""Output tokens of a case that is run three times a round; larger ones once, they take seconds by themselves."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required=True, help="command of the peer")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--sampling", default="greedy", help=f"kinds, of {', '.join(ALL)}")
    parser.add_argument("--greedy-cases", default="", help="more cases, of greedy requests only")
    parser.add_argument("--shape", help="of both sides, as gpu.py has it")
    parser.add_argument("--precision", help="of both sides, as gpu.py has it")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write all results there, as JSON")
    options, ours = parser.parse_known_args()
    ours = [argument for argument in ours if argument != "--"]
    asked = [] if options.sampling == "greedy" else ["--sampling", options.sampling]
    for name in ("shape", "precision"):
        if value := getattr(options, name):
            asked += [f"--{name}", value]
    greedy = [*filter(None, options.greedy_cases.split(","))]
    cases = options.cases.split(",")
    named = [f"{case} {kind}" for case in cases for kind in options.sampling.split(",")]
    named += [f"{case} greedy" for case in greedy]
    rates: dict[str, dict[str, list[float]]] = {"ours": defaultdict(list), "peer": defaultdict(list)}
    gpu: dict[str, Any] = {}
    for _ in range(options.rounds):
        command = [sys.executable, str(GPU), "--parts", "throughput", "--cases", options.cases, *asked]
        for line in lines_of([*command, *more(greedy), *ours]):
            if line.get("part") == "throughput":
                case = f"{line['case']} {line['sampling']}"
                rates["ours"][case] += line["rates"]
                gpu[case] = line["gpu"]
        command = [*shlex.split(options.peer), "--cases", ",".join(repeated(cases)), *asked]
        for line in lines_of([*command, *more(repeated(greedy))]):
            case = f"{line['concurrency']}:{line['isl']}:{line['osl']} {line.get('sampling', 'greedy')}"
            rates["peer"][case].append(line["output_tokens_per_s"])
    if options.out:
        options.out.write_text(json.dumps({"rates": rates, "gpu": gpu}, indent=1))
    return table(named, rates, gpu)


def more(greedy: Iterable[str]) -> list[str]:
    cases = ",".join(greedy)
    return ["--greedy-cases", cases] if cases else []


def repeated(cases: list[str]) -> Iterator[str]:
    for case in cases:
        count, _, outputs = map(int, case.split(":"))
        yield from [case] * (3 if count * outputs <= REPEATED_UP_TO else 1)


def lines_of(command: list[str]) -> Iterator[dict[str, Any]]:
    print("$", shlex.join(command), flush=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for text in process.stdout:
            print(text, end="", flush=True)
            if text.startswith("{"):
                yield json.loads(text)
    if process.returncode:
        sys.exit(f"{command[0]} ended with {process.returncode}: see its output above")


def table(cases: list[str], rates: dict[str, dict[str, list[float]]], gpu: dict[str, Any]) -> int:
    print(f"\n{'case':>24} {'ours tok/s':>24} {'of greedy':>9} {'peer tok/s':>24} {'ratio':>6}   GPU")
    for case in cases:
        ours, peer = rates["ours"][case], rates["peer"][case]
        if not ours or not peer:
            print(f"{case:>24} not measured on both sides")
            continue
        ratio = statistics.median(ours) / statistics.median(peer)
        greedy = rates["ours"].get(f"{case.split()[0]} greedy") or ours
        share = statistics.median(ours) / statistics.median(greedy)
        print(f"{case:>24} {spread(ours):>24} {share:>9.3f} {spread(peer):>24} {ratio:>6.2f}   {gpu[case]}")
    return 0


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f}..{max(values):.0f})"


if __name__ == "__main__":
    sys.exit(main())
