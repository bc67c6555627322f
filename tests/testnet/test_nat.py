"""Two nodes behind masquerading NATs and two relays on the Internet between them, as real daemons in network namespaces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from nexus.core.errors import NexusError
from nexus.storage.home import create_home, load_identity
from nexus_cli.client import Daemon
from nexus_cli.processes import why_it_ended
from tests.testnet import namespaces
from tests.testnet.memory_nodes import NEXUS, until

pytestmark = pytest.mark.slow

PORT = 4510
RELAYS = ("5.6.7.1", "5.6.7.2")
HOMES = {"ann": ("5.6.7.10", "192.168.1.2"), "bob": ("5.6.7.20", "192.168.2.2")}
READY_TIMEOUT_S = 60.0
MEET_TIMEOUT_S = 90.0
COMMAND_TIMEOUT_S = 120
QUESTION = "Why is the sky blue?"


class Daemons:
    """Daemons in namespaces; their control sockets are files, which namespaces share."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self.peer_ids: dict[str, str] = {}

    def home(self, name: str) -> Path:
        return self._place / name

    def start(self, name: str, space: str, *settings: str) -> None:
        home = self.home(name)
        self.peer_ids[name] = load_identity(create_home(home)).peer_id
        common = (
            "network.mdns=false",
            f"node.name={name}",
            "engine.threads=1",
            "memory.enabled=false",
            "control.drain_timeout_s=1",
        )
        options = [f"--set={setting}" for setting in (*common, *settings)]
        command = ["ip", "netns", "exec", space, sys.executable, "-c", "from nexus_cli.daemon import main; main()"]
        environ = {key: value for key, value in os.environ.items() if not key.startswith("NEXUS_")}
        with (home / "nexusd.log").open("wb") as output:
            self._running[name] = subprocess.Popen(
                [*command, "--home", str(home), *options], stdout=output, stderr=subprocess.STDOUT, env=environ
            )
        until(lambda: self._is_ready(name), READY_TIMEOUT_S, f"{name} is ready")

    def _is_ready(self, name: str) -> bool:
        assert self._running[name].poll() is None, why_it_ended(self.home(name) / "nexusd.log")
        try:
            Daemon(self.home(name) / "control.sock", 5.0).get("/readyz")
        except NexusError:
            return False
        return True

    def nexus(self, name: str, *arguments: str, codes: tuple[int, ...] = (0,)) -> Any:
        done = subprocess.run(
            [*NEXUS, "--home", str(self.home(name)), *arguments, "--json"],
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            check=False,
        )
        assert done.returncode in codes, f"{name}: nexus {' '.join(arguments)}: {done.returncode}: {done.stdout}{done.stderr}"
        return json.loads(done.stdout)

    def stop(self) -> None:
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    """Ann and Bob at home, Bob behind a router that takes another outside port for each destination; Rae and Roy are relays."""
    reason = namespaces.why_not()
    if reason:
        pytest.skip(reason)
    with ExitStack() as stack:
        net = stack.enter_context(namespaces.internet())
        daemons = Daemons(tmp_path_factory.mktemp("nat"))
        stack.callback(daemons.stop)
        relays = []
        for name, address in zip(("rae", "roy"), RELAYS, strict=True):
            known = f"network.bootstrap={','.join(relays)}"
            daemons.start(name, net.host(name, address), "network.relay=on", "serve.enabled=false", known)
            relays.append(f"/ip4/{address}/tcp/{PORT}/p2p/{daemons.peer_ids[name]}")
        for name, (outside, inside) in HOMES.items():
            space = net.home(name, outside, inside, random_ports=name == "bob")
            daemons.start(name, space, f"network.bootstrap={','.join(relays)}")
        yield daemons


def circuits(daemons: Daemons, name: str) -> list[str]:
    addresses = daemons.nexus(name, "id")["addresses"]
    return [address for address in addresses if "p2p-circuit" in address]


