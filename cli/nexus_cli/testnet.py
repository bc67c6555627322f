"""nexus testnet: real nexusd processes on loopback, each with its own home and port, under one directory."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nexus_cli import show
from nexus_cli.options import NexusGroup, Shared, pass_shared

if TYPE_CHECKING:
    from nexus.node.api import NodeStatus
    from nexus_cli.processes import Process

UP_TIMEOUT_S = 180.0
TERM_TIMEOUT_S = 20.0
KILL_TIMEOUT_S = 10.0
NODES_MAX = 32
STATE_FILE = "testnet.json"
CHEATING_DAEMON = "nexus_cli.byzantine"
# Below the range from which systems take ports for outgoing connections, so that none of those can take one of ours.
PORTS = range(20000, 30000)


@dataclass(frozen=True, slots=True)
class TestnetNode:
    """One node of a testnet, as its state file keeps it. `started`: see `nexus_cli.processes.Process`. `attack`: what it does
    wrong (`nexus attacks`), or "" for an honest one."""

    name: str
    home: str
    peer_id: str
    port: int
    pid: int
    started: str
    attack: str = ""

    @property
    def address(self) -> str:
        return f"/ip4/127.0.0.1/tcp/{self.port}/p2p/{self.peer_id}"

    @property
    def socket(self) -> Path:
        return Path(self.home) / "control.sock"

    @property
    def process(self) -> Process:
        """The one that was started here, or whoever holds the home now: its user may have restarted the node."""
        from nexus.core.errors import LocalError
        from nexus.storage.home import Home, lock_holder
        from nexus_cli.processes import Process, find_process, is_running

        noted = Process(self.pid, self.started)
        if is_running(noted):
            return noted
        try:
            holder = lock_holder(Home(Path(self.home)))
        except LocalError:
            return noted
        return (find_process(holder) if holder else None) or noted


@dataclass(frozen=True, slots=True)
class NodeState:
    """What a node of a testnet is doing now. `status` None: it does not answer."""

    node: TestnetNode
    running: bool
    status: NodeStatus | None


class Testnet:
    """The nodes under one directory. Everything it knows is in the state file, so any process can look, kill or clean up."""

    def __init__(self, directory: Path, threads: int = 1) -> None:
        """`threads`: of each node's engine; one, so that the nodes do not fight over the cores of one machine."""
        self.directory = directory
        self._threads = threads
        self._state = directory / STATE_FILE

    def exists(self) -> bool:
        return self._state.exists()

    def nodes(self) -> list[TestnetNode]:
        """Raises NotFoundError where there is no testnet, LocalError for a damaged state file."""
        from nexus.core.errors import LocalError, NotFoundError

        try:
            document = json.loads(self._state.read_text("utf-8"))
            return [TestnetNode(**entry) for entry in document["nodes"]]
        except FileNotFoundError as error:
            raise NotFoundError(f"there is no testnet in {self.directory}", "Start one with: nexus testnet up") from error
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise LocalError(
                f"{self._state} is damaged: {error}", "End the nexusd processes by hand, then remove the directory"
            ) from error

    def up(self, count: int, timeout_s: float, report: Callable[[str], None], attacks: Sequence[str] = ()) -> list[TestnetNode]:
        """Start `count` nodes and return when every one is ready and connected to every other. Cleans up if that fails.

        `attacks`: of the last nodes, which cheat; fewer than `count`, so that the first node is honest.
        """
        from nexus.core.errors import LocalError

        if self.exists():
            raise LocalError(f"there is a testnet in {self.directory} already", "End it with: nexus testnet down")
        if self.directory.exists() and any(self.directory.iterdir()):
            raise LocalError(f"{self.directory} holds something else", "Give another directory with --dir")
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            nodes = self._prepare(count, attacks)
            self._write(nodes)
            for index, node in enumerate(nodes):
                nodes[index] = self._spawn(node)
                self._write(nodes)
            report(f"{count} nodes started, waiting until they are connected and ready")
            self._wait_ready(nodes, time.monotonic() + timeout_s, timeout_s)
        except BaseException:
            # Also on Ctrl-C: half a testnet is of no use to anybody. The logs go with it, so errors quote their end.
            if self.exists():
                self.down()
            raise
        return nodes

    def states(self) -> list[NodeState]:
        from nexus_cli.processes import is_running

        states = []
        for node in self.nodes():
            process = node.process
            now = dataclasses.replace(node, pid=process.pid, started=process.started)
            states.append(NodeState(now, is_running(process), _status(node.socket)))
        return states

    def kill(self, name: str) -> tuple[TestnetNode, int]:
        """SIGKILL one node, as a power failure would: the node, and the pid that it had. `name`: "node-2" or "2"."""
        from nexus_cli.processes import wait_for_end

        node, process = self.send_signal(name, signal.SIGKILL)
        wait_for_end([process], KILL_TIMEOUT_S)
        return node, process.pid

    def send_signal(self, name: str, number: signal.Signals) -> tuple[TestnetNode, Process]:
        """Signal the process of a node. Raises NotFoundError for another name, LocalError where it does not run."""
        from nexus.core.errors import LocalError
        from nexus_cli.processes import send_signal

        node = self.find(name)
        process = node.process
        if not send_signal(process, number):
            raise LocalError(f"{node.name} does not run", "See: nexus testnet status")
        return node, process

    def find(self, name: str) -> TestnetNode:
        from nexus.core.errors import NotFoundError

        nodes = self.nodes()
        node = next((node for node in nodes if name in (node.name, node.name.removeprefix("node-"), node.peer_id)), None)
        if node is None:
            raise NotFoundError(f"there is no node {name!r}", f"There are: {', '.join(node.name for node in nodes)}")
        return node

    def start(self, name: str) -> TestnetNode:
        """Start a node again that has ended; it is on its way when this returns. Raises LocalError where it runs."""
        from nexus.core.errors import LocalError
        from nexus_cli.processes import is_running

        node = self.find(name)
        if is_running(node.process):
            raise LocalError(f"{node.name} runs already", "See: nexus testnet status")
        started = self._spawn(node)
        self._write([started if other.name == node.name else other for other in self.nodes()])
        return started

    def down(self, keep: bool = False) -> int:
        """End every node, politely first, and remove the directory unless `keep`. Returns how many were running."""
        from nexus_cli.processes import undisturbed

        processes = [process for process in (node.process for node in self.nodes()) if process.pid]
        with undisturbed():
            ended = _end(processes)
            if keep:
                self._state.unlink()
            else:
                shutil.rmtree(self.directory)
        return ended

    def _prepare(self, count: int, attacks: Sequence[str]) -> list[TestnetNode]:
        """Homes, keys, ports and settings. Every node knows the first one, as in a real network."""
        from nexus.storage.home import create_home, load_identity

        nodes = []
        conducts = [""] * (count - len(attacks)) + list(attacks)
        for index, (port, attack) in enumerate(zip(free_ports(count), conducts, strict=True), start=1):
            home = create_home(self.directory / f"n{index}")
            peer_id = load_identity(home).peer_id
            nodes.append(TestnetNode(f"node-{index}", str(home.path), peer_id, port, 0, "", attack))
        for node in nodes:
            bootstrap = [nodes[0].address] if node is not nodes[0] else []
            (Path(node.home) / "config.toml").write_text(_config_text(node, bootstrap, self._threads), "utf-8")
        return nodes

    def _spawn(self, node: TestnetNode) -> TestnetNode:
        from nexus.core.errors import LocalError
        from nexus_cli.processes import DAEMON, find_process, spawn_daemon, why_it_ended

        home = Path(node.home)
        # Settings of the user's own node must not leak into the testnet, nor a pool of threads per process beside the engine's one.
        environ = {key: value for key, value in os.environ.items() if not key.startswith("NEXUS_")}
        arguments, module = (["--attack", node.attack], CHEATING_DAEMON) if node.attack else ([], DAEMON)
        child = spawn_daemon(home, arguments, home / "nexusd.log", environ, module)
        process = find_process(child.pid)
        if process is None:
            child.wait()
            raise LocalError(
                f"{node.name} ended at once. It says:\n{why_it_ended(home / 'nexusd.log')}", "Correct what its log says"
            )
        return dataclasses.replace(node, pid=process.pid, started=process.started)

    def _wait_ready(self, nodes: Sequence[TestnetNode], until: float, timeout_s: float) -> None:
        from nexus.core.errors import LocalError, TimedOutError
        from nexus_cli.processes import POLL_S, is_running, why_it_ended

        while True:
            for node in nodes:
                if not is_running(node.process):
                    cause = f"{node.name} ended while starting. It says:\n{why_it_ended(Path(node.home) / 'nexusd.log')}"
                    raise LocalError(cause, "Correct what its log says")
            states = [(node, _status(node.socket)) for node in nodes]
            connected = all(status is not None and status.ready and status.peers >= len(nodes) - 1 for _, status in states)
            if connected and all(_named_peers(node.socket) >= len(nodes) - 1 for node in nodes):
                return
            if all(status is not None for _, status in states):
                # Discovery would get there too; a testnet is to be complete now.
                _connect_missing([(node, status) for node, status in states if status is not None])
            if time.monotonic() > until:
                late = "; ".join(f"{node.name}: {_not_ready_because(status, len(nodes) - 1)}" for node, status in states)
                raise TimedOutError(f"the testnet is not ready after {timeout_s:g} s ({late})", "Give it longer with --timeout")
            time.sleep(POLL_S)

    def _write(self, nodes: Sequence[TestnetNode]) -> None:
        temporary = self._state.with_suffix(".part")
        temporary.write_text(json.dumps({"schema": 1, "nodes": [dataclasses.asdict(node) for node in nodes]}, indent=1), "utf-8")
        temporary.replace(self._state)


