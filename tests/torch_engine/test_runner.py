"""The tensors of a step, against what they are computed from, token by token."""

from __future__ import annotations

import ctypes
import random
from types import SimpleNamespace

import pytest
import torch

from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.core.scheduler import Chunk
from flightline.torch_engine.core.steps import StepBuilder, TensorSteps
from flightline.torch_engine.kernels.cpu.native import NativeKernels, NativeSteps

WINDOWS = (None, 9, 5)
"""Of groups of layers."""


def sequence(chance: random.Random, length: int) -> SimpleNamespace:
    made = SimpleNamespace(
        tokens=[chance.randrange(999) for _ in range(length)], num_computed=0, block_tables=[[], [], []]
    )
    return Hashable(vars(made))


def slot(table: list[int], position: int, size: int) -> int:
    return table[position // size] * size + position % size


class Hashable(SimpleNamespace):
    def __init__(self, values: dict) -> None:
        super().__init__(**values)

    __hash__ = object.__hash__

    @property
    def num_blocks(self) -> int:
        return len(self.block_tables[0])


def check(builder: StepBuilder, chunks: list[Chunk], size: int) -> None:
    step = builder.build(chunks)
    tokens, positions, slots, wanted = [], [], [[], [], []], []
    for chunk in chunks:
        begin = chunk.sequence.num_computed
        tokens += chunk.inputs
        here = range(begin, begin + chunk.num_tokens)
        positions += here
        for table, group in zip(chunk.sequence.block_tables, slots, strict=True):
            group += [slot(table, position, size) for position in here]
        wanted += range(len(tokens) - chunk.num_sampled, len(tokens))
    assert step.token_ids.tolist() == tokens
    assert step.positions.tolist() == positions
    assert [group.tolist() for group in step.slots] == slots
    assert (list(range(len(tokens))) if step.logit_rows is None else step.logit_rows.tolist()) == wanted
    decodes = [chunk for chunk in chunks if chunk.num_tokens == 1]
    assert step.decode_lengths.tolist() == [chunk.sequence.num_computed + 1 for chunk in decodes]
    for group, window in enumerate(WINDOWS):
        for number, chunk in enumerate(decodes):
            length, begin = chunk.sequence.num_computed + 1, int(step.decode_begins[group][number])
            table = chunk.sequence.block_tables[group][begin // size : -(-length // size)]
            assert step.decode_blocks[group][number, : len(table)].tolist() == table
            assert begin == 0 if window is None else begin <= max(length - window, 0) < begin + size
    row = len(decodes)
    for chunk, prefill in zip(chunks[len(decodes) :], step.prefills, strict=True):
        end = chunk.sequence.num_computed + chunk.num_tokens
        assert (prefill.start, prefill.end, prefill.context) == (row, row + chunk.num_tokens, end)
        for group, window in enumerate(WINDOWS):
            begin, table = prefill.begins[group], chunk.sequence.block_tables[group]
            assert prefill.blocks[group].tolist() == table[begin // size : -(-end // size)]
            first = 0 if window is None else max(chunk.sequence.num_computed - window + 1, 0)
            assert begin <= first < begin + size
        row += chunk.num_tokens


def check_native(builder: NativeSteps, chunks: list[Chunk], size: int) -> None:
    """What the compiled library is given, read back from the addresses."""
    step = builder.build(chunks)

    def numbers(address: int, count: int) -> list[int]:
        return list((ctypes.c_int64 * count).from_address(address))

    where, at, tokens, wanted = step.where, 0, [], []
    assert where.chunks == len(chunks) and step.wanted == sum(chunk.num_sampled for chunk in chunks)
    spans = numbers(where.spans, 4 * len(chunks))
    for chunk, span in zip(chunks, zip(*[iter(spans)] * 4, strict=True), strict=True):
        begin, count = chunk.sequence.num_computed, chunk.num_tokens
        positions = range(begin, begin + count)
        assert span[:3] == (at, count, begin + count)
        assert numbers(where.positions + 8 * at, count) == list(positions)
        for group, table in enumerate(chunk.sequence.block_tables):
            there = numbers(where.tables + 8 * (span[3] + group * where.width), -(-span[2] // size))
            assert there == table[: len(there)]
            slots = numbers(where.slots + 8 * (group * where.rows + at), count)
            assert slots == [slot(table, position, size) for position in positions]
        tokens += chunk.inputs
        at += count
        wanted += range(at - chunk.num_sampled, at)
    assert where.rows == at and step.token_ids.tolist() == tokens
    assert numbers(step.logit_rows, step.wanted) == wanted


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_steps_of_growing_ending_and_preempted_sequences(seed: int, native: bool, library: str) -> None:
    """More sequences and longer ones than the builder begins with, in random order, some of which lose their blocks."""
    if native and not library:
        pytest.skip("no C++ compiler")
    chance, size = random.Random(seed), 4
    builder: StepBuilder = TensorSteps(size, torch.device("cpu"), WINDOWS)
    if native:
        config = EngineConfig(model_dir="none", kernel_dir=library)
        builder = NativeKernels(config, torch.device("cpu"), torch.float32, 1).steps(size, WINDOWS)
    live: list[Hashable] = []
    for _ in range(60):
        live += [sequence(chance, chance.randrange(1, 200)) for _ in range(chance.randrange(3))]
        for gone in chance.sample(live, len(live) // 15):
            live.remove(gone)
            builder.forget(gone)
        for lost in chance.sample(live, len(live) // 10):
            lost.num_computed, lost.block_tables = 0, [[], [], []]
        chunks = []
        for one in live:
            remaining = len(one.tokens) - one.num_computed
            count = chance.choice([1, min(remaining, 7), remaining])
            blocks = -(-(one.num_computed + count) // size)
            for table in one.block_tables:
                table += [chance.randrange(999) for _ in range(blocks - len(table))]
            chunks.append(Chunk(one, count, count == remaining, (5,) * chance.randrange(count)))
        chunks.sort(key=lambda chunk: chunk.num_tokens > 1)
        if not chunks:
            continue
        (check_native if native else check)(builder, chunks, size)
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.num_tokens
            if chunk.samples:
                chunk.sequence.tokens.append(7)
