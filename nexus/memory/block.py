"""Blocks, the units of the shared memory: a text or the hash of one, its vectors, its time and sky, and what it refers to.

A block is the encoding (`nexus.core.encoding`) of an array of eighteen values: the number of this form, then `Block`'s fields in
order. Its id is the plain SHA-256 of these bytes, so that the id is also a CID (version 1, raw) that other software can compute.
Who wrote it is proven by the signature of the batch it was sealed in (`nexus.memory.batch`).

`decode_block` is written out by hand and not a `Record`: a node that joins a collection decodes every block of it. The first
eighty bytes have the same layout in every block, so they are taken apart in one step.
"""

from __future__ import annotations

import base64
import binascii
import struct
from hashlib import sha256
from typing import NamedTuple

from nexus.core.encoding import Value, encode
from nexus.core.errors import MalformedError, UsageError

SPEC = 1
ID_BYTES = 32
BLOCK_BYTES_MAX = 64 * 1024

# What a block is. CONTENT: a text, or the hash of a source. TOMBSTONE: takes its parents away. SEALED: content that only the
# members of its collection can read. MAP: a part of a map between the spaces of two models.
CONTENT, TOMBSTONE, SEALED, MAP = range(4)
KIND_NAMES = ("content", "tombstone", "sealed", "map")

# Times of blocks are whole milliseconds since 1970 UTC. From 2**32 on (19 February 1970) all have an encoding of nine bytes.
TIME_MIN_MS, TIME_MAX_MS = 2**32, 2**53 - 1
SKY_BYTES = 98
PARENTS_MAX, LINKS_MAX, AFTER_MAX = 16, 32, 4
TAGS_MAX, TAG_BYTES_MAX = 16, 64
TITLE_BYTES_MAX, LANG_BYTES_MAX = 256, 32
PART_MAX = 2**24
TEXT_BYTES_MAX = 32 * 1024
VECTORS_MAX, MODEL_BYTES_MAX, DIMENSION_MAX = 4, 64, 4096
SCALE_MAX = 2_000_000_000
DATA_BYTES_MAX = 48 * 1024

INT8 = 1  # the scheme of a vector: codes in [-127, 127], times scale / 127e9

_PREFIX = struct.Struct(">BBBH32sH32sBQ")
_ARRAY_HEAD, _BYTES_32, _UINT_8 = 0x80 | 18, 0x5820, 0x1B
_EMPTY_ARRAY = 0x80
_NONE_OF_FOUR = b"\x00\x40\x40\x40"  # no expiry, parents, links or data
_CID_HEAD = bytes((1, 0x55, 0x12, 0x20))  # CID version 1, raw, SHA-256 of 32 bytes
_CID_CHARS = 59


class Vector(NamedTuple):
    """An embedding of the block. `model`: what its author calls the model; `fingerprint` says which it is. `scale`: see INT8."""

    model: str
    fingerprint: bytes
    scheme: int
    scale: int
    codes: bytes


class Block(NamedTuple):
    """`author`: a public key. `expires_ms`: when it may be forgotten, or 0. `sky`: a `SkyStamp`, or empty.

    `parents`: earlier versions that this one replaces; `links`: blocks that it refers to; `after`: the newest blocks that its
    author knew of. These are ids, one after another. `tags`: sorted, each once. `source`: SHA-256 of the document that the text is
    part number `part` of, or empty. `data`: of sealed blocks and maps.
    """

    kind: int
    collection: bytes
    author: bytes
    created_ms: int
    expires_ms: int = 0
    parents: bytes = b""
    links: bytes = b""
    data: bytes = b""
    sky: bytes = b""
    after: bytes = b""
    source: bytes = b""
    tags: tuple[str, ...] = ()
    title: str = ""
    lang: str = ""
    part: int = 0
    text: str = ""
    vectors: tuple[Vector, ...] = ()


def encode_block(block: Block) -> bytes:
    """The only bytes of `block`. Raises UsageError where there are none: a value is out of its bounds."""
    data = encode((SPEC, *_values(block)))
    try:
        decode_block(data)
    except MalformedError as error:
        raise UsageError(f"this is no block: {error.cause}", "Keep within the bounds in docs/protocol.md") from error
    return data


def _values(block: Block) -> tuple[Value, ...]:
    return tuple(tuple(tuple(vector) for vector in value) if value is block.vectors else value for value in block)


def block_id(data: bytes) -> bytes:
    """The id of the block that has these bytes."""
    return sha256(data).digest()


