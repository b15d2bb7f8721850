"""Where top-k, top-p and min-p cut a row off: the last value that stays, exactly, ties by id.

Nothing is sorted: the interval that the value lies in is narrowed, round by round, until few enough tokens are
in it to be looked at at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flightline.torch_engine.kernels.gpu.launch import begin_kernel, kernel
from flightline.torch_engine.kernels.gpu.sampling_logits import (
    asked_logits,
    is_last,
    slot_and_position,
)
from flightline.torch_engine.kernels.gpu.sampling_tables import FLOATS, INTEGERS, PART, TRUNCATED

_PART = tl.constexpr(PART)
_INTEGERS = tl.constexpr(INTEGERS)
_FLOATS = tl.constexpr(FLOATS)
_TRUNCATED = tl.constexpr(TRUNCATED)
_MOST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _key(values):
    """Float32 as int32 in the same order."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _unkey(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weights(values, top, inverse, MASS: tl.constexpr):
    """What each token counts for: its mass relative to the likeliest, or 1; ``inverse`` of the temperature."""
    if MASS:
        result = tl.exp((values - top) * inverse)
    else:
        result = tl.where(values == float("-inf"), 0.0, 1.0)
    return result


@triton.jit
def _bisected(values, weights, low, high, above, target):
    """The highest value v at which those of at least v reach ``target``, and what those above v reach.

    ``above`` is part of both; ``weights`` are float64. Known: those of at least ``low`` reach it, and none is of at
    least ``high``.
    """
    keys = _key(values)
    least, most = _key(low), _key(high)  # reaches it, does not
    while most - 1 > least:
        middle = (least >> 1) + (most >> 1) + (least & most & 1)
        if above + tl.sum(tl.where(keys >= middle, weights, 0.0), 0) >= target:
            least = middle
        else:
            most = middle
    return _unkey(least), above + tl.sum(tl.where(keys > least, weights, 0.0), 0)


@triton.jit
def _fitting(target, before, each):
    """How many equal tokens of mass ``each`` top-p keeps after those that reach ``before``: at least one."""
    wanted = (target - before) / each
    count = wanted.to(tl.int64)
    return tl.maximum(count + (count.to(tl.float64) < wanted).to(tl.int64), 1)


@triton.jit
def _nucleus_floor(lowest, top, temperature, top_p, N: tl.constexpr):
    """A value below which there is less mass than top-p leaves out."""
    depth = tl.log(N * 1.0) - tl.log(tl.maximum(1.0 - top_p, 1e-9)) + 1.0
    return tl.maximum(lowest, top - temperature * depth.to(tl.float32))


