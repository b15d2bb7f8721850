"""What the pages at the top name is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "CHANGELOG.md",
    "examples/README.md",
    "docs/SCALE.md",
)
WHERE = ("", "torch_engine", "model_repository", "engine_build", "supervisor", "gateway", "docs", "examples")
"""Folders that a page may leave out."""


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)#]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_files_of_the_architecture_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w/]+/?[\w]+\.(?:py|pbtxt)\b", text))
    assert len(named) > 30
    missing = [name for name in named if not any((ROOT / folder / name).is_file() for folder in WHERE)]
    assert not missing
