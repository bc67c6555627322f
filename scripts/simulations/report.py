"""What a simulation comes to: the same table, and the same JSON, for the same seed. No times in it: they would differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from nexus.swarm.standing import DEMOTED, SUSPENDED
from scripts.simulations.byzantine import Node, Swarm
from scripts.simulations.cheaters import STRATEGIES

WRONG_GOAL = 0.01
Row = Mapping[str, object]


def rows_of(swarm: Swarm) -> list[Row]:
    """One per strategy."""
    rows = []
    for strategy in STRATEGIES:
        nodes = [node for node in swarm.nodes if node.strategy is strategy]
        if not nodes:
            continue
        found = [swarm.found[node.number] for node in nodes]
        convicted = sorted(one.convicted for one in found if one.convicted is not None)
        everywhere = [one.everywhere for one in found]
        rows.append(
            {
                "strategy": strategy.name,
                "nodes": len(nodes),
                "executions": sum(one.executions for one in found),
                "false_executions": sum(one.false for one in found),
                "wrong_answers_accepted": sum(one.wrong_before + one.wrong_after for one in found),
                "convicted": len(convicted),
                "convicted_at_request": convicted,
                "known_to_all_at_request": sorted(at for at in everywhere if at is not None),
                "proof": sorted({one.kind for one in found if one.kind}),
                "proof_bytes_max": max(one.bytes for one in found),
                "state": _states(swarm, nodes),
            }
        )
    return rows


def _states(swarm: Swarm, nodes: Sequence[Node]) -> list[str]:
    """What the askers think of them in the end."""
    probation = swarm.options.policy.probation_sessions
    return sorted({asker.standing(node.key, probation).state for asker in swarm.askers for node in nodes})


def summary_of(swarm: Swarm) -> dict[str, object]:
    counts, options = swarm.counts, swarm.options
    probation = options.policy.probation_sessions
    slashed = frozenset(node.key for node in swarm.nodes if node.key in swarm.honest[0].slashed)
    totals = swarm.book.totals(slashed)
    bad = [node for node in swarm.nodes if not node.honest]
    changers = [node for node in bad if node.strategy is not None and node.strategy.changes and swarm.found[node.number].false]
    harmed = [
        node
        for node in swarm.honest
        if any(
            other.standing(node.key, probation).state in (DEMOTED, SUSPENDED) or node.key in other.slashed for other in swarm.honest
        )
    ]
    return {
        **asdict(counts),
        "wrong_share_after_probation": counts.wrong_after / max(1, counts.after),
        "changers": len(changers),
        "changers_evicted": sum(node.key in slashed for node in changers),
        "malicious_slashed": sum(node.key in slashed for node in bad),
        "honest_slashed": sum(node.key in other.slashed for node in swarm.honest for other in swarm.honest),
        "honest_harmed": len(harmed),
        "slashed_sets_equal": all(node.slashed == swarm.honest[0].slashed for node in swarm.honest),
        "ledger_sum": totals.sum,
        "vault": totals.vault,
        "bonds": totals.bonds,
        "burned": totals.burned,
        "audit_share": counts.layers_audited / max(1, counts.layers_computed),
    }


def as_json(swarm: Swarm) -> dict[str, object]:
    options = swarm.options
    told = {
        "seed": options.seed,
        "nodes": options.nodes,
        "requests": options.requests,
        "malicious": options.malicious,
        "askers": options.askers,
        "policy": asdict(options.policy),
    }
    summary = summary_of(swarm)
    return {
        "schema": 1,
        "simulation": "byzantine",
        "options": told,
        "strategies": rows_of(swarm),
        "summary": summary,
        "held": held(swarm, summary),
    }


def held(swarm: Swarm, summary: Mapping[str, object]) -> bool:
    """Whether everything came out as it has to: who changed answers is out, hardly any wrong answer was accepted after probation,
    none at all that ran twice, no honest node was harmed, and no credit was made or lost."""
    return (
        summary["changers"] == summary["changers_evicted"]
        and float(str(summary["wrong_share_after_probation"])) < WRONG_GOAL
        and not (swarm.options.dual and swarm.counts.wrong_before + swarm.counts.wrong_after)
        and not summary["honest_slashed"]
        and not summary["honest_harmed"]
        and bool(summary["slashed_sets_equal"])
        and not summary["ledger_sum"]
    )


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


def as_text(swarm: Swarm) -> str:
    options = swarm.options
    lines = [
        f"seed {options.seed}: {options.nodes} nodes, {len(swarm.found)} of them malicious; {options.requests} requests, of "
        f"{options.askers} honest askers and of malicious ones",
        f"audits: {options.policy.mode}, all of a node's first {options.policy.probation_sessions} executions, then "
        f"{options.policy.rate:.0%}",
        "",
    ]
    table = [COLUMNS, *(_cells(row) for row in rows_of(swarm))]
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([*lines, "", *(f"{name:<18}{said}" for name, said in _totals(swarm))])


def _totals(swarm: Swarm) -> list[tuple[str, str]]:
    counts, summary = swarm.counts, summary_of(swarm)
    share, audited = (float(str(summary[name])) for name in ("wrong_share_after_probation", "audit_share"))
    before = counts.answered - counts.after
    same = "the same on all" if summary["slashed_sets_equal"] else "NOT the same on all"
    return [
        ("answers", f"{counts.answered} of {counts.requests} requests of honest askers; {counts.unanswered} got none"),
        ("wrong, probation", f"{counts.wrong_before} of {before} (false in any way: {counts.false_before})"),
        ("wrong, after it", f"{counts.wrong_after} of {counts.after}, {share:.2%} (false in any way: {counts.false_after})"),
        ("evicted", f"{summary['changers_evicted']} of {summary['changers']} nodes that changed answers"),
        (
            "slashed",
            f"{summary['malicious_slashed']} of {len(swarm.found)} malicious nodes; {same} {len(swarm.honest)} honest nodes",
        ),
        ("honest nodes", f"{summary['honest_slashed']} slashed, {summary['honest_harmed']} slashed, suspended or demoted anywhere"),
        ("accusations", f"{counts.accusations} false ones, {counts.accusations_believed} believed"),
        ("audits", f"{counts.stages_audited} of {counts.stages_run} executions; {audited:.1%} of the work computed again"),
        ("cells", f"{counts.cells} looked at by light audits"),
        ("sessions", f"{counts.sessions}; {counts.refused} more refused to askers that are convicted"),
        ("broken off", f"{counts.broken} sessions, with {counts.unpaid_broken} executions of honest stages that nobody pays"),
        ("ledger", f"sums to {summary['ledger_sum']}; vault {summary['vault']}, burned {summary['burned']} micro-credits"),
        ("double spending", f"cost honest nodes {counts.unpaid_forks} micro-credits before it was proven"),
        ("holds", "yes" if held(swarm, summary) else "NO"),
    ]


def _cells(row: Row) -> tuple[str, ...]:
    return (
        str(row["strategy"]),
        str(row["nodes"]),
        str(row["executions"]),
        str(row["false_executions"]),
        str(row["wrong_answers_accepted"]),
        str(row["convicted"]),
        _span(row["convicted_at_request"]),
        _span(row["known_to_all_at_request"]),
        _listed(row["proof"]) or "-",
        str(row["proof_bytes_max"] or "-"),
        _listed(row["state"]),
    )


def _span(values: object) -> str:
    assert isinstance(values, list)
    return "-" if not values else str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}"


def _listed(values: object) -> str:
    assert isinstance(values, list)
    return ", ".join(values)
