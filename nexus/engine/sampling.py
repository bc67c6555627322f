"""Choosing the next token from logits so that anyone can repeat the draw: the only randomness is a hash of (seed, step).

`Sampling` is what a session asks for, in both profiles. `sample` is the float profile's; `nexus.engine.exact.sampler` does the same
in arithmetic that gives the same token on every machine.

Top-p: Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020. Min-p: Nguyen et al., "Turning Up the Heat",
ICLR 2025. Repetition penalty: Keskar et al., "CTRL", 2019.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import NexusError, UsageError
from nexus.core.hashing import tagged_hash
from nexus.proof.receipts import (
    MICRO,
    REPETITION_PENALTY_MAX,
    REPETITION_PENALTY_MIN,
    TEMPERATURE_MAX,
    TOP_K_MAX,
    Terms,
    millionths,
)

SEED_MAX = 2**64 - 1
_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose. The options work in this order, each on what the one before left:

    `repetition_penalty` above 1 makes the session's earlier answer tokens less likely; 1 does nothing. `temperature` 0 is greedy.
    `top_k`: draw from so many of the likeliest tokens; 0 is all. `top_p` in (0, 1]: from the fewest likeliest that reach this
    share. `min_p` in [0, 1]: from those at least this times as likely as the likeliest. `seed`: 64 bits.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= TEMPERATURE_MAX:
            raise UsageError(
                f"the temperature {self.temperature} is not from 0 to {TEMPERATURE_MAX}", "Use 0 for greedy, about 0.7 for variety"
            )
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p} is not in (0, 1]", "Use 1 to draw from all tokens")
        if not 0 <= self.seed <= SEED_MAX:
            raise UsageError(f"the seed {self.seed} is not an unsigned 64-bit number", "Use a number from 0 to 2**64 - 1")
        if not 0 <= self.top_k <= TOP_K_MAX:
            raise UsageError(f"top_k {self.top_k} is not from 0 to {TOP_K_MAX}", "Use 0 to draw from all tokens")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p {self.min_p} is not in [0, 1]", "Use 0 to draw from all tokens")
        if not REPETITION_PENALTY_MIN <= self.repetition_penalty <= REPETITION_PENALTY_MAX:
            raise UsageError(
                f"the repetition penalty {self.repetition_penalty} is out of range",
                f"Use {REPETITION_PENALTY_MIN} to {REPETITION_PENALTY_MAX}: 1 for none, about 1.1 against repetition",
            )

    @classmethod
    def of(cls, terms: Terms) -> Sampling:
        """What a session's terms ask for. Division by a million and `millionths` undo each other."""
        return cls(
            temperature=terms.temperature / MICRO,
            top_p=terms.top_p / MICRO,
            seed=terms.seed,
            top_k=terms.top_k,
            min_p=terms.min_p / MICRO,
            repetition_penalty=terms.repetition_penalty / MICRO,
        )


GREEDY = Sampling()


def not_a_number() -> NexusError:
    """The error of a model whose arithmetic ran into infinity."""
    return NexusError("the model computed something that is not a number", "Its weights do not work in this dtype; use float32")


def draw_bits(seed: int, step: int) -> int:
    """64 random bits as a number: the first 8 bytes of H("sample", seed, step), all little-endian."""
    digest = tagged_hash("sample", seed.to_bytes(8, "little"), step.to_bytes(8, "little"))
    return int.from_bytes(digest[:8], "little")


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) with 53 random bits."""
    return (draw_bits(seed, step) >> 11) * 2.0**-53


def penalised(logits: NDArray[np.float32], seen: Sequence[int], sampling: Sampling) -> NDArray[np.float32]:
    """The logits with those of `seen` tokens divided by the repetition penalty where positive, multiplied by it where not.

    One float64 operation per logit, rounded to float32, so it is the same everywhere. The given logits stay as they are; they
    must be finite, and the result is.
    """
    penalty = millionths(sampling.repetition_penalty)
    if penalty == MICRO or not seen:
        return logits
    tokens = np.asarray(seen, np.int64)
    factor = penalty / MICRO
    before = logits[tokens].astype(np.float64)
    after = np.where(before > 0, before / factor, before * factor)
    values = logits.copy()
    values[tokens] = np.clip(after, -_FLOAT32_MAX, _FLOAT32_MAX)
    return values


def likeliest(logits: NDArray[np.float32]) -> int:
    """The token of the highest logit, the lowest id among equals. Raises NexusError for logits that are not finite."""
    best = int(logits.argmax())
    # argmax finds a NaN before anything else, and +inf before anything finite.
    if not math.isfinite(logits[best]):
        raise not_a_number()
    return best


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
    drawn = int(np.searchsorted(cumulative, uniform(sampling.seed, step) * cumulative[-1], side="right"))
    return int(tokens[min(drawn, len(tokens) - 1)])
