"""Our words for TensorRT-LLM's LLM API, against the contract double: every release, every wrong word."""

from __future__ import annotations

import importlib.abc
import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from model_repository.trtllm import llm_api, server, versions
from model_repository.trtllm.engine import LlmEngine
from model_repository.trtllm.llm_api import LlmConfig, LlmConfigError
from tests.serving import DOUBLE
from tests.tiny import tiny_checkpoint
from torch_engine.request import Code, FinishReason, GenerationRequest, RequestError, SamplingParams
from torch_engine.text import TokenBytes

TOKENS = TokenBytes([b"", b"", b"the", b" dog", b"\xe6"])
ENDS = (1, 9)
NOW = versions.habits("1.2.1")


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


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0", "1.2.1", "1.3.0rc24", "1.3.0rc26", "1.4.0rc4"])
def test_every_release_serves(api: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Each takes our arguments, and gives a log-prob with each token."""
    monkeypatch.setattr(api, "__version__", version)
    engine = LlmEngine(config(tiny), api)
    assert version in engine.info.description and engine.info.max_seq_len == 512
    engine.add("one", GenerationRequest([5, 6], 4, end_id=-1, return_log_probs=True), 1)
    last = run_to_the_end(engine)["one"]
    assert last.error is None and last.cum_log_prob < 0
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
    monkeypatch.setattr(api, "__version__", "1.9.0")
    with pytest.raises(RuntimeError, match=r"the facts know no release 1\.9\.0"):
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
        # NVIDIA's client sends a top-p of 0 along with a top-k, and their backend drops it.
        (
            GenerationRequest(
                [2],
                8,
                SamplingParams(top_k=5, top_p=0.0),
                stop_ids=(7,),
                top_log_probs=3,
                return_log_probs=True,
            ),
            {"max_tokens": 8, "temperature": 1.0, "top_k": 5, "stop_token_ids": [1, 9, 7], "logprobs": 3},
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
    arguments = llm_api.sampling_arguments(request_, ENDS, TOKENS, NOW)
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
        llm_api.sampling_arguments(request_, ENDS, TOKENS, NOW)
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


@pytest.mark.parametrize("where", ["RAISE", "FAIL_ON"])
def test_any_exception_of_the_api_ends_its_request_alone(
    api: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """RuntimeError from ``generate_async`` or its iterator: the slot comes back, the queue has room as before."""
    monkeypatch.setenv(f"TRTLLM_DOUBLE_{where}", "77")
    engine = LlmEngine(config(tiny, max_batch_size=1, max_queue_size=1), api)
    for _ in range(3):
        engine.add("bad", GenerationRequest([5, 77], 8), 1)
        engine.add("good", GenerationRequest([5, 6], 8, end_id=-1), 1)
        last = run_to_the_end(engine)
        assert last["bad"].error.code is Code.INTERNAL and "TensorRT-LLM failed" in last["bad"].error.message
        assert (last["good"].finish_reason, last["good"].num_output_tokens) == (FinishReason.LENGTH, 8)
        assert not engine.sequences
    engine.close()


def test_an_abort_that_fails_ends_the_request_all_the_same(
    api: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRTLLM_DOUBLE_ABORT_FAILS", "1")
    engine = LlmEngine(config(tiny), api)
    engine.add("leaves", GenerationRequest([5, 6], 400, end_id=-1), 1)
    while not engine.step():
        pass
    engine.cancel("leaves")
    assert run_to_the_end(engine)["leaves"].finish_reason is FinishReason.CANCELLED
    assert "abort failed: RuntimeError" in capfd.readouterr().err
    engine.close()


def test_a_read_that_fails_here_stops_the_generation_there(
    api: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs without the token that was chosen, say: nobody reads on, so TensorRT-LLM must not generate on."""
    aborted: list[Any] = []
    monkeypatch.setattr(
        api.llm.Result,
        "abort",
        lambda result: (aborted.append(result), result._llm._command("cancel", result)),
    )
    monkeypatch.setattr(
        llm_api, "log_prob", lambda entry, token: (_ for _ in ()).throw(LookupError("not there"))
    )
    engine = LlmEngine(config(tiny), api)
    engine.add("one", GenerationRequest([5, 6], 400, end_id=-1, return_log_probs=True), 1)
    last = run_to_the_end(engine)["one"]
    assert last.error.code is Code.INTERNAL and "not there" in last.error.message
    engine.close()
    assert len(aborted) == 1


def test_a_bias_beyond_the_vocabulary_is_refused() -> None:
    request = GenerationRequest([5], 2, SamplingParams(logit_bias=((5, 1.0),)))
    with pytest.raises(
        RequestError, match="logit_bias names token 5: this model has 5 tokens, 0 to 4"
    ) as error:
        llm_api.embedding_bias(request, 5)
    assert error.value.code is Code.INVALID_ARG


def guided(kind: bytes, guide: bytes) -> GenerationRequest:
    inputs = {"guided_decoding_guide_type": kind, "guided_decoding_guide": guide}
    return GenerationRequest(
        [2], 8, lane_inputs={name: np.array([[value]], dtype=np.object_) for name, value in inputs.items()}
    )


@pytest.mark.parametrize(
    ("kind", "guide", "field", "value"),
    [
        (b"json", b"", "json_object", True),
        (b"json_schema", b"{}", "json", "{}"),
        (b"regex", b"a+", "regex", "a+"),
        (b"ebnf_grammar", b"root ::= x", "grammar", "root ::= x"),
    ],
)
def test_guides(api: Any, kind: bytes, guide: bytes, field: str, value: Any) -> None:
    params = api.llmapi.GuidedDecodingParams
    arguments = llm_api.sampling_arguments(guided(kind, guide), ENDS, TOKENS, NOW, params)
    assert getattr(arguments["guided_decoding"], field) == value


@pytest.mark.parametrize(
    ("kind", "guide", "engine_has_it", "says"),
    [
        (b"regex", b"a+", False, "built without guided decoding: build with TRTLLM_PARAMETERS="),
        (b"xml", b"a", True, "guided_decoding_guide_type is 'xml': it must be one of json, json_schema"),
        (b"regex", b"", True, "guided_decoding_guide is empty: regex needs one"),
        (b"regex", b"\xff", True, "guided_decoding_guide is not UTF-8"),
    ],
)
def test_guides_that_are_refused(api: Any, kind: bytes, guide: bytes, engine_has_it: bool, says: str) -> None:
    params = api.llmapi.GuidedDecodingParams if engine_has_it else None
    with pytest.raises(RequestError, match=says):
        llm_api.sampling_arguments(guided(kind, guide), ENDS, TOKENS, NOW, params)


def test_a_bias_reaches_the_sampler_as_a_tensor(
    api: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    engine = LlmEngine(config(tiny, guided_decoding="xgrammar"), api)
    monkeypatch.setattr(
        engine, "_sampling", lambda **given: (seen.append(given), api.SamplingParams(**given))[1]
    )
    engine.add(
        "one", GenerationRequest([5], 2, SamplingParams(logit_bias=((7, 1.5), (7, 1.0))), end_id=-1), 1
    )
    assert run_to_the_end(engine)["one"].error is None
    bias = seen[0]["embedding_bias"]
    assert bias.shape == (engine.info.vocab_size,) and bias[7] == 2.5 and bias.sum() == 2.5
    engine.close()


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


@pytest.mark.parametrize(
    ("raised", "numpy", "says"),
    [
        # FlashInfer makes ~/.cache/flashinfer when it is imported; NVIDIA's user has no home.
        (
            PermissionError(13, "Permission denied", "/home/triton-server"),
            "1.26.4",
            "cannot be imported (PermissionError: [Errno 13] Permission denied: '/home/triton-server'): set HOME to",
        ),
        (
            ImportError("libnvinfer.so.10"),
            "1.26.4",
            "cannot be imported (ImportError: libnvinfer.so.10): use nvcr",
        ),
        # The import itself fails with a NumPy that is too new: that is the cause to name.
        (
            ImportError("numpy.core.multiarray failed to import"),
            "2.1.0",
            "needs numpy<2 and 2.1.0 is installed",
        ),
    ],
)
def test_an_installed_release_that_cannot_be_imported(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    raised: Exception,
    numpy: str,
    says: str,
) -> None:
    class Broken(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, *_: Any) -> None:
            if name.partition(".")[0] == "tensorrt_llm":
                raise raised

    (tmp_path / "llm_api.json").write_text(json.dumps({"model_dir": str(tiny)}))
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.setattr(versions, "installed", lambda: "1.2.1")
    monkeypatch.setattr(server.np, "__version__", numpy)
    assert server.main(["--engine-dir", str(tmp_path), "--socket", str(tmp_path / "s")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("engine: TensorRT-LLM 1.2.1 ") and says in line
