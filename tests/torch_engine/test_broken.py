"""An engine folder that cannot be served: one line that names what is wrong and what to do, exit code 1."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from flightline.torch_engine.core.config import ConfigError, EngineConfig
from flightline.torch_engine.kernels.cpu.toolchain import NoCompiler, compile_library, compiler, is_whole
from flightline.torch_engine.process.server import main

AGAIN = "run 'make build-engines' again"


@pytest.fixture
def engine_dir(llama_dir: Path, tmp_path: Path) -> Path:
    """Of its own copy of a checkpoint."""
    shutil.copytree(llama_dir, tmp_path / "model")
    folder = tmp_path / "engine"
    folder.mkdir()
    EngineConfig(model_dir="../model", block_size=4096, num_kv_blocks=64, num_threads=1).save(folder)
    return folder


def refused(engine_dir: Path, capsys: pytest.CaptureFixture[str]) -> str:
    socket = engine_dir / "socket"
    status = main(["--engine-dir", str(engine_dir), "--socket", str(socket)])
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 1 and not socket.exists()
    return line


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("max_seq_len", "128", "use a whole number"),
        ("max_seq_len", 128.0, "use a whole number"),
        ("max_batch_size", True, "use a whole number"),
        ("block_size", None, "use a whole number"),
        ("device", 0, "use text"),
        ("model_dir", ["../model"], "use text"),
        ("cuda_graphs", "yes", "use true or false"),
        ("abandon_after_s", "30", "use a number"),
        ("abandon_after_s", float("inf"), "use a positive number of seconds"),
        ("num_threads", 100_000, "use 1024 at most"),
        ("max_num_tokens", 10**9, "use 1048576 at most"),
        ("num_kv_blocks", 10**30, "use 2147483646 at most"),
        ("num_kv_blocks", 2**31 - 2, "lower num_kv_blocks"),
        ("kv_dtype", "fp4", "use one of"),
    ],
)
def test_a_wrong_setting(
    engine_dir: Path, capsys: pytest.CaptureFixture[str], name: str, value: object, remedy: str
) -> None:
    path = engine_dir / "engine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    line = refused(engine_dir, capsys)
    assert f"{name}=" in line and remedy in line


@pytest.mark.parametrize("text", ["[]", "{", "3", "[" * 100_000, "{}"])
def test_a_damaged_file(engine_dir: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (engine_dir / "engine.json").write_text(text)
    line = refused(engine_dir, capsys)
    assert "engine.json" in line and AGAIN in line


def cut_weights(model: Path) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def index_of_nothing(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text(
        '{"weight_map": {"model.norm.weight": "gone.safetensors"}}'
    )


def index_of_lies(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a.weight": "model.safetensors"}}')


def damaged_index(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text('{"weight_map": []}')


@pytest.mark.parametrize("damage", [cut_weights, index_of_nothing, index_of_lies, damaged_index])
def test_a_checkpoint_that_was_damaged_since(
    engine_dir: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    damage(engine_dir.parent / "model")
    line = refused(engine_dir, capsys)
    assert "model.safetensors" in line or "gone.safetensors" in line
    assert "damaged" in line and "fetch the checkpoint again" in line


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("left", [0, 100, 0.5, 0.999])
def test_a_cut_kernel_library(
    engine_dir: Path, library: str, capsys: pytest.CaptureFixture[str], left: float
) -> None:
    for path in Path(library).glob("*.so"):
        assert is_whole(path)
        whole = path.read_bytes()
        size = left if left >= 1 else int(left * len(whole))
        (engine_dir / path.name).write_bytes(whole[: int(size)])
    path = engine_dir / "engine.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kernels": "native", "kernel_dir": "."}))
    line = refused(engine_dir, capsys)
    assert "cut short" in line and "run 'make build-engines' again on this machine" in line


def test_types_are_checked_in_python_too() -> None:
    with pytest.raises(ConfigError, match=r"max_seq_len='128' is not valid: use a whole number"):
        EngineConfig(model_dir="m", max_seq_len="128")  # type: ignore[arg-type]


def test_the_compilers_temporaries_lie_in_the_folder_that_a_kill_leaves_to_the_next_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen, command = tmp_path / "kernels", tmp_path / "seen", tmp_path / "c++"
    folder.mkdir()
    command.write_text(
        f'#!/bin/sh\necho half >"$TMPDIR/cc1"\necho "$TMPDIR" >{seen}\necho broken >&2\nexit 1\n'
    )
    command.chmod(0o755)
    monkeypatch.setenv("CXX", str(command))
    with pytest.raises(NoCompiler, match="failed: broken"):
        compile_library(folder, ["portable"])
    assert Path(seen.read_text().strip()).parent == folder
    assert not list(folder.iterdir())
