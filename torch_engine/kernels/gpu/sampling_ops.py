"""Choosing tokens on the device, in Triton's language: see ``core/sampling.py`` for what is computed.

All of it is launches without a word from the host, so that it lives in a CUDA graph, and rows of every kind mix: a
program looks at its row's flags and leaves what the row does not ask for. What a request asks for lies in tables by
slot, and so does what was said (``Tables``): the kernels keep the latter up themselves, so that the next step's
sampling knows this step's token before the host does.

The row is read in parts of ``PART`` columns, whatever the batch. Nothing is sorted: where top-k or top-p leave tokens
out, the last value that stays is found by narrowing the interval it lies in (``sampling_cutoff.py``).

Shapes: R rows of logits, N columns (the vocabulary), P parts, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from flightline.torch_engine.kernels.gpu.launch import LAUNCH, begin_kernel, cdiv, kernel, next_power_of_2
from flightline.torch_engine.kernels.gpu.sampling_cutoff import (
    begin_interval,
    gather_kernel,
    is_kept,
    limits_of,
    round_kernel,
    search_kernel,
    settle_kernel,
)
from flightline.torch_engine.kernels.gpu.sampling_logits import (
    adjusted_logits,
    asked_logits,
    by_part,
    gumbel,
    is_last,
    log_sum_exp,
    log_sum_exps,
    raw_logits,
    slot_and_position,
)
from flightline.torch_engine.kernels.gpu.sampling_tables import (
    CANDIDATES,
    COUNTED,
    DRAWN,
    FLOATS,
    INTEGERS,
    MOST_TOP,
    MOST_WORD_TOKENS,
    MOST_WORDS,
    PART,
    RING,
    ROUNDS,
    SEEN,
    SPLIT,
    TRUNCATED,
    WORDED,
    Choice,
    Tables,
)

_PART = tl.constexpr(PART)
_RING = tl.constexpr(RING)
_TOP = tl.constexpr(MOST_TOP)
_WORDS = tl.constexpr(MOST_WORDS)
_WORD_TOKENS = tl.constexpr(MOST_WORD_TOKENS)
_INTEGERS = tl.constexpr(INTEGERS)
_FLOATS = tl.constexpr(FLOATS)
_DRAWN = tl.constexpr(DRAWN)
_SEEN = tl.constexpr(SEEN)
_COUNTED = tl.constexpr(COUNTED)
_WORDED = tl.constexpr(WORDED)
_TRUNCATED = tl.constexpr(TRUNCATED)
_MOST = tl.constexpr(3.4028234663852886e38)
_NONE = tl.constexpr(2147483647)


@kernel()
def _words_kernel(
    logit_rows, slots, positions, integers, word_tokens, word_ends, ring, matched, kept, arrived,
    PICKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Which bad words of several tokens are all but said; sets the row's counters to 0."""
    begin_kernel()
    row = tl.program_id(0).to(tl.int64)
    tl.store(kept + row, 0)
    tl.store(arrived + row, 0)
    slot, position = slot_and_position(row, logit_rows, slots, positions, PICKED)
    count = tl.load(integers + slot * _INTEGERS + 6)
    back = tl.arange(0, _RING)
    place = position - 1 - back
    said = tl.load(ring + slot * _RING + (place + _RING) % _RING)
    said = tl.where(place >= 0, said, -1)
    for first in range(0, count, BLOCK):
        word = first + tl.arange(0, BLOCK)
        known = word < count
        end = tl.load(word_ends + slot * _WORDS + word, mask=known, other=0)
        begin = tl.load(word_ends + slot * _WORDS + word - 1, mask=known & (word > 0), other=0)
        asked = back[None, :] < (end - begin)[:, None]
        token = tl.load(
            word_tokens + slot * _WORD_TOKENS + end[:, None] - 1 - back[None, :],
            mask=asked & known[:, None],
            other=-1,
        )
        wrong = tl.sum((asked & (token != said[None, :])).to(tl.int32), 1)
        tl.store(matched + slot * _WORDS + word, (wrong == 0).to(tl.int32), mask=known)


