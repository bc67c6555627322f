"""nexus netcheck: the transport's word on how this node is reached, with names and clocks, and news of it for the others.

Clocks are compared as NTP does (RFC 5905, section 8): half of the round trip is taken off, so that what remains is the difference
of the two clocks, uncertain by as much. A node's records hold only where clocks agree, so a clock that is off is said here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog
import trio

from nexus.core.errors import NexusError
from nexus.core.record import Record, uint
from nexus.network.reachability import Netcheck
from nexus.network.transport import ProtocolSpec, Stream, Transport

log = structlog.get_logger("nexus.netcheck")

CLOCK = ProtocolSpec("/nexus/clock/1", frame_max=64, read_timeout_s=5.0, streams_per_peer_max=2, frames_per_peer_s=2)
CLOCK_TIMEOUT_S = 5.0
CLOCKS_ASKED_MAX = 8
CLOCK_OFF_MS = 30_000
ADDRESSES_EVERY_S = 2.0


@dataclass(frozen=True, slots=True)
class ClockQuestion(Record):
    """`asked_ms`: Unix time of the asker, given back."""

    asked_ms: int = uint(2**53)


@dataclass(frozen=True, slots=True)
class ClockAnswer(Record):
    asked_ms: int = uint(2**53)
    now_ms: int = uint(2**53)


@dataclass(frozen=True, slots=True)
class ClockView:
    """A peer's clock is `ahead_ms` ahead of this one (negative: behind), give or take `uncertain_ms`."""

    peer_id: str
    ahead_ms: int
    uncertain_ms: int


@dataclass(frozen=True, slots=True)
class NetcheckView:
    """`names`: of the peers in it, by peer id. `clock`: "ok", "off" or "unknown"."""

    network: Netcheck
    clock: str
    clocks: tuple[ClockView, ...]
    names: tuple[tuple[str, str], ...]
    advice: tuple[str, ...]


class NetcheckService:
    """`announce`: tell the others what this node says of itself; called when its addresses have changed."""

    def __init__(
        self,
        transport: Transport,
        now_ms: Callable[[], int],
        names: Callable[[], dict[str, str]],
        announce: Callable[[], None],
    ) -> None:
        self._transport = transport
        self._now_ms = now_ms
        self._names = names
        self._announce = announce

    def start(self) -> None:
        self._transport.serve(CLOCK, self._answer)

    async def watch_addresses(self) -> None:
        """A relay that keeps a place for this node, or takes it away, changes where others can dial it."""
        told = self._transport.addresses
        while True:
            await trio.sleep(ADDRESSES_EVERY_S)
            now = self._transport.addresses
            if now != told:
                told = now
                log.info("addresses_changed", addresses=list(now))
                self._announce()

    async def _answer(self, stream: Stream) -> None:
        question = ClockQuestion.from_bytes(await stream.receive())
        await stream.send(ClockAnswer(question.asked_ms, self._now_ms()).to_bytes())

    async def check(self) -> NetcheckView:
        clocks: list[ClockView] = []

        async def ask(peer_id: str) -> None:
            try:
                with trio.fail_after(CLOCK_TIMEOUT_S):
                    clocks.append(await self._clock_of(peer_id))
            except (NexusError, trio.EndOfChannel, trio.TooSlowError) as error:
                log.debug("clock_unknown", peer_id=peer_id, reason=repr(error))

        async with trio.open_nursery() as nursery:
            for peer_id in sorted({connection.peer_id for connection in self._transport.connections()})[:CLOCKS_ASKED_MAX]:
                nursery.start_soon(ask, peer_id)
        network = await self._transport.netcheck()
        clocks.sort(key=lambda view: view.peer_id)
        clock = judge_clock(clocks)
        advice = network.advice
        if clock == "off":
            advice += ("This machine's clock disagrees with most peers: set it, by NTP, or they refuse its records.",)
        known = self._names()
        mentioned = {view.peer_id for view in clocks}
        mentioned.update(one.peer_id for check in network.addresses for one in check.tried)
        mentioned.update(one.peer_id for one in network.observations)
        mentioned.update(one.relay for one in network.relays)
        names = tuple((peer_id, known[peer_id]) for peer_id in sorted(mentioned) if peer_id in known)
        return NetcheckView(network, clock, tuple(clocks), names, advice)

    async def _clock_of(self, peer_id: str) -> ClockView:
        stream = await self._transport.open_stream(peer_id, CLOCK)
        try:
            before_ms = self._now_ms()
            await stream.send(ClockQuestion(max(0, before_ms)).to_bytes())
            answer = ClockAnswer.from_bytes(await stream.receive())
            after_ms = self._now_ms()
        finally:
            with trio.CancelScope(shield=True):
                await stream.reset()
        half = max(0, after_ms - before_ms) // 2
        return ClockView(peer_id, answer.now_ms - (before_ms + half), half)


def judge_clock(clocks: list[ClockView]) -> str:
    """By the median of what peers say, so that one with a wrong clock, or that lies, decides nothing."""
    if not clocks:
        return "unknown"
    ahead = sorted(view.ahead_ms for view in clocks)
    return "off" if abs(ahead[len(ahead) // 2]) > CLOCK_OFF_MS else "ok"
