"""The gate judges what serves: the engine itself, with its kernels and its KV cache."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flightline.engine_build import gate, plan
from flightline.engine_build.engine_model import EngineModel
from flightline.engine_build.errors import BuildError, GateRefused
from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.core.steps import StepInput
from flightline.torch_engine.kernels.cpu.native import NativeKernels
from flightline.torch_engine.kernels.reference.pytorch import PyTorchKernels
from tests.tiny import tiny_checkpoint

Make = Callable[..., dict[str, Any]]


def edited(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def large_key_biases(tensors: dict[str, torch.Tensor]) -> None:
    """As published Qwen2 models have them: keys of 100 to 400 whose difference from token to token is about 1.

    They stand where RoPE turns slowly: there they add the same to every score, which softmax does not see.
    """
    for name, bias in tensors.items():
        if name.endswith("k_proj.bias"):
            heads = bias.view(-1, 16)
            heads[:, 6], heads[:, 7], heads[:, 14], heads[:, 15] = 100, -200, 300, 400


@pytest.fixture
def on_fp8_kv(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice that a GPU gets for FP8 weights, here with the reference kernels."""
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setattr(plan, "_kv_dtype", lambda *_: "fp8")
    monkeypatch.setattr(gate, "MAX_WINDOWS", 2)


def with_large_key_biases(folder: Path) -> Path:
    slow_rope = {"rope_type": "default", "rope_theta": 1e6}
    return edited(tiny_checkpoint(folder, "qwen2", rope_parameters=slow_rope), large_key_biases)


def test_large_key_biases_do_not_get_an_fp8_cache(tmp_path: Path, make_build: Make, on_fp8_kv: None) -> None:
    model = with_large_key_biases(tmp_path / "qwen")
    said: list[str] = []
    built = make_build(model, tmp_path / "build", "--precision", "bf16", said=said)
    config = EngineConfig.load(built["engine_dir"])
    assert config.kv_dtype in ("int8", "bfloat16", "float32")
    told = [line for line in said if "instead of fp8, with which perplexity" in line]
    assert len(told) == 1 and "KV cache int8" in told[0]
    measured = json.loads(Path(built["manifest"]).read_text())["gate"]
    assert measured["perplexity_rise"] < 0.04 and measured["agreement"] > 0.85
    said.clear()
    again = make_build(model, tmp_path / "build", "--precision", "bf16", said=said)
    assert EngineConfig.load(again["engine_dir"]) == config and not any("gate" in line[:4] for line in said)


