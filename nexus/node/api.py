"""What a node offers to whatever steers it: the control API, later the OpenAI-compatible gateway. Plain data in, plain data out.

`nexus.node.node.Node` implements `NodeApi`; the gateway is written against this protocol alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from nexus.core.fidelity import Fidelity
from nexus.core.manifest import Manifest
from nexus.node.fragments_api import DrainView, FragmentsApi, ServingView, VersionView
from nexus.node.memory.api import AddedView, ExportPart, MemoryApi, ReindexView, VerifyView
from nexus.node.netcheck import NetcheckView
from nexus.node.progress import Notice, Progress
from nexus.node.swarm_view import SwarmView
from nexus.proof.bundle import AnswerProof, Bundle
from nexus.proof.solver import Proven

if TYPE_CHECKING:
    from nexus.node.planning import PlanReport, PlanRequest


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """`ready`: whether the node can serve a stage now; `not_ready_because` if not. `memory_*_bytes`: weights and KV caches."""

    peer_id: str
    name: str
    version: str
    addresses: tuple[str, ...]
    uptime_s: float
    ready: bool
    not_ready_because: str
    peers: int
    models: int
    sessions: int
    sessions_served: int
    steps_served: int
    receipts_signed: int
    memory_used_bytes: int
    memory_limit_bytes: int


@dataclass(frozen=True, slots=True)
class PeerView:
    """`rtt_s`: last measured round trip, or None. `models`: "name layers a-b" as the peer announces them."""

    peer_id: str
    name: str
    agent: str
    addresses: tuple[str, ...]
    direction: str
    rtt_s: float | None
    memory_bytes: int
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelView:
    """`held_layers`: ranges [start, end) whose pieces are all here. `providers`: peers known to hold some of it. `fidelity`: of an
    exact model, as it was last measured on this node. `serving`: what of it this node undertook to serve and has. `replicas`: per
    layer the nodes in reach that serve it, this one too. `versions`: of its name, the oldest first; `version`: which one this is, 0
    where the name has none; `publisher`: who makes them, or ""."""

    name: str
    manifest: Manifest
    held_layers: tuple[tuple[int, int], ...]
    held_bytes: int
    providers: tuple[str, ...]
    fidelity: Fidelity | None = None
    serving: tuple[tuple[int, int], ...] = ()
    replicas: tuple[int, ...] = ()
    version: int = 0
    versions: tuple[VersionView, ...] = ()
    publisher: str = ""


@dataclass(frozen=True, slots=True)
class StageView:
    """One row of a plan, with the reason for its size."""

    stage: int
    peer_id: str
    name: str
    start: int
    end: int
    weight_bytes: int
    memory_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class PlanView:
    model: str
    model_root: bytes
    plan_root: bytes
    stages: tuple[StageView, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class JudgementView:
    """A plan, and what was proven of it and of its model before it may run."""

    plan: PlanView
    proofs: tuple[Proven, ...]


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """Sampling options as `nexus.proof.arithmetic.sampler.Sampling` has them. `seed` None: a fresh one is drawn.
    `stages` None: the node decides. `receipts` False: the stages sign nothing, and nothing of the answer can be verified.
    `verify`: how the answer is audited, one of `nexus.core.audits.MODES`; None: as the settings say."""

    model: str
    prompt: str
    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stages: int | None = None
    receipts: bool = True
    verify: str | None = None


@dataclass(frozen=True, slots=True)
class ResumeRequest:
    """`answer`: the id that `Planned` gave, or its beginning. `tokens`: what the reader has of it already."""

    answer: str
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class EmbedRequest:
    """`verify`: how the answer is audited, one of `nexus.core.audits.MODES`; None: as the settings say."""

    texts: tuple[str, ...]
    model: str = "minilm"
    stages: int | None = None
    verify: str | None = None


@dataclass(frozen=True, slots=True)
class FidelityRequest:
    """`text`: what to compare on, called `text_name`; None takes the one that comes with the program. `against`: the directory with
    the float weights; None is the one that the model was added from."""

    model: str
    text: str | None = None
    text_name: str = ""
    against: str | None = None


# What happens while a request runs, in order: Planned, any Progress, then Token or Embedding events, then one Finished.
@dataclass(frozen=True, slots=True)
class Planned:
    """`answer`: by which it can be taken up again; of an answer over several sessions that of the first."""

    plan: PlanView
    session: bytes
    answer: bytes


@dataclass(frozen=True, slots=True)
class Token:
    """`text`: what this token adds to the answer, possibly nothing until a character is whole."""

    step: int
    token: int
    text: str


@dataclass(frozen=True, slots=True)
class Embedding:
    index: int
    vector: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class StageSummary:
    """Who did what: one row of the closing table. `compute_s`: time in the engine, as that node reports it."""

    stage: int
    peer_id: str
    name: str
    start: int
    end: int
    steps: int
    receipts: int
    compute_s: float


@dataclass(frozen=True, slots=True)
class StageAuditView:
    """What came of the audit of one stage. `mode`, `verdict`: of `nexus.core.audits`. `steps`, `cells`: how much was checked.
    `detail`: why it is not "ok", in a sentence. `evidence`: the id of the proof, empty where there is none."""

    stage: int
    peer_id: str
    name: str
    mode: str
    verdict: str
    steps: int
    cells: int
    cost_s: float
    evidence: bytes
    detail: str


@dataclass(frozen=True, slots=True)
class AuditView:
    """One audit of a session. `at_ms`: when it ended."""

    session: bytes
    at_ms: int
    stages: tuple[StageAuditView, ...]


@dataclass(frozen=True, slots=True)
class SessionSummary:
    """A session of this node's users that is kept. `size`: bytes on the disk. `audits`: how many there were."""

    session: bytes
    model: str
    ended_ms: int
    size: int
    audits: int


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session of this node's users that is kept, and what came of its audits, the latest last. `ended_ms`: when it ended."""

    session: bytes
    model: str
    model_root: bytes
    ended_ms: int
    steps: int
    stages: int
    audits: tuple[AuditView, ...]


