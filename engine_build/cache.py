"""Content hashes, remembered by file identity so that an unchanged build reads no large file twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CACHE_FILE = "hashes.json"


def digest(value: Any) -> str:
    """SHA-256 of a JSON-like value; equal values have equal digests."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


class FileHashes:
    """SHA-256 of files. A file is read again only when its path, size, mtime or inode differ."""

    def __init__(self, build_dir: Path) -> None:
        self._path = build_dir / CACHE_FILE
        try:
            self._known: dict[str, list] = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._known = {}
        self._used: dict[str, list] = {}

    def of(self, path: Path) -> str:
        """Hex SHA-256 of one file's content."""
        name = str(path.absolute())
        stat = path.stat()
        identity = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        known = self._known.get(name)
        if known is None or known[:3] != identity:
            with path.open("rb") as file:
                known = [*identity, hashlib.file_digest(file, "sha256").hexdigest()]
        self._known[name] = self._used[name] = known
        return known[3]

    def of_all(self, paths: Iterable[Path]) -> dict[str, str]:
        """File name to SHA-256, by name; for the files of one folder."""
        return {path.name: self.of(path) for path in sorted(paths)}

    def save(self) -> None:
        """Remembers the hashes of existing files for the next build."""
        alive = {
            name: known for name, known in self._known.items() if name in self._used or Path(name).exists()
        }
        temporary = self._path.with_name(f".{CACHE_FILE}.tmp")
        try:
            temporary.write_text(json.dumps(alive, indent=1), encoding="utf-8")
            temporary.replace(self._path)
        finally:
            temporary.unlink(missing_ok=True)


def source_version(hashes: FileHashes) -> str:
    """Digest of this package's own code: a build made by other code is not the same build."""
    folder = Path(__file__).parent
    return digest([hashes.of_all(folder.glob("*.py")), hashes.of_all(folder.glob("trtllm/*.py"))])
