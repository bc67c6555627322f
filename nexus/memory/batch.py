"""Signed batches: blocks of one author under one signature.

The leaves of a Merkle tree are the blocks' ids, and the author signs its root and size: one signature and two hashes per block in
place of a signature each. A node may pass on any part of a batch, with the hashes that lead from it to the root. A single block is
a batch of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from nexus.core.encoding import encode
from nexus.core.errors import MalformedError, VerificationError
from nexus.core.hashing import (
    HASH_BYTES,
    leaf_hash,
    merkle_joint_narrow,
    merkle_joint_root,
    merkle_root,
)
from nexus.core.keys import SIGNATURE_BYTES, Identity, verify_signature
from nexus.core.record import Record, many, nested, raw, uint
from nexus.memory.block import BLOCK_BYTES_MAX, Block, block_id, decode_block

BLOCKS_MAX = 4096
_TAG = "memory-batch"
_INDEX_BYTES = 2
# A part of a batch needs at most two hashes per level and block; what needs more is sent in smaller parts or whole.
_PROOF_BYTES_MAX = BLOCKS_MAX * HASH_BYTES


@dataclass(frozen=True, slots=True)
class BatchProof(Record):
    """What proves blocks to be of one author's batch. `size`: blocks of the whole batch. `indices`: which of them these are, two
    bytes big-endian each, ascending; empty for all. `hashes`: see `merkle_joint_root`, one after another."""

    size: int = uint(BLOCKS_MAX, 1)
    indices: bytes = raw(most=BLOCKS_MAX * _INDEX_BYTES)
    hashes: bytes = raw(most=_PROOF_BYTES_MAX)
    signature: bytes = raw(SIGNATURE_BYTES)

    def positions(self) -> tuple[int, ...]:
        """The places of the blocks in the batch. Raises MalformedError."""
        if not self.indices:
            return tuple(range(self.size))
        if len(self.indices) % _INDEX_BYTES:
            raise MalformedError("the places of a batch are not made of whole numbers")
        places = tuple(int.from_bytes(self.indices[at : at + 2], "big") for at in range(0, len(self.indices), _INDEX_BYTES))
        if any(low >= high for low, high in pairwise(places)) or places[-1] >= self.size:
            raise MalformedError("the places of a batch are not in order, or beyond its size")
        if len(places) == self.size:
            raise MalformedError("a whole batch does not list its places")
        return places

    def root(self, ids: Sequence[bytes]) -> bytes:
        """The root that blocks with these ids lead to. Raises MalformedError, VerificationError."""
        places = self.positions()
        if len(places) != len(ids) or len(self.hashes) % HASH_BYTES:
            raise MalformedError("a batch has another number of blocks than it says")
        leaves = [leaf_hash(identifier) for identifier in ids]
        if len(places) == self.size:
            if self.hashes:
                raise MalformedError("a whole batch needs no hashes")
            return merkle_root(leaves)
        return merkle_joint_root(self.size, dict(zip(places, leaves, strict=True)), _split(self.hashes))

    def narrow(self, ids: Mapping[int, bytes], wanted: Sequence[int]) -> BatchProof:
        """The proof of some of its blocks. `ids`: of all blocks that this proof is of, by place. Raises VerificationError."""
        if len(wanted) == self.size:
            return self
        leaves = {place: leaf_hash(identifier) for place, identifier in ids.items()}
        hashes = merkle_joint_narrow(self.size, leaves, _split(self.hashes), wanted)
        return BatchProof(self.size, _join_places(sorted(wanted)), b"".join(hashes), self.signature)


@dataclass(frozen=True, slots=True)
class SignedBatch(Record):
    """Blocks as they travel: in the order of their places."""

    proof: BatchProof = nested(BatchProof)
    blocks: tuple[bytes, ...] = many(raw(most=BLOCK_BYTES_MAX), BLOCKS_MAX)


class OpenedBlock(NamedTuple):
    """A block whose author is proven. `place`: in its batch. Nothing else of it is checked."""

    id: bytes
    data: bytes
    block: Block
    place: int


def sign_batch(identity: Identity, blocks: Sequence[bytes]) -> SignedBatch:
    """Sign encoded blocks of `identity`, 1 to BLOCKS_MAX of them."""
    if not 1 <= len(blocks) <= BLOCKS_MAX:
        raise ValueError(f"a batch has 1 to {BLOCKS_MAX} blocks, not {len(blocks)}")
    root = merkle_root([leaf_hash(block_id(data)) for data in blocks])
    signature = identity.sign(_TAG, _signed(len(blocks), root))
    return SignedBatch(BatchProof(len(blocks), b"", b"", signature), tuple(blocks))


def open_batch(batch: SignedBatch) -> list[OpenedBlock]:
    """The blocks of a batch, decoded, and their author's signature checked. Raises MalformedError, VerificationError."""
    if not batch.blocks:
        raise MalformedError("a batch has no blocks")
    ids = [block_id(data) for data in batch.blocks]
    root = batch.proof.root(ids)
    blocks = [decode_block(data) for data in batch.blocks]
    author = blocks[0].author
    if any(block.author != author for block in blocks):
        raise VerificationError("a batch has blocks of several authors")
    verify_signature(author, _TAG, _signed(batch.proof.size, root), batch.proof.signature)
    return list(map(OpenedBlock, ids, batch.blocks, blocks, batch.proof.positions()))


def _signed(size: int, root: bytes) -> bytes:
    return encode((size, root))


def _split(hashes: bytes) -> list[bytes]:
    return [hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES)]


def _join_places(places: Sequence[int]) -> bytes:
    return b"".join(place.to_bytes(_INDEX_BYTES, "big") for place in places)
