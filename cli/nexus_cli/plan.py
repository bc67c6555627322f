"""nexus model plan: who would compute what, how fast that is predicted to be, and what is missing; also for imagined machines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nexus_cli import show
from nexus_cli.model import print_plan
from nexus_cli.options import NexusCommand, Shared, pass_shared

if TYPE_CHECKING:
    from nexus.gateway.wire import Json
    from nexus.node.planning import LayersView, PlanReport

FILE_BYTES_MAX = 1 << 20


@click.command("plan", cls=NexusCommand)
@click.argument("name")
@click.option("--stages", type=click.IntRange(1, 256), help="Split over this many nodes. [default: as many as make it faster]")
@click.option("--streams", type=click.IntRange(1, 65536), help="Sessions that are to run at once. [default: 4]")
@click.option("--replicas", type=click.IntRange(1, 64), help="Nodes per layer. [default: 2, and 3 where nodes are idle]")
@click.option(
    "--nodes",
    type=click.Path(path_type=Path),
    help="Plan over the machines that this file describes (TOML or JSON) instead of the nodes in reach.",
)
@click.option("--explain", is_flag=True, help="Also which layers every node is to hold, and why.")
@pass_shared
def model_plan(
    shared: Shared, name: str, stages: int | None, streams: int | None, replicas: int | None, nodes: Path | None, explain: bool
) -> None:
    """Show who would compute NAME, and why. Also how fast, and which layers lack replicas."""
    from nexus.gateway.wire import to_json
    from nexus.node.planning import PlanReport
    from nexus_cli.client import connected, model_path

    machines = None if nodes is None else read_machines(nodes)
    body: dict[str, Json] = {"stages": stages, "streams": streams, "replicas": replicas, "machines": machines}
    path = model_path(name) + "/plan"
    with connected(shared) as daemon:
        report = daemon.post_as(PlanReport, path, body)
    if shared.json:
        found = to_json(report)
        show.print_json(found if isinstance(found, Mapping) else {"plan": found})
        return
    print_plan(shared, report.plan)
    show.pairs(_facts(report))
    click.echo(f"plan {report.plan.plan_root.hex()}")
    if report.plan.reason:
        show.paragraph(shared, report.plan.reason)
    if explain:
        rows = [
            (one.name, show.short_id(one.peer_id), show.layers([(one.start, one.end)]), show.size(one.fetch_bytes), one.reason)
            for one in report.fragments
        ]
        click.echo("\nwhat every node is to hold, so that the swarm can lose any one:")
        show.console(shared).print(
            show.table(("node", "peer", "layers", "to fetch", "why"), rows, right=("to fetch",), wrap=("node", "why"))
        )
    for text in report.short:
        click.echo(f"short: {show.printable(text)}")


def _facts(report: PlanReport) -> list[tuple[str, str]]:
    slowest = report.plan.stages[report.slowest]
    bound = "the ring" if report.latency_us >= report.streams * report.slowest_us else "the slowest stage"
    together = f"{_rate(report.streams_tokens_per_s)} with {show.count(report.streams, 'session')} at once"
    return [
        ("tokens/s", f"{_rate(report.tokens_per_s)} for one session alone, {together} (predicted)"),
        ("a step", f"{show.duration(report.step_us / 1e6)}, bound by {bound}"),
        ("slowest stage", f"{report.slowest}, {show.duration(report.slowest_us / 1e6)} on {slowest.name or slowest.peer_id}"),
        ("memory", f"{show.size(report.memory_bytes)} of {show.size(report.memory_offered_bytes)} that serving nodes offer"),
        ("to fetch", show.size(report.fetch_bytes) if report.fetch_bytes else "nothing"),
        ("held by", _by_layers(report.layers, "held")),
        ("could be", _by_layers(report.layers, "planned")),
    ]


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.3g}"


def _by_layers(layers: tuple[LayersView, ...], field: str) -> str:
    """ "layers 0-15: 2 nodes; 16-31: 1 node"."""
    runs: list[tuple[int, int, int]] = []
    for one in layers:
        count = one.held if field == "held" else one.planned
        if runs and runs[-1][2] == count:
            runs[-1] = (runs[-1][0], one.end, count)
        else:
            runs.append((one.start, one.end, count))
    return "layers " + "; ".join(f"{show.layers([(start, end)])}: {show.count(count, 'node')}" for start, end, count in runs)


def read_machines(path: Path) -> Mapping[str, Json]:
    """A file that describes machines, as the table that it is; the daemon checks what is in it. Raises NotFoundError, and
    UsageError for what is no TOML or JSON."""
    import json
    import tomllib

    from nexus.core.errors import NotFoundError, UsageError

    if not path.is_file():
        raise NotFoundError(f"there is no file {path}", "Give a TOML or JSON file; docs/placement.md shows one")
    if path.stat().st_size > FILE_BYTES_MAX:
        raise UsageError(f"{path} is larger than {show.size(FILE_BYTES_MAX)}", "Describe at most a thousand machines")
    try:
        text = path.read_text("utf-8")
        value = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
        # What JSON has no form for, such as a date or an infinite number, is nothing that describes a machine.
        value = json.loads(json.dumps(value, allow_nan=False))
    except (ValueError, TypeError, RecursionError) as error:
        kind = "JSON" if path.suffix.lower() == ".json" else "TOML"
        raise UsageError(f"{path} cannot be read as {kind}: {error}", "Correct it; docs/placement.md shows one") from error
    if not isinstance(value, Mapping):
        raise UsageError(f"{path} is not a table", "Describe machines under nodes; docs/placement.md shows how")
    return value
