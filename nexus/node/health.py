"""Heartbeats to the nodes that matter, so that plans count on none that has stopped (`nexus.swarm.health` decides).

A heartbeat is a ping of the transport with a deadline, in a task of its own: a peer that takes its time holds up nobody. Only
connected nodes get any; who dials a node that is not, finds out for himself, and says so here (`heard`, `unreachable`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

import structlog
import trio

from nexus.core.errors import NexusError, UnreachableError
from nexus.core.keys import peer_id_of
from nexus.network.transport import Transport
from nexus.swarm.health import DEADLINE_S, HEARTBEAT_S, MISSES_MAX, HealthTable, Vitals, is_usable
from nexus.swarm.links import Coordinate, Links

log = structlog.get_logger("nexus.health")

HEARTBEATS_AT_ONCE = 32
# However little there is to do, somebody may have connected.
LOOK_EVERY_S = 5.0
CHECKED_MAX = 64


class Health:
    """`watched`: connected nodes of this swarm, by public key. `needed`: nodes that something depends on now. `coordinate`: what a
    node says of its place, None where it said nothing. `links` learns every round trip. Whoever is in `on_unwell` is told, by
    public key, of each node that plans can no longer count on, and whoever is in `on_change` of any change."""

    def __init__(
        self,
        transport: Transport,
        links: Links,
        watched: Callable[[], Collection[bytes]],
        needed: Callable[[], Collection[bytes]],
        coordinate: Callable[[bytes], Coordinate | None],
    ) -> None:
        self._transport = transport
        self._links = links
        self._watched = watched
        self._needed = needed
        self._coordinate = coordinate
        self._table = HealthTable()
        self._in_flight: dict[bytes, trio.Event] = {}
        self.on_unwell: list[Callable[[bytes], None]] = []
        self.on_change: list[Callable[[], None]] = []

    def state(self, node: bytes) -> str:
        """By public key, one of `nexus.swarm.health.STATES`."""
        return self._table.state(node)

    def vitals(self, node: bytes) -> Vitals:
        return self._table.get(node)

    def is_usable(self, node: bytes) -> bool:
        """Whether plans may count on it."""
        return is_usable(self._table.state(node))

    def stuck(self) -> frozenset[bytes]:
        """Nodes that are connected and do not answer."""
        return self._table.stuck()

    def heard(self, node: bytes) -> None:
        """It answered something else than a heartbeat, first-hand."""
        self._noted(node, self._table.heard(node, trio.current_time()))

    def unreachable(self, node: bytes) -> None:
        """Nobody answers where it was."""
        self._noted(node, self._table.unreachable(node, trio.current_time()))

    def forget(self, node: bytes) -> None:
        """It left in order, or is no member any more."""
        self._table.forget(node)
        self._links.forget(node)

    async def check(self, nodes: Iterable[bytes]) -> frozenset[bytes]:
        """Those of `nodes` that do not answer now. Whoever answered in the last seconds is not asked again, so it costs nothing
        most of the time, and two deadlines at most."""
        nodes = list(nodes)[:CHECKED_MAX]
        async with trio.open_nursery() as nursery:
            for node in self._table.stale(nodes, trio.current_time()):
                if node in self._in_flight:
                    nursery.start_soon(self._in_flight[node].wait)
                else:
                    self._start(nursery, node)
        return frozenset(node for node in nodes if not self.is_usable(node))

    async def run(self) -> None:
        """Send heartbeats until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                watched, needed = self._watched(), self._needed()
                now_s = trio.current_time()
                for node in self._table.due(watched, needed, now_s):
                    if len(self._in_flight) >= HEARTBEATS_AT_ONCE:
                        break
                    if node not in self._in_flight:
                        self._start(nursery, node)
                # Those that are due at about the same time are asked at the same time: an idle node wakes seldom.
                pause_s = min(self._table.next_due_s(watched, needed) - now_s, LOOK_EVERY_S)
                await trio.sleep(max(HEARTBEAT_S / 2, pause_s))

    def _start(self, nursery: trio.Nursery, node: bytes) -> None:
        self._in_flight[node] = trio.Event()
        nursery.start_soon(self._beat, node)

    async def _beat(self, node: bytes) -> None:
        """Ask; who misses a deadline is asked again at once, so that one is not taken for stuck, nor a stuck one for alive."""
        try:
            for _ in range(MISSES_MAX):
                await self._ask_once(node)
                if not self._table.get(node).misses or not self.is_usable(node):
                    break
        finally:
            self._in_flight.pop(node).set()

    async def _ask_once(self, node: bytes) -> None:
        peer_id = peer_id_of(node)
        self._table.asked(node, trio.current_time())
        with trio.move_on_after(DEADLINE_S) as scope:
            try:
                rtt_us = round(await self._transport.ping(peer_id) * 1e6)
            except UnreachableError as error:
                log.debug("heartbeat_failed", peer_id=peer_id, reason=error.cause)
                self.unreachable(node)
                return
            except NexusError as error:
                log.debug("heartbeat_failed", peer_id=peer_id, reason=error.cause)
                self._noted(node, self._table.missed(node, trio.current_time()))
                return
        now_s = trio.current_time()
        if scope.cancelled_caught:
            self._noted(node, self._table.missed(node, now_s))
        else:
            self._links.measured(node, rtt_us, self._coordinate(node))
            self._noted(node, self._table.answered(node, rtt_us, now_s))

    def _noted(self, node: bytes, changed: bool) -> None:
        if not changed:
            return
        state = self._table.state(node)
        log.debug("health", peer_id=peer_id_of(node), state=state)
        if not is_usable(state):
            log.warning("node_unwell", peer_id=peer_id_of(node), state=state)
            for tell in self.on_unwell:
                tell(node)
        for note in self.on_change:
            note()
