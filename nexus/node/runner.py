"""Runs a user's request: finds the model, plans it over the nodes in reach, runs the session, turns tokens into text."""

from __future__ import annotations

import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import structlog
import trio

from nexus.core.audits import CONVICTED, DUAL, LIGHT, OFF, UNANSWERED
from nexus.core.errors import (
    CapacityError,
    LocalError,
    MalformedError,
    NexusError,
    NotAllowedError,
    NotFoundError,
    PeerError,
    TimedOutError,
    UnreachableError,
    UsageError,
    VerificationError,
)
from nexus.core.hashing import leaf_hash
from nexus.core.keys import Identity, peer_id_of, public_key_of
from nexus.core.manifest import CAUSAL, ENCODER, EXACT, Manifest
from nexus.core.plan import DTYPES, Plan
from nexus.models import BUILTIN_NAMES
from nexus.network.transport import PeerAddress, Transport
from nexus.node.api import (
    AuditView,
    EarlierPart,
    Embedding,
    EmbedRequest,
    Event,
    Finished,
    GenerateRequest,
    Planned,
    PlanView,
    ResumeRequest,
    StageSummary,
    Token,
)
from nexus.node.audit.sessions import SessionAudits
from nexus.node.environment import SYSTEM, Environment
from nexus.node.failover import Absent, Course, Job, Part, PartAudit
from nexus.node.health import Health
from nexus.node.infer.coordinator import Coordinator, Ended, SessionEvent, StageProgress
from nexus.node.infer.messages import PAYLOAD_MAX
from nexus.node.live import Live
from nexus.node.models import Models
from nexus.node.placing import candidates_of, choose, held_ranges
from nexus.node.planning import plan_view
from nexus.node.progress import Notice, Progress
from nexus.node.resuming import AnswerJournal, course_of, job_of, request_of
from nexus.proof.arithmetic.plan import ExactPlan, trace_shape
from nexus.proof.audit import chain_of
from nexus.proof.bundle import Bundle
from nexus.proof.evidence import Evidence
from nexus.proof.receipts import SPEC, STEPS_MAX, WINDOW, Terms, millionths, tokens_from_bytes, tokens_to_bytes
from nexus.storage.answers import AnswerStore
from nexus.swarm.audit_policy import can_audit, other_nodes
from nexus.swarm.costs import RttUs, rtt_default
from nexus.swarm.membership import NodeRecord
from nexus.swarm.placement import STREAMS, Placement
from nexus.swarm.session import Result

if TYPE_CHECKING:
    from nexus.engine.tokenizer import Tokenizer

log = structlog.get_logger("nexus.runner")

ATTEMPTS_MAX = 3
# A node that did not answer is left out of plans for so long; its record may live on for minutes.
AVOID_S = 60.0
# When nobody is left to plan with, one that fell silent is waited for.
COMEBACK_S = 30.0
COMEBACK_EVERY_S = 0.5
# The audit of an answer's earlier parts keeps nobody waiting longer for its end.
EARLIER_AUDITS_S = 10.0
# One in whose session something did not hold may be honest, and is avoided for so long.
DOUBT_S = 600.0
EVENTS_MAX = 64
# What a session may grow to is planned for; a longer answer is refused by the stage whose memory it would not fit.
PLANNED_TOKENS = 2048
# So long a request waits for nodes that are stuck, where nothing can be planned without them.
PATIENCE_S, PATIENCE_STEP_S = 10.0, 1.0


# Pays for a session: the prices of its nodes, and who forfeited the pay.
Submit = Callable[[Evidence], Awaitable[None]]
Settle = Callable[[Bundle, Mapping[bytes, int], Collection[bytes]], Awaitable[None]]

# What canaries ask about.
_WORDS = (
    *("why", "what", "when", "how", "where", "who", "does", "is", "are", "can", "will", "the", "a", "my", "your", "this", "that"),
    *("water", "light", "house", "river", "music", "winter", "letter", "garden", "story", "bread", "stone", "cloud", "mother"),
    *("number", "answer", "question", "morning", "market", "machine", "window", "colour", "people", "country", "summer", "road"),
)


@dataclass
class _Clock:
    began_s: float = field(default_factory=trio.current_time)
    first_s: float | None = None

    def first(self) -> None:
        if self.first_s is None:
            self.first_s = trio.current_time() - self.began_s

    @property
    def total_s(self) -> float:
        return trio.current_time() - self.began_s


