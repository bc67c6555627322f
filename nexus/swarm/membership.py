"""What a node says about itself: a signed record, newest wins, believed only until it expires.

Records come first-hand only, over a stream to the node that they are about; here is decided which to believe and when to ask
again. Wall-clock times are Unix milliseconds and end in `_ms`; intervals are in seconds of any steady clock and end in `_s`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from nexus.core.errors import VerificationError
from nexus.core.hashing import tagged_hash
from nexus.core.keys import Identity, peer_id_of, verify_signature
from nexus.core.manifest import EXACT, LAYERS_MAX
from nexus.core.record import Record, digest, many, nested, raw, text, uint
from nexus.swarm.ledger import PRICE_MAX
from nexus.swarm.links import Coordinate

RECORD_BYTES_MAX = 32 * 1024
ADDRESSES_MAX = 16
ADDRESS_BYTES_MAX = 256
HOLDINGS_MAX = 256
HELD_RANGES_MAX = 64
SPEED_MAX = 2**48
LOAD_MAX = 2**16
UPLOAD_MAX = 2**48
# A signature and the heads of the arrays around the record.
ENVELOPE_BYTES = 128
RECORD_LIFETIME_MS = 10 * 60 * 1000
CLOCK_SKEW_MS = 5 * 60 * 1000
# A record is signed anew while most of its life is left, so that what peers hold of a live node never expires.
RENEW_AFTER_MS = 60 * 1000
MEMBERS_MAX = 4096
# How often a peer is asked for its record: while connected, while not, and at the least, whatever gossip says.
REFRESH_CONNECTED_S = 150.0
REFRESH_OTHERS_S = 180.0
REFRESH_SOONEST_S = 5.0
# One failure may be a hiccup and is tried again soon; two in a row and the node is gone from the table.
RETRY_AFTER_S = 10.0
FAILURES_MAX = 2
# The DHT forgets providers after 48 hours (libp2p's default), sooner where the nodes that keep the record leave.
PROVIDE_RENEW_S = 30 * 60.0
PROVIDE_RETRY_S = 30.0
PROVIDE_PACE_S = 1.0


@dataclass(frozen=True, slots=True)
class LayerRange(Record):
    """Layers [start, end)."""

    start: int = uint(LAYERS_MAX)
    end: int = uint(LAYERS_MAX)


@dataclass(frozen=True, slots=True)
class Holding(Record):
    """A model that this node has pieces of. `name` is what its owner calls it; the root is what it is. `serving`: what of `held` it
    has undertaken to serve. `version`: which version of that name this is by the word of its `publisher`, whose `signature` is
    over a `nexus.swarm.fragments.Publication`; 0 and empty where the name has no versions, but a publisher may be followed before
    it has made any. `memory_bytes`, `disk_bytes`: what a node gives to this model that takes what the swarm needs, otherwise 0."""

    name: str = text(64)
    model_root: bytes = digest()
    held: tuple[LayerRange, ...] = many(nested(LayerRange), HELD_RANGES_MAX)
    serving: tuple[LayerRange, ...] = many(nested(LayerRange), HELD_RANGES_MAX)
    version: int = uint(2**32)
    publisher: bytes = raw(0, 32, default=b"")
    signature: bytes = raw(0, 64, default=b"")
    memory_bytes: int = uint(2**56, default=0)
    disk_bytes: int = uint(2**56, default=0)


@dataclass(frozen=True, slots=True)
class NodeRecord(Record):
    """`issued_ms`: Unix time, also the version: the newest record of a node wins.

    `memory_bytes`: what it offers to models, `memory_free_bytes`: what of it nothing uses now. `exact_speed`, `float_speed`:
    measured, in millions of multiply-adds per second, of one session decoding in that profile; 0 where it is not known. `upload`:
    bytes per second that it gives to others, as measured, 0 where it is not known. `load`: sessions that it computes for now.
    `coordinate`: where it is (`nexus.swarm.links`). `serves`: 1 where it takes stages for others. `leaving`: 1 while it drains, and
    then it takes nothing new. `price`: what it asks, in micro-credits per token and layer. All of it is the node's own word."""

    spec: int = uint(1, least=1)
    node: bytes = raw(32)
    issued_ms: int = uint(2**53)
    agent: str = text(64)
    name: str = text(64)
    addresses: tuple[str, ...] = many(text(ADDRESS_BYTES_MAX), ADDRESSES_MAX)
    memory_bytes: int = uint(2**56)
    memory_free_bytes: int = uint(2**56)
    exact_speed: int = uint(SPEED_MAX)
    float_speed: int = uint(SPEED_MAX)
    upload: int = uint(UPLOAD_MAX)
    load: int = uint(LOAD_MAX)
    coordinate: Coordinate = nested(Coordinate)
    serves: int = uint(1)
    leaving: int = uint(1)
    models: tuple[Holding, ...] = many(nested(Holding), HOLDINGS_MAX)
    price: int = uint(PRICE_MAX)

    def speed(self, profile: str) -> int:
        """Of the arithmetic of a model's profile, in millions of multiply-adds per second."""
        return self.exact_speed if profile == EXACT else self.float_speed

    @property
    def peer_id(self) -> str:
        return peer_id_of(self.node)


