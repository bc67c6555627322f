"""Turns of a loaded stage: steps of different sessions that wait at the same moment are computed as one batch.

Continuous batching: Yu et al., "Orca", OSDI 2022. Prompts in parts beside the tokens of others: Agrawal et al., "Sarathi-Serve",
OSDI 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Protocol
from weakref import WeakKeyDictionary

import trio

from nexus.core.errors import LocalError, NexusError
from nexus.node.environment import SYSTEM

# What all prompts that wait read in one turn: the sessions that go on token by token wait so long and no longer.
PROMPT_TOKENS_PER_TURN = 128
STEPS_PER_TURN_MAX = 64
# Turns of different stages, or steps of a stage that takes them one by one, at a time.
THREADS = 2


class BatchStage(Protocol):
    """What is needed of `nexus.engine.stage.Stage`."""

    @property
    def chunked(self) -> bool: ...

    @property
    def causal(self) -> bool: ...

    def input_size(self, tokens: int) -> int: ...

    def step(self, session: bytes, payload: bytes) -> bytes: ...

    def step_many(self, steps: Sequence[tuple[bytes, bytes]], more: Sequence[bool] = ()) -> list[bytes | NexusError]: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """`compute_s`: the step's share of the engine's time, by tokens. `turn_s`: the whole time of the turn in which it ended."""

    output: bytes
    compute_s: float
    turn_s: float


@dataclass(eq=False, slots=True)
class _Step:
    """A session's step that waits. `read`: its tokens that were computed; `in_turn`: the engine is at it right now."""

    session: bytes
    payload: bytes
    tokens: int
    token_bytes: int
    expected_s: float
    read: int = 0
    outputs: list[bytes] = field(default_factory=list)
    compute_s: float = 0.0
    in_turn: bool = False
    outcome: Outcome | Exception | None = None
    wake: trio.Event = field(default_factory=trio.Event)

    @property
    def left(self) -> int:
        return self.tokens - self.read

    def part(self, tokens: int) -> bytes:
        """The payload of the next `tokens`; the last part takes whatever is left, so that the engine sees what is too much."""
        begin = self.read * self.token_bytes
        return self.payload[begin:] if tokens == self.left else self.payload[begin : begin + tokens * self.token_bytes]


@dataclass(eq=False, slots=True)
class _Line:
    """Steps that wait for one stage, whoever came first in front. `busy`: one of them leads a turn."""

    waiting: list[_Step] = field(default_factory=list)
    busy: bool = False


_Turn = list[tuple[_Step, int]]
_Answers = Sequence[bytes | Exception]


def next_turn(
    left: Sequence[int], prompt_tokens: int = PROMPT_TOKENS_PER_TURN, steps_max: int = STEPS_PER_TURN_MAX
) -> list[tuple[int, int]]:
    """Which of the waiting steps to compute together, from the tokens that each has left: (place in line, tokens) of each.

    Whoever waits for one token is served; those that read a prompt share `prompt_tokens`, the first in line before the next.
    """
    turn: list[tuple[int, int]] = []
    room = prompt_tokens
    for place, tokens in enumerate(left):
        if len(turn) == steps_max:
            break
        count = 1 if tokens == 1 else min(tokens, room)
        if tokens > 1:
            room -= count
        if count:
            turn.append((place, count))
    return turn


