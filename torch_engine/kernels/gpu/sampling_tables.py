"""What the slots' requests ask of their next tokens and have said, in tables on the device.

Shapes: R rows of logits, N columns (the vocabulary), P parts, S slots.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import triton.language as tl

from flightline.torch_engine.kernels.gpu.launch import cdiv, kernel

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
"""Readings of a row before that: each leaves an eighth of the interval."""
SPLIT = 4
"""Parts that one program reads: a program costs a nanosecond even where it has nothing to do."""

# Flags of a slot: what its request asks for.
DRAWN, SEEN, COUNTED, EDITED, WORDED, TRUNCATED, MASKED = (1 << bit for bit in range(7))
# When an edit holds: always, while the output is too short to end, or (>= 0) when that bad word is all but said.
ALWAYS, TOO_SHORT = -1, -2
# Columns of the tables of numbers.
FLAGS, TOP_K, SEED_LOW, SEED_HIGH, ENDS_FROM, NUM_TOP, NUM_WORDS, TOP_P_LOW, TOP_P_HIGH, INTEGERS = range(10)
TEMPERATURE, LEAST, REPETITION, PRESENCE, FREQUENCY, FLOATS = range(6)

_PART = tl.constexpr(PART)
_RING = tl.constexpr(RING)
_EDITS = tl.constexpr(MOST_EDITS)
_WORDS = tl.constexpr(MOST_WORDS)
_WORD_TOKENS = tl.constexpr(MOST_WORD_TOKENS)
_INTEGERS = tl.constexpr(INTEGERS)
_FLOATS = tl.constexpr(FLOATS)
_SEEN = tl.constexpr(SEEN)
_COUNTED = tl.constexpr(COUNTED)
_EDITED = tl.constexpr(EDITED)
_WORDED = tl.constexpr(WORDED)


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
    """[S, ceil(N / 32)] int32: a bit for each token that may come next, applied where ``MASKED``.

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


@kernel()
def _fork_kernel(
    moves, integers, floats, seen, counts, edit_ids, edit_values, edit_when, edit_starts, word_tokens, word_ends, ring,
    N: tl.constexpr, P: tl.constexpr, SAID: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Makes a slot what another one will be when some tokens more have been said there."""
    move = moves + tl.program_id(0).to(tl.int64) * (3 + SAID)
    source, target = tl.load(move).to(tl.int64), tl.load(move + 1).to(tl.int64)
    position = tl.load(move + 2)
    flags = tl.load(integers + source * _INTEGERS)
    first = tl.program_id(1) * _PART
    column = first + tl.arange(0, _PART)
    if flags & _SEEN:
        size = (N + 31) // 32
        word = first // 32 + tl.arange(0, _PART // 32)
        bits = tl.load(seen + source * size + word, mask=word < size, other=0)
        for number in range(SAID):
            token = tl.load(move + 3 + number)
            bits |= tl.where((token >= 0) & (word == token // 32), 1 << (token % 32), 0)
        tl.store(seen + target * size + word, bits, mask=word < size)
    if flags & _COUNTED:
        count = tl.load(counts + source * N + column, mask=column < N, other=0)
        for number in range(SAID):
            count += (column == tl.load(move + 3 + number)).to(tl.int16)
        tl.store(counts + target * N + column, count, mask=column < N)
    if flags & _EDITED:
        for begin in range(first, _EDITS, COLUMNS):
            edit = begin + tl.arange(0, _PART)
            known = edit < _EDITS
            tl.store(
                edit_ids + target * _EDITS + edit,
                tl.load(edit_ids + source * _EDITS + edit, mask=known),
                known,
            )
            values = tl.load(edit_values + source * _EDITS + edit, mask=known)
            tl.store(edit_values + target * _EDITS + edit, values, known)
            tl.store(
                edit_when + target * _EDITS + edit,
                tl.load(edit_when + source * _EDITS + edit, mask=known),
                known,
            )
        start = tl.load(edit_starts + source * (P + 1) + column, mask=column <= P)
        tl.store(edit_starts + target * (P + 1) + column, start, mask=column <= P)
    if flags & _WORDED:
        for begin in range(first, _WORD_TOKENS, COLUMNS):
            place = begin + tl.arange(0, _PART)
            known = place < _WORD_TOKENS
            token = tl.load(word_tokens + source * _WORD_TOKENS + place, mask=known)
            tl.store(word_tokens + target * _WORD_TOKENS + place, token, known)
            known = place < _WORDS
            end = tl.load(word_ends + source * _WORDS + place, mask=known)
            tl.store(word_ends + target * _WORDS + place, end, known)
        if first == 0:
            place = tl.arange(0, _RING)
            last = tl.load(ring + source * _RING + place)
            for number in range(SAID):
                token = tl.load(move + 3 + number)
                last = tl.where((token >= 0) & (place == (position + number) % _RING), token, last)
            tl.store(ring + target * _RING + place, last)
    if first == 0:
        number = tl.arange(0, 16)
        values = tl.load(integers + source * _INTEGERS + number, mask=number < _INTEGERS)
        tl.store(integers + target * _INTEGERS + number, values, mask=number < _INTEGERS)
        amounts = tl.load(floats + source * _FLOATS + number, mask=number < _FLOATS)
        tl.store(floats + target * _FLOATS + number, amounts, mask=number < _FLOATS)


def fork(tables: Tables, moves: torch.Tensor) -> None:
    """Makes slots what others will be when some tokens more have been said there.

    Args:
        moves: [M, 3 + G] int32: the other slot, the slot, the position of the first of the tokens, and the tokens, the
            rest of the row -1. No slot may be both.
    """
    vocab = tables.counts.shape[1]
    parts = cdiv(vocab, PART)
    _fork_kernel[(len(moves), parts)](
        moves, tables.integers, tables.floats, tables.seen, tables.counts, tables.edit_ids, tables.edit_values,
        tables.edit_when, tables.edit_starts, tables.word_tokens, tables.word_ends, tables.ring,
        vocab, parts, moves.shape[1] - 3, parts * PART,
    )  # fmt: skip
