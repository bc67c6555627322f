"""Maps between the spaces of two models: made when a collection is embedded with a second one, published in it, used for questions.

A node whose model has no vectors in a collection asks through a map that somebody published there, if its recall is good enough to
answer. How well a map does is its author's word; what is found with it are good blocks all the same, in an order that is worth that
word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import structlog
from numpy.typing import NDArray

from nexus.core.errors import MalformedError, UsageError
from nexus.engine.embedding.embedder import Embedder
from nexus.memory.block import MAP, SCALE_MAX, Vector
from nexus.memory.quantise import restore, unit
from nexus.memory.space_map import SpaceMap, fit_map, join_parts, read_part
from nexus.storage.memory.records import Filters
from nexus.storage.memory.store import MemoryStore

log = structlog.get_logger("nexus.memory.map")

# Anchors beyond these make a map no better.
ANCHORS_MAX = 5000
ANCHORS_ENOUGH = 2000
PARTS_READ_MAX = 256


@dataclass(slots=True)
class Anchors:
    """The vectors of the same texts by two models, gathered while a collection is embedded anew."""

    pairs: dict[bytes, tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]] = field(default_factory=dict)

    def add(self, known: Sequence[Vector], vector: NDArray[np.float32]) -> None:
        """`known`: the vectors that a block came with; `vector`: of the new model."""
        for one in known:
            first, second = self.pairs.setdefault(one.fingerprint, ([], []))
            if len(first) < ANCHORS_MAX and 0 < one.scale <= SCALE_MAX:
                first.append(unit(restore(np.frombuffer(one.codes, np.int8)[None], np.array([one.scale], np.int64)))[0])
                second.append(vector)

    def add_sentences(self, sentences: Sequence[str], known: Embedder, new: Embedder) -> None:
        """Texts that both models can embed here, where the collection alone has too few. Takes some seconds."""
        first, second = self.pairs.setdefault(known.fingerprint, ([], []))
        if known.fingerprint != new.fingerprint and len(first) < ANCHORS_ENOUGH:
            first.extend(known.embed(sentences))
            second.extend(new.embed(sentences))

    def maps(self, new: bytes) -> list[SpaceMap]:
        """Maps between each model that blocks came with and the new one (its fingerprint), both ways, where there are texts enough
        to tell how good they are. Takes some seconds."""
        found = []
        for known, (first, second) in sorted(self.pairs.items()):
            # In an order that has nothing to do with how the texts came: those held out are to be like the others.
            if not first or known == new:
                continue
            order = np.random.default_rng(len(first)).permutation(len(first))
            one, other = (np.stack(side)[order] for side in (first, second))
            for source, target, x, y in ((known, new, one, other), (new, known, other, one)):
                try:
                    found.append(fit_map(source, target, x, y))
                except UsageError as error:
                    log.info("no_map", reason=error.cause)
        return found


def best_map(store: MemoryStore, collections: Sequence[bytes], source: bytes, dimension: int, now_ms: int) -> SpaceMap | None:
    """The map from a model (its fingerprint and dimension) to another with the best recall that was published in these collections,
    if it is good enough to answer. Runs in a worker thread. Raises LocalError."""
    blocks = store.listing(Filters(collections=tuple(collections), kinds=(MAP,)), PARTS_READ_MAX, now_ms)
    parts: dict[tuple[bytes, bytes], dict[int, bytes]] = {}
    for stored in blocks:
        try:
            part = read_part(stored.block.data) if stored.block else None
        except MalformedError:
            continue  # an author's affair
        if part is not None and part.source == source:
            parts.setdefault((stored.author, part.whole), {})[part.number] = stored.block.data if stored.block else b""
    found = []
    for whole in parts.values():
        try:
            space_map = join_parts(list(whole.values()))
        except MalformedError:
            continue
        if space_map.may_answer and space_map.source_dimension == dimension:
            found.append(space_map)
    return max(found, key=lambda one: (one.recall_ppm, one.target), default=None)
