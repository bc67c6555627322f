"""scripts/simulate scale: what a swarm of 10, 100 and 1000 nodes does, as one table.

The parts say what is real and what is modelled: scale_dht, scale_membership, scale_inference and scale_machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import log2
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Report = dict[str, Any]

PARTS = ("dht", "membership", "inference")
GROWTH_GOAL = 1.8
INFERENCES_GOAL, INFERENCES_NODES = 1000.0, 100
HEALED_GOAL_S = 30.0
# Real memberships of more nodes take hours: every node asks its acquaintances each minute, and all of it is signed and checked.
MEMBERSHIP_MAX = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    say = parser.add_argument
    say("--nodes", default="10,100,1000", help="how many, by comma [default: %(default)s]")
    say("--seed", type=int, default=1, help="all but wall-clock times follows from it [default: %(default)s]")
    say("--membership-max", type=int, default=MEMBERSHIP_MAX, help="the real membership up to so many [default: %(default)s]")
    say("--only", default=",".join(PARTS), help="these parts, by comma [default: %(default)s]")
    say("--exactly", action="store_true", help="these numbers of nodes only, no halves and doubles of them")
    say("--from", dest="source", type=Path, nargs="+", help="take the figures from earlier --json outputs, joined")
    say("--write-docs", action="store_true", help="write table and plots into docs/scaling.md (needs matplotlib)")
    say("--json", action="store_true", help="one JSON object on stdout")


def run(options: argparse.Namespace) -> int:
    report = joined(options.source) if options.source else measured(options)
    if options.write_docs:
        from scripts.simulations.scale_docs import write_docs

        write_docs(report)
    print(json.dumps(report) if options.json else as_text(report))
    return 0 if all(goal["met"] for goal in report["goals"]) else 1


def sizes_of(nodes: Sequence[int]) -> list[int]:
    """Those asked for, and half and double of each as far as they lie between: what doubling gives is measured."""
    halves = (count // 2 for count in nodes if count // 2 >= min(nodes))
    doubles = (2 * count for count in nodes if 2 * count <= max(nodes))
    return sorted({*nodes, *halves, *doubles})


def measured(options: argparse.Namespace) -> Report:
    from scripts.simulations.scale_dht import dht_figures
    from scripts.simulations.scale_inference import inference_figures
    from scripts.simulations.scale_membership import membership_figures

    nodes = sorted({int(text) for text in options.nodes.split(",")})
    if nodes[0] < 4 or nodes[-1] > 4000:
        raise SystemExit("error: --nodes are to be from 4 to 4000")
    parts = options.only.split(",")
    if set(parts) - set(PARTS):
        raise SystemExit(f"error: --only knows {', '.join(PARTS)}")
    report = _empty(options.seed)
    for count in nodes:
        if "dht" in parts:
            _say(f"DHT of {count} nodes")
            whole, dead = dht_figures(options.seed, count)
            report["dht"].append({"nodes": count, "whole": asdict(whole), "after_deaths": asdict(dead)})
        if "membership" in parts and count <= options.membership_max:
            _say(f"membership of {count} nodes")
            report["membership"].append({"nodes": count} | asdict(membership_figures(options.seed, count)))
    for count in nodes if options.exactly else sizes_of(nodes):
        if "inference" in parts:
            _say(f"inferences of {count} nodes")
            report["inference"].append(asdict(inference_figures(options.seed, count)))
    return report | {"goals": goals_of(report)}


def joined(files: Sequence[Path]) -> Report:
    """Parts that were computed apart. The seed must be one."""
    reports = [json.loads(file.read_text()) for file in files]
    if len({report["seed"] for report in reports}) != 1:
        raise SystemExit("error: the files are of different seeds")
    result = _empty(reports[0]["seed"])
    for part in PARTS:
        rows = {row["nodes"]: row for report in reports for row in report[part]}
        result[part] = [rows[count] for count in sorted(rows)]
    return result | {"goals": goals_of(result)}


def _empty(seed: int) -> Report:
    return {"schema": 1, "simulation": "scale", "seed": seed} | {part: [] for part in PARTS}


def doublings(inference: Sequence[Row]) -> list[tuple[int, int, float]]:
    """Pairs of sizes of which one is twice the other, and how much the throughput grew."""
    rates = {row["nodes"]: row["inferences_per_s"] for row in inference}
    return [(count, 2 * count, round(rates[2 * count] / rates[count], 3)) for count in rates if 2 * count in rates]


def growth(inference: Sequence[Row]) -> float:
    """Per doubling, over the whole span."""
    first, last = inference[0], inference[-1]
    return float((last["inferences_per_s"] / first["inferences_per_s"]) ** (1 / log2(last["nodes"] / first["nodes"])))


def goals_of(report: Report) -> list[Row]:
    goals: list[Row] = []

    def goal(name: str, value: float | None, met: bool) -> None:
        goals.append({"goal": name, "value": value, "met": met})

    inference = report["inference"]
    for one, two, ratio in doublings(inference):
        goal(f"{one} to {two} nodes: throughput >= {GROWTH_GOAL} x", ratio, ratio >= GROWTH_GOAL)
    if len(inference) > 1:
        value = round(growth(inference), 3)
        span = f"{inference[0]['nodes']} to {inference[-1]['nodes']} nodes"
        goal(f"{span}: >= {GROWTH_GOAL} x per doubling, mean", value, value >= GROWTH_GOAL)
    for row in inference:
        if row["nodes"] == INFERENCES_NODES:
            rate = row["inferences_per_s"]
            goal(f"{INFERENCES_NODES} nodes: >= {INFERENCES_GOAL:g} inferences/s", rate, rate >= INFERENCES_GOAL)
    for row in report["membership"]:
        healed = row["healed_s"]
        goal(f"{row['nodes']} nodes: healed <= {HEALED_GOAL_S:g} s", healed, healed is not None and healed <= HEALED_GOAL_S)
    return goals


def table(report: Report) -> list[tuple[str, ...]]:
    """A row for each figure, a column for each number of nodes. A dash: not measured."""
    counts = sorted({row["nodes"] for part in PARTS for row in report[part]})
    rows = {part: {row["nodes"]: row for row in report[part]} for part in PARTS}

    def line(name: str, part: str, text: Any) -> tuple[str, ...]:
        return name, *(text(rows[part][count]) if count in rows[part] else "-" for count in counts)

    def seconds(value: float | None) -> str:
        return "never" if value is None else f"{value:g} s"

    def hops(figures: Row) -> str:
        return f"{figures['hops_mean']} ({figures['hops_max']})"

    return [
        ("nodes", *map(str, counts)),
        line("DHT: hops to the nearest node, mean (most)", "dht", lambda row: hops(row["whole"])),
        line("DHT: the same with a fifth dead", "dht", lambda row: hops(row["after_deaths"])),
        line("DHT: nodes asked per lookup", "dht", lambda row: f"{row['whole']['queries_mean']}"),
        line("DHT: lookups that find the nearest", "dht", lambda row: f"{row['whole']['found']:.1%}"),
        line("a fifth crashes: nobody counts on them after", "membership", lambda row: seconds(row["ghosts_gone_s"])),
        line("as many join: known after", "membership", lambda row: seconds(row["joined_s"])),
        line("a partition ends: healed after", "membership", lambda row: seconds(row["healed_s"])),
        line("records, sent per node", "membership", lambda row: f"{row['exchange_bytes'] / 1000:.1f} kB/s"),
        line("gossip, sent per node", "membership", lambda row: f"{row['gossip_bytes'] / 1000:.1f} kB/s"),
        line("streams", "inference", lambda row: f"{row['streams']:,}"),
        line("inferences per second", "inference", lambda row: f"{row['inferences_per_s']:,.0f}"),
        line("the same per node", "inference", lambda row: f"{row['inferences_per_s'] / row['nodes']:.0f}"),
        line("a token of one stream, median", "inference", lambda row: f"{row['step_ms']:.0f} ms"),
        line("stages of a chain, mean", "inference", lambda row: f"{row['stages']:.1f}"),
        line("steps in a batch, mean", "inference", lambda row: f"{row['batch']:.1f}"),
        line("nodes' time that is busy, mean", "inference", lambda row: f"{row['busy_mean']:.0%}"),
        line("busiest line", "inference", lambda row: f"{row['line_max']:.0%}"),
        line("wall clock: a placement", "inference", lambda row: f"{row['place_s']:.2f} s"),
        line("wall clock: a route", "inference", lambda row: f"{1000 * row['route_s']:.0f} ms"),
        line("wall clock: a layout", "inference", lambda row: f"{row['layout_s']:.1f} s"),
    ]


def as_text(report: Report) -> str:
    rows = table(report)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"seed {report['seed']}"]
    for row in rows:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
    lines.append("")
    for goal in report["goals"]:
        lines.append(f"{'met   ' if goal['met'] else 'MISSED'}  {goal['goal']}: {goal['value']}")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, file=sys.stderr)
