"""A Llama GGUF file to a normal Hugging Face folder: weights, configuration and tokenizer.

Not left to Transformers: the tokenizer it derives has the wrong end token, decoder and digit splitting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flightline.engine_build.errors import BuildError
from flightline.engine_build.gguf_file import GgufFile
from flightline.engine_build.hf_format import with_both_rope_spellings, write_json

CONTROL, USER_DEFINED = 3, 4
"""Token types of the GGUF format."""
DIGIT_SPLITTING = ("smollm",)
"""Values of ``tokenizer.ggml.pre`` whose words are split at every digit before byte-level BPE."""
_NAMES = {
    "token_embd": "model.embed_tokens.weight",
    "output_norm": "model.norm.weight",
    "attn_norm": "model.layers.{}.input_layernorm.weight",
    "attn_q": "model.layers.{}.self_attn.q_proj.weight",
    "attn_k": "model.layers.{}.self_attn.k_proj.weight",
    "attn_v": "model.layers.{}.self_attn.v_proj.weight",
    "attn_output": "model.layers.{}.self_attn.o_proj.weight",
    "ffn_norm": "model.layers.{}.post_attention_layernorm.weight",
    "ffn_gate": "model.layers.{}.mlp.gate_proj.weight",
    "ffn_up": "model.layers.{}.mlp.up_proj.weight",
    "ffn_down": "model.layers.{}.mlp.down_proj.weight",
}
"""GGUF part to Hugging Face name."""


def convert(gguf_file: Path, folder: Path) -> None:
    """Writes bf16 weights, config, generation config, tokenizer and chat template into ``folder``.

    Raises:
        BuildError: the file is damaged, or holds another architecture or another kind of tokenizer.
    """
    file = GgufFile(gguf_file)
    architecture, splitting = file.facts.get("general.architecture"), file.facts.get("tokenizer.ggml.pre")
    if architecture != "llama":
        raise BuildError(
            f"{gguf_file}: architecture {architecture!r} is not read from GGUF: use a llama file"
        )
    if splitting not in DIGIT_SPLITTING:
        known = ", ".join(DIGIT_SPLITTING)
        raise BuildError(f"{gguf_file}: tokenizer {splitting!r} is not read from GGUF: use one of {known}")
    _write_weights(file, folder)
    _write_config(file.facts, folder)
    _write_tokenizer(file.facts, folder)


def _write_weights(file: GgufFile, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    heads = {
        "attn_q": file.facts["llama.attention.head_count"],
        "attn_k": file.facts["llama.attention.head_count_kv"],
    }
    weights = {}
    for name, values in file.tensors():
        layer, part = _split(name)
        if part not in _NAMES:
            raise BuildError(
                f"{file.path}: tensor {name} is not expected in a llama file with tied embeddings"
            )
        if part in heads:
            values = _rotary_halves(values, heads[part])
        weights[_NAMES[part].format(layer)] = torch.from_numpy(values.copy()).to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _split(name: str) -> tuple[str, str]:
    """``blk.3.attn_q.weight`` to layer ``3`` and part ``attn_q``."""
    parts = name.removesuffix(".weight").split(".")
    return (parts[1], parts[2]) if parts[0] == "blk" else ("", parts[0])


def _rotary_halves(values: np.ndarray, heads: int) -> np.ndarray:
    """GGUF interleaves the two halves of a head that RoPE turns together; Transformers keeps them apart."""
    rows, columns = values.shape
    return values.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _write_config(facts: dict[str, Any], folder: Path) -> None:
    hidden, heads = facts["llama.embedding_length"], facts["llama.attention.head_count"]
    ids = {
        "bos_token_id": facts["tokenizer.ggml.bos_token_id"],
        "eos_token_id": facts["tokenizer.ggml.eos_token_id"],
        "pad_token_id": facts["tokenizer.ggml.padding_token_id"],
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": facts["llama.feed_forward_length"],
        "num_hidden_layers": facts["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": facts["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "rms_norm_eps": round(facts["llama.attention.layer_norm_rms_epsilon"], 12),
        "max_position_embeddings": facts["llama.context_length"],
        "vocab_size": len(facts["tokenizer.ggml.tokens"]),
        "rope_theta": facts["llama.rope.freq_base"],
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        **ids,
    }
    write_json(folder / "config.json", with_both_rope_spellings(config))
    write_json(folder / "generation_config.json", ids | {"eos_token_id": [ids["eos_token_id"]]})


def _write_tokenizer(facts: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    defined = [token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in defined])
    tokenizer.save(str(folder / "tokenizer.json"))

    template = facts["tokenizer.chat_template"]
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[facts["tokenizer.ggml.bos_token_id"]],
            "eos_token": tokens[facts["tokenizer.ggml.eos_token_id"]],
            "pad_token": tokens[facts["tokenizer.ggml.padding_token_id"]],
            "unk_token": tokens[facts["tokenizer.ggml.unknown_token_id"]],
            "additional_special_tokens": special,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": facts["llama.context_length"],
            "chat_template": template,
        },
    )
