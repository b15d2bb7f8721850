"""Reads a Triton request into the engine's types, and says precisely what is wrong with it.

``TABLE`` lists every input tensor of NVIDIA's contract, and of what ``text_generation`` adds to it, once: what it is
called in each model, which backends serve it, and what it becomes. Request parameters are in it as ``client/params.py``
declares them, the other tensors are declared here. The tables of ``docs/TENSORS.md`` are made from it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NoReturn, Self

import numpy as np

from flightline.client.params import BACKENDS as LANES
from flightline.client.params import DECLARED, ENGINE, PYTORCH, TORCH, Declaration
from flightline.model_repository.shared import words
from flightline.model_repository.shared.contract import OURS, Contract
from flightline.torch_engine.core import grammar
from flightline.torch_engine.core.request import (
    Code,
    GenerationRequest,
    Guide,
    InvalidField,
    ModelInfo,
    RequestError,
    SamplingParams,
)


@dataclass(frozen=True)
class Tensor:
    """One input of the contract."""

    name: str
    """In ``ensemble``; the name that users know and errors show."""
    aliases: tuple[str, ...] = ()
    """What ``preprocessing`` and ``tensorrt_llm`` call it."""
    sampling: str = ""
    """The field of ``SamplingParams`` that it fills."""
    request: str = ""
    """The field of ``GenerationRequest`` that it fills."""
    option: str = ""
    """The field of ``Options`` that it fills."""
    limits: tuple[int, int] | None = None
    """The least and the greatest value, where no other value decides them."""
    ours: bool = False
    """Whether it is not NVIDIA's: ``text_generation`` alone has it."""
    feature: str = ""
    """What it is for, if not every backend has it; "" = all do."""
    lanes: tuple[str, ...] = LANES
    """Whose engine has the feature."""
    ensemble_only: bool = False
    """Whether it changes what an answer consists of: then our text models refuse it, in each backend."""
    ignored: bool = False
    """Whether NVIDIA's own models send it along without a need."""
    neutral: tuple = (0, False, b"")
    """Values that ask for nothing of the feature; a tensor without elements never does."""

    @property
    def engine_name(self) -> str:
        """In ``tensorrt_llm``."""
        return self.aliases[-1] if self.aliases else self.name

    @property
    def passes(self) -> bool:
        """Whether it goes to the engines that have the feature as it came."""
        return bool(self.feature) and not self.ours


def _only(lanes: tuple[str, ...], feature: str, *names: str, **more: Any) -> list[Tensor]:
    return [Tensor(name, feature=feature, lanes=lanes, **more) for name in names]


NOWHERE: tuple[str, ...] = ()
_COMPILED = (ENGINE,)
_TENSORRT = (PYTORCH, ENGINE)
_BEAMS, _DRAFTS = "beam search", "speculative decoding"
_TUNING, _RETENTION, _CODERS = "prompt tuning", "KV cache retention", "an encoder-decoder model"
_WHOLE = {"ensemble_only": True}

_SAMPLING = {field.name for field in fields(SamplingParams)}
_REQUEST = {
    "min_tokens": "min_tokens",
    "skip_special_tokens": "skip_special_tokens",
    "return_log_probs": "return_log_probs",
    "top_logprobs": "top_log_probs",
    "return_prompt_log_probs": "return_prompt_log_probs",
}
"""Parameters that fill a field of ``GenerationRequest`` as they are."""
_OPTION = {
    "num_return_sequences": "num_sequences",
    "exclude_input_in_output": "exclude_input",
    "return_log_probs": "log_probs",
    "top_logprobs": "top_log_probs",
    "return_perf_metrics": "perf_metrics",
    "return_num_input_tokens": "num_input_tokens",
    "return_num_output_tokens": "num_output_tokens",
    "return_finish_reason": "finish_reason",
    "return_prompt_log_probs": "prompt_log_probs",
    "return_token_ids": "token_ids",
    "return_num_cached_tokens": "num_cached_tokens",
    "counts_at_end": "counts_at_end",
}
"""Parameters that fill a field of ``Options``."""


def _declared(name: str, parameter: Declaration) -> Tensor:
    return Tensor(
        name,
        parameter.nvidia,
        sampling=name if name in _SAMPLING else "",
        request=_REQUEST.get(name, ""),
        option=_OPTION.get(name, ""),
        limits=parameter.limits,
        ours=parameter.ours,
        feature=name if parameter.backends != LANES else "",
        lanes=parameter.backends,
        neutral=(parameter.neutral, False, b""),
    )


