from __future__ import annotations

import random

import pytest

from flightline.torch_engine.core.blocks import ROOT, BlockEvent, BlockManager


def fill(blocks: BlockManager, tokens: list[int]) -> list[int]:
    """What a sequence does: match, take, allocate the rest, register the full ones."""
    cached = blocks.match(tokens)
    blocks.share(cached)
    table = cached + blocks.allocate(blocks.blocks_for(len(tokens)) - len(cached))
    uid, size = ROOT, blocks.block_size
    for number in range(len(tokens) // size):
        uid = blocks.register(table[number], uid, tokens[number * size : (number + 1) * size])
    return table


def test_a_prefix_is_shared_and_the_last_token_never_matches() -> None:
    blocks = BlockManager(8, 4)
    first = fill(blocks, [1, 2, 3, 4, 5, 6, 7, 8])
    assert blocks.match([1, 2, 3, 4, 5, 6, 7, 8]) == first[:1]
    assert blocks.match([1, 2, 3, 4, 5, 6, 7, 8, 9]) == first
    assert blocks.match([1, 2, 3, 4, 9, 6, 7, 8, 9]) == first[:1]
    assert blocks.match([2, 2, 3, 4, 5]) == []


def test_same_tokens_after_another_prefix_do_not_match() -> None:
    blocks = BlockManager(8, 2)
    fill(blocks, [1, 1, 7, 7])
    fill(blocks, [2, 2])
    assert len(blocks.match([2, 2, 7, 7, 0])) == 1


def test_shared_blocks_stay_until_the_last_user_frees_them() -> None:
    blocks = BlockManager(4, 2)
    first = fill(blocks, [1, 2, 3, 4, 5])
    second = fill(blocks, [1, 2, 3, 4, 6])
    assert second[:2] == first[:2] and second[2] != first[2]
    blocks.check([first, second])
    blocks.free(first)
    blocks.check([second])
    assert blocks.num_free == 1
    blocks.free(second)
    assert blocks.num_free == 4
    with pytest.raises(AssertionError, match="freed twice"):
        blocks.free(second)


def test_freed_content_is_reused_until_its_block_is_handed_out() -> None:
    blocks = BlockManager(3, 2)
    table = fill(blocks, [1, 2, 3, 4, 5])
    blocks.free(table)
    assert blocks.match([1, 2, 3, 4, 5]) == table[:2]
    blocks.allocate(1)
    assert len(blocks.match([1, 2, 3, 4, 5])) == 2, "a blank block goes first"
    blocks.allocate(1)
    assert len(blocks.match([1, 2, 3, 4, 5])) == 1, "then the end of the oldest sequence"
    with pytest.raises(MemoryError, match="2 KV blocks asked for, 1 of 3 are free"):
        blocks.allocate(2)
    assert blocks.num_free == 1


def test_no_reuse_when_switched_off() -> None:
    blocks = BlockManager(4, 2, enable_reuse=False)
    fill(blocks, [1, 2, 3])
    assert blocks.match([1, 2, 3]) == []


def test_random_traffic_keeps_the_books() -> None:
    chance = random.Random(5)
    blocks = BlockManager(24, 2)
    tables: list[list[int]] = []
    for _ in range(3000):
        if tables and (chance.random() < 0.5 or blocks.num_free < 8):
            blocks.free(tables.pop(chance.randrange(len(tables))))
        else:
            tables.append(fill(blocks, [chance.randrange(2) for _ in range(chance.randrange(1, 14))]))
        blocks.check(tables)
    for table in tables:
        blocks.free(table)
    blocks.check([])
    assert blocks.num_free == 24


def test_who_replays_the_journal_knows_what_can_be_found() -> None:
    """Whatever is evicted and in which order; one who joins late begins with what there is."""
    dice = random.Random(5)
    blocks = BlockManager(12, 2)
    blocks.journal = []
    early: dict[int, BlockEvent] = {}
    late: dict[int, BlockEvent] | None = None

    def replay(known: dict[int, BlockEvent], events: list[BlockEvent]) -> None:
        for event in events:
            if event.tokens:
                assert event.uid not in known
                known[event.uid] = event
            else:
                known.pop(event.uid, None)

    def leads_somewhere(known: dict[int, BlockEvent]) -> set[BlockEvent]:
        found: dict[int, BlockEvent] = {}
        for uid in sorted(known):
            if known[uid].parent_uid in (ROOT, *found):
                found[uid] = known[uid]
        return set(found.values())

    held: list[list[int]] = []
    for step in range(300):
        if held and (dice.random() < 0.5 or blocks.num_free < 6):
            blocks.free(held.pop(dice.randrange(len(held))))
        else:
            held.append(fill(blocks, dice.choices(range(3), k=dice.randint(2, 9))))
        events, blocks.journal = blocks.journal, []
        replay(early, events)
        if late is not None:
            replay(late, events)
            assert leads_somewhere(late) == set(blocks.findable())
        if step == 100:
            late = {event.uid: event for event in blocks.findable()}
        assert leads_somewhere(early) == set(blocks.findable())
    assert early and late


def test_nobody_watches_nothing_is_kept() -> None:
    blocks = BlockManager(4, 2)
    fill(blocks, [1, 2, 3])
    assert blocks.journal is None
