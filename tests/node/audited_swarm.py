"""Nodes with real stages of a tiny model on a simulated network: a coordinator that audits, and stages that may cheat."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import trio

from nexus.core.audits import LIGHT
from nexus.core.hashing import leaf_hash
from nexus.core.manifest import Manifest
from nexus.core.plan import DTYPES, Plan, PlanStage
from nexus.engine.exact.audit import answer, read_exact_plan
from nexus.engine.exact.stage import ExactStage
from nexus.engine.exact.tampering import TAMPERINGS, load_tampered_stage
from nexus.engine.stage import Stage
from nexus.network.simulated import SimulatedNetwork
from nexus.network.transport import PeerAddress, Transport
from nexus.node.audit.answering import AuditAnswers
from nexus.node.audit.asking import Auditor, Callbacks
from nexus.node.audit.reading import Answered, Unanswered
from nexus.node.blobs import BlobService, Fetcher
from nexus.node.cheating import HONEST, Honest
from nexus.node.environment import SYSTEM
from nexus.node.infer.coordinator import Coordinator, Ended, SessionEvent
from nexus.node.infer.messages import Open
from nexus.node.infer.serving import InferService
from nexus.node.models import Models
from nexus.node.signing import DurableSigner
from nexus.proof.arithmetic.plan import trace_shape
from nexus.proof.audit import AuditReport, Cell, Opening, chain_of
from nexus.proof.audit_check import AuditedStage
from nexus.proof.evidence import Evidence
from nexus.proof.receipts import MICRO, Terms, tokens_to_bytes
from nexus.storage.audit_keys import AuditKeys
from nexus.storage.blobs import BlobStore
from nexus.storage.catalog import Catalog
from nexus.storage.sessions import KeptSession, SessionStore
from nexus.swarm.audit_policy import AuditPolicy
from tests.engine.conftest import Folder
from tests.swarm.ring import identity

Show = Callable[[Stage, AuditedStage, tuple[Cell, ...], dict[str, Path]], list[Opening]]
MEMORY = 1 << 30


class Tampered(Honest):
    """Computes with other weights than the model's, and says what it computed when it is audited."""

    def __init__(self, name: str, folder: Folder) -> None:
        self._name = name
        self._folder = folder
        self._loaded: ExactStage | None = None

    def stage(self, opened: Open, manifest: Manifest, stage: Stage) -> Stage:
        return self._tampered(manifest, stage.start, stage.end)

    def _tampered(self, manifest: Manifest, start: int, end: int) -> ExactStage:
        if self._loaded is None:
            files = self._folder.stage_files(manifest, start, end)
            self._loaded = load_tampered_stage(TAMPERINGS[self._name], manifest, start, end, files)
        return self._loaded

    def show(self, stage: Stage, subject: AuditedStage, cells: tuple[Cell, ...], files: dict[str, Path]) -> list[Opening]:
        return answer(self._tampered(subject.manifest, stage.start, stage.end), subject, cells, files)


@dataclass
class Heard:
    """What the auditor told the rest of its node."""

    evidence: list[Evidence] = field(default_factory=list)
    silent: list[bytes] = field(default_factory=list)
    unanswered: list[Unanswered] = field(default_factory=list)
    witnesses: Callable[[Unanswered], Awaitable[Answered | None]] | None = None
    executions: int = 1000

    def callbacks(self) -> Callbacks:
        async def take(evidence: Evidence) -> None:
            self.evidence.append(evidence)

        async def note(node: bytes, session: bytes, reason: str) -> None:
            self.silent.append(node)

        async def ask_witnesses(case: Unanswered) -> Answered | None:
            self.unanswered.append(case)
            return await self.witnesses(case) if self.witnesses else None

        return Callbacks(lambda _: self.executions, take, note, ask_witnesses)