class Runner:
    """Requests of this node's own users. `records`: what other nodes say of themselves; `own`: what this one would say. `judge`:
    raises for a plan that is not proven sound, and then it does not run. `audits`: what becomes of a session that ended.
    `submit`: takes a proof that a node cheated. `settle`: pays for it; None: nobody is paid.
    `current`: the model that a name with versions means now, None for one without.
    `broke_off`: is told of nodes, by public key, that made a session fail; `fell_silent`: of those that gave no sign of life."""

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        models: Models,
        records: Callable[[], Sequence[NodeRecord]],
        own: Callable[[], NodeRecord],
        nursery: trio.Nursery,
        sessions_max: int,
        import_builtin: Callable[[str], Awaitable[None]],
        judge: Callable[[Plan, Manifest, Sequence[Plan]], Awaitable[object]],
        audits: SessionAudits,
        submit: Submit,
        settle: Settle | None = None,
        broke_off: Callable[[bytes], None] | None = None,
        fell_silent: Callable[[Terms, Plan, bytes], Awaitable[None]] | None = None,
        environment: Environment = SYSTEM,
        rtt_us: RttUs = rtt_default,
        current: Callable[[str], Awaitable[bytes | None]] | None = None,
        answers: AnswerStore | None = None,
        health: Health | None = None,
    ) -> None:
        self._transport = transport
        self._identity = identity
        self._models = models
        self._records = records
        self._own = own
        self._nursery = nursery
        self._sessions_max = sessions_max
        self._import_builtin = import_builtin
        self._judge = judge
        self._audits = audits
        self._submit = submit
        self._settle = settle
        self._broke_off = broke_off
        self._fell_silent = fell_silent
        self._rng = environment.rng
        self._rtt_us = rtt_us
        self._current = current
        self._answers = answers
        self._health = health
        self._running: set[Coordinator] = set()
        self._courses: set[Course] = set()
        self._cut_off: set[bytes] = set()  # sessions that run, of which a node was convicted
        self._prices: dict[bytes, dict[bytes, int]] = {}  # by session that runs: what its nodes asked when it was planned
        # Nodes that did not answer, and until when to plan without them, unless they sign a newer record than of then.
        self._gone: dict[bytes, tuple[float, int]] = {}
        self._doubted: dict[bytes, float] = {}  # nodes in whose sessions something did not hold, and until when to avoid them
        self.live = Live()
        self.comeback_s = COMEBACK_S

    def partners(self) -> set[bytes]:
        """The nodes of all sessions that run for this node's users, by public key."""
        return {node for coordinator in self._running for node in coordinator.nodes}

    async def resolve(self, name: str) -> tuple[str, bytes]:
        """The model that `name` stands for: of a name with versions the one that counts now, otherwise a local name or root, else a
        built-in, else what a peer announces.

        A built-in's name never means a stranger's model. Raises NotFoundError, UsageError.
        """
        versioned = await self._current(name) if self._current is not None else None
        if versioned is not None:
            return name, versioned
        try:
            return self._find(name)
        except NotFoundError:
            if name in BUILTIN_NAMES:
                await self._import_builtin(name)
                return self._find(name)
        announced = {
            holding.model_root: holding.name
            for record in self._records()
            for holding in record.models
            if holding.name == name or (len(name) >= 8 and holding.model_root.hex().startswith(name.lower()))
        }
        if not announced:
            raise NotFoundError(f"no model {name!r} here, and no peer announces one", "`nexus model list`; `nexus model add PATH`")
        if len(announced) > 1:
            roots = ", ".join(sorted(root.hex()[:16] for root in announced))
            raise UsageError(f"peers announce different models as {name!r}", f"Say which by its root: {roots}")
        (root,) = announced
        return announced[root] or root.hex()[:16], root

    def _find(self, name: str) -> tuple[str, bytes]:
        catalog = self._models.catalog
        root = catalog.find(name)
        return name if name in catalog.names() else catalog.name_of(root), root

    def _present(self) -> list[NodeRecord]:
        """Records of nodes that have not just failed to answer."""
        now_s = trio.current_time()
        self._gone = {node: (until_s, issued_ms) for node, (until_s, issued_ms) in self._gone.items() if until_s > now_s}
        present = [record for record in self._records() if self._gone.get(record.node, (0.0, -1))[1] < record.issued_ms]
        return present if self._health is None else [record for record in present if self._health.is_usable(record.node)]

    def sources(self, model_root: bytes) -> list[PeerAddress]:
        """Peers that announce pieces of a model."""
        return [
            PeerAddress(record.peer_id, record.addresses)
            for record in self._present()
            if any(holding.model_root == model_root and holding.held for holding in record.models)
        ]

    async def manifest(self, name: str) -> tuple[str, Manifest]:
        found, root = await self.resolve(name)
        return found, await self._models.manifest(root, self.sources(root))

    async def place(
        self, manifest: Manifest, stages: int | None, without: frozenset[bytes] = frozenset(), streams: int = STREAMS
    ) -> Placement:
        """Who computes what, over the nodes known now. Those in whose sessions something did not hold get no part while the others
        can do without them: it may be their neighbours that cheat."""
        now_s = trio.current_time()
        self._doubted = {node: until_s for node, until_s in self._doubted.items() if until_s > now_s}
        if self._doubted:
            try:
                return await self._place(manifest, stages, without | self._doubted.keys(), streams)
            except (CapacityError, UsageError):
                log.info("doubted_nodes_planned_with", nodes=[peer_id_of(node) for node in sorted(self._doubted)])
        return await self._place(manifest, stages, without, streams)

    async def _place(self, manifest: Manifest, stages: int | None, without: frozenset[bytes], streams: int) -> Placement:
        """A plan of nodes that answer now. Where nothing can be planned because some are stuck, they are waited for a little."""
        patient_until_s = trio.current_time() + PATIENCE_S
        while True:
            try:
                placement = await self._search(manifest, stages, without, streams)
            except (CapacityError, UsageError):
                if self._health is None or not self._health.stuck() - without or trio.current_time() >= patient_until_s:
                    raise
                await trio.sleep(PATIENCE_STEP_S)
                continue
            others = {stage.node for stage in placement.plan.stages} - {self._identity.public_key}
            silent = frozenset() if self._health is None else await self._health.check(sorted(others))
            if not silent or trio.current_time() >= patient_until_s:
                return placement
            log.info("planned_again", without=[peer_id_of(node) for node in sorted(silent)], reason="they do not answer")

    async def _search(self, manifest: Manifest, stages: int | None, without: frozenset[bytes], streams: int) -> Placement:
        """Nodes that leave get no part, unless others would have to fetch for it first what these still serve."""
        own = self._own()
        records = [own, *(record for record in self._present() if record.node != own.node and record.node not in without)]
        if not any(record.leaving for record in records):
            return await self._choose(manifest, records, own.node, stages, streams)
        staying: Placement | None = None
        failure: NexusError | None = None
        try:
            staying = await self._choose(manifest, records, own.node, stages, streams)
        except (CapacityError, UsageError) as error:
            failure = error
        if staying is not None and not any(staying.fetch_bytes):
            return staying
        try:
            with_leaving = await self._choose(manifest, records, own.node, stages, streams, leaving=True)
        except (CapacityError, UsageError) as error:
            raise failure or error from error
        return with_leaving if staying is None or not any(with_leaving.fetch_bytes) else staying

    async def _choose(
        self,
        manifest: Manifest,
        records: Sequence[NodeRecord],
        coordinator: bytes,
        stages: int | None,
        streams: int,
        *,
        leaving: bool = False,
    ) -> Placement:
        tokens, dtype = min(manifest.context, PLANNED_TOKENS), DTYPES[manifest.profile][0]
        # Off the trio thread: with many unlike nodes the search takes a noticeable part of a second.
        search = partial(
            choose,
            manifest,
            candidates_of(records, manifest, leaving=leaving),
            coordinator=coordinator,
            stages=stages,
            dtype=dtype,
            context=tokens,
            streams=streams,
            rtt_us=self._rtt_us,
            seed=self._rng.randbytes(16),
        )
        return await trio.to_thread.run_sync(search)

    def plan_view(self, name: str, manifest: Manifest, placement: Placement) -> PlanView:
        names = {record.node: record.name for record in (self._own(), *self._records())}
        return plan_view(name, manifest, placement, names)

    def in_reach(self) -> list[NodeRecord]:
        """This node and those that plans are made of now."""
        own = self._own()
        return [own, *(record for record in self._present() if record.node != own.node)]

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Events of one generation. Closing the generator cancels the work on every stage."""
        name, manifest, tokenizer = await self._open_model(request.model, CAUSAL)
        prompt = await trio.to_thread.run_sync(tokenizer.encode, request.prompt)
        _check_prompt(prompt, request.max_tokens, manifest)
        job = Job(
            name=name,
            manifest=manifest,
            inputs=(tokens_to_bytes(prompt),),
            steps_max=min(request.max_tokens, manifest.context - len(prompt), STEPS_MAX),
            temperature=millionths(request.temperature),
            top_k=request.top_k,
            top_p=max(1, millionths(request.top_p)),
            min_p=millionths(request.min_p),
            repetition_penalty=millionths(request.repetition_penalty),
            seed=self._rng.getrandbits(64) if request.seed is None else request.seed,
            end_tokens=tuple(tokenizer.end_tokens),
            stages=request.stages,
            receipts=request.receipts,
            verify=request.verify,
        )
        self._check_auditable(job)
        answer = _Answer(tokenizer, request.stop)
        journal = AnswerJournal(self._answers, request_of(job, request.stop)) if self._answers is not None else None
        async with aclosing(self._tell(job, Course(job), answer, journal, 0)) as events:
            async for event in events:
                yield event

    async def resume(self, request: ResumeRequest) -> AsyncGenerator[Event, None]:
        """Events of an answer that broke off, from the token after those that the reader has."""
        if self._answers is None:
            raise NotFoundError("this node writes no answers down", "Ask again")
        store = self._answers
        answer, asked = await trio.to_thread.run_sync(store.find, request.answer)
        if any(course.answer == answer for course in self._courses):
            raise NotAllowedError("this answer is still on its way to another reader", "Wait until that one is gone")
        manifest = await self._models.manifest(asked.model_root, self.sources(asked.model_root))
        job = job_of(asked, manifest)
        tokenizer = await self._tokenizer(manifest)
        parts = await trio.to_thread.run_sync(store.parts, answer)
        course = await trio.to_thread.run_sync(course_of, answer, job, parts, request.tokens)
        journal = AnswerJournal(store, asked, begun=True)
        text = _Answer(tokenizer, asked.stop)
        async with aclosing(self._tell(job, course, text, journal, len(request.tokens))) as events:
            async for event in events:
                yield event

    async def _tell(
        self, job: Job, course: Course, answer: _Answer, journal: AnswerJournal | None, known: int
    ) -> AsyncGenerator[Event, None]:
        """An answer as text. `known`: tokens that the reader has already."""
        clock = _Clock()
        prompt_tokens = len(job.inputs[0]) // 4
        for step, payload in enumerate(course.shown):
            (token,) = tokens_from_bytes(payload)
            text = answer.push(token, is_end=token in job.end_tokens)
            if text is not None and step >= known:
                yield Token(step, token, text)
            if answer.stopped:
                course.want(step + 1)
                break
        async with aclosing(self._run(job, course, journal)) as events:
            async for event, coordinator in events:
                match event:
                    case Result(step, payload):
                        clock.first()
                        (token,) = tokens_from_bytes(payload)
                        text = answer.push(token, is_end=token in job.end_tokens)
                        if answer.stopped:
                            course.want(step + 1)
                            if coordinator is not None:
                                await coordinator.stop()
                        if text is not None:
                            yield Token(step, token, text)
                    case Part():
                        rest = answer.finish()
                        if rest:
                            yield Token(answer.steps - 1, answer.last_token, rest)
                        reason = "stop" if answer.stopped or answer.ended else "length"
                        total_s = clock.total_s
                        audit = await self._audit(event)
                        yield await self._finished(course, event, reason, prompt_tokens, answer.steps, clock, total_s, audit)
                    case _:
                        yield event
        if journal is not None:
            await journal.end(course)

    async def embed(self, request: EmbedRequest) -> AsyncGenerator[Event, None]:
        """One vector per text, in order. Texts longer than the model's context are refused, not cut."""
        name, manifest, tokenizer = await self._open_model(request.model, ENCODER)
        texts = await trio.to_thread.run_sync(lambda: [tokenizer.encode(text) for text in request.texts])
        for number, tokens in enumerate(texts):
            if len(tokens) > manifest.context:
                raise UsageError(
                    f"text {number + 1} has {len(tokens)} tokens; {name} reads {manifest.context}", "Split it into shorter texts"
                )
        inputs = tuple(tokens_to_bytes(tokens) for tokens in texts)
        job = Job(name, manifest, inputs, len(texts), request.stages, verify=request.verify)
        self._check_auditable(job)
        clock = _Clock()
        course = Course(job)
        async with aclosing(self._run(job, course)) as events:
            async for event, _ in events:
                match event:
                    case Result(step, payload):
                        clock.first()
                        yield Embedding(step, _vector(payload))
                    case Part():
                        total_s = clock.total_s
                        audit = await self._audit(event)
                        yield await self._finished(course, event, "stop", sum(map(len, texts)), 0, clock, total_s, audit)
                    case _:
                        yield event

    def _check_auditable(self, job: Job) -> None:
        """What a user asked to have audited and cannot be is refused before it runs. Raises UsageError."""
        if job.verify in (None, OFF):
            return
        if not job.receipts:
            raise UsageError("without receipts nothing can be audited", "Ask for receipts, or for no audit")
        if not can_audit(job.manifest.profile, str(job.verify)):
            raise UsageError(
                f"{job.name} is in the float profile, whose arithmetic nobody can repeat exactly",
                "Add the model with --profile exact, or ask with --verify off",
            )

    async def _audit(self, part: Part) -> AuditView | None:
        """Keep the session, audit it as was asked or as the settings say, and pay for it."""
        job, ended = part.job, part.ended
        prices = self._prices.get(ended.bundle.terms.session, {})
        if self._audits.mode(job.verify) != DUAL or not ended.traces:
            audit = await self._audits.ended(ended.bundle, ended.traces, job.verify)
            self._settle_soon(ended.bundle, prices, _forfeited(audit))
            return audit
        began_s = trio.current_time()
        second = await self._run_again(job, ended.bundle)
        took_s = trio.current_time() - began_s
        audit = await self._audits.compared(ended.bundle, ended.traces, second.bundle, second.traces, took_s)
        self._settle_soon(ended.bundle, prices, _forfeited(audit))
        self._settle_soon(second.bundle, self._prices_of(second.bundle.plan), ())  # who is convicted gets nothing in any case
        return audit

    def _settle_soon(self, bundle: Bundle, prices: Mapping[bytes, int], forfeited: Collection[bytes]) -> None:
        """Nobody waits for the bill to see the answer."""
        if self._settle is not None:
            self._nursery.start_soon(self._settle, bundle, prices, forfeited)

    def _prices_of(self, plan: Plan) -> dict[bytes, int]:
        """What the nodes of a plan ask now, in micro-credits per token and layer."""
        nodes = {stage.node for stage in plan.stages}
        return {record.node: record.price for record in self._records() if record.node in nodes}

    async def _run_again(self, job: Job, first: Bundle) -> Ended:
        """The same job on other nodes, as far as the first run went."""
        placement = await self._place_again(job, first.plan)
        again = replace(job, steps_max=len(first.outputs))
        exact = await self._models.exact_plan(job.manifest, self.sources(job.manifest.root))
        async with aclosing(self._drive(self._coordinator(again, placement, exact))) as events:
            async for event in events:
                if isinstance(event, Ended):
                    return event
        raise LocalError("the second run ended without a word", "Run it again")

    async def _place_again(self, job: Job, plan: Plan, without: frozenset[bytes] = frozenset()) -> Placement:
        """A plan with none of the other nodes of `plan` in it. Raises CapacityError."""
        try:
            placement = await self.place(job.manifest, job.stages, without | other_nodes(plan, self._identity.public_key))
        except (CapacityError, UsageError) as error:  # too little memory, or too few nodes for the stages asked for
            raise CapacityError(
                f"a dual execution needs two sets of nodes with nothing in common, and there is one: {error.cause}",
                "Start more nodes, or ask with --verify light",
            ) from error
        await self._judge(placement.plan, job.manifest, (plan,))
        return placement

    async def canary(self) -> None:
        """Run a short made-up prompt on others and audit it. Raises NotFoundError where there is no model to do it with."""
        others = {holding.model_root for record in self._records() for holding in record.models}
        known = [(name, root) for name, root in self._models.catalog.names().items() if root in others]
        models = [name for name, root in known if _is_exact_causal(self._models.catalog.manifest(root))]
        if not models:
            raise NotFoundError("no model of the exact profile is held by anybody else")
        prompt = " ".join(self._rng.choices(_WORDS, k=self._rng.randint(4, 15)))
        request = GenerateRequest(self._rng.choice(models), prompt, max_tokens=self._rng.randint(4, 31), verify=LIGHT)
        async with aclosing(self.generate(replace(request, stages=2))) as events:
            async for _ in events:
                pass

    async def _open_model(self, name: str, kind: str) -> tuple[str, Manifest, Tokenizer]:
        found, manifest = await self.manifest(name)
        if manifest.kind != kind:
            right = "`nexus embed --model`" if manifest.kind == ENCODER else "`nexus run`"
            raise UsageError(f"{found} is a model of kind {manifest.kind!r}", f"Use it with {right}")
        return found, manifest, await self._tokenizer(manifest)

    async def _tokenizer(self, manifest: Manifest) -> Tokenizer:
        from nexus.engine.tokenizer import Tokenizer

        files = await self._models.files(manifest, self.sources(manifest.root), _ignore_progress)
        return await trio.to_thread.run_sync(Tokenizer.load, files)

    async def _run(
        self, job: Job, course: Course, journal: AnswerJournal | None = None
    ) -> AsyncGenerator[tuple[Planned | Progress | Notice | Result | Part, Coordinator | None], None]:
        """One job to its end, which is the last part of its course. Where a node goes away, the answer goes on without it."""
        if self.live.count >= self._sessions_max:
            raise CapacityError(f"{self.live.count} requests are running here, the limit", "Wait, or raise serve.sessions_max")
        with self.live.one(), self._under_way(course):
            if course.is_whole and course.parts:
                yield course.parts.pop(), None  # all of it was written down
                return
            commits = job.receipts and job.manifest.profile == EXACT
            exact = await self._models.exact_plan(job.manifest, self.sources(job.manifest.root)) if commits else None
            absent = Absent()
            in_vain = 0
            while True:
                placement = await self._place_without(job, absent)
                await self._judge(placement.plan, job.manifest, ())
                if commits and self._audits.mode(job.verify) == DUAL and not course.shown:
                    # Better refused now than when the answer is there.
                    await self._place_again(job, placement.plan, absent.nodes(self._records()))
                rest = course.begin()
                coordinator = self._coordinator(rest, placement, exact)
                self._prices[coordinator.session] = self._prices_of(placement.plan)
                course.answer = course.answer or coordinator.session
                yield Planned(self.plan_view(job.name, job.manifest, placement), coordinator.session, course.answer), coordinator
                try:
                    async with aclosing(self._drive(coordinator)) as events:
                        async for event in events:
                            match event:
                                case Result(step, payload):
                                    if (result := course.take(step, payload)) is not None:
                                        yield result, coordinator
                                    if journal is not None:
                                        await journal.note(course, coordinator)
                                case Ended():
                                    yield Part(rest, event), coordinator
                                case StageProgress(stage, phase, done, total):
                                    yield Progress(peer_id_of(placement.plan.stages[stage].node), phase, done, total), coordinator
                    return
                except (PeerError, TimedOutError, CapacityError, NotFoundError, NotAllowedError) as error:
                    failed = self._note_failed(coordinator, placement.plan, error)
                    if not failed:
                        raise
                    went_on = self._break_off(course, rest, coordinator, failed, error)
                    if course.is_whole:
                        yield course.parts.pop(), coordinator  # all is there and signed for: it may go
                        return
                    in_vain = 0 if went_on else in_vain + 1
                    if in_vain == ATTEMPTS_MAX or course.is_full:
                        raise
                    log.warning("replanned", without=[peer_id_of(node) for node in sorted(failed)], error=str(error))
                    absent.leave(failed, self._records(), error)
                    if course.shown:
                        yield Notice(f"{error.cause}: the answer goes on without it"), coordinator
                finally:
                    self._cut_off.discard(coordinator.session)
                    del self._prices[coordinator.session]

    @contextmanager
    def _under_way(self, course: Course) -> Iterator[None]:
        """Noted as on its way: nobody else may take it up meanwhile."""
        self._courses.add(course)
        try:
            yield
        finally:
            self._courses.discard(course)

    def _break_off(self, course: Course, job: Job, coordinator: Coordinator, failed: frozenset[bytes], error: NexusError) -> bool:
        """A session ended before its time: settle what stands of the answer. Whether it is further than before.

        Nothing stands that a node had a part in which is convicted, or of which something did not hold: it is computed again, in
        the exact profile. Raises the error where it cannot be.
        """
        cheated = coordinator.session in self._cut_off or isinstance(error, VerificationError | MalformedError)
        if not cheated:
            went_on = course.keep(job, coordinator.so_far())
            if went_on and course.parts and not course.is_whole:
                self._audit_earlier(course, course.parts[-1])
            return went_on
        if not course.may_repeat:
            raise error
        course.forget(failed)
        return False

    def _audit_earlier(self, course: Course, part: Part) -> None:
        """Audit and pay for a part while the answer goes on."""
        done = course.audits[part.session] = PartAudit()
        prices = dict(self._prices.get(part.session, {}))

        async def audit() -> None:
            try:
                self._prices[part.session] = prices
                done.view = await self._audit(part)
            except NexusError as error:
                log.warning("audit_failed", session=part.session.hex()[:16], reason=error.cause)
            finally:
                self._prices.pop(part.session, None)
                done.over.set()

        self._nursery.start_soon(audit)

    async def _earlier(self, course: Course) -> tuple[EarlierPart, ...]:
        """The parts of an answer before the last one. Audits that take much longer than the answer go on behind it."""
        with trio.move_on_after(EARLIER_AUDITS_S):
            for part in course.parts:
                if part.session in course.audits:
                    await course.audits[part.session].over.wait()
        audits = {session: audit.view for session, audit in course.audits.items()}
        return tuple(EarlierPart(part.session, part.ended.bundle, audits.get(part.session)) for part in course.parts)

    async def _place_without(self, job: Job, absent: Absent) -> Placement:
        """A plan without the nodes that failed. When nobody else is left, one that fell silent may return: that is waited for."""
        until_s = trio.current_time() + self.comeback_s
        while True:
            try:
                return await self.place(job.manifest, job.stages, absent.nodes(self._records()))
            except (CapacityError, UsageError) as error:
                if absent.because is None:
                    raise
                if not absent.may_return or trio.current_time() >= until_s:
                    raise absent.because from error  # why nobody is left says more than that nobody is
            await trio.sleep(COMEBACK_EVERY_S)

    def _note_failed(self, coordinator: Coordinator, plan: Plan, error: NexusError) -> frozenset[bytes]:
        """The nodes of which one made the session fail, and that it is better to plan without; none where it was this one."""
        failed = frozenset(plan.stages[stage].node for stage in coordinator.suspects) - {self._identity.public_key}
        now_s = trio.current_time()
        if isinstance(error, UnreachableError | TimedOutError):
            issued = {record.node: record.issued_ms for record in self._records()}
            self._gone |= {node: (now_s + AVOID_S, issued.get(node, 0)) for node in failed}
            if len(failed) == 1 and self._fell_silent is not None:
                # Beside whatever comes next: nobody waits for witnesses.
                self._nursery.start_soon(self._fell_silent, coordinator.terms, plan, next(iter(failed)))
        elif isinstance(error, VerificationError | MalformedError) or len(coordinator.suspects) > 1:
            self._doubted |= dict.fromkeys(failed, now_s + DOUBT_S)
        else:
            return failed
        if len(failed) == 1 and self._broke_off is not None:
            self._broke_off(next(iter(failed)))
        return failed

    def _coordinator(self, job: Job, placement: Placement, exact: ExactPlan | None) -> Coordinator:
        """`exact`: what the model computes; None where the stages are not to commit to it."""
        nonce = self._rng.randbytes(16)
        terms = Terms(
            spec=SPEC,
            nonce=nonce,
            coordinator=self._identity.public_key,
            model_root=job.manifest.root,
            plan_root=placement.plan.root,
            prompt=leaf_hash(job.inputs[0]),
            steps_max=job.steps_max,
            window=WINDOW if job.receipts else 0,
            temperature=job.temperature,
            top_k=job.top_k,
            top_p=job.top_p,
            min_p=job.min_p,
            repetition_penalty=job.repetition_penalty,
            seed=job.seed,
            end_tokens=job.end_tokens,
            challenge=chain_of(self._identity, nonce).head if job.receipts and job.manifest.profile == EXACT else b"",
            answered=job.answered,
        )
        known = {record.node: PeerAddress(record.peer_id, record.addresses) for record in (self._own(), *self._records())}
        wanted = {stage.node for stage in placement.plan.stages} | {
            record.node for record in (self._own(), *self._present()) if held_ranges(record, job.manifest.root)
        }
        return Coordinator(
            self._transport,
            self._identity,
            job.name,
            job.manifest,
            placement.plan,
            terms,
            job.inputs,
            {node: address for node, address in known.items() if node in wanted},
            [trace_shape(exact, stage.start, stage.end) for stage in placement.plan.stages] if exact else (),
        )

    async def _drive(self, coordinator: Coordinator) -> AsyncGenerator[SessionEvent, None]:
        """The coordinator runs in a task of the node; this hands its events on, and cancels it when nobody wants them."""
        send, receive = trio.open_memory_channel[SessionEvent](EVENTS_MAX)
        scope = trio.CancelScope()
        failure: list[NexusError] = []

        async def work() -> None:
            with scope, send:
                try:
                    await coordinator.run(send.send)
                except NexusError as error:
                    failure.append(error)

        self._running.add(coordinator)
        self._nursery.start_soon(work)
        async with receive:
            try:
                async for event in receive:
                    yield event
            finally:
                # Before the channel is closed: whoever sends on a closed one breaks, and with it the node.
                scope.cancel()
                self._running.discard(coordinator)
        for evidence in coordinator.evidence:
            try:
                await self._submit(evidence)
            except NexusError as error:  # no reason to hide why the session failed
                log.warning("evidence_not_kept", evidence=evidence.id.hex()[:16], reason=error.cause, fix=error.fix)
        if failure:
            raise failure[0]

    def end_sessions_with(self, public_key: bytes, error: NexusError) -> int:
        """End the sessions of this node's users in which this node has a stage, for this reason; they are planned again without it.
        Returns how many."""
        ended = {coordinator.session for coordinator in self._running if coordinator.end_with(public_key, error)}
        self._cut_off |= ended
        return len(ended)

    async def _finished(
        self,
        course: Course,
        part: Part,
        reason: str,
        prompt_tokens: int,
        completion_tokens: int,
        clock: _Clock,
        total_s: float,
        audit: AuditView | None,
    ) -> Finished:
        names = {record.node: record.name for record in (self._own(), *self._records())}
        earlier = await self._earlier(course)
        ended, bundle = part.ended, part.ended.bundle
        before = sum(len(one.bundle.receipts) for one in earlier)  # each of them was verified to be a part
        signed = [sum(r.receipt.stage == i for r in bundle.receipts) for i in range(len(bundle.plan.stages))]
        return Finished(
            reason=reason,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            first_token_s=clock.first_s or total_s,
            total_s=total_s,
            receipts=before + len(bundle.receipts),
            receipts_verified=before + ended.receipts_verified,
            stages=tuple(
                StageSummary(
                    stage=number,
                    peer_id=peer_id_of(stage.node),
                    name=names.get(stage.node, ""),
                    start=stage.start,
                    end=stage.end,
                    steps=len(bundle.outputs),
                    receipts=signed[number],
                    compute_s=report.compute_s if report else 0.0,
                )
                for number, (stage, report) in enumerate(zip(bundle.plan.stages, ended.reports, strict=True))
            ),
            bundle=bundle,
            audit=audit,
            earlier=earlier,
        )


