"""Collections: who may write, replace and read the blocks of one. Its owner signs that, and all nodes follow the same charter.

A collection's id is the hash of its owner's key and its name. What a charter says holds for all blocks of the collection, older
ones too: whoever gets a later charter checks again who wrote what (`write_until`), so that in the end all nodes keep the same
blocks.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from nexus.core.errors import CapacityError, MalformedError, NotFoundError, UsageError
from nexus.core.hashing import tagged_hash
from nexus.core.keys import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, Identity, verify_digest
from nexus.core.record import Record, many, nested, optional_digest, raw, text, uint
from nexus.memory.block import MODEL_BYTES_MAX, TIME_MAX_MS
from nexus.memory.sky.place import STEP_DEFAULT, STEP_MAX, STEP_MIN, check_step
from nexus.memory.versions import Rule, Version, same_author

SPEC = 1
# PUBLIC: anybody writes. WRITERS: the owner and those it names write, anybody reads. PRIVATE: others do not read.
PUBLIC, WRITERS, PRIVATE = 1, 2, 3
MODE_NAMES = {PUBLIC: "public", WRITERS: "writers", PRIVATE: "private"}
NAME_CHARS_MAX, NAME_BYTES_MAX = 64, 256
WRITERS_MAX = MEMBERS_MAX = 256
REVISION_MAX = 2**32
# Each is a key that is handed to every new member.
EPOCHS_MAX = 1024
CHARTER_BYTES_MAX = 32 * 1024
_TAG = "collection-charter"


@dataclass(frozen=True, slots=True)
class Writer(Record):
    """`until_ms`: what the writer dated later does not count; 0 while it may write."""

    key: bytes = raw(PUBLIC_KEY_BYTES)
    until_ms: int = uint(TIME_MAX_MS)


@dataclass(frozen=True, slots=True)
class Charter(Record):
    """`writers`: of modes WRITERS and PRIVATE, beside the owner, and those that once were; sorted by key. `members`: of mode
    PRIVATE, who read and do not write; sorted. `epoch`, `key_hash`: which key blocks are sealed with now, from 1 on, and
    `nexus.memory.sealing.key_hash` of it; 0 and empty in other modes. `model`, `fingerprint`: of the vectors that blocks should
    have; may both be empty. `sky_step`: the smallest cell that a block may name as its place, in hundredths of a degree; 0 where
    blocks have no sky. `issued_ms` is for people: what counts is `revision`."""

    spec: int = uint(SPEC, least=SPEC)
    owner: bytes = raw(PUBLIC_KEY_BYTES)
    name: str = text(NAME_BYTES_MAX)
    mode: int = uint(PRIVATE, least=PUBLIC)
    revision: int = uint(REVISION_MAX)
    issued_ms: int = uint(TIME_MAX_MS)
    writers: tuple[Writer, ...] = many(nested(Writer), WRITERS_MAX)
    members: tuple[bytes, ...] = many(raw(PUBLIC_KEY_BYTES), MEMBERS_MAX)
    epoch: int = uint(EPOCHS_MAX)
    key_hash: bytes = optional_digest()
    model: str = text(MODEL_BYTES_MAX)
    fingerprint: bytes = optional_digest()
    sky_step: int = uint(STEP_MAX)

    @property
    def id(self) -> bytes:
        """The collection's id: the same for all its charters."""
        return collection_id(self.owner, self.name)

    @property
    def digest(self) -> bytes:
        return tagged_hash(_TAG, self.to_bytes())

    def readers(self) -> tuple[bytes, ...]:
        """Who reads a private collection, sorted: what its key is sealed to."""
        return tuple(sorted({self.owner, *self.members, *(writer.key for writer in self.writers if not writer.until_ms)}))


@dataclass(frozen=True, slots=True)
class SignedCharter(Record):
    charter: Charter = nested(Charter)
    signature: bytes = raw(SIGNATURE_BYTES)

    @classmethod
    def sign(cls, charter: Charter, owner: Identity) -> SignedCharter:
        """Raises UsageError for a charter that nobody would take."""
        if charter.owner != owner.public_key:
            raise UsageError("the charter is of another owner's collection", "Only the owner of a collection can change it")
        try:
            _check(Charter.from_bytes(charter.to_bytes()))
        except MalformedError as error:
            raise UsageError(f"this is no charter: {error.cause}", "Keep within the bounds in docs/memory.md") from error
        return cls(charter, owner.sign_digest(charter.digest))

    def verify(self) -> Charter:
        """The charter, if it makes sense and its owner signed it. Raises MalformedError, VerificationError."""
        _check(self.charter)
        verify_digest(self.charter.owner, _TAG, self.charter.digest, self.signature)
        return self.charter


