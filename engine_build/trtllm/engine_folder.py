"""An engine folder that ``trtllm-build`` has written: is it whole, and is it what was asked for?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flightline.engine_build.errors import BuildError
from flightline.engine_build.hf_format import read_json
from flightline.engine_build.plan import Plan

LOGITS_TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "bfloat16": "TYPE_BF16"}


def require_built(folder: Path, plan: Plan) -> dict[str, Any]:
    """The engine's ``config.json``.

    Raises:
        BuildError: a file is missing, or a size or option is not the plan's.
    """
    if not (folder / "config.json").is_file():
        raise _unfinished(folder, "config.json is missing")
    config = read_json(folder / "config.json")
    try:
        built, mapping = config["build_config"], config["pretrained_config"]["mapping"]
        plugins = built["plugin_config"]
        facts = {
            "world_size": (mapping["world_size"], plan.world_size),
            "max_batch_size": (built["max_batch_size"], plan.max_batch_size),
            "max_seq_len": (built["max_seq_len"], plan.max_seq_len),
            "max_num_tokens": (built["max_num_tokens"], plan.max_num_tokens),
            "use_paged_context_fmha": (_flag(plugins["use_paged_context_fmha"]), True),
            "use_fp8_context_fmha": (_flag(plugins["use_fp8_context_fmha"]), plan.fp8_kv),
            "kv_cache_type": (str(built["kv_cache_type"]).upper(), "PAGED"),
        }
    except (KeyError, TypeError) as error:
        raise _unfinished(folder, f"config.json lacks {error}") from None
    for name, (found, wanted) in facts.items():
        if found != wanted:
            raise BuildError(
                f"the engine in {folder} has {name}={found}, but {wanted} was asked for: "
                "read build.log beside it and build again with --force"
            )
    for rank in range(plan.world_size):
        path = folder / f"rank{rank}.engine"
        if not path.is_file() or not path.stat().st_size:
            raise _unfinished(folder, f"{path.name} is missing or empty")
    return config


def logits_type(config: dict[str, Any]) -> str:
    """Triton's name of the engine's logits dtype; another one fails an assertion inside the backend."""
    name = config["pretrained_config"].get("logits_dtype", "float32")
    if name not in LOGITS_TYPES:
        raise BuildError(f"the engine's logits_dtype is {name}: use one of {', '.join(LOGITS_TYPES)}")
    return LOGITS_TYPES[name]


def _flag(value: Any) -> bool:
    """Plugin options are spelled as booleans or as words, depending on the release."""
    return value in (True, "enable", "true", "True")


def _unfinished(folder: Path, what: str) -> BuildError:
    return BuildError(f"the engine in {folder} is half-built ({what}): make build-engines again")
