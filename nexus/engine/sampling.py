"""Choosing the next token from logits so that anyone can repeat the draw: the only randomness is a hash of (seed, step).

This is the float profile's way. `nexus.proof.arithmetic.sampler` has `Sampling`, what a session asks for in both profiles, and the
exact profile's way, which gives the same token on every machine.

Top-p: Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020. Min-p: Nguyen et al., "Turning Up the Heat",
ICLR 2025. Repetition penalty: Keskar et al., "CTRL", 2019.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nexus.proof.arithmetic.sampler import Sampling, draw_bits, likeliest, penalised


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) with 53 random bits."""
    return (draw_bits(seed, step) >> 11) * 2.0**-53


def nucleus(logits: NDArray[np.float32], sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that may be drawn, likeliest first (lower id first among equals), and their cumulative probabilities, the last
    of which is the mass of the nucleus (not rescaled to 1). `sampling.temperature` must not be 0; the penalty is not applied."""
    scaled = logits.astype(np.float64)
    scaled -= scaled.max()
    # A temperature near 0 may overflow to -inf here, which exp turns into the 0 that it should be.
    with np.errstate(over="ignore"):
        scaled /= sampling.temperature
    order = np.argsort(-logits, kind="stable")[: sampling.top_k or None]
    weights = np.exp(scaled[order])
    cumulative = np.cumsum(weights)
    cumulative /= cumulative[-1]
    by_share = int(np.searchsorted(cumulative, sampling.top_p)) + 1
    # Weights fall along the order, and the first is 1.
    by_least = int(np.count_nonzero(weights >= sampling.min_p))
    count = min(by_share, by_least, len(order))
    return order[:count], cumulative[:count]


def sample(logits: NDArray[np.float32], sampling: Sampling, step: int, seen: Sequence[int] = ()) -> int:
    """The token id for pass number `step` of a session, from float32 logits [vocabulary]; `seen`: what the penalty is for.

    Greedy takes the highest logit, the lowest id among equals. Otherwise: softmax in float64, the options in the order that
    `Sampling` gives, and the inverse of the cumulative distribution at `uniform(seed, step)`.
    """
    best = likeliest(logits)
    values = penalised(logits, seen, sampling)
    if sampling.temperature == 0:
        return best if values is logits else likeliest(values)
    tokens, cumulative = nucleus(values, sampling)
    drawn = int(np.searchsorted(cumulative, uniform(sampling.seed, len(sampling.answered) + step) * cumulative[-1], side="right"))
    return int(tokens[min(drawn, len(tokens) - 1)])
