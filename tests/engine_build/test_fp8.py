"""The FP8 folder: ModelOpt's unified schema, and the silent traps closed."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flightline.engine_build import gate, source_model
from flightline.engine_build.build import GATE_TEXT
from flightline.engine_build.engine_model import EngineModel
from flightline.engine_build.errors import BuildError
from flightline.engine_build.hf_format import (
    read_tensors,
    with_both_rope_spellings,
    with_common_tokenizer_class,
)
from flightline.engine_build.prompts import Sample
from flightline.engine_build.quantize import dequantize, quantize, to_e4m3
from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.model.config_json import load_spec
from flightline.torch_engine.model.layout import plain_names
from tests.tiny import FAMILIES, MIXTURES, tiny_checkpoint

SAMPLES = [Sample(text="the quick brown fox " * count) for count in range(1, 9)]
LINEAR = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEAR += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
KV_SCALES = ("k_proj.k_scale", "v_proj.v_scale")


@pytest.fixture(scope="module")
def fp8(fp8_build: dict[str, Any]) -> dict[str, torch.Tensor]:
    return dict(read_tensors(Path(fp8_build["model_dir"])))


def test_schema(fp8: dict[str, torch.Tensor], tiny: Path) -> None:
    source = load_file(tiny / "model.safetensors")
    names = {f"model.layers.{layer}.{part}" for layer in range(2) for part in LINEAR}
    scales = {f"{name}.{kind}" for name in names for kind in ("weight_scale", "input_scale")}
    scales |= {f"model.layers.{layer}.self_attn.{kind}" for layer in range(2) for kind in KV_SCALES}
    assert fp8.keys() == source.keys() | scales
    for name in names:
        assert fp8[f"{name}.weight"].dtype == torch.float8_e4m3fn
        assert fp8[f"{name}.weight"].shape == source[f"{name}.weight"].shape
    for name in scales:
        assert fp8[name].dtype == torch.float32 and fp8[name].dim() == 0 and fp8[name] > 0
    for name in source.keys() - {f"{name}.weight" for name in names}:
        assert torch.equal(fp8[name], source[name]) and fp8[name].dtype == torch.bfloat16


def test_fused_layers_share_their_scale(fp8: dict[str, torch.Tensor], tiny: Path) -> None:
    source = load_file(tiny / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        for group in (LINEAR[:3], LINEAR[4:6]):
            for kind in ("weight_scale", "input_scale"):
                assert len({fp8[f"{prefix}.{part}.{kind}"].item() for part in group}) == 1
            largest = max(source[f"{prefix}.{part}.weight"].abs().max().item() for part in group)
            assert fp8[f"{prefix}.{group[0]}.weight_scale"].item() == pytest.approx(largest / 448)


def test_weights_are_the_source_rounded_once(fp8: dict[str, torch.Tensor], tiny: Path) -> None:
    for name, weight in load_file(tiny / "model.safetensors").items():
        scale = fp8.get(name.replace(".weight", ".weight_scale"))
        if scale is not None:
            assert torch.equal(fp8[name].float(), (weight.float() / scale).to(torch.float8_e4m3fn).float())


def test_tensorrt_llm_rescaling_changes_no_code(fp8: dict[str, torch.Tensor]) -> None:
    """What its loader does to fused layers: dequantise to bf16, divide by the group's largest scale, round."""
    for layer in range(2):
        for group in (LINEAR[:3], LINEAR[4:6]):
            names = [f"model.layers.{layer}.{part}" for part in group]
            largest = torch.stack([fp8[f"{name}.weight_scale"] for name in names]).max()
            for name in names:
                codes = fp8[f"{name}.weight"]
                wide = (codes.float() * fp8[f"{name}.weight_scale"]).bfloat16()
                again = (wide.float() / largest).to(torch.float8_e4m3fn)
                assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))