TABLE: tuple[Tensor, ...] = (
    Tensor("text_input", ("QUERY",)),
    Tensor("input_ids"),
    Tensor("input_lengths"),
    *(_declared(name, parameter) for name, parameter in DECLARED.items()),
    Tensor("embedding_bias"),
    Tensor("guided_decoding_guide_type"),
    Tensor("guided_decoding_guide"),
    Tensor("stop"),
    Tensor("stream", ("streaming",), option="stream", request="stream"),
    *_only(_COMPILED, _BEAMS, "beam_width", neutral=(0, 1), **_WHOLE),
    *_only(_COMPILED, _BEAMS, "length_penalty", aliases=("len_penalty",), neutral=(0, 1), **_WHOLE),
    *_only(_COMPILED, _BEAMS, "early_stopping", "beam_search_diversity_rate", **_WHOLE),
    *_only(_TENSORRT, "returning logits", "return_context_logits", "return_generation_logits", **_WHOLE),
    *_only(_TENSORRT, "top-p decay", "runtime_top_p_min", neutral=(0, np.float32(1e-6))),
    *_only(_TENSORRT, "top-p decay", "runtime_top_p_decay", neutral=(0, 1)),
    *_only(_TENSORRT, "top-p decay", "runtime_top_p_reset_ids", neutral=(0, 1, -1)),
    *_only(_COMPILED, _DRAFTS, "draft_input_ids", "draft_logits", neutral=()),
    *_only(_COMPILED, _DRAFTS, "draft_acceptance_threshold"),
    *_only(_COMPILED, _DRAFTS, "lookahead_window_size", "lookahead_ngram_size"),
    *_only(_COMPILED, _DRAFTS, "lookahead_verification_set_size"),
    *_only(NOWHERE, "a draft model", "num_draft_tokens", "use_draft_logits"),
    *_only(_COMPILED, _TUNING, "prompt_embedding_table", neutral=()),
    *_only(_COMPILED, _TUNING, "prompt_table_extra_ids", "prompt_vocab_size"),
    *_only(_COMPILED, _TUNING, "prompt_table_extra_id", aliases=("PROMPT_TABLE_EXTRA_ID",)),
    *_only(_COMPILED, "LoRA", "lora_task_id"),
    *_only(_COMPILED, "LoRA", "lora_weights", "lora_config", neutral=()),
    *_only(_TENSORRT, _RETENTION, "retention_token_range_starts", "retention_token_range_ends"),
    *_only(_TENSORRT, _RETENTION, "retention_token_range_priorities", "retention_token_range_durations_ms"),
    *_only(_TENSORRT, _RETENTION, "retention_decode_priority", "retention_decode_duration_ms"),
    *_only(NOWHERE, _CODERS, "decoder_text_input", aliases=("DECODER_QUERY",)),
    # Preprocessing sends one pad token to every model, and one without a decoder apart does not look.
    Tensor("decoder_input_ids", ignored=True),
    Tensor("decoder_input_lengths", ignored=True),
    *_only(_COMPILED, _CODERS, "encoder_output_lengths"),
    *_only(_COMPILED, _CODERS, "encoder_input_features", neutral=()),
    *_only(_COMPILED, _CODERS, "cross_attention_mask", "skip_cross_attn_blocks"),
    *_only(_COMPILED, "multi-modal positions", "mrope_rotary_cos_sin", "mrope_position_deltas"),
    *_only(_COMPILED, "disaggregated serving", "context_phase_params"),
    *_only(NOWHERE, "image and video input", "IMAGE_BYTES", "IMAGE_URL", "IMAGE_SIZES", neutral=()),
    *_only(NOWHERE, "image and video input", "VIDEO_BYTES", "image_input", "image_bytes_input", neutral=()),
    *_only(NOWHERE, "image and video input", "image_url_input", "image_sizes_input", neutral=()),
    *_only(NOWHERE, "image and video input", "video_bytes_input", neutral=()),
)
GUIDES = {
    **dict.fromkeys(("json", "json_schema", "regex", "ebnf_grammar"), LANES),
    "lark": (TORCH,),
    "structural_tag": (TORCH, PYTORCH),
}
"""What ``guided_decoding_guide_type`` may be, and in which backends. NVIDIA's backend knows the first four, and answers
unguided where it does not know one."""
BY_NAME: dict[str, Tensor] = {name: tensor for tensor in TABLE for name in (tensor.name, *tensor.aliases)}


