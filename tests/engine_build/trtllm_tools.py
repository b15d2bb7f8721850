"""Stand-ins for ``quantize.py`` and ``trtllm-build`` at the process boundary.

Their command line is what the facts say (``data/quantize_py_args.json``, ``data/trtllm_build_flags.json``): an
argument or value that the real tool does not have ends them with an error. They write what the real ones write:
the files, with the sizes that were asked for, and a log.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

DATA = Path(__file__).parent / "data"
SAYS, FAILS, FORGETS = "TRTLLM_TOOLS_SAY", "TRTLLM_TOOLS_FAIL", "TRTLLM_TOOLS_FORGET"
"""Environment: a line for trtllm-build's log; a line to fail with; a file not to write."""


def quantize_parser() -> argparse.ArgumentParser:
    facts = json.loads((DATA / "quantize_py_args.json").read_text())
    parser = argparse.ArgumentParser(allow_abbrev=False)
    choices = {
        "--qformat": list(facts["qformat_to_result"]),
        "--kv_cache_dtype": ["fp8", "int8"],
        "--dtype": ["auto", "float16", "bfloat16", "float32"],
    }
    for name, default in facts["args"].items():
        kind = int if isinstance(default, int) and not isinstance(default, bool) else str
        parser.add_argument(name, default=default, type=kind, choices=choices.get(name))
    return parser


def build_parser() -> argparse.ArgumentParser:
    facts = json.loads((DATA / "trtllm_build_flags.json").read_text())
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in [*facts["flags"], *facts["plugin_config"]]:
        if flag["values"] == "switch":
            parser.add_argument(flag["flag"], action="store_true")
            continue
        words = [word.split(" ")[0] for word in flag["values"].split("|")]
        parser.add_argument(
            flag["flag"],
            default=flag["default"],
            type=int if flag["values"].startswith("int ") or flag["values"] == "int" else str,
            choices=words if len(words) > 1 and "..." not in words else None,
        )
    return parser


def quantize(arguments: list[str]) -> None:
    asked = quantize_parser().parse_args(arguments)
    facts = json.loads((DATA / "quantize_py_args.json").read_text())
    assert (Path(asked.model_dir) / "config.json").is_file()
    rows = (Path(asked.calib_dataset) / "train.jsonl").read_text().splitlines()
    assert len(rows) == asked.calib_size and all(json.loads(row)["text"] for row in rows)
    config = json.loads((DATA / "engine_config.json").read_text())["pretrained_config"]
    world = asked.tp_size * asked.pp_size
    config["mapping"] = {"world_size": world, "tp_size": asked.tp_size, "pp_size": asked.pp_size}
    config["quantization"] = {
        "quant_algo": facts["qformat_to_result"][asked.qformat]["quant_algo"],
        "kv_cache_quant_algo": facts["kv_cache_dtype_to_kv_cache_quant_algo"][str(asked.kv_cache_dtype)],
    }
    folder = Path(asked.output_dir)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for rank in range(world):
        (folder / f"rank{rank}.safetensors").write_bytes(b"weights")


def build(arguments: list[str]) -> None:
    asked = build_parser().parse_args(arguments)
    config = json.loads((DATA / "engine_config.json").read_text())
    pretrained = json.loads((Path(asked.checkpoint_dir) / "config.json").read_text())
    config["pretrained_config"] = {**pretrained, "logits_dtype": asked.logits_dtype or "float16"}
    built, plugins = config["build_config"], config["build_config"]["plugin_config"]
    for name in ("max_batch_size", "max_seq_len", "max_num_tokens", "max_beam_width"):
        built[name] = getattr(asked, name)
    fp8_kv = pretrained["quantization"]["kv_cache_quant_algo"] == "FP8"
    plugins["use_paged_context_fmha"] = asked.use_paged_context_fmha == "enable"
    plugins["use_fp8_context_fmha"] = asked.use_fp8_context_fmha == "enable" and fp8_kv
    if asked.use_fp8_context_fmha == "enable" and not fp8_kv:
        print("FP8 Paged Context FMHA is disabled because it must be used together with fp8 KV Cache.")
    print(os.environ.get(SAYS, "Total time of building all engines: 00:00:01"))
    folder = Path(asked.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    for rank in range(pretrained["mapping"]["world_size"]):
        if f"rank{rank}.engine" != os.environ.get(FORGETS):
            (folder / f"rank{rank}.engine").write_bytes(b"engine")


def install(folder: Path) -> Path:
    """A folder for PATH with ``python3`` (runs only quantize.py) and ``trtllm-build``."""
    folder.mkdir()
    for name, what in (("python3", "quantize"), ("trtllm-build", "build")):
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {what} "$@"\n')
        path.chmod(0o755)
    return folder


if __name__ == "__main__":
    if os.environ.get(FAILS):
        sys.exit(os.environ[FAILS])
    if sys.argv[1] == "quantize":
        assert sys.argv[2] == "/app/examples/quantization/quantize.py"
        quantize(sys.argv[3:])
    else:
        build(sys.argv[2:])
