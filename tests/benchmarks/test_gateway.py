"""What the commands about the gateway make of what they have seen."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from gateway_drills import FAULTS, Row
from gpu_gateway import table

GATEWAY, TRITON, _ = FAULTS


@pytest.mark.parametrize(
    ("fault", "ends", "after", "left", "failed"),
    [
        (TRITON, {"told": 60, "whole": 4}, 3.0, [], False),
        (GATEWAY, {"told": 32, "whole": 32}, 0.5, [], False),
        (GATEWAY, {"told": 32, "cut": 1, "whole": 31}, 0.5, [], True),
        (TRITON, {"told": 63, "cut": 1}, 3.0, [], True),
        (GATEWAY, {"told": 63, "HUNG": 1}, 3.0, [], True),
        (TRITON, {"told": 63, "CHANGED": 1}, 3.0, [], True),
        (TRITON, {"told": 64}, 10.1, [], True),
        (TRITON, {"told": 64}, None, [], True),
        (TRITON, {"told": 64}, 3.0, ["3 KV blocks"], True),
    ],
)
def test_a_drill_fails(
    fault: str, ends: dict[str, int], after: float | None, left: list[str], failed: bool
) -> None:
    row = Row(fault, Counter(ends), after, left)
    assert row.failed is failed
    assert str(row).count("|") == 6 and ("FAIL" in str(row)) is failed


def test_the_table_of_both_servers() -> None:
    times = {f"{kind}_{what}_ms": 1.0 for kind in ("mean", "p99") for what in ("ttft", "tpot")}
    case = {"temperature": 1.0, "level": 64, **times}
    found = [{"side": "ours", "output_throughput": 1500.0, **case}]
    found.append({"side": "vLLM", "output_throughput": 1000.0, **case})
    assert list(table(found))[2:] == [
        "| 1, 64 | ours | 1,500 | 1.00 / 1.00 | 1.00 / 1.00 |",
        "| 1, 64 | vLLM | 1,000 (ours: 1.50) | 1.00 / 1.00 | 1.00 / 1.00 |",
    ]
