"""Who owns which KV block: reference counts, prefix reuse, least-recently-used eviction, a second tier in host memory.

A block holds the keys and values of ``block_size`` consecutive tokens of one sequence, in the layers of one group
(``core/layer_groups.py``; most models have one group of all layers). A full block may serve every sequence that starts
with the same tokens. The identity of its content is exact, not a hash: ``(content before it, its tokens)``.

A block is in exactly one of three states:

* in use: ``ref_count > 0``;
* cached: ``ref_count == 0``, its content can still be found by identity, first to go is the oldest;
* blank: ``ref_count == 0`` and not findable.

``num_free`` counts cached and blank blocks: both can be handed out.

Where there are host blocks, the content of a cached block that is handed out moves to one of them, and comes back when
a sequence begins with it. A host block keeps its content then, so that a block which goes again need not be copied
again. Who copies is told by :meth:`BlockManager.take_moves`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from flightline.torch_engine.core.layer_groups import most_blocks

ROOT = 0
NOWHERE = -1
"""Stands for a block where there is none: in a block table, because no token to come can see it."""
Identity = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class BlockEvent:
    """A block's content can be found from now on, or no longer: routers send a prompt where its beginning is."""

    uid: int
    parent_uid: int = ROOT
    """ROOT: it holds the beginning of a sequence."""
    tokens: tuple[int, ...] = ()
    """Empty: its content is gone."""


class Moves(NamedTuple):
    """Copies between blocks, before anything else is computed: first all of ``saved``, then all of ``restored``."""

    saved: list[tuple[int, int]]
    """(block, host block)."""
    restored: list[tuple[int, int]]
    """(host block, block)."""


@dataclass(eq=False)
class Content:
    """Tokens that have been computed, after those of ``parent``, and the blocks that hold their keys and values."""

    uid: int
    identity: Identity
    parent: Content | None
    blocks: list[int]
    """For each group of layers; NOWHERE: none holds them."""
    host: list[int]
    """The same in host memory."""
    children: int = 0
    """Contents that name this one as parent: they can only be found through it."""

    def holds(self, group: int) -> bool:
        return self.blocks[group] != NOWHERE or self.host[group] != NOWHERE


class Beginning(NamedTuple):
    """Tokens whose keys and values are known already, with what a sequence sees that goes on after them."""

    num_tokens: int
    tables: list[list[int]]
    """For each group of layers its block table."""
    contents: list[Content]
    absent: list[tuple[int, int]]
    """Group and place in its table of what is in host memory only."""

    @property
    def blocks(self) -> list[int]:
        """All that are in the tables."""
        return [index for table in self.tables for index in table if index != NOWHERE]


@dataclass
class Block:
    index: int
    ref_count: int = 0
    content: Content | None = None
    group: int = 0
    """Of layers; while it has content."""
    found: bool = False
    """A sequence has begun with its content."""
    left_behind: bool = False
    """Its sequence went on without it, and nobody has ever begun with it: not worth a copy to host memory."""


@dataclass
class HostTier:
    """Blocks in host memory, by the content that they hold."""

    num_blocks: int
    blank: list[int] = field(init=False)
    used: OrderedDict[int, tuple[Content, int]] = field(default_factory=OrderedDict)
    """Content and group of each, the least recently used first."""
    saved: dict[int, int] = field(default_factory=dict)
    """Host block <- block: copies that nobody has been told of."""
    restored: dict[int, int] = field(default_factory=dict)
    """Block <- host block."""
    pinned: set[int] = field(default_factory=set)
    """They are read by copies that nobody has been told of."""
    num_saved: int = 0
    num_restored: int = 0
    num_hits: int = 0
    """Sequences for which something came back."""

    def __post_init__(self) -> None:
        self.blank = list(range(self.num_blocks))[::-1]


