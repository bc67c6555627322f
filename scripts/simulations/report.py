"""What a simulation comes to: the same table, and the same JSON, for the same seed. No times in it: they would differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from nexus.swarm.standing import DEMOTED, SUSPENDED
from scripts.simulations.byzantine import Counts, Node, Swarm
from scripts.simulations.cheaters import STRATEGIES

WRONG_GOAL = 0.01
COLUMNS = (
    "strategy",
    "nodes",
    "executions",
    "false",
    "wrong accepted",
    "convicted",
    "at request",
    "all know",
    "proof",
    "bytes",
    "state",
)


@dataclass(frozen=True, slots=True)
class Row:
    """What became of the nodes of one strategy. `state`: what the honest askers think of them in the end."""

    strategy: str
    nodes: int
    executions: int
    false_executions: int
    wrong_answers_accepted: int
    convicted: int
    convicted_at_request: list[int]
    known_to_all_at_request: list[int]
    proof: list[str]
    proof_bytes_max: int
    state: list[str]

    def cells(self) -> tuple[str, ...]:
        return (
            self.strategy,
            *map(str, (self.nodes, self.executions, self.false_executions, self.wrong_answers_accepted, self.convicted)),
            _span(self.convicted_at_request),
            _span(self.known_to_all_at_request),
            ", ".join(self.proof) or "-",
            str(self.proof_bytes_max or "-"),
            ", ".join(self.state),
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """`changers`: malicious nodes that did something which may change answers. `honest_slashed`: pairs of an honest node and one
    that takes it for convicted; `honest_harmed`: honest nodes that any honest one slashed, suspended or demoted. Credits are
    micro-credits."""

    wrong_share_after_probation: float
    changers: int
    changers_evicted: int
    malicious_slashed: int
    honest_slashed: int
    honest_harmed: int
    slashed_sets_equal: bool
    ledger_sum: int
    vault: int
    bonds: int
    burned: int
    audit_share: float

    def holds(self, counts: Counts, *, dual: bool) -> bool:
        """Whether everything came out as it has to: who changed answers is out, hardly any wrong answer was accepted after
        probation, none at all that ran twice, no honest node was harmed, and no credit was made or lost."""
        return (
            self.changers == self.changers_evicted
            and self.wrong_share_after_probation < WRONG_GOAL
            and not (dual and counts.wrong_before + counts.wrong_after)
            and not (self.honest_slashed or self.honest_harmed)
            and self.slashed_sets_equal
            and self.ledger_sum == 0
        )


def rows_of(swarm: Swarm) -> list[Row]:
    """One per strategy that there is."""
    rows = []
    probation = swarm.options.policy.probation_sessions
    for strategy in STRATEGIES:
        nodes = [node for node in swarm.nodes if node.strategy is strategy]
        found = [swarm.found[node.number] for node in nodes]
        if not nodes:
            continue
        convicted = sorted(one.convicted for one in found if one.convicted is not None)
        rows.append(
            Row(
                strategy=strategy.name,
                nodes=len(nodes),
                executions=sum(one.executions for one in found),
                false_executions=sum(one.false for one in found),
                wrong_answers_accepted=sum(one.wrong_before + one.wrong_after for one in found),
                convicted=len(convicted),
                convicted_at_request=convicted,
                known_to_all_at_request=sorted(one.everywhere for one in found if one.everywhere is not None),
                proof=sorted({one.kind for one in found if one.kind}),
                proof_bytes_max=max(one.bytes for one in found),
                state=sorted({asker.standing(node.key, probation).state for asker in swarm.askers for node in nodes}),
            )
        )
    return rows


def summary_of(swarm: Swarm) -> Summary:
    counts, honest = swarm.counts, swarm.honest
    slashed = frozenset(node.key for node in swarm.nodes if node.key in honest[0].slashed)
    totals = swarm.book.totals(slashed)
    bad = [node for node in swarm.nodes if not node.honest]
    changers = [node for node in bad if node.strategy and node.strategy.changes and swarm.found[node.number].false]
    return Summary(
        wrong_share_after_probation=counts.wrong_after / max(1, counts.after),
        changers=len(changers),
        changers_evicted=sum(node.key in slashed for node in changers),
        malicious_slashed=sum(node.key in slashed for node in bad),
        honest_slashed=sum(node.key in other.slashed for node in honest for other in honest),
        honest_harmed=len(_harmed(swarm, honest)),
        slashed_sets_equal=all(node.slashed == honest[0].slashed for node in honest),
        ledger_sum=totals.sum,
        vault=totals.vault,
        bonds=totals.bonds,
        burned=totals.burned,
        audit_share=counts.layers_audited / max(1, counts.layers_computed),
    )


def _harmed(swarm: Swarm, honest: Sequence[Node]) -> list[Node]:
    probation = swarm.options.policy.probation_sessions

    def harms(other: Node, node: Node) -> bool:
        return node.key in other.slashed or other.standing(node.key, probation).state in (DEMOTED, SUSPENDED)

    return [node for node in honest if any(harms(other, node) for other in honest)]


def as_json(swarm: Swarm) -> dict[str, object]:
    options, summary = swarm.options, summary_of(swarm)
    told = {
        "seed": options.seed,
        "nodes": options.nodes,
        "requests": options.requests,
        "malicious": options.malicious,
        "askers": options.askers,
        "policy": asdict(options.policy),
    }
    return {
        "schema": 1,
        "simulation": "byzantine",
        "options": told,
        "strategies": [asdict(row) for row in rows_of(swarm)],
        "summary": asdict(swarm.counts) | asdict(summary),
        "held": summary.holds(swarm.counts, dual=options.dual),
    }


def as_text(swarm: Swarm) -> str:
    options = swarm.options
    lines = [
        f"seed {options.seed}: {options.nodes} nodes, {len(swarm.found)} of them malicious; {options.requests} requests, of "
        f"{options.askers} honest askers and of malicious ones",
        f"audits: {options.policy.mode}, all of a node's first {options.policy.probation_sessions} executions, then "
        f"{options.policy.rate:.0%}",
        "",
    ]
    table = [COLUMNS, *(row.cells() for row in rows_of(swarm))]
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([*lines, "", *(f"{name:<18}{said}" for name, said in _totals(swarm))])


def _totals(swarm: Swarm) -> list[tuple[str, str]]:
    counts, summary = swarm.counts, summary_of(swarm)
    before, share = counts.answered - counts.after, summary.wrong_share_after_probation
    same = "the same on all" if summary.slashed_sets_equal else "NOT the same on all"
    bad = len(swarm.found)
    return [
        ("answers", f"{counts.answered} of {counts.requests} requests of honest askers; {counts.unanswered} got none"),
        ("wrong, probation", f"{counts.wrong_before} of {before} (false in any way: {counts.false_before})"),
        ("wrong, after it", f"{counts.wrong_after} of {counts.after}, {share:.2%} (false in any way: {counts.false_after})"),
        ("evicted", f"{summary.changers_evicted} of {summary.changers} nodes that changed answers"),
        ("slashed", f"{summary.malicious_slashed} of {bad} malicious nodes; {same} {len(swarm.honest)} honest nodes"),
        ("honest nodes", f"{summary.honest_slashed} slashed, {summary.honest_harmed} slashed, suspended or demoted anywhere"),
        ("accusations", f"{counts.accusations} false ones, {counts.accusations_believed} believed"),
        ("audits", f"{counts.stages_audited} of {counts.stages_run} executions; {summary.audit_share:.1%} of the work done again"),
        ("cells", f"{counts.cells} looked at by light audits"),
        ("sessions", f"{counts.sessions}; {counts.refused} more refused to askers that are convicted"),
        ("broken off", f"{counts.broken} sessions, with {counts.unpaid_broken} executions of honest stages that nobody pays"),
        ("ledger", f"sums to {summary.ledger_sum}; vault {summary.vault}, burned {summary.burned} micro-credits"),
        ("double spending", f"cost honest nodes {counts.unpaid_forks} micro-credits before it was proven"),
        ("holds", "yes" if summary.holds(counts, dual=swarm.options.dual) else "NO"),
    ]


def _span(values: Sequence[int]) -> str:
    return "-" if not values else str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}"
