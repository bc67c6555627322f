"""Blocks and batches as tests of the memory store make them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nexus.core.keys import Identity
from nexus.memory.batch import SignedBatch, open_batch, sign_batch
from nexus.memory.block import CONTENT, INT8, TIME_MIN_MS, TOMBSTONE, Block, Vector, encode_block
from nexus.memory.versions import Rule, same_author
from nexus.storage.memory.records import Arrival, Content
from nexus.storage.memory.store import MemoryStore

COLLECTION = b"c" * 32
FINGERPRINT = b"f" * 32
T0 = TIME_MIN_MS + 1_000_000
AUTHORS = [Identity(bytes([number]) * 32) for number in range(4)]


def rules(collection: bytes) -> Rule:
    del collection
    return same_author


def open_store(root: Path, bytes_max: int = 1 << 30, author_bytes_max: int = 1 << 30) -> MemoryStore:
    return MemoryStore(root, bytes_max=bytes_max, author_bytes_max=author_bytes_max)


def codes_of(seed: int, dimension: int = 16) -> bytes:
    return np.random.default_rng(seed).integers(-127, 128, dimension).astype(np.int8).tobytes()


def vector(seed: int, dimension: int = 16, fingerprint: bytes = FINGERPRINT) -> Vector:
    return Vector("test", fingerprint, INT8, 1_000_000, codes_of(seed, dimension))


def plain(number: int, author: int = 0, collection: bytes = COLLECTION, **fields: object) -> Block:
    """A text with a vector, made at T0 + `number` ms."""
    values: dict[str, object] = {"text": f"text number{number}", "vectors": (vector(number),), **fields}
    return Block(CONTENT, collection, AUTHORS[author].public_key, T0 + number, **values)  # type: ignore[arg-type]


def tombstone(number: int, parents: bytes, author: int = 0, collection: bytes = COLLECTION) -> Block:
    return Block(TOMBSTONE, collection, AUTHORS[author].public_key, T0 + number, parents=parents)


def signed(blocks: Sequence[Block]) -> SignedBatch:
    author = next(identity for identity in AUTHORS if identity.public_key == blocks[0].author)
    return sign_batch(author, [encode_block(block) for block in blocks])


def arrival(
    batch: SignedBatch, contents: Sequence[Content | None] | None = None, received_ms: int = T0, sender: bytes = b""
) -> Arrival:
    opened = tuple(open_batch(batch))
    given = [Content.of(each.block) for each in opened] if contents is None else contents
    return Arrival(batch.proof, opened, tuple(given), received_ms, sender)


def put(store: MemoryStore, *blocks: Block, received_ms: int = T0) -> list[bytes]:
    return store.put([arrival(signed(blocks), received_ms=received_ms)], rules)
