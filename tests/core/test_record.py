"""Records take their one byte form and no other; every field is checked."""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.encoding import decode, encode
from nexus.core.errors import MalformedError
from nexus.core.record import MessageSet, Record, many, nested, raw, text, uint


@dataclass(frozen=True, slots=True)
class Inner(Record):
    name: str = text(8)


@dataclass(frozen=True, slots=True)
class Outer(Record):
    count: int = uint(1000)
    key: bytes = raw(0, 4)
    inner: Inner = nested(Inner)
    many: tuple[Inner, ...] = many(nested(Inner), 3)


names = st.text(max_size=2).map(Inner)
outers = st.builds(Outer, st.integers(0, 1000), st.sampled_from([b"", b"abcd"]), names, st.lists(names, max_size=3).map(tuple))


@given(outers)
def test_a_record_comes_back(record: Outer) -> None:
    assert Outer.from_bytes(record.to_bytes()) == record


@given(st.binary(max_size=60))
def test_no_other_bytes_make_a_record(data: bytes) -> None:
    try:
        record = Outer.from_bytes(data)
    except MalformedError:
        return
    assert record.to_bytes() == data


GOOD = (1, b"abcd", ("a",), (("b",),))


@pytest.mark.parametrize(
    "value",
    [
        (),
        GOOD[:-1],
        (*GOOD, 0),
        (1001, *GOOD[1:]),
        (-1, *GOOD[1:]),
        ("1", *GOOD[1:]),
        (1, b"abc", *GOOD[2:]),
        (1, "abcd", *GOOD[2:]),
        (1, b"", (b"a",), ()),
        (1, b"", ("a" * 9,), ()),
        (1, b"", ("é" * 5,), ()),
        (1, b"", ("a", "b"), ()),
        (1, b"", ("a",), (("b",),) * 4),
        (1, b"", ("a",), "b"),
        7,
    ],
)
def test_a_field_out_of_bounds_is_refused(value: object) -> None:
    with pytest.raises(MalformedError):
        Outer.from_bytes(encode(value))  # type: ignore[arg-type]


def test_the_error_names_the_field() -> None:
    with pytest.raises(MalformedError, match=r"Outer\.many: Inner\.name"):
        Outer.from_bytes(encode((1, b"", ("a",), (("b",), (5,)))))


def test_messages_are_told_apart_by_their_kind() -> None:
    messages = MessageSet(Inner, Outer)
    assert messages.unpack(messages.pack(Inner("x"))) == Inner("x")
    assert messages.pack(Inner("x")) == encode((0, "x"))
    for frame in (encode((2, "x")), encode((1, "x")), encode(()), encode("x"), encode((b"", "x")), b"", encode((-1, "x"))):
        with pytest.raises(MalformedError):
            messages.unpack(frame)


@pytest.mark.parametrize("item", [b"\x00", b"\x80", b"\x81\x00", b"\x40"], ids=lambda item: item.hex())
def test_a_frame_of_tiny_values_is_refused_before_they_become_objects(item: bytes) -> None:
    """64 MiB of them took half a minute, in which nothing else ran, and gigabytes."""
    count = 1 << 20
    junk = b"\x9a" + count.to_bytes(4, "big") + item * count
    for frame in (b"\x84\x01" + junk, b"\x85\x01\x00\x40\x81" + junk, junk):
        tracemalloc.start()
        try:
            with pytest.raises(MalformedError, match="more values"):
                MessageSet(Inner, Outer).unpack(frame)
            assert tracemalloc.get_traced_memory()[1] < 100_000
        finally:
            tracemalloc.stop()


@given(outers)
def test_the_bound_on_values_follows_from_the_fields(record: Outer) -> None:
    assert Outer.values_max() == 4 + 1 + 3 * (1 + 1)
    full = replace(record, many=(Inner("a"),) * 3)
    assert decode(full.to_bytes(), Outer.values_max()) == full.to_value()
    with pytest.raises(MalformedError):
        decode(full.to_bytes(), Outer.values_max() - 1)
