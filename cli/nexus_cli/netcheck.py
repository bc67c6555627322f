"""nexus netcheck: can others reach this node, how, and what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from nexus_cli import show
from nexus_cli.options import NexusCommand, Shared, pass_shared

if TYPE_CHECKING:
    from nexus.network.reachability import AddressCheck, Netcheck
    from nexus.node.netcheck import NetcheckView

EXIT_NOT_REACHED, EXIT_CANNOT_TELL = 1, 8

_SCOPES = {"loopback": "this machine", "private": "the local network", "public": "the Internet"}
_NATS = {
    ("none", "none"): "none between this node and the peers that looked",
    ("behind", "endpoint_independent"): "yes; it keeps one outside port for all peers (endpoint-independent mapping)",
    ("behind", "address_dependent"): "yes; it takes another outside port for each peer (address-dependent mapping)",
    (
        "behind",
        "unknown",
    ): "yes; how it maps ports cannot be told: that takes two peers at different addresses, dialled by this node",
    ("unknown", "unknown"): "cannot be told: no peer said where it sees this node",
}


@click.command(cls=NexusCommand)
@pass_shared
def netcheck(shared: Shared) -> None:
    """Say whether others can reach this node, and how. By which address, behind which NAT, through which relay, and what to do.

    Exit code 0: they can, directly or through a relay; 1: they cannot; 8: nobody outside could try."""
    from nexus.gateway.wire import from_json, to_json
    from nexus.node.netcheck import NetcheckView
    from nexus_cli.client import connected

    with connected(shared) as daemon:
        view = from_json(NetcheckView, daemon.post("/v0/netcheck", {}))
    code = exit_code(view.network)
    if shared.json:
        show.print_json({"netcheck": to_json(view), "exit_code": code})
    else:
        for line in lines(view):
            click.echo(show.printable(line))
    if code:
        raise click.exceptions.Exit(code)


def exit_code(found: Netcheck) -> int:
    if found.verdict == "reachable" or (found.verdict == "unreachable" and found.relays):
        return 0
    return EXIT_NOT_REACHED if found.verdict == "unreachable" else EXIT_CANNOT_TELL


def lines(view: NetcheckView) -> list[str]:
    found, names = view.network, dict(view.names)
    out = [_verdict(found)]
    out.append(f"NAT        {_NATS.get((found.nat, found.mapping), f'{found.nat}, {found.mapping}')}")
    out.append(f"peers      {found.peers} connected, {found.asked} of them looked")
    for check in found.addresses:
        out.append(f"address    {check.address}  ({check.origin})")
        out += [f"           {line}" for line in _tried(check, names)]
    for one in found.observations:
        how = f"from port {one.local.port} of this machine" if one.reused else "on a connection made for something else"
        out.append(
            f"seen       {_name(one.peer_id, names)} at {one.peer_ip} sees this node at {one.seen.host} port {one.seen.port}, {how}"
        )
    out += [
        f"relay      {_name(one.relay, names)} keeps a place for this node for {show.duration(max(0.0, one.expires_in_s))}"
        for one in found.relays
    ]
    if found.relay_service:
        out.append("relay      this node is one for others (network.relay = on)")
    out.append(f"clock      {_clock(view, names)}")
    out += [f"do         {line}" for line in view.advice]
    return out


def _verdict(found: Netcheck) -> str:
    where = _SCOPES.get(found.scope, "")
    if found.verdict == "reachable":
        return "reachable  others reach this node directly, from the Internet"
    if found.verdict == "local_only":
        return f"reachable  from {where}; whether from further away cannot be told, for no peer there could try"
    if found.verdict == "unreachable":
        through = f", but through {show.count(len(found.relays), 'relay')}" if found.relays else ""
        return f"not reachable  peers in {where} cannot dial this node{through}"
    return "cannot tell  no peer could try to dial this node"


def _tried(check: AddressCheck, names: dict[str, str]) -> list[str]:
    if check.origin == "relay":
        return ["through a relay, which keeps a place for this node"]
    words = {"ok": "reached it", "failed": "could not reach it", "refused": "did not try"}
    said = [
        f"{_name(one.peer_id, names)} {words.get(one.result, one.result)}{f': {one.detail}' if one.detail else ''}"
        for one in check.tried
    ]
    return said or ["nobody tried: no peer sees this node there"]


def _clock(view: NetcheckView, names: dict[str, str]) -> str:
    if not view.clocks:
        return "cannot be told: no peer said what time it is"
    worst = max(view.clocks, key=lambda one: abs(one.ahead_ms))
    off, uncertain = abs(worst.ahead_ms) / 1000, worst.uncertain_ms / 1000
    apart = f"at most {off:.3f} s (give or take {uncertain:.3f}) from {_name(worst.peer_id, names)}"
    return f"{'agrees with most peers' if view.clock == 'ok' else 'disagrees with most peers'}: {apart}"


def _name(peer_id: str, names: dict[str, str]) -> str:
    return names.get(peer_id) or show.short_id(peer_id)