def newest(one: SignedCharter, other: SignedCharter) -> SignedCharter:
    """Which of two charters of one collection counts: the later revision; of two for the same one, the same everywhere."""
    return max(one, other, key=lambda signed: (signed.charter.revision, signed.charter.digest, signed.signature))


def collection_id(owner: bytes, name: str) -> bytes:
    """The id of the collection of this name that the owner, a public key, has."""
    return tagged_hash("collection", owner, name.encode("utf-8"))


def create(
    owner: bytes,
    name: str,
    mode: int,
    issued_ms: int,
    *,
    writers: Iterable[bytes] = (),
    members: Iterable[bytes] = (),
    key_hash: bytes = b"",
    model: str = "",
    fingerprint: bytes = b"",
    sky_step: int | None = None,
) -> Charter:
    """The first charter of a collection. `key_hash`: of the first key of a private one. Raises UsageError."""
    check_name(name)
    step = sky_step if sky_step is not None else 0 if mode == PRIVATE else STEP_DEFAULT
    writing = sorted(set(writers) - {owner})
    reading = sorted(set(members) - {owner, *writing})
    _check_room(writing, reading)
    charter = Charter(
        SPEC,
        owner,
        name,
        mode,
        0,
        issued_ms,
        tuple(Writer(key, 0) for key in writing),
        tuple(reading),
        int(mode == PRIVATE),
        key_hash,
        model,
        fingerprint,
        check_step(step) if step else 0,
    )
    try:
        _check(charter)
    except MalformedError as error:
        raise UsageError(error.cause, "Name writers in a writers-only or private collection, members in a private one") from error
    return charter


def grant(charter: Charter, key: bytes, *, write: bool, issued_ms: int) -> Charter:
    """The next charter, in which `key` may read (of a private collection), or read and write. Raises UsageError, CapacityError.

    In a private collection the present key is then to be sealed to it too (`nexus.memory.sealing.deliver`).
    """
    if charter.mode not in (WRITERS, PRIVATE) or (charter.mode == WRITERS and not write):
        raise UsageError(
            f"in a {MODE_NAMES[charter.mode]} collection everybody may do that", "Only what is not everybody's can be granted"
        )
    if key == charter.owner:
        raise UsageError("the owner may do everything already", "Name another peer")
    writers = {writer.key: writer for writer in charter.writers}
    members = set(charter.members) - {key}
    if write:
        writers[key] = Writer(key, 0)
    elif key in writers and not writers[key].until_ms:
        raise UsageError("this peer writes, and so reads already", "Take the right to write from it to let it read only")
    else:
        members.add(key)
    return _next(charter, writers.values(), members, issued_ms)


def revoke(
    charter: Charter,
    key: bytes,
    *,
    issued_ms: int,
    since_ms: int | None = None,
    may_still_read: bool = False,
    key_hash: bytes = b"",
) -> Charter:
    """The next charter, in which `key` may write no longer, and of a private collection not read, unless it `may_still_read`.

    What it dated after `since_ms` (now, if not given) counts no more; 0: nothing it ever wrote here. `key_hash`: of a new key; a
    private collection needs one when a reader goes, and it must not be sealed to that reader. Raises UsageError, NotFoundError.
    """
    writers = {writer.key: writer for writer in charter.writers}
    members = set(charter.members)
    read_before = key in charter.readers()
    if key == charter.owner or (key not in writers and key not in members):
        raise NotFoundError("the charter names no such writer or member", "See who is in it with `nexus collection ls`")
    members.discard(key)
    writer = writers.pop(key, None)
    if writer is not None and since_ms != 0:
        # Never 0, which would mean that it may still write.
        until_ms = max(1, issued_ms if since_ms is None else since_ms)
        writers[key] = Writer(key, min(until_ms, writer.until_ms or until_ms))
    if charter.mode == PRIVATE and may_still_read:
        members.add(key)
    elif charter.mode == PRIVATE and read_before:
        if not key_hash or key_hash == charter.key_hash:
            raise UsageError("a private collection needs a new key when a reader goes", "Make one, and seal it to the others")
        if charter.epoch == EPOCHS_MAX:
            raise CapacityError(f"the collection has had {EPOCHS_MAX} keys", "Make a new collection and add its blocks there")
        charter = replace(charter, epoch=charter.epoch + 1, key_hash=key_hash)
    return _next(charter, writers.values(), members, issued_ms)


def write_until(charter: Charter, key: bytes) -> int | None:
    """Up to which time blocks of this author count here, in milliseconds; None: none do."""
    if charter.mode == PUBLIC or key == charter.owner:
        return TIME_MAX_MS
    for writer in charter.writers:
        if writer.key == key:
            return writer.until_ms or TIME_MAX_MS
    return None


