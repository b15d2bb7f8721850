"""The kernel interface in compiled C++ for CPUs.

Weights are bfloat16 with float32 activations, or int8 or int4 with int8 activations (both in groups of 32);
norms, attention and sums are float32. The KV cache is float32, bfloat16 or int8.

The libraries lie in the engine folder, one for each instruction set (``kernels/cpu/toolchain.py``); the best that
the CPU has is taken.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from flightline.torch_engine.core.config import ConfigError, EngineConfig
from flightline.torch_engine.core.host_memory import free_host_memory
from flightline.torch_engine.core.sampling import Sampled
from flightline.torch_engine.core.sampling_state import SamplingState
from flightline.torch_engine.core.steps import SequenceSteps, StepBuilder, StepInput, TensorSequence
from flightline.torch_engine.kernels.cpu.pages import zeros
from flightline.torch_engine.kernels.cpu.toolchain import available_isas, is_whole, library
from flightline.torch_engine.kernels.operations import Operations, computed_in
from flightline.torch_engine.model.coded import Coded
from flightline.torch_engine.model.kernel_interface import (
    Decoder,
    GatedMlp,
    Layer,
    RoutedMlp,
)
from flightline.torch_engine.model.mixture import MixtureSpec
from flightline.torch_engine.model.spec import ModelSpec
from flightline.torch_engine.model.weights import Checkpoint

I64, F32, POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
SIGNATURES = {
    "fl_set_threads": (I64,),
    "fl_layout": (),
    "fl_pack": (POINTER, I64, I64, POINTER),
    "fl_pack_ints": (I64, POINTER, I64, I64, POINTER),
    "fl_linear": (POINTER, POINTER, I64, POINTER),
    "fl_mixture": (POINTER, POINTER, I64, POINTER),
    "fl_pack_codes": (I64, POINTER, POINTER, POINTER, I64, I64, I64, POINTER),
    "fl_add_norm": (POINTER, POINTER, POINTER, POINTER, F32, I64, I64, I64, POINTER),
    "fl_gate": (POINTER, I64, I64, I64, I64, POINTER),
    "fl_attention": (POINTER, POINTER, POINTER, I64, POINTER),
    "fl_argmax": (POINTER, I64, I64, POINTER),
    "fl_sample": (POINTER, I64, I64, *[POINTER] * 4, I64, POINTER, POINTER),
    "fl_kept": (POINTER, I64, POINTER, POINTER),
    "fl_noise": (ctypes.c_uint64, I64, I64, I64, POINTER, POINTER),
    "fl_embed_rows": (POINTER, I64, POINTER, I64, I64, F32, POINTER),
    "fl_step": (POINTER, I64, POINTER, I64, I64, I64, I64, POINTER),
    "fl_decode": (POINTER, POINTER, POINTER, POINTER, I64, POINTER),
}
GROUP = 32
"""Inputs that share a scale."""
PACKED_AT_ONCE = 1 << 12
"""Outputs, a whole number of panels."""
WEIGHT_BITS = {"auto": 16, "int8": 8, "int4": 4}
CACHE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class AttentionLayer(ctypes.Structure):
    """``AttentionLayer`` of cpu/attention.h."""

    _fields_ = (
        *[(name, POINTER) for name in ("cache", "scales", "rope", "q_norm", "k_norm")],
        *[
            (name, I64)
            for name in (
                *("element_bytes", "heads", "kv_heads", "d", "block_size", "window", "norms_row", "group"),
            )
        ],
        *[(name, F32) for name in ("eps", "scale", "softcap")],
        ("sinks", POINTER),
    )


class AttentionStep(ctypes.Structure):
    """``AttentionStep`` of cpu/attention.h."""

    _fields_ = (
        *[(name, I64) for name in ("rows", "chunks")],
        *[(name, POINTER) for name in ("positions", "slots", "spans", "tables")],
        ("width", I64),
    )


@dataclass
class NativeStep:
    """A step as the library takes it."""

    token_ids: NDArray[np.int64]
    """[T] int64."""
    where: AttentionStep
    logit_rows: int | None
    """Address of [wanted] int64: rows of the step whose logits are wanted, in ascending order; None = all."""
    wanted: int
    kept: tuple[object, ...]
    """What the addresses point to."""

    @classmethod
    def of(cls, step: StepInput) -> NativeStep:
        where, kept = _where(step)
        rows = None if step.logit_rows is None else step.logit_rows.contiguous()
        wanted = step.positions.shape[0] if rows is None else rows.shape[0]
        return cls(step.token_ids.numpy(), where, _at(rows), wanted, (kept, rows))


class NativeSteps(StepBuilder[NativeStep]):
    """Steps straight from the builder's own block tables, in one call: in Python the arrays' many small operations
    take as long as everything else the host does."""

    def __init__(
        self, block_size: int, library: ctypes.CDLL, windows: Sequence[int | None] = (None,)
    ) -> None:
        super().__init__(block_size, torch.device("cpu"), windows)
        self._make = library.fl_step

    def _step(
        self, tokens: NDArray[np.int64], columns: NDArray[np.int64], decodes: int, sampled: int
    ) -> NativeStep:
        chunks, rows, tables = len(columns), len(tokens), self._tables
        _, groups, width = tables.shape
        made = np.empty(4 * chunks + (1 + groups) * rows + sampled, dtype=np.int64)
        at, table_at = _address(made), _address(tables)
        self._make(_address(columns), chunks, table_at, groups, width, self._block_size, rows, at)
        spans, positions, slots = at, at + 32 * chunks, at + 32 * chunks + 8 * rows
        where = AttentionStep(rows, chunks, positions, slots, spans, table_at, width)
        return NativeStep(tokens, where, slots + 8 * groups * rows, sampled, (made, tables))


class SamplingRow(ctypes.Structure):
    """``SamplingRow`` of cpu/sampling.h."""

    _fields_ = (
        *[(name, POINTER) for name in ("allowed", "seen", "generated", "amounts")],
        ("num_generated", I64),
        *[(name, POINTER) for name in ("bias_ids", "biases")],
        ("num_biases", I64),
        ("banned", POINTER),
        ("num_banned", I64),
        ("matched", POINTER),
        ("num_matched", I64),
        ("ends", POINTER),
        *[(name, I64) for name in ("num_ends", "ends_from")],
        ("seed", ctypes.c_uint64),
        *[(name, I64) for name in ("top_k", "num_top")],
        *[(name, ctypes.c_double) for name in ("temperature", "top_p", "least")],
        ("repetition", F32),
    )

    @classmethod
    def of(cls, state: SamplingState) -> SamplingRow:
        """``state``'s constants, made once, and what has changed since."""
        row: SamplingRow | None = state.made
        if row is None:
            row = state.made = cls(
                seen=_address(state.seen) if len(state.seen) else None,
                bias_ids=_address(state.bias_ids),
                biases=_address(state.biases),
                num_biases=len(state.bias_ids),
                banned=_address(state.banned),
                num_banned=len(state.banned),
                ends=_address(state.ends),
                num_ends=len(state.ends),
                ends_from=state.ends_from,
                seed=state.seed,
                top_k=state.top_k,
                num_top=state.num_top,
                temperature=state.temperature,
                top_p=state.top_p,
                least=state.least,
                repetition=state.repetition,
            )
        if state.penalises_output:
            generated = state.generated
            row.generated, row.amounts = _address(generated), _address(state.amounts)
            row.num_generated = len(generated)
        if state.words.spans_tokens:
            matched = state.matched
            row.matched, row.num_matched = _address(matched), len(matched)
        if state.allowed is not None:
            row.allowed = _address(state.allowed)
        return row


