"""Every command against a real control API with a fake node behind it: output, JSON, exit codes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nexus.node.api import EmbedRequest, FidelityRequest, GenerateRequest
from nexus.proof.bundle import AnswerProof
from nexus.storage.home import Home
from nexus_cli import show
from nexus_cli.model import TEXT_BYTES_MAX
from nexus_cli.receipts import verify_file
from nexus_cli.run import Writer
from tests.cli.conftest import Cli
from tests.gateway.fake_node import ANSWER, COORDINATOR, FIRST, SECOND, FakeNode, bundle, manifest

PEER = f"/ip4/192.0.2.1/tcp/4510/p2p/{FIRST.peer_id}"


def test_a_bare_command_prints_help(cli: Cli) -> None:
    for arguments in ((), ("model",), ("config",), ("receipts",), ("testnet",), ("engine",), ("bench",)):
        result = cli(*arguments)
        assert (result.code, result.err) == (0, "")
        assert result.out.startswith("Usage: nexus")


def test_init_makes_a_node_once(cli: Cli, tmp_path: Path) -> None:
    made = cli("init", "--home", str(tmp_path / "new"), "--json", "--name", 'a "quoted" name').json
    assert made["peer_id"].startswith("12D3KooW")
    shown = cli("--home", str(tmp_path / "new"), "config", "show", "--origin", "--json").json
    assert shown["settings"]["node.name"] == 'a "quoted" name'
    assert shown["origins"]["node.name"].endswith("new/config.toml")
    again = cli("--home", str(tmp_path / "new"), "init")
    assert again.code == 1
    assert "already" in again.err
    assert cli("--home", str(tmp_path / "new"), "id", "--json").json["peer_id"] == made["peer_id"]


def test_config_show_prints_a_config_file(cli: Cli, home: Home) -> None:
    text = cli("config", "show").out
    home.config_file.write_text(text)
    assert cli("config", "show").out == text


def test_a_bad_setting_names_file_key_and_fix(cli: Cli, home: Home) -> None:
    home.config_file.write_text("[log]\nlevel = 5\n")
    result = cli("status")
    assert result.code == 2
    assert "log.level = 5" in result.err
    assert str(home.config_file) in result.err
    assert "fix:" in result.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("status",),
        ("stop",),
        ("peers",),
        ("peers", "add", PEER),
        ("ping", "x"),
        ("swarm", "status"),
        ("swarm", "watch"),
        ("model", "list"),
        ("model", "show", "x"),
        ("model", "plan", "x"),
        ("model", "add", "nano"),
        ("model", "fidelity", "x"),
        ("run", "nano", "x"),
        ("embed", "x"),
        ("audit", "list"),
        ("audit", "run", "ab"),
    ],
)
def test_without_a_daemon_the_exit_code_is_3(cli: Cli, home: Home, arguments: tuple[str, ...]) -> None:
    result = cli(*arguments)
    assert (result.code, result.out) == (3, "")
    assert "fix: Start one with: nexus start --detach" in result.err
    problem = json.loads(cli(*arguments, "--json").err)["error"]
    assert (problem["code"], problem["exit_code"]) == ("daemon-not-running", 3)


def test_status_and_id(cli: Cli, node: FakeNode) -> None:
    assert cli("status").out.startswith(f"peer id    {COORDINATOR.peer_id}")
    assert cli("--json", "status").json["receipts_signed"] == 5
    assert cli("status", "--json").json["ready"] is True
    assert cli("id", "--json").json["addresses"] == [f"/ip4/127.0.0.1/tcp/4510/p2p/{COORDINATOR.peer_id}"]


def test_netcheck(cli: Cli, node: FakeNode) -> None:
    said = cli("netcheck")
    assert said.code == 0  # through a relay
    assert "cannot dial this node, but through 1 relay" in said.out
    assert "cannot be told: that takes two peers" in said.out
    assert "could not reach it: no answer in 5 s" in said.out
    assert "nobody tried" in said.out
    assert "Forward the port." in said.out
    assert "\x1b" not in said.out
    found = cli("netcheck", "--json").json
    assert (found["exit_code"], found["netcheck"]["network"]["relays"][0]["relay"]) == (0, SECOND.peer_id)


@pytest.mark.parametrize(
    ("verdict", "scope", "code", "words"),
    [
        ("reachable", "public", 0, "directly, from the Internet"),
        ("unreachable", "public", 1, "cannot dial this node"),
        ("unreachable", "private", 1, "peers in the local network cannot dial"),
        ("local_only", "private", 8, "from the local network; whether from further away cannot be told"),
        ("local_only", "loopback", 8, "from this machine"),
        ("unknown", "", 8, "no peer could try"),
    ],
)
def test_netcheck_says_what_is_true(cli: Cli, node: FakeNode, verdict: str, scope: str, code: int, words: str) -> None:
    network = replace(node.reached.network, verdict=verdict, scope=scope, relays=())
    node.reached = replace(node.reached, network=network, clocks=(), clock="unknown")
    said = cli("netcheck")
    assert said.code == code
    assert words in said.out
    assert "no peer said what time it is" in said.out
    assert cli("netcheck", "--json").json["exit_code"] == code


def test_peers_and_ping(cli: Cli, node: FakeNode) -> None:
    listed = cli("peers")
    assert FIRST.peer_id[:16] in listed.out
    assert "\x1b" not in listed.out  # a peer's name must not steer the terminal
    assert cli("peers", "--json").json["peers"][0]["name"] == "node\x1b[31m"
    assert cli("peers", "add", PEER, "--json").json["peer"]["peer_id"] == FIRST.peer_id
    assert cli("ping", FIRST.peer_id, "--count", "3").out == "12.3 ms\n" * 3
    assert cli("ping", FIRST.peer_id, "--json").json["rtt_s"] == [0.0123]
    assert cli("ping", "nobody").code == 5
    assert cli("peers", "add", "/ip4/192.0.2.1/tcp/4510").code == 2
    assert cli("peers", "add", PEER.replace("192.0.2.1", "192.0.2.9")).code == 1


def test_models(cli: Cli, node: FakeNode, tmp_path: Path) -> None:
    root = manifest().root.hex()
    assert cli("model", "add", "nano").out == f"nano  {root}\n"
    assert cli("model", "add", str(tmp_path), "--name", "mine", "--json").json["model"]["name"] == "mine"
    notice = cli("model", "add", "nano", "--profile", "exact").err
    assert "profile exact" in notice
    assert "\x1b" not in notice
    assert cli("model", "add", "nano", "--profile", "fast").code == 2
    assert cli("model", "add", str(tmp_path / "nowhere")).code == 5
    assert root[:12] in cli("model", "list").out
    assert cli("model", "list", "--json").json["models"][0]["manifest"]["root"] == root
    shown = cli("model", "show", "nano").out
    assert "LlamaForCausalLM" in shown
    assert "differ in their last digits" in shown
    assert cli("model", "show", "missing").code == 5
    assert "two nodes are enough" in cli("model", "plan", "nano").out
    assert len(cli("model", "plan", "nano", "--json", "--stages", "2").json["plan"]["stages"]) == 2
    assert cli("model", "plan", "nano", "--stages", "3").code == 1


def test_model_fidelity(cli: Cli, node: FakeNode, tmp_path: Path) -> None:
    shown = cli("model", "fidelity", "nano").out
    assert "99.50% of the tokens are the same" in shown
    assert "ratio 1.0038" in shown
    assert "layer.0, its own error is 2.00%" in shown
    assert "embedding    1.0000%" in shown
    text = tmp_path / "mine.txt"
    text.write_text("über", "utf-8")
    value = cli("model", "fidelity", "nano", "--text", str(text), "--against", str(tmp_path), "--json").json["fidelity"]
    assert node.requests[-1] == FidelityRequest("nano", "über", "mine.txt", str(tmp_path))
    assert (value["model"], value["top1_agreement"], value["worst_layer"]) == ("nano", 0.995, {"name": "layer.0", "error": 0.02})
    assert [layer["name"] for layer in value["layers"]] == ["embedding", "layer.0", "head"]
    assert "99.50% of the tokens are the same" in cli("model", "show", "compared").out
    assert cli("model", "show", "compared", "--json").json["model"]["fidelity"]["tokens"] == 5000
    assert cli("model", "show", "nano", "--json").json["model"]["fidelity"] is None


def test_model_fidelity_refuses(cli: Cli, node: FakeNode, tmp_path: Path) -> None:
    binary, large, empty = tmp_path / "binary", tmp_path / "large", tmp_path / "empty"
    binary.write_bytes(b"\xff\xfe")
    large.write_bytes(b"a" * (TEXT_BYTES_MAX + 1))
    empty.write_bytes(b"\n")
    for arguments, code in (
        (("missing",), 5),
        (("nano", "--text", str(tmp_path / "none")), 5),
        (("nano", "--against", str(tmp_path / "none")), 5),
        (("nano", "--text", str(binary)), 2),
        (("nano", "--text", str(large)), 2),
        (("nano", "--text", str(empty)), 2),
    ):
        result = cli("model", "fidelity", *arguments)
        assert (result.code, result.out) == (code, ""), arguments
        assert "fix:" in result.err


def test_run_streams_to_stdout_and_reports_on_stderr(cli: Cli, node: FakeNode, tmp_path: Path) -> None:
    file = tmp_path / "proof"
    result = cli(
        "run", "nano", "Tell me", "--seed", "5", "--stop", "x", "--stop", "y", "--temperature", "0.5", "--receipts", str(file)
    )
    assert (result.code, result.out) == (0, "".join(ANSWER))
    assert "10.0 tokens/s, first token after 100.0 ms (stop); 2 of 2 receipts verified" in result.err
    assert node.requests == [GenerateRequest("nano", "Tell me", temperature=0.5, seed=5, stop=("x", "y"))]
    assert [report.receipts for report in verify_file(file)] == [2]
    value = cli("run", "nano", "Tell me", "--json").json
    assert (value["text"], value["receipts_verified"], value["reason"]) == ("".join(ANSWER), 2, "stop")
    assert "bundle" not in value


def test_run_says_what_was_audited(cli: Cli, node: FakeNode) -> None:
    result = cli("run", "nano", "x", "--verify", "light")
    assert result.code == 0
    assert isinstance(node.requests[-1], GenerateRequest)
    assert node.requests[-1].verify == "light"
    assert "audited: 2 of 2 stages by light audit (2 cells each), 4.5 ms (0.9 % of the answer)" in result.err
    shown = cli("run", "nano", "x", "--verify", "light", "--json").json["audit"]["stages"]
    assert [(stage["verdict"], stage["cells"], stage["cost_s"]) for stage in shown] == [("ok", 2, 0.001), ("ok", 2, 0.0035)]
    assert "audited" not in cli("run", "nano", "x").err


def test_a_cheated_answer_is_marked_and_the_exit_code_is_7(cli: Cli, node: FakeNode) -> None:
    result = cli("run", "nano", "cheated", "--verify", "replica")
    assert result.code == 7
    assert "WRONG" in result.err
    assert "operation down of layer 1 is wrong in step 2" in result.err
    assert f"nexus evidence show {bytes(range(8)).hex()}" in result.err
    assert "node-1" in result.err


def test_an_audit_that_was_asked_for_and_did_not_take_place_is_no_success(cli: Cli, node: FakeNode) -> None:
    assert cli("run", "nano", "x", "--no-receipts", "--verify", "light").code == 2
    assert cli("embed", "x", "--verify", "light").code == 7
    assert cli("embed", "x", "--verify", "off").code == 0


def test_sessions_are_audited_after_the_fact(cli: Cli, node: FakeNode) -> None:
    session = bundle().terms.session.hex()
    listed = cli("audit", "list")
    assert session[:16] in listed.out
    assert cli("audit", "list", "--json").json["sessions"][0]["session"] == session
    assert "node-1" in cli("audit", "show", session[:8]).out
    ran = cli("audit", "run", session[:8], "--mode", "replica")
    assert ran.code == 0
    assert "replica" in ran.out
    assert cli("audit", "show", "ffff").code == 5
    assert cli("audit", "show", "../../etc").code == 5
    assert cli("audit", "run", session[:8], "--mode", "dual").code == 2


def test_run_reads_its_prompt_from_stdin(cli: Cli, node: FakeNode) -> None:
    assert cli("run", "nano", "-", stdin="über\n".encode()).code == 0
    assert node.requests == [GenerateRequest("nano", "über\n")]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--max-tokens", "0"), "max_tokens is 0\nfix: Give a whole number from 1"),
        (("--max-tokens", "99999999999"), "max_tokens"),
        (("--max-tokens", "many"), "not a valid integer"),
        (("--temperature", "-1"), "temperature"),
        (("--temperature", "nan"), "not a number"),
        (("--top-p", "0"), "top_p"),
        (("--top-k", "-1"), "top_k"),
        (("--min-p", "2"), "min_p"),
        (("--min-p", "nan"), "not a number"),
        (("--repetition-penalty", "0"), "repetition_penalty"),
        (("--seed", "-1"), "seed"),
        (("--stages", "0"), "stages"),
        (("--receipts", "/nowhere/at/all"), "cannot write"),
        (("--receipts", "x", "--no-receipts"), "exclude"),
        (("--timeout", "0"), "above 0"),
    ],
)
def test_run_refuses_what_makes_no_sense(cli: Cli, node: FakeNode, arguments: tuple[str, ...], says: str) -> None:
    result = cli("run", "nano", "x", *arguments)
    assert result.code == (1 if "/nowhere/at/all" in arguments else 2)
    assert says in result.err
    assert result.out == ""
    assert node.requests == []


def test_text_that_is_not_utf8_is_refused(cli: Cli, node: FakeNode) -> None:
    argument = os.fsdecode(b"caf\xe9")
    for arguments, stdin in (
        (("run", "nano", argument), b""),
        (("run", "nano", "-"), b"caf\xe9"),
        (("embed", argument), b""),
        (("embed", "-"), b"\xff"),
    ):
        result = cli(*arguments, stdin=stdin)
        assert result.code == 2
        assert "not valid UTF-8" in result.err
    assert node.requests == []


def test_an_empty_prompt_is_refused(cli: Cli, node: FakeNode) -> None:
    assert cli("run", "nano", "").code == 2
    assert cli("run", "nano", "-", stdin=b"").code == 2


def test_a_run_that_fails_half_way_keeps_what_came_and_says_why(cli: Cli, node: FakeNode) -> None:
    result = cli("run", "nano", "fail half way")
    assert (result.code, result.out) == (1, "".join(ANSWER[:2]))
    assert "error: node-1 is gone" in result.err


def test_an_answer_whose_receipts_do_not_all_hold_is_a_failure(cli: Cli, node: FakeNode) -> None:
    result = cli("run", "nano", "unverified")
    assert result.code == 7
    assert "1 of 2 receipts verified" in result.err
    assert cli("run", "nano", "unverified", "--json").code == 7
    assert cli("run", "nano", "unverified", "--no-receipts").code == 0


def test_a_timeout_ends_the_command_and_the_work(cli: Cli, node: FakeNode) -> None:
    result = cli("run", "nano", "wait", "--timeout", "0.5")
    assert result.code == 6
    assert "within 0.5 s" in result.err


def test_embed(cli: Cli, node: FakeNode, tmp_path: Path) -> None:
    result = cli("embed", "one", "two", "--receipts", str(tmp_path / "proof"))
    assert [json.loads(line) for line in result.out.splitlines()] == [[0.5, -0.25, 1e-9]] * 2
    assert "2 of 2 receipts verified" in result.err
    assert node.requests == [EmbedRequest(("one", "two"))]
    assert len(cli("embed", "one", "--json").json["embeddings"]) == 1
    assert cli("embed").code == 2


def test_receipts_verify_needs_nothing_but_the_file(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path / "no" / "such" / "home"))
    file = tmp_path / "proof"
    file.write_bytes(AnswerProof(1, (bundle(),)).to_bytes())
    result = cli("receipts", "verify", str(file))
    assert result.code == 0
    assert result.out.endswith("2 of 2 receipts verified\n")
    assert cli("receipts", "verify", str(file), "--json").json["parts"][0]["coordinator"] == COORDINATOR.peer_id


def test_a_proof_that_does_not_hold_has_exit_code_7(cli: Cli, tmp_path: Path) -> None:
    good = AnswerProof(1, (bundle(),)).to_bytes()
    file = tmp_path / "proof"
    for content in (good[:-1], good + b"\0", b"", b"garbage", good[:-1] + bytes([good[-1] ^ 1])):
        file.write_bytes(content)
        result = cli("receipts", "verify", str(file), "--json")
        assert (result.code, result.out) == (7, "")
    assert "receipt 2 of 2" in result.err
    assert cli("receipts", "verify", str(tmp_path / "none")).code == 5


def test_doctor_says_what_is_wrong_and_what_to_do(cli: Cli, home: Home) -> None:
    fine = cli("doctor", "--json")
    levels = {check["name"]: check["level"] for check in fine.json["checks"]}
    assert fine.code == 0
    assert (levels["python"], levels["data directory"], levels["torch"], levels["daemon"]) == ("pass", "pass", "pass", "warn")
    home.identity_file.chmod(0o644)
    broken = cli("doctor")
    assert broken.code == 1
    assert "chmod 600" in broken.out


def test_errors_are_plain_without_colour(cli: Cli, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in cli("status").err


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    code = """
import sys
sys.argv = ["nexus", "--help"]
from nexus_cli.main import main
try:
    main()
