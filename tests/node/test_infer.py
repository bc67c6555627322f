"""Sessions over a network in memory, with arithmetic that needs no model: the protocol, its refusals and its failures."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, ClassVar

import pytest
import trio

from nexus.core.errors import (
    CapacityError,
    LocalError,
    NexusError,
    NotAllowedError,
    NotFoundError,
    PeerError,
    RefusedError,
    TimedOutError,
    UnreachableError,
    VerificationError,
)
from nexus.core.hashing import leaf_hash
from nexus.core.keys import peer_id_of
from nexus.core.manifest import CAUSAL, ENCODER, EXACT, FLOAT, Manifest
from nexus.core.plan import Plan
from nexus.core.record import Record
from nexus.network import simulated
from nexus.network.simulated import SimulatedNetwork
from nexus.network.transport import PeerAddress, Transport
from nexus.node.batching import Outcome
from nexus.node.cheating import HONEST, Conduct, Honest
from nexus.node.infer.coordinator import Coordinator, Ended, SessionEvent
from nexus.node.infer.messages import INFER, INFER_MESSAGES, LINK, LINK_MESSAGES, Failed, Hello, Open, OwnReceipt, OwnTrace
from nexus.node.infer.serving import INLINE_STEP_S, InferService
from nexus.node.signing import DurableSigner, Signer
from nexus.proof.bundle import verify_bundle
from nexus.proof.receipts import SignedReceipt, Terms, payload_root, tokens_to_bytes
from nexus.proof.trace import WindowTrace, check_trace
from nexus.storage.sessions import SessionStore, Window
from nexus.swarm.session import Result, StageSession
from tests.swarm.ring import identity, manifest, plan_for, shapes_for, terms_for, toy_compute, toy_seal

if TYPE_CHECKING:
    from nexus.engine.stage import Stage


class ToyStage:
    """Bytes of the right length, and whatever a test wants to happen before them."""

    chunked = False

    def __init__(self, model: Manifest, plan: Plan, stage: int, before: Callable[[int], None]) -> None:
        self._number = stage
        self._sealed: dict[bytes, int] = {}
        if model.profile == EXACT:
            self.trace_shape = shapes_for(model, plan)[stage]
        self._compute = lambda payload: toy_compute(model, plan, stage, 0, payload)
        self._before = before
        self.sessions: dict[bytes, int] = {}
        self.weight_bytes = 0
        self._width = 4 if stage == 0 else 4 * model.hidden_size

    def input_size(self, tokens: int) -> int:
        return tokens * self._width

    def open(self, session: bytes, sampling: object, commit: bool) -> None:
        self.sessions[session] = 0
        if commit:
            self._sealed[session] = 0

    def seal(self, session: bytes, steps: int) -> WindowTrace:
        step0 = self._sealed[session]
        self._sealed[session] += steps
        assert self._sealed[session] <= self.sessions[session]
        return toy_seal(self.trace_shape, self._number, step0, steps).trace

    def close(self, session: bytes) -> None:
        del self.sessions[session]
        self._sealed.pop(session, None)

    def step(self, session: bytes, payload: bytes) -> bytes:
        self._before(self.sessions[session])
        self.sessions[session] += 1
        return self._compute(payload)


class ToyBatchStage(ToyStage):
    """Takes prompts in parts and several sessions at a time. `turns`: how many sessions each had, and how many were not through."""

    chunked = causal = True

    def __init__(self, model: Manifest, plan: Plan, stage: int, before: Callable[[int], None]) -> None:
        super().__init__(model, plan, stage, before)
        self._last = stage == len(plan.stages) - 1
        self.turns: list[tuple[int, int]] = []

    def step_many(self, steps: Sequence[tuple[bytes, bytes]], more: Sequence[bool] = ()) -> list[bytes | NexusError]:
        self.turns.append((len(steps), sum(more)))
        parts = more or [False] * len(steps)
        return [
            b"" if part and self._last else self.step(session, payload)
            for (session, payload), part in zip(steps, parts, strict=True)
        ]


@dataclass
class ToySource:
    model: Manifest
    plan: Plan
    stage_number: int
    before: Callable[[int], None] = lambda _: None
    kv_limit: int = 1 << 30
    kv: dict[bytes, int] = field(default_factory=dict)
    loaded: ToyStage | None = None
    stage_type: type[ToyStage] = ToyStage

    async def manifest(self, model_root: bytes, sources: Sequence[PeerAddress]) -> Manifest:
        assert model_root == self.model.root
        return self.model

    @asynccontextmanager
    async def stage(self, manifest, start, end, dtype, sources, progress) -> AsyncIterator[ToyStage]:  # type: ignore[no-untyped-def]
        await progress("loading", 0, 0)
        self.loaded = self.loaded or self.stage_type(self.model, self.plan, self.stage_number, self.before)
        yield self.loaded

    def reserve_kv(self, session: bytes, n_bytes: int) -> None:
        if n_bytes > self.kv_limit:
            raise CapacityError("the KV cache is full", "Wait")
        self.kv[session] = n_bytes
        if not n_bytes:
            del self.kv[session]


@dataclass
class Swarm:
    """`stages` nodes and a coordinator of its own on a simulated network."""

    network: SimulatedNetwork
    model: Manifest
    plan: Plan
    transport: Transport
    transports: list[Transport]
    services: list[InferService]
    stores: list[SessionStore]
    sources: list[ToySource]

    def coordinator(self, inputs: Sequence[bytes], terms: Terms) -> Coordinator:
        known = {
            stage.node: PeerAddress(transport.peer_id, transport.addresses)
            for stage, transport in zip(self.plan.stages, self.transports, strict=True)
        }
        shapes = shapes_for(self.model, self.plan) if terms.window else []
        return Coordinator(self.transport, identity(0), "toy", self.model, self.plan, terms, inputs, known, shapes)

    async def run(self, steps_max: int, prompt: Sequence[int] = (5, 6, 7)) -> tuple[list[SessionEvent], Ended]:
        inputs = [tokens_to_bytes(prompt)]
        return await self.collect(self.coordinator(inputs, terms_for(self.model, self.plan, inputs, steps_max)))

    async def collect(self, coordinator: Coordinator) -> tuple[list[SessionEvent], Ended]:
        events: list[SessionEvent] = []

        async def emit(event: SessionEvent) -> None:
            events.append(event)

        with trio.fail_after(30):
            await coordinator.run(emit)
        assert isinstance(events[-1], Ended)
        return events, events[-1]


@asynccontextmanager
async def swarm(
    stages: int,
    kind: str = CAUSAL,
    sessions_max: int = 8,
    before: Callable[[int, int], None] | None = None,
    stage_type: type[ToyStage] = ToyStage,
    profile: str = FLOAT,
    may_open: Callable[[bytes], None] = lambda _: None,
    conducts: Mapping[int, Conduct] | None = None,
) -> AsyncIterator[Swarm]:
    """`conducts`: of the stages that are not honest."""
    model = manifest(kind, profile=profile)
    plan = plan_for(model, stages)
    network = SimulatedNetwork(1, delay_s=(0.0, 0.001))
    async with AsyncExitStack() as stack:
        transport = await stack.enter_async_context(network.open(identity(0)))
        directory = Path(stack.enter_context(TemporaryDirectory()))
        transports, services, stores, sources = [], [], [], []
        for stage in range(stages):
            node = await stack.enter_async_context(network.open(identity(stage + 1)))
            hook = (lambda step, stage=stage: before(stage, step)) if before else (lambda _: None)
            # What blocks in `before` must do so on a thread.
            inline_step_s = 0.0 if before else INLINE_STEP_S
            source = ToySource(model, plan, stage, hook, stage_type=stage_type)
            store = SessionStore(directory / f"{stage}.db", keep_max_bytes=1 << 30, keep_s=1e6, now_ms=lambda: 1)
            stack.callback(store.close)
            service = InferService(
                node,
                identity(stage + 1),
                source,
                DurableSigner(identity(stage + 1), store),
                serve=True,
                sessions_max=sessions_max,
                may_open=may_open,
                inline_step_s=inline_step_s,
                conduct=(conducts or {}).get(stage, HONEST),
            )
            service.start()
            transports.append(node)
            services.append(service)
            stores.append(store)
            sources.append(source)
        yield Swarm(network, model, plan, transport, transports, services, stores, sources)


@pytest.mark.parametrize("stages", [1, 2, 3, 8])
@pytest.mark.parametrize("steps", [1, 16, 37])
async def test_a_session_runs_and_its_bundle_verifies(stages: int, steps: int) -> None:
    async with swarm(stages) as nodes:
        events, ended = await nodes.run(steps)
        results = [event for event in events if isinstance(event, Result)]
        assert [result.step for result in results] == list(range(steps))
        report = verify_bundle(ended.bundle)
        assert report.steps == steps
        assert report.receipts == ended.receipts_verified == stages * -(-steps // 16)
        assert all(r is not None and r.steps == steps for r in ended.reports)
        assert [service.live.count for service in nodes.services] == [0] * stages
        assert all(not source.kv and source.loaded and not source.loaded.sessions for source in nodes.sources)


@pytest.mark.parametrize("kind", [CAUSAL, ENCODER])
@pytest.mark.parametrize("stages", [1, 3])
async def test_an_exact_session_commits_and_is_kept_before_anybody_sees_it(stages: int, kind: str) -> None:
    """What the asker gets of each stage, the stage has on its disk, with all that it needs to show its work."""
    async with swarm(stages, kind, profile=EXACT, stage_type=ToyBatchStage if kind == CAUSAL else ToyStage) as nodes:
        inputs = [tokens_to_bytes(range(1, 4))] if kind == CAUSAL else [tokens_to_bytes([n + 1, 2]) for n in range(37)]
        terms = terms_for(nodes.model, nodes.plan, inputs, 37)
        _, ended = await nodes.collect(nodes.coordinator(inputs, terms))
        assert verify_bundle(ended.bundle).steps == 37
        shapes = shapes_for(nodes.model, nodes.plan)
        for stage, store in enumerate(nodes.stores):
            receipts = [signed.receipt for signed in ended.bundle.receipts if signed.receipt.stage == stage]
            for receipt, trace in zip(receipts, ended.traces[stage], strict=True):
                check_trace(trace, shapes[stage], receipt.n, receipt.trace_root, receipt.kv_root)
            work = store.served(terms.session, stage)
            assert work.receipts == tuple(receipts)
            assert (work.served.terms, work.served.plan, work.served.model_name) == (terms, nodes.plan, "toy")
            for receipt in receipts:
                assert payload_root(work.inputs[receipt.step0 : receipt.step0 + receipt.n]) == receipt.in_root


@pytest.mark.parametrize("late", [0, 1, 2])
async def test_a_late_stream_is_no_stage_s_fault(late: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one stage shows comes long after what the others show of many later windows: they wait for it."""
    arrival_s = simulated._Link.arrival_s
    async with swarm(3, profile=EXACT) as nodes:
        slow = nodes.transports[late].peer_id, nodes.transport.peer_id

        def delayed(link: simulated._Link, size: int) -> float:
            return arrival_s(link, size) + (0.3 if link._ends == slow else 0.0)

        monkeypatch.setattr(simulated._Link, "arrival_s", delayed)
        inputs = [tokens_to_bytes([5, 6, 7])]
        _, ended = await nodes.collect(nodes.coordinator(inputs, terms_for(nodes.model, nodes.plan, inputs, 20, window=2)))
        assert verify_bundle(ended.bundle).receipts == 30


