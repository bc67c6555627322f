"""nexus doctor: what could keep this node from working, each with what to do about it."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import click

from nexus_cli import show
from nexus_cli.options import NexusCommand, Shared, pass_shared

if TYPE_CHECKING:
    from nexus.node.api import NodeStatus
    from nexus_config.settings import Settings

Level = Literal["pass", "warn", "fail"]
DISK_FREE_BYTES_MIN = 1 << 30
MEMORY_BYTES_MIN = 1 << 30
# 2025-01-01: no clock that is right says less, and node records of others would all be from its future.
CLOCK_LEAST_S = 1_735_689_600
ANSWER_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `fix` is empty where nothing has to be done."""

    name: str
    level: Level
    detail: str
    fix: str = ""


@click.command(cls=NexusCommand)
@pass_shared
def doctor(shared: Shared) -> None:
    """Check this node and its surroundings. Pass, warn or fail, each with the fix; exit code 1 if anything fails."""
    checks = list(run_checks(shared))
    failed = any(check.level == "fail" for check in checks)
    if shared.json:
        entries = [{"name": check.name, "level": check.level, "detail": check.detail, "fix": check.fix} for check in checks]
        show.print_json({"ok": not failed, "checks": entries})
    else:
        colors = {"pass": "green", "warn": "yellow", "fail": "red"}
        plain = False if shared.no_color or "NO_COLOR" in os.environ else None
        for check in checks:
            click.echo(
                f"{click.style(check.level, fg=colors[check.level])}  {check.name}: {show.printable(check.detail)}", color=plain
            )
            if check.fix:
                click.echo(f"      fix: {show.printable(check.fix)}")
    if failed:
        raise click.exceptions.Exit(1)


def run_checks(shared: Shared) -> Iterator[Check]:
    """Every check in an order in which the first failure is the likeliest cause of the later ones."""
    from nexus.core.errors import NexusError

    yield check_python(sys.version_info[:3])
    yield check_clock(time.time())
    yield check_torch()
    try:
        settings = shared.settings()
    except NexusError as error:
        yield Check("settings", "fail", error.cause, error.fix)
        return
    yield Check("settings", "pass", str(shared.path / "config.toml"))
    home = check_home(shared)
    yield home
    yield check_disk(shared)
    yield check_memory(settings)
    if home.level == "fail":
        return
    status, daemon = check_daemon(shared, settings)
    yield daemon
    yield from (check_port(address, status is not None) for address in settings.network.listen)
    if status is not None:
        yield check_ready(status)
        yield check_peers(status, settings)


def check_python(version: Sequence[int]) -> Check:
    text = ".".join(str(part) for part in version)
    if tuple(version[:2]) < (3, 11):
        return Check("python", "fail", f"{text}, Nexus needs 3.11", "Install Python 3.11 or newer")
    return Check("python", "pass", text)


def check_clock(now_s: float) -> Check:
    if now_s < CLOCK_LEAST_S:
        shown = time.strftime("%Y-%m-%d", time.gmtime(now_s))
        return Check(
            "clock", "fail", f"it says {shown}", "Set the clock, and keep it right by NTP: peers refuse records from another time"
        )
    return Check("clock", "pass", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now_s)))


def check_torch() -> Check:
    """Not only whether it is installed: a build for another processor fails at the first product."""
    try:
        import torch

        product = float((torch.ones(2, 2) @ torch.ones(2, 2)).sum())
    except (ImportError, OSError, RuntimeError) as error:
        return Check("torch", "fail", f"it does not work: {error}", "Install again: scripts/quickstart")
    if product != 8.0:
        return Check("torch", "fail", f"it computes 2x2 ones wrong ({product})", "Install again: scripts/quickstart")
    return Check("torch", "pass", f"{torch.__version__}, {torch.get_num_threads()} threads")


def check_home(shared: Shared) -> Check:
    from nexus.core.errors import NexusError
    from nexus.storage.home import load_identity

    try:
        identity = load_identity(shared.open_home())
    except NexusError as error:
        return Check("data directory", "fail", error.cause, error.fix)
    return Check("data directory", "pass", f"{shared.path}, node {identity.peer_id}")


