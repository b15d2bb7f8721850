"""Stage 5: the engine folder that a backend starts from, and the manifest that says what went into it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flightline.engine_build import record
from flightline.engine_build.errors import PrecisionRefused
from flightline.engine_build.hf_format import write_json
from flightline.engine_build.plan import INTEGERS, Plan
from flightline.engine_build.workspace import new_folder
from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.kernels.cpu.toolchain import NoCompiler, compile_library

LLM_API_FILE = "llm_api.json"
Check = Callable[[Path], dict[str, Any]]


def package(
    folder: Path, model_dir: Path, plan: Plan, key: str, facts: dict[str, Any], check: Check | None = None
) -> list[str]:
    """Writes ``engine.json``, ``manifest.json`` and the compiled CPU kernels for backend torch.

    Args:
        folder: the engine folder.
        model_dir: the checkpoint that the engine loads; stored relative to ``folder``.
        plan: sizes and dtypes.
        key: digest of every input.
        facts: goes into the manifest.
        check: looks at the finished folder before it takes its place; what it returns goes into the manifest.

    Raises:
        PrecisionRefused: the kernels for integers cannot be compiled, or ``check`` refuses.

    Returns what did not go as planned, in words.
    """
    remarks: list[str] = []
    with new_folder(folder) as fresh:
        kernels, dtype = plan.kernels, plan.compute_dtype
        integers = plan.precision in INTEGERS
        if kernels == "native":
            try:
                compile_library(fresh)
            except NoCompiler as error:
                if integers:
                    raise PrecisionRefused(
                        f"PRECISION={plan.precision} needs compiled kernels, and {error}: use PRECISION=bf16"
                    ) from None
                kernels, dtype = "pytorch", plan.build_dtype
                remarks.append(f"kernels pytorch instead of native, in {dtype}: {error}")
        EngineConfig(
            model_dir=os.path.relpath(model_dir, folder),
            device=plan.device,
            compute_dtype=dtype,
            kv_dtype=plan.kv_dtype,
            kernels=kernels,
            kernel_dir="." if kernels == "native" else "",
            weight_precision=plan.weight_precision,
            block_size=plan.block_size,
            num_kv_blocks=plan.num_kv_blocks,
            num_host_kv_blocks=plan.num_host_kv_blocks,
            max_batch_size=plan.max_batch_size,
            max_num_tokens=plan.max_num_tokens,
            max_gap_ms=plan.max_gap_ms,
            max_seq_len=plan.max_seq_len,
            tensor_parallel_size=plan.tp,
        ).save(fresh)
        if check is not None:
            facts = facts | check(fresh)
        record.close(fresh, key, facts | {"kernels": kernels, "remarks": remarks})
    return remarks


def package_llm_api(
    folder: Path, model_dir: Path, plan: Plan, key: str, facts: dict[str, Any], asked: dict[str, str]
) -> list[str]:
    """Writes ``llm_api.json`` and ``manifest.json`` for backend trtllm-pytorch; arguments as of :func:`package`.

    ``asked`` are more settings, as ``LlmConfig`` has them.
    """
    with new_folder(folder) as fresh:
        settings = {
            "model_dir": os.path.relpath(model_dir, folder),
            "dtype": "bfloat16",
            "kv_cache_dtype": "fp8" if plan.fp8_kv else "auto",
            "tensor_parallel_size": plan.tp,
            "pipeline_parallel_size": plan.pp,
            "max_batch_size": plan.max_batch_size,
            "max_num_tokens": plan.max_num_tokens,
            "max_seq_len": plan.max_seq_len,
            # The pool that the plan has left beside the baseline model.
            "kv_cache_tokens": plan.num_kv_blocks * plan.block_size,
            **asked,
        }
        write_json(fresh / LLM_API_FILE, settings)
        record.close(fresh, key, facts | {"kernels": plan.kernels, "remarks": []})
    return []
