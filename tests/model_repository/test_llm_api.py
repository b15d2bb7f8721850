"""Our words for TensorRT-LLM's LLM API, against the contract double: every release, every wrong word."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from model_repository.trtllm import llm_api, server
from model_repository.trtllm.engine import LlmEngine
from model_repository.trtllm.llm_api import LlmConfig, LlmConfigError
from tests.serving import DOUBLE
from tests.tiny import tiny_checkpoint
from torch_engine.request import Code, FinishReason, GenerationRequest, RequestError, SamplingParams
from torch_engine.text import TokenBytes

TOKENS = TokenBytes([b"", b"", b"the", b" dog", b"\xe6"])
ENDS = (1, 9)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(DOUBLE))
    import tensorrt_llm

    yield tensorrt_llm
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorrt_llm"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llm-api") / "tiny")


def config(tiny: Path, **changes: Any) -> LlmConfig:
    sizes = {"max_batch_size": 4, "max_seq_len": 512, "kv_cache_tokens": 4096}
    return LlmConfig(str(tiny), **{**sizes, **changes})


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0", "1.2.1"])
def test_arguments_exist_in_every_release(
    api: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(api, "__version__", version)
    engine = LlmEngine(config(tiny), api)
    assert version in engine.info.description and engine.info.max_seq_len == 512
    engine.close()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("build_config", "specific to TensorRT backend"),
        ("kv_cache_dtype", "invalid argument: kv_cache_dtype"),
        ("enable_trtllm_sampler", "invalid argument: enable_trtllm_sampler"),
    ],
)
def test_the_double_refuses_what_the_facts_do_not_list(api: Any, tiny: Path, name: str, says: str) -> None:
    arguments = llm_api.llm_arguments(config(tiny), "1.2.1", api.llmapi)
    with pytest.raises(ValueError, match=says):
        api.LLM(**arguments, **{name: True})
    with pytest.raises(ValueError, match="extra inputs are not permitted"):
        api.llmapi.KvCacheConfig(free_gpu_mem_fraction=0.9)
    with pytest.raises(TypeError, match="max_new_tokens"):
        api.SamplingParams(max_new_tokens=4)
    with pytest.raises(AttributeError):
        api.BuildCache  # noqa: B018


def test_a_release_that_the_facts_do_not_know(api: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "__version__", "1.4.0")
    with pytest.raises(RuntimeError, match=r"the facts know no release 1\.4\.0"):
        LlmEngine(config(tiny), api)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (GenerationRequest([2], 8), {"max_tokens": 8, "top_k": 1, "stop_token_ids": [1, 9]}),
        (GenerationRequest([2], 8, end_id=-1), {"max_tokens": 8, "top_k": 1, "ignore_eos": True}),
        (GenerationRequest([2], 8, end_id=3), {"max_tokens": 8, "top_k": 1, "end_id": 3}),
        (
            GenerationRequest([2], 8, SamplingParams(0.7, 0, 0.9, 1.2, 0.1, 0.2, 7), min_tokens=2),
            {
                **{"max_tokens": 8, "temperature": 0.7, "top_k": 0, "top_p": 0.9, "seed": 7, "min_tokens": 2},
                **{"repetition_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": 0.2},
                "stop_token_ids": [1, 9],
            },
        ),
        (
            GenerationRequest([2], 8, end_id=-1, bad_ids=((2,), (2, 3)), return_log_probs=True, stop=(b"x",)),
            {
                **{"max_tokens": 8, "top_k": 1, "ignore_eos": True, "logprobs": 1},
                **{"bad_token_ids": [2], "bad": ["the dog"]},
            },
        ),
    ],
)
def test_sampling(api: Any, request_: GenerationRequest, expected: dict[str, Any]) -> None:
    """Fact sheet, section 2.2; ``max_tokens`` is 32 unless given."""
    arguments = llm_api.sampling_arguments(request_, ENDS, TOKENS)
    assert arguments == expected | {"detokenize": False, "return_perf_metrics": True}
    api.SamplingParams(**arguments)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (GenerationRequest([2], 8, bad_ids=((2, 4),)), "tokens that are no text"),
        (GenerationRequest([2], 8, end_id=3, bad_ids=((2, 3),)), "together with end_id are not supported"),
    ],
)
def test_what_the_api_cannot_express_is_refused(request_: GenerationRequest, says: str) -> None:
    with pytest.raises(RequestError, match=says) as refusal:
        llm_api.sampling_arguments(request_, ENDS, TOKENS)
    assert refusal.value.code is Code.UNSUPPORTED


def test_log_probs_of_either_form() -> None:
    assert llm_api.log_prob({5: SimpleNamespace(logprob=-0.5)}, 5) == -0.5
    assert llm_api.log_prob(-0.25, 5) == -0.25


def test_statistics_of_an_idle_engine_show_no_requests() -> None:
    record = {"iter": 7, "kvCacheStats": {"maxNumBlocks": 10, "usedNumBlocks": 4, "tokensPerBlock": 32}}
    record["inflightBatchingStats"] = {"numScheduledRequests": 2, "numContextRequests": 1}
    idle = llm_api.engine_stats(record, 0, 4, 100)
    assert (idle.active_requests, idle.scheduled_requests, idle.kv_blocks_used, idle.kv_blocks_free) == (
        0,
        0,
        0,
        10,
    )
    busy = llm_api.engine_stats(record, 5, 4, 100)
    assert (busy.scheduled_requests, busy.waiting_requests, busy.kv_blocks_free) == (2, 3, 6)
    assert llm_api.engine_stats({}, 1, 4, 0).kv_blocks_max == 0


def run_to_the_end(engine: LlmEngine) -> dict[Any, Any]:
    last = {}
    while engine.busy:
        for key, output in engine.step():
            last[key] = output
    return last


def test_failures_cancellation_and_a_full_queue(
    api: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = threading.active_count()
    monkeypatch.setenv("TRTLLM_DOUBLE_FAIL_ON", "77")
    monkeypatch.setenv("TRTLLM_DOUBLE_REFUSE", "78")
    engine = LlmEngine(config(tiny, max_batch_size=2, max_queue_size=2), api)
    engine.add("fails", GenerationRequest([5, 77], 8), 1)
    engine.add("refused", GenerationRequest([5, 78], 8), 1)
    engine.add("works", GenerationRequest([5, 6], 8, end_id=-1), 1)
    engine.add("leaves", GenerationRequest([5, 6], 400, end_id=-1), 1)
    with pytest.raises(RequestError, match="the queue is full: 2 requests are waiting"):
        engine.add("too much", GenerationRequest([5], 8), 1)
    engine.cancel("leaves")
    last = run_to_the_end(engine)
    assert last["fails"].error.message == "TensorRT-LLM failed: Executor failed process requestId 1"
    assert last["refused"].error.code is Code.INVALID_ARG
    assert last["refused"].error.message.endswith("refused the request: this sampler has no such thing")
    assert (last["works"].finish_reason, last["works"].num_output_tokens) == (FinishReason.LENGTH, 8)
    assert last["leaves"].finish_reason is FinishReason.CANCELLED
    engine.close()
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, r"llm_api.json does not exist: run 'make build-engines' first"),
        ("{", "is damaged"),
        ('{"model_dir": "m", "max_beam_width": 2}', r"unknown settings \['max_beam_width'\]"),
    ],
)
def test_engine_folder(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "llm_api.json").write_text(text)
    with pytest.raises(LlmConfigError, match=says):
        LlmConfig.load(tmp_path)


@pytest.mark.parametrize("version", [None, "0.21.0"])
def test_process_without_a_usable_release(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
) -> None:
    (tmp_path / "llm_api.json").write_text(json.dumps({"model_dir": str(tiny)}))
    if version:
        fake = SimpleNamespace(__version__=version, llmapi=SimpleNamespace())
        monkeypatch.setitem(sys.modules, "tensorrt_llm", fake)
        monkeypatch.setitem(sys.modules, "tensorrt_llm.llmapi", fake.llmapi)
    assert server.main(["--engine-dir", str(tmp_path), "--socket", str(tmp_path / "s")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert ("older than 1.0" if version else "not installed here: run inside nvcr.io") in line
