"""``LLM``: arguments as strict as upstream's, an asyncio result, tokens from our own engine in this process."""

from __future__ import annotations

import asyncio
import datetime
import os
import threading
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.core.request import FinishReason, GenerationRequest, RequestOutput
from flightline.torch_engine.core.request import SamplingParams as OurSampling

from .executor.request import LoRARequest
from .llmapi import KvCacheRetentionConfig
from .sampling import SamplingParams
from .surface import SURFACE

if TYPE_CHECKING:
    import torch

FAIL_ON = "TRTLLM_DOUBLE_FAIL_ON"
REFUSE = "TRTLLM_DOUBLE_REFUSE"
RAISE = "TRTLLM_DOUBLE_RAISE"
"""Environment: prompt tokens that make the executor fail, the API refuse and the API fail, to see errors arrive."""
ABORT_FAILS = "TRTLLM_DOUBLE_ABORT_FAILS"
"""Environment: if it is there, ``abort`` raises."""


class LLM:
    def __init__(self, model: str, **arguments: Any) -> None:
        from flightline.torch_engine.engine import (
            Engine,  # imports torch, which a look at the surface does not need
        )

        from . import __version__

        _check_arguments(arguments, __version__)
        pool = arguments["kv_cache_config"].max_tokens or 4 * arguments["max_seq_len"]
        # What the real one detokenises and stops by is ours to do: only bare tokens are asked of this engine.
        self._engine = Engine(
            EngineConfig(
                model_dir=model,
                num_threads=1,
                max_seq_len=arguments["max_seq_len"],
                max_batch_size=arguments["max_batch_size"],
                max_num_tokens=max(256, arguments["max_batch_size"]),
                num_kv_blocks=pool // 16,
            )
        )
        self._folder, self._model = model, None
        self._known: set[tuple[str | None, tuple[int, ...]]] = set()
        """Salts and prompts of which there are KV blocks."""
        self._tokenizer = Tokenizer.from_file(f"{model}/tokenizer.json")
        self._results: dict[int, Result] = {}
        self._fail_on = int(os.environ.get(FAIL_ON, "-1"))
        self._refuse = int(os.environ.get(REFUSE, "-1"))
        self._raise = int(os.environ.get(RAISE, "-1"))
        self._abort_fails = ABORT_FAILS in os.environ
        self._guided = arguments.get("guided_decoding_backend")
        self._adapters = arguments.get("lora_config") is not None
        self._commands: list[tuple[str, Any]] = []
        self._records: list[dict] = []
        self._collect = arguments.get("enable_iter_perf_stats", False)
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="executor", daemon=True)
        self._thread.start()

    def generate_async(
        self,
        inputs: list[int],
        sampling_params: SamplingParams | None = None,
        lora_request: LoRARequest | None = None,
        prompt_adapter_request: None = None,
        streaming: bool = False,
        kv_cache_retention_config: KvCacheRetentionConfig | None = None,
        cache_salt: str | None = None,
    ) -> Result:
        from . import __version__

        params = sampling_params or SamplingParams()
        if cache_salt is not None and __version__ in SURFACE["without_cache_salt"]:
            raise TypeError("generate_async() got an unexpected keyword argument 'cache_salt'")
        if self._refuse in inputs:
            raise ValueError("this sampler has no such thing")
        if self._raise in inputs:
            raise RuntimeError("the executor is not running")
        if params.guided_decoding is not None and not self._guided:
            raise ValueError("guided_decoding needs a guided_decoding_backend")
        if params.end_id is None:
            eos_id = self._engine.info.end_ids[0]
            params.setup(eos_id, lambda word: self._tokenizer.encode(word, add_special_tokens=False).ids)
        if lora_request is not None and not self._adapters:
            raise ValueError("lora_request needs a lora_config")
        result = Result(self, inputs, params, streaming)
        result.reused = self._reused(inputs, cache_salt)
        self._command("add", result)
        return result

    def _reused(self, prompt: list[int], cache_salt: str | None) -> int:
        """Tokens of a prompt that need not be computed: all but the last of one that was here under this salt."""
        known = (cache_salt, tuple(prompt)) in self._known
        self._known.add((cache_salt, tuple(prompt)))
        return len(prompt) - 1 if known else 0

    def logits(self, ids: list[int]) -> torch.Tensor:
        """Of each token, by Transformers."""
        import torch
        from transformers import AutoModelForCausalLM

        if self._model is None:
            self._model = AutoModelForCausalLM.from_pretrained(self._folder, dtype=torch.float32)
        with torch.inference_mode():
            return self._model(torch.tensor([ids])).logits[0]

    def get_stats_async(self, timeout: float | None = 2) -> Any:
        async def records() -> Any:
            await asyncio.sleep(min(timeout or 2, 0.05))
            with self._changed:
                taken, self._records = self._records[-1:], []
            for record in taken:
                yield record

        return records()

    def shutdown(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=5)

    def _command(self, kind: str, result: Result) -> None:
        with self._changed:
            self._commands.append((kind, result))
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._commands or self._closed or self._engine.busy)
                commands, self._commands = self._commands, []
                if self._closed:
                    return
            for kind, result in commands:
                self._obey(kind, result)
            if self._engine.busy:
                for key, output in self._engine.step():
                    self._results[key].receive(output)
            if self._collect:
                self._record()

    def _obey(self, kind: str, result: Result) -> None:
        key = id(result)
        if kind == "add":
            if self._fail_on in result.prompt_token_ids:
                return result.receive(None, RuntimeError("Executor failed process requestId 1"))
            self._results[key] = result
            self._engine.add(key, result.request(), 1)
        elif (output := self._engine.cancel(key)) is not None:
            result.receive(output)

    def _record(self) -> None:
        stats = self._engine.stats
        with self._changed:
            self._records.append(
                {
                    "iter": stats.iterations,
                    "numActiveRequests": stats.active_requests,
                    "numQueuedRequests": stats.waiting_requests,
                    "kvCacheStats": {
                        "maxNumBlocks": stats.kv_blocks_max,
                        "freeNumBlocks": stats.kv_blocks_free,
                        "usedNumBlocks": stats.kv_blocks_used,
                        "tokensPerBlock": stats.tokens_per_block,
                        "reusedBlocks": stats.kv_blocks_reused,
                    },
                    "inflightBatchingStats": {
                        "numScheduledRequests": stats.scheduled_requests,
                        "numContextRequests": stats.context_requests,
                    },
                }
            )


