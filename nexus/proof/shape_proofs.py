"""What the judge proves of a model's shape: no integer of docs/exact.md leaves the width it is kept in, for any weights and inputs;
and what follows for Freivalds' check of its products."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nexus.core.errors import VerificationError
from nexus.proof.arithmetic.bounds import (
    BYTE_MAX,
    CONTEXT_MAX,
    EXP_MAX,
    FIXED_MAX,
    FLOAT64_LIMIT,
    FLOAT_FIX,
    INT32_LIMIT,
    SHARE_MAX,
    VOCAB_MAX,
    WEIGHT_MAX,
    WIDE_MAX,
)
from nexus.proof.arithmetic.plan import HEAD_OP, ExactPlan
from nexus.proof.arithmetic.sampler import GAP_UNITS_MAX, WEIGHT_ONE
from nexus.proof.freivalds import KEYS
from nexus.proof.receipts import MICRO, TEMPERATURE_MAX
from nexus.proof.solver import RULE_FIX, Proven, Solver, Term
from nexus.proof.trace import ATTENTION

INT64_LIMIT = 1 << 63
# Half a unit in the last place of float32, relative; and what a result below the normal range is off by at most.
FLOAT32_ROUND, FLOAT32_TINY = 1 << 24, 1 << 149


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model its bounds depend on. `linears`: (name, depth). `wide`: whether a linear operation is 16 bits wide."""

    linears: tuple[tuple[str, int], ...]
    norm_size: int
    head_dim: int
    context: int
    vocab: int
    causal: bool
    wide: bool
    wide_attention: bool

    @classmethod
    def of(cls, plan: ExactPlan) -> Shape:
        linears = [(name, depth) for name, (_, depth) in plan.linear_shapes().items()]
        if plan.causal:
            linears.append((HEAD_OP, plan.hidden))
        wide = plan.wide_ops()
        return cls(
            linears=tuple(linears),
            norm_size=max(plan.hidden, plan.head_dim),
            head_dim=plan.head_dim,
            context=plan.context,
            vocab=plan.vocab,
            causal=plan.causal,
            wide=any(layers for op, layers in wide.items() if op != ATTENTION),
            wide_attention=bool(wide[ATTENTION]),
        )


def shape_proofs(solver: Solver, shape: Shape) -> tuple[Proven, ...]:
    """Every bound of docs/exact.md for this shape. Raises VerificationError that names the one that does not hold."""
    proofs = prove_integers(solver, wide=shape.wide or shape.wide_attention)
    proofs += [
        products(solver, f"linear.{name}", f"the sums of {name}, of {depth:,} products,", depth, BYTE_MAX, WEIGHT_MAX, INT32_LIMIT)
        for name, depth in shape.linears
    ]
    deepest = max(depth for _, depth in shape.linears)
    if shape.wide:
        proofs.append(prove_recombination(solver, deepest))
    proofs += prove_attention(solver, shape)
    proofs += prove_norms(solver, shape.norm_size)
    proofs.append(prove_difference(solver, deepest))
    proofs += prove_sampler(solver, shape.vocab) if shape.causal else prove_pooling(solver, shape.context)
    return tuple(proofs)


def products(solver: Solver, name: str, what: str, terms: int, left: int, right: int, limit: int) -> Proven:
    """Sums of `terms` products of two numbers, of at most `left` and `right` in magnitude."""

    def term(solver: Solver) -> tuple[Term, list[Term]]:
        one, other = solver.reals("left right")
        return one * other, [solver.within(one, left), solver.within(other, right)]

    return solver.sum_stays_below(name, what, terms, left * right, limit, term, FLOAT_FIX)


