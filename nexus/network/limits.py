"""Bounds on what peers may use: streams, bytes per second, patience. Pure: the time is handed in."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from nexus.network.transport import ProtocolSpec

# Peers remembered without an open stream, so that closing and reopening a stream does not refill a budget.
PEERS_REMEMBERED = 1024
STRIKES_MAX = 10
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


@dataclass(slots=True)
class _Use:
    streams: int = 0
    bytes: TokenBucket | None = None


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
        """Seconds that reading has to pause after `size` more bytes from the peer."""
        if protocol.bytes_per_peer_s is None:
            return 0.0
        use = self._use(peer_id, protocol)
        if use.bytes is None:
            use.bytes = TokenBucket(protocol.bytes_per_peer_s, protocol.bytes_per_peer_s, now_s)
        return use.bytes.take(size, now_s)

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
