"""Which layers share a KV block: those with a sliding window need the last tokens only, the others all.

Each group of layers has a block table of its own, and a block holds the keys and values of the layers of one group. All
groups have room for equally many layers, so that every block can serve each of them: the layers' caches are as many
tensors as a group has places, and layers of different groups at the same place share one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MOST_GROUPS = 8
"""Each has a block table of every sequence on the device."""
MOST_STRIDE = 128
"""Of any kernels, see :func:`most_blocks`."""


def most_blocks(
    windows: Sequence[int | None], num_tokens: int, at_once: int, block_size: int, stride: int = MOST_STRIDE
) -> int:
    """Blocks of all groups that a sequence of ``num_tokens`` has at most, ``at_once`` of which a step computes.

    ``stride``: kernels read keys behind a window's beginning from a multiple of so many tokens on, and ignore them.
    """
    whole = -(-num_tokens // block_size)
    return sum(
        whole if window is None else min(whole, -(-(window - 1 + stride - 1 + at_once) // block_size) + 2)
        for window in windows
    )


@dataclass(frozen=True)
class LayerGroups:
    windows: tuple[int | None, ...]
    """Of each group, how many tokens a token sees, itself included; None: all. Those with None come first."""
    groups: tuple[int, ...]
    """Of each layer."""
    places: tuple[int, ...]
    """Of each layer: which of its group's it is."""
    size: int
    """Places of a group. In some groups the last ones are empty."""

    @classmethod
    def of(cls, windows: Sequence[int | None]) -> LayerGroups:
        """For layers with these windows.

        Of the sizes that leave no place of the layers without a window empty (they are why there is too little memory)
        the one that leaves the fewest empty of all.
        """
        kinds = sorted(set(windows), key=lambda window: (window is not None, window or 0))
        counts = [list(windows).count(kind) for kind in kinds]
        shares = [(size, [-(-count // size) for count in counts]) for size in range(1, max(counts) + 1)]
        allowed = [
            (size, groups)
            for size, groups in shares
            if sum(groups) <= max(MOST_GROUPS, len(kinds)) and counts[0] % size == 0
        ] or [(max(counts), [1] * len(kinds))]
        size, groups = min(allowed, key=lambda share: (share[0] * sum(share[1]), -share[0]))
        first = {kind: sum(groups[:number]) for number, kind in enumerate(kinds)}
        seen = dict.fromkeys(kinds, 0)
        group_of, places = [], []
        for window in windows:
            group_of.append(first[window] + seen[window] // size)
            places.append(seen[window] % size)
            seen[window] += 1
        all_windows = [kind for kind, count in zip(kinds, groups, strict=True) for _ in range(count)]
        return cls(tuple(all_windows), tuple(group_of), tuple(places), size)

    @classmethod
    def for_length(cls, windows: Sequence[int | None], length: int) -> LayerGroups:
        """For sequences of ``length`` tokens at most: a window that is as long is none."""
        return cls.of([None if window is None or window >= length else window for window in windows])

    @classmethod
    def one(cls, num_layers: int) -> LayerGroups:
        """All layers keep all tokens."""
        return cls.of([None] * num_layers)

    def num_blocks(self, whole: int) -> int:
        """Blocks in the memory of ``whole`` that hold all layers each."""
        return whole * len(self.groups) // self.size

    def most_whole(self, num_tokens: int, at_once: int, block_size: int) -> int:
        """What a sequence takes at most, as :func:`most_blocks` says, counted in blocks that hold all layers each."""
        return -(-most_blocks(self.windows, num_tokens, at_once, block_size) * self.size // len(self.groups))