def prove_integers(solver: Solver, *, wide: bool) -> list[Proven]:
    """The rounding of a row to integers, with every float operation as inexact as IEEE 754 allows, stays in its range."""
    proofs = [_prove_rounding(solver, "integers.narrow", WEIGHT_MAX)]
    if not wide:
        return proofs
    value, high, low = solver.integers("value high low")
    halves = [solver.within(value, WIDE_MAX), high == (value + 128) / 256, low == value - 256 * high]
    return [
        *proofs,
        _prove_rounding(solver, "integers.wide", WIDE_MAX),
        solver.prove(
            "integers.halves",
            f"both halves of a 16-bit integer are bytes, and of the high one the magnitude is at most {WEIGHT_MAX}",
            [(halves, solver.all(solver.within(high, WEIGHT_MAX), low >= -BYTE_MAX, low < BYTE_MAX))],
            fix=RULE_FIX,
            value=BYTE_MAX,
            limit=BYTE_MAX + 1,
        ),
    ]


def _prove_rounding(solver: Solver, name: str, most: int) -> Proven:
    """rint(x * (most / a)) for |x| <= a: two float32 operations, each off by half a unit in the last place, then to the nearest."""
    share, first, second, third, product, rounded = solver.reals("share first second third product rounded")
    half = solver.ratio(1, 2)
    errors = [solver.within(error, solver.ratio(1, FLOAT32_ROUND)) for error in (first, second)]
    return solver.prove(
        name,
        f"a row's integers are at most {most:,} in magnitude",
        [
            (
                [
                    solver.within(share, 1),
                    *errors,
                    solver.within(third, solver.ratio(1, FLOAT32_TINY)),
                    product == most * share * (1 + first) * (1 + second) + third,
                ],
                solver.within(product, most + solver.ratio(1, 4)),
            ),
            # To the nearest: an integer that is at most a half away from less than most + 1/2.
            (
                [
                    solver.within(product, most + solver.ratio(1, 4)),
                    solver.within(rounded - product, half),
                    solver.is_whole(rounded),
                ],
                solver.within(rounded, most),
            ),
        ],
        fix=RULE_FIX,
        value=most,
        limit=most + 1,
    )


def prove_recombination(solver: Solver, depth: int) -> Proven:
    """256 * hi + lo of two sums: exact in float64 at every step."""
    high, low = solver.reals("high low")
    most = depth * BYTE_MAX * WEIGHT_MAX
    steps = [below(solver, term, FLOAT64_LIMIT) for term in (256 * high, 256 * high + low)]
    return solver.prove(
        "linear.wide",
        "the sums of 16-bit activations are whole numbers that float64 holds",
        [([solver.within(high, most), solver.within(low, most)], solver.all(*steps))],
        fix=FLOAT_FIX,
        value=257 * most,
        limit=FLOAT64_LIMIT,
        explain=lambda example: f"they reach {257 * most:,}",
    )


def below(solver: Solver, term: Term, limit: int) -> Term:
    return solver.all(term < limit, -term < limit)


def prove_attention(solver: Solver, shape: Shape) -> list[Proven]:
    """Scores, the sum of the weights, and the weighted sums of values over as many positions as the context has."""
    proofs = [products(solver, "attention.scores", "the scores", shape.head_dim, BYTE_MAX, WEIGHT_MAX, INT32_LIMIT)]
    if shape.wide_attention:
        proofs.append(
            products(solver, "attention.scores-wide", "the scores of 16 bits", shape.head_dim, WIDE_MAX, WIDE_MAX, FLOAT64_LIMIT)
        )
    context = shape.context
    if context > CONTEXT_MAX:
        raise VerificationError(
            f"attention.weights: a context of {context:,} tokens is beyond the {CONTEXT_MAX:,} that the exact profile covers",
            FLOAT_FIX,
        )

    def weight(solver: Solver) -> tuple[Term, list[Term]]:
        one = solver.real("weight")
        return one, [one >= 0, one <= EXP_MAX]

    rest, total = solver.reals("rest total")
    return [
        *proofs,
        solver.sum_stays_below(
            "attention.weights",
            f"the sums of weights over {context:,} positions",
            context,
            EXP_MAX,
            FLOAT64_LIMIT,
            weight,
            FLOAT_FIX,
        ),
        solver.prove(
            "attention.divisor",
            "attention never divides by zero: the likeliest position alone weighs 2^24",
            [([rest >= 0, total == rest + EXP_MAX], total > 0)],
            fix=RULE_FIX,
        ),
        products(
            solver,
            "attention.values",
            f"the weighted sums of values over {context:,} positions",
            context,
            SHARE_MAX,
            WEIGHT_MAX,
            FLOAT64_LIMIT,
        ),
    ]


