"""``flightline preflight``: what this machine can run, in seconds, before anything is built.

Prints each backend and precision as compatible, low on memory or impossible with the reason, then what would fail
later, then the command to type. Exit code 0 if what was asked for can run, else 1. Needs nothing but Python: it
comes before anything is installed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from flightline.engine_build.errors import BuildError
from flightline.engine_build.hardware import Hardware, cpu
from flightline.engine_build.memory import fp8_build_cost
from flightline.engine_build.plan import AUTO, LANES, ModelShape, Plan, available_precisions, make_plan
from flightline.engine_build.settings import Settings, parse
from flightline.engine_build.shape import Model, look_up
from flightline.engine_build.speed import expected
from flightline.engine_build.trtllm import containers, host, versions
from flightline.supervisor.errors import ServeError
from flightline.supervisor.settings import ServeSettings
from flightline.torch_engine.core.host_memory import free_host_memory

GIB = 1 << 30
COMFORTABLE_SEQUENCES = 8
"""Fewer full-length sequences in the KV cache than this is low on memory: batching is what makes serving fast."""
SHARED_MEMORY = {1: 256 << 20, 2: 8 * GIB}
"""/dev/shm of a server on one GPU or CPU, and on several: Triton's Python models, and NCCL."""
TP_SHOWN = (1, 2, 4, 8)
LINKS = {
    "NVLink": "are connected by NVLink",
    "PCIe": "are connected by PCIe only: with TP each layer waits for its sums, DP does not",
    "": "are connected in a way that nvidia-smi does not tell: TP wants NVLink",
}
COMPATIBLE, LOW, IMPOSSIBLE = "compatible", "low on memory", "impossible"


