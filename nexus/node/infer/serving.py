"""A stage's end of the inference protocols: `InferService` answers both, one `_Served` per live session."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
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
    TimedOutError,
    UnreachableError,
    VerificationError,
)
from nexus.core.keys import Identity, peer_id_of
from nexus.core.manifest import CAUSAL, EXACT, Manifest
from nexus.core.plan import Plan
from nexus.core.record import Record
from nexus.network.transport import PeerAddress, Stream, Transport
from nexus.node.batching import Batcher, Outcome
from nexus.node.cheating import HONEST, Conduct
from nexus.node.environment import SYSTEM
from nexus.node.infer.messages import (
    INFER,
    INFER_MESSAGES,
    LINK,
    LINK_MESSAGES,
    LINK_TIMEOUT_S,
    OPEN_TIMEOUT_S,
    Accepted,
    Alive,
    Done,
    Failed,
    FeedInput,
    Finish,
    Hello,
    Open,
    OpenProgress,
    Output,
    OwnReceipt,
    OwnTrace,
    ParentReceipt,
    Push,
    Report,
    address_of,
    blame,
    first_cause,
    first_message,
)
from nexus.node.live import Live
from nexus.node.signing import Signer
from nexus.proof.bundle import check_request
from nexus.proof.receipts import Refusal, SignedRefusal
from nexus.proof.trace import Sealed
from nexus.storage.sessions import ServedSession, Window
from nexus.swarm.session import (
    Close,
    Compute,
    Seal,
    SendDone,
    SendFinish,
    SendOutput,
    SendReceipt,
    SendStep,
    ShowParent,
    ShowReceipt,
    ShowTrace,
    Sign,
    StageAction,
    commits,
)

if TYPE_CHECKING:
    from nexus.engine.stage import Stage

log = structlog.get_logger("nexus.infer")

ALIVE_EVERY_S = 1.0
SESSION_IDLE_S = 300.0
INLINE_STEP_S = 0.002
# Traces that are closed on the trio thread: those of 16 steps of 12 layers take half a millisecond.
INLINE_SEAL_BYTES = 40_000
# For so long after a session a stage is a witness of what happened in it.
RECENT_S = 900.0
RECENT_MAX = 4096


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
    """Serves stages. `signer`: makes receipts durable and signs them. `may_open`: raises NotAllowedError for a node, by its public
    key, that this one has nothing to do with; asked about the coordinator and every node of the plan. `conduct`: see
    `nexus.node.cheating`."""

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        source: StageSource,
        signer: Signer,
        *,
        serve: bool,
        sessions_max: int,
        may_open: Callable[[bytes], None] = lambda public_key: None,
        note_served: Callable[[bytes, int, int], None] = lambda coordinator, layers, tokens: None,
        inline_step_s: float = INLINE_STEP_S,
        conduct: Conduct = HONEST,
        perf_counter: Callable[[], float] = SYSTEM.perf_counter,
    ) -> None:
        self._transport = transport
        self._identity = identity
        self._source = source
        self._signer = signer
        self._may_open = may_open
        self._note_served = note_served
        self._conduct = conduct
        self._serve = serve
        self._sessions_max = sessions_max
        self._served: dict[tuple[bytes, int], _Served] = {}
        self._seats: dict[tuple[bytes, int], str] = {}  # sessions from their Open on, and whose they are
        self.live = Live()
        self._recent: OrderedDict[bytes, float] = OrderedDict()  # sessions, and when they were last served in
        self._dialling: dict[str, trio.Lock] = {}
        self._batcher = Batcher(inline_step_s, perf_counter)
        self.totals = ServedTotals()
        self.draining = False

    def start(self) -> None:
        self._transport.serve(INFER, self._answer_open)
        self._transport.serve(LINK, self._answer_link)

    def end_sessions_with(self, public_key: bytes, error: NexusError) -> int:
        """End the sessions in which this node takes part as the coordinator or as a stage, for this reason. Returns how many."""
        ended = [served for served in self._served.values() if public_key in served.nodes]
        for served in ended:
            served.fail(error)
        return len(ended)

    @property
    def seats(self) -> int:
        """Sessions that have a place here, from the moment that they are asked for."""
        return len(self._seats)

    def hand_over(self) -> int:
        """End the sessions that others coordinate because this node leaves: they go on over other nodes, from the last window that
        was signed. How many. Those in floating point run to their end here: on another node they may come out otherwise."""
        own = self._identity.public_key
        ended = [served for served in self._served.values() if served.may_move and served.coordinator != own]
        for served in ended:
            served.fail(NotAllowedError("this node is leaving", "Go on without it"))
        return len(ended)

    def sessions_on(self, model_root: bytes) -> int:
        """Stages of that model that run here now."""
        return sum(served.model_root == model_root for served in self._served.values())

    def partners(self) -> set[bytes]:
        """The nodes of all sessions that run here, by public key."""
        return {node for served in self._served.values() for node in served.nodes}

    def took_part(self, session: bytes) -> bool:
        """Whether this node served in that session, now or a short while ago."""
        return trio.current_time() - self._recent.get(session, -math.inf) <= RECENT_S

    def _note_recent(self, session: bytes) -> None:
        self._recent[session] = trio.current_time()
        self._recent.move_to_end(session)
        if len(self._recent) > RECENT_MAX:
            self._recent.popitem(last=False)

    def check_nodes(self, opened: Open) -> None:
        """Whether this node works for and with all of these. Raises NotAllowedError."""
        self._may_open(opened.terms.coordinator)
        for stage in opened.plan.stages:
            self._may_open(stage.node)

    async def _answer_open(self, control: Stream) -> None:
        with trio.move_on_after(OPEN_TIMEOUT_S) as scope:
            first = await control.receive()
        if scope.cancelled_caught:
            raise TimedOutError("the coordinator opened a stream and sent nothing")
        message = first_message(INFER_MESSAGES, first, control)
        if not isinstance(message, Open):
            raise MalformedError("a session begins with Open", peer=control.peer_id)
        served: _Served | None = None
        failure: NexusError | None = None
        try:
            async with alive(control):
                with self._seat(control.peer_id, message):
                    manifest = await self._admit(control, message)
                    self._note_recent(message.terms.session)
                    async with self._hold_stage(control, message, manifest) as stage:
                        served = _Served(self, control, message, manifest, stage)
                        with self.live.one():
                            await served.run()
        except* NexusError as group:  # may come with Cancelled beside it when the node stops: that goes on its way
            failure = first_cause(group)
        if served:
            self._note_recent(message.terms.session)
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
        self.check_nodes(message)
        if peer_id_of(message.terms.coordinator) != control.peer_id:
            raise VerificationError("the session's terms name another coordinator than the peer that sent them")
        stages = message.plan.stages
        if not 0 <= stage < len(stages) or stages[stage].node != self._identity.public_key:
            raise VerificationError(f"the plan does not name this node for stage {stage}")
        following = stages[(stage + 1) % len(stages)].node
        if message.next.node != following:
            raise VerificationError("the next peer named is not the plan's next stage")
        check_request(message.request, message.terms, message.plan, stage)
        manifest = await self._source.manifest(message.plan.model_root, [address_of(peer) for peer in message.sources])
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

        sources = [address_of(peer) for peer in message.sources]
        async with AsyncExitStack() as stack:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch)
                stage = await stack.enter_async_context(
                    self._source.stage(manifest, layers.start, layers.end, message.plan.dtype, sources, tell)
                )
                nursery.cancel_scope.cancel()
            yield stage

    async def _refuse(self, control: Stream, message: Open, step: int, error: NexusError) -> None:
        cause, fix = error.cause[:500], error.fix[:500]
        if isinstance(error, LocalError) and control.peer_id != self._transport.peer_id:
            # Of this machine's disk and paths the log tells its owner, and nobody else.
            cause, fix = "this node failed inside", "Plan without it; its owner's log says more"
        refusal = Refusal(message.terms.session, self._identity.public_key, message.stage, step, error.code, cause, fix)
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
        hello = first_message(LINK_MESSAGES, first, link)
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

    async def seal(self, stage: Stage, session: bytes, n: int) -> Sealed:
        """Close a session's trace over its oldest `n` steps: a hash per step, layer and operation, of many on a thread."""
        # Only exact stages seal: what they take to import is there when one is loaded.
        from nexus.engine.exact.commit import sealed

        def close() -> Sealed:
            return sealed(stage.seal(session, n), stage.trace_shape, n)

        if n * stage.trace_shape.step_bytes <= INLINE_SEAL_BYTES:
            return close()
        return await trio.to_thread.run_sync(close)


