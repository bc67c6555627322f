"""Real daemons that serve fragments: one is killed, a version rolls under load and back, one is drained while it computes."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from nexus.models import builtin_path
from tests.testnet.test_testnet import NEXUS, QUESTION, TIMEOUT_S, environ, nexus, on  # noqa: F401

pytestmark = pytest.mark.slow

LAYERS = 12
# Room for seven of the twelve layers of nano.
MEMORY = "4MiB"
ASK = ("run", "nano", QUESTION, "--max-tokens", "24")


@pytest.fixture(scope="module")
def nodes(environ: dict[str, str]) -> Iterator[list[Any]]:  # noqa: F811
    yield nexus(environ, "testnet", "up", "--nodes", "3")["nodes"]
    nexus(environ, "testnet", "down")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model like nano that answers otherwise."""
    directory = shutil.copytree(builtin_path("nano"), tmp_path_factory.mktemp("other") / "nano")
    weights = load_file(directory / "model.safetensors")
    for name in weights:
        if "layers.11." in name and name.endswith("down_proj.weight"):
            weights[name] = weights[name] * -1.0
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def until(true: Callable[[], bool], what: str, within_s: float = 90) -> None:
    end_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < end_s, what
        time.sleep(0.3)


def served(node: Any, environ: dict[str, str]) -> set[int]:  # noqa: F811
    ranges = on(node, environ, "model", "show", "nano")["model"]["serving"]
    return {layer for start, end in ranges for layer in range(start, end)}


def covered(nodes: list[Any], environ: dict[str, str]) -> bool:  # noqa: F811
    return set().union(*(served(node, environ) for node in nodes)) == set(range(LAYERS))


class Load:
    """Asks the same question again and again in a thread, until the context is left; every answer counts."""

    def __init__(self, node: Any, environ: dict[str, str]) -> None:  # noqa: F811
        self._command = [*NEXUS, "--home", node["home"], *ASK, "--json"]
        self._environ = environ
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.answers: list[tuple[int, ...]] = []
        self.failures: list[str] = []

    def _run(self) -> None:
        while not self._over.is_set():
            done = subprocess.run(self._command, env=self._environ, capture_output=True, text=True, timeout=TIMEOUT_S)
            if done.returncode:
                self.failures.append(done.stderr)
            else:
                self.answers.append(tuple(json.loads(done.stdout)["tokens"]))

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(TIMEOUT_S)


def test_three_nodes_serve_a_model_that_none_has_room_for(nodes: list[Any], environ: dict[str, str]) -> None:  # noqa: F811
    on(nodes[0], environ, "model", "add", "nano")
    for node in nodes:
        # The others have a model of this name too, since it is built in: whose versions count has to be said.
        publisher = [] if node is nodes[0] else ["--publisher", nodes[0]["peer_id"]]
        answer = on(node, environ, "model", "serve", "nano", "--max-memory", MEMORY, *publisher)["serving"]
        assert answer["publisher"] == nodes[0]["peer_id"]
        assert 0 < sum(end - start for start, end in answer["served"]) < LAYERS
    until(lambda: covered(nodes, environ), "every layer is served")
    assert on(nodes[2], environ, "model", "serve", "nano", "--max-memory", "1TiB", code=2)["error"]["fix"]
    assert on(nodes[2], environ, "model", "serve", "nano", "--fragment", "0-12", code=2)["error"]["fix"]


def test_the_layers_of_a_killed_node_are_taken_over_and_its_promise_outlives_it(
    nodes: list[Any],
    environ: dict[str, str],  # noqa: F811
) -> None:
    nexus(environ, "testnet", "kill", "node-3")
    until(lambda: covered(nodes[:2], environ), "the others serve every layer")
    nexus(environ, "--home", nodes[2]["home"], "start", "--detach")
    until(lambda: bool(served(nodes[2], environ)), "it serves again, unasked")


def test_a_version_rolls_under_load_and_back_and_no_request_is_lost(
    nodes: list[Any],
    environ: dict[str, str],  # noqa: F811
    other: Path,
) -> None:
    before = tuple(on(nodes[0], environ, *ASK)["tokens"])
    with Load(nodes[1], environ) as load:
        until(lambda: bool(load.answers or load.failures), "it answers")
        updated = on(nodes[0], environ, "model", "update", "nano", str(other))
        assert updated["version"]["version"] == 2
        assert updated["layers_served"] == [LAYERS, LAYERS]
        after = tuple(on(nodes[0], environ, *ASK)["tokens"])
        assert after != before
        until(lambda: load.answers[-1] == after, "requests elsewhere get the new version")
        assert on(nodes[0], environ, "model", "rollback", "nano")["version"]["version"] == 3
        until(lambda: load.answers[-1] == before, "and the old one again")
    assert load.failures == []
    assert set(load.answers) == {before, after}
    shown = on(nodes[2], environ, "model", "show", "nano")["model"]
    assert shown["version"] == 3
    assert [one["version"] for one in shown["versions"]] == [1, 2, 3]


def test_a_node_is_drained_while_it_computes_and_nobody_notices(nodes: list[Any], environ: dict[str, str]) -> None:  # noqa: F811
    until(lambda: covered(nodes[:2], environ) or covered(nodes, environ), "every layer is served")
    before = tuple(on(nodes[0], environ, *ASK)["tokens"])
    with Load(nodes[0], environ) as load:
        until(lambda: bool(load.answers or load.failures), "it answers")
        drained = on(nodes[2], environ, "drain", "--deadline", "120s")["drain"]
        asked = len(load.answers)
        until(lambda: len(load.answers) > asked + 1 or bool(load.failures), "it answers without it")
    assert drained["done"]
    assert drained["left_s"] > 0
    assert drained["sessions"] == 0
    assert all(not model["lost"] for model in drained["models"])
    assert load.failures == []
    assert set(load.answers) == {before}
    assert covered(nodes[:2], environ)
    on(nodes[2], environ, "status", code=3)