@dataclass(frozen=True)
class Verdict:
    """One line of the table."""

    lane: str
    precision: str
    verdict: str
    reason: str
    plan: Plan | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report and returns the exit code."""
    try:
        asked = parse(arguments, "flightline preflight")
        model = look_up(asked.model)
        gpus = host.gpus()
        hardware = _hardware(gpus)
        table = verdicts(model.shape, hardware, asked, _tensorrt_llm_problem(gpus))
        chosen = choose(table, asked, hardware)
        problems = failures(model, chosen, asked)
    except (BuildError, ServeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(report(model, hardware, gpus, table, chosen, problems, asked)))
    return 0 if chosen.verdict != IMPOSSIBLE and not problems else 1


def _hardware(gpus: list[host.Gpu]) -> Hardware:
    """The first GPU, else the CPU; torch is not imported, which would take the time of all the rest."""
    if not gpus:
        return cpu()
    first = gpus[0]
    return Hardware(
        device="cuda",
        name=first.name,
        memory_total=first.memory_total,
        memory_free=first.memory_free,
        capability=first.capability,
        cores=len(os.sched_getaffinity(0)),
        tensorrt_llm=versions.installed(),
        count=len(gpus),
        host_memory_free=free_host_memory(),
    )


def _tensorrt_llm_problem(gpus: list[host.Gpu]) -> str:
    """Why no container with TensorRT-LLM would start here; empty if one would."""
    if versions.installed():
        return ""
    if not gpus:
        return "no NVIDIA GPU is visible (nvidia-smi)"
    driver = gpus[0].driver
    if containers.newest_for(containers.driver_version(driver)) is None:
        oldest = containers.CONTAINERS[-1]
        return (
            f"driver {driver} is older than {oldest.driver[0]}, which {oldest.image} wants: update the driver"
        )
    if not shutil.which("docker"):
        return "TensorRT-LLM is not installed and there is no docker: install one of them"
    return ""


def verdicts(shape: ModelShape, hardware: Hardware, asked: Settings, problem: str) -> list[Verdict]:
    """Every backend with every precision; ``problem`` is why TensorRT-LLM cannot run here at all."""
    table = []
    for lane in LANES:
        for precision in _precisions(lane, hardware):
            if lane != "torch" and problem:
                table.append(Verdict(lane, precision, IMPOSSIBLE, problem))
            else:
                table.append(_verdict(lane, precision, shape, hardware, asked))
    return table


def _precisions(lane: str, hardware: Hardware) -> list[str]:
    """What the backend runs here, and what only a GPU without limits would: its refusal names the reason."""
    everything = Hardware("cuda", "", 0, 0, capability=(12, 0))
    here = available_precisions(lane, hardware) if lane == "torch" or hardware.device == "cuda" else ()
    return list(dict.fromkeys((*here, *available_precisions(lane, everything))))


def _verdict(lane: str, precision: str, shape: ModelShape, hardware: Hardware, asked: Settings) -> Verdict:
    installed = versions.installed()
    refusal = versions.refusal(lane, installed) if lane != "torch" and installed else ""
    if refusal:
        return Verdict(lane, precision, IMPOSSIBLE, refusal)
    sizes = (asked.max_seq_len, asked.max_batch_size)
    parallel = (asked.tp, asked.pp)
    engines = asked.dp if lane == "torch" else 1
    try:
        plan = make_plan(
            shape,
            hardware,
            lane,
            precision,
            *sizes,
            *parallel,
            dp=engines,
            max_num_tokens=asked.max_num_tokens,
            max_gap_ms=asked.max_gap_ms,
            host_kv_gib=asked.host_kv_gib if lane == "torch" else 0.0,
        )
    except BuildError as error:
        return Verdict(lane, precision, IMPOSSIBLE, str(error))
    sequences = plan.full_sequences
    room = f"{sequences} sequences of {plan.max_seq_len} tokens at once"
    if sequences < min(COMFORTABLE_SEQUENCES, plan.max_batch_size):
        return Verdict(lane, precision, LOW, f"only {room}: lower MAX_SEQ_LEN", plan)
    return Verdict(lane, precision, COMPATIBLE, room, plan)


def choose(table: list[Verdict], asked: Settings, hardware: Hardware) -> Verdict:
    """The line that ``make bench`` with the same variables would take."""
    lane = asked.engine
    if lane == AUTO:
        usable = versions.installed() and not versions.refusal("trtllm-pytorch", versions.installed())
        lane = "trtllm-pytorch" if usable and hardware.device == "cuda" else "torch"
    mine = [each for each in table if each.lane == lane and asked.precision in (AUTO, each.precision)]
    if not mine:
        known = ", ".join(each.precision for each in table if each.lane == lane)
        raise BuildError(f"PRECISION={asked.precision} is not one of ENGINE={lane}: use {known}")
    return next((each for each in mine if each.verdict != IMPOSSIBLE), mine[0])


def failures(model: Model, chosen: Verdict, asked: Settings) -> list[str]:
    """What would stop the build or the server later on, each with its remedy."""
    found = [
        _disk(model, chosen, asked),
        _host_memory(model, chosen),
        _shared_memory(chosen),
        _triton(chosen),
    ]
    return [problem for problem in [*found, *_ports()] if problem]


def _disk(model: Model, chosen: Verdict, asked: Settings) -> str:
    folder = next(path for path in (asked.build_dir, *asked.build_dir.parents) if path.is_dir())
    needed = model.fetch_bytes + _built_bytes(model.shape, chosen)
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return ""
    return f"disk: {_gib(needed)} are needed and {_gib(free)} are free in {folder}: free some space, or set BUILD_DIR"


def _built_bytes(shape: ModelShape, chosen: Verdict) -> int:
    """Space of everything a build writes."""
    if chosen.lane == "trtllm-engine" and chosen.plan is not None:
        return 2 * chosen.plan.weights_bytes * chosen.plan.world_size + GIB
    if chosen.precision == "fp8" and not shape.fp8:
        return fp8_build_cost(shape.parameters, shape.linear_parameters, False).disk_bytes
    return GIB // 4


def _shared_memory(chosen: Verdict) -> str:
    plan = chosen.plan
    several = plan is not None and plan.world_size > 1 and plan.device == "cuda"
    needed = SHARED_MEMORY[2 if several else 1]
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return "/dev/shm does not exist: Triton's Python models need it"
    if free >= needed:
        return ""
    return (
        f"/dev/shm has {free >> 20} MiB free and {needed >> 20} MiB are needed: start the container with "
        f"--shm-size={'8g' if several else '1g'}"
    )


def _ports() -> list[str]:
    settings = ServeSettings.from_environment()
    taken = []
    for variable, port in settings.ports.items():
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((settings.host, port))
            except OSError:
                taken.append(f"port {port} is taken by {_holder(port)}: set {variable} to a free one")
    return taken


def _holder(port: int) -> str:
    if not _set_up():
        return "another process"
    from flightline.supervisor.processes import holder_of_port

    return holder_of_port(port)


def _set_up() -> bool:
    """The project's packages are installed."""
    return all(importlib.util.find_spec(name) for name in ("numpy", "psutil", "pytriton"))


