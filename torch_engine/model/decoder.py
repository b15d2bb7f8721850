"""The decoder: one forward pass for all supported families, over the kernel interface."""

from __future__ import annotations

from typing import Generic

import torch
import torch.nn.functional as F

from flightline.torch_engine.core.layer_groups import LayerGroups
from flightline.torch_engine.model.kernel_interface import (
    CacheT,
    GatedMlp,
    Kernels,
    Layer,
    LinearT,
    RoutedMlp,
    StepT,
)
from flightline.torch_engine.model.layout import SINKS
from flightline.torch_engine.model.rope import rope_table
from flightline.torch_engine.model.weights import Checkpoint


class Model(Generic[LinearT, CacheT, StepT]):
    """Weights of a checkpoint, prepared for one implementation of the kernels; one rank's, if several share the model.

    Ranks run the same steps at the same time, and their kernels' ``group`` adds up what they have computed.
    """

    def __init__(
        self, checkpoint: Checkpoint, kernels: Kernels[LinearT, CacheT, StepT], max_seq_len: int
    ) -> None:
        spec = checkpoint.spec
        self.spec = spec
        self.kernels = kernels
        dtype, device = kernels.dtype, kernels.device
        self.embedding = kernels.embedding(checkpoint, "model.embed_tokens")
        # Read on the host.
        rounded = dtype if spec.rounds_embedding_scale else torch.float32
        self.embedding_scale = torch.tensor(spec.embedding_scale, dtype=rounded)
        self.layers = [self._load_layer(checkpoint, index) for index in range(spec.num_layers)]
        self.norm = self._norm(checkpoint, "model.norm") / spec.logit_divisor  # the head is linear
        self.first_token, beyond, self.padding = checkpoint.shard.vocabulary(spec.vocab_size)
        """Of this rank's part of the vocabulary; ranks have equally many logits, the last ones -inf of no token."""
        tied = spec.tie_embeddings and "lm_head.weight" not in checkpoint
        if tied:
            own = self.embedding[self.first_token : beyond]
            self.lm_head = kernels.linear(own, checkpoint.bias("lm_head", dtype))
        else:
            self.lm_head = kernels.load_linear(checkpoint, ["lm_head"])
        self.ropes = {
            rope: rope_table(rope, spec.head_dim, max_seq_len, spec.max_position_embeddings).to(device)
            for rope in {layer.rope for layer in spec.layers}
        }

    def _norm(self, checkpoint: Checkpoint, name: str) -> torch.Tensor:
        return self.kernels.norm_weight(checkpoint.raw(f"{name}.weight"), self.spec.norm_plus_one)

    def _load_layer(self, checkpoint: Checkpoint, index: int) -> Layer[LinearT]:
        spec = self.spec
        name = f"model.layers.{index}"

        def linear(*modules: str) -> LinearT:
            return self.kernels.load_linear(checkpoint, [f"{name}.{module}" for module in modules])

        def norm(module: str) -> torch.Tensor:
            return self._norm(checkpoint, f"{name}.{module}")

        def mlp() -> GatedMlp[LinearT] | RoutedMlp[LinearT]:
            mixture = spec.layers[index].mixture
            if mixture is not None:
                return self.kernels.load_mixture(checkpoint, mixture, name, spec.activation)
            return GatedMlp(linear("mlp.gate_proj", "mlp.up_proj"), linear("mlp.down_proj"))

        def norm_if(module: str | None) -> torch.Tensor | None:
            return None if module is None else norm(module)

        layer = Layer(
            spec=spec.layers[index],
            qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            out=linear("self_attn.o_proj"),
            mlp=mlp(),
            input_norm=norm_if(spec.norms.attention),
            attention_out_norm=norm_if(spec.norms.attention_out),
            mlp_norm=norm_if(spec.norms.mlp),
            mlp_out_norm=norm_if(spec.norms.mlp_out),
            kv_scales=checkpoint.kv_scales(f"{name}.self_attn"),
        )
        if spec.qk_norm != "none":
            layer.q_norm, layer.k_norm = norm("self_attn.q_norm"), norm("self_attn.k_norm")
        if spec.sinks:
            layer.sinks = checkpoint.raw(f"{name}.{SINKS}").float().to(self.kernels.device)
        return layer

    def new_caches(self, num_blocks: int, block_size: int, groups: LayerGroups | None = None) -> list[CacheT]:
        """A KV cache for each layer, of ``num_blocks`` blocks; layers of different ``groups`` share their memory.

        Raises MemoryError if they do not fit the device.
        """
        groups = groups or LayerGroups.one(len(self.layers))
        try:
            return self._new_caches(num_blocks, block_size, groups)
        except (MemoryError, RuntimeError) as error:  # torch has no exception of its own for a CPU's memory
            if "memory" not in str(error) and "overflow" not in str(error):
                raise
            known = f" ({error})" if isinstance(error, MemoryError) else ""
            raise MemoryError(
                f"num_kv_blocks={num_blocks * groups.size // len(self.layers)} blocks of {block_size} tokens for "
                f"{len(self.layers)} layers do not fit the memory of {self.kernels.device}: lower num_kv_blocks, or "
                f"build with a smaller MAX_SEQ_LEN{known}"
            ) from None

    def _new_caches(self, num_blocks: int, block_size: int, groups: LayerGroups) -> list[CacheT]:
        spec, caches = self.spec, []
        first: dict[int, CacheT] = {}
        for layer, group, place in zip(self.layers, groups.groups, groups.places, strict=True):
            layer.group = group
            if place in first:
                caches.append(self.kernels.same_cache(first[place], layer.kv_scales))
                continue
            first[place] = self.kernels.new_cache(
                num_blocks, block_size, spec.num_kv_heads, spec.head_dim, layer.kv_scales
            )
            caches.append(first[place])
        return caches

    def forward(self, step: StepT, caches: list[CacheT]) -> torch.Tensor:
        """Runs one step; fills the caches and returns logits [sampled, vocab] in float32, on every rank."""
        logits = self.finished(self.raw_logits(step, caches))
        return self.kernels.group.columns(logits)[:, : self.spec.vocab_size]

    def raw_logits(self, step: StepT, caches: list[CacheT]) -> torch.Tensor:
        """This rank's logits as the output head gives them: their order is right, their values before the soft cap."""
        x = self.kernels.embed(step, self.embedding, self.embedding_scale)
        logits = self.kernels.decode(self, x, caches, step)
        return F.pad(logits, (0, self.padding), value=-torch.inf) if self.padding else logits

    def finished(self, logits: torch.Tensor) -> torch.Tensor:
        """Raw logits of one rank in float32, soft-capped where the model asks for it."""
        logits, cap = self.kernels.float_logits(logits, self.lm_head), self.spec.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)
