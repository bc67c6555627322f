"""Witnesses and the bracket: a receipt is for one block alone, and no bound rests on a key that does not count."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.errors import MalformedError, VerificationError
from nexus.core.hashing import leaf_hash, merkle_root
from nexus.core.keys import Identity
from nexus.memory.block import CONTENT, TIME_MIN_MS, Block
from nexus.memory.bracket import (
    ATTESTED_MAX,
    RECEIPT_BYTES_MAX,
    SPEC,
    Anchor,
    Attestation,
    Bracket,
    Grade,
    Receipt,
    SignedAttestation,
    bracket,
    check_chain,
    named_ids,
    receipts,
)
from nexus.memory.validate import AHEAD_MAX_MS

AUTHOR = Identity(b"a" * 32)
WITNESSES = [Identity(bytes((number,)) * 32) for number in range(1, 5)]
NOW = 1_700_000_000_000
MINUTE = 60_000

id_lists = st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=40, unique=True)
witnesses = st.sampled_from(WITNESSES)


def an_id(number: int) -> bytes:
    return bytes((number,)) * 32


def attested(witness: Identity, at_ms: int) -> Attestation:
    return SignedAttestation.sign(witness, [an_id(9)], at_ms, None).attestation


@given(id_lists, witnesses, st.integers(TIME_MIN_MS, NOW))
def test_a_receipt_is_for_its_block_and_no_other(ids: list[bytes], witness: Identity, at_ms: int) -> None:
    signed = SignedAttestation.sign(witness, ids, at_ms, None)
    assert signed.attestation.root == merkle_root([leaf_hash(identifier) for identifier in ids])
    for place, (identifier, receipt) in enumerate(zip(ids, receipts(signed, ids), strict=True)):
        encoded = receipt.to_bytes()
        assert len(encoded) <= RECEIPT_BYTES_MAX
        assert Receipt.from_bytes(encoded).verify(identifier, NOW) == signed.attestation
        with pytest.raises(VerificationError):
            receipt.verify(ids[place - 1] if len(ids) > 1 else bytes(32) if identifier != bytes(32) else an_id(1), NOW)


@given(id_lists, st.data())
def test_a_receipt_that_was_changed_is_refused(ids: list[bytes], data: st.DataObject) -> None:
    signed = SignedAttestation.sign(WITNESSES[0], ids, NOW, None)
    place = data.draw(st.integers(0, len(ids) - 1))
    encoded = bytearray(receipts(signed, ids)[place].to_bytes())
    bit = data.draw(st.integers(0, len(encoded) * 8 - 1))
    encoded[bit // 8] ^= 1 << bit % 8
    with pytest.raises((MalformedError, VerificationError)):
        Receipt.from_bytes(bytes(encoded)).verify(ids[place], NOW)


def test_paths_of_another_form_are_refused() -> None:
    ids = [an_id(number) for number in range(5)]
    receipt = receipts(SignedAttestation.sign(WITNESSES[0], ids, NOW, None), ids)[2]
    for path in (receipt.path + bytes(32), receipt.path[:-32], receipt.path[:-1], b""):
        with pytest.raises(VerificationError):
            replace(receipt, path=path).verify(ids[2], NOW)
    for place in (1, 5, 7):
        with pytest.raises(VerificationError):
            replace(receipt, place=place).verify(ids[2], NOW)


def test_an_attestation_of_another_or_from_the_future_is_refused() -> None:
    signed = SignedAttestation.sign(WITNESSES[0], [an_id(1)], NOW, None)
    assert signed.verify(NOW - AHEAD_MAX_MS) == signed.attestation
    with pytest.raises(VerificationError, match="future"):
        signed.verify(NOW - AHEAD_MAX_MS - 1)
    with pytest.raises(VerificationError, match="not signed"):
        replace(signed, attestation=replace(signed.attestation, witness=WITNESSES[1].public_key)).verify(NOW)


def test_the_largest_receipt_fits() -> None:
    attestation = Attestation(SPEC, bytes(32), 2**53 - 1, ATTESTED_MAX, bytes(32), bytes(32))
    receipt = Receipt(SignedAttestation(attestation, bytes(64)), ATTESTED_MAX - 1, bytes(20 * 32))
    assert len(receipt.to_bytes()) <= RECEIPT_BYTES_MAX
    assert Receipt.from_bytes(receipt.to_bytes()) == receipt
    with pytest.raises(ValueError, match="1 to"):
        SignedAttestation.sign(WITNESSES[0], [], NOW, None)


def test_a_witness_signs_a_chain_also_when_its_clock_is_set_back() -> None:
    chain = [SignedAttestation.sign(WITNESSES[0], [an_id(0)], NOW, None).attestation]
    for late in (MINUTE, -MINUTE, 0):
        chain.append(SignedAttestation.sign(WITNESSES[0], [an_id(1)], NOW + late, chain[-1]).attestation)
    check_chain(chain)
    check_chain(chain[:1])
    back_dated = replace(chain[1], at_ms=chain[0].at_ms)
    stranger = replace(chain[1], witness=WITNESSES[1].public_key)
    for wrong in ([chain[0], chain[2]], [chain[1], chain[0]], [chain[0], back_dated], [chain[0], stranger]):
        with pytest.raises(VerificationError):
            check_chain(wrong)


ANCHORS = {
    an_id(1): Anchor(WITNESSES[0].public_key, NOW - 5 * MINUTE),
    an_id(2): Anchor(WITNESSES[1].public_key, NOW - 2 * MINUTE),
    an_id(3): Anchor(AUTHOR.public_key, NOW - MINUTE),
    an_id(4): Anchor(WITNESSES[2].public_key, NOW + AHEAD_MAX_MS + 1),
}


def block(*after: int, created_ms: int = NOW) -> Block:
    return Block(CONTENT, bytes(32), AUTHOR.public_key, created_ms, text="words", after=b"".join(map(an_id, after)))


def judged(
    entry: Block, *seen: tuple[int, int], wanted: int = 2, sky: bool = False, trusted: frozenset[bytes] | None = None
) -> Bracket:
    attestations = [attested([*WITNESSES, AUTHOR][number], NOW + late) for number, late in seen]
    return bracket(entry, attestations, ANCHORS.get, sky_agrees=sky, wanted=wanted, trusted=trusted)


def test_grades_from_worst_to_best() -> None:
    assert judged(block()) == Bracket(None, None, 0, Grade.CLAIMED)
    assert judged(block(), sky=True).grade is Grade.CONSISTENT
    assert judged(block(1), sky=True) == Bracket(NOW - 5 * MINUTE, None, 0, Grade.BOUNDED_BELOW)
    assert judged(block(1), (0, 10), (1, 20)) == Bracket(NOW - 5 * MINUTE, NOW + 20, 2, Grade.BOUNDED)
    assert judged(block(4), (0, 10), (1, 20)).grade is Grade.CONTRADICTED
    assert sorted(Grade) == list(Grade)
    assert [grade.label for grade in Grade] == ["contradicted", "claimed", "consistent", "bounded below", "bounded"]


def test_the_latest_of_what_others_stated_bounds_from_below() -> None:
    assert judged(block(1, 2)).not_before_ms == NOW - 2 * MINUTE
    assert judged(block(3)).not_before_ms is None
    assert judged(block(1, 3)).not_before_ms == NOW - 5 * MINUTE
    assert judged(block(7)).not_before_ms is None
    entry = block()._replace(parents=an_id(1), links=an_id(2) + an_id(1))
    assert judged(entry).not_before_ms == NOW - 2 * MINUTE
    assert named_ids(entry._replace(after=an_id(3))) == (an_id(3), an_id(1), an_id(2))


def test_the_upper_bound_is_when_the_last_of_the_wanted_witnesses_had_it() -> None:
    seen = [(0, 30), (1, 10), (2, 20), (3, 40)]
    for wanted, expected in ((1, 10), (2, 20), (3, 30), (4, 40)):
        assert judged(block(), *seen, wanted=wanted).not_after_ms == NOW + expected
    assert judged(block(), *seen, wanted=5) == Bracket(None, None, 4, Grade.CLAIMED)
    with pytest.raises(ValueError, match="at least one"):
        judged(block(), wanted=0)


def test_one_witness_counts_once_and_by_its_first_word_and_the_author_never() -> None:
    assert judged(block(), (0, 30), (0, 10), (4, 5)) == Bracket(None, None, 1, Grade.CLAIMED)
    assert judged(block(), (0, 30), (0, 10), (4, 5), wanted=1).not_after_ms == NOW + 10


def test_where_some_are_trusted_nobody_else_counts() -> None:
    only = frozenset({WITNESSES[0].public_key, AUTHOR.public_key})
    found = judged(block(1, 2, 3), (0, 30), (1, 10), (4, 5), wanted=1, trusted=only)
    assert found == Bracket(NOW - 5 * MINUTE, NOW + 30, 1, Grade.BOUNDED)
    assert judged(block(2), (1, 10), wanted=1, trusted=frozenset()) == Bracket(None, None, 0, Grade.CLAIMED)


def test_a_time_outside_the_bracket_is_contradicted_beyond_what_clocks_may_differ() -> None:
    for created_ms, expected in ((NOW, Grade.BOUNDED_BELOW), (NOW - 2 * MINUTE - AHEAD_MAX_MS, Grade.BOUNDED_BELOW)):
        assert judged(block(2, created_ms=created_ms)).grade is expected
    assert judged(block(2, created_ms=NOW - 2 * MINUTE - AHEAD_MAX_MS - 1)).grade is Grade.CONTRADICTED
    every = frozenset(witness.public_key for witness in WITNESSES)
    for late, expected in ((-AHEAD_MAX_MS, Grade.CLAIMED), (-AHEAD_MAX_MS - 1, Grade.CONTRADICTED)):
        assert judged(block(), (0, late), wanted=1, trusted=every).grade is expected


def test_strangers_cannot_cast_doubt_on_a_block() -> None:
    """They date attestations back, as many as they like: keys cost nothing."""
    early = [(number, -AHEAD_MAX_MS - 1) for number in range(4)]
    assert judged(block(1), *early, wanted=1) == Bracket(NOW - 5 * MINUTE, None, 0, Grade.BOUNDED_BELOW)
    assert judged(block(1), *early, (0, 10), wanted=1).not_after_ms == NOW + 10


seen_lists = st.lists(st.tuples(st.integers(0, 4), st.integers(-AHEAD_MAX_MS, 5 * MINUTE)), max_size=8)


@given(seen_lists, st.tuples(st.integers(0, 4), st.integers(-AHEAD_MAX_MS, 5 * MINUTE)), st.integers(1, 3))
def test_more_witnesses_only_ever_tighten_the_bracket(seen: list[tuple[int, int]], another: tuple[int, int], wanted: int) -> None:
    before, after = judged(block(1), *seen, wanted=wanted), judged(block(1), *seen, another, wanted=wanted)
    assert after == judged(block(1), another, *reversed(seen), wanted=wanted)
    assert after.witnesses >= before.witnesses
    assert after.grade >= before.grade
    if before.not_after_ms is not None:
        assert after.not_after_ms is not None
        assert after.not_after_ms <= before.not_after_ms