def check_disk(shared: Shared) -> Check:
    place = next(path for path in (shared.path, *shared.path.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < DISK_FREE_BYTES_MIN:
        return Check("disk", "warn", f"{show.size(free)} free at {place}", "Free some, or move the data directory with NEXUS_HOME")
    return Check("disk", "pass", f"{show.size(free)} free at {place}")


def check_memory(settings: Settings) -> Check:
    from nexus_config.settings import machine_memory_bytes

    there = machine_memory_bytes()
    offered = settings.serve.memory_max_bytes or there // 2
    if offered > there:
        return Check(
            "memory", "fail", f"{show.size(offered)} offered, the machine has {show.size(there)}", "Lower serve.memory_max_bytes"
        )
    if offered < MEMORY_BYTES_MIN:
        return Check("memory", "warn", f"{show.size(offered)} offered: room for small models only", "Raise serve.memory_max_bytes")
    return Check("memory", "pass", f"{show.size(offered)} offered of {show.size(there)}")


def check_daemon(shared: Shared, settings: Settings) -> tuple[NodeStatus | None, Check]:
    """Whether the daemon answers, and whether lock and socket agree about it."""
    from nexus.core.errors import NexusError
    from nexus.node.api import NodeStatus
    from nexus.storage.home import Home, lock_holder
    from nexus_cli.client import Daemon
    from nexus_config.settings import control_socket

    try:
        holder = lock_holder(Home(shared.path))
        socket_path = control_socket(settings, shared.path)
    except NexusError as error:
        return None, Check("daemon", "fail", error.cause, error.fix)
    if holder is None:
        return None, Check("daemon", "warn", "not running", "Start it with: nexus start --detach")
    daemon = Daemon(socket_path, answer_timeout_s=shared.timeout_s or ANSWER_TIMEOUT_S)
    try:
        status = daemon.get_as(NodeStatus, "/v0/status")
    except NexusError as error:
        return None, Check("daemon", "fail", f"pid {holder} runs, but: {error.cause}", f"If that stays so, end it: kill {holder}")
    finally:
        daemon.close()
    return status, Check("daemon", "pass", f"pid {holder}, version {status.version}, up {show.duration(status.uptime_s)}")


def check_port(address: str, running: bool) -> Check:
    """With a daemon the port must answer, without one it must be free."""
    name = f"port {address}"
    match = re.fullmatch(r"/(ip[46])/([^/]+)/tcp/([0-9]+)", address)
    if match is None:
        return Check(name, "warn", "only numeric addresses can be checked", "Listen on /ip4/... or /ip6/...")
    family = socket.AF_INET if match.group(1) == "ip4" else socket.AF_INET6
    host, port = match.group(2), int(match.group(3))
    if port == 0:
        return Check(name, "pass", "any free port is taken")
    return _check_listening(name, family, host, port) if running else _check_free(name, family, host, port)


def _check_listening(name: str, family: socket.AddressFamily, host: str, port: int) -> Check:
    target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    with closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        probe.settimeout(ANSWER_TIMEOUT_S)
        try:
            probe.connect((target, port))
        except OSError as error:
            return Check(name, "fail", f"the daemon runs, but nothing listens: {error}", "Restart it, and see its log")
    return Check(name, "pass", "listening; from outside a firewall or router may still block it")


def _check_free(name: str, family: socket.AddressFamily, host: str, port: int) -> Check:
    with closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return Check(name, "fail", "another program listens there", "End it, or set network.listen to another port")
            return Check(name, "fail", f"cannot listen there: {error.strerror}", "Set network.listen to an address of this machine")
    return Check(name, "pass", "free")


def check_ready(status: NodeStatus) -> Check:
    if not status.ready:
        return Check("ready", "fail", status.not_ready_because, "Its log says more")
    return Check("ready", "pass", f"{show.count(status.models, 'model')}, {status.sessions} requests and stages running")


def check_peers(status: NodeStatus, settings: Settings) -> Check:
    if status.peers:
        return Check("peers", "pass", f"{status.peers} connected")
    fix = "Add one with: nexus peers add MULTIADDR (the other node prints its own with: nexus id)"
    if settings.network.bootstrap:
        return Check("peers", "fail", "none, though there are bootstrap addresses", "Check that those nodes run, then: " + fix)
    return Check("peers", "warn", "none", fix)
