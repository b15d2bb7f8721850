"""What the soak and the drills make of what they have seen."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from drills import QUIET, Row
from soak import Memory, verdicts
from under_test import Stream

WELL = {"good": Counter(right=5), "ratio": 2.9, "grown": [], "blocks": 0, "restarts": []}


def test_a_soak_without_a_fault() -> None:
    assert all(str(verdict).startswith("PASS  ") for verdict in verdicts(**WELL))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"good": Counter()}, "FAIL  good requests: 0 right, 0 lost, 0 changed, 0 refused"),
        ({"good": Counter(right=5, lost=1)}, "FAIL  good requests: 5 right, 1 lost, 0 changed, 0 refused"),
        ({"good": Counter(right=5, refused=2)}, "FAIL  good requests: 5 right, 0 lost, 0 changed, 2 refused"),
        ({"ratio": 3.1}, "FAIL  worst gap of a good stream: 3.1 times the quiet one (at most 3)"),
        (
            {"grown": ["engine from 1 to 2 MiB"]},
            "FAIL  memory: engine from 1 to 2 MiB (second quarter to the last)",
        ),
        ({"blocks": 3}, "FAIL  KV blocks in use at the end: 3"),
        ({"blocks": None}, "FAIL  KV blocks in use at the end: not told"),
        ({"restarts": ["Triton was ended"]}, "FAIL  restarts: Triton was ended"),
    ],
)
def test_each_fault_has_its_line(change: dict, line: str) -> None:
    assert [str(verdict) for verdict in verdicts(**WELL | change) if not verdict.holds] == [line]


@pytest.mark.parametrize(
    ("mib", "grown"),
    [
        ([50, 120, 120, 120, 120, 120, 120, 120], []),
        ([50, 120, 130, 140, 150, 160, 170, 180], ["a from 135 to 175 MiB"]),
        ([10, 10, 10, 10, 12, 14, 20, 20], []),
    ],
)
def test_memory_is_flat_after_the_first_quarter(mib: list[float], grown: list[str]) -> None:
    memory = SimpleNamespace(samples=[{"a": float(value)} for value in mib])
    rows, found = Memory.table(memory)  # type: ignore[arg-type]
    assert found == grown and rows[-1].startswith("| a | ")


@pytest.mark.parametrize(
    ("fault", "after", "left", "text", "failed"),
    [
        ("kill -9 engine", 30.0, [], "right", False),
        ("kill -9 engine", None, [], "right", True),
        ("kill -9 engine", 3.0, ["python_env_x"], "right", True),
        ("kill -9 engine", 3.0, [], "wrong", True),
        ("kill -9 engine and Triton", 11.0, [], "right", False),
        ("kill -9 engine and Triton", 13.0, [], "right", True),
        (f"SIGSEGV Triton{QUIET}", 9.0, [], "right", True),
        ("SIGSEGV Triton", 9.0, [], "right", False),
        ("HTTP: 24 MB of JSON", 9.0, [], "right", True),
    ],
)
def test_a_drill_fails(fault: str, after: float | None, left: list[str], text: str, failed: bool) -> None:
    row = Row(fault, [Stream("ensemble", "p", text)], {"p": "right"}, after, left)
    assert row.failed is failed
    assert str(row).count("|") == 6


@pytest.mark.parametrize("stream", [{"hung": True}, {"text": "wrong"}])
def test_a_stream_that_hung_or_changed_fails_a_drill(stream: dict) -> None:
    """Beside good ones; one that got an error does not."""
    streams = [Stream("ensemble", "p", "right"), Stream("ensemble", "p", "", error="gone")]
    row = Row("kill -9 engine", streams, {"p": "right"}, 3.0, [])
    assert not row.failed and row.outcomes == "1 error, 1 whole"
    streams.append(Stream(**{"endpoint": "ensemble", "prompt": "p", "text": "right", **stream}))
    assert row.failed
