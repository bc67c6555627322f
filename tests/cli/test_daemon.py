"""nexusd as a process: start, one per home, orderly and immediate end, service manager, detached start. Only the node is fake."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from nexus.storage.home import Home, lock_holder
from nexus_cli import processes, systemd
from tests.cli.conftest import Cli

Nexusd = Callable[..., "subprocess.Popen[str]"]
DEADLINE_S = 30


def read_until(process: subprocess.Popen[str], text: str) -> list[str]:
    """Lines of its log up to the one that has `text`."""
    assert process.stderr is not None
    lines: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} did not come: {''.join(lines)}")


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    assert process.stderr is not None
    rest = process.stderr.read()
    return process.wait(DEADLINE_S), rest


def test_it_logs_json_lines_where_nobody_watches(nexusd: Nexusd) -> None:
    process = nexusd("--set", "node.name=logger")
    lines = [json.loads(line) for line in read_until(process, '"started"')]
    assert [list(line)[:3] for line in lines] == [["ts", "level", "event"]] * len(lines)
    assert lines[0]["name"] == "logger"
    process.send_signal(signal.SIGTERM)
    code, rest = end(process)
    assert code == 0
    assert "closed, drained: True" in rest
    assert '"stopped"' in rest


def test_the_log_of_a_terminal_is_text(nexusd: Nexusd) -> None:
    process = nexusd("--log-format", "text")
    assert "{" not in "".join(read_until(process, "started"))
    process.send_signal(signal.SIGINT)
    assert end(process)[0] == 0


def test_stop_ends_it_and_frees_the_home(nexusd: Nexusd, cli: Cli, home: Home) -> None:
    process = nexusd()
    read_until(process, "started")
    assert lock_holder(home) == process.pid
    assert cli("stop", "--json").json == {"schema": 1, "stopped": True, "pid": process.pid}
    assert process.wait(DEADLINE_S) == 0
    assert not home.socket.exists()
    assert lock_holder(home) is None


def test_a_second_daemon_is_refused_with_the_pid_of_the_first(nexusd: Nexusd) -> None:
    first = nexusd()
    read_until(first, "started")
    code, text = end(nexusd())
    assert code == 1
    assert f"in use by the daemon with pid {first.pid}" in text
    assert first.poll() is None


def test_a_drain_has_a_deadline(nexusd: Nexusd) -> None:
    process = nexusd("--set", "control.drain_timeout_s=0.1", FAKE_NODE="stuck")
    read_until(process, "started")
    process.send_signal(signal.SIGTERM)
    code, rest = end(process)
    assert code == 0
    assert "sessions cut off" in rest


def test_a_second_signal_ends_it_at_once(nexusd: Nexusd, home: Home) -> None:
    process = nexusd("--set", "control.drain_timeout_s=1000", FAKE_NODE="stuck")
    read_until(process, "started")
    process.send_signal(signal.SIGTERM)
    read_until(process, "draining")
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == -signal.SIGTERM
    # What it left behind does not keep the next one from starting.
    assert home.socket.exists()
    read_until(nexusd(), "started")


def test_a_signal_while_it_opens_ends_it_in_order(nexusd: Nexusd, home: Home) -> None:
    process = nexusd(FAKE_NODE="hang")
    read_until(process, "opening")
    process.send_signal(signal.SIGTERM)
    assert end(process)[0] == 0
    assert not home.socket.exists()


def test_a_node_that_cannot_open_says_why(nexusd: Nexusd) -> None:
    code, text = end(nexusd(FAKE_NODE="fail"))
    assert code == 1
    assert "port 4510 is taken" in text
    assert "fix: Set network.listen" in text


def test_a_bug_is_logged_and_not_shown_raw(nexusd: Nexusd) -> None:
    code, text = end(nexusd(FAKE_NODE="crash"))
    assert code == 1
    crash = next(json.loads(line) for line in text.splitlines() if '"crashed"' in line)
    assert "ZeroDivisionError" in crash["exception"]
    assert text.splitlines()[-2].startswith("error: the daemon hit an error of its own")


@pytest.mark.parametrize(("arguments", "code"), [(("--set", "node.nmae=x"), 2), (("--set", "novalue"), 2), (("--unknown",), 2)])
def test_bad_flags(nexusd: Nexusd, arguments: tuple[str, ...], code: int) -> None:
    assert end(nexusd(*arguments))[0] == code


def test_no_home_and_loose_modes(nexusd: Nexusd, home: Home) -> None:
    home.identity_file.chmod(0o640)
    code, text = end(nexusd())
    assert code == 4
    assert "chmod 600" in text
    home.identity_file.unlink()
    code, text = end(nexusd())
    assert code == 5
    assert "nexus init" in text


def test_it_makes_its_home_when_asked(nexusd: Nexusd, home: Home) -> None:
    home.identity_file.unlink()
    process = nexusd("--init")
    read_until(process, "started")
    assert home.identity_file.exists()


def test_the_service_manager_is_told(nexusd: Nexusd, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(DEADLINE_S)
        process = nexusd(NOTIFY_SOCKET=str(tmp_path / "notify"), WATCHDOG_USEC="50000")
        seen: set[str] = set()
        while not {"READY=1", "WATCHDOG=1"} <= seen:
            seen |= set(manager.recv(4096).decode().splitlines())
        process.send_signal(signal.SIGTERM)
        while "STOPPING=1" not in seen:
            seen |= set(manager.recv(4096).decode().splitlines())
        assert end(process)[0] == 0


def test_the_watchdog_is_fed_only_where_it_is_ours() -> None:
    assert systemd.watchdog_interval_s({}, 5) is None
    assert systemd.watchdog_interval_s({"WATCHDOG_USEC": "10000000"}, 5) == 5.0
    assert systemd.watchdog_interval_s({"WATCHDOG_USEC": "10000000", "WATCHDOG_PID": "6"}, 5) is None
    assert systemd.watchdog_interval_s({"WATCHDOG_USEC": "soon"}, 5) is None


@pytest.mark.usefixtures("fake_spawn")
def test_a_detached_start_waits_until_it_is_ready(cli: Cli, home: Home) -> None:
    started = cli("start", "--detach", "--json", "--set", "node.name=detached").json
    try:
        assert lock_holder(home) == started["pid"]
        assert cli("status", "--json").json["name"] == "detached"
        again = cli("start", "--detach")
        assert (again.code, f"pid {started['pid']}" in again.err) == (1, True)
    finally:
        assert cli("stop").code == 0
    os.waitpid(started["pid"], 0)


@pytest.mark.usefixtures("fake_spawn")
def test_a_detached_start_that_fails_quotes_the_log(cli: Cli, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NODE", "fail")
    result = cli("start", "--detach")
    assert result.code == 1
    assert "port 4510 is taken" in result.err


@pytest.mark.usefixtures("fake_spawn")
def test_a_detached_start_has_a_deadline(cli: Cli, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NODE", "hang")
    result = cli("start", "--detach", "--timeout", "1")
    assert result.code == 6
    # It goes on starting, so the message says how to end it.
    told = re.search(r"kill (\d+)", result.err)
    assert told
    os.kill(int(told[1]), signal.SIGKILL)
    os.waitpid(int(told[1]), 0)


def test_a_pid_that_now_is_another_process_is_not_signalled() -> None:
    us = processes.find_process(os.getpid())
    assert us is not None
    assert processes.is_running(us)
    stranger = processes.Process(us.pid, us.started + "0")
    assert not processes.send_signal(stranger, signal.SIGKILL)
    assert processes.find_process(2**22 + 5) is None
