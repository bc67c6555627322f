"""Entries of the ledger: every account is a chain of entries that its owner signed, and nobody else can write into it.

    PAY    the coordinator of a session pays its stages and the network's vault
    EARN   a stage takes its share of one PAY entry of another account

An owner signs one entry per number. Two different ones of one number are a *fork*: they prove that the owner told two stories, and
that convicts it (evidence of kind FORK). What entries mean for balances is in `nexus.swarm.ledger`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nexus.core.errors import MalformedError, VerificationError
from nexus.core.hashing import tagged_hash
from nexus.core.keys import Identity, peer_id_of, verify_digest
from nexus.core.plan import STAGES_MAX
from nexus.core.record import Record, digest, many, nested, optional_digest, raw, text, uint

PAY, EARN = "PAY", "EARN"
KINDS = (PAY, EARN)
# Amounts are whole micro-credits. The bound keeps every number exact in JSON.
MICRO_CREDITS = 1_000_000
AMOUNT_MAX = 2**53 - 1
SEQ_MAX = 2**32
# Of what a session costs, to the stages; the rest, and what rounding leaves over, to the vault.
STAGES_PERCENT = 90
ENTRY_TAG = "ledger-entry"
FORK_BYTES_MAX = 64 * 1024


@dataclass(frozen=True, slots=True)
class Share(Record):
    """What a PAY entry gives to one account, in micro-credits."""

    account: bytes = raw(32)
    amount: int = uint(AMOUNT_MAX, least=1)


@dataclass(frozen=True, slots=True)
class Entry(Record):
    """Entry number `seq` of the account whose key is `account`, counted from 0. `prev`: the id of the entry before.

    `session`: what is paid for. `amount`: micro-credits that leave the account (PAY) or come to it (EARN). `shares`: of PAY, to
    whom; what they leave of the amount goes to the vault. `payment`: of EARN, the id of the PAY entry that gives it.
    """

    spec: int = uint(1, least=1)
    account: bytes = raw(32)
    seq: int = uint(SEQ_MAX)
    prev: bytes = optional_digest()
    kind: str = text(8)
    session: bytes = digest()
    amount: int = uint(AMOUNT_MAX, least=1)
    shares: tuple[Share, ...] = many(nested(Share), STAGES_MAX)
    payment: bytes = optional_digest()

    @property
    def id(self) -> bytes:
        """Leaves the signature out: one statement has one id."""
        return tagged_hash(ENTRY_TAG, self.to_bytes())

    @property
    def vault(self) -> int:
        """What a PAY entry gives to the network's vault."""
        return self.amount - sum(share.amount for share in self.shares) if self.kind == PAY else 0

    def share_of(self, account: bytes) -> int:
        """What a PAY entry gives to `account`; 0 if nothing."""
        return next((share.amount for share in self.shares if share.account == account), 0)

    def check(self) -> Entry:
        """This entry, if it is in itself one that an account may hold. Raises MalformedError."""
        if self.kind not in KINDS:
            raise MalformedError(f"a ledger entry of the unknown kind {self.kind!r}")
        if bool(self.prev) != bool(self.seq):
            raise MalformedError("the first entry of an account names none before it, every other one does")
        if self.kind == EARN:
            if self.shares or not self.payment:
                raise MalformedError("an EARN entry names one payment and shares nothing out")
            return self
        if self.payment or not self.shares:
            raise MalformedError("a PAY entry shares something out and names no payment")
        accounts = {share.account for share in self.shares}
        if len(accounts) != len(self.shares) or self.account in accounts:
            raise MalformedError("a PAY entry pays an account twice, or its own")
        check_split(self.amount, [share.amount for share in self.shares])
        return self


def check_split(amount: int, shares: Sequence[int]) -> None:
    """That the shares are 90 % of the amount, each rounded down. Raises MalformedError."""
    given, most = sum(shares) * 100, amount * STAGES_PERCENT
    if not most - 100 * len(shares) < given <= most:
        raise MalformedError(f"shares of {sum(shares)} are not {STAGES_PERCENT} % of {amount} micro-credits")


@dataclass(frozen=True, slots=True)
class SignedEntry(Record):
    entry: Entry = nested(Entry)
    signature: bytes = raw(64)

    @classmethod
    def sign(cls, entry: Entry, owner: Identity) -> SignedEntry:
        return cls(entry, owner.sign_digest(entry.id))

    def verify(self) -> Entry:
        """The entry, if its owner signed it and it is well formed. Raises VerificationError, MalformedError."""
        verify_digest(self.entry.account, "ledger entry", self.entry.id, self.signature)
        return self.entry.check()


@dataclass(frozen=True, slots=True)
class Fork(Record):
    """Two entries that one owner signed for one number of its account: the body of evidence of kind FORK. The one with the lesser
    id comes first, so that the same two make the same evidence wherever they are found."""

    one: SignedEntry = nested(SignedEntry)
    other: SignedEntry = nested(SignedEntry)

    @classmethod
    def of(cls, one: SignedEntry, other: SignedEntry) -> Fork:
        first, second = sorted((one, other), key=lambda signed: signed.entry.id)
        return cls(first, second)

    def check(self) -> bytes:
        """The account that is forked. Raises VerificationError for what convicts nobody.

        Only signatures, owner, number and the difference count: an owner that signs nonsense twice has told two stories as well.
        """
        one, other = self.one.entry, self.other.entry
        if one.account != other.account or one.seq != other.seq:
            raise VerificationError("the two entries are not of one account and one number")
        if one.id == other.id:
            raise VerificationError("the two entries are one and the same: nobody told two stories")
        if one.id > other.id:
            raise MalformedError("the entry with the lesser id comes first")
        for signed in (self.one, self.other):
            verify_digest(signed.entry.account, "ledger entry", signed.entry.id, signed.signature)
        return one.account

    @property
    def summary(self) -> str:
        """What it says, in words."""
        one, other = self.one.entry, self.other.entry
        return (
            f"{peer_id_of(one.account)} signed two different entries number {one.seq} of its account: "
            f"{_in_words(one)}, and {_in_words(other)}"
        )


def is_fork(one: SignedEntry, other: SignedEntry) -> bool:
    """Whether two entries with good signatures contradict each other."""
    return one.entry.account == other.entry.account and one.entry.seq == other.entry.seq and one.entry.id != other.entry.id


def _in_words(entry: Entry) -> str:
    return f"{entry.kind!r} of {entry.amount} micro-credits for session {entry.session.hex()[:16]}"