class LinearWeights(ctypes.Structure):
    """``Linear`` of cpu/linear.h."""

    _fields_ = (
        *[(name, POINTER) for name in ("weights", "bias")],
        *[(name, I64) for name in ("bits", "inputs", "outputs")],
    )


class MixtureWeights(ctypes.Structure):
    """``Mixture`` of cpu/mixture.h."""

    _fields_ = (
        *[(name, LinearWeights) for name in ("router", "gate_up", "down", "shared_gate_up", "shared_down")],
        *[(name, POINTER) for name in ("correction", "shared_gate")],
        *[
            (name, I64)
            for name in ("experts", "chosen", "groups", "kept_groups", "sigmoid", "normalise", "gelu")
        ],
        ("scale", F32),
        ("clamp", F32),
    )


class DecoderLayer(ctypes.Structure):
    """``Layer`` of cpu/kernels.cpp."""

    _fields_ = (
        *[(name, LinearWeights) for name in ("qkv", "out", "gate_up", "down")],
        *[(name, POINTER) for name in ("mixture", "input_norm", "attention_post", "mlp_norm", "mlp_post")],
        ("attention", AttentionLayer),
    )


class DecoderWeights(ctypes.Structure):
    """``Decoder`` of cpu/kernels.cpp."""

    _fields_ = (
        ("layers", ctypes.POINTER(DecoderLayer)),
        ("count", I64),
        ("head", LinearWeights),
        ("norm", POINTER),
        ("gelu", I64),
        ("eps", F32),
    )


