"""Quantised formats: what the engine makes of one against Transformers on the weights that the format's rule gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flightline.torch_engine.core.request import GenerationRequest
from flightline.torch_engine.model.config_json import load_spec
from flightline.torch_engine.model.fields import UnsupportedModel
from flightline.torch_engine.model.shard import Shard
from flightline.torch_engine.model.weights import Checkpoint
from tests.packing import FORMATS, rewrite
from tests.tiny import tiny_checkpoint
from tests.torch_engine.test_models import (
    greedy,
    logits_of,
    needs_compiler,
    reference,
    reference_logits,
)

SHAPE: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 320, "head_dim": 48}
"""Widths that are no multiple of 128: queries 1.5 blocks, keys 0.75, the MLP 2.5."""
PROMPTS = ([5, 6, 7], list(range(20, 61)))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("source"), "qwen2", **SHAPE)


@pytest.fixture(scope="module", params=FORMATS)
def folders(
    request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    return rewrite(source, tmp_path_factory.mktemp(request.param), *FORMATS[request.param])


def test_logits_and_tokens_equal_transformers(
    folders: tuple[Path, Path], make_engine: Callable[..., Any]
) -> None:
    packed, plain = folders
    engine, model = make_engine(packed), reference(plain, torch.float32)
    for prompt in PROMPTS:
        expected = reference_logits(model, prompt)
        error = (logits_of(engine, prompt, 7) - expected).abs().max() / expected.std()
        assert error < 2e-4, f"{len(prompt)} tokens: relative error {error:.2g}"
    expected = [greedy(model, prompt) for prompt in PROMPTS]
    outputs = engine.generate([GenerationRequest(prompt, 12, end_id=-1) for prompt in PROMPTS])
    assert [output.token_ids for output in outputs] == expected


def test_the_plain_copy_is_what_the_codes_mean(folders: tuple[Path, Path]) -> None:
    """Which the baseline and the accuracy gate run: nothing of the format is left, nothing is missing."""
    packed, plain = folders
    found = dict(Checkpoint(packed, load_spec(packed)).plain_tensors(torch.float32))
    expected = load_file(plain / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].float(), tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["compressed-dynamic", "hf-blocks", "gptq", "awq", "w4a16", "nvfp4"])
def test_mixtures_of_experts_equal_transformers(
    name: str, tmp_path: Path, make_engine: Callable[..., Any]
) -> None:
    shape = {**SHAPE, "num_hidden_layers": 2, "mlp_only_layers": [1], "moe_intermediate_size": 160}
    packed, plain = rewrite(
        tiny_checkpoint(tmp_path / "source", "qwen3_moe", **shape), tmp_path, *FORMATS[name]
    )
    assert sum(".experts." in tensor for tensor in Checkpoint(packed, load_spec(packed))._names) > 3 * 8
    engine, model = make_engine(packed), reference(plain, torch.float32)
    expected = reference_logits(model, PROMPTS[1])
    error = (logits_of(engine, PROMPTS[1], 7) - expected).abs().max() / expected.std()
    assert error < 2e-4, error


def without(leaf: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[f"model.layers.0.mlp.up_proj.{leaf}"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return change


def saying(*path: str, value: Any) -> Callable[[Path], None]:
    """Another value of ``quantization_config``."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        place = config["quantization_config"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


GROUP = ("config_groups", "group_0")
REFUSED: list[tuple[str, Callable[[Path], None], str]] = [
    ("compressed-static", without("weight_scale"), "up_proj.weight is FP8 but has no weight_scale"),
    ("compressed-static", without("input_scale"), "up_proj has no input_scale"),
    ("compressed-static", saying("transform_config", value={"R1": {}}), "transform_config="),
    ("compressed-static", saying("sparsity_config", value={"format": "sparse-24"}), "sparsity_config="),
    ("compressed-static", saying("format", value="new"), "'compressed-tensors new' is not supported"),
    ("compressed-blocks", saying(*GROUP, "weights", "block_structure", value=[64, 64]), "block_structure="),
    ("hf-blocks", saying("weight_block_size", value=[64, 64]), "weight_block_size=[64, 64]"),
    ("hf-blocks", saying("scale_fmt", value="ue8m0"), "scale_fmt='ue8m0'"),
    ("hf-blocks", saying("hadamard", value=True), "hadamard=True is not valid: the setting is not known"),
    ("gptq", saying("bits", value=3), "bits=3 is not valid: only 4"),
    ("gptq", saying("group_size", value=64), "scales has shape [6, 192], and GPTQ"),
    ("gptq", without("scales"), "lacks the tensor model.layers.0.mlp.up_proj.scales"),
    ("gptq", saying("dynamic", value={"-:lm_head": {}}), "dynamic="),
    ("awq", saying("version", value="gemv"), "only the layout 'gemm'"),
    ("awq", saying("zero_point", value=False), "zero_point=False is not valid: only True"),
    ("w4a16", saying(*GROUP, "weights", "num_bits", value=8), "pack-quantized of 8 bits"),
    ("nvfp4", saying(*GROUP, "weights", "group_size", value=32), "group_size=32 is not valid: only 16"),
    (
        "nvfp4",
        without("weight_global_scale"),
        "lacks the tensor model.layers.0.mlp.up_proj.weight_global_scale",
    ),
    ("modelopt-nvfp4", saying("group_size", value=32), "group_size=32 is not valid: only 16"),
    ("modelopt-nvfp4", without("weight_scale"), "lacks the tensor model.layers.0.mlp.up_proj.weight_scale"),
    ("modelopt-nvfp4", saying("quant_algo", value="NVFP4_AWQ"), "'NVFP4_AWQ' is not supported"),
]


