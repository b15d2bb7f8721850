"""The parameters of Triton's ``tensorrtllm`` backend: all that exist, with their types, and those we set.

What nobody sets is left out of the ``config.pbtxt``, and the backend takes its own default, but for ``READ_ALWAYS``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path

from flightline.engine_build.errors import BuildError
from flightline.engine_build.plan import Plan

WORKER = "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker"
FRACTION, WHOLE, FLAG, TEXT, PATH = (
    "a number from 0 to 1",
    "a whole number",
    "true or false",
    "text",
    "a path",
)
FLAGS = ("true", "True", "TRUE", "1", "false", "False", "FALSE", "0")
"""What the backend reads (``model_state.cc``); anything else is its default there, without a word."""
CHOICES = {
    "gpt_model_type": ("inflight_fused_batching", "inflight_batching", "V1"),
    "batch_scheduler_policy": ("guaranteed_no_evict", "max_utilization"),
    "decoding_mode": (
        *("top_k", "top_p", "top_k_top_p", "beam_search"),
        *("medusa", "redrafter", "lookahead", "eagle"),
    ),
    "guided_decoding_backend": ("xgrammar",),
    "FORCE_CPU_ONLY_INPUT_TENSORS": ("no", "yes"),
}
READ_ALWAYS = ("tokenizer_dir", "xgrammar_tokenizer_info_path", "guided_decoding_backend")
"""Empty where nobody sets them: the backend reads these without asking whether they are there, and does not load
without them (``model_instance_state.cc`` 410-415, ``model_state.cc`` 249-268)."""
PARAMETERS: dict[str, str] = {
    "max_beam_width": WHOLE,
    "FORCE_CPU_ONLY_INPUT_TENSORS": TEXT,
    "gpt_model_type": TEXT,
    "gpt_model_path": PATH,
    "encoder_model_path": PATH,
    "max_tokens_in_paged_kv_cache": WHOLE,
    "max_attention_window_size": TEXT,
    "sink_token_length": WHOLE,
    "batch_scheduler_policy": TEXT,
    "kv_cache_free_gpu_mem_fraction": FRACTION,
    "cross_kv_cache_fraction": FRACTION,
    "kv_cache_host_memory_bytes": WHOLE,
    "kv_cache_onboard_blocks": FLAG,
    "exclude_input_in_output": FLAG,
    "cancellation_check_period_ms": WHOLE,
    "stats_check_period_ms": WHOLE,
    "iter_stats_max_iterations": WHOLE,
    "request_stats_max_iterations": WHOLE,
    "enable_kv_cache_reuse": FLAG,
    "normalize_log_probs": FLAG,
    "enable_chunked_context": FLAG,
    "gpu_device_ids": TEXT,
    "participant_ids": TEXT,
    "num_nodes": WHOLE,
    "lora_cache_optimal_adapter_size": WHOLE,
    "lora_cache_max_adapter_size": WHOLE,
    "lora_cache_gpu_memory_fraction": FRACTION,
    "lora_cache_host_memory_bytes": WHOLE,
    "lora_prefetch_dir": PATH,
    "decoding_mode": TEXT,
    "executor_worker_path": PATH,
    "lookahead_window_size": WHOLE,
    "lookahead_ngram_size": WHOLE,
    "lookahead_verification_set_size": WHOLE,
    "medusa_choices": TEXT,
    "eagle_choices": TEXT,
    "gpu_weights_percent": FRACTION,
    "enable_context_fmha_fp32_acc": FLAG,
    "multi_block_mode": FLAG,
    "cuda_graph_mode": FLAG,
    "cuda_graph_cache_size": WHOLE,
    "speculative_decoding_fast_logits": FLAG,
    "tokenizer_dir": PATH,
    "guided_decoding_backend": TEXT,
    "xgrammar_tokenizer_info_path": PATH,
}


def for_engine(plan: Plan, engine_dir: Path, asked: Mapping[str, str]) -> dict[str, str]:
    """What goes into the engine's ``config.pbtxt``: ours, changed by what the user asked for.

    Raises:
        BuildError: a parameter is unknown, or its value of the wrong type.
    """
    ours = {
        "gpt_model_type": "inflight_fused_batching",
        "gpt_model_path": str(engine_dir),
        "executor_worker_path": WORKER,
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
        "max_beam_width": "1",
        "batch_scheduler_policy": "guaranteed_no_evict",
        "kv_cache_free_gpu_mem_fraction": "0.9",
        # The default pool takes the whole GPU, and the baseline model lives there too.
        "max_tokens_in_paged_kv_cache": str(plan.num_kv_blocks * plan.block_size),
        "enable_kv_cache_reuse": "true",
        "enable_chunked_context": "true",
        "normalize_log_probs": "false",
        "cancellation_check_period_ms": "100",
        "stats_check_period_ms": "100",
        **dict.fromkeys(READ_ALWAYS, ""),
    }
    for name, value in asked.items():
        check(name, value)
    chosen = ours | dict(asked)
    if chosen["guided_decoding_backend"] and not chosen["xgrammar_tokenizer_info_path"]:
        raise BuildError(
            "guided_decoding_backend=xgrammar needs xgrammar_tokenizer_info_path: set it to the file that "
            "/app/examples/generate_xgrammar_tokenizer_info.py makes"
        )
    if chosen.get("decoding_mode") == "lookahead":
        _require_lookahead(chosen)
    return chosen


def check(name: str, value: str) -> None:
    """Raises:
    BuildError: names the parameter, the value and what it should be.
    """
    if name not in PARAMETERS:
        near = difflib.get_close_matches(name, PARAMETERS, 1)
        hint = f"did you mean {near[0]}?" if near else "see docs/VERIFICATION.md for the list"
        raise BuildError(f"parameter {name} is not one of the tensorrtllm backend: {hint}")
    kind = PARAMETERS[name]
    choices = CHOICES.get(name)
    if choices:
        ok, kind = value in choices, "one of " + ", ".join(choices)
    elif kind == FLAG:
        ok = value in FLAGS
    elif kind == WHOLE:
        ok = value.isascii() and value.isdigit()
    elif kind == FRACTION:
        ok = _is_fraction(value)
    else:
        ok = bool(value) and not set(value) & set('"$\n\\')
    if not ok:
        raise BuildError(f"parameter {name}={value} is not valid: it must be {kind}")


def _is_fraction(value: str) -> bool:
    try:
        return 0 <= float(value) <= 1
    except ValueError:
        return False


def _require_lookahead(chosen: Mapping[str, str]) -> None:
    needed = ("lookahead_window_size", "lookahead_ngram_size", "lookahead_verification_set_size")
    missing = [name for name in needed if name not in chosen]
    if missing:
        raise BuildError(f"decoding_mode=lookahead needs {', '.join(needed)}: set {missing[0]}")