STRUCTS: tuple[type[ctypes.Structure], ...] = (
    *(
        AttentionLayer,
        AttentionStep,
        SamplingRow,
        LinearWeights,
        MixtureWeights,
        DecoderLayer,
        DecoderWeights,
    ),
)
"""In the order of ``fl_layout``."""


@dataclass
class NativeCache:
    """One layer's KV cache, laid out as cpu/attention.h says."""

    codes: torch.Tensor
    """[blocks, V, 2, block_size * D]."""
    scales: torch.Tensor | None
    """[blocks, V, 2, block_size] float32, for int8 only."""
    block_size: int
    layer: AttentionLayer | None = None
    """The layer's constants for the library, made when it first runs."""
    decoder: DecoderWeights | None = None
    """In the first layer's cache, the whole model's constants."""


class NativeLinear:
    """``x -> [T, N]``; x is [T, K] float32, or the groups that the other kernels write for this reader."""

    def __init__(
        self, kernels: NativeKernels, weight: torch.Tensor | Coded, bias: torch.Tensor | None, bits: int
    ) -> None:
        """``weight`` [N, K] is rounded to ``bits``; codes of so many bits stay what they are."""
        codes = weight.codes if isinstance(weight, Coded) else weight
        self.outputs, self.inputs = codes.shape
        self.bits = bits
        self.integers = int(bits < 16)
        self._packed = kernels.room(bits, 1, self.outputs, self.inputs)
        kernels.pack(bits, weight, self._packed)
        self._bias = None if bias is None else bias.float().contiguous()
        self._run = kernels.library.fl_linear
        self.weights = LinearWeights(_at(self._packed), _at(self._bias), bits, self.inputs, self.outputs)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[0]
        out = torch.empty(rows, self.outputs)
        self._run(ctypes.byref(self.weights), x.data_ptr(), rows, out.data_ptr())
        return out


def bits_kept(coded: Coded) -> int:
    """In how many bits the kernels keep a checkpoint's own codes: fewer than 8 where their groups fit; 8 lose little of
    fewer."""
    fits = coded.order is None and (coded.group % GROUP == 0 or coded.scales.shape[1] == 1)
    if not fits or coded.bits == 8:
        return 8
    return 4 if coded.bits == 4 and not coded.e2m1 else 7


class NativeExperts:
    """One linear of every expert, one expert after the other, so that a pointer finds each."""

    def __init__(self, kernels: NativeKernels, checkpoint: Checkpoint, experts: list[list[str]]) -> None:
        """Each expert's modules are stacked along the output; they are read, packed and dropped one expert by one.

        Raises ConfigError if some experts are stored otherwise than the first.
        """
        for number, modules in enumerate(experts):
            weight, bias, bits = self._read(kernels, checkpoint, modules)
            if number == 0:
                outputs, inputs = weight.codes.shape if isinstance(weight, Coded) else weight.shape
                self._packed, kept = kernels.room(bits, len(experts), outputs, inputs), bits
                kernels.rounded += kernels.bits == 4 and bits == 8
                self._biases = None if bias is None else torch.empty(len(experts), outputs)
            if bits != kept:
                raise ConfigError(
                    f"{modules[0]} is not stored like the experts before it: use weight_precision='auto' "
                    "(PRECISION=bf16 of the build)"
                )
            kernels.pack(bits, weight, self._packed[number])
            if bias is not None and self._biases is not None:
                self._biases[number] = bias
        self.weights = LinearWeights(_at(self._packed), _at(self._biases), kept, inputs, outputs)

    @staticmethod
    def _read(
        kernels: NativeKernels, checkpoint: Checkpoint, modules: list[str]
    ) -> tuple[torch.Tensor | Coded, torch.Tensor | None, int]:
        """An expert's weight and bias, and the bits to keep the weight in."""
        stored = kernels.stored_codes(checkpoint, modules)
        if stored is None:
            return *checkpoint.fused(modules, torch.float32), kernels.bits
        coded, bias = stored
        bits = bits_kept(coded)
        return (coded.whole() if bits < 8 else coded.values(torch.float32)), bias, bits


