"""The kernel interface on NVIDIA GPUs: Triton-language kernels around cuBLASLt's matrix products.

A layer of a decode step is ten launches: add + norm + quantise, qkv product, rotate + cache write, attention,
merge of its splits, output product, add + norm + quantise, gate and up product, gate + quantise, down product.
Every kernel writes its result in the form that the linear reading it wants (:class:`Form`), so
that nothing is quantised in a pass of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from triton.runtime.errors import OutOfResources

from flightline.torch_engine.core.config import FP8_CAPABILITY, ConfigError, EngineConfig
from flightline.torch_engine.core.shared_prefixes import Group
from flightline.torch_engine.core.steps import SequenceSteps
from flightline.torch_engine.kernels.gpu import attention, four_bits, norm, tokens
from flightline.torch_engine.kernels.gpu.activation import Activation, Form
from flightline.torch_engine.kernels.gpu.attention import DecodePlan, PrefillPlan
from flightline.torch_engine.kernels.gpu.exchange import Exchange
from flightline.torch_engine.kernels.gpu.four_bits import FourBitLinear
from flightline.torch_engine.kernels.gpu.gathered import (
    FETCHES,
    STEPS,
    GatheredPlan,
    GatheredScratch,
    ahead_plans,
    attend_gathered,
    gathered_plans,
)
from flightline.torch_engine.kernels.gpu.grouped import (
    ROWS_AT_ONCE,
    CodedLinear,
    GroupedCodes,
    GroupedLinear,
    GroupedPlan,
    Scratch,
    tile_of,
)
from flightline.torch_engine.kernels.gpu.kv_cache import KVCache, rotate_write, row_means
from flightline.torch_engine.kernels.gpu.launch import INTERPRETED, OVERLAPS
from flightline.torch_engine.kernels.gpu.linear import (
    SKINNY_ROWS,
    CudaLinear,
    Fp8Head,
    Fp8Linear,
    Fp8RowLinear,
    Int8Linear,
    PlainLinear,
    SkinnyPlan,
    fp8_by_output,
    quantise,
    skinny_plans,
)
from flightline.torch_engine.kernels.gpu.mixture import BLOCK_ROWS, FEW_OUTPUTS, CudaMixture, Experts, Shared
from flightline.torch_engine.kernels.gpu.shared_prefix import PrefixPlan, attend_prefixes
from flightline.torch_engine.kernels.gpu.steps import CudaSequence, CudaStep
from flightline.torch_engine.kernels.gpu.timing import (
    OTHER_GLUON,
    difference,
    graph_seconds,
    prefill_seconds,
    prompt_attention,
    random_content,
    random_qkv,
    shared_seconds,
)
from flightline.torch_engine.kernels.operations import Operations, name_of
from flightline.torch_engine.model.coded import Coded
from flightline.torch_engine.model.kernel_interface import GatedMlp, Layer
from flightline.torch_engine.model.mixture import MixtureSpec
from flightline.torch_engine.model.spec import ModelSpec
from flightline.torch_engine.model.weights import Checkpoint

MOST_APART = 0.02
"""A way to compute attention whose results differ by more from the usual one's is not used: rounding explains less."""
MOST_APART_FP8 = 0.08
"""The same of scores in FP8, for which the tuning's queries are rounded to 4 significant bits: 0.03 is usual."""
MOST_TRIED = 512
"""Rows of the output head that are tried at load: logits of more take memory that only full steps have a use for."""
FEWEST = 8
"""Rows at which products for few rows are timed."""
TUNED_ROWS = (FEWEST, 32, ROWS_AT_ONCE, 128, 256, 512)
"""And those of weights in groups, whose kernels are others for more rows."""
LONG_GATHERED = 49_152
"""Keys of a prompt from which on the plan over gathered keys is chosen anew: they no longer lie in the L2 together, and
tiles of more queries read them less often."""
EXCHANGED_ROWS = (1, 4, 16, 32, 64, 128, 256)
"""Of sums that are timed in one kernel with the norm, and apart."""
EXCHANGES = 32
NEEDED = f"compute capability {'.'.join(map(str, FP8_CAPABILITY))}"


