"""nexus model: add models, list them, show who would compute what."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nexus.core.manifest import DEFAULT_PROFILE, EXACT, FLOAT, PROFILES_ASKED
from nexus_cli import show
from nexus_cli.options import NexusGroup, Shared, pass_shared

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.table import Table

    from nexus.core.fidelity import Fidelity
    from nexus.node.api import ModelView, PlanView
    from nexus.node.progress import Progress

_PROFILES = {
    EXACT: "exact: int8, the same bits on every machine",
    FLOAT: "float: answers differ in their last digits between machines",
}

model = NexusGroup(name="model", help="Models: add, list, show, plan, compare with float.")


@model.command("add")
@click.argument("source")
@click.option(
    "--name", help="What to call it. [default: the directory's name, or the built-in's; with -float behind it if so asked]"
)
@click.option(
    "--profile",
    type=click.Choice(PROFILES_ASKED),
    default=DEFAULT_PROFILE,
    show_default=True,
    help="The arithmetic: exact (int8, the same bits on every machine), float, or exact where the model can be.",
)
@pass_shared
def model_add(shared: Shared, source: str, name: str | None, profile: str) -> None:
    """Take in a model. A Hugging Face directory (safetensors), or the built-in "nano" or "minilm"."""
    from nexus.core.errors import LocalError, NotFoundError
    from nexus.gateway.wire import to_json
    from nexus.models import BUILTIN_NAMES
    from nexus.node.api import ModelView
    from nexus.node.progress import Notice, Progress
    from nexus_cli.client import connected

    if source not in BUILTIN_NAMES:
        path = Path(source).expanduser().absolute()
        if not path.is_dir():
            raise NotFoundError(f"{source} is not a directory", f"Give a model directory, or one of: {', '.join(BUILTIN_NAMES)}")
        source = str(path)
    added: ModelView | None = None
    with connected(shared, None) as daemon, progress_bars(shared) as advance:
        for event in daemon.stream("/v0/models", {"source": source, "name": name, "profile": profile}):
            if isinstance(event, Progress):
                advance(event)
            elif isinstance(event, Notice):
                click.echo(show.printable(event.text), err=True)
            elif isinstance(event, ModelView):
                added = event
    if added is None:
        raise LocalError("the daemon did not say that the model is there", "See its log, and: nexus model list")
    if shared.json:
        show.print_json({"model": to_json(added)})
        return
    click.echo(f"{show.printable(added.name)}  {added.manifest.root.hex()}")


@model.command("list")
@pass_shared
def model_list(shared: Shared) -> None:
    """List the models that are known here. This node's own, and those of its peers."""
    from nexus.gateway.wire import to_json
    from nexus.node.api import ModelView
    from nexus_cli.client import connected

    with connected(shared) as daemon:
        found = daemon.get_list(ModelView, "/v0/models", "models")
    if shared.json:
        show.print_json({"models": to_json(found)})
        return
    if not found:
        click.echo("no models; add one with: nexus model add nano", err=True)
        return
    rows = [
        (
            view.name,
            view.manifest.root.hex()[:12],
            view.manifest.kind,
            view.manifest.profile,
            str(view.manifest.layers),
            show.size(view.manifest.weight_bytes),
            show.layers(view.held_layers),
            show.layers(view.serving) if view.serving else "-",
            str(min(view.replicas, default=0)),
            str(view.version or "-"),
            str(len(view.providers)),
        )
        for view in found
    ]
    columns = ("name", "root", "kind", "profile", "layers", "size", "here", "served", "replicas", "version", "peers")
    right = ("layers", "size", "replicas", "version", "peers")
    show.console(shared).print(show.table(columns, rows, right=right, wrap=("name", "here", "served")))


