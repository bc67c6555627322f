"""nexus memory: the shared memory of this node. `add`, `search`, `ls`, `export` and `import` have modules of their own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nexus_cli import show, values
from nexus_cli.memory_add import memory_add
from nexus_cli.memory_file import memory_export, memory_import
from nexus_cli.memory_search import block_list, first_words, memory_ls, memory_search
from nexus_cli.options import NexusGroup, Shared, pass_shared

if TYPE_CHECKING:
    from nexus.gateway.wire import Json
    from nexus.node.memory.api import BlockView, PruneView
    from nexus_cli.client import Daemon

GET_TIMEOUT_S = 60.0
# Of the versions of a block that --versions shows.
VERSIONS_MAX = 64

KINDS_IN_WORDS = {
    "content": "",
    "sealed": "sealed: only the members of its collection can read it",
    "tombstone": "tombstone: it takes away what it replaces",
    "map": "map: a part of a map between the vectors of two models",
}

memory = NexusGroup(name="memory", help="The shared memory: add text, search by meaning.")
for command in (memory_add, memory_search, memory_ls, memory_export, memory_import):
    memory.add_command(command)


@memory.command("get")
@click.argument("id", type=values.text)
@click.option("--network/--local", default=True, help="Look for it at peers where it is not here, or only here. [default: network]")
@click.option("--versions", is_flag=True, help="Show its other versions too, as far as they are here.")
@pass_shared
def memory_get(shared: Shared, id: str, network: bool, versions: bool) -> None:
    """Show the block ID, whole. The start of an id is enough for a block that is here."""
    from nexus.gateway.wire import to_json
    from nexus.node.memory.api import BlockView
    from nexus_cli.bars import waiting_for
    from nexus_cli.client import connected

    path = block_path(id) + ("?network=true" if network else "")
    with connected(shared, GET_TIMEOUT_S) as daemon, waiting_for(shared, "looking for it"):
        view = daemon.get_as(BlockView, path)
        others = _versions(daemon, view) if versions else []
    if shared.json:
        show.print_json({"block": to_json(view)} | ({"versions": to_json(others)} if versions else {}))
        return
    show.pairs(_lines(view))
    if view.text:
        click.echo()
        _print_text(shared, view.text)
    if versions:
        if others:
            screen = show.console(shared)
            screen.print(block_list(others, screen.width))
        else:
            click.echo("no other version of it is here", err=True)
    if len(view.heads) > 1:
        click.echo(f"in conflict: {len(view.heads)} versions that nothing replaces; searches show {view.winner}", err=True)


def _print_text(shared: Shared, text: str) -> None:
    """As it is, but on a terminal: there lines are broken between words, and nothing in the text can steer it."""
    screen = show.console(shared)
    if not screen.is_terminal:
        click.echo(text)
        return
    from rich.text import Text

    screen.print(Text(show.printable_stream(text)))


def _versions(daemon: Daemon, view: BlockView) -> list[BlockView]:
    """The versions of a block that are here, the newest first."""
    from nexus.core.errors import NotFoundError
    from nexus.node.memory.api import BlockView

    known: dict[str, BlockView | None] = {view.id: view}
    waiting = [*view.heads, view.winner, *view.parents]
    while waiting and len(known) <= VERSIONS_MAX:
        name = waiting.pop(0)
        if name in known or not name:
            continue
        try:
            found = daemon.get_as(BlockView, block_path(name))
        except NotFoundError:
            known[name] = None
            continue
        known[name] = found
        waiting += found.parents
    others = [one for one in known.values() if one is not None and one.id != view.id]
    return sorted(others, key=lambda one: -one.created_ms)


def _lines(view: BlockView) -> list[tuple[str, str]]:
    bounds = [
        f"not before {show.moment(view.not_before_ms)}" if view.not_before_ms is not None else "",
        f"not after {show.moment(view.not_after_ms)}" if view.not_after_ms is not None else "",
        f"attested by {show.count(view.witnesses, 'other node')}" if view.witnesses else "",
    ]
    known = ", ".join(bound for bound in bounds if bound)
    document = f"part {view.part + 1} of document {view.source[:16]}" if view.source else ""
    lines = [
        ("block", view.id),
        ("kind", KINDS_IN_WORDS.get(view.kind, view.kind)),
        ("title", view.title),
        ("collection", view.collection),
        ("author", f"{view.author} {view.author_name}".rstrip()),
        ("made", f"{show.moment(view.created_ms)} UTC, {show.ago(view.created_ms)}"),
        ("time is", view.grade + (f": {known}" if known else "")),
        ("place", f"{view.place}, the middle of a cell of {view.place_step:g}°" if view.place else ""),
        ("came here", f"{show.moment(view.received_ms)} UTC" if view.received_ms else ""),
        ("expires", f"{show.moment(view.expires_ms)} UTC" if view.expires_ms else ""),
        ("language", view.lang),
        ("tags", ", ".join(view.tags)),
        ("from", document),
        ("links", ", ".join(view.links)),
        ("replaces", ", ".join(view.parents)),
        ("replaced by", view.winner if view.winner not in ("", view.id) else ""),
        ("vectors", ", ".join(view.models)),
        ("state", view.state + (", pinned" if view.pinned else "")),
        ("size", show.size(view.size)),
    ]
    return [(name, value) for name, value in lines if value]


@memory.command("rm")
@click.argument("id", type=values.text)
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_shared
def memory_rm(shared: Shared, id: str, yes: bool) -> None:
    """Take away an own block everywhere. The block ID, which this node wrote, and its earlier versions.

    A signed tombstone stays in its place. Blocks of others can only be pruned, from this node alone.
    """
    from nexus.core.errors import LocalError
    from nexus.node.memory.api import BlockView
    from nexus_cli.client import connected

    with connected(shared, None) as daemon:
        view = daemon.get_as(BlockView, block_path(id))
        if not yes:
            if not shared.json:
                _print_what_goes(view)
            check_can_ask(shared)
            confirm("Take it away on every node, for good?")
        answer = daemon.post("/v0/memory/remove", {"block": view.id})
    removed = answer.get("removed") if isinstance(answer, dict) else None
    if not isinstance(removed, list):
        raise LocalError("the daemon did not say what it took away", "Run the same version of nexus and nexusd")
    if shared.json:
        show.print_json({"removed": removed})
        return
    for one in removed:
        click.echo(show.printable(str(one)))


def _print_what_goes(view: BlockView) -> None:
    click.echo(f"{view.id}  {show.printable(view.collection)}, made {show.ago(view.created_ms)}", err=True)
    click.echo(show.printable(first_words(view))[:100], err=True)
    if view.parents:
        click.echo("it replaces earlier versions, which go too", err=True)


@memory.command("pin")
@click.argument("id", type=values.text)
@pass_shared
def memory_pin(shared: Shared, id: str) -> None:
    """Keep the block ID here, whatever is pruned."""
    _pin(shared, id, True)


@memory.command("unpin")
@click.argument("id", type=values.text)
@pass_shared
def memory_unpin(shared: Shared, id: str) -> None:
    """Let the block ID be pruned again."""
    _pin(shared, id, False)


def _pin(shared: Shared, name: str, pinned: bool) -> None:
    from nexus.gateway.wire import to_json
    from nexus.node.memory.api import BlockView
    from nexus_cli.client import connected

    check_block_name(name)
    with connected(shared) as daemon:
        view = daemon.post_as(BlockView, "/v0/memory/pin", {"block": name, "pinned": pinned})
    if shared.json:
        show.print_json({"block": to_json(view)})
    else:
        click.echo(f"{view.id}  {'pinned' if view.pinned else 'not pinned'}")


@memory.command("prune")
@click.option("--older-than", type=values.span, help="Blocks that came here longer ago than this: 30d, 12h.")
@click.option("--max-bytes", type=values.size, help="The oldest, until all that stay take at most this: 512MiB.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_shared
def memory_prune(shared: Shared, older_than: float | None, max_bytes: int | None, dry_run: bool, yes: bool) -> None:
    """Give up old blocks on this node. Only their contents go. Other nodes keep theirs; pinned blocks stay."""
    from nexus.gateway.wire import to_json
    from nexus.node.memory.api import PruneView
    from nexus_cli.client import connected

    if older_than is None and max_bytes is None:
        raise click.UsageError("say what is too much: --older-than, --max-bytes, or both")
    body: dict[str, Json] = {"older_than_s": older_than, "bytes_max": max_bytes}
    with connected(shared, None) as daemon:
        if dry_run or not yes:
            view = daemon.post_as(PruneView, "/v0/memory/prune", body | {"dry_run": True})
            if not shared.json:
                click.echo(_pruned(view, "would go"), err=True)
        if not dry_run:
            if not yes:
                check_can_ask(shared)
                confirm("Give them up on this node?")
            view = daemon.post_as(PruneView, "/v0/memory/prune", body | {"dry_run": False})
            if not shared.json:
                click.echo(_pruned(view, "given up"), err=True)
    if shared.json:
        show.print_json({"pruned": to_json(view)})


def _pruned(view: PruneView, what: str) -> str:
    return f"{what}: {show.count(view.blocks, 'block')}, {show.size(view.bytes)}"


@memory.command("stats")
@pass_shared
def memory_stats(shared: Shared) -> None:
    """Show how much is here, by collection."""
    from nexus.gateway.wire import to_json
    from nexus.node.memory.api import StatsView
    from nexus_cli.client import connected

    with connected(shared) as daemon:
        view = daemon.get_as(StatsView, "/v0/memory/stats")
    if shared.json:
        show.print_json({"stats": to_json(view)})
        return
    show.pairs(
        [
            ("blocks", ", ".join(f"{number} {state}" for state, number in view.blocks) or "none"),
            ("size", f"{show.size(view.bytes)} of at most {show.size(view.bytes_max)}"),
            ("on the disk", f"{show.size(view.disk_bytes)} with indexes"),
            ("model", view.model or "none"),
        ]
    )
    rows = [
        (
            one.collection,
            str(one.live),
            show.size(one.bytes),
            ", ".join(f"{model} {number}" for model, number in one.vectors) or "-",
        )
        for one in view.collections
    ]
    columns = ("collection", "live", "size", "vectors")
    if rows:
        show.console(shared).print(show.table(columns, rows, right=columns[1:3], wrap=("collection", "vectors")))
    for notice in view.notices:
        click.echo(show.printable(notice), err=True)


@memory.command("verify")
@click.argument("id", type=values.text, required=False)
@click.option("--all", "all_", is_flag=True, help="Every block that is here, which is also what is done without ID.")
@pass_shared
def memory_verify(shared: Shared, id: str | None, all_: bool) -> None:
    """Check blocks again. The block ID, or all, read from the disk: hash, signature, sky, and place in the index.

    What is damaged is given up, and fetched again from peers that have it. Exit code 7 if anything was.
    """
    from nexus.core.errors import LocalError, VerificationError
    from nexus.gateway.wire import to_json
    from nexus.node.memory.api import VerifyView
    from nexus.node.progress import Progress
    from nexus_cli.bars import bars
    from nexus_cli.client import connected

    if id is not None and all_:
        raise click.UsageError("give either ID or --all")
    if id is not None:
        check_block_name(id)
    view: VerifyView | None = None
    with connected(shared, None) as daemon, bars(shared) as advance:
        for event in daemon.stream("/v0/memory/verify", {"block": id}):
            match event:
                case Progress():
                    advance("verify", event.phase, event.done, event.total)
                case VerifyView():
                    view = event
    if view is None:
        raise LocalError("the daemon did not say what it found", "Its log says more")
    if shared.json:
        show.print_json({"verified": to_json(view)})
    else:
        for problem in view.problems:
            click.echo(show.printable(problem))
        repaired = f", {view.repaired} repaired" if view.damaged or view.repaired else ""
        click.echo(f"{show.count(view.checked, 'block')} checked, {view.damaged} damaged{repaired}", err=True)
    if view.damaged:
        raise VerificationError(
            f"{show.count(view.damaged, 'block')} {'was' if view.damaged == 1 else 'were'} damaged",
            "Look at the disk (nexus doctor); peers that have them send them again: nexus collection sync",
        )


@memory.command("reindex")
@click.option(
    "--model", type=values.text, required=True, metavar="NAME", help="The model: minilm, or a directory of sentence-transformers."
)
@click.option("--collection", type=values.text, metavar="NAME", help="Only this collection. [default: all]")
@pass_shared
def memory_reindex(shared: Shared, model: str, collection: str | None) -> None:
    """Compute vectors of another model too. Searches go on meanwhile; the vectors that there are stay."""
    from nexus.core.errors import LocalError
    from nexus.gateway.wire import to_json
    from nexus.node.memory.api import ReindexView
    from nexus.node.progress import Progress
    from nexus_cli.bars import bars
    from nexus_cli.client import connected

    if Path(model).expanduser().is_dir():
        model = str(Path(model).expanduser().absolute())
    view: ReindexView | None = None
    with connected(shared, None) as daemon, bars(shared) as advance:
        for event in daemon.stream("/v0/memory/reindex", {"model": model, "collection": collection}):
            match event:
                case Progress():
                    advance("reindex", event.phase, event.done, event.total)
                case ReindexView():
                    view = event
    if view is None:
        raise LocalError("the daemon did not say that all have vectors", "See its log, and: nexus memory stats")
    if shared.json:
        show.print_json({"reindexed": to_json(view)})
        return
    missing = f"; {view.missing} without a text here were left out" if view.missing else ""
    maps = f"; {show.count(view.maps, 'map')} between models published" if view.maps else ""
    click.echo(f"{show.count(view.embedded, 'block')} got a vector of {show.printable(view.model)}{missing}{maps}", err=True)


def check_can_ask(shared: Shared) -> None:
    """Raises UsageError where nobody sits at a terminal."""
    from nexus.core.errors import UsageError

    if shared.json or not sys.stdin.isatty():
        raise UsageError("nothing was changed: this has to be confirmed", "Give --yes")


def confirm(question: str) -> None:
    """Raises LocalError for a no."""
    from nexus.core.errors import LocalError

    if not click.confirm(question, err=True):
        raise LocalError("nothing was changed")


def check_block_name(name: str) -> str:
    """Raises NotFoundError for what cannot be the id of a block, or the start of one."""
    from nexus.core.errors import NotFoundError

    if not name or len(name) > 59 or not name.isascii() or not name.isalnum():
        raise NotFoundError(f"no block has the id {name[:80]!r}", "`nexus memory ls` shows those that are here")
    return name


def block_path(name: str) -> str:
    return f"/v0/memory/blocks/{check_block_name(name)}"
