"""The messages of `/nexus/blobs/1`, what a node has in one byte form, and chunks that are sent smaller than they are. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from nexus.core.errors import MalformedError
from nexus.core.hashing import HASH_BYTES
from nexus.core.manifest import CHUNK_BYTES, Blob, Manifest, chunk_count
from nexus.core.record import MessageSet, Record, digest, text, uint
from nexus.network.transport import ProtocolSpec
from nexus.node.blobs_schedule import Flags
from nexus.storage.blobs import BLOB_BYTES_MAX

CHUNKS_MAX = 16
HASHES_MAX = CHUNK_BYTES // HASH_BYTES
CHUNK_INDEX_MAX = BLOB_BYTES_MAX // CHUNK_BYTES
FRAME_MAX = CHUNK_BYTES + 64 * 1024
BLOBS = ProtocolSpec("/nexus/blobs/1", frame_max=FRAME_MAX, read_timeout_s=60.0, streams_per_peer_max=4, bulk=True)

MANIFEST, HAVE, HASHES, CHUNKS = "manifest", "have", "hashes", "chunks"
OK = "ok"
# zlib's fastest level does about 50 MB/s a core: enough for the links that it is for, and more effort saves little on weights.
PACK_LEVEL = 1
# What packing has to save to be worth the time of both sides.
PACK_SAVES = 0.9
_NONE, _ALL, _SOME = range(3)


@dataclass(frozen=True, slots=True)
class Ask(Record):
    """`what`: "manifest" or "have" (root: the model's), "hashes" or "chunks" (root: the blob's), then [start, start + count) of
    them. `packed`: 1 where chunks may come packed."""

    what: str = text(16)
    root: bytes = digest()
    start: int = uint(CHUNK_INDEX_MAX)
    count: int = uint(HASHES_MAX)
    packed: int = uint(1)


@dataclass(frozen=True, slots=True)
class Answer(Record):
    """`code`: "ok", and then `frames` frames follow; or an error code of `nexus.core.errors` with its cause, and none do."""

    code: str = text(32)
    frames: int = uint(CHUNKS_MAX)
    cause: str = text(512)


ASKS = MessageSet(Ask)
ANSWERS = MessageSet(Answer)


def blobs_of(manifest: Manifest) -> tuple[Blob, ...]:
    """All of a model, in the order in which have-maps speak of it."""
    return (*manifest.files, *manifest.pieces)


def pack_have(blobs: Sequence[Blob], here: Iterable[bytes | bool]) -> bytes:
    """Per blob a byte: 0 none of it, 1 all of it, 2 some: then a bit per chunk, the lowest bit of a byte first.

    `here`: of each blob whether it is here, or a byte per chunk that says so. What would be longer than a frame is cut to none."""
    out = bytearray()
    room = FRAME_MAX - len(blobs)
    for one in here:
        if isinstance(one, bytes) and 0 < one.count(1) < len(one) and (len(one) + 7) // 8 <= room:
            bits = np.packbits(np.frombuffer(one, np.uint8), bitorder="little").tobytes()
            room -= len(bits)
            out += bytes((_SOME,)) + bits
        else:
            out.append(_ALL if one is True or (isinstance(one, bytes) and one.count(1) == len(one)) else _NONE)
    return bytes(out)


def unpack_have(blobs: Sequence[Blob], raw: bytes) -> dict[bytes, Flags]:
    """By blob root, a flag per chunk. Raises MalformedError."""
    found: dict[bytes, Flags] = {}
    at = 0
    for blob in blobs:
        count = chunk_count(blob.size)
        state = raw[at] if at < len(raw) else -1
        at += 1
        if state == _SOME:
            bits = raw[at : at + (count + 7) // 8]
            at += (count + 7) // 8
            flags = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
            if len(flags) < count or flags[count:].any():
                raise MalformedError("a have-map whose bits do not fit the blob")
            found[blob.root] = flags[:count].astype(np.bool_)
        elif state in (_NONE, _ALL):
            found[blob.root] = np.full(count, state == _ALL, np.bool_)
        else:
            raise MalformedError("a have-map that ends early or speaks of an unknown state")
    if at != len(raw):
        raise MalformedError("a have-map with bytes left over")
    return found


def pack_chunk(data: bytes) -> bytes | None:
    """The chunk as zlib, or None where that saves too little. It is always shorter than the chunk: that tells the two apart."""
    packed = zlib.compress(data, PACK_LEVEL)
    return packed if len(packed) <= PACK_SAVES * len(data) else None


def unpack_chunk(frame: bytes, length: int) -> bytes:
    """The chunk of `length` bytes in a frame, packed or not. Never makes more than that of it. Raises MalformedError."""
    if len(frame) == length:
        return frame
    if len(frame) > length:
        raise MalformedError(f"it sent {len(frame)} bytes for a chunk of {length}")
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(frame, length + 1)
    except zlib.error as error:
        raise MalformedError("it sent a chunk of another length, and not packed either") from error
    if len(data) != length or not unpacker.eof or unpacker.unused_data or unpacker.unconsumed_tail:
        raise MalformedError(f"what it packed is not a chunk of {length} bytes")
    return data
