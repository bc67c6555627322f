"""Stamps have one form."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.errors import MalformedError
from nexus.memory.sky.place import Cell
from nexus.memory.sky.stamp import BODIES, SIGNATURE_BYTES, SKY_MODEL, STAMP_BYTES, TOLERANCE, UNITS, SkyStamp, cosines

numbers = st.lists(st.integers(-UNITS - TOLERANCE, UNITS + TOLERANCE), min_size=21, max_size=21)
stamps = st.builds(
    SkyStamp, st.binary(min_size=8, max_size=8), st.just(Cell.of(50, 8)), numbers.map(lambda values: struct.pack("<21i", *values))
)


@given(stamps)
def test_a_stamp_comes_back(stamp: SkyStamp) -> None:
    data = stamp.to_bytes()
    assert len(data) == STAMP_BYTES
    assert SkyStamp.from_bytes(data) == stamp


@given(numbers)
def test_numbers_come_back_by_body(values: list[int]) -> None:
    seen = cosines(struct.pack("<21i", *values))
    assert len(seen) == len(BODIES)
    assert [number for body in seen for number in body] == values


@given(st.binary(max_size=120) | st.binary(min_size=STAMP_BYTES, max_size=STAMP_BYTES) | stamps.map(SkyStamp.to_bytes))
def test_no_other_bytes_make_a_stamp(data: bytes) -> None:
    try:
        stamp = SkyStamp.from_bytes(data)
    except MalformedError:
        return
    assert stamp.to_bytes() == data


GOOD = SKY_MODEL + Cell.of(50, 8).to_bytes() + bytes(SIGNATURE_BYTES)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        GOOD[:-1],
        GOOD + b"\0",
        GOOD[:8] + bytes(6) + GOOD[14:],
        GOOD[:14] + struct.pack("<i", UNITS + TOLERANCE + 1) + GOOD[18:],
        GOOD[:-4] + struct.pack("<i", -(2**31)),
    ],
)
def test_what_is_no_stamp(data: bytes) -> None:
    assert SkyStamp.from_bytes(GOOD).to_bytes() == GOOD
    with pytest.raises(MalformedError):
        SkyStamp.from_bytes(data)
