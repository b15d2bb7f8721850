"""The typed request parameters of the endpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from client.errors import InvalidRequest

LIMITS = {"INT32": (-(2**31), 2**31 - 1), "UINT64": (0, 2**64 - 1)}

WIRE_TYPES = {
    "max_tokens": "INT32",
    "bad_words": "BYTES",
    "stop_words": "BYTES",
    "exclude_input_in_output": "BOOL",
    "end_id": "INT32",
    "pad_id": "INT32",
    "top_k": "INT32",
    "top_p": "FP32",
    "temperature": "FP32",
    "repetition_penalty": "FP32",
    "min_tokens": "INT32",
    "presence_penalty": "FP32",
    "frequency_penalty": "FP32",
    "seed": "UINT64",
    "return_log_probs": "BOOL",
    "return_perf_metrics": "BOOL",
    "return_num_input_tokens": "BOOL",
    "return_num_output_tokens": "BOOL",
}
"""Tensor name -> Triton datatype; the names are those of NVIDIA's ``ensemble``, and of the fields below."""


@dataclass(frozen=True, kw_only=True)
class GenerateParams:
    """How to continue a prompt; ``None`` leaves the tensor out, which is the server's default.

    Decoding is greedy unless ``top_k``, ``top_p`` or ``temperature`` asks for sampling. NVIDIA's contract
    ignores a temperature on its own, so ``temperature`` without the other two is sent with ``top_p=1``.

    Raises:
        InvalidRequest: a value has the wrong type or does not fit its tensor. Ranges are checked by the
            server, which knows the model's limits.
    """

    max_tokens: int = 128
    """Most tokens to generate."""
    min_tokens: int | None = None
    """The end token and the stop words do not count before this many tokens."""
    stop_words: Sequence[str] = ()
    """The output ends before the first of these."""
    bad_words: Sequence[str] = ()
    """Never generated."""
    end_id: int | None = None
    """Token id that ends the output; None = the model's own."""
    pad_id: int | None = None
    temperature: float | None = None
    """0 is greedy."""
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    """The same seed and request give the same output."""
    return_log_probs: bool = False
    exclude_input_in_output: bool = True
    """False puts the prompt in front of a non-streamed text, which is NVIDIA's default."""
    return_num_input_tokens: bool = True
    return_num_output_tokens: bool = True
    return_perf_metrics: bool = True

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                _check(field.name, WIRE_TYPES[field.name], value)

    def tensors(self) -> dict[str, object]:
        """Tensor name -> value of everything that travels; sequences are non-empty."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.temperature and self.top_k is None and self.top_p is None:
            values["top_p"] = 1.0
        return {name: value for name, value in values.items() if value is not None and value not in ((), [])}


def _check(name: str, wire_type: str, value: object) -> None:
    if wire_type == "BYTES":
        ok = (
            not isinstance(value, str)
            and isinstance(value, Sequence)
            and all(isinstance(w, str) for w in value)
        )
        wanted = "a list of strings"
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
