"""Cheaters among real nexusd processes: caught, convicted on every node by a proof that stands alone, and done without."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nexus.proof.evidence import EQUIVOCATION, OP

pytestmark = pytest.mark.slow

NEXUS = [sys.executable, "-m", "nexus_cli.main"]
TIMEOUT_S = 180
SPREAD_TIMEOUT_S = 60.0
# It takes half a second on a quiet machine. What this is to find is a second of imports: torch, transformers, z3.
CPU_MAX_S = 2.0
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


def verify_with_nothing_else(proof: Path, place: Path) -> tuple[Any, float]:
    """The verdict of a new process on the file alone, in an empty directory with an empty data directory; and its CPU time."""
    home, work = place / "home", place / "work"
    home.mkdir(parents=True)
    work.mkdir()
    (work / "copy").write_bytes(proof.read_bytes())
    environ = {"PATH": os.environ["PATH"], "NEXUS_HOME": str(home)}
    verify = subprocess.Popen([*NEXUS, "evidence", "verify", "copy", "--json"], env=environ, cwd=work, stdout=subprocess.PIPE)
    with verify:
        assert verify.stdout is not None
        said = verify.stdout.read()
        # Of this child alone: getrusage would count every other child of the tests too.
        _, status, usage = os.wait4(verify.pid, 0)
        verify.returncode = os.waitstatus_to_exitcode(status)
    assert verify.returncode == 0
    assert [path.name for path in work.iterdir()] == ["copy"]
    assert list(home.iterdir()) == []
    return json.loads(said), usage.ru_utime + usage.ru_stime


def test_the_demo_catches_a_cheater(environ: dict[str, str], tmp_path: Path) -> None:
    """The one that it shows by default."""
    proof = tmp_path / "proof.evidence"
    shown = nexus(environ, "demo", "--byzantine", "--nodes", "3", "--evidence", str(proof))
    cheater = shown["cheater"]
    assert (cheater["name"], cheater["attack"]) == ("node-3", "stale-cache")
    assert shown["found_by"] in ("light", "replica")
    assert (shown["conviction"]["kind"], shown["conviction"]["accused"]) == (OP, cheater["peer_id"])
    assert shown["conviction"]["layer"] is not None
    assert shown["conviction"]["op"]
    assert set(shown["slashed"]) == {"node-1", "node-2"}
    assert {(view["peer_id"], view["state"]) for view in shown["slashed"].values()} == {(cheater["peer_id"], "slashed")}
    assert {stage["name"] for stage in shown["second"]["stages"]} == {"node-1", "node-2"}
    assert shown["second"]["tokens"] == shown["honest"]["tokens"] != []
    assert len(shown["honest"]["stages"]) == 1

    said, cpu_s = verify_with_nothing_else(proof, tmp_path / "elsewhere")
    assert said["verdict"]["evidence"] == shown["conviction"]["id"]
    assert proof.stat().st_size == shown["proof"]["size"]
    assert cpu_s < CPU_MAX_S
    assert not list(Path(environ["TMPDIR"]).glob("nexus-*"))


def test_the_demo_says_what_it_did_not_see(environ: dict[str, str]) -> None:
    """Not to show one's work proves nothing: nobody is convicted, and the demo does not end well."""
    error = nexus(environ, "demo", "--byzantine", "--nodes", "2", "--attack", "silent", code=7)["error"]
    assert error["cause"].startswith("missing: node-2, which plays 'silent', was not convicted")


def test_the_demo_for_people(environ: dict[str, str], tmp_path: Path) -> None:
    """Of a cheater whom no audit has to look for: its receipts contradict each other."""
    proof = tmp_path / "proof.evidence"
    demo = [*NEXUS, "demo", "--byzantine", "--nodes", "3", "--attack", "equivocation", "--evidence", str(proof)]
    done = subprocess.run(demo, env=environ, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    for line in (
        "1  node-3 cheats: it signs two different receipts for the same work",
        "3  The answer was given up: ",
        "node-3 is convicted: stage ",
        f"4  The proof against node-3: {proof}",
        "5  The proof went round",
        "6  Asked again; the plan does without node-3",
        "Token for token what ",
        "Cheated, caught, proven, shut out by all, done without",
    ):
        assert line in done.stdout
    said, cpu_s = verify_with_nothing_else(proof, tmp_path / "elsewhere")
    assert said["verdict"]["kind"] == EQUIVOCATION
    assert cpu_s < CPU_MAX_S


@pytest.fixture(scope="module")
def nodes(environ: dict[str, str]) -> Iterator[list[Any]]:
    """Four, of which the last one computes with other weights."""
    yield nexus(environ, "testnet", "up", "--nodes", "4", "--byzantine", "1", "--attack", "swapped-weights")["nodes"]
    nexus(environ, "testnet", "down")


def on(node: Any, environ: dict[str, str], *arguments: str, code: int = 0) -> Any:
    return nexus(environ, "--home", node["home"], *arguments, code=code)


def test_all_honest_nodes_of_a_testnet_agree_on_who_is_convicted(nodes: list[Any], environ: dict[str, str], tmp_path: Path) -> None:
    *honest, cheater = nodes
    assert [node["attack"] for node in nexus(environ, "testnet", "status")["nodes"]] == ["", "", "", "swapped-weights"]
    error = on(honest[0], environ, "run", "nano", QUESTION, "--stages", "4", "--verify", "replica", code=7)["error"]
    assert cheater["peer_id"] in error["cause"]
    assert "convicted" in error["cause"]

    until = time.monotonic() + SPREAD_TIMEOUT_S
    while not all(on(node, environ, "slashed")["slashed"] for node in honest):
        assert time.monotonic() < until
    believed = [on(node, environ, "slashed")["slashed"] for node in honest]
    assert [[(one["peer_id"], one["state"]) for one in found] for found in believed] == [[(cheater["peer_id"], "slashed")]] * 3

    # From a node that only heard of it.
    proof = tmp_path / "proof"
    evidence = believed[2][0]["evidence"]
    assert on(honest[2], environ, "evidence", "show", evidence, "--output", str(proof))["evidence"]["sender"]
    said, cpu_s = verify_with_nothing_else(proof, tmp_path / "elsewhere")
    assert said["convicts"]
    assert said["verdict"]["evidence"] == evidence
    assert cpu_s < CPU_MAX_S

    # Nobody plans with it, whoever asks.
    alone = on(honest[0], environ, "run", "nano", QUESTION, "--stages", "1")
    for node in honest:
        answer = on(node, environ, "run", "nano", QUESTION, "--stages", "3")
        assert {stage["name"] for stage in answer["stages"]} == {"node-1", "node-2", "node-3"}
        assert answer["tokens"] == alone["tokens"]
    on(honest[1], environ, "run", "nano", QUESTION, "--stages", "4", code=2)