@dataclass(frozen=True)
class Options:
    """What the response shall hold."""

    stream: bool = False
    exclude_input: bool = True
    log_probs: bool = False
    perf_metrics: bool = False
    num_input_tokens: bool = False
    num_output_tokens: bool = False
    counts_at_end: bool = False
    """The number of output tokens comes with the last response only."""
    num_sequences: int = 1
    """Answers to each prompt."""
    finish_reason: bool = False
    token_ids: bool = False
    num_cached_tokens: bool = False
    top_log_probs: int = 0
    """The most likely tokens in the place of each generated one: so many."""
    prompt_log_probs: bool = False
    """The first response tells of the prompt's tokens what is told of generated ones."""


class Inputs:
    """The tensors of one request, by the names of ``ensemble``; the first dimension is the batch.

    Errors call a tensor what the client does that asked: a request that came as text has the names of ``ensemble``,
    also where ``preprocessing`` has passed it on, and one of token ids those of ``tensorrt_llm``.
    """

    def __init__(
        self, tensors: Mapping[str, np.ndarray], lane: str = TORCH, contract: Contract = OURS
    ) -> None:
        """Raises RequestError for an unknown tensor or a feature that the backend does not have."""
        self.lane = lane
        self.contract = contract
        self._values: dict[str, np.ndarray] = {}
        # The first is tensorrt_llm's alone; preprocessing sends the second along with what it has made of a text.
        self._of_tokens = "input_lengths" in tensors and "decoder_input_ids" not in tensors
        for name, value in tensors.items():
            known = BY_NAME.get(name)
            if known is None:
                raise RequestError(Code.INVALID_ARG, f"{name} is not an input of this model")
            self._values[known.name] = value
            if known.feature and lane not in known.lanes:
                self._require_neutral(known, value)
        self.rows = max((len(value) for value in self._values.values()), default=1)

    @classmethod
    def of(cls, request: Any, lane: str, contract: Contract) -> Inputs:
        """Reads a ``pb_utils.InferenceRequest``."""
        inputs = cls({tensor.name(): tensor.as_numpy() for tensor in request.inputs()}, lane, contract)
        if not contract.unknown_parameters:
            # Over HTTP, Triton makes a request parameter of a JSON field that is no input: a misspelled one.
            for name in json.loads(request.parameters() or "{}"):
                if not name.startswith("triton_"):
                    inputs.refuse(name, "is not an input of this model")
        return inputs

    def _require_neutral(self, tensor: Tensor, value: np.ndarray) -> None:
        for item in value.ravel():
            if item not in tensor.neutral:
                shown = repr(item.decode("utf-8", "replace")) if isinstance(item, bytes) else item
                label = self._label(tensor.name)
                raise RequestError(
                    Code.UNSUPPORTED,
                    f"{label} is {shown}: {tensor.feature} is not supported {self._remedy(tensor, label)}",
                )

    def _remedy(self, tensor: Tensor, label: str) -> str:
        if self.lane in tensor.lanes:
            return f"by this model; leave {label} out, or ask the model ensemble"
        others = " or ".join(f"ENGINE={lane}" for lane in tensor.lanes)
        return f"by backend {self.lane}; leave {label} out" + (f", or build with {others}" if others else "")

    def require_one_text(self) -> None:
        """Raises RequestError where more is asked for than a model that answers with one text can show."""
        for name, value in self._values.items():
            if BY_NAME[name].ensemble_only:
                self._require_neutral(BY_NAME[name], value)

    def lane_inputs(self, row: int) -> dict[str, np.ndarray]:
        """What only some engines understand, as it came, by the names of ``tensorrt_llm``; [1, ...] each."""
        found = {}
        for name, value in self._values.items():
            tensor = BY_NAME[name]
            if tensor.passes and self.lane in tensor.lanes and value.size:
                one = value[row : row + 1]
                found[tensor.engine_name] = one if one.ndim > 1 else one.reshape(1, 1)
        return found

    def has(self, name: str) -> bool:
        return name in self._values

    def row(self, name: str, row: int) -> np.ndarray:
        """One batch row. Raises RequestError if the tensor is missing."""
        if name not in self._values:
            self.refuse(name, "is missing: this model requires it")
        return self._values[name][row]

    def scalar(self, name: str, row: int, default: Any = None) -> Any:
        """One value as a Python bool, int, float or bytes; ``default`` where the tensor is missing."""
        if name not in self._values:
            return default
        value = np.atleast_1d(self._values[name][row]).ravel()
        if value.size != 1:
            self.refuse(name, f"has {value.size} values: it must have one")
        found = value[0].item() if isinstance(value[0], np.generic) else value[0]
        if (limits := BY_NAME[name].limits) and not limits[0] <= found <= limits[1]:
            self.refuse(name, f"is {found}: it must be between {limits[0]} and {limits[1]}")
        return found

    def _fields(self, kind: str, row: int) -> dict[str, Any]:
        """The fields of a ``kind`` (``sampling``, ``request``, ``option``) that the request fills."""
        fields = {name: getattr(BY_NAME[name], kind) for name in self._values}
        return {field: self.scalar(name, row) for name, field in fields.items() if field}

    def refuse(self, name: str, problem: str) -> NoReturn:
        raise RequestError(Code.INVALID_ARG, f"{self._label(name)} {problem}")

    def _label(self, name: str) -> str:
        """What the client calls an input; ``name`` need not be one."""
        return BY_NAME[name].engine_name if self._of_tokens and name in BY_NAME else name

    @property
    def num_text_bytes(self) -> int:
        """Of all prompts in the batch."""
        prompts = self._values.get("text_input", np.zeros(0))
        return sum(len(prompt) for prompt in prompts.ravel().tolist() if isinstance(prompt, bytes))

    def copy(self) -> Self:
        """The same with arrays of its own: Triton's may end with the call that brought them."""
        made = copy.copy(self)
        made._values = {name: value.copy() for name, value in self._values.items()}
        return made

    def text(self, row: int, most_bytes: int) -> str:
        """The prompt. Raises RequestError if it is missing, empty, longer than ``most_bytes`` or not UTF-8."""
        self.row("text_input", row)
        data = self.scalar("text_input", row)
        if not data:
            self.refuse("text_input", "is empty: give at least one character")
        if len(data) > most_bytes:
            self.refuse(
                "text_input",
                f"has {len(data)} bytes: the longest prompt that fits this model's context has {most_bytes}",
            )
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            self.refuse("text_input", f"is not UTF-8: {error.reason} at byte {error.start}")

    def words(self, name: str, row: int) -> list[str]:
        """``stop_words`` or ``bad_words`` as text."""
        if name not in self._values:
            return []
        try:
            return words.parse(self.row(name, row).ravel().tolist(), self.contract.json_words)
        except UnicodeDecodeError as error:
            self.refuse(name, f"has a word that is not UTF-8: {error.reason} at byte {error.start}")
        except ValueError as error:
            self.refuse(name, str(error))

    def word_ids(self, name: str, row: int) -> list[list[int]]:
        """``stop_words`` or ``bad_words`` as token ids (the ``[2, N]`` form)."""
        if name not in self._values:
            return []
        try:
            return words.unpack(self.row(name, row))
        except ValueError as error:
            self.refuse(name, str(error))

    def prompt_ids(self, row: int, vocab_size: int) -> list[int]:
        """``input_ids`` cut to ``input_lengths``."""
        self.row("input_lengths", row)
        ids = self.row("input_ids", row).ravel().tolist()
        length = self.scalar("input_lengths", row)
        if not 1 <= length <= len(ids):
            self.refuse(
                "input_lengths", f"is {length}: it must be between 1 and the {len(ids)} ids of input_ids"
            )
        return self._known("input_ids", ids[:length], vocab_size)

    def whole_prompt_ids(self, row: int, vocab_size: int) -> list[int]:
        """``input_ids`` where no ``input_lengths`` belong to it: all of them."""
        ids = self.row("input_ids", row).ravel().tolist()
        if not ids:
            self.refuse("input_ids", "is empty: give at least one token id")
        return self._known("input_ids", ids, vocab_size)

    def _known(self, name: str, ids: list[int], vocab_size: int) -> list[int]:
        """The same ids; raises RequestError where one is no token of the model."""
        for token in ids if ids and (min(ids) < 0 or max(ids) >= vocab_size) else ():
            if not 0 <= token < vocab_size:
                self.refuse(name, f"holds {token}: ids of this model are 0 to {vocab_size - 1}")
        return ids

    def max_tokens(self, row: int) -> int:
        self.row("max_tokens", row)
        value = self.scalar("max_tokens", row)
        if value <= 0:
            self.refuse("max_tokens", f"is {value}: it must be at least 1")
        return value

    def sampling(self, row: int, logit_bias: tuple[tuple[int, float], ...] = ()) -> SamplingParams:
        try:
            return SamplingParams(**self._fields("sampling", row), logit_bias=logit_bias)
        except InvalidField as error:
            self.refuse(error.field, error.problem)  # tensors that fill a field have its name

    def options(self, row: int) -> Options:
        return Options(**({"exclude_input": self.contract.exclude_input} | self._fields("option", row)))

    def bias_words(self, row: int) -> list[tuple[str, float]]:
        """``embedding_bias_words`` with ``embedding_bias_weights``: (word, what its tokens' logits gain)."""
        if not self.has("embedding_bias_words") or not self.has("embedding_bias_weights"):
            return []
        names = self.row("embedding_bias_words", row).ravel().tolist()
        weights = self._weights("embedding_bias_weights", self.row("embedding_bias_weights", row))
        if len(names) != len(weights):
            self.refuse(
                "embedding_bias_words", f"has {len(names)} words for {len(weights)} embedding_bias_weights"
            )
        try:
            return [(name.decode("utf-8"), weight) for name, weight in zip(names, weights, strict=True)]
        except UnicodeDecodeError as error:
            self.refuse(
                "embedding_bias_words",
                f"has a word that is not UTF-8: {error.reason} at byte {error.start}",
            )

    def token_bias(self, row: int, vocab_size: int) -> tuple[tuple[int, float], ...]:
        """``embedding_bias``, a number for each token of the vocabulary, as (token id, bias) of those not 0."""
        if not self.has("embedding_bias"):
            return ()
        values = self.row("embedding_bias", row).ravel()
        if len(values) > vocab_size:
            self.refuse("embedding_bias", f"has {len(values)} values: this model has {vocab_size} tokens")
        self._weights("embedding_bias", values)
        return tuple((int(token), float(values[token])) for token in np.flatnonzero(values))

    def _weights(self, name: str, values: np.ndarray) -> list[float]:
        """What is added to logits; -inf bans a token, NaN and inf mean nothing."""
        bad = values[~(values < np.inf)]  # as arrays: one may have a number for each token of the vocabulary
        if bad.size:
            self.refuse(name, f"holds {bad.ravel()[0]}: it must hold finite numbers, or -inf to ban")
        return values.ravel().tolist()

    def _token_ids(self, name: str, row: int, info: ModelInfo) -> list[int]:
        """A list of token ids; [] where the tensor is missing."""
        if name not in self._values:
            return []
        ids = self.row(name, row).ravel().tolist()
        if len(ids) > words.MOST_WORDS:
            self.refuse(name, f"has {len(ids)} ids: at most {words.MOST_WORDS} are allowed")
        return self._known(name, ids, info.vocab_size)

    def _id_bias(self, row: int, info: ModelInfo) -> list[tuple[int, float]]:
        """``logit_bias_ids`` with ``logit_bias_weights``: (token id, what its logit gains)."""
        ids = self._token_ids("logit_bias_ids", row, info)
        given = self.row("logit_bias_weights", row) if self.has("logit_bias_weights") else np.zeros(0)
        weights = self._weights("logit_bias_weights", given)
        if len(ids) != len(weights):
            self.refuse(
                "logit_bias_ids",
                f"has {len(ids)} ids for {len(weights)} logit_bias_weights: it must have as many",
            )
        return list(zip(ids, weights, strict=True))

    @property
    def guided(self) -> bool:
        """Whether an answer has to keep to something, which takes a moment to look at."""
        return self.has("guided_decoding_guide_type") or self.has("guided_decoding_guide")

    def guide(self, row: int) -> Guide | None:
        """What the answer keeps to; None where both tensors are missing or empty.

        Raises:
            RequestError: it is none, or cannot be enforced, here or by the lane's engine.
        """
        kind, text = (self._text(f"guided_decoding_guide{part}", row) for part in ("_type", ""))
        if not kind and not text:
            return None
        if not kind:
            self.refuse("guided_decoding_guide_type", f"is missing: it must be one of {', '.join(GUIDES)}")
        lanes = GUIDES.get(kind)
        if lanes is None:
            self.refuse("guided_decoding_guide_type", f"is {kind!r}: it must be one of {', '.join(GUIDES)}")
        if self.lane not in lanes:
            self.refuse(
                "guided_decoding_guide_type",
                f"is {kind!r}, which backend {self.lane} does not have: use another type",
            )
        guide = Guide(kind, text)
        try:
            grammar.check(guide)
        except InvalidField as error:
            self.refuse(f"guided_decoding_{error.field}", error.problem)
        return guide

    def _text(self, name: str, row: int) -> str:
        """A text that may be missing."""
        try:
            return self.scalar(name, row, b"").decode("utf-8")
        except UnicodeDecodeError as error:
            self.refuse(name, f"is not UTF-8: {error.reason} at byte {error.start}")
        except AttributeError:
            self.refuse(name, "is no text")

    def stops(self) -> bool:
        """Whether this is the order to stop another request.

        Raises:
            RequestError: it says so for some rows and not for others.
        """
        values = self._values.get("stop", np.zeros(0)).ravel().tolist()
        if any(values) and not all(values):
            self.refuse("stop", f"is {values}: a stop request must be true for each of its rows")
        return any(values)

    def generation(
        self,
        row: int,
        prompt_ids: list[int],
        stop: tuple[bytes, ...],
        bad_ids: tuple[tuple[int, ...], ...],
        info: ModelInfo,
        logit_bias: tuple[tuple[int, float], ...] = (),
        stop_ids: tuple[int, ...] = (),
    ) -> GenerationRequest:
        """The engine's request, checked against the model's limits.

        Raises:
            RequestError: names the tensor, its value and the limit.
        """
        prompt = "text_input" if self.has("text_input") else "input_ids"
        max_tokens, room = self.max_tokens(row), info.max_seq_len - len(prompt_ids)
        if room < 1:
            self.refuse(
                prompt,
                f"has {len(prompt_ids)} tokens: it must have fewer than max_seq_len={info.max_seq_len}",
            )
        if max_tokens > room:
            self.refuse(
                "max_tokens",
                f"is {max_tokens}: after {len(prompt_ids)} prompt tokens it must be at most {room} "
                f"(max_seq_len={info.max_seq_len})",
            )
        fields = {"stream": False} | self._fields("request", row)
        min_tokens = fields.get("min_tokens", 0)
        if not 0 <= min_tokens <= max_tokens:
            self.refuse(
                "min_tokens",
                f"is {min_tokens}: it must be between 0 and {self._label('max_tokens')}={max_tokens}",
            )
        return GenerationRequest(
            prompt_ids=prompt_ids,
            max_tokens=max_tokens,
            sampling=self.sampling(row, _summed([*logit_bias, *self._id_bias(row, info)])),
            end_id=self._end_id(row, info),
            stop_ids=(*stop_ids, *self._token_ids("stop_token_ids", row, info)),
            stop=stop,
            bad_ids=bad_ids,
            guide=self.guide(row),
            lane_inputs=self.lane_inputs(row),
            **fields,
        )

    def _end_id(self, row: int, info: ModelInfo) -> int | None:
        """None = the model's own list; asking for one of that list, as preprocessing does, means the list."""
        end_id = self.scalar("end_id", row)
        if self.scalar("ignore_eos", row, False):
            if end_id is not None and end_id != -1:
                self.refuse("ignore_eos", f"is True and end_id is {end_id}: it must be one of the two")
            return -1
        if end_id is None or end_id in info.end_ids:
            return None
        if not -1 <= end_id < info.vocab_size:
            self.refuse("end_id", f"is {end_id}: it must be -1 (none) or between 0 and {info.vocab_size - 1}")
        return end_id


def _summed(bias: list[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Each token once."""
    sums: dict[int, float] = {}
    for token, weight in bias:
        sums[token] = sums.get(token, 0.0) + weight
    return tuple(sorted(sums.items()))
