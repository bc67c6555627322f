"""Collections: only the owner changes a charter, all nodes follow the same one, and nobody has rights that it does not name."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.core.encoding import encode
from nexus.core.errors import CapacityError, MalformedError, NexusError, NotFoundError, UsageError, VerificationError
from nexus.core.keys import Identity
from nexus.memory.collection import (
    CHARTER_BYTES_MAX,
    EPOCHS_MAX,
    MEMBERS_MAX,
    PRIVATE,
    PUBLIC,
    REVISION_MAX,
    WRITERS,
    WRITERS_MAX,
    Charter,
    SignedCharter,
    Writer,
    check_name,
    collection_id,
    create,
    grant,
    is_name,
    may_read,
    may_remove,
    may_replace,
    may_write,
    newest,
    replace_rule,
    revoke,
    split_reference,
    write_until,
)
from nexus.memory.versions import Version

OWNER, OTHER = Identity(b"o" * 32), Identity(b"x" * 32)
KEYS = [bytes((number,)) * 32 for number in range(1, 6)]
NOW = 1_700_000_000_000
A, B, C = KEYS[:3]


def writers_only(*keys: bytes) -> Charter:
    return create(OWNER.public_key, "notes", WRITERS, NOW, writers=keys)


def private(*keys: bytes, members: tuple[bytes, ...] = ()) -> Charter:
    return create(OWNER.public_key, "diary", PRIVATE, NOW, writers=keys, members=members, key_hash=b"1" * 32)


names = st.text(st.characters(exclude_characters="/@"), min_size=1, max_size=20).filter(is_name)
keys = st.sampled_from(KEYS)


@st.composite
def charters(draw: st.DrawFn) -> Charter:
    """What an owner's grants and revocations lead to."""
    mode = draw(st.sampled_from([PUBLIC, WRITERS, PRIVATE]))
    charter = create(
        OWNER.public_key,
        draw(names),
        mode,
        draw(st.integers(0, NOW)),
        writers=draw(st.sets(keys)) if mode != PUBLIC else (),
        members=draw(st.sets(keys)) if mode == PRIVATE else (),
        key_hash=bytes(32) if mode == PRIVATE else b"",
        sky_step=draw(st.sampled_from([None, 0, 10, 100, 1000])),
    )
    for step in range(draw(st.integers(0, 5))):
        try:
            if draw(st.booleans()):
                charter = grant(charter, draw(keys), write=draw(st.booleans()), issued_ms=draw(st.integers(0, NOW)))
            else:
                since = draw(st.sampled_from([None, 0, 1, NOW]))
                still = draw(st.booleans())
                new = bytes((step + 1,)) * 32
                when = draw(st.integers(0, NOW))
                charter = revoke(charter, draw(keys), issued_ms=when, since_ms=since, may_still_read=still, key_hash=new)
        except (UsageError, NotFoundError):
            continue
    return charter


@given(charters())
def test_a_charter_comes_back_and_holds(charter: Charter) -> None:
    signed = SignedCharter.sign(charter, OWNER)
    received = SignedCharter.from_bytes(signed.to_bytes())
    assert received == signed
    assert received.verify() == charter
    assert charter.id == collection_id(OWNER.public_key, charter.name)


