"""The tensors of a step, against what they are computed from, token by token."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from torch_engine.runner import StepBuilder
from torch_engine.scheduler import Chunk


def sequence(chance: random.Random, length: int) -> SimpleNamespace:
    made = SimpleNamespace(
        tokens=[chance.randrange(999) for _ in range(length)], num_computed=0, block_table=[]
    )
    return Hashable(vars(made))


class Hashable(SimpleNamespace):
    def __init__(self, values: dict) -> None:
        super().__init__(**values)

    __hash__ = object.__hash__


def check(builder: StepBuilder, chunks: list[Chunk], size: int) -> None:
    step = builder.build(chunks)
    tokens, positions, slots, wanted = [], [], [], []
    for chunk in chunks:
        table, begin = chunk.sequence.block_table, chunk.sequence.num_computed
        tokens += chunk.inputs
        positions += range(begin, begin + chunk.num_tokens)
        slots += [table[p // size] * size + p % size for p in range(begin, begin + chunk.num_tokens)]
        wanted += range(len(tokens) - chunk.num_sampled, len(tokens))
    assert step.token_ids.tolist() == tokens
    assert step.positions.tolist() == positions
    assert step.slots.tolist() == slots
    assert (list(range(len(tokens))) if step.logit_rows is None else step.logit_rows.tolist()) == wanted
    decodes = [chunk for chunk in chunks if chunk.num_tokens == 1]
    assert step.decode_lengths.tolist() == [chunk.sequence.num_computed + 1 for chunk in decodes]
    for chunk, row, length in zip(
        decodes, step.decode_blocks.tolist(), step.decode_lengths.tolist(), strict=True
    ):
        used = -(-length // size)
        assert row[:used] == chunk.sequence.block_table[:used]
    row = len(decodes)
    for chunk, prefill in zip(chunks[len(decodes) :], step.prefills, strict=True):
        end = chunk.sequence.num_computed + chunk.num_tokens
        assert (prefill.start, prefill.end, prefill.context) == (row, row + chunk.num_tokens, end)
        assert prefill.blocks.tolist() == chunk.sequence.block_table[: -(-end // size)]
        row += chunk.num_tokens


@pytest.mark.parametrize("seed", range(5))
def test_steps_of_growing_ending_and_preempted_sequences(seed: int) -> None:
    """More sequences and longer ones than the builder begins with, in random order, some of which lose their blocks."""
    chance, size = random.Random(seed), 4
    builder = StepBuilder(size, torch.device("cpu"))
    live: list[Hashable] = []
    for _ in range(60):
        live += [sequence(chance, chance.randrange(1, 200)) for _ in range(chance.randrange(3))]
        for gone in chance.sample(live, len(live) // 15):
            live.remove(gone)
            builder.forget(gone)
        for lost in chance.sample(live, len(live) // 10):
            lost.num_computed, lost.block_table = 0, []
        chunks = []
        for one in live:
            remaining = len(one.tokens) - one.num_computed
            count = chance.choice([1, min(remaining, 7), remaining])
            blocks = -(-(one.num_computed + count) // size)
            one.block_table += [chance.randrange(999) for _ in range(blocks - len(one.block_table))]
            chunks.append(Chunk(one, count, count == remaining, (5,) * chance.randrange(count)))
        chunks.sort(key=lambda chunk: chunk.num_tokens > 1)
        if not chunks:
            continue
        check(builder, chunks, size)
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.num_tokens
            if chunk.samples:
                chunk.sequence.tokens.append(7)
