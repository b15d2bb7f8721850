"""What attention takes on this device, and whether two ways to compute it agree: choices at load are made by that."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from flightline.torch_engine.core.shared_prefixes import Group
from flightline.torch_engine.kernels.gpu import attention
from flightline.torch_engine.kernels.gpu.attention import PrefillPlan
from flightline.torch_engine.kernels.gpu.gathered import GatheredPlan, attend_gathered
from flightline.torch_engine.kernels.gpu.kv_cache import AttentionInput, KVCache, SharedPrefixes
from flightline.torch_engine.kernels.gpu.launch import INTERPRETED
from flightline.torch_engine.kernels.gpu.shared_prefix import PrefixPlan, attend_prefixes
from flightline.torch_engine.model.spec import ModelSpec

OTHER_GLUON = (ImportError, AttributeError, TypeError, ValueError, CompilationError)
"""What a kernel in Gluon ends in on a release of Triton whose Gluon is another."""


def device_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Median of what the device takes for it; in the interpreter, where that means nothing, the host's time once."""
    if INTERPRETED:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    times: list[float] = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def graph_seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """As :func:`device_seconds`, of a graph of it, where the host's part does not count."""
    if INTERPRETED:
        return device_seconds(run, repeats)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL may have a thread
        run()
    return device_seconds(graph.replay, repeats)


@contextlib.contextmanager
def random_content(cache: KVCache, blocks: int) -> Iterator[None]:
    """For as long as this lasts the first blocks of an empty cache hold random keys and values."""
    values = cache.values[:blocks]
    for part in values.split(1024):  # in pieces: random numbers are float32
        content = torch.randn(part.shape, device=part.device)
        part.copy_(content.mul(32).round().clamp(-127, 127) if cache.scales is not None else content)
    if cache.scales is not None:
        cache.scales[:blocks] = 1 / 32
    try:
        yield
    finally:
        values.zero_()
        if cache.scales is not None:
            cache.scales[:blocks] = 0


def random_qkv(spec: ModelSpec, tokens: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    return torch.randn(tokens, width, dtype=dtype, device=device)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest one, as a share of the largest value; not a number where there is one in them."""
    ours, theirs = ours.float(), theirs.float()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def prompt_attention(
    plan: PrefillPlan | GatheredPlan,
    spec: ModelSpec,
    cache: KVCache,
    context: int,
    qkv: torch.Tensor,
) -> Callable[[], torch.Tensor]:
    """What computes one layer's attention of the last tokens of a prompt of ``context``, whose queries are in ``qkv``
    [tokens, (H + 2 V) D] and whose blocks are the first of ``cache``."""
    tokens, device = len(qkv), qkv.device
    gathered = plan if isinstance(plan, GatheredPlan) else None
    tile = plan.tile if isinstance(plan, GatheredPlan) else plan
    integers: dict[str, Any] = {"dtype": torch.int32, "device": device}
    each, first = tile.tokens(spec.num_groups), context - tokens
    pieces = [(at, min(each, tokens - at), first + at, 0) for at in range(0, tokens, each)][::-1]
    tiles = torch.tensor(pieces, **integers)
    table = torch.arange(-(-context // cache.values.shape[3]), **integers)[None]
    positions = torch.arange(first, context, **integers)
    where = AttentionInput(torch.zeros_like(positions), positions, table, 0, tiles, context, True)
    if gathered is not None:
        where.spans = torch.tensor([[0, context, 0, 0]], **integers)
        where.offsets = torch.zeros(1, **integers)
    how = (spec.num_heads, spec.attention_scale)

    def run() -> torch.Tensor:
        nothing = attention.DecodePlan(0, 0, 32, 1)
        out = attention.attend(qkv, cache, where, *how, None, spec.attention_softcap, nothing, prefill=tile)
        if gathered is not None:
            attend_gathered(qkv, cache, where, *how, spec.attention_softcap, gathered, out)
        return out

    return run


def prefill_seconds(
    plan: PrefillPlan | GatheredPlan,
    spec: ModelSpec,
    cache: KVCache,
    context: int,
    tokens: int,
    dtype: torch.dtype,
    repeats: int = 5,
    in_graph: bool = False,
) -> float:
    """What one layer's attention takes of the last ``tokens`` of a prompt of ``context``; infinite if the plan does not
    fit this device. ``in_graph`` leaves out the host's part, which counts where there are few tokens."""
    run = prompt_attention(plan, spec, cache, context, random_qkv(spec, tokens, dtype, cache.values.device))
    unfit: tuple[type[Exception], ...] = (OutOfResources, CompilationError, RuntimeError)
    if isinstance(plan, GatheredPlan) and plan.ahead:
        unfit += OTHER_GLUON
    try:
        run()
    except unfit as error:
        if isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        return float("inf")
    return (graph_seconds if in_graph else device_seconds)(run, repeats)


def shared_attention(
    plan: PrefixPlan,
    spec: ModelSpec,
    cache: KVCache,
    decodes: int,
    shared: int,
    own: int,
    dtype: torch.dtype,
    multiprocessors: int,
) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:
    """One layer's attention of decodes that share so many blocks and have others of their own: each row alone, and
    together."""
    device, block_size = cache.values.device, cache.values.shape[3]
    integers: dict[str, Any] = {"dtype": torch.int32, "device": device}
    rows = torch.arange(decodes, **integers)
    tables = torch.arange(shared, **integers).expand(decodes, -1)
    tables = torch.cat([tables, shared + torch.arange(decodes * own, **integers).view(decodes, own)], 1)
    positions = torch.full_like(rows, (shared + own) * block_size - 1)
    qkv = random_qkv(spec, decodes, dtype, device)
    parts = plan.lay_out([Group(np.arange(decodes), shared)], decodes, block_size, least=0)
    assert parts is not None
    placed = [torch.tensor(part, **integers) for part in parts]
    prefixes = SharedPrefixes(placed[0].view(3, -1), placed[1], placed[2].view(-1, 4))
    decode = attention.decode_plan(
        decodes,
        spec.num_kv_heads,
        spec.num_groups,
        spec.head_dim,
        cache.values.element_size(),
        multiprocessors,
        (shared + own) * block_size,
    )

    def attend(prefixes: SharedPrefixes | None) -> torch.Tensor:
        where = AttentionInput(rows, positions, tables, decodes, None, prefixes=prefixes)
        how = (spec.num_heads, spec.attention_scale, None, spec.attention_softcap)
        return attention.attend(
            qkv, cache, where, *how, decode, prefix=attend_prefixes(qkv, cache, where, *how, plan)
        )

    return partial(attend, None), partial(attend, prefixes)


def shared_seconds(plan: PrefixPlan, *shape: Any) -> tuple[float, float, float]:
    """What :func:`shared_attention` takes of each row alone, and together, and the :func:`difference` of the results;
    all infinite if the plan does not fit this device."""
    alone, together = shared_attention(plan, *shape)
    try:
        apart = difference(together(), alone())
    except (OutOfResources, CompilationError):
        return math.inf, math.inf, math.inf
    return graph_seconds(alone), graph_seconds(together), apart
