"""Collections as users steer them: made, granted, followed, brought up to date."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import structlog
import trio

from nexus.core.errors import NotAllowedError, NotFoundError, PeerError, UsageError
from nexus.core.keys import public_key_of
from nexus.memory import collection as rules
from nexus.memory.collection import Charter, SignedCharter
from nexus.node.memory.api import (
    CollectionView,
    SyncView,
)
from nexus.node.memory.parts import Parts
from nexus.node.memory.views import collection_view

log = structlog.get_logger("nexus.memory")


class Following:
    """See `nexus.node.memory.api` for what is promised. `charters_changed`: told of collections whose rules were changed here."""

    def __init__(self, parts: Parts, charters_changed: Callable[[Sequence[bytes]], Awaitable[None]]) -> None:
        self._parts = parts
        self._charters_changed = charters_changed

    async def collections(self) -> list[CollectionView]:
        stats = await trio.to_thread.run_sync(self._parts.store.stats)
        held = {collection: (live, size) for collection, live, size in stats.collections}
        return [self._collection_view(charter, held) for charter in self._parts.charters.all()]

    def _collection_view(self, charter: Charter, held: dict[bytes, tuple[int, int]]) -> CollectionView:
        return collection_view(
            charter,
            self._parts.charters,
            self._parts.names,
            self._parts.identity.public_key,
            self._parts.now_ms(),
            held.get(charter.id, (0, 0)),
        )

    async def _one_collection(self, charter: Charter) -> CollectionView:
        stats = await trio.to_thread.run_sync(self._parts.store.stats)
        return self._collection_view(charter, {collection: (live, size) for collection, live, size in stats.collections})

    async def create_collection(self, name: str, mode: str, writers: Sequence[str]) -> CollectionView:
        if mode not in ("public", "writers", "private"):
            raise UsageError(f"there is no kind of collection {mode!r}", "Choose public, writers or private")
        others = [public_key_of(self._parts.find_peer(writer)) for writer in writers]
        number = {name: number for number, name in rules.MODE_NAMES.items()}[mode]
        charter = await trio.to_thread.run_sync(self._parts.charters.create, name, number, others, "", b"")
        self._parts.syncing.followed(charter.id)
        return await self._one_collection(charter)

    async def grant(self, collection: str, peer: str, *, write: bool, revoke: bool) -> CollectionView:
        charter = self._parts.charters.resolve(collection)
        key = public_key_of(self._parts.find_peer(peer))
        if revoke:
            # --write takes the right to write and leaves that to read.
            changed = await trio.to_thread.run_sync(
                partial(self._parts.charters.revoke, charter, key, may_still_read=write and charter.mode == rules.PRIVATE)
            )
        else:
            changed = await trio.to_thread.run_sync(partial(self._parts.charters.grant, charter, key, write=write))
        await self._charters_changed([changed.id])
        await self._parts.syncing.tell_charter(changed.id)
        self._parts.syncing.followed(changed.id)
        return await self._one_collection(changed)

    async def subscribe(self, name: str, peer: str | None) -> CollectionView:
        peer_id = self._parts.find_peer(peer) if peer is not None else None
        charter = self._known(name, peer_id)
        if charter is None:
            signed, grants = await self._parts.finding.collection(name, peer_id)
            charter = signed.charter
            await trio.to_thread.run_sync(self._take, signed, grants)
            await self._charters_changed([charter.id])
        if not rules.may_read(charter, self._parts.identity.public_key):
            raise NotAllowedError(f"{name!r} is private and you are not in it", "Ask its owner: nexus collection grant")
        await trio.to_thread.run_sync(self._parts.charters.follow, charter.id)
        self._parts.syncing.followed(charter.id)
        return await self._one_collection(charter)

    def _take(self, signed: SignedCharter, grants: Sequence[bytes]) -> None:
        """One peer's bad keys do not keep a user from what another says."""
        self._parts.charters.take(signed)
        for grant in grants:
            try:
                self._parts.charters.take_grant(grant)
            except PeerError as error:
                log.info("key_refused", reason=error.cause)

    def _known(self, name: str, peer_id: str | None) -> Charter | None:
        """A collection that is known here, unless a peer is named whose own it is not."""
        try:
            charter = self._parts.charters.resolve(name)
        except NotFoundError:
            return None
        return charter if peer_id is None or charter.owner == public_key_of(peer_id) else None

    async def unsubscribe(self, name: str) -> CollectionView:
        charter = self._parts.charters.resolve(name)
        await trio.to_thread.run_sync(self._parts.charters.unfollow, charter.id)
        self._parts.syncing.unfollowed(charter.id)
        return await self._one_collection(charter)

    async def sync(self, collection: str | None) -> list[SyncView]:
        await self._parts.syncing.sync_now(self._parts.charters.resolve(collection).id if collection is not None else None)
        return await self.sync_status()

    async def sync_status(self) -> list[SyncView]:
        now_s, now_ms, names = trio.current_time(), self._parts.now_ms(), self._parts.names()
        views = []
        for status, received, refused in self._parts.syncing.status():
            since_s = now_s - status.last_success_s if status.last_success_s is not None else None
            state = status.state
            if state == "waiting":
                state = "in sync" if status.in_sync else "behind" if status.missing else "waiting"
            views.append(
                SyncView(
                    collection=self._parts.charters.name(status.collection),
                    peer_id=status.peer,
                    name=names.get(status.peer, ""),
                    state="failing" if state == "retrying" else state,
                    missing=status.missing,
                    received=received,
                    refused=refused,
                    failures=status.failures,
                    last_success_ms=now_ms - round(since_s * 1000) if since_s is not None else 0,
                    next_try_s=max(0.0, status.next_try_s - now_s) if status.next_try_s is not None else 0.0,
                    reason=status.cause,
                )
            )
        return views
