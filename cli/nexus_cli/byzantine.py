"""nexusd with a dishonest conduct, for test networks on this machine: python -m nexus_cli.byzantine --attack NAME, and nexusd's own
arguments. Nothing else of Nexus starts one but `nexus testnet` and `nexus demo`, and no setting makes a node cheat.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nexus.core.errors import UsageError
from nexus_cli.options import check_home, daemon_options, flags_from

if TYPE_CHECKING:
    from nexus.core.manifest import Manifest
    from nexus.node.cheating import Conduct
    from nexus.node.options import NodeOptions


@click.command(context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": None})
@click.option("--attack", required=True, metavar="NAME", help="What it does wrong; `nexus attacks` lists the names.")
@daemon_options
@click.option("--home", type=click.Path(path_type=Path), callback=check_home, help="Data directory.")
def byzantine(
    attack: str, home: Path | None, init: bool, settings: tuple[str, ...], log_level: str | None, log_format: str | None
) -> None:
    """Run a node that cheats, in a test network on this machine."""
    from nexus_cli.daemon import run_daemon

    check_attack(attack)
    run_daemon(home, init, flags_from(settings, log_level, log_format), lambda options: conduct_on_loopback(attack, options))


def check_attack(name: str) -> None:
    """Raises UsageError for a name that no attack has."""
    from nexus.node.attacks import ATTACKS

    if name not in ATTACKS:
        raise UsageError(f"there is no attack {name!r}", "`nexus attacks` lists those that there are")


def conduct_on_loopback(attack: str, options: NodeOptions) -> Conduct:
    """What the cheater does. Raises UsageError unless its node can be reached, and reaches others, on this machine only."""
    from nexus.node.attacks import Means, conduct_of
    from nexus.storage.blobs import BlobStore
    from nexus.storage.home import Home, load_identity

    check_loopback(options)
    home = Home(options.home)
    blobs = BlobStore(home.models)

    def files(manifest: Manifest, start: int, end: int) -> Mapping[str, Path]:
        return {blob.name: blobs.path(blob.root) for blob in (*manifest.files, *manifest.pieces) if blobs.has(blob.root)}

    return conduct_of(attack, Means(load_identity(home), files))


def check_loopback(options: NodeOptions) -> None:
    """Raises UsageError unless the node listens on, and begins with, loopback addresses alone and looks for no others."""
    for address in (*options.listen, *options.bootstrap):
        if not _is_loopback(address):
            raise UsageError(
                f"a node that cheats stays on this machine, and {address} is not of it",
                "Set network.listen and network.bootstrap to addresses of 127.0.0.1",
            )
    if options.mdns:
        raise UsageError(
            "a node that cheats stays on this machine, and mDNS would look for others around it", "Set network.mdns = false"
        )


def _is_loopback(address: str) -> bool:
    from nexus.core.errors import MalformedError
    from nexus.network.addresses import parse_endpoint

    try:
        endpoint = parse_endpoint(address.partition("/p2p/")[0])
    except MalformedError:
        return False
    # A name may come to mean anything.
    return endpoint.kind in ("ip4", "ip6") and ipaddress.ip_address(endpoint.host).is_loopback


def main() -> None:
    """Entry point of `python -m nexus_cli.byzantine`."""
    from nexus_cli.main import run_command

    run_command(byzantine)


if __name__ == "__main__":
    main()
