"""Which implementation of the kernel interface runs: chosen once, at load."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from flightline.torch_engine.core.config import ConfigError, EngineConfig
from flightline.torch_engine.kernels.cpu.native import NativeKernels
from flightline.torch_engine.kernels.reference.pytorch import PyTorchKernels
from flightline.torch_engine.parallel.group import Alone, Group

if TYPE_CHECKING:
    from flightline.torch_engine.kernels.gpu.cuda import CudaKernels

IMPLEMENTATIONS = ("pytorch", "native", "cuda")


def default_threads() -> int:
    """The cores that this process may use, less one from four up: Triton's processes need room to run."""
    cores = len(os.sched_getaffinity(0))
    return cores - 1 if cores >= 4 else cores


def device_of(config: EngineConfig, rank: int) -> torch.device:
    """Where a rank runs: on a GPU of its own, or beside the others on the CPU."""
    shared = config.tensor_parallel_size > 1 and config.device == "cuda"
    return torch.device(f"cuda:{rank}" if shared else config.device)


def choose(config: EngineConfig, group: Group | None = None) -> PyTorchKernels | NativeKernels | CudaKernels:
    """The implementation that ``config.kernels`` names, for one rank of ``group`` (default: the only one).

    ``auto`` is ``cuda`` on a CUDA device, ``native`` on a CPU if the build compiled it, else ``pytorch``.

    Raises:
        ConfigError: there is no such implementation, or it cannot run here.
    """
    group = group or Alone()
    name = config.kernels
    if name == "auto":
        name = "cuda" if config.device.startswith("cuda") else "native" if config.kernel_dir else "pytorch"
    device, dtype = device_of(config, group.rank), getattr(torch, config.compute_dtype)
    threads = config.num_threads or max(1, default_threads() // group.size)
    made: PyTorchKernels | NativeKernels | CudaKernels
    if name == "pytorch":
        if device.type == "cpu":
            torch.set_num_threads(threads)
        made = PyTorchKernels(device, dtype, config.kv_dtype)
    elif name == "native":
        return NativeKernels(config, device, dtype, threads)
    elif name == "cuda":
        try:
            from flightline.torch_engine.kernels.gpu.cuda import CudaKernels
        except ImportError as error:
            raise ConfigError(
                f"kernels='cuda' needs Triton's language ({error}): pip install triton"
            ) from None
        made = CudaKernels(config, device, dtype)
    else:
        raise ConfigError(f"kernels={name!r} is not valid: use auto or one of {', '.join(IMPLEMENTATIONS)}")
    made.group = group
    return made
