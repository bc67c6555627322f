"""Suspension cases travel, `/nexus/suspensions/1` and the topic `nexus/suspensions/1`. Both ends are here.

On contact, and now and then, each side asks the other for the list of cases that it believes, and for those that it lacks; gossip
says only that there is a new one. A case is a few signed statements (`nexus.swarm.standing`): every node counts them itself, by
those whose word counts with it, before it believes the case and passes it on. Of one node one case is kept, until it is over, and
each case is judged and published once at the most.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
import trio

from nexus.core.errors import (
    CapacityError,
    LocalError,
    MalformedError,
    PeerError,
    TimedOutError,
    UnreachableError,
    VerificationError,
)
from nexus.core.keys import peer_id_of
from nexus.core.record import MessageSet, Record, digest, many, nested, raw
from nexus.network.limits import TokenBucket
from nexus.network.transport import Message, ProtocolSpec, Stream, Transport
from nexus.node.evidence import Offload, in_thread
from nexus.node.standing import Standings
from nexus.swarm.standing import Suspension, SuspensionCase

log = structlog.get_logger("nexus.suspensions")

TOPIC = "nexus/suspensions/1"
# Terms, a plan of 256 stages, and 257 statements.
CASE_BYTES_MAX = 96 * 1024
ENVELOPE_BYTES = 1024
CASES_MAX = 256
# Cases judged here already, believed or not.
SEEN_MAX = 4096
EXCHANGE_TIMEOUT_S = 30.0
REQUESTS_MAX = 1 + CASES_MAX
SERVE_TIMEOUT_S = 120.0
POLL_S = 1.0
PULL_EVERY_S = 300.0
PULLS_AT_ONCE = 4
PEERS_MAX = 1024
# Of one peer: cases judged per second, and what it may save up. One that suspends nobody takes all that is left.
CASES_PER_S = 0.1
CASES_BURST = 16.0
PUBLISH_EVERY_S = 1.0
PUBLISH_MAX = 64
PUBLISH_TIMEOUT_S = 10.0

SUSPENSIONS = ProtocolSpec(
    "/nexus/suspensions/1", frame_max=CASE_BYTES_MAX + ENVELOPE_BYTES, first_frame_max=256, streams_per_peer_max=2
)


@dataclass(frozen=True, slots=True)
class ListedCase(Record):
    """Gossip, and a line of a list: the publisher believes this case against the node with key `accused`."""

    accused: bytes = raw(32)
    case: bytes = digest()


@dataclass(frozen=True, slots=True)
class CasesAsk(Record):
    """For the list."""


@dataclass(frozen=True, slots=True)
class Cases(Record):
    entries: tuple[ListedCase, ...] = many(nested(ListedCase), CASES_MAX)


@dataclass(frozen=True, slots=True)
class CaseAsk(Record):
    case: bytes = digest()


@dataclass(frozen=True, slots=True)
class CaseFound(Record):
    """`content`: the SuspensionCase; empty where it is not there (any more)."""

    content: bytes = raw(most=CASE_BYTES_MAX)


MESSAGES = MessageSet(CasesAsk, Cases, CaseAsk, CaseFound)


@dataclass(frozen=True, slots=True)
class _Believed:
    id: bytes
    content: bytes
    until_ms: int


@dataclass(slots=True)
class _Peer:
    """`due_s`: when its list is to be asked for."""

    checks: TokenBucket
    due_s: float = 0.0


class Suspensions:
    """`now_ms`: Unix time. Only the word of nodes in good standing here counts, and this node's own."""

    def __init__(
        self,
        transport: Transport,
        own_key: bytes,
        standings: Standings,
        now_ms: Callable[[], int],
        offload: Offload = in_thread,
    ) -> None:
        self._transport = transport
        self._own_key = own_key
        self._standings = standings
        self._now_ms = now_ms
        self._offload = offload
        self._believed: dict[bytes, _Believed] = {}
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self._peers: OrderedDict[str, _Peer] = OrderedDict()
        self._pulling: set[str] = set()
        self._judging = trio.CapacityLimiter(1)
        self._news: deque[ListedCase] = deque(maxlen=PUBLISH_MAX)

    async def submit(self, case: SuspensionCase) -> Suspension:
        """A case that this node collected: applied here, then told to others. Raises VerificationError, MalformedError where it
        suspends nobody, LocalError, CapacityError where it cannot be kept."""
        return await self._judge(case)

    def cases(self) -> list[ListedCase]:
        """Those believed here that still run, by the key of the accused."""
        now_ms = self._now_ms()
        self._believed = {accused: one for accused, one in self._believed.items() if one.until_ms > now_ms}
        return [ListedCase(accused, one.id) for accused, one in sorted(self._believed.items())]

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Exchange cases until cancelled."""
        self._transport.serve(SUSPENSIONS, self._serve)
        async with self._transport.subscribe(TOPIC) as messages, trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_pulling)
            nursery.start_soon(self._listen, messages)
            nursery.start_soon(self._publish)
            task_status.started()

    # --- what others ask ---------------------------------------------------------------------------------------------------------

    async def _serve(self, stream: Stream) -> None:
        with trio.move_on_after(SERVE_TIMEOUT_S):
            for _ in range(REQUESTS_MAX):
                try:
                    message = MESSAGES.unpack(await stream.receive())
                except trio.EndOfChannel:
                    return
                except MalformedError as error:
                    error.peer = stream.peer_id
                    raise
                match message:
                    case CasesAsk():
                        await stream.send(MESSAGES.pack(Cases(tuple(self.cases()))))
                    case CaseAsk(wanted):
                        listed = (one.content for one in self._believed.values() if one.id == wanted)
                        await stream.send(MESSAGES.pack(CaseFound(next(listed, b""))))
                    case _:
                        raise MalformedError(f"{type(message).__name__} is no request", peer=stream.peer_id)

    # --- what this node asks -----------------------------------------------------------------------------------------------------

    async def _keep_pulling(self) -> None:
        """Ask every connected peer for its list: at contact, and again every PULL_EVERY_S."""
        connected: set[str] = set()
        async with trio.open_nursery() as nursery:
            while True:
                now_s = trio.current_time()
                before, connected = connected, {connection.peer_id for connection in self._transport.connections()}
                for peer_id in sorted(connected):
                    peer = self._peer(peer_id)
                    if peer_id not in before:
                        peer.due_s = min(peer.due_s, now_s)
                    if now_s >= peer.due_s and len(self._pulling) < PULLS_AT_ONCE:
                        peer.due_s = now_s + PULL_EVERY_S
                        self._start_pull(nursery, peer_id, None)
                await trio.sleep(POLL_S)

    async def _listen(self, messages: trio.MemoryReceiveChannel[Message]) -> None:
        async with trio.open_nursery() as nursery:
            async for message in messages:
                try:
                    news = ListedCase.from_bytes(message.data)
                except MalformedError:
                    continue
                if message.peer_id == self._transport.peer_id or not self._wants(news):
                    continue
                if len(self._pulling) < PULLS_AT_ONCE:
                    self._start_pull(nursery, message.peer_id, news)
                else:
                    self._peer(message.peer_id).due_s = 0.0

    async def _publish(self) -> None:
        while True:
            await trio.sleep(PUBLISH_EVERY_S)
            if self._news and self._transport.connections():
                news = self._news.popleft()
                try:
                    with trio.move_on_after(PUBLISH_TIMEOUT_S):
                        await self._transport.publish(TOPIC, news.to_bytes())
                except (PeerError, TimedOutError, CapacityError) as error:
                    log.info("gossip_failed", reason=error.cause)

    def _start_pull(self, nursery: trio.Nursery, peer_id: str, news: ListedCase | None) -> None:
        if peer_id not in self._pulling:
            self._pulling.add(peer_id)
            nursery.start_soon(self._pull, peer_id, news)

    async def _pull(self, peer_id: str, news: ListedCase | None) -> None:
        """Get what a peer believes and this node has not judged yet; only that one where there is `news`."""
        try:
            with trio.move_on_after(EXCHANGE_TIMEOUT_S):
                await self._exchange(peer_id, news)
        except (MalformedError, VerificationError) as error:
            log.info("suspension_not_believed", peer_id=peer_id, reason=error.cause)
        except (PeerError, TimedOutError, CapacityError, LocalError) as error:
            log.info("suspensions_not_pulled", peer_id=peer_id, reason=error.cause)
        finally:
            self._pulling.discard(peer_id)

    async def _exchange(self, peer_id: str, news: ListedCase | None) -> None:
        stream = await self._transport.open_stream(peer_id, SUSPENSIONS)
        try:
            for listed in [news] if news else await self._list(stream):
                if not self._wants(listed):
                    continue
                checks, now_s = self._peer(peer_id).checks, trio.current_time()
                if checks.take(0.0, now_s) > 0:
                    break
                checks.take(1.0, now_s)
                await self._fetch(stream, listed)
            await stream.close()
        except trio.EndOfChannel:
            await stream.reset()
            raise UnreachableError("it closed the stream in the middle of an exchange", peer=peer_id) from None
        except BaseException:
            with trio.CancelScope(shield=True):
                await stream.reset()
            raise

    async def _list(self, stream: Stream) -> tuple[ListedCase, ...]:
        await stream.send(MESSAGES.pack(CasesAsk()))
        listed = MESSAGES.unpack(await stream.receive())
        if not isinstance(listed, Cases):
            raise MalformedError("something else than a list where one is due", peer=stream.peer_id)
        return listed.entries

    async def _fetch(self, stream: Stream, listed: ListedCase) -> None:
        """Raises MalformedError, VerificationError for what does not suspend the one that it is listed for."""
        await stream.send(MESSAGES.pack(CaseAsk(listed.case)))
        found = MESSAGES.unpack(await stream.receive())
        if not isinstance(found, CaseFound):
            raise MalformedError("something else than a case where it is due", peer=stream.peer_id)
        if not found.content:
            return  # it is over by now
        try:
            case = SuspensionCase.from_bytes(found.content)
            if case.id != listed.case or not case.statements or case.statements[0].statement.accused != listed.accused:
                raise VerificationError("it hands out another case than it lists", peer=stream.peer_id)
            await self._judge(case)
        except (MalformedError, VerificationError):
            # Maybe nothing is wrong with it: standing is for each node to judge. But others have their turn now.
            self._note_seen(listed.case)
            self._peer(stream.peer_id).checks.take(CASES_BURST, trio.current_time())
            raise

    # --- judging -----------------------------------------------------------------------------------------------------------------

    def _wants(self, listed: ListedCase) -> bool:
        return listed.case not in self._seen and self._standings.suspension_of(listed.accused) is None

    async def _judge(self, case: SuspensionCase) -> Suspension:
        content, case_id = case.to_bytes(), case.id
        async with self._judging:
            suspension = await self._offload(lambda: self._standings.suspend(case, {self._own_key}))
        fresh = case_id not in self._seen
        self._note_seen(case_id)
        self.cases()  # lets go of those that are over
        if fresh and suspension.node not in self._believed and len(self._believed) < CASES_MAX and len(content) <= CASE_BYTES_MAX:
            self._believed[suspension.node] = _Believed(case_id, content, suspension.until_ms)
            self._news.append(ListedCase(suspension.node, case_id))
        if fresh:
            tell = log.critical if suspension.node == self._own_key else log.warning
            session = suspension.session.hex()[:16]
            tell("suspended", peer_id=peer_id_of(suspension.node), cause=suspension.cause, session=session)
        return suspension

    def _note_seen(self, case_id: bytes) -> None:
        self._seen[case_id] = None
        while len(self._seen) > SEEN_MAX:
            self._seen.popitem(last=False)

    def _peer(self, peer_id: str) -> _Peer:
        peer = self._peers.get(peer_id)
        if peer is None:
            peer = self._peers[peer_id] = _Peer(TokenBucket(CASES_PER_S, CASES_BURST, trio.current_time()))
            while len(self._peers) > PEERS_MAX:
                self._peers.popitem(last=False)
        self._peers.move_to_end(peer_id)
        return peer