class Batcher:
    """Computes the steps of all stages of a node. Only language models of the exact profile are computed in batches and prompts in
    parts: there the bits are the same as one by one and at once."""

    def __init__(self, inline_step_s: float, perf_counter: Callable[[], float] = SYSTEM.perf_counter) -> None:
        """`inline_step_s`: what is expected to take less is computed on the trio thread, see docs/adr/0007."""
        self._inline_step_s = inline_step_s
        self._perf_counter = perf_counter
        self._threads = trio.CapacityLimiter(THREADS)
        # A turn has its place in `_threads` already when it goes to its thread.
        self._turn_threads = trio.CapacityLimiter(THREADS)
        self._lines: WeakKeyDictionary[BatchStage, _Line] = WeakKeyDictionary()

    async def compute(self, stage: BatchStage, session: bytes, payload: bytes, expected_s: float | None) -> Outcome:
        """One step of a session. `expected_s`: what a step of one token takes lately, None where nobody knows or it is a prompt.

        A step that is cancelled while it waits is not computed; one that the engine is at is waited for, so that the session may be
        closed after this returns or raises. Raises what the stage raises for this step.
        """
        expected_s = inf if expected_s is None else expected_s
        if not (stage.chunked and stage.causal):
            return await self._alone(stage, session, payload, expected_s)
        token_bytes = stage.input_size(1)
        step = _Step(session, payload, max(1, len(payload) // token_bytes), token_bytes, expected_s)
        line = self._lines.setdefault(stage, _Line())
        line.waiting.append(step)
        try:
            while step.outcome is None:
                if line.busy:
                    step.wake = trio.Event()
                    await step.wake.wait()
                else:
                    await self._lead(stage, line)
        finally:
            with trio.CancelScope(shield=True):
                while step.in_turn:
                    step.wake = trio.Event()
                    await step.wake.wait()
            if step in line.waiting:
                line.waiting.remove(step)
            if line.waiting and not line.busy:
                line.waiting[0].wake.set()  # to lead the next turn
        if isinstance(step.outcome, Exception):
            raise step.outcome
        return step.outcome

    async def _alone(self, stage: BatchStage, session: bytes, payload: bytes, expected_s: float) -> Outcome:
        def step() -> Outcome:
            began_s = self._perf_counter()
            output = stage.step(session, payload)
            taken_s = self._perf_counter() - began_s
            return Outcome(output, taken_s, taken_s)

        if self._is_brief(expected_s):
            await trio.lowlevel.checkpoint()
            return step()
        return await trio.to_thread.run_sync(step, limiter=self._threads)

    def _is_brief(self, expected_s: float) -> bool:
        return expected_s < self._inline_step_s and not self._threads.borrowed_tokens

    async def _lead(self, stage: BatchStage, line: _Line) -> None:
        """One turn of a stage, for all that wait when it begins."""
        line.busy = True
        try:
            await trio.lowlevel.checkpoint()  # whoever is about to join may
            if self._is_brief(sum(step.expected_s for step in line.waiting)):
                turn = _take(line)
                try:
                    _settle(line, turn, *self._run(stage, turn))
                finally:
                    _release(turn)
                return
            async with self._threads:
                turn = _take(line)
                try:
                    _settle(line, turn, *await trio.to_thread.run_sync(self._run, stage, turn, limiter=self._turn_threads))
                finally:
                    _release(turn)
        finally:
            line.busy = False

    def _run(self, stage: BatchStage, turn: _Turn) -> tuple[_Answers, float]:
        """The engine's part, on a thread or not: the answers, and the seconds that they took."""
        began_s = self._perf_counter()
        answers: _Answers
        try:
            answers = stage.step_many(
                [(step.session, step.part(tokens)) for step, tokens in turn], [tokens < step.left for step, tokens in turn]
            )
            if len(answers) != len(turn):
                raise LocalError(f"the engine gave {len(answers)} answers to {len(turn)} steps", "Please report it")
        except Exception as error:  # noqa: BLE001  every session of the turn must hear of it; each ends it at its own boundary
            answers = [error] * len(turn)
        return answers, self._perf_counter() - began_s


def _take(line: _Line) -> _Turn:
    turn = [(line.waiting[place], tokens) for place, tokens in next_turn([step.left for step in line.waiting])]
    for step, _ in turn:
        step.in_turn = True
    return turn


def _settle(line: _Line, turn: _Turn, answers: _Answers, turn_s: float) -> None:
    """Hand out the answers. Who has tokens left goes to the end of the line, so that every prompt gets its turn."""
    total = sum(tokens for _, tokens in turn)
    for (step, tokens), answer in zip(turn, answers, strict=True):
        line.waiting.remove(step)
        step.compute_s += turn_s * tokens / total
        if isinstance(answer, Exception):
            step.outcome = answer
            continue
        step.read += tokens
        step.outputs.append(answer)
        if step.left:
            line.waiting.append(step)
        else:
            step.outcome = Outcome(b"".join(step.outputs), step.compute_s, turn_s)


def _release(turn: _Turn) -> None:
    for step, _ in turn:
        step.in_turn = False
        step.wake.set()