@model.command("show")
@click.argument("name")
@pass_shared
def model_show(shared: Shared, name: str) -> None:
    """Show what NAME is made of: shape, root, pieces, who has them."""
    from nexus.gateway.wire import to_json
    from nexus.node.api import ModelView
    from nexus_cli.client import connected, model_path

    path = model_path(name)
    with connected(shared) as daemon:
        view = daemon.get_as(ModelView, path)
    if shared.json:
        show.print_json({"model": to_json(view)})
        return
    manifest = view.manifest
    show.pairs(
        [
            ("name", view.name),
            ("root", manifest.root.hex()),
            ("kind", manifest.kind),
            ("profile", _PROFILES[manifest.profile]),
            ("architecture", manifest.architecture),
            ("weights", f"{show.size(manifest.weight_bytes)} in {manifest.dtype}, {len(manifest.pieces)} pieces"),
            ("shape", f"{manifest.layers} layers, hidden size {manifest.hidden_size}, vocabulary {manifest.vocab_size}"),
            ("context", f"{manifest.context} tokens, {show.size(manifest.kv_bytes * manifest.layers)} of KV cache per token"),
            ("layers here", f"{show.layers(view.held_layers)} ({show.size(view.held_bytes)})"),
            ("served here", f"layers {show.layers(view.serving)}" if view.serving else "nothing"),
            ("replicas", replicas_text(view.replicas) if any(view.replicas) else "nobody undertook to serve it"),
            ("versions", versions_text(view)),
            ("peers", ", ".join(show.short_id(peer_id) for peer_id in view.providers) or "none has any of it"),
        ]
    )
    if view.fidelity is not None:
        click.echo("\nexact against float, as last measured here:")
        show.pairs(fidelity_rows(view.fidelity))
    rows = [(blob.name, show.size(blob.size), blob.root.hex()[:32]) for blob in (*manifest.pieces, *manifest.files)]
    show.console(shared).print(show.table(("piece or file", "size", "root begins"), rows, right=("size",), wrap=("piece or file",)))


@model.command("fidelity")
@click.argument("name")
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="Compare on this UTF-8 text: of a language model what blank lines part, of an encoder every line. "
    "[default: one that comes with Nexus]",
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="Directory with the float weights. [default: the one that the model was added from]",
)
@pass_shared
def model_fidelity(shared: Shared, name: str, text: Path | None, against: Path | None) -> None:
    """Show how close the exact model NAME comes to float. Both are run over the same text."""
    from nexus.core.errors import LocalError, NotFoundError
    from nexus.core.fidelity import Fidelity
    from nexus.node.progress import Progress
    from nexus_cli.client import connected, model_path

    if against is not None and not against.is_dir():
        raise NotFoundError(f"{against} is not a directory", "Give the directory that the model was added from")
    body = {
        "text": None if text is None else read_text(text),
        "text_name": None if text is None else show.printable(text.name)[-128:],
        "against": None if against is None else str(against.absolute()),
    }
    found: Fidelity | None = None
    path = model_path(name) + "/fidelity"
    with connected(shared, None) as daemon, progress_bars(shared) as advance:
        for event in daemon.stream(path, body):
            if isinstance(event, Progress):
                # One bar for all layers: they follow one another.
                advance(replace(event, phase="comparing"))
            elif isinstance(event, Fidelity):
                found = event
    if found is None:
        raise LocalError("the daemon did not say what it found", "See its log")
    if shared.json:
        computed = {"perplexity_ratio": found.perplexity_ratio, "worst_layer": asdict(found.worst_layer)}
        show.print_json({"fidelity": {"model": name, **asdict(found), **computed}})
        return
    show.pairs([("model", name), *fidelity_rows(found), ("against", found.source)])
    rows = [(layer.name, f"{layer.error:.4%}") for layer in found.layers]
    show.console(shared).print(show.table(("part", "own error"), rows, right=("own error",)))


TEXT_BYTES_MAX = 2 << 20


def read_text(path: Path) -> str:
    """A file of text for the daemon. Raises NotFoundError, and UsageError for one that is too large or not text."""
    from nexus.core.errors import NotFoundError, UsageError

    if not path.is_file():
        raise NotFoundError(f"there is no file {path}", "Give a file of UTF-8 text")
    if path.stat().st_size > TEXT_BYTES_MAX:
        raise UsageError(f"{path} is larger than {show.size(TEXT_BYTES_MAX)}", "Give a part of it: no more would be used")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text", "Convert it, or give another file") from error