async def test_a_receipt_that_the_disk_has_not_taken_leaves_no_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """The session of that stage ends with the reason; the next one finds that there is space again."""
    async with swarm(3, profile=EXACT) as nodes:
        full = LocalError("the disk is full", "Free some space")
        monkeypatch.setattr(nodes.stores[1], "sign_all", lambda windows: [full] * len(windows))
        with pytest.raises(RefusedError, match=r"stage 1 .*this node failed inside") as refused:
            await nodes.run(40)
        assert "disk" not in f"{refused.value.cause} {refused.value.fix}", "strangers learn nothing of this machine"
        monkeypatch.undo()
        with trio.fail_after(5):
            while any(service.live.count for service in nodes.services):
                await trio.testing.wait_all_tasks_blocked(0.001)
        _, ended = await nodes.run(40)
        assert verify_bundle(ended.bundle).steps == 40


async def test_receipts_of_many_sessions_share_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    async with swarm(1, stage_type=ToyBatchStage, profile=EXACT) as nodes:
        sign_all, batches, go_on = nodes.stores[0].sign_all, list[int](), threading.Event()

        def slow(windows: Sequence[Window]) -> list[LocalError | None]:
            batches.append(len(windows))
            assert go_on.wait(20)
            return sign_all(windows)

        monkeypatch.setattr(nodes.stores[0], "sign_all", slow)
        async with trio.open_nursery() as nursery:
            for n in range(6):
                nursery.start_soon(nodes.run, 16, (n + 1, 2))
            with trio.fail_after(20):
                while nodes.services[0].totals.steps < 6 * 16:
                    await trio.testing.wait_all_tasks_blocked(0.001)
                await trio.testing.wait_all_tasks_blocked(0.01)
            go_on.set()
        assert sum(batches) == 6
        assert len(batches) == 2


