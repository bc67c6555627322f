"""Witnesses of a stage that falls silent, `/nexus/witness/1`. Both ends are here.

When a stage gives no sign of life in a session, or does not answer the audit that the session's terms call for, the coordinator
asks the other participants to look for themselves: each puts the very same request to the stage, and hands back what it answers.
Then nobody is suspended. A witness that hears nothing either signs a statement, and a quorum of them is a case
(`nexus.swarm.standing`), which is applied here and passed on (`nexus.node.suspensions`). Nobody's word slashes.

A lying coordinator gets nowhere alone: an honest stage answers its witnesses. So a witness makes sure, before it asks anybody
anything, that the request is one that an honest stage can answer: of a session that both took part in a while ago, with a receipt
that the stage signed, and one request per session.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial

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
    RefusedError,
    TimedOutError,
    UnreachableError,
    VerificationError,
)
from nexus.core.keys import Identity, peer_id_of
from nexus.core.manifest import EXACT
from nexus.core.plan import Plan
from nexus.core.record import MessageSet, Record, many, nested, raw, text
from nexus.network.limits import TokenBucket
from nexus.network.transport import PeerAddress, ProtocolSpec, Stream, Transport
from nexus.node.audit.answering import working
from nexus.node.audit.messages import SHOWN_BYTES_MAX, Answer, Shown, Working
from nexus.node.audit.reading import SILENCE_MAX_S, Answered, Unanswered, ask, checked, collected, receive
from nexus.node.standing import Standings
from nexus.node.suspensions import Suspensions
from nexus.proof.audit import CELLS, Cell, SignedAuditRequest, check_reveal
from nexus.proof.receipts import SignedReceipt, Terms
from nexus.swarm.standing import SILENT, UNANSWERED, SignedStatement, Statement, SuspensionCase, quorum_of

log = structlog.get_logger("nexus.witness")

ASK_TIMEOUT_S = 15.0
# How long a witness tries. A stage that is busy with other audits is asked again.
LOOK_TIMEOUT_S = 60.0
AGAIN_S = 5.0
PING_TIMEOUT_S = 10.0
PINGS = 2
# How long the coordinator waits for its witnesses, some at a time.
WITNESSES_TIMEOUT_S = 90.0
WITNESSES_AT_ONCE = 32
# Of one coordinator: so many at once, and so many per second after that. Each costs the accused a replay of the session.
LOOKS_BURST = 4
LOOKS_PER_S = 1 / 60
PEERS_REMEMBERED = 1024
# Which request was looked into, by session and accused.
LOOKS_REMEMBERED = 4096

# Terms, a plan of 256 stages, a request and a receipt.
WITNESS_BYTES_MAX = 32 * 1024
WITNESS = ProtocolSpec(
    "/nexus/witness/1", frame_max=SHOWN_BYTES_MAX, first_frame_max=WITNESS_BYTES_MAX, read_timeout_s=None, streams_per_peer_max=2
)


@dataclass(frozen=True, slots=True)
class WitnessAsk(Record):
    """The coordinator of a session asks a participant to look for another one. `request`, `receipt`: one each where it is about an
    audit: what was asked for, and the receipt of the accused that the request names."""

    terms: Terms = nested(Terms)
    plan: Plan = nested(Plan)
    accused: bytes = raw(32)
    request: tuple[SignedAuditRequest, ...] = many(nested(SignedAuditRequest), 1)
    receipt: tuple[SignedReceipt, ...] = many(nested(SignedReceipt), 1)


@dataclass(frozen=True, slots=True)
class Heard(Record):
    """The accused gave a sign of life, where that is all that was asked for."""


@dataclass(frozen=True, slots=True)
class Stated(Record):
    """It did not, or did not answer."""

    statement: SignedStatement = nested(SignedStatement)


@dataclass(frozen=True, slots=True)
class NoWitness(Record):
    """The one who was asked has nothing to say, and why."""

    cause: str = text(512)


MESSAGES = MessageSet(WitnessAsk, Working, Answer, Shown, Heard, Stated, NoWitness)
_WORKING = MESSAGES.pack(Working())


class Witnesses:
    """`cells_of`: what a stage has to show for a request, raises NotFoundError where this node had no part in the session.
    `took_part`: whether this node served in that session a short while ago. `find`: where a node is, by its own word; None: not
    known. `now_ms`: Unix time."""

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        standings: Standings,
        suspensions: Suspensions,
        cells_of: Callable[[Unanswered], Awaitable[Sequence[Cell]]],
        took_part: Callable[[bytes], bool],
        find: Callable[[bytes], PeerAddress | None],
        now_ms: Callable[[], int],
    ) -> None:
        self._transport = transport
        self._identity = identity
        self._standings = standings
        self._suspensions = suspensions
        self._cells_of = cells_of
        self._took_part = took_part
        self._find = find
        self._now_ms = now_ms
        self._rates: OrderedDict[str, TokenBucket] = OrderedDict()
        self._looks: OrderedDict[tuple[bytes, bytes], bytes] = OrderedDict()

    def start(self) -> None:
        self._transport.serve(WITNESS, self._answer)

    # --- the coordinator ---------------------------------------------------------------------------------------------------------

    async def unanswered(self, case: Unanswered) -> Answered | None:
        """Have an unanswered audit witnessed. What the stage answers to one of them; else None, and it is suspended if they are
        enough. Never raises for what others do."""
        asked = WitnessAsk(case.terms, case.plan, case.receipt.receipt.node, (case.request,), (case.receipt,))
        return await self._gather(asked, case)

    async def silent(self, terms: Terms, plan: Plan, accused: bytes) -> None:
        """Have it witnessed that a stage gave no sign of life in a session."""
        await self._gather(WitnessAsk(terms, plan, accused, (), ()), None)

    async def _gather(self, asked: WitnessAsk, case: Unanswered | None) -> Answered | None:
        others = {stage.node for stage in asked.plan.stages} - {asked.accused, self._identity.public_key}
        try:
            # Only those whose word counts here make up the quorum, and this node is one of them. All are asked: elsewhere
            # others count.
            quorum_of(1 + sum(self._standings.counts(node) for node in others))
        except VerificationError as error:
            log.info("not_witnessed", accused=peer_id_of(asked.accused), reason=error.cause)
            return None
        statements = [self._state(asked)]
        heard: list[Answered | None] = []
        limiter = trio.CapacityLimiter(WITNESSES_AT_ONCE)

        async def one(node: bytes) -> None:
            async with limiter:
                try:
                    heard.append(await self._ask(node, asked, case))
                    log.info("witness_heard_it", accused=peer_id_of(asked.accused), witness=peer_id_of(node))
                    nursery.cancel_scope.cancel()
                except _Stated as said:
                    statements.append(said.statement)
                except NexusError as error:
                    log.info("no_witness", witness=peer_id_of(node), reason=error.cause)

        with trio.move_on_after(WITNESSES_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                for node in sorted(others):
                    nursery.start_soon(one, node)
        if heard:
            return heard[0]
        try:
            await self._suspensions.submit(SuspensionCase(1, asked.terms, asked.plan, tuple(statements)))
        except (VerificationError, MalformedError, LocalError, CapacityError) as error:
            log.info("not_suspended", accused=peer_id_of(asked.accused), reason=error.cause)
        return None

    async def _ask(self, node: bytes, asked: WitnessAsk, case: Unanswered | None) -> Answered | None:
        """What the accused answered to this witness; None where it gave a sign of life and that is all that was asked for. Raises
        _Stated where it did not, PeerError, TimedOutError, CapacityError where the witness is none."""
        peer_id = peer_id_of(node)
        with trio.move_on_after(ASK_TIMEOUT_S) as scope:
            stream = await self._transport.open_stream(peer_id, WITNESS)
            await stream.send(MESSAGES.pack(asked))
        if scope.cancelled_caught:
            raise TimedOutError(f"{peer_id} did not take the question")

        async def next_message() -> Record:
            while True:
                match await _receive(stream):
                    case Working():
                        continue
                    case NoWitness(cause):
                        raise RefusedError(f"it is no witness: {cause}", peer=peer_id)
                    case Stated(statement):
                        raise _Stated(_checked_statement(statement, node, asked))
                    case message:
                        return message

        try:
            if case is not None:
                return await collected(checked(next_message, case.request.request, asked.accused, case.cells))
            message = await next_message()
            if not isinstance(message, Heard):
                raise MalformedError(f"{type(message).__name__} is not what a witness says", peer=peer_id)
            return None
        finally:
            with trio.CancelScope(shield=True):
                await stream.reset()

    def _state(self, asked: WitnessAsk) -> SignedStatement:
        own = self._identity
        statement = Statement(1, own.public_key, asked.accused, asked.terms.session, _cause(asked), self._now_ms())
        return SignedStatement.sign(statement, own)

    # --- the witness -------------------------------------------------------------------------------------------------------------

    async def _answer(self, stream: Stream) -> None:
        with trio.move_on_after(ASK_TIMEOUT_S) as scope:
            first = await stream.receive()
        if scope.cancelled_caught:
            raise TimedOutError("a witness was called and nothing said")
        try:
            asked = MESSAGES.unpack(first)
            if not isinstance(asked, WitnessAsk):
                raise MalformedError("a witness is asked with WitnessAsk")
        except MalformedError as error:
            error.peer = stream.peer_id
            raise
        try:
            self._check_rate(stream.peer_id)
            self._check(stream.peer_id, asked)
            async with working(stream, _WORKING):
                await self._look(stream, asked)
        except NexusError as error:
            log.info("witness_declined", peer_id=stream.peer_id, reason=error.cause)
            cause = "this node cannot look now" if isinstance(error, LocalError) else error.cause
            with trio.move_on_after(ASK_TIMEOUT_S):
                try:
                    await stream.send(MESSAGES.pack(NoWitness(cause[:400])))
                    await stream.close()
                except UnreachableError:
                    await stream.reset()  # whoever asked is gone

    def _check_rate(self, peer_id: str) -> None:
        now_s = trio.current_time()
        bucket = self._rates.pop(peer_id, None) or TokenBucket(LOOKS_PER_S, LOOKS_BURST, now_s)
        self._rates[peer_id] = bucket
        if len(self._rates) > PEERS_REMEMBERED:
            self._rates.popitem(last=False)
        if bucket.take(1, now_s):
            bucket.take(-1, now_s)
            raise CapacityError("you call witnesses too often")

    def _check(self, peer_id: str, asked: WitnessAsk) -> None:
        """All that can be checked before anybody is asked anything. Raises NexusError that says what is amiss."""
        terms, plan, own = asked.terms, asked.plan, self._identity.public_key
        if peer_id_of(terms.coordinator) != peer_id:
            raise NotAllowedError("only the coordinator of a session may call its witnesses")
        nodes = [stage.node for stage in plan.stages]
        if terms.plan_root != plan.root or own not in nodes or asked.accused not in nodes or asked.accused == own:
            raise VerificationError("this node is no witness by that plan")
        if not self._took_part(terms.session):
            raise NotFoundError("this node did not serve in that session lately")
        if len(asked.request) != len(asked.receipt):
            raise MalformedError("a request for an audit and its receipt come together")
        if asked.request:
            self._check_request(asked)
        if all(connection.peer_id != peer_id_of(asked.accused) for connection in self._transport.connections()):
            address = self._find(asked.accused)
            if address is None:
                raise NotFoundError("this node does not know where to look")
            self._transport.learn(address)

    def _check_request(self, asked: WitnessAsk) -> None:
        """That it is the coordinator's, and that an honest stage can answer it."""
        terms, plan = asked.terms, asked.plan
        request, receipt = asked.request[0].verify(), asked.receipt[0].verify()
        if (request.coordinator, request.session) != (terms.coordinator, terms.session) or request.kind != CELLS:
            raise VerificationError("the request is no audit of that session by its coordinator")
        if plan.profile != EXACT or request.stage >= len(plan.stages) or plan.stages[request.stage].node != asked.accused:
            raise VerificationError("the request is not for the accused")
        known = receipt.node, receipt.session, receipt.stage, receipt.id
        if known != (asked.accused, terms.session, request.stage, request.receipt):
            raise VerificationError("the request does not name that receipt of the accused")
        check_reveal(terms.challenge, request.index, request.reveal)
        key = terms.session, asked.accused
        if self._looks.setdefault(key, request.id) != request.id:
            raise NotAllowedError("this node has put another request of that session to the accused")
        while len(self._looks) > LOOKS_REMEMBERED:
            self._looks.popitem(last=False)

    async def _look(self, stream: Stream, asked: WitnessAsk) -> None:
        if asked.request:
            case = Unanswered(asked.terms, asked.plan, asked.request[0], asked.receipt[0], ())
            heard = await self._relay(stream, case, asked.accused, await self._cells_of(case))
        else:
            heard = await self._is_there(peer_id_of(asked.accused))
            if heard:
                await stream.send(MESSAGES.pack(Heard()))
        if not heard:
            log.warning("witnessed", accused=peer_id_of(asked.accused), session=asked.terms.session.hex()[:16], cause=_cause(asked))
            await stream.send(MESSAGES.pack(Stated(self._state(asked))))
        await stream.close()

    async def _relay(self, stream: Stream, case: Unanswered, accused: bytes, cells: Sequence[Cell]) -> bool:
        """Put the request to the accused, and hand back what it answers. Whether it answered in full."""
        reason = f"no answer in {LOOK_TIMEOUT_S:.0f} s"
        with trio.move_on_after(LOOK_TIMEOUT_S):
            async with aclosing(self._answers(case, accused, cells)) as answers:
                while True:
                    try:
                        message = await anext(answers)
                    except StopAsyncIteration:
                        return True
                    except (PeerError, TimedOutError) as error:
                        reason = error.cause
                        break
                    await stream.send(MESSAGES.pack(message))
        log.info("accused_does_not_answer", peer_id=peer_id_of(accused), reason=reason)
        return False

    async def _answers(self, case: Unanswered, accused: bytes, cells: Sequence[Cell]) -> AsyncGenerator[Answer | Shown, None]:
        """What the accused answers; while it is busy with other audits it is asked again. Raises PeerError, TimedOutError."""
        while True:
            try:
                stream = await ask(self._transport, peer_id_of(accused), case.request)
                try:
                    async for message in checked(partial(receive, stream), case.request.request, accused, cells):
                        yield message
                finally:
                    with trio.CancelScope(shield=True):
                        await stream.reset()
                return
            except CapacityError as error:
                log.info("accused_is_busy", peer_id=peer_id_of(accused), reason=error.cause)
            await trio.sleep(AGAIN_S)

    async def _is_there(self, peer_id: str) -> bool:
        for attempt in range(PINGS):
            if attempt:
                await trio.sleep(AGAIN_S)
            with trio.move_on_after(PING_TIMEOUT_S):
                try:
                    await self._transport.ping(peer_id)
                    return True
                except PeerError as error:
                    log.info("accused_does_not_answer", peer_id=peer_id, reason=error.cause)
        return False


class _Stated(Exception):
    """A statement came where an answer might have."""

    def __init__(self, statement: SignedStatement) -> None:
        super().__init__()
        self.statement = statement


def _cause(asked: WitnessAsk) -> str:
    return UNANSWERED if asked.request else SILENT


def _checked_statement(signed: SignedStatement, node: bytes, asked: WitnessAsk) -> SignedStatement:
    """Raises VerificationError where it is not this witness's word on that event."""
    said = signed.verify()
    if (said.witness, said.accused, said.session, said.cause) != (node, asked.accused, asked.terms.session, _cause(asked)):
        raise VerificationError("a statement came that is about something else", peer=peer_id_of(node))
    return signed


async def _receive(stream: Stream) -> Record:
    """What a witness says next. Raises PeerError, TimedOutError."""
    with trio.move_on_after(SILENCE_MAX_S):
        try:
            return MESSAGES.unpack(await stream.receive())
        except trio.EndOfChannel:
            raise UnreachableError("it ended the stream", peer=stream.peer_id) from None
    raise TimedOutError(f"not a sign of life of the witness for {SILENCE_MAX_S:.0f} s")
