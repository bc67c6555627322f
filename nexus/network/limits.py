"""Bounds on what peers may use: streams, bytes per second, patience. Pure: the time is handed in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from nexus.network.transport import ProtocolSpec

# Peers remembered without an open stream, so that closing and reopening a stream does not refill a budget.
PEERS_REMEMBERED = 1024
KEYS_MAX = 4096
STRIKES_MAX = 10
FRAMES_BURST = 2
STRIKES_FORGOTTEN_S = 60.0


class TokenBucket:
    """Sustained `rate` per second, and `burst` at once. Takes may run into debt, which the caller waits off."""

    __slots__ = ("_at_s", "_tokens", "burst", "rate")

    def __init__(self, rate: float, burst: float, now_s: float) -> None:
        self.rate = rate
        self.burst = burst
        self._tokens = burst
        self._at_s = now_s

    def take(self, amount: float, now_s: float) -> float:
        """Take `amount`; the seconds to wait until the debt, if any, is paid."""
        self._tokens = min(self.burst, self._tokens + (now_s - self._at_s) * self.rate) - amount
        self._at_s = now_s
        return max(0.0, -self._tokens / self.rate)

    def left(self, now_s: float) -> float:
        """What could be taken now without a debt; negative in debt."""
        return min(self.burst, self._tokens + (now_s - self._at_s) * self.rate)


class TokenTable:
    """A bucket each for peers, IP addresses or what else a key names. Bounded: those that were used longest ago start anew."""

    def __init__(self, rate: float, burst: float, keys_max: int = KEYS_MAX) -> None:
        self.rate = rate
        self.burst = burst
        self._keys_max = keys_max
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def may(self, keys: Iterable[str], now_s: float) -> bool:
        """Count one for each key, unless one of them has had its share."""
        buckets = [self._bucket(key, now_s) for key in keys]
        if any(bucket.left(now_s) < 1 for bucket in buckets):
            return False
        for bucket in buckets:
            bucket.take(1, now_s)
        return True

    def delay_s(self, keys: Iterable[str], amount: float, now_s: float) -> float:
        """Take `amount` of each; the seconds to wait until no key is in debt."""
        return max((self._bucket(key, now_s).take(amount, now_s) for key in keys), default=0.0)

    def _bucket(self, key: str, now_s: float) -> TokenBucket:
        bucket = self._buckets.pop(key, None) or TokenBucket(self.rate, self.burst, now_s)
        self._buckets[key] = bucket
        if len(self._buckets) > self._keys_max:
            self._buckets.popitem(last=False)
        return bucket

    def __len__(self) -> int:
        return len(self._buckets)


@dataclass(slots=True)
class _Use:
    streams: int = 0
    bytes: TokenBucket | None = None
    frames: TokenBucket | None = None


@dataclass(slots=True)
class _Strikes:
    count: float
    at_s: float


@dataclass(slots=True)
class PeerLimits:
    """What each peer uses of each protocol of this node, and how often it broke the rules."""

    _uses: OrderedDict[tuple[str, str], _Use] = field(default_factory=OrderedDict)
    _strikes: OrderedDict[str, _Strikes] = field(default_factory=OrderedDict)

    def admit(self, peer_id: str, protocol: ProtocolSpec) -> bool:
        """Count one more inbound stream, unless the peer has its fill of them. Every True wants a `release`."""
        use = self._use(peer_id, protocol)
        if use.streams >= protocol.streams_per_peer_max:
            return False
        use.streams += 1
        return True

    def release(self, peer_id: str, protocol: ProtocolSpec) -> None:
        self._use(peer_id, protocol).streams -= 1

    def delay_s(self, peer_id: str, protocol: ProtocolSpec, size: int, now_s: float) -> float:
        """Seconds that reading has to pause after one more frame, of `size` bytes, from the peer."""
        pause_s = 0.0
        if protocol.bytes_per_peer_s is not None:
            use = self._use(peer_id, protocol)
            if use.bytes is None:
                use.bytes = TokenBucket(protocol.bytes_per_peer_s, protocol.bytes_per_peer_s, now_s)
            pause_s = use.bytes.take(size, now_s)
        if protocol.frames_per_peer_s is not None:
            use = self._use(peer_id, protocol)
            if use.frames is None:
                use.frames = TokenBucket(protocol.frames_per_peer_s, FRAMES_BURST * protocol.frames_per_peer_s, now_s)
            pause_s = max(pause_s, use.frames.take(1, now_s))
        return pause_s

    def strike(self, peer_id: str, now_s: float) -> bool:
        """Note that a peer broke the rules. True once it did so too often: drop it."""
        strikes = self._strikes.pop(peer_id, None) or _Strikes(0.0, now_s)
        faded = strikes.count * max(0.0, 1.0 - (now_s - strikes.at_s) / STRIKES_FORGOTTEN_S)
        strikes = self._strikes[peer_id] = _Strikes(faded + 1.0, now_s)
        if len(self._strikes) > PEERS_REMEMBERED:
            self._strikes.popitem(last=False)
        return strikes.count > STRIKES_MAX

    def _use(self, peer_id: str, protocol: ProtocolSpec) -> _Use:
        key = (peer_id, protocol.id)
        use = self._uses.get(key)
        if use is None:
            use = self._uses[key] = _Use()
            if len(self._uses) > PEERS_REMEMBERED:
                # Those with open streams stay: connections are capped, so these are few.
                idle = next((old for old, held in self._uses.items() if not held.streams and old != key), None)
                if idle is not None:
                    del self._uses[idle]
        else:
            self._uses.move_to_end(key)
        return use