def _end(processes: Sequence[Process]) -> int:
    """SIGTERM, then SIGKILL for those that do not go. Returns how many were running. Raises LocalError if any still is."""
    from nexus.core.errors import LocalError
    from nexus_cli.processes import send_signal, wait_for_end

    asked = [process for process in processes if send_signal(process, signal.SIGTERM)]
    stubborn = wait_for_end(asked, TERM_TIMEOUT_S)
    for process in stubborn:
        send_signal(process, signal.SIGKILL)
    left = wait_for_end(stubborn, KILL_TIMEOUT_S)
    if left:
        shown = ", ".join(str(process.pid) for process in left)
        raise LocalError(f"the processes {shown} do not end", "They may be waiting for a disk; try again")
    return len(asked)


def _config_text(node: TestnetNode, bootstrap: Sequence[str], threads: int) -> str:
    return (
        f'[node]\nname = "{node.name}"\n'
        f'[network]\nlisten = ["/ip4/127.0.0.1/tcp/{node.port}"]\nbootstrap = {json.dumps(list(bootstrap))}\nmdns = false\n'
        f"[control]\ndrain_timeout_s = 2.0\n[engine]\nthreads = {threads}\n"
    )


def free_ports(count: int) -> list[int]:
    """TCP ports of loopback that are free now, held until all are found."""
    from nexus.core.errors import LocalError

    ports: list[int] = []
    with ExitStack() as held:
        # Not for secrecy: testnets that start at the same time should not look in the same order.
        for port in random.sample(PORTS, len(PORTS)):
            probe = held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            ports.append(port)
            if len(ports) == count:
                return ports
    raise LocalError(f"there are no {count} free ports from {PORTS.start} to {PORTS.stop}", "End other programs that listen there")


