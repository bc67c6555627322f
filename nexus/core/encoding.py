"""One byte form per value: the subset of deterministic CBOR (RFC 8949, section 4.2.1) that everything signed or hashed uses.

A value is an int in [-2**64, 2**64), bytes, text, or an array of values. There are no floats, maps, tags, booleans, nulls or
indefinite lengths, so a value has exactly one encoding and `decode` accepts only that one. The decoder is our own because
general CBOR decoders accept what must be refused here (tags, cycles, non-minimal integers, trailing bytes) and work on it first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from nexus.core.errors import MalformedError

Value: TypeAlias = "int | bytes | str | Sequence[Value]"

MAX_DEPTH = 12
_UINT, _NINT, _BYTES, _TEXT, _ARRAY = range(5)


def _head(major: int, argument: int) -> bytes:
    if argument < 24:
        return _SHORT_HEADS[major][argument]
    for code, width in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if argument < 1 << (8 * width):
            return bytes((major << 5 | code,)) + argument.to_bytes(width, "big")
    raise ValueError(f"{argument} does not fit in 64 bits")


_SHORT_HEADS = tuple(tuple(bytes((major << 5 | argument,)) for argument in range(24)) for major in range(_ARRAY + 1))


def _encode_into(value: Value, out: list[bytes], depth: int) -> None:
    # Exact types, the most frequent first: every signed record and every frame of a session passes here.
    kind = type(value)
    if kind is bytes:
        out.append(_head(_BYTES, len(value)))  # type: ignore[arg-type]
        out.append(value)  # type: ignore[arg-type]
    elif kind is int:
        out.append(_head(_UINT, value) if value >= 0 else _head(_NINT, -1 - value))  # type: ignore[operator, arg-type]
    elif kind is tuple or kind is list:
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} arrays")
        out.append(_head(_ARRAY, len(value)))  # type: ignore[arg-type]
        for item in value:  # type: ignore[union-attr]
            _encode_into(item, out, depth + 1)
    elif kind is str:
        raw = value.encode("utf-8")  # type: ignore[union-attr]
        out.append(_head(_TEXT, len(raw)))
        out.append(raw)
    else:
        raise TypeError(f"{kind.__name__} has no encoding")


def encode(value: Value) -> bytes:
    """The only encoding of `value`. Raises TypeError or ValueError for what has none."""
    out: list[bytes] = []
    _encode_into(value, out, 0)
    return b"".join(out)


def _read(data: bytes, at: int, depth: int, left: list[int]) -> tuple[Value, int]:
    if depth > MAX_DEPTH:
        raise MalformedError(f"nested deeper than {MAX_DEPTH} arrays")
    if at >= len(data):
        raise MalformedError("ends too early")
    initial = data[at]
    major, code = initial >> 5, initial & 31
    at += 1
    if major > _ARRAY:
        raise MalformedError(f"major type {major} is not allowed")
    if code < 24:
        argument = code
    elif code < 28:
        width = 1 << (code - 24)
        if at + width > len(data):
            raise MalformedError("ends too early")
        argument = int.from_bytes(data[at : at + width], "big")
        at += width
        if argument < (24 if width == 1 else 1 << (4 * width)):
            raise MalformedError("a number is not in its shortest form")
    else:
        raise MalformedError("indefinite or reserved length")
    if major == _UINT:
        return argument, at
    if major == _NINT:
        return -1 - argument, at
    # An item takes at least a byte, so this also bounds the work that an array can ask for.
    if argument > len(data) - at:
        raise MalformedError("a length runs past the end")
    if major == _ARRAY:
        left[0] -= argument
        if left[0] < 0:
            raise MalformedError("more values than there may be")
        items = []
        for _ in range(argument):
            item, at = _read(data, at, depth + 1, left)
            items.append(item)
        return tuple(items), at
    raw = data[at : at + argument]
    at += argument
    if major == _BYTES:
        return raw, at
    try:
        return raw.decode("utf-8"), at
    except UnicodeDecodeError as error:
        raise MalformedError("text is not UTF-8") from error


def decode(data: bytes, values_max: int | None = None) -> Value:
    """The value whose only encoding is `data`; arrays come back as tuples. Raises MalformedError.

    `values_max`: items of all arrays together. A value may be one byte long and is some fifty as an object, so what a peer sends
    is bounded by its meaning (see `Record`) and not by its length alone. None: by its length.
    """
    value, end = _read(data, 0, 0, [len(data) if values_max is None else values_max])
    if end != len(data):
        raise MalformedError("bytes left over after the value")
    return value
