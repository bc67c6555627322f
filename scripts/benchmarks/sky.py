"""What one signature of the sky costs: Nexus's kernel, skyfield over whole batches, skyfield one by one. Same inputs, in turns.

Times are spread over a week and places over the globe; everything is warm. A part of `scripts/bench blocks`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import numpy as np

from nexus.memory.sky.kernel import SkyKernel
from nexus.memory.sky.reference import SkyReference
from nexus.memory.sky.tables import DAY_MS
from nexus.storage.sky_tables import load_sky_kernel, load_sky_reference

START_MS = 1_763_600_000_000
SPREAD_MS = 7 * DAY_MS
# Skyfield takes 2 GB over 100,000 blocks at once, and more time than in pieces.
SKYFIELD_CHUNK = 2048
SIZES = (1024, 8192)
SCALARS = 64


def measure(rounds: int = 7, sizes: tuple[int, ...] = SIZES, scalars: int = SCALARS) -> dict[str, object]:
    """By batch size: microseconds per block of each side, the ratios, and the largest difference in units of 1e-9."""
    kernel, reference = load_sky_kernel(), load_sky_reference()
    return {f"batch_{count}": _measure(kernel, reference, count, rounds, scalars) for count in sizes}


def _measure(kernel: SkyKernel, reference: SkyReference, count: int, rounds: int, scalars: int) -> dict[str, float]:
    random = np.random.default_rng(count)
    t_ms = START_MS + random.integers(0, SPREAD_MS, count)
    latitude = np.degrees(np.arcsin(random.uniform(-1, 1, count)))
    longitude = random.uniform(-180, 180, count)
    found = kernel.signatures(t_ms, latitude, longitude)
    pieces = [slice(at, at + SKYFIELD_CHUNK) for at in range(0, count, SKYFIELD_CHUNK)]
    few = list(zip(t_ms.tolist(), latitude.tolist(), longitude.tolist(), strict=True))[:scalars]
    repeats = max(1, 16_384 // count)

    def ours() -> None:
        for _ in range(repeats):
            kernel.check(t_ms, latitude, longitude, found)

    def vectorised() -> None:
        for at in pieces:
            reference.vectors(t_ms[at], latitude[at], longitude[at])

    def scalar() -> None:
        for one in few:
            reference.vectors(*one)

    sides = ((ours, count * repeats), (vectorised, count), (scalar, len(few)))
    taken = [[_us(work) / blocks for work, blocks in sides] for _ in range(rounds)]
    kernel_us, vectorised_us, scalar_us = (median(side) for side in zip(*taken, strict=True))
    expected = np.concatenate([reference.vectors(t_ms[at], latitude[at], longitude[at]) for at in pieces])
    return {
        "kernel_us": round(kernel_us, 3),
        "skyfield_vectorised_us": round(vectorised_us, 1),
        "skyfield_scalar_us": round(scalar_us),
        "over_vectorised": round(median(row[1] / row[0] for row in taken), 1),
        "over_scalar": round(median(row[2] / row[0] for row in taken)),
        "difference_max": round(float(np.abs(found - expected).max()), 3),
    }


def _us(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1e6
