"""What makes a build new, and that nothing else does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flightline.engine_build import gate
from flightline.engine_build.build import CALIBRATION, Build
from flightline.engine_build.cache import FileHashes
from flightline.engine_build.errors import BuildError
from flightline.torch_engine.kernels.cpu.toolchain import compiler
from tests.short_gate import short_gate
from tests.tiny import tiny_checkpoint

Make = Callable[..., dict[str, Any]]


def key(deployment: dict[str, Any]) -> str:
    return json.loads(Path(deployment["manifest"]).read_text())["key"]


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture(autouse=True)
def quick_gate(fp8_build: dict[str, Any]) -> Iterator[None]:
    """What is measured is no matter here; the shared FP8 build comes first, with the whole gate."""
    with short_gate():
        yield


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Identity of everything in a build folder but the hash memory and the lock."""
    ignored = {"hashes.json", ".lock"}
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.name not in ignored
    }


def test_unchanged_build_touches_nothing(model: Path, tmp_path: Path, make_build: Make) -> None:
    target, said = tmp_path / "build", []
    make_build(model, target, "--precision", "bf16")
    before = snapshot(target)
    make_build(model, target, "--precision", "bf16", said=said)
    assert snapshot(target) == before
    assert sum("unchanged" in line for line in said) == 3


def test_unchanged_fp8_build_imports_no_torch(fp8_build: dict[str, Any], tiny: Path) -> None:
    target = Path(fp8_build["model_repository"]).parent
    before = snapshot(target)
    script = (
        "import sys; from flightline.engine_build.__main__ import main; code = main(sys.argv[1:]); "
        "print('heavy', sorted({'torch', 'transformers', 'modelopt'} & set(sys.modules))); sys.exit(code)"
    )
    arguments = ["--model", str(tiny), "--build-dir", str(target), "--precision", "fp8"]
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert "heavy []" in run.stdout
    assert snapshot(target) == before


