"""A NodeApi without a network, for tests of what is in front of a node. Its proof bundle is a real one: it verifies."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event as ThreadEvent
from threading import Thread

import structlog
import trio

from nexus.core.errors import CapacityError, NotFoundError, UnreachableError, VerificationError
from nexus.core.fidelity import Fidelity, LayerFidelity
from nexus.core.hashing import leaf_hash
from nexus.core.keys import Identity
from nexus.core.manifest import Blob, Manifest
from nexus.core.plan import Plan, PlanStage
from nexus.gateway.control import Control, control_app
from nexus.gateway.unix_socket import bound_socket, serve_on
from nexus.network.addresses import Endpoint
from nexus.network.reachability import AddressCheck, DialBack, Netcheck, Observation, Reservation
from nexus.node.api import (
    AuditView,
    Embedding,
    EmbedRequest,
    EntryView,
    Event,
    EvidenceFile,
    EvidenceView,
    FidelityRequest,
    Finished,
    GenerateRequest,
    JudgementView,
    LedgerView,
    ModelView,
    NodeStatus,
    PeerView,
    Planned,
    PlanView,
    ResumeRequest,
    SessionSummary,
    SessionView,
    SlashedView,
    StageAuditView,
    StageSummary,
    StageView,
    Token,
)
from nexus.node.netcheck import ClockView, NetcheckView
from nexus.node.planning import FragmentView, LayersView, PlanReport, PlanRequest, imagined
from nexus.node.progress import Notice, Progress
from nexus.node.swarm_view import SwarmView, swarm_view
from nexus.proof.accounts import Fork, Share, SignedEntry
from nexus.proof.bundle import Bundle, make_requests
from nexus.proof.evidence import FORK, Evidence, verify_evidence
from nexus.proof.receipts import FLOAT, MICRO, WINDOW, Receipt, SignedReceipt, Terms, payload_root, tokens_to_bytes
from nexus.proof.solver import Proven
from nexus.swarm.health import Vitals
from nexus.swarm.ledger import Account, Cost, pay_entry
from tests.gateway.fake_fragments import FakeFragments
from tests.gateway.fake_memory import FakeMemory
from tests.swarm.node_records import holding, node_record

COORDINATOR, FIRST, SECOND = (Identity(bytes([number]) * 32) for number in (1, 2, 3))
_HOME, _SEEN = Endpoint("ip4", "192.168.1.4", 4510), Endpoint("ip4", "198.51.100.7", 4510)
NETCHECK = NetcheckView(
    Netcheck(
        "unreachable",
        "public",
        "behind",
        "unknown",
        2,
        1,
        (
            AddressCheck(str(_HOME), "listen", "private", ()),
            AddressCheck(str(_SEEN), "observed", "public", (DialBack(FIRST.peer_id, str(_SEEN), "failed", "no answer in 5 s"),)),
        ),
        (Observation(FIRST.peer_id, "203.0.113.9", _HOME, _SEEN),),
        (Reservation(SECOND.peer_id, f"/ip4/203.0.113.8/tcp/4510/p2p/{SECOND.peer_id}/p2p-circuit", 3000.0),),
        False,
        1,
        ("Forward the port.",),
    ),
    "ok",
    (ClockView(FIRST.peer_id, -120, 4),),
    ((FIRST.peer_id, "evil\x1b[31m"),),
    ("Forward the port.",),
)
SWARM = swarm_view(
    node_record(COORDINATOR.public_key, name="own", models=(holding("nano", b"n" * 32, (0, 6)),)),
    [
        node_record(FIRST.public_key, name="node\x1b[31m", load=3, models=(holding("nano", b"n" * 32, (0, 4), serving=((0, 2),)),)),
        node_record(SECOND.public_key, name="", leaving=1, models=(holding("rare", b"r" * 32, (0, 2)),)),
    ],
    lambda node: Vitals("alive", 0.0, 8.0) if node == FIRST.public_key else Vitals(),
    lambda one, other: 20_000,
    lambda node: 20_000 if node == FIRST.public_key else None,
    lambda root: 6 if root == b"n" * 32 else None,
    2,
    10.0,
    256,
)
FIDELITY = Fidelity(
    "held_out.txt",
    "/models/nano",
    120,
    121,
    5000,
    "native (avx2)",
    (LayerFidelity("embedding", 0.01), LayerFidelity("layer.0", 0.02), LayerFidelity("head", 0.005)),
    top1_agreement=0.995,
    perplexity_exact=26.6,
    perplexity_float=26.5,
)
ANSWER = ("Once", " upon", " a", " time", ".\n")


def manifest() -> Manifest:
    pieces = tuple(Blob(name, 1000, leaf_hash(name.encode())) for name in ("embedding", "layer.0", "layer.1", "head"))
    files = (Blob("config.json", 10, leaf_hash(b"config")),)
    return Manifest(1, "causal", "LlamaForCausalLM", "float", "float32", 2, 64, 256, 512, 1024, 0, pieces, files, ())


def bundle(outputs: int = len(ANSWER)) -> Bundle:
    """The proof of a session of two stages: one window of `outputs` steps, as the stages would have signed it."""
    model = manifest()
    plan = Plan(1, model.root, FLOAT, "float32", (PlanStage(FIRST.public_key, 0, 1), PlanStage(SECOND.public_key, 1, 2)))
    prompt = tokens_to_bytes([5, 6, 7])
    terms = Terms(
        1,
        b"n" * 16,
        COORDINATOR.public_key,
        model.root,
        plan.root,
        leaf_hash(prompt),
        16,
        WINDOW,
        0,
        0,
        MICRO,
        0,
        MICRO,
        0,
        (),
        b"",
        b"",
    )
    requests = make_requests(COORDINATOR, terms, plan)
    results = tuple(tokens_to_bytes([index]) for index in range(outputs))
    payloads = ([prompt, *results[:-1]], [b"hidden"] * outputs, list(results))
    receipts: list[SignedReceipt] = []
    for stage, node in enumerate((FIRST, SECOND)):
        receipts.append(
            SignedReceipt.sign(
                Receipt(
                    1,
                    FLOAT,
                    model.root,
                    terms.session,
                    node.public_key,
                    stage,
                    0,
                    outputs,
                    3 + outputs - 1,
                    requests[stage].request.id,
                    receipts[-1].receipt.id if receipts else b"",
                    b"",
                    payload_root(payloads[stage]),
                    payload_root(payloads[stage + 1]),
                    b"",
                    b"",
                ),
                node,
            )
        )
    return Bundle(1, "nano", model, plan, terms, requests, (prompt,), results, tuple(receipts))


def plan_view() -> PlanView:
    proof = bundle()
    stages = tuple(
        StageView(index, node.peer_id, f"node-{index}", index, index + 1, 2000, 4000, "fits")
        for index, node in enumerate((FIRST, SECOND))
    )
    return PlanView("nano", proof.manifest.root, proof.plan.root, stages, "two nodes are enough")


def finished(verified: int = 2, audit: AuditView | None = None) -> Finished:
    stages = tuple(
        StageSummary(index, node.peer_id, f"node-{index}", index, index + 1, 5, 1, 0.01)
        for index, node in enumerate((FIRST, SECOND))
    )
    return Finished("stop", 3, 5, 0.1, 0.5, 2, verified, stages, bundle(), audit)


def audit_view(verdict: str = "ok") -> AuditView:
    """The second stage as the audit found it, the first one right."""
    proof = bytes(range(32)) if verdict == "convicted" else b""
    detail = "" if verdict == "ok" else "operation down of layer 1 is wrong in step 2"
    stages = (
        StageAuditView(0, FIRST.peer_id, "node-0", "light", "ok", 0, 2, 0.001, b"", ""),
        StageAuditView(1, SECOND.peer_id, "node-1", "light", verdict, 0, 2, 0.0035, proof, detail),
    )
    return AuditView(bundle().terms.session, 1_700_000_000_000, stages)


def session_view() -> SessionView:
    proof = bundle()
    return SessionView(proof.terms.session, "nano", proof.manifest.root, 1_700_000_000_000, 5, 2, (audit_view(),))


def fork() -> Evidence:
    """Real evidence: SECOND told two stories about its first payment."""
    stories = []
    for session in (b"1", b"2"):
        entry = pay_entry(Account(SECOND.public_key), session * 32, Cost(100, (Share(FIRST.public_key, 90),)))
        stories.append(SignedEntry.sign(entry, SECOND))
    return Evidence(1, FORK, SECOND.public_key, Fork.of(*stories).to_bytes())


def evidence_view() -> EvidenceView:
    proof, verdict = fork(), verify_evidence(fork())
    return EvidenceView(
        proof.id,
        proof.kind,
        proof.peer_id,
        "node\x1b[31m",
        1_700_000_000_000,
        FIRST.peer_id,
        len(proof.to_bytes()),
        "believed",
        verdict.summary,
        b"",
        b"",
        None,
        None,
        None,
        "",
    )


class FakeNode:
    """`prompt` steers it: "fail at once", "fail half way", "crash", "wait" (for ever), "unverified",
    "cheated"; anything else is answered."""

    def __init__(self) -> None:
        self.reached = NETCHECK
        self.ready = True
        self.name = "fake"
        self.running = 0
        self.cancelled = 0
        self.drained = False
        self.burned = False
        self.memory = FakeMemory()
        self.fragments = FakeFragments()
        self.seen = SWARM
        self.idle = trio.Event()
        self.requests: list[GenerateRequest | EmbedRequest | FidelityRequest | ResumeRequest] = []

    def status(self) -> NodeStatus:
        reason = "" if self.ready else "no speed measured yet"
        addresses = (f"/ip4/127.0.0.1/tcp/4510/p2p/{COORDINATOR.peer_id}",)
        return NodeStatus(
            COORDINATOR.peer_id, self.name, "0.1.0", addresses, 12.5, self.ready, reason, 1, 1, self.running, 3, 40, 5, 1000, 2**30
        )

    async def peers(self) -> list[PeerView]:
        return [
            PeerView(FIRST.peer_id, "node\x1b[31m", "nexus/0.1.0", ("/ip4/192.0.2.1/tcp/4510",), "out", None, 2**30, ("nano 0-1",))
        ]

    async def swarm(self, limit: int) -> SwarmView:
        return replace(self.seen, nodes=self.seen.nodes[:limit])

    async def add_peer(self, address: str) -> PeerView:
        if "192.0.2.9" in address:
            raise UnreachableError("nobody answers at 192.0.2.9", "Check that the node runs")
        return (await self.peers())[0]

    async def ping(self, peer_id: str) -> float:
        if peer_id != FIRST.peer_id:
            raise NotFoundError(f"there is no peer {peer_id!r}", "See: nexus peers")
        return 0.0123

    async def netcheck(self) -> NetcheckView:
        return self.reached

    async def add_model(
        self, source: Path | str, name: str | None, profile: str
    ) -> AsyncGenerator[Progress | Notice | ModelView, None]:
        yield Progress(COORDINATOR.peer_id, "import", 10, 100)
        yield Notice(f"profile {profile}\x1b[2J")
        yield await self.model(name or str(source))

    async def fidelity(self, request: FidelityRequest) -> AsyncGenerator[Progress | Fidelity, None]:
        self.requests.append(request)
        if request.model == "missing":
            raise NotFoundError("there is no model 'missing'", "See: nexus model list")
        yield Progress(COORDINATOR.peer_id, "layer.0", 10, 100)
        yield FIDELITY

    async def models(self) -> list[ModelView]:
        return [await self.model("nano")]

    async def model(self, name: str) -> ModelView:
        if name == "missing":
            raise NotFoundError("there is no model 'missing'", "See: nexus model list")
        if name == "bug":
            raise ZeroDivisionError("secret detail")
        return ModelView(name, manifest(), ((0, 1),), 2000, (FIRST.peer_id,), FIDELITY if name == "compared" else None)

    async def plan(self, model: str, stages: int | None) -> PlanView:
        if stages is not None and stages > 2:
            raise CapacityError(f"there are 2 nodes, not {stages}", "Ask for fewer stages")
        return plan_view()

    async def plan_report(self, request: PlanRequest) -> PlanReport:
        if request.machines is not None:
            return imagined(request, manifest(), request.model, 8)
        view = await self.plan(request.model, request.stages)
        layers = (LayersView(0, 1, 2, 2, 2), LayersView(1, 2, 1, 1, 2))
        fragments = (FragmentView(FIRST.peer_id, "node-0", 0, 2, 2000, "serves it already"),)
        short = ("layer 1 has 1 of 2 replicas: 2.0 KiB missing",)
        rates = (view, request.streams, 20_000.0, 8_000.0, 1, 32_000.0, 50.0, 125.0)
        return PlanReport(*rates, 8000, 1 << 20, 2000, layers, fragments, short)

    async def judge(self, model: str, nodes: int | None) -> JudgementView:
        if model == "broken":
            raise VerificationError("plan.coverage does not hold: layer 1 is computed 0 times", "Plan it again")
        proofs = (
            Proven("plan.coverage", "every one of 2 layers is computed exactly once", 0, 0, 1.25),
            Proven("norm.squares", "the sums of 64 squares stay below 2^53", 2**44, 2**53, 2.5),
        )
        return JudgementView(plan_view(), proofs if nodes is None else proofs[:1])

    async def resume(self, request: ResumeRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        if not bundle().terms.session.hex().startswith(request.answer):
            raise NotFoundError(f"no answer {request.answer!r} is kept here", "Ask again")
        yield Planned(plan_view(), bundle().terms.session, bundle().terms.session)
        for index, text in enumerate(ANSWER[len(request.tokens) :], len(request.tokens)):
            yield Token(index, index, text)
        yield finished(2, None)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        if request.prompt == "fail at once":
            raise NotFoundError("there is no model 'x'", "See: nexus model list")
        self.running += 1
        try:
            yield Planned(plan_view(), bundle().terms.session, bundle().terms.session)
            yield Progress(SECOND.peer_id, "fetch layer.1", 10, 1000)
            for index, text in enumerate(ANSWER):
                if index == 2 and request.prompt == "fail half way":
                    raise UnreachableError("node-1 is gone", "Try again")
                if index == 2 and request.prompt == "crash":
                    raise ZeroDivisionError("secret detail")
                if index == 2 and request.prompt == "wait":
                    await trio.sleep_forever()
                yield Token(index, index, text)
            audit = None if request.verify is None else audit_view("convicted" if request.prompt == "cheated" else "ok")
            yield finished(1 if request.prompt == "unverified" else 2, audit)
        except (trio.Cancelled, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
            self.idle.set()

    async def embed(self, request: EmbedRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        yield Planned(plan_view(), bundle().terms.session, bundle().terms.session)
        for index in range(len(request.texts)):
            yield Embedding(index, (0.5, -0.25, 1e-9))
        yield finished()

    async def sessions(self) -> list[SessionSummary]:
        view = session_view()
        return [SessionSummary(view.session, view.model, view.ended_ms, 3000, len(view.audits))]

    async def session(self, session: str) -> SessionView:
        if not session_view().session.hex().startswith(session):
            raise NotFoundError(f"no session {session!r} is kept", "`nexus audit list` shows those that are")
        return session_view()

    async def audit(self, session: str, mode: str) -> AsyncGenerator[Progress | AuditView, None]:
        view = await self.session(session)
        yield Progress(FIRST.peer_id, "auditing", 0, 0)
        yield replace(view.audits[0], stages=tuple(replace(stage, mode=mode) for stage in view.audits[0].stages))

    async def evidence(self) -> list[EvidenceView]:
        return [evidence_view()]

    async def evidence_of(self, evidence: str) -> EvidenceView:
        if not evidence_view().id.hex().startswith(evidence):
            raise NotFoundError(f"no evidence {evidence!r} is kept here", "`nexus evidence list` shows what is")
        return evidence_view()

    async def evidence_file(self, evidence: str) -> EvidenceFile:
        return EvidenceFile((await self.evidence_of(evidence)).id, fork().to_file())

    async def slashed(self) -> list[SlashedView]:
        view = evidence_view()
        state = "slashed" if self.burned else "suspended"
        return [SlashedView(view.accused, view.name, state, view.kind, view.id, view.known_ms, view.summary)]

    async def resume_burning(self) -> int:
        self.burned = True
        return 1

    async def ledger(self, peer: str | None) -> LedgerView:
        if peer == "nobody":
            raise NotFoundError("no peer in reach is called 'nobody'", "See: nexus peers")
        entries = (
            EntryView(0, "PAY", 200, bundle().terms.session, (FIRST.peer_id, SECOND.peer_id)),
            EntryView(1, "EARN", 90, bundle().terms.session, ()),
        )
        if peer is None:
            frozen = "" if self.ready else "it is older than what this node signed"
            return LedgerView(COORDINATOR.peer_id, "fake", "good", "", 0, -200, 90, 90, 200, 2, 2, 0, 0, 0, 0.5, 1, frozen, entries)
        cause = "3 of its first 20 executions are right"
        return LedgerView(
            FIRST.peer_id,
            "node\x1b[31m",
            "probation",
            cause,
            0,
            1_500_000,
            0,
            90,
            0,
            20_000,
            16_384,
            70,
            3,
            1,
            0.66,
            2,
            "",
            entries,
        )

    async def drain(self) -> None:
        self.drained = True
        if self.running:
            await self.idle.wait()


@contextmanager
def served(node: FakeNode, path: Path) -> Iterator[Control]:
    """The control API of `node` on a Unix socket, from a thread of its own, so that tests may use any client."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("critical"))
    token: list[trio.lowlevel.TrioToken] = []
    shutdown: list[trio.Event] = []
    control = Control(node, lambda: None)
    started = ThreadEvent()

    async def run() -> None:
        token.append(trio.lowlevel.current_trio_token())
        shutdown.append(trio.Event())
        with bound_socket(path) as listener:
            started.set()
            await serve_on(listener, control_app(control), shutdown[0])

    thread = Thread(target=trio.run, args=(run,))
    thread.start()
    started.wait(10)
    try:
        yield control
    finally:
        token[0].run_sync_soon(shutdown[0].set)
        thread.join(10)
        assert not thread.is_alive()
