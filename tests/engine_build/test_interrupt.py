"""Ctrl-C, kill, a second build, a full disk: one clear line, and nothing half-written."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from flightline.engine_build.__main__ import _known_trouble
from flightline.engine_build.errors import BuildError
from flightline.engine_build.workspace import locked, new_folder, swap_in, write_text

Make = Callable[..., dict[str, Any]]


HALF_A_CHECKPOINT = "checkpoints/.*.new-*/modelopt/*"
HALF_AN_ENGINE = "engines/.*.new-*/engine.json"
"""Its kernels are compiled; the accuracy gate is next, and then its manifest."""


def start_and_wait_for(what: str, model: Path, target: Path, precision: str = "fp8") -> subprocess.Popen[str]:
    """A real build, at the moment that this is there."""
    environment = {**os.environ, "MODEL": str(model), "BUILD_DIR": str(target), "PRECISION": precision}
    child = subprocess.Popen(
        [sys.executable, "-m", "flightline.engine_build"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(target.glob(what)):
        assert child.poll() is None and time.monotonic() < deadline, child.communicate()
        time.sleep(0.002)
    return child


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "moment"), [(signal.SIGINT, HALF_A_CHECKPOINT), (signal.SIGTERM, ".lock")]
)
def test_interrupted_build_leaves_nothing(
    tiny: Path, tmp_path: Path, number: signal.Signals, moment: str
) -> None:
    child = start_and_wait_for(moment, tiny, tmp_path / "build")
    child.send_signal(number)
    _, stderr = child.communicate(timeout=300)
    assert child.returncode == 130
    assert stderr.strip() == "build interrupted: nothing half-written was left"
    assert {path.name for path in (tmp_path / "build").rglob("*")} <= {"checkpoints", "hashes.json", ".lock"}


@pytest.mark.slow
def test_killed_build_is_cleared_by_the_next(tiny: Path, tmp_path: Path, make_build: Make) -> None:
    target = tmp_path / "build"
    child = start_and_wait_for(
        HALF_AN_ENGINE, tiny, target, "bf16"
    )  # FP8 takes four times as long to get there
    child.kill()
    child.communicate()
    (left,) = (target / "engines").iterdir()
    assert left.name.startswith(".") and not (target / "deployment.json").exists()
    make_build(tiny, target, "--precision", "bf16")
    assert not list(target.rglob(".*.new-*"))
    assert (target / "deployment.json").exists()


def test_two_builds_at_once(tiny: Path, tmp_path: Path, make_build: Make) -> None:
    another = rf"another build \(process {os.getpid()}\).*wait for it"
    with locked(tmp_path), pytest.raises(BuildError, match=another):
        make_build(tiny, tmp_path, "--precision", "bf16")
    make_build(tiny, tmp_path, "--precision", "bf16")
    with (tmp_path / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_new_folder_replaces_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "thing"
    with new_folder(target) as fresh:
        (fresh / "a").write_text("1")
    with pytest.raises(RuntimeError), new_folder(target) as fresh:
        (fresh / "b").write_text("2")
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["a"]
    with new_folder(target) as fresh:
        (fresh / "b").write_text("2")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert list(tmp_path.iterdir()) == [target]


def test_death_between_the_two_renames_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, fresh = tmp_path / "thing", tmp_path / ".thing.new-1"
    target.mkdir()
    (target / "old").touch()
    fresh.mkdir()
    rename = Path.rename

    def die_on_the_second(path: Path, other: Path) -> Path:
        if path == fresh:
            raise KeyboardInterrupt
        return rename(path, other)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die_on_the_second)
        with pytest.raises(KeyboardInterrupt):
            swap_in(fresh, target)
    assert not target.exists()
    with locked(tmp_path):
        assert (target / "old").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"thing", ".lock"}


def test_write_text_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    assert write_text(path, "a") and not write_text(path, "a") and write_text(path, "b")
    assert path.read_text() == "b" and list(path.parent.iterdir()) == [path]


def test_full_disk_is_one_line() -> None:
    """The system's real error, bare and wrapped."""
    with pytest.raises(OSError) as bare, open("/dev/full", "w") as file:
        file.write("x")
        file.flush()
    assert "the disk is full" in (_known_trouble(bare.value) or "")
    wrapped = RuntimeError("wrapped")
    wrapped.__cause__ = bare.value
    assert "the disk is full" in (_known_trouble(wrapped) or "")
    # What safetensors makes of it: text only.
    library = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "the disk is full" in (_known_trouble(library) or "")
    assert _known_trouble(ValueError("something else")) is None


def test_unusable_build_folder(tiny: Path, tmp_path: Path, make_build: Make) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match=r"cannot be used.*BUILD_DIR"):
        make_build(tiny, tmp_path / "file" / "build")
