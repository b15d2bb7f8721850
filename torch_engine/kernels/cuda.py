"""The kernel interface on NVIDIA GPUs: Triton-language kernels around cuBLASLt's matrix products.

A layer of a decode step is ten launches: add + norm + quantise, qkv product, rotate + cache write, attention,
merge of its splits, output product, add + norm + quantise, gate and up product, gate + quantise, down product.
Every kernel writes its result in the form that the linear reading it wants (:class:`triton_ops.Form`), so
that nothing is quantised in a pass of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from triton.runtime.errors import OutOfResources

from torch_engine.config import ConfigError, EngineConfig
from torch_engine.families import ModelSpec
from torch_engine.kernels import triton_ops
from torch_engine.kernels.pytorch import PyTorchKernels
from torch_engine.kernels.triton_ops import Activation, AttentionInput, Form, KVCache, SkinnyPlan
from torch_engine.weights import Checkpoint

if TYPE_CHECKING:
    from torch_engine.model import Layer

E4M3_MAX = 448.0
INT8_MIN_ROWS = 32
"""``torch._int_mm`` wants more than 16 rows."""


class PlainLinear:
    """Product in the compute dtype."""

    form = Form.PLAIN
    input_scale: torch.Tensor | None = None
    column_scales: torch.Tensor | None = None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Activation) -> torch.Tensor:
        return F.linear(x.values, self.weight, self.bias)


class Fp8Linear:
    """e4m3 weights and activations with one scale each, known beforehand; accumulated in float32."""

    form = Form.FP8_STATIC
    column_scales: torch.Tensor | None = None

    def __init__(
        self,
        codes: torch.Tensor,
        weight_scale: torch.Tensor,
        input_scale: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.weight, self.weight_scale, self.input_scale = codes, weight_scale, input_scale
        self.bias, self.dtype = bias, dtype
        self.plan: SkinnyPlan | None = None
        """For a few rows, where measuring found it faster than the library: :meth:`CudaKernels.tune`."""

    def __call__(self, x: Activation) -> torch.Tensor:
        if self.plan is not None and x.values.shape[0] <= triton_ops.SKINNY_ROWS:
            return triton_ops.skinny_linear(
                x.values, self.weight, self.input_scale, self.weight_scale, self.plan
            )
        return _scaled_mm(x.values, self.weight, self.input_scale, self.weight_scale, self.bias, self.dtype)


class Int8Linear:
    """int8 weights with a scale for each output, int8 activations with a scale for each token (W8A8)."""

    form = Form.INT8_TOKEN
    input_scale: torch.Tensor | None = None
    column_scales: torch.Tensor | None = None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        scales = weight.float().abs().amax(1).clamp_min(1e-12) / 127
        self.weight = (weight.float() / scales[:, None]).round_().to(torch.int8)
        self.scales, self.bias, self.dtype = scales, bias, dtype

    def __call__(self, x: Activation) -> torch.Tensor:
        assert x.scales is not None
        codes = x.values
        if codes.shape[0] < INT8_MIN_ROWS:
            codes = F.pad(codes, (0, 0, 0, INT8_MIN_ROWS - codes.shape[0]))
        sums = torch._int_mm(codes, self.weight.t())
        return triton_ops.dequantise(sums, x.scales, self.scales, self.bias, self.dtype)


class Fp8Head:
    """Output head in e4m3 with a scale for each token of the vocabulary, activations with one for each row.

    The product runs without scales, its fastest form; the column scales are left to whoever reads the logits (the
    argmax applies them in passing).
    """

    form = Form.FP8_TOKEN
    input_scale: torch.Tensor | None = None

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        size = weight.shape[0]
        self.column_scales = torch.empty(size, dtype=torch.float32, device=weight.device)
        self.weight = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
        for start in range(0, size, 16384):  # a float32 copy of the whole head would be gigabytes
            part = weight[start : start + 16384].float()
            scales = part.abs().amax(1).clamp_min(1e-12) / E4M3_MAX
            self.column_scales[start : start + 16384] = scales
            self.weight[start : start + 16384] = (part / scales[:, None]).to(torch.float8_e4m3fn)
        self.one = torch.ones((), dtype=torch.float32, device=weight.device)
        self.dtype = dtype

    def __call__(self, x: Activation) -> torch.Tensor:
        assert x.scales is not None
        logits = _scaled_mm(x.values, self.weight, self.one, self.one, None, self.dtype)
        return logits.mul_(x.scales[:, None])


CudaLinear = PlainLinear | Fp8Linear | Int8Linear | Fp8Head


def _scaled_mm(x, weight, x_scale, weight_scale, bias, dtype) -> torch.Tensor:
    return torch._scaled_mm(
        x, weight.t(), x_scale, weight_scale, bias=bias, out_dtype=dtype,
        use_fast_accum=x.is_cuda and dtype != torch.float32,
    )  # fmt: skip


class CudaKernels(PyTorchKernels):
    """Triton-language kernels; activations travel as :class:`Activation`, in the form their reader asks for.

    Runs on a CPU in Triton's interpreter (``TRITON_INTERPRET=1``), for tests.
    """

    name = "cuda"

    def __init__(self, config: EngineConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        if device.type != "cuda" and not triton_ops.INTERPRETED:
            raise ConfigError(f"kernels='cuda' needs a CUDA device, not {device}: use device='cuda'")
        self.packs = False
        self.has_fp8 = device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9)
        self.multiprocessors = (
            torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
        )
        self.weights = config.weight_precision
        self.head = config.lm_head_precision
        self.kv = config.kv_dtype
        if self.kv == "auto":
            # int8 with a scale for each token and head has a fifth of the error of e4m3 and costs up to 11 % of an
            # H200's tokens/s (benchmarks/h200): e4m3 where the GPU has it.
            self.kv = str(dtype).removeprefix("torch.")
            if dtype == torch.bfloat16 and self.weights != "dequantised":
                self.kv = "fp8" if self.has_fp8 else "int8"
        for name, value in (("kv_dtype", self.kv), ("lm_head_precision", self.head)):
            if value == "fp8" and not self.has_fp8:
                raise ConfigError(f"{name}='fp8' needs compute capability 8.9: use another value on this GPU")
        self._used: dict[str, int] = {}
        self._tuning = ""
        self.tuned: dict[str, dict[str, float]] = {}
        """Microseconds of each candidate for the linears of a layer; ``None`` is the library."""

    def describe(self) -> str:
        used = ", ".join(f"{count} {kind}" for kind, count in self._used.items())
        return f"Triton-language kernels (linears: {used}{self._tuning}; {self.kv} KV cache)"

    # Weights ---------------------------------------------------------------------------------------

    def load_linear(self, checkpoint: Checkpoint, modules: list[str]) -> CudaLinear:
        head = modules == ["lm_head"]
        if not head and self.weights == "auto" and self.has_fp8:
            stored = checkpoint.fused_fp8(modules, self.device)
            if stored is not None and all(size % 16 == 0 for size in stored[0].shape):
                self._count("FP8 W8A8")
                codes, scale, input_scale, bias = stored
                bias = None if bias is None else bias.to(self.dtype)
                return Fp8Linear(codes, scale, input_scale, bias, self.dtype)
            if stored is not None:
                self._count("FP8 dequantised (shape is no multiple of 16)")
        return self._linear(*checkpoint.fused(modules, self.dtype), head)

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> CudaLinear:
        """The output head, or a linear whose weights are not FP8 codes."""
        return self._linear(weight, bias, head=True)

    def _linear(self, weight: torch.Tensor, bias: torch.Tensor | None, head: bool) -> CudaLinear:
        weight = weight.to(self.device, self.dtype)
        bias = None if bias is None else bias.to(self.device, self.dtype)
        fits = all(size % 16 == 0 for size in weight.shape)
        if head and self.head == "fp8" and bias is None and fits:
            self._count("FP8 head")
            return Fp8Head(weight, self.dtype)
        if not head and self.weights == "int8" and fits:
            self._count("int8 W8A8")
            return Int8Linear(weight, bias, self.dtype)
        self._count(f"{str(self.dtype).removeprefix('torch.')}{' head' if head else ''}")
        return PlainLinear(weight, bias)

    def _count(self, kind: str) -> None:
        self._used[kind] = self._used.get(kind, 0) + 1

    # The step --------------------------------------------------------------------------------------

    def embed(self, step: Any, table: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return triton_ops.embed(step.ids, step.attention.slots, step.last, table, float(factor))

    def add_norm(self, x, delta, post, weight, eps, reader: Any) -> tuple[Activation, torch.Tensor]:
        """In place in ``x``."""
        return triton_ops.add_norm(x, delta, post, weight, eps, reader.form, reader.input_scale), x

    def gate(self, gate_up: torch.Tensor, activation: str, reader: Any = None) -> Activation:
        return triton_ops.gate(gate_up, activation, self.dtype, reader.form, reader.input_scale)

    def new_cache(
        self,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        kv_scales: tuple[float, float] = (1.0, 1.0),
    ) -> KVCache:
        kinds = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}
        dtype = kinds.get(self.kv) or getattr(torch, self.kv)
        shape = (num_blocks, 2, num_kv_heads, block_size, head_dim)
        scales = None
        if dtype == torch.int8:
            scales = torch.zeros(shape[:-1], dtype=torch.float32, device=self.device)
        values = torch.zeros(shape, dtype=dtype, device=self.device)
        return KVCache(values, scales, *kv_scales) if self.kv == "fp8" else KVCache(values, scales)

    def attention(
        self, qkv: torch.Tensor, layer: Layer, spec: ModelSpec, rope: torch.Tensor, cache: KVCache, step: Any
    ) -> Activation:
        where: AttentionInput = step.attention
        qkv = triton_ops.rotate_write(
            qkv, cache, where, rope, spec.num_heads, layer.q_norm, layer.k_norm, spec.norm_eps, self.dtype
        )
        plan = triton_ops.decode_plan(
            max(1, where.num_decodes), spec.num_kv_heads, spec.num_groups, spec.head_dim, self.multiprocessors
        )
        reader: Any = layer.out
        form = reader.form if reader.form == Form.FP8_STATIC else Form.PLAIN
        out = triton_ops.attend(
            qkv, cache, where, spec.num_heads, spec.attention_scale, layer.spec.window, spec.attention_softcap,
            plan, form, reader.input_scale,
        )  # fmt: skip
        # A scale for each token spans heads that different programs compute: a pass of its own.
        return Activation(out) if form == reader.form else triton_ops.quantise(out, reader.form)

    # Tuning ----------------------------------------------------------------------------------------

    def tune(self, layers: list[Layer]) -> None:
        """Chooses for each FP8 linear between the library and our product for few rows, by timing both.

        Each candidate runs through all layers in a graph, so that weights come from memory and not from a cache.
        """
        chosen = []
        for kind in ("qkv", "out", "gate_up", "down"):
            linears = [getattr(layer, kind) for layer in layers]
            if not all(isinstance(linear, Fp8Linear) and linear.bias is None for linear in linears):
                continue
            outputs, inputs = linears[0].weight.shape
            x = Activation(torch.ones(8, inputs, device=self.device).to(torch.float8_e4m3fn))
            times: dict[SkinnyPlan | None, float] = {None: _time_all(linears, x, None)}
            for plan in triton_ops.skinny_plans(outputs, inputs, self.multiprocessors):
                times[plan] = _time_all(linears, x, plan)
            ours = [plan for plan in times if plan is not None]
            best = min(ours, key=lambda plan: times[plan], default=None)
            # Our partial sums cost their reader a little, but ours starts while the kernel before it ends: where that
            # is possible a close race goes to it, otherwise to the library.
            if times[best] > (1.05 if triton_ops.OVERLAPS else 0.95) * times[None]:
                best = None
            for linear in linears:
                linear.plan = best
            each = len(linears)
            chosen.append(f"{kind} {times[None] / each:.1f} -> {times[best] / each:.1f} us")
            self.tuned[kind] = {str(plan): round(time / each, 2) for plan, time in times.items()}
        if chosen:
            self._tuning = f"; few rows: {', '.join(chosen)}"


def _time_all(linears: list[Fp8Linear], x: Activation, plan: SkinnyPlan | None) -> float:
    """Microseconds to run ``x`` through all of them; infinite if the plan does not fit this device."""
    for linear in linears:
        linear.plan = plan
    try:
        linears[0](x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for linear in linears:
                linear(x)
        times = []
        for _ in range(5):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        return sorted(times)[2]
    except OutOfResources:
        return float("inf")
