from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from flightline.torch_engine.core.blocks import NOWHERE, ROOT, BlockEvent, BlockManager


def fill(blocks: BlockManager, tokens: list[int]) -> list[int]:
    """What a sequence does: match, take, allocate the rest, register the full ones."""
    known = blocks.match(tokens)
    blocks.take(known)
    [table] = known.tables
    table += blocks.allocate(blocks.blocks_for(len(tokens)) - len(table))
    content, size = None, blocks.block_size
    for number in range(len(tokens) // size):
        content = blocks.register([table[number]], content, tokens[number * size : (number + 1) * size])
    return table


def known(blocks: BlockManager, tokens: list[int]) -> list[int]:
    [table] = blocks.match(tokens).tables
    return table


def test_a_prefix_is_shared_and_the_last_token_never_matches() -> None:
    blocks = BlockManager(8, 4)
    first = fill(blocks, [1, 2, 3, 4, 5, 6, 7, 8])
    assert known(blocks, [1, 2, 3, 4, 5, 6, 7, 8]) == first[:1]
    assert known(blocks, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == first
    assert known(blocks, [1, 2, 3, 4, 9, 6, 7, 8, 9]) == first[:1]
    assert known(blocks, [2, 2, 3, 4, 5]) == []


def test_same_tokens_after_another_prefix_do_not_match() -> None:
    blocks = BlockManager(8, 2)
    fill(blocks, [1, 1, 7, 7])
    fill(blocks, [2, 2])
    assert len(known(blocks, [2, 2, 7, 7, 0])) == 1


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
    assert known(blocks, [1, 2, 3, 4, 5]) == table[:2]
    blocks.allocate(1)
    assert len(known(blocks, [1, 2, 3, 4, 5])) == 2, "a blank block goes first"
    blocks.allocate(1)
    assert len(known(blocks, [1, 2, 3, 4, 5])) == 1, "then the end of the oldest sequence"
    with pytest.raises(MemoryError, match="2 KV blocks asked for, 1 of 3 are free"):
        blocks.allocate(2)
    assert blocks.num_free == 1


def test_no_reuse_when_switched_off() -> None:
    blocks = BlockManager(4, 2, enable_reuse=False)
    fill(blocks, [1, 2, 3])
    assert known(blocks, [1, 2, 3]) == []


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


class Traffic:
    """Sequences that come, grow, leave their windows behind and end, over blocks whose content is kept account of."""

    def __init__(self, seed: int, windows: tuple[int | None, ...], host: int, num_blocks: int = 40) -> None:
        self.dice = random.Random(seed)
        self.blocks = BlockManager(num_blocks, 2, windows=windows, num_host_blocks=host, stride=seed % 3 + 1)
        self.there: dict[int, object] = {}
        self.on_host: dict[int, object] = {}
        self.live: list[SimpleNamespace] = []

    def start(self) -> None:
        tokens = [self.dice.randrange(2) for _ in range(self.dice.randrange(1, 24))]
        known = self.blocks.match(tokens)
        count = self.blocks.blocks_for(len(tokens))
        if self.blocks.num_free < count * self.blocks.num_groups:
            return
        self.blocks.take(known)
        one = SimpleNamespace(
            tokens=tokens, tables=known.tables, computed=known.num_tokens,
            content=known.contents[-1] if known.contents else None,
        )  # fmt: skip
        self.live.append(one)
        for table in one.tables:
            table += self.blocks.allocate(count - len(table))
        self.move()
        self.look(one)
        for number in range(known.num_tokens // 2, count):
            self.write(one, number)

    def write(self, one: SimpleNamespace, number: int) -> None:
        """Computes a block of a sequence; full ones are registered."""
        begin, end = 2 * number, min(2 * number + 2, len(one.tokens))
        for group, table in enumerate(one.tables):
            self.there[table[number]] = (group, tuple(one.tokens[:end]))
        one.computed = end
        if end - begin == 2:
            indices = [table[number] for table in one.tables]
            one.content = self.blocks.register(indices, one.content, one.tokens[begin:end])

    def move(self) -> None:
        moves = self.blocks.take_moves()
        if moves is None:
            return
        for index, host in moves.saved:
            self.on_host[host] = self.there[index]
        for host, index in moves.restored:
            self.there[index] = self.on_host[host]

    def look(self, one: SimpleNamespace) -> None:
        """What the sequence sees is what it, or another one with the same tokens, has computed."""
        for group, table in enumerate(one.tables):
            for number in range(self.blocks.first_seen(one.computed, group), one.computed // 2):
                assert self.there[table[number]] == (group, tuple(one.tokens[: 2 * number + 2]))

    def leave(self, one: SimpleNamespace) -> None:
        for group, table in enumerate(one.tables):
            first = self.blocks.first_seen(one.computed // 2 * 2, group)
            self.blocks.free([index for index in table[:first] if index != NOWHERE], left_behind=True)
            table[:first] = [NOWHERE] * first

    def end(self, one: SimpleNamespace) -> None:
        self.live.remove(one)
        for indices in zip(*(reversed(table) for table in one.tables), strict=True):
            self.blocks.free([index for index in indices if index != NOWHERE])

    def turn(self) -> None:
        if self.live and self.dice.random() < 0.5:
            one = self.dice.choice(self.live)
            self.dice.choice([self.leave, self.end])(one)
        else:
            self.start()
        for one in self.live:
            self.look(one)
        self.blocks.check([table for one in self.live for table in one.tables])


@pytest.mark.parametrize("windows", [(None,), (None, 5, 5), (3,), (None, None, 4, 7)])
@pytest.mark.parametrize("host", [0, 3, 60])
def test_whatever_goes_where_a_sequence_sees_its_own_tokens(
    windows: tuple[int | None, ...], host: int
) -> None:
    restored = 0
    for seed in range(3):
        traffic = Traffic(seed, windows, host)
        for _ in range(300):
            traffic.turn()
        for one in list(traffic.live):
            traffic.end(one)
        traffic.blocks.check([])
        assert traffic.blocks.num_free == traffic.blocks.num_blocks
        restored += traffic.blocks.host.num_restored
    assert restored > 0 if host == 60 else host or not restored


def test_a_window_needs_its_own_blocks_alone() -> None:
    blocks = BlockManager(20, 2, windows=(None, 4))
    tokens = list(range(12))
    tables = [blocks.allocate(6), blocks.allocate(6)]
    content = None
    for number in range(6):
        indices = [table[number] for table in tables]
        content = blocks.register(indices, content, tokens[2 * number : 2 * number + 2])
    blocks.free(tables[1][:3])
    assert blocks.num_free == 11
    blocks.allocate(11)  # what was behind the window is gone
    whole = blocks.match([*tokens, 12])
    assert whole.num_tokens == 12 and whole.tables == [tables[0], [NOWHERE] * 4 + tables[1][4:]]
    assert blocks.match(tokens[:9]).num_tokens == 0, "it would begin behind what is left of the window"


def test_a_host_block_in_use_is_not_given_away() -> None:
    """Of two host blocks both are wanted back, and what makes room for them has nowhere to go."""
    blocks = BlockManager(3, 2, num_host_blocks=2)
    blocks.free(fill(blocks, [1, 2, 3, 4, 5]))
    blocks.free(fill(blocks, [6, 7, 8, 9, 10, 11]))
    first = blocks.take_moves()
    assert len(first.saved) == 2 and not first.restored
    found = blocks.match([1, 2, 3, 4, 5])
    assert found.num_tokens == 4 and len(found.absent) == 2
    blocks.take(found)
    moves = blocks.take_moves()
    assert len(moves.restored) == 2 and not moves.saved
    assert sorted(host for host, _ in moves.restored) == sorted(host for _, host in first.saved)
    blocks.check(found.tables)


def test_a_content_outlives_the_one_after_it() -> None:
    """Its only host block is that of the one after it, which is forgotten then."""
    blocks = BlockManager(3, 2, num_host_blocks=1)
    blocks.free(fill(blocks, [1, 2, 3, 4, 5]))
    held = blocks.allocate(2)
    assert blocks.match([1, 2, 3, 4, 5]).absent == [(0, 1)]
    held += blocks.allocate(1)
    blocks.check([held])
    found = blocks.match([1, 2, 3, 4, 5])
    assert found.num_tokens == 2 and found.absent == [(0, 0)]


def test_what_was_left_behind_is_not_worth_a_copy() -> None:
    """Unless somebody has begun with it."""
    for begun in (False, True):
        blocks = BlockManager(4, 2, windows=(2,), num_host_blocks=4)
        table = fill(blocks, [1, 2, 3, 4, 5])
        if begun:
            found = blocks.match([1, 2, 9])
            blocks.take(found)
            blocks.free(found.blocks)
        blocks.free(table[:1], left_behind=True)
        blocks.free(table[1:])
        blocks.allocate(4)
        moves = blocks.take_moves()
        assert [index for index, _ in moves.saved] == [*table[:1] * begun, table[1]]
