"""Sessions of real stages and state machines in random order: messages of different streams overtake each other, steps of several
sessions are computed as one batch, prompts in parts, nodes crash and come back, neighbours are hostile.

Everything is drawn from one `random.Random`, so a seed gives the same sessions again.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from nexus.core.errors import NexusError
from nexus.core.hashing import leaf_hash, tagged_hash
from nexus.core.keys import Identity
from nexus.core.manifest import CAUSAL, EXACT, EXACT_PLAN, Manifest
from nexus.core.plan import Plan, PlanStage
from nexus.engine.exact import stage as exact_stage
from nexus.engine.exact.commit import sealed
from nexus.engine.exact.stage import ExactStage
from nexus.engine.exact.weight_rows import StoredWeights
from nexus.engine.stage import load_stage
from nexus.proof.arithmetic.plan import ExactPlan, plan_from_json, trace_shape
from nexus.proof.arithmetic.sampler import Sampling
from nexus.proof.audit import chain_of
from nexus.proof.bundle import Bundle
from nexus.proof.receipts import MICRO, Receipt, SignedReceipt, Terms, millionths, tokens_to_bytes
from nexus.proof.trace import Sealed, TraceShape, WindowTrace
from nexus.storage.sessions import ServedSession, SessionStore, Window
from nexus.swarm.session import (
    AskFinish,
    Close,
    Compute,
    CoordinatorSession,
    Feed,
    Result,
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
    StageSession,
    Verified,
)
from tests.engine.conftest import Folder

COORDINATOR = Identity(tagged_hash("honest-test", b"coordinator"))
WINDOWS = (1, 2, 3, 4, 7, 16)
Message = tuple[str, tuple[object, ...]]


@dataclass(eq=False)
class Model:
    """A model, and its stages as they were loaded so far."""

    name: str
    manifest: Manifest
    folder: Folder
    _loaded: dict[tuple[int, int, str], ExactStage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.exact_bytes = self.folder.paths[EXACT_PLAN].read_bytes()
        self.exact: ExactPlan = plan_from_json(self.exact_bytes)
        self.weights = StoredWeights(lambda _: (self.manifest, self.folder.paths))

    @property
    def causal(self) -> bool:
        return self.manifest.kind == CAUSAL

    def stage(self, start: int, end: int, kernel: str) -> ExactStage:
        key = start, end, kernel
        if key not in self._loaded:
            loaded = load_stage(self.manifest, start, end, self.folder.stage_files(self.manifest, start, end), kernel=kernel)
            assert isinstance(loaded, ExactStage)
            self._loaded[key] = loaded
        return self._loaded[key]


class Node:
    """One machine: its key, its disk, and the kernel that its processor has."""

    def __init__(self, number: int, path: Path, kernel: str) -> None:
        self.identity = Identity(tagged_hash("honest-test", b"node-%d" % number))
        self.kernel = kernel
        self._path = path
        self.store = self._open()

    def _open(self) -> SessionStore:
        return SessionStore(self._path, keep_max_bytes=1 << 30, keep_s=1e6, now_ms=lambda: 1)

    def restart(self, kernel: str) -> None:
        """The process is gone; what is on the disk comes back, on a processor that may be another one."""
        self.store.close()
        self.store = self._open()
        self.kernel = kernel


@dataclass(frozen=True)
class Asked:
    """What one session is about."""

    model: Model
    plan: Plan
    terms: Terms
    inputs: tuple[bytes, ...]

    @property
    def shapes(self) -> list[TraceShape]:
        return [trace_shape(self.model.exact, stage.start, stage.end) for stage in self.plan.stages]


@dataclass(eq=False)
class Served:
    """What one honest stage did in one session: all that it ever signed, and the inputs, outputs and traces of the last attempt."""

    signed: dict[bytes, SignedReceipt] = field(default_factory=dict)
    chain: list[SignedReceipt] = field(default_factory=list)
    inputs: list[bytes] = field(default_factory=list)
    outputs: list[bytes] = field(default_factory=list)
    traces: list[WindowTrace] = field(default_factory=list)

    def begin(self) -> None:
        self.chain, self.inputs, self.outputs, self.traces = [], [], [], []


@dataclass(eq=False)
class Ran:
    """A session and what came of it. `served`: by stage, of the honest ones."""

    asked: Asked
    served: dict[int, Served]
    hostile: frozenset[int] = frozenset()
    bundle: Bundle | None = None
    traces: tuple[tuple[WindowTrace, ...], ...] = ()
    failed: NexusError | None = None


class CrashError(Exception):
    """The power fails."""


# Makes of (stage, input) what a hostile stage gives on.
Lie = Callable[[int, bytes], bytes]


@dataclass(eq=False)
class _Part:
    """One stage of one session under way."""

    run: _Under
    number: int
    machine: StageSession
    node: Node
    stage: ExactStage | None  # none where it is hostile
    asked: ServedSession
    busy: bool = False
    unsigned: list[bytes] = field(default_factory=list)
    steps: int = 0


@dataclass(eq=False)
class _Under:
    """One session under way."""

    ran: Ran
    coordinator: CoordinatorSession
    parts: list[_Part]
    stop_at: int | None
    streams: dict[tuple[int, int], deque[Message]] = field(default_factory=dict)  # (from, to); -1 is the coordinator
    over: bool = False


@dataclass(eq=False)
class _Work:
    """A step that a stage computes, in parts of so many tokens each."""

    part: _Part
    step: int
    payload: bytes
    parts: deque[bytes]
    out: list[bytes] = field(default_factory=list)


class Swarm:
    """Runs sessions over the same stages at once. `crash_after`: (stage, how many signatures) after which that node's power fails,
    before or after the receipt went out."""

    def __init__(
        self,
        chance: random.Random,
        nodes: Sequence[Node],
        sessions: Sequence[Ran],
        *,
        lie: Lie | None = None,
        crash_after: tuple[int, int] | None = None,
    ) -> None:
        self._chance = chance
        self._nodes = nodes
        self._lie = lie
        self._crash_after = crash_after
        self._signatures = 0
        self._work: dict[int, list[_Work]] = {}
        self._signing: list[tuple[_Part, Receipt]] = []
        self._under = [self._begin(ran) for ran in sessions]

    def _begin(self, ran: Ran) -> _Under:
        asked, chance = ran.asked, self._chance
        terms, plan, manifest = asked.terms, asked.plan, asked.model.manifest
        coordinator = CoordinatorSession(COORDINATOR, asked.model.name, manifest, plan, terms, asked.inputs, asked.shapes)
        stop_at = chance.randrange(terms.steps_max) if chance.random() < 0.3 else None
        under = _Under(ran, coordinator, [], stop_at)
        for number, planned in enumerate(plan.stages):
            node, request = self._nodes[number], coordinator.requests[number]
            machine = StageSession(planned.node, manifest, plan, terms, request, number)
            stage = None if number in ran.hostile else asked.model.stage(planned.start, planned.end, node.kernel)
            if stage:
                stage.open(terms.session, Sampling.of(terms) if stage.last else None, commit=True)
                ran.served[number].begin()
            served = ServedSession(number, asked.model.name, plan, terms, request)
            under.parts.append(_Part(under, number, machine, node, stage, served))
        return under

    def run(self) -> None:
        """Until every session is over. Raises CrashError."""
        try:
            for under in self._under:
                for number in self._chance.sample(range(len(under.parts)), len(under.parts)):
                    self._coordinate(under, under.coordinator.accepted(number))
            while turns := self._turns():
                self._chance.choice(turns)()
            assert all(under.over for under in self._under), "a session stands still"
        finally:
            for under in self._under:
                self._end(under)

    def _end(self, under: _Under) -> None:
        under.over = True
        for part in under.parts:
            if part.stage:
                part.stage.close(under.ran.asked.terms.session)

    def _turns(self) -> list[Callable[[], None]]:
        """Everything that may happen next."""
        turns: list[Callable[[], None]] = []
        for under in self._under:
            for (sender, to), stream in under.streams.items():
                if not stream or under.over:
                    continue
                if to == -1:
                    ready = not _has_to_wait(under, sender, stream[0])
                else:
                    ready = not (under.parts[to].busy or under.parts[to].machine.holds)
                if ready:
                    turns.append(lambda under=under, to=to, stream=stream: self._deliver(under, to, stream))  # type: ignore[misc]
        self._signing = [one for one in self._signing if not one[0].run.over and not one[0].run.ran.failed]
        if any(not part.busy for part, _ in self._signing):
            turns.append(self._sign)
        for number, work in self._work.items():
            if work:
                turns.append(lambda number=number: self._compute(number))  # type: ignore[misc]
        return turns

    def _guarded(self, under: _Under, event: Callable[[], None]) -> None:
        """A session that fails ends alone, which only a hostile stage may bring about."""
        try:
            event()
        except NexusError as error:
            if not under.ran.hostile:
                raise
            under.ran.failed = error
            for number in self._work:
                self._work[number] = [work for work in self._work[number] if work.part.run is not under]
            self._end(under)

    def _deliver(self, under: _Under, to: int, stream: deque[Message]) -> None:
        kind, arguments = stream.popleft()
        if to == -1:
            self._guarded(under, lambda: self._coordinate(under, getattr(under.coordinator, kind)(*arguments) or ()))
        else:
            part = under.parts[to]
            self._guarded(under, lambda: self._perform(part, getattr(part.machine, kind)(*arguments)))

    def _send(self, under: _Under, sender: int, to: int, kind: str, *arguments: object) -> None:
        under.streams.setdefault((sender, to), deque()).append((kind, arguments))

    def _coordinate(self, under: _Under, actions: Sequence[object]) -> None:
        for action in actions:
            match action:
                case Feed(step, payload):
                    self._send(under, -1, 0, "feed", step, payload)
                case AskFinish():
                    self._send(under, -1, 0, "finish")
                case Result(step, _):
                    if under.stop_at == step:
                        self._coordinate(under, under.coordinator.stop())
                case Verified(bundle, traces):
                    under.ran.bundle, under.ran.traces = bundle, traces
                    under.over = True

    def _perform(self, part: _Part, actions: Sequence[StageAction]) -> None:
        under, number = part.run, part.number
        following = (number + 1) % len(under.parts)
        for action in actions:
            match action:
                case Compute(step, payload):
                    self._begin_step(part, step, payload)
                case Seal(n):
                    self._perform(part, part.machine.sealed(self._seal(part, n)))
                case Sign(receipt):
                    self._signing.append((part, receipt))
                case SendStep(step, payload):
                    self._send(under, number, following, "push", step, payload)
                case SendReceipt(own):
                    self._send(under, number, following, "receipt", own)
                case SendFinish():
                    self._send(under, number, following, "finish")
                case SendOutput(step, payload):
                    self._send(under, number, -1, "output", step, payload)
                case ShowTrace(trace):
                    self._send(under, number, -1, "trace", number, trace)
                case ShowParent(parent):
                    self._send(under, number, -1, "parent", number, parent)
                case ShowReceipt(own):
                    self._send(under, number, -1, "receipt", number, own)
                case SendDone():
                    self._send(under, number, -1, "done")
                case Close():
                    pass

    # ---- computing

    def _begin_step(self, part: _Part, step: int, payload: bytes) -> None:
        part.unsigned.append(payload)
        if part.stage is None:
            assert self._lie is not None
            self._perform(part, part.machine.computed(step, self._lie(part.number, payload)))
            return
        part.busy = True
        self._work.setdefault(id(part.stage), []).append(_Work(part, step, payload, deque(self._in_parts(part.stage, payload))))

    def _in_parts(self, stage: ExactStage, payload: bytes) -> list[bytes]:
        unit = stage.input_size(1)
        tokens = len(payload) // unit
        if tokens == 1 or not stage.chunked or self._chance.random() < 0.4:
            return [payload]
        cuts = sorted(self._chance.sample(range(1, tokens), self._chance.randrange(1, min(tokens, 5))))
        return [payload[unit * start : unit * end] for start, end in pairwise([0, *cuts, tokens])]

    def _compute(self, number: int) -> None:
        """One batch of one stage: of some sessions that wait the next part each."""
        waiting = self._work[number]
        batch = self._chance.sample(waiting, self._chance.randrange(1, len(waiting) + 1))
        stage = batch[0].part.stage
        assert stage is not None
        taken = [work.parts.popleft() for work in batch]
        steps = [(work.part.run.ran.asked.terms.session, payload) for work, payload in zip(batch, taken, strict=True)]
        answers = stage.step_many(steps, [bool(work.parts) for work in batch])
        for work, answer in zip(batch, answers, strict=True):
            if isinstance(answer, NexusError):
                error = answer
                self._guarded(work.part.run, lambda error=error: _raise(error))  # type: ignore[misc]
                continue
            work.out.append(answer)
            if not work.parts and work in self._work[number]:
                self._work[number].remove(work)
                self._computed(work)

    def _computed(self, work: _Work) -> None:
        part = work.part
        part.busy = False
        served, output = part.run.ran.served[part.number], b"".join(work.out)
        served.inputs.append(work.payload)
        served.outputs.append(output)
        self._guarded(part.run, lambda: self._perform(part, part.machine.computed(work.step, output)))

    def _seal(self, part: _Part, n: int) -> Sealed:
        ran = part.run.ran
        shape = ran.asked.shapes[part.number]
        if part.stage is None:
            trace = WindowTrace(self._chance.randbytes(n * shape.step_bytes), self._chance.randbytes(shape.logs_bytes))
            return Sealed.of(trace, shape, n)
        trace = part.stage.seal(ran.asked.terms.session, n)
        ran.served[part.number].traces.append(trace)
        return sealed(trace, shape, n)

    # ---- signing

    def _sign(self) -> None:
        """Some of the receipts that wait for a disk: those of one node go into one commit."""
        ready = [one for one in self._signing if not one[0].busy]
        first = self._chance.choice(ready)
        batch = [one for one in ready if one[0].node is first[0].node]
        self._signing = [one for one in self._signing if one not in batch]
        windows = []
        for part, receipt in batch:
            inputs, part.unsigned = part.unsigned[: receipt.n], part.unsigned[receipt.n :]
            windows.append(Window(part.asked, receipt, tuple(inputs)))
        honest = first[0].stage is not None
        if honest:
            assert first[0].node.store.sign_all(windows) == [None] * len(windows), "an honest node contradicts itself"
        for part, receipt in batch:
            own = SignedReceipt.sign(receipt, part.node.identity)
            released = self._chance.random() < 0.5
            crashes = honest and self._crashes(part)
            if not crashes or released:
                self._release(part, own)
            if crashes:
                raise CrashError
            self._guarded(part.run, lambda part=part, own=own: self._perform(part, part.machine.signed(own)))  # type: ignore[misc]

    def _release(self, part: _Part, own: SignedReceipt) -> None:
        if part.stage is None:
            return
        served = part.run.ran.served[part.number]
        earlier = served.signed.setdefault(own.receipt.id, own)
        assert earlier == own
        served.chain.append(own)

    def _crashes(self, part: _Part) -> bool:
        if self._crash_after is None or part.number != self._crash_after[0]:
            return False
        self._signatures += 1
        return self._signatures >= self._crash_after[1]


def _has_to_wait(under: _Under, sender: int, message: Message) -> bool:
    """Whether other stages' streams have to catch up first."""
    kind, arguments = message
    if kind == "receipt":
        return under.coordinator.is_ahead(sender)
    if kind == "output":
        step, _ = arguments
        assert isinstance(step, int)
        return under.coordinator.is_ahead(sender, step)
    return False


