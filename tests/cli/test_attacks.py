"""Cheaters in test networks: their names, where they may run, and which nodes of a testnet they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nexus.core.errors import UsageError
from nexus.node.attacks import ATTACKS
from nexus.node.cheating import Honest
from nexus.node.options import NodeOptions
from nexus.storage.home import Home
from nexus_cli import testnet
from nexus_cli.attacks import MIXED, attacks_of
from nexus_cli.byzantine import conduct_on_loopback
from nexus_config.settings import load, node_options
from tests.cli.conftest import Cli

LOCAL = {"network.listen": "/ip4/127.0.0.1/tcp/0", "network.mdns": "false"}


def options(home: Home, **changes: str) -> NodeOptions:
    flags = LOCAL | {key.replace("_", ".", 1): value for key, value in changes.items()}
    return node_options(load(flags, {}, home.path)[0], home.path)


def test_attacks_are_listed_with_what_they_are(cli: Cli) -> None:
    shown = cli("attacks", "--json").json["attacks"]
    assert [entry["name"] for entry in shown] == list(ATTACKS)
    assert all(entry["summary"] for entry in shown)
    people = cli("attacks")
    assert all(name in people.out for name in ATTACKS)


def test_every_attack_is_a_conduct(home: Home) -> None:
    for name in ATTACKS:
        assert isinstance(conduct_on_loopback(name, options(home)), Honest)


@pytest.mark.parametrize(
    "changes",
    [
        {"network_listen": "/ip4/0.0.0.0/tcp/0"},
        {"network_listen": "/ip6/::/tcp/0"},
        {"network_listen": "/ip4/192.0.2.7/tcp/4001"},
        {"network_listen": "/dns4/localhost/tcp/0"},
        {"network_bootstrap": "/ip4/192.0.2.7/tcp/4001/p2p/12D3KooWKnEqMfYo9zvfHmqTLpLdiHXPe4SVqUWcWHDJdFGrSmcA"},
        {"network_mdns": "true"},
    ],
)
def test_a_cheater_stays_on_this_machine(home: Home, changes: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="a node that cheats stays on this machine"):
        conduct_on_loopback("one-bit", options(home, **changes))


def test_a_cheater_may_use_either_loopback(home: Home) -> None:
    assert conduct_on_loopback("one-bit", options(home, network_listen="/ip6/::1/tcp/0"))


def test_the_cheating_daemon_refuses_before_it_listens(home: Home) -> None:
    """As it is by default, on all addresses."""
    command = [sys.executable, "-m", "nexus_cli.byzantine", "--home", str(home.path), "--attack"]
    for attack, says in (("one-bit", "stays on this machine"), ("nonsense", "there is no attack 'nonsense'")):
        done = subprocess.run([*command, attack], capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert says in done.stderr
        assert "started" not in done.stderr


def test_an_honest_daemon_knows_no_attacks(home: Home) -> None:
    command = [sys.executable, "-m", "nexus_cli.daemon", "--home", str(home.path), "--attack", "one-bit"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "No such option" in done.stderr


@pytest.mark.parametrize(
    ("byzantine", "names", "cheating"),
    [
        (None, (), []),
        (0, (), []),
        (None, ("silent",), ["silent"]),
        (2, ("silent",), ["silent", "silent"]),
        (3, ("silent", "one-bit"), ["silent", "one-bit", "silent"]),
    ],
)
def test_who_does_what(byzantine: int | None, names: tuple[str, ...], cheating: list[str]) -> None:
    assert attacks_of(4, byzantine, names) == cheating


def test_mixed_attacks_differ() -> None:
    for names in ((), (MIXED,)):
        drawn = attacks_of(6, 5, names)
        assert len(set(drawn)) == 5
        assert set(drawn) <= set(ATTACKS)
    drawn = attacks_of(6, 4, ("silent", MIXED))
    assert drawn[::2] == ["silent", "silent"]
    assert set(drawn) <= set(ATTACKS)
    assert len(attacks_of(100, 99, ())) == 99


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--byzantine", "4"), "at most 3 can cheat"),
        (("--byzantine", "1", "--attack", "silent", "--attack", "one-bit"), "2 attacks are named for 1 cheater"),
        (("--attack", "nonsense"), "there is no attack 'nonsense'"),
    ],
)
def test_a_testnet_that_cannot_be_is_refused(cli: Cli, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    refused = cli("testnet", "up", "--nodes", "4", "--dir", str(tmp_path / "net"), *arguments)
    assert refused.code == 2
    assert says in refused.err
    assert not (tmp_path / "net").exists()


@pytest.mark.usefixtures("fake_spawn")
def test_a_testnet_says_who_cheats(cli: Cli, tmp_path: Path) -> None:
    where = ("--dir", str(tmp_path / "net"))
    up = cli("testnet", "up", "--nodes", "2", "--attack", "one-bit", *where)
    try:
        assert "node-2 cheats: it changes the last bit" in up.err
        assert up.out.count("one-bit") == 1
        assert up.out.count("honest") == 1
        nodes = cli("testnet", "status", *where, "--json").json["nodes"]
        assert [node["attack"] for node in nodes] == ["", "one-bit"]
        assert "node-2 cheats" in cli("testnet", "status", *where).err
    finally:
        assert testnet.Testnet(tmp_path / "net").down() == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--attack", "one-bit"), "add --byzantine"),
        (("--evidence", "file"), "add --byzantine"),
        (("--byzantine", "--nodes", "1"), "at least two nodes"),
        (("--byzantine", "--receipts", "file"), "--evidence"),
        (("--byzantine", "--attack", "nonsense"), "there is no attack 'nonsense'"),
    ],
)
def test_a_demo_that_cannot_be_is_refused(cli: Cli, arguments: tuple[str, ...], says: str) -> None:
    refused = cli("demo", *arguments)
    assert refused.code == 2
    assert says in refused.err
