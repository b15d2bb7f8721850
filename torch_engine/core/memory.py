"""GPU memory of this process."""

from __future__ import annotations

import torch


def reserved_gpu_memory() -> int:
    """Bytes that PyTorch keeps on all GPUs; the driver's context comes on top. 0 where CUDA was not used."""
    if not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.memory_reserved(device) for device in range(torch.cuda.device_count()))
