"""What the sampling kernels need to know of each slot, put on the device when a sequence gets the slot.

From then on the kernels keep it up themselves (``kernels/gpu/sampling_tables.py``). Most requests ask for a few
numbers, which travel together; those with penalties, a bias or bad words have tables of their own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flightline.torch_engine.core.grammar import Grammar
from flightline.torch_engine.core.request import Code, RequestError
from flightline.torch_engine.core.sampling_state import SamplingState
from flightline.torch_engine.core.sequence import Sequence
from flightline.torch_engine.kernels.gpu import sampling_tables as ops

NOTHING = np.zeros(ops.INTEGERS, dtype=np.int32), np.zeros(ops.FLOATS, dtype=np.float32)
NOTHING[0][ops.NUM_TOP] = -1
Move = tuple[int, int, int, tuple[int, ...]]
"""The other slot, the slot, the position of the first token, and the tokens."""


class Masks:
    """Masks of tokens for one step on their way, behind the slots that they are for: pinned here, and on the device."""

    def __init__(self, count: int, words: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.most, self._words = count, words
        self._host = torch.empty(count * (2 + words), dtype=torch.int32, pin_memory=on_gpu)
        self._there = torch.empty_like(self._host, device=device)
        self._stream = torch.cuda.Stream(device) if on_gpu else None
        if self._stream is not None:  # what had this memory before may still be computed with
            self._stream.wait_stream(torch.cuda.current_stream())

    def parts(self, count: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Here, to be written: slots int64 [count], and masks uint32 [count, words]."""
        slots, masks = self._parts(self._host, count)
        return slots.numpy(), masks.numpy().view(np.uint32)

    def put(self, count: int, table: torch.Tensor) -> None:
        """Queues that they are in their slots' rows of ``table`` [slots, words or fewer] when the device has computed
        what is queued so far. They get there on a stream of their own, meanwhile: whoever has read these rows before
        must have done so."""
        size = count * (2 + self._words)
        with torch.cuda.stream(self._stream):  # None: no other than the current one
            self._there[:size].copy_(self._host[:size], non_blocking=True)
            slots, masks = self._parts(self._there, count)
            table.index_copy_(0, slots, masks[:, : table.shape[1]])
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def _parts(self, where: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        slots, masks = where[: count * (2 + self._words)].split([2 * count, count * self._words])
        return slots.view(torch.int64), masks.view(count, self._words)


class DeviceSampling:
    """The tables of all slots."""

    def __init__(self, slots: int, vocab: int, device: torch.device) -> None:
        self.tables = ops.Tables.empty(slots, vocab, device)
        self.tables.integers[:, ops.NUM_TOP] = -1
        self._vocab = vocab
        self._device = device
        self._asks = [False] * slots
        """Whether a slot's numbers on the device ask for anything."""
        self._new: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {}
        self._masks = [Masks(0, 1, device) for _ in range(2)]

    @staticmethod
    def check(sequence: Sequence) -> None:
        """Raises RequestError: INVALID_ARG if the tables cannot hold what it asks for."""
        request = sequence.request
        several = [word for word in request.bad_ids if len(word) > 1]
        edits = len(request.sampling.logit_bias) + len(request.bad_ids) + len(sequence.end_ids)
        for count, most, what in (
            (edits, ops.MOST_EDITS, "tokens with a bias, bad words and end ids together"),
            (len(several), ops.MOST_WORDS, "bad words of several tokens"),
            (sum(len(word) - 1 for word in several), ops.MOST_WORD_TOKENS, "tokens in bad words"),
            (max(map(len, several), default=0), ops.RING, "tokens in one bad word"),
        ):
            if count > most:
                raise RequestError(
                    Code.INVALID_ARG, f"the request has {count} {what}: on a GPU it may have {most}"
                )

    def assign(self, slot: int, sequence: Sequence) -> None:
        """The slot is this sequence's from the next :meth:`flush` on."""
        if sequence.samples_on_device and not sequence.request.min_tokens:
            if self._asks[slot]:
                self._new[slot] = NOTHING
                self._asks[slot] = False
            return
        state = sequence.sampling_state(self._vocab)
        flags = self._tables(slot, sequence, state)
        if sequence.request.guide is not None:
            flags |= ops.MASKED
        if not state.greedy:
            flags |= ops.DRAWN
            if state.top_k or state.top_p < 1 or state.least > -np.inf:
                flags |= ops.TRUNCATED
        integers, floats = NOTHING[0].copy(), NOTHING[1].copy()
        integers[[ops.FLAGS, ops.TOP_K, ops.ENDS_FROM, ops.NUM_TOP]] = (
            flags, state.top_k, state.ends_from, state.num_top
        )  # fmt: skip
        integers[[ops.SEED_LOW, ops.SEED_HIGH]] = np.array([state.seed], dtype="<u8").view(np.int32)
        integers[[ops.TOP_P_LOW, ops.TOP_P_HIGH]] = np.array([state.top_p], dtype="<f8").view(np.int32)
        if flags & ops.WORDED:
            integers[ops.NUM_WORDS] = sum(len(word) > 1 for word in self._words(sequence))
        params = sequence.request.sampling
        floats[:] = (
            state.temperature or 1.0, state.least, state.repetition, params.presence_penalty,
            params.frequency_penalty,
        )  # fmt: skip
        self._new[slot] = integers, floats
        self._asks[slot] = True

    def flush(self) -> None:
        """Queues what is new on its way to the device, in one piece."""
        if not self._new:
            return
        slots = np.array(list(self._new), dtype=np.int64)
        integers, floats = (np.stack(rows) for rows in zip(*self._new.values(), strict=True))
        self._new.clear()
        both = self._up(np.concatenate([integers, floats.view(np.int32)], axis=1))
        where = self._up(slots)
        self.tables.integers.index_copy_(0, where, both[:, : ops.INTEGERS])
        self.tables.floats.index_copy_(0, where, both[:, ops.INTEGERS :].view(torch.float32))

    def new_masks(self, count: int) -> NDArray[Any]:
        """Where the masks of ``count`` slots are to be written for :meth:`allow`: uint32 [count, words].

        Two places take turns, since the copy of the last step's masks may still be under way; that of the step before
        it is not, because its tokens have been fetched.
        """
        self._masks.reverse()
        if self._masks[0].most < count:
            self._masks[0] = Masks(1 << (count - 1).bit_length(), Grammar.words(self._vocab), self._device)
        return self._masks[0].parts(count)[1]

    def allow(self, slots: list[int]) -> None:
        """Queues that only what the new masks say may come next, one mask a slot. All tokens that were chosen by older
        masks have been fetched."""
        self._masks[0].parts(len(slots))[0][:] = slots
        self._masks[0].put(len(slots), self.tables.allowed)

    def fork(self, moves: list[Move]) -> None:
        """Queues that slots become what others will be when some tokens more have been said there."""
        most = max(len(tokens) for *_, tokens in moves)
        rows = [[*where, *tokens, *[-1] * (most - len(tokens))] for *where, tokens in moves]
        ops.fork(self.tables, self._up(np.array(rows, dtype=np.int32)))

    def _up(self, values: NDArray[Any]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        if self._device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    # What a few requests ask for ----------------------------------------------------------------------

    def _tables(self, slot: int, sequence: Sequence, state: SamplingState) -> int:
        """Fills the slot's rows of the tables that the request needs; returns the flags for them."""
        tables, flags, params = self.tables, 0, sequence.request.sampling
        if state.repetition != 1.0:
            flags |= ops.SEEN
            width = tables.seen.shape[1]
            tables.seen[slot].copy_(self._up(state.seen.view(np.int32)[:width]))
        if params.presence_penalty or params.frequency_penalty:
            flags |= ops.COUNTED
            tables.counts[slot].zero_()
            if sequence.num_generated:
                ids, counts = np.unique(sequence.tokens[sequence.num_prompt :], return_counts=True)
                tables.counts[slot].index_copy_(0, self._up(ids), self._up(counts.astype(np.int16)))
        words = [word for word in self._words(sequence) if len(word) > 1]
        if words:
            flags |= ops.WORDED
            ends = np.cumsum([len(word) - 1 for word in words]).astype(np.int32)
            heads = np.array([token for word in words for token in word[:-1]], dtype=np.int32)
            tables.word_tokens[slot, : len(heads)] = self._up(heads)
            tables.word_ends[slot, : len(words)] = self._up(ends)
            length = len(sequence.tokens)
            ring = np.full(ops.RING, -1, dtype=np.int32)
            for place in range(max(0, length - ops.RING), length):
                ring[place % ops.RING] = sequence.tokens[place]
            tables.ring[slot].copy_(self._up(ring))
        edits = [(int(token), float(value), ops.ALWAYS) for token, value in params.logit_bias]
        edits += [(int(token), -np.inf, ops.ALWAYS) for token in state.banned]
        edits += [(word[-1], -np.inf, number) for number, word in enumerate(words)]
        edits += [(int(token), -np.inf, ops.TOO_SHORT) for token in state.ends]
        edits = [edit for edit in edits if edit[0] < self._vocab]
        if edits:
            flags |= ops.EDITED
            edits.sort(key=lambda edit: edit[0] // ops.PART)  # stable: a token's own stay in their order
            ids, values, when = (np.array(column) for column in zip(*edits, strict=True))
            starts = np.searchsorted(ids // ops.PART, np.arange(tables.edit_starts.shape[1]))
            tables.edit_ids[slot, : len(ids)] = self._up(ids.astype(np.int32))
            tables.edit_values[slot, : len(ids)] = self._up(values.astype(np.float32))
            tables.edit_when[slot, : len(ids)] = self._up(when.astype(np.int32))
            tables.edit_starts[slot].copy_(self._up(starts.astype(np.int32)))
        return flags

    def _words(self, sequence: Sequence) -> list[tuple[int, ...]]:
        return [word for word in sequence.request.bad_ids if word and 0 <= word[-1] < self._vocab]
