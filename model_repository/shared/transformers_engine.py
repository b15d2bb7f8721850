"""The baseline: plain Transformers ``generate()`` behind the interface of the engine's client.

Honest, not crippled: bf16 weights, inference mode, all cores, warmed up, streams every token. It does
what ``generate`` does: one request at a time, or a static batch of waiting requests that starts and
ends together. Our own code only watches it: :class:`_Watcher` is a ``StoppingCriteria``, called after
each step, that passes tokens on and says which rows are done.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
import transformers
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from flightline.model_repository.shared.generation import Progress
from flightline.torch_engine.core.memory import reserved_gpu_memory
from flightline.torch_engine.core.output import end_ids_of
from flightline.torch_engine.core.request import (
    Code,
    EngineStats,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    PerfMetrics,
    RequestError,
    RequestOutput,
    SamplingParams,
)
from flightline.torch_engine.model.config_json import transformers_class
from flightline.torch_engine.process.threads import vital
from flightline.torch_engine.text.stream import TokenBytes

THREADS_VARIABLE = "FLIGHTLINE_BASELINE_THREADS"
_GATHER_S = 0.02
"""A static batch is only ever filled if the first request waits for others a little."""


M_MMAP_THRESHOLD = -3
"""Of glibc's ``mallopt``, from ``malloc.h``."""


