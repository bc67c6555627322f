"""Sessions of real stages of tiny models in the exact profile, run by hand: honest ones, and ones with a cheater among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from nexus.core.hashing import leaf_hash
from nexus.core.keys import Identity
from nexus.core.manifest import EXACT_PLAN, Manifest
from nexus.core.plan import Plan, PlanStage
from nexus.engine.exact.replay import Replay, replay
from nexus.engine.exact.stage import ExactStage
from nexus.engine.exact.weight_rows import StoredWeights
from nexus.engine.stage import load_stage
from nexus.proof.accuse import AccusedStage
from nexus.proof.arithmetic.plan import plan_from_json, trace_shape
from nexus.proof.arithmetic.sampler import Sampling
from nexus.proof.bundle import request_for
from nexus.proof.receipts import Receipt, SignedReceipt, Terms, payload_root, tokens_to_bytes
from nexus.proof.trace import TraceShape, WindowTrace
from tests.engine.conftest import Folder

COORDINATOR = Identity(bytes([99]) * 32)
# Given to the cheater's session: layers [start, end) of the model from these files.
Load = Callable[[Manifest, int, int, Mapping[str, Path]], ExactStage]


def honest(manifest: Manifest, start: int, end: int, files: Mapping[str, Path]) -> ExactStage:
    stage = load_stage(manifest, start, end, files)
    assert isinstance(stage, ExactStage)
    return stage


@dataclass
class Part:
    """One stage's part in a session, as it was signed."""

    identity: Identity
    stage: ExactStage
    inputs: list[bytes] = field(default_factory=list)
    outputs: list[bytes] = field(default_factory=list)
    traces: list[WindowTrace] = field(default_factory=list)
    receipts: list[SignedReceipt] = field(default_factory=list)


@dataclass
class World:
    """One session of a model split over some stages."""

    manifest: Manifest
    folder: Folder
    plan: Plan
    terms: Terms
    parts: list[Part]

    @property
    def exact_plan(self) -> bytes:
        return self.folder.paths[EXACT_PLAN].read_bytes()

    def shape(self, stage: int) -> TraceShape:
        one = self.plan.stages[stage]
        return trace_shape(plan_from_json(self.exact_plan), one.start, one.end)

    def honest_stage(self, stage: int) -> ExactStage:
        one = self.plan.stages[stage]
        return honest(self.manifest, one.start, one.end, self.folder.stage_files(self.manifest, one.start, one.end))

    def replay(self, stage: int) -> Replay:
        return replay(self.honest_stage(stage), self.parts[stage].inputs, Sampling.of(self.terms))

    def accused(self, stage: int) -> AccusedStage:
        part = self.parts[stage]
        known = part.outputs if stage == len(self.parts) - 1 else ()
        return AccusedStage(self.manifest, self.exact_plan, self.plan, self.terms, part.receipts, part.traces, part.inputs, known)

    @property
    def weights(self) -> StoredWeights:
        return StoredWeights(lambda root: (self.manifest, self.folder.paths))

    def windows(self) -> list[tuple[int, int]]:
        steps, window = len(self.parts[0].inputs), self.terms.window
        return [(step0, min(window, steps - step0)) for step0 in range(0, steps, window)]

    def sign(self) -> None:
        """All receipts, by what the parts hold."""
        for part in self.parts:
            part.receipts = []
        for number, (step0, n) in enumerate(self.windows()):
            parent: Receipt | None = None
            if number and self.manifest.kind == "causal":
                parent = self.parts[-1].receipts[number - 1].receipt
            for stage, part in enumerate(self.parts):
                receipt = self.receipt(stage, number, step0, n, parent)
                part.receipts.append(SignedReceipt.sign(receipt, part.identity))
                parent = receipt

    def receipt(self, stage: int, number: int, step0: int, n: int, parent: Receipt | None) -> Receipt:
        part, trace = self.parts[stage], self.parts[stage].traces[number]
        shape = self.shape(stage)
        return Receipt(
            spec=1,
            profile="exact",
            model_root=self.manifest.root,
            session=self.terms.session,
            node=part.identity.public_key,
            stage=stage,
            step0=step0,
            n=n,
            kv_len=sum(len(each) // 4 for each in self.parts[0].inputs[: step0 + n]) if self.manifest.kind == "causal" else 0,
            request=request_for(self.terms, stage).id,
            parent=parent.id if parent else b"",
            prev=part.receipts[-1].receipt.id if part.receipts else b"",
            in_root=payload_root(part.inputs[step0 : step0 + n]),
            out_root=payload_root(part.outputs[step0 : step0 + n]),
            kv_root=trace.kv_root(shape),
            trace_root=trace.trace_root(shape, n),
        )


def run(
    model: tuple[Manifest, Folder],
    inputs: Sequence[Sequence[int]],
    *,
    stages: int = 2,
    steps: int = 10,
    window: int = 4,
    sampling: Sampling | None = None,
    cheaters: Mapping[int, Load] | None = None,
    nonce: int = 0,
) -> World:
    """A session of `steps` steps: of a decoder one prompt, of an encoder a text a step."""
    manifest, folder = model
    edges = [round(manifest.layers * index / stages) for index in range(stages + 1)]
    identities = [Identity(bytes([index + 1]) * 32) for index in range(stages)]
    plan = Plan(
        spec=1,
        model_root=manifest.root,
        profile="exact",
        dtype="exact",
        stages=tuple(
            PlanStage(identity.public_key, start, end) for identity, (start, end) in zip(identities, pairwise(edges), strict=True)
        ),
    )
    chosen = sampling or Sampling()
    payloads = [tokens_to_bytes(each) for each in inputs]
    terms = make_terms(manifest, plan, payloads[0], chosen, steps if manifest.kind == "causal" else len(inputs), window, nonce)
    parts = []
    for index, (start, end) in enumerate(pairwise(edges)):
        load = (cheaters or {}).get(index, honest)
        parts.append(Part(identities[index], load(manifest, start, end, folder.stage_files(manifest, start, end))))
    world = World(manifest, folder, plan, terms, parts)
    session = terms.session
    for part in parts:
        part.stage.open(session, Sampling.of(terms), commit=True)
    fed: bytes | None = payloads[0]
    for step in range(steps if manifest.kind == "causal" else len(payloads)):
        fed = payloads[step] if manifest.kind != "causal" or step == 0 else fed
        assert fed is not None
        for part in parts:
            part.inputs.append(fed)
            fed = part.stage.step(session, fed)
            part.outputs.append(fed)
    for part in parts:
        part.traces = [part.stage.seal(session, n) for _, n in world.windows()]
        part.stage.close(session)
    world.sign()
    return world


def make_terms(manifest: Manifest, plan: Plan, prompt: bytes, sampling: Sampling, steps: int, window: int, nonce: int) -> Terms:
    million = 1_000_000
    values = {
        "spec": 1,
        "nonce": nonce.to_bytes(16, "big"),
        "coordinator": COORDINATOR.public_key,
        "model_root": manifest.root,
        "plan_root": plan.root,
        "prompt": leaf_hash(prompt),
        "challenge": b"",
        "answered": b"",
        "steps_max": steps,
        "window": window,
        "temperature": round(sampling.temperature * million),
        "top_k": sampling.top_k,
        "top_p": round(sampling.top_p * million),
        "min_p": round(sampling.min_p * million),
        "repetition_penalty": round(sampling.repetition_penalty * million),
        "seed": sampling.seed,
        "end_tokens": (),
    }
    return Terms(**values)  # type: ignore[arg-type]
