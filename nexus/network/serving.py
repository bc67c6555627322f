"""What a node serves: the table of protocols, and the one boundary around every handler. Both adapters share it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from nexus.core.errors import MalformedError, NexusError, PeerError, VerificationError
from nexus.network.limits import PeerLimits
from nexus.network.pipe import Direct, PipeStream, pipe
from nexus.network.transport import Handler, ProtocolSpec, Stream

log = logging.getLogger(__name__)

PROTOCOLS_MAX = 256
# Errors that say the peer broke the rules, and not that it merely went away or declined.
BREACHES = frozenset({PeerError.code, MalformedError.code, VerificationError.code})


@asynccontextmanager
async def background_nursery() -> AsyncIterator[trio.Nursery]:
    """A nursery for background tasks that ends with its body. What the body raises comes out as it is, not in a group of one."""
    try:
        async with trio.open_nursery() as nursery:
            try:
                yield nursery
            finally:
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        only: BaseException = group
        while isinstance(only, BaseExceptionGroup) and len(only.exceptions) == 1:
            only = only.exceptions[0]
        raise only from only.__cause__


class Serving:
    """The protocols that this node answers, its limits per peer, and the handlers that run.

    `drop`: called with the id of a peer that broke the rules too often.
    """

    def __init__(self, peer_id: str, nursery: trio.Nursery, drop: Callable[[str], None]) -> None:
        self.peer_id = peer_id
        self.limits = PeerLimits()
        self._nursery = nursery
        self._drop = drop
        # Also told of a peer that is dropped: what else is connected with it ends.
        self.on_drop: list[Callable[[str], None]] = []
        self._table: dict[str, tuple[ProtocolSpec, Handler]] = {}

    def serve(self, protocol: ProtocolSpec, handler: Handler) -> None:
        """Raises ValueError where the protocol is served already."""
        if protocol.id in self._table:
            raise ValueError(f"{protocol.id} is served already")
        if len(self._table) >= PROTOCOLS_MAX:
            raise ValueError("too many protocols")
        self._table[protocol.id] = (protocol, handler)

    def find(self, protocol_id: str) -> tuple[ProtocolSpec, Handler] | None:
        return self._table.get(protocol_id)

    def start(self, stream: Stream, protocol: ProtocolSpec, handler: Handler) -> None:
        """Run `handler` in a task of its own."""
        self._nursery.start_soon(self.run, stream, protocol, handler)

    async def run(self, stream: Stream, protocol: ProtocolSpec, handler: Handler) -> None:
        """Answer one inbound stream. Whatever the handler raises ends this stream and no more."""
        peer_id = stream.peer_id
        if peer_id != self.peer_id and not self.limits.admit(peer_id, protocol):
            log.info("peer %s has %d streams of %s open: one more is reset", peer_id, protocol.streams_per_peer_max, protocol.id)
            await stream.reset()
            self.note_misbehaviour(peer_id)
            return
        done = False
        try:
            with contextlib.suppress(trio.EndOfChannel):  # the peer had no more to say
                await handler(stream)
            await stream.close()
            done = True
        except NexusError as error:
            log.info("stream %s of peer %s ends: %s", protocol.id, peer_id, error)
            if isinstance(error, PeerError) and error.peer == peer_id and error.code in BREACHES:
                self.note_misbehaviour(peer_id)
        except Exception:  # the boundary: no peer and no handler's bug may end the node
            log.exception("the handler of %s failed on a stream of peer %s", protocol.id, peer_id)
        finally:
            if not done:
                with trio.CancelScope(shield=True):
                    await stream.reset()
            if peer_id != self.peer_id:
                self.limits.release(peer_id, protocol)

    def note_misbehaviour(self, peer_id: str) -> None:
        if peer_id != self.peer_id and self.limits.strike(peer_id, trio.current_time()):
            log.warning("peer %s breaks the rules again and again: dropping it", peer_id)
            self._drop(peer_id)
            for told in self.on_drop:
                told(peer_id)

    def open_to_self(self, protocol: ProtocolSpec) -> PipeStream:
        """A stream from this node to itself. Raises PeerError when nothing here answers it."""
        found = self.find(protocol.id)
        if found is None:
            raise not_served(self.peer_id, protocol)
        served, handler = found
        near, far = pipe((self.peer_id, protocol, self.limits, Direct()), (self.peer_id, served, self.limits, Direct()))
        self.start(far, served, handler)
        return near


def not_served(peer_id: str, protocol: ProtocolSpec) -> PeerError:
    return PeerError(
        f"peer {peer_id} does not speak {protocol.id}", "It may run another version, or a role that does not offer it", peer=peer_id
    )
