"""The testnet's handling of processes, with real ones around fake nodes (they all say that they have one peer)."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from nexus.core.errors import LocalError
from nexus_cli import processes, testnet
from nexus_cli.testnet import PORTS, free_ports
from tests.cli.conftest import Cli

pytestmark = pytest.mark.usefixtures("fake_spawn")


@pytest.fixture
def net(tmp_path: Path) -> testnet.Testnet:
    return testnet.Testnet(tmp_path / "net")


def running(net: testnet.Testnet) -> list[bool]:
    return [processes.is_running(node.process) for node in net.nodes()]


def test_up_status_kill_down(cli: Cli, net: testnet.Testnet) -> None:
    where = ("--dir", str(net.directory), "--json")
    nodes = cli("testnet", "up", "--nodes", "2", *where).json["nodes"]
    try:
        assert [(node["name"], node["running"], node["status"]["ready"]) for node in nodes] == [
            ("node-1", True, True),
            ("node-2", True, True),
        ]
        assert nodes[0]["port"] != nodes[1]["port"]
        shown = cli("--home", nodes[1]["home"], "config", "show", "--json").json["settings"]
        assert shown["network.bootstrap"] == [nodes[0]["address"]]
        assert (shown["engine.threads"], shown["network.mdns"]) == (1, False)
        assert cli("testnet", "up", *where).code == 1

        assert cli("testnet", "kill", "2", *where).json["pid"] == nodes[1]["pid"]
        assert cli("testnet", "kill", "2", *where).code == 1
        assert cli("testnet", "kill", "9", *where).code == 5
        states = cli("testnet", "status", *where).json["nodes"]
        assert [(state["running"], state["status"] is None) for state in states] == [(True, False), (False, True)]
    finally:
        down = cli("testnet", "down", *where)
    assert down.json["ended"] == 1
    assert not net.directory.exists()
    assert all(processes.find_process(node["pid"]) is None for node in nodes)
    assert cli("testnet", "down", *where).code == 5


def test_down_can_keep_the_homes(net: testnet.Testnet) -> None:
    net.up(2, 30, print)
    net.down(keep=True)
    assert not net.exists()
    assert (net.directory / "n1" / "nexusd.log").exists()


def test_a_node_that_does_not_start_takes_the_testnet_down(net: testnet.Testnet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NODE", "fail")
    with pytest.raises(LocalError, match="port 4510 is taken"):
        net.up(2, 30, print)
    assert not net.directory.exists()


def test_an_interrupt_takes_the_testnet_down(net: testnet.Testnet, monkeypatch: pytest.MonkeyPatch) -> None:
    pids: list[int] = []

    def interrupt(message: str) -> None:
        pids.extend(node.pid for node in net.nodes())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        net.up(2, 30, interrupt)
    assert len(pids) == 2
    assert all(processes.find_process(pid) is None for pid in pids)
    assert not net.directory.exists()


def test_a_node_that_hangs_is_ended_by_force(net: testnet.Testnet, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = net.up(2, 30, print)
    monkeypatch.setattr("nexus_cli.testnet.TERM_TIMEOUT_S", 0.2)
    os.kill(nodes[0].pid, signal.SIGSTOP)
    assert net.down() == 2
    assert all(processes.find_process(node.pid) is None for node in nodes)


def test_a_pid_that_was_reused_is_left_alone(net: testnet.Testnet) -> None:
    nodes = net.up(2, 30, print)
    state = net.directory / "testnet.json"
    document = json.loads(state.read_text())
    us = processes.find_process(os.getpid())
    assert us is not None
    document["nodes"].append(
        document["nodes"][0]
        | {"name": "node-3", "home": str(net.directory / "n3"), "pid": os.getpid(), "started": us.started + "0"}
    )
    state.write_text(json.dumps(document))
    assert running(net) == [True, True, False]
    assert net.down() == len(nodes)


def test_a_node_that_its_user_restarted_still_belongs_to_the_testnet(net: testnet.Testnet) -> None:
    first, second = net.up(2, 30, print)
    assert processes.send_signal(first.process, signal.SIGTERM)
    assert processes.wait_for_end([first.process], 20) == []
    again = processes.spawn_daemon(Path(first.home), [], net.directory / "again.log", os.environ)
    while net.states()[0].status is None:
        assert again.poll() is None
        time.sleep(processes.POLL_S)
    state = net.states()[0]
    assert (state.running, state.node.pid) == (True, again.pid)
    assert net.kill("1")[1] == again.pid
    assert again.wait(20) == -signal.SIGKILL
    assert running(net) == [False, True]
    assert net.down() == 1
    assert not processes.is_running(second.process)


def test_a_directory_with_something_else_is_not_touched(net: testnet.Testnet) -> None:
    net.directory.mkdir()
    (net.directory / "precious").write_text("x")
    with pytest.raises(LocalError, match="something else"):
        net.up(2, 30, print)
    assert (net.directory / "precious").exists()


def test_ports_are_free_and_different() -> None:
    ports = free_ports(8)
    assert len(set(ports)) == 8
    assert all(port in PORTS for port in ports)
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