def prove_norms(solver: Solver, size: int) -> list[Proven]:
    """Fixed point of a row, v = rint(x * 2^(19-e)) with |x| < 2^e; its sum, and its sum of squares."""
    scaled, value = solver.reals("scaled value")
    near = [scaled >= 0, scaled < FIXED_MAX, solver.within(value - scaled, solver.ratio(1, 2)), solver.is_whole(value)]
    return [
        solver.prove(
            "norm.fixed",
            f"the fixed-point values of a row are at most {FIXED_MAX:,}",
            [(near, value <= FIXED_MAX)],
            fix=RULE_FIX,
            value=FIXED_MAX,
            limit=FIXED_MAX + 1,
        ),
        solver.sum_stays_below("norm.sum", f"the sums of {size:,} values", size, FIXED_MAX, FLOAT64_LIMIT, fixed_value, FLOAT_FIX),
        solver.sum_stays_below(
            "norm.squares", f"the sums of {size:,} squares", size, FIXED_MAX * FIXED_MAX, FLOAT64_LIMIT, square, FLOAT_FIX
        ),
    ]


def fixed_value(solver: Solver) -> tuple[Term, list[Term]]:
    value = solver.real("value")
    return value, [solver.within(value, FIXED_MAX)]


def square(solver: Solver) -> tuple[Term, list[Term]]:
    value = solver.real("value")
    return value * value, [solver.within(value, FIXED_MAX)]


def prove_pooling(solver: Solver, context: int) -> list[Proven]:
    return [
        solver.sum_stays_below(
            "pooling", f"the sums over {context:,} tokens", context, FIXED_MAX, FLOAT64_LIMIT, fixed_value, FLOAT_FIX
        )
    ]


def prove_sampler(solver: Solver, vocab: int) -> list[Proven]:
    """The exact sampler's integers (docs/protocol.md) in int64."""
    gap, temperature, weight, share = solver.reals("gap temperature weight share")
    gaps = [gap >= 0, gap <= int(GAP_UNITS_MAX), temperature >= 1, temperature <= TEMPERATURE_MAX * MICRO]
    indexed = int(GAP_UNITS_MAX) * MICRO + TEMPERATURE_MAX * MICRO
    logit, token = solver.integers("logit token")
    keys = [logit >= -INT32_LIMIT, logit < INT32_LIMIT, token >= 0, token < vocab]

    def one(solver: Solver) -> tuple[Term, list[Term]]:
        term = solver.real("weight")
        return term, [term >= 0, term <= WEIGHT_ONE]

    return [
        solver.prove(
            "sampler.gaps",
            "the distances of logits, times a million, are numbers that int64 holds",
            [(gaps, solver.all(gap * MICRO + temperature <= indexed, 2 * temperature < INT64_LIMIT, gap * MICRO < INT64_LIMIT))],
            fix=RULE_FIX,
            value=indexed,
            limit=INT64_LIMIT,
        ),
        solver.sum_stays_below(
            "sampler.weights", f"the sums of weights of {vocab:,} tokens", vocab, WEIGHT_ONE, INT64_LIMIT, one, FLOAT_FIX
        ),
        solver.prove(
            "sampler.shares",
            "a weight times a million is a number that int64 holds",
            [
                (
                    [weight >= 0, weight <= WEIGHT_ONE, share >= 0, share <= MICRO],
                    solver.all(weight * MICRO < INT64_LIMIT, share * WEIGHT_ONE < INT64_LIMIT),
                )
            ],
            fix=RULE_FIX,
            value=WEIGHT_ONE * MICRO,
            limit=INT64_LIMIT,
        ),
        solver.prove(
            "sampler.order",
            "a token's number fits below its logit in the integer that is sorted",
            [(keys, solver.all(solver.within(logit * VOCAB_MAX + token, INT32_LIMIT * VOCAB_MAX), token < VOCAB_MAX))],
            fix=FLOAT_FIX,
            value=INT32_LIMIT * VOCAB_MAX,
            limit=INT64_LIMIT,
        ),
    ]