@dataclass(frozen=True, slots=True)
class EvidenceView:
    """A proof that a node cheated. `known_ms`: since when evidence against that node is known here. `sender`: the peer that it came
    from, "" where this node found it. `state`: "believed"; "waiting" for the weights of its model; or "not believed" (any more).
    `summary`: what is proven, in words. `session` and what follows: where, empty or None where nothing fits."""

    id: bytes
    kind: str
    accused: str
    name: str
    known_ms: int
    sender: str
    size: int
    state: str
    summary: str
    session: bytes
    model_root: bytes
    stage: int | None
    step: int | None
    layer: int | None
    op: str


@dataclass(frozen=True, slots=True)
class EvidenceFile:
    """`content`: the file that `nexus evidence verify` takes."""

    id: bytes
    content: bytes


@dataclass(frozen=True, slots=True)
class SlashedView:
    """A convicted node. `state`: "slashed", or "suspended" while the fuse keeps its bond from burning."""

    peer_id: str
    name: str
    state: str
    kind: str
    evidence: bytes
    known_ms: int
    summary: str


@dataclass(frozen=True, slots=True)
class EntryView:
    """An entry of an account. `amount`: micro-credits, all that a payment took or what was earned. `payees`: of a payment."""

    seq: int
    kind: str
    amount: int
    session: bytes
    payees: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LedgerView:
    """An account as this node read and checked it, and what this node thinks of its owner. Amounts in micro-credits.

    `standing`: of `nexus.swarm.standing.STATES`, with its cause; `until_ms`: when it ends by itself, or 0. `bond`: 0 once it is
    burned. `entries`: how many the account has, of which the first `checked` were checked. `owed`: what it owes this node for work,
    below 0 what it paid in advance.
    `reputation`: the chance that its next audit finds it right, after `audits_ok` and `audits_bad`. `price`: per token and layer.
    `frozen`: why this node's own ledger cannot be used, or "". `chain`: the newest entries, the oldest of them first.
    """

    peer_id: str
    name: str
    standing: str
    cause: str
    until_ms: int
    balance: int
    bond: int
    earned: int
    paid: int
    entries: int
    checked: int
    owed: int
    audits_ok: int
    audits_bad: int
    reputation: float
    price: int
    frozen: str
    chain: tuple[EntryView, ...]


@dataclass(frozen=True, slots=True)
class EarlierPart:
    """Of an answer that went on over other nodes when some went away: a session before the last, as far as it stands. `audit`: as
    in `Finished`, None also where it is still under way; `nexus audit show` has it then."""

    session: bytes
    bundle: Bundle
    audit: AuditView | None


@dataclass(frozen=True, slots=True)
class Finished:
    """`reason`: "stop" (end token or stop text), "length" (max_tokens or context). `receipts_verified` of `receipts` hold.
    `stages`, `bundle`, `audit`: of the session that ended the answer. `audit`: None where nothing can be audited: no receipts, or
    the float profile. `earlier`: the parts of the answer that other sessions gave, in order."""

    reason: str
    prompt_tokens: int
    completion_tokens: int
    first_token_s: float
    total_s: float
    receipts: int
    receipts_verified: int
    stages: tuple[StageSummary, ...]
    bundle: Bundle
    audit: AuditView | None = None
    earlier: tuple[EarlierPart, ...] = ()

    @property
    def proof(self) -> AnswerProof:
        return AnswerProof(1, (*(part.bundle for part in self.earlier), self.bundle))


