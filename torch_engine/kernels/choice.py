"""Which implementation of the kernel interface runs: chosen once, at load."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from flightline.torch_engine.core.config import ConfigError, EngineConfig
from flightline.torch_engine.kernels.cpu.native import NativeKernels
from flightline.torch_engine.kernels.reference.pytorch import PyTorchKernels

if TYPE_CHECKING:
    from flightline.torch_engine.kernels.gpu.cuda import CudaKernels

IMPLEMENTATIONS = ("pytorch", "native", "cuda")


def default_threads() -> int:
    """The cores that this process may use, less one from four up: Triton's processes need room to run."""
    cores = len(os.sched_getaffinity(0))
    return cores - 1 if cores >= 4 else cores


def choose(config: EngineConfig) -> PyTorchKernels | NativeKernels | CudaKernels:
    """The implementation that ``config.kernels`` names.

    ``auto`` is ``cuda`` on a CUDA device, ``native`` on a CPU if the build compiled it, else ``pytorch``.

    Raises:
        ConfigError: there is no such implementation, or it cannot run here.
    """
    name = config.kernels
    if name == "auto":
        name = "cuda" if config.device.startswith("cuda") else "native" if config.kernel_dir else "pytorch"
    device, dtype = torch.device(config.device), getattr(torch, config.compute_dtype)
    threads = config.num_threads or default_threads()
    if name == "pytorch":
        if device.type == "cpu":
            torch.set_num_threads(threads)
        return PyTorchKernels(device, dtype, config.kv_dtype)
    if name == "native":
        return NativeKernels(config, device, dtype, threads)
    if name == "cuda":
        try:
            from flightline.torch_engine.kernels.gpu.cuda import CudaKernels
        except ImportError as error:
            raise ConfigError(
                f"kernels='cuda' needs Triton's language ({error}): pip install triton"
            ) from None
        return CudaKernels(config, device, dtype)
    raise ConfigError(f"kernels={name!r} is not valid: use auto or one of {', '.join(IMPLEMENTATIONS)}")
