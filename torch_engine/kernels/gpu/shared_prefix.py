"""Attention of decodes to keys that several of them share: a system prompt, a document, another answer's prompt.

Each row of its own would read them again. Here the queries of up to a tile of rows, times the heads of a group, meet
the shared keys in one product, as a prompt's do; the keys are read once for all of them. What each row sees beyond is
the decode attention's, which merges both by the logarithms of their sums.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import triton.language as tl

from flightline.torch_engine.core.shared_prefixes import Group, Ints
from flightline.torch_engine.kernels.gpu.attention import (
    LOG2_E,
    PrefillPlan,
    PrefixParts,
    dot_type,
    meet,
)
from flightline.torch_engine.kernels.gpu.kv_cache import AttentionInput, KVCache
from flightline.torch_engine.kernels.gpu.launch import begin_kernel, cdiv, kernel, next_power_of_2

LAUNCH_BYTES = 16_000_000
"""What a GPU reads in the time that the kernel more and the merge of all rows take at the least, about 4 us."""
LEAST_KEYS = 256
"""Of a piece, at the least: its result costs as much to write and read as 8 or 16 keys."""


@kernel()
def _prefix_kernel(
    qkv, slots, positions, tables, width, members, items, values, scales, parts, sums, scale, v_scale, softcap,
    H: tl.constexpr, V: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    KV_INT8: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    begin_kernel()
    number, head = tl.program_id(0), tl.program_id(1)
    item = items + number * 4
    count = tl.load(item + 1)
    if count > 0:
        G: tl.constexpr = H // V
        first, begin, end = tl.load(item), tl.load(item + 2), tl.load(item + 3)
        r, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
        member = r // G
        there = member < count
        mask = there[:, None] & (d < D)[None, :]
        row = tl.load(members + first + member, mask=there, other=0).to(tl.int64)
        position = tl.load(positions + row)
        slot = tl.load(slots + tl.load(members + first)).to(tl.int64)  # any member's table has these blocks
        heads = (head * G + r % G)[:, None] * D + d[None, :]
        q = tl.load(qkv + row[:, None] * (H + 2 * V) * D + heads, mask=mask, other=0.0).to(DOT)
        table = tables + slot * width
        result = tl.zeros([ROWS, BLOCK_D], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        edge = begin
        if WINDOW == 0:
            edge += (end - begin) // BLOCK_N * BLOCK_N
            result, top, total = meet(
                q, result, top, total, begin, edge, position, table, values, scales, head, scale, softcap,
                V, D, BLOCK_D, BLOCK_N, BLOCK_SIZE, WINDOW, SOFTCAP, KV_INT8, DOT, STAGES, False,
            )  # fmt: skip
        result, top, total = meet(
            q, result, top, total, edge, end, position, table, values, scales, head, scale, softcap,
            V, D, BLOCK_D, BLOCK_N, BLOCK_SIZE, WINDOW, SOFTCAP, KV_INT8, DOT, 1, True,
        )  # fmt: skip
        seen = total > 0.0  # a window may have moved beyond these keys
        total = tl.where(seen, total, 1.0)
        part = (number * (ROWS // G) + member).to(tl.int64) * H + head * G + r % G
        tl.store(parts + part[:, None] * D + d[None, :], result / total[:, None] * v_scale, mask=mask)
        sum_log = tl.where(seen, (top + tl.log2(total)) / LOG2_E, float("-inf"))
        tl.store(sums + part, sum_log, mask=there)


@dataclass(frozen=True)
class PrefixPlan:
    """How shared keys are computed, and when that pays, for a model on a device."""

    tile: PrefillPlan
    """Query rows (decodes times heads of a group) and keys of one program."""
    group: int
    """Query heads of a key/value head."""
    programs: int
    """A key/value head, to fill the device."""
    key_bytes: int
    """A token's keys and values in one layer."""
    result_bytes: int
    """A row's result for one piece of keys in one layer, written and read."""

    @classmethod
    def of(cls, cache: KVCache, heads: int, dtype: torch.dtype, multiprocessors: int) -> PrefixPlan:
        """``heads`` query heads attend to ``cache`` in ``dtype``."""
        _, _, kv_heads, _, size = cache.values.shape
        keys = 64 if size <= 128 else 32
        tile = PrefillPlan(32, 32, 4, 1) if dtype == torch.float32 else PrefillPlan(64, keys, 4, 1)
        a_key = size * cache.values.element_size() + (0 if cache.scales is None else 4)
        return cls(
            tile, heads // kv_heads, cdiv(2 * multiprocessors, kv_heads), 2 * kv_heads * a_key,
            2 * heads * (size + 1) * 4,
        )  # fmt: skip

    def others(self, dtype: torch.dtype, size: int) -> list[PrefixPlan]:
        """Plans that may be faster, with as many query rows: they fetch keys ahead of their use, or more at a time."""
        if dtype == torch.float32 or size > 128:
            return []
        rows = self.tile.rows
        tiles = (PrefillPlan(rows, 64, 4, 3), PrefillPlan(rows, 128, 4, 2), PrefillPlan(rows, 64, 8, 2))
        return [replace(self, tile=tile) for tile in tiles]

    @property
    def rows(self) -> int:
        """Decodes of one program."""
        return self.tile.tokens(self.group)

    def items(self, decodes: int) -> int:
        """Room for programs a key/value head in a step of so many decodes, whatever they share."""
        return max(self.programs, 2 * -(-decodes // self.rows) + 8)

    def lay_out(
        self, groups: list[Group], decodes: int, block_size: int, least: int = LAUNCH_BYTES
    ) -> list[Ints] | None:
        """``SharedPrefixes`` of the groups, flat; None if these would save no more than ``least`` bytes a layer.

        The largest groups first, as far as there is room. The keys are cut so that all programs have work, into equal
        pieces.
        """
        room, taken, tiles = self.items(decodes), [], 0
        for group in sorted(groups, key=lambda group: -len(group.rows) * group.blocks):
            more = cdiv(len(group.rows), self.rows)
            if tiles + more <= room and self._gain(group, LEAST_KEYS, block_size) > 0:
                taken.append(group)
                tiles += more
        each = self._piece(taken, room, block_size)
        if sum(self._gain(group, each, block_size) for group in taken) <= least:
            return None
        rows, members = np.zeros((3, decodes), dtype=np.int32), np.zeros(decodes, dtype=np.int32)
        items = np.zeros((room, 4), dtype=np.int32)
        at = number = 0
        for group in taken:
            keys = group.blocks * block_size
            members[at : at + len(group.rows)] = group.rows
            for begin in range(0, len(group.rows), self.rows):
                some = group.rows[begin : begin + self.rows]
                starts = np.arange(0, keys, each)
                mine = items[number : number + len(starts)]
                mine[:, 0], mine[:, 1] = at + begin, len(some)
                mine[:, 2], mine[:, 3] = starts, np.minimum(starts + each, keys)
                rows[0, some], rows[2, some] = keys, len(starts)
                rows[1, some] = number * self.rows + np.arange(len(some))
                number += len(starts)
            at += len(group.rows)
        return [rows.reshape(-1), members, items.reshape(-1)]

    def _piece(self, groups: list[Group], room: int, block_size: int) -> int:
        """Keys of a piece, so many that all pieces are no more than ``room``."""
        block = self.tile.block
        work = [(-(-len(group.rows) // self.rows), group.blocks * block_size) for group in groups]
        free = max(1, room - sum(tiles for tiles, _ in work))  # each tile's last piece may be a short one
        each = max(LEAST_KEYS, -(-sum(tiles * keys for tiles, keys in work) // free))
        return -(-each // block) * block

    def _gain(self, group: Group, each: int, block_size: int) -> int:
        """Bytes of one layer that need not be moved."""
        count, keys = len(group.rows), group.blocks * block_size
        saved = (count - -(-count // self.rows)) * keys * self.key_bytes
        return saved - count * -(-keys // each) * self.result_bytes


def attend_prefixes(
    qkv: torch.Tensor,
    cache: KVCache,
    step: AttentionInput,
    num_heads: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    plan: PrefixPlan,
) -> PrefixParts | None:
    """Attention of the step's decodes to the keys that they share, for ``attention.attend``; None: they share none."""
    prefixes = step.prefixes
    if prefixes is None:
        return None
    _, _, kv_heads, block_size, size = cache.values.shape
    results = len(prefixes.items) * plan.rows
    values = torch.empty(results, num_heads, size, dtype=torch.float32, device=qkv.device)
    sums = torch.empty(results, num_heads, dtype=torch.float32, device=qkv.device)
    tile = plan.tile
    _prefix_kernel[(len(prefixes.items), kv_heads)](
        qkv, step.slots, step.positions, step.tables, step.tables.stride(0), prefixes.members, prefixes.items,
        cache.values, cache.values if cache.scales is None else cache.scales, values, sums,
        scale * cache.k_scale, cache.v_scale, softcap or 1.0,
        num_heads, kv_heads, size, max(32, next_power_of_2(size)), tile.rows, tile.block, block_size,
        window or 0, softcap is not None, cache.scales is not None, dot_type(qkv.dtype, cache.values.dtype),
        tile.stages, **tile.launch,
    )  # fmt: skip
    return PrefixParts(prefixes.rows, plan.rows, values, sums)
