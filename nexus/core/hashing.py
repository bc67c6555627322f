"""Domain-tagged BLAKE3 and Merkle trees (RFC 6962, section 2.1, with BLAKE3 for SHA-256)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from blake3 import blake3

from nexus.core.errors import VerificationError

HASH_BYTES = 32
MAX_PROOF_HASHES = 64


def tagged_hash(tag: str, *parts: bytes) -> bytes:
    """H(tag, parts...) = BLAKE3("nexus/v1/" tag 0x00, then for each part its length as 8 bytes little-endian and the part)."""
    hasher = blake3(b"nexus/v1/" + tag.encode("ascii") + b"\0")
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.digest()


def leaf_hash(data: bytes) -> bytes:
    """The hash of one Merkle leaf: BLAKE3(0x00 data)."""
    return blake3(b"\0" + data).digest()


def _node_hash(left: bytes, right: bytes) -> bytes:
    return blake3(b"\1" + left + right).digest()


def merkle_root(leaves: Iterable[bytes]) -> bytes:
    """Root over leaf hashes, in order. The root of no leaves is BLAKE3 of nothing. Sign the tree size beside the root."""
    level = list(leaves)
    if not level:
        return blake3(b"").digest()
    # Pairing neighbours and carrying an odd last one up gives the same tree as RFC 6962's split at a power of two.
    while len(level) > 1:
        paired = [_node_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        if len(level) % 2:
            paired.append(level[-1])
        level = paired
    return level[0]


def _split(size: int) -> int:
    return 1 << ((size - 1).bit_length() - 1)


def merkle_proof(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """Sibling hashes from leaf `index` up to the root (RFC 6962, section 2.1.1)."""
    if not 0 <= index < len(leaves):
        raise IndexError(f"leaf {index} of {len(leaves)}")
    if len(leaves) == 1:
        return []
    k = _split(len(leaves))
    if index < k:
        return [*merkle_proof(leaves[:k], index), merkle_root(leaves[k:])]
    return [*merkle_proof(leaves[k:], index - k), merkle_root(leaves[:k])]


def verify_merkle_proof(root: bytes, size: int, index: int, leaf: bytes, proof: Sequence[bytes]) -> None:
    """Check that `leaf` (a leaf hash) is number `index` of the `size` leaves under `root`. Raises VerificationError."""
    if not 0 <= index < size or len(proof) > MAX_PROOF_HASHES:
        raise VerificationError("the Merkle proof does not fit its tree")
    # Walk down from the root, so that the side of every sibling follows from index and size alone.
    sides = []
    low, high = 0, size
    while high - low > 1:
        middle = low + _split(high - low)
        if index < middle:
            sides.append("right")
            high = middle
        else:
            sides.append("left")
            low = middle
    if len(sides) != len(proof):
        raise VerificationError("the Merkle proof has the wrong length")
    node = leaf
    for side, sibling in zip(reversed(sides), proof, strict=True):
        node = _node_hash(node, sibling) if side == "right" else _node_hash(sibling, node)
    if node != root:
        raise VerificationError("the Merkle proof does not lead to the root")
