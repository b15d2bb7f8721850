"""Our words for TensorRT-LLM's LLM API, against the contract double: every release, every wrong word."""

from __future__ import annotations

import dataclasses
import datetime
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

from flightline.engine_build.trtllm import versions
from flightline.supervisor.trtllm import llm_api, server
from flightline.supervisor.trtllm.engine import LlmEngine
from flightline.supervisor.trtllm.llm_api import LlmConfig, LlmConfigError
from flightline.torch_engine.core.request import (
    Code,
    FinishReason,
    GenerationRequest,
    Guide,
    RequestError,
    SamplingParams,
)
from flightline.torch_engine.text.stream import TokenBytes
from tests.serving import DOUBLE
from tests.tiny import tiny_checkpoint

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


@pytest.mark.parametrize("version", ["1.1.0", "1.2.1", "1.3.0rc24", "1.3.0rc26", "1.4.0rc4"])
def test_what_a_release_has_removed(
    api: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """It is an error there, and not among what we say."""
    monkeypatch.setattr(api, "__version__", version)
    arguments = llm_api.llm_arguments(config(tiny), version, api.llmapi)
    newest = versions.habits(version)
    gone = {name for each in versions.HABITS if each.since <= newest.since for name in each.removed}
    assert gone and not gone & arguments.keys()
    for name in gone:
        with pytest.raises(ValueError, match=name):
            api.LLM(**arguments, **{name: True})


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
            GenerationRequest([2], 8, SamplingParams(min_p=0.1), top_log_probs=2),
            {
                **{"max_tokens": 8, "temperature": 1.0, "min_p": 0.1, "top_p": 1.0},
                **{"stop_token_ids": [1, 9], "logprobs": 2},
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


def test_top_log_probs_are_the_likeliest_whatever_was_chosen() -> None:
    values = {5: -3.0, 6: -0.1, 7: -2.5}
    table = {token: SimpleNamespace(logprob=value) for token, value in values.items()}
    assert llm_api.top_log_probs(table, 2) == [(6, -0.1), (7, -2.5)]


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
    """Raises AssertionError if a request never ends."""
    last, deadline = {}, time.monotonic() + 60
    while engine.busy:
        assert time.monotonic() < deadline, f"without an end: {list(engine.sequences)}"
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
    deadline = time.monotonic() + 60
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


def guided(kind: str, guide: str) -> GenerationRequest:
    return GenerationRequest([2], 8, guide=Guide(kind, guide))


@pytest.mark.parametrize(
    ("kind", "guide", "field", "value"),
    [
        ("json", "", "json_object", True),
        ("json_schema", "{}", "json", "{}"),
        ("regex", "a+", "regex", "a+"),
        ("ebnf_grammar", "root ::= x", "grammar", "root ::= x"),
        ("structural_tag", "{}", "structural_tag", "{}"),
    ],
)
def test_guides(api: Any, kind: str, guide: str, field: str, value: Any) -> None:
    params = api.llmapi.GuidedDecodingParams
    arguments = llm_api.sampling_arguments(guided(kind, guide), ENDS, TOKENS, NOW, params)
    assert getattr(arguments["guided_decoding"], field) == value


@pytest.mark.parametrize(
    ("kind", "guide", "engine_has_it", "says"),
    [
        ("regex", "a+", False, "built without guided decoding: build with TRTLLM_PARAMETERS="),
        ("xml", "a", True, "guided_decoding_guide_type is 'xml': it must be one of json, json_schema"),
    ],
)
def test_guides_that_are_refused(api: Any, kind: str, guide: str, engine_has_it: bool, says: str) -> None:
    params = api.llmapi.GuidedDecodingParams if engine_has_it else None
    with pytest.raises(RequestError, match=says):
        llm_api.sampling_arguments(guided(kind, guide), ENDS, TOKENS, NOW, params)


def with_inputs(**inputs: list[Any]) -> GenerationRequest:
    """Of one row."""
    return GenerationRequest(
        [5], 2, end_id=-1, lane_inputs={name: np.array([value]) for name, value in inputs.items()}
    )


def test_retention_reaches_the_api(api: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    engine = LlmEngine(config(tiny), api)
    generate = engine._llm.generate_async

    def heard(*given: Any, **options: Any) -> Any:
        seen.append(options.get("kv_cache_retention_config"))
        return generate(*given, **options)

    monkeypatch.setattr(engine._llm, "generate_async", heard)
    ranges = {"starts": [0, 4], "ends": [4, -1], "priorities": [100, 10], "durations_ms": [-1, 1500]}
    inputs = {f"retention_token_range_{name}": values for name, values in ranges.items()}
    engine.add("kept", with_inputs(**inputs, retention_decode_priority=[50]), 1)
    engine.add("short", with_inputs(retention_decode_duration_ms=[20]), 1)
    engine.add("plain", with_inputs(), 1)
    with pytest.raises(
        RequestError, match=r"refused the request: Retention priority must be within \[0, 100\]"
    ):
        engine.add("bad", with_inputs(**inputs | {"retention_token_range_priorities": [100, 101]}), 1)
    assert all(last.error is None for last in run_to_the_end(engine).values())
    engine.close()
    kept, short, plain = seen
    of_a_range = api.llmapi.KvCacheRetentionConfig.TokenRangeRetentionConfig
    later = datetime.timedelta(seconds=1.5)
    assert kept.token_range_retention_configs == [of_a_range(0, 4, 100), of_a_range(4, None, 10, later)]
    assert (kept.decode_retention_priority, kept.decode_duration_ms) == (50, None)
    assert short.token_range_retention_configs == [] and short.decode_retention_priority == 35
    assert short.decode_duration_ms == datetime.timedelta(milliseconds=20) and plain is None


def test_retention_that_is_refused(api: Any) -> None:
    request = with_inputs(retention_token_range_starts=[0, 4], retention_token_range_ends=[4])
    with pytest.raises(RequestError, match=r"ends has 1 values: it must have as many as .*_starts, 2"):
        llm_api.retention(request, NOW, api.llmapi)
    with pytest.raises(RequestError, match=r"retention_token_range_starts is given: .* or use 1.2 or later"):
        llm_api.retention(request, versions.habits("1.1.0"), api.llmapi)


def test_top_p_decay(api: Any) -> None:
    decay = {"runtime_top_p_decay": [0.5], "runtime_top_p_min": [0.25], "runtime_top_p_reset_ids": [7]}
    request, newest = with_inputs(**decay), versions.habits("1.4.0rc4")
    arguments = llm_api.sampling_arguments(request, ENDS, TOKENS, newest)
    assert arguments.items() >= {"top_p_decay": 0.5, "top_p_min": 0.25, "top_p_reset_ids": 7}.items()
    api.SamplingParams(**arguments)
    with pytest.raises(
        RequestError, match=r"runtime_top_p_min is 0.25: .* leave runtime_top_p_min out, or use 1.3"
    ):
        llm_api.sampling_arguments(request, ENDS, TOKENS, NOW)
    assert "top_p_decay" not in llm_api.sampling_arguments(
        with_inputs(runtime_top_p_decay=[1.0]), ENDS, TOKENS, NOW
    )


ADAPTER = {"lora_id": [3], "lora_name": [b"mine"], "lora_path": [b"mine"]}


def test_an_adapter_reaches_the_api(
    api: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapters/mine").mkdir(parents=True)
    seen: list[Any] = []
    engine = LlmEngine(config(tiny, lora_dir=str(tmp_path / "adapters")), api)
    generate = engine._llm.generate_async
    monkeypatch.setattr(
        engine._llm,
        "generate_async",
        lambda *given, **options: (seen.append(options.get("lora_request")), generate(*given, **options))[1],
    )
    engine.add("one", with_inputs(**ADAPTER), 1)
    engine.add("plain", with_inputs(), 1)
    assert all(last.error is None for last in run_to_the_end(engine).values())
    engine.close()
    adapter, none = seen
    assert none is None and (adapter.lora_name, adapter.lora_int_id) == ("mine", 3)
    assert (adapter.lora_path, adapter.lora_ckpt_source) == (str(tmp_path / "adapters/mine"), "hf")


@pytest.mark.parametrize(
    ("inputs", "built_with", "says"),
    [
        (
            ADAPTER,
            False,
            "lora_id is given, and this engine was built without adapters: build with TRTLLM_PARA",
        ),
        (
            {"lora_path": [b"mine"]},
            True,
            "lora_path is given: lora_id, lora_name and lora_path belong together",
        ),
        (ADAPTER | {"lora_path": [b".."]}, True, r"lora_path is '\.\.': it must be a folder in"),
        (ADAPTER | {"lora_path": [b"/etc"]}, True, "lora_path is '/etc': it must be a folder in"),
        (ADAPTER | {"lora_path": [b"theirs"]}, True, "lora_path is 'theirs': it must be a folder in"),
        (ADAPTER | {"lora_path": [b"\0mine"]}, True, r"lora_path is .\\x00mine.: it must be a folder in"),
        (ADAPTER | {"lora_ckpt_source": [b"zip"]}, True, "lora_ckpt_source is 'zip': it must be hf or nemo"),
    ],
)
def test_adapters_that_are_refused(
    tmp_path: Path, inputs: dict[str, list[Any]], built_with: bool, says: str
) -> None:
    (tmp_path / "adapters/mine").mkdir(parents=True)
    with pytest.raises(RequestError, match=says):
        llm_api.Adapter.of(with_inputs(**inputs), str(tmp_path / "adapters") if built_with else "")


def with_logits(**changes: Any) -> GenerationRequest:
    request = with_inputs(return_context_logits=[True], return_generation_logits=[True])
    whole = {"prompt_ids": [5, 6, 7], "max_tokens": 4, "stream": False}
    return dataclasses.replace(request, **whole | changes)


def test_logits(api: Any, tiny: Path) -> None:
    """Of the whole prompt, too, when it comes again and its KV blocks are there."""
    engine = LlmEngine(config(tiny), api)
    for key in ("first", "again"):
        engine.add(key, with_logits(), 1)
        tokens: list[int] = []
        while engine.busy:
            for _, last in engine.step():
                tokens += last.token_ids
        context, generated = last.lane_outputs["context_logits"], last.lane_outputs["generation_logits"]
        assert context.shape == (1, 3, engine.info.vocab_size) and context.dtype == np.float32
        assert generated.shape == (1, 1, 4, engine.info.vocab_size)
        assert generated.argmax(-1).ravel().tolist() == tokens
        assert np.array_equal(context[0, -1], generated[0, 0, 0])
    engine.add("plain", with_inputs(return_context_logits=[False]), 1)
    assert not run_to_the_end(engine)["plain"].lane_outputs
    engine.close()


def test_logits_that_did_not_come(api: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused, and no failure of the engine, which three in a row would end."""
    engine = LlmEngine(config(tiny), api)
    monkeypatch.setattr(api.llm.LLM, "_reused", lambda *_: 2)
    for _ in range(3):
        engine.add("short", with_logits(), 1)
        error = run_to_the_end(engine)["short"].error
        assert error.code is Code.UNSUPPORTED and "gave the logits of 1 tokens of 3" in error.message
    assert engine.failed_steps == 0
    engine.close()


@pytest.mark.parametrize(
    ("changes", "version", "says"),
    [
        ({"stream": True}, "1.2.1", "return_context_logits is True in a stream: .* leave stream out"),
        ({}, "1.1.0", "return_context_logits is True: .* or use 1.2 or later"),
        ({"max_tokens": 1000}, "1.2.1", "are 191 MiB, and at most 128 are returned; make it shorter"),
    ],
)
def test_logits_that_are_refused(changes: dict[str, Any], version: str, says: str) -> None:
    with pytest.raises(RequestError, match=says) as error:
        llm_api.require_logits(with_logits(**changes), versions.habits(version), 50_000)
    assert error.value.code is Code.UNSUPPORTED


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
    found = {"tensorrt_llm": "1.2.1"}
    monkeypatch.setattr(versions, "installed", lambda package="tensorrt_llm": found.get(package))
    monkeypatch.setattr(server.np, "__version__", numpy)
    assert server.main(["--engine-dir", str(tmp_path), "--socket", str(tmp_path / "s")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("engine: TensorRT-LLM 1.2.1 ") and says in line
