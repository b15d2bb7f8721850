"""Which tensors a checkpoint must hold, in which shapes, and where it has those that the engine asks for.

No torch: the build asks before it imports anything heavy.
A missing or foreign tensor means weights of another model under this configuration: loaded, they would be wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flightline.torch_engine.model.fields import UnsupportedModel
from flightline.torch_engine.model.mixture import MixtureSpec, mixture_linears, mixture_sizes
from flightline.torch_engine.model.quantization import (
    BESIDE_CODES,
    BESIDE_INT4,
    FP8,
    PACKED,
    PLAIN,
    SUPPORTED,
    Stored,
    check_codes,
    check_int4,
    codes_of,
)
from flightline.torch_engine.model.spec import ModelSpec, Rope
from flightline.torch_engine.model.stacked import stacked_sizes, stacked_tensors


@dataclass(frozen=True)
class Rows:
    """Where the outputs of a module lie in the module that a checkpoint stores."""

    module: str
    """The stored one; the module itself unless it is stored with others."""
    start: int
    stop: int
    total: int
    """Rows of the stored module."""
    order: tuple[int, ...] | None
    """Of the dimensions of each head, as the engine wants them; None = as they are stored."""


TEXT_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
"""How wrappers name their language part: Transformers 5 and before 4.52."""
OTHER_PARTS = re.compile(
    r"(model\.)?(vision_tower|vision_model|visual|vision_encoder|audio_tower|multi_modal_projector|patch_merger)\."
)
"""Of a wrapper, what is not its language part: known, and not served."""


def plain_names(stored: Iterable[str], spec: ModelSpec, folder: Path) -> dict[str, str]:
    """The tensors of the decoder, by their names in a model without a wrapper, with their names in the file.

    Raises UnsupportedModel if two are the same one.
    """
    found: dict[str, str] = {}
    for name in stored:
        plain = name
        if spec.wrapper:
            if OTHER_PARTS.match(name):
                continue
            for prefix, instead in TEXT_PREFIXES:
                if name.startswith(prefix):
                    plain = instead + name.removeprefix(prefix)
                    break
        if plain in found:
            raise UnsupportedModel(f"{folder} has both {found[plain]} and {name}: fetch the checkpoint again")
        found[plain] = name
    return found


def rows_of(spec: ModelSpec, module: str) -> Rows | None:
    """Where a checkpoint has the rows of ``module``; None if it has them as the engine does."""
    layer = LAYER.match(module)
    if layer is None:
        return None
    prefix, name = layer.group(0), module[layer.end() :]
    order = None
    if name.endswith((".q_proj", ".k_proj", ".q_norm", ".k_norm")):
        order = head_order(spec.layers[int(layer.group(1))].rope, spec.head_dim)
    for whole, parts in spec.fused:
        if name in parts:
            sizes = [_outputs(spec, part) for part in parts]
            start = sum(sizes[: parts.index(name)])
            return Rows(prefix + whole, start, start + _outputs(spec, name), sum(sizes), order)
    if order is None:
        return None
    size = _outputs(spec, name.replace("_norm", "_proj"))
    if name.endswith("_norm") and spec.qk_norm == "head":
        size = spec.head_dim
    return Rows(module, 0, size, size, order)


LAYER = re.compile(r"model\.layers\.(\d+)\.")


def head_order(rope: Rope, head_dim: int) -> tuple[int, ...] | None:
    """The stored dimension of each dimension of a head, such that those that turn together lie half a head apart.

    The kernels know one rotary embedding: all pairs (i, i + head_dim / 2). Whatever else a checkpoint was trained with
    becomes that one when the rows of its queries and keys move alike, which no product of the two notices; dimensions
    that do not turn come last in each half, where :func:`rope.rope_table` does nothing. None if nothing moves.
    """
    dims, half = head_dim if rope.dims is None else rope.dims, head_dim // 2
    if dims == 0 or (dims == head_dim and not rope.interleaved):
        return None
    turning = dims // 2
    firsts = [2 * pair if rope.interleaved else pair for pair in range(turning)]
    partners = [2 * pair + 1 if rope.interleaved else pair + turning for pair in range(turning)]
    still = list(range(dims, head_dim))
    return (*firsts, *still[: half - turning], *partners, *still[half - turning :])


def check_tensors(spec: ModelSpec, stored: Mapping[str, Stored], folder: Path) -> None:
    """Raises UnsupportedModel that names the first tensor which is missing, misshapen or foreign."""
    stored = {plain: stored[name] for plain, name in plain_names(stored, spec, folder).items()}
    wanted = _wanted(spec)
    sizes = _sizes(spec)
    again = "fetch the weights and config.json of one checkpoint"
    foreign = [name for name in stored if name not in wanted and not _known(name, spec, wanted)]
    for name, extents in wanted.items():
        codes = codes_of(name.removesuffix(".weight"), spec.quantization)
        if codes in stored and stored[codes].dtype in PACKED and spec.quantization is not None:
            shape = tuple(sizes[extent] for extent in extents)
            check_int4(name.removesuffix(".weight"), shape, stored, spec.quantization, folder)
            continue
        if name not in stored:
            instead = f" (it has {foreign[0]}, which no {spec.architecture} has)" if foreign else ""
            raise UnsupportedModel(f"{folder} lacks the tensor {name}{instead}: {again}")
        _check_tensor(name, stored, tuple(sizes[extent] for extent in extents), extents, spec, folder)
    if spec.quantization is not None and not any(_is_codes(name, stored, spec) for name in wanted):
        raise UnsupportedModel(
            f"{folder}: its configuration says {spec.quantization.name}, and no tensor has such codes: {again}"
        )
    if foreign:
        raise UnsupportedModel(
            f"{folder}: tensor {foreign[0]} is none of a {spec.architecture} with this config.json: {again}"
        )


def _is_codes(name: str, stored: Mapping[str, Stored], spec: ModelSpec) -> bool:
    codes = codes_of(name.removesuffix(".weight"), spec.quantization) or name
    return codes in stored and stored[codes].dtype in (*PACKED, FP8)


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
    layer = LAYER.match(name)
    if layer is not None and 0 <= int(layer.group(1)) - spec.num_layers < spec.extra_layers:
        return True
    if leaf in ("k_scale", "v_scale"):  # they come with unquantised weights, too
        attention = f"self_attn.{leaf}", f"self_attn.{leaf[0]}_proj.{leaf}"
        return (
            layer is not None and int(layer.group(1)) < spec.num_layers and name[layer.end() :] in attention
        )
    packing = spec.quantization.packing if spec.quantization else ""
    if packing == "mxfp4":
        weight, _, kind = name.rpartition("_")
        return kind in BESIDE_INT4[packing] and weight in wanted
    if leaf in BESIDE_CODES if not packing else leaf in BESIDE_INT4[packing]:
        return spec.quantization is not None and f"{module}.weight" in wanted
    if packing == "gptq" and leaf == "bias":  # its first tool gave one to every module
        return f"{module}.weight" in wanted
    return name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq")


QUERIES, KEYS = "num_attention_heads * head_dim", "num_key_value_heads * head_dim"
HIDDEN, INNER, HEADS = "hidden_size", "intermediate_size", "num_attention_heads"
SINKS = "self_attn.sinks"
LINEARS = {
    "self_attn.q_proj": (QUERIES, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, QUERIES),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
"""Outputs and inputs of a layer's linears, by the names of :func:`_sizes`."""


