"""Choosing the next token from logits so that anyone can repeat the draw: the only randomness is a hash of (seed, step).

Top-p: Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import NexusError, UsageError
from nexus.core.hashing import tagged_hash

SEED_MAX = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Sampling:
    """`temperature` 0 is greedy. `top_p` in (0, 1]: draw from the fewest likeliest tokens that reach it. `seed`: 64 bits."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(
                f"the temperature {self.temperature} is not a number from 0 up", "Use 0 for greedy, about 0.7 for variety"
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p} is not in (0, 1]", "Use 1 to draw from all tokens")
        if not 0 <= self.seed <= SEED_MAX:
            raise UsageError(f"the seed {self.seed} is not an unsigned 64-bit number", "Use a number from 0 to 2**64 - 1")


GREEDY = Sampling()


def not_a_number() -> NexusError:
    """The error of a model whose arithmetic ran into infinity."""
    return NexusError("the model computed something that is not a number", "Its weights do not work in this dtype; use float32")


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) with 53 random bits: H("sample", seed, step), both as 8 bytes little-endian."""
    digest = tagged_hash("sample", seed.to_bytes(8, "little"), step.to_bytes(8, "little"))
    return (int.from_bytes(digest[:8], "little") >> 11) * 2.0**-53


def nucleus(logits: NDArray[np.float32], sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that may be drawn, likeliest first (lower id first among equals), and their cumulative probabilities, the last
    of which is the mass of the nucleus (not rescaled to 1). `sampling.temperature` must not be 0."""
    scaled = logits.astype(np.float64)
    scaled -= scaled.max()
    # A temperature near 0 may overflow to -inf here, which exp turns into the 0 that it should be.
    with np.errstate(over="ignore"):
        scaled /= sampling.temperature
    weights = np.exp(scaled)
    order = np.argsort(-logits, kind="stable")
    cumulative = np.cumsum(weights[order])
    cumulative /= cumulative[-1]
    count = min(int(np.searchsorted(cumulative, sampling.top_p)) + 1, len(order))
    return order[:count], cumulative[:count]


def sample(logits: NDArray[np.float32], sampling: Sampling, step: int) -> int:
    """The token id for pass number `step` of a session, from float32 logits [vocabulary].

    Greedy takes the highest logit, the lowest id among equals. Otherwise: softmax in float64, top-p, and the inverse of the
    cumulative distribution at `uniform(seed, step)`.
    """
    best = int(logits.argmax())
    if not math.isfinite(float(logits[best])):
        # argmax finds a NaN before anything else, and +inf before anything finite.
        raise not_a_number()
    if sampling.temperature == 0:
        return best
    tokens, cumulative = nucleus(logits, sampling)
    drawn = int(np.searchsorted(cumulative, uniform(sampling.seed, step) * cumulative[-1], side="right"))
    return int(tokens[min(drawn, len(tokens) - 1)])
