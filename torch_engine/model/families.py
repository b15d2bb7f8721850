"""Which checkpoints the engine can run, and the shape facts it reads from their ``config.json``. No torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flightline.torch_engine.model.fields import (
    ROPE_NEEDED,
    ROPE_SETTINGS,
    Fields,
    UnsupportedModel,
    check_keys,
)
from flightline.torch_engine.model.quantization import Quantization, read_quantization

__all__ = ["SUPPORTED_ARCHITECTURES", "LayerSpec", "ModelSpec", "Rope", "UnsupportedModel", "load_spec"]

SUPPORTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one kind of layer, as ``rope_parameters`` of Transformers 5 gives it."""

    theta: float
    scaling: tuple[tuple[str, Any], ...] = ()
    """``rope_type`` and its settings; empty for the plain embedding."""


@dataclass(frozen=True)
class LayerSpec:
    """What differs between the layers of one model."""

    rope: Rope
    window: int | None
    """Sliding attention window in tokens; None = full attention."""


@dataclass(frozen=True)
class ModelSpec:
    """A decoder as the engine sees it: sizes and switches, whatever family it came from."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    layers: tuple[LayerSpec, ...]
    tie_embeddings: bool
    max_position_embeddings: int
    activation: str
    """``silu`` or ``gelu_tanh``."""
    attention_scale: float
    end_ids: tuple[int, ...]
    qk_norm: bool = False
    norm_plus_one: bool = False
    """Gemma stores norm weights less one."""
    sandwich_norm: bool = False
    """Gemma 2 and 3 also normalise what attention and MLP return."""
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    quantization: Quantization | None = None
    """How the linears are stored; None = as plain numbers."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False

    @property
    def fp8(self) -> bool:
        """Linears are stored as e4m3 codes."""
        return self.quantization is not None and not self.quantization.int4

    @property
    def int4(self) -> bool:
        """Linears are stored as codes of 4 bits."""
        return self.quantization is not None and self.quantization.int4

    @property
    def stored(self) -> str:
        """How the linears are stored, in words."""
        return "bf16" if self.quantization is None else self.quantization.name

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def num_groups(self) -> int:
        return self.num_heads // self.num_kv_heads


ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh"}


