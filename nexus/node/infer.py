"""The inference protocols, both ends of each.

`/nexus/infer/1`, coordinator to stage, one stream per session and stage: Open, then Progress* and Accepted, then Feed and Finish
one way (to the first stage) and Output and Done the other (from the last), from every stage its receipts and at the end a Report. A
Failed may come at any time. Closing the stream ends the session on that stage.

`/nexus/link/1`, stage to the next stage of the ring, one stream per session: Hello, then Push and OwnReceipt, and Finish.

What may follow what, and what is checked before it is used, is decided by the state machines in `nexus.swarm.session`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

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
    UsageError,
    VerificationError,
)
from nexus.core.keys import Identity, peer_id_of
from nexus.core.manifest import CAUSAL, Manifest
from nexus.core.plan import Plan
from nexus.core.record import MessageSet, Record, digest, many, nested, raw, text, uint
from nexus.network.transport import FRAME_MAX, PeerAddress, ProtocolSpec, Stream, Transport
from nexus.node.batching import Batcher, Outcome
from nexus.node.live import Live
from nexus.proof.bundle import Bundle, check_request
from nexus.proof.receipts import STEPS_MAX, Refusal, SignedReceipt, SignedRefusal, SignedRequest, Terms
from nexus.swarm.session import (
    AskFinish,
    Close,
    Compute,
    CoordinatorAction,
    CoordinatorSession,
    Feed,
    Result,
    SendDone,
    SendFinish,
    SendOutput,
    SendReceipt,
    SendStep,
    ShowReceipt,
    StageAction,
    StageSession,
    Verified,
)

if TYPE_CHECKING:
    from nexus.engine.stage import Stage

log = structlog.get_logger("nexus.infer")

OPEN_TIMEOUT_S = 30.0
LINK_TIMEOUT_S = 15.0
ALIVE_EVERY_S = 2.0
SILENCE_MAX_S = 10.0
# A stage that is alive may read a long prompt for minutes.
STEP_TIMEOUT_S = 600.0
SESSION_IDLE_S = 300.0
INLINE_STEP_S = 0.002
REPORT_TIMEOUT_S = 2.0
SECOND_HAND_WAIT_S = 0.5
PAYLOAD_MAX = FRAME_MAX - 64 * 1024
ADDRESSES_MAX = 16
OPEN_BYTES_MAX = 1 << 20

INFER = ProtocolSpec(
    "/nexus/infer/1", frame_max=FRAME_MAX, first_frame_max=OPEN_BYTES_MAX, read_timeout_s=None, streams_per_peer_max=64
)
LINK = ProtocolSpec("/nexus/link/1", frame_max=FRAME_MAX, first_frame_max=1024, read_timeout_s=None, streams_per_peer_max=64)


# --- messages ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KnownPeer(Record):
    """Where a node of the plan was last seen."""

    node: bytes = raw(32)
    addresses: tuple[str, ...] = many(text(256), ADDRESSES_MAX)


@dataclass(frozen=True, slots=True)
class Open(Record):
    """The coordinator asks for a stage. `next`: the following stage of the ring. `sources`: who may have the weights."""

    stage: int = uint(4095)
    model_name: str = text(64)
    plan: Plan = nested(Plan)
    terms: Terms = nested(Terms)
    request: SignedRequest = nested(SignedRequest)
    next: KnownPeer = nested(KnownPeer)
    sources: tuple[KnownPeer, ...] = many(nested(KnownPeer), 32)


@dataclass(frozen=True, slots=True)
class OpenProgress(Record):
    phase: str = text(64)
    done: int = uint()
    total: int = uint()


@dataclass(frozen=True, slots=True)
class Accepted(Record):
    """The stage is loaded, the session is registered, the next stage is connected."""


@dataclass(frozen=True, slots=True)
class FeedInput(Record):
    step: int = uint(STEPS_MAX)
    payload: bytes = raw(most=PAYLOAD_MAX)


@dataclass(frozen=True, slots=True)
class Finish(Record):
    """No more steps come."""


@dataclass(frozen=True, slots=True)
class Output(Record):
    step: int = uint(STEPS_MAX)
    payload: bytes = raw(most=PAYLOAD_MAX)


@dataclass(frozen=True, slots=True)
class OwnReceipt(Record):
    """The sender's receipt for one window."""

    receipt: SignedReceipt = nested(SignedReceipt)


