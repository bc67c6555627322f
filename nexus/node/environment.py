"""What a node has from its machine beside disk and network: clocks and randomness, handed through `Node` to every part.

No other module of `nexus.node` and `nexus.swarm` reads a clock or draws a random number by itself: that is what lets a whole node
run in a simulation, unchanged, and do the same again with the same seed. tests/node/test_environment.py walks the sources.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass


def _unix_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class Environment:
    """`now_ms`: Unix time in milliseconds, which may leap. `rng`: keys, nonces and secret seeds are drawn from it, so outside a
    simulation it is the operating system's. `perf_counter`: seconds that only grow, to measure how long work takes. Deadlines are
    by trio's clock."""

    now_ms: Callable[[], int]
    rng: random.Random
    perf_counter: Callable[[], float]


SYSTEM = Environment(_unix_ms, random.SystemRandom(), time.perf_counter)
