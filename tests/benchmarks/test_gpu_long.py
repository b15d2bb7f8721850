"""The cases of the benchmark of long prompts, on an engine that gives a token a step to each request."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_long.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_long", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_long"] = module
    spec.loader.exec_module(module)
    return module


class OneTokenAStep:
    """Notes the prompts that it gets."""

    gaps = (0, 50)

    def __init__(self) -> None:
        self.steps: list[list[float]] = []
        self.prompts: list[list[int]] = []
        self.left: dict[str, int] = {}
        self.bounds: list[int] = []

    def add(self, key: str, prompt: list[int], outputs: int) -> None:
        self.prompts.append(prompt)
        self.left[key] = outputs

    def step(self) -> list[tuple[str, list[int], bool]]:
        self.left = {key: left - 1 for key, left in self.left.items() if left}
        return [(key, [left], left == 0) for key, left in self.left.items()]

    def cancel(self, key: str) -> None:
        self.left.pop(key, None)

    def bound_gaps(self, milliseconds: int) -> None:
        self.bounds.append(milliseconds)
        self.steps.append([milliseconds])


def figures(script: ModuleType, case: str) -> tuple[OneTokenAStep, dict[str, dict]]:
    side = OneTokenAStep()
    lines = list(script.Cases(side, script.TINY).run(case))
    assert [line["steps"] for line in lines if "what" not in line] == [side.steps] * (case == "gaps")
    found = {line["what"]: line for line in lines if "what" in line}
    assert found and all(line["value"] > 0 for line in found.values())
    return side, found


@pytest.mark.parametrize("case", ["8x16000/256", "first-30000"])
def test_every_prompt_is_another(script: ModuleType, case: str) -> None:
    side, _ = figures(script, case)
    assert {len(prompt) for prompt in side.prompts} == {16_000 // 500 if "x" in case else 30_000 // 500}
    assert len(set(map(tuple, side.prompts))) == len(side.prompts)


def test_prompts_with_a_beginning_in_common(script: ModuleType) -> None:
    side, _ = figures(script, "shared")
    together = side.prompts[: script.TINY.most]
    assert len({tuple(prompt[: 2000 // 500]) for prompt in together}) == 1
    assert len(set(map(tuple, together))) == len(together)


def test_a_turn_goes_on_from_the_last(script: ModuleType) -> None:
    side, found = figures(script, "turns")
    talks, turns = script.TINY.talks, script.TINY.turns
    assert set(found) == {"output tokens/s", "first turn, s", "last turn, s"}
    assert len(side.prompts) == talks * turns
    for before, after in zip(side.prompts, side.prompts[talks:], strict=False):
        answer = list(range(script.TINY.outputs))[::-1]
        assert after[: len(before) + len(answer)] == before + answer


def test_gaps_are_of_streams(script: ModuleType) -> None:
    side, found = figures(script, "gaps")
    assert side.bounds == [50, 0] and not any(side.left.values()), "nothing runs on, and the bound is gone"
    assert {"gap p99.9, ms", "longest gap, ms (MAX_GAP_MS=50)"} <= set(found)
    assert (
        found["gap p50, ms"]["value"] <= found["gap p99.9, ms"]["value"] <= found["longest gap, ms"]["value"]
    )


def test_the_curve_is_drawn(script: ModuleType, tmp_path: Path) -> None:
    """A device of 1 ms a step, 10 us a token and 0.1 ns a pair, whose steps above 1,000 tokens take 10 ms more."""
    lines = [{"side": "ours", "case": "gaps", "what": "gap p50, ms", "value": 1}]
    for tokens in script.CURVE:
        ms = 1 + 0.01 * tokens + 1e-7 * tokens**2 + 10 * (tokens > 1000)
        lines.append(
            {"side": "ours", "case": "curve", "what": f"first token of {tokens} tokens, ms", "value": ms}
        )
        lines.append({"side": "ours", "case": "curve", "what": f"step after {tokens} tokens, ms", "value": 3})
    (tmp_path / "long.json").write_text(json.dumps(lines))
    command = [
        sys.executable,
        SCRIPT.with_name("long_curve.py"),
        tmp_path / "long.json",
        tmp_path / "long.png",
    ]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    assert [row[1] for row in rows] == [f"{tokens:,}" for tokens in script.CURVE]
    steep = [row[1] for row in rows if row[5] and float(row[5]) > 2]
    assert steep == ["1,100"], "where the kink is"
    half = next(row for row in rows if row[1] == "8,000")
    assert half[4] == f"{(2 * 6_979_321_856 * 8000 + 4 * 32 * 4096 * 8000 * 8001 / 2) / 0.0974 / 1979e12:.0%}"
    assert (tmp_path / "long.png").read_bytes().startswith(b"\x89PNG")


def test_every_case_is_known(script: ModuleType) -> None:
    for case in script.CASES.split(","):
        figures(script, case)
    with pytest.raises(SystemExit, match="'last-1' is unknown"):
        figures(script, "last-1")


def test_the_table_tells_who_is_ahead(script: ModuleType) -> None:
    def line(side: int, what: str, value: float, more: bool) -> tuple[int, dict]:
        return side, {"case": "shared", "what": what, "value": value, "more": more}

    lines = [
        line(0, "rate", 30, True),
        line(1, "rate", 20, True),
        line(0, "ms", 5, False),
        line(1, "ms", 20, False),
    ]
    text = script.table([*lines, (1, {"case": "gaps", "left_out": True})], ["ours", "vllm"])
    assert "| shared | rate | 30 | 20 | 1.50 |" in text and "| shared | ms | 5 | 20 | 4.00 |" in text
    assert "Left out for want of time: vllm: gaps." in text
