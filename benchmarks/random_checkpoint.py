"""A checkpoint that exists on the device only: the shape of a large model, random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from flightline.torch_engine.model.coded import Coded
from flightline.torch_engine.model.quantization import Quantization
from flightline.torch_engine.model.shard import Shard
from flightline.torch_engine.model.spec import LayerSpec, ModelSpec, Rope
from flightline.torch_engine.model.weights import Checkpoint

LLAMA_ROPE = Rope(
    500000.0,
    (
        ("factor", 8.0), ("high_freq_factor", 4.0), ("low_freq_factor", 1.0),
        ("original_max_position_embeddings", 8192), ("rope_type", "llama3"),
    ),
)  # fmt: skip
LLAMA_8B = ModelSpec(
    architecture="LlamaForCausalLM", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_heads=32,
    num_kv_heads=8, head_dim=128, norm_eps=1e-5, layers=(LayerSpec(LLAMA_ROPE, None),) * 32, tie_embeddings=False,
    max_position_embeddings=131072, activation="silu", attention_scale=128**-0.5, end_ids=(),
    quantization=Quantization("ModelOpt FP8", static=True),
)  # fmt: skip

LLAMA_70B = dataclasses.replace(
    LLAMA_8B,
    hidden_size=8192,
    intermediate_size=28672,
    num_heads=64,
    layers=(LayerSpec(LLAMA_ROPE, None),) * 80,
)


class RandomCheckpoint(Checkpoint):
    """Random weights of a given shape, made on the device when asked for: linears in FP8, or in 4 bits as of AWQ in
    groups of 128; the rest in bf16.

    The parts of ranks do not make up the whole: each is a random model of its own size.
    """

    def __init__(self, spec: ModelSpec, fp8: bool, device: str = "cuda", int4: bool = False) -> None:
        self.spec = self.whole = spec
        self.shard = Shard()
        self.fp8, self.int4, self.device, self.folder = fp8, int4, device, Path("random")
        self._random_state: torch.Generator | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_random_state": None}

    @property
    def _generator(self) -> torch.Generator:
        """On the GPU of the process that asks."""
        if self._random_state is None:
            self._random_state = torch.Generator(self.device).manual_seed(0)
        return self._random_state

    def __contains__(self, name: str) -> bool:
        return name.endswith(("norm.weight", "layernorm.weight")) or name in (
            "model.embed_tokens.weight", "lm_head.weight",
        )  # fmt: skip

    def _random(self, *shape: int, spread: float) -> torch.Tensor:
        values = torch.randn(*shape, generator=self._generator, device=self.device, dtype=torch.bfloat16)
        return values * spread

    def _shape(self, module: str) -> tuple[int, int]:
        spec = self.spec
        hidden, inner, query = spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim
        keys = spec.num_kv_heads * spec.head_dim
        begin, end, _ = self.shard.vocabulary(spec.vocab_size)
        return {
            "q_proj": (query, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, query),
            "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner),
            "lm_head": (end - begin, hidden), "embed_tokens": (spec.vocab_size, hidden),
        }[module.rsplit(".", 1)[-1]]  # fmt: skip

    def raw(self, name: str) -> torch.Tensor:
        if "norm" in name:
            return 1.0 + self._random(self.spec.hidden_size, spread=0.1)
        return self.weight(name.removesuffix(".weight"), torch.bfloat16)

    def weight(self, module: str, dtype: torch.dtype) -> torch.Tensor:
        return self._random(*self._shape(module), spread=0.02).to(dtype)

    def bias(self, module: str, dtype: torch.dtype) -> None:
        return None

    def coded(self, module: str) -> Coded | None:
        rows, inputs = self._shape(module)
        if self.int4:
            make = {"generator": self._generator, "device": self.device, "dtype": torch.uint8}
            codes = torch.randint(0, 16, (rows, inputs), **make)
            zeros = torch.randint(6, 10, (rows, inputs // 128), **make)
            scales = torch.full(zeros.shape, 0.02 / 4.6, device=self.device, dtype=torch.float16)
            return Coded(codes, scales, 128, zeros, 4)
        if not self.fp8:
            return None
        codes = self._random(rows, inputs, spread=64.0).clamp_(-448, 448).to(torch.float8_e4m3fn)
        scales = torch.full((rows, 1), 0.02 / 64, device=codes.device)
        return Coded(codes, scales, inputs, input_scale=torch.tensor(8.0 / 448, device=codes.device))
