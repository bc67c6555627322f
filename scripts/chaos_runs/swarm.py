"""A testnet of real daemons, faults done to it, and who of it is whole."""

from __future__ import annotations

import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from nexus.core.errors import NexusError
from nexus.node.api import NodeStatus, PeerView
from nexus_cli.client import Daemon
from nexus_cli.processes import Process, send_signal, wait_for_end
from nexus_cli.testnet import Testnet, TestnetNode
from scripts.chaos_runs.faults import DRAIN, KILL, RESTART, STOP, Fault

POLL_S = 0.1
# A daemon that was asked to end politely has its drain_timeout_s (2 s in a testnet) and some for a busy machine.
END_TIMEOUT_S = 30.0
READY_TIMEOUT_S = 120.0


@dataclass(slots=True)
class Down:
    """A node that is away. `back_s`: when it is to be started or to go on, None: that has been done, and it is not yet whole."""

    kind: str
    since_s: float
    back_s: float | None
    process: Process | None = None


@dataclass
class Chaos:
    """Strikes nodes and brings them back. `asker`: the first node, which is never struck. `notes`: what happened, in order."""

    testnet: Testnet
    nodes: list[TestnetNode]
    seconds: Callable[[], float]
    down: dict[str, Down] = field(default_factory=dict)
    struck: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    longest_return_s: float = 0.0

    @property
    def asker(self) -> TestnetNode:
        return self.nodes[0]

    def run(self, faults: Iterator[Fault], until_s: float, together: int) -> None:
        """Faults until that time, at most `together` nodes away at once; then all of them come back."""
        coming = next(faults)
        earliest_s = self.seconds() + coming.gap_s
        while self.seconds() < until_s:
            self.bring_back()
            whole = [name for name in coming.order if name not in self.down]
            if self.seconds() >= earliest_s and len(self.down) < together and whole:
                self.strike(coming, whole[0])
                coming = next(faults)
                earliest_s = self.seconds() + coming.gap_s
            time.sleep(POLL_S)

    def strike(self, fault: Fault, name: str) -> None:
        self._say(f"{fault.kind} {name}" + (f" for {fault.away_s:.1f} s" if fault.away_s else ""))
        number = {KILL: signal.SIGKILL, STOP: signal.SIGSTOP, DRAIN: signal.SIGTERM, RESTART: signal.SIGTERM}[fault.kind]
        _, process = self.testnet.send_signal(name, number)
        self.struck[fault.kind] += 1
        self.down[name] = Down(fault.kind, self.seconds(), self.seconds() + fault.away_s, process)

    def bring_back(self) -> None:
        """Start or wake those whose time has come, and note those that are whole again."""
        for name, down in list(self.down.items()):
            if down.back_s is None:
                if self._is_whole(name):
                    self.longest_return_s = max(self.longest_return_s, self.seconds() - down.since_s)
                    del self.down[name]
            elif self.seconds() >= down.back_s:
                assert down.process is not None
                if down.kind == STOP:
                    send_signal(down.process, signal.SIGCONT)
                elif wait_for_end([down.process], POLL_S):
                    if self.seconds() - down.since_s > END_TIMEOUT_S:
                        self.problems.append(f"{name} did not end within {END_TIMEOUT_S:g} s of SIGTERM")
                        send_signal(down.process, signal.SIGKILL)
                    continue
                else:
                    self.testnet.start(name)
                down.back_s = None
                self._say(f"{name} comes back after {down.kind}")

    def restore(self) -> None:
        """Bring all back at once and wait until they are whole."""
        until_s = self.seconds() + READY_TIMEOUT_S
        for down in self.down.values():
            down.back_s = None if down.back_s is None else 0.0
        while self.down and self.seconds() < until_s:
            self.bring_back()
            time.sleep(POLL_S)
        self.problems += [f"{name} is not whole {READY_TIMEOUT_S:g} s after {down.kind}" for name, down in self.down.items()]

    def _is_whole(self, name: str) -> bool:
        """Whether it says that it is ready, and the asker knows it."""
        node = self.testnet.find(name)
        try:
            own = Daemon(node.socket, answer_timeout_s=2.0)
            asker = Daemon(self.asker.socket, answer_timeout_s=10.0)
            try:
                if not own.get_as(NodeStatus, "/v0/status").ready:
                    return False
                return any(peer.name == name for peer in asker.get_list(PeerView, "/v0/peers", "peers"))
            finally:
                own.close()
                asker.close()
        except NexusError:
            return False

    def _say(self, text: str) -> None:
        print(f"{self.seconds():7.1f} s  {text}", file=sys.stderr)
