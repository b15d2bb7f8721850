"""A decoder as the engine sees it: sizes and switches, whatever family it came from. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from flightline.torch_engine.model.mixture import MixtureSpec
from flightline.torch_engine.model.quantization import Quantization


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one kind of layer."""

    theta: float
    scaling: tuple[tuple[str, Any], ...] = ()
    """``rope_type`` and its settings, lists as tuples; empty for the plain embedding."""
    dims: int | None = None
    """How many dimensions of each head turn, from the first on; None = all, 0 = none."""
    interleaved: bool = False
    """The checkpoint pairs dimension 2i with 2i + 1, not with the one half of ``dims`` away."""


@dataclass(frozen=True)
class LayerSpec:
    """What differs between the layers of one model."""

    rope: Rope
    window: int | None
    """Sliding attention window in tokens; None = full attention."""
    mixture: MixtureSpec | None = None
    """How its MLP is routed; None: it is dense."""


@dataclass(frozen=True)
class Norms:
    """The norms of a layer, by the names of their modules in the checkpoint; None = there is none."""

    attention: str | None = "input_layernorm"
    """Of what attention reads."""
    attention_out: str | None = None
    """Of what attention adds to the residual."""
    mlp: str | None = "post_attention_layernorm"
    mlp_out: str | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        names = (self.attention, self.attention_out, self.mlp, self.mlp_out)
        return tuple(name for name in names if name is not None)


Fused = tuple[tuple[str, tuple[str, ...]], ...]
"""Modules of a layer that a checkpoint stores as one, with what they hold, in the order of their rows."""


QkNorm = Literal["none", "head", "row"]
"""What of queries and keys is normalised before the rotary embedding: nothing, each head, or all heads of a token."""


@dataclass(frozen=True)
class ModelSpec:
    """All that the engine knows of a model besides its weights."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    layers: tuple[LayerSpec, ...]
    tie_embeddings: bool
    max_position_embeddings: int
    activation: str
    """``silu`` or ``gelu_tanh``."""
    attention_scale: float
    end_ids: tuple[int, ...]
    norms: Norms = Norms()
    qk_norm: QkNorm = "none"

    norm_plus_one: bool = False
    """Gemma stores norm weights less one."""
    embedding_scale: float = 1.0
    rounds_embedding_scale: bool = False
    """Gemma rounds the scale to the compute dtype."""
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    logit_divisor: float = 1.0
    quantization: Quantization | None = None
    """How the linears are stored; None = as plain numbers."""
    qkv_bias: bool = False
    out_bias: bool = False
    sinks: bool = False
    """Each query head has a learned score that joins the softmax of every token, and nothing is read for it."""
    mlp_bias: bool = False
    fused: Fused = ()
    extra_layers: int = 0
    """Layers that a checkpoint has after the last one, to guess further tokens with: they are not read."""
    wrapper: str = ""
    """Architecture whose language part this is, like ``Gemma3ForConditionalGeneration``; empty if it stands alone."""

    @property
    def fp8(self) -> bool:
        """Linears are stored as e4m3 codes."""
        return self.quantization is not None and not self.quantization.int4

    @property
    def int4(self) -> bool:
        """Linears are stored as codes of 4 bits."""
        return self.quantization is not None and self.quantization.int4

    @property
    def stored(self) -> str:
        """How the linears are stored, in words."""
        return "bf16" if self.quantization is None else self.quantization.name

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer; empty if none has one."""
        found = tuple(layer.window for layer in self.layers)
        return found if any(found) else ()

    @property
    def num_groups(self) -> int:
        return self.num_heads // self.num_kv_heads