def test_an_ordinary_model_keeps_its_fp8_cache(
    tiny: Path, tmp_path: Path, make_build: Make, on_fp8_kv: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_compute_dtype", lambda *_: "float32")  # whatever instructions this CPU has
    built = make_build(tiny, tmp_path / "build", "--precision", "bf16")
    assert EngineConfig.load(built["engine_dir"]).kv_dtype == "fp8"
    decoded = json.loads(Path(built["manifest"]).read_text())["gate"]["decoded"]
    assert decoded["tokens"] == 48 and decoded["agreement"] == 1 and abs(decoded["perplexity_rise"]) < 1e-3


def in_the_wrong_blocks(attend: Callable[..., Any]) -> Callable[..., Any]:
    """A decode that takes the blocks in order, whatever the table says."""

    def wrong(self: object, q: object, cache: object, step: StepInput, *rest: object) -> Any:
        blocks = torch.arange(step.decode_blocks[0].shape[1])[None]
        return attend(self, q, cache, dataclasses.replace(step, decode_blocks=[blocks]), *rest)

    return wrong


def without_the_last_keys(decode: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled forward pass whose single tokens do not see what came right before them."""

    def wrong(self: object, model: object, x: object, caches: object, step: StepInput) -> Any:
        lengths = (step.decode_lengths - 32).clamp(min=1)
        return decode(self, model, x, caches, dataclasses.replace(step, decode_lengths=lengths))

    return wrong


@pytest.mark.parametrize("kernels", ["pytorch", "native"])
def test_a_wrong_decode_is_refused(
    tiny: Path, tmp_path: Path, make_build: Make, monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    """Though every prompt is computed rightly."""
    monkeypatch.setattr(gate, "MAX_WINDOWS", 1)
    if kernels == "pytorch":
        monkeypatch.setenv("CXX", "/nonexistent")
        monkeypatch.setattr(
            PyTorchKernels, "attend_decodes", in_the_wrong_blocks(PyTorchKernels.attend_decodes)
        )
    else:
        monkeypatch.setattr(NativeKernels, "decode", without_the_last_keys(NativeKernels.decode))
    right, wrong = r"top-1 agreement (1\.000|0\.9\d+) ", r"48 tokens one at a time: [+-]\d"
    with pytest.raises(GateRefused, match=f"{right}.*; {wrong}"):
        make_build(tiny, tmp_path / "build", "--precision", "bf16")
    assert not (tmp_path / "build" / "deployment.json").exists()


def test_the_scales_of_a_checkpoint_are_used(tmp_path: Path) -> None:
    """Keys far beyond e4m3's 448 and values far below its smallest: right with the scales, garbage without."""
    folder = tiny_checkpoint(tmp_path / "model")

    def stretch(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(2):
            attention = f"model.layers.{layer}.self_attn"
            for part, factor in (("q", 2.0**-10), ("k", 2.0**10), ("v", 2.0**-14), ("o", 2.0**14)):
                tensors[f"{attention}.{part}_proj.weight"] *= factor
            tensors[f"{attention}.k_proj.k_scale"] = torch.tensor(2.0**10 / 16)
            tensors[f"{attention}.v_proj.v_scale"] = torch.tensor(2.0**-14 / 16)

    def forget(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("k_scale", "v_scale"))]:
            del tensors[name]

    def logits(kv_dtype: str) -> torch.Tensor:
        target = tmp_path / "engine"
        target.mkdir(exist_ok=True)
        EngineConfig(model_dir=str(folder), kv_dtype=kv_dtype, num_threads=1).save(target)
        return EngineModel(target, 64)(ids).logits

    ids = torch.arange(3, 43)[None]
    edited(folder, stretch)
    exact = logits("auto")
    with_scales, int8 = (logits(kv) for kv in ("fp8", "int8"))
    edited(folder, forget)
    without = logits("fp8")
    spread = exact.std()
    assert (with_scales - exact).abs().mean() < 0.1 * spread
    assert (int8 - exact).abs().mean() < 0.4 * (with_scales - exact).abs().mean()
    assert (without - exact).abs().mean() > 0.3 * spread


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(tmp_path: Path, make_build: Make, value: float) -> None:
    """One line about the source, and no walk through all precisions."""

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    model, said = edited(tiny_checkpoint(tmp_path / "model"), spoil), []
    with pytest.raises(BuildError) as error:
        make_build(model, tmp_path / "build", said=said)
    line = str(error.value)
    assert "1 of its tensors hold NaN or infinity, the first is model.layers.1.mlp.up_proj.weight" in line
    assert "fetch the checkpoint again" in line and "\n" not in line
    assert not (tmp_path / "build" / "deployment.json").exists()
    assert not list((tmp_path / "build" / "engines").glob("*"))


def test_an_absurd_source_is_remarked_on(
    tiny: Path, tmp_path: Path, make_build: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "MAX_WINDOWS", 1)
    said: list[str] = []
    make_build(tiny, tmp_path / "build", "--precision", "bf16", said=said)
    measured = next(line for line in said if line.startswith("gate"))
    perplexity = float(measured.split("perplexity ")[1].split(" ")[0])
    told = [line for line in said if "the source model's own perplexity is" in line]
    assert len(told) == (perplexity > 1000)
    monkeypatch.setattr(gate, "ABSURD_PERPLEXITY", perplexity / 2)
    said.clear()
    make_build(tiny, tmp_path / "build", "--precision", "bf16", "--force", said=said)
    assert any("the source model's own perplexity is" in line and "trained" in line for line in said)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    """``python3 -m pytest --noconftest -m gpu tests/engine_build/test_gate.py``: whole builds, by their kernels."""

    def build(
        self, model: Path, folder: Path, *options: str
    ) -> tuple[EngineConfig, dict[str, Any], list[str]]:
        """Its configuration, the gate's record, and what was said."""
        from tests.engine_build.conftest import build

        said: list[str] = []
        built = build(model, folder, "--engine", "torch", *options, said=said)
        config = EngineConfig.load(built["engine_dir"])
        assert config.device == "cuda" and config.kernels == "cuda"
        return config, json.loads(Path(built["manifest"]).read_text())["gate"], said

    def test_fp8_weights_and_an_fp8_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        # A random model's top two logits are close: rounding swaps them more often than in a trained one.
        monkeypatch.setattr(gate, "MIN_AGREEMENT", 0.5)
        config, measured, said = self.build(
            tiny_checkpoint(tmp_path / "m"), tmp_path / "b", "--precision", "fp8"
        )
        assert config.kv_dtype == "fp8"
        assert abs(measured["perplexity_rise"]) < 0.04
        assert measured["decoded"]["tokens"] == 48 and abs(measured["decoded"]["perplexity_rise"]) < 0.02
        assert measured["decoded"]["agreement"] > 0.85
        print(*said, sep="\n")

    def test_large_key_biases(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plan, "_kv_dtype", lambda *_: "fp8")
        config, measured, said = self.build(
            with_large_key_biases(tmp_path / "m"), tmp_path / "b", "--precision", "bf16"
        )
        assert config.kv_dtype in ("int8", "bfloat16")
        assert any(f"KV cache {config.kv_dtype} instead of" in line for line in said)
        assert abs(measured["perplexity_rise"]) < 0.04 and measured["decoded"]["agreement"] > 0.85
        print(*said, sep="\n")

    @pytest.mark.parametrize("kv_dtype", ["bfloat16", "fp8", "int8"])
    def test_a_wrong_decode_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kv_dtype: str
    ) -> None:
        from flightline.torch_engine.kernels.gpu.cuda import CudaKernels

        attention = CudaKernels.attention

        def wrong(kernels: Any, qkv: Any, layer: Any, spec: Any, rope: Any, cache: Any, step: Any) -> Any:
            """Single tokens take the blocks in order, whatever the table says."""
            where = step.attention
            if where.num_decodes:
                blocks = torch.arange(where.tables.shape[1], dtype=torch.int32, device=where.tables.device)
                where = dataclasses.replace(where, tables=blocks[None])
            return attention(
                kernels, qkv, layer, spec, rope, cache, dataclasses.replace(step, attention=where)
            )

        monkeypatch.setattr(CudaKernels, "attention", wrong)
        monkeypatch.setattr(plan, "_kv_dtype", lambda *_: kv_dtype)
        monkeypatch.setattr("flightline.engine_build.build.other_kv_dtypes", lambda _: ())
        with pytest.raises(GateRefused, match=r"48 tokens one at a time"):
            self.build(tiny_checkpoint(tmp_path / "m"), tmp_path / "b", "--precision", "bf16")
