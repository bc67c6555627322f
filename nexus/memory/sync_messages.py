"""The messages of `/nexus/memory-sync/1`, and the news of a collection that goes over gossip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nexus.core.errors import MalformedError
from nexus.core.record import MessageSet, Record, digest, many, raw, text, uint
from nexus.memory.block import TIME_MAX_MS, TIME_MIN_MS
from nexus.memory.item_set import ITEM_BYTES, SALT_BYTES, Item, pack_item, unpack_items
from nexus.memory.reconcile_wire import PAYLOAD_MAX

PROTOCOL_ID = "/nexus/memory-sync/1"
FRAME_MAX = 1024 * 1024
WANT_MAX = 256
TELL_MAX = 512
NEWS_MAX = 24
SIZE_MAX = 2**40
# What the rest of a full answer takes: an id missing has 34 bytes, a batch a head of at most 5.
BATCHES_BYTES_MAX = FRAME_MAX - 40 * WANT_MAX - 64


@dataclass(frozen=True, slots=True)
class Open(Record):
    """Begins a session. `salt`: of its fingerprints, random; `size`: how many ids the sender knows; `query`: as in `Query`."""

    collection: bytes = digest()
    salt: bytes = raw(SALT_BYTES)
    size: int = uint(SIZE_MAX)
    query: bytes = raw(most=PAYLOAD_MAX)


@dataclass(frozen=True, slots=True)
class Query(Record):
    query: bytes = raw(most=PAYLOAD_MAX)


@dataclass(frozen=True, slots=True)
class Reply(Record):
    """To Open and Query. `size`: how many ids the sender knows."""

    size: int = uint(SIZE_MAX)
    reply: bytes = raw(most=PAYLOAD_MAX)


@dataclass(frozen=True, slots=True)
class Want(Record):
    """These blocks, please. Needs no Open before it."""

    collection: bytes = digest()
    ids: tuple[bytes, ...] = many(digest(), WANT_MAX)


@dataclass(frozen=True, slots=True)
class Batches(Record):
    """To Want: signed batches with only such blocks as were asked for, and the ids of which the sender has no block. About the
    others there was no room: ask again."""

    batches: tuple[bytes, ...] = many(raw(most=BATCHES_BYTES_MAX), WANT_MAX)
    missing: tuple[bytes, ...] = many(digest(), WANT_MAX)


@dataclass(frozen=True, slots=True)
class Tell(Record):
    """The sender has `total` items that the receiver lacks: these, of 40 bytes each; of more than `TELL_MAX` none is listed, and
    the receiver reconciles for itself."""

    collection: bytes = digest()
    items: bytes = raw(most=TELL_MAX * ITEM_BYTES)
    total: int = uint(SIZE_MAX)

    @classmethod
    def of(cls, collection: bytes, items: Sequence[Item]) -> Tell:
        return cls(collection, b"".join(map(pack_item, items)) if len(items) <= TELL_MAX else b"", len(items))


@dataclass(frozen=True, slots=True)
class Told(Record):
    """To Tell."""


@dataclass(frozen=True, slots=True)
class Refuse(Record):
    """To any request: not served, and why."""

    cause: str = text(256)


MESSAGES = MessageSet(Open, Query, Reply, Want, Batches, Tell, Told, Refuse)


@dataclass(frozen=True, slots=True)
class News(Record):
    """Gossip, at most a kilobyte: the publisher has these new items, 40 bytes each, and `more` beside them. Never payloads."""

    collection: bytes = digest()
    items: bytes = raw(most=NEWS_MAX * ITEM_BYTES)
    more: int = uint(2**32)

    @classmethod
    def of(cls, collection: bytes, items: Sequence[Item]) -> News:
        """Of many items only their number goes out: who has not got them already reconciles."""
        if len(items) > NEWS_MAX:
            return cls(collection, b"", len(items))
        return cls(collection, b"".join(map(pack_item, items)), 0)


def told_items(packed: bytes) -> list[Item]:
    """The items in a News or a Tell. Raises MalformedError."""
    if len(packed) % ITEM_BYTES:
        raise MalformedError("items have 40 bytes each")
    items = unpack_items(packed)
    if any(not TIME_MIN_MS <= item.t_ms <= TIME_MAX_MS for item in items) or len({item.id for item in items}) != len(items):
        raise MalformedError("an item has a time that no block has, or comes twice")
    return items
