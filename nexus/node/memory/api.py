"""What a node's memory offers to whatever steers it: plain data in, plain data out. `nexus.node.memory.service` implements it.

Blocks are named by their CIDs ("bafkrei..."), or where a user names one, by any start of it that fits one block here. Collections
are named `NAME` or, where several owners have one of that name, `NAME@PEER`, with the peer id of the owner or a start of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from nexus.node.progress import Progress

MAIN = "main"
# What a part of an export may have: the control API takes no more at a time.
EXPORT_PART_BYTES_MAX = 4 * 1024 * 1024
# Blocks that one listing shows at most.
LIST_MAX = 10_000


@dataclass(frozen=True, slots=True)
class AddRequest:
    """A document, or a vector that was computed elsewhere.

    `text` is cut into chunks, a block each. `ttl_s` None: it does not expire. `links`: blocks that it refers to. `replaces`: the
    block of which this is the next version; the text must then fit one block. `vector`: of `text` as a whole, which may be empty,
    by the model `vector_model`, whose fingerprint is given in hex; it must be finite, and gets length 1.
    """

    text: str
    title: str = ""
    collection: str = MAIN
    tags: tuple[str, ...] = ()
    lang: str = ""
    ttl_s: float | None = None
    links: tuple[str, ...] = ()
    replaces: str | None = None
    vector: tuple[float, ...] = ()
    vector_model: str = ""
    vector_fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class AddedView:
    """`ids`: the new blocks in the order of the text. `known`: chunks that this node had written into the collection before."""

    collection: str
    ids: tuple[str, ...]
    known: int


@dataclass(frozen=True, slots=True)
class BlockView:
    """A block. `author`: a peer id. `place`: the middle of its cell as "latitude, longitude", and `place_step` its side in degrees;
    "" and 0 without. `grade`: of `nexus.memory.bracket`; `not_before_ms`, `not_after_ms`: what others' signatures say of its time,
    or None. `state`: "live", "superseded", "removed", "pruned" or "expired". `winner`: the version that searches show. `heads`: all
    versions that nothing replaces; more than one are in conflict. `text` is whole in `get`, and cut in listings."""

    id: str
    kind: str
    collection: str
    author: str
    author_name: str
    created_ms: int
    expires_ms: int
    received_ms: int
    title: str
    lang: str
    tags: tuple[str, ...]
    text: str
    source: str
    part: int
    links: tuple[str, ...]
    parents: tuple[str, ...]
    models: tuple[str, ...]
    place: str
    place_step: float
    grade: str
    not_before_ms: int | None
    not_after_ms: int | None
    witnesses: int
    state: str
    pinned: bool
    winner: str
    heads: tuple[str, ...]
    size: int


@dataclass(frozen=True, slots=True)
class Filters:
    """Which blocks: of any of `collections` and `authors` (peer ids or names), with all of `tags`, made from `since_ms` on and
    before `until_ms`, stamped within `near_km` of `near` (latitude, longitude in degrees). Empty or None: any."""

    collections: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    authors: tuple[str, ...] = ()
    lang: str = ""
    since_ms: int | None = None
    until_ms: int | None = None
    near: tuple[float, float] | None = None
    near_km: float = 100.0


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """`hybrid`: by words too, the two rankings fused. `model`: of whose vectors; None: the embedder of this node. `network`: ask
    peers too, for at most `deadline_s`. `vector`: of the question, computed elsewhere, as in `AddRequest`; `text` may then be
    empty."""

    text: str
    filters: Filters = Filters()
    k: int = 10
    hybrid: bool = False
    model: str | None = None
    network: bool = False
    deadline_s: float = 5.0
    vector: tuple[float, ...] = ()
    vector_model: str = ""
    vector_fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class HitView:
    """`similarity`: the cosine, None where the block was found by its words alone. `found_at`: the peer that it came from, "" for
    this node."""

    block: BlockView
    score: float
    similarity: float | None
    found_at: str


@dataclass(frozen=True, slots=True)
class AskedView:
    """A peer that was asked. `outcome`: "answered", or in a word why not."""

    peer_id: str
    name: str
    outcome: str
    hits: int
    took_s: float


@dataclass(frozen=True, slots=True)
class SearchView:
    """`complete`: every peer that was asked has answered in time. `explain`: how it was found, a sentence each."""

    hits: tuple[HitView, ...]
    model: str
    took_s: float
    complete: bool
    asked: tuple[AskedView, ...]
    explain: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PruneRequest:
    """Give up bodies of blocks: those older than `older_than_s`, then the oldest until all take at most `bytes_max`. Pinned ones
    stay."""

    older_than_s: float | None = None
    bytes_max: int | None = None
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class PruneView:
    blocks: int
    bytes: int
    dry_run: bool


@dataclass(frozen=True, slots=True)
class CollectionStats:
    """`live`: blocks that are shown. `vectors`: how many there are of each model, by its name."""

    collection: str
    live: int
    bytes: int
    vectors: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class StatsView:
    """`blocks`: how many by state, those of `BlockView`. `bytes`: of blocks, of `bytes_max`; `disk_bytes`: everything of the memory
    on the disk. `model`: what texts are embedded with. `notices`: what was found damaged since the start, and made anew."""

    collections: tuple[CollectionStats, ...]
    blocks: tuple[tuple[str, int], ...]
    bytes: int
    bytes_max: int
    disk_bytes: int
    model: str
    notices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VerifyView:
    """Blocks read again from the disk: hash, signature, sky and place in the index. `problems`: what was found, a sentence each."""

    checked: int
    damaged: int
    repaired: int
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ExportPart:
    """A part of an export: bytes that `import_part` takes, batches, or parts of them, or charters, with all their proofs; at most
    EXPORT_PART_BYTES_MAX."""

    content: bytes
    blocks: int


@dataclass(frozen=True, slots=True)
class ImportView:
    """`refused`: blocks that do not hold, `reasons` the first of them, a sentence each."""

    new: int
    known: int
    refused: int
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReindexView:
    """`missing`: blocks without a text here, which cannot be embedded anew. `maps`: how many maps between this model and others
    were published, so that nodes with one of them find what has vectors of another."""

    model: str
    embedded: int
    missing: int
    maps: int


@dataclass(frozen=True, slots=True)
class CollectionView:
    """`mode`: "public", "writers" or "private". `owner`, `writers`, `members`: peer ids."""

    name: str
    id: bytes
    mode: str
    owner: str
    owner_name: str
    revision: int
    writers: tuple[str, ...]
    members: tuple[str, ...]
    may_write: bool
    may_read: bool
    subscribed: bool
    blocks: int
    bytes: int


@dataclass(frozen=True, slots=True)
class SyncView:
    """One collection and one peer. `state`: "in sync", "behind", "syncing", "waiting", "failing", "demoted" or "dropped"; `reason`
    says why."""

    collection: str
    peer_id: str
    name: str
    state: str
    missing: int
    received: int
    refused: int
    failures: int
    last_success_ms: int
    next_try_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class WitnessView:
    """What this node attested last: at `at_ms` it had seen `blocks` blocks, under one root. `issued`: attestations in all."""

    issued: int
    at_ms: int
    blocks: int
    root: bytes
    previous: bytes
    interval_s: float
    witnesses_wanted: int


class MemoryApi(Protocol):
    """Every method raises the errors of `nexus.core.errors`."""

    def add(self, request: AddRequest) -> AsyncIterator[Progress | AddedView]:
        """Cut, embed, stamp, sign and store a document; what came of it is the last item, and durable by then."""
        ...

    async def search(self, request: SearchRequest) -> SearchView: ...

    async def get(self, block: str, *, network: bool) -> BlockView:
        """`network`: find it at peers where it is not here; it is verified, and kept where this node follows its collection."""
        ...

    async def listed(self, filters: Filters, limit: int) -> list[BlockView]:
        """The newest first."""
        ...

    async def remove(self, block: str) -> tuple[str, ...]:
        """Sign a tombstone for an own block and its earlier versions; the ids that it takes away."""
        ...

    async def pin(self, block: str, pinned: bool) -> BlockView: ...

    async def prune(self, request: PruneRequest) -> PruneView: ...

    async def stats(self) -> StatsView: ...

    def export(self, collections: Sequence[str]) -> AsyncIterator[ExportPart]:
        """The blocks of these collections, or of all."""
        ...

    async def import_part(self, content: bytes) -> ImportView: ...

    def verify(self, block: str | None) -> AsyncIterator[Progress | VerifyView]: ...

    def reindex(self, model: str, collection: str | None) -> AsyncIterator[Progress | ReindexView]:
        """Embed what is here with another model too, whose vectors join those that there are."""
        ...

    async def collections(self) -> list[CollectionView]: ...

    async def create_collection(self, name: str, mode: str, writers: Sequence[str]) -> CollectionView:
        """`mode`: "public", "writers" or "private". `writers`: peers, who in a private collection also read it."""
        ...

    async def grant(self, collection: str, peer: str, *, write: bool, revoke: bool) -> CollectionView:
        """Let a peer read (private) or write, or no longer."""
        ...

    async def subscribe(self, name: str, peer: str | None) -> CollectionView:
        """Follow a collection, known here or found at `peer` or anywhere in reach."""
        ...

    async def unsubscribe(self, name: str) -> CollectionView:
        """Follow it no longer; its blocks stay until they are pruned."""
        ...

    async def sync(self, collection: str | None) -> list[SyncView]:
        """Exchange with all peers in reach now, and say what came of it."""
        ...

    async def sync_status(self) -> list[SyncView]: ...

    async def witness(self) -> WitnessView: ...
