"""Triton-language kernels against plain PyTorch: in Triton's interpreter, as ``test_kernels_in_the_interpreter.py``
starts it, and on a GPU with ``-m gpu``."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import os
import random
import re
from collections import defaultdict
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F

from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.core.request import FinishReason, GenerationRequest, Guide, SamplingParams
from flightline.torch_engine.core.shared_prefixes import Group, find_groups
from flightline.torch_engine.model.coded import Coded
from tests.tiny import tiny_checkpoint

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
RUNS = HAS_TRITON and (ON_GPU or INTERPRETED)
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.float32, torch.bfloat16] if ON_GPU else [torch.float32, torch.float16]

LINEAR_DTYPE = torch.bfloat16 if ON_GPU else torch.float32

if RUNS:
    from flightline.engine_build.engine_model import EngineModel
    from flightline.torch_engine import cuda_runner
    from flightline.torch_engine.cuda_runner import MixedShape
    from flightline.torch_engine.kernels.gpu import attention, cuda, four_bits, shared_prefix, timing
    from flightline.torch_engine.kernels.gpu.activation import Activation, Form
    from flightline.torch_engine.kernels.gpu.attention import (
        DecodePlan,
        PrefillPlan,
        Shares,
        attend,
        decode_plan,
        long_prefill_plans,
        prefill_plan,
        usual_prefill_plans,
    )
    from flightline.torch_engine.kernels.gpu.cuda import CudaKernels
    from flightline.torch_engine.kernels.gpu.four_bits import FourBitLinear
    from flightline.torch_engine.kernels.gpu.gathered import (
        GatheredPlan,
        GatheredScratch,
        attend_gathered,
        padded,
    )
    from flightline.torch_engine.kernels.gpu.grouped import FEW_ROWS, GroupedLinear, Scratch
    from flightline.torch_engine.kernels.gpu.kv_cache import (
        AttentionInput,
        KVCache,
        SharedPrefixes,
        rotate_write,
        row_means,
        scatter,
    )
    from flightline.torch_engine.kernels.gpu.launch import WAITS_LATER
    from flightline.torch_engine.kernels.gpu.linear import (
        Fp8Head,
        Fp8Linear,
        Fp8RowLinear,
        Int8Linear,
        SkinnyPlan,
        dequantise,
        quantise,
        scale_rows,
        skinny_linear,
        skinny_plans,
    )
    from flightline.torch_engine.kernels.gpu.norm import add_norm, gate
    from flightline.torch_engine.kernels.gpu.shared_prefix import PrefixPlan, attend_prefixes
    from flightline.torch_engine.kernels.gpu.tokens import argmax, embed

if RUNS and INTERPRETED:
    from tests.torch_engine.quick_interpreter import quicken

    quicken()

kernel = [
    pytest.mark.skipif(not RUNS, reason="runs in test_kernels_in_the_interpreter, or on a GPU with -m gpu"),
    *([pytest.mark.gpu] if ON_GPU else []),
]


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Relative error of the whole, as ‖ours − theirs‖ / ‖theirs‖."""
    assert ours.shape == theirs.shape
    error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
    assert error <= tolerance, f"relative error {error:.2g} > {tolerance}"


def tolerance_of(dtype: torch.dtype) -> float:
    return {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]


def expanded(activation, form: Form, scale: torch.Tensor | None) -> torch.Tensor:
    """An activation's values in float32."""
    values = activation.values.float()
    if form == Form.FP8_STATIC:
        return values * scale
    return values if activation.scales is None else values * activation.scales[:, None]


def form_tolerance(form: Form, dtype: torch.dtype) -> float:
    return {Form.PLAIN: tolerance_of(dtype), Form.INT8_TOKEN: 3e-2}.get(form, 6e-2)


FORMS = [0, 1, 2, 3]


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


