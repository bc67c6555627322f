"""Private collections: what a block says is encrypted with a key that the owner hands to each member.

A sealed block has in the open who wrote it, when, in which collection, and which versions it replaces; all else is in `data`:

     4 bytes   epoch: which of the collection's keys, big-endian
    24 bytes   nonce
     n bytes   XChaCha20-Poly1305 of the content and its padding, 16 bytes longer; the open fields are authenticated with it

The content is the encoding of the fields `_CONTENT` of a block with content, then 0x80 and zeros up to the next of thirty sizes, so
that a length says little. Each epoch key travels to a member sealed to the X25519 form of its Ed25519 key, signed by the owner.
A new key keeps a former member from what is written later. What it could read before, it has read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from nacl.bindings import (
    crypto_aead_xchacha20poly1305_ietf_ABYTES,
    crypto_aead_xchacha20poly1305_ietf_decrypt,
    crypto_aead_xchacha20poly1305_ietf_encrypt,
    crypto_aead_xchacha20poly1305_ietf_KEYBYTES,
    crypto_aead_xchacha20poly1305_ietf_NPUBBYTES,
    crypto_box_seal,
    crypto_box_seal_open,
    crypto_box_SEALBYTES,
    crypto_sign_ed25519_pk_to_curve25519,
    crypto_sign_ed25519_sk_to_curve25519,
)
from nacl.exceptions import CryptoError

from nexus.core.encoding import Value, decode, encode
from nexus.core.errors import MalformedError, NotFoundError, UsageError, VerificationError
from nexus.core.hashing import HASH_BYTES, tagged_hash
from nexus.core.keys import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, Identity, verify_signature
from nexus.core.record import Record, digest, nested, raw, uint
from nexus.memory.block import (
    CONTENT,
    DATA_BYTES_MAX,
    SEALED,
    TAGS_MAX,
    VECTORS_MAX,
    Block,
    Vector,
    decode_block,
    encode_block,
)
from nexus.memory.block import SPEC as BLOCK_SPEC
from nexus.memory.collection import EPOCHS_MAX, Charter
from nexus.memory.validate import CheckSky, sound_vectors

SPEC = 1
EPOCH_KEY_BYTES: int = crypto_aead_xchacha20poly1305_ietf_KEYBYTES
NONCE_BYTES: int = crypto_aead_xchacha20poly1305_ietf_NPUBBYTES
_EPOCH_BYTES = 4
_OVERHEAD = _EPOCH_BYTES + NONCE_BYTES + crypto_aead_xchacha20poly1305_ietf_ABYTES
_SIZE_MIN = 256
_PAD = b"\x80"
_GRANT_TAG = "key-grant"

_CONTENT = ("links", "sky", "source", "tags", "title", "lang", "part", "text", "vectors")
# The fields, and what is in the lists of tags and of vectors, five numbers or texts each.
_VALUES_MAX = len(_CONTENT) + TAGS_MAX + VECTORS_MAX * (1 + len(Vector._fields))
_NOT_OPENED = "Only members of the collection have its keys; if you are one, fetch the block and the keys again"


@dataclass(frozen=True, slots=True)
class KeyGrant(Record):
    """The key of one epoch for one member. `sealed`: a libsodium sealed box of the key and a hash of what it is for."""

    spec: int = uint(SPEC, least=SPEC)
    collection: bytes = digest()
    epoch: int = uint(EPOCHS_MAX, least=1)
    member: bytes = raw(PUBLIC_KEY_BYTES)
    sealed: bytes = raw(EPOCH_KEY_BYTES + HASH_BYTES + crypto_box_SEALBYTES)


@dataclass(frozen=True, slots=True)
class SignedKeyGrant(Record):
    """Signed by the owner of the collection."""

    grant: KeyGrant = nested(KeyGrant)
    signature: bytes = raw(SIGNATURE_BYTES)

    def verify(self, charter: Charter) -> KeyGrant:
        """The grant, if the owner of the collection with this charter signed it. Raises VerificationError."""
        if self.grant.collection != charter.id:
            raise VerificationError("the key is for another collection")
        verify_signature(charter.owner, _GRANT_TAG, self.grant.to_bytes(), self.signature)
        return self.grant


def key_hash(key: bytes) -> bytes:
    """What a charter says of the key of its epoch."""
    return tagged_hash("epoch-key", key)


def deliver(collection: bytes, epoch: int, member: bytes, key: bytes, owner: Identity) -> SignedKeyGrant:
    """The key of an epoch for a member, by the owner. Not the same twice: libsodium draws a key for each sealed box itself.

    Raises UsageError for a member whose key nothing can be sealed to.
    """
    bound = key + _purpose(collection, epoch, member)
    grant = KeyGrant(SPEC, collection, epoch, member, _seal_to(member, bound))
    return SignedKeyGrant(grant, owner.sign(_GRANT_TAG, grant.to_bytes()))


def receive(signed: SignedKeyGrant, charter: Charter, member: Identity) -> bytes:
    """The key that was delivered to this member. Raises VerificationError."""
    grant = signed.verify(charter)
    if grant.member != member.public_key:
        raise VerificationError("the key is for another member")
    secret = crypto_sign_ed25519_sk_to_curve25519(member.seed + member.public_key)
    try:
        opened = crypto_box_seal_open(grant.sealed, _curve_key(member.public_key), secret)
    except (CryptoError, ValueError) as error:
        raise VerificationError(
            "the key does not open: it was sealed to somebody else", "Ask the owner to grant it again"
        ) from error
    key, purpose = opened[:EPOCH_KEY_BYTES], opened[EPOCH_KEY_BYTES:]
    if purpose != _purpose(grant.collection, grant.epoch, grant.member):
        raise VerificationError("the key was sealed for another collection, epoch or member")
    if grant.epoch == charter.epoch and key_hash(key) != charter.key_hash:
        raise VerificationError("the key is not the one that the charter names")
    return key


def seal(block: Block, epoch: int, key: bytes, nonce: bytes) -> Block:
    """The sealed form of a block with content. `nonce`: NONCE_BYTES random bytes, never used before. Raises UsageError."""
    if block.kind != CONTENT:
        raise UsageError("only blocks with content are sealed", "Tombstones stay in the open, and maps are for open collections")
    if not 1 <= epoch <= EPOCHS_MAX or len(key) != EPOCH_KEY_BYTES or len(nonce) != NONCE_BYTES:
        raise ValueError(f"sealing takes an epoch from 1, a key of {EPOCH_KEY_BYTES} and a nonce of {NONCE_BYTES} bytes")
    encode_block(block)
    content = encode(tuple(_plain(getattr(block, name)) for name in _CONTENT))
    size = _padded(len(content) + 1)
    if size + _OVERHEAD > DATA_BYTES_MAX:
        raise UsageError("the block is too large to be sealed", "Cut its text, or give it fewer vectors")
    message = (content + _PAD).ljust(size, b"\0")
    cipher = crypto_aead_xchacha20poly1305_ietf_encrypt(message, _bound_fields(block, epoch), nonce, key)
    return _head(block, SEALED)._replace(data=epoch.to_bytes(_EPOCH_BYTES, "big") + nonce + cipher)


def epoch_of(block: Block) -> int:
    """Which key a sealed block takes. Raises VerificationError."""
    if block.kind != SEALED or len(block.data) < _OVERHEAD + _SIZE_MIN:
        raise VerificationError("this is no sealed block, or one that was cut off", "Fetch the block again")
    return int.from_bytes(block.data[:_EPOCH_BYTES], "big")


def unseal(block: Block, keys: Mapping[int, bytes], check_sky: CheckSky | None = None) -> Block:
    """The block with content that was sealed, checked like one that came in the open. Its id and signature are the sealed one's.

    `keys`: of the collection, by epoch. `check_sky`: see `validate`; without it a block with a sky does not pass. Raises
    NotFoundError where the key is not here, VerificationError.
    """
    epoch = epoch_of(block)
    key = keys.get(epoch)
    if key is None:
        raise NotFoundError(
            f"key {epoch} of the private collection is not here", "Ask its owner to let you in: nexus collection grant"
        )
    nonce, cipher = block.data[_EPOCH_BYTES:][:NONCE_BYTES], block.data[_EPOCH_BYTES + NONCE_BYTES :]
    try:
        message = crypto_aead_xchacha20poly1305_ietf_decrypt(cipher, _bound_fields(block, epoch), nonce, key)
    except (CryptoError, ValueError) as error:
        raise VerificationError("a sealed block does not open: another key, or it was changed or moved", _NOT_OPENED) from error
    content = message.rstrip(b"\0")
    if not content.endswith(_PAD) or len(message) != _padded(len(content)):
        raise VerificationError("the padding of a sealed block is wrong", "Its author's software is at fault")
    try:
        opened = _open_content(_head(block, CONTENT), content[: -len(_PAD)])
    except MalformedError as error:
        raise VerificationError(
            f"a sealed block has no good content: {error.cause}", "Its author's software is at fault"
        ) from error
    if not sound_vectors(opened.vectors).all():
        raise VerificationError("a sealed block has a vector of another length than 1", "Its author's software is at fault")
    if opened.sky and (check_sky is None or not check_sky(np.array([opened.created_ms], np.int64), [opened.sky]).all()):
        raise VerificationError("the sky of a sealed block was not found to be that of its time and place")
    return opened


def _open_content(head: Block, content: bytes) -> Block:
    """Raises MalformedError."""
    values = decode(content, _VALUES_MAX)
    if type(values) is not tuple or len(values) != len(_CONTENT):
        raise MalformedError(f"the content is a list of {len(_CONTENT)}")
    fields = dict(zip(_CONTENT, values, strict=True))
    # The values take their places in a plain block, whose decoder then says whether they may be there.
    try:
        plain = encode((BLOCK_SPEC, *(fields.get(name, _plain(value)) for name, value in head._asdict().items())))
    except ValueError as error:
        raise MalformedError("the content is nested too deeply") from error
    return decode_block(plain)


def _head(block: Block, kind: int) -> Block:
    """What is in the open of a block, whether it is sealed or not."""
    return Block(
        kind,
        block.collection,
        block.author,
        block.created_ms,
        expires_ms=block.expires_ms,
        parents=block.parents,
        after=block.after,
    )


def _bound_fields(block: Block, epoch: int) -> bytes:
    head = _head(block, SEALED)
    open_fields = (head.collection, head.author, head.created_ms, head.expires_ms, head.parents, head.after)
    return tagged_hash("sealed-block", encode((SPEC, epoch, *open_fields)))


def _plain(value: object) -> Value:
    """A field as it is encoded: named tuples as plain ones."""
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value  # type: ignore[return-value]


def _padded(length: int) -> int:
    """The least size that holds so much: _SIZE_MIN, or one of four to each doubling."""
    if length <= _SIZE_MIN:
        return _SIZE_MIN
    step = 1 << ((length - 1).bit_length() - 3)
    return -(-length // step) * step


def _purpose(collection: bytes, epoch: int, member: bytes) -> bytes:
    # An owner of another collection could pass on a box that it cannot open as one of its own.
    return tagged_hash("epoch-key-for", encode((collection, epoch, member)))


def _seal_to(member: bytes, secret: bytes) -> bytes:
    """A sealed box. Here alone in this package something random is drawn: by libsodium, which takes none that is handed in."""
    sealed: bytes = crypto_box_seal(secret, _curve_key(member))
    return sealed


def _curve_key(public_key: bytes) -> bytes:
    """The X25519 form of an Ed25519 key. Raises UsageError."""
    try:
        converted: bytes = crypto_sign_ed25519_pk_to_curve25519(public_key)
    except (RuntimeError, CryptoError, ValueError) as error:
        raise UsageError("nothing can be sealed to this key: it is no point of the curve", "Check the member's peer id") from error
    return converted
