"""GGUF files, written with llama.cpp's own package: every type's numbers, and whole models against Transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from flightline.engine_build.cache import FileHashes
from flightline.engine_build.checkpoint import obtain
from flightline.engine_build.errors import BuildError
from flightline.engine_build.gguf_codes import CODED, to_coded
from flightline.engine_build.gguf_import import convert
from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.core.request import GenerationRequest
from flightline.torch_engine.engine import Engine
from flightline.torch_engine.model.coded import stack
from tests.tiny import tiny_checkpoint

PARTS = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
GEMMA_PARTS = PARTS | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
TYPES = {
    "attn_q": "Q4_0",
    "attn_k": "Q4_0",
    "attn_v": "Q5_1",
    "ffn_down": "Q8_0",
    "ffn_up": "Q5_0",
    "attn_output": "F16",
}
"""Of a file's linears, the others being Q4_1: all that the package writes, and several in one product."""


def blocks(kind: str, rows: int, columns: int) -> np.ndarray:
    """Random codes and scales, finite ones."""
    block = CODED[kind][0]
    random = np.random.default_rng(3)
    raw = random.integers(0, 256, (rows, columns, block), dtype=np.uint8)
    halves = {"Q4_1": 2, "Q5_1": 2, "Q4_K": 2, "Q5_K": 2}.get(kind, 1)
    first = 208 if kind == "Q6_K" else 0
    for at in range(first, first + 2 * halves, 2):
        raw[..., at : at + 2] = random.normal(size=(rows, columns, 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", CODED)
def test_numbers_are_those_of_llama_cpp(kind: str) -> None:
    raw = blocks(kind, 5, 3)
    expected = dequantize(raw, GGMLQuantizationType[kind])
    assert np.array_equal(to_coded(raw, kind).values(torch.float32).numpy(), expected)


def test_parts_of_different_types_are_stacked_without_loss() -> None:
    parts = [
        to_coded(blocks(kind, 4, count), kind) for kind, count in (("Q4_K", 1), ("Q6_K", 1), ("Q4_0", 8))
    ]
    together = stack(parts)
    assert together is not None and together.group == 16
    expected = torch.cat([part.values(torch.float32) for part in parts])
    torch.testing.assert_close(together.values(torch.float32), expected, rtol=1e-6, atol=1e-5)


def write(source: Path, path: Path, family: str) -> None:
    """``source`` as a GGUF file; its own weights become the ones that the file means."""
    config = json.loads((source / "config.json").read_text())
    writer = GGUFWriter(path, family)

    def number(key: str, value: float) -> None:
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{family}.{key}", value)

    number("block_count", config["num_hidden_layers"])
    number("context_length", config["max_position_embeddings"])
    number("embedding_length", config["hidden_size"])
    number("feed_forward_length", config["intermediate_size"])
    number("attention.head_count", config["num_attention_heads"])
    number("attention.head_count_kv", config["num_key_value_heads"])
    number("attention.key_length", config["head_dim"])
    number("attention.layer_norm_rms_epsilon", float(config["rms_norm_eps"]))
    if family == "gemma3":
        number("rope.freq_base", float(config["rope_parameters"]["full_attention"]["rope_theta"]))
        number("attention.sliding_window", config["sliding_window"])
    else:
        number("rope.freq_base", float(config["rope_parameters"]["rope_theta"]))
    write_tokens(writer, source)
    tensors, means = load_file(source / "model.safetensors"), {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if module in OUTSIDE:
            part, values = OUTSIDE[module], tensor.float().numpy()
        else:
            _, _, layer, inside = module.split(".", 3)
            kind = (GEMMA_PARTS if family == "gemma3" else PARTS)[inside]
            part, values = f"blk.{layer}.{kind}", tensor.float().numpy()
        if family == "llama" and part.endswith(("attn_q", "attn_k")):
            heads = values.shape[0] // config["head_dim"]
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        stored, meant = packed(values, part.rpartition(".")[2], gemma=family == "gemma3")
        writer.add_tensor(f"{part}.{leaf}", stored[0], raw_dtype=stored[1])
        if family == "llama" and part.endswith(("attn_q", "attn_k")):
            meant = meant.reshape(heads, -1, 2, meant.shape[1]).swapaxes(1, 2).reshape(meant.shape)
        means[name] = torch.from_numpy(np.ascontiguousarray(meant))
    for step in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        step()
    save_file(means, source / "model.safetensors", {"format": "pt"})


def packed(values: np.ndarray, part: str, gemma: bool) -> tuple[tuple[np.ndarray, Any], np.ndarray]:
    if values.ndim == 1:
        plus = 1.0 if gemma else 0.0
        return (values + np.float32(plus), GGMLQuantizationType.F32), (
            values + np.float32(plus)
        ) - np.float32(plus)
    kind = GGMLQuantizationType[TYPES.get(part, "Q4_1")]
    raw = quantize(values, kind)
    return (raw, kind), dequantize(raw, kind)


def write_tokens(writer: GGUFWriter, source: Path) -> None:
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocab = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    writer.add_array("tokenizer.ggml.tokens", [token for token, _ in vocab])
    writer.add_array("tokenizer.ggml.token_type", [3 if index < 3 else 1 for _, index in vocab])
    writer.add_array("tokenizer.ggml.merges", [" ".join(merge) for merge in tokenizer["model"]["merges"]])
    for name, index in (("bos", 0), ("eos", 1), ("padding", 2)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
def test_logits_equal_transformers(family: str, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", family, dtype=torch.float32)
    write(source, tmp_path / "tiny.gguf", family)
    (tmp_path / "codes").mkdir()
    convert(tmp_path / "tiny.gguf", tmp_path / "codes", keep_codes=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    settings: dict[str, Any] = {"num_kv_blocks": 64, "block_size": 4, "max_seq_len": 128, "num_threads": 1}
    engine = Engine(EngineConfig(str(tmp_path / "codes"), **settings))
    assert engine.model.spec.stored.startswith("GGUF Q4_0, Q8_0")
    prompt = list(range(20, 60))
    tokens = engine.generate([GenerationRequest(prompt, 12, end_id=-1)])[0].token_ids
    for count in range(len(tokens)):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens[:count]]), use_cache=False).logits[0, -1]
        assert int(logits.argmax()) == tokens[count]
    text = "the quick fox, 12 dogs"
    ours, theirs = (
        Tokenizer.from_file(str(tmp_path / name / "tokenizer.json")) for name in ("codes", "source")
    )
    assert ours.encode(text).ids == theirs.encode(text).ids and ours.decode(ours.encode(text).ids) == text


def test_a_file_is_a_model(tmp_path: Path) -> None:
    """Its codes, or bf16 for the precisions that are made of that; and one line for what is not read."""
    source = tiny_checkpoint(tmp_path / "source")
    write(source, tmp_path / "Tiny.Q4_1.gguf", "llama")
    hashes = FileHashes(tmp_path)
    codes = obtain(str(tmp_path / "Tiny.Q4_1.gguf"), tmp_path, hashes, keep_codes=True)
    assert codes.name == "tiny.q4_1" and codes.shape.int4 and not codes.cached
    assert obtain(str(tmp_path / "Tiny.Q4_1.gguf"), tmp_path, hashes, keep_codes=True).cached
    plain = obtain(str(tmp_path / "Tiny.Q4_1.gguf"), tmp_path, hashes)
    assert not plain.shape.int4 and plain.folder != codes.folder
    assert plain.shape.parameters == codes.shape.parameters


def header(path: Path, change: Callable[[GGUFWriter], None], architecture: str = "llama") -> Path:
    writer = GGUFWriter(path, architecture)
    change(writer)
    writer.add_tensor(
        "blk.0.attn_q.weight", np.zeros((1, 66), dtype=np.uint8), raw_dtype=GGMLQuantizationType.IQ2_XXS
    )
    for step in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        step()
    return path


@pytest.mark.parametrize(
    ("change", "architecture", "says"),
    [
        (lambda writer: None, "mamba", "architecture 'mamba' is not read from GGUF: it must be one of llama"),
        (
            lambda writer: writer.add_uint32("llama.expert_count", 8),
            "llama",
            "llama.expert_count=8 is not known",
        ),
        (
            lambda writer: None,
            "llama",
            "tensor blk.0.attn_q.weight is IQ2_XXS, which is not read: use a file of Q4_0",
        ),
    ],
)
def test_refused_by_name(
    change: Callable[[GGUFWriter], None], architecture: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(BuildError) as refusal:
        obtain(str(header(tmp_path / "a.gguf", change, architecture)), tmp_path, FileHashes(tmp_path))
    assert says in str(refusal.value) and "\n" not in str(refusal.value)
