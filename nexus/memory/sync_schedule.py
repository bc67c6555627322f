"""With whom to synchronise what, and when. Pure: times are seconds of any steady clock, handed in, and jitter comes from a seed.

A pair is a peer and a collection. After a change pairs are synchronised soon, and in ever longer intervals while nothing changes;
after a failure they wait, twice as long each time. A few run at once, the longest due first, so none starves. News starts a pull
from whoever has it. A peer that breaks the protocol or sends bad blocks is demoted: its turn comes later and it is asked for little
at once; then dropped for a time. Everything that peers can make grow is bounded.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

from nexus.core.hashing import tagged_hash
from nexus.memory.item_set import Item
from nexus.memory.sync import Outcome
from nexus.memory.sync_conduct import Conduct, Standing
from nexus.memory.sync_messages import WANT_MAX

AT_ONCE = 4
AT_ONCE_PER_COLLECTION = 2
PAIRS_MAX = 4096
PEERS_MAX = 1024
INTERVAL_MIN_S = 5.0
INTERVAL_MAX_S = 300.0
# So many peers are looked at soon after a change here. The others keep to their time: news reaches them anyway.
CHANGE_FANOUT = 3
RETRY_MIN_S = 2.0
RETRY_MAX_S = 600.0
# Whoever publishes is not asked by all subscribers at the same moment, and no pair runs more often than this.
NEWS_SPREAD_S = 0.5
GAP_S = 1.0
# So long a block is left to the peer that was asked for it.
CLAIM_S = 60.0
HINTS_MAX = 1024
ABSENT_MAX = 4096
ABSENT_AGAIN_S = 3600.0
# Of a peer whose news so often led to nothing, news is not listened to until a session with it brings something.
BARREN_MAX = 3
# A demoted peer's turn comes so much later, and it is asked for so few blocks at once.
DEMOTED_DELAY_S = 60.0
DEMOTED_WANT_MAX = 16


class Start(NamedTuple):
    """Run a session. `items`: to be pulled, without reconciliation; empty: reconcile. `want_max`: ids per request."""

    peer: str
    collection: bytes
    items: tuple[Item, ...]
    want_max: int


@dataclass(frozen=True, slots=True)
class SyncStatus:
    """Of one peer and collection. `state`: syncing, waiting (for its time), retrying (after failures), demoted, dropped or offline.
    `missing`: ids that the peer knows and this node could not get, as of the last success; `behind`: what the peer lacked then."""

    peer: str
    collection: bytes
    state: str
    in_sync: bool
    missing: int
    behind: int
    failures: int
    cause: str
    last_success_s: float | None
    next_try_s: float | None
    peer_size: int


@dataclass(slots=True)
class _Pair:
    due_s: float
    interval_s: float = INTERVAL_MIN_S
    online: bool = True
    running: Start | None = None
    turns: int = 0
    failures: int = 0
    barren: int = 0
    cause: str = ""
    ended_s: float | None = None
    last_success_s: float | None = None
    in_sync: bool = False
    missing: int = 0
    behind: int = 0
    peer_size: int = 0
    # Of what the peer says it has, to be pulled at `news_s`.
    news_s: float = inf
    hints: OrderedDict[bytes, Item] = field(default_factory=OrderedDict)
    # Ids that it had no block for, and until when they are not asked for again.
    absent: OrderedDict[bytes, float] = field(default_factory=OrderedDict)
    claims: set[bytes] = field(default_factory=set)
    # In the running session: items that are lacking here and were not asked for, and how many of them another pair was at.
    passed: int = 0
    deferred: int = 0


_Key = tuple[str, bytes]


class SyncSchedule:
    """`seed`: of the jitter."""

    def __init__(self, seed: bytes, at_once: int = AT_ONCE) -> None:
        self._seed = seed
        self._at_once = at_once
        self._pairs: dict[_Key, _Pair] = {}
        self._conducts: OrderedDict[str, Conduct] = OrderedDict()
        # Which peer a block is under way from, and until when others leave it to that one.
        self._claimed: dict[bytes, dict[bytes, tuple[str, float]]] = {}
        # From when on news from those who are no peers here counts again, per collection.
        self._strangers_s: dict[bytes, float] = {}

    def add(self, peer: str, collection: bytes, now_s: float) -> bool:
        """The peer is there and has the collection. False: too many pairs already."""
        pair = self._pairs.get((peer, collection))
        if pair is None:
            if len(self._pairs) >= PAIRS_MAX and not self._evict():
                return False
            self._pairs[peer, collection] = _Pair(now_s + NEWS_SPREAD_S * self._jitter(peer, collection, 0))
        elif not pair.online:
            pair.online = True
            pair.due_s = min(pair.due_s, now_s + (RETRY_MIN_S if pair.failures else NEWS_SPREAD_S))
        return True

    def lost(self, peer: str) -> None:
        """The peer is gone. What is known of it stays, as long as there is room."""
        for key in self._keys(peer=peer):
            self._pairs[key].online = False

    def remove(self, collection: bytes, peer: str | None = None) -> None:
        """No longer subscribed, or the peer no longer has it. A session that still runs ends without an effect."""
        for key in self._keys(peer, collection):
            self._release(key, self._pairs.pop(key))
        if not self._keys(collection=collection):
            self._strangers_s.pop(collection, None)

    def next(self, now_s: float) -> list[Start]:
        """The sessions to start now."""
        return [self._start(*key, now_s) for key in self._ready(now_s)]

    def begin(self, peer: str, collection: bytes, now_s: float) -> Start | None:
        """A comparison now, whoever's turn it is: somebody asked for it. None: it runs already, the peer is offline or dropped."""
        pair = self._pairs.get((peer, collection))
        if pair is None or pair.running or not pair.online or self.standing(peer, now_s) is Standing.DROPPED:
            return None
        pair.due_s = now_s
        return self._start(peer, collection, now_s)

    def next_due_s(self, now_s: float) -> float | None:
        """When to call `next` again, unless something happens before. None: only when something happens."""
        if self._ready(now_s):
            return now_s
        if sum(pair.running is not None for pair in self._pairs.values()) >= self._at_once:
            return None
        # What is due already waits for another session of its peer or collection.
        later = [at_s for key, pair in self._pairs.items() if now_s < (at_s := self._turn_s(key, pair, now_s)) < inf]
        return min(later, default=None)

    def claim(self, peer: str, collection: bytes, items: Sequence[Item], now_s: float) -> list[Item]:
        """Of items that this node lacks, those to ask this peer for: not those under way from another, nor those it had not
        lately."""
        pair = self._pairs.get((peer, collection))
        if pair is None or pair.running is None:
            return []
        claimed = self._claimed.setdefault(collection, {})
        free = [item for item in items if (held := claimed.get(item.id)) is None or held[0] == peer or now_s >= held[1]]
        mine = [item for item in free if now_s >= pair.absent.get(item.id, -inf)]
        pair.deferred += len(items) - len(free)
        pair.passed += len(items) - len(mine)
        for item in mine:
            claimed[item.id] = peer, now_s + CLAIM_S
            pair.claims.add(item.id)
        return mine

    def finished(self, peer: str, collection: bytes, outcome: Outcome, now_s: float) -> None:
        """A session that `next` started is over."""
        key = (peer, collection)
        if outcome.offence:
            self._conduct(peer).offend(now_s)
        pair = self._pairs.get(key)
        if pair is None or pair.running is None:
            return
        pulled_news = bool(pair.running.items)
        passed, deferred = pair.passed, pair.deferred
        self._release(key, pair)
        pair.ended_s = now_s
        pair.cause = outcome.cause
        for id_ in outcome.absent:
            pair.absent[id_] = now_s + ABSENT_AGAIN_S
            pair.absent.move_to_end(id_)
        while len(pair.absent) > ABSENT_MAX:
            pair.absent.popitem(last=False)
        if outcome.accepted:
            pair.barren = 0
        elif pulled_news and outcome.needed > outcome.skipped:
            pair.barren += 1
        if not outcome.ok:
            pair.failures += 1
            pair.due_s = now_s + self._spread(key, pair, min(RETRY_MAX_S, RETRY_MIN_S * 2.0 ** min(pair.failures - 1, 20)))
            return
        pair.failures = 0
        if pulled_news:
            # The pull says nothing about the rest: the next comparison keeps to its time.
            return
        pair.last_success_s = now_s
        # What was no longer wanted came from someone else meanwhile; what was passed over is lacking still.
        pair.missing = outcome.needed - outcome.accepted - (outcome.skipped - passed)
        pair.in_sync = outcome.complete and pair.missing == 0
        pair.behind, pair.peer_size = outcome.have, outcome.peer_size
        moved = outcome.accepted > 0 or deferred > 0
        pair.interval_s = INTERVAL_MIN_S if moved else min(INTERVAL_MAX_S, pair.interval_s * 2.0)
        unfinished = outcome.accepted > 0 and not outcome.complete
        pair.due_s = now_s + (GAP_S if unfinished else self._spread(key, pair, pair.interval_s))

    def changed(self, collection: bytes, now_s: float) -> None:
        """Something was added here: compare soon with a few peers, whether or not news of it arrives."""
        keys = [key for key in self._keys(collection=collection) if self._pairs[key].online and not self._pairs[key].failures]
        for key in sorted(keys, key=lambda key: (self._pairs[key].due_s, key))[:CHANGE_FANOUT]:
            pair = self._pairs[key]
            pair.interval_s = INTERVAL_MIN_S
            pair.due_s = min(pair.due_s, now_s + self._spread(key, pair, INTERVAL_MIN_S))

    def heard(self, peer: str, collection: bytes, lacking: Iterable[Item], more: int, now_s: float) -> bool:
        """News, or what a peer told: it has `lacking`, which this node has not, and `more` items besides. True: a session comes of
        it.

        A few items are pulled from the one who has them. For more there is a comparison; and so there is with somebody else if
        the publisher is no peer here, because news travels: once in a while, whatever strangers publish.
        """
        items = [*lacking]
        if not items and not more:
            return False
        pair = self._pairs.get((peer, collection))
        if pair is None or not pair.online:
            return self._compare_with_someone(collection, now_s)
        if pair.failures or pair.barren >= BARREN_MAX or self.standing(peer, now_s) is not Standing.GOOD:
            return False
        if more:
            self._compare_soon((peer, collection), pair, now_s)
            return True
        fresh = [item for item in items if now_s >= pair.absent.get(item.id, -inf)]
        for item in fresh[:HINTS_MAX]:
            pair.hints[item.id] = item
        while len(pair.hints) > HINTS_MAX:
            pair.hints.popitem(last=False)
        if fresh:
            pair.news_s = min(pair.news_s, now_s + NEWS_SPREAD_S * self._jitter(peer, collection, pair.turns))
        return bool(fresh)

    def standing(self, peer: str, now_s: float) -> Standing:
        conduct = self._conducts.get(peer)
        return Standing.GOOD if conduct is None else conduct.standing(now_s)

    def offend(self, peer: str, now_s: float) -> None:
        """The peer broke the protocol where this node answered it."""
        self._conduct(peer).offend(now_s)

    def status(self, now_s: float) -> list[SyncStatus]:
        """Of every pair, sorted by collection and peer."""
        return [
            SyncStatus(
                peer,
                collection,
                self._state(peer, pair, now_s),
                pair.in_sync,
                pair.missing,
                pair.behind,
                pair.failures,
                pair.cause,
                pair.last_success_s,
                None if pair.running or not pair.online else self._turn_s((peer, collection), pair, now_s),
                pair.peer_size,
            )
            for (peer, collection), pair in sorted(self._pairs.items(), key=lambda entry: (entry[0][1], entry[0][0]))
        ]

    def _state(self, peer: str, pair: _Pair, now_s: float) -> str:
        if pair.running:
            return "syncing"
        if not pair.online:
            return "offline"
        standing = self.standing(peer, now_s)
        if standing is not Standing.GOOD:
            return str(standing.value)
        return "retrying" if pair.failures else "waiting"

    def _ready(self, now_s: float) -> list[_Key]:
        """The pairs whose turn it is, the longest due first, as far as there may be more sessions."""
        running = [key for key, pair in self._pairs.items() if pair.running]
        free = self._at_once - len(running)
        peers = {peer for peer, _ in running}
        per_collection = Counter(collection for _, collection in running)
        due = sorted((at_s, key) for key, pair in self._pairs.items() if (at_s := self._turn_s(key, pair, now_s)) <= now_s)
        ready: list[_Key] = []
        for _, (peer, collection) in due:
            if len(ready) < free and peer not in peers and per_collection[collection] < AT_ONCE_PER_COLLECTION:
                peers.add(peer)
                per_collection[collection] += 1
                ready.append((peer, collection))
        return ready

    def _start(self, peer: str, collection: bytes, now_s: float) -> Start:
        pair = self._pairs[peer, collection]
        # A comparison finds what was announced as well.
        items = () if pair.due_s <= now_s else tuple(pair.hints.values())
        pair.hints.clear()
        pair.news_s = inf
        pair.passed = pair.deferred = 0
        pair.turns += 1
        demoted = self.standing(peer, now_s) is Standing.DEMOTED
        pair.running = Start(peer, collection, items, DEMOTED_WANT_MAX if demoted else WANT_MAX)
        return pair.running

    def _turn_s(self, key: _Key, pair: _Pair, now_s: float) -> float:
        """When the pair's turn comes; infinite while it runs or is offline."""
        if pair.running or not pair.online:
            return inf
        at_s = pair.due_s if pair.failures else min(pair.due_s, pair.news_s)
        if pair.ended_s is not None:
            at_s = max(at_s, pair.ended_s + GAP_S)
        conduct = self._conducts.get(key[0])
        if conduct is None:
            return at_s
        demoted = conduct.standing(now_s) is Standing.DEMOTED
        return max(at_s + (DEMOTED_DELAY_S if demoted else 0.0), conduct.dropped_until_s)

    def _compare_soon(self, key: _Key, pair: _Pair, now_s: float) -> None:
        earliest_s = now_s if pair.ended_s is None else max(now_s, pair.ended_s + INTERVAL_MIN_S)
        pair.due_s = min(pair.due_s, earliest_s + NEWS_SPREAD_S * self._jitter(*key, pair.turns))

    def _compare_with_someone(self, collection: bytes, now_s: float) -> bool:
        good = [
            key
            for key in self._keys(collection=collection)
            if self._pairs[key].online and not self._pairs[key].failures and self.standing(key[0], now_s) is Standing.GOOD
        ]
        if not good or now_s < self._strangers_s.get(collection, -inf):
            return False
        self._strangers_s[collection] = now_s + INTERVAL_MIN_S
        key = min(good, key=lambda key: (self._pairs[key].due_s, key))
        self._compare_soon(key, self._pairs[key], now_s)
        return True

    def _keys(self, peer: str | None = None, collection: bytes | None = None) -> list[_Key]:
        return [key for key in self._pairs if peer in (None, key[0]) and collection in (None, key[1])]

    def _release(self, key: _Key, pair: _Pair) -> None:
        claimed = self._claimed.get(key[1], {})
        for id_ in pair.claims:
            if id_ in claimed and claimed[id_][0] == key[0]:
                del claimed[id_]
        if not claimed:
            self._claimed.pop(key[1], None)
        pair.claims = set()
        pair.running = None

    def _evict(self) -> bool:
        """Forget the pair that was offline the longest."""
        idle = [key for key, pair in self._pairs.items() if not pair.online and not pair.running]
        if not idle:
            return False
        del self._pairs[min(idle, key=lambda key: (self._pairs[key].ended_s or 0.0, key))]
        return True

    def _conduct(self, peer: str) -> Conduct:
        conduct = self._conducts.pop(peer, None) or Conduct()
        self._conducts[peer] = conduct
        if len(self._conducts) > PEERS_MAX:
            self._conducts.popitem(last=False)
        return conduct

    def _spread(self, key: _Key, pair: _Pair, wait_s: float) -> float:
        """Between half of it and all of it, so that nodes that started together do not stay together."""
        return wait_s * (0.5 + 0.5 * self._jitter(*key, pair.turns))

    def _jitter(self, peer: str, collection: bytes, turn: int) -> float:
        """In [0, 1)."""
        drawn = tagged_hash("memory-sync-jitter", self._seed, peer.encode(), collection, turn.to_bytes(8, "big"))
        return int.from_bytes(drawn[:6], "big") / 2**48