class _Served:
    """One session on this node. Every event is handled to the end, under a lock, before the next one is looked at."""

    def __init__(self, service: InferService, control: Stream, opened: Open, manifest: Manifest, stage: Stage) -> None:
        self._service = service
        self._control = control
        self._opened = opened
        self._manifest = manifest
        conduct = service._conduct
        self._stage = conduct.stage(opened, manifest, stage)
        self._session = opened.terms.session
        self._machine = conduct.machine(opened, manifest, service._identity.public_key)
        self._signer = conduct.signer(opened, service._signer)
        self._asked = ServedSession(opened.stage, opened.model_name, opened.plan, opened.terms, opened.request)
        self._unsigned: list[bytes] = []  # inputs of the open window
        self._tokens = 0  # that are to be paid for: of the steps that were signed, or of all where nothing is to be signed
        self._turn = trio.Condition()
        self._link_out: Stream | None = None
        self._link_in_taken = False
        self._over = trio.Event()
        self._failure: NexusError | None = None
        self._link_scope = trio.CancelScope()
        self._idle = trio.move_on_after(SESSION_IDLE_S)
        self._compute_s = 0.0
        self._token_s: float | None = None  # what a step of one token takes lately
        self._token_kv_bytes = _kv_bytes(manifest, opened.plan, opened.stage)
        self.nodes = frozenset({opened.terms.coordinator, *(stage.node for stage in opened.plan.stages)})
        self.model_root = opened.plan.model_root
        self.coordinator = opened.terms.coordinator
        self.may_move = manifest.profile == EXACT
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
        self._stage.open(self._session, sampling, commit=commits(plan, terms))
        service._served[key] = self
        service.totals.sessions += 1
        try:
            service.check_nodes(self._opened)  # standing may have changed while the stage was loaded
            await self._control.send(INFER_MESSAGES.pack(Accepted()))
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._read_control)
                nursery.start_soon(self._watch)
                await self._over.wait()
                nursery.cancel_scope.cancel()
        finally:
            del service._served[key]
            layers = plan.stages[self._opened.stage]
            service._note_served(terms.coordinator, layers.end - layers.start, self._tokens)
            self._link_scope.cancel()
            with trio.CancelScope(shield=True):
                # Who holds the lock is cancelled by now, but for the engine: it may still write to the cache of this session, which
                # must not be another's by then.
                async with self._turn:
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
        following = address_of(self._opened.next)
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
        self.fail(TimedOutError(f"nothing came for {SESSION_IDLE_S:.0f} s, so the session's cache was evicted", "Run it again"))

    def fail(self, error: NexusError) -> None:
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
            self.fail(UnreachableError("the coordinator ended the session"))
        except NexusError as error:
            self.fail(error)

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
                self.fail(UnreachableError(f"stage {self._machine.before} closed its link", peer=link.peer_id))
        except NexusError as error:
            self.fail(blame(error, link.peer_id))

    async def _handle(self, event: Callable[[], list[StageAction]]) -> None:
        self._idle.deadline = trio.current_time() + SESSION_IDLE_S
        async with self._turn:
            while self._machine.holds and not self._over.is_set():
                await self._turn.wait()  # until the disk has the receipt
            await self._act_on(event)

    async def _sign(self, window: Window) -> None:
        """Beside the steps that follow: a disk takes its time."""
        try:
            own = await self._signer.sign(window)
            async with self._turn:
                await self._act_on(partial(self._machine.signed, own))
                self._turn.notify_all()
        except NexusError as error:
            self.fail(error)

    async def _act_on(self, event: Callable[[], list[StageAction]]) -> None:
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
                case Seal(n):
                    sealed = await self._service.seal(self._stage, self._session, n)
                    await self._perform(self._machine.sealed(sealed))
                case Sign(receipt):
                    inputs, self._unsigned = self._unsigned[: receipt.n], self._unsigned[receipt.n :]
                    self._tokens += sum(map(len, inputs)) // self._stage.input_size(1)
                    self._nursery.start_soon(self._sign, Window(self._asked, receipt, tuple(inputs)))
                case SendStep(step, payload):
                    await self._send_link(Push(step, payload))
                case SendReceipt(own):
                    await self._send_link(OwnReceipt(own))
                case SendFinish():
                    await self._send_link(Finish())
                case SendOutput(step, payload):
                    await self._send_control(Output(step, payload))
                case ShowTrace(trace):
                    await self._send_control(OwnTrace(trace))
                case ShowParent(parent):
                    await self._send_control(ParentReceipt(parent))
                case ShowReceipt(own):
                    await self._send_control(OwnReceipt(own))
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
        if self._opened.terms.window:
            self._unsigned.append(payload)
        else:
            self._tokens += len(payload) // self._stage.input_size(1)
        await self._perform(self._machine.computed(step, outcome.output))

    async def _send_link(self, message: Push | OwnReceipt | Finish) -> None:
        with trio.move_on_after(LINK_TIMEOUT_S) as scope:
            if self._link_out is None:
                following = address_of(self._opened.next)
                self._link_out = await self._service._transport.open_stream(following.peer_id, LINK)
                stage = (self._opened.stage + 1) % len(self._opened.plan.stages)
                await self._link_out.send(LINK_MESSAGES.pack(Hello(self._session, stage)))
            for sent in self._service._conduct.send(self._opened, message, to_coordinator=False):
                await self._link_out.send(LINK_MESSAGES.pack(sent))
        if scope.cancelled_caught:
            raise TimedOutError(f"the next stage took nothing for {LINK_TIMEOUT_S:.0f} s", "It may be overloaded or gone")

    async def _send_control(self, message: Record) -> None:
        with trio.move_on_after(LINK_TIMEOUT_S) as scope:
            for sent in self._service._conduct.send(self._opened, message, to_coordinator=True):
                await self._control.send(INFER_MESSAGES.pack(sent))
        if scope.cancelled_caught:
            raise TimedOutError(f"the coordinator took nothing for {LINK_TIMEOUT_S:.0f} s")


def _kv_bytes(manifest: Manifest, plan: Plan, stage: int) -> int:
    """KV cache of one token on one stage."""
    layers = plan.stages[stage]
    return manifest.kv_bytes * (layers.end - layers.start)
