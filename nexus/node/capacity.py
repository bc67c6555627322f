"""What this node can do, as measured here: how fast it computes, and how fast it gives bytes to others.

Both are measured again as long as the node runs: the first time, right after the start, others may start on the same machine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from random import Random

import structlog
import trio

from nexus.engine.speed import Speeds

log = structlog.get_logger("nexus.capacity")

# Speeds are measured again so long after the start, and then ever more seldom.
AGAIN_SOONEST_S = 20.0
AGAIN_LATEST_S = 3600.0
# The best of the last few counts: what else a machine did for a while is no slowness of its own.
KEPT = 4
# Others are told of a speed that differs by more than this, as a share.
NOTED_CHANGE = 0.125
# Others are told of the load when it has changed by a step, so seldom, and all nodes together so often at most.
LOAD_EVERY_S = 2.0
LOADS_PER_S = 20
# Less than so many bytes tell nothing of a link: they go into buffers.
UPLOAD_SAMPLE_BYTES = 2 << 20
# A faster transfer counts at once, a slower one by so much: it may be whoever reads that is slow.
_UPLOAD_DECAY = 0.1


class UploadMeter:
    """Bytes per second that go out while there is something to send, over all receivers together.

    Call `busy` around the answering of a request and `sent` for what has left. Costs two readings of a clock per request.
    """

    def __init__(self, clock: Callable[[], float] = trio.current_time) -> None:
        """`clock`: seconds that only grow."""
        self._clock = clock
        self._senders = 0
        self._since_s = 0.0
        self._busy_s = 0.0
        self._bytes = 0
        self._rate = 0.0

    @property
    def bytes_per_s(self) -> int:
        """0 until enough was sent to tell."""
        return round(self._rate)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Something is being sent inside."""
        if not self._senders:
            self._since_s = self._clock()
        self._senders += 1
        try:
            yield
        finally:
            self._senders -= 1
            self._take_time()

    def sent(self, n_bytes: int) -> None:
        """So many bytes have left."""
        self._bytes += n_bytes
        if self._bytes < UPLOAD_SAMPLE_BYTES:
            return
        self._take_time()
        if self._busy_s > 0:
            rate = self._bytes / self._busy_s
            self._rate = rate if rate > self._rate else self._rate + _UPLOAD_DECAY * (rate - self._rate)
        self._bytes, self._busy_s = 0, 0.0

    def _take_time(self) -> None:
        now_s = self._clock()
        self._busy_s += now_s - self._since_s
        self._since_s = now_s


class Capacity:
    """`speeds`: measured at the start. `measure`: measures again, in a thread; None: never again. `wait_idle`: until this node
    computes nothing; `is_idle`: whether it does. `changed`: is called when others are to be told."""

    def __init__(
        self,
        speeds: Speeds,
        measure: Callable[[], Awaitable[Speeds]] | None,
        is_idle: Callable[[], bool],
        wait_idle: Callable[[], Awaitable[None]],
        changed: Callable[[], None],
        rng: Random,
    ) -> None:
        self._measured = deque([speeds], KEPT)
        self._measure = measure
        self._is_idle = is_idle
        self._wait_idle = wait_idle
        self._changed = changed
        self._rng = rng
        self._told = speeds
        self.uploads = UploadMeter()

    @property
    def speeds(self) -> Speeds:
        """The best of late."""
        return Speeds(max(one.exact for one in self._measured), max(one.float for one in self._measured))

    async def run(self) -> None:
        """Measure again when there is nothing else to do, until cancelled."""
        if self._measure is None:
            return
        pause_s = AGAIN_SOONEST_S
        while True:
            # Not at the same moment as others that started with this one.
            await trio.sleep(pause_s * self._rng.uniform(1, 2))
            while not self._is_idle():
                await self._wait_idle()
            speeds = await self._measure()
            if not self._is_idle():
                continue
            pause_s = min(2 * pause_s, AGAIN_LATEST_S)
            self._measured.append(speeds)
            now = self.speeds
            if _differs(now.exact, self._told.exact) or _differs(now.float, self._told.float):
                log.info("speed_changed", exact=now.exact, float=now.float)
                self._told = now
                self._changed()


def _differs(now: int, told: int) -> bool:
    return abs(now - told) > NOTED_CHANGE * told


def load_step(sessions: int) -> int:
    """0, 1, 2, 4, 8, ...: steps that others are told of."""
    return 1 << (sessions.bit_length() - 1) if sessions else 0


class LoadNews:
    """Has others told how loaded this node is. `sessions`: how many run; `members`: how many nodes would hear of it. `changed`: is
    called when others are to be told. Call `note` whenever a session begins or ends."""

    def __init__(self, sessions: Callable[[], int], members: Callable[[], int], changed: Callable[[], None]) -> None:
        self._sessions = sessions
        self._members = members
        self._changed = changed
        self._event = trio.Event()

    def note(self) -> None:
        self._event.set()

    async def run(self) -> None:
        told = 0
        while True:
            await self._event.wait()
            self._event = trio.Event()
            step = load_step(self._sessions())
            if step != told:
                told = step
                self._changed()
                await trio.sleep(max(LOAD_EVERY_S, self._members() / LOADS_PER_S))
                # What happened meanwhile is looked at now.
                self._event.set()
