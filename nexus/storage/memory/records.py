"""What goes into the memory store and comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from nexus.core.encoding import Value, decode, encode
from nexus.core.errors import CapacityError, MalformedError
from nexus.memory.batch import BatchProof, OpenedBlock
from nexus.memory.block import Block, Vector
from nexus.memory.versions import Rule

# The rule by which blocks of a collection (its id) may replace one another.
Rules = Callable[[bytes], Rule]


class State(IntEnum):
    """What this node holds of a block. LIVE: shown. SUPERSEDED: replaced by a later version, or in conflict with one that is shown;
    kept. REMOVED: taken away by its author, erased. PRUNED: dropped here for room. EXPIRED: its time is over. Of the last three
    only the row with the id stays."""

    LIVE, SUPERSEDED, REMOVED, PRUNED, EXPIRED = range(5)


WITH_BODY = (State.LIVE, State.SUPERSEDED)


class QuotaError(CapacityError):
    """`whose`: "total" for the whole store, "author" for what one author may have in one collection (`author`, `collection`)."""

    def __init__(self, cause: str, fix: str, whose: str, author: bytes = b"", collection: bytes = b"") -> None:
        super().__init__(cause, fix)
        self.whose = whose
        self.author = author
        self.collection = collection


@dataclass(frozen=True, slots=True)
class Content:
    """What of a block is searched: of a plain block its own fields, of a sealed one what a member of its collection can read."""

    text: str = ""
    title: str = ""
    lang: str = ""
    tags: tuple[str, ...] = ()
    links: bytes = b""
    source: bytes = b""
    part: int = 0
    vectors: tuple[Vector, ...] = ()

    @classmethod
    def of(cls, block: Block) -> Self:
        return cls(block.text, block.title, block.lang, block.tags, block.links, block.source, block.part, block.vectors)

    def to_bytes(self) -> bytes:
        vectors: Value = tuple((*vector,) for vector in self.vectors)
        return encode((self.text, self.title, self.lang, self.tags, self.links, self.source, self.part, vectors))

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Raises MalformedError for what `to_bytes` did not make. Bytes are checked by a hash before they come here."""
        value = decode(data)
        try:
            text, title, lang, tags, links, source, part, vectors = value  # type: ignore[misc]
            return cls(text, title, lang, tuple(tags), links, source, part, tuple(Vector(*each) for each in vectors))  # type: ignore[arg-type, misc, union-attr]
        except (TypeError, ValueError) as error:
            raise MalformedError("not the content of a block") from error


@dataclass(frozen=True, slots=True)
class Arrival:
    """Blocks of one signed batch, opened and checked. `contents`: one for each block: `Content.of` a plain block, what could be
    read of a sealed one, None where nothing is to be searched. `sender`: the public key of the peer; empty if made here."""

    proof: BatchProof
    opened: tuple[OpenedBlock, ...]
    contents: tuple[Content | None, ...]
    received_ms: int
    sender: bytes = b""


class Versions(NamedTuple):
    """`heads`: versions of the same thing that nothing replaces, the one to show first; several where they are concurrent."""

    winner: bytes | None
    heads: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """`data`, `block` and `content` are empty or None where only the id is left (see `State`). `versions`: None for a block that
    neither replaces another nor is replaced."""

    id: bytes
    state: State
    collection: bytes
    author: bytes
    kind: int
    created_ms: int
    expires_ms: int
    received_ms: int
    sender: bytes
    pinned: bool
    data: bytes = b""
    block: Block | None = None
    content: Content | None = None
    versions: Versions | None = None


class Item(NamedTuple):
    """A block as sets are compared. `number`: where to go on from, growing in order of arrival."""

    number: int
    created_ms: int
    id: bytes
    state: State


class VectorRow(NamedTuple):
    """A vector for a block that is stored already. See `nexus.memory.block.Vector`."""

    id: bytes
    scale: int
    codes: bytes


class Near(NamedTuple):
    """Degrees north and east, kilometres. Blocks without a sky are nowhere."""

    latitude: float
    longitude: float
    radius_km: float


@dataclass(frozen=True, slots=True)
class Filters:
    """What a block must be like. Empty means any. `tags`: all of them. Times in ms, both ends included."""

    collections: tuple[bytes, ...] = ()
    tags: tuple[str, ...] = ()
    authors: tuple[bytes, ...] = ()
    langs: tuple[str, ...] = ()
    kinds: tuple[int, ...] = ()
    since_ms: int = 0
    until_ms: int = 0
    near: Near | None = None
    states: tuple[State, ...] = (State.LIVE,)


@dataclass(frozen=True, slots=True)
class PruneReport:
    """How many blocks, and bytes of them, went or would go. `ids`: which."""

    ids: tuple[bytes, ...]
    size: int


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """`damaged`: blocks whose bytes or row do not fit their hash: set aside, and wanted again from peers. `repaired`: derived
    files that did not agree with the blocks and were made anew."""

    checked: int
    damaged: tuple[bytes, ...] = ()
    repaired: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SpaceStats:
    collection: bytes
    fingerprint: bytes
    model: str
    dimension: int
    vectors: int
    indexed: int


@dataclass(frozen=True, slots=True)
class Stats:
    """`blocks`: by state. `size`: bytes, of `size_max`. `collections`: their ids, live blocks and bytes."""

    blocks: dict[State, int]
    size: int
    size_max: int
    collections: tuple[tuple[bytes, int, int], ...]
    spaces: tuple[SpaceStats, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Query:
    """What to search for: the nearest to `vector` (float32 [d], of the model `fingerprint`), or without one texts with words of
    `text`, or with `hybrid` both, fused by rank. `blocks`: whether hits carry their blocks."""

    k: int = 10
    vector: NDArray[np.float32] | None = None
    fingerprint: bytes = b""
    text: str = ""
    hybrid: bool = False
    filters: Filters = Filters()
    blocks: bool = True


class Hit(NamedTuple):
    """`score`: what the list is ordered by: the cosine, for texts alone minus bm25, or the sum of 1 / (60 + rank) of both lists.
    `cosine` and `text_rank` (from 1) are None where the block is not in that list. `block`: None if not asked for."""

    id: bytes
    score: float
    cosine: float | None = None
    text_rank: int | None = None
    block: StoredBlock | None = None


@dataclass(frozen=True, slots=True)
class Explain:
    """How a search went. `paths`: one line per space of vectors and one for the words, e.g. "index", "flat", "words". `candidates`:
    how many each compared. `seconds`: by step."""

    paths: tuple[str, ...] = ()
    candidates: tuple[int, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SearchResult:
    hits: tuple[Hit, ...]
    explain: Explain