def fidelity_rows(found: Fidelity) -> list[tuple[str, str]]:
    """What a report says, for people."""
    text = f"{found.text}: {show.count(found.texts, 'text')}, {show.count(found.tokens, 'token')}"
    rows = [("compared on", text)]
    if found.top1_agreement is not None and found.perplexity_ratio is not None:
        rows += [
            ("top-1 agreement", f"{found.top1_agreement:.2%} of the tokens are the same"),
            (
                "perplexity",
                f"{found.perplexity_exact:.5g} exact, {found.perplexity_float:.5g} float, ratio {found.perplexity_ratio:.4f}",
            ),
        ]
    if found.cosine_mean is not None:
        rows += [
            ("cosine", f"{found.cosine_mean:.5f} in the mean, {found.cosine_worst:.5f} the worst"),
            ("top-10 overlap", f"{found.overlap:.2%} of the nearest texts are the same"),
        ]
    worst = found.worst_layer
    return [*rows, ("worst layer", f"{worst.name}, its own error is {worst.error:.2%}")]


def plan_path(name: str, stages: int | None) -> str:
    from nexus_cli.client import model_path

    return model_path(name) + "/plan" + (f"?stages={stages}" if stages else "")


def print_plan(shared: Shared, view: PlanView) -> None:
    """Who holds what, and below it why: the reasons are sentences, and in a column of their own they would be towers."""
    screen = show.console(shared)
    screen.print(plan_table(view))
    screen.print(
        show.table(("stage", "why"), [(str(stage.stage), stage.reason) for stage in view.stages], right=("stage",), wrap=("why",))
    )


def plan_table(view: PlanView) -> Table:
    rows = [
        (
            str(stage.stage),
            stage.name,
            show.short_id(stage.peer_id),
            show.layers([(stage.start, stage.end)]),
            show.size(stage.weight_bytes),
            show.size(stage.memory_bytes),
        )
        for stage in view.stages
    ]
    return show.table(("stage", "node", "peer", "layers", "weights", "memory"), rows, right=("stage", "weights", "memory"))


@contextmanager
def progress_bars(
    shared: Shared, in_bytes: Callable[[Progress], bool] = lambda event: True
) -> Iterator[Callable[[Progress], None]]:
    """A bar per node on stderr, with what it is doing now; nothing where nobody watches. `in_bytes`: whether an event counts
    bytes."""
    from rich.progress import BarColumn, TaskID, TextColumn
    from rich.progress import Progress as Bars

    console = show.console(shared, stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[amount]}", markup=False))
    with Bars(*columns, console=console, transient=True, disable=shared.json or not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def advance(event: Progress) -> None:
            if event.peer_id not in tasks and len(tasks) < 64:
                tasks[event.peer_id] = bars.add_task("", total=None, amount="")
            if event.peer_id in tasks:
                bars.update(
                    tasks[event.peer_id],
                    description=f"{show.short_id(event.peer_id)} {show.printable(event.phase)}",
                    completed=event.done,
                    # No amount is known: the bar only moves.
                    total=event.total or None,
                    amount=_amount(event, in_bytes(event)),
                )

        yield advance


def replicas_text(replicas: Sequence[int]) -> str:
    """How many nodes serve which layers: "2 of layers 0-5, 1 of layers 6-11"."""
    runs: list[list[int]] = []
    for layer, count in enumerate(replicas):
        if runs and runs[-1][2] == count:
            runs[-1][1] = layer + 1
        else:
            runs.append([layer, layer + 1, count])
    return ", ".join(f"{count} of layers {show.layers([(start, end)])}" for start, end, count in runs) or "none"


def versions_text(view: ModelView) -> str:
    """The versions of the name; the one that is shown stands in brackets."""
    if not view.versions:
        return "none was published"
    marked = [f"[{one.version}]" if one.model_root == view.manifest.root else str(one.version) for one in view.versions]
    return f"{' '.join(marked)}, published by {show.short_id(view.publisher)}"


def _amount(event: Progress, in_bytes: bool) -> str:
    if not event.total:
        return ""
    return f"{show.size(event.done)} of {show.size(event.total)}" if in_bytes else f"{event.done} of {event.total}"
