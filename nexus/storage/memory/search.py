"""Queries: the nearest vectors, the best texts, or both; filters apply before anything is cut off.

Small spaces, and what a filter leaves few of, are compared one by one: exact. In large ones an index proposes candidates. In either
case the list is ordered by the codes themselves, and equal ones by their ids: the same blocks give the same list on every node.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import UsageError
from nexus.memory.ranking import Asked, cosines, fuse, round_asked
from nexus.storage.memory import words
from nexus.storage.memory.columns import Columns
from nexus.storage.memory.filters import Matcher
from nexus.storage.memory.index import SpaceIndex
from nexus.storage.memory.names import Names
from nexus.storage.memory.records import Explain, Hit, Query
from nexus.storage.memory.spaces import Rows, Space, Spaces

K_MAX = 1000
CANDIDATES = 32
_CANDIDATES_PER_HIT = 3
# An index is asked for more where a filter leaves less, up to here; beyond, what the filter leaves is compared one by one.
_CANDIDATES_MAX = 2000
_FLAT_MAX = 20_000
_GATHERED = 4096
_SORTED_MAX = 2 * K_MAX
# How much of each list counts where two are fused.
FUSED_DEPTH = 100


class Connections(Protocol):
    def transaction(self) -> AbstractContextManager[sqlite3.Connection]: ...


class _Found(NamedTuple):
    """Blocks by number in order, with their ids and what they are ordered by."""

    numbers: list[int]
    ids: list[bytes]
    scores: list[float]


@dataclass(slots=True)
class Searcher:
    """Reads what writes have put into memory; the database for words and tags alone."""

    columns: Columns
    names: Names
    spaces: Spaces
    indexes: Mapping[int, SpaceIndex]
    database: Connections
    paths: list[str] = field(default_factory=list)
    candidates: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def search(self, query: Query, now_ms: int) -> tuple[list[Hit], Explain]:
        """Hits without their blocks. Raises UsageError."""
        if not 1 <= query.k <= K_MAX:
            raise UsageError(f"{query.k} hits are asked for", f"Ask for 1 to {K_MAX}")
        by_text = bool(query.text.strip()) and (query.hybrid or query.vector is None)
        if query.vector is None and not by_text:
            raise UsageError("a search needs a text or a vector", "Say what to search for")
        matcher = Matcher(self.columns, self.names, query.filters, now_ms)
        if query.filters.tags:
            with self.database.transaction() as connection:
                matcher.read_tags(connection)
        fused = by_text and query.vector is not None
        depth = max(query.k, FUSED_DEPTH) if fused else query.k
        near = self._nearest(query, query.vector, depth, matcher) if query.vector is not None else None
        texts = self._texts(query, depth, matcher) if by_text else None
        hits = _hits(near, texts, query.k)
        return hits, Explain(tuple(self.paths), tuple(self.candidates), self.seconds)

    def _nearest(self, query: Query, vector: NDArray[np.float32], depth: int, matcher: Matcher) -> _Found:
        began = perf_counter()
        asked = round_asked(vector)
        parts = []
        for space in self.spaces.matching(query.filters.collections, query.fingerprint, len(vector)):
            parts.append(self._in_space(space, asked, depth, matcher))
        found = _merge(parts, depth)
        self.seconds["vectors"] = perf_counter() - began
        return found

    def _in_space(self, space: Space, asked: Asked, depth: int, matcher: Matcher) -> _Found:
        rows, index = space.view, self.indexes.get(space.number)
        # Taken once: the index may grow meanwhile.
        indexed = index.rows if index is not None else 0
        if index is not None and indexed:
            chosen = self._proposed(rows, index, indexed, asked, depth, matcher)
            if chosen is not None:
                return self._rank(rows, chosen, asked, depth, "index")
        allowed = matcher(rows.numbers, in_collections=True)
        allowed &= rows.inverses > 0
        return self._rank(rows, np.flatnonzero(allowed), asked, depth, "flat")

    def _proposed(
        self, rows: Rows, index: SpaceIndex, indexed: int, asked: Asked, depth: int, matcher: Matcher
    ) -> NDArray[np.int64] | None:
        """The rows that the index proposes and those that are not in it yet, or None where the filter leaves too few of them."""
        count = max(CANDIDATES, depth * _CANDIDATES_PER_HIT)
        if matcher.selective:
            left = int(np.count_nonzero(matcher(rows.numbers, in_collections=True)))
            if left <= _FLAT_MAX:
                return None
            count = count * len(rows.numbers) // left
        if count > min(_CANDIDATES_MAX, len(rows.numbers) // 2):
            return None
        proposed = index.nearest(asked, count)
        if len(rows.numbers) > indexed:
            proposed = np.concatenate([proposed[proposed < indexed], np.arange(indexed, len(rows.numbers))])
        kept = matcher(rows.numbers[proposed], in_collections=True)
        kept &= rows.inverses[proposed] > 0
        chosen = proposed[kept]
        return chosen if len(chosen) >= depth else None

    def _rank(self, rows: Rows, chosen: NDArray[np.int64], asked: Asked, depth: int, path: str) -> _Found:
        self.paths.append(path)
        self.candidates.append(len(chosen))
        if len(chosen) <= _GATHERED:
            scores = cosines(asked, rows.codes[chosen], rows.inverses[chosen])
        else:
            parts = (chosen[at : at + _GATHERED] for at in range(0, len(chosen), _GATHERED))
            scores = np.concatenate([cosines(asked, rows.codes[part], rows.inverses[part]) for part in parts])
        return _best(self.columns, rows.numbers[chosen], -scores, depth)

    def _texts(self, query: Query, depth: int, matcher: Matcher) -> _Found:
        began = perf_counter()
        with self.database.transaction() as connection:
            matches = words.match(connection, query.text)
        numbers = np.array([number for number, _ in matches], np.int64)
        scores = np.array([score for _, score in matches], np.float64)
        known = numbers < self.columns.count  # a write may be between its commit and memory
        numbers, scores = numbers[known], scores[known]
        kept = matcher(numbers)
        self.paths.append("words")
        self.candidates.append(len(matches))
        found = _best(self.columns, numbers[kept], scores[kept], depth)
        self.seconds["words"] = perf_counter() - began
        return found


def _best(columns: Columns, numbers: NDArray[np.int64], costs: NDArray[np.float64], count: int) -> _Found:
    """The `count` that cost least; of equal ones those with lesser ids. Scores are negative costs."""
    if len(costs) > _SORTED_MAX:
        most = np.partition(costs, count - 1)[count - 1]
        kept = costs <= most
        numbers, costs = numbers[kept], costs[kept]
    order = costs.argsort()
    numbers, costs = numbers[order], costs[order]
    if (costs[1 : count + 1] == costs[:-1][:count]).any():
        return _found(zip(costs.tolist(), columns.ids_of(numbers), numbers.tolist(), strict=True), count)
    numbers = numbers[:count]
    return _Found(numbers.tolist(), columns.ids_of(numbers), (-costs[:count]).tolist())


def _found(listed: Iterable[tuple[float, bytes, int]], count: int) -> _Found:
    best = sorted(listed)[:count]
    return _Found([number for _, _, number in best], [identifier for _, identifier, _ in best], [-cost for cost, _, _ in best])


def _merge(parts: Sequence[_Found], count: int) -> _Found:
    if len(parts) == 1:
        return parts[0]
    return _found(
        (
            (-score, identifier, number)
            for part in parts
            for number, identifier, score in zip(part.numbers, part.ids, part.scores, strict=True)
        ),
        count,
    )


def _hits(near: _Found | None, texts: _Found | None, count: int) -> list[Hit]:
    if texts is None:
        assert near is not None
        return [Hit(identifier, score, score) for identifier, score in zip(near.ids[:count], near.scores[:count], strict=True)]
    ranks = {identifier: rank for rank, identifier in enumerate(texts.ids, 1)}
    if near is None:
        return [
            Hit(identifier, score, None, ranks[identifier])
            for identifier, score in zip(texts.ids[:count], texts.scores[:count], strict=True)
        ]
    cosine = dict(zip(near.ids, near.scores, strict=True))
    fused = fuse([near.ids, texts.ids])
    best = sorted(fused, key=lambda identifier: (-fused[identifier], identifier))[:count]
    return [Hit(identifier, fused[identifier], cosine.get(identifier), ranks.get(identifier)) for identifier in best]
