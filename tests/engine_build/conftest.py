"""A tiny checkpoint and one real FP8 build of it, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flightline.engine_build.build import Build
from flightline.engine_build.settings import parse
from tests.tiny import tiny_checkpoint


def build(model: Path, build_dir: Path, *options: str, said: list[str] | None = None) -> dict[str, Any]:
    """One build in this process; returns what is in deployment.json."""
    lines = [] if said is None else said
    arguments = ["--model", str(model), "--build-dir", str(build_dir), *options]
    return Build(parse(arguments), say=lines.append).run()


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Makefile passes settings by variable; tests say everything themselves."""
    for name in ("MODEL", "ENGINE", "PRECISION", "CALIB", "MAX_SEQ_LEN", "MAX_BATCH_SIZE", "BUILD_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("BASELINE_MAX_BATCH_SIZE", raising=False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama in bf16. Read only."""
    return tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny-llama")


@pytest.fixture(scope="session")
def fp8_build(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """deployment.json of one FP8 build of ``tiny``. Read only."""
    from flightline.engine_build import gate

    # A random model's top two logits are close: rounding swaps them more often than in a trained one.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "MIN_AGREEMENT", 0.5)
        return build(tiny, tmp_path_factory.mktemp("fp8") / "build", "--precision", "fp8")


@pytest.fixture
def make_build() -> Callable[..., dict[str, Any]]:
    return build
