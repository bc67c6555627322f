"""nexus start, status, stop: the daemon of this data directory."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import click

from nexus_cli import show
from nexus_cli.options import NexusCommand, Shared, daemon_options, flags_from, pass_shared

START_TIMEOUT_S = 60.0
STOP_MARGIN_S = 20.0


@click.command(cls=NexusCommand)
@daemon_options
@click.option("--detach", is_flag=True, help="Start it in the background, and return when it is ready.")
@pass_shared
def start(
    shared: Shared, init: bool, settings: tuple[str, ...], log_level: str | None, log_format: str | None, detach: bool
) -> None:
    """Start the daemon. In the foreground, as nexusd does, or with --detach in the background."""
    from nexus_cli.daemon import run_daemon

    flags = flags_from(settings, log_level, log_format)
    if not detach:
        run_daemon(shared.home, init, flags)
        return
    arguments = [f"--set={key}={value}" for key, value in flags.items()]
    pid, waited_s = _start_detached(shared, init, arguments)
    if shared.json:
        show.print_json(
            {"pid": pid, "home": str(shared.path), "log": str(shared.path / "nexusd.log"), "started_after_s": round(waited_s, 3)}
        )
        return
    click.echo(
        f"nexusd runs with pid {pid}, ready after {show.duration(waited_s)}; its log: {shared.path / 'nexusd.log'}", err=True
    )


def _start_detached(shared: Shared, init: bool, arguments: Sequence[str]) -> tuple[int, float]:
    from nexus.core.errors import LocalError, NexusError, TimedOutError
    from nexus.storage.home import create_home, lock_holder, open_home
    from nexus_cli.client import Daemon
    from nexus_cli.processes import POLL_S, last_words, log_size, spawn_daemon
    from nexus_config.settings import control_socket

    if init and not (shared.path / "identity.key").exists():
        create_home(shared.path)
    home = open_home(shared.path)
    socket = control_socket(shared.settings(), shared.path)
    holder = lock_holder(home)
    if holder is not None:
        raise LocalError(f"a daemon runs already, with pid {holder}", "Use it, or stop it with: nexus stop")
    began = time.monotonic()
    timeout_s = shared.timeout_s or START_TIMEOUT_S
    since = log_size(home.log_file)
    process = spawn_daemon(shared.path, arguments, home.log_file, os.environ)
    reason = "it has not answered yet"
    # The socket is there before the node is open: what it has not read yet must not hold us past the deadline.
    daemon = Daemon(socket, answer_timeout_s=min(2.0, timeout_s))
    try:
        while time.monotonic() - began < timeout_s:
            code = process.poll()
            if code is not None:
                raise last_words(code, home.log_file, since)
            try:
                daemon.get("/readyz")
            except NexusError as error_:
                reason = error_.cause
                time.sleep(POLL_S)
                continue
            return process.pid, time.monotonic() - began
    finally:
        daemon.close()
    raise TimedOutError(
        f"the daemon (pid {process.pid}) is not ready after {timeout_s:g} s: {reason}",
        f"It goes on starting, and its log is {home.log_file}; end it with: kill {process.pid}",
    )


@click.command(cls=NexusCommand)
@pass_shared
def status(shared: Shared) -> None:
    """Say what the running daemon is, has and does. Exit code 3 if there is none."""
    from nexus.gateway.wire import to_json
    from nexus.node.api import NodeStatus
    from nexus_cli.client import connected

    with connected(shared) as daemon:
        now = daemon.get_as(NodeStatus, "/v0/status")
    if shared.json:
        fields = to_json(now)
        assert isinstance(fields, dict)
        show.print_json(fields)
        return
    show.pairs(
        [
            ("peer id", now.peer_id),
            ("name", now.name),
            ("version", now.version),
            ("ready", "yes" if now.ready else f"no: {now.not_ready_because}"),
            ("up", show.duration(now.uptime_s)),
            ("addresses", " ".join(now.addresses) or "none"),
            ("peers", str(now.peers)),
            ("models", str(now.models)),
            ("running", f"{now.sessions} requests and stages now"),
            (
                "computed",
                f"{show.count(now.steps_served, 'step')} in {show.count(now.sessions_served, 'stage')}, own requests and others'",
            ),
            ("signed", show.count(now.receipts_signed, "receipt")),
            ("memory", f"{show.size(now.memory_used_bytes)} of {show.size(now.memory_limit_bytes)}"),
        ]
    )


@click.command(cls=NexusCommand)
@pass_shared
def stop(shared: Shared) -> None:
    """Stop the daemon. Running sessions may finish first, for as long as control.drain_timeout_s says."""
    from nexus.core.errors import TimedOutError
    from nexus.storage.home import Home, lock_holder
    from nexus_cli.client import connected
    from nexus_cli.processes import POLL_S

    home = Home(shared.path)
    with connected(shared) as daemon:
        pid = lock_holder(home)
        daemon.post("/v0/stop", {})
    timeout_s = shared.timeout_s or shared.settings().control.drain_timeout_s + STOP_MARGIN_S
    until = time.monotonic() + timeout_s
    while lock_holder(home) is not None:
        if time.monotonic() > until:
            raise TimedOutError(
                f"the daemon (pid {pid}) still runs after {timeout_s:g} s", f"End it at once with: kill -KILL {pid}"
            )
        time.sleep(POLL_S)
    if shared.json:
        show.print_json({"stopped": True, "pid": pid})
        return
    click.echo("stopped", err=True)
