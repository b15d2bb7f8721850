"""Choosing tokens on the device, in Triton's language: see :mod:`torch_engine.sampling` for what is computed.

All of it is launches without a word from the host, so that it lives in a CUDA graph, and rows of every kind mix: a
program looks at its row's flags and leaves what the row does not ask for. What a request asks for lies in tables by
slot, and so does what was said (``Tables``): the kernels keep the latter up themselves, so that the next step's
sampling knows this step's token before the host does.

The row is read in parts of ``PART`` columns, whatever the batch. Nothing is sorted: where top-k or top-p leave tokens
out, the last value that stays is found by narrowing the interval it lies in (``_round_kernel``), exactly, ties by id.

Shapes: R rows of logits, N columns (the vocabulary), P parts, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl

from torch_engine.kernels.triton_ops import LAUNCH, _begin

PART = 1024
MOST_TOP = 20
MOST_EDITS = 2048
"""Tokens of a request with a bias or a ban: biased ones, bad words' last ones, ends that come too early."""
MOST_WORDS = 1024
"""Bad words of several tokens of a request."""
MOST_WORD_TOKENS = 4096
RING = 64
"""Last tokens of each slot: what a bad word can look back at."""
CANDIDATES = 4096
"""Tokens of a row among which the last one that stays is looked for at once."""
ROUNDS = 3
"""Readings of a row before that: each leaves a ninth of the interval."""
SPLIT = 4
"""Parts that one program of a round reads."""

# Flags of a slot: what its request asks for.
DRAWN, SEEN, COUNTED, EDITED, WORDED, TRUNCATED, MASKED = (1 << bit for bit in range(7))
# When an edit holds: always, while the output is too short to end, or (>= 0) when that bad word is all but said.
ALWAYS, TOO_SHORT = -1, -2
# Columns of the tables of numbers.
FLAGS, TOP_K, SEED_LOW, SEED_HIGH, ENDS_FROM, NUM_TOP, NUM_WORDS, TOP_P_LOW, TOP_P_HIGH, INTEGERS = range(10)
TEMPERATURE, LEAST, REPETITION, PRESENCE, FREQUENCY, FLOATS = range(6)

_PART = tl.constexpr(PART)
_RING = tl.constexpr(RING)
_TOP = tl.constexpr(MOST_TOP)
_EDITS = tl.constexpr(MOST_EDITS)
_WORDS = tl.constexpr(MOST_WORDS)
_WORD_TOKENS = tl.constexpr(MOST_WORD_TOKENS)
_INTEGERS = tl.constexpr(INTEGERS)
_FLOATS = tl.constexpr(FLOATS)
_DRAWN, _SEEN, _COUNTED = tl.constexpr(DRAWN), tl.constexpr(SEEN), tl.constexpr(COUNTED)
_EDITED, _WORDED, _TRUNCATED = tl.constexpr(EDITED), tl.constexpr(WORDED), tl.constexpr(TRUNCATED)
_MASKED = tl.constexpr(MASKED)
_MOST = tl.constexpr(3.4028234663852886e38)
_NONE = tl.constexpr(2147483647)


