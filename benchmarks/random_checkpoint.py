"""A checkpoint that exists on the device only: the shape of a large model, random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from flightline.torch_engine.model.coded import Coded
from flightline.torch_engine.model.mixture import MixtureNames, MixtureSpec
from flightline.torch_engine.model.mxfp4 import GROUP
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
)  # fmt: skip

LLAMA_70B = dataclasses.replace(
    LLAMA_8B,
    hidden_size=8192,
    intermediate_size=28672,
    num_heads=64,
    layers=(LayerSpec(LLAMA_ROPE, None),) * 80,
)


GPT_OSS_ROPE = Rope(
    150000.0,
    (
        ("beta_fast", 32.0), ("beta_slow", 1.0), ("factor", 32.0), ("original_max_position_embeddings", 4096),
        ("rope_type", "yarn"), ("truncate", False),
    ),
)  # fmt: skip
GPT_OSS_MIXTURE = MixtureSpec(
    experts=32, chosen=4, inner=2880, normalise=True, router_bias=True, expert_bias=True, clamp=7.0, stacked=True,
    names=MixtureNames(choice="router"),
)  # fmt: skip
GPT_OSS_20B = ModelSpec(
    architecture="GptOssForCausalLM", vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_heads=64,
    num_kv_heads=8, head_dim=64, norm_eps=1e-5,
    layers=tuple(LayerSpec(GPT_OSS_ROPE, window, GPT_OSS_MIXTURE) for window in (128, None) * 12),
    tie_embeddings=False, max_position_embeddings=131072, activation="silu", attention_scale=64**-0.5, end_ids=(),
    quantization=Quantization("MXFP4, 4 bits in groups of 32", False, packing="mxfp4", group=GROUP), qkv_bias=True,
    out_bias=True, sinks=True,
)  # fmt: skip
QWEN3_30B_A3B = ModelSpec(
    architecture="Qwen3MoeForCausalLM", vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_heads=32,
    num_kv_heads=4, head_dim=128, norm_eps=1e-6,
    layers=(LayerSpec(Rope(1000000.0), None, MixtureSpec(128, 8, 768, normalise=True)),) * 48, tie_embeddings=False,
    max_position_embeddings=40960, activation="silu", attention_scale=128**-0.5, end_ids=(), qk_norm="head",
)  # fmt: skip
SHAPES = {
    "llama-8b": LLAMA_8B, "llama-70b": LLAMA_70B, "qwen3-30b-a3b": QWEN3_30B_A3B, "gpt-oss-20b": GPT_OSS_20B,
}  # fmt: skip
LLAMA_FORMATS = ("fp8", "fp8-output", "fp8-blocks", "int4", "bf16", "int8")
PRECISIONS = {
    "llama-8b": LLAMA_FORMATS, "llama-70b": LLAMA_FORMATS[:4],
    "qwen3-30b-a3b": ("fp8-blocks", "fp8-output", "fp8", "int4", "bf16"), "gpt-oss-20b": ("mxfp4", "bf16"),
}  # fmt: skip
"""What a shape is measured in, the form that people have first: FP8 with one scale a tensor, an output or a block of
128x128; AWQ's 4 bits in groups of 128; int8 is made at load."""

FORMS = {
    "fp8": "FP8, a scale for each tensor, static activations", "fp8-output": "FP8, a scale for each output",
    "fp8-blocks": "FP8 in blocks of 128x128", "int4": "AWQ, 4 bits in groups of 128",
}  # fmt: skip


def scaled_down(spec: ModelSpec) -> ModelSpec:
    """The same in two layers of a size that a CPU runs in a moment."""
    layers = spec.layers[:2]
    if (mixture := layers[0].mixture) is not None:
        small = dataclasses.replace(mixture, experts=8, chosen=2, inner=128)
        layers = tuple(dataclasses.replace(layer, mixture=small) for layer in layers)
    return dataclasses.replace(
        spec,
        layers=layers,
        hidden_size=256,
        intermediate_size=384,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=512,
    )


