"""Picture and table of ``gpu_long.py --cases curve``: ``python3 benchmarks/long_curve.py long.json long.png``.

Of each length, for each side that ran: the time of a prompt of so many tokens, the operations of the 8B shape in that
time as a share of the H200's FP8 roof (1,979 TFLOP/s, dense), and the time of a decode step after so many tokens.
``growth`` is the exponent between a length and the one before: 1 where time grows as the length does, 2 where attention
is all. A curve without a kink has exponents that only rise, to 2 at the most.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

FP8_ROOF = 1979e12
LAYERS, HEADS, HEAD_DIM = 32, 32, 128
WEIGHTS = 6_979_321_856
"""Of the 8B shape's linears, each of which every token is multiplied with; the output head sees the last one only."""
Curve = dict[str, dict[int, float]]
"""Milliseconds by length, of prompts (``first token``) and of decode steps (``step``)."""


def operations(tokens: int) -> float:
    """Of a prompt: a multiplication and an addition for each weight and token, and attention below the diagonal."""
    return 2.0 * WEIGHTS * tokens + 4.0 * LAYERS * HEADS * HEAD_DIM * tokens * (tokens + 1) / 2


def curves(lines: list[dict[str, Any]]) -> dict[str, Curve]:
    """By side."""
    found: dict[str, Curve] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        named = re.fullmatch(r"(first token of|step after) (\d+) tokens, ms", line.get("what", ""))
        if line.get("case") == "curve" and named:
            found[line["side"]][named[1].rsplit(" ", 1)[0]][int(named[2])] = line["value"]
    return found


def growth(times: dict[int, float]) -> dict[int, float]:
    """Exponents by the longer of two lengths."""
    lengths = sorted(times)
    return {
        after: math.log(times[after] / times[before]) / math.log(after / before)
        for before, after in itertools.pairwise(lengths)
    }


def table(found: dict[str, Curve]) -> str:
    text = [
        "| side | tokens | prompt, ms | us a token | of the FP8 roof | growth | decode step after it, ms |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for side, curve in found.items():
        prompts, exponents = curve["first token"], growth(curve["first token"])
        for tokens, ms in sorted(prompts.items()):
            share = operations(tokens) / (ms / 1e3) / FP8_ROOF
            grows = f"{exponents[tokens]:.2f}" if tokens in exponents else ""
            step = curve["step"].get(tokens)
            text.append(
                f"| {side} | {tokens:,} | {ms:g} | {1e3 * ms / tokens:.1f} | {share:.0%} | {grows} | "
                f"{'' if step is None else f'{step:g}'} |"
            )
    return "\n".join(text)


def picture(found: dict[str, Curve], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for side, curve in found.items():
        for axis, name in zip(axes, ("first token", "step"), strict=True):
            lengths = sorted(curve[name])
            axis.plot(
                lengths, [curve[name][length] for length in lengths], marker="o", markersize=3, label=side
            )
    for axis, title in zip(axes, ("a prompt, ms", "a decode step after it, ms"), strict=True):
        axis.set(xscale="log", xlabel="tokens", title=title)
        axis.grid(alpha=0.3)
    axes[0].set(yscale="log")
    axes[1].set_ylim(bottom=0)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="what gpu_long.py --out has written")
    parser.add_argument("picture", type=Path, help="PNG to write")
    options = parser.parse_args()
    found = curves(json.loads(options.data.read_text(encoding="utf-8")))
    if not found:
        sys.exit(f"long_curve.py: error: {options.data} has no case 'curve': run gpu_long.py --cases curve")
    picture(found, options.picture)
    print(table(found))


if __name__ == "__main__":
    main()
