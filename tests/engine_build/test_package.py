"""The engine folder: compiled kernels where there is a compiler, PyTorch's and a word about it where it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flightline.engine_build.errors import PrecisionRefused
from flightline.engine_build.hardware import Hardware
from flightline.engine_build.package import package
from flightline.engine_build.plan import ModelShape, make_plan
from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.kernels.cpu.toolchain import available_isas, compiler, library

GIB = 1 << 30
SHAPE = ModelShape(2, 2, 16, 512, 100_000, 50_000)


def plan_with(command: str | None, precision: str = "bf16"):
    hardware = Hardware("cpu", "CPU", 8 * GIB, 8 * GIB, cores=2, compiler=command)
    return make_plan(SHAPE, hardware, precision=precision)


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_the_kernels_are_in_the_folder(tmp_path: Path) -> None:
    assert package(tmp_path / "engine", tmp_path / "model", plan_with(compiler()), "key", {}) == []
    config = EngineConfig.load(tmp_path / "engine")
    assert config.kernels == "native" and library(config.kernel_dir, available_isas()[0]).is_file()
    assert config.model_dir == str(tmp_path / "model")


def test_no_compiler_means_the_pytorch_kernels(tmp_path: Path) -> None:
    assert package(tmp_path / "engine", tmp_path / "model", plan_with(None), "key", {}) == []
    config = EngineConfig.load(tmp_path / "engine")
    assert (config.kernels, config.kernel_dir) == ("pytorch", "")


def test_a_compiler_that_fails_is_named_and_the_build_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "false")
    remarks = package(tmp_path / "engine", tmp_path / "model", plan_with("false"), "key", {})
    assert "kernels pytorch instead of native" in remarks[0] and "false failed" in remarks[0]
    assert EngineConfig.load(tmp_path / "engine").kernels == "pytorch"
    assert json.loads((tmp_path / "engine" / "manifest.json").read_text())["remarks"] == remarks


def test_integers_without_kernels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(PrecisionRefused, match=r"PRECISION=int4 needs compiled kernels.*false failed.*bf16"):
        package(tmp_path / "engine", tmp_path / "model", plan_with("false", "int4"), "key", {})
    assert not list(tmp_path.iterdir()), "nothing half-written"