@dataclass(frozen=True, slots=True)
class Done(Record):
    """Every step is shown and receipted."""


@dataclass(frozen=True, slots=True)
class Report(Record):
    """What the stage says it did; for the user's eyes, nothing rests on it."""

    steps: int = uint(STEPS_MAX)
    receipts: int = uint(STEPS_MAX)
    compute_us: int = uint()


@dataclass(frozen=True, slots=True)
class Failed(Record):
    refusal: SignedRefusal = nested(SignedRefusal)


@dataclass(frozen=True, slots=True)
class Hello(Record):
    session: bytes = digest()
    stage: int = uint(4095)


@dataclass(frozen=True, slots=True)
class Push(Record):
    step: int = uint(STEPS_MAX)
    payload: bytes = raw(most=PAYLOAD_MAX)


@dataclass(frozen=True, slots=True)
class Alive(Record):
    """The stage is still at it: sent every ALIVE_EVERY_S, whatever else is, so that a stopped process is told from a slow one."""


INFER_MESSAGES = MessageSet(Open, OpenProgress, Accepted, FeedInput, Finish, Output, OwnReceipt, Done, Report, Failed, Alive)
LINK_MESSAGES = MessageSet(Hello, Push, OwnReceipt, Finish)


# What a stage's refusal is here; by its code, so that the exit code still says what kind of failure it was.
REFUSALS: dict[str, type[NexusError]] = {
    error.code: error
    for error in (CapacityError, NotAllowedError, NotFoundError, TimedOutError, UnreachableError, UsageError, VerificationError)
}


# --- a stage's end ----------------------------------------------------------------------------------------------------------

ProgressSink = Callable[[str, int, int], Awaitable[None]]


class StageSource(Protocol):
    """Where sessions get the loaded layers from: fetched if need be, shared between sessions, held while in use."""

    async def manifest(self, model_root: bytes, sources: Sequence[PeerAddress]) -> Manifest: ...

    def stage(
        self, manifest: Manifest, start: int, end: int, dtype: str, sources: Sequence[PeerAddress], progress: ProgressSink
    ) -> AbstractAsyncContextManager[Stage]: ...

    def reserve_kv(self, session: bytes, n_bytes: int) -> None:
        """Count `n_bytes` of KV cache to `session`; 0 gives all back. Raises CapacityError when the node has no room."""


@asynccontextmanager
async def alive(control: Stream) -> AsyncIterator[None]:
    """Tells the coordinator now and then that this process runs."""

    async def beat() -> None:
        while True:
            await trio.sleep(ALIVE_EVERY_S)
            try:
                await control.send(INFER_MESSAGES.pack(Alive()))
            except UnreachableError:
                return  # whoever reads the stream finds out as well, and says so

    async with trio.open_nursery() as nursery:
        nursery.start_soon(beat)
        yield
        nursery.cancel_scope.cancel()


@dataclass
class ServedTotals:
    """Since this node started."""

    sessions: int = 0
    steps: int = 0
    receipts: int = 0


