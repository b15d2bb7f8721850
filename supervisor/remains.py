"""What a server has outside its build folder, and how the next one removes it if it was killed.

Each server has a private folder ``flightline-...`` among the temporary files. Its ``owner.json`` names what else is its
own, and is locked for as long as the server lives: what belongs to a folder without a lock belongs to nobody any more.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

_FOLDER = "flightline-"
_OWNER = "owner.json"
_SHM_PREFIX = re.compile(r"flightline[0-9a-f]{8}_")
_SHARED_MEMORY = Path("/dev/shm")
_TRITON_TEMPORARIES = "/tmp"
"""Whatever TMPDIR says."""


class Belongings:
    """The private folder of a running server, and the names of its shared memory."""

    def __init__(self) -> None:
        # A Unix socket's path may have 107 bytes; the build folder's may be longer.
        self.folder = Path(tempfile.mkdtemp(prefix=_FOLDER))
        self.shm_prefix = f"flightline{uuid.uuid4().hex[:8]}_"
        self._triton_folder: dict[str, Any] | None = None
        # Locked before it has its name: nobody ever sees one without its lock.
        draft = self.folder / "draft"
        self._file = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._write()
        draft.rename(self.folder / _OWNER)

    def _write(self) -> None:
        marks = {"shm_prefix": self.shm_prefix, "triton_folder": self._triton_folder}
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(marks).encode(), 0)

    def own_triton_folder(self, before: set[Path]) -> None:
        """Remembers the folder that Triton made since ``before`` was :func:`triton_folders`.

        Its Python backend makes exactly one at its start and removes it at a clean end only. If there are several new
        ones, those of other servers cannot be told from ours, and stay.
        """
        new = triton_folders() - before
        if len(new) == 1:
            folder = new.pop()
            self._triton_folder = {"path": str(folder), "inode": folder.stat().st_ino}
            self._write()

    def remove_tritons(self) -> None:
        """What a Triton that has ended may have left."""
        _remove_tritons(self.shm_prefix, self._triton_folder)
        self._triton_folder = None

    def remove(self) -> None:
        """Everything."""
        self.remove_tritons()
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._file)


def triton_folders() -> set[Path]:
    """This user's folders that Python backends of Triton have made."""
    return {path for path in Path(_TRITON_TEMPORARIES).glob("python_env_*") if _owner(path) == os.getuid()}


def sweep(say: Callable[[str], None]) -> None:
    """Ends and removes what servers of this user have left that could not do it themselves."""
    for path in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*/{_OWNER}"):
        if _owner(path.parent) != os.getuid():
            continue
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _sweep_one(path, say)
        except (BlockingIOError, ValueError, KeyError, TypeError):
            pass  # it lives, or says nothing that we could act on
        finally:
            os.close(file)


def _sweep_one(path: Path, say: Callable[[str], None]) -> None:
    marks = json.loads(path.read_text(encoding="utf-8"))
    prefix = marks["shm_prefix"]
    if not _SHM_PREFIX.fullmatch(prefix):
        raise ValueError(prefix)
    ended = []
    for process in _processes_with(prefix, f"{path.parent}/"):
        say(f"ending {process.name()} (pid {process.pid}), left by a server that was killed")
        process.kill()
        ended.append(process)
    psutil.wait_procs(ended, timeout=10)
    _remove_tritons(prefix, marks["triton_folder"])
    shutil.rmtree(path.parent, ignore_errors=True)


def _processes_with(*names: str) -> Iterator[psutil.Process]:
    """Random names on the command line tell ours from others, and from reused process ids."""
    for process in psutil.process_iter():
        try:
            if process.uids().real == os.getuid() and any(
                name in word for word in process.cmdline() for name in names
            ):
                yield process
        except psutil.Error:
            pass


def _remove_tritons(shm_prefix: str, triton_folder: dict[str, Any] | None) -> None:
    for name in _SHARED_MEMORY.glob(shm_prefix + "*"):
        name.unlink(missing_ok=True)
    if triton_folder is not None:
        try:
            if os.stat(triton_folder["path"]).st_ino == triton_folder["inode"]:
                os.rmdir(triton_folder["path"])  # empty, or not as we know it
        except OSError:
            pass


def _owner(path: Path) -> int | None:
    try:
        return path.stat().st_uid
    except OSError:
        return None