class NativeMixture:
    """A mixture of experts: ``x`` [T, N] float32 -> [T, N]."""

    def __init__(
        self,
        kernels: NativeKernels,
        checkpoint: Checkpoint,
        mixture: MixtureSpec,
        layer: str,
        activation: str,
    ) -> None:
        def module(name: str) -> str:
            return f"{layer}.{name}"

        def experts(*wanted: int) -> NativeExperts:
            """Of the modules gate, up and down the ``wanted`` ones."""
            modules = [mixture.names.expert(number) for number in range(mixture.experts)]
            stacked = [[module(each[which]) for which in wanted] for each in modules]
            return NativeExperts(kernels, checkpoint, stacked)

        names, none = mixture.names, LinearWeights()
        # In float32: rounding it to bfloat16 chooses other experts.
        bias = checkpoint.raw(f"{module(names.router)}.bias") if mixture.router_bias else None
        self.router = NativeLinear(kernels, checkpoint.raw(f"{module(names.router)}.weight"), bias, 32)
        self._experts = experts(0, 1), experts(2)
        self._shared: list[NativeLinear] = []
        if mixture.shared_inner:
            gate, up, down = map(module, names.shared_expert())
            self._shared = [
                kernels.load_linear(checkpoint, [gate, up]),
                kernels.load_linear(checkpoint, [down]),
            ]
        self._correction = checkpoint.raw(module(names.correction)).float() if mixture.correction else None
        self._shared_gate = None
        if mixture.shared_gate:
            self._shared_gate = checkpoint.weight(module(names.shared_gate), torch.float32).contiguous()
        self._run = kernels.library.fl_mixture
        self.weights = MixtureWeights(
            router=self.router.weights,
            gate_up=self._experts[0].weights,
            down=self._experts[1].weights,
            shared_gate_up=self._shared[0].weights if self._shared else none,
            shared_down=self._shared[1].weights if self._shared else none,
            correction=_at(self._correction),
            shared_gate=_at(self._shared_gate),
            experts=mixture.experts,
            chosen=mixture.chosen,
            groups=mixture.groups,
            kept_groups=mixture.kept_groups,
            sigmoid=mixture.score == "sigmoid",
            normalise=mixture.normalise,
            gelu=activation != "silu",
            scale=mixture.scale,
            clamp=mixture.clamp or 0.0,
        )

    def __call__(self, x: torch.Tensor, step: object) -> torch.Tensor:
        out = torch.empty_like(x)
        self._run(ctypes.byref(self.weights), x.data_ptr(), x.shape[0], out.data_ptr())
        return out