async def test_a_session_computes_on_while_the_disk_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    async with swarm(1, profile=EXACT) as nodes:
        sign_all, go_on = nodes.stores[0].sign_all, threading.Event()

        def slow(windows: Sequence[Window]) -> list[LocalError | None]:
            assert go_on.wait(20)
            return sign_all(windows)

        monkeypatch.setattr(nodes.stores[0], "sign_all", slow)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(nodes.run, 40)
            with trio.fail_after(20):
                while nodes.services[0].totals.steps < 17:
                    await trio.testing.wait_all_tasks_blocked(0.001)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert nodes.services[0].totals.steps == 17
            go_on.set()


async def test_who_is_not_wanted_gets_no_session_and_loses_those_that_run() -> None:
    unwanted: set[bytes] = set()

    def may_open(node: bytes) -> None:
        if node in unwanted:
            raise NotAllowedError(f"{peer_id_of(node)} is slashed", "See `nexus slashed`")

    reached, go_on = trio.Event(), trio.Event()

    def before(stage: int, step: int) -> None:
        if stage == 0 and step == 5:
            trio.from_thread.run_sync(reached.set)
            trio.from_thread.run(go_on.wait)

    async with swarm(2, before=before, may_open=may_open) as nodes:
        async with trio.open_nursery() as nursery:

            async def ended_by(error: str) -> None:
                with pytest.raises(NotAllowedError, match=error):
                    await nodes.run(40)

            nursery.start_soon(ended_by, r"stage 0 .*is slashed")
            await reached.wait()
            other = nodes.plan.stages[1].node
            unwanted.add(other)
            assert nodes.services[0].end_sessions_with(identity(9).public_key, NotAllowedError("nobody")) == 0
            assert nodes.services[0].end_sessions_with(other, NotAllowedError("stage 1 is slashed")) == 1
            go_on.set()
        with pytest.raises(NotAllowedError, match="is slashed"):
            await nodes.run(4)
        unwanted.clear()
        await nodes.run(4)
        unwanted.add(identity(0).public_key)
        with pytest.raises(NotAllowedError, match="is slashed"):
            await nodes.run(4)


