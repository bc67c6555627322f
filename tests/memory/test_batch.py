"""Batches: one signature for many blocks, of which any part can be passed on, and nothing else passes."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.encoding import encode
from nexus.core.errors import MalformedError, PeerError, VerificationError
from nexus.core.hashing import leaf_hash, merkle_root
from nexus.core.keys import Identity
from nexus.memory.batch import BLOCKS_MAX, BatchProof, OpenedBlock, SignedBatch, open_batch, sign_batch
from nexus.memory.block import CONTENT, Block, block_id, decode_block, encode_block

AUTHOR, OTHER = Identity(b"a" * 32), Identity(b"x" * 32)


@lru_cache(maxsize=4096)
def encoded(number: int, author: Identity = AUTHOR) -> bytes:
    return encode_block(Block(CONTENT, b"c" * 32, author.public_key, 2**40 + number, text=f"text {number}"))


@lru_cache(maxsize=64)
def batch_of(count: int) -> SignedBatch:
    return sign_batch(AUTHOR, [encoded(number) for number in range(count)])


def part_of(batch: SignedBatch, places: list[int]) -> SignedBatch:
    """What a node passes on that has the whole batch."""
    ids = dict(enumerate(map(block_id, batch.blocks)))
    return SignedBatch(batch.proof.narrow(ids, places), tuple(batch.blocks[place] for place in sorted(places)))


@st.composite
def parts(draw: st.DrawFn) -> tuple[SignedBatch, list[int]]:
    size = draw(st.integers(1, 40))
    return batch_of(size), sorted(draw(st.sets(st.integers(0, size - 1), min_size=1)))


@given(st.integers(1, 70))
def test_a_batch_opens_to_what_was_signed(count: int) -> None:
    batch = SignedBatch.from_bytes(batch_of(count).to_bytes())
    expected = [OpenedBlock(block_id(data), data, decode_block(data), place) for place, data in enumerate(batch.blocks)]
    assert open_batch(batch) == expected
    assert batch.proof.indices == batch.proof.hashes == b""


@given(parts())
def test_any_part_of_a_batch_opens_alone(part: tuple[SignedBatch, list[int]]) -> None:
    batch, places = part
    received = SignedBatch.from_bytes(part_of(batch, places).to_bytes())
    assert [(one.place, one.data) for one in open_batch(received)] == [(place, batch.blocks[place]) for place in places]
    assert received.proof.positions() == tuple(places)
    assert len(received.proof.hashes) <= 32 * 2 * len(places) * batch.proof.size.bit_length()
    assert (received.proof.indices == b"") == (len(places) == batch.proof.size)


@given(parts(), st.data())
def test_a_part_of_a_part_is_that_part_of_the_whole(part: tuple[SignedBatch, list[int]], data: st.DataObject) -> None:
    batch, places = part
    passed_on = part_of(batch, places)
    fewer = sorted(data.draw(st.sets(st.sampled_from(places), min_size=1)))
    ids = {one.place: one.id for one in open_batch(passed_on)}
    assert passed_on.proof.narrow(ids, fewer) == part_of(batch, fewer).proof
    if fewer[::-1] != fewer:
        assert passed_on.proof.narrow(ids, fewer[::-1]) == part_of(batch, fewer).proof


@given(parts(), st.data())
def test_a_part_that_was_changed_does_not_open(part: tuple[SignedBatch, list[int]], data: st.DataObject) -> None:
    whole = part_of(*part).to_bytes()
    changed = bytearray(whole)
    bit = data.draw(st.integers(0, len(changed) * 8 - 1))
    changed[bit // 8] ^= 1 << bit % 8
    with pytest.raises((MalformedError, VerificationError)):
        open_batch(SignedBatch.from_bytes(bytes(changed)))


@given(parts(), st.data())
def test_only_these_blocks_in_these_places_open(part: tuple[SignedBatch, list[int]], data: st.DataObject) -> None:
    batch, places = part
    good = part_of(batch, places)
    at = data.draw(st.integers(0, len(places) - 1))
    stranger = (*good.blocks[:at], encoded(4000), *good.blocks[at + 1 :])
    attempts = [
        replace(good, blocks=stranger),
        replace(good, blocks=good.blocks[:at] + good.blocks[at + 1 :]),
        replace(good, blocks=(*good.blocks, encoded(4000))),
        replace(good, blocks=(*good.blocks, good.blocks[-1])),
        replace(good, blocks=()),
        replace(good, proof=replace(good.proof, hashes=good.proof.hashes + bytes(32))),
        replace(good, proof=replace(good.proof, hashes=good.proof.hashes + b"\0")),
        replace(good, proof=replace(good.proof, size=good.proof.size + 1)),
        replace(good, proof=replace(good.proof, indices=good.proof.indices + b"\0")),
        replace(good, proof=replace(good.proof, signature=OTHER.sign("memory-batch", encode((batch.proof.size, bytes(32)))))),
    ]
    if len(places) > 1:
        attempts.append(replace(good, blocks=good.blocks[::-1]))
    if good.proof.indices:
        attempts.append(replace(good, proof=replace(good.proof, indices=b"")))
        attempts.append(replace(good, proof=replace(good.proof, hashes=good.proof.hashes[:-32])))
    for attempt in attempts:
        with pytest.raises((MalformedError, VerificationError)):
            open_batch(attempt)


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (b"\0", "whole numbers"),
        (b"\0\1\0\1", "in order"),
        (b"\0\2\0\1", "in order"),
        (b"\0\4", "beyond"),
        (b"\0\0\0\1\0\2\0\3", "does not list"),
    ],
)
def test_places_in_another_form_are_refused(indices: bytes, message: str) -> None:
    proof = replace(batch_of(4).proof, indices=indices)
    with pytest.raises(MalformedError, match=message):
        proof.positions()
    with pytest.raises(MalformedError):
        open_batch(SignedBatch(proof, batch_of(4).blocks[: max(1, len(indices) // 2)]))


def test_blocks_of_others_do_not_get_in() -> None:
    """Signed by the one who made the batch, whoever's name the blocks carry."""
    mixed = [encoded(1), encoded(2, OTHER)]
    for signer in (AUTHOR, OTHER):
        with pytest.raises(VerificationError, match="several authors"):
            open_batch(sign_batch(signer, mixed))
    with pytest.raises(VerificationError, match="not signed"):
        open_batch(sign_batch(OTHER, [encoded(1)]))


