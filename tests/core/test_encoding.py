"""One byte form per value."""

from __future__ import annotations

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.encoding import MAX_DEPTH, decode, encode
from nexus.core.errors import MalformedError

scalars = st.integers(-(2**64), 2**64 - 1) | st.binary(max_size=300) | st.text(max_size=300)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=6).map(tuple), max_leaves=30)


@given(values)
def test_a_value_comes_back_and_has_the_bytes_of_deterministic_cbor(value: object) -> None:
    data = encode(value)  # type: ignore[arg-type]
    assert decode(data) == value
    assert cbor2.dumps(value, canonical=True) == data


@given(st.binary(max_size=200))
def test_what_decodes_has_exactly_these_bytes(data: bytes) -> None:
    try:
        value = decode(data)
    except MalformedError:
        return
    assert encode(value) == data


@given(values, st.data())
def test_a_changed_encoding_is_another_value_or_none(value: object, data: st.DataObject) -> None:
    raw = bytearray(encode(value))  # type: ignore[arg-type]
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        assert decode(bytes(raw)) != value
    except MalformedError:
        return


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00\x00",  # bytes left over
        b"\x18\x01",  # a number not in its shortest form
        b"\x19\x00\x17",
        b"\x58\x01x",
        b"\xa0",  # map
        b"\xc0\x00",  # tag
        b"\xd8\x1c\x81\xd8\x1d\x00",  # a cycle, by tags
        b"\xf4",  # false
        b"\xf6",  # null
        b"\xf9\x00\x00",  # float
        b"\x9f\xff",  # indefinite length
        b"\x1c",  # reserved
        b"\x9b\xff\xff\xff\xff\xff\xff\xff\xff",  # an array longer than anything
        b"\x5b\x7f\xff\xff\xff\xff\xff\xff\xff",
        b"\x42x",
        b"\x62\xff\xfe",  # text that is not UTF-8
        b"\x81" * (MAX_DEPTH + 2) + b"\x00",
        b"\x81" * 100_000,
    ],
    ids=lambda data: data[:6].hex(),
)
def test_everything_else_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedError):
        decode(data)


@pytest.mark.parametrize("value", [True, None, 1.0, {}, 2**64, -(2**64) - 1, [[]] * 1 + [object()]])
def test_what_has_no_encoding_is_refused(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        encode(value)  # type: ignore[arg-type]