async def test_the_asker_ends_a_session_with_a_node_that_it_no_longer_wants() -> None:
    reached, go_on = trio.Event(), trio.Event()

    def before(stage: int, step: int) -> None:
        if stage == 1 and step == 5:
            trio.from_thread.run_sync(reached.set)
            trio.from_thread.run(go_on.wait)

    async with swarm(2, before=before) as nodes, trio.open_nursery() as nursery:
        inputs = [tokens_to_bytes([1])]
        coordinator = nodes.coordinator(inputs, terms_for(nodes.model, nodes.plan, inputs, 40))

        async def ended() -> None:
            with pytest.raises(NotAllowedError, match=r"stage 1 .*is slashed"):
                await nodes.collect(coordinator)

        nursery.start_soon(ended)
        await reached.wait()
        assert not coordinator.end_with(identity(9).public_key, NotAllowedError("no stage"))
        assert coordinator.end_with(nodes.plan.stages[1].node, NotAllowedError("it is slashed"))
        assert coordinator.failed_stage == 1
        go_on.set()


class Altering(Honest):
    """Changes what one kind of message to the coordinator says."""

    def __init__(self, change: Callable[[Record], Sequence[Record]]) -> None:
        self._change = change

    def send(self, opened: Open, message: Record, *, to_coordinator: bool) -> Sequence[Record]:
        return self._change(message) if to_coordinator else (message,)


@pytest.mark.parametrize("liar", [0, 1, 2])
@pytest.mark.parametrize("lie", ["no trace", "another trace", "trace of a float model"])
async def test_a_stage_whose_trace_does_not_fit_is_named(liar: int, lie: str) -> None:
    def change(message: Record) -> Sequence[Record]:
        if not isinstance(message, OwnTrace):
            return (message,)
        cells = message.trace.cells
        return {
            "no trace": (),
            "another trace": (OwnTrace(replace(message.trace, cells=cells[32:] + cells[:32])),),
            "trace of a float model": (OwnTrace(WindowTrace(b"", b"")),),
        }[lie]

    async with swarm(3, profile=EXACT, conducts={liar: Altering(change)}) as nodes:
        inputs = [tokens_to_bytes([1])]
        coordinator = nodes.coordinator(inputs, terms_for(nodes.model, nodes.plan, inputs, 20))
        with pytest.raises(PeerError, match=f"stage {liar} "):
            await nodes.collect(coordinator)
        assert coordinator.failed_stage == liar


