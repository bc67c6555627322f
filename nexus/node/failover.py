"""One answer over as many sessions as it takes: what stands when nodes go away in the middle of it, and what is left to do.

A session that breaks off leaves the windows that every stage has signed for. They stand, with their receipts; the next session,
over other nodes, reads the prompt and the answer that they hold in one pass (`Terms.answered`) and goes on from there. What had
been shown beyond them is computed again, and must come out the same: nothing is shown twice, and nothing that was shown changes.

Where a node of a session that broke off is suspected of cheating, or convicted, nothing that it had a part in stands.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import trio

from nexus.core.errors import CapacityError, NexusError, TimedOutError, UnreachableError, VerificationError
from nexus.core.manifest import CAUSAL, EXACT, Manifest
from nexus.node.api import AuditView
from nexus.node.infer.coordinator import Ended
from nexus.node.infer.messages import PAYLOAD_MAX
from nexus.proof.bundle import PARTS_MAX
from nexus.proof.receipts import ANSWERED_MAX, MICRO, tokens_from_bytes
from nexus.swarm.membership import NodeRecord
from nexus.swarm.session import Result


@dataclass(frozen=True, slots=True)
class Job:
    """What one session is to do, whoever runs it. `inputs`: the prompt's token ids, or those of every text. `answered`: token ids
    of the answer so far, with which the prompt then ends."""

    name: str
    manifest: Manifest
    inputs: tuple[bytes, ...]
    steps_max: int
    stages: int | None
    temperature: int = 0
    top_k: int = 0
    top_p: int = MICRO
    min_p: int = 0
    repetition_penalty: int = MICRO
    seed: int = 0
    end_tokens: tuple[int, ...] = ()
    receipts: bool = True
    verify: str | None = None
    answered: bytes = b""


@dataclass(frozen=True, slots=True)
class Part:
    """A session that had a part in the answer, as far as it stands."""

    job: Job
    ended: Ended

    @property
    def steps(self) -> int:
        return len(self.ended.bundle.outputs)

    @property
    def session(self) -> bytes:
        return self.ended.bundle.terms.session

    @property
    def nodes(self) -> frozenset[bytes]:
        return frozenset(stage.node for stage in self.ended.bundle.plan.stages)


@dataclass(slots=True)
class PartAudit:
    """Of a part that is audited while the answer goes on."""

    view: AuditView | None = None
    over: trio.Event = field(default_factory=trio.Event)


class Course:
    """The way of one answer. `parts`: what stands of the sessions before the one that runs. `shown`: every result that was handed
    on, in order. `audits`: of the parts, by session. `answer`: its id, which is its first session's."""

    def __init__(self, job: Job, parts: Sequence[Part] = (), answer: bytes = b"") -> None:
        self._job = job
        self.answer = answer
        self.parts = list(parts)
        self.audits: dict[bytes, PartAudit] = {}
        self.shown: list[bytes] = [output for part in parts for output in part.ended.bundle.outputs]
        self._wanted = job.steps_max
        self._is_long = False  # too long for one pass over prompt and answer
        self._began = 0  # the step at which the running session began

    @property
    def steps(self) -> int:
        """Steps that stand: the running session's first one is the next. Without receipts nothing is signed for, so all that was
        shown stands."""
        if self._job.receipts or self._is_long:
            return sum(part.steps for part in self.parts)
        # The last token of all is computed again: there is no signed part that could stand for the end of the answer.
        shown = min(len(self.shown), self._wanted)
        return shown - 1 if shown and (shown == self._wanted or self._ends(self.shown[shown - 1])) else shown

    @property
    def is_whole(self) -> bool:
        """Whether what stands is all of the answer."""
        steps = self.steps
        return steps >= self._wanted or bool(steps and self._ends(self.shown[steps - 1]))

    def rest(self) -> Job:
        """What the next session is to do."""
        job, done = self._job, self.shown[: self.steps]
        left = self._wanted - len(done)
        if job.manifest.kind != CAUSAL:
            return replace(job, inputs=job.inputs[len(done) :], steps_max=left)
        answered = job.answered + b"".join(done)
        prompt = job.inputs[0] + b"".join(done)
        return replace(job, inputs=(prompt,), answered=answered, steps_max=left)

    def take(self, step: int, payload: bytes) -> Result | None:
        """A result of the running session, as the whole answer's; None where it was shown before. Raises VerificationError where
        something else was."""
        at = self._began + step
        if at == len(self.shown):
            self.shown.append(payload)
            return Result(at, payload)
        if payload != self.shown[at]:
            raise self._differs(at)
        return None

    def _differs(self, at: int) -> VerificationError:
        if self._job.manifest.profile == EXACT:
            return VerificationError(
                f"the nodes of this answer changed in the middle of it, and step {at} comes out another on the new ones",
                "One of them computed wrongly. Do not trust what was shown; run it again with --verify replica",
            )
        return VerificationError(
            f"the nodes of this answer changed in the middle, and step {at} comes out another, as may be in the float profile",
            "Run it again; in the exact profile every machine computes the same",
        )

    def begin(self) -> Job:
        """The next session begins."""
        self._began = self.steps
        return self.rest()

    def want(self, steps: int) -> None:
        """No more than so many steps of the answer are wanted."""
        self._wanted = min(self._wanted, steps)

    def keep(self, job: Job, ended: Ended | None) -> bool:
        """A session broke off, of which this stands. Whether the answer is further than when it began."""
        if ended is not None:
            self.parts.append(Part(job, ended))
        if not self._fits(self.rest()):
            self._is_long = True
            self.parts.clear()  # all of it is computed again, step by step
        return self.steps > self._began

    def forget(self, nodes: Collection[bytes]) -> None:
        """Nothing stands from the first part on that one of these nodes had a stage in."""
        first = next((number for number, part in enumerate(self.parts) if part.nodes & frozenset(nodes)), len(self.parts))
        del self.parts[first:]

    @property
    def may_repeat(self) -> bool:
        """Whether what was shown may be computed again: in the exact profile the same comes out, or it was wrong."""
        return self._job.manifest.profile == EXACT or not self.shown

    @property
    def is_full(self) -> bool:
        return len(self.parts) >= PARTS_MAX - 1

    def _fits(self, job: Job) -> bool:
        if job.manifest.kind != CAUSAL:
            return True
        tokens = len(job.inputs[0]) // 4
        return tokens * job.manifest.hidden_size * 4 <= PAYLOAD_MAX and len(job.answered) <= 4 * ANSWERED_MAX

    def _ends(self, payload: bytes) -> bool:
        return self._job.manifest.kind == CAUSAL and tokens_from_bytes(payload)[0] in self._job.end_tokens


class Absent:
    """The nodes that failed one request. Who fell silent is back once it has signed a new record."""

    def __init__(self) -> None:
        self._left: dict[bytes, int | None] = {}  # when the record was signed that it was planned by; None: gone for good
        self.because: NexusError | None = None

    def leave(self, nodes: Collection[bytes], records: Sequence[NodeRecord], error: NexusError) -> None:
        self.because = error
        may_return = isinstance(error, UnreachableError | TimedOutError | CapacityError)
        issued = {record.node: record.issued_ms for record in records}
        self._left |= {node: issued.get(node, 0) if may_return else None for node in nodes}

    def nodes(self, records: Sequence[NodeRecord]) -> frozenset[bytes]:
        """Those to plan without now."""
        issued = {record.node: record.issued_ms for record in records}
        return frozenset(node for node, since in self._left.items() if since is None or issued.get(node, 0) <= since)

    @property
    def may_return(self) -> bool:
        return any(since is not None for since in self._left.values())
