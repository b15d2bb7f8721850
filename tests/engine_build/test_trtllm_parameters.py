"""The backend's parameters and the rendered repository of backend trtllm-engine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from flightline.engine_build import repository
from flightline.engine_build.build import TEMPLATES
from flightline.engine_build.errors import BuildError
from flightline.engine_build.plan import make_plan
from flightline.engine_build.trtllm import log
from flightline.engine_build.trtllm.parameters import CHOICES, PARAMETERS, check, for_engine
from tests.engine_build.test_plan import H200, LLAMA_8B
from tests.engine_build.trtllm_tools import DATA

PLAN = make_plan(LLAMA_8B, H200, "trtllm-engine", "fp8")
FACTS = {
    each["key"]: each
    for each in json.loads((DATA / "tensorrt_llm_parameters.json").read_text())["parameters"]
}


def rendered(tmp_path: Path, **asked: str) -> dict[str, model_config_pb2.ModelConfig]:
    values = repository.values_for(
        PLAN, "m", tmp_path / "engine", tmp_path / "source", parameters=asked, logits_type="TYPE_FP16"
    )
    target = tmp_path / "repository"
    repository.write(repository.render(TEMPLATES, values), target)
    configs = {}
    for path in target.glob("*/config.pbtxt"):
        text = path.read_text(encoding="utf-8")
        assert "$" not in text, "a placeholder survived"
        configs[path.parent.name] = text_format.Parse(text, model_config_pb2.ModelConfig())
    return configs


def test_every_parameter_is_reachable_and_no_other() -> None:
    assert PARAMETERS.keys() == FACTS.keys()


@pytest.mark.parametrize("name", sorted(CHOICES.keys() - {"FORCE_CPU_ONLY_INPUT_TENSORS"}))
def test_choices_are_the_documented_ones(name: str) -> None:
    documented = set(re.split(r"[|\s(]+", FACTS[name]["type"]))
    assert set(CHOICES[name]) <= documented


def test_engine_repository(tmp_path: Path) -> None:
    """Fact sheet, §4.2 and §4.3."""
    configs = rendered(tmp_path)
    engine = configs["tensorrt_llm"]
    values = {name: each.string_value for name, each in engine.parameters.items()}
    assert engine.backend == "tensorrtllm"
    assert engine.model_transaction_policy.decoupled  # §0 fact 6
    assert engine.dynamic_batching.default_queue_policy.max_queue_size == 512  # §4.3: 0 is unlimited
    assert [(group.count, group.kind) for group in engine.instance_group] == [
        (1, model_config_pb2.ModelInstanceGroup.KIND_CPU)  # §4.1: the executor owns the GPUs
    ]
    assert values["gpt_model_type"] == "inflight_fused_batching"
    assert values["gpt_model_path"] == str(tmp_path / "engine")
    assert "exclude_input_in_output" not in values  # NVIDIA's default, which its clients count on
    assert values["executor_worker_path"] == FACTS["executor_worker_path"]["default"]
    assert values.keys() <= PARAMETERS.keys()
    assert int(values["max_tokens_in_paged_kv_cache"]) == PLAN.num_kv_blocks * PLAN.block_size
    assert not (tmp_path / "repository/tensorrt_llm/1/model.py").exists()
    assert (tmp_path / "repository/tensorrt_llm/1").is_dir()
    assert configs["preprocessing"].parameters["end_ids_as_stop_words"].string_value == "true"  # §0 fact 11
    assert configs["text_generation"].parameters["engine"].string_value == "tensorrt_llm"


def test_logits_dtype_follows_the_engine(tmp_path: Path) -> None:
    """§2.4, §4.5: the backend asserts that they are equal."""
    for model, name in (("tensorrt_llm", "context_logits"), ("ensemble", "generation_logits")):
        (output,) = [each for each in rendered(tmp_path)[model].output if each.name == name]
        assert output.data_type == model_config_pb2.TYPE_FP16


def test_what_was_asked_for_arrives(tmp_path: Path) -> None:
    asked = {"cuda_graph_mode": "true", "kv_cache_free_gpu_mem_fraction": "0.8", "gpu_device_ids": "0,1;2,3"}
    values = rendered(tmp_path, **asked)["tensorrt_llm"].parameters
    assert {name: values[name].string_value for name in asked} == asked


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("kv_cache_free_gpu_memory_fraction", "0.9", "did you mean kv_cache_free_gpu_mem_fraction"),
        ("worker_path", "/w", "not one of the tensorrtllm backend"),
        ("enable_trt_overlap", "true", "not one of the tensorrtllm backend"),
        ("kv_cache_free_gpu_mem_fraction", "90", "a number from 0 to 1"),
        ("enable_chunked_context", "yes", "true or false"),
        ("enable_chunked_context", "tRuE", "true or false"),  # which the backend would take for false
        ("cuda_graph_cache_size", "-1", "a whole number"),
        ("batch_scheduler_policy", "fair", "guaranteed_no_evict, max_utilization"),
        ("medusa_choices", '"', "text"),
        ("xgrammar_tokenizer_info_path", "${path}", "a path"),
    ],
)
def test_bad_parameter(name: str, value: str, says: str) -> None:
    with pytest.raises(BuildError, match=re.escape(says)):
        check(name, value)


def test_lookahead_needs_all_three(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="set lookahead_ngram_size"):
        for_engine(PLAN, tmp_path, {"decoding_mode": "lookahead", "lookahead_window_size": "4"})


def test_parameters_of_another_lane(tmp_path: Path) -> None:
    other = make_plan(LLAMA_8B, H200, "torch", "fp8")
    with pytest.raises(
        BuildError, match="TRTLLM_PARAMETERS is for the TensorRT-LLM backends, and this is torch"
    ):
        repository.values_for(other, "m", tmp_path, tmp_path, parameters={"cuda_graph_mode": "true"})


def test_every_documented_error_has_a_remedy() -> None:
    for each in json.loads((DATA / "error_signatures.json").read_text())["errors"]:
        sign = log.error_in(f"[TRT-LLM] [E] {each['match']} and so on")
        assert sign is not None and sign.remedy, each["match"]


def test_first_error_of_a_log_wins() -> None:
    text = "x\nNetworks with FP8 Q/DQ layers require hardware with FP8 support\nthen\nNo space left on device"
    assert log.explain(text).endswith("use PRECISION=int8_sq or PRECISION=int4_awq")
    assert log.explain("all went well") == ""


@pytest.mark.parametrize("sign", log.OVERRIDES, ids=lambda sign: sign.text[:30])
def test_silent_overrides_are_found(sign: log.Sign) -> None:
    """§2.1: trtllm-build says so and still ends with status 0."""
    assert log.overrides_in(f"[W] {sign.text}.\nTotal time of building all engines") == [sign]


def test_parameters_that_the_backend_reads_in_any_case(tmp_path: Path) -> None:
    """The sheet's number 1: without them the model does not load; empty is as good as absent."""
    values = {name: each.string_value for name, each in rendered(tmp_path)["tensorrt_llm"].parameters.items()}
    for name in ("tokenizer_dir", "xgrammar_tokenizer_info_path", "guided_decoding_backend"):
        assert values[name] == ""
    with pytest.raises(
        BuildError, match="guided_decoding_backend=xgrammar needs xgrammar_tokenizer_info_path"
    ):
        for_engine(PLAN, tmp_path, {"guided_decoding_backend": "xgrammar"})