async def test_a_float_stage_that_shows_a_trace_is_named() -> None:
    def change(message: Record) -> Sequence[Record]:
        return (OwnTrace(WindowTrace(b"", b"")), message) if isinstance(message, OwnReceipt) else (message,)

    async with swarm(2, conducts={1: Altering(change)}) as nodes:
        with pytest.raises(VerificationError, match=r"stage 1 .*not due"):
            await nodes.run(20)


async def test_a_cheat_may_change_every_part_of_a_stage() -> None:
    """The seam that tests/attacks stand on: who computes, what decides, who signs, what is said."""

    class Counting(Honest):
        asked: ClassVar[list[str]] = []

        def stage(self, opened: Open, manifest: Manifest, stage: Stage) -> Stage:
            self.asked.append("stage")
            return stage

        def machine(self, opened: Open, manifest: Manifest, node: bytes) -> StageSession:
            self.asked.append("machine")
            return super().machine(opened, manifest, node)

        def signer(self, opened: Open, signer: Signer) -> Signer:
            asked = self.asked

            class Forging:
                async def sign(self, window: Window) -> SignedReceipt:
                    asked.append("sign")
                    return SignedReceipt.sign(replace(window.receipt, kv_len=window.receipt.kv_len + 1), identity(2))

            return Forging()

    async with swarm(3, profile=EXACT, conducts={1: Counting()}) as nodes:
        with pytest.raises(VerificationError, match=r"stage [12]"):
            await nodes.run(20)
    assert Counting.asked == ["stage", "machine", "sign"]


@pytest.mark.parametrize("stages", [1, 3])
async def test_an_encoder_reads_many_texts_in_one_session(stages: int) -> None:
    async with swarm(stages, ENCODER) as nodes:
        inputs = [tokens_to_bytes(range(1, 3 + n % 5)) for n in range(21)]
        _, ended = await nodes.collect(nodes.coordinator(inputs, terms_for(nodes.model, nodes.plan, inputs, len(inputs))))
        assert verify_bundle(ended.bundle).steps == 21


async def test_sessions_run_side_by_side() -> None:
    async with swarm(3) as nodes, trio.open_nursery() as nursery:
        for n in range(6):
            nursery.start_soon(nodes.run, 20, (n + 1, 2, 3))


async def test_sessions_run_in_batches_and_long_prompts_in_parts() -> None:
    async with swarm(3, stage_type=ToyBatchStage) as nodes:
        async with trio.open_nursery() as nursery:
            for n in range(6):
                nursery.start_soon(nodes.run, 20, [n + 1] * (1 + 100 * n))
        for source in nodes.sources:
            assert isinstance(source.loaded, ToyBatchStage)
            assert sum(sessions - unfinished for sessions, unfinished in source.loaded.turns) == 6 * 20
            assert sum(unfinished for _, unfinished in source.loaded.turns) >= 1 + 2 + 3 + 3  # of 201, 301, 401 and 501 tokens
            assert not source.loaded.sessions


async def test_a_session_is_closed_when_the_engine_is_done_with_it() -> None:
    """The coordinator's stream closes it, the link computes for it: what is freed may be another session's at once."""
    begun, go_on = threading.Event(), threading.Event()

    def before(stage: int, step: int) -> None:
        if stage == 1 and step == 1:
            begun.set()
            assert go_on.wait(20)

    async with swarm(2, before=before) as nodes, trio.open_nursery() as nursery:
        nursery.start_soon(nodes.run, 8)
        assert await trio.to_thread.run_sync(begun.wait, 20)
        (served,) = nodes.services[1]._served.values()
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True), trio.fail_after(20):
            await served._over.wait()
            await trio.testing.wait_all_tasks_blocked()
            loaded = nodes.sources[1].loaded
            assert loaded
            assert loaded.sessions
            go_on.set()
            while nodes.services[1].live.count:
                await trio.testing.wait_all_tasks_blocked(0.001)
            assert not loaded.sessions


