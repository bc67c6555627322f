"""Auditing what others computed: after a session, by the policy of `nexus.swarm.audit_policy`, on this node's own judgement alone.

A light audit asks a stage to open the cells that the challenge picks, and checks them with keys of this node's own. A replica
computes a session again, stage by stage from the first one on, and compares. Where anything differs, evidence is made of what
the stage itself showed, or else of the first wrong operation that the replica finds. It is verified as everybody else will
verify it, and handed on. What cannot be proven is reported as a mismatch, and nobody is accused.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import structlog
import trio

from nexus.core.audits import CONVICTED, LIGHT, MISMATCH, OFF, OK, OWN, REPLICA, UNANSWERED, UNAUDITED
from nexus.core.errors import (
    CapacityError,
    LocalError,
    MalformedError,
    NexusError,
    NotFoundError,
    PeerError,
    TimedOutError,
    VerificationError,
)
from nexus.core.hashing import tagged_hash
from nexus.core.keys import Identity, peer_id_of
from nexus.core.manifest import Manifest, stage_pieces
from nexus.network.transport import PeerAddress, Transport
from nexus.node.audit.reading import Answered, Unanswered, ask, checked, collected, receive
from nexus.node.environment import Environment
from nexus.node.models import Models, ProgressSink
from nexus.proof.audit import (
    CELLS,
    OPENING_BYTES_MAX,
    ROW,
    AuditReport,
    AuditRequest,
    Cell,
    ChallengeChain,
    Opening,
    SignedAuditAnswer,
    SignedAuditRequest,
    StageAudit,
    chain_of,
    challenge,
    pick_cells,
)
from nexus.proof.bundle import first_stage_inputs
from nexus.proof.receipts import SignedReceipt
from nexus.storage.audit_keys import AuditKeys
from nexus.storage.sessions import KeptSession
from nexus.swarm.audit_policy import AuditPolicy, StagePolicy, can_audit, stage_policy

if TYPE_CHECKING:
    from pathlib import Path

    from nexus.engine.exact.audit import Checked
    from nexus.engine.exact.stage import ExactStage
    from nexus.proof.audit_check import AuditedStage, AuditorKeys, Fault
    from nexus.proof.evidence import Evidence, Verdict

log = structlog.get_logger("nexus.audit")

T = TypeVar("T")

ROW_TIMEOUT_S = 20.0
LIGHT_AT_ONCE = 4
# Of the time of an audit, what one stage has to answer: "still at it" must not use up everybody's, and end in no verdict at all.
ANSWER_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Callbacks:
    """What an audit tells others in the node. `executions`: of a node, done well, as far as is known here. `evidence`: a proof
    that was verified here. `silence`: a node, by its public key, did not answer an audit of a session, and why. `witnesses`: has
    the other participants ask a stage that did not answer; what it answers to them."""

    executions: Callable[[bytes], int]
    evidence: Callable[[Evidence], Awaitable[None]]
    silence: Callable[[bytes, bytes, str], Awaitable[None]]
    witnesses: Callable[[Unanswered], Awaitable[Answered | None]]


@dataclass
class _Cost:
    """Time of this node's processor."""

    s: float = 0.0


@dataclass
class _Audit:
    """One audit under way. `results`: what is known, by stage. `faulty`: the opening in which a light audit found a fault."""

    kept: KeptSession
    manifest: Manifest
    subjects: list[AuditedStage]
    signed: list[list[SignedReceipt]]
    chain: ChallengeChain
    index: int
    policies: list[StagePolicy]
    sources: Sequence[PeerAddress]
    progress: ProgressSink
    results: dict[int, StageAudit] = field(default_factory=dict)
    faulty: dict[int, Opening] = field(default_factory=dict)
    costs: dict[int, _Cost] = field(default_factory=dict)

    @property
    def session(self) -> bytes:
        return self.kept.bundle.terms.session

    def cost(self, stage: int) -> _Cost:
        return self.costs.setdefault(stage, _Cost())

    def drawn(self, stage: int, index: int) -> bytes:
        return challenge(self.subjects[stage].receipts[-1].id, self.chain.reveal(index))

    def take_index(self) -> int:
        """The next element of the chain."""
        self.index += 1
        return self.index - 1

    def note(
        self, stage: int, mode: str, verdict: str, *, steps: int = 0, cells: int = 0, detail: str = "", evidence: bytes = b""
    ) -> None:
        self.results[stage] = StageAudit(
            stage=stage,
            node=self.subjects[stage].layers.node,
            mode=mode,
            verdict=verdict,
            steps=steps,
            cells=cells,
            cost_us=int(self.cost(stage).s * 1e6),
            evidence=evidence,
            detail=detail[:300],
        )


