"""nexus evidence list|show, slashed, ledger: what they say, in words and in JSON."""

from __future__ import annotations

from pathlib import Path

import pytest

from nexus.storage.home import Home
from nexus_cli.evidence import KINDS_IN_WORDS, verify_file
from tests.cli.conftest import Cli
from tests.gateway.fake_node import COORDINATOR, FIRST, SECOND, FakeNode, fork


def test_evidence_is_listed_shown_and_written(cli: Cli, node: FakeNode, tmp_path: Path) -> None:
    short = fork().id.hex()[:16]
    listed = cli("evidence", "list")
    assert short in listed.out
    assert SECOND.peer_id[:16] in listed.out
    assert "\x1b" not in listed.out
    assert cli("evidence", "list", "--json").json["evidence"][0]["id"] == fork().id.hex()
    file = tmp_path / "proof.evidence"
    shown = cli("evidence", "show", short, "--output", str(file))
    assert (shown.code, "\x1b" in shown.out) == (0, False)
    assert "two different entries number 0" in shown.out
    assert f"came from    {FIRST.peer_id}" in shown.out
    assert "2023-11-14 22:13:20 UTC" in shown.out
    assert verify_file(file)[1].peer_id == SECOND.peer_id
    assert cli("evidence", "verify", str(file)).code == 0
    assert cli("evidence", "show", short, "--json").json["evidence"]["kind"] == "FORK"
    assert cli("evidence", "show", short, "--output", str(tmp_path / "no" / "file")).code == 1


@pytest.mark.parametrize("given", ["ffffffff", "../status", "?", "%2e%2e"])
def test_unknown_evidence_is_not_found(cli: Cli, node: FakeNode, given: str) -> None:
    result = cli("evidence", "show", given)
    assert (result.code, result.out) == (5, "")


def test_every_kind_has_words() -> None:
    from nexus.proof.evidence import KINDS

    assert set(KINDS_IN_WORDS) == set(KINDS)


def test_slashed_and_resume(cli: Cli, node: FakeNode) -> None:
    held = cli("slashed")
    assert "suspended" in held.out
    assert "burning is paused for 1 bond" in held.err
    assert cli("slashed", "--json").json["slashed"][0]["peer_id"] == SECOND.peer_id
    resumed = cli("slashed", "--resume")
    assert "1 bond burned" in resumed.err
    assert "suspended" not in resumed.out
    assert cli("slashed", "--resume", "--json").json["burned"] == 1


def test_ledger(cli: Cli, node: FakeNode) -> None:
    own = cli("ledger")
    assert COORDINATOR.peer_id in own.out
    assert "balance     -0.0002 credits" in own.out
    assert "-0.0002" in own.out
    assert own.err == ""
    other = cli("ledger", "node x/y?")
    assert "\x1b" not in other.out
    assert "probation: 3 of its first 20" in other.out
    assert "20000 entries, of which the first 16384 were read" in other.out
    assert "0.66 after 4 audits here, 1 of them bad" in other.out
    value = cli("ledger", "--json").json["ledger"]
    assert (value["balance"], value["chain"][0]["payees"]) == (-200, [FIRST.peer_id, SECOND.peer_id])
    assert cli("ledger", "nobody").code == 5
    assert cli("ledger", "x" * 200).code == 2
    node.ready = False
    assert "this ledger is frozen" in cli("ledger").err


@pytest.mark.parametrize("command", [("evidence", "list"), ("evidence", "show", "abcd"), ("slashed",), ("ledger",)])
def test_without_a_daemon_the_exit_code_is_3(cli: Cli, home: Home, command: tuple[str, ...]) -> None:
    assert cli(*command).code == 3