@kernel()
def _scan_kernel(
    logits, scales, logit_rows, slots, positions,
    integers, floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed,
    tops, lows, places, sums, raw_tops, raw_sums, arrived, ends, masses,
    N: tl.constexpr, P: tl.constexpr, SCALED: tl.constexpr, CAP: tl.constexpr, PICKED: tl.constexpr,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Of each part: highest and lowest logit, where the highest is, and log-sum-exps of what will be drawn from.

    Of a row that leaves tokens out also the interval in which the last value lies that stays.
    """
    begin_kernel()
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, position = slot_and_position(row, logit_rows, slots, positions, PICKED)
    flags = tl.load(integers + slot * _INTEGERS)
    first = split * WIDTH * _PART
    columns = first + tl.arange(0, WIDTH * _PART)
    mask = columns < N
    part = split * WIDTH + tl.arange(0, WIDTH)
    at, inside = row * P + part, part < P
    values = raw_logits(logits, scales, row, columns, mask, N, SCALED, CAP)
    if tl.load(integers + slot * _INTEGERS + 5) >= 0:
        tl.store(raw_tops + at, tl.max(by_part(values, WIDTH), 1), mask=inside)
        tl.store(raw_sums + at, log_sum_exps(by_part(values, WIDTH)), mask=inside)
    values = adjusted_logits(
        values, slot, flags, position, first, columns, mask, tl.load(integers + slot * _INTEGERS + 4),
        floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed, N, P, WIDTH,
    )  # fmt: skip
    values = by_part(values, WIDTH)
    columns = by_part(columns, WIDTH)
    top = tl.max(values, 1)
    tl.store(tops + at, top, mask=inside)
    here = (columns < N) & (values == top[:, None])
    tl.store(places + at, tl.min(tl.where(here, columns, _NONE), 1), mask=inside)
    temperature = tl.load(floats + slot * _FLOATS)
    if flags & _TRUNCATED:
        lowest = tl.min(tl.where(values == float("-inf"), _MOST, values), 1)
        tl.store(lows + at, lowest, mask=inside)
        top_k, top_p = limits_of(integers, slot)
        if is_last(arrived, row, SPLITS) & ((top_k > 0) | (top_p < 1)):
            begin_interval(tops, lows, ends, masses, row, temperature, top_k, top_p, N, P, PARTS)
    elif flags & _DRAWN:
        tl.store(sums + at, log_sum_exps(values * (1.0 / temperature)), mask=inside)


@kernel()
def _sum_kernel(
    logits, scales, logit_rows, slots, positions,
    integers, floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed,
    tops, bounds, cuts, sums,
    N: tl.constexpr, P: tl.constexpr, SCALED: tl.constexpr, CAP: tl.constexpr, PICKED: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of the parts of rows that leave tokens out."""
    begin_kernel()
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, position = slot_and_position(row, logit_rows, slots, positions, PICKED)
    flags = tl.load(integers + slot * _INTEGERS)
    if flags & _TRUNCATED:
        part = split * WIDTH + tl.arange(0, WIDTH)
        at, inside = row * P + part, part < P
        bound, cut = tl.load(bounds + row), tl.load(cuts + row)
        result = tl.full([WIDTH], float("-inf"), tl.float32)
        if tl.max(tl.load(tops + at, mask=inside, other=float("-inf")), 0) >= bound:
            first = split * WIDTH * _PART
            columns = first + tl.arange(0, WIDTH * _PART)
            values = asked_logits(
                logits, scales, row, slot, flags, position, first, tl.load(integers + slot * _INTEGERS + 4),
                floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed,
                N, P, SCALED, CAP, WIDTH,
            )  # fmt: skip
            values = tl.where(is_kept(values, columns, bound, cut), values, float("-inf"))
            result = log_sum_exps(by_part(values * (1.0 / tl.load(floats + slot * _FLOATS)), WIDTH))
        tl.store(sums + at, result, mask=inside)


@kernel()
def _draw_kernel(
    logits, scales, logit_rows, slots, positions,
    integers, floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed, ring,
    tops, places, sums, raw_sums, bounds, cuts, last, tokens, log_probs,
    N: tl.constexpr, P: tl.constexpr, SCALED: tl.constexpr, CAP: tl.constexpr, PICKED: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Chooses the token of a row, and notes that it was said."""
    begin_kernel()
    row = tl.program_id(0).to(tl.int64)
    slot, position = slot_and_position(row, logit_rows, slots, positions, PICKED)
    flags = tl.load(integers + slot * _INTEGERS)
    number = tl.arange(0, PARTS)
    highest = tl.load(tops + row * P + number, mask=number < P, other=float("-inf"))
    top = tl.max(highest, 0)
    token = tl.min(
        tl.where(highest == top, tl.load(places + row * P + number, mask=number < P, other=_NONE), _NONE), 0
    )
    if ((flags & _DRAWN) != 0) & (top > float("-inf")):
        low, high = tl.load(integers + slot * _INTEGERS + 2), tl.load(integers + slot * _INTEGERS + 3)
        total = tl.load(sums + row * P + number, mask=number < P, other=float("-inf"))
        score = tl.where(
            total == float("-inf"), float("-inf"), total + gumbel(low, high, number, position, 1)
        )
        part = tl.min(tl.where(score == tl.max(score, 0), number, _NONE), 0)
        columns = part * _PART + tl.arange(0, _PART)
        values = asked_logits(
            logits, scales, row, slot, flags, position, part * _PART, tl.load(integers + slot * _INTEGERS + 4),
            floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed,
            N, P, SCALED, CAP, 1,
        )  # fmt: skip
        if flags & _TRUNCATED:
            stays = is_kept(values, columns, tl.load(bounds + row), tl.load(cuts + row))
            values = tl.where(stays, values, float("-inf"))
        score = values / tl.load(floats + slot * _FLOATS) + gumbel(low, high, columns, position, 0)
        score = tl.where(values == float("-inf"), float("-inf"), score)
        token = tl.min(tl.where(score == tl.max(score, 0), columns, _NONE), 0)
    if top == float("-inf"):
        tl.store(tokens + row, -1)
        tl.store(last + slot, 0)  # a token that exists; the host ends the request
    else:
        tl.store(tokens + row, token)
        tl.store(last + slot, token)
        if tl.load(integers + slot * _INTEGERS + 5) >= 0:
            raw = tl.load(raw_sums + row * P + number, mask=number < P, other=float("-inf"))
            value = raw_logits(logits, scales, row, token, token < N, N, SCALED, CAP)
            tl.store(log_probs + row, value - log_sum_exp(raw))
        if flags & _SEEN:
            place = seen + slot * ((N + 31) // 32) + token // 32
            tl.store(place, tl.load(place) | (1 << (token % 32)))
        if flags & _COUNTED:
            place = counts + slot * N + token
            tl.store(place, tl.load(place) + 1)
        if flags & _WORDED:
            tl.store(ring + slot * _RING + position % _RING, token)


@kernel()
def _top_kernel(
    logits, scales, logit_rows, slots, positions, integers, raw_tops, raw_sums, top_ids, top_log_probs,
    N: tl.constexpr, P: tl.constexpr, SCALED: tl.constexpr, CAP: tl.constexpr, PICKED: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The likeliest tokens of a row, one after the other: each is the highest of the part that has the highest left."""
    begin_kernel()
    row = tl.program_id(0).to(tl.int64)
    slot, _ = slot_and_position(row, logit_rows, slots, positions, PICKED)
    wanted = tl.load(integers + slot * _INTEGERS + 5)
    if wanted > 0:
        number = tl.arange(0, PARTS)
        left = tl.load(raw_tops + row * P + number, mask=number < P, other=float("-inf"))
        total = log_sum_exp(tl.load(raw_sums + row * P + number, mask=number < P, other=float("-inf")))
        taken = tl.full([PARTS], -1, tl.int32)  # of each part the last token that was told
        told = tl.full([PARTS], 0.0, tl.float32)  # and its logit
        for rank in range(wanted):
            top = tl.max(left, 0)
            part = tl.min(tl.where(left == top, number, _NONE), 0)
            columns = part * _PART + tl.arange(0, _PART)
            values = raw_logits(logits, scales, row, columns, columns < N, N, SCALED, CAP)
            before = tl.sum(tl.where(number == part, taken, 0), 0)
            value = tl.sum(tl.where(number == part, told, 0.0), 0)
            if before >= 0:
                after = (values < value) | ((values == value) & (columns > before))
                values = tl.where(after, values, float("-inf"))
            token = tl.min(tl.where((values == top) & (columns < N), columns, _NONE), 0)
            tl.store(top_ids + row * _TOP + rank, token)
            tl.store(top_log_probs + row * _TOP + rank, top - total)
            rest = tl.where((values < top) | ((values == top) & (columns > token)), values, float("-inf"))
            taken = tl.where(number == part, token, taken)
            told = tl.where(number == part, top, told)
            left = tl.where(number == part, tl.max(rest, 0), left)


@dataclass
class Scratch:
    """Between the kernels of a step."""

    tops: torch.Tensor
    lows: torch.Tensor
    places: torch.Tensor
    sums: torch.Tensor
    raw_tops: torch.Tensor
    raw_sums: torch.Tensor
    arrived: torch.Tensor
    ends: torch.Tensor
    masses: torch.Tensor
    partials: torch.Tensor
    buffers: torch.Tensor
    buffer_ids: torch.Tensor
    kept: torch.Tensor
    bounds: torch.Tensor
    cuts: torch.Tensor
    unsettled: torch.Tensor

    @classmethod
    def empty(cls, rows: int, parts: int, splits: int, device: torch.device) -> Scratch:
        def made(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        float32, float64, int32 = torch.float32, torch.float64, torch.int32
        return cls(
            made(float32, rows, parts), made(float32, rows, parts), made(int32, rows, parts),
            made(float32, rows, parts), made(float32, rows, parts), made(float32, rows, parts),
            made(int32, rows), made(float32, rows, 2), made(float64, rows, 3), made(float64, rows, splits, 8),
            made(float32, rows, CANDIDATES), made(int32, rows, CANDIDATES), made(int32, rows),
            made(float32, rows), made(int32, rows), made(int32, rows),
        )  # fmt: skip


def sample(
    logits: torch.Tensor,
    column_scales: torch.Tensor | None,
    softcap: float | None,
    logit_rows: torch.Tensor | None,
    slots: torch.Tensor,
    positions: torch.Tensor,
    tables: Tables,
    last: torch.Tensor,
    choice: Choice,
    searches: bool = True,
) -> None:
    """Chooses a token for each row of ``logits`` [R, N], as its slot's request asks, and notes it in ``tables``.

    Args:
        column_scales: [N] float32, of the logits; None = 1.
        logit_rows: [R] int32: the row of the step that each row of logits is of; None = the same.
        slots: [R] int32.
        positions: of the step's rows, int32: of the tokens that went in; the chosen ones stand one further.
        last: [S] int32: gets the tokens by slot.
        choice: gets the tokens by row, and what is told about them.
        searches: whether a row may leave tokens out, have its likeliest tokens told, or bad words of several tokens.
            Without, two of the kernels do.
    """
    rows, size = logits.shape
    parts = cdiv(size, PART)
    span = min(SPLIT, next_power_of_2(parts))
    splits = cdiv(parts, span)
    made = Scratch.empty(rows, parts, splits, logits.device)
    scales = made.tops if column_scales is None else column_scales
    where = (slots if logit_rows is None else logit_rows, slots, positions)
    shape = (size, parts, column_scales is not None, softcap or 0.0, logit_rows is not None)
    said = (
        tables.integers, tables.floats, tables.seen, tables.counts, tables.edit_ids, tables.edit_values,
        tables.edit_when, tables.edit_starts, tables.matched, tables.allowed,
    )  # fmt: skip
    grid = (rows, splits)
    padded = max(next_power_of_2(parts), 2)
    padding = max(next_power_of_2(splits), 2)
    interval = (made.arrived, made.ends, made.masses)
    if searches:
        _words_kernel[(rows,)](
            *where, tables.integers, tables.word_tokens, tables.word_ends, tables.ring, tables.matched, made.kept,
            made.arrived, logit_rows is not None, 64, **LAUNCH,
        )  # fmt: skip
    _scan_kernel[grid](
        logits, scales, *where, *said, made.tops, made.lows, made.places, made.sums, made.raw_tops, made.raw_sums,
        *interval, *shape, span, padded, splits, **LAUNCH,
    )  # fmt: skip
    if searches:
        for number in range(ROUNDS):
            round_kernel[grid](
                logits, scales, *where, *said, made.tops, *interval, made.partials,
                *shape, span, padded, splits, padding, CANDIDATES, number == 0, **LAUNCH,  # the others are one kernel
            )  # fmt: skip
        gather_kernel[grid](
            logits, scales, *where, *said, made.tops, made.ends, made.masses, made.buffers, made.buffer_ids, made.kept,
            *shape, span, CANDIDATES, **LAUNCH,
        )  # fmt: skip
        settle_kernel[(rows,)](
            *where, tables.integers, tables.floats, made.tops, made.ends, made.masses, made.buffers, made.buffer_ids,
            made.kept, made.bounds, made.cuts, made.unsettled, size, parts,
            logit_rows is not None, CANDIDATES, padded, num_warps=8, **LAUNCH,
        )  # fmt: skip
        width = min(8, next_power_of_2(parts))
        search_kernel[(rows,)](
            logits, scales, *where, *said, made.tops, made.lows, made.buffers, made.bounds, made.cuts, made.unsettled,
            *shape, width, CANDIDATES, padded, 4, num_warps=16 if width == 8 else 4, **LAUNCH,
        )  # fmt: skip
        _sum_kernel[grid](
            logits, scales, *where, *said, made.tops, made.bounds, made.cuts, made.sums, *shape, span, **LAUNCH,
        )  # fmt: skip
    _draw_kernel[(rows,)](
        logits, scales, *where, *said, tables.ring, made.tops, made.places, made.sums, made.raw_sums, made.bounds,
        made.cuts, last, choice.tokens, choice.log_probs, *shape, padded, **LAUNCH,
    )  # fmt: skip
    if searches:
        _top_kernel[(rows,)](
            logits, scales, *where, tables.integers, made.raw_tops, made.raw_sums, choice.top_ids,
            choice.top_log_probs, *shape, padded, **LAUNCH,
        )  # fmt: skip
