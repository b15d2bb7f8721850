"""The two commands that make an engine. Pure functions: ``--dry-run`` prints what a build would run.

Each flag that is given differs from TensorRT-LLM's default, or is a default that a wrong result hides behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flightline.engine_build.errors import BuildError
from flightline.engine_build.plan import Plan

QUANTIZE_SCRIPT = "/app/examples/quantization/quantize.py"
QFORMATS = {"fp8": "fp8", "nvfp4": "nvfp4", "int8_sq": "int8_sq", "int4_awq": "int4_awq", "bf16": "full_prec"}
MAX_SAMPLE_TOKENS = 512
AWQ_BLOCK = 128
LOGITS_DTYPE = "float32"
"""Of the engine; ModelOpt's checkpoints say float16, and Triton's ``logits_datatype`` must agree with the engine."""


def quantize(model_dir: Path, calibration_dir: Path, samples: int, plan: Plan, output_dir: Path) -> list[str]:
    """Hugging Face checkpoint -> calibrated TensorRT-LLM checkpoint, one file for each GPU.

    Args:
        calibration_dir: a data set folder with a ``train`` split and the column ``text``.
        samples: rows of it.
    """
    command = ["python3", QUANTIZE_SCRIPT, "--model_dir", str(model_dir), "--dtype", "bfloat16"]
    command += ["--qformat", QFORMATS[plan.precision]]
    if plan.fp8_kv:  # without it FP8 paged context attention is switched off, in one line of the build's log
        command += ["--kv_cache_dtype", "fp8"]
    if plan.precision == "int4_awq":
        command += ["--awq_block_size", str(AWQ_BLOCK)]
    command += ["--calib_dataset", str(calibration_dir), "--calib_size", str(samples)]
    command += ["--calib_max_seq_length", str(MAX_SAMPLE_TOKENS), "--batch_size", "1"]
    command += ["--tp_size", str(plan.tp), "--pp_size", str(plan.pp), "--output_dir", str(output_dir)]
    return command


def build(
    checkpoint_dir: Path,
    plan: Plan,
    output_dir: Path,
    timing_cache: Path,
    beam_width: int = 1,
    more: Sequence[str] = (),
) -> list[str]:
    """TensorRT-LLM checkpoint -> engine. Its sizes are the plan's: what is not given here is not small.

    Args:
        more: flags that the user adds: ``--lora_plugin``, ``--gather_context_logits`` and the like.

    Raises:
        BuildError: one of them is ours.
    """
    enable = {True: "enable", False: "disable"}
    command = ["trtllm-build", "--checkpoint_dir", str(checkpoint_dir), "--output_dir", str(output_dir)]
    command += ["--max_batch_size", str(plan.max_batch_size), "--max_seq_len", str(plan.max_seq_len)]
    command += ["--max_num_tokens", str(plan.max_num_tokens), "--max_beam_width", str(beam_width)]
    command += ["--kv_cache_type", "paged", "--tokens_per_block", str(plan.block_size)]
    command += ["--remove_input_padding", "enable", "--context_fmha", "enable"]
    command += ["--use_paged_context_fmha", "enable", "--use_fp8_context_fmha", enable[plan.fp8_kv]]
    command += ["--gemm_plugin", _gemm_plugin(plan.precision), "--multiple_profiles", "enable"]
    if plan.tp > 1 and plan.precision == "fp8":
        command += ["--reduce_fusion", "enable"]
    command += ["--logits_dtype", LOGITS_DTYPE, "--workers", str(plan.world_size)]
    command += ["--output_timing_cache", str(timing_cache), "--log_level", "info"]
    if taken := [flag for flag in more if flag.startswith("--") and flag.split("=")[0] in command]:
        raise BuildError(
            f"TRTLLM_BUILD_FLAGS has {taken[0]}, which follows from the plan: leave it out (MAX_SEQ_LEN, "
            "MAX_BATCH_SIZE, PRECISION and TRTLLM_PARAMETERS=max_beam_width=N change it)"
        )
    return [*command, *more]


def _gemm_plugin(precision: str) -> str:
    """TensorRT's own FP8 products are faster than the plugin's; for 16-bit activations it is the other way round."""
    return {"fp8": "disable", "nvfp4": "nvfp4"}.get(precision, "auto")
