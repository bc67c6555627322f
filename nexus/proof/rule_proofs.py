"""What the judge proves of the rules that all nodes follow: slashing, quorums, the ledger.

The rules are stated here once more, over terms that stand for any numbers; tests hold `nexus.swarm.ledger` and
`nexus.swarm.standing` to the same on numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nexus.core.plan import STAGES_MAX
from nexus.proof.accounts import AMOUNT_MAX, STAGES_PERCENT
from nexus.proof.solver import RULE_FIX, Proven, Solver, Term


def rule_proofs(solver: Solver) -> tuple[Proven, ...]:
    return (prove_order(solver, slash), prove_merge(solver), prove_quorums(solver), *prove_ledger(solver))


def slash(solver: Solver, bond: Term, evidence: Term) -> Term:
    """What is left of a bond when evidence came: nothing. `evidence`: how grave it is, 0 for one against somebody else."""
    return solver.choose(evidence == 0, bond, solver.number(0))


GRAVITY_MAX = 100
Fine = Callable[[Solver, Term, Term], Term]


def prove_order(solver: Solver, fine: Fine) -> Proven:
    """Two evidences leave the same bond whichever comes first, one that comes twice changes nothing, no bond falls below zero."""
    bond, first, second = solver.integers("bond first second")
    given = [bond >= 0, *(term >= 0 for term in (first, second)), *(term <= GRAVITY_MAX for term in (first, second))]
    after_first, after_both = fine(solver, bond, first), fine(solver, fine(solver, bond, first), second)
    return solver.prove(
        "slashing.order",
        "evidence leaves the same bond in any order and however often it comes, and never less than nothing",
        [
            (given, after_both == fine(solver, fine(solver, bond, second), first)),
            (given, fine(solver, after_first, first) == after_first),
            (given, solver.all(after_first >= 0, after_first <= bond)),
        ],
        fix=RULE_FIX,
    )


# Evidence ids are numbers below this; of a node that none is known against it stands for "none".
NOTHING = 1 << 256


def prove_merge(solver: Solver) -> Proven:
    """Merging slashed sets keeps the least evidence id per node: whatever order and however often nodes tell each other, they end
    with the same set, and nobody is ever taken out."""
    one, other, third = solver.integers("one other third")
    known = [solver.all(term >= 0, term <= NOTHING) for term in (one, other, third)]

    def merged(left: Term, right: Term) -> Term:
        return solver.choose(left < right, left, right)

    return solver.prove(
        "slashing.merge",
        "nodes that heard of the same evidence have the same slashed set, and nobody leaves it",
        [
            (known, merged(one, other) == merged(other, one)),
            (known, merged(merged(one, other), third) == merged(one, merged(other, third))),
            (known, merged(one, one) == one),
            ([*known, one < NOTHING], merged(one, other) < NOTHING),
        ],
        fix=RULE_FIX,
    )


def prove_quorums(solver: Solver, faulty_of: int = 3) -> Proven:
    """Of n > 3f witnesses any two groups of n - (n - 1) / 3 have more than f in common: an honest one. `faulty_of`: for tests."""
    n, f, one, other, common = solver.integers("n f one other common")
    quorum = n - (n - 1) / faulty_of
    facts = [f >= 0, n >= faulty_of * f + 1, one >= quorum, other >= quorum, one <= n, other <= n, common >= one + other - n]
    return solver.prove(
        "quorums", "two quorums of n - f among n > 3f witnesses share an honest one", [(facts, common >= f + 1)], fix=RULE_FIX
    )


# --- the ledger -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Credits:
    """Sums over all accounts, as `nexus.swarm.ledger.Totals` has them: numbers, or terms that stand for any."""

    balances: Term
    bonds: Term
    unclaimed: Term
    vault: Term
    burned: Term

    @property
    def sum(self) -> Term:
        return self.balances + self.bonds + self.unclaimed + self.vault + self.burned


def pay(credits: Credits, amount: Term, shared: Term) -> Credits:
    """A PAY entry whose shares add up to `shared`."""
    return replace(
        credits,
        balances=credits.balances - amount,
        unclaimed=credits.unclaimed + shared,
        vault=credits.vault + amount - shared,
    )


def earn(credits: Credits, amount: Term, released: Term) -> Credits:
    """An EARN entry; `released`: what leaves the escrow for the balance, an earlier entry's amount or nothing."""
    return replace(
        credits,
        balances=credits.balances + released,
        bonds=credits.bonds + amount - released,
        unclaimed=credits.unclaimed - amount,
    )


def burn(credits: Credits, bond: Term) -> Credits:
    """An account is slashed whose bond this is."""
    return replace(credits, bonds=credits.bonds - bond, burned=credits.burned + bond)


def prove_ledger(solver: Solver) -> list[Proven]:
    """Each transition, from any state: nothing is made or lost, nothing but balances falls below zero."""
    before = Credits(*solver.integers("balances bonds unclaimed vault burned"))
    amount, shared, shares, other = solver.integers("amount shared shares other")
    paid = pay(before, amount, shared)
    split = [
        amount >= 1,
        amount <= AMOUNT_MAX,
        shares >= 1,
        shares <= STAGES_MAX,
        shared >= shares,
        shared * 100 <= amount * STAGES_PERCENT,
        shared * 100 > amount * STAGES_PERCENT - 100 * shares,
    ]
    earning = [amount >= 1, amount <= before.unclaimed, other >= 0, other <= before.bonds + amount]
    return [
        _prove_step(solver, "ledger.pay", "a payment makes and loses nothing", before, paid, split),
        solver.prove(
            "ledger.vault",
            f"of a payment the vault gets {100 - STAGES_PERCENT} % and at most one micro-credit per stage more",
            [
                (
                    split,
                    solver.all(
                        (paid.vault - before.vault) * 100 >= amount * (100 - STAGES_PERCENT),
                        (paid.vault - before.vault) * 100 < amount * (100 - STAGES_PERCENT) + 100 * shares,
                    ),
                )
            ],
            fix=RULE_FIX,
        ),
        _prove_step(
            solver, "ledger.earn", "what is earned was paid, and stays a bond first", before, earn(before, amount, other), earning
        ),
        _prove_step(
            solver,
            "ledger.burn",
            "slashing makes and loses nothing",
            before,
            burn(before, other),
            [other >= 0, other <= before.bonds],
        ),
    ]


def _prove_step(solver: Solver, name: str, statement: str, before: Credits, after: Credits, guards: Sequence[Term]) -> Proven:
    held = [before.sum == 0, *_not_negative(before), *guards]
    return solver.prove(
        name,
        f"{statement}: all credits still add up to 0, and no bond, claim or vault falls below 0",
        [(held, solver.all(after.sum == 0, *_not_negative(after)))],
        fix=RULE_FIX,
    )


def _not_negative(credits: Credits) -> list[Term]:
    return [credits.bonds >= 0, credits.unclaimed >= 0, credits.vault >= 0, credits.burned >= 0]
