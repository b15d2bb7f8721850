"""The decoder: one forward pass for all supported families, over the kernel interface."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from torch_engine.families import LayerSpec
from torch_engine.kernels.pytorch import Linear, PyTorchKernels, StepInput
from torch_engine.rope import rope_table
from torch_engine.weights import Checkpoint


@dataclass
class Layer:
    spec: LayerSpec
    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    input_norm: torch.Tensor
    mlp_norm: torch.Tensor
    attention_out_norm: torch.Tensor | None = None
    mlp_out_norm: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None


class Model:
    """Weights of a checkpoint, prepared for one implementation of the kernels."""

    def __init__(self, checkpoint: Checkpoint, kernels: PyTorchKernels, max_seq_len: int) -> None:
        spec = checkpoint.spec
        self.spec = spec
        self.kernels = kernels
        dtype, device = kernels.dtype, kernels.device
        self.embedding = checkpoint.weight("model.embed_tokens", dtype).to(device)
        self.embedding_scale = torch.tensor(spec.embedding_scale, dtype=dtype, device=device)
        self.layers = [self._load_layer(checkpoint, index) for index in range(spec.num_layers)]
        self.norm = self._norm(checkpoint, "model.norm")
        tied = spec.tie_embeddings and "lm_head.weight" not in checkpoint
        self.lm_head = kernels.linear(
            self.embedding if tied else checkpoint.weight("lm_head", dtype), checkpoint.bias("lm_head", dtype)
        )
        self.ropes = {
            rope: rope_table(rope, spec.head_dim, max_seq_len, spec.max_position_embeddings).to(device)
            for rope in {layer.rope for layer in spec.layers}
        }

    def _norm(self, checkpoint: Checkpoint, name: str) -> torch.Tensor:
        return self.kernels.norm_weight(checkpoint.raw(f"{name}.weight"), self.spec.norm_plus_one)

    def _load_layer(self, checkpoint: Checkpoint, index: int) -> Layer:
        spec, dtype = self.spec, self.kernels.dtype
        name = f"model.layers.{index}"

        def linear(*modules: str) -> Linear:
            return self.kernels.linear(*checkpoint.fused([f"{name}.{module}" for module in modules], dtype))

        def norm(module: str) -> torch.Tensor:
            return self._norm(checkpoint, f"{name}.{module}")

        layer = Layer(
            spec=spec.layers[index],
            qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            out=linear("self_attn.o_proj"),
            gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
            down=linear("mlp.down_proj"),
            input_norm=norm("input_layernorm"),
            mlp_norm=norm("pre_feedforward_layernorm" if spec.sandwich_norm else "post_attention_layernorm"),
        )
        if spec.sandwich_norm:
            layer.attention_out_norm = norm("post_attention_layernorm")
            layer.mlp_out_norm = norm("post_feedforward_layernorm")
        if spec.qk_norm:
            layer.q_norm, layer.k_norm = norm("self_attn.q_norm"), norm("self_attn.k_norm")
        return layer

    def new_caches(self, num_blocks: int, block_size: int) -> list[torch.Tensor]:
        """A KV cache for each layer; one block more than asked for, which padding may read and write."""
        spec = self.spec
        return [
            self.kernels.new_cache(num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
            for _ in self.layers
        ]

    def forward(self, step: StepInput, caches: list[torch.Tensor]) -> torch.Tensor:
        """Runs one step; fills the caches and returns logits [sampled, vocab] in float32."""
        x = F.embedding(step.token_ids, self.embedding)
        if self.spec.embedding_scale != 1.0:
            x = x * self.embedding_scale
        for layer, cache in zip(self.layers, caches, strict=True):
            x = x + self._attention(layer, x, cache, step)
            x = x + self._mlp(layer, x)
        x = self.kernels.rms_norm(x.index_select(0, step.logit_rows), self.norm, self.spec.norm_eps)
        logits = self.lm_head(x).float()
        cap = self.spec.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _attention(self, layer: Layer, x: torch.Tensor, cache: torch.Tensor, step: StepInput) -> torch.Tensor:
        spec, kernels = self.spec, self.kernels
        eps = spec.norm_eps
        qkv = layer.qkv(kernels.rms_norm(x, layer.input_norm, eps))
        heads = qkv.view(x.shape[0], spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
        qk, v = heads.split([spec.num_heads + spec.num_kv_heads, spec.num_kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = qk.split([spec.num_heads, spec.num_kv_heads], dim=1)
            qk = torch.cat(
                [kernels.rms_norm(q, layer.q_norm, eps), kernels.rms_norm(k, layer.k_norm, eps)], dim=1
            )
        qk = kernels.rotate(qk, self.ropes[layer.spec.rope], step.positions)
        q, k = qk.split([spec.num_heads, spec.num_kv_heads], dim=1)
        out = kernels.attend(
            q, k, v, cache, step, spec.attention_scale, layer.spec.window, spec.attention_softcap
        )
        out = layer.out(out.reshape(x.shape[0], -1))
        return (
            out if layer.attention_out_norm is None else kernels.rms_norm(out, layer.attention_out_norm, eps)
        )

    def _mlp(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        kernels, eps = self.kernels, self.spec.norm_eps
        hidden = layer.gate_up(kernels.rms_norm(x, layer.mlp_norm, eps))
        out = layer.down(kernels.gate(hidden, self.spec.activation))
        return out if layer.mlp_out_norm is None else kernels.rms_norm(out, layer.mlp_out_norm, eps)