@triton.jit
def _narrow(
    low, high, target, top, inverse, buffer,
    logits, scales, row, slot, flags, position, ends_from,
    floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed,
    N: tl.constexpr, P: tl.constexpr, SCALED: tl.constexpr, CAP: tl.constexpr, WIDTH: tl.constexpr,
    CANDIDATES: tl.constexpr, PASSES: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """The highest value v at which tokens of at least v reach ``target``, and what those above v reach (float64).

    Known: tokens of at least ``low`` reach it, and none is of at least ``high``.
    """
    BLOCK: tl.constexpr = WIDTH * _PART
    above = tl.full([], 0.0, tl.float64)  # what tokens of at least ``high`` reach: less than the target
    kept = tl.full([], CANDIDATES + 1, tl.int32)
    goes_on = kept > CANDIDATES
    while goes_on:
        for _ in range(PASSES):
            # Four values between the ends; the tokens of at least each of them
            step = tl.minimum(high, _MOST) * 0.2 - low * 0.2
            a, b, c, d = low + step, low + 2 * step, low + 3 * step, low + 4 * step
            sum_a = tl.zeros([BLOCK], tl.float32)
            sum_b = tl.zeros([BLOCK], tl.float32)
            sum_c = tl.zeros([BLOCK], tl.float32)
            sum_d = tl.zeros([BLOCK], tl.float32)
            for first in range(0, N, BLOCK):
                values = asked_logits(
                    logits, scales, row, slot, flags, position, first, ends_from,
                    floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed,
                    N, P, SCALED, CAP, WIDTH,
                )  # fmt: skip
                weights = tl.where(values < high, _weights(values, top, inverse, MASS), 0.0)
                sum_a += tl.where(values >= a, weights, 0.0)
                sum_b += tl.where(values >= b, weights, 0.0)
                sum_c += tl.where(values >= c, weights, 0.0)
                sum_d += tl.where(values >= d, weights, 0.0)
            all_a = above + tl.sum(sum_a.to(tl.float64), 0)
            all_b = above + tl.sum(sum_b.to(tl.float64), 0)
            all_c = above + tl.sum(sum_c.to(tl.float64), 0)
            all_d = above + tl.sum(sum_d.to(tl.float64), 0)
            if all_d >= target:
                low = tl.maximum(low, d)
            elif all_c >= target:
                low, high, above = tl.maximum(low, c), d, all_d
            elif all_b >= target:
                low, high, above = tl.maximum(low, b), c, all_c
            elif all_a >= target:
                low, high, above = tl.maximum(low, a), b, all_b
            else:
                high, above = a, all_a
        # What lies between the ends, if it is little enough
        kept = tl.full([], 0, tl.int32)
        for first in range(0, N, BLOCK):
            values = asked_logits(
                logits, scales, row, slot, flags, position, first, ends_from,
                floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed,
                N, P, SCALED, CAP, WIDTH,
            )  # fmt: skip
            inside = ((values >= low) & (values < high)).to(tl.int32)
            found = tl.sum(inside, 0)
            if found > 0:
                place = kept + tl.cumsum(inside, 0) - 1
                tl.store(buffer + place, values, mask=(inside != 0) & (place < CANDIDATES))
            kept += found
        # Neighbouring numbers have nothing between them: many equal values, which no interval parts
        goes_on = (kept > CANDIDATES) & (low + (tl.minimum(high, _MOST) * 0.2 - low * 0.2) > low)
    value, reached = low, above
    if kept <= CANDIDATES:
        tl.debug_barrier()
        number = tl.arange(0, CANDIDATES)
        few = tl.load(buffer + number, mask=number < kept, other=float("-inf"))
        weights = tl.where(number < kept, _weights(few, top, inverse, MASS), 0.0).to(tl.float64)
        value, reached = _bisected(few, weights, low, high, above, target)
    return value, reached


@triton.jit
def limits_of(integers, slot):
    """Top-k (0: none) and top-p (1: none) of a slot; the latter is a float64 in two integers."""
    low = tl.load(integers + slot * _INTEGERS + 7).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(integers + slot * _INTEGERS + 8).to(tl.uint32, bitcast=True).to(tl.uint64)
    return tl.load(integers + slot * _INTEGERS + 1), (low | (high << 32)).to(tl.float64, bitcast=True)


@triton.jit
def _kth(tops, row, mine, number, count, P: tl.constexpr, PARTS: tl.constexpr):
    """The ``count``-th highest of the parts' highest logits ``mine``; so many tokens are of at least as much."""
    rank = tl.zeros([PARTS], tl.int32)
    for first in range(0, P, 32):
        other = first + tl.arange(0, 32)
        theirs = tl.load(tops + row * P + other, mask=other < P, other=float("-inf"), cache_modifier=".cg")[
            None, :
        ]
        ahead = (theirs > mine[:, None]) | ((theirs == mine[:, None]) & (other[None, :] < number[:, None]))
        rank += tl.sum(ahead.to(tl.int32), 1)
    return tl.max(tl.where((rank == count - 1) & (number < P), mine, float("-inf")), 0)


@triton.jit
def begin_interval(
    tops,
    lows,
    ends,
    masses,
    row,
    temperature,
    top_k,
    top_p,
    N: tl.constexpr,
    P: tl.constexpr,
    PARTS: tl.constexpr,
):
    """The interval before the first round: empty if the row has no finite logit."""
    part = tl.arange(0, PARTS)
    inside = part < P
    highest = tl.load(tops + row * P + part, mask=inside, other=float("-inf"), cache_modifier=".cg")
    lowest = tl.load(lows + row * P + part, mask=inside, other=_MOST, cache_modifier=".cg")
    top, low = tl.max(highest, 0), tl.min(lowest, 0)
    high = top
    if top > float("-inf"):
        high = _unkey(_key(top) + 1)  # the next number: no token is of at least so much
        if top_k == 0:
            low = _nucleus_floor(low, top, temperature, top_p, N)
        elif top_k <= P:
            low = tl.maximum(low, _kth(tops, row, highest, part, top_k, P, PARTS))
    else:
        low = top
    nothing = tl.full([], 0.0, tl.float64)
    _note_interval(ends, masses, row, low, high, nothing, top_k.to(tl.float64), nothing + float("inf"))


@triton.jit
def _note_interval(ends, masses, row, low, high, above, target, count):
    tl.store(ends + row * 2, low)
    tl.store(ends + row * 2 + 1, high)
    tl.store(masses + row * 3, above)
    tl.store(masses + row * 3 + 1, target)
    tl.store(masses + row * 3 + 2, count)


@triton.jit
def _interval(ends, masses, row):
    """Its ends, what lies above it, the target, and no fewer tokens than lie in it; of a top-k what ``low`` reaches."""
    low, high = tl.load(ends + row * 2), tl.load(ends + row * 2 + 1)
    above, target = tl.load(masses + row * 3), tl.load(masses + row * 3 + 1)
    return low, high, above, target, tl.load(masses + row * 3 + 2)


@triton.jit
def _lanes(values, weights, edge):
    """Sums of neighbours' weights, of values of at least ``edge``; float64, for the rest, is slow to get."""
    taken = tl.where(values >= edge, weights, 0.0)
    return tl.sum(tl.reshape(taken, [taken.shape[0] // 8, 8]), 1)


@triton.jit
def _eighth(low, high, number):
    """Where an eighth of the interval begins."""
    step = tl.minimum(high, _MOST) * 0.125 - low * 0.125
    return tl.minimum(tl.maximum(low + number * step, low), high)


@kernel()
def round_kernel(
    logits, scales, logit_rows, slots, positions,
    integers, floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed,
    tops, arrived, ends, masses, partials,
    N: tl.constexpr, P: tl.constexpr, SCALED: tl.constexpr, CAP: tl.constexpr, PICKED: tl.constexpr,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr,
    CANDIDATES: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """Narrows the interval in which the last value lies that stays: what reaches each of its eighths, by splits.

    Top-k counts tokens, top-p alone adds masses up. Once few enough are left the interval stays as it is.
    """
    begin_kernel()
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, position = slot_and_position(row, logit_rows, slots, positions, PICKED)
    flags = tl.load(integers + slot * _INTEGERS)
    top_k, top_p = limits_of(integers, slot)
    if ((flags & _TRUNCATED) != 0) & ((top_k > 0) | (top_p < 1)):
        low, high, above, target, count = _interval(ends, masses, row)
        if (low < high) & (count > CANDIDATES):
            floor = low
            if FIRST:
                floor = tl.where(top_k == 0, float("-inf"), low)  # all the mass of which top-p is a share
            e1, e2, e3, e4 = (
                _eighth(low, high, 1),
                _eighth(low, high, 2),
                _eighth(low, high, 3),
                _eighth(low, high, 4),
            )
            e5, e6, e7 = _eighth(low, high, 5), _eighth(low, high, 6), _eighth(low, high, 7)
            number, part = tl.arange(0, 8), tl.arange(0, PARTS)
            top = tl.max(tl.load(tops + row * P + part, mask=part < P, other=float("-inf")), 0)
            inverse = 1.0 / tl.load(floats + slot * _FLOATS)
            sums = tl.zeros([8], tl.float64)
            own = split * WIDTH + tl.arange(0, WIDTH)
            reach = tl.max(tl.load(tops + row * P + own, mask=own < P, other=float("-inf")), 0)
            if reach >= floor:
                values = asked_logits(
                    logits, scales, row, slot, flags, position, split * WIDTH * _PART,
                    tl.load(integers + slot * _INTEGERS + 4),
                    floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed,
                    N, P, SCALED, CAP, WIDTH,
                )  # fmt: skip
                weights = tl.where(values == float("-inf"), 0.0, 1.0)
                if top_k == 0:
                    weights = _weights(values, top, inverse, True)
                weights = tl.where(values < high, weights, 0.0)
                # [lanes, 8]: joined, each thread keeps its own eight sums, and there is one reduction
                even = tl.join(
                    tl.join(_lanes(values, weights, floor), _lanes(values, weights, e4)),
                    tl.join(_lanes(values, weights, e2), _lanes(values, weights, e6)),
                )
                odd = tl.join(
                    tl.join(_lanes(values, weights, e1), _lanes(values, weights, e5)),
                    tl.join(_lanes(values, weights, e3), _lanes(values, weights, e7)),
                )
                lanes = tl.reshape(tl.join(even, odd), [WIDTH * _PART // 8, 8])
                sums = tl.sum(lanes.to(tl.float64), 0)
            tl.store(partials + (row * SPLITS + split) * 8 + number, sums)
            if is_last(arrived, row, SPLITS):
                other = tl.arange(0, PADDED)[:, None]
                place = partials + (row * SPLITS + other) * 8 + number[None, :]
                sums = tl.sum(tl.load(place, mask=other < SPLITS, other=0.0, cache_modifier=".cg"), 0)
                if FIRST & (top_k == 0):
                    target = top_p * tl.sum(tl.where(number == 0, sums, 0.0), 0)
                reaching = (number >= 1) & (above + sums >= target)
                at = tl.sum(reaching.to(tl.int32), 0)  # of the eighths the last that reaches it
                edge = tl.where(number == 1, e1, tl.where(number == 2, e2, tl.where(number == 3, e3, low)))
                edge = tl.where(number == 4, e4, tl.where(number == 5, e5, tl.where(number == 6, e6, edge)))
                edge = tl.where(number == 7, e7, edge)
                if at < 7:
                    high = tl.sum(tl.where(number == at + 1, edge, 0.0), 0)
                low = tl.sum(tl.where(number == at, edge, 0.0), 0)
                count = above + tl.sum(tl.where(number == at, sums, 0.0), 0)
                above += tl.sum(tl.where(number == at + 1, sums, 0.0), 0)
                if top_k == 0:  # a token has at least the lowest one's mass; and masses are rounded
                    least = tl.exp((low - top) * inverse).to(tl.float64)
                    count = tl.where(least > 0, 1.001 * (count - above) / least, float("inf"))
                _note_interval(ends, masses, row, low, high, above, target, count)


@kernel()
def gather_kernel(
    logits, scales, logit_rows, slots, positions,
    integers, floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed,
    tops, ends, masses, buffers, buffer_ids, kept,
    N: tl.constexpr, P: tl.constexpr, SCALED: tl.constexpr, CAP: tl.constexpr, PICKED: tl.constexpr,
    WIDTH: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Collects the tokens in what the rounds have left of the interval, in any order."""
    begin_kernel()
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, position = slot_and_position(row, logit_rows, slots, positions, PICKED)
    flags = tl.load(integers + slot * _INTEGERS)
    top_k, top_p = limits_of(integers, slot)
    if ((flags & _TRUNCATED) != 0) & ((top_k > 0) | (top_p < 1)):
        low, high, _, _, count = _interval(ends, masses, row)
        if (top_k > 0) & (count <= CANDIDATES):  # all of at least ``low``
            high = tl.full([], float("inf"), tl.float32)
        own = split * WIDTH + tl.arange(0, WIDTH)
        reach = tl.max(tl.load(tops + row * P + own, mask=own < P, other=float("-inf")), 0)
        if (reach >= low) & (reach > float("-inf")):
            first = split * WIDTH * _PART
            columns = first + tl.arange(0, WIDTH * _PART)
            values = asked_logits(
                logits, scales, row, slot, flags, position, first, tl.load(integers + slot * _INTEGERS + 4),
                floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed,
                N, P, SCALED, CAP, WIDTH,
            )  # fmt: skip
            taken = (values >= low) & (values < high)
            place = tl.atomic_add(kept + row + columns * 0, 1, mask=taken, sem="relaxed")
            fits = taken & (place < CANDIDATES)
            tl.store(buffers + row * CANDIDATES + place, values, mask=fits)
            tl.store(buffer_ids + row * CANDIDATES + place, columns, mask=fits)


@kernel()
def settle_kernel(
    logit_rows, slots, positions, integers, floats, tops, ends, masses, buffers, buffer_ids, kept,
    bounds, cuts, unsettled,
    N: tl.constexpr, P: tl.constexpr, PICKED: tl.constexpr, CANDIDATES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What top-k, top-p and min-p leave: values above ``bounds[row]``, and equal ones up to the id ``cuts[row]``.

    Found among the tokens that were collected. Where these do not suffice (a large top-k with a top-p, or thousands of
    equal values), ``unsettled`` says so.
    """
    begin_kernel()
    row = tl.program_id(0).to(tl.int64)
    slot, _ = slot_and_position(row, logit_rows, slots, positions, PICKED)
    flags = tl.load(integers + slot * _INTEGERS)
    part = tl.arange(0, PARTS)
    top = tl.max(tl.load(tops + row * P + part, mask=part < P, other=float("-inf")), 0)
    open_ = tl.full([], 0, tl.int32)
    if ((flags & _TRUNCATED) != 0) & (top > float("-inf")):
        top_k, top_p = limits_of(integers, slot)
        bound = tl.full([], float("-inf"), tl.float32)
        ties = tl.full([], N, tl.int64)
        number = tl.arange(0, CANDIDATES)
        values = tl.full([CANDIDATES], float("-inf"), tl.float32)
        ids = tl.full([CANDIDATES], N, tl.int32)
        if (top_k > 0) | (top_p < 1):
            low, high, above, target, most = _interval(ends, masses, row)
            count = tl.load(kept + row)
            whole = (top_k > 0) & (most <= CANDIDATES)
            if (count > CANDIDATES) | ((top_k > 0) & (top_p < 1) & (whole == 0)):
                open_ = tl.full([], 1, tl.int32)
            else:
                known = number < count
                values = tl.load(buffers + row * CANDIDATES + number, mask=known, other=float("-inf"))
                ids = tl.load(buffer_ids + row * CANDIDATES + number, mask=known, other=N)
                inverse = 1.0 / tl.load(floats + slot * _FLOATS)
                if whole:
                    high = _unkey(_key(top) + 1)
                    above = above * 0
                if top_k > 0:
                    ones = tl.where(known, 1.0, 0.0).to(tl.float64)
                    bound, above = _bisected(values, ones, low, high, above, target)
                    ties = top_k.to(tl.int64) - above.to(tl.int64)
                    low = bound
                if top_p < 1:
                    shares = tl.where(known, _weights(values, top, inverse, True), 0.0).to(tl.float64)
                    if top_k > 0:
                        each = tl.exp((bound - top) * inverse).to(tl.float64)
                        over = tl.sum(tl.where(values > bound, shares, 0.0), 0)
                        target = top_p * (over + ties.to(tl.float64) * each)
                        above = above * 0
                    value, before = _bisected(values, shares, low, high, above, target)
                    each = tl.exp((value - top) * inverse).to(tl.float64)
                    fitting = _fitting(target, before, each)
                    if (top_k > 0) & (value == bound):
                        fitting = tl.minimum(ties, fitting)
                    ties = fitting
                    bound = value
        least = top + tl.load(floats + slot * _FLOATS + 1)
        if least > bound:
            bound = least
            ties = tl.full([], N, tl.int64)
        # The id of the last tie that stays
        equal = values == bound
        cut, before_it = tl.full([], N, tl.int32), tl.full([], -1, tl.int32)
        if tl.sum(equal.to(tl.int64), 0) > ties:
            while cut - 1 > before_it:
                middle = (cut + before_it) // 2
                if tl.sum((equal & (ids <= middle)).to(tl.int64), 0) >= ties:
                    cut = middle
                else:
                    before_it = middle
        tl.store(bounds + row, bound)
        tl.store(cuts + row, cut)
    tl.store(unsettled + row, open_)


@kernel()
def search_kernel(
    logits, scales, logit_rows, slots, positions,
    integers, floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed,
    tops, lows, buffers, bounds, cuts, unsettled,
    N: tl.constexpr, P: tl.constexpr, SCALED: tl.constexpr, CAP: tl.constexpr, PICKED: tl.constexpr,
    WIDTH: tl.constexpr, CANDIDATES: tl.constexpr, PARTS: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """What is kept of rows that :func:`settle_kernel` left over: one program reads the row as often as it must."""
    begin_kernel()
    row = tl.program_id(0).to(tl.int64)
    slot, position = slot_and_position(row, logit_rows, slots, positions, PICKED)
    if tl.load(unsettled + row) != 0:
        flags = tl.load(integers + slot * _INTEGERS)
        number = tl.arange(0, PARTS)
        top = tl.max(tl.load(tops + row * P + number, mask=number < P, other=float("-inf")), 0)
        BLOCK: tl.constexpr = WIDTH * _PART
        ends_from = tl.load(integers + slot * _INTEGERS + 4)
        temperature = tl.load(floats + slot * _FLOATS)
        inverse = 1.0 / temperature
        top_k, top_p = limits_of(integers, slot)
        buffer = buffers + row * CANDIDATES
        lowest = tl.min(tl.load(lows + row * P + number, mask=number < P, other=_MOST), 0)
        end = _unkey(_key(top) + 1)  # the next number: no token is of at least so much
        bound = lowest
        ties = tl.full([], N, tl.int64)
        if top_k > 0:
            begin = lowest
            if top_k <= P:  # as many parts have a token of at least the lowest of their highest
                begin = tl.min(tl.load(tops + row * P + number, mask=number < P, other=_MOST), 0)
                begin = tl.maximum(begin, lowest)
            bound, above = _narrow(
                begin, end, top_k.to(tl.float64), top, inverse, buffer,
                logits, scales, row, slot, flags, position, ends_from,
                floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed,
                N, P, SCALED, CAP, WIDTH, CANDIDATES, PASSES, False,
            )  # fmt: skip
            ties = top_k.to(tl.int64) - above.to(tl.int64)
        if top_p < 1:
            # All that there is to reach
            total = tl.zeros([BLOCK], tl.float32)
            for first in range(0, N, BLOCK):
                values = asked_logits(
                    logits, scales, row, slot, flags, position, first, ends_from,
                    floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed,
                    N, P, SCALED, CAP, WIDTH,
                )  # fmt: skip
                counted = values > bound
                if top_k == 0:
                    counted = values >= bound
                total += tl.where(counted, _weights(values, top, inverse, True), 0.0)
            mass = tl.sum(total.to(tl.float64), 0)
            each = tl.exp((bound - top) * inverse).to(tl.float64)
            if top_k > 0:
                mass += ties.to(tl.float64) * each
            target = mass * top_p
            begin = _nucleus_floor(bound, top, temperature, top_p, N)
            value, before = _narrow(
                begin, end, target, top, inverse, buffer,
                logits, scales, row, slot, flags, position, ends_from,
                floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed,
                N, P, SCALED, CAP, WIDTH, CANDIDATES, PASSES, True,
            )  # fmt: skip
            each = tl.exp((value - top) * inverse).to(tl.float64)
            fitting = _fitting(target, before, each)
            if value > bound:
                ties = fitting
            else:
                ties = tl.minimum(ties, fitting)
            bound = value
        least = top + tl.load(floats + slot * _FLOATS + 1)
        if least > bound:
            bound = least
            ties = tl.full([], N, tl.int64)
        # The id of the last tie that stays
        cut = tl.full([], N, tl.int64)
        if ties < N:
            passed = tl.full([], 0, tl.int64)
            cut = tl.full([], -1, tl.int64)
            for first in range(0, N, BLOCK):
                columns = first + tl.arange(0, BLOCK)
                values = asked_logits(
                    logits, scales, row, slot, flags, position, first, ends_from,
                    floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed,
                    N, P, SCALED, CAP, WIDTH,
                )  # fmt: skip
                equal = ((columns < N) & (values == bound)).to(tl.int32)
                found = tl.sum(equal, 0)
                if (found > 0) & (passed < ties):
                    rank = passed + tl.cumsum(equal, 0)
                    stays = (equal != 0) & (rank <= ties)
                    cut = tl.maximum(cut, tl.max(tl.where(stays, columns, -1), 0).to(tl.int64))
                passed += found
        tl.store(bounds + row, bound)
        tl.store(cuts + row, cut.to(tl.int32))


@triton.jit
def is_kept(values, columns, bound, cut):
    return (values > bound) | ((values == bound) & (columns <= cut))
