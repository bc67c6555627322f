"""A collection is brought up to date from a peer: both ends as state machines without I/O.

One side opens a session and learns by reconciliation what it lacks and what the peer lacks. It pulls what it lacks in bounded
requests, and *tells* the peer the rest: nobody is ever sent a block that it did not ask for, and everything received is verified
once, by whoever asked, before it is stored. Every request has one answer, so either end holds at most one message.

`SyncSession` asks: send what `generate` gives, hand what comes to `receive`; where that gives a `Check`, verify and store the
batches and say so by `checked`. Errors it raises are the peer's fault; pass them, and those of the stream, to `fail`. At the end
`outcome` is for `nexus.memory.sync_schedule`. `SyncResponder` answers, one per stream.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

from nexus.core.errors import MalformedError, NexusError, RefusedError, TimedOutError, VerificationError
from nexus.core.record import Record
from nexus.memory.item_set import Item, View
from nexus.memory.reconcile import NEED_MAX, ROUNDS_MAX, Found, Reconciliation, answer
from nexus.memory.sync_messages import (
    BATCHES_BYTES_MAX,
    TELL_MAX,
    WANT_MAX,
    Batches,
    Open,
    Query,
    Refuse,
    Reply,
    Tell,
    Told,
    Want,
    told_items,
)

# A peer may have dropped blocks of which it knows the ids. One that names so many, and has hardly any, is left for this time.
ABSENT_MAX = 1024
ABSENT_PER_ACCEPTED = 3
EXCHANGE_TIMEOUT_S = 30.0
# After so long, or so many requests, a session asks for no more blocks; what is left is for the next. The responder bears with
# more.
PULL_S = 600.0
SESSION_TIMEOUT_S = 900.0
PULL_REQUESTS_MAX = 1024
REQUESTS_MAX = PULL_REQUESTS_MAX + ROUNDS_MAX + 2


class Check(NamedTuple):
    """Verify these batches and store their blocks; blocks with other ids than `wanted` are to be refused. Then call `checked`."""

    batches: tuple[bytes, ...]
    wanted: frozenset[bytes]


class Checked(NamedTuple):
    """`accepted`: verified and stored, durably, with the times in the blocks. `declined`: ids that this node does not take for
    reasons of its own (quota, a clock that is behind): nobody's fault. `refused`: how many batches failed verification or held what
    was not wanted, and why."""

    accepted: Sequence[Item] = ()
    declined: Sequence[bytes] = ()
    refused: int = 0
    cause: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a session came to. `offence`: it ended by a peer that broke the protocol or sent bad blocks. `complete`: both sets were
    compared to the end, and everything lacking was asked for. `needed` ids were lacking here; of these `accepted` came, `skipped`
    were no longer wanted when their turn came, `absent` were not at the peer. `have`: what the peer lacks. `peer_size`: ids that it
    knows."""

    ok: bool
    offence: bool
    cause: str
    complete: bool
    needed: int
    accepted: int
    declined: int
    skipped: int
    absent: tuple[bytes, ...]
    have: int
    peer_size: int

    @classmethod
    def not_begun(cls, cause: str) -> Outcome:
        """Of a session that did not come about, by nobody's fault: the schedule wants to hear of it as well."""
        return cls(False, False, cause, False, 0, 0, 0, 0, (), 0, 0)


class Phase(Enum):
    RECONCILE = "reconcile"
    PULL = "pull"
    TELL = "tell"
    DONE = "done"
    FAILED = "failed"


