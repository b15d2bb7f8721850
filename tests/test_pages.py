"""What the pages at the top name is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from flightline import pages
from flightline.client.params import MOST_SEQUENCES
from flightline.engine_build import models_page
from flightline.model_repository.shared.responses import NO_TOKEN
from flightline.model_repository.shared.words import MOST_WORDS
from flightline.torch_engine.model.families import FAMILIES

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


@pytest.mark.parametrize("page", pages.PAGES)
def test_what_is_made_from_the_code_is_up_to_date(page: str) -> None:
    assert (ROOT / page).read_text(encoding="utf-8") == pages.text(page), "run python -m flightline.pages"


def test_numbers_that_a_page_repeats() -> None:
    text = (ROOT / "docs/TENSORS.md").read_text(encoding="utf-8")
    for said in (f"values, {MOST_WORDS} at most", f"{NO_TOKEN} if fewer", f"(1 to {MOST_SEQUENCES})"):
        assert said in text


def test_files_of_the_architecture_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w/]+/?[\w]+\.(?:py|pbtxt)\b", text))
    assert len(named) > 30
    missing = [name for name in named if not any((ROOT / folder / name).is_file() for folder in WHERE)]
    assert not missing


QUESTIONS = (
    *(
        "KV block freed",
        "FP8 refused",
        "TTFT",
        "stop word held back",
        "vanished client",
        "stuck stub",
        "int4 kernel",
    ),
    *("INVALID", "family added", "request parameter declared"),
)
"""What a newcomer asks, and finds answered in the second file that is opened."""


def names(tree: ast.AST) -> set[str]:
    """Classes, functions and constants of a module, and the methods as ``Class.method``."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{name}" for name in names(node)}
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def test_a_newcomers_questions_lead_to_what_answers_them() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").partition("## Where is")[2]
    rows = re.findall(r"^\| (.+?) \| `(.+?)` \| `(.+?)` \|$", text, re.MULTILINE)
    assert [question for question in QUESTIONS if not any(question in row[0] for row in rows)] == []
    for question, file, name in rows:
        assert name in names(ast.parse((ROOT / file).read_text(encoding="utf-8"))), (
            f"{question}: {name} in {file}"
        )


def test_every_family_of_the_page_is_tested() -> None:
    from tests import tiny

    assert {f"{name}ForCausalLM" for name in tiny._FAMILIES.values()} >= set(FAMILIES)
    assert set(models_page.RAN_ON_GPU) <= set(FAMILIES)