class TestKernels:
    pytestmark = kernel

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("delta", "post"), [(False, False), (True, False), (True, True)])
    def test_add_norm(self, form: int, dtype: torch.dtype, delta: bool, post: bool) -> None:
        form = Form(form)
        x = torch.randn(3, 80, device=DEVICE, dtype=dtype)
        d = torch.randn_like(x) * 2 if delta else None
        weight, p = torch.rand(80, device=DEVICE) + 0.5, torch.rand(80, device=DEVICE) + 0.5
        scale = torch.tensor(0.02, device=DEVICE)
        wide = x.float()
        if delta:
            wide = wide + (rms(d.float(), p) if post else d.float())
        expected = rms(wide, weight)
        result = add_norm(x, d, p if post else None, weight, 1e-5, form, scale)
        close(x, wide, tolerance_of(dtype))
        close(expanded(result, form, scale), expected, form_tolerance(form, dtype))

    @pytest.mark.parametrize("form", FORMS)
    def test_a_sum_without_a_norm(self, form: int) -> None:
        form, dtype, scale = Form(form), DTYPES[1], torch.tensor(0.02, device=DEVICE)
        x, delta = torch.randn(2, 3, 80, device=DEVICE, dtype=dtype)
        expected = x.float() + delta.float()
        result = add_norm(x, delta, None, None, 1e-5, form, scale)
        close(expanded(result, form, scale), expected, form_tolerance(form, dtype))

    @pytest.mark.parametrize("parts", [None, 3])
    def test_norms_over_all_heads_of_a_row(self, parts: int | None) -> None:
        """More heads than a program has; queries and keys each have a norm of their own."""
        heads, kv_heads, size, rows = 9, 3, 20, 5
        shape = rows, (heads + 2 * kv_heads) * size
        qkv = torch.randn(parts or 1, *shape, device=DEVICE)
        cache = KVCache(torch.zeros(2, 2, kv_heads, 16, size, device=DEVICE), None)
        where = torch.arange(rows, device=DEVICE, dtype=torch.int32)
        table = torch.ones(1, 1, device=DEVICE, dtype=torch.int32)
        step = AttentionInput(torch.zeros_like(where), where, table, rows, None)
        rope = torch.randn(rows, 2, size // 2, device=DEVICE)
        q_norm, k_norm = (torch.rand(count * size, device=DEVICE) + 0.5 for count in (heads, kv_heads))
        q, k, v = qkv.sum(0).split([heads * size, kv_heads * size, kv_heads * size], 1)
        normed = torch.cat([rms(q, q_norm), rms(k, k_norm), v], 1)
        other = KVCache(cache.values.clone(), None)
        expected = rotate_write(normed, other, step, rope, heads)
        ours = rotate_write(
            qkv if parts else qkv[0], cache, step, rope, heads, q_norm, k_norm, 1e-5, torch.float32, True
        )
        close(ours[:, : heads * size], expected[:, : heads * size], 1e-5)
        close(cache.values, other.values, 1e-5)

    @pytest.mark.parametrize("parts", [None, 3])
    @pytest.mark.parametrize("ranks", [2, 4])
    def test_norms_over_the_heads_of_all_ranks(self, ranks: int, parts: int | None) -> None:
        """Each rank writes what one has of its heads; of four ranks two have the same key head."""
        heads, kv_heads, size, rows = 8, 2, 20, 3
        qkv = torch.randn(parts or 1, rows, heads + 2 * kv_heads, size, device=DEVICE)
        q_norm, k_norm = (torch.rand(count, size, device=DEVICE) + 0.5 for count in (heads, kv_heads))
        where = torch.arange(rows, device=DEVICE, dtype=torch.int32)
        table = torch.ones(1, 1, device=DEVICE, dtype=torch.int32)
        step = AttentionInput(torch.zeros_like(where), where, table, rows, None)
        rope = torch.randn(rows, 2, size // 2, device=DEVICE)

        def written(
            each: torch.Tensor, queries: slice, keys: slice, means: torch.Tensor | None
        ) -> list[torch.Tensor]:
            count = keys.stop - keys.start
            cache = KVCache(torch.zeros(2, 2, count, 16, size, device=DEVICE), None)
            norms = q_norm[queries].flatten(), k_norm[keys].flatten()
            out = rotate_write(
                each.clone(),
                cache,
                step,
                rope,
                queries.stop - queries.start,
                *norms,
                1e-5,
                torch.float32,
                True,
                means,
            )
            return [out.unflatten(1, (-1, size))[:, : queries.stop - queries.start], cache.values]

        whole = qkv.flatten(2) if parts else qkv[0].flatten(1)
        expected, cached = written(whole, slice(0, heads), slice(0, kv_heads), None)
        shares = []
        for rank in range(ranks):
            queries = slice(rank * heads // ranks, (rank + 1) * heads // ranks)
            first = rank * kv_heads // ranks
            keys = slice(first, first + 1)
            kept = [
                qkv[:, :, queries],
                *(qkv[:, :, start + first][:, :, None] for start in (heads, heads + kv_heads)),
            ]
            own = torch.cat(kept, 2).flatten(2)
            shares.append((own if parts else own[0], queries, keys))
        means = sum(row_means(own, heads // ranks, 1, size, ranks) for own, _, _ in shares)
        for own, queries, keys in shares:
            out, values = written(own, queries, keys, means)
            close(out, expected[:, queries], 1e-5)
            close(values, cached[:, :, keys], 1e-5)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
    @pytest.mark.parametrize("size", [48, 1040])
    def test_gate(self, form: int, activation: str, size: int) -> None:
        form, dtype = Form(form), DTYPES[1]
        gate_up = torch.randn(3, 2 * size, device=DEVICE, dtype=dtype) * 3
        scale = torch.tensor(0.5, device=DEVICE)
        g, u = gate_up.float().chunk(2, -1)
        expected = (F.silu(g) if activation == "silu" else F.gelu(g, approximate="tanh")) * u
        result = gate(gate_up, activation, dtype, form, scale)
        close(expanded(result, form, scale), expected, form_tolerance(form, dtype))

    @pytest.mark.parametrize("rows", [1, 16])
    @pytest.mark.parametrize(("block_n", "block_k", "splits"), [(16, 64, 2), (64, 32, 4), (32, 128, 1)])
    def test_skinny_linear(self, rows: int, block_n: int, block_k: int, splits: int) -> None:
        x = torch.randn(rows, 128, device=DEVICE).to(torch.float8_e4m3fn)
        weight = torch.randn(192, 128, device=DEVICE).to(torch.float8_e4m3fn)
        scales = torch.tensor(0.5, device=DEVICE), torch.tensor(0.25, device=DEVICE)
        plan = SkinnyPlan(block_n, block_k, splits, 4, 2)
        parts = skinny_linear(x, weight, *scales, plan)
        assert parts.shape == (splits, rows, 192)
        # The tensor cores of Hopper keep fewer bits of FP8 sums than float32 has.
        expected = x.float() @ weight.float().t() / 8
        close(parts.sum(0), expected, 1e-5 if INTERPRETED else 2e-3)
        bias = torch.randn(192, device=DEVICE).to(LINEAR_DTYPE)
        biased = skinny_linear(x, weight, *scales, plan, bias).sum(0)
        close(biased, expected + bias.float(), 1e-5 if INTERPRETED else 2e-3)

    @pytest.mark.parametrize(("outputs", "inputs"), [(6144, 4096), (4096, 14336), (5120, 2880), (2880, 4096)])
    def test_skinny_plans_fill_the_device(self, outputs: int, inputs: int) -> None:
        plans = skinny_plans(outputs, inputs, 132)
        assert plans
        for plan in plans:
            assert outputs % plan.block_n == 0 and inputs % (plan.block_k * plan.splits) == 0
            tiles = inputs // plan.block_k
            assert outputs // plan.block_n * plan.splits >= 2 * 132 or plan.splits == max(
                splits for splits in range(1, 10) if tiles % splits == 0
            )

    @pytest.mark.parametrize("size", [40, 5000])
    def test_rows_are_scaled_in_place(self, size: int) -> None:
        x, scales = torch.randn(3, size, device=DEVICE, dtype=DTYPES[1]), torch.rand(3, device=DEVICE)
        expected = (x.float() * scales[:, None]).to(x.dtype)
        assert scale_rows(x, scales) is x and torch.equal(x, expected)

    def test_readers_add_partial_sums(self) -> None:
        dtype = DTYPES[1]
        parts = torch.randn(3, 5, 80, device=DEVICE)
        x, weight = torch.randn(5, 80, device=DEVICE, dtype=dtype), torch.rand(80, device=DEVICE)
        whole = x.clone()
        expected = add_norm(whole, parts.sum(0), None, weight, 1e-5).values
        close(add_norm(x, parts, None, weight, 1e-5).values, expected, tolerance_of(dtype))
        close(x, whole, tolerance_of(dtype))
        ours, theirs = (gate(part, "silu", dtype).values for part in (parts, parts.sum(0)))
        close(ours, theirs, tolerance_of(dtype))
        cache = KVCache(torch.zeros(2, 2, 1, 16, 20, device=DEVICE), None)
        other = KVCache(cache.values.clone(), None)
        rows = torch.zeros(5, device=DEVICE, dtype=torch.int32)
        table = torch.ones(1, 1, device=DEVICE, dtype=torch.int32)
        step = AttentionInput(rows, torch.arange(5, device=DEVICE, dtype=torch.int32), table, 5, None)
        rope = torch.randn(5, 2, 10, device=DEVICE)
        ours = rotate_write(parts, cache, step, rope, 2, dtype=torch.float32)
        theirs = rotate_write(parts.sum(0), other, step, rope, 2)
        close(ours[:, :40], theirs[:, :40], 1e-5)
        close(cache.values, other.values, 1e-5)

    def test_static_fp8_saturates(self) -> None:
        x = torch.tensor([[1e4, -1e4, 3.0, 0.0] * 4], device=DEVICE)
        codes = quantise(x, Form.FP8_STATIC, torch.tensor(1.0, device=DEVICE)).values.float()
        assert codes[0, :4].tolist() == [448.0, -448.0, 3.0, 0.0]

    def test_int8_product(self) -> None:
        sums = torch.randint(-9999, 9999, (32, 40), device=DEVICE, dtype=torch.int32)
        rows, columns = torch.rand(5, device=DEVICE), torch.rand(40, device=DEVICE)
        bias = torch.randn(40, device=DEVICE)
        result = dequantise(sums, rows, columns, bias, torch.float32)
        close(result, sums[:5] * rows[:, None] * columns + bias, 1e-6)

    def test_embed_takes_negative_ids_from_the_device(self) -> None:
        table = torch.randn(50, 24, device=DEVICE)
        ids = torch.tensor([4, -1, 49, -1], device=DEVICE, dtype=torch.int32)
        slots = torch.tensor([0, 2, 1, 0], device=DEVICE, dtype=torch.int32)
        last = torch.tensor([7, 8, 9], device=DEVICE, dtype=torch.int32)
        result = embed(ids, slots, last, table, 2.0)
        assert torch.equal(result, table[[4, 9, 49, 7]] * 2.0)

    @pytest.mark.parametrize("size", [5, 1024, 20000])
    @pytest.mark.parametrize("scaled", [True, False])
    def test_argmax_takes_the_first_of_equals(self, size: int, scaled: bool) -> None:
        logits = torch.randn(3, size, device=DEVICE).half().float()
        scales = torch.rand(size, device=DEVICE) + 0.5 if scaled else None
        logits[1, [1, size - 1]] = 99.0
        if scaled:
            scales[[1, size - 1]] = 2.0
        slots = torch.tensor([3, 0, 1], device=DEVICE, dtype=torch.int32)
        last, tokens = (
            torch.full((5,), -7, device=DEVICE, dtype=torch.int32),
            torch.zeros(3, dtype=torch.int32),
        )
        tokens = tokens.to(DEVICE)
        argmax(logits, slots, last, tokens, scales)
        expected = (logits if scales is None else logits * scales).argmax(-1)
        assert tokens.tolist() == expected.tolist() and tokens[1] == 1
        assert last.tolist() == [tokens[1], tokens[2], -7, tokens[0], -7]

    def test_argmax_leaves_ends_out_where_told(self) -> None:
        logits = torch.zeros(4, 3000, device=DEVICE)
        for column, value in ((2500, 9.0), (7, 8.0), (1200, 7.0)):
            logits[:, column] = value
        integers = {"device": DEVICE, "dtype": torch.int32}
        slots, last, tokens = (
            torch.arange(4, **integers),
            torch.zeros(4, **integers),
            torch.zeros(4, **integers),
        )
        holds = torch.tensor([0, 1, 0, 1], **integers)
        argmax(logits, slots, last, tokens, None, holds, torch.tensor([7, 2500], **integers))
        assert tokens.tolist() == last.tolist() == [2500, 1200, 2500, 1200]

    def test_scatter(self) -> None:
        target = torch.zeros(3, 400, device=DEVICE, dtype=torch.int32)
        where = torch.randperm(1200)[:600].to(DEVICE, torch.int32)
        what = torch.arange(600, device=DEVICE, dtype=torch.int32)
        scatter(target, torch.stack([where, what]))
        expected = torch.zeros(1200, device=DEVICE, dtype=torch.int32)
        expected[where.long()] = what
        assert torch.equal(target.view(-1), expected)

    @pytest.mark.parametrize(
        ("heads", "kv_heads", "size", "kind", "window", "softcap", "normed", "sunk"),
        [
            (4, 4, 8, "compute", None, None, False, False),
            (9, 3, 64, "compute", 5, None, True, True),
            (4, 1, 40, "compute", 70, 3.0, False, False),
            (8, 2, 128, "compute", None, None, True, True),
            (9, 3, 64, "fp8", None, None, False, True),
            (8, 2, 128, "fp8", 70, None, True, False),
            (4, 1, 40, "int8", 5, None, False, True),
            (4, 2, 16, "scaled fp8", 7, 3.0, False, False),
            (8, 2, 128, "int8", None, 3.0, False, False),
            (8, 1, 64, "fp8", None, None, False, True),
            (16, 1, 64, "fp8", 70, None, False, True),
            (12, 1, 40, "compute", None, None, False, False),
        ],
    )
    def test_attention(self, heads, kv_heads, size, kind, window, softcap, normed, sunk) -> None:
        """Rotation, cache write, decodes and ragged prompt chunks, with every cache and number of splits."""
        dtype = DTYPES[1] if size == 128 else DTYPES[0]
        chance = random.Random(heads * size)
        torch.manual_seed(size)
        block_size, width = 16, 16
        prefill = PrefillPlan(32, 32, 4, 2) if heads % 2 else PrefillPlan(64, 16, 4, 1)
        slots, positions, tiles, tables, known = [], [], [], [], []
        free = chance.sample(range(1, 100), 99)
        lengths = [(1, 1), (130, 1), (65, 1), (17, 17), (150, 37), (90, 2)]
        if INTERPRETED:
            lengths = [(1, 1), (98, 1), (17, 17), (85, 19), (35, 2)]
        step_rows = 0
        for slot, (context, count) in enumerate(lengths):
            tables.append([free.pop() for _ in range(-(-context // block_size))] + [0] * width)
            tables[-1] = tables[-1][:width]
            if count > 1:
                each = prefill.tokens(heads // kv_heads)
                for begin in range(0, count, each):
                    rows = min(each, count - begin)
                    tiles.append([step_rows + begin, rows, context - count + begin, slot])
            slots += [slot] * count
            positions += list(range(context - count, context))
            known.append(torch.randn(context, 2, kv_heads, size))
            step_rows += count

        def device(values: list) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=DEVICE)

        step = AttentionInput(device(slots), device(positions), device(tables), 3, device(tiles))
        rope = torch.randn(160, 2, size // 2, device=DEVICE)
        qkv = torch.randn(step_rows, heads + 2 * kv_heads, size, device=DEVICE).to(dtype)
        q_norm, k_norm = (torch.rand(2, size) + 0.5).to(DEVICE) if normed else (None, None)
        sinks = torch.randn(heads, device=DEVICE) * 2 if sunk else None
        expected, writes = reference(
            qkv, step, known, lengths, rope, q_norm, k_norm, heads, kv_heads, window, softcap, sinks
        )
        cache = filled_cache(kind, dtype, known, lengths, tables, block_size, kv_heads, size)
        flat = qkv.reshape(step_rows, -1).clone()
        rotate_write(flat, cache, step, rope, heads, q_norm, k_norm, 1e-5)
        got = read_cache(cache)
        tolerance = max(tolerance_of(dtype), {"compute": 0.0, "int8": 1.2e-2}.get(kind, 4e-2))
        for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            block = tables[slot][position // block_size]
            close(got[block, :, :, position % block_size], writes[row], tolerance)
        scale = torch.tensor(0.01, device=DEVICE)
        kinds = [(3, Form.PLAIN), (3, Form.FP8_STATIC), (0, Form.PLAIN)]
        if INTERPRETED:  # either, by the case
            del kinds[1 + heads % 2]
        for extra, form in kinds:
            plan = DecodePlan(
                extra, 96 if sunk else 32, 32, 2
            )  # of many keys a program merges all of its heads
            out = attend(
                flat, cache, step, heads, 0.2, window, softcap, plan, form, scale, prefill, sinks
            ).float()
            out = out * scale if form == Form.FP8_STATIC else out
            close(out, expected, tolerance * 1.5 + (4e-2 if form else 1e-6))

    @pytest.mark.parametrize(
        ("heads", "kv_heads", "size", "kind", "window", "softcap"),
        [
            (8, 2, 32, "compute", None, None),
            (6, 2, 40, "fp8", None, 3.0),
            (4, 1, 16, "int8", 30, None),
            (2, 2, 16, "scaled fp8", 7, None),
        ],
    )
    def test_shared_keys_are_met_together(
        self, monkeypatch, heads, kv_heads, size, kind, window, softcap
    ) -> None:
        """As each row alone would: groups of less, as much and more than a tile, rows in none, rows cut and whole."""
        monkeypatch.setattr(shared_prefix, "LEAST_KEYS", 16)
        torch.manual_seed(size)
        block_size, dtype = 4, DTYPES[0]
        free = random.Random(3).sample(range(1, 100), 99)
        # Shared blocks and rows of each group, of which a row may have more blocks of its own.
        begins = [[free.pop() for _ in range(blocks)] for blocks in (9, 8, 0)]
        tables, positions = [], []
        for begin, owns in zip(begins, ([1, 3, 1, 2, 7, 1], [2, 1], [1, 10]), strict=True):
            for own in owns:
                tables.append(begin + [free.pop() for _ in range(own)] + [0] * 20)
                positions.append((len(begin) + own) * block_size - 1 - len(tables) % block_size)
        integers = {"dtype": torch.int32, "device": DEVICE}
        order = torch.randperm(len(tables))  # rows of groups do not lie side by side
        slots = order.to(**integers)
        where = torch.tensor(positions, **integers)[order.to(DEVICE)]
        block_tables = torch.tensor([table[:20] for table in tables], **integers)
        known = [torch.randn(position + 1, 2, kv_heads, size) for position in positions]
        cache = filled_cache(
            kind,
            dtype,
            known,
            [(position + 1, 0) for position in positions],
            tables,
            block_size,
            kv_heads,
            size,
        )
        qkv = torch.randn(len(tables), (heads + 2 * kv_heads) * size, device=DEVICE, dtype=dtype)
        plan = dataclasses.replace(
            PrefixPlan.of(cache, heads, dtype, 4), tile=PrefillPlan(16, 16, 4, 2), programs=11, result_bytes=0
        )
        groups = find_groups(
            block_tables.cpu().numpy(), slots.cpu().numpy(), (where // block_size).cpu().numpy()
        )
        assert sorted(len(group.rows) for group in groups) == [2, 6]
        parts = plan.lay_out(groups, len(tables), block_size, least=-(2**60))
        rows, members, items = (torch.tensor(part, **integers) for part in parts)
        prefixes = SharedPrefixes(rows.view(3, -1), members, items.view(-1, 4))
        sinks = torch.randn(heads, device=DEVICE) if softcap else None
        assert rows.view(3, -1)[2].max() > 1, "pieces of keys have to be put together"
        scale = torch.tensor(0.01, device=DEVICE)
        extra, form = (7, Form.FP8_STATIC) if heads % 4 else (0, Form.PLAIN)
        results = []
        for shared in (None, prefixes):
            step = AttentionInput(slots, where, block_tables, len(tables), None, prefixes=shared)
            prefix = attend_prefixes(qkv, cache, step, heads, 0.2, window, softcap, plan)
            assert (prefix is None) == (shared is None)
            plain = qkv, cache, step, heads, 0.2, window, softcap, DecodePlan(extra, 16, 16, 2), form, scale
            results.append(attend(*plain, sinks=sinks, prefix=prefix).float())
        close(results[1], results[0], 4e-2 if form else 2e-3 if ON_GPU else 1e-5)

    def test_shared_keys_are_laid_out_in_the_room_there_is(self) -> None:
        cache = KVCache(torch.zeros(2, 2, 8, 16, 128, dtype=torch.float8_e4m3fn), None)
        plan = PrefixPlan.of(cache, 32, torch.bfloat16, 132)
        assert plan.rows == 16 and plan.key_bytes == 2048
        for sizes in ([(64, 125)], [(8, 90)], [(17, 40), (16, 400), (300, 8), (5, 4000)], [(2, 3000)] * 60):
            total = sum(count for count, _ in sizes)
            starts = [sum(count for count, _ in sizes[:number]) for number in range(len(sizes))]
            groups = [
                Group(torch.arange(start, start + count).numpy(), blocks)
                for start, (count, blocks) in zip(starts, sizes, strict=True)
            ]
            parts = plan.lay_out(groups, total + 3, 16)
            rows, members, items = (torch.tensor(part) for part in parts)
            rows, items = rows.view(3, -1), items.view(-1, 4)
            assert len(items) == plan.items(total + 3) and rows.shape[1] == len(members) == total + 3
            seen: dict[int, list[tuple[int, int]]] = {}
            for number, (first, count, begin, end) in enumerate(items.tolist()):
                assert count <= plan.rows and (count == 0 or begin < end)
                for place, row in enumerate(members[first : first + count].tolist()):
                    piece = len(seen.setdefault(row, []))
                    assert number * plan.rows + place == rows[1, row] + piece * plan.rows
                    seen[row].append((begin, end))
            for group in groups:
                for row in group.rows.tolist():
                    if row not in seen:  # no room: the row is computed alone
                        assert rows[:, row].tolist() == [0, 0, 0] and len(sizes) == 60
                        continue
                    assert rows[0, row] == group.blocks * 16 and rows[2, row] == len(seen[row])
                    ends = [end for _, end in seen[row]]
                    assert [begin for begin, _ in seen[row]] == [0, *ends[:-1]] and ends[-1] == rows[0, row]
        assert plan.lay_out([Group(torch.arange(2).numpy(), 60)], 8, 16) is None, "it would cost more"

    @pytest.mark.parametrize(
        ("heads", "kv_heads", "size", "kind", "softcap", "turned", "tile", "ahead"),
        [
            (6, 2, 64, "compute", None, False, (32, 64, 4, 2), False),
            (2, 1, 64, "scaled fp8", 3.0, False, (32, 64, 4, 2), False),
            (2, 1, 64, "scaled fp8", 3.0, True, (32, 64, 4, 2), False),
            (6, 2, 64, "fp8", None, True, (32, 64, 4, 2, 168), False),
            (4, 1, 64, "int8", None, False, (32, 64, 4, 2), False),
            (8, 2, 128, "scaled fp8", None, True, (64, 64, 4, 4), True),
            (6, 2, 128, "fp8", None, True, (64, 64, 4, 4), True),
            (6, 2, 128, "fp8", None, True, (128, 64, 8, 4), True),
        ],
    )
    def test_prompts_over_gathered_keys(
        self, heads, kv_heads, size, kind, softcap, turned, tile, ahead
    ) -> None:
        """As over keys where they lie: several prompts, the first chunk of one and the last of another, a decode first;
        contexts that end at a block of keys and beside it. What nobody wrote is not a number."""
        torch.manual_seed(heads)
        if ahead and not WAITS_LATER:
            pytest.skip("a kernel for Hopper, in a language that has no interpreter")
        block_size, dtype = 16, DTYPES[1] if ON_GPU else DTYPES[0]
        lengths = [(20, 1), (64, 64), (129, 30), (47, 47)]  # context, tokens of it in this step
        if ahead:  # each number of whole tiles up to three turns of its rings, and what is beside them
            lengths += [(context, 37) for context in (63, 65, 127, 128, *range(140, 900, 61), 832)]
        most = -(-max(context for context, _ in lengths) // block_size)
        blocks = 1000 if ahead else 100
        free = random.Random(4).sample(range(1, blocks), blocks - 1)
        tables = [
            [free.pop() for _ in range(-(-context // block_size))] + [0] * most for context, _ in lengths
        ]
        tables = [table[:most] for table in tables]
        known = [torch.randn(context, 2, kv_heads, size) for context, _ in lengths]
        whole = [(context, 0) for context, _ in lengths]
        cache = filled_cache(kind, dtype, known, whole, tables, block_size, kv_heads, size, blocks)
        tile = PrefillPlan(*tile)
        each = tile.tokens(heads // kv_heads)
        slots, positions, tiles, spans, offsets, used = [], [], [], [], [0] * len(lengths), 0
        for slot, (context, count) in enumerate(lengths):
            if count > 1:
                tiles += [
                    (len(slots) + begin, min(each, count - begin), context - count + begin, slot)
                    for begin in range(0, count, each)
                ]
                spans.append((slot, context, used, 0))
                offsets[slot] = used
                used += padded(context)
            slots += [slot] * count
            positions += range(context - count, context)
        slots, positions, tables, tiles, spans, offsets = (
            torch.tensor(values, dtype=torch.int32, device=DEVICE)
            for values in (slots, positions, tables, tiles, spans, offsets)
        )
        width = (heads + 2 * kv_heads) * size
        qkv = torch.randn(len(slots), width, device=DEVICE, dtype=dtype)
        plan = GatheredPlan(tile, GatheredScratch.new(cache, dtype, used, turned), ahead)
        assert plan.keys == used and plan.scratch.turned == turned
        for part in (plan.scratch.keys, plan.scratch.values):
            part.copy_(torch.full(part.shape, torch.nan))
        sinks = torch.randn(heads, device=DEVICE) if softcap else None
        scale = torch.tensor(0.01, device=DEVICE)
        form = Form.FP8_STATIC if kind == "int8" else Form.PLAIN
        results = []
        exact = qkv.clone()
        if plan.fp8:  # prompts' queries are rounded, with a scale for each head of a token
            heads_of = exact[1:, : heads * size].view(-1, heads, size).float()
            unit = heads_of.abs().amax(-1, keepdim=True) / 448
            rounded = (heads_of / unit).to(torch.float8_e4m3fn).float() * unit
            exact[1:, : heads * size] = rounded.flatten(1).to(dtype)
        for gathers in (False, True):
            step = AttentionInput(slots, positions, tables, 1, tiles, most * block_size)
            if gathers:
                step.spans, step.offsets = spans, offsets
            decode = DecodePlan(0, 0, 32, 1)
            given = qkv if gathers else exact
            out = attend(given, cache, step, heads, 0.2, None, softcap, decode, form, scale, tile, sinks)
            if gathers:
                attend_gathered(qkv, cache, step, heads, 0.2, softcap, plan, out, form, scale, sinks)
            results.append(out.float())
        assert results[1].isfinite().all()
        close(results[1], results[0], 4e-2 if form or turned else 1e-2 if ON_GPU else 1e-5)

    def test_no_more_pieces_are_started_than_there_are_keys_for(self) -> None:
        """On a device of 132 multiprocessors, 8 key/value heads of 4 queries each, FP8."""

        def plan(rows: int, longest: int, width: int = 1) -> DecodePlan:
            return decode_plan(rows, 8, 4, 128, width, 132, longest)

        assert [plan(1, keys).extra for keys in (64, 256, 2048, 100_000)] == [0, 1, 15, 65]
        assert plan(16, 2048) == plan(16, 100_000), "they are enough for any context: one graph does"
        assert (plan(1, 2048).block, plan(1, 2048, width=2).block) == (128, 64)
        assert plan(64, 2048).extra == 0 < plan(64, 100_000).extra, "a long row is cut, whatever is beside it"
        assert plan(256, 2048).extra == 0 < plan(256, 100_000).extra
        assert plan(9, 100_000) == plan(16, 100_000), "that of the next larger graph"
        few, some, many = (plan(rows, 2048) for rows in (64, 128, 256))
        assert [(each.block, each.warps) for each in (few, some, many)] == [(128, 4), (64, 2), (32, 1)]

    def test_many_pieces_of_a_row_are_merged(self) -> None:
        """More than a program adds up at once; all but the last as long as each other."""
        torch.manual_seed(5)
        heads, kv_heads, size, block_size, dtype = 4, 2, 64, 16, DTYPES[1] if ON_GPU else DTYPES[0]
        lengths = [390, 37]
        tables = [[*range(1, 26)], [*range(26, 29), *[0] * 22]]
        known = [torch.randn(length, 2, kv_heads, size) for length in lengths]
        whole = [(length, 0) for length in lengths]
        cache = filled_cache("compute", dtype, known, whole, tables, block_size, kv_heads, size)
        integers = {"dtype": torch.int32, "device": DEVICE}
        qkv = torch.randn(2, (heads + 2 * kv_heads) * size, device=DEVICE, dtype=dtype)
        results = []
        for plan in (DecodePlan(0, 0, 16, 2), DecodePlan(40, 16, 16, 2), DecodePlan(40, 80, 16, 2)):
            positions = torch.tensor(lengths, **integers) - 1
            step = AttentionInput(
                torch.arange(2, **integers), positions, torch.tensor(tables, **integers), 2, None
            )
            results.append(attend(qkv, cache, step, heads, 0.2, None, None, plan).float())
            if plan.extra:
                each, extra, _ = Shares.of(step, plan, None).table.tolist()[:3]
                assert extra == -(-390 // each) - 1 + -(-37 // each) - 1 and (extra > 16) == (plan.keys == 16)
        for cut in results[1:]:
            close(cut, results[0], 1e-2 if ON_GPU else 1e-5)

    def test_the_longest_rows_are_cut(self) -> None:
        """Whatever else is in the batch, and never into more pieces than there are programs."""
        chance = random.Random(5)
        for lengths, extra, keys, window in (
            ([1], 4, 32, None), ([5000], 65, 64, None), ([30] * 255 + [100_000], 33, 4096, None),
            ([70, 70, 70], 8, 32, None), ([20_000, 3, 9_000, 1], 16, 64, 500),
            ([chance.randrange(1, 9000) for _ in range(77)], 33, 128, None),
        ):  # fmt: skip
            rows = len(lengths)
            integers = {"dtype": torch.int32, "device": DEVICE}
            positions, nothing = torch.tensor(lengths, **integers) - 1, torch.zeros(rows, **integers)
            step = AttentionInput(nothing, positions, nothing[:, None], rows, None)
            table = Shares.of(step, DecodePlan(extra, keys, 32, 2), window).table.tolist()
            each, count, cut = table[:3]
            assert Shares.of(step, DecodePlan(extra, keys, 32, 2), window).table.tolist()[:3] == table[:3]
            pieces = [-(-min(length, window or length) // each) for length in lengths]
            assert each >= keys and each % 32 == 0 and count == sum(pieces) - rows <= extra
            owners = [row for row, many in enumerate(pieces) for _ in range(many - 1)]
            assert table[3 : 3 + count] == owners
            assert table[3 + extra : 3 + extra + cut] == sorted(set(owners))
            firsts = table[3 + 2 * extra :]
            assert firsts == [sum(many - 1 for many in pieces[:row]) for row in range(rows)]
            if max(lengths) == 100_000:
                assert pieces[-1] == 25 and sum(pieces) == rows + 24


def coded_weight(kind: str, outputs: int, inputs: int) -> Coded:
    """Random codes of every value that ``kind`` has, with scales and offsets that all differ."""
    name, offsets, group = kind.split("-")
    groups = -(-inputs // int(group))
    scales = 0.01 + torch.rand(outputs, groups, device=DEVICE) / 50
    if name == "fp8":
        codes = (torch.randn(outputs, inputs, device=DEVICE) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        return Coded(codes, scales, int(group))
    if name == "e2m1":
        codes = torch.randint(0, 16, (outputs, inputs), dtype=torch.uint8, device=DEVICE)
        return Coded(codes, scales, int(group), bits=4, e2m1=True)
    bits = int(name.removeprefix("int"))
    codes, zeros = (
        torch.randint(0, 2**bits, (outputs, size), dtype=torch.uint8, device=DEVICE)
        for size in (inputs, groups)
    )
    minima = -torch.rand(outputs, groups, device=DEVICE) * 2 ** (bits - 6)
    order = torch.randperm(inputs, device=DEVICE) if group == "64" else None
    if group == "64":  # as wide as the scales
        minima = minima.half()
    found = {"zeros": zeros, "minima": minima, "none": None}[offsets]
    return Coded(codes, scales.half(), int(group), found, bits, order)


class TestLinears:
    """Each linear on the activations that it asks for, against the product of the unquantised operands."""

    pytestmark = kernel

    @pytest.fixture
    def operands(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = torch.randn(5, 128, device=DEVICE).to(LINEAR_DTYPE)
        return x, torch.randn(192, 128, device=DEVICE) / 11, torch.randn(192, device=DEVICE)

    def error(self, linear, x: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
        activation = quantise(x, linear.form, linear.input_scale) if linear.form else Activation(x)
        out = linear(activation).float()
        out = out.sum(0) if out.dim() == 3 else out
        close(out if linear.column_scales is None else out * linear.column_scales, expected, tolerance)

    @pytest.mark.parametrize("plan", [None, (32, 64, 2), (64, 32, 4)])
    def test_fp8(self, operands, plan: tuple | None) -> None:
        x, weight, bias = operands
        scale, input_scale = weight.abs().amax() / 448, torch.tensor(8 / 448, device=DEVICE)
        codes = (weight / scale).to(torch.float8_e4m3fn)
        rounded = (x.float() / input_scale).to(torch.float8_e4m3fn).float() * input_scale
        expected = rounded @ (codes.float() * scale).t()
        linear = Fp8Linear(codes, scale, input_scale, None, LINEAR_DTYPE)
        if plan:
            linear.plan = SkinnyPlan(*plan, 4, 2)
        # The codes of the activations are the same but for ties: what is left is the product itself.
        self.error(linear, x, expected, 1e-2)
        self.error(linear, x, x.float() @ weight.t(), 5e-2)
        if not plan:
            biased = Fp8Linear(codes, scale, input_scale, bias.to(LINEAR_DTYPE), LINEAR_DTYPE)
            self.error(biased, x, expected + bias, 1e-2)

    @pytest.mark.parametrize("plan", [None, (32, 64, 2), (64, 32, 4)])
    @pytest.mark.parametrize("static", [True, False])
    def test_fp8_by_output(self, operands, static: bool, plan: tuple | None) -> None:
        x, weight, bias = operands
        scales = weight.abs().amax(1) / 448
        codes = (weight / scales[:, None]).to(torch.float8_e4m3fn)
        input_scale = torch.tensor(8 / 448, device=DEVICE) if static else None
        linear = Fp8RowLinear(codes, scales, input_scale, None, LINEAR_DTYPE)
        if plan:
            linear.plan = SkinnyPlan(*plan, 4, 2)
        else:
            linear.bias = bias.to(LINEAR_DTYPE)
        x_scales = input_scale if static else x.float().abs().amax(1, keepdim=True) / 448
        rounded = (x.float() / x_scales).to(torch.float8_e4m3fn).float() * x_scales
        expected = rounded @ (codes.float() * scales[:, None]).t() + (0 if plan else bias)
        self.error(linear, x, expected, 1e-2)

    @pytest.mark.parametrize(
        ("rows", "kind"),
        [
            *((rows, "fp8-none-128") for rows in (5, 70, 130)),
            *((rows, "int4-zeros-128") for rows in (5, 70, 130)),
            *((3, "int4-zeros-64"), (17, "int4-minima-32"), (129, "int4-minima-64")),
            *((8, "int4-zeros-16"), (33, "int4-zeros-384"), (130, "int4-zeros-32"), (1, "int4-none-128")),
            *((3, "int8-zeros-32"), (3, "int8-minima-16"), (130, "int8-minima-16")),
            *((3, "e2m1-none-16"), (129, "e2m1-none-16"), (70, "e2m1-none-32")),
        ],
    )
    def test_in_groups(self, rows: int, kind: str) -> None:
        """Few rows, several pieces of rows, and so many that the weight is written out."""
        # bf16 is what the interpreter cannot do; fp16 goes the same way.
        dtype = torch.float16 if INTERPRETED and rows % 2 else LINEAR_DTYPE
        coded = coded_weight(kind, 256, 384)
        x = torch.randn(rows, 384, device=DEVICE).to(dtype)
        bias = torch.randn(256, device=DEVICE).to(dtype)
        made = FourBitLinear if four_bits.tile_of(coded) is not None else GroupedLinear
        linear = made(coded, bias, dtype, Scratch(dtype, DEVICE), 1)
        expected = x.float() @ coded.values(torch.float32).t() + bias.float()
        plans = linear.plans(rows)[:: 3 if INTERPRETED else 1] if rows <= FEW_ROWS else [None]
        many = linear.many_plans()
        assert any(plan.scaled for plan in many) == (made is FourBitLinear)
        for plan in plans + many[:: 3 if INTERPRETED else 1]:
            linear.choose(max(rows, FEW_ROWS), plan)
            self.error(linear, x, expected, tolerance_of(dtype))

    @pytest.mark.parametrize("kind", ["int4-zeros-128", "int4-minima-64", "int4-none-256"])
    @pytest.mark.parametrize(
        ("rows", "inputs"), [(70, 256), (130, 1024), (256, 768), (300, 2304), (257, 4096)]
    )
    def test_numbers_made_ahead(self, rows: int, inputs: int, kind: str) -> None:
        """Fewer tiles than a ring has, and several turns of it; pieces of the inputs and of the rows."""
        if not WAITS_LATER:
            pytest.skip("a kernel for Hopper, in a language that has no interpreter")
        coded, bias = coded_weight(kind, 512, inputs), torch.randn(512, device=DEVICE).to(LINEAR_DTYPE)
        x = torch.randn(rows, inputs, device=DEVICE).to(LINEAR_DTYPE)
        expected = x.float() @ coded.values(torch.float32).t() + bias.float()
        tried = set()
        for multiprocessors in (1, 10):
            linear = FourBitLinear(coded, bias, LINEAR_DTYPE, Scratch(LINEAR_DTYPE, DEVICE), multiprocessors)
            for plan in linear.many_plans():
                if plan.ahead and plan not in tried:
                    tried.add(plan)
                    linear.choose(rows, plan)
                    self.error(linear, x, expected, tolerance_of(LINEAR_DTYPE))
        assert len({(plan.block_n, plan.rows) for plan in tried}) == 2 and len(tried) > 2

    def test_what_no_interpreter_runs_is_compared_at_load(self, monkeypatch) -> None:
        """A plan whose results differ, or whose language is another release's, is not used, and that is said."""
        config = EngineConfig(model_dir="none", kernels="cuda", device=DEVICE.type)
        kernels = cuda.CudaKernels(config, DEVICE, LINEAR_DTYPE)
        coded = coded_weight("int4-zeros-128", 256, 256)
        linear = FourBitLinear(coded, None, LINEAR_DTYPE, Scratch(LINEAR_DTYPE, DEVICE), 1)
        usual = linear.many_plans()[0]
        plan = dataclasses.replace(usual, ahead=True)
        done: list = [None]

        def product(x: torch.Tensor, out: torch.Tensor, chosen: object, at_once: int) -> None:
            if isinstance(done[0], Exception):
                raise done[0]
            whole = x.float() @ coded.values(torch.float32).t() * (done[0] or 1.0)
            out.copy_(torch.nn.functional.pad(whole, (0, 0, 0, out.shape[-2] - len(x))))

        monkeypatch.setattr(linear, "product", product)
        assert kernels._agrees(linear, 100, plan) and not kernels._tuning
        done[0] = 0.8
        assert not kernels._agrees(linear, 100, plan) and "results differ by 0.25" in kernels._tuning
        done[0] = AttributeError("no such name")
        assert not kernels._agrees(linear, 100, plan)
        assert "is not used: AttributeError with this release of Triton" in kernels._tuning
        assert kernels._agrees(linear, 100, usual), "the others are tested beforehand"

    @pytest.mark.parametrize("kind", ["int4-zeros-128", "e2m1-none-32", "fp8-none-128"])
    def test_sums_are_the_same_each_time(self, kind: str) -> None:
        """Of a full device, whose tensor cores read their operands late (``launch.settled``)."""
        if not ON_GPU:
            pytest.skip("only what runs side by side can come in each other's way")
        coded = coded_weight(kind, 4096, 4096)
        if coded.e2m1:
            coded = dataclasses.replace(coded, scales=coded.scales.bfloat16())
        made = FourBitLinear if four_bits.tile_of(coded) is not None else GroupedLinear
        linear = made(coded, None, LINEAR_DTYPE, Scratch(LINEAR_DTYPE, DEVICE), 132)
        x = torch.randn(256, 4096, device=DEVICE).to(LINEAR_DTYPE)
        expected = x.float() @ coded.values(torch.float32).t()
        for plan in (*linear.plans(64), *linear.many_plans()):
            linear.choose(256, plan)
            self.error(linear, x, expected, tolerance_of(LINEAR_DTYPE))
            first = linear(Activation(x))
            assert all(bool((linear(Activation(x)) == first).all()) for _ in range(50)), plan

    def test_groups_are_tuned_by_rows(self, monkeypatch) -> None:
        """For few rows and for more the plan that was fastest there; the library from where that was."""
        config = EngineConfig(model_dir="none", kernels="cuda", device=DEVICE.type)
        kernels = cuda.CudaKernels(config, DEVICE, LINEAR_DTYPE)
        linear = FourBitLinear(
            coded_weight("int4-zeros-128", 256, 256), None, LINEAR_DTYPE, Scratch(LINEAR_DTYPE, DEVICE), 1
        )
        fastest = {rows: linear.plans(rows)[-1] for rows in (8, 32)}
        assert fastest[8] != fastest[32] != linear.plans(64)[0]
        fastest[64] = fastest[128] = linear.plans(64)[0]

        def time_all(linears: list, x: Activation, plan: object) -> float:
            if plan is None:
                return 1.0 if len(x.values) == 256 else 9.0
            return 2.0 if plan == fastest.get(len(x.values)) else 3.0

        monkeypatch.setattr(cuda, "time_all", time_all)
        kernels.tune([SimpleNamespace(qkv=linear, out=linear, mlp=None)])
        for rows, found in ((1, 8), (8, 8), (9, 32), (32, 32), (33, 64), (64, 64), (65, 128), (128, 128)):
            assert linear.plan_of(rows) == fastest[found]
        assert linear.plan_of(129) is None and linear.plan_of(5000) is None
        assert "qkv of 256 " in kernels._tuning

    def test_int8(self, operands) -> None:
        x, weight, bias = operands
        linear = Int8Linear(weight.to(LINEAR_DTYPE), bias.to(LINEAR_DTYPE), LINEAR_DTYPE)
        self.error(linear, x, x.float() @ weight.t() + bias, 2e-2)

    def test_fp8_head(self, operands) -> None:
        x, weight, _ = operands
        self.error(Fp8Head(weight.to(LINEAR_DTYPE), LINEAR_DTYPE), x, x.float() @ weight.t(), 5e-2)


class TestEngine:
    """The whole engine on these kernels, steps overlapped, against the engine on the PyTorch kernels."""

    pytestmark = kernel
    requests: ClassVar = (
        [([5, 6, 7], 4), ([9] * 33, 2), ([11, 12], 1), (list(range(20, 38)), 4)]
        if INTERPRETED  # a second a step
        else [([5, 6, 7], 6), ([9] * 40, 3), ([11, 12], 1), (list(range(20, 38)), 7)]
    )

    def tokens(self, engine, **fields) -> list[list[int]]:
        requests = [GenerationRequest(prompt, count, end_id=-1, **fields) for prompt, count in self.requests]
        return [output.token_ids for output in engine.generate(requests)]

    @pytest.mark.parametrize("family", ["gemma2", "qwen3"])
    def test_greedy_tokens_equal(self, tmp_path, make_engine, family: str) -> None:
        """Ragged batch, prompts longer than the token budget; then the same prompts from the prefix cache."""
        folder = tiny_checkpoint(tmp_path / family, family, num_hidden_layers=1 if INTERPRETED else 2)
        expected = self.tokens(make_engine(folder))
        engine = make_engine(folder, kernels="cuda", device=DEVICE.type)
        assert engine.runner.lags
        assert self.tokens(engine) == expected
        assert self.tokens(engine) == expected
        assert engine.stats.kv_blocks_reused > 0
        engine.audit()
        assert engine.stats.kv_blocks_free == engine.stats.kv_blocks_max

    def test_ends_found_a_step_late_change_nothing(self, tmp_path, make_engine) -> None:
        """An end id, and a neighbour whose penalties the host applies, so that lag is switched off and on."""
        folder = tiny_checkpoint(tmp_path / "llama", num_hidden_layers=1)
        plain = make_engine(folder)
        end = self.tokens(plain)[0][2]
        requests = [GenerationRequest(prompt, count, end_id=end) for prompt, count in self.requests]
        requests.append(GenerationRequest([5, 6], 3, SamplingParams(repetition_penalty=1.5), end_id=-1))
        expected = [output.token_ids for output in plain.generate(requests)]
        engine = make_engine(folder, kernels="cuda", device=DEVICE.type)
        assert [output.token_ids for output in engine.generate(requests)] == expected
        engine.audit()
        assert engine.stats.kv_blocks_free == engine.stats.kv_blocks_max

    def test_least_lengths_are_kept_on_the_device(self, tmp_path, make_engine, monkeypatch) -> None:
        shape = {"family": "llama", "num_hidden_layers": 1}
        end = self.tokens(make_engine(tiny_checkpoint(tmp_path / "first", **shape)))[0][1]
        folder = tiny_checkpoint(tmp_path / "second", **shape, eos_token_id=end)
        plain = make_engine(folder)
        assert len(plain.generate([GenerationRequest([5, 6, 7], 6)])[0].token_ids) == 1
        requests = [GenerationRequest([5, 6, 7], 4, min_tokens=least) for least in (3, 4)]
        expected = [output.token_ids for output in plain.generate(requests)]
        assert len(expected[0]) >= 3 and len(expected[1]) == 4
        engine = make_engine(folder, kernels="cuda", device=DEVICE.type)
        monkeypatch.setattr(engine.runner, "_choose", lambda *computed: pytest.fail("another launch"))
        assert [output.token_ids for output in engine.generate(requests)] == expected

    def test_the_accuracy_gate_sees_the_engines_logits(self, tmp_path) -> None:
        folder = tiny_checkpoint(tmp_path / "llama", num_hidden_layers=1)
        config = EngineConfig(str(folder), num_kv_blocks=16, max_seq_len=128, device=DEVICE.type)
        for name, fields in (
            ("plain", {"kernels": "pytorch", "device": "cpu"}),
            ("ours", {"kernels": "cuda", "weight_precision": "int8"}),
        ):
            (tmp_path / name).mkdir()
            dataclasses.replace(config, **fields).save(tmp_path / name)
        ids = torch.arange(5, 30, device=DEVICE)[None]
        plain, ours = (EngineModel(tmp_path / name, 64) for name in ("plain", "ours"))
        expected = plain(ids.cpu(), logits_to_keep=3).logits
        whole = ours(ids, logits_to_keep=3).logits.cpu()
        close(whole, expected, 0.1)
        close(ours.decode(ids[0], 22).cpu(), whole[0], 1e-2)

    def test_preemption_with_a_token_in_flight_changes_nothing(self, tmp_path, make_engine) -> None:
        folder = tiny_checkpoint(tmp_path / "llama", num_hidden_layers=1)
        requests = [GenerationRequest(list(range(3, 3 + n)), 10, end_id=-1) for n in (12, 13)]
        expected = [output.token_ids for output in make_engine(folder).generate(requests)]
        tight = {"num_kv_blocks": 8, "max_seq_len": 32, "batch_scheduler_policy": "max_utilization"}
        engine = make_engine(folder, kernels="cuda", device=DEVICE.type, max_batch_size=2, **tight)
        assert [output.token_ids for output in engine.generate(requests)] == expected
        assert engine.scheduler.num_preemptions > 0
        engine.audit()
        assert engine.stats.kv_blocks_free == engine.stats.kv_blocks_max

    def test_layers_with_windows_have_tables_of_their_own(self, tmp_path, make_engine, monkeypatch) -> None:
        """Blocks behind the window are given back: nobody reads what is there then."""
        for size in (64, 128, 256):
            plans = long_prefill_plans(torch.bfloat16, size) + usual_prefill_plans(torch.bfloat16, size)
            assert all(CudaKernels.stride % plan.block == 0 for plan in plans)
        monkeypatch.setattr(CudaKernels, "stride", 32)  # of float32's plans
        kinds = ["sliding_attention", "full_attention"]
        shape = {"num_hidden_layers": 2, "sliding_window": 8, "layer_types": kinds}
        folder = tiny_checkpoint(tmp_path / "gemma3", "gemma3", **shape)
        requests = [GenerationRequest(list(range(3, 3 + n)), 3, end_id=-1) for n in (48, 5)]
        expected = [output.token_ids for output in make_engine(folder).generate(requests)]
        settings = {"kernels": "cuda", "device": DEVICE.type, "max_num_tokens": 32}
        engine = make_engine(folder, num_kv_blocks=36, **settings)
        assert engine.blocks.windows == (None, 8)
        runner, launch, broken = engine.runner, engine.runner.launch, engine.blocks.allocate(2)
        with torch.inference_mode():
            runner.caches[0].values[broken[1]] = torch.nan

        @torch.inference_mode()
        def launch_over_broken_blocks(*step):
            for sequence, slot in runner._slots.items():
                for group, left in enumerate(sequence.num_left):
                    runner.tables[slot, group, :left] = broken[1]
            return launch(*step)

        monkeypatch.setattr(runner, "launch", launch_over_broken_blocks)
        for _ in range(2):
            assert [output.token_ids for output in engine.generate(requests)] == expected
        engine.blocks.free(broken)
        engine.audit()
        assert engine.stats.kv_blocks_reused > 0
        assert engine.stats.kv_blocks_free == engine.stats.kv_blocks_max

    def test_blocks_come_back_from_host_memory(self, tmp_path, make_engine) -> None:
        folder = tiny_checkpoint(tmp_path / "llama", num_hidden_layers=1)
        requests = [GenerationRequest([seed] * 12, 3, end_id=-1) for seed in (5, 6, 5)]
        settings = {"num_kv_blocks": 5, "max_seq_len": 16, "num_host_kv_blocks": 20, "kv_dtype": "int8"}
        engine = make_engine(folder, kernels="cuda", device=DEVICE.type, **settings)
        plain = make_engine(folder, kernels="cuda", device=DEVICE.type, kv_dtype="int8")
        expected = [plain.generate([request])[0].token_ids for request in requests]
        assert [engine.generate([request])[0].token_ids for request in requests] == expected
        assert engine.stats.host_kv_hits == 1 and engine.stats.host_kv_bytes_restored > 0
        engine.audit()

    def test_no_buffer_of_a_step_grows_with_the_longest_sequence(self, tmp_path, make_engine) -> None:
        folder = tiny_checkpoint(tmp_path / "llama", num_hidden_layers=1)
        settings = {"kernels": "cuda", "device": DEVICE.type, "block_size": 16}
        short = make_engine(folder, max_seq_len=128, num_kv_blocks=16, **settings)
        long = make_engine(folder, max_seq_len=131_072, num_kv_blocks=8192, **settings)
        assert long.runner.inputs.numel() == short.runner.inputs.numel()
        assert long.runner.tables.numel() == 17 * 8192, "but for the block tables"
        requests = [GenerationRequest([9, 4] * 20, 3, end_id=-1)]
        assert long.generate(requests)[0].token_ids == short.generate(requests)[0].token_ids

    def test_more_new_table_entries_than_travel_with_a_step(self, tmp_path, make_engine, monkeypatch) -> None:
        monkeypatch.setattr(cuda_runner, "MOST_UPDATES", 3)
        folder = tiny_checkpoint(tmp_path / "llama", num_hidden_layers=1)
        requests = [GenerationRequest([9, 4] * 20, 2, end_id=-1)]
        expected = [output.token_ids for output in make_engine(folder).generate(requests)]
        engine = make_engine(folder, kernels="cuda", device=DEVICE.type)
        for _ in range(2):
            assert [output.token_ids for output in engine.generate(requests)] == expected

    def test_padding_to_captured_sizes_changes_nothing(self, tmp_path, make_engine, monkeypatch) -> None:
        """Every step replays; without a GPU the passes that a graph would hold run as they are."""
        folder = tiny_checkpoint(tmp_path / "llama", num_hidden_layers=1)
        requests = [GenerationRequest(prompt, 2, end_id=-1) for prompt in ([5, 6, 7], [9] * 12)]
        expected = [output.token_ids for output in make_engine(folder).generate(requests)]
        engine = make_engine(folder, kernels="cuda", device=DEVICE.type)
        with torch.inference_mode():
            engine.runner.capture([4], [MixedShape.of(rows, engine.runner.tile) for rows in (10, 18)])
        monkeypatch.setattr(engine.runner, "_loose", None)
        assert [output.token_ids for output in engine.generate(requests)] == expected

    def test_decodes_beside_prompts_have_rows_of_their_own(self, tmp_path, make_engine, monkeypatch) -> None:
        """Many have a step's own attention for them, beside that of the prompts; few are tiles as the prompts are."""
        folder = tiny_checkpoint(tmp_path / "llama", num_hidden_layers=1 if INTERPRETED else 2)
        prompts = ([7 + (17 * at + 29 * length) % 90 for at in range(length)] for length in (3, 12, 18, 1, 7))
        requests = [GenerationRequest(prompt, 7, end_id=-1) for prompt in prompts]
        settings = {"max_num_tokens": 12, "max_batch_size": 8, "enable_kv_cache_reuse": False}
        expected = [output.token_ids for output in make_engine(folder, **settings).generate(requests)]
        engine = make_engine(folder, kernels="cuda", device=DEVICE.type, **settings)
        runner = engine.runner
        shapes = [
            MixedShape.of(12, runner.tile),
            *(MixedShape.beside(*at, runner.tile) for at in ((2, 12), (5, 12))),
            MixedShape.beside(8, 12, runner.tile, long=True),
        ]
        shapes = [
            dataclasses.replace(shape, samples=shape.samples + 3, tiles=shape.tiles + 3) for shape in shapes
        ]
        with torch.inference_mode():
            runner.capture([8], shapes)
        monkeypatch.setattr(runner, "_loose", None)
        carry_out, used = runner._carry_out, []

        def watched(order, staging):
            if isinstance(order.graph, MixedShape):
                used.append(order.graph.decodes)
            return carry_out(order, staging)

        monkeypatch.setattr(runner, "_carry_out", watched)
        # As few are tiles; as long are contexts without splits; decodes that the steps have room for by themselves.
        for few, long, kinds in ((0, 2048, {0, 2, 5}), (2, 2048, {0, 5}), (16, 8, {0, 8})):
            monkeypatch.setattr(cuda_runner, "FEW_DECODES", few)
            monkeypatch.setattr(cuda_runner, "MIXED_DECODE", long)
            used.clear()
            assert [output.token_ids for output in engine.generate(requests)] == expected
            assert set(used) == kinds
        engine.audit()

    def test_which_steps_with_prompts_are_captured(self, tmp_path, make_engine) -> None:
        engine = make_engine(tiny_checkpoint(tmp_path / "llama"), kernels="cuda", device=DEVICE.type)
        shapes = {slots: engine.runner._mixed_shapes(slots, 32) for slots in (0, 16, 17, 64, 100, 512)}
        decodes = {slots: {shape.decodes for shape in each} for slots, each in shapes.items()}
        assert decodes[0] == decodes[16] == {0}, "so many are tiles anyway, or there is no memory"
        assert decodes[17] == {0, 32} and decodes[64] == {0, 32, 64} and decodes[100] == {0, 32, 64, 128}
        assert decodes[512] == {0, 32, 64, 128, 192, 256}
        assert all(shape.samples <= len(engine.runner.tokens) for shape in shapes[512])
        assert {shape.decodes for shape in shapes[512] if shape.long} == {32, 64, 128, 192, 256}
        assert engine.runner._any_rank(True) and not engine.runner._any_rank(False)

    def test_short_contexts_have_a_pass_of_their_own(self, tmp_path, make_engine, monkeypatch) -> None:
        """Until the longest row of a step sees more keys than that pass is for."""
        folder = tiny_checkpoint(tmp_path / "llama", num_hidden_layers=1, max_position_embeddings=4096)
        requests = [GenerationRequest(prompt, 7, end_id=-1) for prompt in ([5, 6, 7], [9] * 12)]
        settings = {"max_seq_len": 4096, "num_kv_blocks": 1100, "cuda_graphs": False}
        expected = [output.token_ids for output in make_engine(folder, **settings).generate(requests)]
        engine = make_engine(folder, kernels="cuda", device=DEVICE.type, **settings)
        runner, passes = engine.runner, []
        engine.kernels.multiprocessors = 2  # of which four rows are plenty
        monkeypatch.setattr(cuda_runner, "SHORT", 16)
        with torch.inference_mode():
            runner.capture([4], [])
        for name in ("graphs", "short"):
            real = getattr(runner, name)[4].replay
            monkeypatch.setattr(
                getattr(runner, name)[4], "replay", lambda name=name, real=real: passes.append(name) or real()
            )
        assert [output.token_ids for output in engine.generate(requests)] == expected
        assert passes == ["short"] * 4 + ["graphs"] * 2
        monkeypatch.setattr(cuda_runner, "SHORT", 2048)
        assert [runner._differs_if_short(rows) for rows in (1, 4)] == [False, True], "of few rows all are cut"

    def test_shared_prefixes_change_nothing(self, tmp_path, make_engine, monkeypatch) -> None:
        """Greedy tokens of requests with a beginning in common, which come and go, with graphs' shapes and without."""
        folder = tiny_checkpoint(tmp_path / "llama", num_hidden_layers=1)
        begin = [5 + at % 90 for at in range(40)]
        requests = [GenerationRequest([*begin, 7 + n, 9], 2 + n % 3, end_id=-1) for n in range(5)]
        requests.append(GenerationRequest([4] * 9, 4, end_id=-1))
        first, *others = requests
        settings = {"max_num_tokens": 64, "num_kv_blocks": 96}

        def tokens(engine) -> list[list[int]]:
            return [output.token_ids for some in ([first], others) for output in engine.generate(some)]

        expected = tokens(make_engine(folder, **settings))
        engine = make_engine(folder, kernels="cuda", device=DEVICE.type, **settings)
        runner, kernels = engine.runner, engine.kernels
        plan = dataclasses.replace(kernels.prefix_plan(runner.model.spec, runner.caches[0]), result_bytes=0)
        kernels.prefix = dataclasses.replace(plan, tile=PrefillPlan(32, 16, 4, 1))
        monkeypatch.setattr(PrefixPlan.lay_out, "__defaults__", (0,))
        with torch.inference_mode():
            runner.capture([4, 8], [])
        replayed, carry_out = [], runner._carry_out

        def watched(order, staging):
            replayed.append(type(order.graph).__name__)
            return carry_out(order, staging)

        monkeypatch.setattr(runner, "_carry_out", watched)
        assert tokens(engine) == expected
        assert replayed.count("SharedShape") >= 2 and "int" in replayed
        engine.audit()

    def test_gathered_keys_change_nothing(self, tmp_path, make_engine, monkeypatch) -> None:
        """Greedy tokens of prompts of several steps beside others', as far as the scratch memory holds them."""
        folder = tiny_checkpoint(tmp_path / "llama", num_hidden_layers=1, head_dim=64)
        requests = [
            GenerationRequest([5 + at % 90 for at in range(length)], 2, end_id=-1) for length in (61, 40, 3)
        ]
        settings = {
            "max_num_tokens": 32,
            "block_size": 16,
            "enable_kv_cache_reuse": False,
            "cuda_graphs": False,
        }
        expected = [output.token_ids for output in make_engine(folder, **settings).generate(requests)]
        engine = make_engine(folder, kernels="cuda", device=DEVICE.type, **settings)
        runner, kernels = engine.runner, engine.kernels
        scratch = GatheredScratch.new(runner.caches[0], kernels.dtype, 200)
        kernels.gathered = GatheredPlan(PrefillPlan(32, 32, 4, 2), scratch)
        kernels.gathered_long = GatheredPlan(PrefillPlan(64, 32, 4, 2), scratch)  # from 50 keys on
        monkeypatch.setattr(cuda, "LONG_GATHERED", 50)
        monkeypatch.setattr(cuda_runner, "LONG_GATHERED", 50)
        monkeypatch.setattr(cuda_runner, "LONG", 8)
        monkeypatch.setattr(cuda_runner, "LEAST_TOKENS", 8)
        gathered, carry_out = [], runner._carry_out
        rows, attend = set(), cuda.attend_gathered
        monkeypatch.setattr(
            cuda, "attend_gathered", lambda *args: (rows.add(args[6].tile.rows), attend(*args))
        )

        def watched(order, staging):
            if order.graph is None:
                gathered.append(order.gathered)
            return carry_out(order, staging)

        monkeypatch.setattr(runner, "_carry_out", watched)
        assert [output.token_ids for output in engine.generate(requests)] == expected
        assert gathered.count(True) >= 2 and rows == {32, 64}
        engine.audit()
        gathered.clear()
        rows.clear()
        with torch.inference_mode():
            runner._warm_up(8)
            assert gathered == [False, True, True] and rows == {32, 64}
            runner.capture([4], [MixedShape.of(32, runner.tile)])
        # A step that a graph could run goes without it where that saves enough.
        for pairs, keys, gathers in ((10**9, 10**9, False), (1, 10**9, True), (10**9, 50, True)):
            monkeypatch.setattr(cuda_runner, "LEAST_PAIRS", pairs)
            monkeypatch.setattr(cuda_runner, "LONGEST_BESIDE", keys)
            gathered.clear()
            assert [output.token_ids for output in engine.generate(requests)] == expected
            assert any(gathered) == gathers

    def test_every_product_is_loaded_before_requests_come(self, tmp_path, make_engine, monkeypatch) -> None:
        """Each kind of linear of a layer, and the head, with every number of rows that stands for others."""
        engine = make_engine(tiny_checkpoint(tmp_path / "llama"), kernels="cuda", device=DEVICE.type)
        kernels, model = engine.kernels, engine.model
        layer, rows = model.layers[0], defaultdict(list)
        watched = {id(each): name for name, each in (("qkv", layer.qkv), ("down", layer.mlp.down))}
        watched[id(model.lm_head)] = "head"
        for kind in {type(layer.qkv), type(layer.mlp.down), type(model.lm_head)}:
            real = kind.__call__

            def call(self, x, real=real):
                rows[watched.get(id(self))].append(len(x.values))
                return real(self, x)

            monkeypatch.setattr(kind, "__call__", call)
        with torch.inference_mode():
            kernels.load_products(model.layers, model.lm_head, 20, 3)
        assert rows["qkv"] == rows["down"] == [*range(1, 21)] and rows["head"] == [1, 2, 3]
        sorts = cuda._sorts(8192)
        assert sorts[:513] == [*range(1, 513), 516] and sorts[-1] == 8192
        assert all(after - before <= 16 for before, after in itertools.pairwise(sorts))

    def test_guesses_change_nothing(self, parrot, make_engine, monkeypatch) -> None:
        """Steps with guesses replay graphs of decodes; the host waits before and after them, and else stays ahead."""
        requests = [GenerationRequest([8, 7, 8, 7, 8, 7], 10, end_id=-1)]
        settings = {"block_size": 16, "num_kv_blocks": 16}
        expected = [output.token_ids for output in make_engine(parrot, **settings).generate(requests)]
        engine = make_engine(parrot, kernels="cuda", device=DEVICE.type, speculation_tokens=3, **settings)
        with torch.inference_mode():
            engine.runner.capture([4], [])
        monkeypatch.setattr(engine.runner, "_decode", None)
        launched, launch = [], engine.runner.launch

        def watched(chunks, sampling):
            launched.append((any(chunk.guesses for chunk in chunks), engine._flight is not None))
            return launch(chunks, sampling)

        monkeypatch.setattr(engine.runner, "launch", watched)
        assert [output.token_ids for output in engine.generate(requests)] == expected
        assert engine.stats.accepted_tokens > 1
        guessed, ahead = zip(*launched, strict=True)
        assert sum(ahead) >= 2, "plain steps are launched before the tokens of the one before are known"
        assert not any(
            ahead[number] for number, guesses in enumerate(guessed) if guesses or guessed[number - 1]
        )
        engine.audit()

    def test_grammars_decide_while_the_next_pass_runs(self, tmp_path, make_engine, monkeypatch) -> None:
        """Beside plain, drawn and told rows; the host launches a pass before it knows the tokens before it, and makes
        the masks after."""
        folder = tiny_checkpoint(tmp_path / "llama", num_hidden_layers=1)
        guide, drawn = Guide("regex", "[a-c]{2,3}z"), SamplingParams(1.0, top_p=1.0, seed=3)
        requests = [
            GenerationRequest([5, 6, 7], 8, guide=guide),
            GenerationRequest([9] * 12, 5, end_id=-1),
            GenerationRequest([5, 6, 8], 8, drawn, guide=guide, min_tokens=4, top_log_probs=2),
            GenerationRequest([5, 6, 9], 5, dataclasses.replace(drawn, repetition_penalty=1.3), end_id=-1),
        ]

        def told(engine) -> list[tuple]:
            return [
                (output.token_ids, output.text, output.finish_reason) for output in engine.generate(requests)
            ]

        expected = told(make_engine(folder))
        engine = make_engine(folder, kernels="cuda", device=DEVICE.type)
        engine.guided.grammars.compile(guide)  # so that all four begin together
        order: list[str] = []
        watched = {
            "launch": engine.runner,
            "finish": engine.runner,
            "_fetch": engine,
            "prepare": engine.runner,
            "allow": engine.runner.sampling,
        }
        for name, owner in watched.items():
            real = getattr(owner, name)

            def noted(*arguments, name=name, real=real):
                if name != "_fetch" or engine._flight is not None:
                    order.append(name)
                return real(*arguments)

            monkeypatch.setattr(owner, name, noted)
        assert told(engine) == expected
        assert all(re.fullmatch(guide.text, text) for _, text, _ in expected[::2])
        # Masks are begun before the fetched tokens' texts are made: the second "prepare" finds them under way.
        steady = ["finish", "prepare", "allow", "launch", "_fetch", "prepare"]
        assert sum(order[at : at + 6] == steady for at in range(len(order))) >= 2
        assert order.count("allow") < order.count("launch"), "steps of plain rows alone need no masks"
        engine.audit()

    def test_a_choice_that_waits_for_masks_is_queued_when_nobody_is_left(self, tmp_path, make_engine) -> None:
        """Other ranks, and the device, have been told of its step."""
        engine = make_engine(
            tiny_checkpoint(tmp_path / "llama", num_hidden_layers=1), kernels="cuda", device=DEVICE.type
        )
        guide = Guide("regex", "[a-c]{20}z")
        engine.guided.grammars.compile(guide)
        engine.add("first", GenerationRequest([5, 6, 7], 8, guide=guide))
        engine.step()
        engine.step()
        assert engine.runner._unfinished is not None
        engine.cancel("first")
        assert engine.runner._unfinished is None
        (output,) = engine.generate([GenerationRequest([5, 6, 7], 8, guide=guide)])
        assert re.fullmatch("[a-c]{8}", output.text)
        engine.audit()

    def test_a_choice_that_fails_fails_its_requests_only(self, tmp_path, make_engine, monkeypatch) -> None:
        """The step that was planned meanwhile is planned again, without them."""
        engine = make_engine(
            tiny_checkpoint(tmp_path / "llama", num_hidden_layers=1), kernels="cuda", device=DEVICE.type
        )
        guide = Guide("regex", "[a-c]{20}z")
        engine.guided.grammars.compile(guide)
        request = GenerationRequest([5, 6, 7], 8, guide=guide)
        (expected,) = engine.generate([request])
        engine.add("first", request)
        engine.step()
        engine.step()
        engine.add("second", request)  # planned with what fails

        def fails(slots):
            raise RuntimeError("no room")

        with monkeypatch.context() as patched:
            patched.setattr(engine.runner.sampling, "allow", fails)
            outputs = dict(engine.step())
        assert outputs["first"].error is not None and "no room" in outputs["first"].error.message
        assert list(engine.sequences) == ["second"] and engine.failed_steps == 1
        tokens: list[int] = []
        while engine.busy:
            for key, output in engine.step():
                assert key == "second" and output.error is None
                tokens += output.token_ids
        assert tokens == list(expected.token_ids) and engine.failed_steps == 0
        engine.audit()

    def test_cancelling_in_flight(self, tmp_path, make_engine) -> None:
        folder = tiny_checkpoint(tmp_path / "llama", num_hidden_layers=1)
        engine = make_engine(folder, kernels="cuda", device=DEVICE.type)
        engine.add("gone", GenerationRequest([5, 6, 7], 6, end_id=-1))
        engine.add("stays", GenerationRequest([9, 8], 3, end_id=-1))
        engine.step()
        engine.step()
        assert engine.cancel("gone").finish_reason is FinishReason.CANCELLED
        outputs = [output for _ in range(6) for output in engine.step()]
        assert {key for key, _ in outputs} == {"stays"} and not engine.busy
        engine.audit()


@pytest.mark.skipif(ON_GPU, reason="there the clock decides")
class TestTuning:
    """What is timed at load: here times are told, and the results are computed."""

    pytestmark = kernel

    @pytest.fixture
    def engine(self, tmp_path, make_engine, monkeypatch):
        monkeypatch.setattr(attention, "LONG", 64)
        monkeypatch.setattr(PrefixPlan.lay_out, "__defaults__", (0,))
        monkeypatch.setattr(
            cuda, "gathered_plans", lambda dtype, size: [PrefillPlan(32, 64, 4, 2), PrefillPlan(64, 64, 4, 2)]
        )
        shape = {"num_hidden_layers": 1, "head_dim": 64, "num_key_value_heads": 1}
        settings = {"block_size": 16, "max_seq_len": 400, "device": DEVICE.type, "kernels": "cuda"}
        return make_engine(tiny_checkpoint(tmp_path / "llama", **shape), **settings)

    def tune(self, engine, monkeypatch, *seconds: float) -> str:
        """With these times of one candidate after the other; what the engine says of itself."""
        told = iter(seconds)
        monkeypatch.setattr(timing, "device_seconds", lambda run, repeats=5: next(told))
        kernels, spec, cache = engine.kernels, engine.model.spec, engine.runner.caches[0]
        with torch.inference_mode():
            kernels.tune_prefill(spec, cache, 80, 20)
            kernels.tune_prefixes(spec, cache, 8, 400)
        assert next(told, None) is None and not cache.values.any(), "the cache is empty again"
        return kernels.describe(spec)

    def test_the_faster_way_is_taken(self, engine, monkeypatch) -> None:
        said = self.tune(engine, monkeypatch, 10e-6, 9e-6, 8e-6, 50e-6, 30e-6)
        kernels = engine.kernels
        assert kernels.long_prefill is None and kernels.gathered.tile == PrefillPlan(64, 64, 4, 2)
        assert kernels.gathered.keys == padded(80 + 2 * 20) and kernels.prefix is not None
        assert "over gathered keys: 10 -> 8 us" in said and "shared prefixes: 50 -> 30 us" in said

    def test_very_long_prompts_have_a_plan_of_their_own(self, engine, monkeypatch) -> None:
        monkeypatch.setattr(cuda, "LONG_GATHERED", 64)
        said = self.tune(engine, monkeypatch, 10e-6, 9e-6, 8e-6, 11e-6, 13e-6, 50e-6, 30e-6)
        kernels = engine.kernels
        assert [kernels.gathered_plan(keys).tile.rows for keys in (63, 64)] == [64, 32]
        assert "from 64 on: 13 -> 11 us" in said

    def test_shared_prefixes_take_the_fastest_plan(self, engine, monkeypatch) -> None:
        usual = engine.kernels.prefix_plan(engine.model.spec, engine.runner.caches[0])
        ahead = dataclasses.replace(usual, tile=dataclasses.replace(usual.tile, block=16, stages=2))
        monkeypatch.setattr(PrefixPlan, "others", lambda plan, dtype, size: [ahead])
        said = self.tune(engine, monkeypatch, 10e-6, 9e-6, 8e-6, 50e-6, 30e-6, 51e-6, 20e-6)
        assert engine.kernels.prefix == ahead and f"shared prefixes: 50 -> 20 us with {ahead.tile}" in said
        assert len(engine.kernels.tuned["shared prefixes"]) == 3

    def test_prompts_that_are_not_long_take_the_fastest_plan(self, engine, monkeypatch) -> None:
        usual, ahead = prefill_plan(torch.float32, 64, 0), PrefillPlan(32, 64, 4, 2)
        monkeypatch.setattr(attention, "usual_prefill_plans", lambda dtype, size: [usual, ahead])
        monkeypatch.setattr(attention, "SHORT", 40)
        told = iter((10e-6, 7e-6))
        monkeypatch.setattr(timing, "device_seconds", lambda run, repeats=5: next(told))
        kernels, spec = engine.kernels, engine.model.spec
        with torch.inference_mode():
            kernels.tune_usual_prefill(spec, engine.runner.caches[0], 400)
        assert kernels.usual_prefill == ahead and "prompts: 10 -> 7 us with 32 x 64" in kernels.describe(spec)
        taken = {}

        def attend(qkv, cache, where, *arguments):
            if where.tiles is not None:
                taken[where.longest] = arguments[7]
            return real(qkv, cache, where, *arguments)

        real = attention.attend
        monkeypatch.setattr(attention, "attend", attend)
        for length in (70, 9):
            engine.generate([GenerationRequest(list(range(3, 3 + length)), 1, end_id=-1)])
        assert {70, 9} <= taken.keys()
        assert taken == {longest: ahead if longest > 40 else None for longest in taken}

    def test_what_gains_little_is_not(self, engine, monkeypatch) -> None:
        said = self.tune(engine, monkeypatch, 10e-6, 9.8e-6, 9.9e-6, 50e-6, 49e-6)
        assert engine.kernels.gathered is None and engine.kernels.prefix is None
        assert "gathered" not in said and "shared" not in said

    def test_what_gives_other_results_is_not(self, engine, monkeypatch) -> None:
        real = timing.attend_gathered, timing.attend_prefixes

        def wrong_prompts(*arguments) -> None:
            real[0](*arguments)
            arguments[7].mul_(1.1)

        def wrong_prefixes(*arguments):
            prefix = real[1](*arguments)
            if prefix is not None:
                prefix.values.fill_(torch.nan)
            return prefix

        monkeypatch.setattr(timing, "attend_gathered", wrong_prompts)
        monkeypatch.setattr(timing, "attend_prefixes", wrong_prefixes)
        said = self.tune(engine, monkeypatch, 10e-6, 5e-6, 5e-6, 50e-6, 5e-6)
        assert engine.kernels.gathered is None and engine.kernels.prefix is None
        assert said.count("over gathered keys is not used: results differ by") == 2
        assert "over shared prefixes is not used: results differ by nan" in said


def reference(qkv, step, known, lengths, rope, q_norm, k_norm, heads, kv_heads, window, softcap, sinks):
    """Outputs [T, H D] and cache writes [T, 2, V, D] in float64; ``known`` gets the new keys and values."""
    q, k, v = qkv.double().cpu().split([heads, kv_heads, kv_heads], 1)
    if q_norm is not None:
        q, k = rms(q, q_norm.double().cpu()), rms(k, k_norm.double().cpu())
    cos, sin = rope.double().cpu()[step.positions.long().cpu()].unbind(1)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, -1)
        c, s = cos[:, None], sin[:, None]
        return torch.cat([first * c - second * s, second * c + first * s], -1)

    q, k = rotate(q), rotate(k)
    writes = torch.stack([k, v], 1)
    outputs, row = [], 0
    for slot, (context, count) in enumerate(lengths):
        known[slot] = known[slot].double()
        known[slot][context - count :] = writes[row : row + count]
        keys, values = (part.repeat_interleave(heads // kv_heads, 1) for part in known[slot].unbind(1))
        scores = torch.einsum("qhd,khd->hqk", q[row : row + count], keys) * 0.2
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        own, other = torch.arange(context - count, context)[:, None], torch.arange(context)
        hidden = (other > own) | ((other <= own - window) if window else False)
        weights = scores.masked_fill(hidden, float("-inf")).exp()
        sums = weights.sum(-1, keepdim=True)
        if sinks is not None:
            sums = sums + sinks.double().cpu().exp()[:, None, None]
        weights = weights / sums
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values).flatten(1))
        row += count
    return torch.cat(outputs).to(DEVICE), writes.to(DEVICE)


KV_SCALES = 0.0625, 0.25


def filled_cache(kind, dtype, known, lengths, tables, block_size, kv_heads, size, blocks=100):
    """A cache that holds what came before the step and garbage elsewhere."""
    values = torch.randn(blocks, 2, kv_heads, block_size, size)
    for slot, (context, count) in enumerate(lengths):
        for position in range(context - count):
            values[tables[slot][position // block_size], :, :, position % block_size] = known[slot][position]
    if kind == "int8":
        scales = values.abs().amax(-1) / 127
        return KVCache((values / scales[..., None]).round().to(torch.int8).to(DEVICE), scales.to(DEVICE))
    if kind == "scaled fp8":
        units = torch.tensor(KV_SCALES).view(1, 2, 1, 1, 1)
        return KVCache((values / units).to(torch.float8_e4m3fn).to(DEVICE), None, *KV_SCALES)
    return KVCache(values.to(torch.float8_e4m3fn if kind == "fp8" else dtype).to(DEVICE), None)


def read_cache(cache) -> torch.Tensor:
    values = cache.values.double()
    values *= torch.tensor([cache.k_scale, cache.v_scale], device=DEVICE).view(1, 2, 1, 1, 1)
    return values if cache.scales is None else values * cache.scales[..., None]
