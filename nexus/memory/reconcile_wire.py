"""The bytes of reconciliation: queries of ranges and replies to them, as tight as differences of times and the starts of ids allow.

Numbers are little-endian base 128, in their shortest form, at most eight bytes. A bound is 0 for the end of all items, else a
number 1 + 2d + p and, if p is 1, a byte n and n bytes: d is the time less the one before, the n bytes are the start of an id, the
last of them not zero. Both decoders accept one form only of what they return, and read a payload once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, TypeAlias

import numpy as np

from nexus.core.errors import MalformedError
from nexus.memory.block import ID_BYTES, TIME_MAX_MS, TIME_MIN_MS
from nexus.memory.item_set import END, FIRST, TIME_BYTES

PAYLOAD_MIN = 512
PAYLOAD_MAX = 512 * 1024
RANGES_MAX = 4096
IDS_MAX = 14_000
HANDLES_MAX = 32_768
# Of one range: each is looked for among all that the responder has there.
HANDLES_PER_RANGE_MAX = 256
PARTS_MAX = 16
HANDLE_BYTES = 6
_FINGERPRINT_BYTES = 8
_NUMBER_BYTES_MAX = 8
_BOUND_BYTES_MAX = _NUMBER_BYTES_MAX + 1 + ID_BYTES
_COUNT_BYTES = 3


class Kind(IntEnum):
    """What is asked about a range. FINGERPRINT: is it the same? HANDLES: these are here, which of them are not there, and what else
    is? TELL: list everything."""

    FINGERPRINT = 0
    HANDLES = 1
    TELL = 2


class Asked(NamedTuple):
    """A range [low, high) of a query; bounds are keys of 40 bytes."""

    low: bytes
    high: bytes
    kind: Kind
    fingerprint: int = 0
    handles: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Same:
    """The fingerprint holds."""


@dataclass(frozen=True, slots=True)
class Split:
    """The range in parts: their fingerprints and, one less, the bounds between them."""

    fingerprints: tuple[int, ...]
    bounds: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """The initiator shall say which items it has there."""


@dataclass(frozen=True, slots=True)
class Listed:
    """Ids, sorted. `lacked` None: all that the responder has in the range; else those whose handles it was not told, and which of
    the told ones it lacks. `cut`: the list goes only so far; it is the last answer of its reply."""

    keys: tuple[bytes, ...]
    lacked: tuple[bool, ...] | None
    cut: bytes | None


Answer: TypeAlias = Same | Split | Ask | Listed

# Kinds of answers on the wire. A list with a cut has the bit _CUT as well.
_SPLIT, _ASK, _LISTED = range(3)
_CUT = 4
# In the kind of a range that does not begin where the one before ended.
_GAP = 4


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _time(key: bytes) -> int:
    return int.from_bytes(key[:TIME_BYTES], "big")


def _bound(key: bytes, base_ms: int) -> bytes:
    if key == END:
        return b"\0"
    start = key[TIME_BYTES:].rstrip(b"\0")
    head = _number(1 + 2 * (_time(key) - base_ms) + bool(start))
    return head + bytes((len(start),)) + start if start else head


class _Reader:
    """Reads a payload from front to back. `base_ms`: the time that the next is told in relation to."""

    __slots__ = ("_at", "_data", "base_ms")

    def __init__(self, data: bytes) -> None:
        if len(data) > PAYLOAD_MAX:
            raise MalformedError("a reconciliation message is too long")
        self._data = data
        self._at = 0
        self.base_ms = 0

    @property
    def done(self) -> bool:
        return self._at == len(self._data)

    def take(self, count: int) -> bytes:
        end = self._at + count
        if end > len(self._data):
            raise MalformedError("a reconciliation message ends too early")
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def number(self, most: int) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                break
            shift += 7
            if shift == 7 * _NUMBER_BYTES_MAX:
                raise MalformedError("a number is too long")
        if value > most or (shift and byte == 0):
            raise MalformedError("a number is too great or not in its shortest form")
        return value

    def bound(self) -> bytes:
        head = self.number(2**56)
        if head == 0:
            return END
        time_ms = self.base_ms + (head - 1) // 2
        start = b""
        if (head - 1) % 2:
            start = self.take(self.take(1)[0])
            if not 0 < len(start) <= ID_BYTES or start[-1] == 0:
                raise MalformedError("the start of an id is not in its shortest form")
        if time_ms > TIME_MAX_MS:
            raise MalformedError("a bound is behind all times")
        self.base_ms = time_ms
        return time_ms.to_bytes(TIME_BYTES, "big") + start.ljust(ID_BYTES, b"\0")

    def bound_between(self, low: bytes, high: bytes) -> bytes:
        bound = self.bound()
        if not low < bound < high:
            raise MalformedError("a bound is outside its range")
        return bound

    def fingerprint(self) -> int:
        return int.from_bytes(self.take(_FINGERPRINT_BYTES), "little")


class QueryWriter:
    """Gathers ranges in order up to the size of a message."""

    def __init__(self, payload_max: int) -> None:
        self._left = payload_max
        self._out: list[bytes] = []
        self._handles = 0
        self._end = FIRST

    @property
    def data(self) -> bytes:
        return b"".join(self._out)

    def add(self, part: Asked) -> bool:
        """False: no room for it."""
        base_ms = _time(self._end)
        head = bytes((part.kind,))
        if part.low != self._end:
            head = bytes((part.kind | _GAP,)) + _bound(part.low, base_ms)
            base_ms = _time(part.low)
        body = b""
        if part.kind is Kind.FINGERPRINT:
            body = part.fingerprint.to_bytes(_FINGERPRINT_BYTES, "little")
        elif part.kind is Kind.HANDLES:
            body = _number(len(part.handles)) + b"".join(handle.to_bytes(HANDLE_BYTES, "little") for handle in part.handles)
        encoded = head + _bound(part.high, base_ms) + body
        if len(encoded) > self._left or len(self._out) == RANGES_MAX or self._handles + len(part.handles) > HANDLES_MAX:
            return False
        self._out.append(encoded)
        self._left -= len(encoded)
        self._handles += len(part.handles)
        self._end = part.high
        return True


def decode_query(data: bytes) -> list[Asked]:
    """The ranges of a query: at least one, ascending, apart from one another. Raises MalformedError."""
    reader = _Reader(data)
    asked: list[Asked] = []
    end, handles_left = FIRST, HANDLES_MAX
    while not reader.done:
        if len(asked) == RANGES_MAX:
            raise MalformedError("a query has too many ranges")
        head = reader.take(1)[0]
        kind = head & ~_GAP
        if kind > Kind.TELL:
            raise MalformedError("a query of an unknown kind")
        low = reader.bound_between(end, END) if head & _GAP else end
        high = reader.bound()
        if not low < high:
            raise MalformedError("a range is empty or out of order")
        if kind == Kind.FINGERPRINT:
            asked.append(Asked(low, high, Kind.FINGERPRINT, fingerprint=reader.fingerprint()))
        elif kind == Kind.TELL:
            asked.append(Asked(low, high, Kind.TELL))
        else:
            count = reader.number(min(handles_left, HANDLES_PER_RANGE_MAX))
            if not count:
                raise MalformedError("a list of no handles")
            handles_left -= count
            raw = reader.take(count * HANDLE_BYTES)
            handles = tuple(int.from_bytes(raw[at : at + HANDLE_BYTES], "little") for at in range(0, len(raw), HANDLE_BYTES))
            asked.append(Asked(low, high, Kind.HANDLES, handles=handles))
        end = high
    if not asked:
        raise MalformedError("a query asks nothing")
    return asked


class ReplyWriter:
    """Gathers answers, one per range of the query and in its order, up to the size of a message. An `add` is False without room."""

    def __init__(self, payload_max: int) -> None:
        # A run of equal ranges is written before the next answer, or at the end.
        self._left = payload_max - _COUNT_BYTES
        self._out: list[bytes] = []
        self._same = 0
        self._parts = self._ids = 0
        self.answers = 0

    @property
    def data(self) -> bytes:
        return b"".join(self._out) + (_number(self._same) if self._same else b"")

    def add_same(self) -> bool:
        self._same += 1
        self.answers += 1
        return True

    def add_ask(self) -> bool:
        return self._add(bytes((_ASK,)))

    def add_split(self, low: bytes, fingerprints: Sequence[int], bounds: Sequence[bytes]) -> bool:
        out, base_ms = [bytes((_SPLIT, len(fingerprints)))], _time(low)
        for at, fingerprint in enumerate(fingerprints):
            out.append(fingerprint.to_bytes(_FINGERPRINT_BYTES, "little"))
            if at < len(bounds):
                out.append(_bound(bounds[at], base_ms))
                base_ms = _time(bounds[at])
        if self._parts + len(fingerprints) > RANGES_MAX or not self._add(b"".join(out)):
            return False
        self._parts += len(fingerprints)
        return True

    def fitting(self, low: bytes, keys: Sequence[bytes], lacked: Sequence[bool] | None) -> int:
        """How many of the keys can be listed, with a cut behind them if not all. -1: not even an empty list."""
        room = self._left - 2 * _COUNT_BYTES - 1 - (0 if lacked is None else (len(lacked) + 7) // 8)
        most = IDS_MAX - self._ids
        base_ms, whole, taken = _time(low), 0, 0
        for at, key in enumerate(keys):
            time_ms = _time(key)
            room -= len(_number(time_ms - base_ms)) + ID_BYTES
            base_ms = time_ms
            if room < 0 or at == most:
                return taken
            whole = at + 1
            if room >= _BOUND_BYTES_MAX:
                taken = whole
        # Nothing is cut off after the last one, so no room is needed for the cut.
        return whole if room >= 0 else -1

    def add_listed(self, low: bytes, listed: Listed) -> bool:
        base_ms = _time(low)
        out = [bytes((_LISTED | (0 if listed.cut is None else _CUT),))]
        if listed.cut is not None:
            out.append(_bound(listed.cut, base_ms))
        if listed.lacked is not None:
            out.append(pack_bits(listed.lacked))
        out.append(_number(len(listed.keys)))
        for key in listed.keys:
            time_ms = _time(key)
            out.append(_number(time_ms - base_ms) + key[TIME_BYTES:])
            base_ms = time_ms
        self._ids += len(listed.keys)
        return self._add(b"".join(out))

    def _add(self, encoded: bytes) -> bool:
        needed = len(encoded) + _COUNT_BYTES
        if needed > self._left:
            return False
        self._out.append(_number(self._same) + encoded)
        self._left -= needed
        self._same = 0
        self.answers += 1
        return True


def decode_reply(data: bytes, asked: Sequence[Asked]) -> list[Answer]:
    """Answers to the first of the ranges that were asked about, at least one. Raises MalformedError."""
    reader = _Reader(data)
    answers: list[Answer] = []
    parts_left, ids_left = RANGES_MAX, IDS_MAX
    while not reader.done:
        same = reader.number(len(asked) - len(answers))
        for part in asked[len(answers) : len(answers) + same]:
            if part.kind is not Kind.FINGERPRINT:
                raise MalformedError("a range is called the same of which no fingerprint was told")
        answers.extend([Same()] * same)
        if reader.done:
            if not same:
                raise MalformedError("a reply goes on without an answer")
            break
        if len(answers) == len(asked):
            raise MalformedError("more answers than ranges")
        part = asked[len(answers)]
        kind = reader.take(1)[0]
        reader.base_ms = _time(part.low)
        if kind & ~_CUT == _LISTED:
            listed = _decode_listed(reader, part, bool(kind & _CUT), ids_left)
            ids_left -= len(listed.keys)
            answers.append(listed)
            if listed.cut is not None and not reader.done:
                raise MalformedError("a reply goes on behind a list that was cut")
        elif part.kind is not Kind.FINGERPRINT:
            raise MalformedError("a list was asked for")
        elif kind == _SPLIT:
            split = _decode_split(reader, part, parts_left)
            parts_left -= len(split.fingerprints)
            answers.append(split)
        elif kind == _ASK:
            answers.append(Ask())
        else:
            raise MalformedError("an answer of an unknown kind")
    if not answers:
        raise MalformedError("a reply answers nothing")
    return answers


def _decode_split(reader: _Reader, part: Asked, parts_left: int) -> Split:
    count = reader.take(1)[0]
    if not 2 <= count <= min(PARTS_MAX, parts_left):
        raise MalformedError("a range is divided into too few or too many parts")
    fingerprints, bounds = [reader.fingerprint()], [part.low]
    for _ in range(count - 1):
        bounds.append(reader.bound_between(bounds[-1], part.high))
        fingerprints.append(reader.fingerprint())
    return Split(tuple(fingerprints), tuple(bounds[1:]))


def _decode_listed(reader: _Reader, part: Asked, is_cut: bool, ids_left: int) -> Listed:
    base_ms = reader.base_ms
    cut = reader.bound_between(part.low, part.high) if is_cut else None
    lacked = None
    if part.kind is Kind.HANDLES:
        lacked = unpack_bits(reader.take((len(part.handles) + 7) // 8), len(part.handles))
    count = reader.number(ids_left)
    if is_cut and not count:
        raise MalformedError("a list is cut before its first id")
    end = part.high if cut is None else cut
    keys: list[bytes] = []
    least = part.low
    for _ in range(count):
        base_ms += reader.number(TIME_MAX_MS)
        if not TIME_MIN_MS <= base_ms <= TIME_MAX_MS:
            raise MalformedError("an id has a time that no block has")
        key = base_ms.to_bytes(TIME_BYTES, "big") + reader.take(ID_BYTES)
        if not least <= key < end or (keys and key == least):
            raise MalformedError("an id is outside its range or out of order")
        keys.append(key)
        least = key
    return Listed(tuple(keys), lacked, cut)


def pack_bits(bits: Sequence[bool]) -> bytes:
    """Eight to a byte, the first in its lowest bit."""
    return np.packbits(np.asarray(bits, dtype=np.bool_), bitorder="little").tobytes()


def unpack_bits(data: bytes, count: int) -> tuple[bool, ...]:
    """`data`: as many bytes as `count` bits take. Raises MalformedError for bits beyond the last."""
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")
    if bits[count:].any():
        raise MalformedError("bits are set that stand for nothing")
    return tuple(bits[:count].astype(np.bool_).tolist())