def _triton(chosen: Verdict) -> str:
    if (chosen.lane != "torch" and not versions.installed()) or not _set_up():
        return ""  # it runs in the container, or comes with make setup
    from flightline.supervisor import triton

    try:
        triton.check_python(triton.find())
    except ServeError as error:
        return str(error)
    return ""


def _host_memory(model: Model, chosen: Verdict) -> str:
    if chosen.precision != "fp8" or model.shape.fp8 or chosen.lane == "trtllm-engine" or chosen.plan is None:
        return ""
    on_gpu = chosen.plan.device == "cuda"
    cost = fp8_build_cost(model.shape.parameters, model.shape.linear_parameters, on_gpu)
    free = free_host_memory()
    if free >= cost.host_bytes:
        return ""
    return (
        f"memory: the FP8 build takes up to {_gib(cost.host_bytes)} of host memory and {_gib(free)} are free: "
        "free some, or use PRECISION=bf16"
    )


def report(
    model: Model,
    hardware: Hardware,
    gpus: list[host.Gpu],
    table: list[Verdict],
    chosen: Verdict,
    problems: list[str],
    asked: Settings,
) -> list[str]:
    """The lines to print."""
    shape = model.shape
    lines = [
        f"machine    {_machine(hardware, gpus)}",
        f"model      {model.name}: {shape.family}, {shape.parameters / 1e6:,.0f}M parameters, "
        f"context {shape.max_position_embeddings}" + (f", {shape.stored}" if shape.stored else ""),
    ]
    if gpus and not versions.installed():
        driver = gpus[0].driver
        if image := containers.newest_for(containers.driver_version(driver)):
            lines.append(f"container  {image.image} (TensorRT-LLM {image.tensorrt_llm}) for driver {driver}")
    lines += [
        "",
        f"{'  lane':<17}{'precision':<11}{'weights':>10}{'KV a token':>12}{'KV cache':>10}  verdict",
    ]
    lines += [_row(each, each is chosen) for each in table]
    lines += [
        "",
        *_speed(shape, chosen, hardware),
        *_cost(model, chosen),
        *_shared(shape, hardware, chosen, asked),
    ]
    lines += [f"problem    {problem}" for problem in problems]
    if chosen.verdict == IMPOSSIBLE:
        lines.append(f"problem    {chosen.reason}")
        possible = [each for each in table if each.verdict != IMPOSSIBLE]
        if possible:
            lines.append(f"next       make preflight {_variables(possible[0], asked)}")
        return lines
    command = "make up" if chosen.lane != "torch" and not versions.installed() else "make bench"
    lines.append(
        f"next       {command} {_variables(chosen, asked)}" + (" (after the problems)" if problems else "")
    )
    return lines


