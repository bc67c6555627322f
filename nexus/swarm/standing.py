"""What a node thinks of another one. Five states, each with its own word and its own cause:

    good         nothing speaks against it
    probation    too new to be trusted with little checking: every execution of it is audited
    demoted      statistics speak against it: it is planned with last (nodes count sessions that broke off; nothing measures yet
                 which were slow, or gave other float results)
    suspended    a quorum of witnesses says that it fell silent, or the fuse holds its conviction back: no work for a time
    slashed      one valid evidence: no work any more, and its bond is gone

Only evidence slashes. Evidence makes up a set that grows and never shrinks, a map from the offender to the evidence with the least
id of those known: merging two of them is commutative, associative and idempotent, so every order of arrival ends in the same set.
Times are Unix milliseconds and end in `_ms`.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from nexus.core.errors import CapacityError, MalformedError, VerificationError
from nexus.core.hashing import tagged_hash
from nexus.core.keys import Identity, peer_id_of, verify_signature
from nexus.core.plan import STAGES_MAX, Plan
from nexus.core.record import Record, digest, many, nested, raw, text, uint
from nexus.proof.receipts import Terms

GOOD, PROBATION, DEMOTED, SUSPENDED, SLASHED = "good", "probation", "demoted", "suspended", "slashed"
# From best to worst: of several that apply, the last one counts.
STATES = (GOOD, PROBATION, DEMOTED, SUSPENDED, SLASHED)

# An offender costs 64 bytes here and one evidence on disk. Whoever would fill this up has to make that many keys and convict each.
SLASHED_MAX = 65_536
SUSPENSION_MS = 60 * 60 * 1000
# Witnesses of one event speak within this time of each other.
WITNESS_SPREAD_MS = 10 * 60 * 1000
WITNESS_CLOCK_SKEW_MS = 5 * 60 * 1000
# n >= 3f + 1 with f >= 1: fewer witnesses cannot outvote a single liar, so they suspend nobody.
WITNESSES_MIN = 4
# A rate of failures is believed above this, at 95 % confidence, from this many runs on. Old runs fade.
DEMOTE_RATE = 0.2
DEMOTE_RUNS_MIN = 8
TALLY_MAX = 256
_Z95 = 1.959963984540054


def room_of_strangers(most: int) -> int:
    """What evidence against nodes that nobody here has met may take of a bound: anyone convicts keys of their own for nothing."""
    return most - most // 8


class SlashedSet:
    """Offender -> the least id of the evidence known against it. Grows only. Bounded: raises CapacityError when it is full."""

    def __init__(self, most: int = SLASHED_MAX) -> None:
        self._most = most
        self._least: dict[bytes, bytes] = {}
        self._sorted: list[bytes] = []  # its keys: a list is asked for more often than it changes, and by anyone

    def add(self, offender: bytes, evidence_id: bytes) -> bool:
        """Note a verified evidence; whether that changed the set. Raises CapacityError."""
        known = self._least.get(offender)
        if known is None and len(self._least) >= self._most:
            raise CapacityError(
                f"{self._most} nodes are convicted, as many as this node keeps count of",
                "Somebody may be convicting keys of their own by the thousand; please report it",
            )
        if known is not None and known <= evidence_id:
            return False
        if known is None:
            insort(self._sorted, offender)
        self._least[offender] = evidence_id
        return True

    def merge(self, other: SlashedSet) -> None:
        """Take in everything that `other` has. Raises CapacityError."""
        for offender, evidence_id in other.entries():
            self.add(offender, evidence_id)

    def wants(self, offender: bytes, evidence_id: bytes) -> bool:
        """Whether this evidence would change the set."""
        known = self._least.get(offender)
        return known is None or evidence_id < known

    def evidence_of(self, offender: bytes) -> bytes | None:
        return self._least.get(offender)

    def entries(self) -> Iterator[tuple[bytes, bytes]]:
        """(offender, evidence id), sorted by offender."""
        return iter(sorted(self._least.items()))

    def page(self, after: bytes, limit: int) -> tuple[list[tuple[bytes, bytes]], bool]:
        """Up to `limit` entries whose offender comes after `after`, and whether there are more."""
        start = bisect_right(self._sorted, after) if after else 0
        chosen = self._sorted[start : start + limit]
        return [(offender, self._least[offender]) for offender in chosen], start + limit < len(self._sorted)

    def __contains__(self, offender: object) -> bool:
        return offender in self._least

    def __len__(self) -> int:
        return len(self._least)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SlashedSet) and self._least == other._least

    __hash__ = None  # type: ignore[assignment]


# --- the fuse ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Conviction:
    """That this node came to know of an evidence. `profile`: what it is about: the profile of the receipts, or "ledger"."""

    offender: bytes
    profile: str
    known_ms: int


@dataclass(frozen=True, slots=True)
class Fuse:
    """More than `bonds_max` offenders of one profile within `window_ms` look like a bug of ours rather than like so many cheaters:
    burning pauses for that profile, from the first of them on, until an operator has looked and resumes it (`resumed_ms`).

    What it holds follows from the convictions alone, in whatever order they are handed in.
    """

    bonds_max: int
    window_ms: int

    def held(self, convictions: Iterable[Conviction], resumed_ms: int = 0) -> frozenset[bytes]:
        """The offenders whose bonds are not burned: suspended until an operator looks. Only what came to be known after
        `resumed_ms` counts."""
        by_profile: dict[str, list[Conviction]] = {}
        for conviction in convictions:
            if conviction.known_ms > resumed_ms:
                by_profile.setdefault(conviction.profile, []).append(conviction)
        held: set[bytes] = set()
        for found in by_profile.values():
            blown_ms = self._blown_ms(found)
            if blown_ms is not None:
                held.update(one.offender for one in found if one.known_ms >= blown_ms)
        return frozenset(held)

    def _blown_ms(self, convictions: Sequence[Conviction]) -> int | None:
        """When the first window began that holds too many, or None."""
        first: dict[bytes, int] = {}
        for one in convictions:
            first[one.offender] = min(one.known_ms, first.get(one.offender, one.known_ms))
        times = sorted(first.values())
        for start_ms, end_ms in zip(times, times[self.bonds_max :], strict=False):
            if end_ms - start_ms <= self.window_ms:
                return start_ms
        return None


# --- suspension --------------------------------------------------------------------------------------------------------------

SILENT, UNANSWERED = "silent", "unanswered"
# In session: gave no sign of life. After it: did not answer the audit that the session's terms call for.
SUSPENSION_CAUSES = (SILENT, UNANSWERED)


@dataclass(frozen=True, slots=True)
class Statement(Record):
    """A participant of a session says that another one failed it. `issued_ms`: Unix time."""

    spec: int = uint(1, least=1)
    witness: bytes = raw(32)
    accused: bytes = raw(32)
    session: bytes = digest()
    cause: str = text(16)
    issued_ms: int = uint(2**53)


@dataclass(frozen=True, slots=True)
class SignedStatement(Record):
    statement: Statement = nested(Statement)
    signature: bytes = raw(64)

    @classmethod
    def sign(cls, statement: Statement, witness: Identity) -> SignedStatement:
        return cls(statement, witness.sign("witness-statement", statement.to_bytes()))

    def verify(self) -> Statement:
        verify_signature(self.statement.witness, "witness-statement", self.statement.to_bytes(), self.signature)
        return self.statement


@dataclass(frozen=True, slots=True)
class SuspensionCase(Record):
    """What suspends a stage: the session with its plan, and what its participants say. Terms and plan bind each other and make up
    the session id, so nobody can be called a witness who had no part in it."""

    spec: int = uint(1, least=1)
    terms: Terms = nested(Terms)
    plan: Plan = nested(Plan)
    statements: tuple[SignedStatement, ...] = many(nested(SignedStatement), STAGES_MAX + 1)

    @property
    def id(self) -> bytes:
        return tagged_hash("suspension", self.to_bytes())


@dataclass(frozen=True, slots=True)
class Suspension:
    """`since_ms`: when the quorum was complete. The pay of `session` is forfeited; the bond is locked until `until_ms`."""

    node: bytes
    session: bytes
    cause: str
    since_ms: int
    until_ms: int


def quorum_of(witnesses: int) -> int:
    """How many of n = 3f + 1 or more witnesses must agree: n - f, so that two quorums share an honest one. Raises
    VerificationError where they are too few to outvote even one liar."""
    if witnesses < WITNESSES_MIN:
        raise VerificationError(f"{witnesses} witnesses with standing suspend nobody, at least {WITNESSES_MIN} are needed")
    return witnesses - (witnesses - 1) // 3


def check_suspension(case: SuspensionCase, standing: Collection[bytes], now_ms: int) -> Suspension:
    """Whom a case suspends, and for how long. `standing`: the nodes whose word counts here: those in good standing.

    Raises VerificationError, MalformedError for one that suspends nobody; an expired one, too.
    """
    terms, plan, session = case.terms, case.plan, case.terms.session
    if terms.plan_root != plan.root:
        raise VerificationError("the terms are not about this plan")
    if not case.statements:
        raise VerificationError("nobody says anything")
    accused, cause = case.statements[0].statement.accused, case.statements[0].statement.cause
    nodes = {stage.node for stage in plan.stages}
    if accused not in nodes:
        raise VerificationError(f"{peer_id_of(accused)} has no stage in this session")
    if cause not in SUSPENSION_CAUSES:
        raise MalformedError(f"{cause!r} is no cause for a suspension")
    witnesses = {node for node in nodes | {terms.coordinator} if node != accused and node in standing}
    quorum = quorum_of(len(witnesses))
    said: dict[bytes, int] = {}
    for signed in case.statements:
        statement = signed.statement
        if (statement.accused, statement.cause, statement.session) != (accused, cause, session):
            raise VerificationError("the statements are not about the same event")
        if statement.witness not in witnesses:
            continue  # a word that does not count is no reason to refuse those that do
        signed.verify()
        if statement.issued_ms > now_ms + WITNESS_CLOCK_SKEW_MS:
            raise VerificationError("a statement is from the future")
        said[statement.witness] = min(statement.issued_ms, said.get(statement.witness, statement.issued_ms))
    if len(said) < quorum:
        raise VerificationError(f"{len(said)} of {len(witnesses)} witnesses agree, {quorum} have to")
    times = sorted(said.values())
    # The earliest quorum that spoke within the spread: later words must not prolong it.
    since_ms = next((end for start, end in zip(times, times[quorum - 1 :], strict=False) if end - start <= WITNESS_SPREAD_MS), None)
    if since_ms is None:
        raise VerificationError("the statements are not about the same time")
    if now_ms >= since_ms + SUSPENSION_MS:
        raise VerificationError("the suspension is over")
    return Suspension(accused, session, cause, since_ms, since_ms + SUSPENSION_MS)


# --- statistics --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tally:
    """What this node saw of another one's work. `audits_ok`, `audits_bad`: executions that an audit found right, or could not
    (wrong or unanswered). `runs`, `mismatched`, `slow`, `flaky`: sessions, and those of them where float results differed, that
    were much slower than planned, or broke off. Counts fade: at TALLY_MAX runs they are halved."""

    audits_ok: int = 0
    audits_bad: int = 0
    runs: int = 0
    mismatched: int = 0
    slow: int = 0
    flaky: int = 0

    @property
    def reputation(self) -> float:
        """The chance that the next audit finds it right, by Laplace's rule of succession: 0.5 for one never audited."""
        return (self.audits_ok + 1) / (self.audits_ok + self.audits_bad + 2)

    def audited(self, ok: bool) -> Tally:
        return replace(self, audits_ok=self.audits_ok + ok, audits_bad=self.audits_bad + (not ok))

    def ran(self, *, mismatched: bool = False, slow: bool = False, flaky: bool = False) -> Tally:
        after = replace(
            self,
            runs=self.runs + 1,
            mismatched=self.mismatched + mismatched,
            slow=self.slow + slow,
            flaky=self.flaky + flaky,
        )
        if after.runs < TALLY_MAX:
            return after
        return replace(after, runs=after.runs // 2, mismatched=after.mismatched // 2, slow=after.slow // 2, flaky=after.flaky // 2)

    @property
    def demoted_because(self) -> str:
        """Why statistics speak against it; "" if they do not."""
        for count, words in (
            (self.mismatched, "float results differed"),
            (self.flaky, "broke off"),
            (self.slow, "were much slower than planned"),
        ):
            if self.runs >= DEMOTE_RUNS_MIN and failure_rate_at_least(count, self.runs) > DEMOTE_RATE:
                return f"{count} of its last {self.runs} sessions here {words}"
        return ""


def failure_rate_at_least(failures: int, runs: int) -> float:
    """The lower bound of Wilson's score interval at 95 %: what the rate is at the least, given how little was seen."""
    if not runs:
        return 0.0
    rate, z2 = failures / runs, _Z95 * _Z95
    centre = rate + z2 / (2 * runs)
    margin = _Z95 * math.sqrt((rate * (1 - rate) + z2 / (4 * runs)) / runs)
    return max(0.0, (centre - margin) / (1 + z2 / runs))


# --- all of it ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Standing:
    """`state`: one of STATES. `cause`: why, in words. `until_ms`: when it ends by itself, 0 where it does not."""

    state: str
    cause: str = ""
    until_ms: int = 0

    @property
    def may_work(self) -> bool:
        """Whether it is planned with at all."""
        return self.state not in (SUSPENDED, SLASHED)


def standing_of(
    tally: Tally, *, evidence_id: bytes | None, held: bool, suspension: Suspension | None, probation_runs: int, now_ms: int
) -> Standing:
    """The worst state that applies. `evidence_id`: of the evidence against it, if there is one; `held`: whether the fuse holds it
    back; `probation_runs`: audited executions until a new node is trusted."""
    if evidence_id is not None and not held:
        return Standing(SLASHED, f"convicted by evidence {evidence_id.hex()[:16]}")
    if evidence_id is not None:
        return Standing(
            SUSPENDED, f"convicted by evidence {evidence_id.hex()[:16]}, but burning is paused until this node's operator looks"
        )
    if suspension is not None and now_ms < suspension.until_ms:
        said = "fell silent" if suspension.cause == SILENT else "did not answer an audit"
        return Standing(SUSPENDED, f"witnesses of session {suspension.session.hex()[:16]} say that it {said}", suspension.until_ms)
    if tally.demoted_because:
        return Standing(DEMOTED, tally.demoted_because)
    if tally.audits_ok < probation_runs:
        return Standing(PROBATION, f"{tally.audits_ok} of its first {probation_runs} executions are audited and right")
    return Standing(GOOD)
