"""What the decoder asks of a device: the kernel interface.

An implementation (``kernels/``) has three types of its own, which nobody else looks into: a linear, the KV cache of one
layer, and the tensors of a step. A model is generic in them, so that no implementation meets another one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from flightline.torch_engine.core.sampling import Sampler
from flightline.torch_engine.core.steps import SequenceSteps, StepBuilder
from flightline.torch_engine.model.mixture import MixtureSpec
from flightline.torch_engine.model.spec import LayerSpec, ModelSpec, Rope
from flightline.torch_engine.model.weights import Checkpoint
from flightline.torch_engine.parallel.group import Group


class Linear(Protocol):
    """A product with weights that were prepared at load."""

    def __call__(self, x: Any, /) -> torch.Tensor:
        """``[T, K] -> [T, N]``; ``x`` is in the form that the implementation's other kernels write for this linear."""


LinearT = TypeVar("LinearT", bound=Linear)
LinearT_co = TypeVar("LinearT_co", bound=Linear, covariant=True)
CacheT = TypeVar("CacheT")
StepT = TypeVar("StepT")


@dataclass
class GatedMlp(Generic[LinearT]):
    """A dense MLP."""

    gate_up: LinearT
    down: LinearT


class RoutedMlp(Protocol[LinearT_co]):
    """A mixture of experts, as an implementation prepared it from a ``MixtureSpec``."""

    @property
    def router(self) -> LinearT_co:
        """What the norm before it writes for; the experts take the same."""

    def __call__(self, x: Any, step: Any, /) -> torch.Tensor:
        """``[T, N] -> [T, N]``; rows of ``step`` that belong to nobody may have any result that is finite."""


@dataclass
class Layer(Generic[LinearT]):
    """One layer's weights, as an implementation prepared them."""

    spec: LayerSpec
    qkv: LinearT
    out: LinearT
    mlp: GatedMlp[LinearT] | RoutedMlp[LinearT]
    input_norm: torch.Tensor | None
    mlp_norm: torch.Tensor | None
    attention_out_norm: torch.Tensor | None = None
    mlp_out_norm: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    """[H] float32: a score of each query head that joins its softmax, and that no value belongs to."""
    kv_scales: tuple[float, float] = (1.0, 1.0)
    """What keys and values are divided by where the KV cache is e4m3."""
    group: int = 0
    """Whose block tables say where its keys and values are (``core/layer_groups.py``)."""


class Decoder(Protocol[LinearT]):
    """What a forward pass reads of a model."""

    spec: ModelSpec
    layers: list[Layer[LinearT]]
    norm: torch.Tensor
    lm_head: LinearT
    ropes: dict[Rope, torch.Tensor]
    """[positions, 2, D / 2] float32: cosines and sines."""


class Kernels(Protocol[LinearT, CacheT, StepT]):
    """What a device does for a model. T is the step's tokens, N the hidden size."""

    name: str
    """As ``EngineConfig.kernels`` has it."""
    device: torch.device
    dtype: torch.dtype
    """Of activations."""
    group: Group
    """The ranks that share the model."""
    stride: int
    """Keys behind a window's beginning are read from a multiple of so many on, and ignored."""

    def describe(self, spec: ModelSpec) -> str:
        """How this model's weights are kept and computed, for the log."""

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> LinearT:
        """Prepares ``x [T, K] -> [T, N]`` for ``weight [N, K]``, which may be dropped afterwards."""

    def load_linear(self, checkpoint: Checkpoint, modules: list[str]) -> LinearT:
        """The linear of one or several modules of a checkpoint, stacked along the output."""

    def load_mixture(
        self, checkpoint: Checkpoint, mixture: MixtureSpec, layer: str, activation: str
    ) -> RoutedMlp[LinearT]:
        """The routed MLP of ``layer``, which is a module's name like ``model.layers.0``."""

    def embedding(self, checkpoint: Checkpoint, module: str) -> torch.Tensor:
        """The rows [vocab, N] that :meth:`embed` picks from, in a dtype that it reads."""

    def norm_weight(self, weight: torch.Tensor, plus_one: bool) -> torch.Tensor:
        """Prepares a norm's weight; Gemma's is applied as ``1 + weight``."""

    def new_cache(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        kv_scales: tuple[float, float],
    ) -> CacheT:
        """One layer's KV cache; ``kv_scales`` are what a key and a value are divided by where it is e4m3."""

    def same_cache(self, cache: CacheT, kv_scales: tuple[float, float]) -> CacheT:
        """The KV cache of another layer, in the same memory: what one writes to a block, the other must not."""

    def cache_tensors(self, cache: CacheT) -> list[torch.Tensor]:
        """What the cache holds, each [blocks, ...]."""

    def embed(self, step: StepT, table: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Embeddings [T, N] of the step's tokens out of ``table`` [vocab, N], times ``factor``."""

    def decode(
        self, model: Decoder[LinearT], x: torch.Tensor, caches: list[CacheT], step: StepT
    ) -> torch.Tensor:
        """From embeddings ``x`` [T, N], which may be changed, to the output head's logits [sampled, vocab]."""

    def sequence_steps(self, spec: ModelSpec, blocks: torch.Tensor, block_size: int) -> SequenceSteps[StepT]:
        """Steps of one sequence alone that has these KV blocks, int64 [blocks]."""

    def float_logits(self, logits: torch.Tensor, head: LinearT) -> torch.Tensor:
        """What ``head`` has left of the logits [sampled, vocab], in float32."""


class HostKernels(Kernels[LinearT, CacheT, StepT], Sampler, Protocol[LinearT, CacheT, StepT]):
    """Kernels that the host drives step by step: it builds the steps and chooses the tokens."""

    def steps(self, block_size: int, windows: Sequence[int | None]) -> StepBuilder[StepT]:
        """Makes the steps that :meth:`embed` and :meth:`decode` take; ``windows`` are those of the groups of layers."""
