"""Work away from the trio thread, and deadlines with words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

import trio

from nexus.core.errors import TimedOutError

Result = TypeVar("Result")


class OffThread(Protocol):
    """Runs a function that waits for the disk or hashes much, away from the trio thread."""

    async def __call__(self, work: Callable[[], Result]) -> Result: ...


async def in_worker_thread(work: Callable[[], Result]) -> Result:
    return await trio.to_thread.run_sync(work)


@contextmanager
def deadline(timeout_s: float, cause: str) -> Iterator[None]:
    """Raises TimedOutError with this cause."""
    with trio.move_on_after(timeout_s) as scope:
        yield
    if scope.cancelled_caught:
        raise TimedOutError(cause)
