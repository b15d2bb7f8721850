"""Chat templates in the manner of the large families, short (in ``jinja/``), and tokenizers that carry them."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from tests.tiny import byte_level_tokenizer

ALL = {path.stem: path.read_text() for path in sorted((Path(__file__).parent / "jinja").glob("*.jinja"))}

MISTRAL_TOKENS = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
HARMONY_TOKENS = (
    "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>",
)  # fmt: skip


def save(
    folder: Path, template: str | dict[str, str] | None, specials: tuple[str, ...] = ()
) -> PreTrainedTokenizerFast:
    """Writes a tokenizer with this template into the folder, and with more special tokens."""
    words = byte_level_tokenizer()
    words.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer
