"""A stage shows its work: for sessions that it served, to their coordinator, after the receipts, one at a time. Other participants
of a session may ask in the coordinator's place, with a request that it signed (`nexus.node.witness`).

Whatever can be refused is refused before any work is done for it, with a signed reason.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import structlog
import trio

from nexus.core.errors import (
    CapacityError,
    LocalError,
    MalformedError,
    NexusError,
    NotAllowedError,
    NotFoundError,
    PeerError,
    TimedOutError,
    UnreachableError,
    VerificationError,
)
from nexus.core.hashing import tagged_hash
from nexus.core.keys import Identity, peer_id_of
from nexus.core.manifest import EXACT, Manifest
from nexus.core.plan import Plan
from nexus.network.limits import TokenBucket
from nexus.network.transport import Stream, Transport
from nexus.node.audit.messages import AUDIT, AUDIT_MESSAGES, Answer, Ask, Declined, Shown, Working
from nexus.node.audit.reading import Unanswered
from nexus.node.cheating import HONEST
from nexus.node.models import Models
from nexus.proof.audit import (
    CELLS,
    OPENING_BYTES_MAX,
    AuditAnswer,
    AuditRequest,
    Cell,
    Opening,
    SignedAuditAnswer,
    challenge,
    check_reveal,
    pick_cells,
)
from nexus.proof.receipts import Refusal, SignedRefusal
from nexus.storage.sessions import ServedWork, SessionStore

if TYPE_CHECKING:
    from pathlib import Path

    from nexus.engine.stage import Stage
    from nexus.proof.arithmetic.plan import ExactPlan
    from nexus.proof.audit_check import AuditedStage

    # Computes the openings of these cells; blocks.
    Show = Callable[[Stage, AuditedStage, tuple[Cell, ...], dict[str, Path]], list[Opening]]

log = structlog.get_logger("nexus.audit")

_WORKING = AUDIT_MESSAGES.pack(Working())

ASK_TIMEOUT_S = 15.0
SEND_TIMEOUT_S = 60.0
READ_OUT_S = 2.0
WORKING_EVERY_S = 2.0
# Of one peer: so many at once, and so many per second after that.
ASKS_BURST = 16
ASKS_PER_S = 0.5
PEERS_REMEMBERED = 1024
# Of one session and stage. Each costs a replay of the session, a few hundredths of what it cost to serve it.
ASKS_PER_SESSION = 16
SESSIONS_REMEMBERED = 8192
# Of one participant that asks in the coordinator's place.
RELAYS_PER_PEER = 3
# Audits that wait for their turn, and of one peer.
WAITING_MAX = 16
WAITING_PER_PEER = 2


class AuditAnswers:
    """The answering end. `show`: who computes what is shown; see `nexus.node.cheating`."""

    def __init__(
        self, transport: Transport, identity: Identity, models: Models, sessions: SessionStore, show: Show | None = None
    ) -> None:
        self._show = show or HONEST.show
        self._transport = transport
        self._identity = identity
        self._models = models
        self._sessions = sessions
        self._turn = trio.Lock()
        self._waiting: dict[str, int] = {}
        self._rates: OrderedDict[str, TokenBucket] = OrderedDict()
        self._used: OrderedDict[tuple[bytes, int], set[int]] = OrderedDict()
        # Of a session and stage: which request each participant relayed, and how often.
        self._relayed: OrderedDict[tuple[bytes, int], dict[str, tuple[bytes, int]]] = OrderedDict()
        self.answered = 0

    def start(self) -> None:
        self._transport.serve(AUDIT, self.answer)

    async def answer(self, stream: Stream) -> None:
        with trio.move_on_after(ASK_TIMEOUT_S) as scope:
            first = await stream.receive()
        if scope.cancelled_caught:
            raise TimedOutError("a stream for an audit was opened and nothing said on it")
        request: AuditRequest | None = None
        try:
            self._check_rate(stream.peer_id)
            request = _request_of(first, stream)
            async with working(stream, _WORKING), self._seat(stream.peer_id):
                work, cells = await self._admit(stream.peer_id, request)
                openings = await self._open(work, cells)
            await self._send(stream, request, openings)
        except NexusError as error:
            log.info("audit_declined", peer_id=stream.peer_id, reason=error.cause)
            await self._decline(stream, request, error)
            if isinstance(error, PeerError) and error.peer == stream.peer_id:
                await _read_out(stream)
                raise  # it counts against the peer, and resets the stream
        else:
            self.answered += 1

    def _check_rate(self, peer_id: str) -> None:
        now_s = trio.current_time()
        bucket = self._rates.pop(peer_id, None) or TokenBucket(ASKS_PER_S, ASKS_BURST, now_s)
        self._rates[peer_id] = bucket
        if len(self._rates) > PEERS_REMEMBERED:
            self._rates.popitem(last=False)
        wait_s = bucket.take(1, now_s)
        if wait_s:
            bucket.take(-1, now_s)  # what is refused is not counted, or a peer that goes on asking would wait for ever
            raise CapacityError("you ask for audits faster than this node answers them", f"Wait {wait_s:.0f} s")

    @asynccontextmanager
    async def _seat(self, peer_id: str) -> AsyncIterator[None]:
        """One replay at a time; a short queue, in which nobody has more than a few places."""
        mine = self._waiting.get(peer_id, 0)
        if mine >= WAITING_PER_PEER or sum(self._waiting.values()) >= WAITING_MAX:
            raise CapacityError("this node is busy with other audits", "Ask again later")
        self._waiting[peer_id] = mine + 1
        try:
            async with self._turn:
                yield
        finally:
            self._waiting[peer_id] -= 1
            if not self._waiting[peer_id]:
                del self._waiting[peer_id]

    async def _admit(self, peer_id: str, request: AuditRequest) -> tuple[ServedWork, tuple[Cell, ...]]:
        """Everything that can be checked before anything is computed."""
        work = await trio.to_thread.run_sync(self._sessions.served, request.session, request.stage)
        terms, plan = work.served.terms, work.served.plan
        relayed = peer_id != peer_id_of(request.coordinator)
        if terms.coordinator != request.coordinator or (relayed and peer_id not in {peer_id_of(one.node) for one in plan.stages}):
            raise NotAllowedError("only the coordinator of a session may ask for its audit", "Ask whoever ran the session")
        if plan.profile != EXACT or not work.receipts:
            raise NotFoundError("nothing of that session was signed for that can be audited")
        blamed = "" if relayed else peer_id
        work = _until(work, request.receipt, blamed)
        try:
            check_reveal(terms.challenge, request.index, request.reveal)
        except VerificationError as error:
            raise VerificationError(error.cause, error.fix, blamed) from error
        if relayed:
            self._use_relayed(peer_id, request)
        else:
            self._use(request)
        layers = plan.stages[request.stage]
        manifest = await self._models.manifest(terms.model_root, [])
        rows = _rows(manifest, work)
        is_last = request.stage == len(plan.stages) - 1
        exact = await self._exact_plan(manifest)
        if request.kind == CELLS:
            return work, _drawn(request, plan, exact, rows)
        (cell,) = request.cells
        if cell.step >= len(rows) or cell.row >= rows[cell.step] or cell.head >= exact.kv_heads:
            raise VerificationError("the audit asks for a cell that the session does not have", peer=blamed)
        if cell.layer > layers.end - layers.start - (not is_last):
            raise VerificationError("the audit asks for a layer that the stage does not have", peer=blamed)
        return work, request.cells

    def _use(self, request: AuditRequest) -> None:
        """Every element of a chain is good for one answer, so that whoever records a request cannot use it."""
        key = request.session, request.stage
        used = self._used.setdefault(key, set())
        self._used.move_to_end(key)
        if len(self._used) > SESSIONS_REMEMBERED:
            self._used.popitem(last=False)
        if request.index in used:
            raise NotAllowedError("that challenge was answered before", "Reveal the next one of the chain")
        if len(used) >= ASKS_PER_SESSION:
            raise CapacityError(f"the session was audited {ASKS_PER_SESSION} times here, the limit", "Audit another session")
        used.add(request.index)

    def _use_relayed(self, peer_id: str, request: AuditRequest) -> None:
        """A participant asks in the coordinator's place. Each may relay one request, which may be one that was answered before:
        a coordinator that says it was not must not be believed."""
        key = request.session, request.stage
        relayed = self._relayed.setdefault(key, {})
        self._relayed.move_to_end(key)
        if len(self._relayed) > SESSIONS_REMEMBERED:
            self._relayed.popitem(last=False)
        known, times = relayed.get(peer_id, (request.id, 0))
        if known != request.id or times >= RELAYS_PER_PEER:
            raise NotAllowedError("you relayed an audit of that session before", "One request is answered to each participant")
        relayed[peer_id] = request.id, times + 1

    async def cells_of(self, case: Unanswered) -> tuple[Cell, ...]:
        """What the stage of an unanswered request has to show, as another participant of the session can tell. Raises
        NotFoundError where this node does not have that session, or no stage could show so much."""
        from nexus.proof.audit_check import AuditedStage

        plan, last = case.plan, case.receipt.receipt
        number = next((number for number, one in enumerate(plan.stages) if one.node == self._identity.public_key), len(plan.stages))
        work = await trio.to_thread.run_sync(self._sessions.served, case.terms.session, number)
        steps = last.step0 + last.n
        receipts = [receipt for receipt in work.receipts if receipt.step0 < steps]  # of the same windows as those of the accused
        if sum(receipt.n for receipt in receipts) != steps:
            raise NotFoundError("this node had no part in all of that session")
        manifest = await self._models.manifest(case.terms.model_root, [])
        rows = _rows(manifest, work)[:steps]
        exact, request = await self._exact_plan(manifest), case.request.request
        cells = _drawn(request, plan, exact, rows)
        subject = AuditedStage(manifest, exact, plan, case.terms, request.stage, receipts, (), (), (), rows)
        if max(map(subject.shown_bytes, cells)) > OPENING_BYTES_MAX:
            raise NotFoundError("that session is too long for a light audit")
        return cells

    async def _open(self, work: ServedWork, cells: tuple[Cell, ...]) -> list[Opening]:
        """Compute the session again, and open what is asked for."""
        terms, number = work.served.terms, work.served.stage
        layers = work.served.plan.stages[number]
        manifest = await self._models.manifest(terms.model_root, [])
        # Counted like a session's, under a name of its own.
        cache = tagged_hash("audit-cache", terms.session, number.to_bytes(4, "little"))
        self._models.reserve_kv(cache, manifest.kv_bytes * (layers.end - layers.start) * work.receipts[-1].kv_len)
        try:
            async with self._models.stage(manifest, layers.start, layers.end, work.served.plan.dtype, [], _ignore) as stage:
                files = self._models.paths(manifest)
                exact = await self._exact_plan(manifest)
                return await trio.to_thread.run_sync(partial(self._show, stage, _subject(manifest, exact, work), cells, files))
        finally:
            self._models.reserve_kv(cache, 0)

    async def _exact_plan(self, manifest: Manifest) -> ExactPlan:
        from nexus.engine.exact.audit import read_exact_plan

        return await trio.to_thread.run_sync(read_exact_plan, manifest, self._models.paths(manifest))

    async def _send(self, stream: Stream, request: AuditRequest, openings: list[Opening]) -> None:
        answer = AuditAnswer(
            spec=1,
            request=request.id,
            session=request.session,
            receipt=request.receipt,
            node=self._identity.public_key,
            stage=request.stage,
            openings=tuple(opening.id for opening in openings),
        )
        with trio.move_on_after(SEND_TIMEOUT_S) as scope:
            await stream.send(AUDIT_MESSAGES.pack(Answer(SignedAuditAnswer.sign(answer, self._identity))))
            for opening in openings:
                await stream.send(AUDIT_MESSAGES.pack(Shown(opening)))
        if scope.cancelled_caught:
            raise TimedOutError(f"the auditor took nothing for {SEND_TIMEOUT_S:.0f} s")

    async def _decline(self, stream: Stream, request: AuditRequest | None, error: NexusError) -> None:
        # What is wrong inside this machine is for its own log: its owner reads that, the auditor need not.
        cause = "this node cannot show its work now" if isinstance(error, LocalError) else error.cause
        refusal = Refusal(
            session=request.session if request else bytes(32),
            node=self._identity.public_key,
            stage=request.stage if request else 0,
            step=0,
            code=error.code,
            cause=cause[:500],
            fix=error.fix[:500],
        )
        with trio.move_on_after(ASK_TIMEOUT_S) as scope:
            scope.shield = True
            try:
                await stream.send(AUDIT_MESSAGES.pack(Declined(SignedRefusal.sign(refusal, self._identity))))
                await stream.close()
            except UnreachableError:
                await stream.reset()  # whoever asked is gone


async def _read_out(stream: Stream) -> None:
    """Until the peer has had the time to read why."""
    with trio.move_on_after(READ_OUT_S), suppress(trio.EndOfChannel, PeerError):
        await stream.receive()


@asynccontextmanager
async def working(stream: Stream, frame: bytes) -> AsyncIterator[None]:
    """Tells whoever waits now and then, with this frame, that this process runs."""

    async def beat() -> None:
        while True:
            await trio.sleep(WORKING_EVERY_S)
            try:
                await stream.send(frame)
            except UnreachableError:
                return  # whoever sends the answer finds out as well

    failure: NexusError | None = None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(beat)
        try:
            yield
        except NexusError as error:
            failure = error  # as it is, not in a group of one
        nursery.cancel_scope.cancel()
    if failure:
        raise failure


def _request_of(frame: bytes, stream: Stream) -> AuditRequest:
    """Garbage, and what is not signed by whoever it names, count against the peer."""
    try:
        message = AUDIT_MESSAGES.unpack(frame)
        if not isinstance(message, Ask):
            raise MalformedError("an audit begins with Ask")
        return message.request.verify()
    except (MalformedError, VerificationError) as error:
        error.peer = stream.peer_id
        raise


def _until(work: ServedWork, receipt: bytes, blamed: str) -> ServedWork:
    """The session up to the receipt with this id: nobody is called silent for having signed more than the auditor was shown."""
    for number, own in enumerate(work.receipts, 1):
        if own.id == receipt:
            return replace(work, receipts=work.receipts[:number], inputs=work.inputs[: own.step0 + own.n])
    raise VerificationError("the audit does not name a receipt of this stage as the last receipt of the session", peer=blamed)


def _drawn(request: AuditRequest, plan: Plan, exact: ExactPlan, rows: list[int]) -> tuple[Cell, ...]:
    """The cells that the challenge picks."""
    layers, is_last = plan.stages[request.stage], request.stage == len(plan.stages) - 1
    drawn = challenge(request.receipt, request.reveal)
    return pick_cells(drawn, rows, layers.end - layers.start, exact.kv_heads, is_last, request.count)


def _rows(manifest: Manifest, work: ServedWork) -> list[int]:
    width = 4 if work.served.stage == 0 else 4 * manifest.hidden_size
    return [len(payload) // width for payload in work.inputs]


def _subject(manifest: Manifest, exact: ExactPlan, work: ServedWork) -> AuditedStage:
    from nexus.proof.audit_check import AuditedStage

    served = work.served
    rows = _rows(manifest, work)
    return AuditedStage(manifest, exact, served.plan, served.terms, served.stage, work.receipts, (), work.inputs, (), rows)


async def _ignore(phase: str, done: int, total: int) -> None:
    """Nobody waits to see the layers load."""