@dataclass(frozen=True, slots=True)
class SignedNodeRecord(Record):
    record: NodeRecord = nested(NodeRecord)
    signature: bytes = raw(64)

    @classmethod
    def sign(cls, record: NodeRecord, node: Identity) -> SignedNodeRecord:
        return cls(record, node.sign("node-record", record.to_bytes()))

    def verify(self, now_ms: int) -> NodeRecord:
        """The record, if its signature holds and it is neither expired nor from the future. Raises VerificationError."""
        verify_signature(self.record.node, "node-record", self.record.to_bytes(), self.signature)
        if not is_live(self.record.issued_ms, now_ms):
            age_s = (now_ms - self.record.issued_ms) / 1000
            when = f"expired: it is {age_s:.0f} s old" if age_s > 0 else f"from the future: it is {-age_s:.0f} s ahead"
            raise VerificationError(f"the node record is {when}", "Set the clocks of both machines, then it holds again")
        return self.record


def provider_key(model_root: bytes) -> bytes:
    """The DHT key under which the nodes that hold some of a model announce it."""
    return tagged_hash("provider", model_root)


def is_live(issued_ms: int, now_ms: int) -> bool:
    """Whether a record of that time may be believed now."""
    return -CLOCK_SKEW_MS <= now_ms - issued_ms <= RECORD_LIFETIME_MS


def clock_fix(agreeing: int) -> str:
    """What to do about a record that a wrong clock has made too old or too new. `agreeing`: how many other nodes' records hold by
    the clock of this node, which is what can be told of whose clock is wrong."""
    if agreeing:
        nodes = "1 other node agrees" if agreeing == 1 else f"{agreeing} other nodes agree"
        return f"Set the clock of that node: {nodes} with the one here"
    return "Set the clocks of both machines, this one first: no other node's record confirms its clock"


def should_renew(issued_ms: int, now_ms: int) -> bool:
    """Whether this node's own record wants a new signature; also after the clock was set back."""
    return not 0 <= now_ms - issued_ms < RENEW_AFTER_MS


def next_issue_ms(previous_ms: int, now_ms: int) -> int:
    """The time for a new record: now, and later than the one before even if the clock was set back. A record from further ahead
    than clocks may differ was refused by everybody: the one after it is not to be, and counts from now."""
    return now_ms if previous_ms - now_ms > CLOCK_SKEW_MS else max(now_ms, previous_ms + 1)


def fit_record(record: NodeRecord) -> NodeRecord:
    """The record within the bounds of its form, so that no peer refuses it: long texts cut, the longest held ranges and as many
    models kept as go in."""
    models = tuple(
        replace(
            holding,
            name=_cut(holding.name, 64),
            held=_longest(holding.held, HELD_RANGES_MAX),
            serving=_longest(holding.serving, HELD_RANGES_MAX),
        )
        for holding in record.models
    )
    addresses = tuple(address for address in record.addresses if len(address.encode()) <= ADDRESS_BYTES_MAX)[:ADDRESSES_MAX]
    short = replace(record, agent=_cut(record.agent, 64), name=_cut(record.name, 64), addresses=addresses, models=())
    room = RECORD_BYTES_MAX - len(short.to_bytes()) - ENVELOPE_BYTES
    kept = 0
    for holding in models[:HOLDINGS_MAX]:
        room -= len(holding.to_bytes())
        if room < 0:
            break
        kept += 1
    return replace(short, models=models[:kept])


def _cut(text: str, bytes_max: int) -> str:
    return text.encode()[:bytes_max].decode(errors="ignore")


def _longest(ranges: Sequence[LayerRange], most: int) -> tuple[LayerRange, ...]:
    """The longest ranges, in order of layers."""
    chosen = sorted(ranges, key=lambda held: (held.start - held.end, held.start))[:most]
    return tuple(sorted(chosen, key=lambda held: held.start))


def newest(one: SignedNodeRecord, other: SignedNodeRecord) -> SignedNodeRecord:
    """Which of two records of one node counts: the later one; of two signed for the same time, the same one everywhere."""
    return max(one, other, key=lambda signed: (signed.record.issued_ms, signed.to_bytes()))


@dataclass(slots=True)
class _Member:
    signed: SignedNodeRecord | None = None
    asked_s: float | None = None
    failures: int = 0
    has_news: bool = False


