"""What goes into the engine and what comes out: plain picklable types shared by all its processes."""

from __future__ import annotations

import math
import secrets
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any


class Code(StrEnum):
    """Error classes, named like Triton's so that a stub can map them one to one."""

    INVALID_ARG = "INVALID_ARG"
    UNAVAILABLE = "UNAVAILABLE"
    UNSUPPORTED = "UNSUPPORTED"
    CANCELLED = "CANCELLED"
    INTERNAL = "INTERNAL"


class RequestError(Exception):
    """A request that cannot be served; the text names the field and the limit."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[Any, ...]:
        return RequestError, (self.code, self.message)


class QueueFull(RequestError):
    """This engine has no room for one more waiting request; another may have."""

    def __init__(self, message: str) -> None:
        super().__init__(Code.UNAVAILABLE, message)

    def __reduce__(self) -> tuple[Any, ...]:
        return QueueFull, (self.message,)


class InvalidField(RequestError):
    """A field of ``SamplingParams`` is out of its range; whoever has filled it from elsewhere knows a better name."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(Code.INVALID_ARG, f"{field} {problem}")
        self.field = field
        self.problem = problem

    def __reduce__(self) -> tuple[Any, ...]:
        return InvalidField, (self.field, self.problem)


LOWEST_TEMPERATURE = 1e-5
"""Below it logits divided by the temperature leave float32's range; vLLM draws the same line."""


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen.

    Semantics are TensorRT-LLM's: greedy unless ``top_k > 1``, ``0 < top_p`` or ``0 < min_p`` asks for sampling
    (``top_k=0`` means "no limit" and samples when given together with ``top_p``); a ``temperature`` below
    ``LOWEST_TEMPERATURE`` is greedy too. Penalties act on the tokens generated so far (presence, frequency) or
    on prompt and output (repetition). The order is bias, penalties, temperature, top-k, top-p, min-p.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    min_p: float | None = None
    """Tokens less likely than this times the most likely one are never drawn."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, what is added to its logit); -inf bans it."""

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, limit: str) -> None:
            if not ok:
                value = getattr(self, name)
                raise InvalidField(name, f"is {value}: it must be {limit}")

        require(math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "finite and >= 0")
        require(self.top_k is None or self.top_k >= 0, "top_k", ">= 0 (0 = no limit)")
        require(self.top_p is None or 0.0 <= self.top_p <= 1.0, "top_p", "between 0 and 1")
        require(
            math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            "finite and > 0 (1 = off)",
        )
        require(math.isfinite(self.presence_penalty), "presence_penalty", "finite (0 = off)")
        require(math.isfinite(self.frequency_penalty), "frequency_penalty", "finite (0 = off)")
        require(self.min_p is None or 0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        for token, bias in self.logit_bias:
            if not (token >= 0 and bias < math.inf):  # so that NaN fails
                raise InvalidField(
                    "logit_bias",
                    f"of token {token} is {bias}: it must be a finite number or -inf, of an id >= 0",
                )
        require(self.seed is None or 0 <= self.seed < 2**64, "seed", "an unsigned 64-bit integer")

    @property
    def greedy(self) -> bool:
        if self.temperature < LOWEST_TEMPERATURE or self.top_k == 1:
            return True
        return not self.top_k and not self.top_p and not self.min_p

    @property
    def plain_greedy(self) -> bool:
        """True when the next token is the argmax of the untouched logits."""
        return (
            self.greedy
            and self.repetition_penalty == 1.0
            and self.presence_penalty == 0.0
            and self.frequency_penalty == 0.0
            and not self.logit_bias
        )


@dataclass(frozen=True)
class Guide:
    """What an answer must keep to; ``core/grammar.py`` says whether it can be enforced, and makes a grammar of it."""

    type: str
    """``json``, ``json_schema``, ``regex``, ``ebnf_grammar`` (NVIDIA's), ``lark`` or ``structural_tag``."""
    text: str = ""
    """The schema, the expression, the grammar; ``json`` needs none."""


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt to continue.

    ``stop`` and ``bad`` are byte strings (UTF-8 text, or what a list of token ids spells): generation
    ends before the first ``stop`` in the *generated* bytes, which is never emitted, whatever the tokens
    it spans. ``bad_ids`` are token sequences that are never generated.
    """

    prompt_ids: list[int]
    max_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    end_id: int | None = None
    """Token that ends the output and is not part of it; None = the model's own, -1 = none at all."""
    stop_ids: tuple[int, ...] = ()
    """More tokens that end the output like ``end_id``, beside it."""
    stop: tuple[bytes, ...] = ()
    bad_ids: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    return_log_probs: bool = False
    top_log_probs: int = 0
    """How many of the most likely tokens are told with each generated one."""
    return_prompt_log_probs: bool = False
    """Whether the prompt's tokens are told about as the generated ones are. All of them are computed then, whatever is
    cached, in pieces of a limited size."""
    skip_special_tokens: bool = True
    """Whether special tokens have no text."""
    stream: bool = True
    """Whether tokens are wanted as they come; otherwise everything is told at the end."""
    request_id: str = ""
    """A name by which it can be stopped; empty = none. Need not be unique."""
    guide: Guide | None = None
    """What the answer keeps to. It ends where the grammar ends, before ``min_tokens`` and without an end token too."""
    lane_inputs: Mapping[str, Any] = field(default_factory=dict)
    """Tensors of NVIDIA's ``tensorrt_llm`` that only TensorRT-LLM understands (LoRA, ...), [1, ...] each.
    Our own engine gets none: its endpoints refuse them."""
    group: str = ""
    """Names the requests of :meth:`siblings`; empty = it has none."""
    sequence_index: int = 0
    """Which of its siblings it is."""

    @property
    def bans(self) -> list[str]:
        """Parameters that forbid tokens, where together they may forbid all; a guide alone always leaves some."""
        given = {
            "bad_words": self.bad_ids,
            "logit_bias": any(bias == -math.inf for _, bias in self.sampling.logit_bias),
        }
        named = [name for name, value in given.items() if value]
        return [*named, "guided_decoding_guide"] if named and self.guide is not None else named

    def siblings(self, count: int) -> list[GenerationRequest]:
        """``count`` requests for as many answers to this one's prompt, whose KV blocks they share in the engine.

        Each is submitted, cancelled and answered like any request; outputs have its ``sequence_index``. From a seed
        the answers' own follow: (seed + index) mod 2^64, so that the first is what the request alone would get.
        Without one each gets its own here: an engine may have a fixed seed for requests that have none.
        """
        if count == 1:
            return [self]
        seed, group = self.sampling.seed, uuid.uuid4().hex
        seeds = [secrets.randbits(64) if seed is None else (seed + index) % 2**64 for index in range(count)]
        return [
            replace(self, sampling=replace(self.sampling, seed=own), group=group, sequence_index=index)
            for index, own in enumerate(seeds)
        ]


class FinishReason(StrEnum):
    LENGTH = "length"
    END_ID = "end_id"
    STOP = "stop_words"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True)
