"""nexus model serve, unserve, update, rollback; nexus drain: what this node undertakes, and how it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from nexus.core.manifest import DEFAULT_PROFILE, PROFILES_ASKED
from nexus_cli import show, values
from nexus_cli.model import progress_bars, replicas_text
from nexus_cli.options import NexusCommand, Shared, pass_shared

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nexus.gateway.wire import Json
    from nexus.node.fragments_api import DrainView, HandOverView, ServingView, VersionView

DEADLINE_S = 300.0


@click.command("serve", cls=NexusCommand)
@click.argument("name")
@click.option(
    "--fragment",
    default="auto",
    show_default=True,
    help='Layers such as 0-5, or "auto": what the swarm needs most.',
)
@click.option("--max-memory", type=values.size, default="0", help="Memory for it, such as 4GiB. [default: what this node has]")
@click.option("--max-disk", type=values.size, default="0", help="Disk for it. [default: what this node has]")
@click.option("--max-upload", type=values.rate, default="0", help="Bytes per second to others, such as 2MiB. [default: no limit]")
@click.option("--publisher", help="The peer whose versions of NAME count. [default: the one that publishes it]")
@click.option("--preload", is_flag=True, help="Load layers as soon as they are here, so that the first request does not wait.")
@click.option("--stop", is_flag=True, help="End it, as nexus model unserve does.")
@pass_shared
def serve(
    shared: Shared,
    name: str,
    fragment: str,
    max_memory: int,
    max_disk: int,
    max_upload: int,
    publisher: str | None,
    preload: bool,
    stop: bool,
) -> None:
    """Take part in serving the model NAME. It stays so over restarts, and goes on when this command is interrupted."""
    from nexus.core.errors import LocalError
    from nexus.gateway.wire import to_json
    from nexus.node.fragments_api import ServingView
    from nexus.node.progress import Notice, Progress
    from nexus_cli.client import connected, model_path

    if stop:
        _unserve(shared, name)
        return
    body: Mapping[str, Json] = {
        "fragment": fragment,
        "memory_max_bytes": max_memory,
        "disk_max_bytes": max_disk,
        "upload_max_bytes": max_upload,
        "publisher": publisher,
        "preload": preload,
    }
    view: ServingView | None = None
    path = model_path(name) + "/serve"
    with connected(shared, None) as daemon, progress_bars(shared) as advance:
        for event in daemon.stream(path, body):
            if isinstance(event, Progress):
                advance(event)
            elif isinstance(event, Notice):
                click.echo(show.printable(event.text), err=True)
            elif isinstance(event, ServingView):
                view = event
    if view is None:
        raise LocalError("the daemon did not say what it serves", "See its log, and: nexus model list")
    if shared.json:
        show.print_json({"serving": to_json(view)})
        return
    show.pairs(serving_rows(view))


@click.command("unserve", cls=NexusCommand)
@click.argument("name")
@pass_shared
def unserve(shared: Shared, name: str) -> None:
    """Take part in serving NAME no longer. What is on the disk stays until its room is needed."""
    _unserve(shared, name)


def _unserve(shared: Shared, name: str) -> None:
    from nexus_cli.client import connected, model_path

    path = model_path(name) + "/unserve"
    with connected(shared) as daemon:
        answer = daemon.post(path, {})
    notices = answer.get("notices") if isinstance(answer, dict) else None
    said = [str(notice) for notice in notices] if isinstance(notices, list) else []
    for notice in said:
        click.echo(show.printable(notice), err=True)
    if shared.json:
        show.print_json({"ended": True, "notices": said})
        return
    click.echo(f"{show.printable(name)} is no longer served here", err=True)


@click.command("update", cls=NexusCommand)
@click.argument("name")
@click.argument("source")
@click.option(
    "--profile",
    type=click.Choice(PROFILES_ASKED),
    default=DEFAULT_PROFILE,
    show_default=True,
    help="As of model add.",
)
@pass_shared
def update(shared: Shared, name: str, source: str, profile: str) -> None:
    """Make SOURCE the next version of NAME. It rolls through the nodes that serve NAME; requests get it once all its layers are
    served."""
    from nexus.core.errors import NotFoundError
    from nexus.models import BUILTIN_NAMES
    from nexus_cli.client import model_path

    if source not in BUILTIN_NAMES:
        path = Path(source).expanduser().absolute()
        if not path.is_dir():
            raise NotFoundError(f"{source} is not a directory", f"Give a model directory, or one of: {', '.join(BUILTIN_NAMES)}")
        source = str(path)
    _roll(shared, model_path(name) + "/update", {"source": source, "profile": profile}, name)


@click.command("rollback", cls=NexusCommand)
@click.argument("name")
@click.option("--to", type=click.IntRange(1), help="Which version's content. [default: what the newest replaced]")
@pass_shared
def rollback(shared: Shared, name: str, to: int | None) -> None:
    """Bring back an earlier version of NAME. It is a new version with that content, and rolls as an update does."""
    from nexus_cli.client import model_path

    _roll(shared, model_path(name) + "/rollback", {"to": to}, name)


def _roll(shared: Shared, path: str, body: Mapping[str, Json], name: str) -> None:
    from nexus.core.errors import LocalError
    from nexus.gateway.wire import to_json
    from nexus.node.fragments_api import VersionView
    from nexus.node.progress import Notice, Progress
    from nexus_cli.client import connected

    version: VersionView | None = None
    notices: list[str] = []
    covered = (0, 0)
    with (
        connected(shared, None) as daemon,
        progress_bars(shared, in_bytes=lambda event: not event.phase.startswith("layers ")) as advance,
    ):
        for event in daemon.stream(path, body):
            if isinstance(event, Progress):
                advance(event)
                covered = (event.done, event.total)
            elif isinstance(event, Notice):
                notices.append(event.text)
                click.echo(show.printable(event.text), err=True)
            elif isinstance(event, VersionView):
                version = event
                click.echo(f"version {version.version} of {show.printable(name)}: {version.model_root.hex()}", err=True)
    if version is None:
        raise LocalError("the daemon did not say which version it is", "See its log, and: nexus model show")
    if shared.json:
        show.print_json({"version": to_json(version), "layers_served": list(covered), "notices": notices})
        return
    click.echo(f"{show.printable(name)}  version {version.version}  {version.model_root.hex()}")


@click.command("drain", cls=NexusCommand)
@click.option(
    "--deadline", type=values.span, default=f"{DEADLINE_S:.0f}s", help="Leave after this time in any case. [default: 5min]"
)
@pass_shared
def drain(shared: Shared, deadline: float) -> None:
    """Hand over fragments and sessions, then stop the daemon. Ctrl-C before it is done calls it off."""
    from nexus.core.errors import LocalError
    from nexus.gateway.wire import to_json
    from nexus.node.fragments_api import DrainView
    from nexus_cli.client import connected

    last: DrainView | None = None
    with connected(shared, None) as daemon:
        for event in daemon.stream("/v0/drain", {"deadline_s": deadline}):
            if isinstance(event, DrainView):
                if not shared.json:
                    for line in drain_lines(last, event):
                        click.echo(show.printable(line), err=True)
                last = event
    if last is None or not last.done:
        raise LocalError("the daemon did not finish draining", "See its log; it goes on as before, unless it was stopped")
    if shared.json:
        show.print_json({"drain": to_json(last)})


def drain_lines(before: DrainView | None, now: DrainView) -> list[str]:
    """What is new since the last time: what is handed over, to whom, and what still waits."""
    lines = []
    known = {model.model_root: model for model in before.models} if before else {}
    for model in now.models:
        if known.get(model.model_root) != model:
            lines.append(_hand_over_line(model))
    if now.sessions and (before is None or before.sessions != now.sessions):
        lines.append(f"{show.count(now.sessions, 'session')} still running, {show.duration(now.left_s)} left")
    if now.done:
        short = [f"{show.layers(model.lost)} of {model.name}" for model in now.models if model.lost]
        lines += [f"nobody else serves layers {text} now" for text in short]
        if now.sessions:
            lines.append(f"the deadline is over: {show.count(now.sessions, 'session')} cut off")
        lines.append("drained; the daemon stops")
    elif before is None and not now.models:
        lines.append("this node serves no fragments")
    return lines


def _hand_over_line(model: HandOverView) -> str:
    parts = []
    if model.handed_over:
        parts.append(f"layers {show.layers(model.handed_over)} handed over to {', '.join(model.to)}")
    if model.waiting:
        parts.append(f"layers {show.layers(model.waiting)} wait for another node to take them")
    elif model.lost:
        parts.append(f"layers {show.layers(model.lost)} on no other node")
    return f"{model.name}: {'; '.join(parts)}"


def serving_rows(view: ServingView) -> list[tuple[str, str]]:
    limits = [
        f"{show.size(limit)}{unit} of {what}"
        for what, unit, limit in (
            ("memory", "", view.memory_max_bytes),
            ("disk", "", view.disk_max_bytes),
            ("upload", "/s", view.upload_max_bytes),
        )
        if limit
    ]
    rows = [
        ("name", view.name),
        ("model", view.model_root.hex()),
        ("version", f"{view.version}, as {show.short_id(view.publisher)} publishes it" if view.version else "none was published"),
        ("fragment", view.fragment),
        ("served", f"layers {show.layers(view.served)} of {view.layers}" if view.served else "nothing: others serve it all"),
        ("limits", ", ".join(limits) or "none but the node's"),
        ("replicas", replicas_text(view.replicas)),
    ]
    if view.fetching:
        rows.append(("fetching", f"layers {show.layers(view.fetching)}"))
    if view.short:
        rows.append(("short", view.short))
    return rows
