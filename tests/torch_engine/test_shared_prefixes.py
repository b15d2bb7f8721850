"""Which rows share the beginning of their block tables."""

from __future__ import annotations

import random

import numpy as np
import pytest

from flightline.torch_engine.core.shared_prefixes import LEAST_BLOCKS, MOST_GROUPS, find_groups


def found(tables: list[list[int]], limits: list[int] | None = None) -> list[tuple[list[int], int]]:
    """Of tables in slots that are not in the order of the rows; each group's rows and blocks."""
    width = max(map(len, tables)) + 2
    slots = list(range(len(tables)))[::-1]
    array = np.zeros((len(tables) + 3, width), dtype=np.int32)
    for slot, table in zip(slots, tables, strict=True):
        array[slot, : len(table)] = table
    counted = np.array(limits or [len(table) - 1 for table in tables], dtype=np.int32)
    groups = find_groups(array, np.array(slots, dtype=np.int32), counted)
    return [(sorted(map(int, group.rows)), group.blocks) for group in groups]


def own(number: int, count: int = 3) -> list[int]:
    """Blocks of nobody else."""
    return [10_000 + 100 * number + at for at in range(count)]


COMMON = list(range(1, 41))


def test_nothing_in_common() -> None:
    assert found([own(number, 20) for number in range(5)]) == []
    assert found([COMMON]) == []


def test_a_short_beginning_is_none() -> None:
    short, enough = COMMON[: LEAST_BLOCKS - 1], COMMON[:LEAST_BLOCKS]
    assert found([short + own(number, 9) for number in range(4)]) == []
    assert found([enough + own(number, 9) for number in range(4)]) == [([0, 1, 2, 3], LEAST_BLOCKS)]


def test_only_what_counts() -> None:
    """A row's own token is not in the blocks that count."""
    tables = [COMMON + own(number) for number in range(3)]
    assert found(tables, [9, 20, 30]) == [([1, 2], 20)]  # 20 blocks are saved, by all three only 18
    assert found(tables, [12, 13, 14]) == [([0, 1, 2], 12)]
    assert found(tables, [7, 40, 40]) == [([1, 2], 40)]


def test_an_outlier_does_not_shorten_the_others() -> None:
    tables = [COMMON[:9] + own(number) for number in range(2)] + [COMMON + own(9 + n) for n in range(6)]
    assert found(tables) == [([2, 3, 4, 5, 6, 7], 40), ([0, 1], 9)]


def test_groups_within_groups() -> None:
    """All share 30 blocks, of which halves go on together for 2 or for 50 more."""
    for more, expected in ((2, [(list(range(8)), 30)]), (50, [([0, 1, 2, 3], 80), ([4, 5, 6, 7], 80)])):
        tables = [
            COMMON[:30] + [500 + 100 * (number // 4) + at for at in range(more)] + own(number)
            for number in range(8)
        ]
        assert found(tables) == expected


def test_equal_content_in_other_blocks_is_not_shared() -> None:
    """Where two computed the same first block, they meet behind it; a table that is read for others must have all."""
    assert found([[7, *COMMON, *own(0)], [8, *COMMON, *own(1)]]) == []


def test_two_rows_of_one_table() -> None:
    """A guess is a row more of the same slot."""
    array = np.array([COMMON], dtype=np.int32)
    groups = find_groups(array, np.array([0, 0, 0], dtype=np.int32), np.array([30, 30, 31], dtype=np.int32))
    assert [(list(group.rows), group.blocks) for group in groups] == [([0, 1, 2], 30)]


@pytest.mark.parametrize("seed", range(20))
def test_groups_are_disjoint_and_true(seed: int) -> None:
    chance = random.Random(seed)
    tables = []
    for number in range(chance.randrange(2, 60)):
        begin = chance.choice(tables)[: chance.randrange(40)] if tables and chance.random() < 0.7 else []
        tables.append([*begin, *own(number, chance.randrange(1, 40))])
    groups = found(tables)
    rows = [row for members, _ in groups for row in members]
    assert len(rows) == len(set(rows)) and len(groups) <= MOST_GROUPS
    for members, blocks in groups:
        assert len(members) > 1 and blocks >= LEAST_BLOCKS
        assert len({tuple(tables[row][:blocks]) for row in members}) == 1
        assert all(blocks < len(tables[row]) for row in members)
