"""A checkpoint on the kernels that the configuration names, with what runs its steps: decided once, here."""

from __future__ import annotations

import torch

from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.kernels.choice import choose
from flightline.torch_engine.kernels.cpu.native import NativeKernels
from flightline.torch_engine.kernels.reference.pytorch import PyTorchKernels
from flightline.torch_engine.model.decoder import Model
from flightline.torch_engine.model.weights import Checkpoint
from flightline.torch_engine.runner import Runner, StepRunner


@torch.inference_mode()
def load_runner(config: EngineConfig, checkpoint: Checkpoint) -> StepRunner:
    """Loads ``checkpoint`` and makes room for its KV cache.

    Raises:
        ConfigError, UnsupportedModel: the configuration or checkpoint cannot run here.
        MemoryError: the KV cache does not fit.
    """
    kernels, longest = choose(config), config.max_seq_len
    room = config.num_kv_blocks, config.block_size
    if isinstance(kernels, PyTorchKernels):
        return Runner(Model(checkpoint, kernels, longest), kernels, *room)
    if isinstance(kernels, NativeKernels):
        return Runner(Model(checkpoint, kernels, longest), kernels, *room)
    from flightline.torch_engine.cuda_runner import CudaRunner  # needs Triton's language

    return CudaRunner(Model(checkpoint, kernels, longest), kernels, config)
