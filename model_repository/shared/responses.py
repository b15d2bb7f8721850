"""What a generation has produced -> output tensors under NVIDIA's names.

Arrays have the batch dimension in front: 1, since each batch row answers for itself, and its number
is in ``batch_index``. NVIDIA's ``text_output`` alone has none.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from flightline.model_repository.shared.tensors import Options
from flightline.torch_engine.core.request import RequestOutput

NO_TOKEN = -1
"""Stands in ``top_token_ids`` where fewer tokens are told than asked for."""

_PERF_INT32 = (
    *("kv_cache_alloc_new_blocks", "kv_cache_reused_blocks", "kv_cache_alloc_total_blocks"),
    *("total_accepted_draft_tokens", "total_draft_tokens"),
)
_PERF_INT64 = ("arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns")

Make = Callable[[], np.ndarray]


def _one(value: Any, dtype: type) -> Make:
    return lambda: np.array([[value]], dtype=dtype)


def ids(prompt_ids: list[int], output: RequestOutput) -> dict[str, Make]:
    """``output_ids`` int32 [1, 1, n] (one beam) and ``sequence_length`` int32 [1, 1]."""
    tokens = prompt_ids + output.token_ids
    return {
        "output_ids": lambda: np.array([[tokens]], dtype=np.int32),
        "sequence_length": _one(len(tokens), np.int32),
    }


def text(value: str, flat: bool) -> dict[str, Make]:
    """``text_output`` bytes [1, 1], or [1] if ``flat``."""
    data = value.encode("utf-8")
    return {"text_output": lambda: np.array([data] if flat else [[data]], dtype=np.object_)}


def details(output: RequestOutput, options: Options, row: int, num_output_tokens: int) -> dict[str, Make]:
    """Everything about a generation but its tokens: what the request asked for.

    Args:
        num_output_tokens: what the endpoint takes that to be, see ``Contract.counts_so_far``.
    """
    made: dict[str, Make] = {}
    if options.log_probs:
        made["cum_log_probs"] = _one(output.cum_log_prob, np.float32)
        made["output_log_probs"] = lambda: np.array([[output.log_probs]], dtype=np.float32)
    if options.num_input_tokens:
        made["num_input_tokens"] = _one(output.num_input_tokens, np.int32)
    if options.num_output_tokens and (output.finish_reason or not options.counts_at_end):
        made["num_output_tokens"] = _one(num_output_tokens, np.int32)
    metrics = output.metrics  # of the end; before it they would be ten tensors of 0
    if options.perf_metrics and metrics:
        made.update({name: _one(getattr(metrics, name), np.int32) for name in _PERF_INT32})
        made.update({name: _one(getattr(metrics, name), np.int64) for name in _PERF_INT64})
        made["acceptance_rate"] = _one(metrics.acceptance_rate, np.float32)
    if options.num_cached_tokens and metrics and metrics.num_cached_tokens is not None:
        made["num_cached_tokens"] = _one(metrics.num_cached_tokens, np.int32)
    if options.finish_reason and output.finish_reason:
        made["finish_reason"] = _one(output.finish_reason.encode(), np.object_)
    if options.token_ids:
        made["token_ids"] = lambda: np.array([output.token_ids], dtype=np.int32)
    if options.top_log_probs:
        made |= _tops("top_token_ids", "top_log_probs", output.top_log_probs, options.top_log_probs)
    if options.prompt_log_probs and output.prompt_log_probs:
        made["prompt_log_probs"] = lambda: np.array([output.prompt_log_probs], dtype=np.float32)
        if options.top_log_probs:
            made |= _tops(
                "prompt_top_token_ids",
                "prompt_top_log_probs",
                output.prompt_top_log_probs,
                options.top_log_probs,
            )
    if row:
        made["batch_index"] = _one(row, np.int32)
    if options.num_sequences > 1:
        made["sequence_index"] = _one(output.sequence_index, np.int32)
    return made


def of_lane(output: RequestOutput) -> dict[str, Make]:
    """What only the engine of some backend gives, as it came."""
    return {name: functools.partial(np.asarray, value) for name, value in output.lane_outputs.items()}


def _tops(ids: str, log_probs: str, tops: list[list[tuple[int, float]]], count: int) -> dict[str, Make]:
    """Both halves of the likeliest tokens in each place, under these names."""
    return {
        ids: lambda: _top(tops, count, 0, NO_TOKEN, np.int32),
        log_probs: lambda: _top(tops, count, 1, 0.0, np.float32),
    }


def _top(
    tops: list[list[tuple[int, float]]], count: int, part: int, nothing: float, dtype: type
) -> np.ndarray:
    """One half of the likeliest tokens' (id, log-probability), [1, tokens, count]."""
    made: np.ndarray = np.full((1, len(tops), count), nothing, dtype=dtype)
    for at, tokens in enumerate(tops):
        made[0, at, : len(tokens)] = [token[part] for token in tokens]
    return made


def _nothing(shape: list[int], dtype: type) -> np.ndarray:
    return np.full(shape, b"", dtype) if dtype is np.object_ else np.zeros(shape, dtype)


class ResponseWriter:
    """Turns arrays into a response with just the tensors that the request wants.

    A request that names its outputs gets each of them, zeros where there is no value, because an
    ensemble step waits for all it names. One that names none gets those that have a value.
    """

    def __init__(self, pb_utils: Any, model_config: str) -> None:
        """``model_config`` is the JSON that Triton gives to ``initialize``."""
        self._pb = pb_utils
        config = json.loads(model_config)
        batch = [1] if config["max_batch_size"] else []
        self._empty = {
            output["name"]: _nothing(
                [*batch, *(max(int(size), 1) for size in output["dims"])],
                pb_utils.triton_string_to_numpy(output["data_type"]),
            )
            for output in config["output"]
        }

    def write(self, requested: Iterable[str], made: dict[str, Make]) -> Any:
        """A ``pb_utils.InferenceResponse``."""
        names = set(requested)
        if len(names) == len(self._empty):
            names &= made.keys()
        return self._pb.InferenceResponse(
            [self._pb.Tensor(name, made[name]() if name in made else self._empty[name]) for name in names]
        )