Event = Planned | Progress | Notice | Token | Embedding | Finished
# What any stream may bring.
StreamItem = (
    Event
    | ModelView
    | Fidelity
    | AuditView
    | AddedView
    | VerifyView
    | ReindexView
    | ExportPart
    | ServingView
    | VersionView
    | DrainView
)


class NodeApi(Protocol):
    """Every method raises the errors of `nexus.core.errors`."""

    @property
    def memory(self) -> MemoryApi: ...

    @property
    def fragments(self) -> FragmentsApi: ...

    def status(self) -> NodeStatus: ...

    async def peers(self) -> list[PeerView]: ...

    async def swarm(self, limit: int) -> SwarmView:
        """Every node that is known, at most `limit` of them listed, and the replicas of every model."""
        ...

    async def add_peer(self, address: str) -> PeerView:
        """Dial a multiaddr, remember it in the address book, return what the peer says of itself."""
        ...

    async def ping(self, peer_id: str) -> float:
        """Round-trip time in seconds; `peer_id` may be a unique prefix or a node's name."""
        ...

    async def netcheck(self) -> NetcheckView:
        """Whether and how others reach this node; takes up to a minute."""
        ...

    def add_model(self, source: Path | str, name: str | None, profile: str) -> AsyncIterator[Progress | Notice | ModelView]:
        """Import a Hugging Face directory or a built-in ("nano", "minilm"); progress, then the model as the last item.

        `profile`: "exact", "float", or "auto", which is exact where the model can be, and else float with a notice that says why.
        `name` None: the directory's, with "-float" behind it where the float profile was asked for.
        """
        ...

    def fidelity(self, request: FidelityRequest) -> AsyncIterator[Progress | Fidelity]:
        """Compare an exact model with the float model that it was made from; progress, then the report as the last item, which is
        kept and shown with the model."""
        ...

    async def models(self) -> list[ModelView]: ...

    async def model(self, name: str) -> ModelView:
        """By name, or by a unique prefix of the hex root."""
        ...

    async def plan(self, model: str, stages: int | None) -> PlanView: ...

    async def plan_report(self, request: PlanRequest) -> PlanReport:
        """The plan that would run now, or over imagined machines, with what is predicted of it. Raises UsageError for a set of
        machines that contradicts itself, CapacityError that says what is missing where the model has no room."""
        ...

    async def judge(self, model: str, nodes: int | None) -> JudgementView:
        """Prove the plan that would run now, or with `nodes` nodes like this one. Raises VerificationError where it does not
        hold."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        """Closing the iterator early cancels the work everywhere."""
        ...

    def resume(self, request: ResumeRequest) -> AsyncIterator[Event]:
        """Go on with an answer that broke off when its reader or this daemon went away, from the token after those given.

        Raises NotFoundError, UsageError where the tokens are not of this answer."""
        ...

    def embed(self, request: EmbedRequest) -> AsyncIterator[Event]: ...

    async def sessions(self) -> list[SessionSummary]:
        """Sessions of this node's users that are kept, the latest first."""
        ...

    async def session(self, session: str) -> SessionView:
        """By a unique prefix of its id in hex. Raises NotFoundError, UsageError."""
        ...

    def audit(self, session: str, mode: str) -> AsyncIterator[Progress | AuditView]:
        """Audit a kept session; progress, then what came of it as the last item."""
        ...

    async def evidence(self) -> list[EvidenceView]:
        """Proofs against other nodes that are kept here, the latest first, then those that wait."""
        ...

    async def evidence_of(self, evidence: str) -> EvidenceView:
        """By a unique prefix of its id in hex. Raises NotFoundError, UsageError."""
        ...

    async def evidence_file(self, evidence: str) -> EvidenceFile: ...

    async def slashed(self) -> list[SlashedView]:
        """Convicted nodes, the latest first."""
        ...

    async def resume_burning(self) -> int:
        """Burn the bonds that the fuse held; how many those are."""
        ...

    async def ledger(self, peer: str | None) -> LedgerView:
        """A node's account, read from itself and checked; None: this node's own. `peer` as in `ping`."""
        ...

    async def drain(self) -> None:
        """Take no new session, from here or from a peer; return when the running ones are over. The caller sets the deadline."""
        ...
