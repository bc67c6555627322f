"""nexusd: settings, logs, lock, node and control API put together, from start to an orderly end."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nexus.core.errors import LocalError, NexusError
from nexus_cli.options import check_home, daemon_options, flags_from

if TYPE_CHECKING:
    import socket

    import trio

    from nexus.node.api import NodeApi
    from nexus.node.cheating import Conduct
    from nexus.node.options import NodeOptions
    from nexus_config.settings import Settings

# After the drain, what is left gets this long; then the kernel ends the process, whatever a thread is stuck in.
CLOSE_TIMEOUT_S = 15


@click.command(context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": None})
@daemon_options
@click.option(
    "--home",
    type=click.Path(path_type=Path),
    callback=check_home,
    help="Data directory. [default: NEXUS_HOME, or the user's data directory]",
)
@click.version_option(package_name="nexus-swarm", prog_name="nexusd")
def nexusd(home: Path | None, init: bool, settings: tuple[str, ...], log_level: str | None, log_format: str | None) -> None:
    """Run a Nexus node in the foreground, until SIGTERM or SIGINT. A second signal stops it at once."""
    run_daemon(home, init, flags_from(settings, log_level, log_format))


def main() -> None:
    """Entry point of `nexusd`."""
    from nexus_cli.main import run_command

    run_command(nexusd)


def run_daemon(
    home: Path | None, init: bool, flags: Mapping[str, object], conduct: Callable[[NodeOptions], Conduct] | None = None
) -> None:
    """Run a node until it is told to stop. Raises NexusError for everything that keeps it from running.

    `conduct`: only `nexus_cli.byzantine` gives one.
    """
    from nexus.storage.home import create_home, lock_home, open_home
    from nexus_cli.logs import configure_logging
    from nexus_config.settings import control_socket, default_home, load, node_options

    # Torch's threads wait asleep, not spinning: a daemon shares its cores with others and with its own sessions, and threads that
    # spin for each other there made a small model fifty times slower. Read when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    path = (home or default_home(os.environ)).expanduser().absolute()
    settings, _ = load(flags, os.environ, path)
    configure_logging(settings.log.level, settings.log.format)
    if init and not (path / "identity.key").exists():
        create_home(path)
    data = open_home(path)
    socket_path = control_socket(settings, path)
    with lock_home(data):
        from nexus.gateway.unix_socket import bound_socket

        with bound_socket(socket_path) as listener:
            _run(settings, node_options(settings, path), listener, conduct)


def _run(
    settings: Settings, options: NodeOptions, listener: socket.socket, conduct: Callable[[NodeOptions], Conduct] | None
) -> None:
    import structlog
    import trio

    log = structlog.get_logger("nexusd")
    log.info("starting", pid=os.getpid(), home=str(options.home), name=options.name)
    try:
        trio.run(_serve, settings, options, listener, conduct(options) if conduct else None)
    except Exception as error:
        known = next(_nexus_errors(error), None)
        if known is None:
            # The one boundary of the process: the log gets the whole story, also where it is one JSON object per line.
            log.exception("crashed")
            raise LocalError("the daemon hit an error of its own", "Its log says more; please report it") from error
        log.error("failed", code=known.code, cause=known.cause, fix=known.fix)
        raise known from error
    log.info("stopped", pid=os.getpid())


def _nexus_errors(error: BaseException) -> Iterator[NexusError]:
    """The errors with a cause and a fix in what a nursery raised."""
    if isinstance(error, NexusError):
        yield error
    elif isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _nexus_errors(part)


async def _serve(settings: Settings, options: NodeOptions, listener: socket.socket, conduct: Conduct | None) -> None:
    import trio

    from nexus.node.node import open_node

    stop, is_open, opening = trio.Event(), trio.Event(), trio.CancelScope()
    # Received from here on, not only once a task gets its first turn: a signal must not find its default effect in between.
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as background:
            background.start_soon(_await_signal, signals, stop, is_open, opening)
            background.start_soon(_feed_watchdog)
            # The scope spans the node's whole life, since one cannot leave it in between; it is cancelled only while opening.
            with opening:
                async with open_node(options, conduct) if conduct else open_node(options) as node:
                    is_open.set()
                    await _serve_node(node, listener, stop, settings.control.drain_timeout_s)
            background.cancel_scope.cancel()
    signal.alarm(0)


async def _serve_node(node: NodeApi, listener: socket.socket, stop: trio.Event, drain_timeout_s: float) -> None:
    """Answer the control API until `stop`, then let sessions finish."""
    import structlog
    import trio

    from nexus.gateway.control import Control, control_app
    from nexus.gateway.unix_socket import serve_on
    from nexus_cli.systemd import notify

    log = structlog.get_logger("nexusd")
    control, http_shutdown = Control(node, stop.set), trio.Event()
    async with trio.open_nursery() as serving:
        serving.start_soon(serve_on, listener, control_app(control), http_shutdown)
        status = node.status()
        log.info("started", peer_id=status.peer_id, addresses=list(status.addresses))
        notify(f"READY=1\nSTATUS=node {status.peer_id}", os.environ)
        await stop.wait()
        notify("STOPPING=1", os.environ)
        control.stopping = True
        log.info("draining", sessions=node.status().sessions, timeout_s=drain_timeout_s)
        with trio.move_on_after(drain_timeout_s) as drain:
            await node.drain()
        if drain.cancelled_caught:
            log.warning("sessions cut off", sessions=node.status().sessions)
        signal.alarm(CLOSE_TIMEOUT_S)
        http_shutdown.set()


async def _await_signal(signals: AsyncIterator[int], stop: trio.Event, is_open: trio.Event, opening: trio.CancelScope) -> None:
    """The first SIGTERM or SIGINT asks for an orderly end; from then on both have their default effect, an immediate one."""
    import structlog

    number = await anext(signals)
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_DFL)
    structlog.get_logger("nexusd").info("signal", signal=signal.Signals(number).name)
    stop.set()
    if not is_open.is_set():
        opening.cancel()


async def _feed_watchdog() -> None:
    """As long as this loop gets its turn, the daemon is not hung."""
    import trio

    from nexus_cli.systemd import notify, watchdog_interval_s

    interval_s = watchdog_interval_s(os.environ, os.getpid())
    while interval_s is not None:
        notify("WATCHDOG=1", os.environ)
        await trio.sleep(interval_s)


if __name__ == "__main__":
    main()
