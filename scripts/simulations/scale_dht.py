"""A model of the DHT: nodes with real k-buckets that look keys up as py-libp2p 0.8.1 does. No formula: what is counted, happened.

Maymounkov & Mazieres, Kademlia (2002), with the library's numbers: buckets of 20, ten questions at a time (the paper says three),
and an end when a round brings nothing closer. Everyone who asks, answers or is told of is entered where a bucket has room; a bucket
splits where it covers the node's own id; who does not answer is taken out. Left out are the time-outs of real connections.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from statistics import mean

BUCKET_SIZE = 20
ALPHA = 10
BETA = 3
ROUNDS_MAX = 20
ID_BITS = 256
# Keys that are looked up, each by another node.
LOOKUPS = 400


class Table:
    """The buckets of one node, by how many leading bits an id shares with its own: the leaves of the tree that splitting makes."""

    def __init__(self, own: int) -> None:
        self.own = own
        self._buckets: dict[int, dict[int, None]] = {}
        self._split_to = 0

    def add(self, other: int) -> None:
        """Enter an id, unless it is there, is one's own, or its bucket is full: whoever is in it stays, since it is alive."""
        if other == self.own:
            return
        shared = ID_BITS - (self.own ^ other).bit_length()
        while True:
            bucket = self._buckets.setdefault(min(shared, self._split_to), {})
            if other in bucket or len(bucket) < BUCKET_SIZE:
                bucket[other] = None
                return
            if shared < self._split_to:
                return
            # The bucket of one's own id is full: those that share no more bits than this stay, the others go one deeper.
            nearer = {one: None for one in bucket if ID_BITS - (self.own ^ one).bit_length() > self._split_to}
            self._buckets[self._split_to] = {one: None for one in bucket if one not in nearer}
            self._split_to += 1
            self._buckets[self._split_to] = nearer

    def remove(self, other: int) -> None:
        for bucket in self._buckets.values():
            bucket.pop(other, None)

    def closest(self, key: int, count: int = BUCKET_SIZE) -> list[int]:
        return nsmallest(count, (one for bucket in self._buckets.values() for one in bucket), key=lambda one: one ^ key)

    @property
    def buckets(self) -> list[int]:
        """The depths of those that there are."""
        return sorted(self._buckets)

    def __len__(self) -> int:
        return sum(map(len, self._buckets.values()))


@dataclass(frozen=True, slots=True)
class Lookup:
    """`closest`: the ids that were found, nearest first. `hops`: how many nodes on end referred the asker to the nearest of them:
    1 where it stood in its own table. `queries`: nodes asked, also those that did not answer. `rounds`: round trips on end."""

    closest: tuple[int, ...]
    hops: int
    queries: int
    rounds: int


class Network:
    """All nodes, and which of them answer."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"dht {seed}")
        self.tables: dict[int, Table] = {}
        self.dead: set[int] = set()

    def grow(self, count: int) -> None:
        """So many more nodes join, one after the other: each knows one member, looks itself up, then an id in each of its
        buckets."""
        for _ in range(count):
            own = self.rng.getrandbits(ID_BITS)
            alive = [node for node in self.tables if node not in self.dead]
            table = self.tables[own] = Table(own)
            if alive:
                table.add(self.rng.choice(alive))
                self.refresh(own)

    def refresh(self, own: int) -> None:
        self.lookup(own, own)
        for depth in self.tables[own].buckets[:-1]:
            # An id that shares exactly `depth` bits with one's own.
            below = ID_BITS - depth - 1
            self.lookup(own, ((own >> below) ^ 1) << below | self.rng.getrandbits(below))

    def crash(self, count: int) -> None:
        alive = [node for node in self.tables if node not in self.dead]
        self.dead.update(self.rng.sample(alive, count))

    def lookup(self, asker: int, key: int) -> Lookup:
        """The iterative search of the library, round by round."""
        table = self.tables[asker]
        closest = table.closest(key)
        hops = dict.fromkeys(closest, 1)
        asked: set[int] = set()
        rounds = 0
        while rounds < ROUNDS_MAX:
            batch = [node for node in closest if node not in asked][:ALPHA]
            if not batch:
                break
            rounds += 1
            told: dict[int, None] = {}
            for node in batch:
                asked.add(node)
                for other in self._ask(table, node, key):
                    hops[other] = min(hops.get(other, ROUNDS_MAX), hops[node] + 1)
                    told[other] = None
            before = closest
            found = {one for one in (*closest, *told) if one not in self.dead or one not in asked}
            closest = nsmallest(BUCKET_SIZE, found, key=lambda one: one ^ key)
            if not told:
                continue
            if closest == before and sum(node in asked for node in closest) >= min(BETA, len(closest)):
                break
        answering = tuple(node for node in closest if node not in self.dead)
        return Lookup(answering, hops[answering[0]] if answering else 0, len(asked), rounds)

    def _ask(self, table: Table, node: int, key: int) -> Iterable[int]:
        if node in self.dead:
            table.remove(node)
            return ()
        other = self.tables[node]
        table.add(node)
        answer = [one for one in other.closest(key) if one != table.own]
        other.add(table.own)
        for one in answer:
            table.add(one)
        return answer


@dataclass(frozen=True, slots=True)
class DhtFigures:
    """Over LOOKUPS keys. `found`: share of the lookups that ended at the node nearest to the key of all that live."""

    hops_mean: float
    hops_max: int
    rounds_mean: float
    queries_mean: float
    found: float
    table_mean: float


def measure(network: Network, lookups: int = LOOKUPS) -> DhtFigures:
    """Random keys, each looked up by a random node that lives."""
    alive = sorted(node for node in network.tables if node not in network.dead)
    made: list[tuple[int, Lookup]] = []
    for _ in range(lookups):
        asker, key = network.rng.choice(alive), network.rng.getrandbits(ID_BITS)
        made.append((min((node for node in alive if node != asker), key=lambda node: node ^ key), network.lookup(asker, key)))
    return _figures(network, alive, made)


def _figures(network: Network, alive: Sequence[int], made: Sequence[tuple[int, Lookup]]) -> DhtFigures:
    return DhtFigures(
        hops_mean=round(mean(one.hops for _, one in made), 2),
        hops_max=max(one.hops for _, one in made),
        rounds_mean=round(mean(one.rounds for _, one in made), 2),
        queries_mean=round(mean(one.queries for _, one in made), 1),
        found=round(sum(one.closest[:1] == (nearest,) for nearest, one in made) / len(made), 4),
        table_mean=round(mean(len(network.tables[node]) for node in alive), 1),
    )


def dht_figures(seed: int, nodes: int, dead_share: float = 0.2) -> tuple[DhtFigures, DhtFigures]:
    """With every node there, and right after that share of them died, before anybody has noticed."""
    network = Network(seed)
    network.grow(nodes)
    whole = measure(network)
    network.crash(round(nodes * dead_share))
    return whole, measure(network)
