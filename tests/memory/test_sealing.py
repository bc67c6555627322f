"""Sealed blocks: only the key opens them, where they were made, and what comes out is checked like any block."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.bindings import crypto_aead_xchacha20poly1305_ietf_encrypt
from numpy.typing import NDArray

from nexus.core.encoding import encode
from nexus.core.errors import MalformedError, NotFoundError, UsageError, VerificationError
from nexus.core.keys import Identity
from nexus.memory import sealing
from nexus.memory.block import (
    CONTENT,
    DATA_BYTES_MAX,
    INT8,
    MAP,
    SEALED,
    SKY_BYTES,
    TEXT_BYTES_MAX,
    Block,
    Vector,
    decode_block,
    encode_block,
)
from nexus.memory.collection import PRIVATE, create, revoke
from nexus.memory.sealing import (
    EPOCH_KEY_BYTES,
    NONCE_BYTES,
    SignedKeyGrant,
    deliver,
    epoch_of,
    key_hash,
    receive,
    seal,
    unseal,
)

OWNER, MEMBER, OTHER = (Identity(bytes((letter,)) * 32) for letter in b"omx")
NOW = 1_700_000_000_000
KEY, OTHER_KEY, NONCE = b"k" * EPOCH_KEY_BYTES, b"K" * EPOCH_KEY_BYTES, b"n" * NONCE_BYTES
CHARTER = create(OWNER.public_key, "diary", PRIVATE, NOW, members=[MEMBER.public_key], key_hash=key_hash(KEY))
PLAIN = Block(CONTENT, CHARTER.id, OWNER.public_key, NOW, text="what nobody else shall read", tags=("a", "b"), title="t", part=3)

lists_of_ids = st.lists(st.binary(min_size=32, max_size=32), max_size=3).map(b"".join)
printable = st.text(st.characters(categories=("L", "N")), max_size=8)


def unit_vector(size: int, at: int, fingerprint: bytes) -> Vector:
    codes = np.zeros(size, np.int8)
    codes[at % size] = 127
    return Vector("m", fingerprint, INT8, 10**9, codes.tobytes())


contents = st.builds(
    Block,
    kind=st.just(CONTENT),
    collection=st.just(CHARTER.id),
    author=st.just(OWNER.public_key),
    created_ms=st.integers(2**32, 2**40),
    expires_ms=st.just(0) | st.integers(2**40 + 1, 2**41),
    parents=lists_of_ids,
    links=lists_of_ids,
    data=st.just(b""),
    after=lists_of_ids,
    sky=st.just(b"") | st.binary(min_size=SKY_BYTES, max_size=SKY_BYTES),
    source=st.just(b"") | st.binary(min_size=32, max_size=32),
    tags=st.sets(printable.filter(bool), max_size=4).map(lambda tags: tuple(sorted(tags))),
    title=printable,
    lang=printable,
    part=st.integers(0, 1000),
    text=st.text(min_size=1, max_size=300),
    vectors=st.lists(
        st.builds(unit_vector, st.integers(1, 50), st.integers(0, 49), st.binary(min_size=32, max_size=32)), max_size=4
    ).map(tuple),
)


def any_sky(times: NDArray[np.int64], stamps: list[bytes]) -> NDArray[np.bool_]:
    return np.ones(len(stamps), np.bool_)


def no_sky(times: NDArray[np.int64], stamps: list[bytes]) -> NDArray[np.bool_]:
    return np.zeros(len(stamps), np.bool_)


@given(contents, st.integers(1, 1024))
def test_what_is_sealed_comes_back_and_nothing_of_it_is_in_the_open(block: Block, epoch: int) -> None:
    sealed = seal(block, epoch, KEY, NONCE)
    travelled = decode_block(encode_block(sealed))
    assert travelled == sealed
    assert epoch_of(travelled) == epoch
    assert unseal(travelled, {epoch: KEY, epoch + 1: OTHER_KEY}, any_sky) == block
    empty = Block(SEALED, block.collection, block.author, block.created_ms)
    kept = {"data", "expires_ms", "parents", "after"}
    assert {name for name in Block._fields if getattr(sealed, name) != getattr(empty, name)} <= kept
    if len(block.text) > 3:
        assert block.text.encode() not in sealed.data[4 + NONCE_BYTES :]


@given(contents, st.data())
def test_a_changed_byte_anywhere_and_it_does_not_open(block: Block, data: st.DataObject) -> None:
    sealed = seal(block, 1, KEY, NONCE)
    changed = bytearray(sealed.data)
    bit = data.draw(st.integers(0, len(changed) * 8 - 1))
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises((VerificationError, NotFoundError)):
        unseal(sealed._replace(data=bytes(changed)), {1: KEY}, any_sky)
    cut = data.draw(st.integers(0, len(sealed.data) - 1))
    with pytest.raises(VerificationError):
        unseal(sealed._replace(data=sealed.data[:cut]), {1: KEY}, any_sky)
    with pytest.raises(VerificationError):
        unseal(sealed._replace(data=sealed.data + b"\0"), {1: KEY}, any_sky)


@pytest.mark.parametrize(
    "moved",
    [
        {"collection": b"c" * 32},
        {"author": OTHER.public_key},
        {"created_ms": NOW + 1},
        {"expires_ms": NOW + 1},
        {"parents": b"p" * 32},
        {"after": b"p" * 32},
        {"data": (2).to_bytes(4, "big") + seal(PLAIN, 1, KEY, NONCE).data[4:]},
    ],
    ids=str,
)
def test_it_opens_only_in_the_block_that_it_was_made_for(moved: dict[str, object]) -> None:
    sealed = seal(PLAIN, 1, KEY, NONCE)
    assert unseal(sealed, {1: KEY}) == PLAIN
    with pytest.raises(VerificationError, match="does not open"):
        unseal(sealed._replace(**moved), {1: KEY, 2: KEY})  # type: ignore[arg-type]


def test_without_the_key_it_does_not_open() -> None:
    sealed = seal(PLAIN, 2, KEY, NONCE)
    with pytest.raises(NotFoundError, match="key 2"):
        unseal(sealed, {1: KEY})
    with pytest.raises(VerificationError, match="does not open"):
        unseal(sealed, {2: OTHER_KEY})
    with pytest.raises(VerificationError, match="no sealed block"):
        unseal(PLAIN, {1: KEY})


def test_a_sky_inside_is_checked_or_the_block_does_not_open() -> None:
    sealed = seal(PLAIN._replace(sky=bytes(SKY_BYTES)), 1, KEY, NONCE)
    for check in (None, no_sky):
        with pytest.raises(VerificationError, match="sky"):
            unseal(sealed, {1: KEY}, check)
    assert unseal(sealed, {1: KEY}, any_sky).sky == bytes(SKY_BYTES)


def test_a_vector_inside_is_checked() -> None:
    wrong = PLAIN._replace(vectors=(Vector("m", bytes(32), INT8, 1, b"\x7f"),))
    with pytest.raises(VerificationError, match="vector"):
        unseal(seal(wrong, 1, KEY, NONCE), {1: KEY})


def sealed_by_hand(message: bytes) -> Block:
    """What a member with other software could sign."""
    cipher = crypto_aead_xchacha20poly1305_ietf_encrypt(message, sealing._bound_fields(PLAIN, 1), NONCE, KEY)
    return sealing._head(PLAIN, SEALED)._replace(data=(1).to_bytes(4, "big") + NONCE + cipher)


VALUES = [b"", b"", b"", (), "", "", 0, "words", ()]


def padded(content: bytes) -> bytes:
    return (content + b"\x80").ljust(256, b"\0")


def nest(depth: int) -> object:
    return () if depth == 0 else (nest(depth - 1),)


def test_content_by_hand_that_is_right_opens() -> None:
    assert unseal(sealed_by_hand(padded(encode(VALUES))), {1: KEY}).text == "words"


@pytest.mark.parametrize(
    "message",
    [
        padded(encode(VALUES[:-1])),
        padded(encode([*VALUES, ()])),
        padded(encode("words")),
        padded(encode([*VALUES[:7], "", ()])),
        padded(encode([*VALUES[:3], ("b", "a"), *VALUES[4:]])),
        padded(encode([*VALUES[:3], nest(11), *VALUES[4:]])),
        padded(encode([b"short", *VALUES[1:]])),
        padded(encode([0, *VALUES[1:]])),
        padded(encode([*VALUES[:7], b"words", ()])),
        padded(encode([*VALUES[:8], ((),)])),
        padded(encode(VALUES) + b"\0\1"),
        padded(b"\x98\x09" + encode(VALUES)[1:]),
        padded(encode(VALUES)) + bytes(64),
        (encode(VALUES) + b"\x80").ljust(128, b"\0"),
        encode(VALUES).ljust(256, b"\0"),
        (encode(VALUES) + b"\x81").ljust(256, b"\0"),
        bytes(256),
        b"",
    ],
    ids=range(18),
)
def test_other_content_is_refused(message: bytes) -> None:
    with pytest.raises(VerificationError):
        unseal(sealed_by_hand(message), {1: KEY})


@given(st.binary(max_size=80))
def test_no_other_bytes_open(content: bytes) -> None:
    try:
        opened = unseal(sealed_by_hand(padded(content)), {1: KEY}, any_sky)
    except VerificationError:
        return
    assert seal(opened, 1, KEY, NONCE) == sealed_by_hand(padded(content))


@given(st.integers(1, 60_000), st.integers(1, 60_000))
def test_a_length_says_little(one: int, other: int) -> None:
    small, large = sorted((one, other))
    assert small <= sealing._padded(small) <= sealing._padded(large)
    assert sealing._padded(large) <= max(256, large * 5 // 4 + 1)
    assert sealing._padded(sealing._padded(large)) == sealing._padded(large)


def test_there_are_few_sizes() -> None:
    assert len({sealing._padded(length) for length in range(DATA_BYTES_MAX)}) == 31


def test_what_cannot_be_sealed_is_refused() -> None:
    with pytest.raises(UsageError, match="content"):
        seal(Block(MAP, CHARTER.id, OWNER.public_key, NOW, data=b"d"), 1, KEY, NONCE)
    with pytest.raises(UsageError, match="no block"):
        seal(PLAIN._replace(created_ms=0), 1, KEY, NONCE)
    full = PLAIN._replace(text="x" * TEXT_BYTES_MAX)
    assert unseal(decode_block(encode_block(seal(full, 1, KEY, NONCE))), {1: KEY}) == full
    large = full._replace(vectors=tuple(unit_vector(4096, 0, bytes((number,)) * 32) for number in range(4)))
    with pytest.raises(UsageError, match="too large"):
        seal(large, 1, KEY, NONCE)
    for epoch, key, nonce in ((0, KEY, NONCE), (1025, KEY, NONCE), (1, KEY[1:], NONCE), (1, KEY, NONCE[1:])):
        with pytest.raises(ValueError, match="sealing takes"):
            seal(PLAIN, epoch, key, nonce)


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
@settings(max_examples=20)
def test_a_key_reaches_the_member_that_it_is_for(seed: bytes, key: bytes) -> None:
    member = Identity(seed)
    charter = create(OWNER.public_key, "diary", PRIVATE, NOW, members=[member.public_key], key_hash=key_hash(key))
    signed = SignedKeyGrant.from_bytes(deliver(charter.id, 1, member.public_key, key, OWNER).to_bytes())
    assert receive(signed, charter, member) == key
    assert key not in signed.to_bytes()


def test_a_key_is_refused_that_is_not_the_owners_or_not_for_this() -> None:
    signed = deliver(CHARTER.id, 1, MEMBER.public_key, KEY, OWNER)
    other_charter = create(OTHER.public_key, "diary", PRIVATE, NOW, members=[MEMBER.public_key], key_hash=key_hash(KEY))
    with pytest.raises(VerificationError, match="another member"):
        receive(signed, CHARTER, OTHER)
    with pytest.raises(VerificationError, match="another collection"):
        receive(signed, other_charter, MEMBER)
    with pytest.raises(VerificationError, match="not signed"):
        receive(deliver(CHARTER.id, 1, MEMBER.public_key, KEY, OTHER), CHARTER, MEMBER)
    with pytest.raises(VerificationError, match="not signed"):
        receive(replace(signed, grant=replace(signed.grant, epoch=2)), CHARTER, MEMBER)
    with pytest.raises(VerificationError, match="charter names"):
        receive(deliver(CHARTER.id, 1, MEMBER.public_key, OTHER_KEY, OWNER), CHARTER, MEMBER)

    def signed_anew(owner: Identity, **changed: object) -> SignedKeyGrant:
        grant = replace(signed.grant, **changed)  # type: ignore[arg-type]
        return SignedKeyGrant(grant, owner.sign("key-grant", grant.to_bytes()))

    with pytest.raises(VerificationError, match="does not open"):
        receive(signed_anew(OWNER, sealed=bytes(len(signed.grant.sealed))), CHARTER, MEMBER)
    # A stranger passes off the box, which only the member opens, as the key of a collection of its own.
    with pytest.raises(VerificationError, match="sealed for another"):
        receive(signed_anew(OTHER, collection=other_charter.id), other_charter, MEMBER)
    with pytest.raises(VerificationError, match="sealed for another"):
        receive(signed_anew(OWNER, epoch=2), CHARTER, MEMBER)


@given(st.data())
def test_a_grant_that_was_changed_is_refused(data: st.DataObject) -> None:
    encoded = bytearray(deliver(CHARTER.id, 1, MEMBER.public_key, KEY, OWNER).to_bytes())
    bit = data.draw(st.integers(0, len(encoded) * 8 - 1))
    encoded[bit // 8] ^= 1 << bit % 8
    with pytest.raises((MalformedError, VerificationError)):
        receive(SignedKeyGrant.from_bytes(bytes(encoded)), CHARTER, MEMBER)


def test_nothing_is_sealed_to_what_is_no_key() -> None:
    for no_key in (bytes(32), b"\xff" * 32, b"\1" + bytes(31)):
        with pytest.raises(UsageError, match="point"):
            deliver(CHARTER.id, 1, no_key, KEY, OWNER)


def test_a_member_that_was_taken_out_reads_what_it_could_and_nothing_later() -> None:
    after = revoke(CHARTER, MEMBER.public_key, issued_ms=NOW, key_hash=key_hash(OTHER_KEY))
    keys_of_member, keys_of_owner = {1: KEY}, {1: KEY, after.epoch: OTHER_KEY}
    earlier, later = seal(PLAIN, 1, KEY, NONCE), seal(PLAIN, after.epoch, OTHER_KEY, NONCE)
    assert unseal(earlier, keys_of_member) == unseal(later, keys_of_owner) == unseal(earlier, keys_of_owner) == PLAIN
    with pytest.raises(NotFoundError):
        unseal(later, keys_of_member)
    # An old key is still delivered by the owner to whoever joins, and is then not measured by the hash of the new one.
    assert receive(deliver(after.id, 1, MEMBER.public_key, KEY, OWNER), after, MEMBER) == KEY
