"""Proofs by Z3: a statement is proven when its negation has no model. What the solver cannot decide in its limits is not proven.

Z3 is imported when the first proof is made: the rest of the program does not pay for it. Everything here is over one context per
`Solver`, which belongs to one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nexus.core.errors import VerificationError

# Of one obligation. The first counts the solver's own steps, so that a proof does not depend on how busy a machine is; the second
# bounds the wait where steps are slow. None takes more than some hundred thousand steps, and a few milliseconds.
STEPS_MAX = 20_000_000
TIME_MAX_MS = 20_000

# Of what is true of Nexus itself, not of a plan or model.
RULE_FIX = "This is a mistake in Nexus: please report it"

# An expression of Z3, whose library has no types.
Term = Any


@dataclass(frozen=True, slots=True)
class Proven:
    """`name`: what `nexus judge` calls it. `statement`: in plain words. `value`, `limit`: the most that the proven quantity can be
    and what it stays below; both 0 where the statement is not about a size. `ms`: time that the solver took."""

    name: str
    statement: str
    value: int
    limit: int
    ms: float


class Disproven(VerificationError):
    """A statement has a counterexample: `example` gives its variables' values."""

    code = "disproven"

    def __init__(self, cause: str, fix: str = "", example: Mapping[str, str] | None = None) -> None:
        super().__init__(cause, fix)
        self.example = dict(example or {})


class Undecided(VerificationError):
    """The solver gave up. Nothing is known, and what is not proven does not run."""

    code = "undecided"


def _no_clock() -> float:
    return 0.0


class Solver:
    """Makes proofs. `clock`: seconds, for `Proven.ms`; without one it stays 0."""

    def __init__(self, clock: Callable[[], float] = _no_clock, steps_max: int = STEPS_MAX, time_max_ms: int = TIME_MAX_MS) -> None:
        self._clock = clock
        self._steps_max = steps_max
        self._time_max_ms = time_max_ms

    @cached_property
    def z3(self) -> Any:
        import z3  # type: ignore[import-untyped]

        return z3

    @cached_property
    def context(self) -> Any:
        return self.z3.Context()

    # Variables and the few operators that Python's own do not give.
    def real(self, name: str) -> Term:
        return self.z3.Real(name, self.context)

    def reals(self, names: str) -> list[Term]:
        return [self.real(name) for name in names.split()]

    def integer(self, name: str) -> Term:
        return self.z3.Int(name, self.context)

    def integers(self, names: str) -> list[Term]:
        return [self.integer(name) for name in names.split()]

    def bits(self, name: str, width: int) -> Term:
        return self.z3.BitVec(name, width, self.context)

    def number(self, value: int) -> Term:
        return self.z3.IntVal(value, self.context)

    def ratio(self, numerator: int, denominator: int) -> Term:
        return self.z3.Q(numerator, denominator, self.context)

    def is_whole(self, term: Term) -> Term:
        """Of a real."""
        return self.z3.IsInt(term)

    def all(self, *terms: Term) -> Term:
        return self.z3.And(*terms, self.z3.BoolVal(True, self.context))

    def any(self, *terms: Term) -> Term:
        return self.z3.Or(*terms, self.z3.BoolVal(False, self.context))

    def choose(self, condition: Term, then: Term, otherwise: Term) -> Term:
        return self.z3.If(condition, then, otherwise)

    def within(self, term: Term, most: Any) -> Term:
        """|term| <= most."""
        return self.all(term <= most, -term <= most)

    def prove(
        self,
        name: str,
        statement: str,
        obligations: Sequence[tuple[Sequence[Term], Term]],
        *,
        fix: str,
        value: int = 0,
        limit: int = 0,
        explain: Callable[[dict[str, str]], str] | None = None,
    ) -> Proven:
        """The statement, once every obligation (assumptions, claim) holds for all values of its variables.

        `explain` puts a counterexample into words. Raises Disproven, Undecided.
        """
        began_s = self._clock()
        for assumptions, claim in obligations:
            example = self._counterexample(name, assumptions, claim)
            if example is not None:
                told = explain(example) if explain else _listed(example)
                raise Disproven(f"{name} does not hold ({statement}): {told}", fix, example)
        return Proven(name, statement, value, limit, (self._clock() - began_s) * 1000)

    def _counterexample(self, name: str, assumptions: Sequence[Term], claim: Term) -> dict[str, str] | None:
        solver = self.z3.Solver(ctx=self.context)
        solver.set("rlimit", self._steps_max)
        solver.set("timeout", self._time_max_ms)
        solver.add(*assumptions)
        # Assumptions that contradict each other would prove anything.
        self._check(solver, name, self.z3.sat)
        solver.add(self.z3.Not(claim))
        if self._check(solver, name) == self.z3.unsat:
            return None
        model = solver.model()
        return {str(variable): str(model[variable]) for variable in model}

    def _check(self, solver: Any, name: str, wanted: Any = None) -> Any:
        found = solver.check()
        if found == self.z3.unknown:
            raise Undecided(
                f"{name}: the solver did not decide it ({solver.reason_unknown()})",
                "Try again on a machine with less to do; if it stays so, please report it with the model's shape",
            )
        if wanted is not None and found != wanted:
            raise Undecided(f"{name}: the assumptions of the proof exclude each other", RULE_FIX)
        return found

    def sum_stays_below(
        self,
        name: str,
        what: str,
        terms: int,
        worst: int,
        limit: int,
        term: Callable[[Solver], tuple[Term, Sequence[Term]]],
        fix: str,
    ) -> Proven:
        """That every sum of at most `terms` terms, in any order, is below `limit` in magnitude, by induction over their number.

        `term`: one term and the ranges of what it is made of; `worst`: the most that it can be. Over the reals, which takes in the
        integers.
        """
        one, ranges = term(self)
        total, next_one, count = self.reals("sum term terms")
        so_far = [count >= 0, count <= terms, self.within(total, count * worst)]
        return self.prove(
            name,
            f"{what} stay below {shown(limit)} in magnitude",
            [
                (ranges, self.within(one, worst)),
                ([*so_far, count + 1 <= terms, self.within(next_one, worst)], self.within(total + next_one, (count + 1) * worst)),
                (so_far, self.all(total < limit, -total < limit)),
            ],
            fix=fix,
            value=terms * worst,
            limit=limit,
            explain=lambda example: (
                f"{terms:,} terms of up to {worst:,} reach {terms * worst:,}" if "terms" in example else _listed(example)
            ),
        )


def shown(number: int) -> str:
    """For people: powers of two as such."""
    return f"2^{number.bit_length() - 1}" if number > 1024 and not number & (number - 1) else f"{number:,}"


def _listed(example: Mapping[str, str]) -> str:
    return "for example " + ", ".join(f"{name} = {shown}" for name, shown in sorted(example.items()))
