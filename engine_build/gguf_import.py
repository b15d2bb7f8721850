"""A GGUF file to a Hugging Face folder: weights (their codes as they are, or in bf16), configuration and tokenizer.

Not left to Transformers: the tokenizer it derives has the wrong end token, decoder and digit splitting. What a file
says and nobody looked at is refused by name, as in ``config.json``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flightline.engine_build.errors import BuildError
from flightline.engine_build.gguf_file import GgufFile
from flightline.engine_build.gguf_tokenizer import write_tokenizer
from flightline.engine_build.hf_format import with_both_rope_spellings, write_json, write_tensors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dialect:
    """One of GGUF's architectures in the words of Hugging Face."""

    architecture: str
    model_type: str
    interleaved: bool = False
    """Rows of queries and keys that turn together are neighbours; Transformers keeps them half a head apart."""
    plus_one: bool = False
    """Norm weights are stored plus one."""
    parts: tuple[tuple[str, str], ...] = ()
    """Parts of a layer that are not :data:`PARTS`."""
    activation: str = "silu"


PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
QK_NORMS = (("attn_q_norm", "self_attn.q_norm"), ("attn_k_norm", "self_attn.k_norm"))
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
DIALECTS = {
    "llama": Dialect("LlamaForCausalLM", "llama", interleaved=True),
    "qwen2": Dialect("Qwen2ForCausalLM", "qwen2"),
    "qwen3": Dialect("Qwen3ForCausalLM", "qwen3", parts=QK_NORMS),
    "gemma3": Dialect(
        "Gemma3ForCausalLM",
        "gemma3_text",
        plus_one=True,
        parts=(
            *QK_NORMS,
            ("post_attention_norm", "post_attention_layernorm"),
            ("ffn_norm", "pre_feedforward_layernorm"),
            ("post_ffw_norm", "post_feedforward_layernorm"),
        ),
        activation="gelu_pytorch_tanh",
    ),
}
KNOWN_KEYS = frozenset(
    {
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "rope.freq_base",
        "rope.dimension_count",
        "rope.scaling.type",
        "rope.scaling.factor",
    }
)
KEYS_OF = {"gemma3": frozenset({"attention.sliding_window", "rope.freq_base_swa"})}
LLAMA3_FACTORS = (8.0, 32.0)
"""Of Llama 3.1 and 3.2: a file has only the table that follows from one of them."""
GEMMA3_27B_LAYERS = 62
"""The one Gemma 3 whose attention is scaled by hidden_size / heads; no key says it."""


def convert(gguf_file: Path, folder: Path, keep_codes: bool = False) -> None:
    """Writes weights, config, generation config, tokenizer and chat template into ``folder``.

    Weights are written in bf16, one tensor at a time; with ``keep_codes`` linears and embedding stay codes, in our own
    layout (``quantization.py``), and the rest is float32.

    Raises:
        BuildError: the file is damaged, or holds an architecture, type or tokenizer that is not read.
    """
    file = GgufFile(gguf_file)
    _, facts = require_readable(file)
    config = _config_of_codes(file) if keep_codes else _config(facts, file)
    write_tensors(_tensors(file, "quantization_config" in config), folder)
    write_json(folder / "config.json", with_both_rope_spellings(config))
    write_json(folder / "generation_config.json", _ids(facts) | {"eos_token_id": _ends(facts)})
    write_tokenizer(gguf_file, facts, int(config["max_position_embeddings"]), folder)


def write_configuration(gguf_file: Path, folder: Path) -> None:
    """Writes the ``config.json`` alone that :func:`convert` with ``keep_codes`` writes; raises as it does."""
    file = GgufFile(gguf_file)
    require_readable(file)
    write_json(folder / "config.json", with_both_rope_spellings(_config_of_codes(file)))


def _config_of_codes(file: GgufFile) -> dict[str, Any]:
    config = _config(file.facts, file)
    kinds = Counter(kind for name, _, kind in file.entries if name.startswith("blk.") and _is_coded(kind))
    if kinds:
        name = f"GGUF {', '.join(kind for kind, _ in kinds.most_common())}"
        config["quantization_config"] = {"quant_method": "flightline", "name": name}
    return config


def require_readable(file: GgufFile) -> tuple[Dialect, dict[str, Any]]:
    """The file's dialect and facts.

    Raises BuildError that names what of its header is not read.
    """
    from flightline.engine_build.gguf_codes import CODED, PLAIN

    facts = file.facts
    name = facts.get("general.architecture")
    if name not in DIALECTS:
        raise BuildError(
            f"{file.path}: architecture {name!r} is not read from GGUF: it must be one of {', '.join(DIALECTS)}, or "
            "give the Hugging Face folder"
        )
    known = KNOWN_KEYS | KEYS_OF.get(name, frozenset())
    for key, value in facts.items():
        if key.startswith(f"{name}.") and key.removeprefix(f"{name}.") not in known:
            raise BuildError(
                f"{file.path}: {key}={value} is not known, and may change what the model computes: give the Hugging "
                "Face folder"
            )
    for tensor, _, kind in file.entries:
        if kind not in CODED and kind not in PLAIN:
            raise BuildError(
                f"{file.path}: tensor {tensor} is {kind}, which is not read: use a file of "
                f"{', '.join((*CODED, *PLAIN))}"
            )
    return DIALECTS[name], facts


def _is_coded(kind: str) -> bool:
    from flightline.engine_build.gguf_codes import CODED

    return kind in CODED


# Weights -------------------------------------------------------------------------------------------------------------


