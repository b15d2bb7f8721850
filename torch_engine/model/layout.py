"""Which tensors a checkpoint must hold, in which shapes. No torch: the build asks before it imports anything heavy.

A missing or foreign tensor means weights of another model under this configuration: loaded, they would be wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from flightline.torch_engine.model.families import ModelSpec
from flightline.torch_engine.model.fields import UnsupportedModel
from flightline.torch_engine.model.quantization import (
    BESIDE_CODES,
    BESIDE_INT4,
    FP8,
    KV_SCALES,
    PLAIN,
    SUPPORTED,
    Stored,
    check_codes,
    check_int4,
    codes_of,
)


def check_tensors(spec: ModelSpec, stored: Mapping[str, Stored], folder: Path) -> None:
    """Raises UnsupportedModel that names the first tensor which is missing, misshapen or foreign."""
    wanted = _wanted(spec)
    sizes = _sizes(spec)
    again = "fetch the weights and config.json of one checkpoint"
    foreign = [name for name in stored if name not in wanted and not _known(name, spec, wanted)]
    for name, extents in wanted.items():
        codes = codes_of(name.removesuffix(".weight"), spec.quantization)
        if codes in stored and name not in stored and spec.quantization is not None:
            shape = tuple(sizes[extent] for extent in extents)
            check_int4(name.removesuffix(".weight"), shape, stored, spec.quantization, folder)
            continue
        if name not in stored:
            instead = f" (it has {foreign[0]}, which no {spec.architecture} has)" if foreign else ""
            raise UnsupportedModel(f"{folder} lacks the tensor {name}{instead}: {again}")
        _check_tensor(name, stored, tuple(sizes[extent] for extent in extents), extents, spec, folder)
    if foreign:
        raise UnsupportedModel(
            f"{folder}: tensor {foreign[0]} is none of a {spec.architecture} with this config.json: {again}"
        )


def _check_tensor(
    name: str,
    stored: Mapping[str, Stored],
    shape: tuple[int, ...],
    extents: tuple[str, ...],
    spec: ModelSpec,
    folder: Path,
) -> None:
    found = stored[name]
    if found.shape != shape:
        meaning = ", ".join(f"{what}={size}" for what, size in zip(extents, shape, strict=True))
        raise UnsupportedModel(
            f"{folder}: {name} has shape {list(found.shape)}, and config.json says {list(shape)} ({meaning}): "
            "fetch the weights and config.json of one checkpoint"
        )
    if found.dtype not in (*PLAIN, FP8):
        raise UnsupportedModel(
            f"{folder}: {name} is stored as {found.dtype}, which is not supported; supported are {SUPPORTED}"
        )
    if found.dtype == FP8:
        check_codes(name.removesuffix(".weight"), shape, stored, spec.quantization, folder)


def _known(name: str, spec: ModelSpec, wanted: Mapping[str, tuple[str, ...]]) -> bool:
    """Tensors that may be there: scales, an unused copy of the tied head, and tables that old files stored."""
    module, _, leaf = name.rpartition(".")
    if leaf in KV_SCALES:  # these also come with unquantised weights
        return f"{module}.weight" in wanted or f"{module}.q_proj.weight" in wanted
    packing = spec.quantization.packing if spec.quantization else ""
    if leaf in BESIDE_CODES if not packing else leaf in BESIDE_INT4[packing]:
        return spec.quantization is not None and f"{module}.weight" in wanted
    if packing == "gptq" and leaf == "bias":  # its first tool gave one to every module
        return f"{module}.weight" in wanted
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")


def _sizes(spec: ModelSpec) -> dict[str, int]:
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_attention_heads * head_dim": spec.num_heads * spec.head_dim,
        "num_key_value_heads * head_dim": spec.num_kv_heads * spec.head_dim,
        "head_dim": spec.head_dim,
    }


def _wanted(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """Tensor name to what its extents are, by the names of :func:`_sizes`."""
    hidden, inner = "hidden_size", "intermediate_size"
    queries, keys = "num_attention_heads * head_dim", "num_key_value_heads * head_dim"
    linears = {
        "self_attn.q_proj": (queries, hidden, spec.qkv_bias),
        "self_attn.k_proj": (keys, hidden, spec.qkv_bias),
        "self_attn.v_proj": (keys, hidden, spec.qkv_bias),
        "self_attn.o_proj": (hidden, queries, spec.out_bias),
        "mlp.gate_proj": (inner, hidden, spec.mlp_bias),
        "mlp.up_proj": (inner, hidden, spec.mlp_bias),
        "mlp.down_proj": (hidden, inner, spec.mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if spec.sandwich_norm:
        norms |= {"pre_feedforward_layernorm": hidden, "post_feedforward_layernorm": hidden}
    if spec.qk_norm:
        norms |= {"self_attn.q_norm": "head_dim", "self_attn.k_norm": "head_dim"}
    wanted: dict[str, tuple[str, ...]] = {"model.embed_tokens.weight": ("vocab_size", hidden)}
    for layer in range(spec.num_layers):
        prefix = f"model.layers.{layer}"
        for name, (outputs, inputs, biased) in linears.items():
            wanted[f"{prefix}.{name}.weight"] = (outputs, inputs)
            if biased:
                wanted[f"{prefix}.{name}.bias"] = (outputs,)
        wanted |= {f"{prefix}.{name}.weight": (size,) for name, size in norms.items()}
    wanted["model.norm.weight"] = (hidden,)
    if not spec.tie_embeddings:
        wanted["lm_head.weight"] = ("vocab_size", hidden)
    return wanted


def count(spec: ModelSpec) -> tuple[int, int]:
    """Numbers that the model has, and those of its linears, whatever they are stored as."""
    sizes = _sizes(spec)
    counts = {name: math.prod(sizes[extent] for extent in extents) for name, extents in _wanted(spec).items()}
    return sum(counts.values()), sum(size for name, size in counts.items() if name.endswith("_proj.weight"))