except SystemExit:
    pass
heavy = {"torch", "libp2p", "transformers", "trio", "httpx", "rich", "starlette", "numpy", "nacl"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


NOT_UTF8 = os.fsdecode(b"\xff")


@pytest.mark.parametrize(
    "arguments",
    [
        ("model", "show", NOT_UTF8),
        ("model", "plan", NOT_UTF8),
        ("model", "add", "nano", "--name", NOT_UTF8),
        ("ping", NOT_UTF8),
        ("run", NOT_UTF8, "x"),
        ("embed", "x", "--model", NOT_UTF8),
        ("init", "--home", "made", "--name", NOT_UTF8),
    ],
)
def test_no_argument_that_is_not_utf8_gets_further(cli: Cli, node: FakeNode, arguments: tuple[str, ...]) -> None:
    result = cli(*arguments, "--json")
    assert result.code in (2, 5)
    error = json.loads(result.err)["error"]
    assert error["exit_code"] == result.code
    assert error["fix"]
    assert node.requests == []


@pytest.mark.parametrize("name", ["", "a/b", "..", "../../v0/status", "a\nb"])
def test_what_cannot_be_a_models_name_is_not_found(cli: Cli, node: FakeNode, name: str) -> None:
    for command in ("show", "plan"):
        result = cli("model", command, name)
        assert result.code == 5
        assert "no model can be called" in result.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("bogus",),
        ("run",),
        ("run", "nano", "x", "--max-tokens", "many"),
        ("--bogus",),
        ("model", "bogus"),
        ("status", "--timeout", "x"),
    ],
)
def test_a_wrong_command_line_is_json_too_where_json_is_asked_for(cli: Cli, home: Home, arguments: tuple[str, ...]) -> None:
    for given in ((*arguments, "--json"), ("--json", *arguments)):
        result = cli(*given)
        assert (result.code, result.out) == (2, "")
        error = json.loads(result.err)["error"]
        assert (error["code"], error["exit_code"]) == ("usage", 2)
        assert error["fix"].startswith("See: nexus")
    assert cli(*arguments).err.startswith("Usage: nexus")


