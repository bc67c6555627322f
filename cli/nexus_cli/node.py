"""nexus init, nexus id: the data directory and the key in it."""

from __future__ import annotations

import click

from nexus_cli import show
from nexus_cli.options import NexusCommand, Shared, pass_shared


@click.command(cls=NexusCommand)
@click.option("--name", help="What others see beside the node's id. [default: the host name]")
@pass_shared
def init(shared: Shared, name: str | None) -> None:
    """Make a data directory with a new identity."""
    from nexus.storage.home import create_home, load_identity
    from nexus_config.settings import load

    load({"node.name": name} if name else {}, {}, shared.path)  # refuse a bad name before anything is made
    home = create_home(shared.path)
    if not home.config_file.exists():
        home.config_file.write_text(_config_text(name), "utf-8")
    peer_id = load_identity(home).peer_id
    if shared.json:
        show.print_json({"home": str(home.path), "peer_id": peer_id, "config": str(home.config_file)})
        return
    show.pairs([("peer id", peer_id), ("data directory", str(home.path)), ("settings", str(home.config_file))])
    click.echo("Keep identity.key safe: whoever has it is this node. Next: nexus start --detach", err=True)


def _config_text(name: str | None) -> str:
    import json

    # A JSON string of printable text is a TOML string as well.
    section = f"\n[node]\nname = {json.dumps(name)}\n" if name else ""
    return "# Settings of this node that differ from the defaults; `nexus config show` prints all of them.\n" + section


@click.command(cls=NexusCommand, name="id")
@pass_shared
def id_(shared: Shared) -> None:
    """Print this node's id. With a running daemon also its addresses."""
    from nexus.core.errors import DaemonNotRunningError
    from nexus.storage.home import load_identity
    from nexus_cli.client import connected
    from nexus_config.settings import node_options

    identity = load_identity(shared.open_home())
    addresses: list[str] = []
    running = True
    try:
        with connected(shared) as daemon:
            answer = daemon.get("/v0/id")
            listed = answer.get("addresses") if isinstance(answer, dict) else None
            addresses = [str(address) for address in listed] if isinstance(listed, list) else []
    except DaemonNotRunningError:
        running = False
    if shared.json:
        show.print_json(
            {
                "peer_id": identity.peer_id,
                "public_key": identity.public_key.hex(),
                "name": node_options(shared.settings(), shared.path).name,
                "running": running,
                "addresses": addresses,
            }
        )
        return
    click.echo(identity.peer_id)
    for address in addresses:
        click.echo(show.printable(address))
    if not running:
        click.echo("the daemon is not running, so there are no addresses yet", err=True)
