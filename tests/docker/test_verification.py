"""docs/VERIFICATION.md names tests, commands and files that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/VERIFICATION.md").read_text(encoding="utf-8")


def test_every_test_it_names_exists() -> None:
    known = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py")}
    named = re.findall(r"\b((?:test_|trtllm_tools)\w*\.py)(?:::(\w+))?", TEXT)
    assert len(named) > 20
    for file, function in named:
        assert file in known, file
        assert not function or f"def {function}(" in known[file], function


def test_every_command_and_file_it_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    assert set(re.findall(r"\bmake ([a-z][a-z-]+)", TEXT)) <= targets
    paths = re.findall(r"`((?:benchmarks|docker|engine_build|tests)/[\w./-]+)", TEXT)
    paths += re.findall(r"python3 (benchmarks/\w+\.py)", TEXT)
    assert paths and not [path for path in paths if not (ROOT / path).exists()]


def test_every_line_says_how_far_it_was_checked() -> None:
    """And what is only facts says how to confirm it."""
    body = TEXT[TEXT.index("## Line by line") : TEXT.index("`promtool` and the browser")]
    rows = [line.strip("|").split(" | ") for line in body.splitlines() if line.startswith("| ")]
    rows = [[cell.strip(" |") for cell in row] for row in rows if row[0].strip() != "part"]
    assert len(rows) > 25
    for row in rows:
        state, confirm = row[1], row[-1] if len(row) > 2 else ""
        assert re.search(r"\*\*(ran|double|facts)\*\*|not pulled|not run|not part of", state), row
        if "facts" in state or "double" in state or "not run" in state:
            assert confirm, f"{row[0]}: no way to confirm it"
