"""nexus swarm: every node in reach, what it holds, how it is, and which models want more replicas."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from nexus_cli import show
from nexus_cli.options import NexusCommand, NexusGroup, Shared, pass_shared

if TYPE_CHECKING:
    from rich.console import Group

    from nexus.node.swarm_view import SwarmFragment, SwarmModel, SwarmNode, SwarmView
    from nexus_cli.client import Daemon

LIMIT, LIMIT_MAX = 256, 4096
EVERY_S = 2.0
# Below this width a table shows what matters most, and no more.
NARROW = 100

_limit = click.option(
    "--limit",
    type=click.IntRange(1, LIMIT_MAX),
    default=LIMIT,
    show_default=True,
    help="Nodes to list, those that need a look first.",
)


swarm = NexusGroup(name="swarm", help="Look at the swarm: its nodes, what they hold and how they are.")


@swarm.command(cls=NexusCommand)
@_limit
@pass_shared
def status(shared: Shared, limit: int) -> None:
    """List nodes, what they hold, and how many replicas models have."""
    from nexus.gateway.wire import to_json
    from nexus_cli.client import connected

    with connected(shared) as daemon:
        view = _ask(daemon, limit)
    if shared.json:
        show.print_json({"swarm": to_json(view)})
        return
    console = show.console(shared)
    console.print(_shown(view, console.width, console.height if console.is_terminal else None, fit=False))


@swarm.command(cls=NexusCommand)
@_limit
@click.option(
    "--every", type=click.FloatRange(0.2, 3600), default=EVERY_S, show_default=True, metavar="SECONDS", help="How often to look."
)
@click.option("--count", type=click.IntRange(1), default=None, help="Look so many times, then end; without it until Ctrl-C.")
@pass_shared
def watch(shared: Shared, limit: int, every: float, count: int | None) -> None:
    """Show the same live, redrawn in place, until Ctrl-C. With --json one object per look and line."""
    from nexus.gateway.wire import to_json
    from nexus_cli.client import connected

    with connected(shared, default_timeout_s=None) as daemon:
        if shared.json or not show.console(shared).is_terminal:
            for _ in _looks(every, count):
                view = _ask(daemon, limit)
                if shared.json:
                    show.print_json({"swarm": to_json(view)})
                else:
                    console = show.console(shared)
                    console.print(_shown(view, console.width, None, fit=False))
            return
        _redraw(shared, daemon, limit, every, count)


def _redraw(shared: Shared, daemon: Daemon, limit: int, every: float, count: int | None) -> None:
    from rich.live import Live

    console = show.console(shared)
    with Live(console=console, auto_refresh=False, screen=count is None) as live:
        try:
            for _ in _looks(every, count):
                live.update(_shown(_ask(daemon, limit), console.width, console.height, fit=True), refresh=True)
        except KeyboardInterrupt:
            return  # that is how one leaves


def _looks(every: float, count: int | None) -> Iterator[int]:
    """One item per look, with a pause between."""
    number = 0
    while True:
        yield number
        number += 1
        if number == count:
            return
        time.sleep(every)


def _ask(daemon: Daemon, limit: int) -> SwarmView:
    from nexus.node.swarm_view import SwarmView

    return daemon.get_as(SwarmView, f"/v0/swarm?limit={limit}")


def _shown(view: SwarmView, width: int, height: int | None, *, fit: bool) -> Group:
    """For people. `fit`: leave out rows so that all of it is on one screen of `height`."""
    from rich.console import Group
    from rich.text import Text

    nodes, models = view.nodes, view.models
    if fit and height is not None:
        # A line above, four of each table beside its rows, and two for what is left out.
        models = models[: max(1, (height - 11) // 3)]
        nodes = nodes[: max(1, height - 11 - len(models))]
    narrow = width < NARROW
    columns: tuple[str, ...] = ("name", "peer", "state", "link", "load", "speed", "memory free", "fragments")
    if narrow:
        columns = ("name", "state", "link", "load", "fragments")
    rows = [[_cell(node, column) for column in columns] for node in nodes]
    one_line = () if fit else ("name", "fragments")
    parts: list[object] = [
        Text(f"{view.alive} of {show.count(view.nodes_total, 'node')} can be planned with"),
        show.table(columns, rows, right=("link", "load", "speed", "memory free"), wrap=one_line),
    ]
    if view.nodes_total > len(nodes):
        parts.append(Text(f"and {view.nodes_total - len(nodes)} more nodes" + ("" if fit else "; --limit lists more")))
    if models:
        rows = [
            [show.printable(model.name) or model.model_root.hex()[:16], str(model.layers), _replicas(model), _verdict(model)]
            for model in models
        ]
        parts.append(
            show.table(("model", "layers", "replicas", ""), rows, right=("layers",), wrap=() if fit else ("model", "replicas"))
        )
    if view.models_total > len(models):
        parts.append(Text(f"and {view.models_total - len(models)} more models"))
    if view.nodes_total == 1:
        parts.append(Text("no other node is in reach; add one with: nexus peers add MULTIADDR"))
    return Group(*parts)  # type: ignore[arg-type]


def _cell(node: SwarmNode, column: str) -> str:
    match column:
        case "name":
            return node.name or show.short_id(node.peer_id)
        case "peer":
            return show.short_id(node.peer_id)
        case "state":
            return (
                "leaving"
                if node.leaving
                else node.state
                if node.serves or node.state == "this node"
                else f"{node.state}, serves not"
            )
        case "link":
            return "-" if node.rtt_us is None else f"{'' if node.measured else '~'}{show.duration(node.rtt_us / 1e6)}"
        case "load":
            return str(node.load)
        case "speed":
            return "?" if not node.exact_speed else f"{node.exact_speed / 1000:.1f} G/s"
        case "memory free":
            return show.size(node.memory_free_bytes)
        case _:
            shown = "; ".join(_held(fragment) for fragment in node.fragments)
            rest = node.fragments_total - len(node.fragments)
            return (shown + (f"; {rest} more" if rest else "")) or "-"


def _held(fragment: SwarmFragment) -> str:
    """ "nano 0-3 of 0-5": what is served of what is held."""
    held, serving = (", ".join(f"{start}-{end - 1}" for start, end in ranges) for ranges in (fragment.held, fragment.serving))
    version = f" v{fragment.version}" if fragment.version else ""
    name = fragment.model or fragment.model_root.hex()[:8]
    return f"{name}{version} {held}" if not serving or serving == held else f"{name}{version} {serving} of {held}"


def _replicas(model: SwarmModel) -> str:
    """ "0-3: 2, 4-5: 1"."""
    if len(model.replicas) == 1:
        return str(model.replicas[0].replicas)
    return ", ".join(f"{run.start}-{run.end - 1}: {run.replicas}" for run in model.replicas[:8]) + (
        ", ..." if len(model.replicas) > 8 else ""
    )


def _verdict(model: SwarmModel) -> str:
    if model.layers and not min(run.replicas for run in model.replicas):
        return "incomplete"
    if model.short:
        return f"short of {model.short}"
    return f"{model.spare} spare" if model.spare else "as wanted"
