"""Reads a Triton request into the engine's types, and says precisely what is wrong with it.

``TABLE`` lists every input tensor of NVIDIA's contract once: what it is called in each model, and
whether we read it or accept only values that change nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from model_repository.shared import words
from torch_engine.request import Code, GenerationRequest, ModelInfo, RequestError, SamplingParams


@dataclass(frozen=True)
class Tensor:
    """One input of the contract."""

    name: str
    """In ``ensemble``; the name that users know and errors show."""
    aliases: tuple[str, ...] = ()
    """What ``preprocessing`` and ``tensorrt_llm`` call it."""
    unsupported: str = ""
    """The feature that we do not have; "" = we read the tensor."""
    neutral: tuple = (0, False, b"")
    """Values of an unsupported tensor that ask for nothing; a tensor without elements never does."""


def _lacks(feature: str, *names: str, neutral: tuple = Tensor.neutral) -> list[Tensor]:
    return [Tensor(name, unsupported=feature, neutral=neutral) for name in names]


TABLE: tuple[Tensor, ...] = (
    Tensor("text_input", ("QUERY",)),
    Tensor("input_ids"),
    Tensor("input_lengths"),
    Tensor("max_tokens", ("REQUEST_OUTPUT_LEN", "request_output_len")),
    Tensor("bad_words", ("BAD_WORDS_DICT", "bad_words_list")),
    Tensor("stop_words", ("STOP_WORDS_DICT", "stop_words_list")),
    Tensor("end_id", ("END_ID",)),
    Tensor("pad_id", ("PAD_ID",)),
    Tensor("top_k", ("runtime_top_k",)),
    Tensor("top_p", ("runtime_top_p",)),
    Tensor("temperature"),
    Tensor("repetition_penalty"),
    Tensor("presence_penalty"),
    Tensor("frequency_penalty"),
    Tensor("min_tokens"),
    Tensor("seed"),
    Tensor("stream", ("streaming",)),
    Tensor("stop"),
    Tensor("exclude_input_in_output"),
    Tensor("return_log_probs"),
    Tensor("return_perf_metrics"),
    Tensor("return_num_input_tokens"),
    Tensor("return_num_output_tokens"),
    *_lacks("beam search", "beam_width", neutral=(0, 1)),
    *_lacks("more than one output for a prompt", "num_return_sequences", neutral=(0, 1)),
    Tensor("length_penalty", ("len_penalty",), "beam search", (0, 1)),
    *_lacks("beam search", "early_stopping", "beam_search_diversity_rate"),
    *_lacks("top-p decay", "runtime_top_p_min", neutral=(0, np.float32(1e-6))),
    *_lacks("top-p decay", "runtime_top_p_decay", neutral=(0, 1)),
    *_lacks("top-p decay", "runtime_top_p_reset_ids", neutral=(0, 1, -1)),
    *_lacks("returning logits", "return_context_logits", "return_generation_logits"),
    Tensor("decoder_text_input", ("DECODER_QUERY",), "an encoder-decoder model"),
    *_lacks("an encoder-decoder model", "decoder_input_ids", "decoder_input_lengths"),
    *_lacks("an encoder-decoder model", "encoder_output_lengths"),
    *_lacks("an encoder-decoder model", "encoder_input_features", neutral=()),
    *_lacks("an encoder-decoder model", "cross_attention_mask", "skip_cross_attn_blocks"),
    *_lacks("speculative decoding", "draft_input_ids", "draft_logits", neutral=()),
    *_lacks("speculative decoding", "draft_acceptance_threshold"),
    *_lacks("speculative decoding", "lookahead_window_size", "lookahead_ngram_size"),
    *_lacks("speculative decoding", "lookahead_verification_set_size"),
    Tensor("embedding_bias_words", ("EMBEDDING_BIAS_WORDS",), "a bias on tokens"),
    Tensor("embedding_bias_weights", ("EMBEDDING_BIAS_WEIGHTS",), "a bias on tokens"),
    *_lacks("a bias on tokens", "embedding_bias"),
    *_lacks("prompt tuning", "prompt_embedding_table", neutral=()),
    *_lacks("prompt tuning", "prompt_table_extra_ids", "prompt_vocab_size"),
    Tensor("prompt_table_extra_id", ("PROMPT_TABLE_EXTRA_ID",), "prompt tuning"),
    *_lacks("LoRA", "lora_task_id"),
    *_lacks("LoRA", "lora_weights", "lora_config", neutral=()),
    *_lacks("guided decoding", "guided_decoding_guide_type", "guided_decoding_guide"),
    *_lacks("image and video input", "IMAGE_BYTES", "IMAGE_URL", "IMAGE_SIZES", "VIDEO_BYTES", neutral=()),
    *_lacks("multi-modal positions", "mrope_rotary_cos_sin", "mrope_position_deltas"),
    *_lacks("disaggregated serving", "context_phase_params"),
    *_lacks("KV cache retention", "retention_token_range_starts", "retention_token_range_ends"),
    *_lacks("KV cache retention", "retention_token_range_priorities", "retention_token_range_durations_ms"),
    *_lacks("KV cache retention", "retention_decode_priority", "retention_decode_duration_ms"),
)
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


class Inputs:
    """The tensors of one request, by the names of ``ensemble``; the first dimension is the batch."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Raises RequestError for an unknown tensor or an unsupported feature."""
        self._values: dict[str, np.ndarray] = {}
        self._labels: dict[str, str] = {}
        for name, value in tensors.items():
            known = BY_NAME.get(name)
            if known is None:
                raise RequestError(Code.INVALID_ARG, f"{name} is not an input of this model")
            self._values[known.name] = value
            self._labels[known.name] = name if name == known.name else f"{known.name} ({name})"
            if known.unsupported:
                self._require_neutral(known, value)
        self.rows = max((len(value) for value in self._values.values()), default=1)

    @classmethod
    def of(cls, request: Any) -> Inputs:
        """Reads a ``pb_utils.InferenceRequest``."""
        inputs = cls({tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
        # Over HTTP, Triton makes a request parameter of a JSON field that is no input: a misspelled one.
        for name in json.loads(request.parameters() or "{}"):
            if not name.startswith("triton_"):
                inputs.refuse(name, "is not an input of this model")
        return inputs

    def _require_neutral(self, tensor: Tensor, value: np.ndarray) -> None:
        for item in value.ravel():
            if item not in tensor.neutral:
                shown = repr(item.decode("utf-8", "replace")) if isinstance(item, bytes) else item
                label = self._labels[tensor.name]
                raise RequestError(
                    Code.UNSUPPORTED,
                    f"{label} is {shown}: {tensor.unsupported} is not supported; leave {label} out",
                )

    def has(self, name: str) -> bool:
        return name in self._values

    def row(self, name: str, row: int) -> np.ndarray:
        """One batch row. Raises RequestError if the tensor is missing."""
        if name not in self._values:
            raise RequestError(Code.INVALID_ARG, f"{name} is missing: this model requires it")
        return self._values[name][row]

    def scalar(self, name: str, row: int, default: Any = None) -> Any:
        """One value as a Python bool, int, float or bytes; ``default`` where the tensor is missing."""
        if name not in self._values:
            return default
        value = np.atleast_1d(self._values[name][row]).ravel()
        if value.size != 1:
            self.refuse(name, f"has {value.size} values: it must have one")
        return value[0].item() if isinstance(value[0], np.generic) else value[0]

    def refuse(self, name: str, problem: str) -> NoReturn:
        raise RequestError(Code.INVALID_ARG, f"{self._labels.get(name, name)} {problem}")

    @property
    def num_text_bytes(self) -> int:
        """Of all prompts in the batch."""
        prompts = self._values.get("text_input", np.zeros(0))
        return sum(len(prompt) for prompt in prompts.ravel().tolist() if isinstance(prompt, bytes))

    def copy(self) -> Inputs:
        """The same with arrays of its own: Triton's may end with the call that brought them."""
        made = Inputs({})
        made._values = {name: value.copy() for name, value in self._values.items()}
        made._labels, made.rows = self._labels, self.rows
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
            return words.parse(self.row(name, row).ravel().tolist())
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
        for token in ids[:length]:
            if not 0 <= token < vocab_size:
                self.refuse("input_ids", f"holds {token}: ids of this model are 0 to {vocab_size - 1}")
        return ids[:length]

    def max_tokens(self, row: int) -> int:
        self.row("max_tokens", row)
        value = self.scalar("max_tokens", row)
        if value <= 0:
            self.refuse("max_tokens", f"is {value}: it must be at least 1")
        return value

    def sampling(self, row: int) -> SamplingParams:
        return SamplingParams(
            temperature=self.scalar("temperature", row, 1.0),
            top_k=self.scalar("top_k", row),
            top_p=self.scalar("top_p", row),
            repetition_penalty=self.scalar("repetition_penalty", row, 1.0),
            presence_penalty=self.scalar("presence_penalty", row, 0.0),
            frequency_penalty=self.scalar("frequency_penalty", row, 0.0),
            seed=self.scalar("seed", row),
        )

    def options(self, row: int) -> Options:
        return Options(
            stream=self.scalar("stream", row, False),
            exclude_input=self.scalar("exclude_input_in_output", row, True),
            log_probs=self.scalar("return_log_probs", row, False),
            perf_metrics=self.scalar("return_perf_metrics", row, False),
            num_input_tokens=self.scalar("return_num_input_tokens", row, False),
            num_output_tokens=self.scalar("return_num_output_tokens", row, False),
        )

    def generation(
        self,
        row: int,
        prompt_ids: list[int],
        stop: tuple[bytes, ...],
        bad_ids: tuple[tuple[int, ...], ...],
        info: ModelInfo,
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
        min_tokens = self.scalar("min_tokens", row, 0)
        if not 0 <= min_tokens <= max_tokens:
            self.refuse("min_tokens", f"is {min_tokens}: it must be between 0 and max_tokens={max_tokens}")
        return GenerationRequest(
            prompt_ids=prompt_ids,
            max_tokens=max_tokens,
            sampling=self.sampling(row),
            end_id=self._end_id(row, info),
            stop=stop,
            bad_ids=bad_ids,
            min_tokens=min_tokens,
            return_log_probs=self.scalar("return_log_probs", row, False),
            stream=self.scalar("stream", row, False),
        )

    def _end_id(self, row: int, info: ModelInfo) -> int | None:
        """None = the model's own list; asking for one of that list, as preprocessing does, means the list."""
        end_id = self.scalar("end_id", row)
        if end_id is None or end_id in info.end_ids:
            return None
        if not -1 <= end_id < info.vocab_size:
            self.refuse("end_id", f"is {end_id}: it must be -1 (none) or between 0 and {info.vocab_size - 1}")
        return end_id