class NativeKernels(Operations[NativeLinear, torch.Tensor, NativeCache, StepInput]):
    """Compiled kernels on threads of their own; PyTorch's are not used, so that the two do not compete.

    One caller a process: the library's threads serve one at a time.
    """

    name = "native"
    stride = 64  # kStretch of attention_layer.h

    def __init__(self, config: EngineConfig, device: torch.device, dtype: torch.dtype, threads: int) -> None:
        super().__init__(device, dtype)
        if device.type != "cpu" or dtype != torch.float32:
            raise ConfigError(f"kernels='native' computes in float32 on a CPU, not in {dtype} on {device}")
        if config.weight_precision not in WEIGHT_BITS:
            raise ConfigError(
                f"weight_precision={config.weight_precision!r} is not for kernels='native': "
                f"use one of {', '.join(WEIGHT_BITS)}"
            )
        self.bits = WEIGHT_BITS[config.weight_precision]
        kv = config.kv_dtype
        self.kv = ("float32" if self.bits == 16 else "int8") if kv == "auto" else kv
        if self.kv not in CACHE_DTYPES:
            raise ConfigError(f"kv_dtype={kv!r} is not for kernels='native': use {', '.join(CACHE_DTYPES)}")
        self.isa, self.library = _load(config)
        self.library.fl_set_threads(threads)
        torch.set_num_threads(1)
        self.panel = self.library.fl_panel()
        self.reserved = 0
        """Bytes of KV caches, whose pages are not taken yet: what they need must be free."""
        self.rounded = 0
        """Linears of 4-bit codes that are kept in 8 bits."""
        self.group_bytes = self.library.fl_group_bytes()

    def describe(self, spec: ModelSpec) -> str:
        weights = "bfloat16 weights" if self.bits == 16 else f"int{self.bits} weights, int8 activations"
        if self.rounded:
            weights += f"; {self.rounded} linears whose groups do not fit have int8 weights"
        computed = computed_in(spec, self.dtype)
        return f"{computed}, compiled CPU kernels ({weights}, {self.kv} KV cache, {self.isa})"

    def embedding(self, checkpoint: Checkpoint, module: str) -> torch.Tensor:
        """In bfloat16 as the file has it, whose pages then are read as they are used; else in float32."""
        if checkpoint.coded(module) is None:
            stored = checkpoint.raw(f"{module}.weight")
            if stored.dtype == torch.bfloat16:
                return stored.contiguous()
        return checkpoint.weight(module, self.dtype)

    def load_linear(self, checkpoint: Checkpoint, modules: list[str]) -> NativeLinear:
        head = modules == ["lm_head"]
        stored = None if head else self.stored_codes(checkpoint, modules)
        if stored is not None:
            return self._coded(*stored)
        weight, bias = checkpoint.fused(modules, self.dtype)
        return self.linear(weight, bias) if head else NativeLinear(self, weight, bias, self.bits)

    def stored_codes(
        self, checkpoint: Checkpoint, modules: list[str]
    ) -> tuple[Coded, torch.Tensor | None] | None:
        """Codes of few bits as a checkpoint has them, and a bias, where the kernels are to keep such; else None."""
        stored = checkpoint.fused_coded(modules, self.dtype, self.device) if self.bits == 4 else None
        return stored if stored is not None and stored[0].codes.dtype == torch.uint8 else None

    def _coded(self, coded: Coded, bias: torch.Tensor | None) -> NativeLinear:
        """A checkpoint's own codes where the kernels' groups fit theirs; else 8 bits, which lose little of fewer."""
        bits = bits_kept(coded)
        if bits < 8:
            return NativeLinear(self, coded.whole(), bias, bits)
        self.rounded += 1
        return NativeLinear(self, coded.values(self.dtype), bias, 8)

    def load_mixture(
        self, checkpoint: Checkpoint, mixture: MixtureSpec, layer: str, activation: str
    ) -> NativeMixture:
        return NativeMixture(self, checkpoint, mixture, layer, activation)

    def room(self, bits: int, count: int, outputs: int, inputs: int) -> torch.Tensor:
        """For ``count`` packed weights [outputs, inputs], a row each."""
        if bits < 16:
            return torch.zeros(count, self.library.fl_int_bytes(bits, outputs, inputs), dtype=torch.uint8)
        dtype = torch.bfloat16 if bits == 16 else torch.float32
        return torch.zeros(count, -(-outputs // self.panel) * self.panel * inputs, dtype=dtype)

    def pack(self, bits: int, weight: torch.Tensor | Coded, into: torch.Tensor) -> None:
        """``weight`` [N, K] in ``bits`` bits into a row of :meth:`room`; codes of so many bits stay what they are."""
        if isinstance(weight, Coded):
            codes, scales = weight.codes.contiguous(), weight.scales.float().contiguous()
            minima = weight.minima().contiguous()
            self.library.fl_pack_codes(
                *(bits, codes.data_ptr(), scales.data_ptr(), minima.data_ptr()),
                *(*codes.shape, weight.group, into.data_ptr()),
            )
            return
        outputs, inputs = weight.shape
        if bits > 16:  # panels of neighbouring columns, input after input
            padded = F.pad(weight.float(), (0, 0, 0, -outputs % self.panel))
            into.copy_(padded.view(-1, self.panel, inputs).transpose(1, 2).reshape(into.shape))
            return
        # In pieces: an output head in float32 would be the largest thing here.
        for start in range(0, outputs, PACKED_AT_ONCE):
            rows = weight[start : start + PACKED_AT_ONCE].float().contiguous()
            if bits < 16:
                to = into.data_ptr() + self.library.fl_int_bytes(bits, start, inputs)
                self.library.fl_pack_ints(bits, rows.data_ptr(), len(rows), inputs, to)
            else:
                to = into.data_ptr() + start * inputs * into.element_size()
                self.library.fl_pack(rows.data_ptr(), len(rows), inputs, to)

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> NativeLinear:
        """The output head: 7 bits at the least, since int4 there costs more accuracy than time it saves."""
        return NativeLinear(self, weight, bias, max(self.bits, 7))

    def _hidden(self, rows: int, size: int, integers: int) -> torch.Tensor:
        """What a reader reads: float32, or groups."""
        if integers:
            return torch.empty(rows, -(-size // GROUP) * self.group_bytes, dtype=torch.uint8)
        return torch.empty(rows, size)

    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        post: torch.Tensor | None,
        weight: torch.Tensor | None,
        eps: float,
        reader: NativeLinear,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """In place in ``x``."""
        rows, size = x.shape
        out = self._hidden(rows, size, reader.integers)
        self.library.fl_add_norm(
            x.data_ptr(),
            None if delta is None else delta.data_ptr(),
            None if post is None else post.data_ptr(),
            *(_at(weight), eps, rows, size, reader.integers, out.data_ptr()),
        )
        return out, x

    def gate(self, gate_up: torch.Tensor, activation: str, reader: NativeLinear) -> torch.Tensor:
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = self._hidden(rows, size, reader.integers)
        gelu = activation != "silu"
        self.library.fl_gate(gate_up.data_ptr(), rows, size, gelu, reader.integers, out.data_ptr())
        return out

    def new_cache(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        kv_scales: tuple[float, float] = (1.0, 1.0),
    ) -> NativeCache:
        shape, dtype = (num_blocks, num_kv_heads, 2, block_size), CACHE_DTYPES[self.kv]
        scale = torch.float32.itemsize if dtype == torch.int8 else 0
        self.reserved += math.prod(shape) * (head_dim * dtype.itemsize + scale)
        if self.reserved > (free := free_host_memory()):
            raise MemoryError(
                f"{self.reserved >> 20} MiB of memory or more are needed, {free >> 20} MiB are free"
            )
        codes = zeros((*shape[:3], block_size * head_dim), dtype)
        return NativeCache(codes, zeros(shape, torch.float32) if dtype == torch.int8 else None, block_size)

    def same_cache(self, cache: NativeCache, kv_scales: tuple[float, float]) -> NativeCache:
        return NativeCache(cache.codes, cache.scales, cache.block_size)

    def cache_tensors(self, cache: NativeCache) -> list[torch.Tensor]:
        return [cache.codes] if cache.scales is None else [cache.codes, cache.scales]

    def attention(
        self,
        qkv: torch.Tensor,
        layer: Layer[NativeLinear],
        spec: ModelSpec,
        rope: torch.Tensor,
        cache: NativeCache,
        step: StepInput,
    ) -> torch.Tensor:
        """In place in ``qkv``."""
        if cache.layer is None:
            cache.layer = _attention_layer(layer, spec, rope, cache)
        where = step.made.get("native") or step.made.setdefault("native", _where(step))
        integers = layer.out.integers
        out = self._hidden(qkv.shape[0], spec.num_heads * spec.head_dim, integers)
        self.library.fl_attention(
            ctypes.byref(cache.layer), ctypes.byref(where[0]), qkv.data_ptr(), integers, out.data_ptr()
        )
        return out

    def steps(self, block_size: int, windows: Sequence[int | None]) -> StepBuilder[NativeStep]:
        return NativeSteps(block_size, self.library, windows)

    def sequence_steps(
        self, spec: ModelSpec, blocks: torch.Tensor, block_size: int
    ) -> SequenceSteps[StepInput]:
        return TensorSequence(blocks, block_size)

    def embed(self, step: StepInput | NativeStep, table: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        ids = step.token_ids if isinstance(step, NativeStep) else step.token_ids.numpy()
        out = torch.empty(len(ids), table.shape[1])
        self.library.fl_embed_rows(
            *(_address(ids), len(ids), table.data_ptr(), table.element_size(), table.shape[1], factor.item()),
            out.data_ptr(),
        )
        return out

    def decode(
        self,
        model: Decoder[NativeLinear],
        x: torch.Tensor,
        caches: list[NativeCache],
        step: StepInput | NativeStep,
    ) -> torch.Tensor:
        """All layers and the head in one call. In place in ``x``."""
        decoder = caches[0].decoder
        if decoder is None:
            decoder = caches[0].decoder = _decoder(model, caches)
        if isinstance(step, StepInput):
            step = NativeStep.of(step)
        logits = torch.empty(step.wanted, decoder.head.outputs)
        self.library.fl_decode(
            ctypes.byref(decoder),
            ctypes.byref(step.where),
            x.data_ptr(),
            step.logit_rows,
            step.wanted,
            logits.data_ptr(),
        )
        return logits

    def argmax(self, logits: torch.Tensor) -> torch.Tensor:
        out = torch.empty(logits.shape[0], dtype=torch.int64)
        self.library.fl_argmax(logits.data_ptr(), *logits.shape, out.data_ptr())
        return out

    def sample(
        self, logits: torch.Tensor, states: list[SamplingState], positions: list[int]
    ) -> list[Sampled]:
        """In place in ``logits``."""
        rows, width = len(states), max(0, *(state.num_top for state in states))
        asked = [SamplingRow.of(state) for state in states]
        at = np.array([*map(ctypes.addressof, asked), *positions], dtype=np.int64)
        tokens, log_probs = np.empty(rows, dtype=np.int64), np.zeros(rows, dtype=np.float32)
        top_ids = np.full((rows, width), -1, dtype=np.int32)
        top_log_probs = np.empty((rows, width), dtype=np.float32)
        self.library.fl_sample(
            *(logits.data_ptr(), *logits.shape, _address(at), _address(at) + 8 * rows),
            *(_address(tokens), _address(log_probs)),
            *(width, _address(top_ids), _address(top_log_probs)),
        )
        chosen, told = tokens.tolist(), log_probs.tolist()
        if not width:
            return list(map(Sampled, chosen, told))
        return [
            Sampled(token, log_prob, tuple(top for top in zip(ids, values, strict=True) if top[0] >= 0))
            for token, log_prob, ids, values in zip(
                chosen, told, top_ids.tolist(), top_log_probs.tolist(), strict=True
            )
        ]


def _load(config: EngineConfig) -> tuple[str, ctypes.CDLL]:
    """The library of ``config.cpu_isa``, or of the best instruction set that this CPU and the build have."""
    if not config.kernel_dir:
        raise ConfigError(
            "kernels='native' needs kernel_dir: run 'make build-engines', or use kernels='pytorch'"
        )
    available = available_isas()
    if config.cpu_isa != "auto" and config.cpu_isa not in available:
        raise ConfigError(f"cpu_isa={config.cpu_isa!r} does not run on this CPU: use {', '.join(available)}")
    wanted = available if config.cpu_isa == "auto" else [config.cpu_isa]
    again = "run 'make build-engines' again on this machine"
    isa = next((isa for isa in wanted if library(config.kernel_dir, isa).exists()), None)
    if isa is None:
        raise ConfigError(
            f"kernel_dir={config.kernel_dir!r} has no kernels for {' or '.join(wanted)}: {again}"
        )
    path = library(config.kernel_dir, isa)
    try:
        if not is_whole(path):  # the dynamic loader would end the process with SIGBUS
            raise OSError(f"{path.name} is cut short")
        loaded = ctypes.CDLL(str(path))
        for name, types in SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = types, None
        loaded.fl_layout.restype = ctypes.c_char_p
        _check_layout(loaded)
    except (OSError, AttributeError, ValueError) as error:
        raise ConfigError(f"kernel_dir={config.kernel_dir!r} cannot be loaded ({error}): {again}") from None
    for name in ("fl_panel", "fl_group_bytes"):
        getattr(loaded, name).restype = I64
    loaded.fl_int_bytes.argtypes, loaded.fl_int_bytes.restype = (I64, I64, I64), I64
    return isa, loaded


def _check_layout(loaded: ctypes.CDLL) -> None:
    """Raises OSError if a struct of the library is not what this file mirrors: every call would read nonsense."""
    lines = loaded.fl_layout().decode().splitlines()
    for struct, there in zip(STRUCTS, lines, strict=True):
        offsets = " ".join(f"{field[0]} {getattr(struct, field[0]).offset}" for field in struct._fields_)
        here = f"{ctypes.sizeof(struct)} {offsets}"
        if here != there:
            raise OSError(f"its {struct.__name__} is another one: {there}, not {here}")


def _address(array: NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


def _at(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _decoder(model: Decoder[NativeLinear], caches: list[NativeCache]) -> DecoderWeights:
    """``model``'s constants; its tensors and ``caches`` must outlive them."""
    spec = model.spec
    layers = (DecoderLayer * len(caches))(
        *(
            DecoderLayer(
                qkv=layer.qkv.weights,
                out=layer.out.weights,
                **_mlp(layer.mlp),
                input_norm=_at(layer.input_norm),
                attention_post=_at(layer.attention_out_norm),
                mlp_norm=_at(layer.mlp_norm),
                mlp_post=_at(layer.mlp_out_norm),
                attention=_attention_layer(layer, spec, model.ropes[layer.spec.rope], cache),
            )
            for layer, cache in zip(model.layers, caches, strict=True)
        )
    )
    gelu = spec.activation != "silu"
    norm = _at(model.norm)
    return DecoderWeights(layers, len(layers), model.lm_head.weights, norm, gelu, spec.norm_eps)


def _mlp(mlp: GatedMlp[NativeLinear] | RoutedMlp[NativeLinear]) -> dict[str, Any]:
    if isinstance(mlp, GatedMlp):
        return {"gate_up": mlp.gate_up.weights, "down": mlp.down.weights}
    assert isinstance(mlp, NativeMixture)
    return {"mixture": ctypes.addressof(mlp.weights)}


def _attention_layer(
    layer: Layer[NativeLinear], spec: ModelSpec, rope: torch.Tensor, cache: NativeCache
) -> AttentionLayer:
    return AttentionLayer(
        cache=_at(cache.codes),
        scales=_at(cache.scales),
        rope=_at(rope),
        q_norm=_at(layer.q_norm),
        k_norm=_at(layer.k_norm),
        element_bytes=cache.codes.element_size(),
        heads=spec.num_heads,
        kv_heads=spec.num_kv_heads,
        d=spec.head_dim,
        block_size=cache.block_size,
        window=layer.spec.window or 0,
        norms_row=spec.qk_norm == "row",
        group=layer.group,
        eps=spec.norm_eps,
        scale=spec.attention_scale,
        softcap=spec.attention_softcap or 0.0,
        sinks=_at(layer.sinks),
    )


def _where(step: StepInput) -> tuple[AttentionStep, tuple[object, ...]]:
    """The step for the library, of a model whose layers are one group, and the arrays that it points to."""
    [blocks], [slots] = step.decode_blocks, step.slots
    decodes, width = blocks.shape
    spans = np.empty((decodes + len(step.prefills), 4), dtype=np.int64)
    rows = np.arange(decodes)
    spans[:decodes].T[:] = rows, np.ones_like(rows), step.decode_lengths.numpy(), rows * width
    begin = decodes * width
    for number, chunk in enumerate(step.prefills, decodes):
        spans[number] = chunk.start, chunk.end - chunk.start, chunk.context, begin
        begin += chunk.blocks[0].shape[0]
    tables = blocks
    if step.prefills:
        tables = torch.cat([tables.flatten(), *[chunk.blocks[0] for chunk in step.prefills]])
    where = AttentionStep(
        rows=step.positions.shape[0],
        chunks=spans.shape[0],
        positions=step.positions.data_ptr(),
        slots=slots.data_ptr(),
        spans=spans.ctypes.data,
        tables=tables.data_ptr(),
    )
    return where, (spans, tables, step.positions, slots)
