"""A whole session in memory: real keys, real state machines, arithmetic that needs no model. For tests of the protocol."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nexus.core.hashing import HASH_BYTES, leaf_hash, tagged_hash
from nexus.core.keys import Identity
from nexus.core.manifest import (
    CAUSAL,
    EMBEDDING,
    ENCODER,
    EXACT,
    EXACT_PLAN,
    EXACT_TABLES,
    EXACT_VECTORS,
    FLOAT,
    HEAD,
    Blob,
    Manifest,
    layer_name,
)
from nexus.core.plan import DTYPES, Plan, PlanStage
from nexus.proof.bundle import Bundle
from nexus.proof.receipts import WINDOW, Receipt, SignedReceipt, Terms, tokens_to_bytes
from nexus.proof.trace import Sealed, TraceShape, WindowTrace
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
    StageSession,
    Verified,
)

HIDDEN = 4
KV_HEADS = 2
Message = tuple[object, ...]


def identity(number: int) -> Identity:
    return Identity(tagged_hash("test-key", bytes([number])))


def manifest(kind: str = CAUSAL, layers: int = 8, profile: str = FLOAT) -> Manifest:
    def blob(name: str) -> Blob:
        return Blob(name, 10, leaf_hash(name.encode()))

    pieces = tuple(blob(name) for name in (EMBEDDING, *(layer_name(i) for i in range(layers)), HEAD))
    exact = profile == EXACT
    files = tuple(blob(name) for name in ("config.json", *((EXACT_PLAN, EXACT_TABLES, EXACT_VECTORS) if exact else ())))
    rows = tuple(leaf_hash(bytes([n])) for n in range(len(pieces) + 1)) if exact else ()
    dtype = "int8" if exact else "float32"
    return Manifest(1, kind, "Toy", profile, dtype, layers, HIDDEN, 256, 4096, 8, 0, pieces, files, rows).check()


def plan_for(model: Manifest, stages: int) -> Plan:
    cuts = [model.layers * i // stages for i in range(stages + 1)]
    nodes = [identity(i + 1).public_key for i in range(stages)]
    rows = tuple(PlanStage(node, cuts[i], cuts[i + 1]) for i, node in enumerate(nodes))
    return Plan(1, model.root, model.profile, DTYPES[model.profile][0], rows).check(model)


def shapes_for(model: Manifest, plan: Plan) -> list[TraceShape]:
    """Of every stage; none of a float model."""
    if model.profile == FLOAT:
        return []
    causal = model.kind == CAUSAL
    return [
        TraceShape(stage.end - stage.start, KV_HEADS if causal else 0, causal and stage is plan.stages[-1]) for stage in plan.stages
    ]


def terms_for(
    model: Manifest, plan: Plan, inputs: Sequence[bytes], steps_max: int, end_tokens: tuple[int, ...] = (), window: int = WINDOW
) -> Terms:
    return Terms(
        spec=1,
        nonce=bytes(16),
        coordinator=identity(0).public_key,
        model_root=model.root,
        plan_root=plan.root,
        prompt=leaf_hash(inputs[0]),
        steps_max=steps_max,
        window=window,
        temperature=0,
        top_k=0,
        top_p=1_000_000,
        min_p=0,
        repetition_penalty=1_000_000,
        seed=0,
        end_tokens=end_tokens,
        challenge=b"",
        answered=b"",
    )


def toy_compute(model: Manifest, plan: Plan, stage: int, step: int, payload: bytes) -> bytes:
    """Deterministic bytes of the right length: hidden states, one token below 200, or one vector."""
    width = 4 if stage == 0 else 4 * HIDDEN
    tokens = len(payload) // width
    seed = tagged_hash("toy", payload, bytes([stage]))
    if stage < len(plan.stages) - 1:
        return (seed * HIDDEN)[: 4 * HIDDEN] * tokens
    return struct.pack(f"<{HIDDEN}f", *seed[:HIDDEN]) if model.kind == ENCODER else tokens_to_bytes([seed[0] % 200])


def toy_seal(shape: TraceShape, stage: int, step0: int, n: int) -> Sealed:
    """Deterministic hashes of the right number, as if an engine had committed to steps [step0, step0 + n)."""

    def hashes(what: str, n_bytes: int) -> bytes:
        return b"".join(tagged_hash(what, bytes([stage]), b"%d" % (step0 + at)) for at in range(n_bytes // HASH_BYTES))

    return Sealed.of(WindowTrace(hashes("toy-cells", n * shape.step_bytes), hashes("toy-logs", shape.logs_bytes)), shape, n)


@dataclass
class Ring:
    """Runs the machines against each other until nothing moves. `tamper` sees every message and may return another, or None."""

    model: Manifest
    plan: Plan
    terms: Terms
    inputs: Sequence[bytes]
    tamper: Callable[[int, Message], Message | None] = lambda _, message: message
    stop_at: int | None = None
    results: list[bytes] = field(default_factory=list)
    bundle: Bundle | None = None
    traces: tuple[tuple[WindowTrace, ...], ...] = ()
    # Whether a receipt is signed at once or only when nothing else moves any more, as on a slow disk.
    slow_disk: bool = False

    def run(self) -> Bundle | None:
        stages = len(self.plan.stages)
        shapes = shapes_for(self.model, self.plan) if self.terms.window else []
        coordinator = CoordinatorSession(identity(0), "toy", self.model, self.plan, self.terms, self.inputs, shapes)
        machines = [
            StageSession(identity(i + 1).public_key, self.model, self.plan, self.terms, coordinator.requests[i], i)
            for i in range(stages)
        ]
        wire: deque[tuple[int, Message]] = deque()  # (to, message); -1 is the coordinator
        signing: deque[tuple[int, Receipt]] = deque()
        sealed = [0] * stages

        def send(sender: int, to: int, message: Message) -> None:
            tampered = self.tamper(sender, message)
            if tampered is not None:
                wire.append((to, tampered))

        def coordinate(actions: Sequence[object]) -> None:
            for action in actions:
                match action:
                    case Feed(step, payload):
                        send(-1, 0, ("feed", step, payload))
                    case AskFinish():
                        send(-1, 0, ("finish",))
                    case Result(step, payload):
                        self.results.append(payload)
                        if self.stop_at == step:
                            coordinate(coordinator.stop())
                    case Verified(bundle, traces):
                        self.bundle, self.traces = bundle, traces

        def perform(stage: int, actions: Sequence[object]) -> None:
            machine = machines[stage]
            for action in actions:
                match action:
                    case Compute(step, payload):
                        perform(stage, machine.computed(step, toy_compute(self.model, self.plan, stage, step, payload)))
                    case Seal(n):
                        step0, sealed[stage] = sealed[stage], sealed[stage] + n
                        perform(stage, machine.sealed(toy_seal(shapes[stage], stage, step0, n)))
                    case Sign(receipt) if self.slow_disk:
                        signing.append((stage, receipt))
                    case Sign(receipt):
                        perform(stage, machine.signed(SignedReceipt.sign(receipt, identity(stage + 1))))
                    case SendStep(step, payload):
                        send(stage, (stage + 1) % stages, ("push", step, payload))
                    case SendReceipt(receipt):
                        send(stage, (stage + 1) % stages, ("receipt", receipt))
                    case SendOutput(step, payload):
                        send(stage, -1, ("output", step, payload))
                    case ShowTrace(trace):
                        send(stage, -1, ("trace", stage, trace))
                    case ShowParent(receipt):
                        send(stage, -1, ("parent", stage, receipt))
                    case ShowReceipt(receipt):
                        send(stage, -1, ("receipt", stage, receipt))
                    case SendFinish():
                        send(stage, (stage + 1) % stages, ("finish",))
                    case SendDone():
                        send(stage, -1, ("done",))
                    case Close():
                        pass

        for stage in range(stages):
            coordinate(coordinator.accepted(stage))
        while wire or signing:
            ready = next((at for at, (to, _) in enumerate(wire) if to == -1 or not machines[to].holds), None)
            if ready is None:
                stage, receipt = signing.popleft()
                perform(stage, machines[stage].signed(SignedReceipt.sign(receipt, identity(stage + 1))))
                continue
            to, (kind, *arguments) = wire[ready]
            del wire[ready]
            if to == -1:
                coordinate(getattr(coordinator, str(kind))(*arguments) or ())
            else:
                perform(to, getattr(machines[to], str(kind))(*arguments))
        return self.bundle


def causal_ring(
    stages: int,
    steps_max: int,
    prompt: Sequence[int] = (5, 6, 7),
    end_tokens: tuple[int, ...] = (),
    window: int = WINDOW,
    profile: str = FLOAT,
) -> Ring:
    model = manifest(profile=profile)
    plan = plan_for(model, stages)
    inputs = [tokens_to_bytes(prompt)]
    return Ring(model, plan, terms_for(model, plan, inputs, steps_max, end_tokens, window), inputs)


def encoder_ring(stages: int, texts: int, window: int = WINDOW, profile: str = FLOAT) -> Ring:
    model = manifest(ENCODER, profile=profile)
    plan = plan_for(model, stages)
    inputs = [tokens_to_bytes(range(1, 3 + i % 5)) for i in range(texts)]
    return Ring(model, plan, terms_for(model, plan, inputs, texts, window=window), inputs)
