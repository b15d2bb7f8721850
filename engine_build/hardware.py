"""What this machine can do: device, memory, and the instruction sets that decide the compute dtype."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flightline.torch_engine.core.host_memory import free_host_memory, host_memory
from flightline.torch_engine.kernels.cpu.toolchain import compiler

NVIDIA_DEVICE = Path("/dev/nvidiactl")
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "bf16")
CPU_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


@dataclass(frozen=True)
class Hardware:
    """One device. Memory in bytes."""

    device: str
    """``cpu`` or ``cuda``."""
    name: str
    memory_total: int
    memory_free: int
    capability: tuple[int, int] | None = None
    """CUDA compute capability; None on a CPU."""
    cores: int = 1
    """CPU cores this process may use."""
    flags: tuple[str, ...] = ()
    """Those of ``CPU_FLAGS`` that the CPU has."""
    compiler: str | None = None
    """C++ compiler for the CPU kernels; None if there is none, or on a GPU."""
    tensorrt_llm: str | None = None
    """Version of the installed TensorRT-LLM."""
    count: int = 1
    """Visible devices of this kind."""
    host_memory_free: int | None = None
    """Of a GPU's host; None: it is not known, or the device is the host itself."""
    note: str = ""
    """What detection wants the user to know."""

    @property
    def fast_bf16(self) -> bool:
        """Whether bf16 matrix products run in hardware; elsewhere they are several times slower than float32."""
        if self.capability is not None:
            return self.capability >= (8, 0)
        return any(flag in CPU_BF16_FLAGS for flag in self.flags)

    def identity(self) -> dict[str, Any]:
        """The facts a plan depends on that do not change from one minute to the next."""
        facts = dataclasses.asdict(self)
        del facts["memory_free"], facts["host_memory_free"], facts["note"]
        return facts


def detect() -> Hardware:
    """Describes the first visible CUDA device, else the CPU. Torch is imported only if a GPU may be there."""
    note = ""
    if NVIDIA_DEVICE.exists():
        gpu = _cuda()
        if gpu is not None:
            return gpu
        note = "an NVIDIA device is present, but this torch cannot use it: install a CUDA build of torch"
    return cpu(note)


def _cuda() -> Hardware | None:
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return Hardware(
        device="cuda",
        name=torch.cuda.get_device_name(),
        memory_total=total,
        memory_free=free,
        capability=torch.cuda.get_device_capability(),
        cores=len(os.sched_getaffinity(0)),
        tensorrt_llm=_version("tensorrt_llm"),
        count=torch.cuda.device_count(),
        host_memory_free=free_host_memory(),
    )


def cpu(note: str = "") -> Hardware:
    """Describes the CPU."""
    name, flags = _cpu_description()
    total, free = host_memory()
    return Hardware(
        device="cpu",
        name=name,
        memory_total=total,
        memory_free=free,
        cores=len(os.sched_getaffinity(0)),
        flags=flags,
        compiler=compiler(),
        tensorrt_llm=_version("tensorrt_llm"),
        note=note,
    )


def _cpu_description() -> tuple[str, tuple[str, ...]]:
    facts: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    present = (facts.get("flags") or facts.get("Features") or "").split()
    return facts.get("model name", "CPU"), tuple(flag for flag in CPU_FLAGS if flag in present)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