def keep_freed_tensors() -> None:
    """A tensor's memory stays here when it is freed, up to 32 MiB, the most that glibc learns to keep by itself.

    Triton's own limit (supervisor/triton.py) is in this process's environment, and new pages for each tensor would
    make the baseline slower than it is alone.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 32 << 20)


class TransformersEngine:
    """Loads a checkpoint and generates on a thread of its own, in order of arrival."""

    def __init__(
        self, model_dir: str, dtype: str = "bfloat16", max_batch_size: int = 1, max_queue_size: int = 256
    ) -> None:
        """
        Args:
            dtype: name of a torch dtype for weights and computation.
            max_batch_size: most waiting requests that are generated together (with equal sampling settings).
            max_queue_size: requests that may wait; one more is refused with UNAVAILABLE.
        """
        keep_freed_tensors()
        torch.set_num_threads(int(os.environ.get(THREADS_VARIABLE) or len(os.sched_getaffinity(0))))
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        auto_class: Any = getattr(transformers, transformers_class(model_dir))
        model = auto_class.from_pretrained(model_dir, dtype=getattr(torch, dtype), local_files_only=True)
        self._model = model.to(self._device).eval()
        end = model.generation_config.eos_token_id
        end_ids = tuple(end) if isinstance(end, list) else () if end is None else (end,)
        # What the checkpoint recommends (sampling, lengths) must not override what a request says.
        model.generation_config = GenerationConfig()
        config = model.config.get_text_config()
        self.info = ModelInfo(config.vocab_size, config.max_position_embeddings, end_ids, model_dir)
        self._tokens = TokenBytes.from_dir(model_dir)
        self._max_batch_size = max_batch_size
        self._max_queue_size = max_queue_size
        self._handles = itertools.count(1)
        self._changed = threading.Condition()
        self._waiting: deque[Progress] = deque()
        self._jobs: dict[int, Progress] = {}
        self._closed = False
        warm: Future[None] = Future()
        self._thread = vital(self._run, "generate", warm)
        warm.result()

    def submit(self, request: GenerationRequest, on_output: Callable[[RequestOutput], None]) -> int:
        """As ``EngineClient.submit``."""
        if request.guide is not None:
            raise RequestError(
                Code.UNSUPPORTED,
                "guided_decoding_guide is given: the baseline is plain generate() and keeps to none; leave it out, or "
                "ask text_generation",
            )
        end_ids = end_ids_of(request, self.info.end_ids)
        job = Progress(
            request, on_output, self._tokens, end_ids, PerfMetrics(arrival_time_ns=time.monotonic_ns())
        )
        with self._changed:
            if len(self._waiting) >= self._max_queue_size:
                limit = f"{self._max_queue_size} requests are waiting, no more may"
                raise RequestError(Code.UNAVAILABLE, f"the queue is full: {limit}; try again later")
            handle = next(self._handles)
            self._jobs[handle] = job
            self._waiting.append(job)
            self._changed.notify()
        return handle

    def cancel(self, handle: int) -> None:
        """As ``EngineClient.cancel``."""
        with self._changed:
            job = self._jobs.get(handle)
            if job is None:
                return
            job.cancelled = True
            if job not in self._waiting:
                return  # its next token ends it
            self._waiting.remove(job)
            del self._jobs[handle]
        job.finish(FinishReason.CANCELLED)

    def stop(self, request_id: str) -> None:
        """As ``EngineClient.stop``."""
        with self._changed:
            jobs = list(self._jobs.items())
        for handle, job in jobs:
            if job.request.request_id == request_id:
                self.cancel(handle)

    @property
    def stats(self) -> EngineStats:
        """The GPU memory alone: what this process keeps, the weights and the largest batch's cache after a while."""
        return EngineStats(gpu_memory_bytes=reserved_gpu_memory())

    def close(self) -> None:
        with self._changed:
            self._closed = True
            for job in self._jobs.values():
                job.cancelled = True
            self._changed.notify()
        self._thread.join(timeout=10)

    def _warm_up(self) -> None:
        with torch.inference_mode():
            prompt = torch.zeros((1, 16), dtype=torch.long, device=self._device)
            self._model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0),
            )

    def _run(self, warm: Future[None]) -> None:
        # Warmed up here and not where the model was loaded: each thread that computes gets a team of
        # OpenMP threads, and with more of them than cores OpenMP sleeps where it would spin.
        try:
            self._warm_up()
        except BaseException as failure:
            warm.set_exception(failure)
            return
        warm.set_result(None)
        while (batch := self._next_batch()) is not None:
            try:
                self._generate([job for job in batch if not job.cancelled])
                error = None
            except Exception as failure:  # out of memory, say: the next request is served nevertheless
                error = RequestError(Code.INTERNAL, f"generate() failed: {failure!r}")
            for job in batch:
                if error is None:
                    job.finish(FinishReason.CANCELLED)
                else:
                    job.fail(error)
            with self._changed:
                self._jobs = {handle: job for handle, job in self._jobs.items() if not job.finished}

    def _next_batch(self) -> list[Progress] | None:
        """Waits for a request; takes with it those that may run in the same static batch."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
        if self._max_batch_size > 1:
            time.sleep(_GATHER_S)
        with self._changed:
            if self._closed:
                return None
            batch = [self._waiting.popleft()]
            for job in list(self._waiting):
                if len(batch) < self._max_batch_size and _may_share(batch[0].request, job.request):
                    self._waiting.remove(job)
                    batch.append(job)
        return batch

    @torch.inference_mode()
    def _generate(self, batch: list[Progress]) -> None:
        if not batch:
            return
        request = batch[0].request
        longest = max(len(job.request.prompt_ids) for job in batch)
        pad = next(iter(self.info.end_ids), 0)
        prompt = torch.full((len(batch), longest), pad, dtype=torch.long)
        mask = torch.zeros_like(prompt)
        for row, job in enumerate(batch):
            ids = torch.tensor(job.request.prompt_ids)
            prompt[row, longest - len(ids) :] = ids
            mask[row, longest - len(ids) :] = 1
            job.scheduled()
        torch.manual_seed(request.sampling.seed) if request.sampling.seed is not None else torch.seed()
        told = any(job.request.return_log_probs or job.request.top_log_probs for job in batch)
        raw = _RawLogits() if told else None
        processors = [*([raw] if raw else []), *_penalties(request.sampling, longest)]
        self._model.generate(
            prompt.to(self._device),
            attention_mask=mask.to(self._device),
            generation_config=_generation_config(batch, pad),
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList([_Watcher(batch, raw)]),
        )


def _may_share(first: GenerationRequest, other: GenerationRequest) -> bool:
    """``generate`` has one set of settings for all rows of a batch."""
    settings = ("sampling", "end_id", "stop_ids", "bad_ids", "min_tokens")
    return all(getattr(first, name) == getattr(other, name) for name in settings)


def _generation_config(batch: list[Progress], pad: int) -> GenerationConfig:
    request = batch[0].request
    sampling = request.sampling
    values: dict = {
        "max_new_tokens": max(job.request.max_tokens for job in batch),
        "min_new_tokens": request.min_tokens or None,
        "eos_token_id": sorted(batch[0].end_ids) or None,
        "pad_token_id": pad,
        "repetition_penalty": sampling.repetition_penalty,
        "bad_words_ids": [list(ids) for ids in request.bad_ids] or None,
        "sequence_bias": [[[token], float(bias)] for token, bias in sampling.logit_bias] or None,
        "do_sample": not sampling.greedy,
    }
    if not sampling.greedy:
        values |= {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or 0,
            "top_p": sampling.top_p or 1.0,
            "min_p": sampling.min_p or None,
        }
    return GenerationConfig(**values)


def _penalties(sampling: SamplingParams, prompt_length: int) -> list[LogitsProcessor]:
    if not sampling.presence_penalty and not sampling.frequency_penalty:
        return []
    return [_OutputPenalty(sampling.presence_penalty, sampling.frequency_penalty, prompt_length)]


class _OutputPenalty(LogitsProcessor):
    """Presence and frequency penalties, which Transformers lacks: they count generated tokens only."""

    def __init__(self, presence: float, frequency: float, prompt_length: int) -> None:
        self._presence, self._frequency, self._prompt_length = presence, frequency, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """ids [rows, length], scores [rows, vocabulary] -> scores."""
        counts = torch.zeros_like(scores)
        generated = input_ids[:, self._prompt_length :]
        counts.scatter_add_(1, generated, torch.ones_like(generated, dtype=scores.dtype))
        return scores - self._presence * (counts > 0) - self._frequency * counts


class _RawLogits(LogitsProcessor):
    """Keeps the model's logits of this step, before any penalty."""

    logits: torch.Tensor

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.logits = scores
        return scores


