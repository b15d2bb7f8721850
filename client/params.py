"""The request parameters: each is declared here once, and nowhere else.

The client checks and sends what :class:`GenerateParams` says, and its command line has an option for each field. The
server makes of the same declarations the inputs of ``text_generation`` (``engine_build/repository.py``), what it reads
and refuses (``model_repository/shared/tensors.py``), OpenAI's fields (``gateway/params.py``) and the pages
docs/TENSORS.md and docs/GATEWAY.md. This module imports nothing but the standard library and the client's errors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from flightline.client.errors import InvalidRequest

INTEGERS = {"INT32": (-(2**31), 2**31 - 1), "UINT64": (0, 2**64 - 1)}
"""What fits a tensor of this Triton datatype."""
INT32_MOST = INTEGERS["INT32"][1]
TORCH, PYTORCH, ENGINE = "torch", "trtllm-pytorch", "trtllm-engine"
BACKENDS = (TORCH, PYTORCH, ENGINE)
MOST_SEQUENCES = 128
"""Answers to one prompt; as many as OpenAI's API offers."""
MOST_TOP_LOG_PROBS = 20
"""As many as OpenAI's API offers."""


@dataclass(frozen=True)
class OpenAiField:
    """The field of a request to OpenAI's endpoints that has a parameter's value, under its name if it has none here."""

    name: str = ""
    low: float | None = None
    high: float | None = None
    """Limits; of a list, ``high`` is its longest length."""
    default: Any = None
    of_model: bool = False
    """Whether the checkpoint's generation_config.json may say another default, as at vLLM."""
    what: str = ""
    """What the page says of it beside the limits."""


@dataclass(frozen=True)
class Declaration:
    """What is known of a parameter beside its name, which its tensor has at ``ensemble`` or ``text_generation``."""

    wire_type: str
    """Triton's datatype."""
    default: Any
    """Of the client: None = the tensor is not sent, and the server's default counts."""
    what: str = ""
    many: bool = False
    """Whether it has any number of values."""
    silent: bool = False
    """Whether it is not sent while it has its default: not every model knows it."""
    limits: tuple[int, int] | None = None
    """The least and the greatest value that the server takes, where nothing else decides them."""
    nvidia: tuple[str, ...] = ()
    """What NVIDIA's ``preprocessing`` and ``tensorrt_llm`` call it, where they have another name."""
    ours: bool = False
    """Whether it is not NVIDIA's: ``text_generation`` alone has it."""
    backends: tuple[str, ...] = BACKENDS
    """Those that can do it; the others refuse it by name."""
    neutral: Any = 0
    """The value that asks for nothing, which each backend takes."""
    openai: OpenAiField | None = None
    """None: OpenAI's endpoints have no such field, or ``gateway/params.py`` says what becomes of it."""


