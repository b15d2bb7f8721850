"""gpt-oss: what only its checkpoints have, and its experts in MXFP4. The rest is held with all families."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from flightline.torch_engine.core.request import GenerationRequest
from flightline.torch_engine.model.coded import E2M1
from flightline.torch_engine.model.config_json import load_spec
from flightline.torch_engine.model.fields import UnsupportedModel
from flightline.torch_engine.model.mxfp4 import read_mxfp4
from flightline.torch_engine.model.shard import Shard
from flightline.torch_engine.model.weights import Checkpoint
from tests.packing import rewrite_experts
from tests.tiny import tiny_checkpoint
from tests.torch_engine.test_models import (
    TOLERANCE,
    greedy,
    logits_of,
    needs_compiler,
    prompts,
    reference,
    reference_logits,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("gpt-oss"), "gpt_oss")


@pytest.fixture(scope="module")
def folders(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return rewrite_experts(source, tmp_path_factory.mktemp("mxfp4"))


def change(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@torch.no_grad()
@pytest.mark.parametrize("part", ["sinks", "router.bias", "gate_up_proj_bias", "down_proj_bias"])
def test_this_checkpoint_would_show_a_part_that_is_left_out(source: Path, part: str) -> None:
    model, prompt = reference(source, torch.float32), prompts(300)[-1]
    right = reference_logits(model, prompt)
    for name, parameter in model.named_parameters():
        if name.endswith(part):
            parameter.fill_(-1e9 if part == "sinks" else 0.0)
    wrong = reference_logits(model, prompt)
    assert (right - wrong).abs().max() / right.std() > 100 * TOLERANCE


def test_the_clamp_is_that_of_the_configuration(tmp_path: Path, make_engine: Callable[..., Any]) -> None:
    """Transformers has 7 whatever its configuration says."""
    folder = tiny_checkpoint(tmp_path, "gpt_oss")
    model, prompt = reference(folder, torch.float32), prompts(300)[-1]
    usual = reference_logits(model, prompt)
    change(folder, swiglu_limit=2.0)
    for layer in model.model.layers:
        layer.mlp.experts.limit = 2.0
    expected = reference_logits(model, prompt)
    assert (usual - expected).abs().max() / expected.std() > 100 * TOLERANCE
    error = (logits_of(make_engine(folder), prompt, 7) - expected).abs().max() / expected.std()
    assert error < TOLERANCE


def test_mxfp4_means_what_transformers_reads() -> None:
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (6, 40, 3, 16), dtype=torch.uint8, generator=generator)
    exponents = torch.randint(100, 140, (6, 40, 3), dtype=torch.uint8, generator=generator)
    theirs = convert_moe_packed_tensors(blocks, exponents)
    ours = torch.stack(
        [read_mxfp4(*pair).values(torch.bfloat16).t() for pair in zip(blocks, exponents, strict=True)]
    )
    assert torch.equal(ours, theirs)
    assert set(E2M1.tolist()) == {sign * value for sign in (1, -1) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6)}


@pytest.mark.parametrize("kernels", ["pytorch", pytest.param("native", marks=needs_compiler)])
def test_mxfp4_logits_and_tokens_equal_transformers(
    folders: tuple[Path, Path], make_engine: Callable[..., Any], library: str, kernels: str
) -> None:
    packed, plain = folders
    engine = make_engine(packed, kernels=kernels, kernel_dir=library)
    model, batch = reference(plain, torch.float32), prompts(300)
    if kernels == "pytorch":
        for prompt in batch:
            expected = reference_logits(model, prompt)
            error = (logits_of(engine, prompt, 7) - expected).abs().max() / expected.std()
            assert error < TOLERANCE, f"{len(prompt)} tokens: relative error {error:.2g}"
    outputs = engine.generate([GenerationRequest(prompt, 12, end_id=-1) for prompt in batch])
    assert [output.token_ids for output in outputs] == [greedy(model, prompt) for prompt in batch]


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.03), ("fp8", 0.2)])
def test_keys_and_values_of_8_bits(
    source: Path, make_engine: Callable[..., Any], kind: str, most: float
) -> None:
    """Windows, sinks and pieces of prompts over them. Logits are off by what the codes round: by the median, since a
    token whose two best experts are almost equal may go to another one."""
    model, longest = reference(source, torch.float32), prompts(300)[-1]
    expected = reference_logits(model, longest)
    got = logits_of(make_engine(source, kernels="pytorch", kv_dtype=kind), longest, 7)
    assert TOLERANCE < (got - expected).abs().median() / expected.std() < most


@needs_compiler
def test_compiled_kernels_read_keys_of_8_bits(
    source: Path, make_engine: Callable[..., Any], library: str
) -> None:
    requests = [GenerationRequest(prompt, 12, end_id=-1) for prompt in prompts(300)]
    plain, compiled = (
        make_engine(source, kv_dtype="int8", **kernels).generate(requests)
        for kernels in ({"kernels": "pytorch"}, {"kernels": "native", "kernel_dir": library})
    )
    same = [ours.token_ids[0] == theirs.token_ids[0] for ours, theirs in zip(compiled, plain, strict=True)]
    assert all(same)


def test_a_plain_copy_of_mxfp4_is_a_checkpoint_of_transformers(folders: tuple[Path, Path]) -> None:
    packed, plain = folders
    wanted = load_file(plain / "model.safetensors")
    found = dict(Checkpoint(packed, load_spec(packed)).plain_tensors(torch.float32))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name].float(), wanted[name]) for name in wanted)


@pytest.mark.parametrize("form", [0, 1])
def test_parts_of_experts_add_up(folders: tuple[Path, Path], form: int) -> None:
    folder, module = folders[form], "model.layers.1.mlp.experts.4"
    whole = Checkpoint(folder, load_spec(folder))
    parts = [whole.part(Shard(rank, 4)) for rank in range(4)]  # of 128 inner columns a group of 32 each
    for name, cut in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
        pieces = [part.weight(f"{module}.{name}", torch.float32) for part in parts]
        assert torch.equal(torch.cat(pieces, cut), whole.weight(f"{module}.{name}", torch.float32))
    biases = [part.bias(f"{module}.down_proj", torch.float32) for part in parts]
    assert biases[0] is not None and biases[1:] == [None] * 3


def lacking(name: str) -> Callable[[Path], None]:
    def leave_out(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[f"model.layers.0.{name}"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return leave_out


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lacking("self_attn.sinks"), "lacks the tensor model.layers.0.self_attn.sinks"),
        (lacking("mlp.router.bias"), "lacks the tensor model.layers.0.mlp.router.bias"),
        (lacking("mlp.experts.down_proj_bias"), "lacks the tensor model.layers.0.mlp.experts.down_proj_bias"),
        (lacking("mlp.experts.down_proj_scales"), "lacks the tensor model.layers.0.mlp.experts.down_proj_scales"),
        (lacking("mlp.experts.down_proj_blocks"), "lacks the tensor model.layers.0.mlp.experts.down_proj"),
        (lambda folder: change(folder, intermediate_size=64), "gate_up_proj_blocks has shape [6, 256, 2, 16]"),
        (lambda folder: change(folder, experts_per_token=2), "experts_per_token=2 is not valid"),
        (lambda folder: change(folder, swiglu_limit=0), "swiglu_limit=0 is not valid: it must be a positive number"),
    ],
)  # fmt: skip
def test_a_wrong_checkpoint_is_refused_by_name(
    source: Path, tmp_path: Path, spoil: Callable[[Path], None], said: str
) -> None:
    packed, _ = rewrite_experts(source, tmp_path)
    spoil(packed)
    with pytest.raises(UnsupportedModel) as refused:
        Checkpoint(packed, load_spec(packed))
    assert said in str(refused.value)