def test_descriptions(fp8_build: dict[str, Any], tiny: Path) -> None:
    folder = Path(fp8_build["model_dir"])
    nested = json.loads((folder / "hf_quant_config.json").read_text())
    assert nested["producer"]["name"] == "modelopt"
    assert nested["quantization"]["quant_algo"] == "FP8"
    assert nested["quantization"]["kv_cache_quant_algo"] is None
    assert "lm_head" in nested["quantization"]["exclude_modules"]
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["quant_algo"] == "FP8"
    assert config["quantization_config"]["quant_method"] == "modelopt"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert (folder / "tokenizer.json").read_bytes() == (tiny / "tokenizer.json").read_bytes()
    assert (folder / "generation_config.json").exists()


def test_rope_spellings() -> None:
    new = with_both_rope_spellings(
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}}
    )
    assert new["rope_theta"] == 5e5 and new["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    old = with_both_rope_spellings({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert old["rope_parameters"] == {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    assert with_both_rope_spellings(old)["rope_parameters"] == old["rope_parameters"]
    gemma = with_both_rope_spellings({"rope_theta": 1e6, "rope_local_base_freq": 1e4})
    assert gemma["rope_parameters"]["full_attention"]["rope_theta"] == 1e6
    assert gemma["rope_parameters"]["sliding_attention"]["rope_theta"] == 1e4
    new_gemma = with_both_rope_spellings({"rope_parameters": gemma["rope_parameters"]})
    assert new_gemma["rope_theta"] == 1e6 and new_gemma["rope_local_base_freq"] == 1e4


def test_tokenizer_class() -> None:
    new = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "extra_special_tokens": ["<a>"]}
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<a>"]}
    assert with_common_tokenizer_class(new) == fixed
    assert with_common_tokenizer_class({"tokenizer_class": "Qwen2Tokenizer"}) == {
        "tokenizer_class": "Qwen2Tokenizer"
    }


def test_cast_saturates() -> None:
    codes = to_e4m3(torch.tensor([1000.0, -1000.0, 448.0]), 1.0).float()
    assert codes.tolist() == [448.0, -448.0, 448.0]


def test_zero_weights_have_no_scale(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "zero")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"].zero_()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "fp8").mkdir()
    with pytest.raises(BuildError, match=r"model\.layers\.1\.mlp\.down_proj.*0\.0.*PRECISION=bf16"):
        quantize(source, SAMPLES, tmp_path / "fp8", "cpu", "float32")


def becoming(folder: Path) -> gate.Become:
    return lambda model: gate.become_w8a8(model, folder)


ALIKE = ("mistral", "glm", "ministral3", "olmo2", "mistral3-ministral3")
"""Families whose linears and names are those of another one here."""


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in (*ALIKE, *MIXTURES)])
def test_every_family_quantises(tmp_path: Path, family: str) -> None:
    """Sharded sources included; the FP8 arithmetic stays near the source's."""
    source = tiny_checkpoint(tmp_path / family, family, max_shard_size="100KB")
    target = tmp_path / "fp8"
    target.mkdir()
    seen = quantize(source, SAMPLES, target, "cpu", "float32")
    assert seen.samples == 8
    quantized = dict(read_tensors(target))
    spec = load_spec(source)
    names = plain_names(dict(read_tensors(source)), spec, source)
    linears = [name for name in names if name.endswith("_proj.weight")]
    assert {name for name in quantized if name.endswith(".weight_scale")} == {
        f"{name}_scale" for name in linears
    }
    assert ("lm_head.weight" in quantized) == (not spec.tie_embeddings)
    text = GATE_TEXT.read_text(encoding="utf-8")
    result = gate.measure(source, becoming(target), text, SAMPLES[:2], "cpu", "float32")
    assert abs(result.perplexity_rise) < 0.1


