"""Which rows of a step have the same beginning in the KV cache: equal leading entries of their block tables."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEAST_BLOCKS = 8
"""Shorter common beginnings are not looked for."""
MOST_GROUPS = 16
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Group:
    """Rows whose tables begin with the same blocks."""

    rows: NDArray[np.intp]
    blocks: int


def find_groups(tables: Ints, slots: Ints, limits: Ints) -> list[Group]:
    """Groups of rows that have ``LEAST_BLOCKS`` or more in common, of disjoint rows.

    ``tables`` [slots, width] are block tables, ``slots`` [rows] says whose row it is, and the first ``limits`` [rows]
    entries count. Rows are grouped so that a group saves as many blocks as it can: all rows where the common
    beginning is long, or fewer rows with a longer one. Where nothing is shared only one column is looked at.
    """
    candidates = np.flatnonzero(limits >= LEAST_BLOCKS)
    if len(candidates) < 2:
        return []
    column = tables[slots[candidates], LEAST_BLOCKS - 1]
    ids, counts = np.unique(column, return_counts=True)
    found: list[Group] = []
    for block in ids[counts > 1]:
        rows = candidates[column == block]
        while len(rows) > 1 and len(found) < MOST_GROUPS:
            group = _best(tables, slots, limits, rows)
            if group is None:
                break
            found.append(group)
            rows = np.setdiff1d(rows, group.rows, assume_unique=True)
    return found


def _best(tables: Ints, slots: Ints, limits: Ints, rows: NDArray[np.intp]) -> Group | None:
    """The group among ``rows`` that saves most; None if they have too little in common.

    Follows from each depth at which rows part the way that most of them go.
    """
    best, saved = None, 0
    while len(rows) > 1:
        begin = tables[slots[rows], : limits[rows].min()]
        same = (begin == begin[0]).all(0)
        depth = len(same) if same.all() else int(same.argmin())
        if depth >= LEAST_BLOCKS and (len(rows) - 1) * depth > saved:
            best, saved = Group(rows, depth), (len(rows) - 1) * depth
        rows = rows[limits[rows] > depth]
        if len(rows) > 1:
            following = tables[slots[rows], depth]
            ids, counts = np.unique(following, return_counts=True)
            rows = rows[following == ids[counts.argmax()]]
    return best
