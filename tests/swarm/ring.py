"""A whole session in memory: real keys, real state machines, arithmetic that needs no model. For tests of the protocol."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nexus.core.hashing import leaf_hash, tagged_hash
from nexus.core.keys import Identity
from nexus.core.manifest import CAUSAL, EMBEDDING, ENCODER, HEAD, Blob, Manifest, layer_name
from nexus.core.plan import Plan, PlanStage
from nexus.proof.bundle import Bundle
from nexus.proof.receipts import FLOAT, WINDOW, Terms, tokens_to_bytes
from nexus.swarm.session import (
    AskFinish,
    Close,
    Compute,
    CoordinatorSession,
    Feed,
    Result,
    SendDone,
    SendFinish,
    SendOutput,
    SendReceipt,
    SendStep,
    ShowReceipt,
    StageSession,
    Verified,
)

HIDDEN = 4
Message = tuple[object, ...]


def identity(number: int) -> Identity:
    return Identity(tagged_hash("test-key", bytes([number])))


def manifest(kind: str = CAUSAL, layers: int = 8) -> Manifest:
    def blob(name: str) -> Blob:
        return Blob(name, 10, leaf_hash(name.encode()))

    pieces = tuple(blob(name) for name in (EMBEDDING, *(layer_name(i) for i in range(layers)), HEAD))
    return Manifest(1, kind, "Toy", "float", "float32", layers, HIDDEN, 256, 4096, 8, 0, pieces, (blob("config.json"),)).check()


def plan_for(model: Manifest, stages: int) -> Plan:
    cuts = [model.layers * i // stages for i in range(stages + 1)]
    nodes = [identity(i + 1).public_key for i in range(stages)]
    rows = tuple(PlanStage(node, cuts[i], cuts[i + 1]) for i, node in enumerate(nodes))
    return Plan(1, model.root, FLOAT, "float32", rows).check(model)


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
    )


def toy_compute(model: Manifest, plan: Plan, stage: int, step: int, payload: bytes) -> bytes:
    """Deterministic bytes of the right length: hidden states, one token below 200, or one vector."""
    width = 4 if stage == 0 else 4 * HIDDEN
    tokens = len(payload) // width
    seed = tagged_hash("toy", payload, bytes([stage]))
    if stage < len(plan.stages) - 1:
        return (seed * HIDDEN)[: 4 * HIDDEN] * tokens
    return (seed * HIDDEN)[: 4 * HIDDEN] if model.kind == ENCODER else tokens_to_bytes([seed[0] % 200])


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

    def run(self) -> Bundle | None:
        stages = len(self.plan.stages)
        coordinator = CoordinatorSession(identity(0), "toy", self.model, self.plan, self.terms, self.inputs)
        machines = [
            StageSession(identity(i + 1), self.model, self.plan, self.terms, coordinator.requests[i], i) for i in range(stages)
        ]
        wire: deque[tuple[int, Message]] = deque()  # (to, message); -1 is the coordinator

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
                    case Verified(bundle):
                        self.bundle = bundle

        def perform(stage: int, actions: Sequence[object]) -> None:
            machine = machines[stage]
            for action in actions:
                match action:
                    case Compute(step, payload):
                        perform(stage, machine.computed(step, toy_compute(self.model, self.plan, stage, step, payload)))
                    case SendStep(step, payload):
                        send(stage, (stage + 1) % stages, ("push", step, payload))
                    case SendReceipt(receipt):
                        send(stage, (stage + 1) % stages, ("receipt", receipt))
                    case SendOutput(step, payload):
                        send(stage, -1, ("output", step, payload))
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
        while wire:
            to, (kind, *arguments) = wire.popleft()
            if to == -1:
                coordinate(getattr(coordinator, str(kind))(*arguments))
            else:
                perform(to, getattr(machines[to], str(kind))(*arguments))
        return self.bundle


def causal_ring(
    stages: int, steps_max: int, prompt: Sequence[int] = (5, 6, 7), end_tokens: tuple[int, ...] = (), window: int = WINDOW
) -> Ring:
    model = manifest()
    plan = plan_for(model, stages)
    inputs = [tokens_to_bytes(prompt)]
    return Ring(model, plan, terms_for(model, plan, inputs, steps_max, end_tokens, window), inputs)


def encoder_ring(stages: int, texts: int) -> Ring:
    model = manifest(ENCODER)
    plan = plan_for(model, stages)
    inputs = [tokens_to_bytes(range(1, 3 + i % 5)) for i in range(texts)]
    return Ring(model, plan, terms_for(model, plan, inputs, texts), inputs)