class PerfMetrics:
    """Of one request: times, KV blocks, and tokens that were guessed and of those the right ones.

    Times are ns of the steady clock (``time.monotonic_ns``), as NVIDIA's are (``std::chrono::steady_clock``): one
    clock for all processes of a host, and no date.
    """

    arrival_time_ns: int = 0
    first_scheduled_time_ns: int = 0
    first_token_time_ns: int = 0
    last_token_time_ns: int = 0
    kv_cache_alloc_new_blocks: int = 0
    kv_cache_reused_blocks: int = 0
    kv_cache_alloc_total_blocks: int = 0
    total_draft_tokens: int = 0
    total_accepted_draft_tokens: int = 0
    num_cached_tokens: int | None = None
    """Tokens of the prompt that were found computed when it began; None: this lane does not say."""

    @property
    def acceptance_rate(self) -> float:
        """0 where nothing was guessed."""
        return self.total_accepted_draft_tokens / self.total_draft_tokens if self.total_draft_tokens else 0.0


@dataclass(slots=True)
class RequestOutput:
    """What became of a request since the last message about it; messages add up.

    ``token_ids`` and ``text`` are new parts only and end where the text is whole: no incomplete UTF-8
    sequence, nothing that may still turn out to be a stop word. ``text`` is the tokens' text (special
    tokens have none). The last message has ``finish_reason``; with ``FinishReason.ERROR`` it has ``error``.
    """

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    log_probs: list[float] = field(default_factory=list)
    """Log-probability of each of ``token_ids``, only if asked for."""
    top_log_probs: list[list[tuple[int, float]]] = field(default_factory=list)
    """For each of ``token_ids`` the most likely tokens there, the likeliest first, with their log-probabilities."""
    cum_log_prob: float = 0.0
    """Sum over all tokens so far."""
    num_input_tokens: int = 0
    num_output_tokens: int = 0
    """Tokens told so far, the number of all ``token_ids`` up to here: neither what is held back nor an end id or
    stop word."""
    finish_reason: FinishReason | None = None
    error: RequestError | None = None
    metrics: PerfMetrics | None = None
    prompt_log_probs: list[float] = field(default_factory=list)
    """Log-probability of each token of the prompt but the first, which nothing comes before; only if asked for, and
    with the first message."""
    prompt_top_log_probs: list[list[tuple[int, float]]] = field(default_factory=list)
    """The most likely tokens in the places of those."""
    sequence_index: int = 0
    """The request's: which of several answers to a prompt this is about."""
    lane_outputs: Mapping[str, Any] = field(default_factory=dict)
    """Tensors that only TensorRT-LLM gives (logits), by the names of NVIDIA's ``tensorrt_llm``, [1, ...] each; they
    come with the last message."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """What travels between processes, thousands a second: of most outputs only some tokens and their text."""
        usual = self.token_ids, self.text, self.num_input_tokens, self.num_output_tokens, self.sequence_index
        more = (
            self.log_probs, self.top_log_probs, self.cum_log_prob, self.finish_reason, self.error, self.metrics,
            self.prompt_log_probs, self.prompt_top_log_probs, self.lane_outputs,
        )  # fmt: skip
        return _output, (*usual, *more) if any(more) else usual

    def extend(self, later: RequestOutput) -> None:
        """Merges a later message about the same request into this one: tokens coalesce, none is lost."""
        self.token_ids += later.token_ids
        self.text += later.text
        self.log_probs += later.log_probs
        self.top_log_probs += later.top_log_probs
        self.cum_log_prob = later.cum_log_prob
        self.num_input_tokens = later.num_input_tokens
        self.num_output_tokens = later.num_output_tokens
        self.finish_reason = later.finish_reason
        self.error = later.error
        self.metrics = later.metrics or self.metrics
        self.prompt_log_probs += later.prompt_log_probs
        self.prompt_top_log_probs += later.prompt_top_log_probs
        self.sequence_index = later.sequence_index
        self.lane_outputs = later.lane_outputs


def _output(
    token_ids: list[int],
    text: str,
    num_input_tokens: int,
    num_output_tokens: int,
    sequence_index: int,
    *more: Any,
) -> RequestOutput:
    """As ``RequestOutput.__reduce__`` gives it."""
    output = object.__new__(RequestOutput)  # its ``__init__`` would take half of the time
    output.token_ids, output.text, output.sequence_index = token_ids, text, sequence_index
    output.num_input_tokens, output.num_output_tokens = num_input_tokens, num_output_tokens
    (
        output.log_probs, output.top_log_probs, output.cum_log_prob, output.finish_reason, output.error,
        output.metrics, output.prompt_log_probs, output.prompt_top_log_probs, output.lane_outputs,
    ) = more or ([], [], 0.0, None, None, None, [], [], {})  # fmt: skip
    return output


@dataclass(frozen=True)
class EngineStats:
    """A snapshot for metrics; names follow ``nv_trt_llm_*``."""

    active_requests: int = 0
    scheduled_requests: int = 0
    context_requests: int = 0
    waiting_requests: int = 0
    max_requests: int = 0
    kv_blocks_max: int = 0
    kv_blocks_free: int = 0
    kv_blocks_used: int = 0
    kv_blocks_reused: int = 0
    host_kv_bytes_max: int = 0
    """Host memory for KV blocks of rank 0, what of it is used, and what has been copied there and back."""
    host_kv_bytes_used: int = 0
    host_kv_bytes_saved: int = 0
    host_kv_bytes_restored: int = 0
    host_kv_hits: int = 0
    """Prompts for which blocks came back."""
    tokens_per_block: int = 0
    iterations: int = 0
    generated_tokens: int = 0
    guessed_tokens: int = 0
    """Tokens guessed, and of those the right ones (``core/speculation.py``)."""
    accepted_tokens: int = 0
    gpu_memory_bytes: int = 0
    """Weights, KV cache and workspace, without the driver's context of the process; 0: no GPU, or not known."""


@dataclass(frozen=True)
class ModelInfo:
    """What a front end needs to know to check a request before the engine sees it."""

    vocab_size: int
    max_seq_len: int
    end_ids: tuple[int, ...]
    model_dir: str
    description: str = ""
    """One line: model, precision, device and kernels that run."""
