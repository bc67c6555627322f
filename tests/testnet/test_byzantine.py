"""Four cheaters at once among real nexusd processes: each is caught by the proof of its kind, or not caught and not punished, and
honest nodes are left to answer. The simulated counterparts of all attacks are in tests/attacks."""

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

from nexus.core.keys import public_key_of
from nexus.proof.evidence import EQUIVOCATION, KV, OP

pytestmark = pytest.mark.slow

NEXUS = [sys.executable, "-m", "nexus_cli.main"]
TIMEOUT_S = 180
SPREAD_TIMEOUT_S = 60.0
QUESTION = "Why is the sky blue?"
HONEST = 3
# What each does, and the kind of the proof against it; "" where there is none.
CHEATERS = {"flipped-bit": OP, "equivocation": EQUIVOCATION, "rewritten-log": KV, "silent": ""}
VERIFICATION_FAILED = 7


@pytest.fixture(scope="module")
def environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """No node of whoever runs the tests is touched."""
    place = tmp_path_factory.mktemp("t")
    return os.environ | {"NEXUS_HOME": str(place / "home"), "TMPDIR": str(place)}


@pytest.fixture(scope="module")
def nodes(environ: dict[str, str]) -> Iterator[list[Any]]:
    attacks = [word for name in CHEATERS for word in ("--attack", name)]
    up = run(environ, "testnet", "up", "--nodes", str(HONEST + len(CHEATERS)), *attacks)
    assert up.returncode == 0, up.stderr
    yield json.loads(up.stdout)["nodes"]
    run(environ, "testnet", "down")


def run(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*NEXUS, *arguments, "--json"], env=environ, capture_output=True, text=True, timeout=TIMEOUT_S)


def on(node: Any, environ: dict[str, str], *arguments: str) -> Any:
    done = run(environ, "--home", node["home"], *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def convicted(node: Any, environ: dict[str, str]) -> dict[str, str]:
    """The kinds of proof that a node believes, by whom they convict."""
    return {one["peer_id"]: one["kind"] for one in on(node, environ, "slashed")["slashed"]}


def test_each_is_caught_by_the_proof_of_its_kind_and_nobody_else(nodes: list[Any], environ: dict[str, str], tmp_path: Path) -> None:
    honest, cheaters = nodes[:HONEST], dict(zip(CHEATERS, nodes[HONEST:], strict=True))
    expected = {cheaters[attack]["peer_id"]: kind for attack, kind in CHEATERS.items() if kind}
    alone = on(honest[0], environ, "run", "nano", QUESTION, "--max-tokens", "20", "--stages", "1", "--verify", "off")

    # Every node has a stage, as long as it is not convicted: of several wrong stages an audit proves the first one.
    done = None
    for _ in range(2 * len(nodes)):
        left = len(nodes) - len(convicted(honest[0], environ))
        arguments = ("run", "nano", QUESTION, "--max-tokens", "20", "--stages", str(left), "--verify", "replica")
        done = run(environ, "--home", honest[0]["home"], *arguments)
        if done.returncode == 0:
            break
        # Whom a session that failed made doubtful is avoided as long as the others suffice, and here they do not.
        assert done.returncode == VERIFICATION_FAILED, done.stderr
    assert done is not None
    assert done.returncode == 0
    answer = json.loads(done.stdout)
    assert answer["tokens"] == alone["tokens"]
    assert {stage["name"] for stage in answer["stages"]} == {node["name"] for node in (*honest, cheaters["silent"])}

    until = time.monotonic() + SPREAD_TIMEOUT_S
    while any(convicted(node, environ) != expected for node in honest):
        assert time.monotonic() < until
    for number, view in enumerate(on(honest[1], environ, "slashed")["slashed"]):
        proof = tmp_path / str(number)
        on(honest[1], environ, "evidence", "show", view["evidence"], "--output", str(proof))
        # Somebody with no node, no model, and nothing but the file.
        nowhere = environ | {"NEXUS_HOME": str(tmp_path / "nothing")}
        said = json.loads(run(nowhere, "evidence", "verify", str(proof)).stdout)["verdict"]
        assert (said["accused"], said["kind"]) == (public_key_of(view["peer_id"]).hex(), expected[view["peer_id"]])

    plan = on(honest[0], environ, "model", "plan", "nano", "--stages", str(HONEST))["plan"]
    assert not {stage["peer_id"] for stage in plan["stages"]} & set(expected)
