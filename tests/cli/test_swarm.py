"""nexus swarm status and watch: from no peers to hundreds, wide and narrow, with names that would steer a terminal."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from nexus.core.keys import Identity
from nexus.node.swarm_view import SwarmLayers, SwarmModel, SwarmView, swarm_view
from nexus.swarm.health import ALIVE, GONE, STUCK, Vitals
from nexus.swarm.links import RTT_DEFAULT_US
from nexus.swarm.membership import NodeRecord
from nexus_cli.swarm import _shown
from tests.cli.conftest import Cli
from tests.gateway.fake_node import FakeNode
from tests.swarm.node_records import holding, node_record

ROOT = b"n" * 32


def key_of(number: int) -> bytes:
    return Identity(number.to_bytes(32, "big")).public_key


def view_of(own: NodeRecord, others: list[NodeRecord], states: dict[bytes, str] | None = None, limit: int = 256) -> SwarmView:
    known = states or {}
    return swarm_view(
        own,
        others,
        lambda node: Vitals(known.get(node, ALIVE), 0.0, 1.0),
        lambda one, other: RTT_DEFAULT_US,
        lambda node: None,
        lambda root: 4 if root == ROOT else None,
        2,
        10.0,
        limit,
    )


def printed(view: SwarmView, width: int, height: int | None = None) -> str:
    console = Console(width=width, no_color=True, color_system=None)
    with console.capture() as capture:
        console.print(_shown(view, width, height, fit=height is not None))
    return capture.get()


def test_status_shows_nodes_models_and_replicas(cli: Cli, node: FakeNode) -> None:
    said = cli("swarm", "status").out
    assert "\x1b" not in said  # a peer's name must not steer the terminal
    assert "3 of 3 nodes can be planned with" in said
    assert "nano 0-1 of 0-3" in said
    assert "0-3: 2, 4-5: 1" in said
    assert "short of 1" in said
    assert "incomplete" in said  # who holds the rare one is leaving
    swarm = cli("swarm", "status", "--json").json["swarm"]
    assert (len(swarm["nodes"]), swarm["nodes_total"], swarm["alive"]) == (3, 3, 3)
    assert swarm["nodes"][0]["state"] == "this node"
    assert swarm["nodes"][1]["leaving"]
    assert swarm["nodes"][2]["heard_s"] == 2.0
    assert len(cli("swarm", "status", "--json", "--limit", "1").json["swarm"]["nodes"]) == 1
    assert cli("swarm", "status", "--limit", "0").code == 2


def test_watch_prints_a_look_per_line_and_ends_in_order(cli: Cli, node: FakeNode) -> None:
    said = cli("swarm", "watch", "--json", "--every", "0.2", "--count", "3")
    assert said.code == 0
    assert [json.loads(line)["swarm"]["nodes_total"] for line in said.out.splitlines()] == [3, 3, 3]
    assert cli("swarm", "watch", "--count", "1").out.count("can be planned with") == 1
    assert cli("swarm", "watch", "--every", "0").code == 2


def test_a_node_alone_is_told_how_to_find_others() -> None:
    said = printed(view_of(node_record(key_of(1), name="one"), []), 80)
    assert "1 of 1 node can be planned with" in said
    assert "nexus peers add" in said


@pytest.mark.parametrize("width", [20, 40, 80, 100, 200])
@pytest.mark.parametrize("height", [None, 5, 24])
def test_hundreds_of_nodes_fit_any_terminal(width: int, height: int | None) -> None:
    models = tuple(holding(f"m{number}", bytes([number]) * 32, (0, 4)) for number in range(40))
    others = [node_record(key_of(n), name=f"n{n}" * 8, load=n % 5, models=models) for n in range(2, 202)]
    said = printed(view_of(node_record(key_of(1), name="own"), others), width, height)
    assert all(len(line) <= width for line in said.splitlines())
    if height is not None and width >= 80:
        assert len(said.splitlines()) <= max(height, 16)
        assert "more nodes" in said


def test_those_that_need_a_look_come_first_and_do_not_count_as_replicas() -> None:
    models = (holding("nano", ROOT, (0, 4)),)
    others = [node_record(key_of(n), name=f"n{n}", models=models) for n in (2, 3, 4, 5)]
    others[3] = node_record(key_of(5), name="n5", models=models, leaving=1)
    view = view_of(node_record(key_of(1), name="z", models=models), others, {key_of(4): STUCK, key_of(3): GONE})
    assert [node.name for node in view.nodes] == ["z", "n3", "n4", "n5", "n2"]
    assert view.alive == 3
    assert view.models == (SwarmModel("nano", ROOT, 4, (SwarmLayers(0, 4, 2),), 2, 0, 0),)
    cut = view_of(node_record(key_of(1), models=models), others, limit=2)
    assert (len(cut.nodes), cut.nodes_total) == (2, 5)


def test_ranges_that_lie_count_once_and_no_further_than_the_model() -> None:
    liar = node_record(key_of(2), models=(holding("nano", ROOT, (0, 512), (0, 512), (3, 1)), holding("nano", ROOT, (0, 2))))
    view = view_of(node_record(key_of(1), models=(holding("nano", ROOT, (0, 4)),)), [liar])
    assert [(run.start, run.end) for run in view.models[0].replicas][-1][1] == 4
    assert view.models[0].layers == 4
    assert max(run.replicas for run in view.models[0].replicas) == 2