class MemberTable:
    """The records of other nodes, and when each was last asked for its own. Bounded: the record issued longest ago makes room."""

    def __init__(self, members_max: int = MEMBERS_MAX) -> None:
        self._members_max = members_max
        self._members: dict[str, _Member] = {}

    def accept(self, signed: SignedNodeRecord, peer_id: str, now_ms: int) -> NodeRecord:
        """Keep a record that came over a stream from `peer_id`, if it is newer; the one that counts now.

        Raises VerificationError for a bad signature, an expired record, or one of another node than its sender.
        """
        if signed.record.peer_id != peer_id:
            raise VerificationError("the node record is of another node than its sender")
        signed.verify(now_ms)
        member = self._member(peer_id)
        member.signed = signed if member.signed is None else newest(member.signed, signed)
        member.failures = 0
        member.has_news = False
        self._trim(peer_id)
        return member.signed.record

    def __len__(self) -> int:
        return len(self._members)

    def asked(self, peer_id: str, now_s: float) -> None:
        """A request for the peer's record begins."""
        self._member(peer_id).asked_s = now_s
        self._trim(peer_id)

    def failed(self, peer_id: str) -> bool:
        """It came to nothing. After FAILURES_MAX in a row the node is no member any more; whether it was one until now."""
        member = self._members.get(peer_id)
        if member is None:
            return False
        member.failures += 1
        if member.failures < FAILURES_MAX or member.signed is None:
            return False
        member.signed = None
        return True

    def disconnected(self, peer_id: str) -> bool:
        """The connection to it ended. One that was leaving has left, then this is True; another is asked at once whether it is
        still there."""
        member = self._members.get(peer_id)
        if member is None:
            return False
        if member.signed is not None and member.signed.record.leaving:
            member.signed = None
            return True
        member.asked_s = None
        return False

    def get(self, peer_id: str, now_ms: int) -> NodeRecord | None:
        """The peer's live record."""
        member = self._members.get(peer_id)
        if member is None or member.signed is None or not is_live(member.signed.record.issued_ms, now_ms):
            return None
        return member.signed.record

    def live(self, now_ms: int) -> list[NodeRecord]:
        """Every live record, sorted by key."""
        found = (self.get(peer_id, now_ms) for peer_id in self._members)
        return sorted((record for record in found if record is not None), key=lambda record: record.node)

    def may_ask(self, peer_id: str, now_s: float) -> bool:
        """Whether enough time has passed to ask again because somebody said so."""
        member = self._members.get(peer_id)
        return member is None or member.asked_s is None or now_s - member.asked_s >= REFRESH_SOONEST_S

    def told(self, peer_id: str) -> None:
        """It says that it has a new record: ask as soon as may be, also where that is not now."""
        member = self._members.get(peer_id)
        if member is not None:
            member.has_news = True

    def due(self, connected: Iterable[str], now_s: float, now_ms: int) -> list[str]:
        """Whom to ask now, sorted: connected peers without a record or with an old one, and the other members now and then."""
        linked = frozenset(connected)
        members = {peer_id for peer_id, member in self._members.items() if member.signed is not None}
        return sorted(peer_id for peer_id in linked | members if self._is_due(peer_id, peer_id in linked, now_s, now_ms))

    def forget_gone(self, connected: Iterable[str], now_s: float, now_ms: int) -> None:
        """Drop the entries that say nothing any more: no live record, not connected, not asked lately."""
        linked = frozenset(connected)
        for peer_id, member in list(self._members.items()):
            if self.get(peer_id, now_ms) is not None:
                continue
            member.signed = None
            quiet = member.asked_s is None or now_s - member.asked_s >= REFRESH_CONNECTED_S
            if quiet and peer_id not in linked:
                del self._members[peer_id]

    def _is_due(self, peer_id: str, linked: bool, now_s: float, now_ms: int) -> bool:
        member = self._members.get(peer_id)
        if member is None or member.asked_s is None:
            return True
        waited_s = now_s - member.asked_s
        if 0 < member.failures < FAILURES_MAX:
            return waited_s >= RETRY_AFTER_S
        if member.has_news and waited_s >= REFRESH_SOONEST_S:
            return True
        return waited_s >= (REFRESH_CONNECTED_S if linked else REFRESH_OTHERS_S)

    def _member(self, peer_id: str) -> _Member:
        return self._members.setdefault(peer_id, _Member())

    def _trim(self, keep: str) -> None:
        while len(self._members) > self._members_max:
            oldest = min(
                (peer_id for peer_id in self._members if peer_id != keep),
                key=lambda peer_id: (_issued_ms(self._members[peer_id]), peer_id),
            )
            del self._members[oldest]


def _issued_ms(member: _Member) -> int:
    return -1 if member.signed is None else member.signed.record.issued_ms


def next_to_provide(
    wanted: Iterable[bytes], tried_s: Mapping[bytes, float], provided_s: Mapping[bytes, float], now_s: float
) -> bytes | None:
    """The DHT key to announce next, or None: those never announced first, then the one announced longest ago, if it is time.

    `tried_s`: when each key was last tried; `provided_s`: when that last worked."""

    def is_due(key: bytes) -> bool:
        if key in tried_s and now_s - tried_s[key] < PROVIDE_RETRY_S:
            return False
        return key not in provided_s or now_s - provided_s[key] >= PROVIDE_RENEW_S

    return min((key for key in wanted if is_due(key)), key=lambda key: (tried_s.get(key, float("-inf")), key), default=None)