async def test_a_slow_session_does_not_hold_up_another() -> None:
    """One session's step blocks a compute thread until the other session is through."""
    released = trio.Event()
    slow: list[bytes] = []

    def before(stage: int, step: int) -> None:
        if stage == 0 and step == 1 and not slow:
            slow.append(b"first")
            trio.from_thread.run(released.wait)

    async with swarm(2, before=before) as nodes, trio.open_nursery() as nursery:
        nursery.start_soon(nodes.run, 4, (9, 9))
        with trio.fail_after(10):
            while not slow:
                await trio.testing.wait_all_tasks_blocked(0.001)
            await nodes.run(20)
        released.set()


async def test_a_full_node_refuses_and_says_so() -> None:
    async with swarm(2, sessions_max=0) as nodes:
        with pytest.raises(CapacityError, match=r"stage \d .*0 sessions, its limit"):
            await nodes.run(4)


async def test_a_session_that_outgrows_the_cache_ends_with_the_reason() -> None:
    async with swarm(2) as nodes:
        nodes.sources[1].kv_limit = 4 * 8 * 6
        with pytest.raises(CapacityError, match=r"stage 1 .*KV cache is full"):
            await nodes.run(40)
        with trio.fail_after(5):
            while any(service.live.count for service in nodes.services):
                await trio.testing.wait_all_tasks_blocked(0.001)
        assert all(not source.kv for source in nodes.sources)


async def test_a_fragment_that_nobody_has_is_refused_with_its_reason() -> None:
    async with swarm(3) as nodes:

        @asynccontextmanager
        async def stage(*_: object) -> AsyncIterator[ToyStage]:
            await trio.lowlevel.checkpoint()
            raise NotFoundError("nobody has layers 3 to 5", "Start a node that holds them")
            yield

        nodes.sources[1].stage = stage  # type: ignore[method-assign]
        with pytest.raises(NotFoundError, match=r"stage 1 .*nobody has layers 3 to 5"):
            await nodes.run(4)


async def test_a_draining_node_takes_nothing_new() -> None:
    async with swarm(2) as nodes:
        nodes.services[1].draining = True
        with pytest.raises(NotAllowedError, match="shutting down"):
            await nodes.run(4)


async def test_a_node_that_dies_ends_the_session_by_name() -> None:
    async def kill(nodes: Swarm, reached: trio.Event) -> None:
        await reached.wait()
        nodes.network.crash(nodes.transports[1].peer_id)

    reached = trio.Event()

    def before(stage: int, step: int) -> None:
        if stage == 2 and step == 5:
            trio.from_thread.run_sync(reached.set)

    async with swarm(3, before=before) as nodes, trio.open_nursery() as nursery:
        nursery.start_soon(kill, nodes, reached)
        with pytest.raises((UnreachableError, NexusError), match="stage"):
            await nodes.run(4000)


async def test_the_stages_let_go_when_the_coordinator_leaves() -> None:
    async with swarm(2) as nodes:
        inputs = [tokens_to_bytes([1])]
        coordinator = nodes.coordinator(inputs, terms_for(nodes.model, nodes.plan, inputs, 4000))
        scope = trio.CancelScope()

        async def emit(event: SessionEvent) -> None:
            if isinstance(event, Result) and event.step == 3:
                scope.cancel()

        with scope:
            await coordinator.run(emit)
        assert scope.cancelled_caught
        with trio.fail_after(10):
            while any(service.live.count for service in nodes.services):
                await trio.testing.wait_all_tasks_blocked(0.001)


async def test_terms_of_another_coordinator_are_refused() -> None:
    """A signed request that somebody else got hold of opens nothing."""
    async with swarm(1) as nodes:
        inputs = [tokens_to_bytes([1, 2])]
        terms = terms_for(nodes.model, nodes.plan, inputs, 4)
        coordinator = nodes.coordinator(inputs, terms)
        async with nodes.network.open(identity(7)) as thief:
            thief.learn(PeerAddress(nodes.transports[0].peer_id, nodes.transports[0].addresses))
            stream = await thief.open_stream(nodes.transports[0].peer_id, INFER)
            await stream.send(INFER_MESSAGES.pack(coordinator._open(0)))
            answer = INFER_MESSAGES.unpack(await stream.receive())
            assert isinstance(answer, Failed)
            assert answer.refusal.verify().code == VerificationError.code


