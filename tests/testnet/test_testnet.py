"""Real nexusd processes on loopback, driven as a user drives them: by the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nexus.models import builtin_path
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
    # It lists a model by the name that node-1 announces, of which it hears within some seconds.
    deadline = time.monotonic() + 60
    while not any(view["held_layers"] for view in on(nodes[2], environ, "model", "list")["models"]):
        assert time.monotonic() < deadline, "the node fetched its layers"
        time.sleep(0.2)

    # The file alone is the proof, on a machine that has no node.
    elsewhere = environ | {"NEXUS_HOME": str(tmp_path / "nothing")}
    report = nexus(elsewhere, "receipts", "verify", str(proof))
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


def spoil_config(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))


def spoil_weights(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])


def spoil_header(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes((1 << 62).to_bytes(8, "little") + weights.read_bytes()[8:])


def spoil_form(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def spoil_place(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory.parent / "elsewhere")
    (directory / "model.safetensors").symlink_to("../elsewhere")


def spoil_index(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory.parent / "elsewhere.safetensors")
    index = {"weight_map": {"lm_head.weight": "../elsewhere.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_config, "asks to run code"),
        (spoil_weights, "the file has"),
        (spoil_header, "its header claims"),
        (spoil_form, "pickle"),
        (spoil_place, "leads out of the directory"),
        (spoil_index, "outside its directory"),
    ],
)
def test_an_unsafe_or_broken_model_is_refused_and_nothing_is_lost(
    nodes: list[Any], environ: dict[str, str], tmp_path: Path, spoil: Callable[[Path], None], says: str
) -> None:
    model = shutil.copytree(builtin_path("nano"), tmp_path / "model")
    spoil(model)
    before = on(nodes[0], environ, "model", "list")
    error = on(nodes[0], environ, "model", "add", str(model), code=1)["error"]
    assert error["code"] == "bad-model"
    assert says in error["cause"]
    assert error["fix"]
    assert on(nodes[0], environ, "model", "list") == before


def test_a_second_daemon_on_a_data_directory_is_refused(nodes: list[Any], environ: dict[str, str]) -> None:
    error = on(nodes[0], environ, "start", code=1)["error"]
    assert f"in use by the daemon with pid {nodes[0]['pid']}" in error["cause"]


def test_a_port_that_is_taken_is_named(nodes: list[Any], environ: dict[str, str], tmp_path: Path) -> None:
    port = nodes[0]["port"]
    listen = f"network.listen=/ip4/127.0.0.1/tcp/{port}"
    error = nexus(environ, "--home", str(tmp_path / "h"), "start", "--init", "--detach", "--set", listen, code=1)["error"]
    assert f"port {port} is in use" in error["cause"]
    assert "network.listen" in error["fix"]


def start_long_run(node: Any, environ: dict[str, str], stages: int = 3) -> subprocess.Popen[str]:
    """An answer that is on its way: random tokens, so that no end token comes soon. Its first character has been read.

    `stages` is given: nodes that start side by side measure very different speeds, and a fast one would be planned alone.
    """
    options = ["--max-tokens", "450", "--temperature", "100", "--seed", "1", "--stages", str(stages)]
    run = subprocess.Popen(
        [*NEXUS, "--home", node["home"], "run", "nano", QUESTION, *options],
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        # A shell in the background may have told its children to ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert run.stdout is not None
    assert run.stdout.read(1)
    return run


def test_ctrl_c_ends_the_work_on_every_node(nodes: list[Any], environ: dict[str, str]) -> None:
    run = start_long_run(nodes[0], environ)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=TIMEOUT_S)
    assert run.returncode == 130
    assert said.strip() == "interrupted"
    until = time.monotonic() + TIMEOUT_S
    while any(on(node, environ, "status")["sessions"] for node in nodes):
        assert time.monotonic() < until
    assert on(nodes[0], environ, "run", "nano", QUESTION, "--max-tokens", "2")["receipts_verified"] > 0


def test_killing_a_node_in_the_middle_of_an_answer_names_its_stage_and_the_next_answer_does_without(
    nodes: list[Any], environ: dict[str, str]
) -> None:
    plan = on(nodes[0], environ, "model", "plan", "nano", "--stages", "3")["plan"]
    stage = next(stage["stage"] for stage in plan["stages"] if stage["name"] == "node-3")
    run = start_long_run(nodes[0], environ)
    assert processes.send_signal(processes.Process(nodes[2]["pid"], nodes[2]["started"]), signal.SIGKILL)
    _, said = run.communicate(timeout=TIMEOUT_S)
    assert run.returncode == 1
    assert f"error: stage {stage} ({nodes[2]['peer_id']})" in said
    assert "fix: " in said
    states = nexus(environ, "testnet", "status")["nodes"]
    assert [state["running"] for state in states] == [True, True, False]
    answer = on(nodes[0], environ, "run", "nano", QUESTION, "--max-tokens", "4")
    assert answer["receipts"] == answer["receipts_verified"] > 0
    assert {row["name"] for row in answer["stages"]} <= {"node-1", "node-2"}


def test_stopping_lets_an_answer_end_or_says_that_it_was_cut_off(nodes: list[Any], environ: dict[str, str]) -> None:
    run = start_long_run(nodes[1], environ, stages=2)
    assert on(nodes[1], environ, "stop")["stopped"]
    _, said = run.communicate(timeout=TIMEOUT_S)
    assert "receipts verified" in said if run.returncode == 0 else "error: " in said
    assert on(nodes[1], environ, "status", code=3)["error"]["code"] == "daemon-not-running"


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