def _parameter(wire_type: str, default: Any = None, what: str = "", **more: Any) -> Any:
    declaration = Declaration(wire_type, () if more.get("many") else default, what, **more)
    return dataclasses.field(default=declaration.default, metadata={"declaration": declaration})


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

    max_tokens: int = _parameter(
        "INT32", 128, "most tokens to generate", nvidia=("REQUEST_OUTPUT_LEN", "request_output_len"),
        openai=OpenAiField(low=1, high=INT32_MOST, what="chat: the rest of the context; completions: 16"),
    )  # fmt: skip
    min_tokens: int | None = _parameter(
        "INT32", what="the end token and the stop words do not count before this many tokens",
        openai=OpenAiField(low=0, high=INT32_MOST, default=0),
    )  # fmt: skip
    stop_words: Sequence[str] = _parameter(
        "BYTES", what="the output ends before the first of these", many=True,
        nvidia=("STOP_WORDS_DICT", "stop_words_list"),
        openai=OpenAiField("stop", high=64, what="not part of the answer"),
    )  # fmt: skip
    bad_words: Sequence[str] = _parameter(
        "BYTES", what="never generated", many=True, nvidia=("BAD_WORDS_DICT", "bad_words_list"),
        openai=OpenAiField(high=1024, what="never generated"),
    )  # fmt: skip
    end_id: int | None = _parameter(
        "INT32", what="token that ends the output; none given: the model's own", nvidia=("END_ID",)
    )
    stop_token_ids: Sequence[int] = _parameter(
        "INT32", what="end the answer and are not part of it, beside the end token", many=True, ours=True,
        openai=OpenAiField(high=1024),
    )  # fmt: skip
    ignore_eos: bool = _parameter(
        "BOOL", False, "no end token ends the answer (`end_id` -1); stop words and stop tokens still do",
        silent=True, ours=True, openai=OpenAiField(default=False),
    )  # fmt: skip
    pad_id: int | None = _parameter("INT32", nvidia=("PAD_ID",))
    temperature: float | None = _parameter(
        "FP32", what="0 is greedy",
        openai=OpenAiField(low=0, high=2, default=1.0, of_model=True,
                           what="0: greedy; default of the model's generation_config.json, else 1"),
    )  # fmt: skip
    top_k: int | None = _parameter(
        "INT32", what="draw from so many of the likeliest tokens", nvidia=("runtime_top_k",),
        openai=OpenAiField(low=-1, high=INT32_MOST, default=0, of_model=True,
                           what="0, -1: no limit; default as of `temperature`"),
    )  # fmt: skip
    top_p: float | None = _parameter(
        "FP32", what="draw from the likeliest tokens that have this much of the probability together",
        limits=(0, 1), nvidia=("runtime_top_p",),
        openai=OpenAiField(low=0, high=1, default=1.0, of_model=True, what="default as of `temperature`; 0: greedy"),
    )  # fmt: skip
    min_p: float | None = _parameter(
        "FP32", what="tokens less likely than this times the most likely one are never drawn", limits=(0, 1),
        ours=True, backends=(TORCH, PYTORCH),
        openai=OpenAiField(low=0, high=1, default=0.0, of_model=True, what="default as of `temperature`"),
    )  # fmt: skip
    repetition_penalty: float | None = _parameter(
        "FP32", what="above 1: tokens of prompt and answer become less likely",
        openai=OpenAiField(low=0.01, high=100, default=1.0, of_model=True, what="default as of `temperature`"),
    )  # fmt: skip
    presence_penalty: float | None = _parameter(
        "FP32", what="above 0: tokens that the answer has become less likely",
        openai=OpenAiField(low=-2, high=2, default=0.0),
    )  # fmt: skip
    frequency_penalty: float | None = _parameter(
        "FP32", what="the same for each time that the answer has them",
        openai=OpenAiField(low=-2, high=2, default=0.0),
    )  # fmt: skip
    logit_bias_ids: Sequence[int] = _parameter(
        "INT32", what="tokens whose logits are changed", many=True, ours=True
    )
    logit_bias_weights: Sequence[float] = _parameter(
        "FP32", what="what is added to them, one each; -inf bans a token", many=True, ours=True
    )
    embedding_bias_words: Sequence[str] = _parameter(
        "BYTES", what="words whose tokens' logits are changed", many=True, nvidia=("EMBEDDING_BIAS_WORDS",)
    )
    embedding_bias_weights: Sequence[float] = _parameter(
        "FP32", what="what is added to them, one each", many=True, nvidia=("EMBEDDING_BIAS_WEIGHTS",)
    )
    seed: int | None = _parameter(
        "UINT64", what="the same seed and request give the same output",
        openai=OpenAiField(low=-(2**63), high=2**64 - 1,
                           what="choice i has the seed + i; negative ones count from 2^64"),
    )  # fmt: skip
    num_return_sequences: int | None = _parameter(
        "INT32", what="answers to the prompt", limits=(1, MOST_SEQUENCES),
        openai=OpenAiField("n", low=1, high=MOST_SEQUENCES, default=1),
    )  # fmt: skip
    """More than one is for ``generate_all`` and ``generate_stream`` only."""
    skip_special_tokens: bool = _parameter(
        "BOOL", True, "false: special tokens stand in the text as they are called",
        silent=True, ours=True, openai=OpenAiField(default=True),
    )  # fmt: skip
    return_log_probs: bool = _parameter("BOOL", False, "tell each token's log-probability")
    top_logprobs: int | None = _parameter(
        "INT32", what="tell so many of the most likely tokens in each token's place",
        limits=(0, MOST_TOP_LOG_PROBS), ours=True, backends=(TORCH, PYTORCH),
    )  # fmt: skip
    return_prompt_log_probs: bool = _parameter(
        "BOOL", False, "tell the prompt's tokens' log-probabilities, too, and what `top_logprobs` asks for",
        silent=True, ours=True, backends=(TORCH,),
    )  # fmt: skip
    return_token_ids: bool = _parameter("BOOL", False, "tell the tokens of the text", silent=True, ours=True)
    return_finish_reason: bool = _parameter(
        "BOOL", False, "tell why the answer has ended", silent=True, ours=True
    )
    """Whether the server says it; otherwise it is told from the number of tokens."""
    return_num_cached_tokens: bool = _parameter(
        "BOOL", False, "tell how many tokens of the prompt were found computed", silent=True, ours=True
    )
    counts_at_end: bool = _parameter(
        "BOOL",
        False,
        "a stream tells `num_output_tokens` with its last response only",
        silent=True,
        ours=True,
    )
    exclude_input_in_output: bool = _parameter("BOOL", True)
    """False puts the prompt in front of a non-streamed text, which is NVIDIA's default."""
    return_num_input_tokens: bool = _parameter("BOOL", True)
    return_num_output_tokens: bool = _parameter("BOOL", True)
    return_perf_metrics: bool = _parameter("BOOL", True)

    def __post_init__(self) -> None:
        for name, declared in DECLARED.items():
            value = getattr(self, name)
            if declared.many:
                _check_many(name, declared.wire_type, value)
            elif value is not None:
                _check(name, declared.wire_type, value)

    def tensors(self) -> dict[str, object]:
        """Tensor name -> value of everything that travels; sequences are non-empty."""
        values = {
            name: getattr(self, name)
            for name, declared in DECLARED.items()
            if not (declared.silent and getattr(self, name) == declared.default)
        }
        if self.temperature and self.top_k is None and self.top_p is None and not self.min_p:
            values["top_p"] = 1.0
        return {name: value for name, value in values.items() if value is not None and value not in ((), [])}


DECLARED: dict[str, Declaration] = {
    field.name: field.metadata["declaration"] for field in fields(GenerateParams)
}
"""By the name of the field, which is the tensor's."""


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
        low, high = INTEGERS[wire_type]
        ok = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        wanted = f"an integer from {low} to {high}"
    if not ok:
        raise InvalidRequest(f"{name} is {value!r}: it must be {wanted}")
