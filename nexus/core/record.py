"""Records: frozen dataclasses with one byte form, the array of their fields in order.

    @dataclass(frozen=True, slots=True)
    class Ping(Record):
        nonce: bytes = raw(16)
        hops: int = uint(255)

`Ping.from_bytes` refuses anything but the one encoding of a Ping: count, type, range and length of every field are checked. How
many values there may be follows from the fields and is checked while they are decoded: a frame full of tiny values costs no more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, Self, cast

from nexus.core.encoding import Value, decode, encode
from nexus.core.errors import MalformedError
from nexus.core.hashing import HASH_BYTES

UINT64_MAX = 2**64 - 1

Pack = Callable[[Any], Value]
Unpack = Callable[[Value], Any]


def _field(pack: Pack, unpack: Unpack, values: int = 0, default: Any = dataclasses.MISSING) -> Any:
    """`values`: the most that the arrays inside the field hold together. `default`: for records made here; none is ever read."""
    return dataclasses.field(default=default, metadata={"pack": pack, "unpack": unpack, "values": values})


def _same(value: Any) -> Value:
    return value  # type: ignore[no-any-return]


def uint(most: int = UINT64_MAX, least: int = 0, *, default: Any = dataclasses.MISSING) -> Any:
    """An int in [least, most]."""

    def unpack(value: Value) -> int:
        if type(value) is not int or not least <= value <= most:
            raise MalformedError(f"expected a number from {least} to {most}")
        return value

    return _field(_same, unpack, default=default)


def raw(*lengths: int, most: int | None = None, default: Any = dataclasses.MISSING) -> Any:
    """Bytes of one of the given lengths, or of at most `most`."""

    def unpack(value: Value) -> bytes:
        if type(value) is not bytes:
            raise MalformedError("expected bytes")
        if (most is not None and len(value) > most) or (lengths and len(value) not in lengths):
            raise MalformedError(f"{len(value)} bytes where {lengths or most} are allowed")
        return value

    return _field(_same, unpack, default=default)


def digest() -> Any:
    """A 32-byte hash."""
    return raw(HASH_BYTES)


def optional_digest() -> Any:
    """A 32-byte hash, or no bytes where there is none."""
    return raw(0, HASH_BYTES)


def text(most: int) -> Any:
    """Text of at most `most` bytes in UTF-8."""

    def unpack(value: Value) -> str:
        if type(value) is not str or len(value.encode("utf-8")) > most:
            raise MalformedError(f"expected text of at most {most} bytes")
        return value

    return _field(_same, unpack)


def nested(record: type[Record]) -> Any:
    """Another record."""
    return _field(lambda value: value.to_value(), record.from_value, record.values_max())


def many(item: Any, most: int) -> Any:
    """A tuple of at most `most` items, each as the field `item` says."""
    pack_item: Pack = item.metadata["pack"]
    unpack_item: Unpack = item.metadata["unpack"]

    def unpack(value: Value) -> tuple[Any, ...]:
        if type(value) is not tuple or len(value) > most:
            raise MalformedError(f"expected a list of at most {most}")
        return tuple(unpack_item(entry) for entry in value)

    return _field(lambda values: tuple(pack_item(entry) for entry in values), unpack, most * (1 + item.metadata["values"]))


@cache
def _fields(record: Hashable) -> Sequence[tuple[str, Pack, Unpack]]:
    return [(f.name, f.metadata["pack"], f.metadata["unpack"]) for f in dataclasses.fields(record)]  # type: ignore[arg-type]


class Record:
    """Base of all records. Subclasses are frozen dataclasses whose fields come from this module."""

    __slots__ = ()

    def to_value(self) -> Value:
        return tuple(pack(getattr(self, name)) for name, pack, _ in _fields(cast(Hashable, type(self))))

    def to_bytes(self) -> bytes:
        return encode(self.to_value())

    @classmethod
    def values_max(cls) -> int:
        """The most that all arrays in the encoding of such a record hold together."""
        return sum(1 + field.metadata["values"] for field in dataclasses.fields(cls))  # type: ignore[arg-type]

    @classmethod
    def from_value(cls, value: Value) -> Self:
        fields = _fields(cast(Hashable, cls))
        if type(value) is not tuple or len(value) != len(fields):
            raise MalformedError(f"a {cls.__name__} is a list of {len(fields)}")
        arguments = {}
        for (name, _, unpack), entry in zip(fields, value, strict=True):
            try:
                arguments[name] = unpack(entry)
            except MalformedError as error:
                raise MalformedError(f"{cls.__name__}.{name}: {error.cause}") from None
        return cls(**arguments)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        return cls.from_value(decode(data, cls.values_max()))


class MessageSet:
    """The messages of one wire protocol. A frame is the array [kind, fields...], `kind` being the record's place in the set."""

    def __init__(self, *records: type[Record]) -> None:
        self._records = records
        self._kinds = {record: kind for kind, record in enumerate(records)}
        self._values_max = 1 + max(record.values_max() for record in records)

    def pack(self, message: Record) -> bytes:
        fields = cast(Sequence[Value], message.to_value())
        return encode((self._kinds[type(message)], *fields))

    def unpack(self, frame: bytes) -> Record:
        """Raises MalformedError for anything that is not one of the messages."""
        value = decode(frame, self._values_max)
        if type(value) is not tuple or not value or type(value[0]) is not int or not 0 <= value[0] < len(self._records):
            raise MalformedError("not a message of this protocol")
        return self._records[value[0]].from_value(value[1:])
