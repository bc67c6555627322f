"""Ed25519 identities and signatures (RFC 8032), by libsodium alone: it refuses the small-order keys that others accept.

A node's key is also its libp2p identity; its peer id is the base58 form that libp2p users know (12D3Koo...).
"""

from __future__ import annotations

from functools import lru_cache

import base58
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey, VerifyKey

from nexus.core.errors import MalformedError, UsageError, VerificationError
from nexus.core.hashing import tagged_hash

PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64
# libp2p peer id of an Ed25519 key: identity multihash (0x00, 36 bytes) of the protobuf {type: Ed25519, data: 32 bytes}.
_PEER_ID_PREFIX = bytes.fromhex("002408011220")

# Base58 of 36 bytes takes as long as verifying a tenth of a signature, and the same ids are asked for again and again.
_IDS_KEPT = 8192


class Identity:
    """A node's key pair. Signing is deterministic, so an identity needs no randomness after it is made."""

    def __init__(self, seed: bytes) -> None:
        """`seed`: the 32 secret bytes of RFC 8032."""
        self._key = SigningKey(seed)
        self.public_key = bytes(self._key.verify_key)
        self.peer_id = peer_id_of(self.public_key)

    @property
    def seed(self) -> bytes:
        return bytes(self._key)

    def sign(self, tag: str, body: bytes) -> bytes:
        """Sign H(tag, body): a signature made under one tag is worth nothing under another."""
        return self.sign_digest(tagged_hash(tag, body))

    def sign_digest(self, digest: bytes) -> bytes:
        """Sign H(tag, body) where the caller has it already, as the id of a record."""
        return self._key.sign(digest).signature


def verify_signature(public_key: bytes, tag: str, body: bytes, signature: bytes) -> None:
    """Raises VerificationError unless `signature` is `public_key`'s over H(tag, body)."""
    verify_digest(public_key, tag, tagged_hash(tag, body), signature)


def verify_digest(public_key: bytes, tag: str, digest: bytes, signature: bytes) -> None:
    """The same where the caller has H(tag, body) already; `tag` is for the error."""
    try:
        VerifyKey(public_key).verify(digest, signature)
    except (BadSignatureError, ValueError, TypeError) as error:
        raise VerificationError(f"the {tag} is not signed by the key it names") from error


@lru_cache(maxsize=_IDS_KEPT)
def peer_id_of(public_key: bytes) -> str:
    """The libp2p peer id of a 32-byte Ed25519 public key."""
    return base58.b58encode(_PEER_ID_PREFIX + public_key).decode("ascii")


@lru_cache(maxsize=_IDS_KEPT)
def public_key_of(peer_id: str) -> bytes:
    """The 32-byte Ed25519 key inside a peer id. Raises MalformedError for ids of other key types."""
    try:
        raw = base58.b58decode(peer_id)
    except ValueError as error:
        raise MalformedError(f"{peer_id!r} is not a peer id") from error
    if len(raw) != len(_PEER_ID_PREFIX) + PUBLIC_KEY_BYTES or not raw.startswith(_PEER_ID_PREFIX):
        raise MalformedError(f"{peer_id!r} is not the id of an Ed25519 peer")
    return raw[len(_PEER_ID_PREFIX) :]


def parse_peer_id(text: str) -> str:
    """A peer id as a user typed it, checked. Raises UsageError."""
    try:
        public_key_of(text)
    except MalformedError as error:
        raise UsageError(error.cause, "A peer id looks like 12D3KooW...; `nexus peers` lists those in reach") from error
    return text
