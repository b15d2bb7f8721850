"""The tokenizer and chat template in a GGUF file's header as Hugging Face's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flightline.engine_build.errors import BuildError
from flightline.engine_build.hf_format import write_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Token types of the GGUF format."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {"llama-bpe": _WORDS % r"\p{N}{1,3}", "qwen2": _WORDS % r"\p{N}"}
"""Values of ``tokenizer.ggml.pre`` whose words a pattern of their own splits before byte-level BPE."""
PLAIN_SPLITS = ("default", "gpt-2")
DIGIT_SPLITS = ("smollm",)
"""Those whose words are split at every digit, and then as GPT-2's."""


def write_tokenizer(path: Path, facts: dict[str, Any], longest: int, folder: Path) -> None:
    """Writes ``tokenizer.json``, ``tokenizer_config.json`` and the chat template, if the file has one.

    Raises BuildError if the kind of tokenizer is not read; ``path`` names the file in it.
    """
    from tokenizers import AddedToken, processors

    kind = facts.get("tokenizer.ggml.model")
    if kind == "gpt2":
        tokenizer = _byte_level(path, facts)
    elif kind == "llama":
        tokenizer = _sentencepiece(facts)
    else:
        raise BuildError(f"{path}: tokenizer {kind!r} is not read from GGUF: give the Hugging Face folder")
    tokens, kinds = facts["tokenizer.ggml.tokens"], facts["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    defined = [token for token, kind in zip(tokens, kinds, strict=True) if kind == USER_DEFINED]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in defined])
    bos = facts.get("tokenizer.ggml.bos_token_id")
    if facts.get("tokenizer.ggml.add_bos_token") and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A",
            pair=f"{tokens[bos]} $A {tokens[bos]} $B",
            special_tokens=[(tokens[bos], bos)],
        )
    tokenizer.save(str(folder / "tokenizer.json"))

    named = {
        f"{theirs}_token": tokens[facts[f"tokenizer.ggml.{ours}_token_id"]]
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("padding", "pad"), ("unknown", "unk"))
        if f"tokenizer.ggml.{ours}_token_id" in facts
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "additional_special_tokens": special,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
    }
    template = facts.get("tokenizer.chat_template")
    if template:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        config["chat_template"] = template
    write_json(folder / "tokenizer_config.json", config)


def _byte_level(path: Path, facts: dict[str, Any]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    split = facts.get("tokenizer.ggml.pre", "default")
    tokens = facts["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in facts["tokenizer.ggml.merges"]]
    model = models.BPE(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=merges,
        ignore_merges=split == "llama-bpe",
    )
    tokenizer = Tokenizer(model)
    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split in SPLITS:
        words = pre_tokenizers.Split(Regex(SPLITS[split]), "isolated")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, bytes_only])
    elif split in DIGIT_SPLITS:
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_of_words])
    elif split in PLAIN_SPLITS:
        tokenizer.pre_tokenizer = bytes_of_words
    else:
        known = ", ".join((*SPLITS, *DIGIT_SPLITS, *PLAIN_SPLITS))
        raise BuildError(f"{path}: tokenizer {split!r} is not read from GGUF: use one of {known}")
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(facts: dict[str, Any]) -> Any:
    """SentencePiece's BPE: of two neighbours those are merged first whose whole has the highest score."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokens, scores, kinds = (facts[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    vocab = {token: index for index, token in enumerate(tokens)}
    mergeable = {token for token, kind in zip(tokens, kinds, strict=True) if kind in (NORMAL, USER_DEFINED)}
    found = []
    for token in mergeable:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in mergeable and right in mergeable:
                found.append((-scores[vocab[token]], vocab[left], vocab[right], left, right))
    unknown = [token for token, kind in zip(tokens, kinds, strict=True) if kind == UNKNOWN]
    model = models.BPE(
        vocab=vocab,
        merges=[(left, right) for *_, left, right in sorted(found)],
        unk_token=unknown[0] if unknown else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    prefixed = facts.get("tokenizer.ggml.add_space_prefix", True)
    blank = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), blank]) if prefixed else blank
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    last = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    return tokenizer
