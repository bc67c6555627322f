"""Versions of named models: who publishes them, which are known here, and which one a request gets.

A publication travels in the records of all who serve it, signed by its publisher, so a version is known as long as anybody serves
it, and nobody else can make one. Which publisher counts for a name is this node's own choice: that of its undertaking, itself where
it published the name, otherwise the only one that does.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

import structlog
import trio

from nexus.core.errors import NexusError, NotAllowedError, NotFoundError, UsageError, VerificationError
from nexus.core.keys import Identity, peer_id_of
from nexus.core.manifest import Manifest
from nexus.models import BUILTIN_NAMES
from nexus.network.transport import PeerAddress
from nexus.node.blobs import OffThread, in_worker_thread
from nexus.node.fragments_api import VersionView
from nexus.node.models import Models
from nexus.node.progress import Notice, Progress
from nexus.storage.catalog import check_name, held_layers
from nexus.storage.fragments import FragmentStore
from nexus.swarm.fragments import (
    Publication,
    Ranges,
    SignedPublication,
    VersionState,
    is_covered,
    next_version,
    ranges_of,
    replica_counts,
    rollback_target,
    version_to_use,
)
from nexus.swarm.membership import Holding, NodeRecord

log = structlog.get_logger("nexus.versions")

# Versions of a name that are looked at when one is chosen, and how long the manifest of one that is not here may take.
VERSIONS_SEEN, MANIFEST_S = 4, 5.0
# Publications of others whose signatures were checked: each is checked once.
CHECKED_MAX = 4096
LOOK_S = 0.5


class Members(Protocol):
    """What serving needs of the swarm."""

    def records(self) -> Sequence[NodeRecord]:
        """What the nodes in reach say of themselves, without this one and those that are convicted or suspended."""

    def own(self) -> NodeRecord: ...

    async def refresh(self, peer_id: str) -> NodeRecord:
        """A node's record from itself, after it has been given this node's. Raises PeerError, TimedOutError, CapacityError."""

    def announce(self) -> None:
        """What this node holds or serves has changed."""

    def rtt_us(self, one: bytes, other: bytes) -> int: ...


class Versions:
    """`followed`: the publisher of this node's undertaking for a name, b"" where it follows nobody, None where there is none."""

    def __init__(
        self,
        identity: Identity,
        store: FragmentStore,
        models: Models,
        members: Members,
        followed: Callable[[str], bytes | None],
        off_thread: OffThread = in_worker_thread,
    ) -> None:
        self._identity = identity
        self._store = store
        self._models = models
        self._members = members
        self._followed = followed
        self._off_thread = off_thread
        self._kept: dict[tuple[bytes, str], list[SignedPublication]] = {}
        for signed in store.all_versions():
            self._kept.setdefault((signed.publication.publisher, signed.publication.name), []).append(signed)
        self._checked: dict[SignedPublication, bool] = {}

    # --- what is known ---

    def publishes(self, name: str) -> bool:
        """Whether this node is the publisher of a name."""
        return (self._identity.public_key, name) in self._kept

    def own(self) -> dict[str, list[Publication]]:
        """What this node published, by name, the oldest versions first."""
        own = self._identity.public_key
        return {name: [one.publication for one in kept] for (key, name), kept in list(self._kept.items()) if key == own}

    def newest(self, publisher: bytes, name: str) -> Publication | None:
        """The version that counts, of those that are kept here."""
        kept = self._kept.get((publisher, name))
        return kept[-1].publication if kept else None

    def signed(self, publisher: bytes, name: str, model_root: bytes) -> SignedPublication | None:
        """The newest version of the name with that content, of those that are kept here."""
        kept = reversed(self._kept.get((publisher, name), []))
        return next((one for one in kept if one.publication.model_root == model_root), None)

    def of(self, holding: Holding) -> SignedPublication | None:
        """The version that a record names, if its publisher signed it."""
        if not holding.version or not holding.publisher or not holding.signature:
            return None
        publication = Publication(holding.publisher, holding.name, holding.version, holding.model_root)
        signed = SignedPublication(publication, holding.signature)
        if signed not in self._checked:
            try:
                signed.verify()
                holds = True
            except VerificationError:
                holds = False
            while len(self._checked) >= CHECKED_MAX:
                del self._checked[next(iter(self._checked))]
            self._checked[signed] = holds
        return signed if self._checked[signed] else None

    def announced(self, name: str) -> list[tuple[NodeRecord, Holding]]:
        return [(record, one) for record in self._members.records() for one in record.models if one.name == name]

    def known(self, publisher: bytes, name: str) -> list[SignedPublication]:
        """Versions of a name by one publisher: those kept here, and those that others announce. The oldest first; of two with one
        number the one that was kept first."""
        found = {one.publication.version: one for one in self._kept.get((publisher, name), [])}
        for _, holding in self.announced(name):
            if holding.publisher == publisher and (signed := self.of(holding)) is not None:
                found.setdefault(signed.publication.version, signed)
        return [found[version] for version in sorted(found)]

    def root_of(self, publisher: bytes, name: str) -> bytes | None:
        """What a name means by the word of its publisher: the newest version, or what it holds under that name where it has made
        none. None where that is not known."""
        known = self.known(publisher, name)
        if known:
            return known[-1].publication.model_root
        own = {one.model_root for record, one in self.announced(name) if record.node == publisher}
        return own.pop() if len(own) == 1 else None

    async def learn(self, publisher: bytes, name: str) -> None:
        """Keep what is new of the versions of a name that is followed. Raises LocalError, CapacityError."""
        kept = self._kept.get((publisher, name), [])
        known = self.known(publisher, name)
        new = [one for one in known if one not in kept]
        if not new:
            return
        await self._off_thread(partial(self._store.add_versions, new))
        self._kept[(publisher, name)] = after = await self._off_thread(partial(self._store.versions, publisher, name))
        if after[-1:] != kept[-1:]:
            log.info("version_followed", name=name, version=after[-1].publication.version)
        self._members.announce()

    async def forget(self, publisher: bytes, name: str) -> None:
        """Versions of somebody who is no longer followed. What this node published itself stays."""
        if publisher != self._identity.public_key and self._kept.pop((publisher, name), None) is not None:
            await self._off_thread(partial(self._store.forget_versions, publisher, name))

    # --- which one counts ---

    def publisher_of(self, name: str) -> bytes | None:
        """Whose versions of a name count here; None where none do. Raises UsageError where several publish it and none was
        chosen."""
        followed = self._followed(name)
        if followed is not None:
            return followed or None
        if self.publishes(name):
            return self._identity.public_key
        if name in self._models.catalog.names() or name in BUILTIN_NAMES:
            return None
        announced = self.announced(name)
        found = {one.publisher for _, one in announced if self.of(one) is not None}
        if len(found) > 1:
            raise UsageError(
                f"{len(found)} nodes publish a model as {name!r}",
                f"Say which by its root (`nexus model list`), or choose: nexus model serve {name} --publisher PEER",
            )
        published = {one.publication.model_root for key in found for one in self.known(key, name)}
        others = {one.model_root for _, one in announced} - published
        return next(iter(found)) if found and not others else None

    def choose_publisher(self, name: str, model_root: bytes) -> bytes:
        """Whose versions of a name to follow from now on, where the user does not say. `model_root`: what the name means now.
        Raises UsageError where that is not clear."""
        own = self._identity.public_key
        if self.publishes(name):
            return own
        announced = self.announced(name)
        publishers = {one.publisher for _, one in announced if self.of(one) is not None}
        fitting = {key for key in publishers if any(one.publication.model_root == model_root for one in self.known(key, name))}
        if len(fitting) == 1:
            return fitting.pop()
        if name in self._models.catalog.names():
            return own
        publishers = publishers or {one.publisher or record.node for record, one in announced}
        if len(publishers) > 1:
            listed = ", ".join(peer_id_of(key) for key in sorted(publishers)[:4])
            raise UsageError(
                f"{len(publishers)} nodes have a model {name!r}", f"Say whose versions count: --publisher, of {listed}"
            )
        return publishers.pop() if publishers else b""

    def others_followed(self, name: str, publisher: bytes) -> list[str]:
        """What to know for a node that follows this publisher: that others who serve the name follow another one."""
        announced = [one for _, one in self.announced(name) if one.serving or one.memory_bytes]
        others = sorted({one.publisher for one in announced if one.publisher} - {publisher})
        who = f"the versions of {peer_id_of(publisher)}" if publisher else "no versions"
        if publisher == self._identity.public_key:
            who = "only what is published here"
        return [
            f"others serve {name!r} as {peer_id_of(other)} publishes it; this node follows {who}: --publisher changes that"
            for other in others[:4]
        ]

    async def current(self, name: str) -> bytes | None:
        """The model that a name means for a request now: the newest version that is served in whole, or as `version_to_use` says.
        None where the name has no versions here. Raises UsageError as `publisher_of`."""
        publisher = self.publisher_of(name)
        if publisher is None:
            return None
        states = [await self.state(one.publication) for one in self.known(publisher, name)[-VERSIONS_SEEN:]]
        chosen = version_to_use(states)
        return chosen.model_root if chosen else None

    async def state(self, publication: Publication) -> VersionState:
        root, layers = publication.model_root, 0
        with trio.move_on_after(MANIFEST_S), suppress(NexusError):
            layers = (await self._models.manifest(root, self.sources(root))).layers
        records = [*self._members.records(), self._members.own()]
        held = [held_by(record, root) for record in records if record.serves]
        served = [served_by(record, root) for record in records]
        return VersionState(publication.version, root, replica_counts(layers, served), replica_counts(layers, held))

    def sources(self, root: bytes) -> list[PeerAddress]:
        return [PeerAddress(record.peer_id, record.addresses) for record in self._members.records() if held_by(record, root)]

    def views(self, name: str) -> list[VersionView]:
        """The versions of a name that are known here, the oldest first."""
        publisher = self.publisher_of(name)
        known = self.known(publisher, name) if publisher is not None else []
        return [VersionView(one.publication.version, one.publication.model_root) for one in known]

    # --- publishing ---

    def check_may_publish(self, name: str) -> None:
        """Raises UsageError for a bad name, NotFoundError, and NotAllowedError where another node's versions of it are followed."""
        check_name(name)
        followed = self._followed(name)
        if followed and followed != self._identity.public_key:
            raise NotAllowedError(
                f"this node serves {name!r} as {peer_id_of(followed)} publishes it",
                "Publish it there, or under another name; `nexus model unserve` ends that",
            )
        if name not in self._models.catalog.names() and not self.publishes(name):
            raise NotFoundError(f"no model {name!r} was added here", f"Add it first: nexus model add PATH --name {name}")

    async def publish(self, name: str, manifest: Manifest) -> Publication:
        """Make a model that is known here the next version of a name, signed and durable. Raises as `check_may_publish`, and
        UsageError where the name means it already, or a model of another kind."""
        self.check_may_publish(name)
        key = (self._identity.public_key, name)
        signed = list(self._kept.get(key, []))
        if not signed:
            first = next_version([], *key, self._models.catalog.names()[name])
            signed.append(SignedPublication.sign(first, self._identity))
        before = self._models.catalog.manifest(signed[-1].publication.model_root)
        if before.kind != manifest.kind:
            raise UsageError(f"{name!r} is a model of kind {before.kind!r}, this one is {manifest.kind!r}", "Give it another name")
        publication = next_version([one.publication for one in signed], *key, manifest.root)
        signed.append(SignedPublication.sign(publication, self._identity))
        await self._off_thread(partial(self._store.add_versions, signed))
        self._kept[key] = await self._off_thread(partial(self._store.versions, *key))
        self._models.catalog.point(name, manifest.root)
        self._members.announce()
        log.info("version_published", name=name, version=publication.version, model=manifest.root.hex()[:16])
        return publication

    def earlier(self, name: str, to: int | None) -> Manifest:
        """The content that a rollback of a name brings back. Raises as `check_may_publish`, UsageError, and NotFoundError where it
        is nowhere in whole."""
        self.check_may_publish(name)
        target = rollback_target(self.own().get(name, []), to)
        manifest = self._models.catalog.manifest(target.model_root)
        held = [held_layers(manifest, self._models.blobs), *(held_by(one, manifest.root) for one in self._members.records())]
        counts = replica_counts(manifest.layers, held)
        if not is_covered(counts):
            missing = describe_layers(ranges_of(layer for layer, count in enumerate(counts) if not count))
            raise NotFoundError(
                f"nobody in reach has {missing} of version {target.version} of {name!r}",
                "Start a node that has them, or take the model in again: nexus model update",
            )
        return manifest

    async def rolling(self, publication: Publication) -> AsyncGenerator[Progress | Notice, None]:
        """How far the swarm is with a version, until requests get it. At once where nobody serves the name."""
        told = -1
        while True:
            known = [one.publication for one in self.known(publication.publisher, publication.name)]
            state = await self.state(publication)
            if known and known[-1].version > publication.version:
                yield Notice(f"version {known[-1].version} came in between")
                return
            if not self._has_servers(publication):
                yield Notice(f"nobody serves {publication.name!r}: requests get version {publication.version} from now on")
                return
            served = sum(1 for count in state.served if count)
            if served != told:
                told = served
                phase = f"layers served in version {publication.version}"
                yield Progress(self._identity.peer_id, phase, served, len(state.served))
            if is_covered(state.served):
                return
            await trio.sleep(LOOK_S)

    def _has_servers(self, publication: Publication) -> bool:
        """Whether anybody undertook to serve the name as its publisher has it."""
        if self._followed(publication.name) == publication.publisher:
            return True
        announced = (one for _, one in self.announced(publication.name))
        return any(one.publisher == publication.publisher and (one.serving or one.memory_bytes) for one in announced)


def served_by(record: NodeRecord, root: bytes) -> Ranges:
    """What a node serves of a model, by its record; nothing where it leaves."""
    if not record.serves or record.leaving:
        return ()
    return tuple((one.start, one.end) for holding in record.models if holding.model_root == root for one in holding.serving)


def held_by(record: NodeRecord, root: bytes) -> Ranges:
    """What a node has of a model, by its record."""
    return tuple((one.start, one.end) for holding in record.models if holding.model_root == root for one in holding.held)


def describe_layers(ranges: Sequence[tuple[int, int]]) -> str:
    """ "layers 0-3, 7", with the last one included; "no layers" for none."""
    shown = ", ".join(f"{start}-{end - 1}" if end - start > 1 else str(start) for start, end in ranges)
    if not shown:
        return "no layers"
    return ("layer " if len(ranges) == 1 and ranges[0][1] - ranges[0][0] == 1 else "layers ") + shown