class CudaKernels(Operations[CudaLinear, Activation, KVCache, CudaStep]):
    """Triton-language kernels; activations travel as :class:`Activation`, in the form their reader asks for.

    Runs on a CPU in Triton's interpreter (``TRITON_INTERPRET=1``), for tests.
    """

    name = "cuda"
    stride = 128  # the most keys of one iteration in attention.py's plans

    def __init__(self, config: EngineConfig, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(device, dtype)
        if device.type != "cuda" and not INTERPRETED:
            raise ConfigError(f"kernels='cuda' needs a CUDA device, not {device}: use device='cuda'")
        self.has_fp8 = device.type == "cpu" or torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
        self.multiprocessors = (
            torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
        )
        self.weights = config.weight_precision
        self.head = config.lm_head_precision
        self.kv = name_of(dtype) if config.kv_dtype == "auto" else config.kv_dtype
        for name, value in (("kv_dtype", self.kv), ("lm_head_precision", self.head)):
            if value == "fp8" and not self.has_fp8:
                raise ConfigError(f"{name}='fp8' needs {NEEDED}: use another value on this GPU")
        self.scratch = Scratch(dtype, device)
        self._used: dict[str, int] = {}
        self._tuning = ""
        self.usual_prefill: PrefillPlan | None = None
        """How prompts are cut up that are neither short nor long, where that was timed; None: ``prefill_plan`` says."""
        self.long_prefill: PrefillPlan | None = None
        """How long prompts are cut up, where that was timed; None: as all are."""
        self.gathered: GatheredPlan | None = None
        """How they are computed over gathered keys, where that was faster; None: never."""
        self.gathered_long: GatheredPlan | None = None
        """The same from ``LONG_GATHERED`` keys on, where that is another one."""
        self.prefix: PrefixPlan | None = None
        """How keys that several decodes share are computed, where that was timed; None: by each for itself."""
        self.exchange: Exchange | None = None
        """Sums of few rows over the ranks, where that was seen to work and to be faster than sum and norm apart."""
        self.tuned: dict[str, dict[str, float]] = {}
        """Microseconds of each candidate for the linears of a layer; ``None`` is the library."""

    def describe(self, spec: ModelSpec) -> str:
        stored = f"{spec.stored if spec.quantization else 'unquantised'} checkpoint, {name_of(self.dtype)} activations"
        used = ", ".join(f"{count} {kind}" for kind, count in self._used.items())
        return f"{stored}, Triton-language kernels (linears: {used}{self._tuning}; {self.kv} KV cache)"

    # Weights ---------------------------------------------------------------------------------------

    def load_linear(self, checkpoint: Checkpoint, modules: list[str]) -> CudaLinear:
        head = modules == ["lm_head"]
        if not head and self.weights == "auto":
            stored = checkpoint.fused_coded(modules, self.dtype, self.device)
            linear = None if stored is None else self._coded(*stored)
            if linear is not None:
                return linear
        return self._linear(*checkpoint.fused(modules, self.dtype), head, self._narrows(checkpoint))

    def _narrows(self, checkpoint: Checkpoint) -> bool:
        """Whether what a checkpoint has in bf16 is kept in FP8: beside experts of 4 bits it would be two thirds of what
        a token reads."""
        if self.weights != "auto" or not self.has_fp8 or self.dtype != torch.bfloat16:
            return False
        quantization = checkpoint.spec.quantization
        return quantization is not None and quantization.experts_alone

    def load_mixture(
        self, checkpoint: Checkpoint, mixture: MixtureSpec, layer: str, activation: str
    ) -> CudaMixture:
        if self.weights == "int8":
            raise ConfigError(
                "weight_precision='int8' is not for mixtures of experts on a GPU: use 'auto' or 'dequantised' "
                "(PRECISION=bf16 of the build)"
            )
        names = mixture.names

        def named(module: str) -> torch.Tensor:
            return checkpoint.raw(f"{layer}.{module}").to(self.device)

        experts = [[f"{layer}.{name}" for name in names.expert(number)] for number in range(mixture.experts)]
        shared = None
        if mixture.shared_inner:
            up_gate, up, down = (f"{layer}.{name}" for name in names.shared_expert())
            shared = Shared(
                self.load_linear(checkpoint, [up_gate, up]),
                self.load_linear(checkpoint, [down]),
                named(f"{names.shared_gate}.weight").float().flatten() if mixture.shared_gate else None,
            )
        router = named(f"{names.router}.weight")
        narrow = router.to(self.dtype)
        return CudaMixture(
            mixture,
            narrow if torch.equal(narrow.float(), router.float()) else router.float(),
            named(names.correction).float() if mixture.correction else None,
            self._experts(checkpoint, [modules[:2] for modules in experts]),
            self._experts(checkpoint, [modules[2:] for modules in experts]),
            shared,
            activation,
            self.dtype,
            named(f"{names.router}.bias").float() if mixture.router_bias else None,
            self.multiprocessors,
        )

    def _experts(self, checkpoint: Checkpoint, experts: list[list[str]]) -> Experts:
        """One linear of every expert, out of its modules stacked along the output; read expert by expert."""
        all_of_them: Experts | None = None
        for number, modules in enumerate(experts):
            expert, kind = self._expert(checkpoint, modules)
            if all_of_them is None:
                all_of_them = expert.room(len(experts))
                self._count(f"{kind} of experts")
            if not all_of_them.put(number, expert):
                raise ConfigError(
                    f"{modules[0]} is not stored like the experts before it: use weight_precision='dequantised'"
                )
        assert all_of_them is not None
        return all_of_them.done()

    def _expert(self, checkpoint: Checkpoint, modules: list[str]) -> tuple[Experts, str]:
        """One expert, and how it is kept, in words."""
        stored = checkpoint.fused_coded(modules, self.dtype, self.device) if self.weights == "auto" else None
        why = ""
        if stored is not None:
            coded = stored[0]
            outputs, inputs = coded.codes.shape
            fp8 = coded.codes.dtype == torch.float8_e4m3fn
            fits = all(size % 16 == 0 for size in coded.codes.shape)
            readable = self.has_fp8 or not fp8
            if fp8 and readable and fits and coded.by_tensor is not None and coded.input_scale is not None:
                scales = coded.scales[:1, 0].float()
                expert = Experts(coded.codes[None], outputs, inputs, scales, coded.input_scale[None])
                return expert.with_bias(stored[1]), "FP8 W8A8"
            if readable and coded.order is None and tile_of(coded) is not None:
                expert = Experts.of_codes(GroupedCodes.of(coded), outputs, inputs)
                where = "by output" if coded.scales.shape[1] == 1 else f"in groups of {coded.group}"
                return expert.with_bias(stored[1]), f"{_codes_in_words(coded)} {where}"
            why = f" ({_codes_in_words(coded)} dequantised)"
        weight, bias = checkpoint.fused(modules, self.dtype)
        expert = Experts(weight.to(self.device)[None], *weight.shape)
        return expert.with_bias(bias), f"{name_of(self.dtype)}{why}"

    def _coded(self, coded: Coded, bias: torch.Tensor | None) -> CudaLinear | None:
        """A weight as its checkpoint stores it; None if its shape does not allow that."""
        fp8 = coded.codes.dtype == torch.float8_e4m3fn
        if fp8 and not self.has_fp8:
            raise ConfigError(
                f"weight_precision='auto' follows the checkpoint, whose FP8 needs {NEEDED}: use 'dequantised' on "
                "this GPU"
            )
        kind = _codes_in_words(coded)
        fits = all(size % 16 == 0 for size in coded.codes.shape)
        if fp8 and coded.scales.shape[1] == 1 and fits:
            scale = coded.by_tensor
            if scale is not None and coded.input_scale is not None:
                self._count("FP8 W8A8")
                return Fp8Linear(coded.codes, scale, coded.input_scale, bias, self.dtype)
            self._count(f"FP8 W8A8 by {'output' if coded.input_scale is not None else 'output and row'}")
            scales = coded.scales[:, 0].float().contiguous()
            return Fp8RowLinear(coded.codes, scales, coded.input_scale, bias, self.dtype)
        make: type[FourBitLinear | GroupedLinear] | None = None
        if four_bits.tile_of(coded) is not None:
            make = FourBitLinear
        elif tile_of(coded) is not None and not (fp8 and coded.scales.shape[1] == 1):
            make = GroupedLinear
        if make is None:
            self._count(f"{kind} dequantised (shape is no multiple of 16)")
            return None
        self._count(f"{kind} in groups of {coded.group}")
        return make(coded, bias, self.dtype, self.scratch, self.multiprocessors)

    def linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> CudaLinear:
        """The output head, or a linear whose weights are not FP8 codes."""
        return self._linear(weight, bias, head=True)

    def _linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, head: bool, narrows: bool = False
    ) -> CudaLinear:
        weight = weight.to(self.device, self.dtype)
        bias = None if bias is None else bias.to(self.device, self.dtype)
        fits = all(size % 16 == 0 for size in weight.shape)
        if head and (self.head == "fp8" or narrows) and bias is None and fits:
            self._count("FP8 head")
            return Fp8Head(weight, self.dtype)
        if narrows and not head and fits:
            self._count("FP8 W8A8 by output and row")
            codes, scales = fp8_by_output(weight)
            return Fp8RowLinear(codes, scales, None, bias, self.dtype)
        if not head and self.weights == "int8" and fits:
            self._count("int8 W8A8")
            return Int8Linear(weight, bias, self.dtype)
        self._count(f"{name_of(self.dtype)}{' head' if head else ''}")
        return PlainLinear(weight, bias)

    def _count(self, kind: str) -> None:
        self._used[kind] = self._used.get(kind, 0) + 1

    # The step --------------------------------------------------------------------------------------

    def summed(self, delta: torch.Tensor) -> torch.Tensor:
        """Partial sums of this rank's own product are added up first: between GPUs every byte counts."""
        if self.group.size > 1 and delta.dim() == 3:
            shape = (delta.shape[1], delta.shape[2])
            room = self.group.room(shape, self.dtype)
            if room is None:
                room = torch.empty(shape, dtype=self.dtype, device=delta.device)
            delta = norm.add_up(delta, room)
        return self.group.sum(delta)

    def embed(self, step: CudaStep, table: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        return tokens.embed(step.ids, step.attention.slots, step.last, table, float(factor))

    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        post: torch.Tensor | None,
        weight: torch.Tensor | None,
        eps: float,
        reader: CudaLinear,
    ) -> tuple[Activation, torch.Tensor]:
        """In place in ``x``."""
        return norm.add_norm(x, delta, post, weight, eps, reader.form, reader.input_scale), x

    def add_shares(
        self,
        x: torch.Tensor,
        share: torch.Tensor | None,
        post: torch.Tensor | None,
        weight: torch.Tensor | None,
        eps: float,
        reader: CudaLinear,
    ) -> tuple[Activation, torch.Tensor]:
        if share is None or self.exchange is None or x.shape[0] > self.exchange.rows:
            return super().add_shares(x, share, post, weight, eps, reader)
        return self.exchange.add_norm(x, share, post, weight, eps, reader.form, reader.input_scale), x

    def gate(self, gate_up: torch.Tensor, activation: str, reader: CudaLinear) -> Activation:
        return norm.gate(gate_up, activation, self.dtype, reader.form, reader.input_scale)

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

    def same_cache(self, cache: KVCache, kv_scales: tuple[float, float]) -> KVCache:
        scales = kv_scales if self.kv == "fp8" else (1.0, 1.0)
        return KVCache(cache.values, cache.scales, *scales)

    def cache_tensors(self, cache: KVCache) -> list[torch.Tensor]:
        return [cache.values] if cache.scales is None else [cache.values, cache.scales]

    def attention(
        self,
        qkv: torch.Tensor,
        layer: Layer[CudaLinear],
        spec: ModelSpec,
        rope: torch.Tensor,
        cache: KVCache,
        step: CudaStep,
    ) -> Activation:
        where, norms_row, means = step.attention.of(layer.group), spec.qk_norm == "row", None
        if norms_row and self.group.size > 1:
            heads = spec.num_heads, spec.num_kv_heads, spec.head_dim
            means = self.group.sum(row_means(qkv, *heads, self.group.size))
        qkv = rotate_write(
            qkv,
            cache,
            where,
            rope,
            spec.num_heads,
            layer.q_norm,
            layer.k_norm,
            spec.norm_eps,
            self.dtype,
            norms_row,
            means,
        )
        prefix = None
        if where.prefixes is not None:
            assert self.prefix is not None
            prefix = attend_prefixes(
                qkv, cache, where, spec.num_heads, spec.attention_scale, layer.spec.window, spec.attention_softcap,
                self.prefix,
            )  # fmt: skip
        most = where.most or where.tables.shape[1] * cache.values.shape[3]
        plan = self.decode_plan(spec, max(1, where.num_decodes), min(layer.spec.window or most, most))
        reader = layer.out
        form = reader.form if reader.form == Form.FP8_STATIC else Form.PLAIN
        prefill = self.long_prefill if where.long else None
        if prefill is None and where.longest > attention.SHORT:
            prefill = self.usual_prefill
        out = attention.attend(
            qkv, cache, where, spec.num_heads, spec.attention_scale, layer.spec.window, spec.attention_softcap,
            plan, form, reader.input_scale, prefill, layer.sinks, prefix,
        )  # fmt: skip
        if where.spans is not None:
            gathered = self.gathered_plan(where.longest)
            assert gathered is not None
            attend_gathered(
                qkv, cache, where, spec.num_heads, spec.attention_scale, spec.attention_softcap, gathered, out,
                form, reader.input_scale, layer.sinks,
            )  # fmt: skip
        # A scale for each token spans heads that different programs compute: a pass of its own.
        return Activation(out) if form == reader.form else quantise(out, reader.form)

    def gathered_plan(self, longest: int) -> GatheredPlan | None:
        """Of a step's prompts, of which the longest has so many keys."""
        return self.gathered_long if self.gathered_long and longest >= LONG_GATHERED else self.gathered

    def decode_plan(self, spec: ModelSpec, rows: int, longest: int) -> DecodePlan:
        """Of a step's decodes, of which the longest has so many keys."""
        width = 1 if self.kv in ("fp8", "int8") else 2
        return attention.decode_plan(
            rows, spec.num_kv_heads, spec.num_groups, spec.head_dim, width, self.multiprocessors, longest
        )

    def float_logits(self, logits: torch.Tensor, head: CudaLinear) -> torch.Tensor:
        """The column scales of an e4m3 head are left to whoever reads the logits."""
        logits = logits.float()
        return logits if head.column_scales is None else logits * head.column_scales

    def sequence_steps(
        self, spec: ModelSpec, blocks: torch.Tensor, block_size: int
    ) -> SequenceSteps[CudaStep]:
        return CudaSequence.of(blocks, self.dtype, spec.num_groups, spec.head_dim)

    # Tuning ----------------------------------------------------------------------------------------

    def link(self, layer: Layer[CudaLinear], size: int, config: EngineConfig) -> None:
        """Finds out up to how many rows of ``size`` one kernel for sum and norm is faster; every rank calls it.

        ``layer`` is any of the model's. With ``all_reduce='fused'`` it is taken wherever it can be, and nothing timed.

        Raises ConfigError if that cannot be.
        """
        forced = config.all_reduce == "fused"
        if self.group.size == 1 or not (forced or config.cuda_tuning):
            return
        exchange = Exchange.between(self.group, size, self.dtype)
        if forced and exchange is None:
            raise ConfigError(
                "all_reduce='fused' needs GPUs that write to each other's memory, and these do not: use auto"
            )
        if forced or exchange is None:
            self.exchange = exchange
            return
        most, exchange.rows, reader = exchange.rows, 0, layer.qkv
        times: dict[str, float] = {}
        ones = torch.ones(size, dtype=self.dtype, device=self.device)
        for rows in (each for each in EXCHANGED_ROWS if each <= most):
            x = torch.zeros(rows, size, dtype=self.dtype, device=self.device)
            few = rows <= SKINNY_ROWS  # our own products leave partial sums
            share = torch.zeros(2, rows, size, device=self.device) if few else torch.zeros_like(x)

            def together(x: torch.Tensor = x, share: torch.Tensor = share) -> None:
                exchange.add_norm(x, share, None, ones, 1e-5, reader.form, reader.input_scale)

            def apart(x: torch.Tensor = x, share: torch.Tensor = share) -> None:
                self.add_norm(x, self.summed(share), None, ones, 1e-5, reader)

            seen = [_each_us(run) for run in (together, apart)]
            # All ranks decide by the same figures.
            took = self.group.sum(torch.tensor(seen, dtype=torch.float32, device=self.device)).tolist()
            ours, theirs = (each / self.group.size for each in took)
            times |= {f"one kernel, {rows}": round(ours, 2), f"apart, {rows}": round(theirs, 2)}
            if ours > theirs:
                break
            exchange.rows = rows
            self._tuning += f"; sum and norm of {rows}: {theirs:.1f} -> {ours:.1f} us"
        self.tuned["sums"] = times
        self.exchange = exchange if exchange.rows else None

    def tune(self, layers: list[Layer[CudaLinear]]) -> None:
        """Chooses for each FP8 linear between the library and our product for few rows, by timing both.

        For weights in groups the fastest plan of our product is chosen, for few rows and for more, and then from how
        many rows on the library is faster, which reads the weight written out. Each candidate runs through all layers
        in a graph, so that weights come from memory and not from a cache.
        """
        chosen = []
        for kind, linears in _by_kind(layers).items():
            if any(type(linear) is not type(linears[0]) for linear in linears):
                continue
            for rows in _tuned_rows(linears[0]):
                times = self._timed(linears, rows)
                if not times:
                    continue
                best = min(times, key=lambda plan: times[plan])
                if None in times:
                    ours = [plan for plan in times if plan is not None]
                    best = min(ours, key=lambda plan: times[plan], default=None)
                    # Our partial sums cost their reader a little, but ours starts while the kernel before it ends:
                    # where that is possible a close race goes to it, otherwise to the library.
                    if times[best] > (1.05 if OVERLAPS else 0.95) * times[None]:
                        best = None
                for linear in linears:
                    _take(linear, rows, best)
                first, each = next(iter(times.values())), len(linears)
                name = kind if rows == FEWEST else f"{kind} of {rows}"
                chosen.append(f"{name} {first / each:.1f} -> {times[best] / each:.1f} us")
                self.tuned[name] = {str(plan): round(time / each, 2) for plan, time in times.items()}
        if chosen:
            self._tuning += f"; few rows: {', '.join(chosen)}"
        if mixtures := [layer.mlp for layer in layers if isinstance(layer.mlp, CudaMixture)]:
            self._tune_few_experts(mixtures)
            self._tune_blocks(mixtures)

    def _tune_few_experts(self, mixtures: list[CudaMixture]) -> None:
        """How many outputs a program has where one row meets its experts, by timing all layers in a graph."""

        def run() -> None:
            for mixture in mixtures:
                mixture.try_few()

        times: dict[int, float] = {}
        for outputs in FEW_OUTPUTS:
            for mixture in mixtures:
                mixture.few_outputs = outputs
            try:
                run()
            except OutOfResources:  # of a smaller device, or of weights in float32
                continue
            times[outputs] = graph_seconds(run) / len(mixtures) * 1e6
        best = min(times, key=lambda outputs: times[outputs], default=FEW_OUTPUTS[0])
        for mixture in mixtures:
            mixture.few_outputs = best
        self.tuned["experts of one row"] = {
            f"{outputs} outputs": round(us, 2) for outputs, us in times.items()
        }
        if best != FEW_OUTPUTS[0] and FEW_OUTPUTS[0] in times:
            self._tuning += f"; experts of one row: {times[FEW_OUTPUTS[0]]:.1f} -> {times[best]:.1f} us"

    def _tune_blocks(self, mixtures: list[CudaMixture]) -> None:
        """Whether blocks of twice as many rows are faster, for each number of pairs that experts have on average, by
        timing all layers in a graph. Routes are random: real ones are less even, which speaks for larger blocks."""
        shape = mixtures[0].mixture
        draws = torch.Generator(device=self.device).manual_seed(0)
        for each, usual in BLOCK_ROWS.items():
            count = max(1, each * shape.experts // shape.chosen)
            drawn = torch.rand(count, shape.experts, generator=draws, device=self.device)
            routes = drawn.topk(shape.chosen).indices.to(torch.int32)

            def run(routes: torch.Tensor = routes) -> None:
                for mixture in mixtures:
                    mixture.try_many(routes)

            times: dict[int, float] = {}
            for rows in (usual, 2 * usual):
                for mixture in mixtures:
                    mixture.block_rows[each] = rows
                try:
                    run()
                except OutOfResources:
                    continue
                times[rows] = graph_seconds(run) / len(mixtures) * 1e6
            best = min(times, key=lambda rows: times[rows], default=usual)
            for mixture in mixtures:
                mixture.block_rows[each] = best
            self.tuned[f"experts of {count} rows"] = {
                f"blocks of {rows}": round(us, 2) for rows, us in times.items()
            }
            if best != usual and usual in times:
                self._tuning += f"; experts of {count} rows: {times[usual]:.1f} -> {times[best]:.1f} us"

    def load_products(
        self, layers: list[Layer[CudaLinear]], head: CudaLinear, tokens: int, samples: int
    ) -> None:
        """Multiplies with every kind of linear once for all sorts of numbers of rows, up to a step's ``tokens``, and
        ``samples`` of the head.

        The libraries have a kernel for each sort, and the driver loads one where it is first asked for. That lasts
        until the device is idle: up to 90 ms in which every answer waits, again and again on a new server.
        """
        for linears in _by_kind(layers).values():
            for rows in _sorts(tokens):
                linears[0](self._blank(linears[0], rows))
        for rows in _sorts(min(samples, MOST_TRIED)):
            head(self._blank(head, rows))
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _blank(self, linear: CudaLinear, rows: int) -> Activation:
        """An input of ``rows``."""
        inputs = linear.inputs if isinstance(linear, CodedLinear) else linear.weight.shape[1]
        x = torch.zeros(rows, inputs, dtype=self.dtype, device=self.device)
        return Activation(x) if linear.form == Form.PLAIN else quantise(x, linear.form, linear.input_scale)

    def _timed(self, linears: list[Any], rows: int) -> dict[SkinnyPlan | GroupedPlan | None, float]:
        """Microseconds of each candidate, what is taken without tuning first; empty if there is no choice."""
        one = linears[0]
        ones = torch.ones(rows, 1, device=self.device)
        plans: list[SkinnyPlan | GroupedPlan | None]
        if isinstance(one, CodedLinear):
            x = Activation(ones.expand(rows, one.inputs).to(self.dtype).contiguous())
            # What is best of so many rows at once may be best of several times as many.
            plans = [one.plan_of(ROWS_AT_ONCE), *one.many_plans(), None]
            if rows <= ROWS_AT_ONCE:
                plans = [*one.plans(rows)]
            plans = [plan for plan in plans if self._agrees(one, rows, plan)]
        elif isinstance(one, Fp8Linear | Fp8RowLinear):
            outputs, inputs = one.weight.shape
            scales = ones[:, 0].contiguous() if one.form == Form.FP8_TOKEN else None
            x = Activation(ones.expand(rows, inputs).to(torch.float8_e4m3fn), scales)
            plans = [None, *skinny_plans(outputs, inputs, self.multiprocessors)]
        else:
            return {}
        return {plan: time_all(linears, x, plan) for plan in plans}

    def _agrees(self, linear: CodedLinear, rows: int, plan: SkinnyPlan | GroupedPlan | None) -> bool:
        """Whether a plan in the language without an interpreter gives what the library does, on this device and with
        this release of Triton."""
        if not isinstance(plan, GroupedPlan) or not plan.ahead:
            return True
        x = Activation(torch.randn(rows, linear.inputs, dtype=self.dtype, device=self.device))
        results = []
        for each in (None, plan):
            linear.choose(rows, each)
            try:
                result = linear(x)
            except OutOfResources:
                return False
            except OTHER_GLUON as error:
                self._tuning += f"; {plan} is not used: {type(error).__name__} with this release of Triton"
                return False
            results.append(result.sum(0) if result.dim() == 3 else result)
        apart = difference(*results)
        if not apart <= MOST_APART:
            self._tuning += f"; {plan} is not used: results differ by {apart:.2g}"
        return apart <= MOST_APART

    def tune_usual_prefill(self, spec: ModelSpec, cache: KVCache, longest: int) -> None:
        """Chooses how many keys at a time prompts meet that are neither short nor ``long_prefill``'s, by timing the
        candidates: one of up to 1,000 tokens."""
        tokens = min(longest, 1000, cache.values.shape[0] * cache.values.shape[3])
        usual, *others = attention.usual_prefill_plans(self.dtype, spec.head_dim)
        if tokens <= attention.SHORT or not others:
            return
        with random_content(cache, -(-tokens // cache.values.shape[3])):
            times = {
                plan: prefill_seconds(plan, spec, cache, tokens, tokens, self.dtype, in_graph=True)
                for plan in (usual, *others)
            }
        best = min(times, key=lambda plan: times[plan])
        self.tuned["prefill attention, 1,000 tokens"] = {
            str(plan): round(took * 1e6, 1) for plan, took in times.items()
        }
        if times[best] < 0.98 * times[usual]:
            self.usual_prefill = best
            self._tuning += f"; prompts: {times[usual] * 1e6:.0f} -> {times[best] * 1e6:.0f} us with {best}"

    def tune_prefill(self, spec: ModelSpec, cache: KVCache, longest: int, step: int) -> None:
        """Chooses how the attention of prompts of up to ``longest`` tokens is cut up, by timing the candidates; a step
        has ``step`` tokens at the most.

        Each computes the last tokens of a long prompt over ``cache``. Where keys are laid side by side first, the
        results have to be those of the others, and what is best of very long ones is found out by itself.
        """
        block_size = cache.values.shape[3]
        most = min(longest, cache.values.shape[0] * block_size)
        context = min(most, 16384)
        if context < attention.LONG:
            return
        tokens = min(context, 2048)
        with random_content(cache, -(-context // block_size)):
            plans = attention.long_prefill_plans(self.dtype, spec.head_dim)
            seen = [
                prefill_seconds(plan, spec, cache, context, tokens, self.dtype, in_graph=True)
                for plan in plans
            ]
            # All ranks decide by the same figures: rank 0 cuts up the prompts for all of them.
            total = self.group.sum(torch.tensor(seen, dtype=torch.float32, device=self.device))
            times = dict(zip(plans, (total / self.group.size).tolist(), strict=True))
            usual, *_ = times
            alone = self.group.size == 1  # each rank would time its own, and all have to take the same
            room = longest + STEPS * step
            gathered = self._time_gathered(spec, cache, room, context, tokens, usual) if alone else []
        best = min(times, key=lambda plan: times[plan])
        if times[best] < 0.98 * times[usual]:
            self.long_prefill = best
            self._tuning += (
                f"; long prompts: {times[usual] * 1e6:.0f} -> {times[best] * 1e6:.0f} us with {best}"
            )
        self.tuned["prefill attention"] = {str(plan): round(took * 1e6, 1) for plan, took in times.items()}
        if not gathered:
            return
        plan, seconds = min(gathered, key=lambda each: each[1])
        self.tuned["prefill attention over gathered keys"] = {
            str(plan): round(seconds * 1e6, 1) for plan, seconds in gathered
        }
        if seconds >= 0.95 * min(times.values()):
            return
        self.gathered = plan
        self._tuning += (
            f"; prompts of up to {plan.keys} tokens over gathered keys: "
            f"{times[usual] * 1e6:.0f} -> {seconds * 1e6:.0f} us with {plan}"
        )
        if min(most, plan.keys) > LONG_GATHERED:
            self._tune_long_gathered(spec, cache, [each for each, _ in gathered], min(most, plan.keys))

    def _tune_long_gathered(
        self, spec: ModelSpec, cache: KVCache, plans: list[GatheredPlan], context: int
    ) -> None:
        """Of the ``plans`` that have the chosen one's scratch memory, which is best of ``context`` keys."""
        assert self.gathered is not None
        with random_content(cache, -(-context // cache.values.shape[3])):
            times = {
                plan: prefill_seconds(plan, spec, cache, context, 2048, self.dtype, repeats=3, in_graph=True)
                for plan in plans
                if plan.scratch is self.gathered.scratch
            }
        best = min(times, key=lambda plan: times[plan])
        self.tuned[f"prefill attention over {context} gathered keys"] = {
            str(plan): round(seconds * 1e6, 1) for plan, seconds in times.items()
        }
        if times[best] < 0.99 * times[self.gathered]:
            self.gathered_long = best
            self._tuning += (
                f"; from {LONG_GATHERED} on: {times[self.gathered] * 1e6:.0f} -> {times[best] * 1e6:.0f} us "
                f"with {best}"
            )

    def _time_gathered(
        self,
        spec: ModelSpec,
        cache: KVCache,
        room: int,
        context: int,
        tokens: int,
        usual: PrefillPlan,
    ) -> list[tuple[GatheredPlan, float]]:
        """Plans with gathered keys and what they take: those that give the results of the ``usual`` one."""
        tiles = gathered_plans(self.dtype, spec.head_dim)
        if not tiles or not FETCHES or any(layer.window for layer in spec.layers):
            return []
        fp8 = cache.values.dtype == torch.float8_e4m3fn
        try:
            scratches = [
                GatheredScratch.new(cache, self.dtype, room, turned)
                for turned in ((False, True) if fp8 else (False,))
            ]
        except torch.OutOfMemoryError:
            self._tuning += "; no memory is left to gather prompts' keys in"
            return []
        qkv = random_qkv(spec, tokens, self.dtype, cache.values.device)
        expected = prompt_attention(usual, spec, cache, context, qkv)()
        found = []
        plans = [GatheredPlan(tile, scratch) for scratch in scratches for tile in tiles]
        plans += ahead_plans(scratches[-1], spec.attention_softcap, spec.sinks)
        for plan in plans:
            seconds = prefill_seconds(plan, spec, cache, context, tokens, self.dtype, in_graph=True)
            if math.isinf(seconds):
                continue
            apart = difference(prompt_attention(plan, spec, cache, context, qkv)(), expected)
            if apart <= (MOST_APART_FP8 if plan.fp8 else MOST_APART):
                found.append((plan, seconds))
            else:
                self._tuning += f"; {plan} over gathered keys is not used: results differ by {apart:.2g}"
        return found

    def prefix_plan(self, spec: ModelSpec, cache: KVCache) -> PrefixPlan:
        return PrefixPlan.of(cache, spec.num_heads, self.dtype, self.multiprocessors)

    def tune_prefixes(self, spec: ModelSpec, cache: KVCache, decodes: int, longest: int) -> None:
        """Decides whether keys that decodes share are computed together, by timing both ways.

        Up to 64 decodes share up to 2,048 tokens of ``cache`` and have 64 of their own.
        """
        block_size = cache.values.shape[3]
        own = -(-64 // block_size)
        decodes = min(decodes, 64)
        shared = min(2048, longest - 64) // block_size
        shared = min(shared, cache.values.shape[0] - decodes * own)
        if decodes < 8 or shared * block_size < 256:
            return
        usual = self.prefix_plan(spec, cache)
        if usual.lay_out([Group(np.arange(decodes), shared)], decodes, block_size) is None:
            return
        times, alone = {}, math.inf
        shape = (spec, cache, decodes, shared, own, self.dtype, self.multiprocessors)
        with random_content(cache, shared + decodes * own):
            for plan in (usual, *usual.others(self.dtype, spec.head_dim)):
                alone_now, together, apart = shared_seconds(plan, *shape)
                if math.isinf(together):
                    continue
                alone = min(alone, alone_now)
                if apart <= MOST_APART:
                    times[plan] = together
                else:
                    self._tuning += (
                        f"; {plan.tile} over shared prefixes is not used: results differ by {apart:.2g}"
                    )
        if not times:
            return
        best = min(times, key=lambda plan: times[plan])
        self.tuned["shared prefixes"] = {"each row alone": alone * 1e6} | {
            str(plan.tile): round(seconds * 1e6, 1) for plan, seconds in times.items()
        }
        if times[best] < 0.9 * alone:
            self.prefix = best
            self._tuning += (
                f"; shared prefixes: {alone * 1e6:.0f} -> {times[best] * 1e6:.0f} us with {best.tile}"
            )


def _codes_in_words(coded: Coded) -> str:
    if coded.codes.dtype == torch.float8_e4m3fn:
        return "FP8"
    return "FP4 W4A16" if coded.e2m1 else f"W{coded.bits}A16"


def _sorts(most: int) -> list[int]:
    """Numbers of rows up to ``most``, denser where the library changes its mind more often and a product takes less."""
    return [*range(1, min(most, 512) + 1), *range(516, min(most, 2048) + 1, 4), *range(2064, most + 1, 16)]


def _by_kind(layers: list[Layer[CudaLinear]]) -> dict[str, list[Any]]:
    """The linears of all layers, without those of experts."""
    dense = [layer.mlp for layer in layers if isinstance(layer.mlp, GatedMlp)]
    kinds: dict[str, list[Any]] = {
        "qkv": [layer.qkv for layer in layers],
        "out": [layer.out for layer in layers],
        "gate_up": [mlp.gate_up for mlp in dense],
        "down": [mlp.down for mlp in dense],
    }
    return {kind: linears for kind, linears in kinds.items() if linears}


def _tuned_rows(linear: CudaLinear) -> tuple[int, ...]:
    """Numbers of rows, ascending, up to each of which a plan is chosen."""
    return TUNED_ROWS if isinstance(linear, CodedLinear) else (FEWEST,)


def _take(linear: Any, rows: int, plan: SkinnyPlan | GroupedPlan | None) -> None:
    if isinstance(linear, CodedLinear):
        assert not isinstance(plan, SkinnyPlan)
        linear.choose(rows, plan)
    else:
        linear.plan = plan


def time_all(linears: list[Any], x: Activation, plan: SkinnyPlan | GroupedPlan | None) -> float:
    """Microseconds to run ``x`` through all of them; infinite if the plan does not fit this device."""
    for linear in linears:
        _take(linear, len(x.values), plan)

    def run() -> None:
        for linear in linears:
            linear(x)

    try:
        linears[0](x)
        return graph_seconds(run) * 1e6
    except OutOfResources:
        return float("inf")


def _each_us(run: Callable[[], object]) -> float:
    """Microseconds of one of many in a graph; it is run once before, to be compiled."""
    run()

    def many() -> None:
        for _ in range(EXCHANGES):
            run()

    return graph_seconds(many) * 1e6 / EXCHANGES
