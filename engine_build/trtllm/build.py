"""Runs the two commands, reads their logs, and leaves a whole engine folder or none."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flightline.engine_build.errors import BuildError
from flightline.engine_build.plan import ModelShape, Plan
from flightline.engine_build.prompts import Sample
from flightline.engine_build.trtllm import commands, engine_folder, log

BUILD_LOG = "build.log"
DATA_SETS_BY_NAME = ("cnn_dailymail", "scienceqa")
"""quantize.py takes a folder whose path contains one of these for the public data set of that name."""
Say = Callable[[str], None]


def write_calibration(samples: list[Sample], tokenizer: Any, folder: Path) -> int:
    """A data set of our prompts in the form that quantize.py reads; returns the number of rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"text": sample.render(tokenizer)}, ensure_ascii=False) for sample in samples]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return len(rows)


def require_own_calibration(folder: Path) -> None:
    """Raises:
    BuildError: quantize.py would not read our prompts from ``folder``.
    """
    for name in DATA_SETS_BY_NAME:
        if name in str(folder):
            raise BuildError(
                f"quantize.py takes {folder} for the data set {name}, as the path contains its name: "
                "set BUILD_DIR to a folder without it"
            )


def disk_bytes(shape: ModelShape, plan: Plan) -> int:
    """Space that a build takes: the TensorRT-LLM checkpoint and the engine, each about as large as the weights."""
    return 2 * plan.weights_bytes * plan.world_size + (1 << 30)


def require_disk(folder: Path, shape: ModelShape, plan: Plan) -> None:
    """Raises:
    BuildError: the disk would be full in the middle of the build.
    """
    needed, free = disk_bytes(shape, plan), shutil.disk_usage(folder).free
    if free < needed:
        raise BuildError(
            f"the build needs {needed >> 30} GiB in {folder} and {free >> 30} GiB is free: "
            "free some space, or set BUILD_DIR to another disk"
        )


def dry_run(
    source: Path,
    samples: int,
    plan: Plan,
    work: Path,
    engine_dir: Path,
    beam_width: int = 1,
    more: Sequence[str] = (),
) -> list[str]:
    """The commands and files of a build, as lines to print. Raises BuildError as ``run`` would."""
    calibration, checkpoint = work / "calibration", work / "checkpoint"
    require_own_calibration(calibration)
    steps = (
        commands.quantize(source, calibration, samples, plan, checkpoint),
        commands.build(checkpoint, plan, engine_dir, work / "model.cache", beam_width, more),
    )
    files = ["config.json", *(f"rank{rank}.engine" for rank in range(plan.world_size)), BUILD_LOG]
    lines = [f"write  {calibration}/train.jsonl ({samples} prompts)"]
    lines += [f"run    {shlex.join(step)}" for step in steps]
    return lines + [f"write  {engine_dir}/{name}" for name in [*files, "manifest.json"]]


def run(
    source: Path,
    samples: list[Sample],
    tokenizer: Any,
    plan: Plan,
    work: Path,
    engine_dir: Path,
    beam_width: int = 1,
    more: Sequence[str] = (),
) -> dict[str, Any]:
    """Builds into ``engine_dir`` (empty) with ``work`` for what is needed only meanwhile.

    Returns the engine's ``config.json``.

    Raises:
        BuildError: a command failed, the builder switched off what was asked for, or BUILD_DIR misleads quantize.py.
    """
    require_own_calibration(work / "calibration")
    rows = write_calibration(samples, tokenizer, work / "calibration")
    checkpoint, build_log = work / "checkpoint", engine_dir / BUILD_LOG
    quantize = commands.quantize(source, work / "calibration", rows, plan, checkpoint)
    build = commands.build(checkpoint, plan, engine_dir, work / "model.cache", beam_width, more)
    with build_log.open("w", encoding="utf-8") as sink:
        _run(quantize, sink)
        _run(build, sink)
    text = build_log.read_text(encoding="utf-8", errors="replace")
    if switched_off := log.overrides_in(text):
        raise BuildError(f"trtllm-build: {switched_off[0].text}: {switched_off[0].remedy}")
    return engine_folder.require_built(engine_dir, plan)


def _run(command: list[str], sink: Any) -> None:
    """Runs one command with its output in the log. Raises BuildError with the remedy, or the last line."""
    sink.write(f"$ {shlex.join(command)}\n")
    sink.flush()
    start = sink.tell()
    try:
        # A clone of TensorRT-LLM as working folder would hide the installed package.
        status = subprocess.run(
            command, cwd="/", stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT
        ).returncode
    except FileNotFoundError:
        raise BuildError(f"{command[0]} was not found: build inside NVIDIA's container (make up)") from None
    if status == 0:
        return
    with open(sink.name, encoding="utf-8", errors="replace") as source:
        source.seek(start)
        said = source.read()
    last = (said.strip().splitlines() or ["no output"])[-1]
    program = Path(command[1] if command[0].startswith("python") else command[0]).name
    raise BuildError(f"{program} ended with status {status}: {log.explain(said) or last}")
