"""The typed request parameters of the endpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from flightline.client.errors import InvalidRequest

LIMITS = {"INT32": (-(2**31), 2**31 - 1), "UINT64": (0, 2**64 - 1)}


def _tensor(
    wire_type: str, default: Any = None, words: str = "", *, many: bool = False, silent: bool = False
) -> Any:
    """A field that travels as a tensor of this Triton datatype.

    Args:
        words: help of its command-line flag.
        many: it has any number of values.
        silent: it does not travel while it has its default: not every model knows it.
    """
    metadata = {"wire_type": wire_type, "help": words, "many": many, "silent": silent}
    return dataclasses.field(default=() if many else default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class GenerateParams:
    """How to continue a prompt; ``None`` leaves the tensor out, which is the server's default.

    Fields have the names of NVIDIA's ``ensemble``, or those of ``text_generation`` alone (``docs/TENSORS.md``).
    Decoding is greedy unless ``top_k``, ``top_p``, ``min_p`` or ``temperature`` asks for sampling. NVIDIA's contract
    ignores a temperature on its own, so ``temperature`` without the others is sent with ``top_p=1``.

    Raises:
        InvalidRequest: a value has the wrong type or does not fit its tensor. Ranges are checked by the
            server, which knows the model's limits.
    """

    max_tokens: int = _tensor("INT32", 128)
    """Most tokens to generate."""
    min_tokens: int | None = _tensor("INT32")
    """The end token and the stop words do not count before this many tokens."""
    stop_words: Sequence[str] = _tensor("BYTES", many=True)
    """The output ends before the first of these."""
    bad_words: Sequence[str] = _tensor("BYTES", many=True)
    """Never generated."""
    end_id: int | None = _tensor("INT32")
    """Token id that ends the output; None = the model's own."""
    stop_token_ids: Sequence[int] = _tensor("INT32", many=True)
    """More of them, beside it."""
    ignore_eos: bool = _tensor("BOOL", False, silent=True)
    """No end token ends the output; stop words and ``stop_token_ids`` do."""
    pad_id: int | None = _tensor("INT32")
    temperature: float | None = _tensor("FP32")
    """0 is greedy."""
    top_k: int | None = _tensor("INT32")
    top_p: float | None = _tensor("FP32")
    min_p: float | None = _tensor("FP32")
    """Tokens less likely than this times the most likely one are never drawn."""
    repetition_penalty: float | None = _tensor("FP32")
    presence_penalty: float | None = _tensor("FP32")
    frequency_penalty: float | None = _tensor("FP32")
    logit_bias_ids: Sequence[int] = _tensor("INT32", many=True)
    """Tokens to which ``logit_bias_weights`` are added, one each; -inf bans a token."""
    logit_bias_weights: Sequence[float] = _tensor("FP32", many=True)
    embedding_bias_words: Sequence[str] = _tensor("BYTES", many=True)
    """Words to whose tokens ``embedding_bias_weights`` are added, one each."""
    embedding_bias_weights: Sequence[float] = _tensor("FP32", many=True)
    seed: int | None = _tensor("UINT64")
    """The same seed and request give the same output."""
    num_return_sequences: int | None = _tensor("INT32", words="answers to the prompt")
    """Answers to the prompt; more than one for ``generate_all`` and ``generate_stream`` only."""
    skip_special_tokens: bool = _tensor("BOOL", True, silent=True)
    """False: special tokens stand in the text as they are called."""
    return_log_probs: bool = _tensor("BOOL", False, "shown with --json")
    top_logprobs: int | None = _tensor(
        "INT32", words="most likely tokens in each one's place, shown with --json"
    )
    """Tell so many of the most likely tokens in each token's place."""
    return_token_ids: bool = _tensor("BOOL", False, "shown with --json", silent=True)
    return_finish_reason: bool = _tensor("BOOL", False, "the server's own, shown with --json", silent=True)
    """Whether the server says why the output ended; otherwise it is told from the number of tokens."""
    return_num_cached_tokens: bool = _tensor("BOOL", False, "shown with --json", silent=True)
    """Whether the server says how many tokens of the prompt it found computed."""
    exclude_input_in_output: bool = _tensor("BOOL", True)
    """False puts the prompt in front of a non-streamed text, which is NVIDIA's default."""
    return_num_input_tokens: bool = _tensor("BOOL", True)
    return_num_output_tokens: bool = _tensor("BOOL", True)
    return_perf_metrics: bool = _tensor("BOOL", True)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.metadata["many"]:
                _check_many(field.name, field.metadata["wire_type"], value)
            elif value is not None:
                _check(field.name, field.metadata["wire_type"], value)

    def tensors(self) -> dict[str, object]:
        """Tensor name -> value of everything that travels; sequences are non-empty."""
        values = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if not (field.metadata["silent"] and getattr(self, field.name) == field.default)
        }
        if self.temperature and self.top_k is None and self.top_p is None and not self.min_p:
            values["top_p"] = 1.0
        return {name: value for name, value in values.items() if value is not None and value not in ((), [])}


WIRE_TYPES: dict[str, str] = {field.name: field.metadata["wire_type"] for field in fields(GenerateParams)}
"""Tensor name -> Triton datatype."""


def _check_many(name: str, wire_type: str, values: object) -> None:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InvalidRequest(f"{name} is {values!r}: it must be a list")
    for value in values:
        _check(name, wire_type, value)


def _check(name: str, wire_type: str, value: object) -> None:
    if wire_type == "BYTES":
        ok, wanted = isinstance(value, str), "a list of strings"
    elif wire_type == "BOOL":
        ok, wanted = isinstance(value, bool), "True or False"
    elif wire_type == "FP32":
        ok, wanted = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    else:
        low, high = LIMITS[wire_type]
        ok = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        wanted = f"an integer from {low} to {high}"
    if not ok:
        raise InvalidRequest(f"{name} is {value!r}: it must be {wanted}")