class BlockManager:
    """Hands out block indices in ``range(num_blocks)``.

    Args:
        windows: of each group of layers, how many tokens a token sees, itself included; None: all.
        num_host_blocks: see above.
        stride: the kernels read keys behind a window's beginning from a multiple of so many tokens on, and ignore them.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_reuse: bool = True,
        windows: Sequence[int | None] = (None,),
        num_host_blocks: int = 0,
        stride: int = 1,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_reuse = enable_reuse
        self.windows = tuple(windows)
        self.has_windows = any(window is not None for window in self.windows)
        self.host = HostTier(num_host_blocks)
        self._stride = stride
        self._blocks = [Block(index) for index in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        """Blocks nobody references, the next to be handed out first."""
        self._by_identity: dict[Identity, Content] = {}
        self._last_uid = ROOT
        self.journal: list[BlockEvent] | None = None
        """What has happened, for whoever empties it; None: nobody does."""
        self.num_reused = 0
        """Blocks that a new sequence found computed already, since the start."""

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_groups(self) -> int:
        return len(self.windows)

    def blocks_for(self, num_tokens: int) -> int:
        """Of one group."""
        return -(-num_tokens // self.block_size)

    def first_seen(self, position: int, group: int) -> int:
        """The first of a sequence's blocks that is read for tokens from ``position`` on."""
        window = self.windows[group]
        if window is None:
            return 0
        return max(position - window + 1, 0) // self._stride * self._stride // self.block_size

    def most_held(self, num_tokens: int, at_once: int) -> int:
        """Blocks of all groups that a sequence of ``num_tokens`` has at most, ``at_once`` of which a step computes."""
        return most_blocks(self.windows, num_tokens, at_once, self.block_size, self._stride)

    # Finding ---------------------------------------------------------------------------------------

    def match(self, tokens: Sequence[int]) -> Beginning:
        """The longest known beginning of ``tokens`` from whose end a sequence can go on; takes no reference.

        That needs what its next token sees: all blocks, or of layers with a window the last ones.
        The last token never matches: at least one has to be computed to give logits.
        """
        found: list[Content] = []
        uid, size = ROOT, self.block_size
        whole = [group for group, window in enumerate(self.windows) if window is None]
        for start in range(0, (len(tokens) - 1) // size * size if self.enable_reuse else 0, size):
            content = self._by_identity.get((uid, tuple(tokens[start : start + size])))
            if content is None or not all(map(content.holds, whole)):
                break
            found.append(content)
            uid = content.uid
        count = len(found)
        while (hole := self._hole(found, count)) is not None:
            count = hole
        return self._beginning(found[:count])

    def _hole(self, contents: list[Content], count: int) -> int | None:
        """Of the first ``count`` one that lacks a block of a window which the token after them sees, the last such one
        of its group; None: all are there."""
        for group, window in enumerate(self.windows):
            if window is None:
                continue
            for number in reversed(range(self.first_seen(count * self.block_size, group), count)):
                if not contents[number].holds(group):
                    return number
        return None

    def _beginning(self, contents: list[Content]) -> Beginning:
        tables, count = [], len(contents)
        for group in range(self.num_groups):
            first = self.first_seen(count * self.block_size, group)
            tables.append([NOWHERE] * first + [content.blocks[group] for content in contents[first:]])
        absent = [
            (group, number)
            for group, table in enumerate(tables)
            for number in range(self.first_seen(count * self.block_size, group), count)
            if table[number] == NOWHERE
        ]
        return Beginning(count * self.block_size, tables, contents, absent)

    def take(self, beginning: Beginning) -> None:
        """Takes a reference on each of its blocks; ``tables`` then has those that come back from host memory, too.

        Raises:
            MemoryError: there are too few free blocks for these.
        """
        _, tables, contents, absent = beginning
        for table in tables:
            self.share([index for index in table if index != NOWHERE])
        for group, number in absent:
            self.host.pinned.add(contents[number].host[group])
        self.host.num_hits += bool(absent)
        for group, number in absent:
            tables[group][number] = self._restore(contents[number], group)

    def _restore(self, content: Content, group: int) -> int:
        """A block to which the content is copied from its host block."""
        [index] = self.allocate(1)
        host = content.host[group]
        self.host.used.move_to_end(host)
        self.host.restored[index] = host
        self.host.num_restored += 1
        block = self._blocks[index]
        block.content, block.group, block.found = content, group, True
        content.blocks[group] = index
        return index

    def num_free_among(self, indices: Sequence[int]) -> int:
        """How many of these blocks nobody references yet, so that taking them uses up free blocks."""
        return sum(index in self._free for index in indices)

    # Giving and freeing ----------------------------------------------------------------------------

    def share(self, indices: Sequence[int]) -> None:
        """Takes one more reference on each block."""
        for index in indices:
            block = self._blocks[index]
            if block.ref_count == 0:
                del self._free[index]
            block.ref_count += 1
            block.found = True

    def allocate(self, count: int) -> list[int]:
        """Takes ``count`` free blocks, blank ones and the least recently used first; their content moves on.

        Raises:
            MemoryError: fewer are free; nothing was taken.
        """
        if count > len(self._free):
            raise MemoryError(f"{count} KV blocks asked for, {len(self._free)} of {self.num_blocks} are free")
        taken = []
        for _ in range(count):
            index, _ = self._free.popitem(last=False)
            block = self._blocks[index]
            self._evict(block)
            block.ref_count, block.found = 1, False
            taken.append(index)
        return taken

    def free(self, indices: Sequence[int], left_behind: bool = False) -> None:
        """Gives up one reference on each block, last block first: the start of a sequence is kept longest.

        ``left_behind``: the sequence goes on, and does not see them any more.
        """
        for index in reversed(indices):
            block = self._blocks[index]
            if block.ref_count == 0:
                raise AssertionError(f"KV block {index} freed twice")
            block.ref_count -= 1
            block.left_behind = left_behind and not block.found
            if block.ref_count == 0:
                self._free[index] = None
                if block.content is None:
                    self._free.move_to_end(index, last=False)

    def register(
        self, indices: Sequence[int], parent: Content | None, tokens: Sequence[int]
    ) -> Content | None:
        """Makes full, computed blocks of each group findable; returns what the next ones name as parent.

        What is findable already stays where it is, and equal content is the same one, so that both chains meet.
        """
        if not self.enable_reuse:
            return None
        identity = (ROOT if parent is None else parent.uid, tuple(tokens))
        content = self._by_identity.get(identity)
        if content is None:
            content = self._new_content(identity, parent)
        for group, index in enumerate(indices):
            if index == NOWHERE or content.blocks[group] != NOWHERE:
                continue
            if group == 0 and not content.holds(0) and self.journal is not None:
                self.journal.append(BlockEvent(content.uid, *identity))
            block = self._blocks[index]
            block.content, block.group = content, group
            content.blocks[group] = index
        return content

    def _new_content(self, identity: Identity, parent: Content | None) -> Content:
        self._last_uid += 1
        nowhere = [NOWHERE] * self.num_groups
        content = Content(self._last_uid, identity, parent, list(nowhere), list(nowhere))
        self._by_identity[identity] = content
        if parent is not None:
            parent.children += 1
        return content

    def findable(self) -> list[BlockEvent]:
        """All content of the first group that can be found now, parents first."""
        found: dict[int, BlockEvent] = {}
        for content in sorted(self._by_identity.values(), key=lambda content: content.uid):
            parent, tokens = content.identity
            if content.holds(0) and (parent == ROOT or parent in found):
                found[content.uid] = BlockEvent(content.uid, parent, tokens)
        return list(found.values())

    def stray(self) -> Content:
        """What nobody finds, and nothing after it: the parent of blocks whose beginning is not known here."""
        self._last_uid += 1
        nowhere = [NOWHERE] * self.num_groups
        return Content(self._last_uid, (ROOT, ()), None, nowhere, nowhere)

    # Evicting --------------------------------------------------------------------------------------

    def _evict(self, block: Block) -> None:
        """The block is about to be handed out: what it holds moves to host memory, or is forgotten."""
        content, group = block.content, block.group
        if content is None:
            return
        self.host.restored.pop(block.index, None)  # it has not come, and need not any more
        if content.host[group] == NOWHERE and not block.left_behind:
            self._save(content, group, block.index)
        block.content, content.blocks[group] = None, NOWHERE
        self._forget(content, group)

    def _save(self, content: Content, group: int, index: int) -> None:
        """Copies a block to the least recently used host block, if there is one that nobody reads."""
        host = self.host
        if host.blank:
            chosen = host.blank.pop()
        else:
            oldest = next((each for each in host.used if each not in host.pinned), None)
            if oldest is None:
                return
            chosen = oldest
            before, its_group = host.used.pop(chosen)
            before.host[its_group] = NOWHERE
            self._forget(before, its_group)
        host.used[chosen] = content, group
        host.saved[chosen] = index
        host.num_saved += 1
        content.host[group] = chosen

    def _forget(self, content: Content, group: int) -> None:
        """A block or a host block of the content's group is gone: was it the last one?"""
        if group == 0 and not content.holds(0) and self.journal is not None:
            self.journal.append(BlockEvent(content.uid))
        lost: Content | None = content
        while lost is not None and not lost.children and not any(map(lost.holds, range(self.num_groups))):
            if self._by_identity.get(lost.identity) is not lost:
                return  # forgotten before
            del self._by_identity[lost.identity]
            lost = lost.parent
            if lost is not None:
                lost.children -= 1

    def take_moves(self) -> Moves | None:
        """The copies that have to be made before the next step; whoever takes them makes them."""
        host = self.host
        if not host.saved and not host.restored:
            host.pinned.clear()
            return None
        moves = Moves(
            [(index, to) for to, index in host.saved.items()],
            [(origin, index) for index, origin in host.restored.items()],
        )
        host.saved.clear()
        host.restored.clear()
        host.pinned.clear()
        return moves

    def forget_all(self) -> None:
        """Nothing can be found any more: nobody knows what the blocks hold. Those in use keep their users."""
        if self.journal is not None:
            contents = self._by_identity.values()
            self.journal += [BlockEvent(content.uid) for content in contents if content.holds(0)]
        for block in self._blocks:
            block.content = None
        self._by_identity.clear()
        self.host = HostTier(self.host.num_blocks)

    # Auditing --------------------------------------------------------------------------------------

    def check(self, tables: Sequence[Sequence[int]]) -> None:
        """Audits the bookkeeping against the block tables of all live sequences.

        Raises:
            AssertionError: a count differs, a block is lost, or an index points to the wrong block.
        """
        expected = [0] * self.num_blocks
        for table in tables:
            for index in table:
                if index != NOWHERE:
                    expected[index] += 1
        for block in self._blocks:
            if block.ref_count != expected[block.index]:
                raise AssertionError(
                    f"KV block {block.index}: {block.ref_count} references, {expected[block.index]} users"
                )
            if (block.ref_count == 0) != (block.index in self._free):
                raise AssertionError(f"KV block {block.index} is both used and free, or neither")
            if block.content is not None and block.content.blocks[block.group] != block.index:
                raise AssertionError(f"KV block {block.index} has a content that is elsewhere")
        self._check_contents()

    def _check_contents(self) -> None:
        held = hosted = 0
        for identity, content in self._by_identity.items():
            if content.identity != identity:
                raise AssertionError(f"content {content.uid} is found by another one's identity")
            there = [index for index in content.blocks if index != NOWHERE]
            if any(self._blocks[index].content is not content for index in there):
                raise AssertionError(f"content {content.uid} leads to a block that was given away")
            on_host = [host for host in content.host if host != NOWHERE]
            if any(self.host.used[host][0] is not content for host in on_host):
                raise AssertionError(f"content {content.uid} leads to a host block that was given away")
            held, hosted = held + len(there), hosted + len(on_host)
            if not (there or on_host or content.children):
                raise AssertionError(f"content {content.uid} is nowhere, and still known")
        if held != sum(block.content is not None for block in self._blocks):
            raise AssertionError("a block has a content that cannot be found")
        if hosted != len(self.host.used) or hosted + len(self.host.blank) != self.host.num_blocks:
            raise AssertionError("a host block is lost")