class InferService:
    """Serves stages: answers both protocols, one `_Served` per live session."""

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        source: StageSource,
        *,
        serve: bool,
        sessions_max: int,
        inline_step_s: float = INLINE_STEP_S,
    ) -> None:
        self._transport = transport
        self._identity = identity
        self._source = source
        self._serve = serve
        self._sessions_max = sessions_max
        self._served: dict[tuple[bytes, int], _Served] = {}
        self._seats: dict[tuple[bytes, int], str] = {}  # sessions from their Open on, and whose they are
        self.live = Live()
        self._dialling: dict[str, trio.Lock] = {}
        self._batcher = Batcher(inline_step_s)
        self.totals = ServedTotals()
        self.draining = False

    def start(self) -> None:
        self._transport.serve(INFER, self._answer_open)
        self._transport.serve(LINK, self._answer_link)

    async def _answer_open(self, control: Stream) -> None:
        with trio.move_on_after(OPEN_TIMEOUT_S) as scope:
            first = await control.receive()
        if scope.cancelled_caught:
            raise TimedOutError("the coordinator opened a stream and sent nothing")
        message = _first_message(INFER_MESSAGES, first, control)
        if not isinstance(message, Open):
            raise MalformedError("a session begins with Open", peer=control.peer_id)
        served: _Served | None = None
        failure: NexusError | None = None
        try:
            async with alive(control):
                with self._seat(control.peer_id, message):
                    manifest = await self._admit(control, message)
                    async with self._hold_stage(control, message, manifest) as stage:
                        served = _Served(self, control, message, manifest, stage)
                        with self.live.one():
                            await served.run()
        except* NexusError as group:  # may come with Cancelled beside it when the node stops: that goes on its way
            failure = _first_cause(group)
        if failure:
            step = served.step if served else 0
            log.warning(
                "session_failed", session=message.terms.session.hex()[:16], stage=message.stage, step=step, error=str(failure)
            )
            await self._refuse(control, message, step, failure)

    @contextmanager
    def _seat(self, peer_id: str, message: Open) -> Iterator[None]:
        """Count a session from the moment that it is asked for: one that still loads is one as well. No peer gets all of them."""
        key = (message.terms.session, message.stage)
        if key in self._seats:
            raise MalformedError("this session is already open here")
        if len(self._seats) >= self._sessions_max:
            raise CapacityError(
                f"this node runs {self._sessions_max} sessions, its limit", "Try again later, or raise serve.sessions_max there"
            )
        most = self._sessions_max - self._sessions_max // 4
        if peer_id != self._transport.peer_id and sum(owner == peer_id for owner in self._seats.values()) >= most:
            raise CapacityError(
                f"this node runs {most} sessions for you, and keeps {self._sessions_max - most} for others", "Wait for one to end"
            )
        self._seats[key] = peer_id
        try:
            yield
        finally:
            del self._seats[key]

    async def _admit(self, control: Stream, message: Open) -> Manifest:
        """Everything that can be checked before any work is done for the session."""
        stage = message.stage
        if not self._serve or self.draining:
            raise NotAllowedError(
                "this node is shutting down" if self.draining else "this node does not serve stages", "Plan without it"
            )
        if peer_id_of(message.terms.coordinator) != control.peer_id:
            raise VerificationError("the session's terms name another coordinator than the peer that sent them")
        stages = message.plan.stages
        if not 0 <= stage < len(stages) or stages[stage].node != self._identity.public_key:
            raise VerificationError(f"the plan does not name this node for stage {stage}")
        following = stages[(stage + 1) % len(stages)].node
        if message.next.node != following:
            raise VerificationError("the next peer named is not the plan's next stage")
        check_request(message.request, message.terms, message.plan, stage)
        manifest = await self._source.manifest(message.plan.model_root, [_address(peer) for peer in message.sources])
        message.plan.check(manifest)
        return manifest

    @asynccontextmanager
    async def _hold_stage(self, control: Stream, message: Open, manifest: Manifest) -> AsyncIterator[Stage]:
        layers = message.plan.stages[message.stage]

        async def tell(phase: str, done: int, total: int) -> None:
            await control.send(INFER_MESSAGES.pack(OpenProgress(phase, done, total)))

        async def watch() -> None:
            """The coordinator has nothing to say while it waits; if it goes away, so does the reason to load."""
            try:
                await control.receive()
            except trio.EndOfChannel:
                raise UnreachableError("the coordinator ended the session before it began") from None
            raise MalformedError("the coordinator spoke before its session was accepted")

        sources = [_address(peer) for peer in message.sources]
        async with AsyncExitStack() as stack:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch)
                stage = await stack.enter_async_context(
                    self._source.stage(manifest, layers.start, layers.end, message.plan.dtype, sources, tell)
                )
                nursery.cancel_scope.cancel()
            yield stage

    async def _refuse(self, control: Stream, message: Open, step: int, error: NexusError) -> None:
        refusal = Refusal(
            message.terms.session,
            self._identity.public_key,
            message.stage,
            step,
            error.code,
            error.cause[:500],
            error.fix[:500],
        )
        with trio.move_on_after(LINK_TIMEOUT_S) as scope:
            scope.shield = True
            try:
                await control.send(INFER_MESSAGES.pack(Failed(SignedRefusal.sign(refusal, self._identity))))
                await control.close()
            except NexusError:
                await control.reset()  # the coordinator is gone: nobody is left to tell

    async def _answer_link(self, link: Stream) -> None:
        with trio.move_on_after(LINK_TIMEOUT_S) as scope:
            first = await link.receive()
        if scope.cancelled_caught:
            raise TimedOutError("a link was opened and nothing said on it")
        hello = _first_message(LINK_MESSAGES, first, link)
        if not isinstance(hello, Hello):
            raise MalformedError("a link begins with Hello", peer=link.peer_id)
        served = self._served.get((hello.session, hello.stage))
        if served is None:
            raise NotAllowedError("no such session here")
        await served.take_link(link)

    @asynccontextmanager
    async def dialling(self, peer_id: str) -> AsyncIterator[None]:
        """At most one task at a time per peer."""
        lock = self._dialling.setdefault(peer_id, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():  # also when nobody answers there: strangers name as many peers as they like
                self._dialling.pop(peer_id, None)

    async def compute(self, stage: Stage, session: bytes, payload: bytes, expected_s: float | None) -> Outcome:
        """One step of a session, in its turn: see `Batcher.compute`."""
        return await self._batcher.compute(stage, session, payload, expected_s)


class _Served:
    """One session on this node. Every event is handled to the end, under a lock, before the next one is looked at."""

    def __init__(self, service: InferService, control: Stream, opened: Open, manifest: Manifest, stage: Stage) -> None:
        self._service = service
        self._control = control
        self._opened = opened
        self._manifest = manifest
        self._stage = stage
        self._session = opened.terms.session
        self._machine = StageSession(service._identity, manifest, opened.plan, opened.terms, opened.request, opened.stage)
        self._lock = trio.Lock()
        self._link_out: Stream | None = None
        self._link_in_taken = False
        self._over = trio.Event()
        self._failure: NexusError | None = None
        self._link_scope = trio.CancelScope()
        self._idle = trio.move_on_after(SESSION_IDLE_S)
        self._compute_s = 0.0
        self._token_s: float | None = None  # what a step of one token takes lately
        self._token_kv_bytes = stage_kv_bytes(manifest, opened.plan, opened.stage)
        self.step = 0

    async def run(self) -> None:
        """Until the session is over. Raises what made it fail."""
        from nexus.proof.arithmetic.sampler import Sampling

        service, terms, plan = self._service, self._opened.terms, self._opened.plan
        key = (self._session, self._opened.stage)
        last = self._opened.stage == len(plan.stages) - 1
        if not last or self._feeds_back:
            await self._reach_next()
        sampling = Sampling.of(terms) if last and self._feeds_back else None
        self._stage.open(self._session, sampling)
        service._served[key] = self
        service.totals.sessions += 1
        try:
            await self._control.send(INFER_MESSAGES.pack(Accepted()))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_control)
                nursery.start_soon(self._watch)
                await self._over.wait()
                nursery.cancel_scope.cancel()
        finally:
            del service._served[key]
            self._link_scope.cancel()
            with trio.CancelScope(shield=True):
                # Who holds the lock is cancelled by now, but for the engine: it may still write to the cache of this session, which
                # must not be another's by then.
                async with self._lock:
                    self._stage.close(self._session)
            service._source.reserve_kv(self._session, 0)
            with trio.move_on_after(LINK_TIMEOUT_S) as scope:
                scope.shield = True
                if self._link_out:
                    await (self._link_out.reset() if self._failure else self._link_out.close())
        if self._failure:
            raise self._failure

    @property
    def _feeds_back(self) -> bool:
        return self._manifest.kind == CAUSAL

    async def _reach_next(self) -> None:
        """A stage that cannot reach its successor says so now, not in the middle of an answer."""
        following = _address(self._opened.next)
        transport = self._service._transport
        if following.peer_id == transport.peer_id:
            return
        transport.learn(following)
        with trio.move_on_after(LINK_TIMEOUT_S) as scope:
            # One at a time: of many sessions that begin together, the first one dials.
            async with self._service.dialling(following.peer_id):
                if all(connection.peer_id != following.peer_id for connection in transport.connections()):
                    await transport.ping(following.peer_id)
        if scope.cancelled_caught:
            raise UnreachableError(f"the next stage ({following.peer_id}) does not answer", peer=following.peer_id)

    async def _watch(self) -> None:
        """A session in which nothing happens any more gives its memory back."""
        with self._idle:
            await trio.sleep_forever()
        self._fail(TimedOutError(f"nothing came for {SESSION_IDLE_S:.0f} s, so the session's cache was evicted", "Run it again"))

    def _fail(self, error: NexusError) -> None:
        if not self._over.is_set():
            self._failure = error
            self._over.set()

    async def _read_control(self) -> None:
        """The coordinator's side. Its going away ends the session."""
        try:
            while True:
                message = INFER_MESSAGES.unpack(await self._control.receive())
                match message:
                    case FeedInput(step, payload):
                        await self._handle(partial(self._machine.feed, step, payload))
                    case Finish() if self._opened.stage == 0:
                        await self._handle(self._machine.finish)
                    case _:
                        raise MalformedError(f"{type(message).__name__} is not for a stage")
        except trio.EndOfChannel:
            self._fail(UnreachableError("the coordinator ended the session"))
        except NexusError as error:
            self._fail(error)

    async def take_link(self, link: Stream) -> None:
        """The stage before pushes its steps."""
        before = self._opened.plan.stages[self._machine.before]
        if link.peer_id != peer_id_of(before.node) or self._link_in_taken:
            raise NotAllowedError("the link is not from the stage before, or it is the second one")
        self._link_in_taken = True
        with self._link_scope:
            await self._read_link(link)

    async def _read_link(self, link: Stream) -> None:
        try:
            while not self._over.is_set():
                message = LINK_MESSAGES.unpack(await link.receive())
                match message:
                    case Push(step, payload):
                        await self._handle(partial(self._machine.push, step, payload))
                    case OwnReceipt(receipt):
                        await self._handle(partial(self._machine.receipt, receipt))
                    case Finish():
                        await self._handle(self._machine.finish)
                    case _:
                        raise MalformedError(f"{type(message).__name__} does not belong on a link")
        except trio.EndOfChannel:
            if not self._machine.closed:  # in order only after Finish
                self._fail(UnreachableError(f"stage {self._machine.before} closed its link", peer=link.peer_id))
        except NexusError as error:
            self._fail(_blame(error, link.peer_id))

    async def _handle(self, event: Callable[[], list[StageAction]]) -> None:
        self._idle.deadline = trio.current_time() + SESSION_IDLE_S
        async with self._lock:
            if self._over.is_set():
                return
            try:
                await self._perform(event())
            except NexusError:
                raise
            except Exception as error:  # the boundary: a defect of ours in one session must not end the others
                log.exception("session_broke", session=self._session.hex()[:16])
                raise LocalError(
                    f"the node failed inside: {type(error).__name__}", "Its log has the details; please report it"
                ) from error

    async def _perform(self, actions: list[StageAction]) -> None:
        for action in actions:
            match action:
                case Compute(step, payload):
                    await self._compute(step, payload)
                case SendStep(step, payload):
                    await self._send_link(Push(step, payload))
                case SendReceipt(receipt):
                    await self._send_link(OwnReceipt(receipt))
                case SendFinish():
                    await self._send_link(Finish())
                case SendOutput(step, payload):
                    await self._send_control(Output(step, payload))
                case ShowReceipt(receipt):
                    await self._send_control(OwnReceipt(receipt))
                case SendDone():
                    await self._send_control(Done())
                case Close():
                    self._service.totals.receipts += self._machine.receipts_signed
                    await self._send_control(Report(self.step, self._machine.receipts_signed, int(self._compute_s * 1e6)))
                    await self._control.close()
                    self._over.set()

    async def _compute(self, step: int, payload: bytes) -> None:
        service = self._service
        service._source.reserve_kv(self._session, self._token_kv_bytes * self._machine.kv_len)
        is_token = len(payload) == self._stage.input_size(1)
        outcome = await service.compute(self._stage, self._session, payload, self._token_s if is_token else None)
        self._compute_s += outcome.compute_s
        if is_token:
            self._token_s = outcome.turn_s if self._token_s is None else self._token_s + (outcome.turn_s - self._token_s) / 4
        self.step = step + 1
        service.totals.steps += 1
        await self._perform(self._machine.computed(step, outcome.output))

    async def _send_link(self, message: Push | OwnReceipt | Finish) -> None:
        with trio.move_on_after(LINK_TIMEOUT_S) as scope:
            if self._link_out is None:
                following = _address(self._opened.next)
                self._link_out = await self._service._transport.open_stream(following.peer_id, LINK)
                stage = (self._opened.stage + 1) % len(self._opened.plan.stages)
                await self._link_out.send(LINK_MESSAGES.pack(Hello(self._session, stage)))
            await self._link_out.send(LINK_MESSAGES.pack(message))
        if scope.cancelled_caught:
            raise TimedOutError(f"the next stage took nothing for {LINK_TIMEOUT_S:.0f} s", "It may be overloaded or gone")

    async def _send_control(self, message: Record) -> None:
        with trio.move_on_after(LINK_TIMEOUT_S) as scope:
            await self._control.send(INFER_MESSAGES.pack(message))
        if scope.cancelled_caught:
            raise TimedOutError(f"the coordinator took nothing for {LINK_TIMEOUT_S:.0f} s")