class RandomCheckpoint(Checkpoint):
    """Random weights of a given shape, made on the device when asked for, linears in the ``form`` of
    :data:`PRECISIONS`, the rest in bf16. Of a spec in MXFP4 the experts are that, and all else is bf16.

    The parts of ranks do not make up the whole: each is a random model of its own size.
    """

    def __init__(self, spec: ModelSpec, form: str = "fp8", device: str = "cuda") -> None:
        if form in FORMS:
            spec = dataclasses.replace(spec, quantization=Quantization(FORMS[form], static=form == "fp8"))
        self.spec = self.whole = spec
        self.shard = Shard()
        self.form, self.device, self.folder = form, device, Path("random")
        self.mxfp4 = spec.quantization is not None and spec.quantization.packing == "mxfp4"
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
        mixture = spec.layers[0].mixture
        if mixture is not None and ".mlp." in module:
            if module.endswith(mixture.names.router):
                return mixture.experts, hidden
            inner = mixture.inner
        return {
            "q_proj": (query, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, query),
            "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner),
            "lm_head": (end - begin, hidden), "embed_tokens": (spec.vocab_size, hidden),
        }[module.rsplit(".", 1)[-1]]  # fmt: skip

    def raw(self, name: str) -> torch.Tensor:
        if "norm" in name:
            heads = name.endswith(("q_norm.weight", "k_norm.weight"))
            return 1.0 + self._random(self.spec.head_dim if heads else self.spec.hidden_size, spread=0.1)
        if name.endswith("sinks"):
            return self._random(self.spec.num_heads, spread=1.0)
        if name.endswith(".bias"):
            return self._random(self._shape(name.removesuffix(".bias"))[0], spread=0.1)
        return self.weight(name.removesuffix(".weight"), torch.bfloat16)

    def weight(self, module: str, dtype: torch.dtype) -> torch.Tensor:
        return self._random(*self._shape(module), spread=0.02).to(dtype)

    def bias(self, module: str, dtype: torch.dtype) -> torch.Tensor | None:
        mixture = self.spec.layers[0].mixture
        if module.endswith(("q_proj", "k_proj", "v_proj")):
            biased = self.spec.qkv_bias
        elif module.endswith("o_proj"):
            biased = self.spec.out_bias
        else:
            biased = ".experts." in module and mixture is not None and mixture.expert_bias
        return self.raw(f"{module}.bias").to(dtype) if biased else None

    def coded(self, module: str) -> Coded | None:
        rows, inputs = self._shape(module)
        make: dict[str, Any] = {
            "generator": self._generator, "device": self.device, "dtype": torch.uint8,
        }  # fmt: skip
        if self.mxfp4:
            if ".experts." not in module:
                return None
            codes = torch.randint(0, 16, (rows, inputs), **make)
            scales = torch.full((rows, inputs // GROUP), 2.0**-7, device=self.device, dtype=torch.bfloat16)
            return Coded(codes, scales, GROUP, bits=4, e2m1=True)
        if self.form == "int4":
            codes = torch.randint(0, 16, (rows, inputs), **make)
            zeros = torch.randint(6, 10, (rows, inputs // 128), **make)
            scales = torch.full(zeros.shape, 0.02 / 4.6, device=self.device, dtype=torch.float16)
            return Coded(codes, scales, 128, zeros, 4)
        if not self.form.startswith("fp8"):
            return None
        codes = self._random(rows, inputs, spread=64.0).clamp_(-448, 448).to(torch.float8_e4m3fn)
        group = 128 if self.form == "fp8-blocks" else inputs
        scales = torch.full((rows, -(-inputs // group)), 0.02 / 64, device=codes.device)
        if self.form == "fp8-output":
            scales *= 1 + torch.arange(rows, device=codes.device)[:, None] / rows
        known = torch.tensor(8.0 / 448, device=codes.device) if self.form == "fp8" else None
        return Coded(codes, scales, group, input_scale=known)
