"""trio made deterministic: virtual time, an order of tasks that follows from the seed, threads in line, hosts that can be held.

This is the one file that touches trio's private parts; constraints.txt pins trio, and tests/simulation/test_chaos.py shows that one
seed gives one trace in two processes.
"""

from __future__ import annotations

import gc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import ceil
from typing import Any, TypeVar
from unittest.mock import patch

import trio
import trio._core._run as trio_internals
import trio.testing

T = TypeVar("T")
TICK_S = 0.001


@dataclass(eq=False)
class Host:
    """A simulated machine: all tasks of a node carry it in their context, also those that answer others. `charged_s`: processor
    time that its work has cost so far. `call_s`: draws what a call in a thread takes beside what it is charged."""

    name: str
    call_s: Callable[[], float] = lambda: 0.0
    charged_s: float = 0.0
    held: bool = False
    waiting: list[Any] = field(default_factory=list)

    def hold(self) -> None:
        """Stop every task of this host where it is, as SIGSTOP does. Deadlines go on, and are noticed afterwards."""
        self.held = True

    def release(self) -> None:
        self.held = False
        waiting, self.waiting = self.waiting, []
        trio_internals.GLOBAL_RUN_CONTEXT.runner.runq.extend(waiting)


HOST: ContextVar[Host | None] = ContextVar("simulated host", default=None)


@contextmanager
def deterministic_scheduling(seed: int) -> Iterator[None]:
    """Ready tasks run in an order that follows from the seed alone (what trio's own hypothesis plugin does)."""
    state = trio_internals._r.getstate()
    trio_internals._r.seed(seed)
    try:
        with patch.object(trio_internals, "_ALLOW_DETERMINISTIC_SCHEDULING", True):
            yield
    finally:
        trio_internals._r.setstate(state)


@contextmanager
def hosts_can_be_held() -> Iterator[None]:
    """Tasks of a host that is held are put aside instead of in the run queue."""
    original = trio_internals.Runner.reschedule

    def reschedule(runner: Any, task: Any, *outcome: Any) -> None:
        original(runner, task, *outcome)
        host = task.context.get(HOST)
        if host is not None and host.held:
            runner.runq.pop()
            host.waiting.append(task)

    with patch.object(trio_internals.Runner, "reschedule", reschedule):
        yield


async def in_line(
    work: Callable[..., T],
    *args: Any,
    thread_name: str | None = None,
    abandon_on_cancel: bool = False,
    limiter: trio.CapacityLimiter | None = None,
) -> T:
    """`trio.to_thread.run_sync` without a thread: virtual time would leap while a real one works. The work is done at once; the
    task waits for as long as its host was charged for it, uncancelled, as it would for a thread."""
    await trio.lowlevel.checkpoint_if_cancelled()
    if limiter is None:
        return await _charged(work, *args)
    borrower = object()
    await limiter.acquire_on_behalf_of(borrower)
    try:
        return await _charged(work, *args)
    finally:
        limiter.release_on_behalf_of(borrower)


async def _charged(work: Callable[..., T], *args: Any) -> T:
    host = HOST.get()
    before_s = host.charged_s if host is not None else 0.0
    try:
        return work(*args)
    finally:
        with trio.CancelScope(shield=True):
            took_s = host.charged_s - before_s + host.call_s() if host is not None else 0.0
            # By the tick of the network: what ends at the same time is one turn of the scheduler.
            await trio.sleep_until(ceil((trio.current_time() + took_s) / TICK_S) * TICK_S)


@contextmanager
def threads_in_line() -> Iterator[None]:
    with patch.object(trio.to_thread, "run_sync", in_line):
        yield


def simulate(seed: int, main: Callable[[], Awaitable[T]]) -> T:
    """Run `main` in virtual time, deterministically, with threads in line. The garbage collector waits: what it would end in the
    middle of a run depends on more than the seed."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        with deterministic_scheduling(seed), hosts_can_be_held(), threads_in_line():
            return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    finally:
        if collecting:
            gc.enable()
