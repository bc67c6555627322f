"""`nexus judge`: every proof on screen, and exit code 7 for a plan that does not hold."""

from __future__ import annotations

from tests.cli.conftest import Cli
from tests.gateway.fake_node import FakeNode


def test_every_proof_is_shown_with_its_bound(cli: Cli, node: FakeNode) -> None:
    result = cli("judge", "nano")
    assert result.code == 0
    for shown in ("plan.coverage", "norm.squares", "2^44 < 2^53", "2 statements proven by Z3"):
        assert shown in result.out


def test_json_has_the_plan_and_all_numbers(cli: Cli, node: FakeNode) -> None:
    value = cli("judge", "nano", "--json").json
    assert value["proven"] is True
    assert [stage["start"] for stage in value["plan"]["stages"]] == [0, 1]
    assert value["proofs"][1] == {
        "name": "norm.squares",
        "statement": "the sums of 64 squares stay below 2^53",
        "value": 2**44,
        "limit": 2**53,
        "ms": 2.5,
    }


def test_the_number_of_nodes_reaches_the_daemon(cli: Cli, node: FakeNode) -> None:
    assert len(cli("judge", "nano", "--nodes", "3", "--json").json["proofs"]) == 1
    assert cli("judge", "nano", "--nodes", "0").code == 2
    assert cli("judge", "nano", "--nodes", "257").code == 2


def test_a_plan_that_does_not_hold_ends_with_exit_code_7(cli: Cli, node: FakeNode) -> None:
    result = cli("judge", "broken")
    assert (result.code, result.out) == (7, "")
    assert "layer 1 is computed 0 times" in result.err
    assert "fix: Plan it again" in result.err


def test_a_model_that_is_not_there_ends_with_exit_code_5(cli: Cli, node: FakeNode) -> None:
    assert cli("judge", "a/b").code == 5
