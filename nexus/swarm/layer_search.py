"""The search for a chain over layers: cut by cut, for every node the best few chains that end there on it, of different nodes; each
is extended by every node that it has not used. It may miss the optimum; its time grows with the square of the nodes.

With `stages` asked for, chains of different lengths are kept apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nexus.swarm.tables import INF, Ints, Table

# Chains that are kept per cut, over all nodes, and per cut and node.
LABELS, LABELS_EACH = 128, 6


def over_layers(table: Table) -> tuple[list[int], list[int]] | None:
    """Nodes in order and the cuts where their stages end; None where it finds no chain."""
    search = _Search(table)
    search.run()
    return search.best()


class _Search:
    def __init__(self, table: Table) -> None:
        count, last = len(table.along), table.last
        self._table = table
        self._count, self._last = count, last
        self._slots = max(1, min(LABELS_EACH, LABELS // count))
        self._levels = table.stages + 1 if table.stages else 1
        shape = (self._levels, last + 1, self._slots, count)
        self._value = np.full(shape, INF, dtype=np.int64)  # what a chain costs, with the link back to its first node
        self._set = np.zeros(shape, dtype=np.uint64)  # tells chains of different nodes apart
        self._from_cut = np.full(shape, -1, dtype=np.int32)
        self._from_label = np.full(shape, -1, dtype=np.int32)
        self._first = np.zeros(shape, dtype=np.int32)
        self._used = np.zeros((*shape, count), dtype=bool)
        self._names = _names(count)

    def run(self) -> None:
        table = self._table
        for cut in range(self._last):
            far = int(table.reach[:, cut].max())
            if far <= cut:
                continue
            allowed = np.arange(cut + 1, far + 1)[:, None] <= table.reach[:, cut][None, :]
            step = table.along[:, cut + 1 : far + 1].T - table.along[:, cut][None, :]
            for level in range(max(1, self._levels - 1)):
                onto = level + 1 if table.stages else 0
                for label, entry in self._entries(level, cut):
                    self._extend(onto, cut, far, label, entry, step + entry[None, :], allowed & (entry < INF)[None, :])

    def _entries(self, level: int, cut: int) -> list[tuple[Ints, Ints]]:
        """For every node the best ways to begin a stage at this cut: which label each comes from (slot and node), at which cost."""
        table = self._table
        if cut == 0:
            return [(np.full(self._count, -1), table.begin)] if level == 0 else []
        value = self._value[level, cut].reshape(-1)
        if not (value < INF).any():
            return []
        self._mark_used(level, cut)
        # On to every node, and home from there instead of from here.
        first = self._first[level, cut].reshape(-1)
        ends = np.tile(np.arange(self._count), self._slots)
        ways = (value - table.link[ends, first])[:, None] + table.link[ends] + table.link[first]
        ways[value >= INF] = INF
        ways[self._used[level, cut].reshape(-1, self._count)] = INF
        one = self._slots == 1
        order = ways.argmin(axis=0)[None, :] if one else ways.argsort(axis=0, kind="stable")[: self._slots]
        costs = np.take_along_axis(ways, order, axis=0)
        return [(label, np.minimum(cost, INF)) for label, cost in zip(order, costs, strict=True) if (cost < INF).any()]

    def _mark_used(self, level: int, cut: int) -> None:
        """Which nodes each chain that ends at this cut has used."""
        numbers = np.arange(self._count)
        before = self._from_cut[level, cut]
        later = before > 0
        if later.any():
            used = self._used[level - 1 if self._table.stages else 0].reshape(self._last + 1, -1, self._count)
            self._used[level, cut][later] = used[before[later], self._from_label[level, cut][later]]
        self._used[level, cut][:, numbers, numbers] = True

    def _extend(self, onto: int, cut: int, far: int, label: Ints, entry: Ints, reached: Ints, allowed: NDArray[np.bool_]) -> None:
        """Chains with one more stage, from this cut, where they are better than the worst kept, or than one of the same nodes."""
        source = (onto - 1 if self._table.stages else 0, cut)
        names = self._names if cut == 0 else self._set[source].reshape(-1)[label] ^ self._names
        first = np.arange(self._count) if cut == 0 else self._first[source].reshape(-1)[label]
        value = self._value[onto, cut + 1 : far + 1]
        if self._slots == 1:
            slot = np.zeros(reached.shape, dtype=np.int64)
        else:
            same = (self._set[onto, cut + 1 : far + 1] == names[None, None, :]) & (value < INF)
            slot = np.where(same.any(axis=1), same.argmax(axis=1), value.argmax(axis=1))
        ends, nodes = np.nonzero(allowed & (reached < np.take_along_axis(value, slot[:, None, :], axis=1)[:, 0, :]))
        at = (onto, cut + 1 + ends, slot[ends, nodes], nodes)
        self._value[at] = reached[ends, nodes]
        self._set[at] = names[nodes]
        self._from_cut[at] = cut
        self._from_label[at] = label[nodes]
        self._first[at] = first[nodes]

    def best(self) -> tuple[list[int], list[int]] | None:
        level, last = self._levels - 1, self._last
        table = self._table
        value = self._value[level, last]
        closed = np.where(value < INF, value + table.finish, INF).reshape(-1)
        label = int(closed.argmin())
        if closed[label] >= INF:
            return None
        order, ends, cut = [label % self._count], [last], last
        while (previous := int(self._from_cut[level, cut].reshape(-1)[label])) > 0:
            label = int(self._from_label[level, cut].reshape(-1)[label])
            cut, level = previous, level - 1 if table.stages else 0
            order.append(label % self._count)
            ends.append(cut)
        return order[::-1], ends[::-1]


def _names(count: int) -> NDArray[np.uint64]:
    """A number for every node, so that the exclusive or of a set's is hardly ever that of another (splitmix64, Steele, 2014)."""
    found = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    found = (found ^ (found >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    found = (found ^ (found >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return found ^ (found >> np.uint64(31))
