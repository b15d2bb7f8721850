"""TensorRT-LLM's LLM API behind the interface of our own engine: ``add``, ``cancel``, ``step``.

The API batches in flight by itself. It wants one asyncio loop, which runs on a thread here; ``step`` hands over what
the requests have produced since the last call.
"""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import json
import sys
import threading
import uuid
from typing import Any

from flightline.engine_build.trtllm import versions
from flightline.model_repository.shared.generation import Progress
from flightline.supervisor.trtllm import llm_api
from flightline.supervisor.trtllm.llm_api import LlmConfig
from flightline.torch_engine.core.output import end_ids_of
from flightline.torch_engine.core.request import (
    Code,
    EngineStats,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    PerfMetrics,
    QueueFull,
    RequestError,
    RequestOutput,
)
from flightline.torch_engine.model.config_json import load_spec
from flightline.torch_engine.text.stream import TokenBytes

STEP_WAIT_S = 0.005
STATS_WAIT_S = 0.2
Key = Any
"""Whoever adds a request names it; any hashable."""


class LlmEngine:
    """One ``LLM`` and the requests on it. ``add``, ``cancel`` and ``step`` are for one thread."""

    def __init__(self, config: LlmConfig, api: Any) -> None:
        """Loads the model, which takes minutes for a large one.

        Args:
            api: the module ``tensorrt_llm``.
        """
        self.config = config
        self.sequences: dict[Key, Progress] = {}
        spec = load_spec(config.model_dir)
        self._tokens = TokenBytes.from_dir(config.model_dir)
        self._sampling = api.SamplingParams
        self._habits = versions.habits(api.__version__)
        self._llmapi = api.llmapi
        self._guides = api.llmapi.GuidedDecodingParams if config.guided_decoding else None
        self._adapter: Any = None
        lora_config: Any = None
        if config.lora_dir:
            self._adapter = importlib.import_module(f"{api.__name__}.executor.request").LoRARequest
            lora_config = importlib.import_module(f"{api.__name__}.lora_manager").LoraConfig
        self._llm = api.LLM(**llm_api.llm_arguments(config, api.__version__, api.llmapi, lora_config))
        precision = "FP8" if spec.fp8 else "bf16"
        self.info = ModelInfo(
            vocab_size=spec.vocab_size,
            max_seq_len=config.max_seq_len,
            end_ids=spec.end_ids,
            model_dir=config.model_dir,
            description=f"TensorRT-LLM {api.__version__} PyTorch flow, {precision} weights, "
            f"{config.kv_cache_dtype} KV cache",
        )
        self._record: dict[str, Any] = {}
        self._generated = 0
        self.failed_steps = 0
        """Requests in a row that TensorRT-LLM failed."""
        self._results: dict[Key, Any] = {}
        self._outputs: list[tuple[Key, RequestOutput]] = []
        self._produced = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llm-api", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._watch_stats(), self._loop)

    @property
    def busy(self) -> bool:
        return bool(self.sequences or self._outputs)

    @property
    def stats(self) -> EngineStats:
        config = self.config
        return llm_api.engine_stats(self._record, len(self.sequences), config.max_batch_size, self._generated)

    def add(self, key: Key, request: GenerationRequest, arrival_ns: int) -> None:
        """Starts a request. Raises RequestError: too many are waiting, or it cannot be expressed."""
        limit = self.config.max_batch_size + self.config.max_queue_size
        if len(self.sequences) >= limit:
            raise QueueFull(
                f"the queue is full: {self.config.max_queue_size} requests are waiting, no more may; "
                "try again later"
            )
        arguments = llm_api.sampling_arguments(
            request, self.info.end_ids, self._tokens, self._habits, self._guides
        )
        llm_api.require_logits(request, self._habits, self.info.vocab_size)
        adapter = llm_api.Adapter.of(request, self.config.lora_dir)
        if bias := llm_api.embedding_bias(request, self.info.vocab_size):
            arguments["embedding_bias"] = _tensor(bias)
        try:
            retention = llm_api.retention(request, self._habits, self._llmapi)
        except (TypeError, ValueError, RuntimeError) as error:  # the API's own checks
            raise RequestError(Code.INVALID_ARG, f"TensorRT-LLM refused the request: {error}") from None
        options: dict[str, Any] = {"streaming": True}
        if retention:
            options["kv_cache_retention_config"] = retention
        if adapter:
            options["lora_request"] = self._adapter(**dataclasses.asdict(adapter))
        if llm_api.wanted_logits(request):  # in streams releases differ, and of reused blocks there are none
            options |= {"streaming": False, "cache_salt": uuid.uuid4().hex}
        progress = Progress(
            request=request,
            on_output=lambda output: self._put(key, output),
            tokens=self._tokens,
            end_ids=end_ids_of(request, self.info.end_ids),
            metrics=PerfMetrics(arrival_time_ns=arrival_ns),
        )
        self.sequences[key] = progress
        asyncio.run_coroutine_threadsafe(self._follow(key, progress, arguments, options), self._loop)

    def cancel(self, key: Key) -> RequestOutput | None:
        """Stops a request; its last output comes with a later ``step``."""
        progress = self.sequences.get(key)
        if progress is not None:
            self._loop.call_soon_threadsafe(self._abort, key, progress)
        return None

    def step(self) -> list[tuple[Key, RequestOutput]]:
        """What has been produced since the last step; waits a moment if that is nothing."""
        with self._produced:
            if not self._outputs:
                self._produced.wait(STEP_WAIT_S)
            outputs, self._outputs = self._outputs, []
        for key, output in outputs:
            if output.finish_reason is not None:
                self.sequences.pop(key, None)
                failed = output.error is not None and output.error.code is Code.INTERNAL
                self.failed_steps = self.failed_steps + 1 if failed else 0
        return outputs

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end_tasks(), self._loop).result(timeout=5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)
        self._llm.shutdown()

    # -- on the loop's thread ------------------------------------------------------------------------

    def _put(self, key: Key, output: RequestOutput) -> None:
        with self._produced:
            self._outputs.append((key, output))
            self._produced.notify()

    def _abort(self, key: Key, progress: Progress) -> None:
        result = self._results.get(key)
        if result is not None and not progress.finished:
            _abort_quietly(result)
        progress.finish(FinishReason.CANCELLED)

    async def _follow(
        self, key: Key, progress: Progress, arguments: dict[str, Any], options: dict[str, Any]
    ) -> None:
        """``arguments`` are of ``SamplingParams``, ``options`` of ``generate_async``."""
        if progress.finished:  # cancelled before it began
            return
        try:
            result = self._llm.generate_async(
                progress.request.prompt_ids, self._sampling(**arguments), **options
            )
        except (TypeError, ValueError, NotImplementedError) as error:  # this request, not the engine
            progress.fail(RequestError(Code.INVALID_ARG, f"TensorRT-LLM refused the request: {error}"))
            return
        except (
            Exception
        ) as error:  # its executor, say; whatever it is, the request ends and its place is free
            progress.fail(RequestError(Code.INTERNAL, f"TensorRT-LLM failed: {error!r}"))
            return
        self._results[key] = result
        try:
            await self._read(progress, result)
        except RequestError as error:
            progress.fail(error)
        except Exception as error:
            progress.fail(RequestError(Code.INTERNAL, f"TensorRT-LLM failed: {error}"))
            _abort_quietly(result)  # nobody reads on: it must not generate to the end
        finally:
            self._results.pop(key, None)

    async def _read(self, progress: Progress, result: Any) -> None:
        seen = 0
        async for update in result:
            (output,) = update.outputs
            fresh = output.token_ids[seen:]
            count = progress.request.top_log_probs
            entries = output.logprobs[seen:] if progress.request.return_log_probs or count else []
            seen += len(fresh)
            if output.finish_reason is not None:
                reported = getattr(output, "request_perf_metrics", None)
                progress.metrics = llm_api.perf_metrics(progress.metrics, reported)
                progress.lane_outputs = llm_api.logits(progress.request, update)
            for index, token in enumerate(fresh):
                if entries:
                    entry = entries[index]
                    top = llm_api.top_log_probs(entry, count) if count else None
                    progress.take(token, llm_api.log_prob(entry, token), top)
                else:
                    progress.take(token)
            self._generated += len(fresh)
            if progress.finished:
                if not update.finished:
                    _abort_quietly(result)
                return
        reason = {"length": FinishReason.LENGTH, "cancelled": FinishReason.CANCELLED}
        progress.finish(reason.get(output.finish_reason, FinishReason.END_ID))

    async def _end_tasks(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch_stats(self) -> None:
        try:
            while True:
                async for record in self._llm.get_stats_async(timeout=STATS_WAIT_S):
                    self._record = json.loads(record) if isinstance(record, str) else record
                await asyncio.sleep(STATS_WAIT_S)
        except Exception as error:  # metrics are worth a line in the log, not the requests
            print(f"engine: no statistics any more: {error!r}", file=sys.stderr, flush=True)


def _abort_quietly(result: Any) -> None:
    """The request has its answer: that TensorRT-LLM could not be told so goes to the log."""
    try:
        result.abort()
    except Exception as error:
        print(f"engine: abort failed: {error!r}", file=sys.stderr, flush=True)


def _tensor(values: list[float]) -> Any:
    import torch  # TensorRT-LLM has loaded it long ago; tests without it need not

    return torch.tensor(values, dtype=torch.float32)