@dataclass
class AuditedSwarm:
    network: SimulatedNetwork
    manifest: Manifest
    plan: Plan
    transport: Transport
    models: Models
    keys: AuditKeys
    heard: Heard
    sources: list[PeerAddress]
    answers: list[AuditAnswers]
    stores: list[SessionStore]
    transports: list[Transport]
    services: list[InferService]

    def auditor(
        self, mode: str = LIGHT, *, rate: float = 1.0, probation: int = 0, cells: int = 3, timeout_s: float = 60.0
    ) -> Auditor:
        policy = AuditPolicy(mode, rate, probation, cells)
        return Auditor(
            self.transport,
            identity(0),
            self.models,
            self.keys,
            policy,
            timeout_s,
            self.heard.callbacks(),
            replace(SYSTEM, now_ms=lambda: 1_700_000_000_000),
        )

    async def run(self, steps: int = 20, nonce: bytes = bytes(16), prompt: Sequence[int] = range(3, 20)) -> KeptSession:
        inputs = [tokens_to_bytes(prompt)]
        terms = Terms(
            spec=1,
            nonce=nonce,
            coordinator=identity(0).public_key,
            model_root=self.manifest.root,
            plan_root=self.plan.root,
            prompt=leaf_hash(inputs[0]),
            steps_max=steps,
            window=16,
            temperature=0,
            top_k=0,
            top_p=MICRO,
            min_p=0,
            repetition_penalty=MICRO,
            seed=0,
            end_tokens=(),
            challenge=chain_of(identity(0), nonce).head,
            answered=b"",
        )
        exact = read_exact_plan(self.manifest, self.models.paths(self.manifest))
        shapes = [trace_shape(exact, stage.start, stage.end) for stage in self.plan.stages]
        known = {stage.node: source for stage, source in zip(self.plan.stages, self.sources, strict=False)}
        coordinator = Coordinator(self.transport, identity(0), "tiny", self.manifest, self.plan, terms, inputs, known, shapes)
        ended: list[Ended] = []

        async def emit(event: SessionEvent) -> None:
            if isinstance(event, Ended):
                ended.append(event)

        with trio.fail_after(30):
            await coordinator.run(emit)
        return KeptSession(ended[0].bundle, ended[0].traces, 1, ())

    async def audit(self, kept: KeptSession, asked: str | None = None, auditor: Auditor | None = None) -> AuditReport:
        with trio.fail_after(60):
            return await (auditor or self.auditor()).audit(kept, asked, self.sources, _ignore)


async def _ignore(phase: str, done: int, total: int) -> None:
    """Nobody looks."""


@asynccontextmanager
async def audited_swarm(
    model: tuple[Manifest, Folder],
    directory: Path,
    stages: int = 2,
    cheats: Mapping[int, Tampered] | None = None,
    shows: Mapping[int, Show] | None = None,
    *,
    holds_weights: bool = True,
    planned: int = 2,
) -> AsyncIterator[AuditedSwarm]:
    """`cheats`: by stage. `shows`: who computes what a stage shows, where it is not what it computed with. `holds_weights`:
    whether the auditor has the model's pieces, or its files alone. `planned`: stages of the plan; more nodes are there for a
    runner to plan with."""
    manifest = model[0]
    network = SimulatedNetwork(1, delay_s=(0.0, 0.001))
    planned = min(stages, planned)
    edges = [round(manifest.layers * i / planned) for i in range(planned + 1)]
    plan = Plan(
        1,
        manifest.root,
        manifest.profile,
        DTYPES[manifest.profile][0],
        tuple(PlanStage(identity(n + 1).public_key, *layers) for n, layers in enumerate(pairwise(edges))),
    ).check(manifest)
    async with AsyncExitStack() as stack:
        sources, answers, stores, transports = [], [], [], []
        services: list[InferService] = []
        for number in range(stages):
            transport = await stack.enter_async_context(network.open(identity(number + 1)))
            models = _models_of(transport, model, directory / f"stage-{number}", pieces=True)
            store = SessionStore(directory / f"{number}.db", keep_max_bytes=1 << 30, keep_s=1e6, now_ms=lambda: 1)
            stack.callback(store.close)
            own = identity(number + 1)
            cheat = (cheats or {}).get(number)
            service = InferService(
                transport, own, models, DurableSigner(own, store), serve=True, sessions_max=8, conduct=cheat or HONEST
            )
            service.start()
            services.append(service)
            show = (shows or {}).get(number) or (cheat.show if cheat else None)
            answering = AuditAnswers(transport, own, models, store, show)
            answering.start()
            sources.append(PeerAddress(transport.peer_id, transport.addresses))
            answers.append(answering)
            stores.append(store)
            transports.append(transport)
        transport = await stack.enter_async_context(network.open(identity(0)))
        models = _models_of(transport, model, directory / "auditor", pieces=holds_weights)
        keys = AuditKeys(directory / "audit-keys")
        heard = Heard()
        yield AuditedSwarm(network, manifest, plan, transport, models, keys, heard, sources, answers, stores, transports, services)


def _models_of(transport: Transport, model: tuple[Manifest, Folder], path: Path, *, pieces: bool) -> Models:
    manifest, folder = model
    blobs, catalog = BlobStore.open(path), Catalog.open(path)
    for blob in (*manifest.files, *(manifest.pieces if pieces else ())):
        blobs.put(blob.name, blob.size, [folder.paths[blob.name].read_bytes()])
    catalog.add("tiny", manifest)
    BlobService(transport, blobs, catalog).start()
    return Models(
        catalog, blobs, Fetcher(transport, blobs, catalog), auto_fetch=True, memory_max_bytes=MEMORY, changed=lambda: None
    )
