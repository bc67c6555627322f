"""Gossip subscriptions of one node, shared by both adapters."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from nexus.core.errors import CapacityError
from nexus.network.transport import GOSSIP_BYTES_MAX, Message

QUEUE_MAX = 256


def check_message(data: bytes) -> None:
    if len(data) > GOSSIP_BYTES_MAX:
        raise CapacityError(f"a gossip message has {len(data)} bytes, at most {GOSSIP_BYTES_MAX} are allowed")


class Subscribers:
    """Who on this node listens to which topic."""

    def __init__(self) -> None:
        self._queues: dict[str, list[tuple[trio.MemorySendChannel[Message], trio.MemoryReceiveChannel[Message]]]] = {}

    def deliver(self, topic: str, message: Message) -> None:
        """Hand on a message; a full queue loses its oldest. Never waits, never raises."""
        for sender, receiver in self._queues.get(topic, ()):
            try:
                sender.send_nowait(message)
            except trio.WouldBlock:
                receiver.receive_nowait()
                sender.send_nowait(message)
            except trio.BrokenResourceError:
                continue

    @asynccontextmanager
    async def subscribe(self, topic: str) -> AsyncIterator[trio.MemoryReceiveChannel[Message]]:
        sender, receiver = trio.open_memory_channel[Message](QUEUE_MAX)
        queue = (sender, receiver)
        self._queues.setdefault(topic, []).append(queue)
        try:
            # The reader's end is a clone, so that closing it early leaves `deliver` an end to drop the oldest from.
            with receiver.clone() as reading:
                yield reading
        finally:
            self._queues[topic].remove(queue)
            if not self._queues[topic]:
                del self._queues[topic]
            sender.close()
            receiver.close()
