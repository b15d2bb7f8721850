"""What the user asks of a build."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flightline.engine_build.errors import BuildError
from flightline.engine_build.plan import AUTO, LANES, PRECISIONS
from flightline.engine_build.repository import CONTRACTS, INFLIGHT
from flightline.settings import MOST, load, setting

BASELINE_DTYPES = ("bfloat16", "float16", "float32")


def _pairs(text: str) -> dict[str, str]:
    pairs = {}
    for word in _words(text):
        key, equals, what = word.partition("=")
        if not key or not equals:
            raise ValueError(f"{word!r} is not name=value: write for example cuda_graph_mode=true")
        pairs[key] = what
    return pairs


def _words(text: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ValueError(f"{error}: close its quotes") from None


@dataclass(frozen=True)
class Settings:
    """Build what the server serves: checkpoint, engine and model repository, each only if its inputs changed."""

    model: str = setting("", "hub id or local folder; empty: the embedded SmolLM2-135M-Instruct")
    engine: str = setting(AUTO, f"lane: auto, {', '.join(LANES)}", choices=(AUTO, *LANES))
    precision: str = setting(AUTO, f"auto, {', '.join(PRECISIONS)}", choices=(AUTO, *PRECISIONS))
    calibration: Path | None = setting(
        None, "JSON lines of text, prompt or messages, instead of ours", variable="CALIB"
    )
    build_dir: Path = setting(Path("build"), "folder for everything generated")
    max_seq_len: int | None = setting(
        None, "prompt plus output of one request, in tokens", least=1, most=MOST
    )
    max_batch_size: int | None = setting(None, "requests in flight at once", least=1, most=MOST)
    max_num_tokens: int | None = setting(
        None, "tokens of one step: fewer, and long prompts delay others less", least=1, most=MOST
    )
    max_gap_ms: int | None = setting(
        None,
        "longest wait of a stream for the prompts of others, which are cut to fit (ENGINE=torch)",
        least=1,
        most=MOST,
    )
    host_kv_gib: float = setting(
        0.0,
        "GiB of host memory, of all engines together, where the prefix cache goes on (ENGINE=torch)",
        least=0,
        most=MOST,
    )
    tp: int = setting(1, "GPUs that share each layer", least=1, most=MOST)
    pp: int = setting(1, "GPUs that share the layers (TensorRT-LLM backends)", least=1, most=MOST)
    dp: int = setting(1, "whole engines, each on GPUs of its own (ENGINE=torch)", least=1, most=MOST)
    parameters: dict[str, str] = setting(
        dict,
        "of Triton's tensorrtllm backend: name=value, with spaces between",
        parse=_pairs,
        variable="TRTLLM_PARAMETERS",
    )
    build_flags: tuple[str, ...] = setting(
        (),
        "more flags for trtllm-build: '--lora_plugin auto'",
        parse=_words,
        variable="TRTLLM_BUILD_FLAGS",
    )
    contract: str = setting(
        INFLIGHT,
        f"whose tensors the model tensorrt_llm has: {', '.join(CONTRACTS)}",
        choices=CONTRACTS,
        variable="MODEL_CONTRACT",
        flag="--model-contract",
    )
    decoupled: bool = setting(
        True, "let NVIDIA's models stream, instead of answering once (over ModelInfer and /generate too)"
    )
    accumulate_tokens: bool = setting(False, "let tensorrt_llm_bls stream the whole text so far")
    baseline_max_batch_size: int = setting(1, "static batch of the baseline", least=1, most=MOST)
    baseline_dtype: str = setting(
        "bfloat16", f"of the baseline: {', '.join(BASELINE_DTYPES)}", choices=BASELINE_DTYPES
    )
    force: bool = setting(False, "build again even if nothing changed", variable="")
    dry_run: bool = setting(False, "print commands and files, build nothing", variable="")


def parse(arguments: Sequence[str] | None = None, program: str = "flightline build") -> Settings:
    """Reads ``arguments`` (the process's own by default) and the environment.

    Raises:
        BuildError: a value that is not allowed.
    """
    return absolute(load(Settings, program, arguments, BuildError))


def absolute(settings: Settings) -> Settings:
    """The build folder is named in what is built: it must not depend on the working folder."""
    return replace(settings, build_dir=settings.build_dir.absolute())