def test_a_signature_for_something_else_is_worth_nothing() -> None:
    root = merkle_root([leaf_hash(block_id(encoded(0)))])
    body = encode((1, root))
    assert open_batch(SignedBatch(BatchProof(1, b"", b"", AUTHOR.sign("memory-batch", body)), (encoded(0),)))
    for tag, other in (("node-record", body), ("memory-batch", encode((2, root))), ("memory-batch", root)):
        with pytest.raises(VerificationError):
            open_batch(SignedBatch(BatchProof(1, b"", b"", AUTHOR.sign(tag, other)), (encoded(0),)))


def test_what_is_no_block_makes_no_batch() -> None:
    with pytest.raises(MalformedError):
        open_batch(sign_batch(AUTHOR, [encoded(0), b"no block"]))


def test_the_largest_batch_and_one_that_is_larger() -> None:
    blocks = [encoded(number) for number in range(BLOCKS_MAX)]
    batch = sign_batch(AUTHOR, blocks)
    assert len(open_batch(SignedBatch.from_bytes(batch.to_bytes()))) == BLOCKS_MAX
    # Every other one: the most hashes that a part can take.
    half = part_of(batch, list(range(0, BLOCKS_MAX, 2)))
    assert len(open_batch(SignedBatch.from_bytes(half.to_bytes()))) == BLOCKS_MAX // 2
    for wrong in ([], [*blocks, encoded(4096)]):
        with pytest.raises(ValueError, match="a batch has"):
            sign_batch(AUTHOR, wrong)
    with pytest.raises(MalformedError):
        SignedBatch.from_bytes(replace(batch, blocks=(*batch.blocks, encoded(4096))).to_bytes())


def test_a_part_is_made_of_what_is_there() -> None:
    batch = batch_of(5)
    ids = {place: block_id(batch.blocks[place]) for place in range(5)}
    for wanted in ([5], [-1], []):
        with pytest.raises(VerificationError):
            batch.proof.narrow(ids, wanted)
    some = part_of(batch, [1, 3])
    with pytest.raises(VerificationError):
        some.proof.narrow({1: ids[1], 3: ids[3]}, [2])


@given(st.binary(max_size=200))
def test_noise_is_no_batch(noise: bytes) -> None:
    with pytest.raises(PeerError):
        open_batch(SignedBatch.from_bytes(noise))