def _raise(error: NexusError) -> None:
    raise error


# ---- what is drawn -------------------------------------------------------------------------------------------------------------


def draw_plan(chance: random.Random, model: Model, nodes: Sequence[Node]) -> Plan:
    layers = model.manifest.layers
    stages = chance.randrange(1, min(4, layers, len(nodes)) + 1)
    edges = [0, *sorted(chance.sample(range(1, layers), stages - 1)), layers]
    rows = tuple(PlanStage(nodes[n].identity.public_key, start, end) for n, (start, end) in enumerate(pairwise(edges)))
    return Plan(1, model.manifest.root, EXACT, EXACT, rows).check(model.manifest)


def draw_terms(chance: random.Random, model: Model, plan: Plan, prompt: bytes, steps: int) -> Terms:
    greedy = chance.random() < 0.4
    nonce = chance.randbytes(16)
    few = chance.sample(range(model.manifest.vocab_size), chance.choice([0, 0, 1, 5])) if model.causal else []
    return Terms(
        spec=1,
        nonce=nonce,
        coordinator=COORDINATOR.public_key,
        model_root=model.manifest.root,
        plan_root=plan.root,
        prompt=leaf_hash(prompt),
        steps_max=steps,
        window=chance.choice(WINDOWS),
        temperature=0 if greedy else chance.choice([1, millionths(0.3), millionths(0.8), MICRO, 100 * MICRO]),
        top_k=chance.choice([0, 0, 1, 5, 1000]),
        top_p=chance.choice([MICRO, MICRO, millionths(0.9), 1]),
        min_p=chance.choice([0, 0, millionths(0.05), MICRO]),
        repetition_penalty=chance.choice([MICRO, MICRO, millionths(1.1), 100 * MICRO, millionths(0.01)]),
        seed=chance.choice([0, 1, 2**64 - 1, chance.randrange(2**64)]),
        end_tokens=tuple(few),
        challenge=chain_of(COORDINATOR, nonce).head,
        answered=b"",
    )


