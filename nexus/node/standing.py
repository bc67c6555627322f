"""What this node thinks of the others, kept in evidence.db: who is convicted or suspended, and how its work went.

Everything here is in memory and answers at once; what changed is written by `save`. Convictions are written by whoever verified the
evidence, before they are noted here (`nexus.node.evidence`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection

from nexus.core.errors import CapacityError
from nexus.proof.evidence import FORK
from nexus.storage.evidence import TALLIES_MAX, EvidenceStore
from nexus.swarm.standing import (
    GOOD,
    Conviction,
    Fuse,
    SlashedSet,
    Standing,
    Suspension,
    SuspensionCase,
    Tally,
    check_suspension,
    standing_of,
)

LEDGER, EXACT_RECEIPTS = "ledger", "exact"


def profile_of(kind: str) -> str:
    """What a mass conviction by evidence of this kind would cast doubt on."""
    return LEDGER if kind == FORK else EXACT_RECEIPTS


class Standings:
    """`probation_runs`: audited executions until a new node is trusted. `now_ms`: Unix time."""

    def __init__(self, store: EvidenceStore, fuse: Fuse, probation_runs: int, now_ms: Callable[[], int]) -> None:
        self._store = store
        self._fuse = fuse
        self._probation_runs = probation_runs
        self._now_ms = now_ms
        self.slashed = SlashedSet()
        self._convictions: dict[bytes, Conviction] = {}
        self._resumed_ms = store.resumed_ms
        self._held: frozenset[bytes] | None = None  # worked out when it is asked for
        self._suspensions: dict[bytes, Suspension] = store.suspensions(now_ms())
        self._tallies: OrderedDict[bytes, Tally] = OrderedDict(store.tallies())
        self._unsaved: dict[bytes, None] = {}

    def convict(self, offender: bytes, evidence_id: bytes, kind: str, known_ms: int) -> bool:
        """Note evidence that was verified here; whether its offender was not convicted before. Raises CapacityError."""
        fresh = offender not in self.slashed
        self.slashed.add(offender, evidence_id)
        if fresh:
            self._convictions[offender] = Conviction(offender, profile_of(kind), known_ms)
            self._held = None
        return fresh

    def known_ms(self, offender: bytes) -> int:
        """When this node first knew of evidence against it, 0 if it knows of none."""
        return self._convictions[offender].known_ms if offender in self._convictions else 0

    @property
    def held(self) -> frozenset[bytes]:
        """Convicted nodes whose bonds the fuse keeps from burning."""
        if self._held is None:
            self._held = self._fuse.held(self._convictions.values(), self._resumed_ms)
        return self._held

    @property
    def burned(self) -> frozenset[bytes]:
        """Nodes whose bonds are gone."""
        return frozenset(self._convictions) - self.held

    def resume(self) -> int:
        """An operator has looked: burn what the fuse held. How many that are. Blocks for the disk. Raises LocalError."""
        held = len(self.held)
        # Beyond every conviction so far, also where a clock was ahead.
        now_ms = max([self._now_ms(), *(one.known_ms for one in self._convictions.values())])
        self._store.resume(now_ms)
        self._resumed_ms = now_ms
        self._held = None
        return held

    def of(self, node: bytes) -> Standing:
        """By public key."""
        return standing_of(
            self._tallies.get(node, Tally()),
            evidence_id=self.slashed.evidence_of(node),
            held=node in self.held,
            suspension=self._suspensions.get(node),
            probation_runs=self._probation_runs,
            now_ms=self._now_ms(),
        )

    def may_work(self, node: bytes) -> bool:
        """Whether a node gets any work: neither convicted nor suspended."""
        if node in self.slashed:
            return False
        return self.suspension_of(node) is None

    def is_slashed(self, node: bytes) -> bool:
        """Whether evidence against it is known here. It gets no work and is not talked to about work, burned or held."""
        return node in self.slashed

    def tally(self, node: bytes) -> Tally:
        return self._tallies.get(node, Tally())

    def note_audit(self, node: bytes, ok: bool) -> None:
        """An audit of one execution found it right, or wrong or unanswered."""
        self._note(node, self.tally(node).audited(ok))

    def note_run(self, node: bytes, *, mismatched: bool = False, slow: bool = False, flaky: bool = False) -> None:
        """A session with a stage of this node is over."""
        self._note(node, self.tally(node).ran(mismatched=mismatched, slow=slow, flaky=flaky))

    def _note(self, node: bytes, tally: Tally) -> None:
        self._tallies[node] = tally
        self._tallies.move_to_end(node)
        self._unsaved[node] = None
        while len(self._tallies) > TALLIES_MAX:
            gone, _ = self._tallies.popitem(last=False)
            self._unsaved.pop(gone, None)

    def suspension_of(self, node: bytes) -> Suspension | None:
        """The one that runs, if any."""
        suspension = self._suspensions.get(node)
        return suspension if suspension is not None and self._now_ms() < suspension.until_ms else None

    def counts(self, node: bytes) -> bool:
        """Whether its word as a witness counts here."""
        return self.of(node).state == GOOD

    def suspend(self, case: SuspensionCase, trusted: Collection[bytes] = ()) -> Suspension:
        """Take in what witnesses say, kept durably. Only the word of nodes in good standing here counts, and that of those
        `trusted` in any case. What suspends for one session is not prolonged by more words about it. Blocks for the disk.

        Raises VerificationError, MalformedError for a case that suspends nobody, CapacityError, LocalError.
        """
        participants = {stage.node for stage in case.plan.stages} | {case.terms.coordinator}
        standing = {node for node in participants if node in trusted or self.counts(node)}
        now_ms = self._now_ms()
        suspension = check_suspension(case, standing, now_ms)
        self._suspensions = {node: one for node, one in self._suspensions.items() if one.until_ms > now_ms}
        known = self._suspensions.get(suspension.node)
        if known is None and len(self._suspensions) >= TALLIES_MAX:
            raise CapacityError("too many nodes are suspended at once", "They are free again within the hour")
        if known is not None and known.session == suspension.session:
            return known
        if known is None or known.until_ms < suspension.until_ms:
            self._store.put_suspension(suspension, now_ms)
            self._suspensions[suspension.node] = suspension
        return suspension

    def save(self) -> None:
        """Write what changed in the tallies. Blocks for the disk. Raises LocalError, and then tries them again the next time."""
        now_ms = self._now_ms()
        for node in list(self._unsaved):
            self._store.put_tally(node, self.tally(node), now_ms)
            self._unsaved.pop(node, None)
