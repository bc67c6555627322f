"""What is said in `/nexus/memory/ask/1`: one question and one answer per stream, about blocks of the shared memory.

Nothing in an answer is believed: charters, batches and receipts are signed and checked by whoever asked, and the hits of a search
are scored again by their own vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

from nexus.core.record import MessageSet, Record, digest, many, nested, optional_digest, raw, text, uint
from nexus.memory.block import DIMENSION_MAX, LANG_BYTES_MAX, SCALE_MAX, TAG_BYTES_MAX, TAGS_MAX, TIME_MAX_MS
from nexus.memory.bracket import RECEIPT_BYTES_MAX
from nexus.memory.collection import CHARTER_BYTES_MAX, NAME_BYTES_MAX
from nexus.network.transport import ProtocolSpec

ANSWER_BYTES_MAX = 1024 * 1024
COLLECTIONS_MAX = 256
GRANTS_MAX, GRANT_BYTES_MAX = 1024, 512
IDS_MAX = 256
HITS_MAX = 100
QUERY_BYTES_MAX = 4096
# As many as surely fit in a frame.
RECEIPTS_MAX = 480
AUTHORS_MAX = 16
REASON_BYTES_MAX = 256

ASK = ProtocolSpec(
    "/nexus/memory/ask/1",
    frame_max=ANSWER_BYTES_MAX + 64 * 1024,
    first_frame_max=64 * 1024,
    read_timeout_s=20.0,
    streams_per_peer_max=4,
    bytes_per_peer_s=8 * 1024 * 1024,
)


@dataclass(frozen=True, slots=True)
class CollectionsAsk(Record):
    """Of the collections that the peer has, those of this name or, where it is empty, those with these ids."""

    name: str = text(NAME_BYTES_MAX)
    ids: tuple[bytes, ...] = many(digest(), IDS_MAX)


@dataclass(frozen=True, slots=True)
class Collections(Record):
    """`charters`: `SignedCharter`s that the asker may see, as many as there is room for. `grants`: the keys of private ones, sealed
    to the asker. Also told without being asked, when a charter has changed; the answer is then another one, empty."""

    charters: tuple[bytes, ...] = many(raw(most=CHARTER_BYTES_MAX), COLLECTIONS_MAX)
    grants: tuple[bytes, ...] = many(raw(most=GRANT_BYTES_MAX), GRANTS_MAX)


@dataclass(frozen=True, slots=True)
class BlocksAsk(Record):
    ids: tuple[bytes, ...] = many(digest(), IDS_MAX)


@dataclass(frozen=True, slots=True)
class Blocks(Record):
    """`batches`: `SignedBatch`es with those blocks that are there, as many as there is room for."""

    batches: tuple[bytes, ...] = many(raw(most=ANSWER_BYTES_MAX), IDS_MAX)


@dataclass(frozen=True, slots=True)
class SearchAsk(Record):
    """The best `k` blocks of a collection, by `codes` (times `scale`, of the model `fingerprint`), by the words of `query`, or by
    both: whatever is not empty. The rest filters; 0 and empty: any. `latitude`, `longitude`: hundredths of a degree from the south
    pole and from 180 degrees west; they count where `radius_km` is not 0."""

    collection: bytes = digest()
    k: int = uint(HITS_MAX, least=1)
    fingerprint: bytes = optional_digest()
    scale: int = uint(SCALE_MAX)
    codes: bytes = raw(most=DIMENSION_MAX)
    query: str = text(QUERY_BYTES_MAX)
    tags: tuple[str, ...] = many(text(TAG_BYTES_MAX), TAGS_MAX)
    authors: tuple[bytes, ...] = many(raw(32), AUTHORS_MAX)
    lang: str = text(LANG_BYTES_MAX)
    since_ms: int = uint(TIME_MAX_MS)
    until_ms: int = uint(TIME_MAX_MS)
    latitude: int = uint(18_000)
    longitude: int = uint(36_000)
    radius_km: int = uint(20_100)


@dataclass(frozen=True, slots=True)
class ReceiptsAsk(Record):
    """What attests these blocks: the peer's own attestations and those that it knows of."""

    ids: tuple[bytes, ...] = many(digest(), IDS_MAX)


@dataclass(frozen=True, slots=True)
class BlockReceipt(Record):
    """`receipt`: a `nexus.memory.bracket.Receipt` for this block."""

    block: bytes = digest()
    receipt: bytes = raw(most=RECEIPT_BYTES_MAX)


@dataclass(frozen=True, slots=True)
class Receipts(Record):
    receipts: tuple[BlockReceipt, ...] = many(nested(BlockReceipt), RECEIPTS_MAX)


@dataclass(frozen=True, slots=True)
class Declined(Record):
    reason: str = text(REASON_BYTES_MAX)


MESSAGES = MessageSet(CollectionsAsk, Collections, BlocksAsk, Blocks, SearchAsk, ReceiptsAsk, Receipts, Declined)
