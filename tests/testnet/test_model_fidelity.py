"""`nexus model fidelity` on a real daemon: it finds the float weights, says where they are gone, and keeps what it found."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nexus.engine.exact.fidelity import split_texts
from nexus.models import builtin_path, held_out_text
from tests.testnet.test_testnet import environ as environ  # a fixture
from tests.testnet.test_testnet import nexus, on

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def node(environ: dict[str, str]) -> Iterator[Any]:
    yield nexus(environ, "testnet", "up", "--nodes", "1")["nodes"][0]
    nexus(environ, "testnet", "down")


def test_fidelity_is_measured_kept_and_shown(node: Any, environ: dict[str, str], tmp_path: Path) -> None:
    text, source = tmp_path / "talk.txt", tmp_path / "mine"
    text.write_text("\n\n".join(split_texts(held_out_text("causal")[1], causal=True)[:12]), "utf-8")
    shutil.copytree(builtin_path("nano"), source)

    on(node, environ, "model", "add", "nano", "--profile", "exact")
    found = on(node, environ, "model", "fidelity", "nano", "--text", str(text))["fidelity"]
    assert found["top1_agreement"] > 0.97
    assert (found["text"], found["source"]) == ("talk.txt", str(builtin_path("nano")))
    shown = on(node, environ, "model", "show", "nano")["model"]["fidelity"]
    assert shown["tokens"] == found["tokens"]
    against = on(node, environ, "model", "fidelity", "nano", "--text", str(text), "--against", str(source))["fidelity"]
    assert against["layers"] == found["layers"]

    on(node, environ, "model", "add", str(source), "--profile", "float")
    refused = on(node, environ, "model", "fidelity", "mine-float", code=2)["error"]
    assert "--profile exact" in refused["fix"]

    # A model of other weights, whose directory goes away.
    config = source / "generation_config.json"
    config.write_text(config.read_text("utf-8").replace("}", ', "max_length": 77}'), "utf-8")
    on(node, environ, "model", "add", str(source), "--profile", "exact")
    assert on(node, environ, "model", "fidelity", "mine", "--text", str(text))["fidelity"]["source"] == str(source)
    shutil.rmtree(source)
    gone = on(node, environ, "model", "fidelity", "mine", "--text", str(text), code=5)["error"]
    assert "gone" in gone["cause"]
    assert "--against" in gone["fix"]
