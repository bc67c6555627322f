"""nexus slashed: who was convicted, when, and by which evidence."""

from __future__ import annotations

import click

from nexus_cli import show
from nexus_cli.options import NexusCommand, Shared, pass_shared


@click.command(cls=NexusCommand)
@click.option("--resume", is_flag=True, help="Burn the bonds that are held back because too many nodes were convicted at once.")
@pass_shared
def slashed(shared: Shared, resume: bool) -> None:
    """List the nodes that are convicted here, and why.

    They get no work. Their bonds are gone, unless so many were convicted at once that an error in Nexus is likelier than so many
    cheaters: then they are suspended until you have looked at the evidence.
    """
    from nexus.gateway.wire import to_json
    from nexus.node.api import SlashedView
    from nexus.swarm.standing import SUSPENDED
    from nexus_cli.client import connected

    burned: int | None = None
    with connected(shared) as daemon:
        if resume:
            answer = daemon.post("/v0/slashed/resume", {})
            number = answer.get("burned") if isinstance(answer, dict) else None
            burned = number if isinstance(number, int) else 0
        found = daemon.get_list(SlashedView, "/v0/slashed", "slashed")
    if shared.json:
        show.print_json({"slashed": to_json(found)} | ({"burned": burned} if burned is not None else {}))
        return
    if burned is not None:
        click.echo(f"{show.count(burned, 'bond')} burned that had been held back", err=True)
    if not found:
        click.echo("nobody is convicted here", err=True)
        return
    rows = [
        (
            one.name,
            show.short_id(one.peer_id),
            one.state,
            show.moment(one.known_ms),
            one.kind,
            one.evidence.hex()[:16],
            one.summary.replace(one.peer_id, "it"),
        )
        for one in found
    ]
    show.console(shared).print(
        show.table(("name", "peer", "state", "since (UTC)", "kind", "evidence", "because"), rows, wrap=("name", "because"))
    )
    held = sum(one.state == SUSPENDED for one in found)
    if held:
        click.echo(
            f"burning is paused for {show.count(held, 'bond')}: too many fell at once. Look at the evidence "
            "(nexus evidence show ID), then: nexus slashed --resume",
            err=True,
        )
