"""Stage 6: the servable Triton model repository, rendered from the templates in ``model_repository/``.

A template is a folder with a ``config.pbtxt`` that has ``${name}`` placeholders, and a version folder ``1/``.
The rendering is kept in memory until every file of it has been checked.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from pathlib import Path

from flightline.client.params import DECLARED
from flightline.engine_build.errors import BuildError
from flightline.engine_build.plan import Plan
from flightline.engine_build.workspace import new_folder

CONFIG = "config.pbtxt"
VERSION = "1"
TRITON_BACKEND = {"torch": "python", "trtllm-pytorch": "python", "trtllm-engine": "tensorrtllm"}
ENGINE_QUEUE_SIZE = 512
"""Requests that may wait in NVIDIA's backend before it refuses one."""
CORES_FOR_TWO = 8
"""CPU cores from which on two processes tokenise prompts for the ensemble, and two carry text."""
INFLIGHT, LLMAPI = "inflight_batcher_llm", "llmapi"
CONTRACTS = (INFLIGHT, LLMAPI)
"""Whose tensors the model ``tensorrt_llm`` has: NVIDIA's for compiled engines, or those of its LLM API."""
ENGINE_MODEL = "tensorrt_llm_engine"
"""NVIDIA's backend where its usual name is that of the ``llmapi`` model."""
Rendering = dict[str, bytes]
"""Path inside the repository to content."""


def values_for(
    plan: Plan,
    model_name: str,
    engine_dir: Path,
    source_dir: Path,
    baseline_max_batch_size: int = 1,
    *,
    baseline_dtype: str = "bfloat16",
    parameters: Mapping[str, str] | None = None,
    logits_type: str = "TYPE_FP32",
    cores: int = 1,
    decoupled: bool = True,
    accumulate_tokens: bool = False,
    contract: str = INFLIGHT,
) -> dict[str, str]:
    """Every placeholder a template may use.

    Args:
        parameters: of the ``tensorrtllm`` backend, as the user asked for them.
        logits_type: Triton's name of the engine's logits dtype.
        cores: CPU cores of the machine that serves.
        decoupled: whether ``tensorrt_llm``, ``ensemble`` and ``tensorrt_llm_bls`` may answer a request more than
            once; streams and batches need it, ModelInfer and ``/generate`` of some clients need its absence.
        accumulate_tokens: whether each streamed text of ``tensorrt_llm_bls`` is the whole text so far.
        contract: one of ``CONTRACTS``.

    Raises:
        BuildError: a parameter is unknown or of the wrong type, or the backend has none.
    """
    in_triton = plan.lane == "trtllm-engine"
    if parameters and not in_triton:
        _require_llm_api(plan.lane, parameters)
    engine_model = ENGINE_MODEL if contract == LLMAPI else "tensorrt_llm"
    return {
        "model_name": model_name,
        "engine_model": engine_model,
        "triton_backend": TRITON_BACKEND[plan.lane],
        "triton_max_batch_size": str(plan.max_batch_size),
        "decoupled_mode": str(decoupled),
        "accumulate_tokens": str(accumulate_tokens).lower(),
        "lane": plan.lane,
        "engine_dir": str(engine_dir),
        "tokenizer_dir": str(source_dir),
        "logits_datatype": logits_type,
        "encoder_input_features_data_type": "TYPE_FP16",
        "prompt_embedding_table_data_type": "TYPE_FP16",
        "preprocessing_instance_count": "2" if cores >= CORES_FOR_TWO else "1",
        "postprocessing_instance_count": "1",  # two would overtake each other in a stream
        # Each instance is a process that knows all engines; in Triton itself an engine is one instance.
        "engine_instance_count": str(plan.dp),
        "text_instance_count": "1" if in_triton else str(max(plan.dp, 2 if cores >= CORES_FOR_TWO else 1)),
        "max_queue_delay_microseconds": "0",
        "max_queue_size": str(ENGINE_QUEUE_SIZE if in_triton else 0),
        "engine_batching": _engine_batching(plan),
        "engine_parameters": _engine_parameters(plan, engine_dir, source_dir, parameters or {}),
        "text_generation_engine": engine_model if in_triton else "process",
        "end_ids_as_stop_words": "true" if in_triton else "false",
        "max_seq_len": str(plan.max_seq_len),
        "added_inputs": added_inputs(),
        "baseline_model_dir": str(source_dir),
        "baseline_dtype": baseline_dtype,
        "baseline_max_batch_size": str(baseline_max_batch_size),
    }


def added_inputs() -> str:
    """What ``text_generation`` takes beside NVIDIA's inputs, one a line."""
    return ",\n".join(
        f'  {{ name: "{name}" data_type: TYPE_{parameter.wire_type.replace("BYTES", "STRING")} '
        f"dims: [ {-1 if parameter.many else 1} ] optional: true }}"
        for name, parameter in DECLARED.items()
        if parameter.ours
    )


LLM_API_PARAMETERS: dict[str, tuple[str, ...]] = {
    "guided_decoding_backend": ("xgrammar", "llguidance"),
    "lora_dir": (),
}
"""What of ``TRTLLM_PARAMETERS`` backend trtllm-pytorch has, and its values; () = any text."""