def test_an_empty_home_is_not_the_working_directory(cli: Cli) -> None:
    assert cli("--home", "", "init").code == 2
    assert cli("init", "--home", "").code == 2


def test_no_daemon_where_there_is_no_node_says_how_to_make_one(cli: Cli, tmp_path: Path) -> None:
    result = cli("--home", str(tmp_path / "nothing"), "status")
    assert result.code == 3
    assert "nexus init" in result.err


def test_a_full_disk_behind_the_output_is_an_error_with_a_cause(home: Home) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with full.open("w") as out:
        done = subprocess.run(
            [sys.executable, "-c", "from nexus_cli.main import main; main()", "config", "show"],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert "error: cannot read or write the output: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_blank_before_a_first_word_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*pieces: str) -> str:
        writer = Writer()
        for piece in pieces:
            writer.write(piece)
        writer.end()
        return capsys.readouterr().out

    assert shown("", " The", " sky") == "The sky\n"
    assert shown("  The") == " The\n"
    assert shown("\n return x\n") == "\n return x\n"
    assert shown(" ", " a") == " a\n"
    assert shown() == "\n"


def test_an_answer_without_receipts_says_that_nothing_is_verified(cli: Cli, node: FakeNode) -> None:
    result = cli("run", "nano", "x", "--no-receipts")
    assert result.code == 0
    assert "nothing of this is verified" in result.err
    assert "receipts verified" not in result.err


def test_tables_keep_ids_whole_at_80_columns() -> None:
    from rich.console import Console

    screen = Console(width=80, record=True, file=io.StringIO())
    screen.print(show.table(("stage", "peer", "layers", "receipts"), [("0", FIRST.peer_id, "10-11", "100")], right=("stage",)))
    screen.print(show.table(("name", "peer", "models"), [("x", FIRST.peer_id[:16], "nano 0-1; " * 20)], wrap=("models",)))
    text = screen.export_text()
    assert FIRST.peer_id in text
    assert max(len(line) for line in text.splitlines()) <= 80


def test_help_fits_a_terminal_without_cutting_sentences(cli: Cli) -> None:
    for group in ((), ("model",), ("peers",), ("receipts",), ("testnet",), ("config",), ("memory",), ("collection",), ("swarm",)):
        assert "..." not in cli(*group, "--help").out.partition("Commands:")[2]