@given(charters(), st.data())
def test_nobody_else_makes_or_changes_one(charter: Charter, data: st.DataObject) -> None:
    signed = SignedCharter.sign(charter, OWNER)
    with pytest.raises(UsageError, match="another owner"):
        SignedCharter.sign(charter, OTHER)
    encoded = bytearray(signed.to_bytes())
    bit = data.draw(st.integers(0, len(encoded) * 8 - 1))
    encoded[bit // 8] ^= 1 << bit % 8
    with pytest.raises((MalformedError, VerificationError)):
        SignedCharter.from_bytes(bytes(encoded)).verify()
    with pytest.raises(VerificationError):
        replace(signed, charter=replace(charter, owner=OTHER.public_key, writers=(), members=())).verify()


GOOD = private(A, B, members=(C,))


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""},
        {"name": "a/b"},
        {"name": "a@b"},
        {"name": " a"},
        {"name": "a\n"},
        {"name": "e\u0301"},
        {"name": "x" * 65},
        {"mode": PUBLIC},
        {"mode": WRITERS},
        {"epoch": 0},
        {"key_hash": b""},
        {"epoch": 0, "key_hash": b""},
        {"members": (C, C)},
        {"members": (C, A)},
        {"members": (A,)},
        {"members": (OWNER.public_key,)},
        {"writers": (Writer(B, 0), Writer(A, 0))},
        {"writers": (Writer(A, 0), Writer(A, 5))},
        {"writers": (Writer(OWNER.public_key, 0),)},
        {"model": "m"},
        {"fingerprint": bytes(32)},
        {"model": "m\n", "fingerprint": bytes(32)},
        {"sky_step": 7},
        {"sky_step": 9},
        {"sky_step": 70},
    ],
    ids=str,
)
def test_a_charter_that_makes_no_sense_is_neither_signed_nor_believed(wrong: dict[str, object]) -> None:
    charter = replace(GOOD, **wrong)  # type: ignore[arg-type]
    with pytest.raises(UsageError):
        SignedCharter.sign(charter, OWNER)
    with pytest.raises(MalformedError):
        SignedCharter(charter, OWNER.sign_digest(charter.digest)).verify()


@pytest.mark.parametrize(("at", "value"), [(0, 2), (1, b""), (3, 0), (3, 4), (4, REVISION_MAX + 1), (8, EPOCHS_MAX + 1), (9, b"1")])
def test_a_field_out_of_bounds_is_refused(at: int, value: object) -> None:
    fields = list(GOOD.to_value())  # type: ignore[arg-type]
    assert Charter.from_bytes(encode(fields)) == GOOD
    fields[at] = value  # type: ignore[call-overload]
    with pytest.raises(MalformedError):
        Charter.from_bytes(encode(fields))


def test_the_greatest_charter_fits_its_bound() -> None:
    own = [number.to_bytes(32, "big") for number in range(1, WRITERS_MAX + MEMBERS_MAX + 1)]
    charter = create(
        OWNER.public_key,
        "😀" * 64,
        PRIVATE,
        NOW,
        writers=own[:WRITERS_MAX],
        members=own[WRITERS_MAX:],
        key_hash=bytes(32),
        model="m" * 64,
        fingerprint=bytes(32),
    )
    past = replace(charter, writers=tuple(Writer(writer.key, NOW) for writer in charter.writers), revision=REVISION_MAX)
    assert len(SignedCharter.sign(past, OWNER).to_bytes()) < CHARTER_BYTES_MAX
    for write in (True, False):
        with pytest.raises(CapacityError):
            grant(charter, bytes(32), write=write, issued_ms=NOW)
    with pytest.raises(CapacityError):
        create(OWNER.public_key, "a", WRITERS, NOW, writers=[*own])
    with pytest.raises(CapacityError):
        revoke(past, own[-1], issued_ms=NOW, key_hash=b"2" * 32)
    with pytest.raises(CapacityError):
        revoke(replace(charter, epoch=EPOCHS_MAX), own[-1], issued_ms=NOW, key_hash=b"2" * 32)


@settings(max_examples=40)
@given(st.lists(charters(), min_size=1, max_size=4))
def test_every_node_follows_the_same_charter(revisions: list[Charter]) -> None:
    signed = [SignedCharter.sign(replace(charter, name="one"), OWNER) for charter in revisions]
    chosen = set()
    for order in (signed, signed[::-1], [*signed, *signed]):
        best = order[0]
        for other in order[1:]:
            best = newest(best, other)
            assert newest(best, other) == newest(other, best) == best
        chosen.add(best.to_bytes())
    assert len(chosen) == 1
    assert SignedCharter.from_bytes(chosen.pop()).charter.revision == max(charter.revision for charter in revisions)


