"""What this machine computes, measured in milliseconds and without torch: a node that serves nothing never pays for that.

One session decodes a row at a time, and every row reads every weight once: what is measured is a row times a matrix that is larger
than the caches of one core.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_ROWS = _DEPTH = 1024
_ROUNDS = 9


@dataclass(frozen=True, slots=True)
class Speeds:
    """Millions of multiply-adds per second while one session decodes."""

    exact: int
    float: int


def measure_speeds(perf_counter: Callable[[], float] = time.perf_counter) -> Speeds:
    """Now, with whatever else runs on this machine."""
    weight, row = np.ones((_ROWS, _DEPTH), np.float32), np.ones(_DEPTH, np.float32)
    rates = []
    for _ in range(_ROUNDS):
        began = perf_counter()
        weight @ row
        rates.append(weight.size / (perf_counter() - began))
    rate = max(1, round(sorted(rates)[_ROUNDS // 2] / 1e6))
    return Speeds(exact=rate, float=rate)
