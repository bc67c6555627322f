"""How fast bytes may go, one limit for all streams of a service."""

from __future__ import annotations

import trio

from nexus.network.limits import TokenBucket

# What may go at once after a rest, in seconds of the rate: long enough that the limit is reached although timers are coarse.
BURST_S = 0.25


class Pace:
    """At most `rate` bytes per second, shared by whoever asks; 0 for no limit."""

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self._bucket: TokenBucket | None = None

    async def spend(self, size: int) -> None:
        """Return when `size` bytes more may go (or have gone, and it is time for the next)."""
        if not self.rate:
            return
        if self._bucket is None:
            self._bucket = TokenBucket(self.rate, self.rate * BURST_S, trio.current_time())
        if pause_s := self._bucket.take(size, trio.current_time()):
            await trio.sleep(pause_s)