def test_names_are_unique_for_each_owner() -> None:
    ids = {collection_id(owner, name) for owner in (OWNER.public_key, OTHER.public_key) for name in ("main", "mai", "main2")}
    assert len(ids) == 6


def test_who_may_write_and_read() -> None:
    charter = create(OWNER.public_key, "news", PUBLIC, NOW)
    assert may_write(charter, A, NOW)
    assert may_read(charter, A)
    charter = writers_only(A)
    assert [may_write(charter, key, NOW) for key in (OWNER.public_key, A, B)] == [True, True, False]
    assert may_read(charter, B)
    charter = private(A, members=(B,))
    assert [may_write(charter, key, NOW) for key in (OWNER.public_key, A, B, C)] == [True, True, False, False]
    assert [may_read(charter, key) for key in (OWNER.public_key, A, B, C)] == [True, True, True, False]
    assert charter.readers() == tuple(sorted((OWNER.public_key, A, B)))


def test_what_a_writer_wrote_before_it_was_revoked_stays_and_what_it_dates_later_does_not() -> None:
    charter = revoke(writers_only(A, B), A, issued_ms=NOW + 5)
    assert [may_write(charter, A, at) for at in (NOW, NOW + 5, NOW + 6)] == [True, True, False]
    assert write_until(charter, A) == NOW + 5
    assert charter.revision == 1
    earlier = revoke(charter, A, issued_ms=NOW + 9, since_ms=NOW)
    assert write_until(earlier, A) == NOW
    assert write_until(revoke(earlier, A, issued_ms=NOW, since_ms=NOW + 7), A) == NOW
    assert write_until(revoke(charter, A, issued_ms=NOW + 9, since_ms=0), A) is None
    assert may_write(grant(charter, A, write=True, issued_ms=NOW + 9), A, NOW + 10)
    assert not may_write(revoke(writers_only(A), A, issued_ms=0), A, NOW)


def test_a_private_collection_changes_its_key_when_a_reader_goes() -> None:
    charter = private(A, B, members=(C,))
    for gone in (A, C):
        with pytest.raises(UsageError, match="new key"):
            revoke(charter, gone, issued_ms=NOW)
        with pytest.raises(UsageError, match="new key"):
            revoke(charter, gone, issued_ms=NOW, key_hash=charter.key_hash)
        after = revoke(charter, gone, issued_ms=NOW, key_hash=b"2" * 32)
        assert (after.epoch, after.key_hash) == (2, b"2" * 32)
        assert not may_read(after, gone)
        assert set(after.readers()) == set(charter.readers()) - {gone}
    silent = revoke(charter, A, issued_ms=NOW, may_still_read=True)
    assert (silent.epoch, silent.key_hash) == (1, charter.key_hash)
    assert may_read(silent, A)
    assert not may_write(silent, A, NOW + 1)
    # It wrote once and reads still: now it shall not read either, and if it is let in again it is a reader only.
    gone = revoke(silent, A, issued_ms=NOW, key_hash=b"2" * 32)
    assert (gone.epoch, may_read(gone, A)) == (2, False)
    assert revoke(gone, A, issued_ms=NOW, since_ms=0).epoch == 2
    again = grant(gone, A, write=False, issued_ms=NOW + 9)
    assert may_read(again, A)
    assert not may_write(again, A, NOW + 9)


