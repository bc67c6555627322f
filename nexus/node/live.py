"""How many sessions are running, and when none is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio


class Live:
    """Counts what runs inside `one()`, so that a stopping node can wait for the last of it. Whoever is in `on_change` is
    told when the count changes."""

    def __init__(self) -> None:
        self.count = 0
        self.on_change: list[Callable[[], None]] = []
        self._idle = trio.Event()
        self._idle.set()

    @contextmanager
    def one(self) -> Iterator[None]:
        if not self.count:
            self._idle = trio.Event()
        self.count += 1
        self._tell()
        try:
            yield
        finally:
            self.count -= 1
            if not self.count:
                self._idle.set()
            self._tell()

    def _tell(self) -> None:
        for note in self.on_change:
            note()

    async def wait_idle(self) -> None:
        await self._idle.wait()
