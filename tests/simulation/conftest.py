"""Deterministic scheduling for simulations. This is the one place that touches trio's private switch for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
import trio
import trio._core._run as trio_internals
import trio.testing

T = TypeVar("T")


@contextmanager
def deterministic_scheduling(seed: int) -> Iterator[None]:
    """Ready tasks run in an order that follows from the seed alone (what trio's own hypothesis plugin does)."""
    state, allowed = trio_internals._r.getstate(), trio_internals._ALLOW_DETERMINISTIC_SCHEDULING
    trio_internals._r.seed(seed)
    trio_internals._ALLOW_DETERMINISTIC_SCHEDULING = True
    try:
        yield
    finally:
        trio_internals._r.setstate(state)
        trio_internals._ALLOW_DETERMINISTIC_SCHEDULING = allowed


def simulate(seed: int, main: Callable[[], Awaitable[T]]) -> T:
    """Run `main` in virtual time, deterministically."""
    with deterministic_scheduling(seed):
        return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.fixture(name="simulate")
def _simulate() -> Callable[[int, Callable[[], Awaitable[T]]], T]:
    return simulate