def test_what_is_everybodys_or_the_owners_is_not_granted() -> None:
    charter = create(OWNER.public_key, "news", PUBLIC, NOW)
    with pytest.raises(UsageError):
        grant(charter, A, write=True, issued_ms=NOW)
    with pytest.raises(NotFoundError):
        revoke(charter, A, issued_ms=NOW)
    with pytest.raises(UsageError):
        grant(writers_only(), A, write=False, issued_ms=NOW)
    with pytest.raises(UsageError):
        grant(writers_only(), OWNER.public_key, write=True, issued_ms=NOW)
    with pytest.raises(UsageError):
        grant(private(A), A, write=False, issued_ms=NOW)
    with pytest.raises(NotFoundError):
        revoke(writers_only(A), OWNER.public_key, issued_ms=NOW)
    with pytest.raises(CapacityError):
        grant(replace(writers_only(), revision=REVISION_MAX), A, write=True, issued_ms=NOW)
    with pytest.raises(UsageError):
        create(OWNER.public_key, "news", PUBLIC, NOW, writers=[A])
    with pytest.raises(UsageError):
        create(OWNER.public_key, "diary", PRIVATE, NOW)
    with pytest.raises(UsageError):
        create(OWNER.public_key, "news", PUBLIC, NOW, sky_step=7)


def test_a_member_who_may_write_is_listed_once() -> None:
    charter = grant(private(members=(A,)), A, write=True, issued_ms=NOW)
    assert charter.writers == (Writer(A, 0),)
    assert charter.members == ()
    assert private(A, members=(A, OWNER.public_key)).members == ()


versions = st.builds(
    Version,
    st.binary(min_size=32, max_size=32),
    st.just(()),
    st.sampled_from([*KEYS, OWNER.public_key]),
    st.integers(2**32, NOW + 10),
    st.just(False),
)


@given(charters(), versions, versions)
def test_the_rules_for_versions_say_the_same(charter: Charter, child: Version, parent: Version) -> None:
    allowed = may_replace(charter, child, parent)
    assert replace_rule(charter)(child, parent) == allowed
    if child.author == parent.author:
        assert allowed
    elif charter.mode == PUBLIC:
        assert not allowed
    else:
        assert allowed == all(may_write(charter, entry.author, entry.created_ms) for entry in (child, parent))
    assert may_remove(child, parent) == (child.author == parent.author)


@given(charters(), keys, st.booleans(), st.integers(0, NOW))
def test_a_grant_gives_what_it_says_and_nothing_to_others(charter: Charter, key: bytes, write: bool, now_ms: int) -> None:
    try:
        after = grant(charter, key, write=write, issued_ms=now_ms)
    except NexusError:
        return
    assert may_read(after, key)
    assert may_write(after, key, NOW) or not write
    for other in set(KEYS) - {key}:
        assert may_read(after, other) == may_read(charter, other)
        assert write_until(after, other) == write_until(charter, other)
    assert (after.revision, after.epoch) == (charter.revision + 1, charter.epoch)


@given(charters(), keys, st.booleans())
def test_a_revocation_takes_that_and_nothing_from_others(charter: Charter, key: bytes, still: bool) -> None:
    try:
        after = revoke(charter, key, issued_ms=NOW - 1, may_still_read=still, key_hash=b"r" * 32)
    except NexusError:
        return
    assert not may_write(after, key, NOW)
    assert may_read(after, key) == (charter.mode != PRIVATE or still)
    for other in set(KEYS) - {key}:
        assert may_read(after, other) == may_read(charter, other)
        assert write_until(after, other) == write_until(charter, other)


@pytest.mark.parametrize("name", ["main", "Zoé", "日本語", "a b", "x" * 64, "#tag", "."])
def test_names_that_may_be(name: str) -> None:
    assert check_name(name) == name
    assert split_reference(name) == (name, "")
    assert split_reference(f"{name}@12D3Koo") == (name, "12D3Koo")


@pytest.mark.parametrize("reference", ["", "a/b", " a", "a ", "a\tb", "x" * 65, "a@", "@b", "a@b@c", "a@b/c", "\u200b", "a@\u0661"])
def test_references_that_may_not_be(reference: str) -> None:
    with pytest.raises(UsageError):
        split_reference(reference)
