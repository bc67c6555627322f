"""When a block was made, as far as others' signatures say: not before what it names, not after what names it.

A block's own time is a claim, and its sky agrees with any time that its author cares to compute it for. What bounds it from below
is that it names things whose hashes nobody knew before they were there: blocks by others, and attestations of witnesses. What
bounds it from above is that witnesses attest to have it: each signs, once per interval, one Merkle root over the ids of all blocks
that it has verified since the last time. A bound is as good as those who signed for it: keys cost nothing, so unless one lists the
witnesses that one trusts, an author can be all of them. `docs/memory.md` says it in full.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import NamedTuple

from nexus.core.errors import VerificationError
from nexus.core.hashing import HASH_BYTES, MerkleTree, leaf_hash, merkle_range_root, tagged_hash
from nexus.core.keys import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, Identity, verify_digest
from nexus.core.record import Record, digest, nested, optional_digest, raw, uint
from nexus.memory.block import TIME_MAX_MS, TIME_MIN_MS, Block, split_ids
from nexus.memory.validate import AHEAD_MAX_MS

SPEC = 1
ATTESTED_MAX = 1 << 20
RECEIPT_BYTES_MAX = 2048
_PATH_HASHES_MAX = 20
_TAG = "attestation"


@dataclass(frozen=True, slots=True)
class Attestation(Record):
    """A witness has these blocks at `at_ms`, by its clock, all verified. `root`: over their ids, `size` of them. `previous`: id of
    its attestation before, empty in the first: one that it dates back later is missing in the chain that it showed to others."""

    spec: int = uint(SPEC, least=SPEC)
    witness: bytes = raw(PUBLIC_KEY_BYTES)
    at_ms: int = uint(TIME_MAX_MS, least=TIME_MIN_MS)
    size: int = uint(ATTESTED_MAX, least=1)
    root: bytes = digest()
    previous: bytes = optional_digest()

    @property
    def id(self) -> bytes:
        """What blocks name in `after`."""
        return tagged_hash(_TAG, self.to_bytes())


@dataclass(frozen=True, slots=True)
class SignedAttestation(Record):
    attestation: Attestation = nested(Attestation)
    signature: bytes = raw(SIGNATURE_BYTES)

    @classmethod
    def sign(cls, witness: Identity, ids: Sequence[bytes], at_ms: int, previous: Attestation | None) -> SignedAttestation:
        """`ids`: of blocks, 1 to ATTESTED_MAX; `at_ms`: now. Signed for a later time than `previous` whatever the clock says."""
        if not 1 <= len(ids) <= ATTESTED_MAX:
            raise ValueError(f"a witness attests 1 to {ATTESTED_MAX} blocks at once, not {len(ids)}")
        when_ms = at_ms if previous is None else max(at_ms, previous.at_ms + 1)
        before = b"" if previous is None else previous.id
        attestation = Attestation(SPEC, witness.public_key, when_ms, len(ids), _tree(ids).root, before)
        return cls(attestation, witness.sign_digest(attestation.id))

    def verify(self, now_ms: int) -> Attestation:
        """The attestation, if its witness signed it and it is not from the future. Raises VerificationError."""
        verify_digest(self.attestation.witness, _TAG, self.attestation.id, self.signature)
        if self.attestation.at_ms > now_ms + AHEAD_MAX_MS:
            raise VerificationError("the attestation is from the future", "Set the clocks of both machines, then it holds again")
        return self.attestation


@dataclass(frozen=True, slots=True)
class Receipt(Record):
    """What shows that an attestation is about a block. `place`: of its id among the leaves; `path`: hashes one after another, those
    of the range proof of one leaf (`nexus.core.hashing`)."""

    signed: SignedAttestation = nested(SignedAttestation)
    place: int = uint(ATTESTED_MAX - 1)
    path: bytes = raw(most=_PATH_HASHES_MAX * HASH_BYTES)

    def verify(self, block_id: bytes, now_ms: int) -> Attestation:
        """The attestation, if it is good and about this block. Raises VerificationError."""
        attestation = self.signed.attestation
        if len(self.path) % HASH_BYTES:
            raise VerificationError("the path of a receipt is not made of hashes")
        path = [self.path[at : at + HASH_BYTES] for at in range(0, len(self.path), HASH_BYTES)]
        if merkle_range_root(attestation.size, self.place, [leaf_hash(block_id)], path) != attestation.root:
            raise VerificationError("the receipt is not for this block")
        return self.signed.verify(now_ms)


def receipts(signed: SignedAttestation, ids: Sequence[bytes]) -> list[Receipt]:
    """The receipts of all blocks that an attestation is about. `ids`: as they were signed, in that order."""
    tree = _tree(ids)
    return [Receipt(signed, place, b"".join(tree.range_proof(place, place + 1))) for place in range(len(ids))]


def check_chain(attestations: Sequence[Attestation]) -> None:
    """That these are attestations of one witness, each signed right after the one before. Raises VerificationError."""
    for before, after in pairwise(attestations):
        if after.witness != before.witness or after.previous != before.id or after.at_ms <= before.at_ms:
            raise VerificationError("the attestations of the witness are not one chain")


class Grade(IntEnum):
    """How well a block's time is known, from worst to best.

    CONTRADICTED: not as its author says, or somebody else's clock is wrong. CLAIMED: its author says so. CONSISTENT: and gave the
    sky of that time and place, which needs a computer and proves no more. BOUNDED_BELOW: not before the bracket begins. BOUNDED:
    nor after it ends, say as many witnesses as were wanted. The two bounds do not need a sky. There is no better grade yet: nothing
    is anchored in records kept outside Nexus.
    """

    CONTRADICTED = 0
    CLAIMED = 1
    CONSISTENT = 2
    BOUNDED_BELOW = 3
    BOUNDED = 4

    @property
    def label(self) -> str:
        return self.name.lower().replace("_", " ")


class Anchor(NamedTuple):
    """A statement of time by somebody: a block's author and time, or an attestation's witness and time."""

    by: bytes
    at_ms: int


class Bracket(NamedTuple):
    """`not_before_ms`, `not_after_ms`: None where nothing says so. `witnesses`: how many that count attest to the block, also
    fewer than were wanted."""

    not_before_ms: int | None
    not_after_ms: int | None
    witnesses: int
    grade: Grade

    @property
    def label(self) -> str:
        return self.grade.label


def named_ids(block: Block) -> tuple[bytes, ...]:
    """The ids of all that the block was made after, each once: blocks, and attestations in `after`."""
    return tuple(dict.fromkeys(split_ids(block.after + block.parents + block.links)))


def bracket(
    block: Block,
    attestations: Iterable[Attestation],
    anchors: Callable[[bytes], Anchor | None],
    *,
    sky_agrees: bool,
    wanted: int,
    trusted: Collection[bytes] | None = None,
) -> Bracket:
    """What others say of a block's time. All that is handed in has been verified.

    `attestations`: out of receipts for this block. `anchors`: the block or attestation of an id, None if it is not here.
    `sky_agrees`: it has a sky, and that was checked. `wanted`: how many witnesses make an upper bound, at least 1. `trusted`: keys
    whose word alone counts, of witnesses and of authors; None: everybody's. The block's author never counts.

    From below: the latest time of what the block names. It holds if whoever stated that time did not date it ahead. From above: the
    time by which `wanted` witnesses had it. Where everybody counts, attestations from before nodes would have taken the block are
    left out: no witness that keeps the rules signs one, and strangers could cast doubt on any block with them.
    """
    if wanted < 1:
        raise ValueError("an upper bound takes at least one witness")

    def counts(key: bytes) -> bool:
        return key != block.author and (trusted is None or key in trusted)

    found = (anchors(identifier) for identifier in named_ids(block))
    below = [anchor.at_ms for anchor in found if anchor is not None and counts(anchor.by)]
    first: dict[bytes, int] = {}
    for attestation in attestations:
        witness, at_ms = attestation.witness, attestation.at_ms
        if counts(witness) and (trusted is not None or at_ms >= block.created_ms - AHEAD_MAX_MS):
            first[witness] = min(at_ms, first.get(witness, at_ms))
    above = sorted(first.values())
    not_before_ms = max(below, default=None)
    not_after_ms = above[wanted - 1] if len(above) >= wanted else None
    return Bracket(not_before_ms, not_after_ms, len(first), _grade(block.created_ms, not_before_ms, not_after_ms, sky_agrees))


def _grade(created_ms: int, not_before_ms: int | None, not_after_ms: int | None, sky_agrees: bool) -> Grade:
    too_early = not_before_ms is not None and created_ms < not_before_ms - AHEAD_MAX_MS
    too_late = not_after_ms is not None and created_ms > not_after_ms + AHEAD_MAX_MS
    if too_early or too_late:
        return Grade.CONTRADICTED
    if not_before_ms is not None:
        return Grade.BOUNDED_BELOW if not_after_ms is None else Grade.BOUNDED
    return Grade.CONSISTENT if sky_agrees else Grade.CLAIMED


def _tree(ids: Sequence[bytes]) -> MerkleTree:
    return MerkleTree([leaf_hash(identifier) for identifier in ids])