def id_text(identifier: bytes) -> str:
    """An id as people and other software see it: a CID, base32, 59 characters from "bafkrei" on."""
    return "b" + base64.b32encode(_CID_HEAD + identifier).decode("ascii").rstrip("=").lower()


def parse_id(text: str) -> bytes:
    """The id in a CID. Raises MalformedError."""
    if len(text) != _CID_CHARS or not text.startswith("b") or text != text.lower():
        raise MalformedError(f"{text[:80]!r} is not the id of a block")
    try:
        raw = base64.b32decode(text[1:].upper() + "=" * (-(_CID_CHARS - 1) % 8))
    except (binascii.Error, ValueError) as error:
        raise MalformedError(f"{text!r} is not the id of a block") from error
    if not raw.startswith(_CID_HEAD) or len(raw) != len(_CID_HEAD) + ID_BYTES or id_text(raw[len(_CID_HEAD) :]) != text:
        raise MalformedError(f"{text!r} is not the id of a block")
    return raw[len(_CID_HEAD) :]


def split_ids(joined: bytes) -> tuple[bytes, ...]:
    """The ids in a field that has them one after another."""
    return tuple(joined[at : at + ID_BYTES] for at in range(0, len(joined), ID_BYTES))


def decode_block(data: bytes) -> Block:
    """The block whose only bytes are `data`. Raises MalformedError."""
    if not _PREFIX.size < len(data) <= BLOCK_BYTES_MAX:
        raise MalformedError(f"a block has {_PREFIX.size + 1} to {BLOCK_BYTES_MAX} bytes, not {len(data)}")
    head, spec, kind, collection_head, collection, author_head, author, time_head, created_ms = _PREFIX.unpack_from(data)
    if head != _ARRAY_HEAD or collection_head != _BYTES_32 or author_head != _BYTES_32 or time_head != _UINT_8:
        raise MalformedError("not laid out as a block")
    if spec != SPEC or kind > MAP:
        raise MalformedError(f"form {spec} or kind {kind} of a block is not known")
    if not TIME_MIN_MS <= created_ms <= TIME_MAX_MS:
        raise MalformedError("the time of the block is out of range")
    try:
        return _decode_rest(data, kind, collection, author, created_ms)
    except IndexError:
        raise MalformedError("the block ends too early") from None
    except UnicodeDecodeError as error:
        raise MalformedError("a text of the block is not UTF-8") from error


def _decode_rest(data: bytes, kind: int, collection: bytes, author: bytes, created_ms: int) -> Block:
    at = _PREFIX.size
    expires_ms, parents, links, rest = 0, b"", b"", b""
    if data[at : at + 4] == _NONE_OF_FOUR:  # so it is in nearly all blocks
        at += 4
    else:
        expires_ms, at = _uint(data, at, TIME_MAX_MS)
        parents, at = _bytes(data, at, PARENTS_MAX * ID_BYTES)
        links, at = _bytes(data, at, LINKS_MAX * ID_BYTES)
        rest, at = _bytes(data, at, DATA_BYTES_MAX)
        if 0 < expires_ms <= created_ms:
            raise MalformedError("the block expires before it was made")
    sky, at = _bytes(data, at, SKY_BYTES)
    after, at = _bytes(data, at, AFTER_MAX * ID_BYTES)
    source, at = _bytes(data, at, ID_BYTES)
    tags: tuple[str, ...] = ()
    if data[at] == _EMPTY_ARRAY:
        at += 1
    else:
        tags, at = _tags(data, at)
    title, at = _text(data, at, TITLE_BYTES_MAX)
    lang, at = _text(data, at, LANG_BYTES_MAX)
    part, at = _uint(data, at, PART_MAX)
    text, at = _text(data, at, TEXT_BYTES_MAX)
    vectors: tuple[Vector, ...] = ()
    if data[at] == _EMPTY_ARRAY:
        at += 1
    else:
        vectors, at = _vectors(data, at)
    if at != len(data):
        raise MalformedError("the block has bytes left over, or ends too early")
    if len(sky) not in (0, SKY_BYTES) or len(source) not in (0, ID_BYTES):
        raise MalformedError("a field of the block has a length that it cannot have")
    if (len(parents) | len(links) | len(after)) % ID_BYTES:
        raise MalformedError("a list of ids in the block is not made of whole ids")
    if not title.isprintable() or not lang.isprintable():
        raise MalformedError("a title or language has control characters")
    if kind == CONTENT:
        if rest or not (text or source or vectors):
            raise MalformedError("a block with content has a text, a source or a vector, and no data")
    else:
        _check_kind(kind, parents, rest, (links, sky, source, tags, title, lang, part, text, vectors))
    head = (kind, collection, author, created_ms, expires_ms, parents, links, rest)
    return Block(*head, sky, after, source, tags, title, lang, part, text, vectors)