class _Watcher(StoppingCriteria):
    """After each step: passes each row's new token on, and says which rows are done."""

    def __init__(self, batch: list[Progress], raw: _RawLogits | None) -> None:
        self._batch = batch
        self._raw = raw

    def __call__(self, input_ids: torch.Tensor, scores: object, **kwargs: object) -> torch.Tensor:
        """ids [rows, length] -> bool [rows]."""
        new = input_ids[:, -1]
        log_probs = [0.0] * len(self._batch)
        tops: list[list[tuple[int, float]]] = [[] for _ in self._batch]
        if self._raw is not None:
            everywhere = torch.log_softmax(self._raw.logits.float(), dim=-1)
            log_probs = everywhere.gather(1, new[:, None])[:, 0].tolist()
            if most := max(job.request.top_log_probs for job in self._batch):
                values, ids = everywhere.topk(most)
                tops = [
                    list(zip(row, of, strict=True))[: job.request.top_log_probs]
                    for row, of, job in zip(ids.tolist(), values.tolist(), self._batch, strict=True)
                ]
        for job, token, log_prob, top in zip(self._batch, new.tolist(), log_probs, tops, strict=True):
            try:
                job.take(token, log_prob, top)
            except Exception as error:  # in its text or its words: the other rows have theirs
                job.fail(RequestError(Code.INTERNAL, f"the token could not be told: {error!r}"))
        return torch.tensor([job.finished for job in self._batch], device=input_ids.device)
