"""Identities, peer ids and signatures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.peer.id import ID

from nexus.core.errors import MalformedError, UsageError, VerificationError
from nexus.core.keys import Identity, parse_peer_id, peer_id_of, public_key_of, verify_signature

seeds = st.binary(min_size=32, max_size=32)


@given(seeds)
def test_the_peer_id_is_libp2ps(seed: bytes) -> None:
    identity = Identity(seed)
    assert identity.peer_id == ID.from_pubkey(create_new_key_pair(seed).public_key).to_string()
    assert public_key_of(identity.peer_id) == identity.public_key


@given(seeds, st.binary(max_size=64))
def test_a_signature_holds_for_its_tag_body_and_key_alone(seed: bytes, body: bytes) -> None:
    identity = Identity(seed)
    signature = identity.sign("receipt", body)
    verify_signature(identity.public_key, "receipt", body, signature)
    other = Identity(bytes(31) + b"\1")
    for key, tag, text, signed in (
        (identity.public_key, "request", body, signature),
        (identity.public_key, "receipt", body + b"\0", signature),
        (other.public_key, "receipt", body, other.sign("receipt", body)[:-1]),
        (identity.public_key, "receipt", body, signature[:-1] + bytes([signature[-1] ^ 1])),
        (identity.public_key, "receipt", body, b""),
    ):
        with pytest.raises(VerificationError):
            verify_signature(key, tag, text, signed)


@pytest.mark.parametrize(
    "key", [bytes(32), b"\1" + bytes(31), bytes.fromhex("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f")]
)
def test_a_small_order_key_signs_nothing(key: bytes) -> None:
    """With such a key, R = identity point and S = 0 satisfy the equation for every message in libraries that do not look."""
    with pytest.raises(VerificationError):
        verify_signature(key, "receipt", b"anything", b"\1" + bytes(63))


@pytest.mark.parametrize(
    "text", ["", "0OIl", "QmYwAPJzv5CZsnA625s3Xf2nemtYgPpHdWEz79ojWnPbdG", "12D3KooW", peer_id_of(bytes(32)) + "1"]
)
def test_other_ids_are_refused(text: str) -> None:
    with pytest.raises(MalformedError):
        public_key_of(text)
    with pytest.raises(UsageError):
        parse_peer_id(text)
