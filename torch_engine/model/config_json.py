"""Reads ``config.json`` of a Hugging Face folder: which family it is, and the decoder that it describes. No torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from flightline.torch_engine.model.families import (
    BY_MODEL_TYPE,
    FAMILIES,
    FULL,
    SLIDING,
    SUPPORTED_ARCHITECTURES,
    WRAPPERS,
    Family,
    turning_layers,
)
from flightline.torch_engine.model.fields import Fields, UnsupportedModel, check_keys, check_wrapper_keys
from flightline.torch_engine.model.quantization import read_quantization
from flightline.torch_engine.model.rope_settings import read_rope
from flightline.torch_engine.model.spec import LayerSpec, ModelSpec, Rope

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh"}
NO_ROPE = Rope(1.0, dims=0)
SHARED = ("eos_token_id", "tie_word_embeddings", "quantization_config")
"""What a wrapper may say of the language part outside its ``text_config``."""


def load_spec(model_dir: str | Path) -> ModelSpec:
    """Reads ``config.json`` (and the end ids of ``generation_config.json``).

    Raises:
        UnsupportedModel: the architecture, activation, quantisation or shape is not implemented, a value is none, or
            a key is not known.
    """
    folder = Path(model_dir)
    source = folder / "config.json"
    family, fields, wrapper = _text_model(Fields(read_json(source), source))
    quantization = read_quantization(
        folder, fields
    )  # first: what quantises a model often brings keys of its own
    check_keys(fields.config, family.architecture, family.keys, family.code, source)
    fields = Fields({**family.defaults, **fields.config}, fields.source)

    hidden, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    kv_heads = fields.whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.refuse("num_key_value_heads", f"it must divide num_attention_heads={heads}")
    if fields.config.get("head_dim") is None and hidden % heads:
        raise fields.refuse("num_attention_heads", f"it must divide hidden_size={hidden}")
    head_dim = fields.whole("head_dim", hidden // heads or 1)
    if head_dim % 2:
        raise fields.refuse("head_dim", f"heads of {head_dim} cannot be rotated in halves: it must be even")
    attention_bias = fields.flag("attention_bias", False)
    layers = _layers(fields, family, head_dim)
    embedding_scale = hidden**0.5 if family.scales_embedding else 1.0
    branch = _multiplier(fields, family, "residual_multiplier")
    return ModelSpec(
        architecture=family.architecture,
        vocab_size=fields.whole("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.whole("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        # x + branch * f(norm(x)) is branch times y + f(norm(y)) for y = x / branch, with the norm's epsilon scaled
        # alike: no kernel needs to know of the multiplier.
        norm_eps=fields.positive("rms_norm_eps", 1e-6) / branch**2,
        layers=layers,
        tie_embeddings=fields.flag("tie_word_embeddings", False),
        max_position_embeddings=_context(fields, family),
        activation=_activation(fields, family),
        attention_scale=_attention_scale(fields, family, head_dim),
        end_ids=_end_ids(folder, fields),
        norms=family.norms,
        qk_norm="head" if fields.config.get("use_qk_norm") else family.qk_norm,
        norm_plus_one=family.norm_plus_one,
        embedding_scale=embedding_scale * _multiplier(fields, family, "embedding_multiplier") / branch,
        rounds_embedding_scale=family.scales_embedding,
        attention_softcap=_softcap(fields, family, "attn_logit_softcapping"),
        logit_softcap=_softcap(fields, family, "final_logit_softcapping"),
        logit_divisor=_multiplier(fields, family, "logits_scaling"),
        quantization=quantization,
        qkv_bias=fields.flag("qkv_bias", attention_bias or family.qkv_bias),
        out_bias=attention_bias and family.out_bias,
        sinks=family.sinks,
        mlp_bias=fields.flag("mlp_bias", False),
        fused=family.fused,
        extra_layers=_extra_layers(fields),
        wrapper=wrapper,
    )


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` of the language model alone, with what the files of its family leave out: one that says all itself.

    Raises UnsupportedModel if its architecture is none that runs.
    """
    family, fields, _ = _text_model(Fields(config, "config.json"))
    plain = {**family.defaults, **fields.config}
    if fields.config.get("rope_parameters") and "rope_scaling" not in fields.config:
        plain.pop("rope_scaling", None)  # which is the other spelling's default
    return plain


def transformers_class(model_dir: str | Path) -> str:
    """The class of Transformers that loads the checkpoint; raises UnsupportedModel as :func:`load_spec`."""
    path = Path(model_dir) / "config.json"
    _, _, wrapper = _text_model(Fields(read_json(path), path))
    return "AutoModelForImageTextToText" if wrapper else "AutoModelForCausalLM"


