"""Stage 2: model shape and hardware to backend, precision and memory budget. A pure function that gives reasons."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from flightline.engine_build.errors import BuildError
from flightline.engine_build.hardware import Hardware
from flightline.engine_build.memory import kv_bytes_per_token, weight_bytes
from flightline.engine_build.trtllm import versions
from flightline.torch_engine.core.config import FP8_CAPABILITY
from flightline.torch_engine.core.layer_groups import LayerGroups

LANES = ("trtllm-engine", "trtllm-pytorch", "torch")
PRECISIONS = ("fp8", "nvfp4", "int8", "int4", "int8_sq", "int4_awq", "bf16")
INTEGERS = ("int4", "int8")
"""Lane torch, the faster on a CPU first: weights and activations are integers, made of unquantised weights at load."""
INT8_CAPABILITIES = ((8, 0), (10, 0))
"""Compute capabilities, the second excluded, that offer int8: newer ones have FP8 and few integer tensor cores."""
AUTO = "auto"

FP4 = "FP4"
"""In the name of such a checkpoint's format: codes of which no kernel of integers on a CPU has four bits."""
NVFP4 = "NVFP4"
"""As well: a scale for 16 weights."""
NVFP4_CAPABILITY = (10, 0)
BF16_CAPABILITY = (8, 0)
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BLOCK_SIZE = 16
TRTLLM_BLOCK_SIZE = 32
MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a checkpoint that decide memory. Counts, not bytes."""

    layers: int
    kv_heads: int
    head_dim: int
    max_position_embeddings: int
    parameters: int
    linear_parameters: int
    """Of those, the weights of the decoder's linear layers: what FP8 halves."""
    idle_parameters: int = 0
    """Of all, what a step for one token does not read: the embedding beside an output head of its own."""
    idle_linear_parameters: int = 0
    """Of the linear ones, those of experts that one token does not choose."""
    family: str = ""
    """Architecture, as ``config.json`` names it."""
    fp8: bool = False
    """The checkpoint is FP8 already."""
    int4: bool = False
    """The checkpoint is of 4-bit codes already."""
    stored: str = "bf16"
    """How the linears are stored, in words."""
    windows: tuple[int | None, ...] = ()
    """Of each layer, as ``LayerSpec`` has it; empty: none has one."""
    splits: tuple[int, ...] | None = None
    """Numbers of GPUs above 1 that can share each layer in backend torch; None: nobody has looked."""


@dataclass(frozen=True)
class Plan:
    """What will be built. Sizes in tokens, memory in bytes."""

    lane: str
    precision: str
    device: str
    compute_dtype: str
    """Of the engine's activations."""
    build_dtype: str
    """Of the calibration and the accuracy gate, which run Transformers' own code."""
    kernels: str
    """``cuda``, ``native`` (CPU kernels compiled for this machine) or ``pytorch``."""
    max_seq_len: int
    max_batch_size: int
    max_num_tokens: int
    block_size: int
    num_kv_blocks: int
    kv_bytes: int
    weights_bytes: int
    reasons: tuple[str, ...]
    tp: int = 1
    """GPUs that share each layer."""
    pp: int = 1
    """GPUs that share the layers."""
    dp: int = 1
    """Whole engines, each on a GPU of its own; the other numbers are of one."""
    max_gap_ms: int = 0
    """Of lane torch; 0: no bound."""
    kv_dtype: str = "auto"
    """Of backend torch: see :class:`EngineConfig`."""
    num_host_kv_blocks: int = 0
    """The same."""
    sequence_blocks: int = 0
    """What a sequence of ``max_seq_len`` takes of ``num_kv_blocks`` at most: layers with a window keep it alone."""

    @property
    def full_sequences(self) -> int:
        """Of ``max_seq_len``, that fit at once."""
        return self.num_kv_blocks // self.sequence_blocks

    @property
    def weight_precision(self) -> str:
        """Lane torch, as ``EngineConfig`` has it: on a GPU 4-bit codes are only ever the checkpoint's own."""
        if self.precision not in INTEGERS or (self.precision == "int4" and self.device != "cpu"):
            return "auto"
        return self.precision

    @property
    def world_size(self) -> int:
        return self.tp * self.pp

    @property
    def fp8_kv(self) -> bool:
        """On TensorRT-LLM, FP8 weights without an FP8 KV cache lose FP8 paged context attention."""
        return self.lane != "torch" and self.precision in ("fp8", "nvfp4")


