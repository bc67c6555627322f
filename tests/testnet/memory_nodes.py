"""Nodes with a shared memory as real processes, started and ended one by one: partitions, kills and restarts are made of that."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nexus.core.errors import NexusError
from nexus.node.memory.api import AddedView
from nexus.storage.home import create_home, load_identity
from nexus_cli.client import Daemon
from nexus_cli.processes import spawn_daemon, why_it_ended
from nexus_cli.testnet import free_ports

T = TypeVar("T")

NEXUS = [sys.executable, "-c", "from nexus_cli.main import main; main()"]
READY_TIMEOUT_S = 60.0
COMMAND_TIMEOUT_S = 120.0
ANSWER_TIMEOUT_S = 60.0
POLL_S = 0.02


def until(found: Callable[[], T], timeout_s: float, what: str) -> T:
    """What `found` returns once that is true; asked again until the time is over."""
    end = time.monotonic() + timeout_s
    while not (value := found()):
        assert time.monotonic() < end, f"within {timeout_s:g} s {what}"
        time.sleep(POLL_S)
    return value


class Node:
    """A daemon and its home. `models`: taken over from a home where they are already, so that this one need not take them in."""

    def __init__(self, home: Path, models: Path | None = None, settings: Mapping[str, object] | None = None) -> None:
        self.home = home
        self.peer_id = load_identity(create_home(home)).peer_id
        (self.port,) = free_ports(1)
        self._settings = dict(settings or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._daemon = Daemon(home / "control.sock", ANSWER_TIMEOUT_S)
        if models is not None:
            shutil.copytree(models, home / "models", dirs_exist_ok=True)

    @property
    def address(self) -> str:
        return f"/ip4/127.0.0.1/tcp/{self.port}/p2p/{self.peer_id}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    # --- the process -------------------------------------------------------------------------------------------------------------

    def spawn(self, bootstrap: Sequence[Node] = ()) -> None:
        """Start the daemon and do not wait for it."""
        settings = {
            "node.name": self.home.name,
            "network.mdns": False,
            "network.listen": f"/ip4/127.0.0.1/tcp/{self.port}",
            "network.bootstrap": ",".join(node.address for node in bootstrap),
            "control.drain_timeout_s": 1,
            "engine.threads": 1,
            "memory.witness_every_s": 2,
        } | self._settings
        environ = {key: value for key, value in os.environ.items() if not key.startswith("NEXUS_")}
        options = [f"--set={key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]
        self._process = spawn_daemon(self.home, options, self.home / "nexusd.log", environ)

    def is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, why_it_ended(self.home / "nexusd.log")
        try:
            self.get("/readyz")
        except NexusError:
            return False
        return True

    def start(self, bootstrap: Sequence[Node] = ()) -> None:
        self.spawn(bootstrap)
        until(self.is_ready, READY_TIMEOUT_S, f"{self.home.name} is ready")

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until nothing of the process is left."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def ask_to_stop(self) -> None:
        """A stopped process is woken too, or it would hear nothing."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self.signal(signal.SIGCONT)

    def stop(self) -> None:
        """End it in order, or at once where it does not go."""
        self.ask_to_stop()
        if self._process is None:
            return
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()

    def isolate(self) -> None:
        """To be called between `stop` and `start`: it is found nowhere and finds nobody, until a user gives it an address."""
        (self.port,) = free_ports(1)
        (self.home / "peers.json").unlink(missing_ok=True)

    # --- what users do -----------------------------------------------------------------------------------------------------------

    def nexus(self, *arguments: str, code: int = 0, stdin: str = "") -> Any:
        """What the command printed, parsed; with the exit code that is expected of it, the error where that is not 0."""
        done = subprocess.run(
            [*NEXUS, "--home", str(self.home), *arguments, "--json"],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
        )
        assert done.returncode == code, done.stderr
        return json.loads(done.stdout) if code == 0 else json.loads(done.stderr.splitlines()[-1])["error"]

    # The control API is what the command line uses too, but a command takes half a second to start.

    def get(self, path: str) -> Any:
        return self._daemon.get(path)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._daemon.post(path, body)

    def blocks(self, collection: str) -> list[Any]:
        listed: list[Any] = self.get(f"/v0/memory/blocks?limit=10000&collections={collection}")["blocks"]
        return listed

    def add(self, text: str, collection: str, **more: Any) -> list[str]:
        """The ids of the new blocks, once they are acknowledged."""
        events = self._daemon.stream("/v0/memory/blocks", {"text": text, "collection": collection, **more})
        (added,) = [event for event in events if isinstance(event, AddedView)]
        return list(added.ids)

    def search(self, text: str, collection: str | None = None, **more: Any) -> Any:
        filters = {"collections": [collection]} if collection is not None else {}
        return self.post("/v0/memory/search", {"text": text, "filters": filters, **more})

    def connected(self) -> set[str]:
        return {peer["peer_id"] for peer in self.get("/v0/peers")["peers"]}


def end(nodes: Sequence[Node]) -> None:
    for node in nodes:
        node.ask_to_stop()
    for node in nodes:
        node.stop()


def meet(*nodes: Node) -> None:
    """All of them are connected to the first."""
    for node in nodes[1:]:
        until(
            lambda node=node: node.peer_id in nodes[0].connected(), 60, f"{nodes[0].home.name} and {node.home.name} are connected"
        )