@pytest.mark.parametrize(("name", "change", "says"), REFUSED)
def test_refused_in_one_line(
    name: str, change: Callable[[Path], None], says: str, source: Path, tmp_path: Path
) -> None:
    packed, _ = rewrite(source, tmp_path, *FORMATS[name])
    if says.startswith("'compressed"):  # the group's own comes first
        saying(*GROUP, "format", value=None)(packed)
    change(packed)
    with pytest.raises(UnsupportedModel) as refusal:
        Checkpoint(packed, load_spec(packed))
    assert says in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_whole_scale_of_nothing_is_refused(source: Path, tmp_path: Path) -> None:
    packed, _ = rewrite(source, tmp_path, *FORMATS["modelopt-nvfp4"])
    tensors = load_file(packed / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_scale_2"].zero_()
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedModel, match=r"up_proj\.weight_scale_2 is 0\.0: it must be positive"):
        Checkpoint(packed, load_spec(packed)).weight("model.layers.0.mlp.up_proj", torch.float32)


@needs_compiler
@pytest.mark.parametrize("name", ["gptq", "awq", "gptq-act-order", "nvfp4"])
def test_compiled_kernels_keep_codes_of_4_bits(
    name: str, source: Path, tmp_path: Path, make_engine: Callable[..., Any], library: str
) -> None:
    """All that is left is what int8 activations round (and int8 weights, where groups do not fit)."""
    packed, plain = rewrite(source, tmp_path, *FORMATS[name])
    native = {"kernels": "native", "kernel_dir": library}
    engine, wide = make_engine(packed, weight_precision="int4", **native), make_engine(plain)
    again = make_engine(plain, weight_precision="int4", **native)
    fits = name in ("gptq", "awq")
    told = "int4 weights" if fits else "8 linears whose groups do not fit"
    assert told in engine.kernels.describe(engine.model.spec)
    errors = []
    for one in (engine, again):
        pairs = [(logits_of(one, prompt, 7), logits_of(wide, prompt, 7)) for prompt in PROMPTS]
        errors.append(max(float((ours - truth).norm() / truth.norm()) for ours, truth in pairs))
    assert errors[0] < 0.06 and errors[0] < errors[1], errors


@pytest.mark.parametrize("name", ["hf-blocks", "awq"])
def test_ranks_do_not_part_inputs_of_one_scale(name: str, source: Path, tmp_path: Path) -> None:
    """Said before anything is read: 192 and 320 inputs are no 128 or 64 on each of two ranks."""
    packed, _ = rewrite(source, tmp_path, *FORMATS[name])
    with pytest.raises(
        UnsupportedModel, match=r"inputs of one scale \((128|64) of .*\) would lie on two GPUs; use TP"
    ):
        Checkpoint(packed, load_spec(packed)).part(Shard(0, 2))


@pytest.mark.parametrize(
    "name", ["compressed-dynamic", "modelopt", "gptq", "w4a16-asymmetric", "gptq-act-order", "nvfp4"]
)
def test_ranks_have_parts_of_codes(name: str, source: Path, tmp_path: Path) -> None:
    """Put together they are the whole; a part that would cut a group is refused by name."""
    packed, _ = rewrite(source, tmp_path, *FORMATS[name])
    whole = Checkpoint(packed, load_spec(packed))
    parts = [whole.part(Shard(rank, 2)) for rank in range(2)]
    for module, along in (("self_attn.q_proj", 0), ("self_attn.o_proj", 1), ("mlp.down_proj", 1)):
        module = f"model.layers.1.{module}"
        expected = whole.weight(module, torch.float32)
        if along and name == "gptq-act-order":
            with pytest.raises(UnsupportedModel, match=rf"{module} cannot be shared by 2 GPUs.*use TP=1"):
                parts[0].weight(module, torch.float32)
            continue
        found = torch.cat([part.weight(module, torch.float32) for part in parts], along)
        assert torch.equal(found, expected)
