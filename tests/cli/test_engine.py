"""nexus engine check and nexus bench engine: no daemon, the data directory untouched, exit codes for what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from nexus.engine.exact import check
from nexus.engine.importer import import_model
from nexus.models import NANO, builtin_path
from nexus.storage.blobs import BlobStore
from nexus.storage.catalog import Catalog
from nexus.storage.home import Home
from tests.cli.conftest import Cli


@pytest.fixture(autouse=True)
def few_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "DEFAULT_DEPTHS", (96,))


@pytest.fixture
def with_models(home: Home) -> Home:
    """nano in both profiles, the float one with a piece missing."""
    blobs, catalog = BlobStore.open(home.models), Catalog.open(home.models)
    for name, profile in ((NANO, "exact"), ("nano-float", "float")):
        manifest = import_model(builtin_path(NANO), blobs, lambda *_: None, profile=profile)
        catalog.add(name, manifest)
    blobs.remove(manifest.pieces[3].root)
    return home


def test_check_without_a_node(cli: Cli, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    value = cli("engine", "check", "--json", "--home", str(nowhere)).json
    assert value["right"] is True
    assert value["kernel"] in {kernel["name"] for kernel in value["kernels"] if kernel["right"]}
    assert value["depths"] == [{"depth": 96, "kernel": value["kernel"], "reason": "the fastest here, and right", "models": []}]
    assert value["digest"] == check.EXPECTED
    assert not nowhere.exists()
    shown = cli("engine", "check", "--home", str(nowhere)).out
    assert f"computes with {value['kernel']}" in shown


def test_check_tries_the_depths_of_the_models_here(cli: Cli, with_models: Home) -> None:
    depths = cli("engine", "check", "--json").json["depths"]
    assert {depth["depth"]: depth["models"] for depth in depths} == {96: [], 192: [NANO], 512: [NANO]}


def test_check_refuses_when_nothing_is_right(cli: Cli, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "EXPECTED", "0" * 64)
    monkeypatch.setattr(check, "_model_verdict", check._model_verdict.__wrapped__)
    monkeypatch.setattr(check, "_depth_verdict", check._depth_verdict.__wrapped__)
    result = cli("engine", "check", "--json")
    assert result.code == 7
    assert (result.json["right"], result.json["kernel"]) == (False, "")
    people = cli("engine", "check")
    assert people.code == 7
    assert "no kernel is right" in people.err
    assert "fix:" in people.err


def test_bench_measures_a_model_that_is_here(cli: Cli, with_models: Home) -> None:
    value = cli("bench", "engine", "--json").json
    assert (value["model"], value["profile"]) == (NANO, "exact")
    assert value["speed"]["decode_tokens_per_s"] > 0
    assert value["speed"]["share"] > 0
    assert "share of limit" in cli("bench", "engine", NANO).out
    assert cli("bench", "engine", "nano-float").code == 5  # not whole


def test_bench_makes_a_builtin_model_for_the_moment(cli: Cli, tmp_path: Path) -> None:
    nowhere = tmp_path / "nowhere"
    assert cli("bench", "engine", "--json", "--home", str(nowhere)).json["speed"]["prefill_tokens_per_s"] > 0
    assert not nowhere.exists()
    missing = cli("bench", "engine", "missing", "--home", str(nowhere))
    assert missing.code == 5
    assert "nexus model add" in missing.err