def _tensors(file: GgufFile, keep_codes: bool) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    from flightline.engine_build.gguf_codes import CODED, to_coded
    from flightline.torch_engine.model.int4 import write_codes

    dialect, facts = require_readable(file)
    a = facts["general.architecture"]
    heads = {
        "attn_q": facts[f"{a}.attention.head_count"],
        "attn_k": facts.get(f"{a}.attention.head_count_kv", facts[f"{a}.attention.head_count"]),
    }
    for name, shape, kind, raw in file.raw_tensors():
        if name == "rope_freqs.weight":  # in the configuration
            continue
        part, module, leaf = _module(name, dialect, file.path)
        order = _halves_of(shape[0], heads[part]) if dialect.interleaved and part in heads else None
        if kind in CODED:
            coded = to_coded(raw, kind)
            coded = coded if order is None else coded.rows(order)
            if keep_codes and len(shape) == 2:
                yield from ((f"{module}.{last}", tensor) for last, tensor in write_codes(coded))
            else:
                yield f"{module}.{leaf}", coded.values(torch.bfloat16)
            continue
        plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
        values = torch.from_numpy(raw.copy()).view(plain).view(shape)
        if order is not None:
            values = values[order]
        if dialect.plus_one and module.endswith("norm"):
            values = values.float() - 1
        yield f"{module}.{leaf}", values.float() if keep_codes else values.to(torch.bfloat16)


def _module(name: str, dialect: Dialect, path: Path) -> tuple[str, str, str]:
    """``blk.3.attn_q.weight`` to ``attn_q``, ``model.layers.3.self_attn.q_proj`` and ``weight``."""
    stem, _, leaf = name.rpartition(".")
    parts = stem.split(".")
    if parts[0] == "blk" and len(parts) == 3:
        inside = PARTS | dict(dialect.parts)
        if parts[2] in inside and leaf in ("weight", "bias"):
            return parts[2], f"model.layers.{parts[1]}.{inside[parts[2]]}", leaf
    elif stem in OUTSIDE and leaf == "weight":
        return stem, OUTSIDE[stem], leaf
    raise BuildError(
        f"{path}: tensor {name} is none of a {dialect.architecture}: give the Hugging Face folder"
    )


def _halves_of(rows: int, heads: int) -> torch.Tensor:
    """The stored rows such that a head's even ones come first: those that turn together then lie half a head apart."""
    import torch

    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()


# Configuration -------------------------------------------------------------------------------------------------------


def _config(facts: dict[str, Any], file: GgufFile) -> dict[str, Any]:
    a = facts["general.architecture"]
    dialect = DIALECTS[a]

    def fact(name: str, default: Any = None) -> Any:
        value = facts.get(f"{a}.{name}", default)
        if value is None:
            raise BuildError(f"{file.path} lacks {a}.{name}: fetch it again")
        return value

    hidden, heads = fact("embedding_length"), fact("attention.head_count")
    head_dim = fact("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if fact(name, head_dim) != head_dim:
            raise BuildError(f"{file.path}: {a}.{name}={fact(name)} is not implemented (only {head_dim})")
    names = {name for name, _, _ in file.entries}
    config = {
        "architectures": [dialect.architecture],
        "model_type": dialect.model_type,
        "hidden_size": hidden,
        "intermediate_size": fact("feed_forward_length"),
        "num_hidden_layers": fact("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fact("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": round(fact("attention.layer_norm_rms_epsilon"), 12),
        "max_position_embeddings": fact("context_length"),
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "rope_theta": fact("rope.freq_base", 10000.0),
        "attention_bias": a == "llama" and "blk.0.attn_q.bias" in names,
        "tie_word_embeddings": "output.weight" not in names,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        **_ids(facts),
    }
    config["hidden_activation" if a == "gemma3" else "hidden_act"] = dialect.activation
    if a == "llama":
        config["mlp_bias"] = False
    if a == "gemma3":
        config |= {
            "sliding_window": fact("attention.sliding_window"),
            "rope_local_base_freq": fact("rope.freq_base_swa", 10000.0),
            "query_pre_attn_scalar": hidden // heads
            if fact("block_count") == GEMMA3_27B_LAYERS
            else head_dim,
        }
    scaling = fact("rope.scaling.type", "none")
    if scaling == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": fact("rope.scaling.factor")}
    elif scaling != "none":
        raise BuildError(
            f"{file.path}: {a}.rope.scaling.type={scaling} is not read from GGUF: give the Hugging Face folder"
        )
    if "rope_freqs.weight" in names:
        config["rope_scaling"] = _llama3(file, config)
    return config


def _llama3(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """The settings from which the file's table of divisors of the frequencies follows."""
    import numpy as np

    table = next(
        raw.view(np.float32) for name, _, _, raw in file.raw_tensors() if name == "rope_freqs.weight"
    )
    frequencies = config["rope_theta"] ** (-np.arange(0, config["head_dim"], 2) / config["head_dim"])
    turns = 8192 * frequencies / (2 * math.pi)
    for factor in LLAMA3_FACTORS:
        blend = np.clip((turns - 1) / 3, 0, 1)
        if np.allclose(1 / (blend + (1 - blend) / factor), table.reshape(-1), rtol=1e-3):
            own = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
            return {"rope_type": "llama3", "factor": factor, **own}
    raise BuildError(
        f"{file.path}: rope_freqs.weight is not that of Llama 3.1 or 3.2: give the Hugging Face folder"
    )


def _ids(facts: dict[str, Any]) -> dict[str, int]:
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    stored = {theirs: facts.get(f"tokenizer.ggml.{ours}_token_id") for ours, theirs in names.items()}
    return {name: value for name, value in stored.items() if value is not None}


def _ends(facts: dict[str, Any]) -> list[int]:
    """End of text and end of turn, of which a file may have both."""
    ends = (facts.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot"))
    return list(dict.fromkeys(end for end in ends if end is not None))
