"""A checkpoint on the kernels that the configuration names, with what runs its steps: decided once, here."""

from __future__ import annotations

from typing import Any

import torch

from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.core.layer_groups import LayerGroups
from flightline.torch_engine.kernels.choice import choose
from flightline.torch_engine.kernels.cpu.native import NativeCache, NativeKernels
from flightline.torch_engine.kernels.cpu.pages import take
from flightline.torch_engine.kernels.reference.pytorch import PyTorchKernels
from flightline.torch_engine.model.decoder import Model
from flightline.torch_engine.model.shard import Shard
from flightline.torch_engine.model.spec import ModelSpec
from flightline.torch_engine.model.weights import Checkpoint
from flightline.torch_engine.parallel.ranks import Leader, Ranks, Single
from flightline.torch_engine.runner import Runner, StepRunner


def gather_ranks(config: EngineConfig, checkpoint: Checkpoint) -> tuple[Ranks, Checkpoint]:
    """Starts the other ranks, if several share the model; returns rank 0's part of the checkpoint with them.

    Raises:
        ConfigError, UnsupportedModel: the model cannot be shared by so many.
        RankLost: one of them could not start.
    """
    if config.tensor_parallel_size == 1:
        return Single(), checkpoint
    part = checkpoint.part(Shard(0, config.tensor_parallel_size))
    return Leader(config, checkpoint), part


def layer_groups(config: EngineConfig, spec: ModelSpec) -> LayerGroups:
    """Of layers that have their KV blocks in common: by their windows, unless ``config`` has all keep all tokens."""
    if not config.free_behind_windows:
        return LayerGroups.one(spec.num_layers)
    return LayerGroups.for_length([layer.window for layer in spec.layers], config.max_seq_len)


@torch.inference_mode()
def load_runner(config: EngineConfig, checkpoint: Checkpoint, ranks: Ranks) -> StepRunner:
    """Loads this rank's part of a checkpoint and makes room for its KV cache.

    Raises:
        ConfigError, UnsupportedModel: the configuration or checkpoint cannot run here.
        MemoryError: the KV cache does not fit.
        RankLost: another rank failed.
    """
    kernels, longest = choose(config, ranks.group), config.max_seq_len
    groups = layer_groups(config, checkpoint.spec)
    room = config.num_kv_blocks, config.block_size, ranks, groups, config.num_host_kv_blocks
    if isinstance(kernels, PyTorchKernels):
        return Runner(Model(checkpoint, kernels, longest), kernels, *room)
    if isinstance(kernels, NativeKernels):
        runner: Runner[Any, NativeCache, Any] = Runner(Model(checkpoint, kernels, longest), kernels, *room)
        take([tensor for cache in runner.caches for tensor in kernels.cache_tensors(cache)])
        return runner
    from flightline.torch_engine.cuda_runner import CudaRunner  # needs Triton's language

    return CudaRunner(Model(checkpoint, kernels, longest), kernels, config, ranks, groups)
