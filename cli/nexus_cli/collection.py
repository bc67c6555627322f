"""nexus collection: collections of blocks, who writes and reads them, and who has which of them."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

import click

from nexus_cli import show, values
from nexus_cli.options import NexusGroup, Shared, pass_shared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nexus.gateway.wire import Json
    from nexus.node.memory.api import CollectionView, SyncView

SUBSCRIBE_TIMEOUT_S = 60.0

collection = NexusGroup(name="collection", help="Collections of the memory: create, share, follow.")


@collection.command("create")
@click.argument("name", type=values.text)
@click.option("--private", is_flag=True, help="Only its members can read it, and nobody else its contents.")
@click.option("--writers", is_flag=True, help="Anybody reads it; only this node and those named with --write write.")
@click.option(
    "--write", "write", type=values.text, multiple=True, metavar="PEER", help="Let this peer write; may be given several times."
)
@pass_shared
def collection_create(shared: Shared, name: str, private: bool, writers: bool, write: tuple[str, ...]) -> None:
    """Make a collection. This node owns NAME. Without options anybody reads it and writes in it."""
    from nexus.gateway.wire import to_json
    from nexus.node.memory.api import CollectionView
    from nexus_cli.client import connected

    if private and writers:
        raise click.UsageError("--private and --writers exclude each other: the writers of a private collection are its members")
    mode = "private" if private else "writers" if writers or write else "public"
    with connected(shared) as daemon:
        view = daemon.post_as(CollectionView, "/v0/collections", {"name": name, "mode": mode, "writers": list(write)})
    if shared.json:
        show.print_json({"collection": to_json(view)})
        return
    _print(view)


@collection.command("ls")
@pass_shared
def collection_ls(shared: Shared) -> None:
    """List the collections that this node knows."""
    from nexus.gateway.wire import to_json
    from nexus.node.memory.api import CollectionView
    from nexus_cli.client import connected

    with connected(shared) as daemon:
        found = daemon.get_list(CollectionView, "/v0/collections", "collections")
    if shared.json:
        show.print_json({"collections": to_json(found)})
        return
    rows = [
        (
            one.name,
            one.mode,
            _owner(one),
            "yes" if one.subscribed else "no",
            "read and write" if one.may_write else "read" if one.may_read else "neither",
            str(one.blocks),
            show.size(one.bytes),
        )
        for one in found
    ]
    columns = ("collection", "mode", "owner", "followed", "this node may", "blocks", "size")
    show.console(shared).print(show.table(columns, rows, right=("blocks", "size"), wrap=("collection", "owner")))


@collection.command("grant")
@click.argument("name", type=values.text)
@click.argument("peer", type=values.text)
@click.option("--write", is_flag=True, help="To write too, not only to read.")
@click.option("--revoke", is_flag=True, help="Take it away: from now on, with --write only writing.")
@pass_shared
def collection_grant(shared: Shared, name: str, peer: str, write: bool, revoke: bool) -> None:
    """Let a peer read or write. In the private collection NAME, or to write in any. PEER is an id, its start, or a node's name."""
    _change(shared, name, "grant", {"peer": peer, "write": write, "revoke": revoke})


@collection.command("subscribe")
@click.argument("name", type=values.text)
@click.option("--from", "peer", type=values.text, metavar="PEER", help="Get it from this peer. [default: any that has it]")
@pass_shared
def collection_subscribe(shared: Shared, name: str, peer: str | None) -> None:
    """Follow a collection. The blocks of NAME come here and stay up to date. NAME@PEER tells owners apart."""
    _change(shared, name, "subscribe", {"peer": peer})


@collection.command("unsubscribe")
@click.argument("name", type=values.text)
@pass_shared
def collection_unsubscribe(shared: Shared, name: str) -> None:
    """Follow a collection no longer. Its blocks stay here until they are pruned."""
    _change(shared, name, "unsubscribe", {})


def _change(shared: Shared, name: str, verb: str, body: dict[str, Json]) -> None:
    from nexus.core.errors import UsageError
    from nexus.gateway.wire import to_json
    from nexus.node.memory.api import CollectionView
    from nexus_cli.bars import waiting_for
    from nexus_cli.client import connected

    # A slash would make another path of it, and nothing is called so.
    if not name or "/" in name or name in (".", ".."):
        raise UsageError(f"{name!r} is no name of a collection", "`nexus collection ls` shows those that there are")
    with connected(shared, SUBSCRIBE_TIMEOUT_S) as daemon, waiting_for(shared, "asking"):
        view = daemon.post_as(CollectionView, f"/v0/collections/{quote(name, safe='@')}/{verb}", body)
    if shared.json:
        show.print_json({"collection": to_json(view)})
    else:
        _print(view)


@collection.command("sync")
@click.argument("name", type=values.text, required=False)
@click.option("--status", is_flag=True, help="Only show how it stands with every peer.")
@pass_shared
def collection_sync(shared: Shared, name: str | None, status: bool) -> None:
    """Exchange blocks with peers now. The collection NAME, or all, with all peers in reach. It also happens by itself."""
    from nexus.gateway.wire import to_json
    from nexus.node.memory.api import SyncView
    from nexus_cli.bars import waiting_for
    from nexus_cli.client import connected

    with connected(shared, None) as daemon, waiting_for(shared, "exchanging"):
        if status:
            found = daemon.get_list(SyncView, "/v0/collections/sync", "sync")
            if name is not None:
                found = tuple(one for one in found if name in (one.collection, one.collection.partition("@")[0]))
        else:
            found = daemon.post_list(SyncView, "/v0/collections/sync", {"collection": name}, "sync")
    if shared.json:
        show.print_json({"sync": to_json(found)})
        return
    if not found:
        click.echo("nobody in reach follows it too; see: nexus peers", err=True)
        return
    show.console(shared).print(
        show.table(
            ("collection", "peer", "state", "missing", "received", "refused", "last", "next try", "why"),
            [_row(one) for one in found],
            right=("missing", "received", "refused"),
            wrap=("collection", "peer", "why"),
        )
    )


def _row(one: SyncView) -> tuple[str, ...]:
    return (
        one.collection,
        one.name or show.short_id(one.peer_id),
        one.state,
        str(one.missing),
        str(one.received),
        str(one.refused),
        show.ago(one.last_success_ms) if one.last_success_ms else "never",
        f"in {show.duration(one.next_try_s)}" if one.next_try_s > 0 else "-",
        one.reason or "-",
    )


def _owner(view: CollectionView) -> str:
    return view.owner_name or show.short_id(view.owner) if view.owner else "nobody"


def _print(view: CollectionView) -> None:
    def peers(ids: Sequence[str]) -> str:
        return ", ".join(show.short_id(peer_id) for peer_id in ids)

    reads = {"private": "the owner and the members"}.get(view.mode, "anybody")
    lines = [
        ("collection", view.name),
        ("id", view.id.hex()),
        ("owner", f"{view.owner} {view.owner_name}".rstrip() or "nobody"),
        ("mode", view.mode),
        (
            "writes",
            "anybody" if view.mode in ("open", "public") else f"the owner{', ' if view.writers else ''}{peers(view.writers)}",
        ),
        (
            "reads",
            reads
            + (f": {peers((*view.writers, *view.members))}" if view.mode == "private" and view.writers + view.members else ""),
        ),
        ("followed", "yes" if view.subscribed else "no"),
        ("blocks", f"{view.blocks} here, {show.size(view.bytes)}"),
    ]
    show.pairs(lines)
