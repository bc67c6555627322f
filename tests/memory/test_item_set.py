"""A set of items is a set, sorted; its views have fingerprints that add up."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.memory.item_set import (
    END,
    FIRST,
    ITEM_BYTES,
    Item,
    ItemSet,
    as_keys,
    item_hashes,
    pack_item,
    unpack_item,
    unpack_items,
)

SALT = bytes(range(16))
# Few times and ids that share starts and end in zeros: what an array of byte strings could confuse.
ids = st.builds(
    lambda start, last: start.ljust(31, b"\0") + last, st.binary(max_size=2), st.sampled_from([b"\0", b"\1", b" ", b"\xff"])
)
items = st.builds(Item, st.sampled_from([2**32, 2**32 + 1, 2**40, 2**53 - 1]), ids)


def _siphash(key: bytes, message: bytes) -> int:
    """SipHash-2-4 of any message, as the paper tells it."""
    mask = 2**64 - 1

    def turn(word: int, bits: int) -> int:
        return (word << bits | word >> (64 - bits)) & mask

    k0, k1 = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
    a, b, c, d = 0x736F6D6570736575 ^ k0, 0x646F72616E646F6D ^ k1, 0x6C7967656E657261 ^ k0, 0x7465646279746573 ^ k1

    def rounds(count: int) -> None:
        nonlocal a, b, c, d
        for _ in range(count):
            a, c = (a + b) & mask, (c + d) & mask
            b, d = turn(b, 13) ^ a, turn(d, 16) ^ c
            a = turn(a, 32)
            c, a = (c + b) & mask, (a + d) & mask
            b, d = turn(b, 17) ^ c, turn(d, 21) ^ a
            c = turn(c, 32)

    padded = message.ljust(len(message) // 8 * 8 + 7, b"\0") + bytes((len(message) & 255,))
    for at in range(0, len(padded), 8):
        word = int.from_bytes(padded[at : at + 8], "little")
        d ^= word
        rounds(2)
        a ^= word
    c ^= 0xFF
    rounds(4)
    return a ^ b ^ c ^ d


def test_hashes_are_siphash() -> None:
    # The first vectors that its authors published, and the one of 40 bytes.
    published = {0: "310e0edd47db6f72", 1: "fd67dc93c539f874", 40: "d0a704536ba93e0e"}
    for length, expected in published.items():
        assert _siphash(SALT, bytes(range(length))).to_bytes(8, "little").hex() == expected
    assert item_hashes(as_keys(bytes(range(40))), SALT).tolist() == [_siphash(SALT, bytes(range(40)))]
    rng = random.Random(5)
    keys, salt = [rng.randbytes(ITEM_BYTES) for _ in range(5000)], rng.randbytes(16)
    hashes = item_hashes(as_keys(keys), salt).tolist()
    assert [hashes[at] for at in (0, 4095, 4096, 4999)] == [_siphash(salt, keys[at]) for at in (0, 4095, 4096, 4999)]


@given(st.lists(st.tuples(st.sampled_from(["add", "packed", "discard"]), st.lists(items, max_size=6)), max_size=6))
def test_it_is_a_sorted_set(steps: list[tuple[str, list[Item]]]) -> None:
    ours, plain = ItemSet(), set[Item]()
    for verb, some in steps:
        if verb == "discard":
            ours.discard(some)
            plain -= set(some)
        else:
            ours.add(some) if verb == "add" else ours.add_packed(b"".join(map(pack_item, some)))
            plain |= set(some)
        assert [item in ours for item in some] == [item in plain for item in some]
    assert list(ours) == sorted(plain)
    assert len(ours) == len(plain)
    asked = [item for _, some in steps for item in some]
    assert ours.missing(asked) == [item for item in asked if item not in plain]


@given(st.sets(items, max_size=12), st.binary(min_size=16, max_size=16))
def test_a_view_tells_positions_bounds_and_fingerprints(some: set[Item], salt: bytes) -> None:
    ordered = sorted(some)
    view = ItemSet(some).view(salt)
    hashes = [_siphash(salt, pack_item(item)) for item in ordered]
    assert view.positions([FIRST, END]) == [0, len(ordered)]
    for at in range(len(ordered) + 1):
        assert view.positions([view.bound(at)]) == [at]
        for end in range(at, len(ordered) + 1):
            assert view.fingerprint(at, end) == sum(hashes[at:end]) % 2**64
    assert view.keys(0, len(view)) == list(map(pack_item, ordered)) == view.keys_at(range(len(view)))
    for at in range(1, len(ordered)):
        # No shorter start of the later item parts the two.
        before, bound = pack_item(ordered[at - 1]), view.bound(at)
        length = max(8, len(bound.rstrip(b"\0")))
        assert length == 8 or bound[: length - 1].ljust(ITEM_BYTES, b"\0") <= before


def test_a_view_does_not_change() -> None:
    ours = ItemSet([Item(2**32 + at, bytes(32)) for at in range(10)])
    view = ours.view(SALT)
    before = view.keys(0, 10), view.fingerprint(0, 10)
    ours.add([Item(2**33, bytes(32))])
    ours.discard([Item(2**32, bytes(32))])
    assert len(ours) == 10
    assert (view.keys(0, len(view)), view.fingerprint(0, 10)) == before


class _Interrupted(ItemSet):
    """Its owner merges whenever somebody else looks at what was added."""

    interrupted = False

    def __getattribute__(self, name: str) -> object:
        if name == "_added" and object.__getattribute__(self, "interrupted"):
            self.interrupted = False
            assert len(self) == 2
        return object.__getattribute__(self, name)


def test_a_view_from_another_thread_misses_nothing() -> None:
    ours = _Interrupted([Item(2**32, bytes(32))])
    assert len(ours) == 1
    ours.add([Item(2**33, bytes(32))])
    ours.interrupted = True
    assert len(ours.view(SALT)) == 2
    # A view changes nothing by itself.
    ours.add([Item(2**34, bytes(32))])
    assert len(ours.view(SALT)) == len(ours.view(SALT)) == 3
    assert list(ours) == [Item(2**32, bytes(32)), Item(2**33, bytes(32)), Item(2**34, bytes(32))]


def test_many_additions_do_not_wait() -> None:
    ours = ItemSet(Item(2**32 + at, bytes(32)) for at in range(10_000))
    assert not ours._added
    assert len(ours) == 10_000


def test_what_is_no_item_is_refused() -> None:
    good = Item(2**32, bytes(32))
    for bad in (Item(2**32 - 1, bytes(32)), Item(2**53, bytes(32)), Item(2**32, bytes(31))):
        with pytest.raises(ValueError, match="no item"):
            ItemSet([good, bad])
    with pytest.raises(ValueError, match="40 bytes"):
        ItemSet().add_packed(pack_item(good)[:-1])
    with pytest.raises(ValueError, match="no block has"):
        ItemSet().add_packed(pack_item(good) + bytes(40))
    with pytest.raises(ValueError, match="salt"):
        ItemSet([good]).view(b"short")


@given(st.lists(items, max_size=5))
def test_packed_items_come_back(some: list[Item]) -> None:
    assert unpack_items(b"".join(map(pack_item, some))) == some
    assert [unpack_item(pack_item(item)) for item in some] == some