class Auditor:
    """The asking end."""

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        models: Models,
        keys: AuditKeys,
        policy: AuditPolicy,
        timeout_s: float,
        callbacks: Callbacks,
        environment: Environment,
    ) -> None:
        self._transport = transport
        self._identity = identity
        self._models = models
        self._keys = keys
        self.policy = policy
        self._timeout_s = timeout_s
        self._callbacks = callbacks
        self._environment = environment
        # A replica takes memory and all cores: one at a time.
        self._replicas = trio.Lock()

    async def audit(
        self, kept: KeptSession, asked: str | None, sources: Sequence[PeerAddress], progress: ProgressSink
    ) -> AuditReport:
        """Audit a session that is over. `asked`: light, replica or off; None: as the policy says, also dual, whose second run
        is not this function's. `sources`: who may have the model's weights, and where the stages are.

        Never raises for what a stage does: that is in the report. Raises LocalError where this node cannot audit, UsageError where
        the session's challenges are used up.
        """
        audit = await self._begin(kept, asked, sources, progress)
        with trio.move_on_after(self._timeout_s) as scope:
            await self._light_all(audit)
            await self._replicate(audit)
        for number, policy in enumerate(audit.policies):
            if number in audit.results:
                continue
            if audit.subjects[number].layers.node == self._identity.public_key:
                audit.note(number, OFF, OWN, detail=policy.reason)
                continue
            late = f"it took longer than {self._timeout_s:.0f} s" if scope.cancelled_caught else policy.reason
            audit.note(number, policy.mode, UNAUDITED, detail=late)
        stages = tuple(audit.results[number] for number in range(len(audit.subjects)))
        return AuditReport(1, audit.session, self._environment.now_ms(), audit.index, stages)

    async def _begin(self, kept: KeptSession, asked: str | None, sources: Sequence[PeerAddress], progress: ProgressSink) -> _Audit:
        bundle = kept.bundle
        if not can_audit(bundle.plan.profile, REPLICA) or not bundle.terms.challenge or not kept.traces:
            raise NotFoundError("nothing of that session can be audited", "Use a model of the exact profile, with receipts")
        manifest = bundle.manifest
        await self._models.files(manifest, sources, progress)
        subjects, signed = await trio.to_thread.run_sync(_subjects_of, kept, self._models.paths(manifest))
        chain = chain_of(self._identity, bundle.terms.nonce)
        audit = _Audit(kept, manifest, subjects, signed, chain, next_index(kept), [], sources, progress)
        first = audit.take_index()
        for number, stage in enumerate(bundle.plan.stages):
            is_own = stage.node == self._identity.public_key
            executions = self._callbacks.executions(stage.node)
            audit.policies.append(stage_policy(self.policy, asked, audit.drawn(number, first), executions, is_own=is_own))
        return audit

    async def _timed(self, cost: _Cost, work: Callable[[], T]) -> T:
        """In a thread, its time counted."""

        perf_counter = self._environment.perf_counter

        def timed() -> tuple[T, float]:
            began_s = perf_counter()
            return work(), perf_counter() - began_s

        done, took_s = await trio.to_thread.run_sync(timed)
        cost.s += took_s
        return done

    # ---- light

    async def _light_all(self, audit: _Audit) -> None:
        limiter = trio.CapacityLimiter(LIGHT_AT_ONCE)

        async def one(stage: int) -> None:
            async with limiter:
                await self._light(audit, stage)

        async with trio.open_nursery() as nursery:
            for stage, policy in enumerate(audit.policies):
                if policy.mode == LIGHT:
                    nursery.start_soon(one, stage)

    async def _light(self, audit: _Audit, stage: int) -> None:
        """Leaves no result where only a replica can tell what happened."""
        subject = audit.subjects[stage]
        try:
            first = audit.index - 1
            cells = pick_cells(
                audit.drawn(stage, first),
                subject.rows,
                subject.shape.layers,
                subject.exact.kv_heads,
                subject.is_last,
                self.policy.cells,
            )
            if max(map(subject.shown_bytes, cells)) > OPENING_BYTES_MAX:
                audit.note(
                    stage, LIGHT, UNAUDITED, detail="the session is too long for a light audit: `nexus audit run --mode replica`"
                )
                return
            answered = await self._answered(audit, stage, self._request(audit, stage, first, CELLS, self.policy.cells), cells)
            if answered is None:
                return
            answer, openings = answered.answer, answered.openings
            fault = await self._find_fault(audit, stage, cells, openings)
        except (LocalError, NotFoundError) as error:
            audit.note(stage, LIGHT, UNAUDITED, detail=error.cause)
            return
        if fault is None:
            audit.note(stage, LIGHT, OK, cells=len(cells))
            return
        log.warning("audit_fault", node=peer_id_of(subject.layers.node), session=audit.session.hex()[:16], fault=fault.text)
        audit.faulty[stage] = opening = next(opening for opening in openings if opening.cell == fault.cell)
        audit.note(stage, LIGHT, MISMATCH, cells=len(cells), detail=fault.text)
        found = await self._accusation_shown(audit, stage, fault, answer, opening)
        if found is not None:
            await self._convict(audit, stage, LIGHT, *found, cells=len(cells))

    async def _find_fault(self, audit: _Audit, stage: int, cells: Sequence[Cell], openings: Sequence[Opening]) -> Fault | None:
        from nexus.proof.audit_check import find_fault

        keys = await self._keys_for(audit, stage, cells)
        for opening in openings:
            fault = await self._timed(audit.cost(stage), partial(find_fault, audit.subjects[stage], keys, opening))
            if fault is not None:
                return fault
        return None

    async def _accusation_shown(
        self, audit: _Audit, stage: int, fault: Fault, answer: SignedAuditAnswer, opening: Opening
    ) -> tuple[Evidence, Verdict] | None:
        """Evidence from what the stage itself showed, for which it takes the weights of that layer and no more. None where
        that does not prove anything: then the replica tells."""
        from nexus.engine.exact.audit import accusation_shown
        from nexus.engine.exact.weight_rows import StoredWeights

        subject = audit.subjects[stage]
        try:
            async with AsyncExitStack() as stack:
                for name in subject.pieces([opening.cell]):
                    await stack.enter_async_context(self._models.borrowed(audit.manifest, name, audit.sources))
                paths = self._models.paths(audit.manifest)
                weights = StoredWeights(self._models.find)
                work = partial(accusation_shown, subject, audit.signed[stage], fault, answer, opening, weights, paths)
                return await self._timed(audit.cost(stage), work)
        except NexusError as error:
            log.info("not_proven_by_what_is_shown", node=peer_id_of(subject.layers.node), reason=error.cause)
            return None

    async def _keys_for(self, audit: _Audit, stage: int, cells: Sequence[Cell]) -> AuditorKeys:
        """Those kept, or made now from the pieces themselves, which need not stay here."""
        from nexus.engine.exact.audit import auditor_keys, read_piece_keys

        subject = audit.subjects[stage]
        pieces = {}
        for name, linears in subject.pieces(cells).items():
            root = audit.manifest.piece(name).root
            kept = await trio.to_thread.run_sync(self._keys.get, root)
            if kept is None or not {linear.name for linear in kept.linears}.issuperset(linears):
                async with self._models.borrowed(audit.manifest, name, audit.sources) as path:
                    await trio.to_thread.run_sync(self._models.blobs.verify, root)
                    seed = self._environment.rng.randbytes(32)
                    work = partial(read_piece_keys, path, subject.exact, name, linears, seed)
                    kept = await self._timed(audit.cost(stage), work)
                await trio.to_thread.run_sync(self._keys.put, root, kept)
            pieces[name] = kept
        return await trio.to_thread.run_sync(auditor_keys, subject.exact, self._models.paths(audit.manifest), pieces)

    async def _answered(self, audit: _Audit, stage: int, signed: SignedAuditRequest, cells: Sequence[Cell]) -> Answered | None:
        """What the stage shows, to this node or else to the other participants of the session. None where it shows nothing."""
        node, failure = audit.subjects[stage].layers.node, ""
        due_s = self._timeout_s * ANSWER_SHARE
        try:
            with trio.move_on_after(due_s):
                return await self._ask(audit, stage, signed, cells)
            # It gives signs of life, so others would wait for it as long; it may also be that it has much to do.
            failure = f"it works on it, and showed nothing within {due_s:.0f} s"
            log.warning("audit_unanswered", node=peer_id_of(node), session=audit.session.hex()[:16], reason=failure)
            audit.note(stage, LIGHT, UNANSWERED, detail=failure)
            await self._callbacks.silence(node, audit.session, failure)
            return None
        except (PeerError, TimedOutError, CapacityError) as error:
            log.warning("audit_unanswered", node=peer_id_of(node), session=audit.session.hex()[:16], reason=error.cause)
            failure = error.cause
        bundle = audit.kept.bundle
        answered = await self._callbacks.witnesses(Unanswered(bundle.terms, bundle.plan, signed, audit.signed[stage][-1], cells))
        if answered is None:
            audit.note(stage, LIGHT, UNANSWERED, detail=failure)
            await self._callbacks.silence(node, audit.session, failure)
        return answered

    def _request(
        self, audit: _Audit, stage: int, index: int, kind: str, count: int = 0, cells: Sequence[Cell] = ()
    ) -> SignedAuditRequest:
        request = AuditRequest(
            spec=1,
            coordinator=self._identity.public_key,
            session=audit.session,
            stage=stage,
            receipt=audit.subjects[stage].receipts[-1].id,
            index=index,
            reveal=audit.chain.reveal(index),
            kind=kind,
            count=count,
            cells=tuple(cells),
        )
        return SignedAuditRequest.sign(request, self._identity)

    async def _ask(self, audit: _Audit, stage: int, signed: SignedAuditRequest, cells: Sequence[Cell]) -> Answered:
        """The stage's own openings of these cells, and its signature for them. Raises PeerError, TimedOutError, CapacityError:
        it did not show them."""
        node = audit.subjects[stage].layers.node
        peer_id = peer_id_of(node)
        for source in audit.sources:
            if source.peer_id == peer_id:
                self._transport.learn(source)
        stream = await ask(self._transport, peer_id, signed)
        try:
            return await collected(checked(partial(receive, stream), signed.request, node, cells))
        finally:
            with trio.CancelScope(shield=True):
                await stream.reset()

    # ---- replica

    async def _replicate(self, audit: _Audit) -> None:
        wanted = {number for number, policy in enumerate(audit.policies) if policy.mode == REPLICA}
        wanted |= {number for number, result in audit.results.items() if result.verdict == MISMATCH}
        # Where a stage does not show its work, whoever has the weights can do without.
        wanted |= {
            number
            for number, result in audit.results.items()
            if result.verdict == UNANSWERED and self._holds(audit.manifest, audit.subjects[number].layers.end)
        }
        if not wanted:
            return
        async with self._replicas:
            try:
                await self._replicate_stages(audit, wanted)
            except NexusError as error:
                # The weights cannot be had, there is no memory, or this machine computes wrongly: nobody else's fault.
                log.warning("replica_failed", session=audit.session.hex()[:16], reason=error.cause)
                for stage in wanted:
                    if stage not in audit.results:
                        audit.note(stage, REPLICA, UNAUDITED, detail=error.cause)

    def _holds(self, manifest: Manifest, end: int) -> bool:
        return all(self._models.blobs.has(piece.root) for piece in stage_pieces(manifest, 0, end))

    async def _replicate_stages(self, audit: _Audit, wanted: set[int]) -> None:
        """From the first stage on, since the input of each is the output of the one before. Every stage on the way is checked."""
        from nexus.engine.exact.audit import compare
        from nexus.engine.exact.stage import ExactStage

        bundle = audit.kept.bundle
        inputs: Sequence[bytes] = first_stage_inputs(audit.manifest, bundle.inputs, bundle.outputs)
        for number in range(max(wanted) + 1):
            subject, layers, policy = audit.subjects[number], audit.subjects[number].layers, audit.policies[number]
            windows = range(len(subject.receipts)) if policy.thorough else [self._drawn_window(audit, number)]
            cache = tagged_hash("replica-cache", audit.session, number.to_bytes(4, "little"))
            self._models.reserve_kv(cache, audit.manifest.kv_bytes * (layers.end - layers.start) * subject.receipts[-1].kv_len)
            try:
                async with self._models.stage(
                    audit.manifest, layers.start, layers.end, bundle.plan.dtype, audit.sources, audit.progress
                ) as loaded:
                    if not isinstance(loaded, ExactStage):
                        raise LocalError("the stage is not one of the exact profile")
                    checked = await self._timed(audit.cost(number), partial(compare, loaded, subject, inputs, windows))
                    known = audit.results.get(number)
                    if known and known.verdict == CONVICTED:
                        if checked.differs:
                            self._give_up(audit, wanted, number)
                            return
                    elif checked.differs or (known and known.verdict == MISMATCH):
                        right = await self._blame(audit, number, inputs, checked, loaded)
                        if not right:
                            self._give_up(audit, wanted, number)
                            return
                    elif number in wanted:
                        audit.note(number, REPLICA, OK, steps=len(subject.rows))
            finally:
                self._models.reserve_kv(cache, 0)
            inputs = checked.replay.outputs

    def _drawn_window(self, audit: _Audit, stage: int) -> int:
        number = int.from_bytes(tagged_hash("audit-window", audit.drawn(stage, 0))[:8], "little")
        return number % len(audit.subjects[stage].receipts)

    def _give_up(self, audit: _Audit, wanted: set[int], wrong: int) -> None:
        """What came into the stages after a wrong one is known to them alone."""
        for stage in wanted:
            if stage > wrong and (stage not in audit.results or audit.results[stage].verdict == MISMATCH):
                audit.note(stage, REPLICA, UNAUDITED, detail=f"what stage {wrong} gave to it is not known")

    async def _blame(self, audit: _Audit, stage: int, inputs: Sequence[bytes], checked: Checked, loaded: ExactStage) -> bool:
        """Prove what is wrong, if it is. Returns whether the stage is right after all. A stage is accused only by a machine
        whose own known answers hold, with evidence that this machine verified."""
        from nexus.engine.exact.audit import accusation
        from nexus.engine.exact.weight_rows import StoredWeights

        subject, cost = audit.subjects[stage], audit.cost(stage)
        node, steps = subject.layers.node, len(subject.rows)
        await self._timed(cost, loaded.check)
        if node == self._identity.public_key:
            if not checked.differs:
                return True
            audit.note(stage, OFF, MISMATCH, detail="this node computed something else now than when it signed: check its memory")
            return False
        opened = await self._own_row(audit, stage, checked)
        weights = StoredWeights(self._models.find)
        paths = self._models.paths(audit.manifest)
        try:
            found = await self._timed(
                cost, partial(accusation, subject, audit.signed[stage], inputs, checked.replay, weights, paths, opened)
            )
        except (MalformedError, VerificationError, NotFoundError) as error:
            log.warning("accusation_failed", node=peer_id_of(node), session=audit.session.hex()[:16], reason=error.cause)
            detail = f"it gave something else, which cannot be proven: {error.cause}"
            audit.note(stage, REPLICA, MISMATCH, steps=steps, detail=detail)
            return False
        if found is None:
            return await self._acquit(audit, stage)
        evidence, verdict = found
        await self._convict(audit, stage, REPLICA, evidence, verdict)
        return False

    async def _acquit(self, audit: _Audit, stage: int) -> bool:
        """All that was signed for is right. Then it was the keys of this node that were not, or what the stage showed."""
        subject, steps = audit.subjects[stage], len(audit.subjects[stage].rows)
        shown = audit.faulty.get(stage)
        if shown is not None:
            for name in subject.pieces([shown.cell]):
                await trio.to_thread.run_sync(self._keys.drop, audit.manifest.piece(name).root)
            fault = await self._find_fault(audit, stage, [shown.cell], [shown])
            if fault is not None:
                detail = f"what it signed for is right, what it answered to the audit is not: {fault.text}"
                audit.note(stage, LIGHT, MISMATCH, steps=steps, detail=detail)
                return True
        audit.note(stage, REPLICA, OK, steps=steps)
        return True

    async def _convict(self, audit: _Audit, stage: int, mode: str, evidence: Evidence, verdict: Verdict, cells: int = 0) -> None:
        subject = audit.subjects[stage]
        if verdict.accused != subject.layers.node:
            raise RuntimeError("evidence was made against another node than the one that was audited")
        log.warning("convicted", node=peer_id_of(verdict.accused), evidence=evidence.id.hex()[:16], summary=verdict.summary)
        steps = 0 if cells else len(subject.rows)
        audit.note(stage, mode, CONVICTED, steps=steps, cells=cells, detail=verdict.summary, evidence=evidence.id)
        await self._callbacks.evidence(evidence)

    async def _own_row(self, audit: _Audit, stage: int, checked: Checked) -> Opening | None:
        """The accused's own values where the difference is: with them the proof is small. It may well not give them."""
        from nexus.engine.exact.audit import cell_of_difference

        cell = await self._timed(audit.cost(stage), partial(cell_of_difference, audit.subjects[stage], checked.replay))
        if cell is None:
            return None
        with trio.move_on_after(ROW_TIMEOUT_S):
            try:
                signed = self._request(audit, stage, audit.take_index(), ROW, cells=[cell])
                return (await self._ask(audit, stage, signed, [cell])).openings[0]
            except NexusError as error:
                log.info("accused_does_not_show", reason=error.cause)
        return None


def next_index(kept: KeptSession) -> int:
    """The first element of the session's chain that no audit has used."""
    return max((report.index for report in kept.audits), default=0)


def _subjects_of(kept: KeptSession, files: Mapping[str, Path]) -> tuple[list[AuditedStage], list[list[SignedReceipt]]]:
    from nexus.engine.exact.audit import read_exact_plan
    from nexus.proof.audit_check import AuditedStage

    bundle = kept.bundle
    exact = read_exact_plan(bundle.manifest, files)
    inputs = first_stage_inputs(bundle.manifest, bundle.inputs, bundle.outputs)
    rows = [len(payload) // 4 for payload in inputs]
    subjects, signed = [], []
    for stage, traces in enumerate(kept.traces):
        own = [one for one in bundle.receipts if one.receipt.stage == stage]
        signed.append(own)
        receipts = [one.receipt for one in own]
        subjects.append(
            AuditedStage(bundle.manifest, exact, bundle.plan, bundle.terms, stage, receipts, traces, inputs, bundle.outputs, rows)
        )
    return subjects, signed