class _Answer:
    """Text as it grows: end tokens are not shown, and nothing of a stop text is shown, not even its beginning."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._stream = tokenizer.stream()
        self._stop = [text for text in stop if text]
        self._held = ""
        self.steps = 0
        self.last_token = 0
        self.stopped = False
        self.ended = False

    def push(self, token: int, *, is_end: bool) -> str | None:
        """What may be shown now; None once the answer is over, whatever is still on its way."""
        if self.stopped or self.ended:
            return None
        self.steps += 1
        self.last_token = token
        if is_end:
            self.ended = True
            return None
        return self._show(self._stream.push(token))

    def finish(self) -> str:
        """What was held back in case it became a stop text, or an incomplete character."""
        if self.stopped:
            return ""
        text = self._show(self._stream.flush()) + self._held
        self._held = ""
        return text

    def _show(self, text: str) -> str:
        self._held += text
        cut = min((at for at in (self._held.find(stop) for stop in self._stop) if at >= 0), default=None)
        if cut is not None:
            self.stopped = True
            shown, self._held = self._held[:cut], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def _forfeited(audit: AuditView | None) -> set[bytes]:
    """Stages that get no pay: proven wrong, or silent when they were asked to show their work."""
    stages = audit.stages if audit is not None else ()
    return {public_key_of(stage.peer_id) for stage in stages if stage.verdict in (CONVICTED, UNANSWERED)}


def _is_exact_causal(manifest: Manifest) -> bool:
    return manifest.profile == EXACT and manifest.kind == CAUSAL


def _check_prompt(prompt: Sequence[int], max_tokens: int, manifest: Manifest) -> None:
    if not prompt:
        raise UsageError("the prompt is empty", "Give it at least one character")
    if max_tokens < 1:
        raise UsageError(f"max_tokens is {max_tokens}", "Ask for at least one token")
    if len(prompt) >= manifest.context:
        raise UsageError(
            f"the prompt has {len(prompt)} tokens; the model's context is {manifest.context}, the answer included",
            "Shorten the prompt",
        )
    if len(prompt) * manifest.hidden_size * 4 > PAYLOAD_MAX:
        most = PAYLOAD_MAX // (4 * manifest.hidden_size)
        raise UsageError(f"the prompt has {len(prompt)} tokens; at most {most} travel at once", "Shorten the prompt")


def _vector(payload: bytes) -> tuple[float, ...]:
    return struct.unpack(f"<{len(payload) // 4}f", payload)


async def _ignore_progress(phase: str, done: int, total: int) -> None:
    """Config and tokenizer are small: nobody waits for them."""
