"""``manifest.json``: what a built folder was made from, so that it is made again only when that changes."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from flightline.engine_build.hf_format import write_json

MANIFEST = "manifest.json"
TOOLS = ("torch", "transformers", "tokenizers", "safetensors", "nvidia-modelopt")


def tool_versions() -> dict[str, str | None]:
    """Versions of the packages whose behaviour shapes the result."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in TOOLS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def current(folder: Path, key: str) -> dict[str, Any] | None:
    """The record in ``folder`` if it was built from exactly ``key`` and its files still have their sizes."""
    try:
        record = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in record["files"].items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return record if whole and record.get("key") == key else None


def close(folder: Path, key: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Writes the record: key, ``facts``, and the size in bytes of each file of the folder."""
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    record = {"key": key, **facts, "files": files}
    write_json(folder / MANIFEST, record)
    return record
