"""What is asked while nodes fail: fixed requests with fixed seeds, over and over, through one daemon's control socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nexus.core.errors import NexusError
from nexus.gateway.wire import Json
from nexus.node.api import Finished, Planned, Token
from nexus_cli.client import Daemon

# An answer that gives no sign for so long is lost: the user is gone.
SILENCE_MAX_S = 90.0


@dataclass(frozen=True, slots=True)
class Request:
    """`temperature` 0: greedy. In the exact profile sampling with a seed gives the same tokens wherever it runs, too."""

    prompt: str
    max_tokens: int
    temperature: float
    seed: int

    def body(self, model: str, stages: int) -> dict[str, Json]:
        return {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "stages": stages,
        }


@dataclass(slots=True)
class Answer:
    """What came of a request. `error`: why it was lost, "" where it was not. `first_s`: from asking to the first token. `pause_s`:
    the longest time between one token and the next. `plans`: how many chains it ran over, one where nothing failed."""

    request: Request
    began_s: float
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: str = ""
    error: str = ""
    first_s: float = 0.0
    pause_s: float = 0.0
    plans: int = 0
    verified: bool = False


def ask(socket: Path, model: str, request: Request, stages: int, began_s: float) -> Answer:
    """One request to its end. Errors are in the answer: the run goes on, and tells of all of them. `began_s`: for the report."""
    answer = Answer(request, began_s)
    daemon = Daemon(socket, answer_timeout_s=SILENCE_MAX_S)
    last_s = asked_s = time.monotonic()
    try:
        for event in daemon.stream("/v0/run", request.body(model, stages)):
            now_s = time.monotonic()
            match event:
                case Planned():
                    answer.plans += 1
                case Token():
                    if answer.tokens:
                        answer.pause_s = max(answer.pause_s, now_s - last_s)
                    else:
                        answer.first_s = now_s - asked_s
                    last_s = now_s
                    answer.tokens.append(event.token)
                    answer.text += event.text
                case Finished():
                    answer.reason = event.reason
                    answer.verified = 0 < event.receipts == event.receipts_verified
        if not answer.reason:
            answer.error = "the answer ended without saying how it went"
    except NexusError as error:
        answer.error = f"{type(error).__name__}: {error.cause}"
    finally:
        daemon.close()
    return answer


def requests_of(stream: int, requests: Sequence[Request]) -> Iterator[Request]:
    """All requests in turn, without end; each stream begins two further on, so that different ones run side by side."""
    at = stream * 2
    while True:
        yield requests[at % len(requests)]
        at += 1


class Stream:
    """Asks one request after the other, in a thread of its own, until `over` is set; the last one is seen to its end."""

    def __init__(self, ask_one: Callable[[Request], Answer], requests: Iterator[Request], over: threading.Event) -> None:
        self.answers: list[Answer] = []
        self._ask = ask_one
        self._requests = requests
        self._over = over
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        for request in self._requests:
            if self._over.is_set():
                return
            self.answers.append(self._ask(request))
            if self.answers[-1].error:
                # What failed at once would fail again and again: the report should not be a thousand times the same line.
                self._over.wait(1.0)