async def test_a_link_from_anybody_but_the_stage_before_is_refused() -> None:
    reached = trio.Event()
    go_on = trio.Event()

    def before(stage: int, step: int) -> None:
        if stage == 0 and step == 0:
            trio.from_thread.run_sync(reached.set)
            trio.from_thread.run(go_on.wait)

    async with swarm(2, before=before) as nodes, trio.open_nursery() as nursery:
        inputs = [tokens_to_bytes([1, 2])]
        terms = terms_for(nodes.model, nodes.plan, inputs, 20)
        nursery.start_soon(nodes.collect, nodes.coordinator(inputs, terms))
        await reached.wait()
        target = nodes.transports[1]
        nodes.transport.learn(PeerAddress(target.peer_id, target.addresses))
        forged = await nodes.transport.open_stream(target.peer_id, LINK)
        await forged.send(LINK_MESSAGES.pack(Hello(terms.session, 1)))
        with pytest.raises((UnreachableError, trio.EndOfChannel)):
            await forged.receive()
        go_on.set()


async def test_a_plan_that_names_another_node_is_refused() -> None:
    async with swarm(2) as nodes:
        swapped = replace(
            nodes.plan,
            stages=tuple(
                replace(stage, node=other.node) for stage, other in zip(nodes.plan.stages, reversed(nodes.plan.stages), strict=True)
            ),
        )
        inputs = [tokens_to_bytes([1, 2])]
        terms = replace(terms_for(nodes.model, nodes.plan, inputs, 4), plan_root=swapped.root)
        coordinator = nodes.coordinator(inputs, terms)
        nodes.transport.learn(PeerAddress(nodes.transports[0].peer_id, nodes.transports[0].addresses))
        stream = await nodes.transport.open_stream(peer_id_of(nodes.plan.stages[0].node), INFER)
        await stream.send(INFER_MESSAGES.pack(replace(coordinator._open(0), plan=swapped)))
        answer = INFER_MESSAGES.unpack(await stream.receive())
        assert isinstance(answer, Failed)
        assert answer.refusal.verify().code == VerificationError.code


async def test_a_stage_that_is_stuck_has_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexus.node.infer.coordinator.STEP_TIMEOUT_S", 0.3)
    release = trio.Event()

    def before(stage: int, step: int) -> None:
        if stage == 1 and step == 2:
            trio.from_thread.run(release.wait)

    async with swarm(2, before=before) as nodes:
        with pytest.raises(TimedOutError, match="nothing came out"):
            await nodes.run(10)
        release.set()


@pytest.mark.parametrize("silent", [0, 1, 2])
async def test_a_stopped_process_is_named_in_seconds(monkeypatch: pytest.MonkeyPatch, silent: int) -> None:
    """Its connections stay open and nothing comes any more: no step, no sign of life."""
    monkeypatch.setattr("nexus.node.infer.coordinator.SILENCE_MAX_S", 0.5)
    monkeypatch.setattr("nexus.node.infer.serving.ALIVE_EVERY_S", 0.1)
    release = trio.Event()

    async with swarm(3) as nodes:
        compute = nodes.services[silent].compute

        async def stop(*arguments: object) -> Outcome:
            stopped = nodes.services[silent]
            if stopped.totals.steps == 3:
                for served in stopped._served.values():
                    monkeypatch.setattr(served._control, "send", forever)
                await release.wait()
            return await compute(*arguments)  # type: ignore[arg-type]

        async def forever(frame: bytes) -> None:
            await release.wait()

        monkeypatch.setattr(nodes.services[silent], "compute", stop)
        with pytest.raises(TimedOutError, match=f"stage {silent} .*sign of life"):
            await nodes.run(10)
        release.set()


async def test_garbage_instead_of_open_ends_that_stream_only() -> None:
    async with swarm(1) as nodes:
        target = nodes.transports[0]
        nodes.transport.learn(PeerAddress(target.peer_id, target.addresses))
        for garbage in (b"", b"\xff" * 40, INFER_MESSAGES.pack(INFER_MESSAGES.unpack(b"\x81\x02")), b"\x83\x00\x01\x02"):
            stream = await nodes.transport.open_stream(target.peer_id, INFER)
            await stream.send(garbage)
            with pytest.raises((UnreachableError, trio.EndOfChannel)):
                await stream.receive()
        _, ended = await nodes.run(3)
        assert leaf_hash(ended.bundle.inputs[0]) == ended.bundle.terms.prompt
