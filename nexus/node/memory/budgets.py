"""What each peer may cost this node, per second: bytes that it is sent, searches, comparisons."""

from __future__ import annotations

from collections import OrderedDict

import trio

from nexus.network.limits import TokenBucket

PEERS_MAX = 1024


class Budget:
    """One kind of cost, `rate` per second and peer, and `burst` saved up."""

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = burst
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def take(self, peer_id: str, amount: float) -> float:
        """Count it against the peer; the seconds until it is paid for."""
        now_s = trio.current_time()
        bucket = self._buckets.pop(peer_id, None) or TokenBucket(self._rate, self._burst, now_s)
        self._buckets[peer_id] = bucket
        if len(self._buckets) > PEERS_MAX:
            self._buckets.popitem(last=False)
        return bucket.take(amount, now_s)

    async def spend(self, peer_id: str, amount: float) -> None:
        """Count it against the peer, and wait until it is paid for."""
        await trio.sleep(self.take(peer_id, amount))
