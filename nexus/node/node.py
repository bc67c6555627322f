"""The composition root: puts a node's parts together and answers whoever steers it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import structlog
import trio

from nexus.core.audits import CONVICTED, OK
from nexus.core.errors import (
    CapacityError,
    LocalError,
    NexusError,
    NotAllowedError,
    NotFoundError,
    PeerError,
    TimedOutError,
    UsageError,
)
from nexus.core.fidelity import Fidelity
from nexus.core.keys import Identity, parse_peer_id, peer_id_of
from nexus.core.manifest import DEFAULT_PROFILE, EXACT, FLOAT, Manifest
from nexus.engine.exact.weight_rows import Find, StoredWeights
from nexus.engine.speed import Speeds, measure_speeds
from nexus.memory.sky.kernel import SkyKernel
from nexus.models import BUILTIN_NAMES, builtin_path, held_out_text
from nexus.network.addresses import parse_endpoint
from nexus.network.fastpath import FastPathOptions, open_fastpath
from nexus.network.libp2p import NetworkOptions, open_libp2p
from nexus.network.relaying import relay_limits
from nexus.network.transport import PeerAddress, Transport
from nexus.node.api import (
    AuditView,
    EmbedRequest,
    Event,
    EvidenceFile,
    EvidenceView,
    FidelityRequest,
    GenerateRequest,
    JudgementView,
    LedgerView,
    ModelView,
    NodeStatus,
    PeerView,
    PlanView,
    ResumeRequest,
    SessionSummary,
    SessionView,
    SlashedView,
)
from nexus.node.audit.answering import AuditAnswers
from nexus.node.audit.asking import Auditor, Callbacks
from nexus.node.audit.sessions import SessionAudits
from nexus.node.blobs import BlobService, Fetcher
from nexus.node.blobs_wire import blobs_of
from nexus.node.capacity import Capacity, LoadNews
from nexus.node.cheating import HONEST, Conduct
from nexus.node.environment import SYSTEM, Environment
from nexus.node.fragments import Fragments
from nexus.node.health import Health
from nexus.node.infer.serving import InferService
from nexus.node.judge import Judge, imagined_placement
from nexus.node.membership import Membership
from nexus.node.memory.service import Memory, open_memory
from nexus.node.models import Models
from nexus.node.netcheck import NetcheckService, NetcheckView
from nexus.node.options import NodeOptions
from nexus.node.planning import PlanReport, PlanRequest, imagined, members_of, report
from nexus.node.progress import Notice, Progress
from nexus.node.runner import PLANNED_TOKENS, Runner
from nexus.node.serving import Serving
from nexus.node.signing import DurableSigner
from nexus.node.suspensions import Suspensions
from nexus.node.swarm_view import SwarmView, swarm_view
from nexus.node.trust import Trust, open_trust
from nexus.node.witness import Witnesses
from nexus.proof.audit import StageAudit
from nexus.proof.evidence import Evidence, verify_evidence
from nexus.storage.answers import AnswerStore
from nexus.storage.audit_keys import AuditKeys
from nexus.storage.blobs import BlobStore
from nexus.storage.catalog import Catalog, check_name, held_bytes, held_layers
from nexus.storage.fragments import FragmentStore, open_fragment_store
from nexus.storage.home import Home, load_identity
from nexus.storage.journal import ImportJournal
from nexus.storage.memory.store import MemoryStore
from nexus.storage.peers import AddressBook, KnownPeer
from nexus.storage.sessions import SessionStore
from nexus.swarm.audit_policy import AuditPolicy
from nexus.swarm.fragments import REPLICAS
from nexus.swarm.links import Coordinate, Links
from nexus.swarm.membership import HOLDINGS_MAX, LOAD_MAX, SPEED_MAX, UPLOAD_MAX, Holding, NodeRecord

log = structlog.get_logger("nexus.node")

T = TypeVar("T")

VERSION = version("nexus-swarm")
AGENT = f"nexus/{VERSION}"
PROGRESS_MAX = 64
PING_TIMEOUT_S = 10.0
MEET_MAX = 32
MEET_AT_ONCE = 4
BOOK_EVERY_S = 60.0
# Of the models that peers announce, those that a listing shows.
ANNOUNCED_MAX = 64
ANNOUNCED_PER_NODE = 8
ANNOUNCED_AT_ONCE = 4
ANNOUNCED_TIMEOUT_S = 15.0
# What is held is looked up anew when it changed here, and now and then in case the disk was changed by hand.
HOLDINGS_FRESH_S = 60.0


class Node:
    """A running node; see `NodeApi` for what its methods promise. `memory`: None where the settings switch it off. `speeds`: of
    this machine; `measure`: measures them again, in a thread. `conduct`: see `nexus.node.cheating`."""

    def __init__(
        self,
        options: NodeOptions,
        identity: Identity,
        transport: Transport,
        book: AddressBook,
        sessions: SessionStore,
        trust: Trust,
        nursery: trio.Nursery,
        speeds: Speeds,
        memory: tuple[MemoryStore, SkyKernel] | None,
        fragments: FragmentStore,
        conduct: Conduct = HONEST,
        environment: Environment = SYSTEM,
        measure: Callable[[], Awaitable[Speeds]] | None = None,
        answers: AnswerStore | None = None,
    ) -> None:
        self._options = options
        self._identity = identity
        self._transport = transport
        self._book = book
        self._nursery = nursery
        self._now_ms = environment.now_ms
        self._links = Links(identity.public_key)
        self._began_s = trio.current_time()
        home = Home(options.home)
        self._blobs = BlobStore.open(home.models, options.disk_max_bytes)
        self._catalog = Catalog.open(home.models)
        self._trust = trust
        self._trust.evidence.on_slashed.append(self._end_work_with)
        self._membership = Membership(
            transport,
            identity,
            self._describe,
            environment.now_ms,
            trust.standings.is_slashed,
            self._announced_memory,
            self._note_heard,
            self._note_gone,
        )
        self._health = Health(
            transport,
            self._links,
            lambda: [record.node for record in self._membership.connected()],
            lambda: (self._infer.partners() | self._runner.partners()) - {identity.public_key},
            self._coordinate_of,
        )
        self._capacity = Capacity(speeds, measure, self._is_idle, self._wait_idle, self._membership.announce_soon, environment.rng)
        self._blob_service = BlobService(
            transport,
            self._blobs,
            self._catalog,
            uploads=self._capacity.uploads,
            upload_max=options.upload_max,
            pace_of=lambda blob_root: self._fragments.pace_of(blob_root),
        )
        self._models = Models(
            self._catalog,
            self._blobs,
            Fetcher(transport, self._blobs, self._catalog, download_max=options.download_max),
            auto_fetch=options.auto_fetch,
            memory_max_bytes=options.memory_max_bytes,
            changed=self._holdings_changed,
        )
        self._fragments = Fragments(
            identity,
            fragments,
            self._models,
            self,
            environment,
            serve=options.serve,
            replicas=options.replicas,
            memory_bytes=options.memory_max_bytes,
            disk_bytes=options.disk_max_bytes,
            demand=lambda root: self._infer.sessions_on(root),
        )
        self._models.kept = self._fragments.kept
        # Strangers may have this node fetch what they like: what its owner wants, and what is in use, is not evicted for it.
        self._blobs.protect(self._named_roots)
        self._blobs.protect(self._models.loaded_roots)
        self._blobs.protect(self._fragments.pinned)
        self._sessions = sessions
        self._infer = InferService(
            transport,
            identity,
            self._models,
            DurableSigner(identity, sessions),
            serve=options.serve,
            sessions_max=options.sessions_max,
            may_open=trust.may_open,
            note_served=trust.ledger.note_served,
            conduct=conduct,
            perf_counter=environment.perf_counter,
        )
        self._load_news = LoadNews(
            lambda: self._infer.live.count, lambda: len(self._membership.records()), self._membership.announce_soon
        )
        self._infer.live.on_change.append(self._load_news.note)
        self._audit_answers = AuditAnswers(transport, identity, self._models, sessions, conduct.show)
        self._suspensions = Suspensions(transport, identity.public_key, trust.standings, environment.now_ms)
        self._witnesses = Witnesses(
            transport,
            identity,
            trust.standings,
            self._suspensions,
            self._audit_answers.cells_of,
            self._infer.took_part,
            self._membership.find,
            environment.now_ms,
        )
        policy = options.audit
        self._auditor = Auditor(
            transport,
            identity,
            self._models,
            AuditKeys(home.audit_keys),
            AuditPolicy(policy.policy, policy.rate, policy.probation_sessions, policy.cells),
            policy.timeout_s,
            Callbacks(
                lambda node: trust.standings.tally(node).audits_ok,
                self._submit_evidence,
                self._note_silence,
                self._witnesses.unanswered,
            ),
            environment,
        )
        self._session_audits = SessionAudits(
            self._auditor, sessions, self._audit_sources, self.names, self._note_audit, environment.now_ms
        )
        self._judge = Judge(identity.public_key, self._models, lambda root: self._runner.sources(root), environment.perf_counter)
        self._runner = Runner(
            transport,
            identity,
            self._models,
            self._workers,
            self._describe,
            nursery,
            options.sessions_max,
            self._import_builtin,
            self._judge,
            self._session_audits,
            self._submit_evidence,
            trust.settle,
            self._note_broken,
            self._witnesses.silent,
            environment,
            self._links.rtt_us,
            self._fragments.versions.current,
            answers,
            self._health,
        )
        self.fragments = Serving(
            self._fragments, self._runner.resolve, self._find_peer, self._take_in, self, self._membership.announce_soon
        )
        self._netcheck = NetcheckService(transport, environment.now_ms, self._membership.names, self._membership.announce_soon)
        self._holdings: tuple[Holding, ...] = ()
        self._holdings_until_s = 0.0
        self._work_lock = trio.Lock()
        self._draining = False
        self._refusing = False
        self._memory: Memory | None = None
        if memory is not None:
            store, sky = memory
            self._memory = Memory(
                transport,
                identity,
                store,
                sky,
                options.memory,
                self._stored_model,
                self._import_builtin,
                options.threads,
                self._find_peer,
                self.names,
                self._told,
                environment,
            )

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        self._blob_service.start()
        self._infer.start()
        self._audit_answers.start()
        self._witnesses.start()
        self._netcheck.start()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._membership.run)
            nursery.start_soon(self._netcheck.watch_addresses)
            nursery.start_soon(self._trust.run)
            nursery.start_soon(self._suspensions.run)
            nursery.start_soon(self._meet_again)
            nursery.start_soon(self._keep_book)
            nursery.start_soon(self._capacity.run)
            await nursery.start(self._fragments.run)
            nursery.start_soon(self._health.run)
            nursery.start_soon(self._load_news.run)
            if self._memory is not None:
                await nursery.start(self._memory.run)
            if self._options.audit.canary_every_s:
                nursery.start_soon(self._send_canaries)
            task_status.started()
            await trio.sleep_forever()

    @property
    def memory(self) -> Memory:
        """Raises NotAllowedError where the settings switch it off."""
        if self._memory is None:
            raise NotAllowedError("this node keeps no shared memory", "Set memory.enabled = true and start it again")
        return self._memory

    def _announced_memory(self) -> list[bytes]:
        return self._memory.announced() if self._memory is not None else []

    def _stored_model(self, name: str) -> tuple[Manifest, Mapping[str, Path]]:
        """A model that was added here, and where its blobs are. Raises NotFoundError."""
        root = self._catalog.names().get(name)
        if root is None:
            raise NotFoundError(f"no model {name!r} is here", "`nexus model list` lists those that are")
        return _stored_models(Home(self._options.home))(root)

    # --- what serving needs of the node (`nexus.node.versions.Members`, `nexus.node.serving.Sessions`) ---

    def records(self) -> list[NodeRecord]:
        return self._workers()

    def own(self) -> NodeRecord:
        return self._membership.own().record

    async def refresh(self, peer_id: str) -> NodeRecord:
        return await self._membership.refresh(peer_id)

    def announce(self) -> None:
        self._holdings_changed()

    def rtt_us(self, one: bytes, other: bytes) -> int:
        return self._links.rtt_us(one, other)

    def refuse_new(self, refused: bool) -> None:
        self._refusing = self._infer.draining = refused

    def hand_over(self) -> None:
        self._infer.hand_over()

    @property
    def running(self) -> int:
        return self._infer.seats + self._runner.live.count

    def _workers(self) -> list[NodeRecord]:
        """The nodes that may be planned with: neither convicted nor suspended, neither stuck nor gone."""
        return [record for record in self._trust.workers(self._membership.records()) if self._health.is_usable(record.node)]

    def _note_heard(self, record: NodeRecord) -> None:
        self._links.learn(record.node, record.coordinate)
        self._health.heard(record.node)

    def _note_gone(self, node: bytes) -> None:
        self._health.unreachable(node)

    def _coordinate_of(self, node: bytes) -> Coordinate | None:
        record = self._membership.of(node)
        return None if record is None else record.coordinate

    def _end_work_with(self, node: bytes) -> None:
        """A node was convicted: what runs with it ends here."""
        peer_id = peer_id_of(node)
        reason = NotAllowedError(f"{peer_id} was convicted while the session ran", "Run it again: it will be planned without it")
        ended = self._infer.end_sessions_with(node, reason) + self._runner.end_sessions_with(node, reason)
        if ended:
            log.warning("sessions_ended", because_of=peer_id, sessions=ended)

    def _named_roots(self) -> list[bytes]:
        """The blobs of every model that has a name here. From any thread."""
        roots: list[bytes] = []
        for model_root in self._catalog.names().values():
            try:
                roots += [blob.root for blob in blobs_of(self._catalog.manifest(model_root))]
            except (NotFoundError, LocalError) as error:
                log.warning("model_not_protected", model=model_root.hex()[:16], reason=error.cause)
        return roots

    def _audit_sources(self, model_root: bytes) -> list[PeerAddress]:
        """Where the stages of a model may be, and its weights."""
        holders = {source.peer_id: source for source in self._runner.sources(model_root)}
        everybody = {record.peer_id: PeerAddress(record.peer_id, record.addresses) for record in self._membership.records()}
        return list((holders | everybody).values())

    async def _submit_evidence(self, evidence: Evidence) -> None:
        """A proof that an audit or a session made: verified, kept, believed, and told to others."""
        await self._trust.evidence.submit(evidence)

    async def _note_silence(self, node: bytes, session: bytes, reason: str) -> None:
        """Not to answer is no proof of anything; a node that does it often is planned with last."""
        self._note_broken(node)

    def _note_broken(self, node: bytes) -> None:
        if node != self._identity.public_key:
            self._trust.standings.note_run(node, flaky=True)

    def _note_audit(self, stage: StageAudit) -> None:
        if stage.node != self._identity.public_key and stage.verdict in (OK, CONVICTED):
            self._trust.standings.note_audit(stage.node, stage.verdict == OK)

    async def _send_canaries(self) -> None:
        """Now and then a short prompt that is nobody's, run and audited as any other: others cannot tell it from a user's."""
        while True:
            await trio.sleep(self._options.audit.canary_every_s)
            try:
                await self._runner.canary()
            except NexusError as error:
                log.info("canary_failed", reason=error.cause)

    def names(self) -> dict[str, str]:
        """What the nodes in reach call themselves, this one too, by peer id."""
        return {**self._membership.names(), self._identity.peer_id: self._options.name}

    async def _meet_again(self) -> None:
        """Peers of earlier days, so that a node finds its swarm again when its bootstrap nodes are gone."""
        limiter = trio.CapacityLimiter(MEET_AT_ONCE)

        async def meet(known: KnownPeer) -> None:
            async with limiter:
                self._transport.learn(PeerAddress(known.peer_id, known.addresses))
                try:
                    await self._membership.refresh(known.peer_id)
                except NexusError as error:
                    log.debug("known_peer_gone", peer_id=known.peer_id, reason=error.cause)

        async with trio.open_nursery() as nursery:
            for known in self._book.peers()[:MEET_MAX]:
                nursery.start_soon(meet, known)

    async def _keep_book(self) -> None:
        """Note who is connected, now and then: what is lost in a crash is a minute of acquaintance."""
        while True:
            await trio.sleep(BOOK_EVERY_S)
            for record in self._membership.records():
                self._book.remember(record.peer_id, record.addresses, self._now_ms())
            await trio.to_thread.run_sync(self._book.save)

    def status(self) -> NodeStatus:
        totals = self._infer.totals
        return NodeStatus(
            peer_id=self._identity.peer_id,
            name=self._options.name,
            version=VERSION,
            addresses=self._transport.addresses,
            uptime_s=trio.current_time() - self._began_s,
            ready=not (self._draining or self._refusing),
            not_ready_because="the node is shutting down" if self._draining else "the node is draining" if self._refusing else "",
            peers=len({connection.peer_id for connection in self._transport.connections()}),
            models=len(self._catalog.names()),
            sessions=self._infer.live.count + self._runner.live.count,
            sessions_served=totals.sessions,
            steps_served=totals.steps,
            receipts_signed=totals.receipts,
            memory_used_bytes=self._models.memory_used_bytes,
            memory_limit_bytes=self._options.memory_max_bytes,
        )

    async def swarm(self, limit: int) -> SwarmView:
        """As this node sees it now. Connected nodes that were not heard of lately are asked first, so that none is shown as alive
        that has just stopped."""
        records = self._membership.records()
        await self._health.check([record.node for record in self._membership.connected()])
        return swarm_view(
            self._describe(),
            records,
            self._health.vitals,
            self._links.rtt_us,
            self._links.measured_us,
            self._layers_of,
            self._options.replicas or REPLICAS,
            trio.current_time(),
            limit,
        )

    def _layers_of(self, model_root: bytes) -> int | None:
        """How many layers a model has, where its manifest is here."""
        try:
            return self._catalog.manifest(model_root).layers if self._catalog.has(model_root) else None
        except LocalError:
            return None

    async def peers(self) -> list[PeerView]:
        """Connected peers, with round trips measured now."""
        connected = {connection.peer_id: connection for connection in self._transport.connections()}
        rtts: dict[str, float] = {}

        async def measure(peer_id: str) -> None:
            with trio.move_on_after(PING_TIMEOUT_S):
                try:
                    rtts[peer_id] = await self._transport.ping(peer_id)
                except PeerError:
                    log.debug("ping_failed", peer_id=peer_id)

        async with trio.open_nursery() as nursery:
            for peer_id in connected:
                nursery.start_soon(measure, peer_id)
        records = {record.peer_id: record for record in self._membership.records()}
        views = []
        for peer_id, connection in sorted(connected.items()):
            record = records.get(peer_id)
            views.append(
                PeerView(
                    peer_id=peer_id,
                    name=record.name if record else "",
                    agent=record.agent if record else "",
                    addresses=record.addresses if record else (connection.address,),
                    direction=connection.direction,
                    rtt_s=rtts.get(peer_id),
                    memory_bytes=record.memory_bytes if record else 0,
                    models=tuple(_holding_text(holding) for holding in record.models) if record else (),
                )
            )
        return views

    async def netcheck(self) -> NetcheckView:
        return await self._netcheck.check()

    async def add_peer(self, address: str) -> PeerView:
        peer_id = await self._transport.connect(address)
        self._book.remember(peer_id, (address.rpartition("/p2p/")[0],), self._now_ms())
        await trio.to_thread.run_sync(self._book.save)
        await self._membership.refresh(peer_id)
        return next(view for view in await self.peers() if view.peer_id == peer_id)

    async def ping(self, peer_id: str) -> float:
        with trio.move_on_after(PING_TIMEOUT_S):
            return await self._transport.ping(self._find_peer(peer_id))
        raise TimedOutError(f"{peer_id} did not answer within {PING_TIMEOUT_S:.0f} s", "See `nexus peers`")

    def _find_peer(self, text: str) -> str:
        """The peer that a user means: an id, the start of one that fits one peer, or a node's name."""
        known = self._membership.names()
        known |= {connection.peer_id: known.get(connection.peer_id, "") for connection in self._transport.connections()}
        if text in known or text == self._identity.peer_id:
            return text
        fits = sorted(peer_id for peer_id, name in known.items() if text and (name == text or peer_id.startswith(text)))
        if len(fits) > 1:
            raise UsageError(f"{text!r} fits {len(fits)} peers", f"Say more of the id: {', '.join(fits[:4])}")
        if fits:
            return fits[0]
        try:
            return parse_peer_id(text)  # not met yet, but the DHT may know it
        except UsageError:
            raise NotFoundError(f"no peer in reach is called {text!r}", "`nexus peers` lists them") from None

    async def add_model(
        self, source: Path | str, name: str | None, profile: str
    ) -> AsyncGenerator[Progress | Notice | ModelView, None]:
        """Import a model; one at a time, since each reads and writes as fast as the disk goes."""
        text = str(source)
        builtin = text in BUILTIN_NAMES
        path = builtin_path(text) if builtin else Path(source)
        if not builtin and not path.is_absolute():
            raise UsageError(f"{text!r} is neither a built-in model nor an absolute path", f"Built in: {', '.join(BUILTIN_NAMES)}")
        # So that the same directory may be added in both profiles: exact is what a model is by default.
        name = check_name(name or (text if builtin else path.name) + ("-float" if profile == FLOAT else ""))
        notices: list[str] = []
        work = partial(self._import, path, text if builtin else str(path), name, profile, notices.append)
        async with aclosing(self._at_work(work)) as events:
            async for event in events:
                if isinstance(event, Progress):
                    yield event
                    continue
                self._holdings_changed()
                for notice in notices:
                    yield Notice(notice)
                yield self._view(name, event)

    async def fidelity(self, request: FidelityRequest) -> AsyncGenerator[Progress | Fidelity, None]:
        name, manifest = await self._runner.manifest(request.model)
        if manifest.profile != EXACT:
            raise UsageError(
                f"{name!r} is in the float profile: there is nothing to compare", "Add it with --profile exact, then ask again"
            )
        if held_layers(manifest, self._blobs) != ((0, manifest.layers),):
            raise NotFoundError(f"not all layers of {name!r} are on this node", "Add the model here: nexus model add DIRECTORY")
        source = self._float_source(name, manifest.root, request.against)
        text_name, text = (request.text_name, request.text) if request.text else held_out_text(manifest.kind)
        async with aclosing(self._at_work(partial(self._compare, manifest, source, text, text_name))) as events:
            async for event in events:
                yield event

    def _float_source(self, name: str, root: bytes, against: str | None) -> Path:
        """The directory with the float weights that an exact model was made from. Raises NotFoundError, UsageError."""
        noted = self._catalog.notes(root).source or (name if name in BUILTIN_NAMES else "")
        if against is None and noted in BUILTIN_NAMES:
            return builtin_path(noted)
        source = Path(against or noted)
        if against is not None and not source.is_absolute():
            raise UsageError(f"{against!r} is not an absolute path", "The daemon has a working directory of its own")
        if not (against or noted):
            raise NotFoundError(
                f"this node does not know where the float weights of {name!r} are: it was not added here",
                "Name their directory: --against DIRECTORY",
            )
        if not source.is_dir():
            raise NotFoundError(
                f"the float weights of {name!r} are gone: there is no directory {source}", "Name it: --against DIRECTORY"
            )
        return source

    def _compare(
        self, manifest: Manifest, source: Path, text: str, text_name: str, progress: Callable[[str, int, int], None]
    ) -> Fidelity:
        from nexus.engine.exact.fidelity import measure

        files = {blob.name: self._blobs.path(blob.root) for blob in (*manifest.pieces, *manifest.files)}
        report = measure(manifest, files, source, text, text_name, progress)
        self._catalog.note(manifest.root, replace(self._catalog.notes(manifest.root), fidelity=report))
        return report

    async def _at_work(self, work: Callable[[Callable[[str, int, int], None]], T]) -> AsyncGenerator[Progress | T, None]:
        """Progress of `work` in a thread, then what it returned. One at a time: each uses all of the disk or the processor."""

        async def in_turn(tell: Callable[[Progress], None]) -> T:
            def progress(phase: str, done: int, total: int) -> None:
                trio.from_thread.check_cancelled()
                trio.from_thread.run_sync(tell, Progress(self._identity.peer_id, phase, done, total))

            async with self._work_lock:
                return await trio.to_thread.run_sync(work, progress)

        async with aclosing(self._told(in_turn)) as events:
            async for event in events:
                yield event

    async def _told(self, work: Callable[[Callable[[Progress], None]], Awaitable[T]]) -> AsyncGenerator[Progress | T, None]:
        """Progress of `work`, which runs in a task of the node, then what it returned. It ends when nobody wants it any more."""
        send, receive = trio.open_memory_channel[Progress](PROGRESS_MAX)
        done: list[T] = []
        failure: list[Exception] = []
        scope = trio.CancelScope()

        async def run() -> None:
            with scope, send:
                try:
                    done.append(await work(partial(_offer, send)))
                except Exception as error:  # noqa: BLE001 - raised below, where the request is: it fails alone, not the node
                    failure.append(error)

        self._nursery.start_soon(run)
        async with receive:
            try:
                async for event in receive:
                    yield event
            finally:
                scope.cancel()
        if failure:
            raise failure[0]
        yield done[0]

    async def _take_in(self, source: Path | str, profile: str) -> AsyncGenerator[Progress | Notice | Manifest, None]:
        """Import a model without a name; progress, then its manifest."""
        text = str(source)
        path = builtin_path(text) if text in BUILTIN_NAMES else Path(source)
        notices: list[str] = []
        work = partial(self._import, path, text, None, profile, notices.append)
        async with aclosing(self._at_work(work)) as events:
            async for event in events:
                for notice in notices:
                    yield Notice(notice)
                notices.clear()
                yield event

    def _import(
        self,
        path: Path,
        source: str,
        name: str | None,
        profile: str,
        notice: Callable[[str], None],
        progress: Callable[[str, int, int], None],
    ) -> Manifest:
        """`source`: how to find the directory `path` again. `name` None: the model gets none."""
        from nexus.engine.importer import import_model

        journal = ImportJournal(Home(self._options.home).models, self._blobs)
        manifest = import_model(path, self._blobs, progress, profile=profile, journal=journal, notice=notice)
        if name is None:
            self._catalog.keep(manifest)
        else:
            self._catalog.add(name, manifest)
        self._catalog.note(manifest.root, replace(self._catalog.notes(manifest.root), source=source))
        journal.end()
        return manifest

    async def _import_builtin(self, name: str) -> None:
        """The first use of a built-in model takes it in; it came with the program."""
        async with self._work_lock:
            if name not in self._catalog.names():
                work = partial(self._import, builtin_path(name), name, name, DEFAULT_PROFILE, lambda _: None, lambda *_: None)
                await trio.to_thread.run_sync(work)
        self._holdings_changed()

    async def models(self) -> list[ModelView]:
        """Models with a name here and those that this node serves, then those that peers announce and this node knows no other name
        for."""
        views = []
        for name, root in sorted((self._fragments.names() | self._catalog.names()).items()):
            try:
                views.append(self._view(name, self._catalog.manifest(root)))
            except (NotFoundError, LocalError) as error:
                # One that the disk damaged, or an older version wrote, must not hide the others.
                log.warning("model_not_listed", name=name, reason=error.cause, fix=error.fix)
        here = {view.manifest.root for view in views}
        announced = {
            holding.name
            for record in self._membership.records()
            for holding in [holding for holding in record.models if holding.name and holding.model_root not in here][
                :ANNOUNCED_PER_NODE
            ]
        }
        return views + await self._views_of_announced(sorted(announced)[:ANNOUNCED_MAX])

    async def _views_of_announced(self, names: Sequence[str]) -> list[ModelView]:
        """Those whose manifest is had soon. Peers announce what they like: no listing waits for all of it."""
        found: dict[str, ModelView] = {}
        limiter = trio.CapacityLimiter(ANNOUNCED_AT_ONCE)

        async def look(name: str) -> None:
            async with limiter:
                try:
                    found[name] = self._view(*await self._runner.manifest(name))
                except NexusError as error:
                    log.info("announced_model_skipped", name=name, error=str(error))

        with trio.move_on_after(ANNOUNCED_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                for name in names:
                    nursery.start_soon(look, name)
        return [found[name] for name in sorted(found)]

    async def model(self, name: str) -> ModelView:
        return self._view(*await self._runner.manifest(name))

    def _view(self, name: str, manifest: Manifest) -> ModelView:
        return ModelView(
            name=name,
            manifest=manifest,
            held_layers=held_layers(manifest, self._blobs),
            held_bytes=held_bytes(manifest, self._blobs),
            providers=tuple(address.peer_id for address in self._runner.sources(manifest.root)),
            fidelity=self._catalog.notes(manifest.root).fidelity,
            **self._fragments.shown(name, manifest),
        )

    async def plan(self, model: str, stages: int | None) -> PlanView:
        name, manifest = await self._runner.manifest(model)
        return self._runner.plan_view(name, manifest, await self._runner.place(manifest, stages))

    async def plan_report(self, request: PlanRequest) -> PlanReport:
        name, manifest = await self._runner.manifest(request.model)
        context = min(manifest.context, PLANNED_TOKENS)
        if request.machines is not None:
            return await trio.to_thread.run_sync(imagined, request, manifest, name, context)
        placement = await self._runner.place(manifest, request.stages, streams=request.streams)
        members = members_of(self._runner.in_reach(), manifest)
        return await trio.to_thread.run_sync(report, request, manifest, name, placement, members, context, self._links.rtt_us)

    async def judge(self, model: str, nodes: int | None) -> JudgementView:
        name, manifest = await self._runner.manifest(model)
        if nodes is None:
            placement = await self._runner.place(manifest, None)
        else:
            context = min(manifest.context, PLANNED_TOKENS)
            placement = await trio.to_thread.run_sync(imagined_placement, manifest, self._describe(), nodes, context)
        judgement = await self._judge(placement.plan, manifest)
        return JudgementView(self._runner.plan_view(name, manifest, placement), judgement.proofs)

    def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        self._check_accepting()
        return self._runner.generate(request)

    def resume(self, request: ResumeRequest) -> AsyncIterator[Event]:
        return self._runner.resume(request)

    def embed(self, request: EmbedRequest) -> AsyncIterator[Event]:
        self._check_accepting()
        return self._runner.embed(request)

    def _check_accepting(self) -> None:
        if self._refusing:
            raise CapacityError("this node is draining and takes no new work", "Ask another node, or call the drain off")

    async def evidence(self) -> list[EvidenceView]:
        return await self._trust.evidence_views()

    async def evidence_of(self, evidence: str) -> EvidenceView:
        return await self._trust.evidence_view(evidence)

    async def evidence_file(self, evidence: str) -> EvidenceFile:
        return await self._trust.evidence_file(evidence)

    async def slashed(self) -> list[SlashedView]:
        return await self._trust.slashed_views()

    async def resume_burning(self) -> int:
        return await self._trust.resume_burning()

    async def ledger(self, peer: str | None) -> LedgerView:
        peer_id = self._identity.peer_id if peer is None else self._find_peer(peer)
        prices = {record.peer_id: record.price for record in (self._describe(), *self._membership.records())}
        return await self._trust.ledger_view(peer_id, prices.get(peer_id, 0))

    async def sessions(self) -> list[SessionSummary]:
        return await self._session_audits.listed()

    async def session(self, session: str) -> SessionView:
        return await self._session_audits.shown(session)

    async def audit(self, session: str, mode: str) -> AsyncGenerator[Progress | AuditView, None]:
        """Audit a kept session, in a task of the node: an audit may take as long as the session did."""

        async def work(tell: Callable[[Progress], None]) -> AuditView:
            async def progress(phase: str, done: int, total: int) -> None:
                tell(Progress(self._identity.peer_id, phase, done, total))

            return await self._session_audits.audit(session, mode, progress)

        async with aclosing(self._told(work)) as events:
            async for event in events:
                yield event

    def _is_idle(self) -> bool:
        return not self._infer.live.count and not self._runner.live.count

    async def _wait_idle(self) -> None:
        await self._runner.live.wait_idle()
        await self._infer.live.wait_idle()

    async def drain(self) -> None:
        self._draining = True
        self._infer.draining = True
        self._membership.announce_soon()
        await self._wait_idle()

    def _describe(self) -> NodeRecord:
        """What this node says of itself now."""
        options = self._options
        now_s = trio.current_time()
        if now_s >= self._holdings_until_s:
            self._holdings, self._holdings_until_s = self._look_up_holdings(), now_s + HOLDINGS_FRESH_S
        speeds = self._capacity.speeds
        return NodeRecord(
            spec=1,
            node=self._identity.public_key,
            issued_ms=self._now_ms(),
            agent=AGENT,
            name=options.name,
            addresses=tuple(address.rpartition("/p2p/")[0] for address in self._transport.addresses)[:16],
            memory_bytes=options.memory_max_bytes,
            memory_free_bytes=max(0, options.memory_max_bytes - self._models.memory_used_bytes),
            exact_speed=min(speeds.exact, SPEED_MAX),
            float_speed=min(speeds.float, SPEED_MAX),
            upload=min(self._capacity.uploads.bytes_per_s, UPLOAD_MAX),
            load=min(self._infer.live.count, LOAD_MAX),
            coordinate=self._links.coordinate,
            serves=int(options.serve and not self._draining),
            leaving=int(self._draining or self._fragments.leaving),
            models=self._holdings,
            price=options.ledger.price_per_token,
        )

    def _look_up_holdings(self) -> tuple[Holding, ...]:
        """The models that this node serves and those with a name here first: they are not to be crowded out by what strangers had
        this node fetch."""
        holdings: list[Holding] = []
        named = set(self._catalog.names().values())
        served = self._fragments.roots()
        known = {*self._catalog.roots(), *served}
        for root in sorted(known, key=lambda root: (root not in served, root not in named, root))[:HOLDINGS_MAX]:
            held: tuple[tuple[int, int], ...] = ()
            try:
                held = held_layers(self._catalog.manifest(root), self._blobs)
            except (LocalError, NotFoundError) as error:
                if root not in served:
                    log.warning("model_not_announced", model=root.hex()[:16], reason=error.cause)
                    continue
            if held or root in served:
                holdings.append(self._fragments.holding(root, self._catalog.name_of(root), held))
        return tuple(holdings)

    def _holdings_changed(self) -> None:
        self._holdings_until_s = 0.0
        self._membership.announce_soon()


def _holding_text(holding: Holding) -> str:
    ranges = ", ".join(f"{held.start}-{held.end - 1}" for held in holding.held)
    return f"{holding.name} layers {ranges}"


def _offer(send: trio.MemorySendChannel[Progress], event: Progress) -> None:
    """Progress is for the eyes: what nobody has read yet is not added to."""
    with contextlib.suppress(trio.WouldBlock):
        send.send_nowait(event)


def _stored_models(home: Home) -> Find:
    """Where the blobs of a model are that is on this machine, by its root."""
    catalog, blobs = Catalog.open(home.models), BlobStore(home.models)

    def find(model_root: bytes) -> tuple[Manifest, dict[str, Path]]:
        manifest = catalog.manifest(model_root)
        return manifest, {blob.name: blobs.path(blob.root) for blob in (*manifest.pieces, *manifest.files) if blobs.has(blob.root)}

    return find


async def _open_transport(stack: AsyncExitStack, identity: Identity, network: NetworkOptions, options: NodeOptions) -> Transport:
    below = await stack.enter_async_context(open_libp2p(identity, network))
    if not options.fast_path:
        return below
    hosts = tuple(parse_endpoint(address).host for address in options.listen)
    return await stack.enter_async_context(open_fastpath(below, identity, FastPathOptions(hosts, options.fast_path_port)))


@asynccontextmanager
async def open_node(options: NodeOptions, conduct: Conduct = HONEST, environment: Environment = SYSTEM) -> AsyncIterator[Node]:
    """A running node. `conduct`: see `nexus.node.cheating`. Raises LocalError where the data directory or the port stands in the
    way."""
    # Read by torch when it is first imported, which is when the first model is loaded.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    home = Home(options.home)
    identity = load_identity(home)
    measure = partial(trio.to_thread.run_sync, measure_speeds, options.threads, environment.perf_counter)
    speeds = await measure()
    network = NetworkOptions(
        listen=options.listen,
        bootstrap=options.bootstrap,
        mdns=options.mdns,
        dht=options.dht,
        relay=relay_limits(**asdict(options.relay)) if options.relay is not None else None,
        announce=options.announce,
    )
    opening = partial(_open_transport, identity=identity, network=network, options=options)
    async with compose_node(options, identity, opening, speeds, conduct, environment, measure) as node:
        yield node


@asynccontextmanager
async def compose_node(
    options: NodeOptions,
    identity: Identity,
    open_transport: Callable[[AsyncExitStack], Awaitable[Transport]],
    speeds: Speeds,
    conduct: Conduct = HONEST,
    environment: Environment = SYSTEM,
    measure: Callable[[], Awaitable[Speeds]] | None = None,
) -> AsyncIterator[Node]:
    """A node's files opened, its parts put together and running, on whatever network it is given: the world's, or a simulated one.
    `open_transport`: enters what it opens into the stack. `speeds`, `measure`: see `Node`."""
    home, audit = Home(options.home), options.audit
    book = AddressBook.open(home.peers_file)
    if book.warning:
        log.warning("address_book", warning=book.warning)
    async with AsyncExitStack() as stack:
        # Closed when nobody is left that signs.
        sessions = SessionStore(
            home.sessions_file, keep_max_bytes=audit.keep_max_bytes, keep_s=audit.keep_s, now_ms=environment.now_ms
        )
        stack.callback(sessions.close)
        fragments = await trio.to_thread.run_sync(open_fragment_store, home.fragments_file)
        stack.callback(fragments.close)
        answers = AnswerStore(home.answers_file, environment.now_ms)
        stack.callback(answers.close)
        memory = await trio.to_thread.run_sync(open_memory, home, options.memory) if options.memory.enabled else None
        if memory is not None:
            stack.callback(memory[0].close)
        transport = await open_transport(stack)
        trust = await stack.enter_async_context(
            open_trust(
                home,
                identity,
                transport,
                options.ledger,
                audit.probation_sessions,
                partial(verify_evidence, weights=StoredWeights(_stored_models(home))),
                lambda: node.names(),
                environment,
            )
        )
        nursery = await stack.enter_async_context(trio.open_nursery())
        node = Node(
            options,
            identity,
            transport,
            book,
            sessions,
            trust,
            nursery,
            speeds,
            memory,
            fragments,
            conduct,
            environment,
            measure,
            answers,
        )
        await nursery.start(node.run)
        try:
            yield node
        finally:
            nursery.cancel_scope.cancel()