def make_plan(
    shape: ModelShape,
    hardware: Hardware,
    lane: str = AUTO,
    precision: str = AUTO,
    max_seq_len: int | None = None,
    max_batch_size: int | None = None,
    tp: int = 1,
    pp: int = 1,
    refused: tuple[str, ...] = (),
    dp: int = 1,
    max_num_tokens: int | None = None,
    max_gap_ms: int | None = None,
    kv_dtype: str | None = None,
    host_kv_gib: float = 0.0,
) -> Plan:
    """Decides everything the engine needs to know.

    ``refused`` are precisions that ``auto`` must not choose, because an attempt to build them has failed;
    ``kv_dtype`` is the KV cache to take instead of the first choice, for the same reason.

    Raises:
        BuildError: the request cannot work on this hardware; the message names the alternative.
    """
    reasons = [hardware.note] if hardware.note else []
    lane = _choose_lane(lane, hardware, reasons)
    tries_tp = hardware.device == "cpu" and tp > 1 and lane == "torch"
    if tries_tp:
        reasons.append(
            f"kernels pytorch: TP={tp} on a CPU is for trying it out; the compiled ones are faster, in one process"
        )
        hardware = dataclasses.replace(hardware, compiler=None)
    precision = _choose_precision(precision, lane, shape, hardware, reasons, refused)
    _require_gpus(lane, tp, pp, shape, hardware)
    _require_engines(lane, dp, tp, hardware, reasons)
    if max_gap_ms and lane != "torch":
        raise BuildError(
            f"MAX_GAP_MS={max_gap_ms} is for ENGINE=torch, not {lane}: set MAX_NUM_TOKENS instead"
        )
    if host_kv_gib and lane != "torch":
        raise BuildError(f"HOST_KV_GIB={host_kv_gib:g} is for ENGINE=torch, not {lane}: leave it out")
    build_dtype = "bfloat16" if hardware.fast_bf16 else "float32"
    kernels = "pytorch" if tries_tp else _choose_kernels(lane, hardware, reasons)
    dtype = _compute_dtype(precision, kernels, build_dtype, hardware, reasons)
    on_cpu = hardware.device == "cpu"
    if on_cpu:  # its engines share the memory; of GPUs each has one
        hardware = dataclasses.replace(hardware, memory_free=hardware.memory_free // dp)

    length = _sequence_length(max_seq_len, shape, 2048 if on_cpu else 8192)
    batch = max_batch_size or (64 if on_cpu else 256)
    step_tokens = _step_tokens(max_num_tokens, batch, 256 if on_cpu else 8192)
    weights = _weights_bytes(shape, precision, dtype, kernels, on_cpu, tp, pp)
    block_size = BLOCK_SIZE if lane == "torch" else TRTLLM_BLOCK_SIZE
    kv_dtype = kv_dtype or _kv_dtype(lane, precision, dtype, on_cpu, reasons)
    fp8_kv = kv_dtype == "fp8" or (lane != "torch" and precision in ("fp8", "nvfp4"))
    kv_bytes = 1 if fp8_kv else DTYPE_BYTES[dtype]
    if kv_dtype == "int8" or (
        on_cpu and precision in INTEGERS
    ):  # with a float32 scale for each token and head
        per_token = kv_bytes_per_token(shape.layers, shape.kv_heads, shape.head_dim + 4, 1, tp, pp)
    else:
        per_token = kv_bytes_per_token(shape.layers, shape.kv_heads, shape.head_dim, kv_bytes, tp, pp)
    shared = lane == "torch" and tp > 1
    one_sequence = -(-length // block_size)
    if lane == "torch":
        one_sequence = _groups(shape, length).most_whole(length, min(step_tokens, length), block_size)
    needed = weights + one_sequence * block_size * per_token
    on_host = _host_blocks(host_kv_gib, dp, tp, block_size * per_token, needed, hardware)
    taken = weights + (on_host * block_size * per_token if on_cpu else 0)
    blocks = _kv_blocks(
        per_token, block_size, length, batch, taken, shape, hardware, reasons, one_sequence, shared
    )
    if on_host:
        reasons.append(
            f"prefix cache: {on_host} more blocks of {block_size} tokens in the host memory of each engine"
            f"{' and GPU' if tp > 1 else ''}"
        )
    return Plan(
        lane=lane,
        precision=precision,
        device=hardware.device,
        compute_dtype=dtype,
        build_dtype=build_dtype,
        kernels=kernels,
        max_seq_len=length,
        max_batch_size=batch,
        max_num_tokens=step_tokens,
        max_gap_ms=max_gap_ms or 0,
        block_size=block_size,
        num_kv_blocks=blocks,
        kv_bytes=blocks * block_size * per_token,
        weights_bytes=weights,
        reasons=tuple(reasons),
        tp=tp,
        pp=pp,
        dp=dp,
        kv_dtype=kv_dtype,
        num_host_kv_blocks=on_host,
        sequence_blocks=one_sequence,
    )


def _groups(shape: ModelShape, length: int) -> LayerGroups:
    return LayerGroups.for_length(shape.windows or (None,) * shape.layers, length)


def _kv_dtype(lane: str, precision: str, dtype: str, on_cpu: bool, reasons: list[str]) -> str:
    if lane != "torch" or on_cpu:
        return "auto"
    if precision == "int8":
        return "int8"
    if precision != "fp8":
        return dtype
    reasons.append(
        "KV cache fp8: int8 with scales ('kv_dtype' in engine.json) has a fifth of the error and up to 11 % fewer "
        "tokens/s on an H200"
    )
    return "fp8"


def other_kv_dtypes(plan: Plan) -> tuple[str, ...]:
    """KV caches of backend torch to try after the plan's, the smallest first: each has less error than the one before.

    int8 has scales of its own for each token and head; the compute dtype rounds no more than the source does.
    """
    caches = ("fp8", "int8", plan.compute_dtype)
    return caches[caches.index(plan.kv_dtype) + 1 :] if plan.kv_dtype in caches else ()


def require_tensorrt_llm(plan: Plan, version: str | None) -> None:
    """Raises:
    BuildError: the backend cannot be built with the installed TensorRT-LLM.
    """
    if plan.lane != "torch" and (refusal := versions.refusal(plan.lane, version)):
        raise BuildError(f"ENGINE={plan.lane}: {refusal}")


def _choose_lane(lane: str, hardware: Hardware, reasons: list[str]) -> str:
    if lane not in (AUTO, *LANES):
        raise BuildError(f"ENGINE={lane} is unknown: use one of auto, {', '.join(LANES)}")
    if lane == AUTO:
        version = hardware.tensorrt_llm
        if version and hardware.device == "cuda" and not versions.refusal("trtllm-pytorch", version):
            reasons.append(
                f"backend trtllm-pytorch: TensorRT-LLM {version} is installed; this version was checked without "
                "it, so run make verify-gpu-host once"
            )
            return "trtllm-pytorch"
        reasons.append("backend torch: TensorRT-LLM is not usable on this machine")
        return "torch"
    if lane != "torch" and hardware.device != "cuda":
        raise BuildError(
            f"ENGINE={lane} needs an NVIDIA GPU and this machine ({hardware.name}) has none: use ENGINE=torch"
        )
    return lane


def available_precisions(lane: str, hardware: Hardware) -> tuple[str, ...]:
    """Precisions that a backend runs on this hardware, the one to prefer first."""
    fp8 = ("fp8",) if hardware.capability is None or hardware.capability >= FP8_CAPABILITY else ()
    # NVIDIA's engine builder rejects INT8 and INT4 weights on data-centre Blackwell.
    integer = lane == "trtllm-engine" and not (10, 0) <= (hardware.capability or (0, 0)) < (12, 0)
    if lane == "trtllm-engine":
        nvfp4 = ("nvfp4",) if (hardware.capability or (0, 0)) >= NVFP4_CAPABILITY else ()
        return (*fp8, *nvfp4, *(("int8_sq", "int4_awq") if integer else ()), "bf16")
    if hardware.device == "cpu" and hardware.compiler:
        return (*INTEGERS, *fp8, "bf16")
    least, beyond = INT8_CAPABILITIES
    int8 = ("int8",) if lane == "torch" and least <= (hardware.capability or (0, 0)) < beyond else ()
    return (*fp8, *int8, "bf16")


def _choose_precision(
    precision: str,
    lane: str,
    shape: ModelShape,
    hardware: Hardware,
    reasons: list[str],
    refused: tuple[str, ...],
) -> str:
    if precision not in (AUTO, *PRECISIONS):
        raise BuildError(f"PRECISION={precision} is unknown: use one of auto, {', '.join(PRECISIONS)}")
    capability = hardware.capability
    if capability is not None and capability < BF16_CAPABILITY:
        raise BuildError(
            f"{hardware.name} has compute capability {_dotted(capability)} and no bf16 (needs 8.0): "
            "hide it with CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    offered = available_precisions(lane, hardware)
    lacks_fp8 = "fp8" not in offered
    alternatives = " or ".join(f"PRECISION={name}" for name in offered if name != "fp8")
    has = f"{hardware.name} has {_dotted(capability)}"
    too_old = f"FP8 needs compute capability {_dotted(FP8_CAPABILITY)} (Ada, Hopper, Blackwell) and {has}"
    if shape.fp8:
        if lane == "trtllm-engine":
            raise BuildError(
                "MODEL is an FP8 checkpoint and ENGINE=trtllm-engine calibrates a bf16 one: give that, or use "
                "ENGINE=trtllm-pytorch"
            )
        if lane != "torch" and shape.stored != "ModelOpt FP8":
            raise BuildError(
                f"MODEL is {shape.stored}, which ENGINE={lane} was not tried with: use ENGINE=torch"
            )
        if lacks_fp8:
            raise BuildError(
                f"MODEL is an FP8 checkpoint; {too_old}: give the bf16 checkpoint and {alternatives}"
            )
        if precision not in (AUTO, "fp8"):
            raise BuildError(
                f"PRECISION={precision} cannot be made from an FP8 checkpoint: use PRECISION=fp8"
            )
        reasons.append(f"precision fp8: the checkpoint is {shape.stored} already")
        return "fp8"
    if shape.int4:
        return _stored_int4(precision, lane, shape, hardware, reasons)
    if precision == AUTO:
        precision = next(name for name in offered if name not in refused)
        why = f"{too_old}, so {lane} takes {precision}" if lacks_fp8 else "the best that this machine runs"
        if precision in INTEGERS:
            following = offered[offered.index(precision) + 1]
            if hardware.device == "cpu":
                why = f"measured faster than {following} on a CPU (benchmarks/cpu)"
            why += f"; {following} is tried if the accuracy gate refuses it"
        reasons.append(f"precision {precision}: {why}")
        return precision
    if precision == "fp8" and lacks_fp8:
        raise BuildError(f"PRECISION=fp8 is not possible: {too_old}: use {alternatives} (ENGINE={lane})")
    if precision not in offered:
        remedy = f"use PRECISION={offered[0]}"
        if precision in INTEGERS:
            remedy += " or, on a CPU, install a C++ compiler (g++): its kernels are compiled by the build"
        if lane != "trtllm-engine" and precision in ("int8_sq", "int4_awq"):
            remedy += " or, on an NVIDIA GPU below compute capability 10.0, ENGINE=trtllm-engine"
        raise BuildError(
            f"PRECISION={precision} is not available with ENGINE={lane} on {hardware.name} "
            f"(it runs {', '.join(offered)}): {remedy}"
        )
    reasons.append(f"precision {precision}: asked for")
    return precision


def _stored_int4(precision: str, lane: str, shape: ModelShape, hardware: Hardware, reasons: list[str]) -> str:
    """Of a checkpoint of 4-bit codes: they stay what they are where a kernel reads them."""
    if lane != "torch":
        raise BuildError(f"MODEL is {shape.stored}, which ENGINE={lane} was not tried with: use ENGINE=torch")
    offered = ("int4",) if hardware.device != "cpu" else ("int4", "bf16") if hardware.compiler else ("bf16",)
    chosen = offered[0] if precision == AUTO else precision
    if chosen not in offered:
        raise BuildError(
            f"PRECISION={precision} cannot be made from a checkpoint that is {shape.stored}: use "
            f"PRECISION={' or '.join(offered)}, or give the bf16 checkpoint"
        )
    dequantised = f", dequantised at load{'' if hardware.compiler else ' (no C++ compiler for int4 kernels)'}"
    beside = ""
    if shape.stored.startswith("MXFP4") and (hardware.capability or (0, 0)) >= FP8_CAPABILITY:
        beside = ", with attention and output head kept in FP8"
    reasons.append(
        f"precision {chosen}: the checkpoint is {shape.stored}{dequantised if chosen == 'bf16' else beside}"
    )
    return chosen


def _require_gpus(lane: str, tp: int, pp: int, shape: ModelShape, hardware: Hardware) -> None:
    if lane == "torch" and pp > 1:
        raise BuildError(
            f"PP={pp} is for the TensorRT-LLM backends: with ENGINE=torch GPUs share each layer (TP={pp}), or have "
            f"whole engines (DP={pp})"
        )
    if lane == "torch" and tp > 1 and shape.splits is not None and tp not in shape.splits:
        fitting = " or ".join(f"TP={number}" for number in shape.splits if number <= 16) or "DP"
        raise BuildError(
            f"TP={tp} does not divide this model's heads and MLP into equal parts: use {fitting}"
        )
    if lane == "torch" and hardware.device == "cpu":
        if tp > hardware.cores:
            raise BuildError(f"TP={tp} wants a CPU core for each, but {hardware.cores} are there: lower TP")
        return
    wanted = tp * pp
    if wanted > max(1, hardware.count):
        raise BuildError(
            f"TP times PP is {wanted}, but {hardware.count} GPU(s) are visible: lower TP or PP, or show more "
            "with CUDA_VISIBLE_DEVICES"
        )


def _require_engines(lane: str, wanted: int, tp: int, hardware: Hardware, reasons: list[str]) -> None:
    on_cpu = hardware.device == "cpu"
    if lane != "torch" and wanted > 1:
        raise BuildError(f"DP={wanted} is for ENGINE=torch, and this is {lane}: use TP, or leave DP out")
    there = hardware.cores if on_cpu else max(1, hardware.count)
    if lane == "torch" and wanted * tp > there:
        what = "CPU core(s) are there" if on_cpu else "GPU(s) are visible"
        asked = f"DP={wanted}" if tp == 1 else f"DP={wanted} with TP={tp}"
        raise BuildError(f"{asked} wants a part of the machine for each engine, but {there} {what}: lower DP")
    if lane == "torch" and tp > 1 and not on_cpu:
        reasons.append(
            f"{tp} GPUs share each layer: each has its part of the weights and of the KV cache; over PCIe instead of "
            "NVLink a step waits for its sums (nvidia-smi topo -m tells which)"
        )
    if wanted > 1:
        own = "a GPU of its own" if tp == 1 else f"{tp} GPUs of its own"
        each = f"{hardware.cores // wanted} of the {hardware.cores} cores" if on_cpu else own
        reasons.append(f"{wanted} engines, each with {each} and a KV cache of its own")
    elif lane == "torch" and hardware.count > tp:
        engines = hardware.count // tp
        with_dp = f": DP={engines} runs an engine on each" if tp == 1 else f": DP={engines} runs more engines"
        reasons.append(f"{tp} of {hardware.count} GPUs is used{with_dp if engines > 1 else ''}")


def _choose_kernels(lane: str, hardware: Hardware, reasons: list[str]) -> str:
    if lane != "torch":
        return "tensorrt_llm"
    if hardware.device != "cpu":
        reasons.append(
            "kernels cuda: Triton-language kernels and CUDA graphs (measured on an H200; on another GPU run "
            "pytest -m gpu tests/torch_engine first)"
        )
        return "cuda"
    if hardware.compiler is None:
        reasons.append(
            "kernels pytorch: no C++ compiler was found (CXX, g++, clang++); with one, the build compiles "
            "CPU kernels that decode several times faster"
        )
        return "pytorch"
    reasons.append(f"kernels native: compiled for this CPU by {hardware.compiler}")
    return "native"


def _compute_dtype(
    precision: str, kernels: str, build_dtype: str, hardware: Hardware, reasons: list[str]
) -> str:
    if hardware.device != "cpu":
        return build_dtype
    if kernels == "native":
        dtype = "float32"
        held = "bf16 weights"
        if precision in INTEGERS:
            held = f"{precision} weights (output head of 7 bits), int8 activations and an int8 KV cache,"
        reasons.append(f"compute dtype float32: the compiled kernels read {held} and sum in float32")
    else:
        dtype = build_dtype
        why = "this CPU has bf16 instructions" if hardware.fast_bf16 else "this CPU has no bf16 instructions"
        reasons.append(f"compute dtype {dtype}: {why}")
    if precision == "fp8":
        held = "bfloat16" if kernels == "native" else dtype
        reasons.append(
            f"fp8 on a CPU is how weights are stored: they are dequantised to {held} at load, "
            "and activations are not quantised"
        )
    return dtype


def _sequence_length(asked: int | None, shape: ModelShape, default: int) -> int:
    limit = shape.max_position_embeddings
    if asked is None:
        return min(limit, default)
    if asked > limit:
        raise BuildError(
            f"MAX_SEQ_LEN={asked} is beyond the model's context of {limit} tokens: use {limit} or less"
        )
    return asked


def _step_tokens(asked: int | None, batch: int, default: int) -> int:
    if asked is not None and asked < batch:
        raise BuildError(
            f"MAX_NUM_TOKENS={asked} is not enough for a token of each of MAX_BATCH_SIZE={batch} requests: raise it, "
            "or lower MAX_BATCH_SIZE"
        )
    return asked or max(batch, default)


def _weights_bytes(
    shape: ModelShape, precision: str, dtype: str, kernels: str, on_cpu: bool, tp: int, pp: int
) -> int:
    wide = DTYPE_BYTES[dtype]
    if kernels == "cuda":  # each GPU has the whole embedding, and less than all of the head
        rest = (shape.parameters - shape.linear_parameters) * wide
        if shape.int4:  # with scales, and the largest weight of a layer written out for many rows
            largest = shape.linear_parameters // shape.layers // 2
            each = 0.8 if NVFP4 in shape.stored else 0.6
            return int(each * shape.linear_parameters / tp) + largest * wide // tp + rest
        stored = "int8_sq" if precision in INTEGERS else precision
        return weight_bytes(shape.linear_parameters, shape.linear_parameters, stored, wide, tp) + rest
    if precision in INTEGERS:  # with scales; the rest: the head in 7 bits, the embedding in float32 or less
        each = 1.07 if precision == "int8" or FP4 in shape.stored else 0.63
        linear = each * shape.linear_parameters
        return int(linear + (shape.parameters - shape.linear_parameters) * (1.07 + wide))
    if on_cpu:
        return shape.parameters * (2 if kernels == "native" else wide)  # TP: of all processes together, about
    return weight_bytes(shape.parameters, shape.linear_parameters, precision, wide, tp, pp)


def _host_blocks(gib: float, dp: int, tp: int, block_bytes: int, needed: int, hardware: Hardware) -> int:
    """Blocks in the host memory of each rank of each engine; on a CPU ``needed`` bytes of it are not theirs."""
    blocks = int(gib * GIB / (dp * tp) / block_bytes)
    if gib and not blocks:
        raise BuildError(
            f"HOST_KV_GIB={gib:g} has no room for a block of {block_bytes} bytes in each of {dp * tp} processes: "
            "give more, or leave it out"
        )
    free = hardware.memory_free - needed
    if hardware.device == "cpu" and 0 <= free < blocks * block_bytes:
        raise BuildError(
            f"HOST_KV_GIB={gib:g} does not fit {hardware.name}: beside weights and a request's KV cache "
            f"{free * dp / GIB:.1f} GiB are free; lower it"
        )
    on_host = hardware.host_memory_free
    if on_host is not None and on_host < blocks * block_bytes * dp * tp:
        raise BuildError(
            f"HOST_KV_GIB={gib:g} does not fit the host of {hardware.name}: {on_host / GIB:.1f} GiB of its memory are "
            "free; lower it"
        )
    return blocks


def _kv_blocks(
    per_token: int,
    block_size: int,
    length: int,
    batch: int,
    weights: int,
    shape: ModelShape,
    hardware: Hardware,
    reasons: list[str],
    one_sequence: int,
    shared: bool = False,
) -> int:
    """Blocks of ``block_size`` tokens on each GPU; always enough for ``one_sequence`` of full length."""
    block_bytes = block_size * per_token
    if hardware.device == "cuda":
        # The Transformers baseline lives on the same GPU; beside a model that several share there is none.
        baseline = 0 if shared else 2 * shape.parameters
        room = int(0.9 * hardware.memory_free) - weights - baseline
        blocks = room // block_bytes
        whose = "this GPU's part of the weights" if shared else "the weights of engine and baseline"
        rule = f"0.9 of the free GPU memory, less {whose}"
    else:
        room = hardware.memory_free - weights
        wanted = max(one_sequence, -(-batch * one_sequence // 4))
        quarter = hardware.memory_free // 4 // block_bytes
        blocks = max(one_sequence, min(quarter, wanted))
        rule = (
            "a quarter of max_batch_size full sequences"
            if wanted <= quarter
            else "a quarter of the free memory"
        )
    if blocks < one_sequence or blocks * block_bytes > room:
        needed, free = one_sequence * block_bytes // MIB, max(room, 0) // MIB
        raise BuildError(
            f"MAX_SEQ_LEN={length} needs {needed} MiB of KV cache and {free} MiB is free on {hardware.name} "
            "beside the weights: lower MAX_SEQ_LEN or free memory"
        )
    reasons.append(
        f"KV cache {blocks * block_bytes // MIB} MiB = {blocks} blocks of {block_size} tokens "
        f"({per_token / 1024:g} KiB a token): {rule}"
    )
    whole = -(-length // block_size)
    if one_sequence != whole:
        reasons.append(
            f"sliding windows: {length} tokens take {one_sequence} blocks at most instead of {whole}, so that "
            f"{blocks // one_sequence} such sequences fit"
        )
    return blocks


def _dotted(capability: tuple[int, int] | None) -> str:
    return ".".join(str(part) for part in capability or ())
