"""The asker's end of the inference protocol: one session over the stages of a plan."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import trio

from nexus.core.errors import (
    MalformedError,
    NexusError,
    PeerError,
    RefusedError,
    TimedOutError,
    UnreachableError,
    VerificationError,
)
from nexus.core.keys import Identity, peer_id_of
from nexus.core.manifest import CAUSAL, Manifest
from nexus.core.plan import Plan
from nexus.core.record import Record
from nexus.network.transport import PeerAddress, Stream, Transport
from nexus.node.infer.messages import (
    ADDRESSES_MAX,
    INFER,
    INFER_MESSAGES,
    LINK_TIMEOUT_S,
    REFUSALS,
    Accepted,
    Alive,
    Done,
    Failed,
    FeedInput,
    Finish,
    KnownPeer,
    Open,
    OpenProgress,
    Output,
    OwnReceipt,
    OwnTrace,
    ParentReceipt,
    Report,
    at_stage,
    first_cause,
)
from nexus.proof.bundle import Bundle
from nexus.proof.evidence import Evidence
from nexus.proof.receipts import Terms
from nexus.proof.trace import TraceShape, WindowTrace
from nexus.swarm.session import AskFinish, CoordinatorAction, CoordinatorSession, Feed, Result, SignedWindow, Verified

# Five signs of life missed: a stopped process is noticed, a busy one is not taken for it.
SILENCE_MAX_S = 5.0
# Until a stage is reached and has the request; it then gives signs of life, however long it loads.
REACH_TIMEOUT_S = 8.0
# A stage that is alive may read a long prompt for minutes.
STEP_TIMEOUT_S = 600.0
REPORT_TIMEOUT_S = 2.0
CLOSE_TIMEOUT_S = 1.0
SECOND_HAND_WAIT_S = 0.5
# What a stage refuses with when something that it was given does not hold.
_SAID_OF_NEIGHBOUR = (VerificationError.code, MalformedError.code)


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
    """The session is over and `bundle` verifies. `reports`: what each stage says it did, where it said so in time. `traces`: of
    every stage the hashes behind each of its receipts, checked; none in the float profile."""

    bundle: Bundle
    receipts_verified: int
    reports: tuple[StageReport | None, ...]
    traces: tuple[tuple[WindowTrace, ...], ...]


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
        shapes: Sequence[TraceShape] = (),
    ) -> None:
        """`inputs`: the prompt's token ids, or those of every text. `known`: by public key, where nodes were last seen.
        `shapes`: what each stage's traces look like; none in the float profile, or where the terms ask for no receipts."""
        self._transport = transport
        self._plan = plan
        self.terms = terms
        self._model_name = model_name
        self._manifest = manifest
        self._known = known
        self._machine = CoordinatorSession(identity, model_name, manifest, plan, terms, inputs, shapes)
        self._streams: list[Stream | None] = [None] * len(plan.stages)
        self._reports: list[StageReport | None] = [None] * len(plan.stages)
        self._bundle: Bundle | None = None
        self._traces: tuple[tuple[WindowTrace, ...], ...] = ()
        self._unwanted: NexusError | None = None
        self._is_unwanted = trio.Event()
        self._quiet = trio.CancelScope()
        self.session = terms.session
        self.failed_stage: int | None = None
        # Of these stages one is at fault: two, where a stage says that the one before it broke the rules, for it may be lying.
        self.suspects: frozenset[int] = frozenset()
        self._reported = trio.Event()
        self._received = trio.Event()  # a receipt; another one waits for the next

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
                nursery.start_soon(self._watch_nodes)
                await self._reported.wait()
                nursery.cancel_scope.cancel()
        except* NexusError as group:
            failure = first_cause(group)
        finally:
            with trio.move_on_after(CLOSE_TIMEOUT_S) as scope:
                scope.shield = True
                # Side by side: one that is gone keeps neither the others nor whoever waits to go on without it.
                async with trio.open_nursery() as nursery:
                    for stream in self._streams:
                        if stream:
                            nursery.start_soon(stream.close if self._bundle else stream.reset)
        if failure:
            raise failure
        assert self._bundle is not None
        await emit(Ended(self._bundle, self._machine.receipts_verified, tuple(self._reports), self._traces))

    @property
    def nodes(self) -> frozenset[bytes]:
        """Of its plan, by public key."""
        return frozenset(stage.node for stage in self._plan.stages)

    def end_with(self, public_key: bytes, error: NexusError) -> bool:
        """If this node is a stage of the session, end it for this reason: `run` raises it, with `failed_stage` set. An answer
        that is verified already stands. Returns whether it is a stage."""
        stage = next((number for number, stage in enumerate(self._plan.stages) if stage.node == public_key), None)
        if stage is None or self._is_unwanted.is_set():
            return stage is not None
        self.failed_stage, self.suspects = stage, frozenset({stage})
        self._unwanted = at_stage(error, stage, peer_id_of(public_key))
        self._is_unwanted.set()
        return True

    @property
    def evidence(self) -> Sequence[Evidence]:
        """What convicts a stage by its receipts alone, if the session ended over it."""
        return self._machine.evidence

    def so_far(self) -> Ended | None:
        """Of a session that broke off, what stands: see `CoordinatorSession.so_far`."""
        proof = self._machine.so_far()
        if proof is None:
            return None
        return Ended(proof.bundle, len(proof.bundle.receipts), tuple(self._reports), proof.traces)

    def windows(self, first: int) -> list[SignedWindow]:
        """What every stage has signed for, from that window on."""
        return self._machine.windows(first)

    @property
    def header(self) -> Bundle:
        """The proof of the session without what its stages did."""
        return self._machine.header

    async def _watch_nodes(self) -> None:
        await self._is_unwanted.wait()
        if self._unwanted and not self._bundle:
            raise self._unwanted

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
            with trio.move_on_after(REACH_TIMEOUT_S) as scope:
                address = self._known.get(self._plan.stages[stage].node)
                if address:
                    self._transport.learn(address)
                stream = self._streams[stage] = await self._transport.open_stream(peer_id, INFER)
                await stream.send(INFER_MESSAGES.pack(self._open(stage)))
            if scope.cancelled_caught:
                raise TimedOutError(f"stage {stage} ({peer_id}) did not take the session within {REACH_TIMEOUT_S:.0f} s")
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
            # What a stage signed may be found wrong while another one is heard.
            at_fault = next((n for n, one in enumerate(self._plan.stages) if _is_by(error, one.node)), stage)
            if self.failed_stage is None:
                self.failed_stage, self.suspects = at_fault, self.suspects | {at_fault}
            raise at_stage(error, at_fault, peer_id_of(self._plan.stages[at_fault].node)) from error

    def _open(self, stage: int) -> Open:
        stages = self._plan.stages
        following = stages[(stage + 1) % len(stages)].node
        return Open(
            stage=stage,
            model_name=self._model_name,
            plan=self._plan,
            terms=self.terms,
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
                await self._in_turn(stage, step)
                for action in self._machine.output(step, payload):
                    if isinstance(action, Result):
                        await self._emit(action)
            case OwnTrace(trace):
                self._machine.trace(stage, trace)
            case ParentReceipt(receipt):
                self._machine.parent(stage, receipt)
            case OwnReceipt(receipt):
                await self._in_turn(stage)
                self._conclude(self._machine.receipt(stage, receipt))
                self._received.set()
                self._received = trio.Event()
            case Done() if last:
                self._conclude(self._machine.done())
            case Report(steps, receipts_signed, compute_us):
                self._reports[stage] = StageReport(steps, receipts_signed, compute_us / 1e6)
            case Failed(signed):
                refusal = signed.verify()
                if refusal.node != self._plan.stages[stage].node or refusal.session != self.terms.session:
                    raise VerificationError("a refusal came that is not this stage's")
                if refusal.code == UnreachableError.code:
                    # Second-hand: the neighbour that broke off may be about to say why.
                    await trio.sleep(SECOND_HAND_WAIT_S)
                if refusal.code in _SAID_OF_NEIGHBOUR and (stage or self._manifest.kind == CAUSAL) and self.failed_stage is None:
                    self.suspects = frozenset({(stage - 1) % len(self._plan.stages)})
                raise REFUSALS.get(refusal.code, RefusedError)(refusal.cause, refusal.fix)
            case _:
                raise MalformedError(f"{type(message).__name__} is not for the coordinator")
        if self._machine.is_done and all(self._reports) and not self._bundle:
            raise VerificationError("the stages ended the session and owe receipts")
        if not self._bundle:
            self._quiet.deadline = trio.current_time() + STEP_TIMEOUT_S
        if self._bundle and all(self._reports):
            self._reported.set()

    async def _in_turn(self, stage: int, step: int | None = None) -> None:
        """Until the streams of the other stages have caught up with this one."""
        while self._machine.is_ahead(stage, step):
            await self._received.wait()

    def _conclude(self, actions: list[CoordinatorAction]) -> None:
        for action in actions:
            if isinstance(action, Verified):
                self._bundle, self._traces = action.bundle, action.traces
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


def _is_by(error: NexusError, public_key: bytes) -> bool:
    return isinstance(error, PeerError) and error.peer == peer_id_of(public_key)
