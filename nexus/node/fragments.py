"""Serving fragments of named models: what the owner undertook, kept up while nodes come and go and versions follow one another.

One task per undertaking looks at the records of the others again and again and does what `nexus.swarm.fragments` decides: fetch,
announce, withdraw and ask, let go. Everything is decided anew from what is there, so a restart, a lost message or a failed fetch
costs time and nothing else.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import structlog
import trio

from nexus.core.errors import CapacityError, NexusError, NotAllowedError, NotFoundError, UsageError
from nexus.core.keys import Identity, peer_id_of
from nexus.core.manifest import Manifest, stage_pieces
from nexus.core.plan import DTYPES
from nexus.network.rates import Pace
from nexus.node.blobs import OffThread, in_worker_thread
from nexus.node.environment import Environment
from nexus.node.fragments_api import HandOverView, ServeRequest, ServingView, VersionView
from nexus.node.models import Models
from nexus.node.placing import domain_of
from nexus.node.progress import Notice, Progress
from nexus.node.versions import Members, Versions, describe_layers, held_by, served_by
from nexus.storage.catalog import check_name, held_layers
from nexus.storage.fragments import FragmentStore
from nexus.swarm.costs import StageCosts
from nexus.swarm.fragments import (
    REPLICAS,
    Pending,
    Promise,
    Range,
    Ranges,
    Share,
    confirmed,
    consider,
    divide,
    layers_of,
    may_retire,
    needed_elsewhere,
    parse_fragment,
    ranges_of,
    replica_counts,
    to_withdraw,
)
from nexus.swarm.layout import Layout, Member, layout
from nexus.swarm.membership import Holding, LayerRange, NodeRecord
from nexus.swarm.placement import Candidate

log = structlog.get_logger("nexus.fragments")

# How often an undertaking looks at the records of the others; what failed is tried again later and later.
LOOK_S, RETRY_S, RETRY_MAX_S = 1.0, 2.0, 60.0
# For asking another node what it serves, when layers are let go.
ASK_S, ASK_AT_ONCE = 10.0, 8
# For asking those that are known before something is undertaken.
ASK_FIRST_S, ASK_FIRST_MAX = 3.0, 64
# After a withdrawal that was not confirmed nothing is withdrawn for about so long.
REGRET_S = 20.0
# What memory is planned for, as in plans of sessions: tokens of context, and sessions under way.
CONTEXT, STREAMS = 2048, 4
# After a start the others are met first: until then nothing is taken because they seem to be gone.
MEET_S = 15.0
EVENTS_MAX = 64
WAITING, FETCHING, LOADING, SERVING = "waiting", "fetching", "loading", "serving"


@dataclass(eq=False)
class _Work:
    """One undertaking and how it stands.

    `wanted`, `withdrawn`: layers by version; of the latter those that are served and no longer announced. `regret_s`: until when
    nothing is withdrawn. `laid_out`: the last layout, and what it was made from. `asked`: how often its owner changed it, and
    `settled`: the last of these that was done. `pace`: of uploads, and of which blobs they are, by the versions in question.
    """

    promise: Promise
    state: str = WAITING
    detail: str = "it begins"
    pending: Pending | None = None
    wanted: dict[bytes, frozenset[int]] = field(default_factory=dict)
    withdrawn: dict[bytes, frozenset[int]] = field(default_factory=dict)
    regret_s: float = 0.0
    failures: int = 0
    laid_out: tuple[object, Layout] | None = None
    asked: int = 0
    settled: int = 0
    ended: bool = False
    pace: Pace | None = None
    limited: tuple[list[bytes], set[bytes]] = field(default_factory=lambda: ([], set()))
    loaded: set[tuple[bytes, int, int]] = field(default_factory=set)
    changed: trio.Event = field(default_factory=trio.Event)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    lock: trio.Lock = field(default_factory=trio.Lock)
    listeners: list[Callable[[Progress], None]] = field(default_factory=list)

    @property
    def short(self) -> str:
        """What the swarm lacks for it, in words; "" where it lacks nothing."""
        return "; ".join(map(str, self.laid_out[1].short)) if self.laid_out else ""


class Fragments:
    """`replicas`: how many nodes each layer should be on, None: two, and three where
    nodes have nothing else to do. `memory_bytes`, `disk_bytes`: what this
    node gives to models at all. `demand`: sessions that run here on a model now."""

    def __init__(
        self,
        identity: Identity,
        store: FragmentStore,
        models: Models,
        members: Members,
        environment: Environment,
        *,
        serve: bool,
        replicas: int | None,
        memory_bytes: int,
        disk_bytes: int,
        demand: Callable[[bytes], int] = lambda model_root: 0,
        off_thread: OffThread = in_worker_thread,
    ) -> None:
        self._identity = identity
        self._store = store
        self._models = models
        self._members = members
        self._rng = environment.rng
        self._serve = serve
        self._replicas = replicas
        self._memory_bytes = memory_bytes
        self._disk_bytes = disk_bytes
        self._demand = demand
        self._off_thread = off_thread
        self._works = {promise.name: _Work(promise) for promise in store.promises()}
        self.versions = Versions(identity, store, models, members, self._followed, off_thread)
        self._nursery: trio.Nursery | None = None
        self._met_s = 0.0
        self.leaving = False

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Keep every promise until cancelled."""
        self._met_s = trio.current_time() + MEET_S
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for work in self._works.values():
                nursery.start_soon(self._keep, work)
            task_status.started()
            await trio.sleep_forever()

    # --- what this node says ------------------------------------------------------------------------------------------------

    def holding(self, root: bytes, name: str, held: Ranges) -> Holding:
        """What the record says of a model of which this node has `held`, and whose name here is `name`."""
        served: frozenset[int] = frozenset()
        offer, publisher = (0, 0), b""
        for work in self._works.values():
            promise = work.promise
            if root not in self._roots(promise):
                continue
            name, publisher = promise.name, promise.publisher
            served |= self._served(work, root, held)
            if promise.auto and root == self._target(promise) and self._serve:
                offer = self._offer(promise)
        if not publisher:
            for published, versions in self.versions.own().items():
                if any(one.model_root == root for one in versions):
                    name, publisher = published, self._identity.public_key
        signed = self.versions.signed(publisher, name, root)
        version, signature = (signed.publication.version, signed.signature) if signed else (0, b"")
        ranges = tuple(LayerRange(start, end) for start, end in held)
        serving = tuple(LayerRange(start, end) for start, end in ranges_of(served))
        return Holding(name, root, ranges, serving, version, publisher, signature, *offer)

    def roots(self) -> list[bytes]:
        """Models that this node serves or means to, whether any of them is here or not."""
        return sorted({root for work in self._works.values() for root in self._roots(work.promise)})

    def names(self) -> dict[str, bytes]:
        """What this node undertook to serve: by name, the version that counts."""
        return {name: self._target(work.promise) for name, work in sorted(self._works.items())}

    def kept(self) -> set[bytes]:
        """Models whose manifests stay here though they may have no name: what is served, and what can be gone back to."""
        return {one.model_root for versions in self.versions.own().values() for one in versions} | set(self.roots())

    def pinned(self) -> set[bytes]:
        """Blobs that must not make room for others: of what is served or on its way, and of the two newest contents of every name
        that this node publishes. From any thread."""
        blobs: set[bytes] = set()
        for work in list(self._works.values()):
            for root in self._roots(work.promise):
                if (manifest := self._manifest_here(root)) is not None:
                    ranges = ranges_of(_within(work.promise.taken_of(root), manifest))
                    blobs |= {piece.root for start, end in ranges for piece in stage_pieces(manifest, start, end)}
                    blobs |= {file.root for file in manifest.files}
        for versions in self.versions.own().values():
            newest = list(dict.fromkeys(one.model_root for one in reversed(versions)))[:2]
            for root in newest:
                if (manifest := self._manifest_here(root)) is not None:
                    blobs |= {blob.root for blob in (*manifest.pieces, *manifest.files)}
        return blobs

    def pace_of(self, blob_root: bytes) -> Pace | None:
        """The limit on giving a blob to others, if its model is served under one."""
        for work in self._works.values():
            if not work.promise.upload_max:
                continue
            if work.pace is None or work.pace.rate != work.promise.upload_max:
                work.pace = Pace(work.promise.upload_max)
            roots = self._roots(work.promise)
            if work.limited[0] != roots:
                manifests = [one for root in roots if (one := self._manifest_here(root)) is not None]
                work.limited = roots, {piece.root for one in manifests for piece in one.pieces}
            if blob_root in work.limited[1]:
                return work.pace
        return None

    def _manifest_here(self, root: bytes) -> Manifest | None:
        try:
            return self._models.catalog.manifest(root)
        except NexusError:
            return None

    def _followed(self, name: str) -> bytes | None:
        work = self._works.get(name)
        return work.promise.publisher if work is not None else None

    def _target(self, promise: Promise) -> bytes:
        newest = self.versions.newest(promise.publisher, promise.name) if promise.publisher else None
        return newest.model_root if newest else promise.model_root

    def _roots(self, promise: Promise) -> list[bytes]:
        """The version to serve, then older ones that are still served."""
        return list(dict.fromkeys((self._target(promise), *(one.model_root for one in promise.taken))))

    def _served(self, work: _Work, root: bytes, held: Ranges) -> frozenset[int]:
        """What is announced as served: taken, here, and not withdrawn."""
        if not self._serve:
            return frozenset()
        return (work.promise.taken_of(root) & layers_of(held)) - work.withdrawn.get(root, frozenset())

    def _offer(self, promise: Promise) -> tuple[int, int]:
        """Memory and disk for an undertaking that takes what is needed, in bytes; at least 1: 0 means that it takes nothing by
        itself."""
        memory, disk = [], []
        for work in self._works.values():
            one = work.promise
            needs = (None, None) if one.auto else self._needs(one)
            demand = sum(self._demand(root) for root in self._roots(one))
            memory.append(Share(one.name, needs[0], one.memory_max, demand))
            disk.append(Share(one.name, needs[1], one.disk_max, demand))
        return (
            max(1, divide(self._memory_bytes, memory)[promise.name]),
            max(1, divide(self._disk_bytes, disk)[promise.name]),
        )

    def _needs(self, promise: Promise) -> tuple[int, int]:
        """Memory and disk of the layers of a fixed undertaking; nothing while its model is not known here."""
        manifest = self._manifest_here(self._target(promise))
        if manifest is None or promise.start >= manifest.layers:
            return 0, 0
        start, end = promise.start, min(promise.end, manifest.layers)
        costs = _costs(manifest)
        return costs.memory(start, end), costs.stored(start, end)

    # --- undertaking ----------------------------------------------------------------------------------------------------------

    async def serve(
        self, request: ServeRequest, root: bytes, publisher: bytes | None
    ) -> AsyncGenerator[Progress | Notice | ServingView, None]:
        """Undertake to serve a name, durably; then how far it is, until this node serves what it is to serve. The work goes on when
        nobody listens. `root`: what the name means now. `publisher`: whose versions count, None: as it follows.

        Raises UsageError, NotAllowedError, CapacityError, NotFoundError.
        """
        name = check_name(request.name)
        if not self._serve:
            raise NotAllowedError("this node serves no stages", "Set serve.enabled = true and start it again")
        if self.leaving:
            raise NotAllowedError("this node is draining", "Call that off first, or start it again")
        before = self._works.get(name)
        if publisher is None:
            publisher = before.promise.publisher if before else self.versions.choose_publisher(name, root)
        known = self.versions.known(publisher, name) if publisher else []
        root = known[-1].publication.model_root if known else root
        manifest = await self._models.manifest(root, self.versions.sources(root), wanted_here=True)
        fragment = parse_fragment(request.fragment, manifest.layers)
        self._check_limits(request, manifest, fragment)
        promise = Promise(
            name=name,
            publisher=publisher,
            model_root=root,
            auto=int(fragment is None),
            start=fragment[0] if fragment else 0,
            end=fragment[1] if fragment else 0,
            memory_max=request.memory_max_bytes,
            disk_max=request.disk_max_bytes,
            upload_max=request.upload_max_bytes,
            preload=int(request.preload),
            taken=(),
        )
        work = before or _Work(promise)
        async with work.lock:
            promise = replace(promise, taken=work.promise.taken)
            await self._off_thread(partial(self._store.put, promise))
            work.promise, work.pending, work.wanted = promise, None, {}
            work.asked += 1
        if before is None:
            self._works[name] = work
            assert self._nursery is not None, "run() comes first"
            self._nursery.start_soon(self._keep, work)
        work.changed.set()
        self._members.announce()
        for text in self.versions.others_followed(name, publisher):
            yield Notice(text)
        async for event in self._follow(work):
            yield event
        yield self.view(name)

    async def meet(self) -> None:
        """Ask the others anew before something is undertaken or given up: what they serve since a moment ago counts too."""
        limiter = trio.CapacityLimiter(ASK_AT_ONCE)

        async def ask(peer_id: str) -> None:
            async with limiter:
                with suppress(NexusError):
                    await self._members.refresh(peer_id)

        with trio.move_on_after(ASK_FIRST_S):
            async with trio.open_nursery() as nursery:
                for record in self._members.records()[:ASK_FIRST_MAX]:
                    nursery.start_soon(ask, record.peer_id)

    async def _follow(self, work: _Work) -> AsyncGenerator[Progress | Notice, None]:
        """What an undertaking does, until it has nothing left to do for now."""
        send, receive = trio.open_memory_channel[Progress](EVENTS_MAX)

        def listen(event: Progress) -> None:
            with suppress(trio.WouldBlock):
                send.send_nowait(event)

        work.listeners.append(listen)
        told = ""
        try:
            while work.settled < work.asked and not work.ended:
                if work.failures and work.detail != told:
                    told = work.detail
                    yield Notice(f"not yet: {told}")
                event: Progress | None = None
                with trio.move_on_after(LOOK_S / 4):
                    event = await receive.receive()
                if event is not None:
                    yield event
        finally:
            work.listeners.remove(listen)
        if work.short:
            yield Notice(work.short)

    def _check_limits(self, request: ServeRequest, manifest: Manifest, fragment: Range | None) -> None:
        """Raises UsageError for limits above the node's own, CapacityError for those under which nothing can be served."""
        own = (("memory", self._memory_bytes), ("disk", self._disk_bytes))
        given = (request.memory_max_bytes, request.disk_max_bytes)
        for (what, most), limit in zip(own, given, strict=True):
            if limit > most:
                raise UsageError(
                    f"--max-{what} is {limit:,} bytes, and this node gives {most:,} to all models", f"Raise serve.{what}_max_bytes"
                )
        costs = _costs(manifest)
        start, end = fragment or min(
            ((layer, layer + 1) for layer in range(manifest.layers)), key=lambda one: (costs.memory(*one), one)
        )
        which = f"{describe_layers([(start, end)])} of {request.name!r}" + ("" if fragment else ", the smallest,")
        needs = (costs.memory(start, end), costs.stored(start, end))
        for (what, most), limit, needed in zip(own, given, needs, strict=True):
            if needed > (limit or most):
                raise CapacityError(
                    f"{which} take {needed:,} bytes of {what}, and {limit or most:,} are given",
                    f"Raise {f'--max-{what}' if limit else f'serve.{what}_max_bytes'}"
                    + (", or give fewer layers" if fragment else ""),
                )

    async def unserve(self, name: str) -> list[str]:
        """End an undertaking; what is to be said of it. What is on the disk stays there until its room is needed. Raises
        NotFoundError."""
        work = self._work(name)
        said = []
        async with work.lock:
            root = self._target(work.promise)
            if (manifest := self._manifest_here(root)) is not None:
                counts = self._elsewhere(root, manifest.layers)
                served = self._served(work, root, held_layers(manifest, self._models.blobs))
                alone = ranges_of(layer for layer in served if not counts[layer])
                if alone:
                    said.append(f"nobody else in reach serves {describe_layers(alone)} of {name!r}")
            await self._off_thread(partial(self._store.end, name))
            work.ended = True
            del self._works[name]
        work.scope.cancel()
        await self.versions.forget(work.promise.publisher, name)
        self._members.announce()
        return said

    def _work(self, name: str) -> _Work:
        work = self._works.get(name)
        if work is None:
            raise NotFoundError(
                f"this node does not undertake to serve {name!r}",
                f"`nexus model serve {name}` makes it do so; see `nexus model list`",
            )
        return work

    def view(self, name: str) -> ServingView:
        """Raises NotFoundError."""
        work = self._work(name)
        promise, root = work.promise, self._target(work.promise)
        layers, held = 0, frozenset[int]()
        if (manifest := self._manifest_here(root)) is not None:
            layers, held = manifest.layers, layers_of(held_layers(manifest, self._models.blobs))
        older = []
        for other in self._roots(promise)[1:]:
            signed = self.versions.signed(promise.publisher, name, other)
            older.append(VersionView(signed.publication.version if signed else 0, other))
        signed = self.versions.signed(promise.publisher, name, root)
        return ServingView(
            name=name,
            publisher=peer_id_of(promise.publisher) if promise.publisher else "",
            version=signed.publication.version if signed else 0,
            model_root=root,
            layers=layers,
            fragment=_fragment(promise),
            served=ranges_of(self._served(work, root, ranges_of(held))),
            fetching=ranges_of(promise.taken_of(root) - held),
            older=tuple(older),
            state=work.state,
            detail=work.detail,
            memory_max_bytes=promise.memory_max,
            disk_max_bytes=promise.disk_max,
            upload_max_bytes=promise.upload_max,
            replicas=self.replicas(root, layers),
            short=work.short,
        )

    def views(self) -> list[ServingView]:
        return [self.view(name) for name in sorted(self._works)]

    def shown(self, name: str, manifest: Manifest) -> dict[str, Any]:
        """The fields of a `ModelView` that are about serving and versions."""
        work = self._works.get(name)
        held = held_layers(manifest, self._models.blobs)
        try:
            publisher = self.versions.publisher_of(name) or b""
        except UsageError:  # several publish the name, and none was chosen
            publisher = b""
        known = self.versions.known(publisher, name) if publisher else []
        here = [one.publication.version for one in known if one.publication.model_root == manifest.root]
        return {
            "serving": ranges_of(self._served(work, manifest.root, held)) if work is not None else (),
            "replicas": self.replicas(manifest.root, manifest.layers),
            "version": max(here, default=0),
            "versions": tuple(VersionView(one.publication.version, one.publication.model_root) for one in known),
            "publisher": peer_id_of(publisher) if publisher else "",
        }

    def replicas(self, root: bytes, layers: int) -> tuple[int, ...]:
        """On how many nodes each layer of a model is served, this one too."""
        return self._elsewhere(root, layers, [*self._members.records(), self._members.own()])

    def _elsewhere(self, root: bytes, layers: int, records: Iterable[NodeRecord] | None = None) -> tuple[int, ...]:
        """On how many other nodes each layer is served. `records`: of them, None: those at hand."""
        return replica_counts(layers, [served_by(one, root) for one in (self._members.records() if records is None else records)])

    # --- keeping a promise ------------------------------------------------------------------------------------------------------

    async def _keep(self, work: _Work) -> None:
        """One undertaking, until it ends. What fails is tried again, less and less often."""
        with work.scope:
            while True:
                work.changed = trio.Event()
                pause_s = LOOK_S
                try:
                    if not self.leaving:
                        await self._step(work)
                        work.failures = 0
                except NexusError as error:
                    work.failures += 1
                    work.state, work.detail = WAITING, error.cause
                    pause_s = min(RETRY_MAX_S, RETRY_S * 2.0 ** min(work.failures - 1, 8)) * self._rng.uniform(0.5, 1.0)
                    log.info("serving_failed", name=work.promise.name, reason=error.cause, again_in_s=round(pause_s, 1))
                with trio.move_on_after(pause_s):
                    await work.changed.wait()

    async def _step(self, work: _Work) -> None:
        """Look at everything once and do what is to be done. Raises NexusError."""
        asked, promise = work.asked, work.promise
        if promise.publisher:
            await self.versions.learn(promise.publisher, promise.name)
        root = self._target(promise)
        manifest = await self._models.manifest(root, self.versions.sources(root), wanted_here=True)
        planned = await self._decide(work, manifest)
        taken = _within(work.promise.taken_of(root), manifest)
        missing = taken - layers_of(held_layers(manifest, self._models.blobs))
        if missing:
            try:
                await self._fetch(work, manifest, taken, missing)
            except CapacityError:
                # No room for the new beside the old: what is on enough other nodes makes way first.
                await self._let_go(work, manifest, planned)
                await self._let_go_of_older(work)
                raise
        await self._move_name(work.promise, root)
        if work.promise.preload:
            await self._preload(work, manifest)
        work.state, work.detail = SERVING, ""
        work.settled = max(work.settled, asked)
        await self._let_go(work, manifest, planned)
        await self._retire(work, manifest)

    async def _change(self, work: _Work, root: bytes, change: Callable[[frozenset[int]], frozenset[int]]) -> None:
        """Durably change what is taken of a version, and tell the others."""
        async with work.lock:
            before = work.promise.taken_of(root)
            after = change(before)
            if work.ended or after == before:
                return
            promise = work.promise.with_taken(root, after)
            await self._off_thread(partial(self._store.put, promise))
            work.promise = promise
        self._members.announce()

    async def _decide(self, work: _Work, manifest: Manifest) -> Sequence[int]:
        """Take what is to be taken. On how many other nodes the layout puts each layer."""
        root, promise = manifest.root, work.promise
        replicas = self._goal()
        taken = _within(promise.taken_of(root), manifest)
        own = self._identity.public_key
        found = await self._layout(work, manifest)
        others = ((one.start, one.end) for one in found.fragments if one.node != own)
        planned = replica_counts(manifest.layers, ([one] for one in others))
        if not promise.auto:
            wanted = _within(frozenset(range(promise.start, promise.end)), manifest)
            work.wanted = {root: wanted}
            await self._change(work, root, lambda before: before | wanted)
            return planned
        wanted = layers_of((one.start, one.end) for one in found.fragments if one.node == own)
        current = work.wanted.get(root, taken)
        if not taken or work.settled < work.asked:
            current = frozenset()  # its owner has just asked for it
        elif trio.current_time() < self._met_s:
            wanted = current
        counts = self._elsewhere(root, manifest.layers)
        work.pending, act = consider(work.pending, current, wanted, counts, replicas, trio.current_time(), self._rng.uniform)
        if act:
            log.info("fragment_taken", name=promise.name, layers=describe_layers(ranges_of(wanted)), model=root.hex()[:16])
            current = wanted
            await self._change(work, root, lambda before: before | wanted)
        work.wanted = {root: current}
        return planned

    def _goal(self) -> int:
        """On how many nodes each layer has to be before one lets go of it."""
        return self._replicas or REPLICAS

    def _fellows(self, promise: Promise) -> list[NodeRecord]:
        """The other nodes that undertook to serve the same name of the same publisher, or the same model, and stay."""
        return [
            record
            for record in self._members.records()
            if record.serves and not record.leaving and any(self._is_fellow(one, promise) for one in record.models)
        ]

    def _is_fellow(self, holding: Holding, promise: Promise) -> bool:
        same_name = bool(promise.publisher) and (holding.publisher, holding.name) == (promise.publisher, promise.name)
        return (same_name or holding.model_root == self._target(promise)) and bool(holding.serving or holding.memory_bytes)

    async def _layout(self, work: _Work, manifest: Manifest, *, without_own: bool = False) -> Layout:
        """Made anew only when something that it depends on has changed."""
        fellows = self._fellows(work.promise)
        records = fellows if without_own else [self._members.own(), *fellows]
        members = tuple(
            sorted((self._member(one, work.promise, manifest) for one in records), key=lambda member: member.candidate.node)
        )
        inputs = (manifest.root, members)
        if work.laid_out is not None and work.laid_out[0] == inputs:
            return work.laid_out[1]
        found = await self._off_thread(
            partial(
                layout,
                manifest,
                members,
                replicas=self._replicas,
                dtype=DTYPES[manifest.profile][0],
                context=min(manifest.context, CONTEXT),
                streams=STREAMS,
                rtt_us=self._members.rtt_us,
            )
        )
        work.laid_out = (inputs, found)
        return found

    def _member(self, record: NodeRecord, promise: Promise, manifest: Manifest) -> Member:
        """A node as the layout sees it: what it gives to this model, and what it serves of this version, or else of the newest one
        before."""
        own = record.node == self._identity.public_key
        holdings = [one for one in record.models if own or self._is_fellow(one, promise)]
        of_version = [one for one in holdings if one.model_root == manifest.root]
        if own:
            memory, disk = self._offer(promise)
            fixed = not promise.auto
            ranges = ranges_of(_within(promise.taken_of(manifest.root), manifest))
            older = [ranges_of(_within(promise.taken_of(root), manifest)) for root in self._roots(promise)]
        else:
            offered = next((one for one in holdings if one.memory_bytes), None)
            memory, disk = (offered.memory_bytes, offered.disk_bytes) if offered else (record.memory_bytes, record.memory_bytes)
            fixed = offered is None
            ranges = _ranges_within((r for one in of_version for r in one.serving), manifest)
            newest_first = sorted(holdings, key=lambda one: -one.version)
            older = [_ranges_within(one.serving, manifest) for one in newest_first]
        serving = ranges or next((one for one in older if one), ())
        candidate = Candidate(
            node=record.node,
            name=record.name,
            memory_bytes=memory,
            speed=record.speed(manifest.profile),
            rtt_ms=None,
            held=held_by(record, manifest.root),
            serves=bool(record.serves) and not record.leaving,
            domain=domain_of(record.addresses),
        )
        # So many sessions keep a node busy all of its time; more of them wait for each other.
        pinned = serving if fixed else None
        if own and fixed:
            pinned = ranges_of(_within(frozenset(range(promise.start, promise.end)), manifest))
        return Member(candidate, disk, serving, pinned, record.load / STREAMS)

    async def _fetch(self, work: _Work, manifest: Manifest, taken: frozenset[int], missing: frozenset[int]) -> None:
        most = work.promise.disk_max
        needed = sum(_costs(manifest).stored(start, end) for start, end in ranges_of(taken))
        if most and needed > most:
            raise CapacityError(f"its layers take {needed:,} bytes of disk, and {most:,} are given", "Raise --max-disk")
        work.state, work.detail = FETCHING, describe_layers(ranges_of(missing))
        for start, end in ranges_of(missing):
            await self._models.hold(manifest, start, end, self.versions.sources(manifest.root), partial(self._tell, work))
            self._members.announce()

    async def _preload(self, work: _Work, manifest: Manifest) -> None:
        for start, end in ranges_of(work.wanted.get(manifest.root, ())):
            if (manifest.root, start, end) in work.loaded:
                continue
            work.state, work.detail = LOADING, describe_layers([(start, end)])
            dtype, sources = DTYPES[manifest.profile][0], self.versions.sources(manifest.root)
            async with self._models.stage(manifest, start, end, dtype, sources, partial(self._tell, work)):
                work.loaded = {one for one in work.loaded if one[0] == manifest.root} | {(manifest.root, start, end)}

    async def _tell(self, work: _Work, phase: str, done: int, total: int) -> None:
        for listener in tuple(work.listeners):
            listener(Progress(self._identity.peer_id, phase, done, total))

    async def _move_name(self, promise: Promise, root: bytes) -> None:
        """A local name that means an earlier version means this one from now on."""
        named = self._models.catalog.names().get(promise.name)
        if named not in (None, root) and self.versions.signed(promise.publisher, promise.name, named or b"") is not None:
            await self._off_thread(partial(self._models.catalog.point, promise.name, root))

    # --- letting go -------------------------------------------------------------------------------------------------------------

    async def _let_go(self, work: _Work, manifest: Manifest, planned: Sequence[int]) -> None:
        """Give up what is no longer wanted of the version to serve, where enough others have it."""
        root, layers = manifest.root, manifest.layers
        served = self._served(work, root, held_layers(manifest, self._models.blobs))
        wanted = work.wanted.get(root, frozenset())
        # What is neither wanted nor here yet is nobody's loss.
        never = work.promise.taken_of(root) - wanted - served
        if never:
            await self._change(work, root, lambda before: before - never)
        await self._withdraw(work, root, layers, served, wanted, needed_elsewhere(planned, self._goal()))

    async def _let_go_of_older(self, work: _Work) -> None:
        """Make room for a new version: of the older ones what another node serves too. They are in use, so one is enough."""
        for root in self._roots(work.promise)[1:]:
            if (manifest := self._manifest_here(root)) is not None:
                served = self._served(work, root, held_layers(manifest, self._models.blobs))
                await self._withdraw(work, root, manifest.layers, served, frozenset(), [1] * manifest.layers)

    async def _withdraw(
        self, work: _Work, root: bytes, layers: int, served: frozenset[int], wanted: frozenset[int], needed: Sequence[int]
    ) -> None:
        """Withdraw what is not wanted and, by the records at hand, on enough other nodes; ask those, first-hand; let go of what
        they confirm, and serve the rest again. See `nexus.swarm.fragments` for why this is safe."""
        unneeded = to_withdraw(served, wanted, self._elsewhere(root, layers), needed)
        if not unneeded or trio.current_time() < work.regret_s:
            return
        work.withdrawn[root] = unneeded
        self._members.announce()
        fresh: dict[bytes, NodeRecord] = {}
        limiter = trio.CapacityLimiter(ASK_AT_ONCE)

        async def ask(peer_id: str) -> None:
            async with limiter:
                with trio.move_on_after(ASK_S), suppress(NexusError):
                    record = await self._members.refresh(peer_id)
                    fresh[record.node] = record

        try:
            async with trio.open_nursery() as nursery:
                for record in self._members.records():
                    if layers_of(served_by(record, root)) & unneeded:
                        nursery.start_soon(ask, record.peer_id)
            gone = confirmed(unneeded, self._elsewhere(root, layers, fresh.values()), needed)
            if gone:
                log.info(
                    "fragment_given_up", name=work.promise.name, layers=describe_layers(ranges_of(gone)), model=root.hex()[:16]
                )
                await self._change(work, root, lambda before: before - gone)
            if gone != unneeded:
                work.regret_s = trio.current_time() + REGRET_S * self._rng.uniform(0.5, 1.5)
        finally:
            del work.withdrawn[root]
            self._members.announce()

    async def _retire(self, work: _Work, manifest: Manifest) -> None:
        """Serve older versions no longer once the newest is as safe as they are."""
        for root in self._roots(work.promise)[1:]:
            older = self._manifest_here(root)
            layers = older.layers if older is not None else 0
            if may_retire(self.replicas(root, layers), self.replicas(manifest.root, manifest.layers), self._goal()):
                log.info("version_retired", name=work.promise.name, model=root.hex()[:16])
                await self._change(work, root, lambda before: frozenset())

    # --- leaving ----------------------------------------------------------------------------------------------------------------

    async def hand_over(self) -> list[HandOverView]:
        """Of every model that is served here: which layers enough others serve without this node, and which wait. Layers that
        nobody undertook to serve beside this node do not wait for anybody: they are lost."""
        views = []
        for work in list(self._works.values()):
            for root in self._roots(work.promise):
                manifest = self._manifest_here(root)
                if manifest is None:
                    continue
                served = self._served(work, root, held_layers(manifest, self._models.blobs))
                if not served:
                    continue
                counts = self._elsewhere(root, manifest.layers)
                fellows = self._fellows(work.promise)
                lost = frozenset(layer for layer in served if not counts[layer])
                waiting: frozenset[int] = frozenset()
                if fellows:
                    found = await self._layout(work, manifest, without_own=True)
                    planned = replica_counts(manifest.layers, ([(one.start, one.end)] for one in found.fragments))
                    needed = needed_elsewhere(planned, self._goal())
                    waiting = served - to_withdraw(served, frozenset(), counts, needed)
                names = sorted(
                    one.name or one.peer_id for one in self._members.records() if layers_of(served_by(one, root)) & served
                )
                views.append(
                    HandOverView(
                        name=work.promise.name,
                        model_root=root,
                        handed_over=ranges_of(served - waiting - lost),
                        waiting=ranges_of(waiting),
                        lost=ranges_of(lost),
                        to=tuple(names),
                    )
                )
        return views


def _costs(manifest: Manifest) -> StageCosts:
    return StageCosts(manifest, DTYPES[manifest.profile][0], min(manifest.context, CONTEXT))


def _within(layers: frozenset[int], manifest: Manifest) -> frozenset[int]:
    return frozenset(layer for layer in layers if layer < manifest.layers)


def _ranges_within(ranges: Iterable[LayerRange], manifest: Manifest) -> Ranges:
    return ranges_of(_within(layers_of((one.start, one.end) for one in ranges), manifest))


def _fragment(promise: Promise) -> str:
    if promise.auto:
        return "auto"
    return f"{promise.start}-{promise.end - 1}" if promise.end - promise.start > 1 else str(promise.start)