def _sizes(spec: ModelSpec) -> dict[str, int]:
    mixture = next((layer.mixture for layer in spec.layers if layer.mixture), None)
    sizes = {
        **(mixture_sizes(mixture) if mixture else {}),
        **(stacked_sizes(mixture) if mixture else {}),
        HEADS: spec.num_heads,
        "vocab_size": spec.vocab_size,
        HIDDEN: spec.hidden_size,
        INNER: spec.intermediate_size,
        QUERIES: spec.num_heads * spec.head_dim,
        KEYS: spec.num_kv_heads * spec.head_dim,
        "head_dim": spec.head_dim,
    }
    return sizes | {
        _together(parts): sum(sizes[LINEARS[part][0]] for part in parts) for _, parts in spec.fused
    }


def _together(parts: tuple[str, ...]) -> str:
    """What the outputs of modules stored as one are."""
    return " + ".join(LINEARS[part][0] for part in parts)


def _outputs(spec: ModelSpec, module: str) -> int:
    return _sizes(spec)[LINEARS[module][0]]


def _biased(spec: ModelSpec, module: str) -> bool:
    if module.startswith("mlp."):
        return spec.mlp_bias
    return spec.out_bias if module == "self_attn.o_proj" else spec.qkv_bias


def _wanted(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """Tensor name to what its extents are, by the names of :func:`_sizes`."""
    linears = {name: (*extents, _biased(spec, name)) for name, extents in LINEARS.items()}
    for whole, parts in spec.fused:
        _, inputs, biased = linears[parts[0]]
        for part in parts:
            del linears[part]
        linears[whole] = (_together(parts), inputs, biased)
    norms = dict.fromkeys(spec.norms.modules, HIDDEN)
    if spec.qk_norm == "head":
        norms |= {"self_attn.q_norm": "head_dim", "self_attn.k_norm": "head_dim"}
    if spec.qk_norm == "row":
        norms |= {"self_attn.q_norm": QUERIES, "self_attn.k_norm": KEYS}
    wanted: dict[str, tuple[str, ...]] = {"model.embed_tokens.weight": ("vocab_size", HIDDEN)}
    attention = {name: shape for name, shape in linears.items() if not name.startswith("mlp.")}
    for index, layer in enumerate(spec.layers):
        prefix = f"model.layers.{index}"
        own = linears
        if layer.mixture:
            own = attention | _routed(layer.mixture)
            wanted |= {f"{prefix}.{name}": shape for name, shape in stacked_tensors(layer.mixture).items()}
            if layer.mixture.correction:
                wanted[f"{prefix}.{layer.mixture.names.correction}"] = ("experts",)
        for name, (outputs, inputs, biased) in own.items():
            wanted[f"{prefix}.{name}.weight"] = (outputs, inputs)
            if biased:
                wanted[f"{prefix}.{name}.bias"] = (outputs,)
        wanted |= {f"{prefix}.{name}.weight": (size,) for name, size in norms.items()}
        if spec.sinks:
            wanted[f"{prefix}.{SINKS}"] = (HEADS,)
    wanted["model.norm.weight"] = (HIDDEN,)
    if not spec.tie_embeddings:
        wanted["lm_head.weight"] = ("vocab_size", HIDDEN)
    return wanted


def _routed(mixture: MixtureSpec) -> dict[str, tuple[str, str, bool]]:
    """The linears of a routed MLP that are stored by themselves: outputs, inputs, and whether they have a bias."""
    names = mixture.names
    return {
        name: (*shape, mixture.router_bias if name == names.router else mixture.expert_bias)
        for name, shape in mixture_linears(mixture).items()
        if not (mixture.stacked and name.startswith(f"{names.block}.experts."))
    }


def _is_linear(name: str) -> bool:
    return name.endswith("_proj.weight") or (".experts." in name and not name.endswith("bias"))


def count(spec: ModelSpec) -> tuple[int, int]:
    """Numbers that the model has, and those of its linears, whatever they are stored as."""
    sizes = _sizes(spec)
    counts = {name: math.prod(sizes[extent] for extent in extents) for name, extents in _wanted(spec).items()}
    return sum(counts.values()), sum(size for name, size in counts.items() if _is_linear(name))