@dataclass(slots=True)
class SyncSession:
    """The side that asks. With a `view` it reconciles first; without, it only pulls `items`, of which it heard.

    `wanted`: of some items, those that are wanted now: unknown here and not under way from another peer. `want_max`: ids per
    request.
    """

    collection: bytes
    wanted: Callable[[Sequence[Item]], Sequence[Item]]
    started_s: float
    view: View | None = None
    items: Sequence[Item] = ()
    want_max: int = WANT_MAX
    need_max: int = NEED_MAX
    phase: Phase = Phase.RECONCILE
    requests: int = 0
    _reconciliation: Reconciliation | None = None
    _pull: deque[Item] = field(default_factory=deque)
    _asked: dict[bytes, Item] = field(default_factory=dict)
    _have: list[Item] = field(default_factory=list)
    _told: bool = False
    _waits_for: type[Record] | None = None
    _checking: bool = False
    _deadline_s: float = 0.0
    _error: NexusError | None = None
    _needed: int = 0
    _accepted: int = 0
    _declined: int = 0
    _skipped: int = 0
    _absent: list[bytes] = field(default_factory=list)
    _stopped: bool = False
    _peer_size: int = 0

    def __post_init__(self) -> None:
        if self.view is not None:
            self._reconciliation = Reconciliation(self.view, need_max=self.need_max)
        else:
            self.phase = Phase.PULL
            self._pull.extend(self.items)
            self._needed = len(self.items)

    @property
    def ended(self) -> bool:
        return self.phase in (Phase.DONE, Phase.FAILED)

    @property
    def deadline_s(self) -> float:
        """When the answer that is due, and the whole session, time out."""
        end_s = self.started_s + SESSION_TIMEOUT_S
        return min(self._deadline_s, end_s) if self._waits_for is not None else end_s

    def generate(self, now_s: float) -> Record | None:
        """The next request; None while an answer or a check is under way, and at the end. Raises TimedOutError."""
        if not self.ended and now_s > self.deadline_s:
            raise TimedOutError("a peer took too long to synchronise")
        if self.ended or self._waits_for is not None or self._checking:
            return None
        request = self._query() or self._want(now_s) or self._tell()
        if request is None:
            self.phase = Phase.DONE
            return None
        self._deadline_s = now_s + EXCHANGE_TIMEOUT_S
        self.requests += 1
        return request

    def receive(self, message: Record, now_s: float) -> Check | None:
        """Take the answer. Raises MalformedError, VerificationError, RefusedError, TimedOutError: call `fail` with it."""
        if self._waits_for is None:
            raise MalformedError("an answer to nothing")
        if now_s > self.deadline_s:
            raise TimedOutError("a peer took too long to synchronise")
        if isinstance(message, Refuse):
            raise RefusedError(f"the peer does not synchronise this collection: {message.cause}")
        if type(message) is not self._waits_for:
            raise MalformedError(f"a {type(message).__name__} where a {self._waits_for.__name__} belongs")
        self._waits_for = None
        if isinstance(message, Reply):
            self._take_reply(message)
        elif isinstance(message, Batches):
            return self._take_batches(message)
        return None

    def checked(self, result: Checked) -> None:
        """How the last `Check` came out. Raises VerificationError."""
        if not self._checking:
            raise ValueError("there is nothing to check")
        self._checking = False
        wrong = result.cause if result.refused else ""
        for item in result.accepted:
            asked = self._asked.pop(item.id, None)
            if asked is None:
                wrong = wrong or "a block came that was not asked for"
                continue
            self._accepted += 1
            if asked.t_ms != item.t_ms:
                wrong = wrong or "a block has another time than the peer said"
        declined = [self._asked.pop(id_) for id_ in result.declined if id_ in self._asked]
        self._declined += len(declined)
        if wrong or result.refused:
            raise VerificationError(f"a peer sent bad blocks: {wrong or 'they do not verify'}")
        if not result.accepted and not declined:
            raise VerificationError("a peer sent batches without a block that was asked for")
        self._ask_again()

    def fail(self, error: NexusError) -> None:
        """The session is over: the peer broke the rules, the stream broke, or this node cannot go on."""
        if not self.ended:
            self.phase = Phase.FAILED
            self._error = error

    def outcome(self) -> Outcome:
        compared = self._reconciliation is not None and self.phase is Phase.DONE and not self._reconciliation.exhausted
        return Outcome(
            ok=self.phase is Phase.DONE,
            offence=isinstance(self._error, MalformedError | VerificationError),
            cause=self._error.cause if self._error else "",
            complete=compared and not self._stopped,
            needed=self._needed,
            accepted=self._accepted,
            declined=self._declined,
            skipped=self._skipped,
            absent=tuple(self._absent),
            have=len(self._have),
            peer_size=self._peer_size,
        )

    def _query(self) -> Record | None:
        if self.phase is not Phase.RECONCILE or self._reconciliation is None or self.view is None:
            return None
        opening = self._reconciliation.rounds == 0
        query = self._reconciliation.query()
        if query is None:
            self.phase = Phase.PULL
            return None
        self._waits_for = Reply
        return Open(self.collection, self.view.salt, len(self.view), query) if opening else Query(query)

    def _take_reply(self, message: Reply) -> None:
        assert self._reconciliation is not None
        found: Found = self._reconciliation.take(message.reply)
        self._peer_size = message.size
        self._needed += len(found.need)
        self._pull.extend(found.need)
        self._have.extend(found.have)

    def _want(self, now_s: float) -> Record | None:
        if self.phase is not Phase.PULL:
            return None
        withheld = len(self._absent) >= ABSENT_MAX and len(self._absent) > ABSENT_PER_ACCEPTED * self._accepted
        long = self.requests >= PULL_REQUESTS_MAX or now_s - self.started_s > PULL_S
        self._stopped = bool(self._pull) and (withheld or long)
        while self._pull and not self._stopped:
            turn = [self._pull.popleft() for _ in range(min(self.want_max, len(self._pull)))]
            wanted = self.wanted(turn)
            self._skipped += len(turn) - len(wanted)
            if wanted:
                self._asked = {item.id: item for item in wanted}
                self._waits_for = Batches
                return Want(self.collection, tuple(self._asked))
        self.phase = Phase.TELL
        return None

    def _take_batches(self, message: Batches) -> Check | None:
        for id_ in message.missing:
            if self._asked.pop(id_, None) is None:
                raise VerificationError("a peer lacks a block that it was not asked for")
            self._absent.append(id_)
        if message.batches:
            if not self._asked:
                raise VerificationError("a peer sent batches although it lacks all that was asked for")
            self._checking = True
            return Check(message.batches, frozenset(self._asked))
        if not message.missing:
            raise VerificationError("a peer answers a request with nothing")
        self._ask_again()
        return None

    def _ask_again(self) -> None:
        self._pull.extendleft(reversed(self._asked.values()))
        self._asked = {}

    def _tell(self) -> Record | None:
        if not self._have or self._told:
            return None
        self._told = True
        self._waits_for = Told
        return Tell.of(self.collection, self._have)


