"""Real nexusd processes on loopback, driven as a user drives them: by the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nexus_cli import processes

pytestmark = pytest.mark.slow

NEXUS = [sys.executable, "-c", "from nexus_cli.main import main; main()"]
TIMEOUT_S = 180
QUESTION = "Why is the sky blue?"


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """No node of whoever runs the tests is touched, and temporary files can be counted."""
    place = tmp_path_factory.mktemp("t")
    return os.environ | {"NEXUS_HOME": str(place / "home"), "TMPDIR": str(place)}


def nexus(environ: dict[str, str], *arguments: str, code: int = 0) -> Any:
    """What the command printed, parsed; with the exit code that is expected of it."""
    done = subprocess.run([*NEXUS, *arguments, "--json"], env=environ, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout if code == 0 else done.stderr.splitlines()[-1])


@pytest.fixture(scope="module")
def nodes(environ: dict[str, str]) -> Iterator[list[Any]]:
    yield nexus(environ, "testnet", "up", "--nodes", "3")["nodes"]
    nexus(environ, "testnet", "down")


def on(node: Any, environ: dict[str, str], *arguments: str, code: int = 0) -> Any:
    return nexus(environ, "--home", node["home"], *arguments, code=code)


def test_every_node_is_connected_to_every_other(nodes: list[Any], environ: dict[str, str]) -> None:
    for node in nodes:
        assert node["running"]
        assert node["status"]["ready"]
        assert node["status"]["peers"] == 2
    names = {peer["name"] for peer in on(nodes[0], environ, "peers")["peers"]}
    assert names == {"node-2", "node-3"}
    assert on(nodes[0], environ, "ping", "node-3")["rtt_s"][0] > 0
    assert on(nodes[0], environ, "id")["addresses"]
    assert on(nodes[0], environ, "doctor")["ok"]


def test_an_unknown_model_is_not_found(nodes: list[Any], environ: dict[str, str]) -> None:
    assert on(nodes[0], environ, "run", "nonsense", "hi", code=5)["error"]["fix"]
    assert on(nodes[0], environ, "model", "plan", "nonsense", code=5)["error"]["fix"]


def test_a_model_that_one_node_has_is_split_over_all_and_answers_the_same_everywhere(
    nodes: list[Any], environ: dict[str, str], tmp_path: Path
) -> None:
    on(nodes[0], environ, "model", "add", "nano")
    alone = on(nodes[0], environ, "run", "nano", QUESTION, "--max-tokens", "12", "--stages", "1")
    proof = tmp_path / "proof"
    split = on(nodes[0], environ, "run", "nano", QUESTION, "--max-tokens", "12", "--stages", "3", "--receipts", str(proof))
    assert split["tokens"] == alone["tokens"]
    assert len(split["stages"]) == 3
    assert split["receipts"] == split["receipts_verified"] > 0
    held = [view for view in on(nodes[2], environ, "model", "list")["models"] if view["held_layers"]]
    assert held, "the node fetched its layers"

    # The file alone is the proof, on a machine that has no node.
    elsewhere = environ | {"NEXUS_HOME": str(tmp_path / "nothing")}
    report = nexus(elsewhere, "receipts", "verify", str(proof))["report"]
    assert report["receipts"] == split["receipts"]
    damaged = bytearray(proof.read_bytes())
    damaged[-1] ^= 1
    proof.write_bytes(damaged)
    assert nexus(elsewhere, "receipts", "verify", str(proof), code=7)["error"]["code"] == "verification-failed"


def test_limits_are_refused_and_the_daemon_stays_up(nodes: list[Any], environ: dict[str, str]) -> None:
    on(nodes[0], environ, "run", "nano", QUESTION, "--max-tokens", "0", code=2)
    on(nodes[0], environ, "run", "nano", QUESTION, "--max-tokens", "99999999999", code=2)
    nexus(environ, "--home", nodes[0]["home"], "run", "nano", "sky " * 3000, code=2)
    assert on(nodes[0], environ, "status")["ready"]


def test_killing_a_node_leaves_the_others_working(nodes: list[Any], environ: dict[str, str]) -> None:
    nexus(environ, "testnet", "kill", "node-3")
    states = nexus(environ, "testnet", "status")["nodes"]
    assert [state["running"] for state in states] == [True, True, False]
    # Two stages need no third node.
    answer = on(nodes[0], environ, "run", "nano", QUESTION, "--max-tokens", "4", "--stages", "1")
    assert answer["receipts"] == answer["receipts_verified"] > 0


def leftovers(environ: dict[str, str]) -> list[str]:
    return [path.name for path in Path(environ["TMPDIR"]).glob("nexus-*")]


def test_the_demo_ends_with_every_receipt_verified(environ: dict[str, str]) -> None:
    shown = nexus(environ, "demo", "--nodes", "4", "--max-tokens", "16")
    assert shown["text"].strip()
    assert len(shown["plan"]["stages"]) == len(shown["stages"]) == 4
    assert shown["receipts"] == shown["receipts_verified"] == shown["report"]["receipts"] >= 4
    assert leftovers(environ) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_cleans_up(environ: dict[str, str], number: signal.Signals) -> None:
    demo = subprocess.Popen(
        [*NEXUS, "demo", "--nodes", "2"], env=environ, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    assert demo.stderr is not None
    for line in demo.stderr:
        if "connected and ready" in line:
            break
    (state,) = Path(environ["TMPDIR"]).glob("nexus-*/net/testnet.json")
    pids = [node["pid"] for node in json.loads(state.read_text())["nodes"]]
    first, second = (processes.find_process(pid) for pid in pids)
    assert first
    assert second
    demo.send_signal(number)
    # Impatient: a second signal comes while it cleans up.
    assert processes.wait_for_end([first], TIMEOUT_S) == []
    demo.send_signal(number)
    demo.stderr.read()
    assert demo.wait(TIMEOUT_S) == 130
    assert all(processes.find_process(pid) is None for pid in pids)
    assert leftovers(environ) == []