def _require_llm_api(lane: str, parameters: Mapping[str, str]) -> None:
    if lane != "trtllm-pytorch":
        raise BuildError(
            f"TRTLLM_PARAMETERS is for the TensorRT-LLM backends, and this is {lane}: leave it out"
        )
    for name, value in parameters.items():
        values = LLM_API_PARAMETERS.get(name)
        if not value or values is None or (values and value not in values):
            raise BuildError(
                f"TRTLLM_PARAMETERS {name}={value}: ENGINE=trtllm-pytorch has guided_decoding_backend=xgrammar or "
                "llguidance, and lora_dir=FOLDER; use ENGINE=trtllm-engine for the others"
            )


def _engine_batching(plan: Plan) -> str:
    """How Triton batches requests for ``tensorrt_llm``: for NVIDIA's backend, which takes its queue limit from there.

    For a Python stub it does not: a request whose bytes are no strings would fail all that share its batch.
    """
    if plan.lane != "trtllm-engine":
        return ""
    return (
        f"dynamic_batching {{\n  preferred_batch_size: [ {plan.max_batch_size} ]\n  max_queue_delay_microseconds: 0\n"
        f"  default_queue_policy {{ max_queue_size: {ENGINE_QUEUE_SIZE} }}\n}}"
    )


def _engine_parameters(plan: Plan, engine_dir: Path, source_dir: Path, asked: Mapping[str, str]) -> str:
    """The ``parameters`` of model ``tensorrt_llm``, one a line."""
    if plan.lane == "trtllm-engine":
        from flightline.engine_build.trtllm.parameters import for_engine

        chosen = for_engine(plan, engine_dir, asked)
    else:
        chosen = {
            "gpt_model_type": "inflight_fused_batching",
            "gpt_model_path": str(engine_dir),
            "tokenizer_dir": str(source_dir),
            "lane": plan.lane,
            "cancellation_check_period_ms": "100",
            "stats_check_period_ms": "100",
        }
    return "\n".join(
        f'parameters {{ key: "{name}" value: {{ string_value: "{value}" }} }}'
        for name, value in chosen.items()
    )


def model_of(template: str, contract: str, lane: str) -> str | None:
    """What the model of a template is called; None = it is not part of this repository."""
    if contract == INFLIGHT:
        return None if template == LLMAPI else template
    names = {LLMAPI: "tensorrt_llm", "text_generation": "text_generation", "hf_baseline": "hf_baseline"}
    if lane == "trtllm-engine":
        names["tensorrt_llm"] = ENGINE_MODEL
    return names.get(template)


def render(templates: Path, values: dict[str, str], contract: str = INFLIGHT) -> Rendering:
    """All files of the repository.

    Raises:
        BuildError: there are no templates, or one of them has a placeholder without a value.
    """
    rendering: Rendering = {}
    for config in sorted(templates.glob(f"*/{CONFIG}")):
        model = config.parent
        name = model_of(model.name, contract, values.get("lane", ""))
        if name is None:
            continue
        rendering[f"{name}/{CONFIG}"] = text = _fill(config, values).encode()
        if b'backend: "tensorrtllm"' in text:
            continue  # NVIDIA's C++ backend, which has no model.py
        for path in sorted((model / VERSION).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                rendering[f"{name}/{path.relative_to(model)}"] = path.read_bytes()
    if not rendering:
        raise BuildError(f"{templates} has no model with a {CONFIG}: the installation is incomplete")
    return rendering


def write(rendering: Rendering, repository: Path) -> bool:
    """Makes ``repository`` hold exactly ``rendering``; returns whether anything had to change.

    The new tree is complete before it takes the place of the old one.

    Raises:
        BuildError: a ``config.pbtxt`` is not a valid ``ModelConfig``, or its name is not its folder's.
    """
    if _on_disk(repository) == rendering:
        return False
    models = {name.split("/")[0] for name in rendering}
    for model in sorted(models):
        check_config(rendering[f"{model}/{CONFIG}"].decode(), model)
    with new_folder(repository) as fresh:
        for model in models:
            (fresh / model / VERSION).mkdir(parents=True)
        for name, content in rendering.items():
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return True


def check_config(text: str, model: str) -> None:
    """Parses one rendered ``config.pbtxt`` with Triton's own protobuf schema.

    Raises:
        BuildError: it does not parse (with the line), or names another model.
    """
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    config = model_config_pb2.ModelConfig()
    try:
        text_format.Parse(text, config)
    except text_format.ParseError as error:
        raise BuildError(f"model_repository/{model}/{CONFIG}: line {error}") from None
    if config.name != model:
        raise BuildError(
            f"model_repository/{model}/{CONFIG}: name is {config.name!r}, but the folder is {model!r}"
        )


def _fill(config: Path, values: dict[str, str]) -> str:
    where = f"model_repository/{config.parent.name}/{CONFIG}"
    template = string.Template(config.read_text(encoding="utf-8"))
    if not template.is_valid():
        raise BuildError(f"{where}: a placeholder is malformed: write it as ${{name}}")
    unknown = sorted(set(template.get_identifiers()) - set(values))
    if unknown:
        raise BuildError(f"{where}: nothing fills ${{{unknown[0]}}}")
    return template.substitute(values)


def _on_disk(repository: Path) -> Rendering | None:
    """What the repository holds now; None if it is not there or lacks a version folder."""
    if not repository.is_dir() or not all((model / VERSION).is_dir() for model in repository.iterdir()):
        return None
    return {
        str(path.relative_to(repository)): path.read_bytes()
        for path in repository.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