@pytest.mark.slow
def test_a_mixture_quantises(tmp_path: Path) -> None:
    """Every expert, also the shared one; routers and the shared expert's gate are left alone."""
    source = tiny_checkpoint(tmp_path / "source", "qwen2_moe", num_hidden_layers=2, num_experts=20)
    target = tmp_path / "fp8"
    target.mkdir()
    quantize(source, SAMPLES, target, "cpu", "float32")
    quantized, plain = dict(read_tensors(target)), dict(read_tensors(source))
    scaled = {name.removesuffix("_scale") for name in quantized if name.endswith(".weight_scale")}
    assert {name for name in scaled if "experts.19." in name} == {
        f"model.layers.1.mlp.experts.19.{linear}_proj.weight" for linear in ("gate", "up", "down")
    }
    assert len(scaled) == 2 * 4 + 3 + 3 * (20 + 1)
    for name in ("model.layers.1.mlp.gate.weight", "model.layers.1.mlp.shared_expert_gate.weight"):
        assert torch.equal(quantized[name], plain[name])
    logits = []
    for folder in (source, target):
        engine = tmp_path / f"engine-{folder.name}"
        engine.mkdir()
        EngineConfig(str(folder), num_kv_blocks=8, max_seq_len=64, kernels="pytorch").save(engine)
        logits.append(EngineModel(engine, 64)(torch.arange(5, 45)[None], logits_to_keep=40).logits)
    # Weights alone are rounded here: 2^-4 of each.
    assert 0 < (logits[1] - logits[0]).std() < 0.15 * logits[0].std()
    with pytest.raises(BuildError, match=r"FP8 mixtures of experts .*use ENGINE=torch"):
        gate.become_w8a8(source_model.load(source, "cpu", "float32")[0], target)


def test_gate_results_are_recorded(fp8_build: dict[str, Any]) -> None:
    measured = json.loads(Path(fp8_build["manifest"]).read_text())["gate"]
    assert measured["scored_tokens"] > 2000 and measured["compared_tokens"] > 200
    assert 0.5 < measured["agreement"] <= 1
    assert 0 < measured["rise_error"] < 0.02 and 0 < measured["agreement_error"] < 0.05
    assert measured["perplexity_rise"] == pytest.approx(
        measured["perplexity"] / measured["source_perplexity"] - 1
    )


@pytest.mark.parametrize(
    ("perplexity", "agreement", "passes"),
    [
        (10.39, 0.86, True),
        (10.41, 0.99, False),
        (9.0, 0.84, False),
        (math.nan, 0.9, False),
        (10.0, math.nan, False),
    ],
)
def test_gate_limits(perplexity: float, agreement: float, passes: bool) -> None:
    result = gate.GateResult(10.0, perplexity, agreement, 1000, 100, 0.005)
    if passes:
        return result.require("PRECISION=fp8", "use PRECISION=bf16")
    with pytest.raises(
        BuildError, match=r"PRECISION=fp8 failed the accuracy gate: .* 10\.00.*: use PRECISION=bf16"
    ):
        result.require("PRECISION=fp8", "use PRECISION=bf16")


def test_the_error_of_the_rise_is_that_of_paired_differences() -> None:
    before = torch.tensor([1.0, 9.0] * 50, dtype=torch.float64)  # tokens differ more than models do
    after = before + torch.tensor([0.1, 0.3], dtype=torch.float64).repeat(50)
    error = gate._rise_error(before, after)
    assert error == pytest.approx(math.exp(0.2) * 0.1 / math.sqrt(100), rel=0.01)


def test_gate_sees_bad_weights(fp8_build: dict[str, Any], tiny: Path, tmp_path: Path) -> None:
    """A scale that is off by two in one layer is enough."""
    folder = tmp_path / "bad"
    shutil.copytree(fp8_build["model_dir"], folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight_scale"] *= 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text, prompts = "the lazy dog jumps " * 200, [Sample(text="the quick"), Sample(text="a token is")]
    good = gate.measure(tiny, becoming(Path(fp8_build["model_dir"])), text, prompts, "cpu", "float32")
    bad = gate.measure(tiny, becoming(folder), text, prompts, "cpu", "float32")
    assert bad.agreement < good.agreement - 0.2


def test_dequantised_copy(fp8_build: dict[str, Any], tmp_path: Path) -> None:
    dequantize(Path(fp8_build["model_dir"]), tmp_path)
    quantized, plain = dict(read_tensors(Path(fp8_build["model_dir"]))), dict(read_tensors(tmp_path))
    name = "model.layers.0.self_attn.v_proj"
    want = quantized[f"{name}.weight"].float() * quantized[f"{name}.weight_scale"]
    assert torch.equal(plain[f"{name}.weight"], want.bfloat16())
    assert not any(key.endswith("_scale") for key in plain)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
