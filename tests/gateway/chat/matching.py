"""Whether a guide lets a text through, token by token, as an engine's matcher decides."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import llguidance
from tokenizers import AddedToken

from flightline.gateway.chat.guides import Guide
from tests.tiny import byte_level_tokenizer


@cache
def words(specials: tuple[str, ...] = ()) -> tuple[llguidance.LLTokenizer, Mapping[str, int]]:
    """A byte-level vocabulary with these special tokens, and their ids."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    ids = {text: tokenizer.token_to_id(text) for text in specials}
    return llguidance.LLTokenizer(tokenizer.to_str(), eos_token=tokenizer.token_to_id("</s>")), ids


def grammar(guide: Guide) -> str:
    if guide.type == "lark":
        return llguidance.grammar_from("lark", guide.text)
    return llguidance.grammar_from({"json_schema": "json_schema", "regex": "regex"}[guide.type], guide.text)


def accepts(guide: Guide, text: str, specials: tuple[str, ...] = ()) -> bool:
    """True if the whole text passes and the answer may end there."""
    tokenizer, _ = words(specials)
    matcher = llguidance.LLMatcher(tokenizer, grammar(guide))
    if matcher.is_error():
        raise ValueError(f"no grammar: {matcher.get_error()}\n{guide.text}")
    tokens = tokenizer.tokenize_str(text, parse_special=True) if specials else tokenizer.tokenize_str(text)
    return (
        matcher.validate_tokens(tokens) == len(tokens)
        and matcher.consume_tokens(tokens)
        and matcher.is_accepting()
    )