def _text_model(fields: Fields) -> tuple[Family, Fields, str]:
    """The family, its configuration, and the architecture that wraps it, if one does."""
    architecture = (fields.words("architectures") or ["?"])[0]
    if architecture in WRAPPERS:
        check_wrapper_keys(fields.config, architecture, WRAPPERS[architecture].keys, fields.source)
        text = _unwrapped(fields, architecture)
        return FAMILIES[text["architectures"][0]], Fields(text, fields.source), architecture
    if architecture not in FAMILIES:
        raise UnsupportedModel(
            f"{fields.source}: architecture {architecture} is not supported; supported are "
            f"{', '.join(SUPPORTED_ARCHITECTURES)}"
        )
    return FAMILIES[architecture], fields, ""


def _unwrapped(fields: Fields, architecture: str) -> dict[str, Any]:
    text = fields.table("text_config")
    kind = str(text.get("model_type"))
    if kind not in WRAPPERS[architecture].texts:
        raise UnsupportedModel(
            f"{fields.source}: text_config of {architecture} is a {kind!r}, which is not supported; supported are "
            f"{', '.join(WRAPPERS[architecture].texts)}"
        )
    shared = {key: fields.config[key] for key in SHARED if fields.config.get(key) is not None}
    return {**text, **shared, "architectures": [BY_MODEL_TYPE[kind].architecture]}


def _activation(fields: Fields, family: Family) -> str:
    if family.fixed_activation:
        return ACTIVATIONS[family.fixed_activation]
    name = "hidden_activation" if fields.config.get("hidden_activation") else "hidden_act"
    activation = fields.config.get(name) or family.activation
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise fields.refuse(name, f"supported activations are {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[activation]


def _attention_scale(fields: Fields, family: Family, head_dim: int) -> float:
    if "attention_multiplier" in family.keys:
        return fields.positive("attention_multiplier")
    named = "query_pre_attn_scalar" in family.keys
    return 1.0 / math.sqrt(fields.positive("query_pre_attn_scalar", head_dim) if named else head_dim)


def _multiplier(fields: Fields, family: Family, name: str) -> float:
    return fields.positive(name) if name in family.keys else 1.0


def _softcap(fields: Fields, family: Family, name: str) -> float | None:
    if name not in family.keys or fields.config.get(name) is None:
        return None
    return fields.positive(name)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; raises UnsupportedModel if the file is missing or holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UnsupportedModel(f"{path} does not exist: not a Hugging Face checkpoint folder") from None
    except (ValueError, RecursionError) as error:
        raise UnsupportedModel(f"{path} is not valid JSON ({error}): fetch the checkpoint again") from None
    if not isinstance(value, dict):
        raise UnsupportedModel(f"{path} is not a JSON object: fetch the checkpoint again")
    return value


def _layers(fields: Fields, family: Family, head_dim: int) -> tuple[LayerSpec, ...]:
    count = fields.whole("num_hidden_layers")
    window = _window(fields, family)
    kinds = fields.words("layer_types")
    if not kinds:
        kinds = [FULL] * count if window is None else family.windowed_layers(fields, count)
    unknown = set(kinds) - {FULL, SLIDING}
    if unknown:
        raise UnsupportedModel(f"{fields.source}: layer types {sorted(unknown)} are not supported")
    if len(kinds) != count:
        raise fields.refuse("layer_types", f"it must have one for each of num_hidden_layers={count}")
    if window is None and SLIDING in kinds:
        raise fields.refuse(
            "sliding_window", "layer_types has sliding_attention, so it must be a whole number"
        )
    ropes = {kind: read_rope(fields, family, kind, head_dim) for kind in set(kinds)}
    mixtures = family.mixtures(fields, count) if family.mixtures else (None,) * count
    turning = turning_layers(fields, count) if "no_rope_layers" in family.keys else [True] * count
    return tuple(
        LayerSpec(ropes[kind] if turns else NO_ROPE, window if kind == SLIDING else None, mixture)
        for kind, turns, mixture in zip(kinds, turning, mixtures, strict=True)
    )


def _extra_layers(fields: Fields) -> int:
    return fields.whole("num_nextn_predict_layers", fields.whole("num_mtp_layers", 0, least=0), least=0)


def _context(fields: Fields, family: Family) -> int:
    """Most positions of a sequence; Ministral 3 scales queries beyond some by their position, which is not done."""
    longest = fields.whole("max_position_embeddings", 2048)
    if "llama_4_scaling_beta" not in family.rope_keys:
        return longest
    trained = Fields(fields.table("rope_parameters"), fields.source)
    return min(longest, trained.whole("original_max_position_embeddings", longest))


def _window(fields: Fields, family: Family) -> int | None:
    name = "sliding_window"
    if name not in family.keys or fields.config.get(name) is None:
        return None
    if "use_sliding_window" in family.keys and not fields.flag("use_sliding_window", False):
        return None
    return fields.whole(name)


def _end_ids(folder: Path, fields: Fields) -> tuple[int, ...]:
    """All ids that end an output; generation_config.json knows more of them than config.json."""
    own = fields.ids("eos_token_id")
    path = folder / "generation_config.json"
    declared = Fields(read_json(path), path).ids("eos_token_id") if path.exists() else None
    return declared or own or ()
