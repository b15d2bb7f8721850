"""Tiny random checkpoints in the Hugging Face layout, made on the spot: no test downloads a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog and then the dog jumps over the fox",
    "a token is a piece of text and a text is a list of tokens, in that order",
    "the engine reads the request, runs the model and returns the text of the answer",
]

_FAMILIES: dict[str, str] = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3": "Gemma3",
    "qwen3_moe": "Qwen3Moe",
    "qwen2_moe": "Qwen2Moe",
    "mixtral": "Mixtral",
}
FAMILIES = tuple(_FAMILIES)
MIXTURES = ("qwen3_moe", "qwen2_moe", "mixtral")

_SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}

_FAMILY_SHAPE: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 32},
    "gemma3": {"query_pre_attn_scalar": 16, "sliding_window": 32},
    # Dense layers beside routed ones, and sizes that are all different.
    "qwen3_moe": {
        "num_hidden_layers": 3,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "qwen2_moe": {
        "num_hidden_layers": 4,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 80,
        "decoder_sparse_step": 2,
    },
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 32},
}


def byte_level_tokenizer(vocab_size: int = 300) -> Tokenizer:
    """Byte-level BPE (GPT-2 style): ids 0 to 2 are ``<s>``, ``</s>``, ``<pad>``; any text has a spelling."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def sentencepiece_tokenizer(vocab_size: int = 340) -> Tokenizer:
    """BPE with byte fallback and ``▁`` for spaces (Llama 2, Gemma style); ids 0 to 2 are the specials."""
    normalizer = normalizers.Replace(" ", "▁")
    seed = Tokenizer(models.BPE())
    seed.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 259, show_progress=False)
    seed.train_from_iterator(CORPUS, trainer)
    learned = json.loads(seed.to_str())["model"]
    pieces = [BOS, EOS, PAD, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece, _ in sorted(learned["vocab"].items(), key=lambda item: item[1])]
    merges = [tuple(merge) for merge in learned["merges"]]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True))
    tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece in (BOS, EOS, PAD)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Writes ``tokenizer.json``, ``tokenizer_config.json`` and the chat template."""
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def tiny_checkpoint(
    path: str | Path,
    family: str = "llama",
    *,
    tokenizer: str = "byte_level",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    max_shard_size: str = "10GB",
    **overrides: Any,
) -> Path:
    """Writes a random model with its tokenizer and returns the folder.

    Args:
        path: folder to make.
        family: one of ``FAMILIES``.
        tokenizer: ``byte_level`` or ``sentencepiece``.
        dtype: of the saved weights.
        seed: of the random weights (norm weights and biases are random too, so that a forgotten one shows).
        max_shard_size: as in ``save_pretrained``; a small one makes a sharded checkpoint.
        overrides: fields of the transformers config (2 layers, hidden 64, 4/2 heads of 16 by default).
    """
    transformers.utils.logging.disable_progress_bar()
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    words = byte_level_tokenizer() if tokenizer == "byte_level" else sentencepiece_tokenizer()
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    shape = {
        **_SHAPE,
        **_FAMILY_SHAPE.get(family, {}),
        "vocab_size": words.get_vocab_size(),
        **ids,
        **overrides,
    }
    name = _FAMILIES[family]
    config_class = getattr(transformers, f"{name}TextConfig" if family == "gemma3" else f"{name}Config")
    model_class = getattr(transformers, f"{name}ForCausalLM")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**shape))
        with torch.no_grad():
            for key, weight in model.named_parameters():
                # Wide enough that the logits differ and activations matter, narrow enough to stay finite.
                if weight.dim() == 1:
                    weight.add_(torch.randn_like(weight) * 0.1)
                elif "embed" in key:
                    # Gemma multiplies by sqrt(hidden size); wider ones would make it echo its input.
                    weight.copy_(torch.randn_like(weight) * 0.03)
                else:
                    weight.copy_(torch.randn_like(weight) * 1.5 / weight.shape[-1] ** 0.5)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    save_tokenizer(words, path)
    return path