class Result:
    """Upstream's ``RequestOutput``: async-iterable, ``outputs[0]`` with all tokens so far, ``abort``."""

    def __init__(self, llm: LLM, prompt: list[int], params: SamplingParams, streaming: bool) -> None:
        self.prompt_token_ids, self.finished = prompt, False
        self.reused = 0
        self.context_logits = None
        self.outputs = [
            SimpleNamespace(
                token_ids=[],
                logprobs=[],
                cumulative_logprob=None,
                finish_reason=None,
                text="",
                generation_logits=None,
            )
        ]
        self._llm, self._params, self._streaming = llm, params, streaming
        self._loop = asyncio.get_running_loop()  # upstream needs one, too
        self._queue: asyncio.Queue = asyncio.Queue()

    def request(self) -> GenerationRequest:
        params = self._params
        greedy = params.greedy
        return GenerationRequest(
            prompt_ids=self.prompt_token_ids,
            max_tokens=params.max_tokens,
            sampling=OurSampling(
                temperature=1.0 if params.temperature is None else params.temperature,
                top_k=1 if greedy else params.top_k,
                top_p=None if greedy else params.top_p,
                repetition_penalty=params.repetition_penalty or 1.0,
                presence_penalty=params.presence_penalty or 0.0,
                frequency_penalty=params.frequency_penalty or 0.0,
                seed=params.seed,
                min_p=None if greedy else params.min_p,
            ),
            end_id=-1 if params.ignore_eos else None if params.stop_token_ids else params.end_id,
            bad_ids=tuple(tuple(word) for word in params.bad_words()),
            min_tokens=params.min_tokens or 0,
            return_log_probs=self._tells_log_probs(params),
            top_log_probs=params.logprobs or 0,
        )

    @staticmethod
    def _tells_log_probs(params: SamplingParams) -> bool:
        from . import __version__

        if __version__ in SURFACE["log_prob_of_chosen_is_0"]:
            return params.logprobs is not None
        return bool(params.logprobs)

    def abort(self) -> None:
        if self._llm._abort_fails:
            raise RuntimeError("the executor has no such request")
        self._llm._command("cancel", self)

    def receive(self, output: RequestOutput | None, error: Exception | None = None) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, error or output)

    def __aiter__(self) -> Result:
        return self

    async def __anext__(self) -> Result:
        if self.finished:
            raise StopAsyncIteration
        while True:
            received = await self._queue.get()
            if isinstance(received, Exception):
                raise received
            self._add(received)
            if self.finished or self._streaming:
                return self

    def _add(self, received: RequestOutput) -> None:
        (output,) = self.outputs
        output.token_ids = output.token_ids + received.token_ids
        tops = received.top_log_probs or [[]] * len(received.log_probs)
        output.logprobs = output.logprobs + [
            {each: SimpleNamespace(logprob=value, rank=1) for each, value in [(token, chosen), *top]}
            for token, chosen, top in zip(received.token_ids, received.log_probs, tops, strict=False)
        ]
        if received.finish_reason is None:
            return
        self.finished = True
        if self._params.return_context_logits or self._params.return_generation_logits:
            self._add_logits(output)
        reasons = {FinishReason.LENGTH: "length", FinishReason.CANCELLED: "cancelled"}
        output.finish_reason = reasons.get(received.finish_reason, "stop")
        if self._params.return_perf_metrics and received.metrics is not None:
            output.request_perf_metrics = _perf(received.metrics)

    def _add_logits(self, output: SimpleNamespace) -> None:
        prompt = len(self.prompt_token_ids)
        logits = self._llm.logits(self.prompt_token_ids + output.token_ids)
        if self._params.return_context_logits:
            self.context_logits = logits[self.reused : prompt]
        if self._params.return_generation_logits:
            first = prompt - 1 if not self._streaming else prompt - 2 + len(output.token_ids)
            output.generation_logits = logits[first : prompt - 1 + len(output.token_ids)]