def _status(socket_path: Path) -> NodeStatus | None:
    from nexus.core.errors import NexusError
    from nexus.node.api import NodeStatus
    from nexus_cli.client import Daemon

    if not socket_path.exists():
        return None
    daemon = Daemon(socket_path, answer_timeout_s=5.0)
    try:
        return daemon.get_as(NodeStatus, "/v0/status")
    except NexusError:
        return None
    finally:
        daemon.close()


def _named_peers(socket: Path) -> int:
    """Of how many peers a node has the record, by which it plans: a connection comes a moment earlier."""
    from nexus.core.errors import NexusError
    from nexus.node.api import PeerView
    from nexus_cli.client import Daemon

    daemon = Daemon(socket, answer_timeout_s=15.0)
    try:
        return sum(bool(peer.name) for peer in daemon.get_list(PeerView, "/v0/peers", "peers"))
    except NexusError:
        return 0
    finally:
        daemon.close()


def _connect_missing(states: Sequence[tuple[TestnetNode, NodeStatus]]) -> None:
    """Ask nodes that miss peers to dial all the others."""
    from nexus.core.errors import NexusError
    from nexus_cli.client import Daemon

    for node, status in states:
        if status.peers >= len(states) - 1:
            continue
        daemon = Daemon(node.socket, answer_timeout_s=15.0)
        try:
            for other, _ in states:
                if other is not node:
                    daemon.post("/v0/peers", {"address": other.address})
        except NexusError:
            pass  # it is asked again until the deadline, which says what is missing
        finally:
            daemon.close()


def _not_ready_because(status: NodeStatus | None, peers: int) -> str:
    if status is None:
        return "does not answer"
    if not status.ready:
        return status.not_ready_because
    return "ready" if status.peers >= peers else f"{status.peers} of {peers} peers"


def default_directory(shared: Shared) -> Path:
    return shared.path / "testnet"


