"""Holds each config.pbtxt against the facts about NVIDIA's model repository (data/io_tables.json)."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from flightline.engine_build import repository
from flightline.engine_build.plan import make_plan
from flightline.model_repository.shared.tensors import BY_NAME, TABLE
from tests.engine_build.test_plan import H200, SMALL

TEMPLATES = Path(__file__).parents[2] / "model_repository"
FACTS: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "io_tables.json").read_text())
LLMAPI = FACTS.pop("llmapi")
TEXT_MODELS = ("text_generation", "hf_baseline")
MODELS = (*FACTS, *TEXT_MODELS)
VALUES = {
    "triton_max_batch_size": "4",
    "decoupled_mode": "true",
    "logits_datatype": "TYPE_FP32",
    "encoder_input_features_data_type": "TYPE_FP16",
    "prompt_embedding_table_data_type": "TYPE_FP16",
    "tokenizer_dir": "/tokenizer",
    "engine_dir": "/engine",
    "triton_backend": "python",
    "preprocessing_instance_count": "1",
    "postprocessing_instance_count": "1",
    "engine_instance_count": "1",
    "text_instance_count": "1",
    "max_queue_delay_microseconds": "0",
    "max_queue_size": "0",
    "baseline_model_dir": "/baseline",
    "baseline_dtype": "bfloat16",
    "baseline_max_batch_size": "1",
    "engine_batching": "",
    "model_name": "tiny",
    "engine_parameters": "",
    "end_ids_as_stop_words": "false",
    "text_generation_engine": "process",
    "max_seq_len": "512",
    "lane": "torch",
    "engine_model": "tensorrt_llm",
    "accumulate_tokens": "false",
    "added_inputs": repository.added_inputs(),
}
DTYPE = model_config_pb2.DataType.Name


def config_of(model: str) -> Any:
    template = string.Template((TEMPLATES / model / "config.pbtxt").read_text(encoding="utf-8"))
    return text_format.Parse(template.substitute(VALUES), model_config_pb2.ModelConfig())


def table(tensors: Any) -> list[tuple]:
    """(name, dtype, dims, reshaped to a scalar, optional, ragged) of parsed tensors."""
    return [
        (
            each.name,
            DTYPE(each.data_type),
            tuple(each.dims),
            each.HasField("reshape") and not each.reshape.shape,
            getattr(each, "optional", False),
            getattr(each, "allow_ragged_batch", False),
        )
        for each in tensors
    ]


def expected(tensors: list[dict], optional: tuple[str, ...] = ()) -> list[tuple]:
    """The same of the facts, with more of them ``optional``."""
    return [
        (
            each["name"],
            string.Template(each["dtype"]).substitute(VALUES),
            tuple(each["dims"]),
            each.get("reshape") == [],
            each.get("optional", False) or each["name"] in optional,
            each.get("allow_ragged_batch", False),
        )
        for each in tensors
    ]


ADDED: dict[str, list[tuple[str, str, list[int]]]] = {
    "input": [
        ("input_ids", "TYPE_INT32", [-1]),
        ("stop_token_ids", "TYPE_INT32", [-1]),
        ("ignore_eos", "TYPE_BOOL", [1]),
        ("min_p", "TYPE_FP32", [1]),
        ("logit_bias_ids", "TYPE_INT32", [-1]),
        ("logit_bias_weights", "TYPE_FP32", [-1]),
        ("skip_special_tokens", "TYPE_BOOL", [1]),
        ("top_logprobs", "TYPE_INT32", [1]),
        ("return_prompt_log_probs", "TYPE_BOOL", [1]),
        ("return_token_ids", "TYPE_BOOL", [1]),
        ("return_finish_reason", "TYPE_BOOL", [1]),
        ("return_num_cached_tokens", "TYPE_BOOL", [1]),
        ("counts_at_end", "TYPE_BOOL", [1]),
    ],
    "output": [
        ("finish_reason", "TYPE_STRING", [1]),
        ("token_ids", "TYPE_INT32", [-1]),
        ("num_cached_tokens", "TYPE_INT32", [1]),
        ("top_token_ids", "TYPE_INT32", [-1, -1]),
        ("top_log_probs", "TYPE_FP32", [-1, -1]),
        ("prompt_log_probs", "TYPE_FP32", [-1]),
        ("prompt_top_token_ids", "TYPE_INT32", [-1, -1]),
        ("prompt_top_log_probs", "TYPE_FP32", [-1, -1]),
    ],
}
"""To ``text_generation`` alone."""


def added(model: str, side: str) -> list[tuple]:
    tensors = ADDED[side] if model == "text_generation" else []
    return [(name, dtype, tuple(dims), False, side == "input", False) for name, dtype, dims in tensors]


CHECKED_BY_US = ("text_input", "max_tokens")
"""Optional in our own models: Triton 2.51 only counts a request's inputs, and the model can say which is missing."""


