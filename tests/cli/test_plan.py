"""`nexus model plan`: what is predicted, what is missing, also for machines that a file describes; what a bad file has wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tests.gateway.fake_node import FakeNode

GOOD = """
rtt_ms = 30

[[nodes]]
name = "desk"
memory = "24 GiB"
speed = 40000
domain = "home"

[[nodes]]
name = "attic"
memory = 8_000_000_000
disk = "100 GB"
speed = 9000
rtt_ms = 2
load = 1
held = ["0-1", "1"]

[[links]]
between = ["desk", "attic"]
rtt_ms = 0.5
"""


def test_what_is_predicted_and_how_many_hold_what(cli: Cli, node: FakeNode) -> None:
    said = cli("model", "plan", "nano")
    assert said.code == 0
    assert "50 for one session alone, 125 with 4 sessions at once" in said.out
    assert "32.0 ms, bound by the slowest stage" in said.out
    assert "layers 0: 2 nodes; 1: 1 node" in said.out
    assert "short: layer 1 has 1 of 2 replicas: 2.0 KiB missing" in said.out
    assert "two nodes are enough" in said.out
    assert "serves it already" not in said.out
    explained = cli("model", "plan", "nano", "--explain", "--streams", "2", "--stages", "2")
    assert "serves it already" in explained.out
    assert "with 2 sessions at once" in explained.out


def test_json_has_all_of_it(cli: Cli, node: FakeNode) -> None:
    value = cli("model", "plan", "nano", "--json").json
    assert [stage["start"] for stage in value["plan"]["stages"]] == [0, 1]
    assert value["streams_tokens_per_s"] == 125.0
    assert value["layers"][1] == {"start": 1, "end": 2, "held": 1, "planned": 1, "wanted": 2}


@pytest.mark.parametrize("kind", ["toml", "json"])
def test_a_set_of_machines_is_planned_over(cli: Cli, node: FakeNode, tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"machines.{kind}"
    if kind == "toml":
        file.write_text(GOOD)
    else:
        nodes = [{"name": "desk", "memory": "24 GiB", "speed": 40000}, {"name": "attic", "memory": "8 GB", "speed": 9000}]
        file.write_text(json.dumps({"nodes": nodes, "links": [{"between": ["attic", "desk"], "rtt_ms": 0.5}]}))
    said = cli("model", "plan", "nano", "--nodes", str(file), "--explain")
    assert said.code == 0, said.err
    assert "desk" in said.out
    assert "(predicted)" in said.out
    value = cli("model", "plan", "nano", "--nodes", str(file), "--json", "--stages", "2").json
    assert {stage["name"] for stage in value["plan"]["stages"]} == {"desk", "attic"}
    compute_us = sum(stage["weight_bytes"] for stage in value["plan"]["stages"]) / 4 / 9000
    assert 500 < value["latency_us"] < 500 + 10 * compute_us + 10  # the link of half a millisecond, there and back


def test_what_is_missing_for_a_model_too_large_is_said(cli: Cli, node: FakeNode, tmp_path: Path) -> None:
    file = tmp_path / "small.toml"
    file.write_text('[[nodes]]\nname = "tiny"\nmemory = 100\nspeed = 1\n')
    said = cli("model", "plan", "nano", "--nodes", str(file))
    assert said.code == 1
    assert "are missing (tiny offers 100 bytes)" in said.err


NODE = '[[nodes]]\nname = "a"\nmemory = "1 GiB"\nspeed = 5\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nodes = [", "cannot be read as TOML"),
        ("", "there is no machine"),
        ("nodes = 3", "nodes is 3"),
        ("nodes = [3]", "node 1 is 3"),
        ("nodez = []", "unknown entry 'nodez'"),
        ('[[nodes]]\nmemory = "1 GiB"\nspeed = 5', "node 1: name is None"),
        ('[[nodes]]\nname = "a"\nspeed = 5', "node 'a': memory is None"),
        ('[[nodes]]\nname = "a"\nmemory = "1 parsec"\nspeed = 5', "memory is '1 parsec'"),
        ('[[nodes]]\nname = "a"\nmemory = -1\nspeed = 5', "memory is -1"),
        ('[[nodes]]\nname = "a"\nmemory = "1 GiB"', "node 'a': speed is missing"),
        ('[[nodes]]\nname = "a"\nmemory = "1 GiB"\nspeed = 0', "node 'a': speed is 0"),
        ('[[nodes]]\nname = "a"\nmemory = "1 GiB"\nspeed = 1e99', "node 'a': speed is 1e+99"),
        (NODE + "rtt_ms = -1", "rtt_ms is -1"),
        (NODE + "rtt_ms = nan", "cannot be read as TOML"),
        (NODE + "load = 1.5", "load is 1.5"),
        (NODE + 'held = "0-3"', "held is '0-3'"),
        (NODE + 'held = ["3-0"]', "held has '3-0'"),
        (NODE + 'held = ["0-99999"]', "held has '0-99999'"),
        (NODE + "gpu = true", "node 1 has an unknown entry 'gpu'"),
        (NODE + "born = 2020-01-01", "cannot be read as TOML"),
        (NODE + NODE, "two machines are called 'a'"),
        (NODE + '[[links]]\nbetween = ["a", "b"]\nrtt_ms = 1', "a link leads to 'b'"),
        (NODE + '[[links]]\nbetween = ["a"]\nrtt_ms = 1', "link 1: between is"),
        (NODE + '[[links]]\nbetween = ["a", "a"]', "link 1: rtt_ms is missing"),
        ("\n".join(NODE.replace('"a"', f'"n{number}"') for number in range(1001)), "nodes has 1001 entries"),
    ],
)
def test_a_bad_file_says_what_is_wrong_with_it(cli: Cli, node: FakeNode, tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    said = cli("model", "plan", "nano", "--nodes", str(file))
    assert said.code == 2
    assert words in said.err.replace("\n", " ")


def test_files_that_are_none(cli: Cli, node: FakeNode, tmp_path: Path) -> None:
    assert cli("model", "plan", "nano", "--nodes", str(tmp_path / "none.toml")).code == 5
    assert cli("model", "plan", "nano", "--nodes", str(tmp_path)).code == 5
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * (1 << 20) + b"\n")
    assert cli("model", "plan", "nano", "--nodes", str(large)).code == 2
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    assert cli("model", "plan", "nano", "--nodes", str(deep)).code == 2
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert cli("model", "plan", "nano", "--nodes", str(binary)).code == 2
    array = tmp_path / "array.json"
    array.write_text("[]")
    assert "is not a table" in cli("model", "plan", "nano", "--nodes", str(array)).err
