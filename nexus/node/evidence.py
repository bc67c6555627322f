"""Evidence travels, `/nexus/evidence/1` and the topic `nexus/evidence/1`. Both ends are here.

On contact, and now and then, each side asks the other for the list of offenders that it knows and for the evidence that it lacks;
gossip says only that there is something new. Nobody's word convicts: every node verifies every evidence itself before it believes
it, keeps it or passes it on, one at a time, in a thread, within a budget per peer. A peer that hands out evidence which
convicts nobody is not asked again for a time.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any, Protocol, TypeVar

import structlog
import trio

from nexus.core.errors import (
    CapacityError,
    LocalError,
    MalformedError,
    NexusError,
    NotFoundError,
    PeerError,
    TimedOutError,
    UnreachableError,
    VerificationError,
)
from nexus.core.keys import public_key_of
from nexus.core.record import MessageSet, Record, digest, many, nested, raw, uint
from nexus.network.limits import TokenBucket
from nexus.network.transport import Message, ProtocolSpec, Stream, Transport
from nexus.node.environment import Environment
from nexus.node.standing import Standings
from nexus.proof.evidence import GOSSIP_BYTES_MAX, Evidence, Verdict
from nexus.storage.evidence import EvidenceStore, StoredEvidence

log = structlog.get_logger("nexus.evidence")

T = TypeVar("T")

TOPIC = "nexus/evidence/1"
PAGE_MAX = 512
PAGES_MAX = 256
# Room for the evidence record and the message around its content.
ENVELOPE_BYTES = 1024
EXCHANGE_TIMEOUT_S = 60.0
REQUESTS_MAX = 1024
SERVE_TIMEOUT_S = 600.0
POLL_S = 1.0
PULL_EVERY_S = 300.0
PULL_AGAIN_S = 15.0
PULLS_AT_ONCE = 4
# Who is asked for news may let this node wait: so many at once leave room for those who are due.
NEWS_AT_ONCE = PULLS_AT_ONCE - 1
FETCHES_PER_PULL = 16
PEERS_MAX = 1024
# Of one peer: verifications per second, what it may save up, and what a mebibyte of evidence and a second of verifying it cost of
# that: whoever brings the dearest evidence there is has one processor's twentieth.
CHECKS_PER_S = 0.5
CHECKS_BURST = 32.0
CHECKS_PER_MIB = 2.0
CHECKS_PER_WORK_S = 10.0
# So much evidence that convicts nobody, and the peer is not listened to for a time.
INVALID_MAX = 3
REFUSED_S = 600.0
SERVED_BYTES_PER_S = 1024 * 1024
SERVED_BYTES_BURST = 2 * GOSSIP_BYTES_MAX
# Another evidence against one convicted already, with a lesser id, makes the sets of all nodes the same. No reason to hurry.
REPLACE_EVERY_S = 60.0
WORTHLESS_MAX = 4096
PENDING_MAX = 32
PENDING_BYTES_MAX = 32 * 1024 * 1024
PENDING_AGAIN_S = 60.0
PUBLISH_EVERY_S = 1.0
PUBLISH_MAX = 256
PUBLISH_TIMEOUT_S = 10.0
SAVE_EVERY_S = 30.0
# What may be spent at start on verifying again what was verified before it was kept: others decide how much of it there is.
LOAD_WORK_S = 20.0

EVIDENCE = ProtocolSpec(
    "/nexus/evidence/1",
    frame_max=GOSSIP_BYTES_MAX + ENVELOPE_BYTES,
    first_frame_max=256,
    read_timeout_s=30.0,
    streams_per_peer_max=2,
    bytes_per_peer_s=SERVED_BYTES_PER_S,
)


@dataclass(frozen=True, slots=True)
class Listed(Record):
    """Gossip, and a line of a list: the publisher has this evidence against the node with key `offender`."""

    offender: bytes = raw(32)
    evidence: bytes = digest()


@dataclass(frozen=True, slots=True)
class ListAsk(Record):
    """The list of those whose key is greater than `after` (empty: from the beginning)."""

    after: bytes = raw(0, 32)


@dataclass(frozen=True, slots=True)
class ListPage(Record):
    """Sorted by key. `more`: 1 where the list goes on."""

    entries: tuple[Listed, ...] = many(nested(Listed), PAGE_MAX)
    more: int = uint(1)


@dataclass(frozen=True, slots=True)
class EvidenceAsk(Record):
    evidence: bytes = digest()


@dataclass(frozen=True, slots=True)
class EvidenceFound(Record):
    """`content`: the evidence record; empty where it is not there (any more)."""

    content: bytes = raw(most=GOSSIP_BYTES_MAX)


MESSAGES = MessageSet(ListAsk, ListPage, EvidenceAsk, EvidenceFound)


class Offload(Protocol):
    """Runs a function that takes a while elsewhere than on the trio thread."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]: ...


