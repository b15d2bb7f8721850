"""The build folder: one build at a time, and everything in it whole or absent."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flightline.engine_build.errors import BuildError

LOCK_FILE = ".lock"
NEW, OLD = ".new-", ".old-"


@contextmanager
def locked(build_dir: Path) -> Iterator[None]:
    """Holds the build folder for this process and clears what a killed build left in it.

    Raises:
        BuildError: another build holds it, or the folder cannot be made.
    """
    try:
        build_dir.mkdir(parents=True, exist_ok=True)
        file = (build_dir / LOCK_FILE).open("a+")
    except OSError as error:
        raise BuildError(
            f"build folder {build_dir} cannot be used ({error.strerror}): choose another BUILD_DIR"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise BuildError(
                f"another build (process {holder}) is using {build_dir}: wait for it to end or stop it"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        _clear_leftovers(build_dir)
        yield
        file.truncate(0)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target`` that takes its place when the block ends well, and else vanishes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = _beside(target, NEW)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        for path in fresh.rglob("*"):  # some writers keep their files to the owner
            path.chmod(0o755 if path.is_dir() else 0o644)
        swap_in(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def swap_in(fresh: Path, target: Path) -> None:
    """Renames ``fresh`` to ``target``. A build killed between the two renames is undone by the next one."""
    old = _beside(target, OLD)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> bool:
    """Writes a file whole or not at all; returns whether it changed."""
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = _beside(path, NEW)
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
    return True


def _beside(target: Path, mark: str) -> Path:
    return target.with_name(f".{target.name}{mark}{os.getpid()}")


def _clear_leftovers(build_dir: Path) -> None:
    """Removes the temporary folders of dead builds; we hold the lock, so no live build owns one."""
    for parent in (build_dir, *(path for path in build_dir.iterdir() if path.is_dir())):
        for path in parent.glob(f".*{OLD}*"):
            target = parent / path.name[1:].rsplit(OLD, 1)[0]
            if not target.exists():
                path.rename(target)
        for mark in (NEW, OLD):
            for path in parent.glob(f".*{mark}*"):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
