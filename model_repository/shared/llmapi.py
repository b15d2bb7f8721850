"""The tensors of NVIDIA's ``all_models/llmapi``: one prompt a request, no batch dimension, a reason at the end.

It is the contract that TensorRT-LLM kept when it removed ``inflight_batcher_llm`` after 1.2. Types are those that its
``config.pbtxt`` declares; as there, a streamed text is the whole text so far.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from flightline.model_repository.shared import responses
from flightline.model_repository.shared.contract import LLMAPI
from flightline.model_repository.shared.front import TextEndpoint
from flightline.model_repository.shared.tensors import PYTORCH, Inputs, Options
from flightline.model_repository.shared.vocabulary import Vocabulary
from flightline.torch_engine.core.request import Code, FinishReason, RequestError, RequestOutput

MAX_TOKENS = 32
"""``SamplingParams`` of the LLM API gives this many where nobody says."""
NAMES = {
    "text_input": "text_input",
    "streaming": "stream",
    "stop": "stop",
    "sampling_param_temperature": "temperature",
    "sampling_param_top_k": "top_k",
    "sampling_param_top_p": "top_p",
    "sampling_param_frequency_penalty": "frequency_penalty",
    "sampling_param_presence_penalty": "presence_penalty",
    "sampling_param_max_tokens": "max_tokens",
    "sampling_param_stop": "stop_words",
    "sampling_param_seed": "seed",
    "sampling_param_exclude_input_from_output": "exclude_input_in_output",
    "sampling_param_return_perf_metrics": "return_perf_metrics",
    "return_cumulative_logprob": "return_log_probs",
    "return_finish_reason": "return_finish_reason",
}
"""Its inputs -> the same ones of ``ensemble``."""
THEIRS = {ours: theirs for theirs, ours in NAMES.items()}
ADAPTER = ("lora_id", "lora_name", "lora_path", "lora_ckpt_source")
"""Its inputs that name a LoRA adapter in a folder of the server; like ``image_url`` of its newest form, after 1.2."""
REASONS = {
    FinishReason.LENGTH: "length",
    FinishReason.END_ID: "stop",
    FinishReason.STOP: "stop",
    FinishReason.CANCELLED: "cancelled",
}
NOTHING = "None"
"""What theirs says before there is a reason."""


@dataclass(frozen=True)
class LlmapiOptions(Options):
    stop_reason: bool = False
    stop_words: tuple[str, ...] = ()


class LlmapiInputs(Inputs):
    """Its tensors under the names of ``ensemble``, with a batch dimension in front."""

    def __init__(self, tensors: dict[str, np.ndarray], lane: str) -> None:
        """Raises RequestError: more than one prompt, more than one answer to it, or what no backend serves."""
        for name in ("image_url", *ADAPTER):
            if (
                name in tensors
                and (why := _why_not(name, lane))
                and any(each != b"" for each in tensors[name].flat)
            ):
                raise RequestError(Code.UNSUPPORTED, f"{name} is given: {why}")
        renamed = {NAMES[name]: value.reshape(1, -1) for name, value in tensors.items() if name in NAMES}
        renamed.setdefault("max_tokens", np.array([[MAX_TOKENS]], np.int32))
        super().__init__(renamed, lane, LLMAPI)
        self._tensors = tensors
        if self._flag("sampling_param_best_of", 1) > 1:
            raise RequestError(
                Code.UNSUPPORTED,
                f"sampling_param_best_of is {self._flag('sampling_param_best_of', 1)}: this model gives one answer; "
                "leave it out",
            )

    def lane_inputs(self, row: int) -> dict[str, np.ndarray]:
        adapter = {name: self._tensors[name].reshape(1, -1) for name in ADAPTER if name in self._tensors}
        return super().lane_inputs(row) | adapter

    def copy(self) -> Self:
        made = super().copy()
        made._tensors = {name: value.copy() for name, value in self._tensors.items()}
        return made

    def _label(self, name: str) -> str:
        return THEIRS.get(name, name)

    def _flag(self, name: str, default: Any) -> Any:
        value = self._tensors.get(name, np.array([default])).ravel()
        if value.size != 1:
            raise RequestError(Code.INVALID_ARG, f"{name} has {value.size} values: it must have one")
        return value[0].item()

    def options(self, row: int) -> LlmapiOptions:
        stop_words = tuple(self.words("stop_words", row))
        stop_reason = self._flag("return_stop_reason", False)
        if stop_reason and len(stop_words) > 1:
            raise RequestError(
                Code.UNSUPPORTED,
                f"return_stop_reason is True with {len(stop_words)} words in sampling_param_stop: which of several "
                "ended an answer is not told; give one, or leave return_stop_reason out",
            )
        return LlmapiOptions(
            **vars(super().options(row)),
            stop_reason=stop_reason,
            stop_words=stop_words,
        )


def _why_not(name: str, lane: str) -> str:
    """Why a backend does not serve an input, with the remedy; empty if it does."""
    if name == "image_url":
        return "image input is not supported; leave it out"
    if lane == PYTORCH:
        return ""
    return (
        f"adapters in folders are not supported by backend {lane}; leave it out, or build with "
        "ENGINE=trtllm-pytorch and TRTLLM_PARAMETERS=lora_dir=FOLDER"
    )


class LlmapiEndpoint(TextEndpoint):
    """``text_input`` to ``text_output`` and ``finish_reason``."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary, LLMAPI)

    def inputs(self, request: Any, lane: str) -> LlmapiInputs:
        return LlmapiInputs({tensor.name(): tensor.as_numpy() for tensor in request.inputs()}, lane)

    def show(
        self, prompt_ids: list[int], output: RequestOutput, options: Options, row: int
    ) -> dict[str, responses.Make]:
        assert isinstance(options, LlmapiOptions)
        made = responses.text(self._vocabulary.bytes.decode(prompt_ids) + output.text, flat=True)
        if options.finish_reason:
            made["finish_reason"] = _text(REASONS[output.finish_reason] if output.finish_reason else NOTHING)
        if options.stop_reason:
            stopped = output.finish_reason is FinishReason.STOP
            made["stop_reason"] = _text(options.stop_words[0] if stopped else NOTHING)
        if options.log_probs:
            made["cumulative_logprob"] = _one(output.cum_log_prob, np.float32)
        if options.perf_metrics and output.metrics:
            made |= _perf_metrics(output.metrics)
        return made


def _perf_metrics(metrics: Any) -> dict[str, responses.Make]:
    new, reused = metrics.kv_cache_alloc_new_blocks, metrics.kv_cache_reused_blocks
    counts = {
        "kv_cache_reused_block": reused,
        "kv_cache_missed_block": new,
        "kv_cache_alloc_new_blocks": new,
        "kv_cache_alloc_total_blocks": metrics.kv_cache_alloc_total_blocks,
        "total_accepted_draft_tokens": metrics.total_accepted_draft_tokens,
        "total_draft_tokens": metrics.total_draft_tokens,
    }
    times = ("arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns")
    made = {name: _one(value, np.int32) for name, value in counts.items()}
    made |= {name: _one(getattr(metrics, name), np.int64) for name in times}
    made["kv_cache_hit_rate"] = _one(reused / (reused + new) if reused + new else 0.0, np.float32)
    made["acceptance_rate"] = _one(metrics.acceptance_rate, np.float32)
    return made


def _one(value: Any, dtype: type) -> responses.Make:
    return lambda: np.array([value], dtype=dtype)


def _text(value: str) -> responses.Make:
    return _one(value.encode("utf-8"), np.object_)
