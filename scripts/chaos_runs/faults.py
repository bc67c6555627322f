"""Which fault comes next, by a seed. Pure: when it strikes, and whom of those that are whole then, the run decides."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

KILL = "kill"
STOP = "stop"
DRAIN = "drain"
RESTART = "restart"
KINDS = (KILL, STOP, DRAIN, RESTART)
# How long a node is away. A stopped process keeps its connections open: some come back before anybody may give it up, some after.
AWAY_S = {KILL: (1.0, 8.0), STOP: (0.5, 15.0), DRAIN: (1.0, 6.0), RESTART: (0.0, 0.0)}
GAP_S = (0.5, 5.0)


@dataclass(frozen=True, slots=True)
class Fault:
    """`order`: all victims; the first that is whole is struck. `away_s`: until it is started or goes on. `gap_s`: from the fault
    before, at the least."""

    kind: str
    order: tuple[str, ...]
    away_s: float
    gap_s: float


def faults(seed: int, victims: Sequence[str]) -> Iterator[Fault]:
    """Faults without end. Every kind comes once in each four, in an order of its own, so that a short run meets all of them."""
    draw = random.Random(f"chaos {seed}")
    while True:
        for kind in draw.sample(KINDS, len(KINDS)):
            order = tuple(draw.sample(list(victims), len(victims)))
            yield Fault(kind, order, draw.uniform(*AWAY_S[kind]), draw.uniform(*GAP_S))
