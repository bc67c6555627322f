"""How large the integer sums of a model get at most, from its shape alone (docs/exact.md, "Bounds").

A sum that fits is the same in any order and on any machine. A shape that could overflow is refused before anything is converted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from nexus.core.errors import ModelFormatError

if TYPE_CHECKING:
    from nexus.proof.arithmetic.plan import ExactPlan

# What to do about a model that the exact profile does not cover.
FLOAT_FIX = "Add it with --profile float"

INT32_LIMIT = 1 << 31
# Up to here float64 holds every integer.
FLOAT64_LIMIT = 1 << 53
# Weights; bytes of activations, the low one of two included; 16-bit values; fixed-point values; shares of attention; e^x.
WEIGHT_MAX = 127
BYTE_MAX = 128
WIDE_MAX = 32512
FIXED_MAX = 1 << 19
SHARE_MAX = 32767
EXP_MAX = 1 << 24
# Sixteen times the longest known, and still tables of rotary angles that are made in a minute.
CONTEXT_MAX = 1 << 24
# The sampler sums that many weights of at most 2^40: at most 2^62, which an int64 holds.
VOCAB_MAX = 1 << 22


@dataclass(frozen=True, slots=True)
class Bound:
    """The largest magnitude that a sum can reach, and what it must stay below."""

    value: int
    limit: int

    @property
    def holds(self) -> bool:
        return self.value < self.limit


def bounds_of(plan: ExactPlan) -> dict[str, Bound]:
    """Every sum of a model: of each linear operation, of scores (of 8 and of 16 bits), norms, attention and pooling."""
    linears = {name: depth for name, (_, depth) in plan.linear_shapes().items()} | ({"head": plan.hidden} if plan.causal else {})
    bounds = {name: Bound(depth * BYTE_MAX * WEIGHT_MAX, INT32_LIMIT) for name, depth in linears.items()}
    bounds["scores"] = Bound(plan.head_dim * BYTE_MAX * WEIGHT_MAX, INT32_LIMIT)
    bounds["scores_wide"] = Bound(plan.head_dim * WIDE_MAX * WIDE_MAX, FLOAT64_LIMIT)
    bounds["norm"] = Bound(max(plan.hidden, plan.head_dim) * FIXED_MAX * FIXED_MAX, FLOAT64_LIMIT)
    bounds["attention_values"] = Bound(plan.context * SHARE_MAX * WEIGHT_MAX, FLOAT64_LIMIT)
    bounds["attention_weights"] = Bound(plan.context * EXP_MAX, FLOAT64_LIMIT)
    if not plan.causal:
        bounds["pooling"] = Bound(plan.context * FIXED_MAX, FLOAT64_LIMIT)
    return bounds


def check_bounds(plan: ExactPlan) -> dict[str, int]:
    """The bounds' values by name, as they stand in exact.json. Raises ModelFormatError for a shape that could overflow."""
    if plan.context > CONTEXT_MAX:
        raise ModelFormatError(f"the exact profile does not cover contexts of {plan.context} tokens", FLOAT_FIX)
    bounds = bounds_of(plan)
    for name, bound in bounds.items():
        if not bound.holds:
            raise ModelFormatError(
                f"a model of this shape could overflow: the sums of {name} reach {bound.value}, and {bound.limit} is too much",
                FLOAT_FIX,
            )
    return {name: bound.value for name, bound in bounds.items()}
