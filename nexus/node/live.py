"""How many sessions are running, and when none is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio


class Live:
    """Counts what runs inside `one()`, so that a stopping node can wait for the last of it."""

    def __init__(self) -> None:
        self.count = 0
        self._idle = trio.Event()
        self._idle.set()

    @contextmanager
    def one(self) -> Iterator[None]:
        if not self.count:
            self._idle = trio.Event()
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1
            if not self.count:
                self._idle.set()

    async def wait_idle(self) -> None:
        await self._idle.wait()
