"""What killed servers have left is removed, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flightline.supervisor import remains
from flightline.supervisor.remains import Belongings
from tests.model_repository.endpoints import wait_until

KILLED = """
import os
from pathlib import Path
from flightline.supervisor import remains
remains._SHARED_MEMORY, remains._TRITON_TEMPORARIES = Path({shared!r}), {temporaries!r}
mine = remains.Belongings()
before = remains.triton_folders()
for number in range({folders}):
    Path({temporaries!r}, f"python_env_{{number}}").mkdir()
mine.own_triton_folder(before)
Path({shared!r}, mine.shm_prefix + "stub").touch()
print(mine.folder, mine.shm_prefix, flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path, Path]]:
    """Temporary files, shared memory, and the temporary files of Triton."""
    folders = tmp_path / "tmp", tmp_path / "shm", tmp_path / "triton"
    for folder in folders:
        folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folders[0]))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(remains, "_SHARED_MEMORY", folders[1])
    monkeypatch.setattr(remains, "_TRITON_TEMPORARIES", str(folders[2]))
    yield folders


def killed_server(places: tuple[Path, Path, Path], folders: int = 1) -> tuple[Path, str]:
    """Its private folder and the prefix of its shared memory."""
    program = KILLED.format(shared=str(places[1]), temporaries=str(places[2]), folders=folders)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    folder, prefix = done.stdout.split()
    return Path(folder), prefix


def test_what_a_killed_server_has_left(places: tuple[Path, Path, Path]) -> None:
    temporary, shared, triton = places
    folder, prefix = killed_server(places)
    (shared / "flightline00000000_another").touch()
    (triton / "python_env_another").mkdir()
    (temporary / "flightline-unmarked").mkdir()
    said: list[str] = []
    sleep = [sys.executable, "-c", "import time; time.sleep(1000)"]
    orphan, innocent = subprocess.Popen([*sleep, f"{prefix}uuid"]), subprocess.Popen(sleep)
    try:
        wait_until(lambda: prefix in Path(f"/proc/{orphan.pid}/cmdline").read_text())
        remains.sweep(said.append)
        orphan.wait(30)
        assert innocent.poll() is None
    finally:
        orphan.kill()
        innocent.kill()
    assert len(said) == 1 and said[0].endswith("left by a server that was killed")
    assert not folder.exists()
    assert [path.name for path in shared.iterdir()] == ["flightline00000000_another"]
    assert [path.name for path in triton.iterdir()] == ["python_env_another"]
    assert [path.name for path in temporary.iterdir()] == ["flightline-unmarked"]


def test_a_living_server_is_left_alone(places: tuple[Path, Path, Path]) -> None:
    alive = Belongings()
    before = remains.triton_folders()
    folder = places[2] / "python_env_x"
    folder.mkdir()
    alive.own_triton_folder(before)
    memory = places[1] / f"{alive.shm_prefix}stub"
    memory.touch()
    remains.sweep(lambda line: pytest.fail(line))
    assert alive.folder.exists() and folder.exists() and memory.exists()
    alive.remove()
    assert not alive.folder.exists() and not folder.exists() and not memory.exists()


def test_folders_of_two_servers_that_cannot_be_told_apart_stay(places: tuple[Path, Path, Path]) -> None:
    killed_server(places, folders=2)
    remains.sweep(print)
    assert len(list(places[2].iterdir())) == 2


@pytest.mark.parametrize(
    "marks", ["", "[]", '{"shm_prefix": ""}', '{"shm_prefix": "", "triton_folder": null}']
)
def test_marks_that_say_nothing_end_nothing(places: tuple[Path, Path, Path], marks: str) -> None:
    folder = places[0] / "flightline-x"
    folder.mkdir()
    (folder / "owner.json").write_text(marks)
    remains.sweep(lambda line: pytest.fail(line))
    assert folder.exists()


def test_a_folder_with_something_in_it_stays(places: tuple[Path, Path, Path]) -> None:
    killed_server(places)
    (places[2] / "python_env_0" / "somebody's").touch()
    remains.sweep(print)
    assert (places[2] / "python_env_0").exists()


def test_only_this_user(places: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = killed_server(places)
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    remains.sweep(lambda line: pytest.fail(line))
    assert json.loads((folder / "owner.json").read_text())
