"""Who owns which KV block: reference counts, prefix reuse and least-recently-used eviction.

A block holds the keys and values of ``block_size`` consecutive tokens of one sequence, in every layer.
A full block may serve every sequence that starts with the same tokens. Its identity is exact, not a
hash: ``(identity of the block before it, its tokens)``.

A block is in exactly one of three states:

* in use: ``ref_count > 0``;
* cached: ``ref_count == 0``, its content can still be found by identity, first to go is the oldest;
* blank: ``ref_count == 0`` and not findable.

``num_free`` counts cached and blank blocks: both can be handed out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

ROOT = 0
Identity = tuple[int, tuple[int, ...]]


@dataclass(frozen=True)
class BlockEvent:
    """A block's content can be found from now on, or no longer: routers send a prompt where its beginning is."""

    uid: int
    parent_uid: int = ROOT
    """ROOT: it holds the beginning of a sequence."""
    tokens: tuple[int, ...] = ()
    """Empty: its content is gone."""


@dataclass
class Block:
    index: int
    ref_count: int = 0
    uid: int = ROOT
    """Names the content for the identity of the next block; ROOT while it has none."""
    identity: Identity | None = None


class BlockManager:
    """Hands out block indices in ``range(num_blocks)``."""

    def __init__(self, num_blocks: int, block_size: int, enable_reuse: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_reuse = enable_reuse
        self._blocks = [Block(index) for index in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        """Blocks nobody references, the next to be handed out first."""
        self._by_identity: dict[Identity, int] = {}
        self._last_uid = ROOT
        self.journal: list[BlockEvent] | None = None
        """What has happened, for whoever empties it; None: nobody does."""
        self.num_reused = 0
        """Blocks that a new sequence found computed already, since the start."""

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def match(self, tokens: Sequence[int]) -> list[int]:
        """The longest run of cached or used blocks that holds a prefix of ``tokens``; takes no reference.

        The last token never matches: at least one has to be computed to give logits.
        """
        if not self.enable_reuse:
            return []
        found: list[int] = []
        uid, size = ROOT, self.block_size
        for start in range(0, (len(tokens) - 1) // size * size, size):
            index = self._by_identity.get((uid, tuple(tokens[start : start + size])))
            if index is None:
                break
            found.append(index)
            uid = self._blocks[index].uid
        return found

    def num_free_among(self, indices: Sequence[int]) -> int:
        """How many of these blocks nobody references yet, so that taking them uses up free blocks."""
        return sum(index in self._free for index in indices)

    def share(self, indices: Sequence[int]) -> None:
        """Takes one more reference on each block."""
        for index in indices:
            block = self._blocks[index]
            if block.ref_count == 0:
                del self._free[index]
            block.ref_count += 1

    def allocate(self, count: int) -> list[int]:
        """Takes ``count`` free blocks, blank ones and the least recently used first; forgets their content.

        Raises:
            MemoryError: fewer are free; nothing was taken.
        """
        if count > len(self._free):
            raise MemoryError(f"{count} KV blocks asked for, {len(self._free)} of {self.num_blocks} are free")
        taken = []
        for _ in range(count):
            index, _ = self._free.popitem(last=False)
            block = self._blocks[index]
            self._forget(block)
            block.ref_count = 1
            taken.append(index)
        return taken

    def free(self, indices: Sequence[int]) -> None:
        """Gives up one reference on each block, last block first: the start of a sequence is kept longest."""
        for index in reversed(indices):
            block = self._blocks[index]
            if block.ref_count == 0:
                raise AssertionError(f"KV block {index} freed twice")
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free[index] = None
                if block.identity is None:
                    self._free.move_to_end(index, last=False)

    def register(self, index: int, parent_uid: int, tokens: Sequence[int]) -> int:
        """Makes a full, computed block findable; returns the uid that the next block names as parent.

        If equal content is findable already, that one stays and its uid is returned, so that both chains meet.
        """
        if not self.enable_reuse:
            return ROOT
        identity = (parent_uid, tuple(tokens))
        known = self._by_identity.get(identity)
        if known is not None:
            return self._blocks[known].uid
        block = self._blocks[index]
        self._last_uid += 1
        block.uid, block.identity = self._last_uid, identity
        self._by_identity[identity] = index
        if self.journal is not None:
            self.journal.append(BlockEvent(block.uid, *identity))
        return block.uid

    def findable(self) -> list[BlockEvent]:
        """All content that can be found now, parents first."""
        found: dict[int, BlockEvent] = {}
        for (parent, tokens), index in sorted(
            self._by_identity.items(), key=lambda item: self._blocks[item[1]].uid
        ):
            if parent == ROOT or parent in found:  # else the block before it is gone, and it leads nowhere
                found[self._blocks[index].uid] = BlockEvent(self._blocks[index].uid, parent, tokens)
        return list(found.values())

    def uid(self, index: int) -> int:
        return self._blocks[index].uid

    def check(self, tables: Sequence[Sequence[int]]) -> None:
        """Audits the bookkeeping against the block tables of all live sequences.

        Raises:
            AssertionError: a count differs, a block is lost, or an index points to the wrong block.
        """
        expected = [0] * self.num_blocks
        for table in tables:
            for index in table:
                expected[index] += 1
        for block in self._blocks:
            if block.ref_count != expected[block.index]:
                raise AssertionError(
                    f"KV block {block.index}: {block.ref_count} references, {expected[block.index]} users"
                )
            if (block.ref_count == 0) != (block.index in self._free):
                raise AssertionError(f"KV block {block.index} is both used and free, or neither")
            if block.identity is not None and self._by_identity.get(block.identity) != block.index:
                raise AssertionError(f"KV block {block.index} has an identity that leads elsewhere")
        if len(self._by_identity) != sum(block.identity is not None for block in self._blocks):
            raise AssertionError("an identity leads to a block that was given away")

    def _forget(self, block: Block) -> None:
        if block.identity is not None:
            del self._by_identity[block.identity]
            if self.journal is not None:
                self.journal.append(BlockEvent(block.uid))
            block.identity, block.uid = None, ROOT