def may_write(charter: Charter, key: bytes, created_ms: int) -> bool:
    until_ms = write_until(charter, key)
    return until_ms is not None and created_ms <= until_ms


def may_read(charter: Charter, key: bytes) -> bool:
    """Whether to hand blocks of the collection to this peer. Sealed ones it could not open anyway."""
    return charter.mode != PRIVATE or key in charter.readers()


def may_replace(charter: Charter, child: Version, parent: Version) -> bool:
    """One's own versions always; of others only among the writers that the charter names, as far as their blocks count."""
    if child.author == parent.author:
        return True
    return charter.mode in (WRITERS, PRIVATE) and all(
        may_write(charter, version.author, version.created_ms) for version in (child, parent)
    )


def replace_rule(charter: Charter) -> Rule:
    """`may_replace` of this charter, for many versions."""
    if charter.mode == PUBLIC:
        return same_author
    until = {writer.key: writer.until_ms or TIME_MAX_MS for writer in charter.writers} | {charter.owner: TIME_MAX_MS}

    def rule(child: Version, parent: Version) -> bool:
        return child.author == parent.author or (
            child.created_ms <= until.get(child.author, -1) and parent.created_ms <= until.get(parent.author, -1)
        )

    return rule


def may_remove(tombstone: Version, parent: Version) -> bool:
    """The author alone."""
    return same_author(tombstone, parent)


def check_name(name: str) -> str:
    """A name as a user typed it. Raises UsageError."""
    if not is_name(name):
        raise UsageError(
            f"{name[:80]!r} is no name of a collection",
            f"1 to {NAME_CHARS_MAX} printable characters, no / or @, no space at either end, accents composed (NFC)",
        )
    return name


def is_name(name: str) -> bool:
    return (
        1 <= len(name) <= NAME_CHARS_MAX
        and name.isprintable()
        and name == name.strip()
        and not set("/@") & set(name)
        and unicodedata.is_normalized("NFC", name)
    )


def split_reference(reference: str) -> tuple[str, str]:
    """`NAME` or `NAME@PEER` as the name and the peer id, or a start of one, or nothing. Raises UsageError."""
    name, at, peer = reference.partition("@")
    if at and (not peer or not peer.isascii() or not peer.isalnum()):
        raise UsageError(f"{reference[:160]!r} names no owner after the @", "Write NAME, or NAME@ and the peer id of its owner")
    return check_name(name), peer


def _next(charter: Charter, writers: Collection[Writer], members: Collection[bytes], issued_ms: int) -> Charter:
    _check_room(writers, members)
    if charter.revision == REVISION_MAX:
        raise CapacityError("the charter cannot be changed any more", "Make a new collection")
    return replace(
        charter,
        revision=charter.revision + 1,
        issued_ms=max(issued_ms, charter.issued_ms),
        writers=tuple(sorted(writers, key=lambda writer: writer.key)),
        members=tuple(sorted(members)),
    )


def _check_room(writers: Collection[object], members: Collection[object]) -> None:
    if len(writers) > WRITERS_MAX or len(members) > MEMBERS_MAX:
        raise CapacityError(
            f"a charter names at most {WRITERS_MAX} writers, past ones included, and {MEMBERS_MAX} members",
            "Take some out, past writers with all that they wrote; or make a second collection",
        )


def _check(charter: Charter) -> None:
    """What the fields' own bounds do not say. Raises MalformedError."""
    if not is_name(charter.name):
        raise MalformedError("the name of a collection is not one that it may have")
    keys = [writer.key for writer in charter.writers]
    for listed in (keys, charter.members):
        if any(low >= high for low, high in pairwise(listed)) or charter.owner in listed:
            raise MalformedError("a charter lists writers and members sorted, each once, without the owner")
    if set(charter.members) & {writer.key for writer in charter.writers if not writer.until_ms}:
        raise MalformedError("a charter names a writer as a member too")
    if (keys and charter.mode == PUBLIC) or (charter.members and charter.mode != PRIVATE):
        raise MalformedError(f"the charter of a {MODE_NAMES[charter.mode]} collection lists who needs no leave")
    if (charter.mode == PRIVATE) != bool(charter.epoch) or bool(charter.epoch) != bool(charter.key_hash):
        raise MalformedError("a private collection has a key, and no other has one")
    if bool(charter.model) != bool(charter.fingerprint) or not charter.model.isprintable():
        raise MalformedError("a charter names a model and its fingerprint, or neither")
    try:
        check_step(charter.sky_step or STEP_MIN)
    except UsageError as error:
        raise MalformedError(error.cause) from error
