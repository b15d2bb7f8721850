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
    "phi3": "Phi3",
    "smollm3": "SmolLM3",
    "granite": "Granite",
    "glm": "Glm",
    "glm4": "Glm4",
    "ministral3": "Ministral3",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "qwen3_moe": "Qwen3Moe",
    "qwen2_moe": "Qwen2Moe",
    "mixtral": "Mixtral",
    "olmoe": "Olmoe",
    "glm4_moe": "Glm4Moe",
    "gpt_oss": "GptOss",
}
MIXTURES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "glm4_moe", "gpt_oss")
WRAPPED = {
    "gemma3-wrapped": ("Gemma3", "siglip_vision_model", "gemma3"),
    "mistral3": ("Mistral3", "pixtral", "mistral"),
    "mistral3-ministral3": ("Mistral3", "pixtral", "ministral3"),
}
"""Models for images: name, vision model and language model."""
FAMILIES = (*_FAMILIES, *WRAPPED)
_EYES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 16,
    "patch_size": 4,
}

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
    "mistral3": {"tie_word_embeddings": False},
    "mistral3-ministral3": {"tie_word_embeddings": False},
    "gemma2": {"query_pre_attn_scalar": 16, "sliding_window": 32},
    "gemma3": {"query_pre_attn_scalar": 16, "sliding_window": 32},
    # Each with its switches away from what Llama has.
    "phi3": {"head_dim": 16, "sliding_window": 32, "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}},
    "smollm3": {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "tie_word_embeddings": True},
    "granite": {"embedding_multiplier": 12.0, "attention_multiplier": 0.15, "residual_multiplier": 0.22,
                "logits_scaling": 6.0},
    "glm": {"attention_bias": True},
    "glm4": {"attention_bias": True},
    "ministral3": {"max_position_embeddings": 512, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}},
    # Dense layers beside routed ones, and sizes that are all different.
    "qwen3_moe": {
        "num_hidden_layers": 3, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48,
        "norm_topk_prob": True, "mlp_only_layers": [1]},
    "qwen2_moe": {
        "num_hidden_layers": 4, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
        "shared_expert_intermediate_size": 80, "decoder_sparse_step": 2},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 32},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 48},
    "glm4_moe": {
        "num_hidden_layers": 3, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40,
        "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7, "use_qk_norm": True,
        "attention_bias": True, "norm_topk_prob": True},
    # Windows and the context that YaRN stretches are shorter than the tests' prompts.
    "gpt_oss": {
        "num_hidden_layers": 3, "num_local_experts": 6, "num_experts_per_tok": 3,
        "sliding_window": 8, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 16}},
}  # fmt: skip


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


def _model(family: str, shape: dict[str, Any]) -> tuple[Any, Any]:
    """Class and configuration; of a wrapper, with the least of eyes beside the language part."""
    if family in WRAPPED:
        name, eyes, text = WRAPPED[family]
        config_class, model_class = getattr(transformers, f"{name}Config"), f"{name}ForConditionalGeneration"
        vision = {**_EYES, "model_type": eyes}
        around = {key: shape[key] for key in ("tie_word_embeddings",) if key in shape}
        inner = {**_FAMILY_SHAPE[text], **shape}
        text_config = _config(text, {key: value for key, value in inner.items() if key not in around})
        config = config_class(text_config=text_config.to_dict(), vision_config=vision, **around)
        return getattr(transformers, model_class), config
    return getattr(transformers, f"{_FAMILIES[family]}ForCausalLM"), _config(family, shape)


def _config(family: str, shape: dict[str, Any]) -> Any:
    name = _FAMILIES[family]
    return getattr(transformers, f"{name}TextConfig" if family == "gemma3" else f"{name}Config")(**shape)


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
    model_class, config = _model(family, shape)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                # Wide enough that the logits differ and activations matter, narrow enough to stay finite.
                if key.endswith("sinks"):
                    weight.copy_(torch.randn_like(weight))
                elif family == "gpt_oss" and key.endswith("experts.gate_up_proj"):
                    # So wide that some values are clamped.
                    weight.copy_(torch.randn_like(weight) * 4 / weight.shape[1] ** 0.5)
                elif weight.dim() == 1:
                    weight.add_(torch.randn_like(weight) * 0.1)
                elif "embed" in key:
                    # Gemma multiplies by sqrt(hidden size); wider ones would make it echo its input.
                    weight.copy_(torch.randn_like(weight) * 0.03)
                else:
                    weight.copy_(torch.randn_like(weight) * 1.5 / weight.shape[-1] ** 0.5)
            for key, buffer in model.named_buffers():
                if key.endswith("e_score_correction_bias"):  # enough to change what is chosen
                    buffer.copy_(torch.randn_like(buffer) * 0.3)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    save_tokenizer(words, path)
    return path
