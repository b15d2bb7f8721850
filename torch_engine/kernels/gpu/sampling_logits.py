"""The logits of a row as its request asks for them, and what all kernels of sampling share."""

from __future__ import annotations

import triton
import triton.language as tl

from flightline.torch_engine.kernels.gpu.sampling_tables import (
    COUNTED,
    EDITED,
    FLOATS,
    MASKED,
    MOST_EDITS,
    MOST_WORDS,
    PART,
    SEEN,
)

_PART = tl.constexpr(PART)
_EDITS = tl.constexpr(MOST_EDITS)
_WORDS = tl.constexpr(MOST_WORDS)
_FLOATS = tl.constexpr(FLOATS)
_SEEN = tl.constexpr(SEEN)
_COUNTED = tl.constexpr(COUNTED)
_EDITED = tl.constexpr(EDITED)
_MASKED = tl.constexpr(MASKED)
_MOST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def gumbel(low, high, numbers, position, STREAM: tl.constexpr):
    """Gumbel noise for token ids or part numbers: Philox-4x32-10 with the seed's halves as key."""
    seed = (high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low.to(tl.uint32, bitcast=True).to(
        tl.uint64
    )
    counter = (numbers // 4).to(tl.uint32)
    zero = counter * 0
    a, b, c, d = tl.philox(seed, counter, zero + position.to(tl.uint32), zero + STREAM, zero)
    lane = numbers % 4
    word = tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d)))
    v = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 1 - 5.960464477539063e-08)
    # -log1p(-v): the series where 1 - v would lose digits, so that large noise keeps all 32 bits
    series = v * (
        1 + v * (0.5 + v * (0.33333334 + v * (0.25 + v * (0.2 + v * (0.16666667 + v * 0.14285715)))))
    )
    return -tl.log(tl.where(v < 0.0625, series, -tl.log(1 - v)))


@triton.jit
def _clean(values):
    """NaN counts as -inf, +inf as the largest number, and there is one zero: ``_key`` would tell two apart."""
    values = tl.where(values != values, float("-inf"), tl.minimum(values, _MOST))
    return tl.where(values == 0, 0.0, values)


@triton.jit
def raw_logits(logits, scales, row, columns, mask, N: tl.constexpr, SCALED: tl.constexpr, CAP: tl.constexpr):
    """The model's logits in float32, as they are before anything is asked for."""
    values = tl.load(logits + row * N + columns, mask=mask, other=float("-inf")).to(tl.float32)
    if SCALED:
        values *= tl.load(scales + columns, mask=mask, other=1.0)
    if CAP > 0:
        values = CAP * (1 - 2 / (tl.exp(2 * values / CAP) + 1))
    return tl.where(mask, _clean(values), float("-inf"))


@triton.jit
def adjusted_logits(
    values, slot, flags, position, first, columns, mask, ends_from,
    floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed,
    N: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Bias and bans, then penalties, then the mask, of columns ``first`` and following, ``WIDTH`` parts of them."""
    if flags & (_EDITED | _SEEN | _COUNTED | _MASKED):
        if flags & _EDITED:
            part = first // _PART
            begin = tl.load(edit_starts + slot * (P + 1) + part)
            end = tl.load(edit_starts + slot * (P + 1) + tl.minimum(part + WIDTH, P))
            for number in range(begin, end):
                when = tl.load(edit_when + slot * _EDITS + number)
                holds = when == -1
                if when == -2:
                    holds = position < ends_from
                if when >= 0:
                    holds = tl.load(matched + slot * _WORDS + when) != 0
                amount = tl.load(edit_values + slot * _EDITS + number)
                here = (columns == tl.load(edit_ids + slot * _EDITS + number)) & holds
                values = tl.where(here, values + amount, values)
        if flags & _SEEN:
            penalty = tl.load(floats + slot * _FLOATS + 2)
            words = tl.load(seen + slot * ((N + 31) // 32) + columns // 32, mask=mask, other=0)
            said = ((words >> (columns % 32)) & 1) != 0
            values = tl.where(said, tl.where(values > 0, values / penalty, values * penalty), values)
        if flags & _COUNTED:
            presence = tl.load(floats + slot * _FLOATS + 3).to(tl.float64)
            frequency = tl.load(floats + slot * _FLOATS + 4).to(tl.float64)
            count = tl.load(counts + slot * N + columns, mask=mask, other=0)
            amount = (presence + frequency * count.to(tl.float64)).to(tl.float32)
            values = tl.where(count > 0, values - amount, values)
        if flags & _MASKED:
            words = tl.load(allowed + slot * ((N + 31) // 32) + columns // 32, mask=mask, other=0)
            values = tl.where(((words >> (columns % 32)) & 1) != 0, values, float("-inf"))
        values = tl.where(mask, _clean(values), float("-inf"))
    return values


@triton.jit
def asked_logits(
    logits, scales, row, slot, flags, position, first, ends_from,
    floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed,
    N: tl.constexpr, P: tl.constexpr, SCALED: tl.constexpr, CAP: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Logits of columns ``first`` and following, ``WIDTH`` parts of them, as the request asks for them."""
    columns = first + tl.arange(0, WIDTH * _PART)
    mask = columns < N
    values = raw_logits(logits, scales, row, columns, mask, N, SCALED, CAP)
    values = adjusted_logits(
        values, slot, flags, position, first, columns, mask, ends_from,
        floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed, N, P, WIDTH,
    )  # fmt: skip
    return values


@triton.jit
def log_sum_exp(values):
    """log(sum(exp(values))) of a block; -inf of nothing."""
    most = tl.max(values, 0)
    base = tl.where(most == float("-inf"), 0.0, most)
    return base + tl.log(tl.sum(tl.exp(values - base), 0))


@triton.jit
def log_sum_exps(values):
    """The same of each row of [rows, columns]."""
    most = tl.max(values, 1)
    base = tl.where(most == float("-inf"), 0.0, most)
    return base + tl.log(tl.sum(tl.exp(values - base[:, None]), 1))


@triton.jit
def by_part(values, WIDTH: tl.constexpr):
    return tl.reshape(values, [WIDTH, _PART])


@triton.jit
def is_last(arrived, row, SPLITS: tl.constexpr):
    """Whether this program is the last of its row's ``SPLITS`` to come here: it may read what the others stored."""
    tl.debug_barrier()  # the whole program has stored before one thread of it says so
    number = tl.atomic_add(arrived + row, 1)
    if number == SPLITS - 1:
        tl.store(arrived + row, 0)
    return number == SPLITS - 1


@triton.jit
def slot_and_position(row, logit_rows, slots, positions, PICKED: tl.constexpr):
    """Slot of a row of logits, and the position of the token that it chooses."""
    at = row
    if PICKED:
        at = tl.load(logit_rows + row).to(tl.int64)
    return tl.load(slots + row).to(tl.int64), tl.load(positions + at) + 1
