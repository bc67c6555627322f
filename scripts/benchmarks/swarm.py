"""Both sides of a decode comparison: a testnet of real daemons on loopback, and plain transformers in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nexus.node.api import Finished, Token
from nexus_cli.client import Daemon
from nexus_cli.testnet import Testnet

UP_TIMEOUT_S = 180.0


@dataclass(frozen=True, slots=True)
class Measured:
    """`tokens_per_s`: without the first token, which waits for the prompt. `compute_share`: of the time, in the stages' engines."""

    tokens: tuple[int, ...]
    tokens_per_s: float
    compute_share: float


@contextmanager
def swarm(nodes: int, threads: int) -> Iterator[Daemon]:
    """A fresh testnet; the daemon of its first node."""
    with tempfile.TemporaryDirectory(prefix="nexus-bench-") as directory:
        testnet = Testnet(Path(directory) / "t", threads)
        try:
            members = testnet.up(nodes, UP_TIMEOUT_S, lambda message: print(message, file=sys.stderr))
            daemon = Daemon(members[0].socket)
            try:
                yield daemon
            finally:
                daemon.close()
        finally:
            if testnet.exists():
                testnet.down()


def add_model(daemon: Daemon, path: Path, name: str, profile: str = "exact") -> None:
    for _ in daemon.stream("/v0/models", {"source": str(path), "name": name, "profile": profile}):
        pass


def generate(daemon: Daemon, model: str, prompt: str, tokens: int, stages: int, receipts: bool = True) -> Measured:
    """One greedy answer, timed where the user is: at the other end of the control socket."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "stages": stages, "receipts": receipts}
    times: list[float] = []
    ids: list[int] = []
    finished: Finished | None = None
    for event in daemon.stream("/v0/run", body):
        if isinstance(event, Token):
            times.append(time.perf_counter())
            ids.append(event.token)
        elif isinstance(event, Finished):
            finished = event
    assert finished is not None
    if receipts and not 0 < finished.receipts == finished.receipts_verified:
        raise RuntimeError("a benchmark run did not verify")
    span = times[-1] - times[0]
    busy = sum(stage.compute_s for stage in finished.stages)
    return Measured(tuple(ids), (len(times) - 1) / span, busy / finished.total_s)


@contextmanager
def plain(directory: Path, threads: int, prompt: Sequence[int]) -> Iterator[Plain]:
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.benchmarks.plain", str(directory), str(threads), ",".join(map(str, prompt))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    try:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise RuntimeError("plain transformers did not start")
        yield Plain(process)
    finally:
        process.kill()
        process.wait()


class Plain:
    """A running `scripts.benchmarks.plain`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def generate(self, tokens: int) -> Measured:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{tokens}\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return Measured(tuple(answer["tokens"]), answer["tokens_per_s"], 1.0)
