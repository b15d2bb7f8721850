"""/tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from typing import Any

from flightline.gateway.errors import invalid
from flightline.gateway.job import render
from flightline.gateway.params import CHAT, parse
from flightline.gateway.served import ServedModel

MOST_IDS = 1 << 20


def tokenize(body: Any, model: ServedModel) -> dict[str, Any]:
    """Token ids of a ``prompt``, or of ``messages`` as the chat template renders them.

    Raises:
        ApiError, RequestError: 400.
    """
    fields = _fields(body, "prompt", "messages")
    model.check_name(fields.get("model"))
    as_texts, special = fields.pop("return_token_strs", None), fields.pop("add_special_tokens", None)
    if "messages" in fields:
        if not fields.get("tools", True):
            del fields["tools"]
        text, _, _ = render(fields, parse(fields, CHAT), model)
        ids = model.encode(text, special is True, "messages")
    else:
        if set(fields) - {"model", "prompt"}:
            (name, *_) = set(fields) - {"model", "prompt"}
            raise invalid(f"{name[:100]} is not a parameter of /tokenize: leave it out", name[:100])
        if not isinstance(fields.get("prompt"), str):
            raise invalid("prompt must be a string, or messages a list", "prompt")
        ids = model.vocabulary.encode_prompt(fields["prompt"], special is not False)
    texts = (
        [model.vocabulary.bytes.with_special[token].decode("utf-8", "replace") for token in ids]
        if as_texts
        else None
    )
    return {"count": len(ids), "max_model_len": model.max_seq_len, "tokens": ids, "token_strs": texts}


def detokenize(body: Any, model: ServedModel) -> dict[str, Any]:
    """The text of ``tokens``, special tokens spelled as they are called."""
    fields = _fields(body, "tokens")
    model.check_name(fields.get("model"))
    ids = fields.get("tokens")
    if not isinstance(ids, list) or len(ids) > MOST_IDS:
        raise invalid(f"tokens must be a list of at most {MOST_IDS} token ids", "tokens")
    return {"prompt": model.vocabulary.bytes.with_special.decode(model.check_ids(ids, "tokens"))}


def _fields(body: Any, *one_of: str) -> dict[str, Any]:
    """The fields that are not null."""
    if not isinstance(body, dict):
        raise invalid("the body must be a JSON object")
    fields = {name: value for name, value in body.items() if value is not None}
    if sum(name in fields for name in one_of) != 1:
        raise invalid(f"give exactly one of {', '.join(one_of)}", one_of[0])
    if not isinstance(fields.get("model", ""), str):
        raise invalid("model must be a string", "model")
    return fields
