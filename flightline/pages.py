"""Writes the parts of the documentation that are made from the code: ``python -m flightline.pages``.

Such a part stands between two marks, ``<!-- made: NAME -->`` and ``<!-- end: NAME -->``; what is around them is written
by hand. ``tests/test_pages.py`` holds the pages to the code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flightline import settings_page
from flightline.engine_build import models_page
from flightline.gateway import params_page
from flightline.model_repository import tensors_page

ROOT = Path(__file__).resolve().parents[1]
PAGES: dict[str, Callable[[], dict[str, str]]] = {
    "docs/GATEWAY.md": params_page.parts,
    "docs/MODELS.md": models_page.parts,
    "docs/SETTINGS.md": settings_page.parts,
    "docs/TENSORS.md": tensors_page.parts,
}
"""A page, and what makes its parts: name to Markdown."""


def text(page: str) -> str:
    """The page as it should be. Raises ValueError: it has not the marks of a part."""
    made = (ROOT / page).read_text(encoding="utf-8")
    for name, part in PAGES[page]().items():
        begin, end = f"<!-- made: {name} -->", f"<!-- end: {name} -->"
        if not 0 <= made.find(begin) < made.find(end):
            raise ValueError(f"{page} has no part {name}: write {begin} and {end} where it belongs")
        before, _, rest = made.partition(begin)
        made = f"{before}{begin}\n\n{part.strip()}\n\n{end}{rest.partition(end)[2]}"
    return made


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(text(page), encoding="utf-8")
