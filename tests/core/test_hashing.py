"""Tagged hashes and Merkle trees."""

from __future__ import annotations

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.errors import VerificationError
from nexus.core.hashing import leaf_hash, merkle_proof, merkle_root, tagged_hash, verify_merkle_proof

leaf_lists = st.lists(st.binary(max_size=8).map(leaf_hash), min_size=1, max_size=70)


def rfc6962_root(leaves: list[bytes]) -> bytes:
    """The definition, word for word: split at the largest power of two below the size."""
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return blake3(b"\1" + rfc6962_root(leaves[:k]) + rfc6962_root(leaves[k:])).digest()


@given(leaf_lists)
def test_the_root_is_that_of_rfc_6962(leaves: list[bytes]) -> None:
    assert merkle_root(leaves) == rfc6962_root(leaves)


@given(leaf_lists, st.data())
def test_every_leaf_can_be_proven_and_no_other(leaves: list[bytes], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(leaves) - 1))
    root, proof = merkle_root(leaves), merkle_proof(leaves, index)
    verify_merkle_proof(root, len(leaves), index, leaves[index], proof)
    with pytest.raises(VerificationError):
        verify_merkle_proof(root, len(leaves), index, leaf_hash(b"another leaf"), proof)
    with pytest.raises(VerificationError):
        verify_merkle_proof(root, len(leaves), index, leaves[index], [*proof, bytes(32)])
    with pytest.raises(VerificationError):
        verify_merkle_proof(root, len(leaves), len(leaves), leaves[index], proof)
    if proof:
        with pytest.raises(VerificationError):
            verify_merkle_proof(root, len(leaves), index, leaves[index], proof[:-1])


def test_an_oversized_proof_is_refused_before_any_hashing() -> None:
    with pytest.raises(VerificationError):
        verify_merkle_proof(bytes(32), 2**64, 0, bytes(32), [bytes(32)] * 100_000)


@given(st.lists(st.binary(max_size=9), max_size=4), st.lists(st.binary(max_size=9), max_size=4))
def test_parts_cannot_be_shifted_into_each_other(one: list[bytes], other: list[bytes]) -> None:
    assert (tagged_hash("t", *one) == tagged_hash("t", *other)) == (one == other)


def test_tags_separate() -> None:
    assert tagged_hash("a", b"x") != tagged_hash("b", b"x")