def test_nodes_behind_nats_keep_places_at_two_relays(nodes: Daemons) -> None:
    for name in HOMES:
        until(lambda name=name: len(circuits(nodes, name)) == 2, MEET_TIMEOUT_S, f"{name} has places at two relays")
        for address in circuits(nodes, name):
            assert address.startswith(tuple(f"/ip4/{relay}/tcp/{PORT}/p2p/" for relay in RELAYS))
            assert address.endswith(f"/p2p-circuit/p2p/{nodes.peer_ids[name]}")
    for name in ("rae", "roy"):
        assert circuits(nodes, name) == []


def test_they_find_each_other_without_being_told(nodes: Daemons) -> None:
    """Neither was given the other's address: membership tells both of each other, and of the relays that reach them."""

    def met() -> bool:
        return all(
            nodes.peer_ids[other] in {node["peer_id"] for node in nodes.nexus(one, "swarm", "status")["swarm"]["nodes"]}
            for one, other in (("ann", "bob"), ("bob", "ann"))
        )

    until(met, MEET_TIMEOUT_S, "Ann and Bob know each other")
    assert nodes.nexus("ann", "ping", "bob")["rtt_s"][0] > 0


def test_a_generation_runs_through_the_relay(nodes: Daemons) -> None:
    nodes.nexus("ann", "model", "add", "nano")
    alone = nodes.nexus("ann", "run", "nano", QUESTION, "--max-tokens", "12", "--stages", "1")
    split = nodes.nexus("ann", "run", "nano", QUESTION, "--max-tokens", "12", "--stages", "2")
    assert split["tokens"] == alone["tokens"]
    assert {stage["peer_id"] for stage in split["stages"]} == {nodes.peer_ids["ann"], nodes.peer_ids["bob"]}
    assert split["receipts"] == split["receipts_verified"] > 0


def netcheck(nodes: Daemons, name: str, code: int = 0) -> Any:
    found = nodes.nexus(name, "netcheck", codes=(code,))["netcheck"]
    assert found["clock"] == "ok"
    return found["network"]


def test_netcheck_tells_the_truth_on_all_of_them(nodes: Daemons) -> None:
    for name, (outside, inside) in HOMES.items():
        found = netcheck(nodes, name)
        assert (found["verdict"], found["scope"], found["nat"]) == ("unreachable", "public", "behind"), found
        # Ann's router keeps the port, whoever is asked; Bob's takes another for each.
        assert found["mapping"] == ("endpoint_independent" if name == "ann" else "address_dependent"), found
        assert {one["seen"]["host"] for one in found["observations"]} == {outside}
        checks = {check["address"]: check for check in found["addresses"]}
        assert checks[f"/ip4/{inside}/tcp/{PORT}"]["tried"] == []
        assert {one["result"] for one in checks[f"/ip4/{outside}/tcp/{PORT}"]["tried"]} == {"failed"}
        assert {relay["relay"] for relay in found["relays"]} == {nodes.peer_ids["rae"], nodes.peer_ids["roy"]}
        assert any(f"forward TCP port {PORT}" in line for line in found["advice"])
    for name, address in zip(("rae", "roy"), RELAYS, strict=True):
        found = netcheck(nodes, name)
        assert (found["verdict"], found["scope"], found["nat"], found["mapping"]) == ("reachable", "public", "none", "none"), found
        assert found["relay_service"]
        assert found["relays"] == []
        (check,) = [check for check in found["addresses"] if check["address"] == f"/ip4/{address}/tcp/{PORT}"]
        assert {one["result"] for one in check["tried"]} == {"ok"}, check


def test_when_a_relay_dies_the_other_carries_on(nodes: Daemons) -> None:
    """Last, for it ends one."""
    nodes._running["rae"].kill()
    nodes._running["rae"].wait()
    until(lambda: len(circuits(nodes, "bob")) == 1, MEET_TIMEOUT_S, "Bob knows that one relay is gone")
    began = time.monotonic()
    split = nodes.nexus("ann", "run", "nano", QUESTION, "--max-tokens", "8", "--stages", "2")
    assert {stage["peer_id"] for stage in split["stages"]} == {nodes.peer_ids["ann"], nodes.peer_ids["bob"]}
    assert time.monotonic() - began < COMMAND_TIMEOUT_S
    assert len(netcheck(nodes, "ann")["relays"]) == 1
