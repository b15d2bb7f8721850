"""Which checkpoints the engine can run, and the shape facts it reads from their ``config.json``. No torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUPPORTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
)


class UnsupportedModel(ValueError):
    """The checkpoint asks for something that the engine does not implement; the message lists what it does."""


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
    fp8: bool = False
    """ModelOpt unified FP8: e4m3 weights with ``weight_scale`` and ``input_scale``."""

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
        UnsupportedModel: the architecture, activation, quantisation or shape is not implemented.
    """
    folder = Path(model_dir)
    config = _read_json(folder / "config.json")
    architecture = (config.get("architectures") or ["?"])[0]
    if architecture not in SUPPORTED_ARCHITECTURES:
        supported = ", ".join(SUPPORTED_ARCHITECTURES)
        raise UnsupportedModel(
            f"{folder}: architecture {architecture} is not supported; supported are {supported}"
        )
    gemma = architecture.startswith("Gemma")
    sandwich = architecture in ("Gemma2ForCausalLM", "Gemma3ForCausalLM")
    activation = (
        config.get("hidden_activation")
        or config.get("hidden_act")
        or ("gelu_pytorch_tanh" if gemma else "silu")
    )
    if architecture == "GemmaForCausalLM":  # its "gelu" has always meant the tanh form
        activation = "gelu_pytorch_tanh"
    if activation not in ACTIVATIONS:
        raise UnsupportedModel(
            f"{folder}: activation {activation!r} is not supported; supported: {sorted(ACTIVATIONS)}"
        )
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    scalar = config.get("query_pre_attn_scalar") if sandwich else None
    return ModelSpec(
        architecture=architecture,
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        intermediate_size=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        norm_eps=config.get("rms_norm_eps", 1e-6),
        layers=_layers(config, architecture, folder),
        tie_embeddings=config.get("tie_word_embeddings", gemma),
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        activation=ACTIVATIONS[activation],
        attention_scale=1.0 / math.sqrt(scalar or head_dim),
        end_ids=_end_ids(folder, config),
        qk_norm=architecture in ("Qwen3ForCausalLM", "Gemma3ForCausalLM"),
        norm_plus_one=gemma,
        sandwich_norm=sandwich,
        embedding_scale=hidden**0.5 if gemma else 1.0,
        attention_softcap=config.get("attn_logit_softcapping") if sandwich else None,
        logit_softcap=config.get("final_logit_softcapping") if sandwich else None,
        fp8=_is_fp8(folder, config),
    )


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnsupportedModel(f"{path} does not exist: not a Hugging Face checkpoint folder") from None
    except json.JSONDecodeError as error:
        raise UnsupportedModel(f"{path} is not valid JSON: {error}") from None


def _layers(config: dict, architecture: str, folder: Path) -> tuple[LayerSpec, ...]:
    count = config["num_hidden_layers"]
    window = config.get("sliding_window")
    if architecture.startswith("Qwen") and not config.get("use_sliding_window", False):
        window = None
    kinds = config.get("layer_types") or _layer_kinds(config, architecture, count, window)
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModel(f"{folder}: layer types {sorted(unknown)} are not supported")
    return tuple(
        LayerSpec(_rope(config, kind, folder), window if kind == "sliding_attention" else None)
        for kind in kinds
    )


def _layer_kinds(config: dict, architecture: str, count: int, window: int | None) -> list[str]:
    """Layer types of configs written before ``layer_types`` existed."""
    if window is None:
        return ["full_attention"] * count
    if architecture == "Gemma2ForCausalLM":
        return ["sliding_attention" if index % 2 == 0 else "full_attention" for index in range(count)]
    if architecture == "Gemma3ForCausalLM":
        pattern = config.get("sliding_window_pattern", 6)
        return ["sliding_attention" if (index + 1) % pattern else "full_attention" for index in range(count)]
    if architecture.startswith("Qwen"):
        first = config.get("max_window_layers", 0)
        return ["sliding_attention" if index >= first else "full_attention" for index in range(count)]
    return ["sliding_attention"] * count


def _rope(config: dict, kind: str, folder: Path) -> Rope:
    """Reads either spelling: ``rope_parameters`` (Transformers 5) or ``rope_theta`` + ``rope_scaling``."""
    parameters = config.get("rope_parameters") or {}
    if kind in parameters:
        parameters = parameters[kind]
    elif "full_attention" in parameters or "sliding_attention" in parameters:
        raise UnsupportedModel(f"{folder}: rope_parameters lack {kind}")
    theta = parameters.get("rope_theta") or config.get("rope_theta") or 10000.0
    scaling = (
        {key: value for key, value in parameters.items() if key != "rope_theta"}
        or config.get("rope_scaling")
        or {}
    )
    if kind == "sliding_attention" and not parameters and config.get("rope_local_base_freq"):
        theta, scaling = config["rope_local_base_freq"], {}
    scaling = dict(scaling)
    rope_type = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    if rope_type == "default":
        return Rope(float(theta))
    if rope_type not in ("linear", "llama3", "yarn"):
        raise UnsupportedModel(
            f"{folder}: rope_type {rope_type!r} is not supported; supported are default, linear, llama3, yarn"
        )
    items = tuple(sorted((key, _freeze(value)) for key, value in scaling.items()))
    return Rope(float(theta), (("rope_type", rope_type), *items))


def _freeze(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _end_ids(folder: Path, config: dict) -> tuple[int, ...]:
    """All ids that end an output; generation_config.json knows more of them than config.json."""
    path = folder / "generation_config.json"
    declared = _read_json(path).get("eos_token_id") if path.exists() else None
    if declared is None:
        declared = config.get("eos_token_id")
    if declared is None:
        return ()
    return tuple(declared) if isinstance(declared, list) else (declared,)


def _is_fp8(folder: Path, config: dict) -> bool:
    path = folder / "hf_quant_config.json"
    quantization = (
        _read_json(path).get("quantization", {}) if path.exists() else config.get("quantization_config")
    )
    if not quantization:
        return False
    algorithm = quantization.get("quant_algo")
    if algorithm != "FP8":
        method = algorithm or quantization.get("quant_method")
        raise UnsupportedModel(
            f"{folder}: quantisation {method!r} is not supported; supported are bf16 checkpoints and ModelOpt FP8"
        )
    return True