def _row(each: Verdict, chosen: bool) -> str:
    mark = ">" if chosen else " "
    if each.plan is None:
        sizes = f"{'':>10}{'':>12}{'':>10}"
    else:
        per_token = each.plan.kv_bytes / (each.plan.num_kv_blocks * each.plan.block_size) / 1024
        sizes = f"{_gib(each.plan.weights_bytes):>10}{per_token:>8.4g} KiB{_gib(each.plan.kv_bytes):>10}"
    return f"{mark} {each.lane:<15}{each.precision:<11}{sizes}  {each.verdict}: {each.reason}"


def _cost(model: Model, chosen: Verdict) -> list[str]:
    """Memory and time of the FP8 build that is about to run."""
    if chosen.precision != "fp8" or model.shape.fp8 or chosen.plan is None or chosen.lane == "trtllm-engine":
        return []
    on_gpu = chosen.plan.device == "cuda"
    cost = fp8_build_cost(model.shape.parameters, model.shape.linear_parameters, on_gpu)
    memory = f"{_gib(cost.device_bytes)} of GPU memory, " if on_gpu else ""
    return [
        f"FP8 build  at most {memory}{_gib(cost.host_bytes)} of host memory, "
        f"{_gib(cost.disk_bytes)} of disk, {cost.seconds / 60:.0f} minutes"
    ]


def _speed(shape: ModelShape, chosen: Verdict, hardware: Hardware) -> list[str]:
    """What one request may get, of the lane whose kernels are known."""
    speed = expected(shape, chosen.plan, hardware) if chosen.plan and chosen.lane == "torch" else None
    if speed is None:
        return []
    return [
        f"speed      about {speed.tokens_a_second:,.0f} tokens/s for one request: a step reads "
        f"{_gib(speed.step_bytes)} of weights ({speed.basis}); requests that run together share the reading"
    ]


def _shared(shape: ModelShape, hardware: Hardware, chosen: Verdict, asked: Settings) -> list[str]:
    """What each GPU would hold if several shared the model in backend torch, and how they are connected."""
    if (
        chosen.lane != "torch"
        or hardware.device != "cuda"
        or (hardware.count == 1 and chosen.plan is not None)
    ):
        return []
    lines = []
    for tp in TP_SHOWN:
        one = dataclasses.replace(asked, tp=tp, dp=1)
        enough = dataclasses.replace(hardware, count=max(hardware.count, tp))
        verdict = _verdict("torch", chosen.precision, shape, enough, one)
        plan, there = (
            verdict.plan,
            "" if tp <= hardware.count else f" ({hardware.count} of {tp} GPUs are here)",
        )
        held = verdict.reason
        if plan is not None:
            tokens = max(plan.num_kv_blocks * plan.block_size, plan.full_sequences * plan.max_seq_len)
            each = f"{_gib(plan.weights_bytes)} of weights and {_gib(plan.kv_bytes)} of KV cache on each"
            held = f"{each}, {tokens:,} tokens"
        lines.append(f"{f'TP={tp}':<10} {held}{there}")
    if hardware.count > 1:
        lines.append(f"GPUs       {LINKS[host.linked()]}")
    return lines


def _machine(hardware: Hardware, gpus: list[host.Gpu]) -> str:
    if not gpus:
        return f"{hardware.name}, {hardware.cores} cores, {_gib(hardware.memory_free)} free; no NVIDIA GPU"
    capability = ".".join(map(str, hardware.capability or ()))
    return (
        f"{hardware.count} x {hardware.name} (compute capability {capability}), "
        f"{_gib(hardware.memory_free)} free each, driver {gpus[0].driver}"
    )


def _variables(chosen: Verdict, asked: Settings) -> str:
    words = [f"ENGINE={chosen.lane}", f"PRECISION={chosen.precision}"]
    if asked.model:
        words.insert(0, f"MODEL={asked.model}")
    parallel = {"TP": asked.tp, **({"DP": asked.dp} if chosen.lane == "torch" else {"PP": asked.pp})}
    words += [f"{name}={count}" for name, count in parallel.items() if count > 1]
    return " ".join(words)


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"


if __name__ == "__main__":
    sys.exit(main())