@pytest.mark.parametrize(
    "change",
    ["weights", "config", "tokenizer", "max_seq_len", "max_batch_size", "code", "hardware", "versions"],
)
def test_each_input_changes_the_key(
    model: Path, tmp_path: Path, make_build: Make, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    target, options = tmp_path / "build", ["--precision", "bf16"]
    first = key(make_build(model, target, *options))
    if change == "weights":
        path = model / "model.safetensors"
        raw = bytearray(path.read_bytes())
        raw[-1] ^= 1
        path.write_bytes(raw)
    elif change in ("config", "tokenizer"):
        path = model / f"{change}.json"
        path.write_text(path.read_text() + "\n")
    elif change in ("max_seq_len", "max_batch_size"):
        options += [f"--{change.replace('_', '-')}", "32"]
    elif change == "code":
        monkeypatch.setattr("flightline.engine_build.build.source_version", lambda hashes: "other")
    elif change == "hardware":
        from flightline.engine_build.hardware import detect

        other = detect().__class__(**{**detect().__dict__, "name": "another CPU"})
        monkeypatch.setattr("flightline.engine_build.build.detect", lambda: other)
    elif change == "versions":
        monkeypatch.setattr("flightline.engine_build.record.tool_versions", lambda: {"torch": "0.1"})
    second = make_build(model, target, *options)
    assert key(second) != first
    assert key(make_build(model, target, *options)) == key(second)


def test_calibration_and_gate_data_change_the_checkpoint(
    fp8_build: dict[str, Any], tiny: Path, tmp_path: Path, make_build: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One changed character requantises; the engine follows."""
    target = Path(shutil.copytree(Path(fp8_build["model_repository"]).parent, tmp_path / "build"))
    prompts = tmp_path / "own.jsonl"
    prompts.write_text(
        "".join(CALIBRATION.read_text(encoding="utf-8").splitlines(True)[:10]), encoding="utf-8"
    )
    monkeypatch.setattr(gate, "MIN_AGREEMENT", 0.5)
    said: list[str] = []
    built = make_build(tiny, target, "--precision", "fp8", "--calibration", str(prompts), said=said)
    assert key(built) != key(fp8_build)
    assert any(line.startswith("quantize") and "10 calibration samples" in line for line in said)


def test_changed_weights_are_quantised_again(
    model: Path, tmp_path: Path, make_build: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "MIN_AGREEMENT", 0.5)
    target = tmp_path / "build"
    old = make_build(model, target, "--precision", "fp8")
    before = (Path(old["model_dir"]) / "model.safetensors").read_bytes()
    tiny_checkpoint(model, seed=1)
    new = make_build(model, target, "--precision", "fp8")
    assert new["model_dir"] == old["model_dir"]
    assert (Path(new["model_dir"]) / "model.safetensors").read_bytes() != before


def test_a_lost_file_is_built_again(model: Path, tmp_path: Path, make_build: Make) -> None:
    built = make_build(model, tmp_path / "build", "--precision", "bf16")
    (Path(built["engine_dir"]) / "engine.json").unlink()
    make_build(model, tmp_path / "build", "--precision", "bf16")
    assert (Path(built["engine_dir"]) / "engine.json").exists()


def test_force(model: Path, tmp_path: Path, make_build: Make) -> None:
    built = make_build(model, tmp_path / "build", "--precision", "bf16")
    before = Path(built["manifest"]).stat().st_ino
    make_build(model, tmp_path / "build", "--precision", "bf16", "--force")
    assert Path(built["manifest"]).stat().st_ino != before


def test_hashes_follow_content_not_only_size(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("one")
    first = FileHashes(tmp_path)
    old = first.of(path)
    first.save()
    os.utime(path, ns=(1, 1))
    assert FileHashes(tmp_path).of(path) == old
    path.write_text("two")
    assert FileHashes(tmp_path).of(path) != old


def test_failed_gate_leaves_no_checkpoint_and_no_engine(
    tmp_path: Path, make_build: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "MAX_PERPLEXITY_RISE", -1.0)
    target = tmp_path / "build"
    with pytest.raises(BuildError, match="failed the accuracy gate"):
        make_build(tiny_checkpoint(tmp_path / "model"), target, "--precision", "fp8")
    left = {path.name for path in target.rglob("*")}
    assert left <= {"checkpoints", "hashes.json", ".lock"}


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_auto_goes_on_to_the_next_precision_and_remembers_it(
    tmp_path: Path, make_build: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "MAX_PERPLEXITY_RISE", -1.0)
    model, target, said = tiny_checkpoint(tmp_path / "model"), tmp_path / "build", []
    for gates in (2, 0):  # int4 and int8 are measured once
        said.clear()
        monkeypatch.setattr(Build, "_quantized", refuse_fp8)
        with pytest.raises(BuildError, match="PRECISION=fp8 is not what this test is about"):
            make_build(model, target, said=said)
        told = "\n".join(said)
        assert sum(line.startswith("gate") for line in said) == gates
        for tried in ("int4", "int8"):
            assert f"PRECISION={tried} failed the accuracy gate" in told
        with pytest.raises(BuildError, match=r"PRECISION=int4 failed.*use PRECISION=int8 or PRECISION=bf16"):
            make_build(model, target, "--precision", "int4")


def refuse_fp8(*_: Any) -> None:
    raise BuildError("PRECISION=fp8 is not what this test is about")


def test_fp8_checkpoint_as_input(
    fp8_build: dict[str, Any], tmp_path: Path, make_build: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "MIN_AGREEMENT", 0.5)
    source = Path(fp8_build["model_dir"])
    built = make_build(source, tmp_path / "build")
    assert built["precision"] == "fp8" and built["model_dir"] == str(source)
    assert built["source_dir"] != built["model_dir"]
    assert "quantization_config" not in json.loads((Path(built["source_dir"]) / "config.json").read_text())


def test_manifest_tells_the_story(fp8_build: dict[str, Any]) -> None:
    manifest = json.loads(Path(fp8_build["manifest"]).read_text())
    assert manifest["versions"]["nvidia-modelopt"] and manifest["hardware"]["name"]
    assert manifest["seconds"].keys() >= {"checkpoint", "quantize", "gate"}
    assert manifest["checkpoint_files"]["model.safetensors"] > 0
    assert manifest["plan"]["reasons"]
    engine = json.loads((Path(fp8_build["engine_dir"]) / "engine.json").read_text())
    assert (Path(fp8_build["engine_dir"]) / engine["model_dir"]).resolve() == Path(fp8_build["model_dir"])
