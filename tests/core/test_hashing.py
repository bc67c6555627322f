"""Tagged hashes and Merkle trees."""

from __future__ import annotations

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.errors import VerificationError
from nexus.core.hashing import (
    MerkleTree,
    appended_roots,
    leaf_hash,
    merkle_joint_narrow,
    merkle_joint_proof,
    merkle_joint_root,
    merkle_peaks,
    merkle_proof,
    merkle_range_proof,
    merkle_root,
    tagged_hash,
    verify_merkle_proof,
    verify_merkle_range,
)

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


def subtrees_outside(low: int, high: int, wanted: range) -> list[range]:
    """By the definition: of the subtrees of RFC 6962 without a wanted leaf, those within no other such subtree."""
    found = []
    if not set(range(low, high)) & set(wanted):
        found.append(range(low, high))
    elif high - low > 1:
        k = 1
        while k * 2 < high - low:
            k *= 2
        found += subtrees_outside(low, low + k, wanted) + subtrees_outside(low + k, high, wanted)
    return found


@st.composite
def ranges(draw: st.DrawFn) -> tuple[list[bytes], int, int]:
    leaves = draw(leaf_lists)
    start = draw(st.integers(0, len(leaves) - 1))
    return leaves, start, draw(st.integers(start + 1, len(leaves)))


@given(ranges())
def test_a_range_proof_is_the_roots_of_all_that_is_outside(given_range: tuple[list[bytes], int, int]) -> None:
    leaves, start, end = given_range
    outside = subtrees_outside(0, len(leaves), range(start, end))
    proof = merkle_range_proof(leaves, start, end)
    assert proof == [rfc6962_root(leaves[part.start : part.stop]) for part in outside]
    assert len(proof) <= 2 * len(leaves).bit_length()
    verify_merkle_range(merkle_root(leaves), len(leaves), start, leaves[start:end], proof)


@given(ranges(), st.data())
def test_of_a_range_nothing_else_is_proven(given_range: tuple[list[bytes], int, int], data: st.DataObject) -> None:
    leaves, start, end = given_range
    root, size, proof = merkle_root(leaves), len(leaves), merkle_range_proof(leaves, start, end)
    shown = leaves[start:end]
    wrong = leaf_hash(b"another leaf")
    at = data.draw(st.integers(0, len(shown) - 1))
    attempts = [
        (size, start, [*shown[:at], wrong, *shown[at + 1 :]], proof),
        (size, start, shown, [*proof, wrong]),
        (size, start, [], proof),
        (size, start, [*shown, wrong], proof),
        (size, start - size, shown, proof),
        (size, size, shown, proof),
        (size, start, shown, [hash_ + b"\0" for hash_ in proof] or [b""]),
    ]
    if proof:
        cut = data.draw(st.integers(0, len(proof) - 1))
        attempts += [
            (size, start, shown, [*proof[:cut], *proof[cut + 1 :]]),
            (size, start, shown, [*proof[:cut], wrong, *proof[cut + 1 :]]),
        ]
    if len(set(leaves)) == size:
        attempts += [(size, other, shown, proof) for other in range(size - len(shown) + 1) if other != start]
    for other_size, other_start, other_leaves, other_proof in attempts:
        with pytest.raises(VerificationError):
            verify_merkle_range(root, other_size, other_start, other_leaves, other_proof)


def test_ranges_that_cannot_be_cost_nothing() -> None:
    with pytest.raises(VerificationError, match="no range"):
        verify_merkle_range(bytes(32), 2**64, 0, [bytes(32)], [bytes(32)] * 64)
    with pytest.raises(VerificationError, match="length"):
        verify_merkle_range(bytes(32), 2**63, 2**62 - 1, [bytes(32)] * 2, [bytes(32)] * 1_000_000)
    for start, end in ((0, 0), (-1, 1), (1, 4), (2, 1)):
        with pytest.raises(IndexError):
            merkle_range_proof([bytes(32)] * 3, start, end)


@given(st.lists(st.binary(max_size=9), max_size=4), st.lists(st.binary(max_size=9), max_size=4))
def test_parts_cannot_be_shifted_into_each_other(one: list[bytes], other: list[bytes]) -> None:
    assert (tagged_hash("t", *one) == tagged_hash("t", *other)) == (one == other)


def test_tags_separate() -> None:
    assert tagged_hash("a", b"x") != tagged_hash("b", b"x")


@given(st.lists(st.binary(max_size=4), min_size=1, max_size=40), st.data())
def test_several_leaves_have_one_proof(values: list[bytes], data: st.DataObject) -> None:
    leaves = [leaf_hash(value) for value in values]
    indices = data.draw(st.sets(st.integers(0, len(leaves) - 1), min_size=1))
    proof = merkle_joint_proof(leaves, indices)
    shown = {index: leaves[index] for index in indices}
    assert merkle_joint_root(len(leaves), shown, proof) == merkle_root(leaves)
    index = data.draw(st.sampled_from(sorted(indices)))
    assert merkle_joint_root(len(leaves), shown | {index: leaf_hash(b"another")}, proof) != merkle_root(leaves)
    for wrong in ([*proof, bytes(32)], proof[1:] if proof else [bytes(32)]):
        with pytest.raises(VerificationError):
            merkle_joint_root(len(leaves), shown, wrong)
    with pytest.raises(VerificationError):
        merkle_joint_root(len(leaves), {len(leaves): leaves[0]}, proof)


@given(st.lists(st.binary(max_size=4), min_size=1, max_size=40), st.data())
def test_a_proof_of_some_leaves_holds_that_of_fewer(values: list[bytes], data: st.DataObject) -> None:
    leaves = [leaf_hash(value) for value in values]
    size = len(leaves)
    indices = data.draw(st.sets(st.integers(0, size - 1), min_size=1))
    wanted = data.draw(st.sets(st.sampled_from(sorted(indices)), min_size=1))
    proof, shown = merkle_joint_proof(leaves, indices), {index: leaves[index] for index in indices}
    narrowed = merkle_joint_narrow(size, shown, proof, wanted)
    assert narrowed == merkle_joint_proof(leaves, wanted)
    assert merkle_joint_root(size, {index: leaves[index] for index in wanted}, narrowed) == merkle_root(leaves)
    for other in (set(), wanted | {size}, wanted | set(range(size)) if len(indices) < size else {-1}):
        with pytest.raises(VerificationError, match="among"):
            merkle_joint_narrow(size, shown, proof, other)
    with pytest.raises(VerificationError, match="length"):
        merkle_joint_narrow(size, shown, [*proof, bytes(32)], wanted)
    with pytest.raises(VerificationError, match="none of the tree"):
        merkle_joint_narrow(size, shown | {size: leaves[0]}, proof, wanted)


@given(st.lists(st.binary(max_size=4), min_size=1, max_size=40), st.data())
def test_a_tree_that_is_kept_and_one_that_grows_are_the_tree(values: list[bytes], data: st.DataObject) -> None:
    leaves = [leaf_hash(value) for value in values]
    start = data.draw(st.integers(0, len(leaves) - 1))
    end = data.draw(st.integers(start + 1, len(leaves)))
    tree = MerkleTree(leaves)
    assert tree.root == merkle_root(leaves)
    assert tree.range_proof(start, end) == merkle_range_proof(leaves, start, end)
    assert appended_roots(start, merkle_peaks(leaves[:start]), leaves[start:]) == (merkle_root(leaves[:start]), tree.root)
    with pytest.raises(VerificationError, match="peaks"):
        appended_roots(start, [*merkle_peaks(leaves[:start]), bytes(32)], leaves[start:])
