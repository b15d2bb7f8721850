"""A forward pass operation by operation: what implementations share that run the decoder from Python."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

import torch

from flightline.torch_engine.model.kernel_interface import (
    CacheT,
    Decoder,
    GatedMlp,
    Layer,
    LinearT,
)
from flightline.torch_engine.model.spec import ModelSpec
from flightline.torch_engine.model.weights import Checkpoint
from flightline.torch_engine.parallel.group import Alone, Group


class Rows(Protocol):
    """A step of which some rows' logits are wanted."""

    logit_rows: torch.Tensor | None
    """[sampled]: rows of the step whose logits are wanted, in ascending order; None = all."""


HiddenT = TypeVar("HiddenT")
"""What a linear reads: a tensor, or the form that an implementation's kernels write for its linears."""
RowsT = TypeVar("RowsT", bound=Rows)


class Operations(ABC, Generic[LinearT, HiddenT, CacheT, RowsT]):
    """The decoder's operations, and :meth:`decode` made of them.

    Shapes: T tokens of all sequences of a step one after the other, N the hidden size, I the MLP's inner size,
    H query heads, V key/value heads, D head size.
    """

    group: Group = Alone()
    stride = 1

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype

    def summed(self, delta: torch.Tensor) -> torch.Tensor:
        """All ranks' ``delta`` together: what a linear gives of which each rank has some of the inputs."""
        return self.group.sum(delta)

    @abstractmethod
    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        post: torch.Tensor | None,
        weight: torch.Tensor | None,
        eps: float,
        reader: LinearT,
    ) -> tuple[HiddenT, torch.Tensor]:
        """Adds ``delta``, normed by ``post`` if given, to the residual ``x`` [T, N]; returns its norm and the new sum.

        Without ``weight`` the sum itself is what the reader gets.

        ``reader`` is the linear that reads the norm; ``x`` may be changed in place.
        """

    def add_shares(
        self,
        x: torch.Tensor,
        share: torch.Tensor | None,
        post: torch.Tensor | None,
        weight: torch.Tensor | None,
        eps: float,
        reader: LinearT,
    ) -> tuple[HiddenT, torch.Tensor]:
        """As :meth:`add_norm`, of what all ranks' ``share`` of ``delta`` add up to."""
        return self.add_norm(x, None if share is None else self.summed(share), post, weight, eps, reader)

    @abstractmethod
    def attention(
        self,
        qkv: torch.Tensor,
        layer: Layer[LinearT],
        spec: ModelSpec,
        rope: torch.Tensor,
        cache: CacheT,
        step: RowsT,
    ) -> HiddenT:
        """From the projection ``qkv`` [T, (H + 2 V) D] to what ``layer.out`` reads, [T, H D]; fills ``cache``."""

    @abstractmethod
    def gate(self, gate_up: torch.Tensor, activation: str, reader: LinearT) -> HiddenT:
        """``[T, 2 I] -> [T, I]``: activation of the first half times the second; ``reader`` as in add_norm."""

    def decode(
        self, model: Decoder[LinearT], x: torch.Tensor, caches: list[CacheT], step: RowsT
    ) -> torch.Tensor:
        """From embeddings to the output head's logits [sampled, vocab], of this rank's part of the vocabulary."""
        eps = model.spec.norm_eps
        share: torch.Tensor | None = None
        """Of what is added next; each rank has one."""
        post: torch.Tensor | None = None
        for layer, cache in zip(model.layers, caches, strict=True):
            h, x = self.add_shares(x, share, post, layer.input_norm, eps, layer.qkv)
            h = self.attention(layer.qkv(h), layer, model.spec, model.ropes[layer.spec.rope], cache, step)
            share = layer.out(h)
            mlp = layer.mlp
            reader = mlp.gate_up if isinstance(mlp, GatedMlp) else mlp.router
            h, x = self.add_shares(x, share, layer.attention_out_norm, layer.mlp_norm, eps, reader)
            if isinstance(mlp, GatedMlp):
                share = mlp.down(self.gate(mlp.gate_up(h), model.spec.activation, mlp.down))
            else:
                share = mlp(h, step)
            post = layer.mlp_out_norm
        if step.logit_rows is not None:
            x = x.index_select(0, step.logit_rows)
            share = None if share is None else share.index_select(-2, step.logit_rows)
        h, _ = self.add_shares(x, share, post, model.norm, eps, model.lm_head)
        return model.lm_head(h)

    def embedding(self, checkpoint: Checkpoint, module: str) -> torch.Tensor:
        """The rows [vocab, N] that ``embed`` picks from: here in the compute dtype."""
        return checkpoint.weight(module, self.dtype).to(self.device)

    def norm_weight(self, weight: torch.Tensor, plus_one: bool) -> torch.Tensor:
        """Prepares a norm's weight. Gemma's is applied in float32 as ``1 + weight``, the others' in ``dtype``."""
        weight = weight.to(self.device)
        return weight.float() + 1.0 if plus_one else weight.to(self.dtype)

    def float_logits(self, logits: torch.Tensor, head: LinearT) -> torch.Tensor:
        """Logits in float32: here the head leaves nothing to do."""
        return logits.float()


def name_of(dtype: torch.dtype) -> str:
    """As a configuration has it, like ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def computed_in(spec: ModelSpec, dtype: torch.dtype) -> str:
    """How a device without FP8 computes a checkpoint's weights, for the log."""
    return f"{spec.stored} weights, computed in {name_of(dtype)}" if spec.quantization else name_of(dtype)
