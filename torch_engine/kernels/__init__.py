"""The kernel interface: what the model asks of a device, in several implementations chosen once at load.

``pytorch`` runs anywhere and is the reference that every other implementation is tested against.
An implementation is a class with the methods of :class:`torch_engine.kernels.pytorch.PyTorchKernels`.
"""

from __future__ import annotations

import torch

from torch_engine.config import ConfigError
from torch_engine.kernels.pytorch import PyTorchKernels

IMPLEMENTATIONS = {"pytorch": PyTorchKernels}


def choose(name: str, device: torch.device, dtype: torch.dtype) -> PyTorchKernels:
    """The implementation called ``name``; ``auto`` takes the fastest one that this device can run.

    Raises:
        ConfigError: there is no such implementation.
    """
    if name == "auto":
        name = "pytorch"
    if name not in IMPLEMENTATIONS:
        raise ConfigError(f"kernels={name!r} is not valid: use auto or one of {', '.join(IMPLEMENTATIONS)}")
    return IMPLEMENTATIONS[name](device, dtype)