def load_spec(model_dir: str | Path) -> ModelSpec:
    """Reads ``config.json`` (and the end ids of ``generation_config.json``).

    Raises:
        UnsupportedModel: the architecture, activation, quantisation or shape is not implemented, a value is none, or
            a key is not known.
    """
    folder = Path(model_dir)
    fields = Fields(_read_json(folder / "config.json"), folder / "config.json")
    architecture = (fields.words("architectures") or ["?"])[0]
    if architecture not in SUPPORTED_ARCHITECTURES:
        supported = ", ".join(SUPPORTED_ARCHITECTURES)
        raise UnsupportedModel(
            f"{folder}: architecture {architecture} is not supported; supported are {supported}"
        )
    quantization = read_quantization(
        folder, fields
    )  # first: what quantises a model often brings keys of its own
    check_keys(fields.config, architecture, folder)
    gemma = architecture.startswith("Gemma")
    sandwich = architecture in ("Gemma2ForCausalLM", "Gemma3ForCausalLM")
    hidden, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    kv_heads = fields.whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.refuse("num_key_value_heads", f"it must divide num_attention_heads={heads}")
    if "head_dim" not in fields.config and hidden % heads:
        raise fields.refuse("num_attention_heads", f"it must divide hidden_size={hidden}")
    head_dim = fields.whole("head_dim", hidden // heads or 1)
    if head_dim % 2:
        raise fields.refuse("head_dim", f"heads of {head_dim} cannot be rotated in halves: it must be even")
    scalar = fields.positive("query_pre_attn_scalar", head_dim) if sandwich else head_dim
    attention_bias = fields.flag("attention_bias", False)
    return ModelSpec(
        architecture=architecture,
        vocab_size=fields.whole("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.whole("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=fields.positive("rms_norm_eps", 1e-6),
        layers=_layers(fields, architecture),
        tie_embeddings=fields.flag("tie_word_embeddings", gemma),
        max_position_embeddings=fields.whole("max_position_embeddings", 2048),
        activation=_activation(fields, architecture),
        attention_scale=1.0 / math.sqrt(scalar),
        end_ids=_end_ids(folder, fields),
        qk_norm=architecture in ("Qwen3ForCausalLM", "Gemma3ForCausalLM"),
        norm_plus_one=gemma,
        sandwich_norm=sandwich,
        embedding_scale=hidden**0.5 if gemma else 1.0,
        attention_softcap=_softcap(fields, architecture, "attn_logit_softcapping", 50.0),
        logit_softcap=_softcap(fields, architecture, "final_logit_softcapping", 30.0),
        quantization=quantization,
        qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
        out_bias=attention_bias and architecture != "Qwen2ForCausalLM",
        mlp_bias=fields.flag("mlp_bias", False),
    )


def _activation(fields: Fields, architecture: str) -> str:
    if architecture == "GemmaForCausalLM":  # its "gelu" has always meant the tanh form
        return "gelu_tanh"
    gemma = architecture.startswith("Gemma")
    name = "hidden_activation" if fields.config.get("hidden_activation") else "hidden_act"
    activation = fields.config.get(name) or ("gelu_pytorch_tanh" if gemma else "silu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise fields.refuse(name, f"supported activations are {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[activation]


def _softcap(fields: Fields, architecture: str, name: str, default: float) -> float | None:
    """Gemma 2 has caps even if its file does not say so, Gemma 3 only if it does."""
    if architecture == "Gemma2ForCausalLM" and name not in fields.config:
        return default
    if architecture not in ("Gemma2ForCausalLM", "Gemma3ForCausalLM") or fields.config.get(name) is None:
        return None
    return fields.positive(name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnsupportedModel(f"{path} does not exist: not a Hugging Face checkpoint folder") from None
    except (ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path} is not valid JSON ({error}): fetch the checkpoint again") from None
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path} is not a JSON object: fetch the checkpoint again")
    return value


def _layers(fields: Fields, architecture: str) -> tuple[LayerSpec, ...]:
    count = fields.whole("num_hidden_layers")
    window = _window(fields, architecture)
    kinds = fields.words("layer_types") or _layer_kinds(fields, architecture, count, window)
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModel(f"{fields.source}: layer types {sorted(unknown)} are not supported")
    if len(kinds) != count:
        raise fields.refuse("layer_types", f"it must have one for each of num_hidden_layers={count}")
    if window is None and "sliding_attention" in kinds:
        raise fields.refuse(
            "sliding_window", "layer_types has sliding_attention, so it must be a whole number"
        )
    ropes = {kind: _rope(fields, kind) for kind in set(kinds)}
    return tuple(LayerSpec(ropes[kind], window if kind == "sliding_attention" else None) for kind in kinds)


WINDOWED = ("MistralForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM")
"""Families with a window of 4,096 tokens if the file does not speak of it."""


def _window(fields: Fields, architecture: str) -> int | None:
    name = "sliding_window"
    if architecture.startswith("Qwen") and not fields.flag("use_sliding_window", False):
        return None
    if architecture in WINDOWED and name not in fields.config:
        return 4096
    return None if fields.config.get(name) is None else fields.whole(name)


def _layer_kinds(fields: Fields, architecture: str, count: int, window: int | None) -> list[str]:
    """Layer types of configs written before ``layer_types`` existed."""
    if window is None:
        return ["full_attention"] * count
    if architecture == "Gemma2ForCausalLM":
        return ["sliding_attention" if index % 2 == 0 else "full_attention" for index in range(count)]
    if architecture == "Gemma3ForCausalLM":
        pattern = fields.whole("sliding_window_pattern", fields.whole("_sliding_window_pattern", 6))
        return ["sliding_attention" if (index + 1) % pattern else "full_attention" for index in range(count)]
    if architecture.startswith("Qwen"):
        first = fields.whole("max_window_layers", 28, least=0)
        return ["sliding_attention" if index >= first else "full_attention" for index in range(count)]
    return ["sliding_attention"] * count


def _rope(fields: Fields, kind: str) -> Rope:
    """Reads either spelling: ``rope_parameters`` (Transformers 5) or ``rope_theta`` + ``rope_scaling``."""
    parameters = fields.table("rope_parameters")
    if kind in parameters:
        parameters = Fields(parameters, fields.source).table(kind)
    elif "full_attention" in parameters or "sliding_attention" in parameters:
        raise UnsupportedModel(f"{fields.source}: rope_parameters lack {kind}")
    spelled = Fields(parameters or fields.config, fields.source)
    theta = spelled.positive("rope_theta", fields.positive("rope_theta", 10000.0))
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
    if not scaling:
        scaling = fields.table("rope_scaling")
    if kind == "sliding_attention" and not parameters and fields.config.get("rope_local_base_freq"):
        theta, scaling = fields.positive("rope_local_base_freq"), {}
    scaling = {key: value for key, value in scaling.items() if value is not None}
    old_spelling = scaling.pop("type", None)
    rope_type = scaling.pop("rope_type", None) or old_spelling or "default"
    if not isinstance(rope_type, str) or rope_type not in ROPE_SETTINGS:
        raise UnsupportedModel(
            f"{fields.source}: rope_type {rope_type!r} is not supported; supported are {', '.join(ROPE_SETTINGS)}"
        )
    if scaling.get("partial_rotary_factor") == 1:
        del scaling["partial_rotary_factor"]
    if rope_type == "default" and not set(scaling) - ROPE_SETTINGS["yarn"] - ROPE_SETTINGS["llama3"]:
        return Rope(float(theta))
    unknown = set(scaling) - ROPE_SETTINGS[rope_type]
    if unknown:
        raise UnsupportedModel(
            f"{fields.source}: {sorted(unknown)} of rope_type {rope_type!r} is not implemented"
        )
    settings = Fields(scaling, f"{fields.source}: rope scaling")
    for name in sorted(set(scaling) | ROPE_NEEDED[rope_type]):
        if name == "truncate":
            settings.flag(name, True)
        else:
            settings.positive(name)
    if rope_type == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise settings.refuse("low_freq_factor", "it must be below high_freq_factor")
    return Rope(float(theta), (("rope_type", rope_type), *sorted(scaling.items())))


def _end_ids(folder: Path, fields: Fields) -> tuple[int, ...]:
    """All ids that end an output; generation_config.json knows more of them than config.json."""
    own = fields.ids("eos_token_id")
    path = folder / "generation_config.json"
    declared = Fields(_read_json(path), path).ids("eos_token_id") if path.exists() else None
    return declared or own or ()