# --- the coordinator's end --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StageReport:
    steps: int
    receipts: int
    compute_s: float


@dataclass(frozen=True, slots=True)
class StageProgress:
    stage: int
    phase: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The session is over and `bundle` verifies. `reports`: what each stage says it did, where it said so in time."""

    bundle: Bundle
    receipts_verified: int
    reports: tuple[StageReport | None, ...]


SessionEvent = StageProgress | Result | Ended


class Coordinator:
    """Runs one session over the stages of a plan and hands its events on as they come."""

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        model_name: str,
        manifest: Manifest,
        plan: Plan,
        terms: Terms,
        inputs: Sequence[bytes],
        known: dict[bytes, PeerAddress],
    ) -> None:
        """`inputs`: the prompt's token ids, or those of every text. `known`: by public key, where nodes were last seen."""
        self._transport = transport
        self._plan = plan
        self._terms = terms
        self._model_name = model_name
        self._manifest = manifest
        self._known = known
        self._machine = CoordinatorSession(identity, model_name, manifest, plan, terms, inputs)
        self._streams: list[Stream | None] = [None] * len(plan.stages)
        self._reports: list[StageReport | None] = [None] * len(plan.stages)
        self._bundle: Bundle | None = None
        self._stop_wanted = False
        self._quiet = trio.CancelScope()
        self.session = terms.session
        self.failed_stage: int | None = None
        self._reported = trio.Event()

    async def run(self, emit: Callable[[SessionEvent], Awaitable[None]]) -> None:
        """To the end. Raises the error of the stage that failed, by its name, or TimedOutError when none is heard of any more."""
        self._emit = emit
        self._quiet.deadline = trio.current_time() + STEP_TIMEOUT_S
        failure: NexusError | None = None
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for stage in range(len(self._plan.stages)):
                    nursery.start_soon(self._run_stage, stage)
                nursery.start_soon(self._watch)
                await self._reported.wait()
                nursery.cancel_scope.cancel()
        except* NexusError as group:
            failure = _first_cause(group)
        finally:
            with trio.move_on_after(REPORT_TIMEOUT_S) as scope:
                scope.shield = True
                for stream in self._streams:
                    if stream:
                        await (stream.close() if self._bundle else stream.reset())
        if failure:
            raise failure
        assert self._bundle is not None
        await emit(Ended(self._bundle, self._machine.receipts_verified, tuple(self._reports)))

    async def stop(self) -> None:
        """No more steps are wanted; `run` still collects the receipts for what was computed."""
        with suppress(UnreachableError):  # the session is over already, or `run` says why not
            await self._feed(self._machine.stop())

    def ends_with(self, result: Result) -> str | None:
        return self._machine.ends_with(result.step, result.payload)

    async def _watch(self) -> None:
        """The deadline of the whole: something must come out every STEP_TIMEOUT_S, and reports end the wait soon after Done."""
        with self._quiet:
            await trio.sleep_forever()
        if self._bundle:
            self._reported.set()
            return
        raise TimedOutError(f"nothing came out for {STEP_TIMEOUT_S:.0f} s", "The prompt may be too long for these machines")

    async def _run_stage(self, stage: int) -> None:
        peer_id = peer_id_of(self._plan.stages[stage].node)
        try:
            with trio.move_on_after(OPEN_TIMEOUT_S) as scope:
                address = self._known.get(self._plan.stages[stage].node)
                if address:
                    self._transport.learn(address)
                stream = self._streams[stage] = await self._transport.open_stream(peer_id, INFER)
                await stream.send(INFER_MESSAGES.pack(self._open(stage)))
            if scope.cancelled_caught:
                raise TimedOutError(f"stage {stage} ({peer_id}) did not take the session within {OPEN_TIMEOUT_S:.0f} s")
            while True:
                with trio.move_on_after(SILENCE_MAX_S) as scope:
                    frame = await stream.receive()
                if scope.cancelled_caught:
                    raise TimedOutError(f"not a sign of life for {SILENCE_MAX_S:.0f} s")
                await self._take(stage, INFER_MESSAGES.unpack(frame))
        except trio.EndOfChannel:
            if self._reports[stage] is None and not self._bundle:
                raise UnreachableError(f"stage {stage} ({peer_id}) closed the session", "Run it again", peer_id) from None
        except NexusError as error:
            if self._bundle:
                return  # the answer is in and verified: a stage may go
            if self.failed_stage is None:
                self.failed_stage = stage
            raise _at_stage(error, stage, peer_id) from error

    def _open(self, stage: int) -> Open:
        stages = self._plan.stages
        following = stages[(stage + 1) % len(stages)].node
        return Open(
            stage=stage,
            model_name=self._model_name,
            plan=self._plan,
            terms=self._terms,
            request=self._machine.requests[stage],
            next=self._known_peer(following),
            sources=tuple(self._known_peer(node) for node in sorted(self._known))[:32],
        )

    def _known_peer(self, node: bytes) -> KnownPeer:
        address = self._known.get(node)
        return KnownPeer(node, address.addresses[:ADDRESSES_MAX] if address else ())

    async def _take(self, stage: int, message: Record) -> None:
        last = stage == len(self._plan.stages) - 1
        match message:
            case Alive():
                return
            case OpenProgress(phase, done, total):
                await self._emit(StageProgress(stage, phase, done, total))
            case Accepted():
                # In a task of its own: whoever feeds may have to wait until somebody reads the results.
                self._nursery.start_soon(self._feed, self._machine.accepted(stage))
            case Output(step, payload) if last:
                for action in self._machine.output(step, payload):
                    if isinstance(action, Result):
                        await self._emit(action)
            case OwnReceipt(receipt):
                self._conclude(self._machine.receipt(stage, receipt))
            case Done() if last:
                self._conclude(self._machine.done())
            case Report(steps, receipts_signed, compute_us):
                self._reports[stage] = StageReport(steps, receipts_signed, compute_us / 1e6)
            case Failed(signed):
                refusal = signed.verify()
                if refusal.node != self._plan.stages[stage].node or refusal.session != self._terms.session:
                    raise VerificationError("a refusal came that is not this stage's")
                if refusal.code == UnreachableError.code:
                    # Second-hand: the neighbour that broke off may be about to say why.
                    await trio.sleep(SECOND_HAND_WAIT_S)
                raise REFUSALS.get(refusal.code, RefusedError)(refusal.cause, refusal.fix)
            case _:
                raise MalformedError(f"{type(message).__name__} is not for the coordinator")
        if self._machine.is_done and all(self._reports) and not self._bundle:
            raise VerificationError("the stages ended the session and owe receipts")
        if not self._bundle:
            self._quiet.deadline = trio.current_time() + STEP_TIMEOUT_S
        if self._bundle and all(self._reports):
            self._reported.set()

    def _conclude(self, actions: list[CoordinatorAction]) -> None:
        for action in actions:
            if isinstance(action, Verified):
                self._bundle = action.bundle
                self._quiet.deadline = trio.current_time() + REPORT_TIMEOUT_S  # once: more reports do not put it off

    async def _feed(self, actions: list[CoordinatorAction]) -> None:
        for action in actions:
            match action:
                case Feed(step, payload):
                    await self._send_first(FeedInput(step, payload))
                case AskFinish():
                    await self._send_first(Finish())

    async def _send_first(self, message: FeedInput | Finish) -> None:
        stream = self._streams[0]
        assert stream is not None
        with trio.move_on_after(LINK_TIMEOUT_S) as scope:
            await stream.send(INFER_MESSAGES.pack(message))
        if scope.cancelled_caught:
            raise TimedOutError(f"stage 0 took nothing for {LINK_TIMEOUT_S:.0f} s")


