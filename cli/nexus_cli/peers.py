"""nexus peers, nexus ping: who is connected, and how far away."""

from __future__ import annotations

import click

from nexus_cli import show
from nexus_cli.options import NexusCommand, NexusGroup, Shared, pass_shared


@click.group(cls=NexusGroup)
@click.pass_context
@pass_shared
def peers(shared: Shared, context: click.Context) -> None:
    """List connected peers, or add one."""
    if context.invoked_subcommand is not None:
        return
    from nexus.gateway.wire import to_json
    from nexus.node.api import PeerView
    from nexus_cli.client import connected

    with connected(shared) as daemon:
        found = daemon.get_list(PeerView, "/v0/peers", "peers")
    if shared.json:
        show.print_json({"peers": to_json(found)})
        return
    if not found:
        click.echo("no peers; add one with: nexus peers add MULTIADDR", err=True)
        return
    rows = [
        (
            peer.name,
            show.short_id(peer.peer_id),
            peer.direction,
            "?" if peer.rtt_s is None else show.duration(peer.rtt_s),
            show.size(peer.memory_bytes),
            "; ".join(peer.models) or "-",
        )
        for peer in found
    ]
    show.console(shared).print(
        show.table(
            ("name", "peer", "dir", "round trip", "memory", "models"), rows, right=("round trip", "memory"), wrap=("name", "models")
        )
    )


@peers.command("add")
@click.argument("multiaddr")
@pass_shared
def peers_add(shared: Shared, multiaddr: str) -> None:
    """Connect to MULTIADDR and remember it. It ends in /p2p/<peer id>; the other node prints it with: nexus id"""
    from nexus.core.errors import PeerError, UsageError
    from nexus.gateway.wire import from_json, to_json
    from nexus.node.api import PeerView
    from nexus_cli.client import connected
    from nexus_config.settings import check_multiaddr

    try:
        check_multiaddr(multiaddr, with_peer=True)
    except ValueError as error:
        raise UsageError(
            f"{multiaddr!r} is not a peer's address: {error}", "The other node prints its own with: nexus id"
        ) from error
    with connected(shared) as daemon:
        try:
            peer = from_json(PeerView, daemon.post("/v0/peers", {"address": multiaddr}))
        except PeerError as error:
            error.fix = (
                error.fix or "Does that node run, and does a firewall let its port through? It prints its addresses with: nexus id"
            )
            raise
    if shared.json:
        show.print_json({"peer": to_json(peer)})
        return
    click.echo(f"{show.printable(peer.name)}  {peer.peer_id}")
    click.echo("connected, and kept in the address book", err=True)


@click.command(cls=NexusCommand)
@click.argument("peer")
@click.option("--count", type=click.IntRange(1, 1000), default=1, show_default=True, help="Round trips to measure.")
@pass_shared
def ping(shared: Shared, peer: str, count: int) -> None:
    """Measure the round trip to PEER. That is an id, the start of one, or a node's name."""
    from nexus.core.errors import LocalError
    from nexus_cli.client import connected

    times: list[float] = []
    with connected(shared) as daemon:
        for _ in range(count):
            answer = daemon.post("/v0/ping", {"peer": peer})
            rtt_s = answer.get("rtt_s") if isinstance(answer, dict) else None
            if not isinstance(rtt_s, (int, float)):
                raise LocalError("the daemon's answer has no round-trip time", "Run the same version of nexus and nexusd")
            times.append(float(rtt_s))
            if not shared.json:
                click.echo(show.duration(float(rtt_s)))
    if shared.json:
        show.print_json({"peer": peer, "rtt_s": times})