class Served(Protocol):
    """What a node lets a peer see. `view`: its ids of the collection under the salt; None where the peer has no business there."""

    def view(self, collection: bytes, salt: bytes, /) -> View | None: ...

    def serves(self, collection: bytes, /) -> bool: ...


class Load(NamedTuple):
    """Get these blocks from the store, in batches of nothing else, and call `loaded`."""

    collection: bytes
    ids: tuple[bytes, ...]


class Heard(NamedTuple):
    """The peer says that this node lacks these, and in all `total`: for the schedule. Then send `Told()`."""

    collection: bytes
    items: tuple[Item, ...]
    total: int

    @property
    def more(self) -> int:
        return self.total - len(self.items)


class Loaded(NamedTuple):
    """A batch out of the store and the ids of its blocks."""

    batch: bytes
    ids: tuple[bytes, ...]


NOT_SERVED = Refuse("not subscribed here, or not for you")


@dataclass(slots=True)
class SyncResponder:
    """The side that answers, for one stream. `receive` gives a message to send, or what has to be done first."""

    served: Served
    requests: int = 0
    _view: View | None = None
    _wanted: tuple[bytes, ...] = ()

    def receive(self, message: Record) -> Record | Load | Heard:
        """Raises MalformedError: drop the stream. Takes about 20 ms for an Open of 100,000 ids: run it in a thread."""
        self.requests += 1
        if self.requests > REQUESTS_MAX:
            raise MalformedError("a stream has too many requests")
        if isinstance(message, Open):
            if self._view is not None:
                raise MalformedError("a session is opened twice")
            self._view = self.served.view(message.collection, message.salt)
            if self._view is None:
                return NOT_SERVED
            return Reply(len(self._view), answer(self._view, message.query))
        if isinstance(message, Query):
            if self._view is None:
                raise MalformedError("a query before its session was opened")
            return Reply(len(self._view), answer(self._view, message.query))
        if isinstance(message, Want):
            if not message.ids or len(set(message.ids)) != len(message.ids):
                raise MalformedError("a request for nothing, or twice for the same")
            if not self.served.serves(message.collection):
                return NOT_SERVED
            self._wanted = message.ids
            return Load(message.collection, message.ids)
        if isinstance(message, Tell):
            items = told_items(message.items)
            if message.total == 0 or len(items) != (message.total if message.total <= TELL_MAX else 0):
                raise MalformedError("a message that tells nothing, or not all")
            if not self.served.serves(message.collection):
                return NOT_SERVED
            return Heard(message.collection, tuple(items), message.total)
        raise MalformedError(f"a {type(message).__name__} is no request")

    def loaded(self, found: Sequence[Loaded]) -> Batches:
        """The answer to the last Want: as many of the batches as fit. A batch too large for any message counts as not there."""
        sent: list[bytes] = []
        there = set[bytes]()
        room = BATCHES_BYTES_MAX
        for batch, ids in found:
            if len(batch) > BATCHES_BYTES_MAX:
                continue
            there.update(ids)
            if len(batch) <= room and len(sent) < WANT_MAX:
                sent.append(batch)
                room -= len(batch)
        return Batches(tuple(sent), tuple(id_ for id_ in self._wanted if id_ not in there))