def _check_kind(kind: int, parents: bytes, data: bytes, content: tuple[object, ...]) -> None:
    """A tombstone has parents and nothing else, a sealed block data and nothing in the open, a map data and a title."""
    if kind == TOMBSTONE and (not parents or data or any(content)):
        raise MalformedError("a tombstone names what it takes away, and nothing else")
    if kind == SEALED and (not data or any(content)):
        raise MalformedError("a sealed block has nothing in the open")
    if kind == MAP and (not data or content[-1]):
        raise MalformedError("a map has data, and no vectors")


def _uint(data: bytes, at: int, most: int) -> tuple[int, int]:
    head = data[at]
    if head < 24:
        return head, at + 1
    if head < 28:
        width = 1 << (head - 24)
        end = at + 1 + width
        value = int.from_bytes(data[at + 1 : end], "big")
        if value < (24 if width == 1 else 1 << (4 * width)) or end > len(data):
            raise MalformedError("a number in the block is not in its shortest form")
    else:
        raise MalformedError("a number is missing in the block")
    if value > most:
        raise MalformedError(f"a number in the block is above {most}")
    return value, end


def _bytes(data: bytes, at: int, most: int) -> tuple[bytes, int]:
    head = data[at]
    if head == 0x40:
        return b"", at + 1
    if head < 0x40 or head > 0x59:
        raise MalformedError("bytes are missing in the block")
    if head < 0x58:
        start, length = at + 1, head - 0x40
    else:
        start, length = _long(data, at, head - 0x58)
    end = start + length
    if length > most or end > len(data):
        raise MalformedError(f"bytes of the block are longer than {most}, or run past its end")
    return data[start:end], end


def _text(data: bytes, at: int, most: int) -> tuple[str, int]:
    head = data[at]
    if head == 0x60:
        return "", at + 1
    if head < 0x60 or head > 0x79:
        raise MalformedError("a text is missing in the block")
    if head < 0x78:
        start, length = at + 1, head - 0x60
    else:
        start, length = _long(data, at, head - 0x78)
    end = start + length
    if length > most or end > len(data):
        raise MalformedError(f"a text of the block is longer than {most} bytes, or runs past its end")
    return data[start:end].decode("utf-8"), end


def _long(data: bytes, at: int, wide: int) -> tuple[int, int]:
    """Start and length of what has a length of one byte (`wide` 0) or two (1): nothing in a block is longer."""
    if wide:
        length = data[at + 1] << 8 | data[at + 2]
        if length < 256:
            raise MalformedError("a length in the block is not in its shortest form")
        return at + 3, length
    length = data[at + 1]
    if length < 24:
        raise MalformedError("a length in the block is not in its shortest form")
    return at + 2, length


def _tags(data: bytes, at: int) -> tuple[tuple[str, ...], int]:
    count = data[at] - 0x80
    if not 0 < count <= TAGS_MAX:
        raise MalformedError(f"a block has at most {TAGS_MAX} tags")
    at += 1
    tags = []
    before = ""
    for _ in range(count):
        tag, at = _text(data, at, TAG_BYTES_MAX)
        if tag <= before or not tag.isprintable():
            raise MalformedError("the tags of a block are printable, not empty, sorted, and each there once")
        tags.append(tag)
        before = tag
    return tuple(tags), at


def _vectors(data: bytes, at: int) -> tuple[tuple[Vector, ...], int]:
    count = data[at] - 0x80
    if not 0 < count <= VECTORS_MAX:
        raise MalformedError(f"a block has at most {VECTORS_MAX} vectors")
    at += 1
    vectors = []
    for _ in range(count):
        if data[at] != 0x85:
            raise MalformedError("a vector is a list of five")
        model, at = _text(data, at + 1, MODEL_BYTES_MAX)
        fingerprint, at = _bytes(data, at, ID_BYTES)
        scheme, at = data[at], at + 1
        scale, at = _uint(data, at, SCALE_MAX)
        codes, at = _bytes(data, at, DIMENSION_MAX)
        if scheme != INT8 or not scale or not codes or len(fingerprint) != ID_BYTES or not model or not model.isprintable():
            raise MalformedError("a vector of the block is not of a form that is known")
        vectors.append(Vector(model, fingerprint, scheme, scale, codes))
    return tuple(vectors), at
