"""What the user asks for: command-line options, each with an environment variable behind it."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine_build.errors import BuildError
from engine_build.plan import AUTO, LANES, PRECISIONS
from engine_build.repository import CONTRACTS, INFLIGHT

MOST = 2**31 - 1
BASELINE_DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Settings:
    """One build."""

    model: str
    engine: str
    precision: str
    calibration: Path | None
    """None = the prompts that ship with us."""
    build_dir: Path
    max_seq_len: int | None
    max_batch_size: int | None
    max_num_tokens: int | None
    baseline_max_batch_size: int
    force: bool
    baseline_dtype: str = "bfloat16"
    tp: int = 1
    pp: int = 1
    dp: int = 1
    parameters: dict[str, str] = field(default_factory=dict)
    """Of Triton's ``tensorrtllm`` backend, by name."""
    build_flags: tuple[str, ...] = ()
    """More flags for ``trtllm-build``."""
    dry_run: bool = False
    decoupled: bool = True
    """Whether NVIDIA's models may answer a request more than once."""
    accumulate_tokens: bool = False
    """Whether each streamed text of ``tensorrt_llm_bls`` is the whole text so far."""
    contract: str = INFLIGHT
    """Whose tensors the model ``tensorrt_llm`` has."""


def parse(arguments: Sequence[str] | None = None) -> Settings:
    """Reads ``arguments`` (the process's own by default); an empty variable counts as unset.

    Raises:
        BuildError: a number is not a positive whole number, a dtype is unknown.
    """
    parser = argparse.ArgumentParser(prog="python -m engine_build", description=__doc__.splitlines()[0])

    def option(flag: str, variable: str, default: str, text: str) -> None:
        parser.add_argument(
            flag,
            default=os.environ.get(variable) or default,
            help=f"{text} [{variable}; {default or 'default'}]",
        )

    option("--model", "MODEL", "", "hub id or local folder; empty: the embedded SmolLM2-135M-Instruct")
    option("--engine", "ENGINE", AUTO, f"lane: auto, {', '.join(LANES)}")
    option("--precision", "PRECISION", AUTO, f"auto, {', '.join(PRECISIONS)}")
    option("--calibration", "CALIB", "", "JSON lines of text, prompt or messages, instead of ours")
    option("--build-dir", "BUILD_DIR", "build", "folder for everything generated")
    option("--max-seq-len", "MAX_SEQ_LEN", "", "prompt plus output of one request, in tokens")
    option("--max-batch-size", "MAX_BATCH_SIZE", "", "requests in flight at once")
    option(
        "--max-num-tokens",
        "MAX_NUM_TOKENS",
        "",
        "tokens of one step: fewer, and long prompts delay others less",
    )
    option("--baseline-max-batch-size", "BASELINE_MAX_BATCH_SIZE", "1", "static batch of the baseline")
    option("--baseline-dtype", "BASELINE_DTYPE", "bfloat16", f"of the baseline: {', '.join(BASELINE_DTYPES)}")
    option("--tp", "TP", "1", "GPUs that share each layer (TensorRT-LLM lanes)")
    option("--pp", "PP", "1", "GPUs that share the layers (TensorRT-LLM lanes)")
    option(
        "--parameters",
        "TRTLLM_PARAMETERS",
        "",
        "of Triton's tensorrtllm backend: name=value, with spaces between",
    )
    option("--build-flags", "TRTLLM_BUILD_FLAGS", "", "more flags for trtllm-build: '--lora_plugin auto'")
    option("--dp", "DP", "1", "whole engines, each on a GPU of its own (ENGINE=torch)")
    option("--model-contract", "MODEL_CONTRACT", INFLIGHT, f"of tensorrt_llm: {', '.join(CONTRACTS)}")
    option(
        "--decoupled", "DECOUPLED", "1", "1: NVIDIA's models stream; 0: they answer once, over ModelInfer too"
    )
    option(
        "--accumulate-tokens", "ACCUMULATE_TOKENS", "0", "1: tensorrt_llm_bls streams the whole text so far"
    )
    parser.add_argument("--force", action="store_true", help="build again even if nothing changed")
    parser.add_argument("--dry-run", action="store_true", help="print commands and files, build nothing")
    found = parser.parse_args(arguments)
    return Settings(
        model=found.model,
        engine=found.engine,
        precision=found.precision,
        calibration=Path(found.calibration) if found.calibration else None,
        build_dir=Path(found.build_dir).absolute(),
        max_seq_len=_positive("MAX_SEQ_LEN", found.max_seq_len),
        max_batch_size=_positive("MAX_BATCH_SIZE", found.max_batch_size),
        max_num_tokens=_positive("MAX_NUM_TOKENS", found.max_num_tokens),
        baseline_max_batch_size=_positive("BASELINE_MAX_BATCH_SIZE", found.baseline_max_batch_size) or 1,
        baseline_dtype=_one_of("BASELINE_DTYPE", found.baseline_dtype, BASELINE_DTYPES),
        force=found.force,
        tp=_positive("TP", found.tp) or 1,
        pp=_positive("PP", found.pp) or 1,
        dp=_positive("DP", found.dp) or 1,
        parameters=_pairs("TRTLLM_PARAMETERS", found.parameters),
        build_flags=tuple(shlex.split(found.build_flags)),
        dry_run=found.dry_run,
        contract=_one_of("MODEL_CONTRACT", found.model_contract, CONTRACTS),
        decoupled=_one_of("DECOUPLED", found.decoupled, ("0", "1")) == "1",
        accumulate_tokens=_one_of("ACCUMULATE_TOKENS", found.accumulate_tokens, ("0", "1")) == "1",
    )


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise BuildError(f"{name}={value} is unknown: use one of {', '.join(allowed)}")
    return value


def _pairs(name: str, value: str) -> dict[str, str]:
    pairs = {}
    try:
        words = shlex.split(value)
    except ValueError as error:
        raise BuildError(f"{name}={value} is not valid ({error}): close its quotes") from None
    for word in words:
        key, equals, what = word.partition("=")
        if not key or not equals:
            raise BuildError(f"{name}: {word!r} is not name=value: write for example cuda_graph_mode=true")
        pairs[key] = what
    return pairs


def _positive(name: str, value: str) -> int | None:
    if value == "":
        return None
    if (
        not value.isascii()
        or not value.isdigit()
        or len(value) > len(str(MOST))
        or not 1 <= int(value) <= MOST
    ):
        raise BuildError(f"{name}={value} is not valid: use a whole number from 1 to {MOST}")
    return int(value)