def draw_texts(chance: random.Random, model: Model) -> tuple[bytes, ...]:
    vocab = model.manifest.vocab_size
    if model.causal:
        tokens = chance.choice([1, 2, chance.randrange(1, 12), chance.randrange(1, 61)])
        return (tokens_to_bytes([chance.randrange(vocab) for _ in range(tokens)]),)
    return tuple(
        tokens_to_bytes([chance.randrange(vocab) for _ in range(chance.randrange(1, 12))]) for _ in range(chance.randrange(1, 6))
    )


def draw_session(chance: random.Random, model: Model, plan: Plan) -> Asked:
    texts = draw_texts(chance, model)
    steps = chance.choice([1, 2, 3, chance.randrange(1, 9), chance.randrange(1, 17), chance.randrange(1, 41)])
    return Asked(model, plan, draw_terms(chance, model, plan, texts[0], steps if model.causal else len(texts)), texts)


def hostile_rows(chance: random.Random, rows: int, width: int) -> bytes:
    """Numbers that a stage takes in, chosen to bring out every difference that two implementations could have."""
    numpy = np.random.default_rng(chance.randrange(2**32))
    kind = chance.randrange(9)
    values = numpy.standard_normal((rows, width)).astype(np.float32)
    match kind:
        case 0:
            values *= np.float32(2.0) ** numpy.integers(-100, 36, (rows, 1)).astype(np.float32)
        case 1:
            values *= np.float32(2.0) ** numpy.integers(-126, 30, (rows, width)).astype(np.float32)
        case 2:
            values = values * np.float32(1e-40)  # not normal
        case 3:
            values = np.where(values > 0, np.float32(0.0), np.float32(-0.0)).astype(np.float32)
        case 4:
            values[:, chance.randrange(width)] = chance.choice([2.0**40, -(2.0**40), 2.0**20])
        case 5:
            values[:] = chance.choice([0.5, -1.0, 2.0**-149, 2.0**40])
        case 6:
            values = (numpy.integers(-255, 256, (rows, width)) / 2).astype(np.float32)  # halves, to be rounded
        case 7:
            values = numpy.integers(0, 2**32, (rows, width), dtype=np.uint32).view(np.float32)
    values = np.where(np.isfinite(values) & (np.abs(values) <= 2.0**40), values, np.float32(0))
    return values.astype("<f4").tobytes()


def hostile(chance: random.Random, asked: Asked) -> Lie:
    manifest = asked.model.manifest
    stages = len(asked.plan.stages)

    def lie(number: int, payload: bytes) -> bytes:
        rows = len(payload) // (4 if number == 0 else 4 * manifest.hidden_size)
        if number < stages - 1:
            return hostile_rows(chance, rows, manifest.hidden_size)
        return (
            tokens_to_bytes([chance.randrange(manifest.vocab_size)])
            if asked.model.causal
            else hostile_rows(chance, 1, manifest.hidden_size)
        )

    return lie


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Every step on so many threads, whatever the size of the stage."""

    def use(weight_bytes: int) -> int:
        torch.set_num_threads(count)
        return count

    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(exact_stage, "use_threads", use)
        try:
            yield
        finally:
            torch.set_num_threads(before)