def stage_kv_bytes(manifest: Manifest, plan: Plan, stage: int) -> int:
    """KV cache of one token on one stage, in bytes."""
    layers = plan.stages[stage]
    return manifest.kv_bytes * (layers.end - layers.start)


def _address(peer: KnownPeer) -> PeerAddress:
    return PeerAddress(peer_id_of(peer.node), peer.addresses)


def _first_message(messages: MessageSet, frame: bytes, stream: Stream) -> Record:
    """Of a stream from a stranger: garbage counts against it."""
    try:
        return messages.unpack(frame)
    except MalformedError as error:
        raise _blame(error, stream.peer_id) from error


def _blame(error: NexusError, peer_id: str) -> NexusError:
    if isinstance(error, PeerError) and not error.peer:
        error.peer = peer_id
    return error


def _at_stage(error: NexusError, stage: int, peer_id: str) -> NexusError:
    """The same kind of error, with the stage named."""
    cause = f"stage {stage} ({peer_id}): {error.cause}"
    fix = error.fix or "Run it again; `nexus model plan` shows who is in the chain"
    return type(error)(cause, fix)


def _first_cause(group: BaseExceptionGroup[NexusError]) -> NexusError:
    """The error to show of those that ended a session: a stage's own words before the silence that they caused elsewhere."""
    return min(_errors_in(group), key=lambda error: isinstance(error, UnreachableError | TimedOutError))


def _errors_in(group: BaseExceptionGroup[NexusError]) -> Iterator[NexusError]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _errors_in(error)
        else:
            yield error