def _perf(metrics: Any) -> SimpleNamespace:
    def clock(ns: int) -> datetime.timedelta:
        return datetime.timedelta(microseconds=ns / 1000)

    return SimpleNamespace(
        timing_metrics=SimpleNamespace(
            arrival_time=clock(metrics.arrival_time_ns), first_scheduled_time=clock(metrics.arrival_time_ns)
        ),
        kv_cache_metrics=SimpleNamespace(
            num_new_allocated_blocks=metrics.kv_cache_alloc_new_blocks,
            num_reused_blocks=metrics.kv_cache_reused_blocks,
            num_total_allocated_blocks=metrics.kv_cache_alloc_total_blocks,
        ),
    )


def _check_arguments(arguments: dict[str, Any], version: str) -> None:
    if version not in SURFACE["versions"]:
        raise RuntimeError(f"the facts know no release {version}")
    facts = SURFACE["llm_arguments"]
    for name, versions in facts["removed_in"].items():
        if name in arguments and version in versions:
            raise ValueError(f"{name} has been removed: TorchSampler is the only sampler")
    known = {*facts["common"], *facts["pytorch"]}
    known |= {name for name, versions in facts["pytorch_only_in"].items() if version in versions}
    engine = sorted(arguments.keys() & set(facts["engine_only"]))
    if engine:
        raise ValueError(f"The following arguments are specific to TensorRT backend {engine}")
    unknown = sorted(arguments.keys() - known)
    if unknown:
        raise ValueError(f"LLM got invalid argument: {unknown[0]}")
    if arguments.get("sampler_type", "auto") not in SURFACE["sampler_types"]:
        raise ValueError(f"sampler_type {arguments['sampler_type']} is not one of {SURFACE['sampler_types']}")