async def in_thread(work: Callable[[], T], /) -> T:
    return await trio.to_thread.run_sync(work)


@dataclass(slots=True)
class _Peer:
    """What attention a peer gets. `checks_of_known`: of evidence against nodes that are known here. `due_s`: when its list is to be
    asked for; `pulled_s`: when it last was; `judged`: evidence of it that was judged; `invalid`: that convicted nobody."""

    checks: TokenBucket
    checks_of_known: TokenBucket
    served: TokenBucket
    due_s: float = 0.0
    pulled_s: float = -inf
    judged: int = 0
    invalid: int = 0
    refused_until_s: float = 0.0


class EvidenceService:
    """`verify`: raises as `verify_evidence` does; called in a thread. `is_known`: whether a node, by its public key, is one that
    this node may work with. Evidence against such nodes has a budget of its own and goes first: others can make as many cheaters
    of their own as they like, and no number of them must keep back what matters.

    `on_slashed` is called once for every node that is newly convicted, itself excepted, on the trio thread; it must not wait.
    """

    def __init__(
        self,
        transport: Transport,
        own_key: bytes,
        store: EvidenceStore,
        standings: Standings,
        verify: Callable[[Evidence], Verdict],
        environment: Environment,
        offload: Offload = in_thread,
        is_known: Callable[[bytes], bool] = lambda public_key: False,
    ) -> None:
        self._transport = transport
        self._is_known = is_known
        self._own_key = own_key
        self._store = store
        self._standings = standings
        self._verify = verify
        self._now_ms = environment.now_ms
        self._perf_counter = environment.perf_counter
        self._offload = offload
        self.on_slashed: list[Callable[[bytes], None]] = []
        self._peers: OrderedDict[str, _Peer] = OrderedDict()
        self._checking = trio.CapacityLimiter(1)
        self._pulling: set[str] = set()
        self._fetching: set[bytes] = set()
        self._worthless: OrderedDict[bytes, None] = OrderedDict()
        self._pending: OrderedDict[bytes, tuple[Evidence, bytes]] = OrderedDict()
        self._pending_bytes = 0
        self._replaced_s: OrderedDict[bytes, float] = OrderedDict()
        self._summaries: dict[bytes, Verdict] = {}
        self._not_shared: set[bytes] = set()
        self._news: deque[Listed] = deque(maxlen=PUBLISH_MAX)

    # --- what others ask ---------------------------------------------------------------------------------------------------------

    def is_slashed(self, node: bytes) -> bool:
        """Whether evidence against the node with this key is known here."""
        return self._standings.is_slashed(node)

    def verdict(self, evidence_id: bytes) -> Verdict | None:
        """What a kept evidence proves, as it was verified by this process."""
        return self._summaries.get(evidence_id)

    @property
    def against_self(self) -> bytes | None:
        """The id of evidence against this node, or None."""
        return self._standings.slashed.evidence_of(self._own_key)

    @property
    def pending(self) -> list[tuple[Evidence, bytes]]:
        """Evidence that cannot be judged here for want of the model's weights, with its sender's key. Not believed."""
        return list(self._pending.values())

    async def submit(self, evidence: Evidence) -> Verdict:
        """Evidence that this node found itself: verified, kept durably, then told to others. Raises MalformedError,
        VerificationError, NotFoundError where it does not convict here, LocalError and CapacityError where it cannot be kept."""
        verdict = await self._judge(evidence)
        await self._believe(evidence, verdict, b"")
        return verdict

    async def load(self) -> None:
        """Read what is kept and verify it again, as far as there is time. What does not hold any more is not believed, and stays
        where it is."""
        due_s, late = self._perf_counter() + LOAD_WORK_S, 0
        for stored in await self._offload(self._store.listed):
            again = self._perf_counter() < due_s
            late += not again
            try:
                evidence, verdict = await self._recall(stored, again)
            except (PeerError, LocalError) as error:
                log.error("kept_evidence_not_believed", evidence=stored.id.hex()[:16], reason=error.cause, fix=error.fix)
                continue
            if verdict is not None:
                self._summaries[stored.id] = verdict
            if stored.size > GOSSIP_BYTES_MAX:
                self._not_shared.add(stored.id)
            self._convict(evidence, stored.known_ms)
        if late:
            log.warning("kept_evidence_not_repeated", pieces=late, reason=f"it takes longer than {LOAD_WORK_S:.0f} s at start")

    async def _recall(self, stored: StoredEvidence, again: bool) -> tuple[Evidence, Verdict | None]:
        content = await self._offload(lambda: self._store.content(stored.id))
        evidence = Evidence.from_bytes(content or b"")
        if (evidence.id, evidence.accused) != (stored.id, stored.offender):
            raise VerificationError("the file holds another evidence than it says")
        if not again:
            return evidence, None
        try:
            return evidence, await self._judge(evidence)
        except NotFoundError as error:
            # It was verified here with the weights of a model that was removed since.
            log.info("kept_evidence_not_repeated", evidence=stored.id.hex()[:16], reason=error.cause)
            return evidence, None

    # --- running -----------------------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Exchange with others until cancelled. `load` comes first."""
        self._transport.serve(EVIDENCE, self._handle)
        async with self._transport.subscribe(TOPIC) as messages, trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_pulling)
            nursery.start_soon(self._listen, messages)
            nursery.start_soon(self._publish)
            nursery.start_soon(self._try_pending)
            nursery.start_soon(self._keep_saved)
            task_status.started()

    async def _handle(self, stream: Stream) -> None:
        """Answer a peer's questions, a bounded number of them."""
        peer = self._peer(stream.peer_id)
        with _deadline(stream.peer_id, SERVE_TIMEOUT_S):
            for _ in range(REQUESTS_MAX):
                try:
                    message = MESSAGES.unpack(await stream.receive())
                except MalformedError as error:
                    error.peer = stream.peer_id
                    raise
                match message:
                    case ListAsk(after):
                        answer: Record = self._page(after)
                    case EvidenceAsk(evidence_id):
                        answer = EvidenceFound(await self._content(evidence_id))
                    case _:
                        raise MalformedError("an answer where a question is due", peer=stream.peer_id)
                frame = MESSAGES.pack(answer)
                # What a peer is sent costs this node's uplink: it waits for its share.
                await trio.sleep(peer.served.take(len(frame), trio.current_time()))
                await stream.send(frame)

    def _page(self, after: bytes) -> ListPage:
        more = True
        while more:
            found, more = self._standings.slashed.page(after, PAGE_MAX)
            entries = tuple(Listed(*entry) for entry in found if entry[1] not in self._not_shared)
            if entries:
                return ListPage(entries, int(more))
            after = found[-1][0] if found else after  # nothing of this page is passed on, maybe of the next
        return ListPage((), 0)

    async def _content(self, evidence_id: bytes) -> bytes:
        if evidence_id in self._not_shared:
            return b""
        content = await self._offload(lambda: self._store.content(evidence_id)) or b""
        return content if len(content) <= GOSSIP_BYTES_MAX else b""

    async def _keep_pulling(self) -> None:
        """Ask every connected peer for its list: at contact, and again every PULL_EVERY_S."""
        connected: set[str] = set()
        async with trio.open_nursery() as nursery:
            while True:
                now_s = trio.current_time()
                before, connected = connected, {connection.peer_id for connection in self._transport.connections()}
                # Those who waited longest first: else a few that never answer, by the order of their names, would be all there is.
                for peer_id in sorted(connected, key=lambda one: (self._peer(one).pulled_s, one)):
                    peer = self._peer(peer_id)
                    if peer_id not in before:
                        peer.due_s = min(peer.due_s, now_s + PULL_AGAIN_S)
                    if len(self._pulling) < PULLS_AT_ONCE and now_s >= max(peer.due_s, peer.refused_until_s):
                        peer.due_s = now_s + PULL_EVERY_S
                        nursery.start_soon(self._pull, peer_id, None)
                        await trio.lowlevel.checkpoint()
                await trio.sleep(POLL_S)

    async def _listen(self, messages: trio.MemoryReceiveChannel[Message]) -> None:
        async with trio.open_nursery() as nursery:
            async for message in messages:
                try:
                    news = Listed.from_bytes(message.data)
                    public_key_of(message.peer_id)
                except MalformedError:
                    continue
                refused = trio.current_time() < self._peer(message.peer_id).refused_until_s
                if not refused and message.peer_id != self._transport.peer_id and self._wants(news):
                    if len(self._pulling) < NEWS_AT_ONCE:
                        nursery.start_soon(self._pull, message.peer_id, news)
                        await trio.lowlevel.checkpoint()
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

    async def _try_pending(self) -> None:
        """The model that it takes may have come here in the meantime."""
        while True:
            await trio.sleep(PENDING_AGAIN_S)
            for evidence, sender in list(self._pending.values()):
                try:
                    await self._believe(evidence, await self._judge(evidence), sender)
                except (NotFoundError, LocalError):
                    continue
                except (PeerError, CapacityError) as error:
                    log.info("pending_evidence_dropped", evidence=evidence.id.hex()[:16], reason=error.cause)
                self._drop_pending(evidence.id)

    async def _keep_saved(self) -> None:
        while True:
            await trio.sleep(SAVE_EVERY_S)
            try:
                await self._offload(self._standings.save)
            except LocalError as error:
                log.warning("standings_not_saved", reason=error.cause, fix=error.fix)

    # --- pulling -----------------------------------------------------------------------------------------------------------------

    async def _pull(self, peer_id: str, news: Listed | None) -> None:
        """Get what a peer has and this node lacks; only that one evidence where there is `news`. Failures are nobody's error."""
        if peer_id in self._pulling:
            return
        self._pulling.add(peer_id)
        peer = self._peer(peer_id)
        peer.pulled_s, judged = trio.current_time(), peer.judged
        try:
            with _deadline(peer_id, EXCHANGE_TIMEOUT_S):
                await self._exchange(peer_id, news)
        except (MalformedError, VerificationError) as error:
            self._note_invalid(peer_id, error)
        except TimedOutError as error:
            # What came is kept: the next exchange goes on from there. One that says nothing is left alone for a while.
            if peer.judged > judged:
                peer.due_s = trio.current_time() + PULL_AGAIN_S
            else:
                peer.refused_until_s = max(peer.refused_until_s, trio.current_time() + PULL_EVERY_S)
            log.info("evidence_not_pulled", peer_id=peer_id, reason=error.cause)
        except (PeerError, CapacityError) as error:
            log.info("evidence_not_pulled", peer_id=peer_id, reason=error.cause)
        finally:
            self._pulling.discard(peer_id)

    async def _exchange(self, peer_id: str, news: Listed | None) -> None:
        stream = await self._transport.open_stream(peer_id, EVIDENCE)
        try:
            wanted = [news] if news is not None else await self._missing(stream)
            wanted.sort(key=lambda listed: not self._is_known(listed.offender))
            for listed in wanted[:FETCHES_PER_PULL]:
                if not await self._fetch(stream, listed):
                    break
            if len(wanted) > FETCHES_PER_PULL:
                self._peer(peer_id).due_s = trio.current_time() + PULL_AGAIN_S
            await stream.close()
        except trio.EndOfChannel:
            await stream.reset()
            raise UnreachableError(f"peer {peer_id} closed the stream in the middle of an exchange", peer=peer_id) from None
        except BaseException:
            with trio.CancelScope(shield=True):
                await stream.reset()
            raise

    async def _missing(self, stream: Stream) -> list[Listed]:
        """What of the peer's list this node wants, a few more than one exchange fetches."""
        after, wanted = b"", list[Listed]()
        for _ in range(PAGES_MAX):
            await stream.send(MESSAGES.pack(ListAsk(after)))
            page = MESSAGES.unpack(await stream.receive())
            if not isinstance(page, ListPage):
                raise MalformedError("something else than a list where one is due", peer=stream.peer_id)
            for listed in page.entries:
                if listed.offender <= after:
                    raise MalformedError("a list that is not sorted", peer=stream.peer_id)
                after = listed.offender
                if self._wants(listed) and len(wanted) <= FETCHES_PER_PULL:
                    wanted.append(listed)
            if not page.more or not page.entries or len(wanted) > FETCHES_PER_PULL:
                break
        return wanted

    def _wants(self, listed: Listed) -> bool:
        """Whether to fetch an evidence: against somebody not convicted, or now and then one with a lesser id."""
        if listed.evidence in self._worthless or listed.evidence in self._pending or listed.evidence in self._fetching:
            return False
        if not self._standings.slashed.wants(listed.offender, listed.evidence):
            return False
        replaced_s = self._replaced_s.get(listed.offender)
        return replaced_s is None or trio.current_time() - replaced_s >= REPLACE_EVERY_S

    async def _fetch(self, stream: Stream, listed: Listed) -> bool:
        """Fetch and judge one. False: the peer has used up its budget for now. Raises MalformedError, VerificationError for what
        does not convict the one it is listed for."""
        if not self._wants(listed):
            return True
        peer, now_s = self._peer(stream.peer_id), trio.current_time()
        # Looking whether there is something left takes nothing, so that asking again and again makes the debt no deeper.
        budget = peer.checks_of_known if self._is_known(listed.offender) else peer.checks
        if budget.take(0.0, now_s) > 0:
            peer.due_s = now_s + PULL_AGAIN_S
            return False
        budget.take(1.0, now_s)
        self._fetching.add(listed.evidence)
        try:
            await stream.send(MESSAGES.pack(EvidenceAsk(listed.evidence)))
            found = MESSAGES.unpack(await stream.receive())
            if not isinstance(found, EvidenceFound):
                raise MalformedError("something else than evidence where it is due", peer=stream.peer_id)
            budget.take(CHECKS_PER_MIB * len(found.content) / 2**20, trio.current_time())
            if not found.content:
                raise VerificationError("it lists evidence that it does not have", peer=stream.peer_id)
            evidence = Evidence.from_bytes(found.content)
            if (evidence.accused, evidence.id) != (listed.offender, listed.evidence):
                raise VerificationError("it hands out another evidence than it lists", peer=stream.peer_id)
            peer.judged += 1
            await self._judge_of(stream.peer_id, evidence, budget)
        finally:
            self._fetching.discard(listed.evidence)
        return True

    async def _judge_of(self, peer_id: str, evidence: Evidence, budget: TokenBucket) -> None:
        sender = public_key_of(peer_id)
        try:
            verdict = await self._judge(evidence, budget)
        except (MalformedError, VerificationError):
            # Only what was judged is worthless: a peer that has nothing, or something else, must not make others' evidence so.
            self._worthless[evidence.id] = None
            while len(self._worthless) > WORTHLESS_MAX:
                self._worthless.popitem(last=False)
            raise
        except (NotFoundError, LocalError) as error:
            log.info("evidence_pending", evidence=evidence.id.hex()[:16], accused=evidence.peer_id, reason=error.cause)
            self._keep_pending(evidence, sender)
            return
        await self._believe(evidence, verdict, sender)

    # --- judging -----------------------------------------------------------------------------------------------------------------

    async def _judge(self, evidence: Evidence, budget: TokenBucket | None = None) -> Verdict:
        """`budget`: of the peer that pays for the time that it takes."""

        took_s = 0.0

        def verify() -> Verdict:
            nonlocal took_s
            began_s = self._perf_counter()
            try:
                return self._verify(evidence)
            finally:
                took_s = self._perf_counter() - began_s

        async with self._checking:
            try:
                return await self._offload(verify)
            except NexusError:
                raise
            except Exception as error:  # the boundary: evidence is made by strangers, and no bug of ours may end the node
                log.exception("evidence_not_judged", evidence=evidence.id.hex(), kind=evidence.kind)
                raise VerificationError("it cannot be judged for an error in Nexus; please report it") from error
            finally:
                if budget is not None:
                    budget.take(CHECKS_PER_WORK_S * took_s, trio.current_time())

    async def _believe(self, evidence: Evidence, verdict: Verdict, sender: bytes) -> None:
        """Keep verified evidence, durably, then act on it and tell others."""
        content, evidence_id = evidence.to_bytes(), evidence.id
        known_ms = self._standings.known_ms(evidence.accused) or self._now_ms()
        stored = StoredEvidence(evidence.accused, evidence_id, evidence.kind, known_ms, sender, len(content))
        replaces = evidence.accused in self._standings.slashed
        of_stranger = bool(sender) and not self._is_known(evidence.accused)
        try:
            kept = await self._offload(lambda: self._store.put(stored, content, of_stranger=of_stranger))
        except (LocalError, CapacityError) as error:
            # It holds all the same: no work for the convicted, though it will have to be found again after a restart.
            log.error("evidence_not_kept", evidence=evidence_id.hex()[:16], reason=error.cause, fix=error.fix)
            # Who lists what it cannot hand out is taken for a liar.
            self._not_shared.add(evidence_id)
            if not (of_stranger and isinstance(error, CapacityError)):
                self._convict(evidence, known_ms)
            if not sender:
                raise
            return
        if not kept:
            return
        self._summaries[evidence_id] = verdict
        if len(content) > GOSSIP_BYTES_MAX:
            self._not_shared.add(evidence_id)
        else:
            self._not_shared.discard(evidence_id)
            news = Listed(evidence.accused, evidence_id)
            (self._news.appendleft if not sender or self._is_known(evidence.accused) else self._news.append)(news)
        if replaces:
            self._replaced_s[evidence.accused] = trio.current_time()
            while len(self._replaced_s) > PEERS_MAX:
                self._replaced_s.popitem(last=False)
        self._convict(evidence, known_ms)

    def _convict(self, evidence: Evidence, known_ms: int) -> None:
        try:
            fresh = self._standings.convict(evidence.accused, evidence.id, evidence.kind, known_ms)
        except CapacityError as error:
            log.error("conviction_not_noted", accused=evidence.peer_id, reason=error.cause, fix=error.fix)
            return
        if not fresh:
            return
        if evidence.accused == self._own_key:
            log.critical(
                "THIS NODE IS CONVICTED",
                evidence=evidence.id.hex(),
                kind=evidence.kind,
                fix="Other nodes give it no work any more. See `nexus evidence show`; was its data restored from an old backup, or "
                "does it run twice?",
            )
            return
        log.warning("slashed", peer_id=evidence.peer_id, kind=evidence.kind, evidence=evidence.id.hex())
        for act in self.on_slashed:
            act(evidence.accused)

    def _keep_pending(self, evidence: Evidence, sender: bytes) -> None:
        size = len(evidence.body)
        if size > PENDING_BYTES_MAX:
            return
        self._pending[evidence.id] = evidence, sender
        self._pending_bytes += size
        while len(self._pending) > PENDING_MAX or self._pending_bytes > PENDING_BYTES_MAX:
            self._drop_pending(next(iter(self._pending)))

    def _drop_pending(self, evidence_id: bytes) -> None:
        dropped = self._pending.pop(evidence_id, None)
        if dropped is not None:
            self._pending_bytes -= len(dropped[0].body)

    # --- peers -------------------------------------------------------------------------------------------------------------------

    def _note_invalid(self, peer_id: str, error: NexusError) -> None:
        """A peer handed out what convicts nobody: no proof against it, anybody could have made that, but no reason to go on."""
        peer = self._peer(peer_id)
        peer.invalid += 1
        log.warning("invalid_evidence", peer_id=peer_id, reason=error.cause, times=peer.invalid)
        if peer.invalid >= INVALID_MAX:
            peer.invalid = 0
            peer.refused_until_s = trio.current_time() + REFUSED_S
        else:
            peer.due_s = trio.current_time() + PULL_AGAIN_S

    def _peer(self, peer_id: str) -> _Peer:
        peer = self._peers.get(peer_id)
        if peer is None:
            now_s = trio.current_time()
            peer = self._peers[peer_id] = _Peer(
                TokenBucket(CHECKS_PER_S, CHECKS_BURST, now_s),
                TokenBucket(CHECKS_PER_S, CHECKS_BURST, now_s),
                TokenBucket(SERVED_BYTES_PER_S, SERVED_BYTES_BURST, now_s),
            )
            while len(self._peers) > PEERS_MAX:
                self._peers.popitem(last=False)
        self._peers.move_to_end(peer_id)
        return peer


@contextmanager
def _deadline(peer_id: str, timeout_s: float) -> Iterator[None]:
    with trio.move_on_after(timeout_s) as scope:
        yield
    if scope.cancelled_caught:
        raise TimedOutError(f"peer {peer_id} did not finish an exchange of evidence within {timeout_s:g} s")
