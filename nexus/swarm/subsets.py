"""The search for a chain over sets of nodes: which were used, which was the first and which the last (Held and Karp, 1962).

Nodes that can stand for each other are counted by kind, not named. It finds the optimum, in time that doubles with every node
that is unlike the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from nexus.swarm.tables import INF, Ints, Table, window_least

# The search is used up to so many cells of its table, and so many kinds of nodes.
SUBSET_CELLS = 12_000_000
KINDS_MAX = 12


@dataclass(frozen=True, slots=True)
class _Step:
    """From one level of the lattice to the next, by one more node of `kind`: rows `before` in runs that begin at `runs`, each to
    a row of `after`; `last`: the last kind of each row before."""

    kind: int
    before: NDArray[np.intp]
    last: NDArray[np.intp]
    runs: NDArray[np.intp]
    after: NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class _Lattice:
    """By number of stages: rows (how many of each kind, first kind, last kind), and the steps to the next."""

    rows: tuple[tuple[tuple[tuple[int, ...], int, int], ...], ...]
    steps: tuple[tuple[_Step, ...], ...]


@lru_cache(maxsize=64)
def _lattice(sizes: tuple[int, ...], depth: int, uniform: bool) -> _Lattice:
    """`uniform`: all links are the same, and which node was first or last makes no difference."""
    kinds = range(len(sizes))
    none = (0,) * len(sizes)
    level = [(_more(none, kind), 0 if uniform else kind, 0 if uniform else kind) for kind in kinds]
    rows, steps = [tuple(level)], []
    for _ in range(depth - 1):
        index: dict[tuple[tuple[int, ...], int, int], int] = {}
        made = []
        for kind in kinds:
            into: dict[tuple[tuple[int, ...], int, int], list[int]] = {}
            for number, (counts, first, _) in enumerate(rows[-1]):
                if counts[kind] < sizes[kind]:
                    into.setdefault((_more(counts, kind), first, 0 if uniform else kind), []).append(number)
            if into:
                after = [index.setdefault(row, len(index)) for row in into]
                before = [number for numbers in into.values() for number in numbers]
                runs = np.cumsum([0, *(len(numbers) for numbers in into.values())])[:-1]
                last = [rows[-1][number][2] for number in before]
                made.append(_Step(kind, np.array(before), np.array(last), runs, np.array(after)))
        rows.append(tuple(index))
        steps.append(tuple(made))
    return _Lattice(tuple(rows), tuple(steps))


def _more(counts: tuple[int, ...], kind: int) -> tuple[int, ...]:
    return (*counts[:kind], counts[kind] + 1, *counts[kind + 1 :])


class Subsets:
    """The search over sets of nodes."""

    def __init__(self, kinds: Sequence[Sequence[int]], lattice: _Lattice, uniform: bool) -> None:
        self._kinds = kinds
        self._lattice = lattice
        self._uniform = uniform

    @classmethod
    def of(cls, kinds: Sequence[Sequence[int]], link: Ints, depth: int, last: int, *, named: bool) -> Subsets | None:
        """None where it would be too much. `named`: which node is the first and which the last counts also where all links are
        the same."""
        if not kinds:
            return None
        sizes = tuple(len(kind) for kind in kinds)
        apart = link[~np.eye(len(link), dtype=bool)]
        uniform = not named and (not len(apart) or bool((apart == apart[0]).all()))
        states = 1
        for size in sizes:
            states *= min(size, depth) + 1
        per_state = len(sizes) if uniform else len(sizes) ** 3 / 3
        if states * per_state * last > SUBSET_CELLS:
            return None
        return cls(kinds, _lattice(tuple(min(size, depth) for size in sizes), depth, uniform), uniform)

    def _hop(self, link: Ints) -> Ints:
        """Between kinds; within a kind between two of it."""
        firsts = [kind[0] for kind in self._kinds]
        hop = link[np.ix_(firsts, firsts)].copy()
        for number, kind in enumerate(self._kinds):
            hop[number, number] = link[kind[0], kind[1]] if len(kind) > 1 else 0
        if self._uniform and len(link) > 1:
            hop[:] = link[0, 1]
        return hop

    def find(self, table: Table) -> tuple[list[int], list[int]] | None:
        """Nodes in order and the cuts where their stages end, at the least cost; None where there is no chain."""
        last = table.last
        firsts = [kind[0] for kind in self._kinds]
        cost, begin, finish = (part[firsts] for part in (table.along, table.begin, table.finish))
        reach = table.reach[firsts]
        hop = self._hop(table.link)
        levels: list[Ints] = []
        level = np.full((len(firsts), last + 1), INF, dtype=np.int64)
        for kind in range(len(firsts)):
            ends = np.arange(1, last + 1) <= reach[kind, 0]
            level[kind, 1:][ends] = cost[kind, 1:][ends] - cost[kind, 0] + begin[kind]
        levels.append(level)
        best: tuple[int, int, int] | None = None
        for depth, rows in enumerate(self._lattice.rows, 1):
            if depth > 1:
                levels.append(self._next(levels[-1], len(rows), self._lattice.steps[depth - 2], cost, reach, hop))
            if table.stages in (None, depth) and len(rows):
                closed = self._closed(levels[-1][:, last], rows, depth, hop, finish)
                row = int(closed.argmin())
                if closed[row] < INF and (best is None or closed[row] < best[0]):
                    best = int(closed[row]), depth, row
        if best is None:
            return None
        return self._trace(levels, best[1], best[2], cost, reach, hop, last)

    def _next(self, level: Ints, count: int, steps: Sequence[_Step], cost: Ints, reach: Ints, hop: Ints) -> Ints:
        following = np.full((count, level.shape[1]), INF, dtype=np.int64)
        for step in steps:
            ways = level[step.before] + hop[step.last, step.kind][:, None]
            entry = np.minimum.reduceat(ways, step.runs, axis=0)
            entry = np.where(entry >= INF, INF, entry - cost[step.kind])
            ends = window_least(entry, reach[step.kind])
            found = np.where(ends >= INF >> 1, INF, ends + cost[step.kind])
            following[step.after] = np.minimum(following[step.after], found)
        return following

    def _closed(self, ends: Ints, rows: Sequence[tuple[tuple[int, ...], int, int]], depth: int, hop: Ints, finish: Ints) -> Ints:
        if depth == 1:
            return np.where(ends < INF, ends + finish, INF)
        firsts, lasts = (np.array([row[part] for row in rows]) for part in (1, 2))
        extra = hop[lasts, firsts] + (finish[lasts] if not self._uniform else 0)
        return np.where(ends < INF, ends + extra, INF)

    def _trace(
        self, levels: Sequence[Ints], depth: int, row: int, cost: Ints, reach: Ints, hop: Ints, last: int
    ) -> tuple[list[int], list[int]]:
        """Back from the last layer: which kinds, and where their stages end."""
        cut, kinds, ends = last, [], []
        for level in range(depth - 1, 0, -1):
            row, start, kind = self._step_back(levels, level, row, cut, cost, reach, hop)
            kinds.append(kind)
            ends.append(cut)
            cut = start
        counts = self._lattice.rows[0][row][0]
        kinds.append(counts.index(1))
        ends.append(cut)
        members = [iter(kind) for kind in self._kinds]
        return [next(members[kind]) for kind in reversed(kinds)], ends[::-1]

    def _step_back(
        self, levels: Sequence[Ints], level: int, row: int, cut: int, cost: Ints, reach: Ints, hop: Ints
    ) -> tuple[int, int, int]:
        value = levels[level][row, cut]
        for step in self._lattice.steps[level - 1]:
            for position in np.flatnonzero(step.after == row):
                upto = step.runs[position + 1] if position + 1 < len(step.runs) else len(step.before)
                for at in range(step.runs[position], upto):
                    before = int(step.before[at])
                    starts = np.flatnonzero(reach[step.kind][:cut] >= cut)
                    found = (
                        levels[level - 1][before, starts]
                        + hop[step.last[at], step.kind]
                        - cost[step.kind, starts]
                        + cost[step.kind, cut]
                    )
                    exact = np.flatnonzero((found == value) & (levels[level - 1][before, starts] < INF))
                    if len(exact):
                        return before, int(starts[exact[0]]), step.kind
        raise AssertionError("a chain that was found cannot be traced back")
