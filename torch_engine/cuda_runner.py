"""Runs the scheduler's chunks on a GPU: decode steps as CUDA graphs, tokens that stay on the device.

Every sequence has a slot: a row of the block tables on the device and a place for its last sampled token.
A step needs four integers a row (token id, slot, position, whether it must not end here), which travel in one copy from
pinned memory together with the entries of the block tables that are new. A token id of -1 means "what the step before
sampled for this slot", so a step can be launched before the tokens of the one before it are known.

Steps of single tokens replay a graph captured for the next larger batch size; rows that pad it belong to a slot
and a KV block of their own. A guess (``core/speculation.py``) is a row more of its sequence's slot, one
position further, in the same graphs: all keys are written before any row attends. Where what was said changes what may
follow, it has a slot of its own in the sampling's tables, a fork: there the guesses before it count as said.

Tokens that a grammar decides over are chosen by :meth:`CudaRunner.finish`, after the tokens of the step before were
fetched and while the device computes the forward pass; the others of that step with them. They get no guesses.

Where several ranks share the model, the first tells the others the integers of each step (:class:`Order`), and they
replay the same graphs on theirs: NCCL and symmetric memory are in the graphs. The likeliest token of each row is the
best of what each rank finds in its part of the vocabulary; where a request asks for more, the first rank gathers the
logits, chooses, and tells the others the tokens, on the device.

Steps of single tokens of which many share their first keys replay graphs of a second kind, in which those keys are read
once for all of them (``kernels/gpu/shared_prefix.py``). Steps whose contexts are all short replay a third kind, without
what cuts and merges the long ones.

Steps with prompt chunks up to ``MIXED_ROWS[-1]`` tokens replay graphs of their own, where the host would need longer to
launch the kernels than the device to run them; larger ones run without a graph.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from flightline.torch_engine.core.blocks import Moves
from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.core.grammar import fill
from flightline.torch_engine.core.layer_groups import LayerGroups
from flightline.torch_engine.core.request import Code, RequestError
from flightline.torch_engine.core.sampling import Asked, Sampled, Scores, score, scored_rows, told_scores
from flightline.torch_engine.core.scheduler import MOST_SCORED, Chunk
from flightline.torch_engine.core.sequence import Sequence
from flightline.torch_engine.core.shared_prefixes import Ints, find_groups
from flightline.torch_engine.core.speculation import MOST_ROWS
from flightline.torch_engine.kernels.gpu.attention import BATCH_SIZES, LONG, prefill_plan
from flightline.torch_engine.kernels.gpu.cuda import LONG_GATHERED, CudaKernels
from flightline.torch_engine.kernels.gpu.device_sampling import DeviceSampling, Move
from flightline.torch_engine.kernels.gpu.gathered import LEAST_PAIRS, LEAST_TOKENS, LONGEST_BESIDE, padded
from flightline.torch_engine.kernels.gpu.kv_cache import AttentionInput, KVCache, SharedPrefixes, scatter
from flightline.torch_engine.kernels.gpu.linear import SKINNY_ROWS, CudaLinear
from flightline.torch_engine.kernels.gpu.sampling_ops import sample
from flightline.torch_engine.kernels.gpu.sampling_tables import Choice
from flightline.torch_engine.kernels.gpu.steps import CudaStep
from flightline.torch_engine.kernels.gpu.tokens import argmax, remember
from flightline.torch_engine.model.decoder import Model
from flightline.torch_engine.parallel.ranks import Ranks, Single
from flightline.torch_engine.runner import Ticket, described, host_blocks

MIXED_ROWS = (16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
MIXED_SAMPLES = 256
BESIDE_DECODES = (32, 64, 128, 192, 256)
BESIDE_PROMPTS = (64, 128, 256, 384, 512, 768, 1024)
"""Rows of decodes, and of prompts beside them, in graphs that compute the decodes as a step of single tokens does."""
LONG_BESIDE = (128, 512)
"""The same rows of prompts where a decode has a longer context than :data:`MIXED_DECODE`: chats with a history."""
BESIDE_BYTES = 4 * 2**30
"""Of the device's memory that must be free beside weights and KV cache for these graphs: on an H200 32 of an 8B model
took 1 GiB."""
ROWS_AN_END = 16
"""Of prompts in such a graph, one may end for so many."""
FEW_DECODES = 16
"""So many may be tiles of one token of the prompts' attention. 248 of those take 90 us a layer of an 8B model on an
H200, and 36 in the decodes' own attention."""
MIXED_DECODE = 2048
"""Longest context of a decode beside prompts in most graphs: it has no splits there, which many keys want."""
SHORT = 2048
"""Keys of the longest row of a step of single tokens that needs no cutting."""
LEAST_SHARING = 4
"""Rows of a step of single tokens from which on it is looked whether they share their first keys."""
MOST_UPDATES = 2**15
"""New entries of the block tables that travel with a step. Of more, the first ones go before it, one lot at a time."""
MIB = 2**20
ALIGNMENT = 4
"""Integers in 16 bytes."""


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class MixedShape:
    """Sizes of a captured step with prompt chunks; a smaller step is padded to them."""

    rows: int
    tiles: int
    samples: int
    """Rows whose logits are wanted."""
    decodes: int = 0
    """The first rows, for decodes alone; 0: these are tiles of one token, anywhere."""
    long: bool = False
    """Whether these decodes may see as many keys as there is room for, and not :data:`MIXED_DECODE`."""

    @classmethod
    def of(cls, rows: int, tile: int) -> MixedShape:
        """``tile`` tokens of one prompt share a tile; a decode has a tile of its own."""
        samples = min(rows, 64 if rows <= 256 else MIXED_SAMPLES)
        return cls(rows, rows // tile + samples + 8, samples)

    @classmethod
    def beside(cls, decodes: int, prompts: int, tile: int, long: bool = False) -> MixedShape:
        """``prompts`` rows of prompts, of which a few end, beside ``decodes``."""
        ends = prompts // ROWS_AN_END
        return cls(decodes + prompts, prompts // tile + ends, decodes + ends, decodes, long)

    def holds(self, decodes: int, prompts: int, tiles: int, samples: int) -> bool:
        """Whether so many rows of each fit, ``tiles`` of the prompts, and so many rows whose logits are wanted."""
        if samples > self.samples:
            return False
        if not self.decodes:
            return decodes + prompts <= self.rows and decodes + tiles <= self.tiles
        return decodes <= self.decodes and prompts <= self.rows - self.decodes and tiles <= self.tiles


@dataclass(frozen=True)
class SharedShape:
    """Sizes of a step of single tokens, captured or not, of which some share their first keys."""

    rows: int
    items: int
    """Room in ``SharedPrefixes.items``."""

    @property
    def sizes(self) -> list[int]:
        """Integers of each part of ``SharedPrefixes``."""
        return [3 * self.rows, self.rows, 4 * self.items]


class Sharing(NamedTuple):
    """What :meth:`CudaRunner._shared` has found, and for which rows."""

    tables: int
    """``CudaRunner._tables_given`` then."""
    slots: list[int]
    parts: list[Ints] | None
    """As ``PrefixPlan.lay_out`` gives them."""


@dataclass(frozen=True)
class Order:
    """A step as the device gets it: the same on every rank."""

    parts: list[NDArray[Any]]
    """int32, laid out as the graph or :meth:`CudaRunner._loose` wants them."""
    updates: list[tuple[int, int]]
    """New entries of the block tables: where, and what."""
    graph: int | SharedShape | MixedShape | None
    """Rows or shape of a step of single tokens, or shape of one with prompt chunks; None: it has none of its own."""
    decodes: int = 0
    """Of a step without a graph: rows of single tokens, which come first."""
    longest: int = 0
    """Of a step without a graph: the longest context of its prompt chunks."""
    long: bool = False
    """Of a step without a graph: its tiles are those of long prompts."""
    gathered: bool = False
    """Of a step without a graph: the last two parts are spans and offsets (``AttentionInput``)."""
    short: bool = False
    """Of a step of single tokens: no row sees more than :data:`SHORT` keys."""
    plain: bool = True
    """Nothing but the likeliest tokens is asked for."""
    searches: bool = False
    """Whether a row ``Sequence.searches``."""


class Computed(NamedTuple):
    """A forward pass that is queued: what went in, and its logits, valid until the next one."""

    step: CudaStep
    logits: torch.Tensor


class Captured:
    """A forward pass on static inputs and the choice of its tokens: a CUDA graph each, or themselves (in tests).

    They are apart so that something which depends on the last token may come between them. The choice has two graphs,
    with and without what only some requests want.
    """

    def __init__(
        self, forward: Callable[[], Computed], choose: Callable[[Computed, bool], None], pool: Any, mode: str
    ) -> None:
        """``pool`` is the memory that graphs share; None: do not capture. ``mode`` is ``capture_error_mode``."""
        self._forward, self._choose = forward, choose
        self._graphs: tuple[torch.cuda.CUDAGraph, ...] = ()
        if pool is not None:
            choose(forward(), True)  # compiles the kernels and warms the libraries up outside of the capture
            torch.cuda.synchronize()
            graphs = tuple(torch.cuda.CUDAGraph() for _ in range(3))
            with torch.cuda.graph(graphs[0], pool=pool, capture_error_mode=mode):
                self._computed = forward()
            for searches in (False, True):
                with torch.cuda.graph(graphs[1 + searches], pool=pool, capture_error_mode=mode):
                    choose(self._computed, searches)
            self._graphs = graphs

    def replay(self) -> Computed:
        """Queues the pass on the current inputs."""
        if not self._graphs:
            self._computed = self._forward()
        else:
            self._graphs[0].replay()
        return self._computed

    def choose(self, searches: bool) -> None:
        """Queues the choice of tokens for requests of every kind; greedy ones alone have theirs from the pass.

        ``searches``: one of them is one that ``Sequence.searches``.
        """
        if self._graphs:
            self._graphs[1 + searches].replay()
        else:
            self._choose(self._computed, searches)


class Fork(NamedTuple):
    """Rows of guesses in a step that ask other rows of the sampling's tables than their sequence's."""

    sequence: Sequence
    slot: int
    row: int
    """The first of them in the step."""
    length: int
    """Tokens known before them."""
    guesses: tuple[int, ...]
    slots: list[int]
    """One for each guess."""


class Staging:
    """Pinned memory for one step's input and output, reused every other step.

    Safe because the tokens of step n are fetched before step n + 2 is launched, and its input was read before
    its tokens were written.
    """

    def __init__(self, capacity: int, rows: int, pinned: bool) -> None:
        self.host = torch.empty(capacity, dtype=torch.int32, pin_memory=pinned)
        self.values = self.host.numpy()
        self.tokens = torch.empty(rows, dtype=torch.int32, pin_memory=pinned)
        self.choice = Choice.empty(rows, "cpu", pinned)
        self.event = torch.cuda.Event() if pinned else None


class CudaRunner:
    """Owns the KV caches, the slots and the graphs of one model on one device."""

    lags = True
    row_cost = 1 / 128
    waited = True

    @torch.inference_mode()
    def __init__(
        self,
        model: Model[CudaLinear, KVCache, CudaStep],
        kernels: CudaKernels,
        config: EngineConfig,
        ranks: Ranks | None = None,
        groups: LayerGroups | None = None,
    ) -> None:
        self.model, self.kernels = model, kernels
        self.block_size = config.block_size
        self.ranks = ranks or Single()
        self.group = self.ranks.group
        groups = groups or LayerGroups.one(len(model.layers))
        # Blocks behind a window are freed, and then another's table does not stand for one's own.
        self._tables_stay = tuple(groups.windows) == (None,)
        blocks = groups.num_blocks(config.num_kv_blocks)
        self.caches = model.new_caches(blocks + 1, config.block_size, groups)  # one block for padding rows
        self.host = host_blocks(kernels, self.caches, groups.num_blocks(config.num_host_kv_blocks))
        device = self.device = kernels.device
        slots = config.max_batch_size
        # Each table begins at a multiple of 16 bytes, too.
        self.width = _aligned(-(-config.max_seq_len // config.block_size))
        self.tables = torch.zeros(
            slots + 1, len(groups.windows), self.width, dtype=torch.int32, device=device
        )
        self.tables[slots] = blocks
        self.spare = slots
        forks = MOST_ROWS - 1 if config.speculation_tokens else 0
        self._forks = range(slots + 1, slots + 1 + forks)
        self._forked: list[Fork] = []
        """Of the last step."""
        self.last = torch.zeros(slots + 1 + forks, dtype=torch.int32, device=device)
        ladder = self._ladder(max(slots, min(slots * (1 + config.speculation_tokens), MOST_ROWS)))
        samples = max(slots + MOST_SCORED, MIXED_SAMPLES + BESIDE_PROMPTS[-1] // ROWS_AN_END)
        self.tokens = torch.zeros(max(samples, ladder[-1]), dtype=torch.int32, device=device)
        spec = model.spec
        self.choice = Choice.empty(len(self.tokens), device)
        self.choice.tokens = self.tokens
        self.sampling = DeviceSampling(slots + 1 + forks, spec.vocab_size, device)
        ends = sorted(token for token in spec.end_ids if token < spec.vocab_size)
        self.ends = torch.tensor(ends, dtype=torch.int32, device=device) if ends else None
        on_gpu = device.type == "cuda"
        self.tile = prefill_plan(kernels.dtype, spec.head_dim, 0).tokens(spec.num_groups)
        self.ranks.meet({"blocks": blocks, "GPU": torch.cuda.get_device_name(device) if on_gpu else "none"})
        if config.cuda_tuning and on_gpu:
            kernels.tune_usual_prefill(spec, self.caches[0], config.max_seq_len)
            kernels.tune_prefill(spec, self.caches[0], config.max_seq_len, config.max_num_tokens)
            # Several ranks would have to agree on a plan, and each times its own.
            if self._tables_stay and isinstance(self.ranks, Single):
                kernels.tune_prefixes(spec, self.caches[0], slots, config.max_seq_len)
        long_plan = kernels.long_prefill
        self.long_tile = long_plan.tokens(spec.num_groups) if long_plan else 0
        """Tokens of a tile of long prompts; 0: as of all."""
        self._no_room = on_gpu and self._any_rank(torch.cuda.mem_get_info()[0] < BESIDE_BYTES)
        """For graphs of decodes beside prompts in rows of their own."""
        mixed = [
            shape
            for shape in self._mixed_shapes(0 if self._no_room else slots, self.tile)
            if shape.rows <= config.max_num_tokens
        ]
        tiles = max([config.max_num_tokens // self.tile + slots + 1, *(shape.tiles for shape in mixed)])
        # Ids, slots, positions, holds, forks, shared prefixes; tiles; sampled rows, slots, holds; new entries of the
        # block tables; alignment.
        longest = max(config.max_num_tokens, len(self.tokens))
        capacity = 9 * longest + 4 * tiles + 3 * samples + 2 * MOST_UPDATES + 13 * ALIGNMENT
        capacity += 5 * slots + 2 * ALIGNMENT  # spans and offsets of gathered keys
        capacity += 4 * kernels.prefix_plan(spec, self.caches[0]).items(len(self.tokens))
        self.inputs = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._own_scales: torch.Tensor | None = None
        self._scales: torch.Tensor | None = None
        """Of this rank's logits, and of those of the whole vocabulary."""
        if model.lm_head.column_scales is not None:
            self._own_scales = F.pad(model.lm_head.column_scales, (0, model.padding), value=1.0)
            self._scales = self._gathered(self._own_scales[None])[0]
        self.staging = [Staging(capacity, len(self.tokens), on_gpu) for _ in range(2)]
        self._slots: dict[Sequence, int] = {}
        self._free = list(range(slots))[::-1]
        self._known: list[tuple[list[list[int]], int]] = [([], 0)] * slots
        """For each slot the sequence's block tables and how much of them is on the device."""
        self._host_tables = np.zeros((slots + 1, self.width), dtype=np.int32)
        """Those of the first group of layers."""
        self._tables_given = 0
        """How often a slot got another table."""
        self._sharing = Sharing(0, [], None)
        """Of the last step of single tokens."""
        self.graphs: dict[int, Captured] = {}
        """Of single tokens, by batch size, the largest first."""
        self.short: dict[int, Captured] = {}
        """The same for short contexts, where that is another pass."""
        self.shared: dict[SharedShape, Captured] = {}
        """Of single tokens that share their first keys."""
        self.mixed: dict[MixedShape, Captured] = {}
        """Of steps with prompt chunks, the smallest first."""
        self.graph_bytes = 0
        self._computed: Computed
        """The last step's forward pass."""
        self._unfinished: Callable[[], None] | None = None
        """What of the launched step is not queued."""
        self._guided: dict[int, Sequence] = {}
        """By slot: those of the launched step that have grammars."""
        self._masks: tuple[list[int], Callable[[], None]] | None = None
        """Slots whose masks are being written, and what waits for them."""
        if config.cuda_graphs and on_gpu:
            kernels.link(model.layers[0], spec.hidden_size, config)
            if config.cuda_tuning:
                kernels.tune(model.layers)
            self.capture(ladder, mixed)
        if on_gpu:
            self._warm_up(min(config.max_num_tokens, config.max_seq_len))

    @staticmethod
    def _ladder(rows: int) -> list[int]:
        """Batch sizes to capture: the smallest that holds ``rows``, and all below."""
        return [
            *(size for size in BATCH_SIZES if size < rows),
            next((s for s in BATCH_SIZES if s >= rows), rows),
        ]

    def _any_rank(self, holds: bool) -> bool:
        """Whether it holds on one of the ranks, all of which have to capture the same steps."""
        return bool(self.group.sum(torch.tensor([float(holds)], device=self.device)).item())

    @staticmethod
    def _mixed_shapes(slots: int, tile: int) -> list[MixedShape]:
        """Those to capture; with rows for decodes, of so many sequences at the most."""
        most = next((size for size in BESIDE_DECODES if size >= slots), BESIDE_DECODES[-1])
        decodes = [size for size in BESIDE_DECODES if size <= most] if slots > FEW_DECODES else []
        return [
            *(MixedShape.of(rows, tile) for rows in MIXED_ROWS),
            *(MixedShape.beside(*rows, tile) for rows in itertools.product(decodes, BESIDE_PROMPTS)),
            *(MixedShape.beside(*rows, tile, True) for rows in itertools.product(decodes, LONG_BESIDE)),
        ]

    def describe(self) -> str:
        tensors = [each for cache in self.caches for each in self.model.kernels.cache_tensors(cache)]
        cache = sum({each.data_ptr(): each.nbytes for each in tensors}.values()) / MIB
        graphs = "no CUDA graphs"
        if self.graphs:
            count = len(self.graphs) + len(self.short) + len(self.shared) + len(self.mixed)
            graphs = f"{count} CUDA graphs ({self.graph_bytes / MIB:.0f} MiB)"
            if self._no_room:
                graphs += ", no memory for those of many decodes beside prompts"
        return f", {cache:.0f} MiB KV cache, {graphs}{described(self.host)}"

    # Graphs ----------------------------------------------------------------------------------------

    def capture(self, sizes: list[int], mixed: list[MixedShape]) -> None:
        """A graph for each batch size and shape, largest first: the smaller ones fit the memory of the larger."""
        pool, before = None, 0
        # NCCL has a thread that looks after its events, whatever this one captures.
        mode = "global" if self.group.size == 1 else "thread_local"
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            before = torch.cuda.mem_get_info()[0]
            pool = torch.cuda.graph_pool_handle()
        for shape in sorted(mixed, key=lambda shape: -shape.rows):
            self._upload(self.staging[0], self._padded(shape, np.empty((3, 0)), [], [], 0), [])
            self.mixed[shape] = Captured(
                functools.partial(self._mixed_forward, shape), self._choose, pool, mode
            )
        self.mixed = dict(reversed(self.mixed.items()))
        for size in sorted(sizes, reverse=True):
            self._upload(self.staging[0], self._columns([(0, self.spare, 0, 0)] * size, []), [])
            self.graphs[size] = Captured(functools.partial(self._decode, size), self._choose, pool, mode)
            if self._differs_if_short(size):
                self.short[size] = Captured(
                    functools.partial(self._decode, size, SHORT), self._choose, pool, mode
                )
            sharing = self._shared_shape(size)
            if sharing is not None:
                nothing = [np.zeros(count, dtype=np.int32) for count in sharing.sizes]
                self._upload(
                    self.staging[0], [*self._columns([(0, self.spare, 0, 0)] * size, []), *nothing], []
                )
                self.shared[sharing] = Captured(
                    functools.partial(self._decode, sharing), self._choose, pool, mode
                )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            self.graph_bytes = max(0, before - torch.cuda.mem_get_info()[0])

    def _warm_up(self, longest: int) -> None:
        """Compiles what steps with prompts need, few rows and many, so that the first request need not wait."""
        last = [[self.tables.numel() - 1], [int(self.tables[-1, -1, -1])]]
        scatter(self.tables, torch.tensor(last, dtype=torch.int32, device=self.device))
        if self.device.type == "cuda":
            self.kernels.load_products(self.model.layers, self.model.lm_head, longest, len(self.tokens))
        for count in sorted({min(rows, longest) for rows in (SKINNY_ROWS, 64, 1024, longest)}):
            self._try_prompt(count)
        count = min(LEAST_TOKENS, longest)
        if self.long_tile:
            self._try_prompt(count, self.long_tile, True)
        if spans := self._spans([(0, count, 0, self.spare)]):
            self._try_prompt(count, self._gathered_tile(count), spans=spans)
            if self.kernels.gathered_long is not None:
                first = LONG_GATHERED - count
                spans = self._spans([(0, count, first, self.spare)])
                self._try_prompt(count, self._gathered_tile(LONG_GATHERED), spans=spans, first=first)

    def _try_prompt(
        self,
        count: int,
        tile: int = 0,
        long: bool = False,
        spans: list[Ints] | None = None,
        first: int = 0,
    ) -> None:
        """A step with a prompt of so many tokens, behind ``first`` others, that is nobody's."""
        columns = np.zeros((3, count), dtype=np.int32)
        columns[1], columns[2] = self.spare, first + np.arange(count)
        tiles = self._tiles(0, count, first, self.spare, tile)
        sampled = [(count - 1, self.spare, 0)]
        self._carry_out(self._loose(columns, tiles, sampled, [], 0, long, spans), self.staging[0])(True)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _differs_if_short(self, rows: int) -> bool:
        """Whether a step of single tokens is computed otherwise if none of them sees many keys."""
        most = self.width * self.block_size
        short, long = (
            self.kernels.decode_plan(self.model.spec, rows, longest) for longest in (min(SHORT, most), most)
        )
        return short != long

    def _decode(self, shape: int | SharedShape, most: int = 0) -> Computed:
        """A step of rows that all choose a token, on the static inputs; leaves these in ``self.tokens``.

        ``most`` is the keys that a row sees at most; 0: as many as there is room for.
        """
        size, sizes = (shape.rows, shape.sizes) if isinstance(shape, SharedShape) else (shape, [])
        ids, slots, positions, holds, asking, *shared = self._places([size] * 5 + sizes)
        prefixes = None
        if shared:
            rows, members, items = shared
            prefixes = SharedPrefixes(rows.view(3, -1), members, items.view(-1, 4))
        where = AttentionInput(slots, positions, self.tables, size, None, prefixes=prefixes, most=most)
        return self._forward(CudaStep(ids, where, self.last, None, asking, holds, idle=self.spare))

    def _mixed_forward(self, shape: MixedShape) -> Computed:
        """A step with prompt chunks on the static inputs, laid out as :meth:`_padded` does."""
        rows, samples = shape.rows, shape.samples
        ids, slots, positions, tiles, sampled, sampled_slots, holds = self._places(
            [rows, rows, rows, 4 * shape.tiles, samples, samples, samples]
        )
        where = AttentionInput(
            slots, positions, self.tables, shape.decodes, tiles.view(-1, 4), rows,
            most=0 if shape.long else MIXED_DECODE,
        )  # fmt: skip
        return self._forward(CudaStep(ids, where, self.last, sampled, sampled_slots, holds, self.spare))

    def _padded(
        self,
        shape: MixedShape,
        columns: NDArray[Any],
        tiles: list[tuple[int, int, int, int]],
        sampled: list[tuple[int, int, int]],
        decodes: int,
    ) -> list[NDArray[Any]]:
        """The parts of a step, filled up with rows of the spare slot, empty tiles and samples that nobody reads.

        ``decodes`` of the rows come first; where the shape has rows for them, those of prompts begin behind all these.
        """
        gap = shape.decodes - decodes if shape.decodes else 0
        rows = np.zeros((3, shape.rows), dtype=np.int32)
        rows[1] = self.spare
        rows[:, :decodes] = columns[:, :decodes]
        rows[:, decodes + gap : columns.shape[1] + gap] = columns[:, decodes:]
        table = np.zeros((shape.tiles, 4), dtype=np.int32)
        table[:, 3] = self.spare
        table[: len(tiles)] = np.array(tiles, dtype=np.int32).reshape(-1, 4)
        samples = np.zeros((3, shape.samples), dtype=np.int32)
        samples[1] = self.spare
        samples[:, : len(sampled)] = np.array(sampled, dtype=np.int32).reshape(-1, 3).T
        for begins in (table[: len(tiles), 0], samples[0]):
            begins[begins >= decodes] += gap
        return [*rows, table.reshape(-1), *samples]

    def _forward(self, step: CudaStep) -> Computed:
        """Queues the pass, and the choice of the tokens of which nothing but the likeliest is asked."""
        logits = self.model.raw_logits(step, self.caches)
        tokens = self.tokens[: logits.shape[0]]
        argmax(
            logits,
            step.logit_slots,
            self.last,
            tokens,
            self._own_scales,
            step.holds,
            self.ends,
            self.model.first_token,
            self.kernels.exchange or self.group,
        )
        return Computed(step, logits)

    def _choose(self, computed: Computed, searches: bool) -> None:
        """Queues the choice of all rows' tokens, as their slots' requests ask."""
        step, logits = computed
        logits = self._gathered(logits)
        tokens = self.tokens[: logits.shape[0]]
        if self.group.rank == 0:
            sample(
                logits, self._scales, self.model.spec.logit_softcap, step.logit_rows, step.logit_slots,
                step.attention.positions, self.sampling.tables, self.last, self.choice, searches,
            )  # fmt: skip
        self.group.told(tokens)
        if self.group.rank > 0:
            remember(tokens, step.logit_slots, self.last)

    def _gathered(self, values: torch.Tensor) -> torch.Tensor:
        """All ranks' columns, without those of no token: [rows, vocab]."""
        return self.group.columns(values)[:, : self.model.spec.vocab_size].contiguous()

    # Steps -----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def move(self, moves: Moves) -> None:
        """Queues copies of KV blocks to host memory and back."""
        assert self.host is not None
        self.ranks.tell(moves)
        with self._together():
            self.host.move(moves)
        self.ranks.done()

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk], sampling: list[Sequence]) -> Ticket:
        """Queues the step on the device and returns at once."""
        self.staging.reverse()
        staging = self.staging[0]
        plain = all(sequence.samples_on_device for sequence in sampling)
        self._join()
        # A prompt's token that chooses nothing is no decode: what its row drew would count as said.
        if all(chunk.num_tokens == chunk.num_sampled for chunk in chunks):
            order = self._order_decodes(chunks)
        else:
            order = self._order_mixed(chunks)
        searches = any(sequence.searches for sequence in sampling)
        order = dataclasses.replace(order, plain=plain, searches=searches)
        self.ranks.tell(order)
        with self._together():
            choose = self._carry_out(order, staging)
        told = [sequence.num_told for sequence in sampling]
        asks = max(told, default=-1) >= 0
        count = len(sampling)
        guided = {self._slots[sequence]: sequence for sequence in sampling if sequence.grammar is not None}
        asked, scores = scored_rows(chunks), []

        def finish() -> None:
            if asked:
                scores.append(self._score(count, asked))
            if not plain:
                self.sampling.flush()
                self._fork()
                self._mask()
                choose(searches)
            staging.tokens[:count].copy_(self.tokens[:count], non_blocking=True)
            if asks:
                for name in ("log_probs", "top_ids", "top_log_probs"):
                    getattr(staging.choice, name)[:count].copy_(
                        getattr(self.choice, name)[:count], non_blocking=True
                    )
            if staging.event is not None:
                staging.event.record()

        self._unfinished, self._guided = finish, guided
        if not guided:
            self.finish()

        def fetch() -> list[Sampled]:
            if staging.event is not None:
                with self._together():
                    self.waited = not staging.event.query()
                    staging.event.synchronize()
            self.ranks.done()
            tokens = staging.tokens[:count].tolist()
            sampled = (
                [Sampled(token) for token in tokens] if not asks else _told(staging.choice, tokens, told)
            )
            return sampled + told_scores(scores[0], asked) if asked else sampled

        return fetch

    @torch.inference_mode()
    def finish(self) -> None:
        """Queues the choice of the launched step's tokens, if that had to wait for the tokens before it."""
        unfinished, self._unfinished = self._unfinished, None
        if unfinished is not None:
            with self._together():
                unfinished()

    @torch.inference_mode()
    def follow(self, told: Order | Moves) -> None:
        """Queues another rank's step. Its inputs' memory is used again when the device has read them."""
        if isinstance(told, Moves):
            assert self.host is not None
            self.host.move(told)
            return
        self.staging.reverse()
        staging = self.staging[0]
        if staging.event is not None:
            staging.event.synchronize()
        choose = self._carry_out(told, staging)
        if not told.plain:
            choose(told.searches)
        if staging.event is not None:
            staging.event.record()

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """What the ranks do at the same place: if one fails there, all have."""
        try:
            yield
        except Exception as error:
            self.ranks.lost(error)
            raise

    def _carry_out(self, order: Order, staging: Staging) -> Callable[[bool], None]:
        """Queues the forward pass; returns what queues the choice of the tokens (:meth:`Captured.choose`)."""
        placed = self._upload(staging, order.parts, order.updates)
        if isinstance(order.graph, MixedShape):
            captured = self.mixed[order.graph]
        elif order.graph is None:
            ids, slots, positions, tiles, rows, row_slots, holds, *spans = placed
            where = AttentionInput(
                slots, positions, self.tables, order.decodes, tiles.view(-1, 4), order.longest, order.long
            )
            if order.gathered:
                where.spans, where.offsets = spans[0].view(-1, 4), spans[1]
            self._computed = self._forward(
                CudaStep(ids, where, self.last, rows, row_slots, holds, self.spare)
            )
            return functools.partial(self._choose, self._computed)
        elif not self.graphs:
            self._computed = self._decode(order.graph)
            return functools.partial(self._choose, self._computed)
        elif isinstance(order.graph, SharedShape):
            captured = self.shared[order.graph]
        else:
            captured = (self.short if order.short else self.graphs)[order.graph]
        self._computed = captured.replay()
        return captured.choose

    def _score(self, first: int, asked: list[Asked]) -> Scores:
        """Queues what is told of the prompts' tokens whose logits begin at row ``first``, and its way to the host."""
        rows = sum(len(each.targets) for each in asked)
        scores = score(self._computed.logits[first : first + rows], asked, self.model.finished)
        pinned = self.device.type == "cuda"
        here = [torch.empty(each.shape, dtype=each.dtype, pin_memory=pinned) for each in scores]
        for each, there in zip(here, scores, strict=True):
            each.copy_(there, non_blocking=True)
        return Scores(*here)

    def prepare(self) -> None:
        """Begins to write down what the launched step's grammars allow: they know all tokens before it."""
        grammars = {
            slot: sequence.grammar
            for slot, sequence in self._guided.items()
            if sequence.grammar is not None and sequence.finish_reason is None
        }
        if grammars:
            rows = self.sampling.new_masks(len(grammars))
            self._masks = list(grammars), fill(list(grammars.values()), rows)
        self._guided = {}

    def _mask(self) -> None:
        """Queues what grammars allow now; of sequences that have just ended nobody looks at it."""
        self.prepare()  # if nothing was in flight before
        masks, self._masks = self._masks, None
        if masks is not None:
            slots, wait = masks
            wait()
            self.sampling.allow(slots)

    def _order_decodes(self, chunks: list[Chunk]) -> Order:
        """The step of single tokens and guesses."""
        rows: list[tuple[int, int, int, int]] = []
        updates: list[tuple[int, int]] = []
        for chunk in chunks:
            rows.append(self._row(chunk.sequence, updates))
            if chunk.guesses:
                rows += self._guessed(chunk, rows[-1], len(rows))
        size = len(rows)
        if self.graphs:
            size = next(size for size in reversed(self.graphs) if size >= len(rows))
        columns = self._columns(rows + [(0, self.spare, 0, 0)] * (size - len(rows)), self._forked)
        shape = self._shared_shape(size)
        shared = self._shared(rows, columns[2]) if shape is not None else None
        if shared is None:
            short = size in self.short and int(columns[2].max()) < SHORT
            return Order(columns, updates, size, short=short)
        return Order([*columns, *shared], updates, shape)

    def _shared_shape(self, size: int) -> SharedShape | None:
        """Of a step of ``size`` rows; None: they are too few to share keys, or nothing of it is computed together."""
        plan = self.kernels.prefix
        if plan is None or size < LEAST_SHARING or not self._tables_stay:
            return None
        return SharedShape(size, plan.items(size))

    def _shared(self, rows: list[tuple[int, int, int, int]], positions: Ints) -> list[Ints] | None:
        """What rows of single tokens share, laid out for the kernel; ``positions`` [rows of the graph].

        Tables only grow behind what they share: it stays what it was as long as the same rows follow each other.
        """
        slots = [slot for _, slot, _, _ in rows]
        known = self._sharing
        plan = self.kernels.prefix
        if known.tables != self._tables_given or known.slots != slots:
            assert plan is not None
            limits = positions[: len(rows)] // self.block_size
            groups = find_groups(self._host_tables, np.array(slots, dtype=np.int32), limits)
            parts = plan.lay_out(groups, len(positions), self.block_size) if groups else None
            self._sharing = known = Sharing(self._tables_given, slots, parts)
        return known.parts

    @staticmethod
    def _columns(rows: list[tuple[int, int, int, int]], forked: list[Fork]) -> list[NDArray[Any]]:
        """Ids, slots, positions, holds, and the slots in the tables of sampling."""
        columns = list(np.array(rows, dtype=np.int32).T)
        asking = columns[1]
        if forked:
            asking = asking.copy()
            for fork in forked:
                asking[fork.row : fork.row + len(fork.slots)] = fork.slots
        return [*columns, asking]

    # Guesses ---------------------------------------------------------------------------------------

    def _guessed(
        self, chunk: Chunk, before: tuple[int, int, int, int], row: int
    ) -> list[tuple[int, int, int, int]]:
        """Rows of a chunk's guesses, of which the first is number ``row``; ``before`` is that of the token before them.

        Notes the forks that they need.
        """
        sequence, guesses = chunk.sequence, chunk.guesses
        _, slot, position, _ = before
        if sequence.remembers:
            taken = sum(len(fork.slots) for fork in self._forked)
            forks = list(self._forks[taken : taken + len(guesses)])
            self._forked.append(Fork(sequence, slot, row, len(sequence.tokens), guesses, forks))
        return [
            (guess, slot, position + number, int(sequence.must_go_on(number)))
            for number, guess in enumerate(guesses, 1)
        ]

    def _fork(self) -> None:
        """Queues that forks know what is said before their rows."""
        moves: list[Move] = [
            (fork.slot, target, fork.length, fork.guesses[: number + 1])
            for fork in self._forked
            for number, target in enumerate(fork.slots)
        ]
        if moves:
            self.sampling.fork(moves)

    def _join(self) -> None:
        """Queues that the slots of sequences forked in the last step know what was said: its last token's fork does.

        The tokens of that step have been fetched, as those of every step with guesses.
        """
        moves: list[Move] = []
        for fork in self._forked:
            accepted = len(fork.sequence.tokens) - fork.length - 1
            if accepted > 0 and self._slots.get(fork.sequence) == fork.slot:
                moves.append((fork.slots[accepted - 1], fork.slot, 0, ()))
        self._forked = []
        if moves:
            self.sampling.fork(moves)

    # Prompts ---------------------------------------------------------------------------------------

    def _order_mixed(self, chunks: list[Chunk]) -> Order:
        singles: list[tuple[int, int, int, int]] = []  # decodes come first
        columns: list[NDArray[Any]] = []
        tiles: list[tuple[int, int, int, int]] = []
        prompts: list[tuple[int, int, int, int]] = []
        sampled: list[tuple[int, int, int]] = []
        scored: list[tuple[int, int, int]] = []
        updates: list[tuple[int, int]] = []
        total = 0
        for chunk in chunks:
            sequence, count = chunk.sequence, chunk.num_tokens
            row = self._row(sequence, updates)
            _, slot, first, holds = row
            if count == 1:
                singles.append(row)
            else:
                rows = np.empty((3, count), dtype=np.int32)
                rows[0] = chunk.inputs
                rows[1] = slot
                rows[2] = np.arange(first, first + count)
                columns.append(rows)
                prompts.append((total, count, first, slot))
                tiles += self._tiles(*prompts[-1])
            total += count
            if chunk.samples:
                sampled.append((total - 1, slot, holds))
            # Tokens are chosen in these rows, too, where nobody looks.
            scored += [
                (row, self.spare, 0) for row in range(total - chunk.num_rows, total - chunk.num_sampled)
            ]
        sampled += scored
        if singles:
            columns.insert(0, np.array(singles, dtype=np.int32).T[:3])
        step = np.concatenate(columns, axis=1)
        shape = self._shape(total, len(tiles), len(sampled), singles)
        spans = self._spans(prompts) if self._gathers(prompts, shape is not None) else []
        if spans:
            shape = None
        if shape is not None and not shape.decodes:
            tiles += [(at, 1, position, slot) for at, (_, slot, position, _) in enumerate(singles)]
        longest = max((each[1] + each[2] for each in prompts), default=0)
        long = shape is None and longest >= LONG
        tile = self._gathered_tile(longest) if spans else self.long_tile
        if long and tile:
            tiles = [piece for each in prompts for piece in self._tiles(*each, tile)]
        # The longest tiles first: they take the most time.
        tiles.sort(key=lambda tile: -tile[2])
        if shape is not None:
            return Order(self._padded(shape, step, tiles, sampled, len(singles)), updates, shape)
        long &= bool(self.long_tile) and not spans
        return self._loose(step, tiles, sampled, updates, len(singles), long, spans)

    def _gathered_tile(self, longest: int) -> int:
        """Tokens of a tile of prompts whose keys are gathered, so many of the longest; 0: none are."""
        plan = self.kernels.gathered_plan(longest)
        return plan.tile.tokens(self.model.spec.num_groups) if plan else 0

    @staticmethod
    def _gathers(prompts: list[tuple[int, int, int, int]], graph: bool) -> bool:
        """Whether it pays to gather the keys of prompt chunks; with a ``graph`` also that the step goes without it."""
        longest = max((count + first for _, count, first, _ in prompts), default=0)
        if longest < LONG or longest >= LONGEST_BESIDE:
            return longest >= LONG
        if graph:
            return sum(count * (first + count // 2) for _, count, first, _ in prompts) >= LEAST_PAIRS
        return sum(count for _, count, _, _ in prompts) >= LEAST_TOKENS

    def _spans(self, prompts: list[tuple[int, int, int, int]]) -> list[Ints]:
        """Spans and offsets of prompt chunks; none where their keys cannot be gathered."""
        plan = self.kernels.gathered
        if plan is None:
            return []
        spans = np.zeros((len(prompts), 4), dtype=np.int32)
        offsets, used = np.zeros(self.spare + 1, dtype=np.int32), 0
        for span, (_, count, first, slot) in zip(spans, prompts, strict=True):
            span[:3] = slot, first + count, used
            offsets[slot] = used
            used += padded(first + count)
        return [spans.reshape(-1), offsets] if used <= plan.keys else []

    def _shape(
        self, rows: int, tiles: int, samples: int, decodes: list[tuple[int, int, int, int]]
    ) -> MixedShape | None:
        """The smallest captured step that holds this one, with rows for decodes by themselves if there are many."""
        long = max((position for _, _, position, _ in decodes), default=0) >= MIXED_DECODE
        count = len(decodes)
        fitting = [shape for shape in self.mixed if shape.holds(count, rows - count, tiles, samples)]
        if long:
            return min((shape for shape in fitting if shape.long), key=lambda shape: shape.rows, default=None)
        many = count > FEW_DECODES
        return min(
            fitting, key=lambda shape: (many != bool(shape.decodes), shape.long, shape.rows), default=None
        )

    def _tiles(
        self, row: int, count: int, first: int, slot: int, tile: int = 0
    ) -> list[tuple[int, int, int, int]]:
        """The pieces of a prompt chunk that starts at ``row`` of the step and at position ``first``."""
        tile = tile or self.tile
        return [
            (row + begin, min(tile, count - begin), first + begin, slot) for begin in range(0, count, tile)
        ]

    def _loose(
        self,
        columns: NDArray[Any],
        tiles: list[tuple[int, int, int, int]],
        sampled: list[tuple[int, int, int]],
        updates: list[tuple[int, int]],
        decodes: int,
        long: bool = False,
        spans: list[Ints] | None = None,
    ) -> Order:
        """A step of ``columns`` [3, T] (ids, slots, positions); ``sampled`` are rows, their slots and holds, ``spans``
        what :meth:`_spans` gave."""
        if not sampled:  # the head wants a row; its token goes where nobody looks
            sampled = [(0, self.spare, 0)]
        sampled_rows = [np.array(values, dtype=np.int32) for values in zip(*sampled, strict=True)]
        parts = [*columns, np.array(tiles, dtype=np.int32).reshape(-1), *sampled_rows, *(spans or [])]
        longest = max((first + count for _, count, first, _ in tiles), default=0)
        return Order(parts, updates, None, decodes, longest, long, bool(spans))

    def _row(self, sequence: Sequence, updates: list[tuple[int, int]]) -> tuple[int, int, int, int]:
        """Token id, slot, position and hold of a sequence's next token; notes what its row of the table lacks."""
        slot = self._slots.get(sequence)
        if slot is None:
            if not self._free:  # preempted sequences wait without blocks and need no slot
                for other in [other for other in self._slots if not other.block_tables]:
                    self.forget(other)
            slot = self._slots[sequence] = self._free.pop()
            self.sampling.assign(slot, sequence)
        tables, length = sequence.block_tables, sequence.num_blocks
        known, count = self._known[slot]
        if known is not tables:  # another sequence, or one that lost its blocks: a new list is a new table
            count = 0
            self._tables_given += 1
        if count < length:
            self._host_tables[slot, count:length] = tables[0][count:length]
            for group, table in enumerate(tables):
                base = (slot * len(tables) + group) * self.width
                updates += [(base + column, table[column]) for column in range(count, length)]
            self._known[slot] = tables, length
        position = sequence.num_computed
        tokens = sequence.tokens
        token = tokens[position] if position < len(tokens) else -1
        return token, slot, position, int(sequence.must_go_on())

    def _upload(
        self, staging: Staging, parts: list[NDArray[Any]], updates: list[tuple[int, int]]
    ) -> list[torch.Tensor]:
        """Copies ``parts`` to the device in one piece and updates the tables; returns the parts on the device.

        Each part starts at a multiple of 16 bytes: Triton compiles a kernel anew for pointers that do not.
        """
        while len(updates) > MOST_UPDATES:  # long prompts whose beginning is known
            some, updates = updates[:MOST_UPDATES], updates[MOST_UPDATES:]
            scatter(self.tables, torch.tensor(some, dtype=torch.int32).T.contiguous().to(self.device))
        if updates:
            parts = [*parts, np.array(updates, dtype=np.int32).T.reshape(-1)]
        at = 0
        for part in parts:
            staging.values[at : at + part.size] = part
            at += _aligned(part.size)
        placed = self._places([part.size for part in parts])
        self.inputs[:at].copy_(staging.host[:at], non_blocking=True)
        if updates:
            scatter(self.tables, placed.pop().view(2, -1))
        return placed

    def _places(self, sizes: list[int]) -> list[torch.Tensor]:
        """Where parts of these sizes lie among the inputs on the device."""
        starts = itertools.accumulate((_aligned(size) for size in sizes), initial=0)
        return [self.inputs[start : start + size] for start, size in zip(starts, sizes, strict=False)]

    def check(self, sequence: Sequence) -> None:
        """Raises RequestError: INVALID_ARG if the device has no room for all that a request asks of its tokens."""
        self.sampling.check(sequence)
        if sequence.request.return_prompt_log_probs and self.group.size > 1:
            raise RequestError(
                Code.INVALID_ARG,
                f"return_prompt_log_probs is true: {self.group.size} GPUs share this model, which is not supported; "
                "leave it out, or ask a server with TP=1",
            )

    def forget(self, sequence: Sequence) -> None:
        """Frees the slot. A step in flight may still use it: its successor's first step runs after that one."""
        slot = self._slots.pop(sequence, None)
        if slot is not None:
            self._known[slot] = [], 0
            self._free.append(slot)


def _told(choice: Choice, tokens: list[int], wanted: list[int]) -> list[Sampled]:
    """Tokens with what is told about each: as many of the likeliest as are ``wanted``; -1: nothing at all."""
    count, most = len(tokens), max(wanted)
    log_probs = choice.log_probs[:count].tolist()
    ids, values = choice.top_ids[:count, :most].tolist(), choice.top_log_probs[:count, :most].tolist()
    return [
        Sampled(token)
        if told < 0
        else Sampled(token, log_prob, tuple(zip(top[:told], near[:told], strict=True)))
        for token, log_prob, top, near, told in zip(tokens, log_probs, ids, values, wanted, strict=True)
    ]