@pytest.mark.parametrize("model", FACTS)
def test_tensors_are_nvidias(model: str) -> None:
    config = config_of(model)
    assert table(config.input) == expected(FACTS[model]["input"])
    assert table(config.output) == expected(FACTS[model]["output"])


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("lane", ["torch", "trtllm-pytorch", "trtllm-engine"])
def test_what_a_lane_serves_is_nvidias(lane: str, decoupled: bool, tmp_path: Path) -> None:
    """The rendered files of each backend, through Triton's schema; no backend changes a tensor."""
    plan = make_plan(SMALL, H200, lane, "bf16")
    values = repository.values_for(plan, "m", tmp_path, tmp_path, decoupled=decoupled)
    rendering = repository.render(TEMPLATES, values)
    for model in MODELS:
        text = rendering[f"{model}/config.pbtxt"].decode()
        config = text_format.Parse(text, model_config_pb2.ModelConfig())
        facts, optional = FACTS.get(model, FACTS["ensemble"]), CHECKED_BY_US if model in TEXT_MODELS else ()
        assert table(config.input) == expected(facts["input"], optional) + added(model, "input")
        outputs = expected(facts["output"]) + added(model, "output")
        assert dict.fromkeys(table(config.output)) == dict.fromkeys(outputs)
        answers_often = model in TEXT_MODELS or (decoupled and model in ("tensorrt_llm", "tensorrt_llm_bls"))
        assert config.model_transaction_policy.decoupled == answers_often
        # A request whose bytes are no strings fails all that Triton hands to a Python stub with it.
        takes_bytes = config.backend == "python" and any(
            DTYPE(each.data_type) == "TYPE_STRING" for each in config.input
        )
        assert not (takes_bytes and config.HasField("dynamic_batching"))


def test_ensemble_is_wired_like_nvidias() -> None:
    steps = [
        {
            "model_name": step.model_name,
            "model_version": step.model_version,
            "input_map": dict(step.input_map),
            "output_map": dict(step.output_map),
        }
        for step in config_of("ensemble").ensemble_scheduling.step
    ]
    assert steps == FACTS["ensemble"]["ensemble_scheduling"]


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_text_models_are_twins_of_the_ensemble(model: str) -> None:
    ensemble, twin = config_of("ensemble"), config_of(model)
    assert table(twin.input) == expected(FACTS["ensemble"]["input"], CHECKED_BY_US) + added(model, "input")
    # NVIDIA lists kv_cache_alloc_total_blocks twice, which Triton takes for one.
    assert table(twin.output) == list(dict.fromkeys(table(ensemble.output))) + added(model, "output")
    assert twin.model_transaction_policy.decoupled


@pytest.mark.parametrize("model", MODELS)
def test_batch_dimension_is_in_front(model: str) -> None:
    assert config_of(model).max_batch_size >= 1


@pytest.mark.parametrize("model", sorted(set(MODELS) - {"postprocessing"}))
def test_every_input_is_read_or_refused(model: str) -> None:
    assert [each.name for each in config_of(model).input if each.name not in BY_NAME] == []


def test_what_text_generation_adds_is_in_the_table() -> None:
    ours = {tensor.name for tensor in TABLE if tensor.ours}
    assert {name for name, _, _ in ADDED["input"]} == ours | {"input_ids"}  # NVIDIA has that one elsewhere


def test_llmapi_is_nvidias() -> None:
    config = config_of("llmapi")
    assert (config.name, config.max_batch_size) == ("tensorrt_llm", 0)
    assert table(config.input) == expected(LLMAPI["input"])
    assert table(config.output) == expected(LLMAPI["output"])


@pytest.mark.parametrize("lane", ["torch", "trtllm-pytorch", "trtllm-engine"])
def test_models_of_the_llmapi_contract(lane: str, tmp_path: Path) -> None:
    """In backend trtllm-engine NVIDIA's backend gives its name away."""
    plan = make_plan(SMALL, H200, lane, "bf16")
    values = repository.values_for(plan, "m", tmp_path, tmp_path, contract="llmapi")
    rendering = repository.render(TEMPLATES, values, "llmapi")
    models = {name.split("/")[0] for name in rendering}
    engine = {"tensorrt_llm_engine"} if lane == "trtllm-engine" else set()
    assert models == {"tensorrt_llm", "text_generation", "hf_baseline"} | engine
    for model in models:
        repository.check_config(rendering[f"{model}/config.pbtxt"].decode(), model)
    assert ('"tensorrt_llm_engine"' in rendering["tensorrt_llm/config.pbtxt"].decode()) == bool(engine)
