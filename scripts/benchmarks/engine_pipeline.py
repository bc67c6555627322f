"""One model in two processes that pass activations over TCP on loopback: what splitting costs without the rest of Nexus.

Usage: python -m scripts.benchmarks.engine_pipeline head STORE CUT KERNEL PORT
       python -m scripts.benchmarks.engine_pipeline tail STORE CUT KERNEL
`tail` names the port that it listens on; `head` is asked for tokens as in `engine_sides.serve`. Every payload is hashed with BLAKE3
by who sends it and by who gets it, in both directions.
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from blake3 import blake3

from scripts.benchmarks.engine_sides import Answer, claim_stdout, serve
from scripts.benchmarks.engine_store import load

# session, bytes of the payload (0: forget the session), digest of the payload
_FRAME = struct.Struct("<II32s")


class Link:
    """Frames over one TCP connection. Raises RuntimeError for a frame that is not what was sent, EOFError at the end."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._file: BinaryIO = connection.makefile("rb")

    def send(self, session: int, payload: bytes) -> None:
        self._connection.sendall(_FRAME.pack(session, len(payload), blake3(payload).digest()) + payload)

    def receive(self) -> tuple[int, bytes]:
        session, size, digest = _FRAME.unpack(self._read(_FRAME.size))
        payload = self._read(size)
        if blake3(payload).digest() != digest:
            raise RuntimeError("a payload changed on its way")
        return session, payload

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) != size:
            raise EOFError
        return data


def tail(store: Path, cut: int, kernel: str, answer: Callable[[Answer], None]) -> None:
    stage = load(store, start=cut, kernel=kernel or None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        answer({"port": server.getsockname()[1]})
        link = Link(server.accept()[0])
    opened: set[int] = set()
    while True:
        try:
            session, payload = link.receive()
        except EOFError:
            return
        name = session.to_bytes(16, "little")
        if not payload:
            stage.close(name)
            opened.discard(session)
            continue
        if session not in opened:
            stage.open(name)
            opened.add(session)
        link.send(session, stage.step(name, payload))


class Head:
    def __init__(self, store: Path, cut: int, kernel: str, port: int) -> None:
        self._stage = load(store, end=cut, kernel=kernel or None)
        self._link = Link(socket.create_connection(("127.0.0.1", port)))
        self._sessions = 0

    def decode(self, prompts: Sequence[Sequence[int]], tokens: int) -> Answer:
        """`tokens` tokens of every prompt, all sessions on their way at the same time. The rate is that of all together, after each
        one's first token."""
        answers: dict[int, list[int]] = {}
        for ids in prompts:
            self._sessions += 1
            self._stage.open(self._sessions.to_bytes(16, "little"))
            answers[self._sessions] = []
            self._forward(self._sessions, np.array(ids, "<u4").tobytes())
        firsts = [self._link.receive() for _ in prompts]
        begin = time.perf_counter()
        for session, token in firsts:
            answers[session].append(int.from_bytes(token, "little"))
            self._forward(session, token)
        waiting = len(prompts)
        while waiting:
            session, token = self._link.receive()
            answers[session].append(int.from_bytes(token, "little"))
            if len(answers[session]) < tokens:
                self._forward(session, token)
            else:
                waiting -= 1
        span = time.perf_counter() - begin
        for session in answers:
            self._stage.close(session.to_bytes(16, "little"))
            self._link.send(session, b"")
        return {"tokens": list(answers.values()), "tokens_per_s": len(prompts) * (tokens - 1) / span}

    def _forward(self, session: int, payload: bytes) -> None:
        self._link.send(session, self._stage.step(session.to_bytes(16, "little"), payload))


def main() -> None:
    role, store, cut, kernel, *rest = sys.argv[1:]
    answer = claim_stdout()
    if role == "tail":
        tail(Path(store), int(cut), kernel, answer)
    else:
        head = Head(Path(store), int(cut), kernel, int(rest[0]))
        serve(lambda operation, arguments: head.decode(**arguments), answer)


if __name__ == "__main__":
    main()
