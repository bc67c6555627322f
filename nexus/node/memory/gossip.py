"""News of collections over gossip, a topic for each: who has new blocks, by their ids, and never the blocks.

Of private collections there is no news: it would tell everybody when something is written there. Their members compare instead.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import structlog
import trio

from nexus.core.errors import MalformedError, NexusError
from nexus.core.keys import public_key_of
from nexus.memory import collection as rules
from nexus.memory.item_set import Item
from nexus.memory.sync_messages import News, told_items
from nexus.network.transport import Message, Transport
from nexus.node.memory.charters import Charters

log = structlog.get_logger("nexus.memory.gossip")

POLL_S = 1.0
# What failed for this node's own reasons is tried again after so long.
AGAIN_S = 15.0
PUBLISH_PACE_S = 0.25
PUBLISH_TIMEOUT_S = 10.0
PENDING_MAX = 4096

Hear = Callable[[str, bytes, Sequence[Item], int], None]


class Gossip:
    """`prepare`: called before a collection is listened to. `hear`: peer, collection, the items that it has, and how many more."""

    def __init__(self, transport: Transport, charters: Charters, prepare: Callable[[bytes], Awaitable[object]], hear: Hear) -> None:
        self._transport = transport
        self._charters = charters
        self._prepare = prepare
        self._hear = hear
        self._pending: dict[bytes, list[Item]] = {}
        self._wake = trio.Event()

    def tell(self, collection: bytes, items: Sequence[Item]) -> None:
        """This node has new items, soon to be published."""
        pending = self._pending.setdefault(collection, [])
        pending.extend(items)
        del pending[:-PENDING_MAX]
        self.wake_up()

    def forget(self, collection: bytes) -> None:
        self._pending.pop(collection, None)
        self.wake_up()

    def wake_up(self) -> None:
        """What is followed has changed, or there is news."""
        self._wake.set()
        self._wake = trio.Event()

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Publish and listen until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_publishing)
            nursery.start_soon(self._keep_listening)
            task_status.started()

    async def _keep_publishing(self) -> None:
        while True:
            for collection in sorted(self._pending):
                items = self._pending.pop(collection, [])
                if items and self._is_public(collection) and self._transport.connections():
                    await self._publish(News.of(collection, items))
                    await trio.sleep(PUBLISH_PACE_S)
            wake = self._wake
            with trio.move_on_after(POLL_S):
                if not self._pending:
                    await wake.wait()

    async def _publish(self, news: News) -> None:
        try:
            with trio.move_on_after(PUBLISH_TIMEOUT_S):
                await self._transport.publish(_topic(news.collection), news.to_bytes())
        except NexusError as error:
            log.info("gossip_failed", reason=error.cause)

    async def _keep_listening(self) -> None:
        """A task for each public collection that is followed."""
        listening: dict[bytes, trio.CancelScope] = {}
        async with trio.open_nursery() as nursery:
            while True:
                wanted = {collection for collection in self._charters.followed() if self._is_public(collection)}
                for gone in listening.keys() - wanted:
                    listening.pop(gone).cancel()
                for new in sorted(wanted - listening.keys()):
                    listening[new] = trio.CancelScope()
                    nursery.start_soon(self._listen, new, listening[new])
                wake = self._wake
                with trio.move_on_after(POLL_S):
                    await wake.wait()

    async def _listen(self, collection: bytes, scope: trio.CancelScope) -> None:
        with scope:
            while True:
                try:
                    await self._prepare(collection)
                    break
                except NexusError as error:
                    log.error("set_not_read", collection=collection.hex()[:16], reason=error.cause, fix=error.fix)
                    await trio.sleep(AGAIN_S)
            async with self._transport.subscribe(_topic(collection)) as messages:
                async for message in messages:
                    self._take(collection, message)

    def _take(self, collection: bytes, message: Message) -> None:
        with suppress(MalformedError):
            news = News.from_bytes(message.data)
            public_key_of(message.peer_id)
            if news.collection == collection and message.peer_id != self._transport.peer_id:
                self._hear(message.peer_id, collection, told_items(news.items), news.more)

    def _is_public(self, collection: bytes) -> bool:
        charter = self._charters.find(collection)
        return charter is not None and charter.mode != rules.PRIVATE


def _topic(collection: bytes) -> str:
    return f"nexus/memory/1/{collection.hex()}"
