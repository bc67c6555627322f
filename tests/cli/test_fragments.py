"""nexus model serve, unserve, update, rollback and nexus drain, against a fake node."""

from __future__ import annotations

from pathlib import Path

import pytest

from nexus.node.fragments_api import DrainView, HandOverView, ServeRequest
from nexus_cli.fragments import drain_lines
from nexus_cli.model import replicas_text
from tests.cli.conftest import Cli
from tests.gateway.fake_fragments import NEW_ROOT, ROOT
from tests.gateway.fake_node import FakeNode


def test_serve_says_what_this_node_serves(cli: Cli, node: FakeNode) -> None:
    shown = cli("model", "serve", "nano", "--fragment", "0-5", "--max-memory", "2GiB", "--max-upload", "512KiB", "--preload")
    assert shown.code == 0
    assert "layers 0-5 of 12" in shown.out
    assert "2.0 GiB of memory, 512.0 KiB/s of upload" in shown.out
    assert "2 of layers 0-5, 1 of layers 6-11" in shown.out
    assert "\x1b[2J" not in shown.err
    assert node.fragments.served == [ServeRequest("nano", "0-5", 2 << 30, 0, 512 << 10, None, True)]
    answer = cli("model", "serve", "nano", "--publisher", "n2", "--json").json
    assert answer["serving"]["fragment"] == "auto"
    assert node.fragments.served[-1] == ServeRequest("nano", publisher="n2")


@pytest.mark.parametrize(
    "bad",
    [("--max-memory", "lots"), ("--max-disk", "-1"), ("--max-upload", "1KiB"), ("--max-upload", "fast"), ("--max-memory", "1")],
)
def test_limits_that_are_none_are_refused(cli: Cli, node: FakeNode, bad: tuple[str, str]) -> None:
    assert cli("model", "serve", "nano", *bad).code == 2
    assert not node.fragments.served


def test_what_cannot_be_served_has_its_own_exit_code(cli: Cli, node: FakeNode) -> None:
    assert cli("model", "serve", "missing").code == 5
    huge = cli("model", "serve", "huge")
    assert huge.code == 1
    assert "fix: Raise --max-memory" in huge.err


@pytest.mark.parametrize("words", [("unserve", "nano"), ("serve", "nano", "--stop")])
def test_unserve_says_what_nobody_else_serves(cli: Cli, node: FakeNode, words: tuple[str, ...]) -> None:
    ended = cli("model", *words)
    assert ended.code == 0
    assert "nobody else in reach serves layers 6-11" in ended.err
    assert cli("model", *words, "--json").json["ended"]
    assert cli("model", words[0], "missing", *words[2:]).code == 5


def test_update_and_rollback_name_the_version(cli: Cli, node: FakeNode, tmp_path: Path) -> None:
    updated = cli("model", "update", "nano", str(tmp_path))
    assert updated.code == 0
    assert f"version 2  {NEW_ROOT.hex()}" in updated.out
    assert node.fragments.updated == [("nano", tmp_path, "auto")]
    answer = cli("model", "update", "nano", "nano", "--json").json
    assert (answer["version"]["version"], answer["layers_served"]) == (2, [12, 12])
    assert cli("model", "update", "nano", str(tmp_path / "nothing")).code == 5
    assert f"version 3  {ROOT.hex()}" in cli("model", "rollback", "nano").out
    assert cli("model", "rollback", "nano", "--to", "1", "--json").json["version"]["version"] == 11
    assert cli("model", "rollback", "nano", "--to", "0").code == 2


def test_drain_says_what_is_handed_over_and_what_waits(cli: Cli, node: FakeNode) -> None:
    drained = cli("drain", "--deadline", "90s")
    assert drained.code == 0
    lines = drained.err.splitlines()
    assert "nano: layers 0-5 wait for another node to take them" in lines[0]
    assert "1 session still running" in lines[1]
    assert "layers 0-5 handed over to node" in lines[2]
    assert "\x1b" not in drained.err
    assert lines[-1] == "drained; the daemon stops"
    assert node.fragments.deadlines == [90.0]
    assert cli("drain", "--json").json["drain"]["done"]
    assert node.fragments.deadlines[-1] == 300.0
    for bad in ("soon", "-1s", "0s", ""):
        assert cli("drain", "--deadline", bad).code == 2


def test_what_is_lost_and_cut_off_at_the_deadline_is_said() -> None:
    over = DrainView((HandOverView("nano", ROOT, (), ((0, 6),), ((2, 6),), ()),), 2, 0.0, True)
    lines = drain_lines(None, over)
    assert "nobody else serves layers 2-5 of nano now" in lines
    assert "the deadline is over: 2 sessions cut off" in lines
    assert drain_lines(over, over)[-1] == "drained; the daemon stops"
    assert drain_lines(None, DrainView((), 0, 9.0, False)) == ["this node serves no fragments"]


def test_replicas_are_shown_in_runs() -> None:
    assert replicas_text(()) == "none"
    assert replicas_text((1, 1, 0, 2)) == "1 of layers 0-1, 0 of layers 2, 2 of layers 3"
