"""Engine configuration: one typed object, validated once, stored as ``engine.json`` in the engine folder."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENGINE_FILE = "engine.json"

SCHEDULER_POLICIES = ("guaranteed_no_evict", "max_utilization")
DEVICES = ("cpu", "cuda")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
KV_DTYPES = ("auto", *COMPUTE_DTYPES, "fp8", "int8")
WEIGHT_PRECISIONS = ("auto", "dequantised", "int8", "int4")
CPU_ISAS = ("auto", "avx512", "avx2", "portable")
LM_HEAD_PRECISIONS = ("auto", "fp8")
ALL_REDUCES = ("auto", "nccl", "fused")
FP8_CAPABILITY = (8, 9)
"""Least CUDA compute capability with FP8 matrix products (Ada, Hopper, Blackwell): NVIDIA, CUDA C++ Programming Guide,
table of features by capability. Plan, engine and the guard before a start all read it here."""
TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "str": ((str,), "use text"),
    "bool": ((bool,), "use true or false"),
    "int": ((int,), "use a whole number"),
    "float": ((int, float), "use a number"),
}
MOST = {
    "block_size": 4096,
    "num_kv_blocks": 2**31 - 2,
    "num_host_kv_blocks": 2**31 - 2,
    "max_batch_size": 65536,
    "max_num_tokens": 2**20,
    "max_seq_len": 2**31 - 1,
    "max_gap_ms": 2**31 - 1,
    "speculation_tokens": 64,
    "num_threads": 1024,
    "tensor_parallel_size": 64,
    "max_queue_size": 2**31 - 1,
    "max_queue_delay_ms": 2**31 - 1,
}
"""Beyond these a number is a slip of the pen; what is below them and too much for the machine, its memory refuses."""


class ConfigError(ValueError):
    """A setting that cannot work; the message names the field, the value and the remedy."""


@dataclass(frozen=True)
class EngineConfig:
    """What ``make build-engines`` decides and the engine process follows.

    Sizes are in tokens unless the name says otherwise. Parameter names follow TensorRT-LLM's Triton
    backend where it has the concept (``batch_scheduler_policy``, ``enable_kv_cache_reuse``, ...).
    """

    model_dir: str
    """Checkpoint folder (Hugging Face layout; bf16, or ModelOpt unified FP8)."""
    device: str = "cpu"
    compute_dtype: str = "float32"
    """Dtype of activations and matrix products; FP8 weights are dequantised to it where the device has no FP8."""
    kernels: str = "auto"
    """Implementation of the kernel interface: ``auto`` or a name in ``kernels/choice.py``."""
    kernel_dir: str = ""
    """Folder of this build's compiled CPU kernels (relative to the engine folder in the file); empty = none."""
    cpu_isa: str = "auto"
    """Instruction set of the compiled CPU kernels; ``auto`` is the best that the CPU has."""
    weight_precision: str = "auto"
    """CUDA: ``auto`` follows the checkpoint, ``dequantised`` computes in ``compute_dtype``, ``int8`` is W8A8.
    Compiled CPU kernels: ``auto`` is bfloat16 with float32 activations, ``int8`` and ``int4`` have int8 ones."""
    lm_head_precision: str = "auto"
    """CUDA: ``auto`` follows the checkpoint; ``fp8`` quantises the output head when it is loaded."""
    kv_dtype: str = "auto"
    """KV cache. The build's plan decides it on a GPU; ``auto`` is ``compute_dtype`` there.
    Compiled CPU kernels: ``auto`` is ``int8`` beside integer weights, else ``float32``."""
    cuda_graphs: bool = True
    """CUDA: decode steps run as captured graphs."""
    cuda_tuning: bool = True
    """CUDA: times the FP8 products for few rows at load (half a minute, the first time) and keeps the fastest."""
    block_size: int = 16
    num_kv_blocks: int = 2048
    num_host_kv_blocks: int = 0
    """In each rank's host memory: what of the prefix cache has no room among the others goes there, and comes back
    when a prompt begins with it."""
    max_batch_size: int = 64
    """Most requests in flight in one step."""
    max_num_tokens: int = 512
    """Token budget of one step: decode tokens first, the rest goes to prefill chunks."""
    max_gap_ms: int = 0
    """Longest time between two tokens of a stream that the prompts of others may cause: their chunks are sized by how
    long steps have taken. 0 = ``max_num_tokens`` alone bounds them."""
    max_seq_len: int = 2048
    """Prompt plus output of one request."""
    batch_scheduler_policy: str = "guaranteed_no_evict"
    enable_kv_cache_reuse: bool = True
    enable_chunked_context: bool = True
    free_behind_windows: bool = True
    """Layers with a sliding window give the KV blocks behind it back as a request runs (``core/layer_groups.py``)."""
    speculation_tokens: int = 0
    """Most tokens guessed beside each decode, where that is likely to pay (``core/speculation.py``); 0 = none.
    On a GPU the host then waits before and after a step with guesses."""
    tensor_parallel_size: int = 1
    """Ranks that share the model, each a process with its part of the weights and the KV cache; on GPUs, one each."""
    all_reduce: str = "auto"
    """CUDA, between ranks: ``auto`` adds up small sums over symmetric memory where that works, in one kernel with the
    norm where that was timed as faster; ``nccl`` never does; ``fused`` is that one kernel, untimed, or an error."""
    num_threads: int = 0
    """Intra-op threads of each rank; 0 = its part of the cores of this process, less one from four cores up."""
    max_queue_size: int = 256
    """Requests that may wait; one more is refused with UNAVAILABLE. 0 = unlimited."""
    max_queue_delay_ms: int = 0
    """A request not scheduled after this time is refused with UNAVAILABLE. 0 = unlimited."""
    abandon_after_s: float = 30.0
    """A request whose output nobody has taken for this long is cancelled."""

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, remedy: str) -> None:
            if not ok:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not valid: {remedy}")

        for field in dataclasses.fields(self):
            types, remedy = TYPES[str(field.type)]
            value = getattr(self, field.name)
            require(
                isinstance(value, types) and (bool in types or type(value) is not bool), field.name, remedy
            )
        for name, most in MOST.items():
            require(getattr(self, name) <= most, name, f"use {most} at most")
        require(math.isfinite(self.abandon_after_s), "abandon_after_s", "use a positive number of seconds")
        require(bool(self.model_dir), "model_dir", "give the checkpoint folder")
        require(self.device.split(":")[0] in DEVICES, "device", f"use one of {', '.join(DEVICES)}")
        require(
            self.compute_dtype in COMPUTE_DTYPES, "compute_dtype", f"use one of {', '.join(COMPUTE_DTYPES)}"
        )
        for name, allowed in (
            ("weight_precision", WEIGHT_PRECISIONS),
            ("lm_head_precision", LM_HEAD_PRECISIONS),
            ("kv_dtype", KV_DTYPES),
            ("cpu_isa", CPU_ISAS),
            ("all_reduce", ALL_REDUCES),
        ):
            require(getattr(self, name) in allowed, name, f"use one of {', '.join(allowed)}")
        require(
            self.batch_scheduler_policy in SCHEDULER_POLICIES,
            "batch_scheduler_policy",
            f"use one of {', '.join(SCHEDULER_POLICIES)}",
        )
        for name in (
            "block_size", "num_kv_blocks", "max_batch_size", "max_num_tokens", "max_seq_len", "tensor_parallel_size",
        ):  # fmt: skip
            require(getattr(self, name) >= 1, name, "use a positive number")
        for name in (
            "num_threads",
            "max_queue_size",
            "max_queue_delay_ms",
            "max_gap_ms",
            "speculation_tokens",
            "num_host_kv_blocks",
        ):
            require(getattr(self, name) >= 0, name, "use 0 or a positive number")
        require(
            self.enable_kv_cache_reuse or not self.num_host_kv_blocks,
            "num_host_kv_blocks",
            "they hold what can be used again: use 0, or set enable_kv_cache_reuse=true",
        )
        native = self.kernels == "native" or (self.kernels == "auto" and bool(self.kernel_dir))
        require(
            self.tensor_parallel_size == 1 or not native,
            "tensor_parallel_size",
            "the compiled CPU kernels use all cores from one process: use 1, or kernels='pytorch'",
        )
        require(
            self.tensor_parallel_size == 1 or self.device in DEVICES,
            "device",
            f"tensor_parallel_size={self.tensor_parallel_size} ranks take the devices in their order: use cuda, and "
            "choose them with CUDA_VISIBLE_DEVICES",
        )
        require(self.abandon_after_s > 0, "abandon_after_s", "use a positive number of seconds")
        require(
            self.max_num_tokens >= self.max_batch_size,
            "max_num_tokens",
            f"it must hold one token for each of max_batch_size={self.max_batch_size} requests",
        )
        require(
            self.enable_chunked_context or not self.max_gap_ms,
            "max_gap_ms",
            "a prompt that is not cut takes as long as it takes; set enable_chunked_context=true",
        )
        require(
            self.enable_chunked_context or self.max_num_tokens >= self.max_seq_len,
            "max_num_tokens",
            f"without chunked context a prompt of up to max_seq_len={self.max_seq_len} must fit one step",
        )

    @property
    def most_at_once(self) -> int:
        """Tokens of one sequence that a step computes at most."""
        return max(1 + self.speculation_tokens, min(self.max_num_tokens, self.max_seq_len))

    def save(self, engine_dir: str | Path) -> None:
        """Writes ``engine.json``."""
        text = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        (Path(engine_dir) / ENGINE_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, engine_dir: str | Path, **overrides: Any) -> EngineConfig:
        """Reads ``engine.json``; paths in it may be relative to the engine folder.

        Raises:
            ConfigError: the file is missing or damaged, or names an unknown setting or an impossible value.
        """
        path = Path(engine_dir) / ENGINE_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path} does not exist: run 'make build-engines' first") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is damaged ({error}): run 'make build-engines' again") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path} is damaged (not a JSON object): run 'make build-engines' again")
        values.update(overrides)
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ConfigError(f"{path}: unknown settings {sorted(unknown)}: run 'make build-engines' again")
        for name in ("model_dir", "kernel_dir"):
            if values.get(name) and isinstance(values[name], str):
                values[name] = str((Path(engine_dir) / values[name]).resolve())
        if "model_dir" not in values:
            raise ConfigError(f"{path} lacks model_dir: run 'make build-engines' again")
        return cls(**values)
