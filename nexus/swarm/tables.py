"""The arrays that searches for chains work on. Cuts are where a stage may begin or end: number 0 is the model's beginning, the last
its end. Times and prices are whole numbers of one unit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
# No way; more than any cost, and small enough to add a cost to.
INF = 1 << 60


@dataclass(frozen=True, slots=True)
class Prices:
    """What a stage costs beside its time, in the unit of times: from one cut to another the difference of `along`, and `begin` and
    `finish` where it is the first and the last."""

    along: Ints
    begin: Ints
    finish: Ints


@dataclass(frozen=True, slots=True)
class Table:
    """What a search needs to know. `along`: by node and cut what everything before the cut costs on that node; `begin` and
    `finish`: by node what it costs beside to be the first and the last; `link`: from node to node; `reach`: by node and first cut
    the furthest cut that a stage may end at, the cut itself where there is none, never falling; `stages`: exactly so many, None:
    any number."""

    along: Ints
    begin: Ints
    finish: Ints
    link: Ints
    reach: Ints
    stages: int | None

    @property
    def last(self) -> int:
        return int(self.along.shape[1]) - 1


def window_least(values: Ints, reach: Ints) -> Ints:
    """By row and end cut: the least value of the starts from which the end is in reach. `reach` never falls."""
    last = len(reach)
    ends = np.arange(last + 1)
    lows = np.searchsorted(reach, ends, side="left")
    found = np.full(values.shape, INF, dtype=np.int64)
    lengths = ends - lows
    table, size = values, 1
    while True:
        fits = np.flatnonzero((lengths >= size) & (lengths < 2 * size))
        if len(fits):
            found[:, fits] = np.minimum(table[:, lows[fits]], table[:, ends[fits] - size])
        if not (lengths >= 2 * size).any():
            return found
        table = np.minimum(table[:, :-size], table[:, size:])
        size *= 2
