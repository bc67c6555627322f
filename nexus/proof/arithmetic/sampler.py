"""The exact profile's sampler: the same logits, options, seed and step give the same token on every machine, as anyone can check.

Nothing here sums floats or calls a math library. Logits become integers in units of 2^-16, softmax weights integers in units of
2^-40 through the tables of exp(-x), and every share is compared as a product of integers.
`Sampling` is what a session asks for, in both profiles. docs/protocol.md says the same in words, for other implementations.

Repetition penalty: Keskar et al., "CTRL", 2019.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import ModelFormatError, NexusError, UsageError
from nexus.core.hashing import tagged_hash
from nexus.proof.arithmetic.bounds import VOCAB_MAX
from nexus.proof.receipts import (
    MICRO,
    REPETITION_PENALTY_MAX,
    REPETITION_PENALTY_MIN,
    TEMPERATURE_MAX,
    TOP_K_MAX,
    Terms,
    millionths,
    tokens_from_bytes,
)

SEED_MAX = 2**64 - 1
_FLOAT32_MAX = float(np.finfo(np.float32).max)
# exp(-i/8) and exp(-j/32768) in float64, i < 256, j < 4096: see nexus.proof.arithmetic.tables.
ExpTables = tuple[NDArray[np.float64], NDArray[np.float64]]

_ID_BITS = 22
_LOGIT_UNIT = 65536.0
WEIGHT_ONE = 1 << 40
# Of the temperature, above which a logit may lie below the highest and still weigh something: exp(-28.5) * 2^40 < 1/2.
_GAP_MAX = 29.0
# Gaps in units of 2^-16 stop here: times a million they fit an int64, and at the highest temperature the weight is 0 long before.
GAP_UNITS_MAX = float(1 << 42)
_EXP_INDEX_MAX = 254 << 12


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose. The options work in this order, each on what the one before left:

    `repetition_penalty` above 1 makes the session's earlier answer tokens less likely; 1 does nothing. `temperature` 0 is greedy.
    `top_k`: draw from so many of the likeliest tokens; 0 is all. `top_p` in (0, 1]: from the fewest likeliest that reach this
    share. `min_p` in [0, 1]: from those at least this times as likely as the likeliest. `seed`: 64 bits. `answered`: tokens of the
    answer that an earlier session chose: the draws go on where it stopped, and the penalty is for them too.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    answered: tuple[int, ...] = ()

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
            answered=tuple(tokens_from_bytes(terms.answered)),
        )


GREEDY = Sampling()


def not_a_number() -> NexusError:
    """The error of a model whose arithmetic ran into infinity."""
    return NexusError("the model computed something that is not a number", "Its weights do not work in this dtype; use float32")


def draw_bits(seed: int, step: int) -> int:
    """64 random bits as a number: the first 8 bytes of H("sample", seed, step), all little-endian."""
    digest = tagged_hash("sample", seed.to_bytes(8, "little"), step.to_bytes(8, "little"))
    return int.from_bytes(digest[:8], "little")


def penalised(logits: NDArray[np.float32], seen: Sequence[int], sampling: Sampling) -> NDArray[np.float32]:
    """The logits with those of `seen` and `answered` tokens divided by the repetition penalty where positive, multiplied by it
    where not.

    One float64 operation per logit, rounded to float32, so it is the same everywhere. The given logits stay as they are; they
    must be finite, and the result is.
    """
    penalty = millionths(sampling.repetition_penalty)
    if penalty == MICRO or not (seen or sampling.answered):
        return logits
    tokens = np.asarray([*sampling.answered, *seen], np.int64)
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


def sample_exact(logits: NDArray[np.float32], sampling: Sampling, step: int, tables: ExpTables, seen: Sequence[int] = ()) -> int:
    """The token id for pass number `step` of a session, from float32 logits [vocabulary].

    `tables`: exp(-i/8) float64 [256] and exp(-j/32768) float64 [4096]. `seen`: the token ids that the repetition penalty is for, in
    any order and number. Greedy takes the highest logit, the lowest id among equals. Raises NexusError where the logits are not
    finite, ModelFormatError for a vocabulary of more than VOCAB_MAX tokens.
    """
    if logits.dtype != np.float32 or logits.ndim != 1 or not len(logits):
        raise UsageError(f"logits are float32 [vocabulary], not {logits.dtype} {list(logits.shape)}")
    if len(logits) > VOCAB_MAX:
        raise ModelFormatError(f"the vocabulary has {len(logits)} tokens; the exact sampler takes {VOCAB_MAX}", "Use profile float")
    best = likeliest(logits)
    values = penalised(logits, seen, sampling)
    if millionths(sampling.temperature) == 0:
        return best if values is logits else likeliest(values)
    tokens, cumulative = candidates(values, sampling, tables)
    # The draw is uniform on [0, 2^64); its product with the total takes up to 126 bits, so it is Python's.
    point = (draw_bits(sampling.seed, len(sampling.answered) + step) * int(cumulative[-1])) >> 64
    return int(tokens[int(np.searchsorted(cumulative, point, side="right"))])


def candidates(logits: NDArray[np.float32], sampling: Sampling, tables: ExpTables) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The tokens that may be drawn, likeliest first (lower id first among equals), and the running sum of their weights.

    The temperature must be at least a millionth; the penalty is not applied. Weights are integers, 2^40 for the likeliest token;
    those that round to 0 may be left out or not, since they cannot be drawn.
    """
    top = float(logits.max())
    temperature = millionths(sampling.temperature)
    # A first cut by float comparison, for speed alone: rounded downwards, it only leaves out what weighs 0.
    with np.errstate(over="ignore"):  # below the lowest float32 is -inf, and nothing is left out
        least = np.nextafter(np.float32(top - 1 - _GAP_MAX * temperature / MICRO), np.float32(-np.inf))
    if 0 < sampling.top_k < len(logits):
        least = max(least, np.partition(logits, -sampling.top_k)[-sampling.top_k])
    tokens = ordered(logits, np.flatnonzero(logits >= least))[: sampling.top_k or None]
    weights = weights_of(logits[tokens], temperature, tables)
    cumulative = np.cumsum(weights)
    # The fewest that reach top_p of the total: sum * MICRO >= top_p * total, the product in Python's integers.
    needed = -(-millionths(sampling.top_p) * int(cumulative[-1]) // MICRO)
    by_share = int(np.searchsorted(cumulative, max(needed, 1))) + 1
    # Weights fall along the order. A weight times a million is below 2^60.
    by_least = int(np.count_nonzero(weights * MICRO >= millionths(sampling.min_p) * WEIGHT_ONE))
    count = min(by_share, by_least)
    return tokens[:count], cumulative[:count]


def ordered(logits: NDArray[np.float32], tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """`tokens` from the highest logit to the lowest, lower id first among equals.

    Sorts one integer per token, the logit's bits above the id: no two are equal, so any way of sorting gives the same.
    """
    # Adding 0 turns -0 into 0, which it equals.
    bits = (logits[tokens] + np.float32(0)).view(np.int32)
    # Of floats, positive ones are ordered as their bits are, negative ones the other way round.
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (~ascending).astype(np.int64)
    keys <<= _ID_BITS
    keys |= tokens
    keys.sort()
    keys &= VOCAB_MAX - 1
    return keys


def weights_of(logits: NDArray[np.float32], temperature: int, tables: ExpTables) -> NDArray[np.int64]:
    """Softmax weights in units of 2^-40 of the highest logit's, from logits with the highest first; `temperature` in millionths."""
    exp_hi, exp_lo = tables
    units = logits.astype(np.float64)
    units *= _LOGIT_UNIT
    np.rint(units, out=units)
    # Differences of whole numbers; the bound before the cast, whose result is not defined beyond int64.
    np.subtract(units[0], units, out=units)
    np.minimum(units, GAP_UNITS_MAX, out=units)
    index = units.astype(np.int64)
    # x = gap / 2^16 / (temperature / MICRO); the index is x * 2^15 to the nearest, half upwards.
    index *= MICRO
    index += temperature
    index //= 2 * temperature
    np.minimum(index, _EXP_INDEX_MAX, out=index)
    weights: NDArray[np.float64] = exp_hi[index >> 12]
    index &= 4095
    weights *= exp_lo[index]
    weights *= float(WEIGHT_ONE)
    np.rint(weights, out=weights)
    return weights.astype(np.int64)