# --- Freivalds' check -------------------------------------------------------------------------------------------------------

# Of the ring that is computed in, and of a key's numbers; and the small rings in which every case is looked at.
RING_BITS, KEY_BITS = 64, 32
SMALL_RINGS = (6, 8, 10)


def prove_difference(solver: Solver, depth: int) -> Proven:
    """Claimed sums are held to int32; the right ones stay within this model's bound."""
    claimed, right = solver.reals("claimed right")
    most = depth * BYTE_MAX * WEIGHT_MAX
    facts = [claimed >= -INT32_LIMIT, claimed < INT32_LIMIT, solver.within(right, most)]
    difference = claimed - right
    return solver.prove(
        "freivalds.difference",
        "a wrong sum differs from the right one by less than 2^32",
        [(facts, solver.all(difference < 2 * INT32_LIMIT, -difference < 2 * INT32_LIMIT))],
        fix=FLOAT_FIX,
        value=INT32_LIMIT + most,
        limit=2 * INT32_LIMIT,
    )


def freivalds_proofs(solver: Solver) -> tuple[Proven, ...]:
    return (prove_freivalds(solver), prove_miss(solver))


def prove_freivalds(solver: Solver, rings: Sequence[int] = SMALL_RINGS, longer: int = 0) -> Proven:
    """In the ring of n bits, a difference below 2^(n/2) and a key's number of n/2 bits: whatever the other sums add, `rest`, no two
    values of the number miss it. `longer`: the same of numbers that are so many bits longer, for tests."""
    obligations = []
    for bits in rings:
        one, other, difference, rest = (solver.bits(f"{name}{bits}", bits) for name in ("one", "other", "difference", "rest"))
        half = 1 << bits // 2
        short = [solver.z3.ULT(term, half << longer) for term in (one, other)]
        missed = [term * difference + rest == 0 for term in (one, other)]
        obligations.append(([difference != 0, difference < half, difference > -half, *short, *missed], one == other))
    listed = ", ".join(str(bits) for bits in rings)
    return solver.prove(
        "freivalds.rings",
        f"mod 2^n, n = {listed}: of a key's numbers of n/2 bits at most one misses a difference below 2^(n/2)",
        obligations,
        fix=RULE_FIX,
    )


def prove_miss(solver: Solver) -> Proven:
    """The same in 64 bits, where not every case can be looked at. If two numbers miss, the product of their distance and the sums'
    difference is a multiple of 2^64, and is too small to be one but 0."""
    apart, difference, product = solver.reals("apart difference product")
    multiple = solver.integer("multiple")
    most = (1 << KEY_BITS) - 1
    within = [solver.within(apart, most), solver.within(difference, 2 * INT32_LIMIT - 1)]
    ring = 1 << RING_BITS
    # Whole numbers: a multiple that is not 0 is at least 1 in magnitude.
    whole = [product == ring * solver.z3.ToReal(multiple), product < ring, -product < ring]
    return solver.prove(
        "freivalds.miss",
        f"mod 2^64 at most one of 2^{KEY_BITS} numbers misses a wrong sum, so all {KEYS} keys do for one in 2^{KEYS * KEY_BITS}",
        [
            (within, solver.all(apart * difference < ring, -(apart * difference) < ring)),
            (whole, product == 0),
            ([difference != 0, apart * difference == 0], apart == 0),
        ],
        fix=RULE_FIX,
    )