testnet = NexusGroup(name="testnet", help="Several real nodes on this machine, for trying things out.")
_directory = click.option(
    "--dir", "directory", type=click.Path(path_type=Path), help="Where it lives. [default: testnet/ in the data directory]"
)


@testnet.command("up")
@click.option("--nodes", type=click.IntRange(1, NODES_MAX), default=4, show_default=True, help="How many.")
@click.option("--byzantine", type=click.IntRange(0, NODES_MAX), help="How many of them cheat. [default: one per --attack]")
@click.option(
    "--attack",
    "attacks",
    multiple=True,
    metavar="NAME",
    help="What they do wrong, one name each in turn; nexus attacks lists the names. [default: mixed, different ones at random]",
)
@_directory
@pass_shared
def testnet_up(shared: Shared, nodes: int, byzantine: int | None, attacks: tuple[str, ...], directory: Path | None) -> None:
    """Start nodes, and return when all are connected and ready."""
    from nexus_cli.attacks import attacks_of

    cheating = attacks_of(nodes, byzantine, attacks)
    net = Testnet((directory or default_directory(shared)).absolute())
    net.up(nodes, shared.timeout_s or UP_TIMEOUT_S, lambda message: click.echo(message, err=True), cheating)
    _print_states(shared, net.states(), net.directory)


@testnet.command("status")
@_directory
@pass_shared
def testnet_status(shared: Shared, directory: Path | None) -> None:
    """Show the nodes and what they are doing."""
    net = Testnet((directory or default_directory(shared)).absolute())
    _print_states(shared, net.states(), net.directory)


@testnet.command("kill")
@click.argument("node")
@_directory
@pass_shared
def testnet_kill(shared: Shared, node: str, directory: Path | None) -> None:
    """SIGKILL NODE ("node-2" or "2"), as a power failure would."""
    killed, pid = Testnet((directory or default_directory(shared)).absolute()).kill(node)
    if shared.json:
        show.print_json({"killed": killed.name, "pid": pid})
        return
    click.echo(f"{killed.name} (pid {pid}) killed", err=True)


@testnet.command("down")
@click.option("--keep", is_flag=True, help="Keep the homes and logs.")
@_directory
@pass_shared
def testnet_down(shared: Shared, keep: bool, directory: Path | None) -> None:
    """End all nodes and remove their directory. It holds nothing but the testnet."""
    net = Testnet((directory or default_directory(shared)).absolute())
    ended = net.down(keep)
    if shared.json:
        show.print_json({"ended": ended, "directory": str(net.directory), "kept": keep})
        return
    click.echo(
        f"{show.count(ended, 'node')} ended" + (f", their homes are in {net.directory}" if keep else f", {net.directory} removed"),
        err=True,
    )


def _print_states(shared: Shared, states: Sequence[NodeState], directory: Path) -> None:
    from nexus.gateway.wire import to_json

    if shared.json:
        entries = [
            dataclasses.asdict(state.node)
            | {"address": state.node.address, "running": state.running, "status": to_json(state.status)}
            for state in states
        ]
        show.print_json({"directory": str(directory), "nodes": entries})
        return
    cheaters = [state.node for state in states if state.node.attack]
    rows = [
        (
            state.node.name,
            show.short_id(state.node.peer_id),
            str(state.node.port),
            str(state.node.pid),
            *([state.node.attack or "honest"] if cheaters else []),
            _state_text(state),
            str(state.status.peers) if state.status else "-",
            str(state.status.sessions_served) if state.status else "-",
        )
        for state in states
    ]
    columns = ("node", "peer", "port", "pid", *(["conduct"] if cheaters else []), "state", "peers", "stages")
    show.console(shared).print(show.table(columns, rows, right=("port", "pid", "peers", "stages"), wrap=("state",)))
    if cheaters:
        from nexus_cli.attacks import deed

        for node in cheaters:
            click.echo(f"{node.name} cheats: it {deed(node.attack)}", err=True)
    if states:
        home = states[0].node.home
        if cheaters:
            stages = f" --stages {len(states)} --verify light"
            click.echo(f"use one with: nexus --home {home} run nano 'Why is the sky blue?'{stages}", err=True)
            click.echo(f"see who was convicted: nexus --home {home} slashed", err=True)
        else:
            click.echo(f"use one with: nexus --home {home} run nano 'a prompt'", err=True)


def _state_text(state: NodeState) -> str:
    if not state.running:
        return "not running"
    if state.status is None:
        return "does not answer"
    return "ready" if state.status.ready else f"not ready: {state.status.not_ready_because}"