@dataclass
class Tables:
    """What the slots' requests ask for and have said, on the device."""

    integers: torch.Tensor
    """[S, INTEGERS] int32."""
    floats: torch.Tensor
    """[S, FLOATS] float32."""
    seen: torch.Tensor
    """[S, ceil(N / 32)] int32: a bit for each token of prompt and output, kept where ``SEEN``."""
    counts: torch.Tensor
    """[S, N] int16: how often each token was generated, kept where ``COUNTED``."""
    edit_ids: torch.Tensor
    """[S, MOST_EDITS] int32, ascending by part."""
    edit_values: torch.Tensor
    """[S, MOST_EDITS] float32: what is added to the logit."""
    edit_when: torch.Tensor
    """[S, MOST_EDITS] int32: ALWAYS, TOO_SHORT, or the number of a bad word."""
    edit_starts: torch.Tensor
    """[S, P + 1] int32: where each part's edits begin."""
    word_tokens: torch.Tensor
    """[S, MOST_WORD_TOKENS] int32: bad words of several tokens without their last ones, one after the other."""
    word_ends: torch.Tensor
    """[S, MOST_WORDS] int32: where each ends."""
    ring: torch.Tensor
    """[S, RING] int32: the token at position p is in column p % RING, kept where ``WORDED``."""
    matched: torch.Tensor
    """[S, MOST_WORDS] int32: whether a word is all but said; of this step."""
    allowed: torch.Tensor
    """[S, ceil(N / 32)] int32: a bit for each token that may come next, obeyed where ``MASKED``.

    For a grammar: its row is to be copied after the forward pass is queued and before the choice is, which are
    separate launches, so that it may depend on the last token.
    """

    @classmethod
    def empty(cls, slots: int, vocab: int, device: torch.device) -> Tables:
        def table(columns: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(slots, columns, dtype=dtype, device=device)

        return cls(
            integers=table(INTEGERS), floats=table(FLOATS, torch.float32), seen=table(-(-vocab // 32)),
            counts=table(vocab, torch.int16), edit_ids=table(MOST_EDITS),
            edit_values=table(MOST_EDITS, torch.float32), edit_when=table(MOST_EDITS),
            edit_starts=table(-(-vocab // PART) + 1), word_tokens=table(MOST_WORD_TOKENS),
            word_ends=table(MOST_WORDS), ring=table(RING), matched=table(MOST_WORDS), allowed=table(-(-vocab // 32)),
        )  # fmt: skip

    @property
    def num_bytes(self) -> int:
        tensors = [getattr(self, field.name) for field in fields(self)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass
class Choice:
    """What a step's sampling writes; rows of the batch."""

    tokens: torch.Tensor
    """[R] int32; -1: the row has no finite logit."""
    log_probs: torch.Tensor
    """[R] float32: of the tokens, under the model's own distribution; only of rows that ask."""
    top_ids: torch.Tensor
    """[R, MOST_TOP] int32, the likeliest first; as many as the row asks for."""
    top_log_probs: torch.Tensor
    """[R, MOST_TOP] float32."""

    @classmethod
    def empty(cls, rows: int, device: torch.device | str, pinned: bool = False) -> Choice:
        def made(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device, pin_memory=pinned)

        return cls(
            made(torch.int32, rows), made(torch.float32, rows),
            made(torch.int32, rows, MOST_TOP), made(torch.float32, rows, MOST_TOP),
        )  # fmt: skip


# Random numbers ------------------------------------------------------------------------------------------------------


@triton.jit
def _gumbel(low, high, numbers, position, STREAM: tl.constexpr):
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


# Logits --------------------------------------------------------------------------------------------------------------


@triton.jit
def _clean(values):
    """NaN counts as -inf, +inf as the largest number, and there is one zero: ``_key`` would tell two apart."""
    values = tl.where(values != values, float("-inf"), tl.minimum(values, _MOST))
    return tl.where(values == 0, 0.0, values)


@triton.jit
def _raw(logits, scales, row, columns, mask, N: tl.constexpr, SCALED: tl.constexpr, CAP: tl.constexpr):
    """The model's logits in float32, as they are before anything is asked for."""
    values = tl.load(logits + row * N + columns, mask=mask, other=float("-inf")).to(tl.float32)
    if SCALED:
        values *= tl.load(scales + columns, mask=mask, other=1.0)
    if CAP > 0:
        values = CAP * (1 - 2 / (tl.exp(2 * values / CAP) + 1))
    return tl.where(mask, _clean(values), float("-inf"))


@triton.jit
def _adjusted(
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
def _log_sum(values):
    """log(sum(exp(values))) of a block; -inf of nothing."""
    most = tl.max(values, 0)
    base = tl.where(most == float("-inf"), 0.0, most)
    return base + tl.log(tl.sum(tl.exp(values - base), 0))


@triton.jit
def _where(row, logit_rows, slots, positions, PICKED: tl.constexpr):
    """Slot of a row of logits, and the position of the token that it chooses."""
    at = row
    if PICKED:
        at = tl.load(logit_rows + row).to(tl.int64)
    return tl.load(slots + row).to(tl.int64), tl.load(positions + at) + 1


# Kernels, in the order of their launch -------------------------------------------------------------------------------


@triton.jit
def _words_kernel(
    logit_rows, slots, positions, integers, word_tokens, word_ends, ring, matched,
    PICKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Which bad words of several tokens are all but said."""
    _begin()
    slot, position = _where(tl.program_id(0).to(tl.int64), logit_rows, slots, positions, PICKED)
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


@triton.jit
def _scan_kernel(
    logits, scales, logit_rows, slots, positions,
    integers, floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed,
    tops, lows, places, sums, raw_tops, raw_sums, kept,
    N: tl.constexpr, P: tl.constexpr, SCALED: tl.constexpr, CAP: tl.constexpr, PICKED: tl.constexpr,
):  # fmt: skip
    """Of each part: highest and lowest logit, where the highest is, and log-sum-exps of what will be drawn from."""
    _begin()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, position = _where(row, logit_rows, slots, positions, PICKED)
    flags = tl.load(integers + slot * _INTEGERS)
    columns = part * _PART + tl.arange(0, _PART)
    mask = columns < N
    values = _raw(logits, scales, row, columns, mask, N, SCALED, CAP)
    at = row * P + part
    if part == 0:
        tl.store(kept + row, 0)
    if tl.load(integers + slot * _INTEGERS + 5) >= 0:
        tl.store(raw_tops + at, tl.max(values, 0))
        tl.store(raw_sums + at, _log_sum(values))
    values = _adjusted(
        values, slot, flags, position, part * _PART, columns, mask, tl.load(integers + slot * _INTEGERS + 4),
        floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed, N, P, 1,
    )  # fmt: skip
    top = tl.max(values, 0)
    tl.store(tops + at, top)
    tl.store(places + at, tl.min(tl.where(mask & (values == top), columns, _NONE), 0))
    if flags & _TRUNCATED:
        tl.store(lows + at, tl.min(tl.where(values == float("-inf"), _MOST, values), 0))
    elif flags & _DRAWN:
        tl.store(sums + at, _log_sum(values / tl.load(floats + slot * _FLOATS)))


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
                columns = first + tl.arange(0, BLOCK)
                mask = columns < N
                values = _raw(logits, scales, row, columns, mask, N, SCALED, CAP)
                values = _adjusted(
                    values, slot, flags, position, first, columns, mask, ends_from,
                    floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed, N, P, WIDTH,
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
            columns = first + tl.arange(0, BLOCK)
            mask = columns < N
            values = _raw(logits, scales, row, columns, mask, N, SCALED, CAP)
            values = _adjusted(
                values, slot, flags, position, first, columns, mask, ends_from,
                floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed, N, P, WIDTH,
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
def _limits(integers, slot):
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
        theirs = tl.load(tops + row * P + other, mask=other < P, other=float("-inf"))[None, :]
        ahead = (theirs > mine[:, None]) | ((theirs == mine[:, None]) & (other[None, :] < number[:, None]))
        rank += tl.sum(ahead.to(tl.int32), 1)
    return tl.max(tl.where((rank == count - 1) & (number < P), mine, float("-inf")), 0)


@triton.jit
def _narrowed(
    edges, aboves, partials, row, top_k, top_p,
    SPLITS: tl.constexpr, PADDED: tl.constexpr, ROUNDS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """The interval after a round: its ends, what lies above it, the target, and (of a top-k) what ``low`` reaches."""
    number, split = tl.arange(0, 16), tl.arange(0, PADDED)
    first = row * ROUNDS
    inside = split < SPLITS
    target = top_k.to(tl.float64)
    if top_k == 0:
        masses = tl.load(partials + (first * SPLITS + split) * 16, mask=inside, other=0.0)
        target = top_p * tl.sum(masses, 0)
    place = ((first + ROUND) * SPLITS + split[:, None]) * 16 + number[None, :]
    sums = tl.sum(tl.load(partials + place, mask=inside[:, None], other=0.0), 0)
    above = tl.load(aboves + first + ROUND)
    reaching = (number >= 1) & (number <= 8) & (above + sums >= target)
    at = tl.sum(reaching.to(tl.int32), 0)  # of the eight values the last that reaches it; 0: none
    edge = tl.load(edges + (first + ROUND) * 16 + number)
    low = tl.sum(tl.where(number == at, edge, 0.0), 0)
    high = tl.sum(tl.where(number == at + 1, edge, 0.0), 0)
    reached = above + tl.sum(tl.where(number == at, sums, 0.0), 0)
    above += tl.sum(tl.where(number == at + 1, sums, 0.0), 0)
    return low, high, above, target, reached


@triton.jit
def _lanes(weights):
    """Sum of a block in float64, of neighbours in float32 first: conversions are slow."""
    return tl.sum(tl.sum(tl.reshape(weights, [weights.shape[0] // 8, 8]), 1).to(tl.float64), 0)


@triton.jit
def _round_kernel(
    logits, scales, logit_rows, slots, positions,
    integers, floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed,
    tops, lows, edges, aboves, partials,
    N: tl.constexpr, P: tl.constexpr, SCALED: tl.constexpr, CAP: tl.constexpr, PICKED: tl.constexpr,
    WIDTH: tl.constexpr, CANDIDATES: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr,
    PADDED: tl.constexpr, ROUNDS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Narrows the interval in which the last value lies that stays: what reaches each of eight values in it, by splits.

    Top-k counts tokens; once few enough are of at least ``low`` it has them all. Top-p alone adds masses up.
    """
    _begin()
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, position = _where(row, logit_rows, slots, positions, PICKED)
    flags = tl.load(integers + slot * _INTEGERS)
    top_k, top_p = _limits(integers, slot)
    if ((flags & _TRUNCATED) != 0) & ((top_k > 0) | (top_p < 1)):
        part, number = tl.arange(0, PARTS), tl.arange(0, 16)
        highest = tl.load(tops + row * P + part, mask=part < P, other=float("-inf"))
        top = tl.max(highest, 0)
        temperature = tl.load(floats + slot * _FLOATS)
        settled = (top == float("-inf")).to(tl.int32)
        if ROUND == 0:
            low = tl.min(tl.load(lows + row * P + part, mask=part < P, other=_MOST), 0)
            if top_k == 0:
                low = _nucleus_floor(low, top, temperature, top_p, N)
            elif top_k <= P:
                low = tl.maximum(low, _kth(tops, row, highest, part, top_k, P, PARTS))
            high = _unkey(_key(top) + 1)  # the next number: no token is of at least so much
            above = tl.full([], 0.0, tl.float64)
        else:
            low, high, above, _, reached = _narrowed(
                edges, aboves, partials, row, top_k, top_p, SPLITS, PADDED, ROUNDS, ROUND - 1
            )
            settled |= ((top_k > 0) & (reached <= CANDIDATES)).to(tl.int32)
        step = tl.minimum(high, _MOST) * 0.1111111 - low * 0.1111111
        edge = tl.minimum(tl.maximum(low + number.to(tl.float32) * step, low), high)
        edge = tl.where(number == 0, low, tl.where(number + 16 * settled > 8, high, edge))
        if split == 0:
            tl.store(edges + (row * ROUNDS + ROUND) * 16 + number, edge)
            tl.store(aboves + row * ROUNDS + ROUND, above)
        sums = tl.zeros([16], tl.float64)
        own = split * WIDTH + tl.arange(0, WIDTH)
        reach = tl.max(tl.load(tops + row * P + own, mask=own < P, other=float("-inf")), 0)
        floor = low
        if ROUND == 0:
            floor = tl.where(top_k == 0, float("-inf"), low)  # all the mass of which top-p is a share
        if (settled == 0) & (reach >= floor):
            first = split * WIDTH * _PART
            columns = first + tl.arange(0, WIDTH * _PART)
            mask = columns < N
            values = _raw(logits, scales, row, columns, mask, N, SCALED, CAP)
            values = _adjusted(
                values, slot, flags, position, first, columns, mask, tl.load(integers + slot * _INTEGERS + 4),
                floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed, N, P, WIDTH,
            )  # fmt: skip
            weights = tl.where(values == float("-inf"), 0.0, 1.0)
            if top_k == 0:
                weights = _weights(values, top, 1.0 / temperature, True)
            weights = tl.where((values < high) & (values >= floor), weights, 0.0)
            sums = tl.where(number == 0, _lanes(weights), 0.0)
            for place in tl.static_range(1, 9):
                value = tl.sum(tl.where(number == place, edge, 0.0), 0)
                sums = tl.where(number == place, _lanes(tl.where(values >= value, weights, 0.0)), sums)
        tl.store(partials + ((row * ROUNDS + ROUND) * SPLITS + split) * 16 + number, sums)


@triton.jit
def _gather_kernel(
    logits, scales, logit_rows, slots, positions,
    integers, floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed,
    tops, edges, aboves, partials, buffers, buffer_ids, kept,
    N: tl.constexpr, P: tl.constexpr, SCALED: tl.constexpr, CAP: tl.constexpr, PICKED: tl.constexpr,
    CANDIDATES: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Collects the tokens in what the rounds have left of the interval, in any order."""
    _begin()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, position = _where(row, logit_rows, slots, positions, PICKED)
    flags = tl.load(integers + slot * _INTEGERS)
    top_k, top_p = _limits(integers, slot)
    if ((flags & _TRUNCATED) != 0) & ((top_k > 0) | (top_p < 1)):
        low, high, _, _, reached = _narrowed(
            edges, aboves, partials, row, top_k, top_p, SPLITS, PADDED, ROUNDS, ROUNDS - 1
        )
        if (top_k > 0) & (reached <= CANDIDATES):  # all of at least ``low``
            high = tl.full([], float("inf"), tl.float32)
        reach = tl.load(tops + row * P + part)
        if (reach >= low) & (reach > float("-inf")):
            first = part * _PART
            columns = first + tl.arange(0, _PART)
            mask = columns < N
            values = _raw(logits, scales, row, columns, mask, N, SCALED, CAP)
            values = _adjusted(
                values, slot, flags, position, first, columns, mask, tl.load(integers + slot * _INTEGERS + 4),
                floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed, N, P, 1,
            )  # fmt: skip
            taken = (values >= low) & (values < high)
            inside = taken.to(tl.int32)
            found = tl.sum(inside, 0)
            if found > 0:
                place = tl.atomic_add(kept + row, found) + tl.cumsum(inside, 0) - 1
                fits = taken & (place < CANDIDATES)
                tl.store(buffers + row * CANDIDATES + place, values, mask=fits)
                tl.store(buffer_ids + row * CANDIDATES + place, columns, mask=fits)


@triton.jit
def _settle_kernel(
    logit_rows, slots, positions, integers, floats, tops, edges, aboves, partials, buffers, buffer_ids, kept,
    bounds, cuts, unsettled,
    N: tl.constexpr, P: tl.constexpr, PICKED: tl.constexpr, CANDIDATES: tl.constexpr, PARTS: tl.constexpr,
    SPLITS: tl.constexpr, PADDED: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """What top-k, top-p and min-p leave: values above ``bounds[row]``, and equal ones up to the id ``cuts[row]``.

    Found among the tokens that were collected. Where these do not suffice (a large top-k with a top-p, or thousands of
    equal values), ``unsettled`` says so.
    """
    _begin()
    row = tl.program_id(0).to(tl.int64)
    slot, _ = _where(row, logit_rows, slots, positions, PICKED)
    flags = tl.load(integers + slot * _INTEGERS)
    part = tl.arange(0, PARTS)
    top = tl.max(tl.load(tops + row * P + part, mask=part < P, other=float("-inf")), 0)
    open_ = tl.full([], 0, tl.int32)
    if ((flags & _TRUNCATED) != 0) & (top > float("-inf")):
        top_k, top_p = _limits(integers, slot)
        bound = tl.full([], float("-inf"), tl.float32)
        ties = tl.full([], N, tl.int64)
        number = tl.arange(0, CANDIDATES)
        values = tl.full([CANDIDATES], float("-inf"), tl.float32)
        ids = tl.full([CANDIDATES], N, tl.int32)
        if (top_k > 0) | (top_p < 1):
            low, high, above, target, reached = _narrowed(
                edges, aboves, partials, row, top_k, top_p, SPLITS, PADDED, ROUNDS, ROUNDS - 1
            )
            count = tl.load(kept + row)
            whole = (top_k > 0) & (reached <= CANDIDATES)
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
                    masses = tl.where(known, _weights(values, top, inverse, True), 0.0).to(tl.float64)
                    if top_k > 0:
                        each = tl.exp((bound - top) * inverse).to(tl.float64)
                        over = tl.sum(tl.where(values > bound, masses, 0.0), 0)
                        target = top_p * (over + ties.to(tl.float64) * each)
                        above = above * 0
                    value, before = _bisected(values, masses, low, high, above, target)
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


@triton.jit
def _search_kernel(
    logits, scales, logit_rows, slots, positions,
    integers, floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed,
    tops, lows, buffers, bounds, cuts, unsettled,
    N: tl.constexpr, P: tl.constexpr, SCALED: tl.constexpr, CAP: tl.constexpr, PICKED: tl.constexpr,
    WIDTH: tl.constexpr, CANDIDATES: tl.constexpr, PARTS: tl.constexpr, PASSES: tl.constexpr,
):  # fmt: skip
    """What is kept of rows that :func:`_settle_kernel` left over: one program reads the row as often as it must."""
    _begin()
    row = tl.program_id(0).to(tl.int64)
    slot, position = _where(row, logit_rows, slots, positions, PICKED)
    if tl.load(unsettled + row) != 0:
        flags = tl.load(integers + slot * _INTEGERS)
        number = tl.arange(0, PARTS)
        top = tl.max(tl.load(tops + row * P + number, mask=number < P, other=float("-inf")), 0)
        BLOCK: tl.constexpr = WIDTH * _PART
        ends_from = tl.load(integers + slot * _INTEGERS + 4)
        temperature = tl.load(floats + slot * _FLOATS)
        inverse = 1.0 / temperature
        top_k, top_p = _limits(integers, slot)
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
                columns = first + tl.arange(0, BLOCK)
                mask = columns < N
                values = _raw(logits, scales, row, columns, mask, N, SCALED, CAP)
                values = _adjusted(
                    values, slot, flags, position, first, columns, mask, ends_from,
                    floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed, N, P, WIDTH,
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
                mask = columns < N
                values = _raw(logits, scales, row, columns, mask, N, SCALED, CAP)
                values = _adjusted(
                    values, slot, flags, position, first, columns, mask, ends_from,
                    floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed, N, P, WIDTH,
                )  # fmt: skip
                equal = (mask & (values == bound)).to(tl.int32)
                found = tl.sum(equal, 0)
                if (found > 0) & (passed < ties):
                    rank = passed + tl.cumsum(equal, 0)
                    stays = (equal != 0) & (rank <= ties)
                    cut = tl.maximum(cut, tl.max(tl.where(stays, columns, -1), 0).to(tl.int64))
                passed += found
        tl.store(bounds + row, bound)
        tl.store(cuts + row, cut.to(tl.int32))


@triton.jit
def _stays(values, columns, bound, cut):
    return (values > bound) | ((values == bound) & (columns <= cut))


@triton.jit
def _sum_kernel(
    logits, scales, logit_rows, slots, positions,
    integers, floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed,
    tops, bounds, cuts, sums,
    N: tl.constexpr, P: tl.constexpr, SCALED: tl.constexpr, CAP: tl.constexpr, PICKED: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of the parts of rows that leave tokens out."""
    _begin()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot, position = _where(row, logit_rows, slots, positions, PICKED)
    flags = tl.load(integers + slot * _INTEGERS)
    if flags & _TRUNCATED:
        at = row * P + part
        bound, cut = tl.load(bounds + row), tl.load(cuts + row)
        if tl.load(tops + at) < bound:
            tl.store(sums + at, float("-inf"))
        else:
            columns = part * _PART + tl.arange(0, _PART)
            mask = columns < N
            values = _raw(logits, scales, row, columns, mask, N, SCALED, CAP)
            values = _adjusted(
                values, slot, flags, position, part * _PART, columns, mask,
                tl.load(integers + slot * _INTEGERS + 4),
                floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed, N, P, 1,
            )  # fmt: skip
            values = tl.where(_stays(values, columns, bound, cut), values, float("-inf"))
            tl.store(sums + at, _log_sum(values / tl.load(floats + slot * _FLOATS)))


@triton.jit
def _draw_kernel(
    logits, scales, logit_rows, slots, positions,
    integers, floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed, ring,
    tops, places, sums, raw_sums, bounds, cuts, last, tokens, log_probs,
    N: tl.constexpr, P: tl.constexpr, SCALED: tl.constexpr, CAP: tl.constexpr, PICKED: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Chooses the token of a row, and notes that it was said."""
    _begin()
    row = tl.program_id(0).to(tl.int64)
    slot, position = _where(row, logit_rows, slots, positions, PICKED)
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
            total == float("-inf"), float("-inf"), total + _gumbel(low, high, number, position, 1)
        )
        part = tl.min(tl.where(score == tl.max(score, 0), number, _NONE), 0)
        columns = part * _PART + tl.arange(0, _PART)
        mask = columns < N
        values = _raw(logits, scales, row, columns, mask, N, SCALED, CAP)
        values = _adjusted(
            values, slot, flags, position, part * _PART, columns, mask,
            tl.load(integers + slot * _INTEGERS + 4),
            floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, matched, allowed, N, P, 1,
        )  # fmt: skip
        if flags & _TRUNCATED:
            stays = _stays(values, columns, tl.load(bounds + row), tl.load(cuts + row))
            values = tl.where(stays, values, float("-inf"))
        score = values / tl.load(floats + slot * _FLOATS) + _gumbel(low, high, columns, position, 0)
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
            value = _raw(logits, scales, row, token, token < N, N, SCALED, CAP)
            tl.store(log_probs + row, value - _log_sum(raw))
        if flags & _SEEN:
            place = seen + slot * ((N + 31) // 32) + token // 32
            tl.store(place, tl.load(place) | (1 << (token % 32)))
        if flags & _COUNTED:
            place = counts + slot * N + token
            tl.store(place, tl.load(place) + 1)
        if flags & _WORDED:
            tl.store(ring + slot * _RING + position % _RING, token)


@triton.jit
def _top_kernel(
    logits, scales, logit_rows, slots, positions, integers, raw_tops, raw_sums, top_ids, top_log_probs,
    N: tl.constexpr, P: tl.constexpr, SCALED: tl.constexpr, CAP: tl.constexpr, PICKED: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """The likeliest tokens of a row, one after the other: each is the highest of the part that has the highest left."""
    _begin()
    row = tl.program_id(0).to(tl.int64)
    slot, _ = _where(row, logit_rows, slots, positions, PICKED)
    wanted = tl.load(integers + slot * _INTEGERS + 5)
    if wanted > 0:
        number = tl.arange(0, PARTS)
        left = tl.load(raw_tops + row * P + number, mask=number < P, other=float("-inf"))
        total = _log_sum(tl.load(raw_sums + row * P + number, mask=number < P, other=float("-inf")))
        taken = tl.full([PARTS], -1, tl.int32)  # of each part the last token that was told
        told = tl.full([PARTS], 0.0, tl.float32)  # and its logit
        for rank in range(wanted):
            top = tl.max(left, 0)
            part = tl.min(tl.where(left == top, number, _NONE), 0)
            columns = part * _PART + tl.arange(0, _PART)
            values = _raw(logits, scales, row, columns, columns < N, N, SCALED, CAP)
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
    edges: torch.Tensor
    aboves: torch.Tensor
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
            made(float32, rows, ROUNDS, 16), made(float64, rows, ROUNDS), made(float64, rows, ROUNDS, splits, 16),
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
) -> None:
    """Chooses a token for each row of ``logits`` [R, N], as its slot's request asks, and notes it in ``tables``.

    Args:
        column_scales: [N] float32, of the logits; None = 1.
        logit_rows: [R] int32: the row of the step that each row of logits is of; None = the same.
        slots: [R] int32.
        positions: of the step's rows, int32: of the tokens that went in; the chosen ones stand one further.
        last: [S] int32: gets the tokens by slot.
        choice: gets the tokens by row, and what is told about them.
    """
    rows, size = logits.shape
    parts = triton.cdiv(size, PART)
    span = min(SPLIT, triton.next_power_of_2(parts))
    splits = triton.cdiv(parts, span)
    made = Scratch.empty(rows, parts, splits, logits.device)
    scales = made.tops if column_scales is None else column_scales
    where = (slots if logit_rows is None else logit_rows, slots, positions)
    shape = (size, parts, column_scales is not None, softcap or 0.0, logit_rows is not None)
    said = (
        tables.integers, tables.floats, tables.seen, tables.counts, tables.edit_ids, tables.edit_values,
        tables.edit_when, tables.edit_starts, tables.matched, tables.allowed,
    )  # fmt: skip
    grid = (rows, parts)
    padded = max(triton.next_power_of_2(parts), 2)
    _words_kernel[(rows,)](
        *where, tables.integers, tables.word_tokens, tables.word_ends, tables.ring, tables.matched,
        logit_rows is not None, 64, **LAUNCH,
    )  # fmt: skip
    _scan_kernel[grid](
        logits, scales, *where, *said, made.tops, made.lows, made.places, made.sums, made.raw_tops, made.raw_sums,
        made.kept, *shape, **LAUNCH,
    )  # fmt: skip
    padding = max(triton.next_power_of_2(splits), 2)
    for number in range(ROUNDS):
        _round_kernel[(rows, splits)](
            logits, scales, *where, *said, made.tops, made.lows, made.edges, made.aboves, made.partials,
            *shape, span, CANDIDATES, padded, splits, padding, ROUNDS, number, num_warps=2 * span, **LAUNCH,
        )  # fmt: skip
    _gather_kernel[grid](
        logits, scales, *where, *said, made.tops, made.edges, made.aboves, made.partials, made.buffers,
        made.buffer_ids, made.kept, *shape, CANDIDATES, splits, padding, ROUNDS, **LAUNCH,
    )  # fmt: skip
    _settle_kernel[(rows,)](
        *where, tables.integers, tables.floats, made.tops, made.edges, made.aboves, made.partials, made.buffers,
        made.buffer_ids, made.kept, made.bounds, made.cuts, made.unsettled, size, parts,
        logit_rows is not None, CANDIDATES, padded, splits, padding, ROUNDS, num_warps=8, **LAUNCH,
    )  # fmt: skip
    width = min(8, triton.next_power_of_2(parts))
    _search_kernel[(rows,)](
        logits, scales, *where, *said, made.tops, made.lows, made.buffers, made.bounds, made.cuts, made.unsettled,
        *shape, width, CANDIDATES, padded, 4, num_warps=16 if width == 8 else 4, **LAUNCH,
    )  # fmt: skip
    _sum_kernel[grid](
        logits, scales, *where, *said, made.tops, made.bounds, made.cuts, made.sums, *shape, **LAUNCH
    )
    _draw_kernel[(rows,)](
        logits, scales, *where, *said, tables.ring, made.tops, made.places, made.sums, made.raw_sums, made.bounds,
        made.cuts, last, choice.tokens, choice.log_probs, *shape, padded, **LAUNCH,
    )  # fmt: skip
    _top_kernel[(rows,)](
        logits, scales, *where, tables.integers, made.raw_tops, made.raw_sums, choice.top_ids,
        choice.top_log_probs, *shape, padded, **LAUNCH,
    )  # fmt: skip
