"""The kernel interface in plain PyTorch.

Shapes: T tokens of all sequences of a step one after the other, H query heads, V key/value heads,
G = H / V heads a group, D head size. The KV cache of a layer is [num_blocks, block_size, 2, V, D], so
that a token's keys and values are one row and a block is one contiguous piece.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from flightline.torch_engine.core.config import ConfigError
from flightline.torch_engine.core.sampling import Sampled
from flightline.torch_engine.core.sampling_state import SamplingState
from flightline.torch_engine.core.steps import (
    PrefillChunk,
    SequenceSteps,
    StepBuilder,
    StepInput,
    TensorSequence,
    TensorSteps,
)
from flightline.torch_engine.kernels.operations import Operations, computed_in, name_of
from flightline.torch_engine.kernels.reference import sampling
from flightline.torch_engine.kernels.reference.mixture import RoutedMlp, clamped_gate
from flightline.torch_engine.model.kernel_interface import Layer
from flightline.torch_engine.model.mixture import MixtureSpec
from flightline.torch_engine.model.spec import ModelSpec
from flightline.torch_engine.model.weights import Checkpoint

Linear = Callable[[torch.Tensor], torch.Tensor]
CODED = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
"""KV caches of 8 bits."""
E4M3_MAX = 448.0


@dataclass
class CodedCache:
    """One layer's KV cache in 8 bits: a value is its code times its scale."""

    codes: torch.Tensor
    """[num_blocks, block_size, 2, V, D], e4m3 or int8."""
    scales: torch.Tensor
    """float32. e4m3: one for keys and one for values, [2, 1, 1]; int8: [num_blocks, block_size, 2, V, 1]."""

    def write(self, kv: torch.Tensor, slots: torch.Tensor) -> None:
        """``kv`` [T, 2, V, D]."""
        wide = kv.float()
        if self.codes.dtype == torch.int8:
            scales = wide.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
            self.scales.flatten(0, 1).index_copy_(0, slots, scales)
            codes = (wide / scales).round_().to(torch.int8)
        else:  # the cast turns values beyond 464 into NaN, hence the clamp
            codes = (wide / self.scales).clamp_(-E4M3_MAX, E4M3_MAX).to(self.codes.dtype)
        # As bytes: torch does not move e4m3 by index on every device.
        self.codes.view(torch.uint8).flatten(0, 1).index_copy_(0, slots, codes.view(torch.uint8))

    def read(self, blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[blocks, block_size, 2, V, D]."""
        codes = self.codes.view(torch.uint8).index_select(0, blocks).view(self.codes.dtype)
        scales = self.scales if self.scales.dim() == 3 else self.scales.index_select(0, blocks)
        return (codes.float() * scales).to(dtype)


Cache = torch.Tensor | CodedCache
"""One layer's KV cache: [num_blocks, block_size, 2, V, D], or its codes."""
PACKED_ROWS = 16
"""Rows that a packed CPU weight is laid out for; measured best across batch 1 to 256."""


class PyTorchKernels(Operations[Linear, torch.Tensor, Cache, StepInput]):
    """Reference implementation; computes in ``dtype`` on ``device``.

    ``kv`` is the dtype of the KV cache by its name in ``engine.json``: ``dtype`` itself, ``fp8`` or ``int8``.
    """

    name = "pytorch"

    def __init__(self, device: torch.device, dtype: torch.dtype, kv: str = "auto") -> None:
        super().__init__(device, dtype)
        own = name_of(dtype)
        self.kv = own if kv == "auto" else kv
        if self.kv not in (own, *CODED):
            raise ConfigError(
                f"kv_dtype={kv!r} is not for kernels='pytorch': use auto, {own}, {', '.join(CODED)}"
            )
        self.packs = device.type == "cpu" and torch.backends.mkldnn.is_available() and _onednn_packs(dtype)

    def describe(self, spec: ModelSpec) -> str:
        cache = f", {self.kv} KV cache" if self.kv in CODED else ""
        linears = "prepacked oneDNN" if self.packs else "plain"
        return f"{computed_in(spec, self.dtype)}, PyTorch kernels ({linears} linears{cache})"

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """Prepares ``x [T, K] -> [T, N]`` for ``weight [N, K]``; the weight passed in may be dropped afterwards."""
        weight = weight.to(self.device, self.dtype)
        bias = None if bias is None else bias.to(self.device, self.dtype)
        if not self.packs:
            return lambda x: F.linear(x, weight, bias)
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACKED_ROWS)
        run = torch.ops.mkldnn._linear_pointwise
        return lambda x: run(x, packed, bias, "none", [], "")

    def load_linear(self, checkpoint: Checkpoint, modules: list[str]) -> Linear:
        """The linear of one or several modules of a checkpoint, stacked along the output."""
        return self.linear(*checkpoint.fused(modules, self.dtype))

    def load_mixture(
        self, checkpoint: Checkpoint, mixture: MixtureSpec, layer: str, activation: str
    ) -> RoutedMlp:
        def named(module: str) -> torch.Tensor:
            return checkpoint.raw(f"{layer}.{module}").to(self.device)

        def mlp(modules: tuple[str, str, str]) -> Linear:
            gate, up, down = (f"{layer}.{module}" for module in modules)
            first, last = self.load_linear(checkpoint, [gate, up]), self.load_linear(checkpoint, [down])
            if mixture.clamp is not None:
                clamp = mixture.clamp
                return lambda x: last(clamped_gate(first(x), clamp))
            return lambda x: last(self.gate(first(x), activation))

        names = mixture.names
        router = named(f"{names.router}.weight").float()
        bias = named(f"{names.router}.bias").float() if mixture.router_bias else None
        return RoutedMlp(
            mixture,
            lambda x: F.linear(x.float(), router, bias),
            named(names.correction).float() if mixture.correction else None,
            [mlp(names.expert(number)) for number in range(mixture.experts)],
            mlp(names.shared_expert()) if mixture.shared_inner else None,
            named(f"{names.shared_gate}.weight") if mixture.shared_gate else None,
        )

    def embed(self, step: StepInput, table: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        """Embeddings of the step's tokens out of ``table``, times ``factor``: [T, N]."""
        x = F.embedding(step.token_ids, table)
        return x if factor == 1.0 else x * factor

    def steps(self, block_size: int, windows: Sequence[int | None]) -> StepBuilder[StepInput]:
        return TensorSteps(block_size, self.device, windows)

    def sequence_steps(
        self, spec: ModelSpec, blocks: torch.Tensor, block_size: int
    ) -> SequenceSteps[StepInput]:
        return TensorSequence(blocks, block_size)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Root-mean-square norm over the last dimension, in float32 like the checkpoints' own code."""
        if x.dtype == torch.float32:
            return F.rms_norm(x, x.shape[-1:], weight, eps)
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        if weight.dtype == torch.float32:
            return (normed * weight).to(x.dtype)
        return normed.to(x.dtype) * weight

    def _shared_norms(
        self, q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Norms over all heads of a token, of which each rank has equally many: ``q`` and ``k`` are [T, its heads D].

        Several ranks may have the same key head; then all heads count equally often.
        """
        wide = q.float(), k.float()
        means = torch.stack([each.square().mean(-1) for each in wide]) / self.group.size
        factors = torch.rsqrt(self.group.sum(means) + eps)[..., None]
        normed_q, normed_k = ((each * factor).to(q.dtype) for each, factor in zip(wide, factors, strict=True))
        return normed_q * q_weight, normed_k * k_weight

    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        post: torch.Tensor | None,
        weight: torch.Tensor | None,
        eps: float,
        reader: Linear | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if delta is not None:
            x = x + (delta if post is None else self.rms_norm(delta, post, eps))
        return x if weight is None else self.rms_norm(x, weight, eps), x

    def gate(self, gate_up: torch.Tensor, activation: str, reader: Linear | None = None) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gate = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
        return gate.mul_(up)

    def rotate(self, x: torch.Tensor, table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotary embedding of ``x [T, heads, D]``, halves paired as Hugging Face does; ``table`` [P, 2, D / 2]."""
        cos, sin = table[positions].to(x.dtype).unbind(1)
        cos, sin = cos[:, None], sin[:, None]
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def new_cache(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        kv_scales: tuple[float, float] = (1.0, 1.0),
    ) -> Cache:
        """One layer's KV cache: [num_blocks, block_size, 2, V, D].

        ``kv_scales`` are what a key and a value are divided by where the cache is e4m3.
        """
        shape = (num_blocks, block_size, 2, num_kv_heads, head_dim)
        if self.kv not in CODED:
            return torch.zeros(shape, device=self.device, dtype=self.dtype)
        if self.kv == "fp8":
            scales = torch.tensor(kv_scales, device=self.device).view(2, 1, 1)
        else:
            scales = torch.zeros(*shape[:-1], 1, device=self.device)
        return CodedCache(torch.zeros(shape, device=self.device).to(CODED[self.kv]), scales)

    def same_cache(self, cache: Cache, kv_scales: tuple[float, float]) -> Cache:
        if self.kv != "fp8":
            return cache
        assert isinstance(cache, CodedCache)
        scales = torch.tensor(kv_scales, device=self.device).view(2, 1, 1)
        return dataclasses.replace(cache, scales=scales)

    def cache_tensors(self, cache: Cache) -> list[torch.Tensor]:
        if not isinstance(cache, CodedCache):
            return [cache]
        return [cache.codes, cache.scales] if self.kv == "int8" else [cache.codes]

    def attention(
        self,
        qkv: torch.Tensor,
        layer: Layer[Linear],
        spec: ModelSpec,
        rope: torch.Tensor,
        cache: Cache,
        step: StepInput,
    ) -> torch.Tensor:
        kv_heads, eps = spec.num_kv_heads, spec.norm_eps
        heads = qkv.view(qkv.shape[0], spec.num_heads + 2 * kv_heads, spec.head_dim)
        qk, v = heads.split([spec.num_heads + kv_heads, kv_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = qk.split([spec.num_heads, kv_heads], dim=1)
            if spec.qk_norm == "row":
                q, k = q.flatten(1), k.flatten(1)
            if spec.qk_norm == "row" and self.group.size > 1:
                normed = self._shared_norms(q, k, layer.q_norm, layer.k_norm, eps)
            else:
                normed = self.rms_norm(q, layer.q_norm, eps), self.rms_norm(k, layer.k_norm, eps)
            qk = torch.cat([part.unflatten(-1, (-1, spec.head_dim)).flatten(1, -2) for part in normed], dim=1)
        qk = self.rotate(qk, rope, step.positions)
        q, k = qk.split([spec.num_heads, kv_heads], dim=1)
        scale, window, softcap = spec.attention_scale, layer.spec.window, spec.attention_softcap
        out = self.attend(q, k, v, cache, step, scale, window, softcap, layer.sinks, layer.group)
        return out.reshape(qkv.shape[0], -1)

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cache: Cache,
        step: StepInput,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        group: int = 0,
    ) -> torch.Tensor:
        """Writes the step's keys and values into ``cache``, then lets each token attend to its sequence.

        ``q`` [T, H, D], ``k`` and ``v`` [T, V, D] -> [T, H, D]; ``sinks`` and ``group`` as ``Layer`` has them.
        """
        self.write_cache(k, v, cache, step.slots[group])
        parts = []
        if step.num_decodes:
            decodes = q[: step.num_decodes]
            parts.append(self.attend_decodes(decodes, cache, step, scale, window, softcap, sinks, group))
        for number in range(len(step.prefills)):
            parts.append(self.attend_prefill(q, cache, step, number, scale, window, softcap, sinks, group))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def write_cache(self, k: torch.Tensor, v: torch.Tensor, cache: Cache, slots: torch.Tensor) -> None:
        kv = torch.stack([k, v], dim=1)
        if isinstance(cache, CodedCache):
            cache.write(kv, slots)
        else:
            cache.view(-1, 2, *k.shape[1:]).index_copy_(0, slots, kv)

    def attend_decodes(
        self,
        q: torch.Tensor,
        cache: Cache,
        step: StepInput,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
        group: int = 0,
    ) -> torch.Tensor:
        """One query token of each sequence: ``q`` [decodes, H, D] -> [decodes, H, D]."""
        rows, heads, head_dim = q.shape
        keys, values = _gather(cache, step.decode_blocks[group].flatten(), rows, self.dtype)
        mask = step.made.get(("decode", window))
        if mask is None:
            mask = _decode_mask(
                step.decode_lengths, step.decode_begins[group], keys.shape[2], window, self.dtype
            )
            step.made["decode", window] = mask
        grouped = q.view(rows, keys.shape[1], -1, head_dim)
        sinks = None if sinks is None else sinks.view(keys.shape[1], -1)
        return _attention(grouped, keys, values, mask, scale, softcap, sinks).reshape(rows, heads, head_dim)

    def attend_prefill(
        self,
        q: torch.Tensor,
        cache: Cache,
        step: StepInput,
        number: int,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
        group: int = 0,
    ) -> torch.Tensor:
        """The step's ``number``-th prompt chunk, out of ``q`` [T, H, D] -> [tokens of the chunk, H, D]."""
        chunk = step.prefills[number]
        count, (heads, head_dim) = chunk.end - chunk.start, q.shape[1:]
        begin = chunk.begins[group]
        keys, values = _gather(cache, chunk.blocks[group], 1, self.dtype)
        keys, values = keys[:, :, : chunk.context - begin], values[:, :, : chunk.context - begin]
        kv_heads = keys.shape[1]
        mask = step.made.get((number, window))
        if mask is None:
            mask = _prefill_mask(chunk, begin, heads // kv_heads, window, self.dtype, self.device)
            step.made[number, window] = mask
        # The group's heads become query rows, [1, V, G * tokens, D]: five times faster than repeating K and V.
        grouped = q[chunk.start : chunk.end].view(count, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        sinks = None if sinks is None else sinks.view(kv_heads, -1).repeat_interleave(count, 1)
        queries = grouped.reshape(1, kv_heads, -1, head_dim)
        out = _attention(queries, keys, values, mask, scale, softcap, sinks)
        return out.view(kv_heads, -1, count, head_dim).permute(2, 0, 1, 3).reshape(count, heads, head_dim)

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        highest, tokens = logits.max(-1)
        if not bool(highest.isfinite().all()):  # NaN counts as highest there
            highest, tokens = sampling.tidy(logits).max(-1)
            tokens = tokens.masked_fill(highest == -torch.inf, -1)
        return tokens

    def sample(
        self, logits: torch.Tensor, states: list[SamplingState], positions: list[int]
    ) -> list[Sampled]:
        return sampling.sample(logits, states, positions)


def _onednn_packs(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def _gather(
    cache: Cache, blocks: torch.Tensor, rows: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of ``rows`` sequences: each [rows, V, blocks a row * block_size, D]."""
    if isinstance(cache, CodedCache):
        picked, stored = cache.read(blocks, dtype), cache.codes
    else:
        picked, stored = cache.flatten(1).index_select(0, blocks), cache
    num_kv_heads, head_dim = stored.shape[3:]
    keys, values = picked.view(rows, -1, 2, num_kv_heads, head_dim).permute(2, 0, 3, 1, 4).unbind(0)
    return keys, values


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """``sinks`` [V, query rows]."""
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask.float()
    if sinks is None:
        return torch.matmul(scores.softmax(-1).to(v.dtype), v)
    with_sinks = torch.cat([scores, sinks[..., None].expand(*scores.shape[:-1], 1)], dim=-1)
    return torch.matmul(with_sinks.softmax(-1)[..., :-1].to(v.dtype), v)


def _decode_mask(
    lengths: torch.Tensor, begins: torch.Tensor, width: int, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    """[decodes, 1, 1, width]: 0 where a key is seen, -inf elsewhere; each row's keys count from its ``begins`` on."""
    keys = begins[:, None] + torch.arange(width, device=lengths.device)
    seen = keys < lengths[:, None]
    if window is not None:
        seen &= keys >= lengths[:, None] - window
    return _additive(seen, dtype)[:, None, None]


def _prefill_mask(
    chunk: PrefillChunk, begin: int, group: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """[group * tokens, keys from ``begin`` to the context's end], the group's heads one after the other."""
    count = chunk.end - chunk.start
    keys = torch.arange(begin, chunk.context, device=device)
    own = torch.arange(chunk.context - count, chunk.context, device=device)[:, None]
    seen = keys <= own
    if window is not None:
        seen &= keys > own - window
    return _additive(seen, dtype).repeat(group, 1)


def _additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
