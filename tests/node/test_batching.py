"""Turns of a stage, with an engine that a test holds still while others get in line."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from nexus.core.errors import LocalError, MalformedError, NexusError
from nexus.node.batching import PROMPT_TOKENS_PER_TURN, STEPS_PER_TURN_MAX, Batcher, Outcome, next_turn

WAIT_S = 20.0  # only passes where something is broken


def token(value: int) -> bytes:
    return value.to_bytes(4, "little")


def prompt(tokens: int, value: int = 7) -> bytes:
    return token(value) * tokens


@dataclass(eq=False)
class FakeStage:
    """A middle stage answers what came in, a last one the token count of the whole step. `hold()` stops it at its next turn."""

    last: bool = False
    chunked: bool = True
    causal: bool = True
    turns: list[list[tuple[bytes, int, bool]]] = field(default_factory=list)
    inline: list[bool] = field(default_factory=list)
    fails: dict[bytes, Exception] = field(default_factory=dict)
    breaks: Exception | None = None
    _read: dict[bytes, int] = field(default_factory=dict)
    _gates: list[tuple[threading.Event, threading.Event]] = field(default_factory=list)
    _trio_thread: int = field(default_factory=threading.get_ident)

    def hold(self) -> tuple[Callable[[], bool], Callable[[], None]]:
        """(wait until the engine has begun, let it go on)"""
        begun, go_on = threading.Event(), threading.Event()
        self._gates.append((begun, go_on))
        return lambda: begun.wait(WAIT_S), go_on.set

    def input_size(self, tokens: int) -> int:
        return 4 * tokens

    def step(self, session: bytes, payload: bytes) -> bytes:
        (answer,) = self.step_many([(session, payload)])
        if isinstance(answer, NexusError):
            raise answer
        return answer

    def step_many(self, steps: Sequence[tuple[bytes, bytes]], more: Sequence[bool] = ()) -> list[bytes | NexusError]:
        self.inline.append(threading.get_ident() == self._trio_thread)
        if self._gates:
            begun, go_on = self._gates.pop(0)
            begun.set()
            assert go_on.wait(WAIT_S)
        more = more or [False] * len(steps)
        self.turns.append([(session, len(payload) // 4, rest) for (session, payload), rest in zip(steps, more, strict=True)])
        if self.breaks:
            raise self.breaks
        return [self._answer(session, payload, rest) for (session, payload), rest in zip(steps, more, strict=True)]

    def _answer(self, session: bytes, payload: bytes, rest: bool) -> bytes | NexusError:
        if session in self.fails:
            return self.fails[session]  # type: ignore[return-value]
        if not self.last:
            return payload
        read = self._read.pop(session, 0) + len(payload) // 4
        if rest:
            self._read[session] = read
            return b""
        return token(read)


@dataclass
class Sessions:
    """Steps in the background and what became of them."""

    nursery: trio.Nursery
    batcher: Batcher
    stage: FakeStage
    outcomes: dict[bytes, Outcome | Exception | str] = field(default_factory=dict)
    scopes: dict[bytes, trio.CancelScope] = field(default_factory=dict)

    async def start(self, session: bytes, payload: bytes, expected_s: float | None = None) -> None:
        """Until it waits, or is in the engine."""

        async def run() -> None:
            with trio.CancelScope() as self.scopes[session]:
                try:
                    self.outcomes[session] = await self.batcher.compute(self.stage, session, payload, expected_s)
                except trio.Cancelled:
                    self.outcomes[session] = "cancelled"
                    raise
                except Exception as error:  # noqa: BLE001  kept for the test to look at
                    self.outcomes[session] = error

        self.nursery.start_soon(run)
        await wait_all_tasks_blocked()

    def output(self, session: bytes) -> bytes:
        outcome = self.outcomes[session]
        assert isinstance(outcome, Outcome), outcome
        return outcome.output


# --- the decision -----------------------------------------------------------------------------------------------------------

LEFT = st.lists(st.integers(1, 500), max_size=20)


@given(LEFT, st.integers(1, 300), st.integers(1, 20))
def test_a_turn_serves_tokens_first_and_shares_the_rest(left: list[int], prompt_tokens: int, steps_max: int) -> None:
    turn = next_turn(left, prompt_tokens, steps_max)
    places = [place for place, _ in turn]
    assert places == sorted(set(places))
    assert all(1 <= tokens <= left[place] for place, tokens in turn)
    assert len(turn) <= steps_max
    assert sum(tokens for place, tokens in turn if left[place] > 1) <= prompt_tokens
    if left:
        assert turn
        assert turn[0][0] == 0, "whoever is first in line is served"
    if len(turn) < steps_max:
        assert {place for place, tokens in enumerate(left) if tokens == 1} <= set(places)


def test_the_turn_of_a_crowd() -> None:
    limit = PROMPT_TOKENS_PER_TURN
    assert next_turn([]) == []
    assert next_turn([1]) == [(0, 1)]
    assert next_turn([1000]) == [(0, limit)]
    assert next_turn([1, 1000, 1, 50, 1]) == [(0, 1), (1, limit), (2, 1), (4, 1)]
    assert next_turn([30, 1000]) == [(0, 30), (1, limit - 30)]
    assert len(next_turn([1] * 100)) == STEPS_PER_TURN_MAX


@given(LEFT, st.integers(1, 300))
def test_every_prompt_ends_whoever_else_is_there(left: list[int], prompt_tokens: int) -> None:
    line = list(enumerate(left))
    bound = sum(left)
    while line:
        turn = next_turn([tokens for _, tokens in line], prompt_tokens)
        served = {line[place][0]: (line[place], tokens) for place, tokens in turn}
        line = [entry for entry in line if entry[0] not in served]
        line += [(name, tokens - count) for (name, tokens), count in served.values() if tokens > count]
        bound -= 1
        assert bound >= 0


# --- turns ------------------------------------------------------------------------------------------------------------------


async def test_who_waits_together_is_computed_together() -> None:
    stage = FakeStage()
    begun, go_on = stage.hold()
    async with trio.open_nursery() as nursery:
        sessions = Sessions(nursery, Batcher(0.0), stage)
        await sessions.start(b"a", token(1))
        assert await trio.to_thread.run_sync(begun)
        for number, name in enumerate((b"b", b"c", b"d")):
            await sessions.start(name, token(number))
        go_on()
    assert stage.turns == [[(b"a", 1, False)], [(b"b", 1, False), (b"c", 1, False), (b"d", 1, False)]]
    assert [sessions.output(name) for name in (b"a", b"b", b"c", b"d")] == [token(1), token(0), token(1), token(2)]
    assert not any(stage.inline)


async def test_the_time_of_a_turn_is_shared() -> None:
    stage = FakeStage()
    begun, go_on = stage.hold()
    async with trio.open_nursery() as nursery:
        sessions = Sessions(nursery, Batcher(0.0), stage)
        await sessions.start(b"a", token(1))
        assert await trio.to_thread.run_sync(begun)
        await sessions.start(b"b", token(1))
        await sessions.start(b"c", prompt(3))
        go_on()
    b, c = sessions.outcomes[b"b"], sessions.outcomes[b"c"]
    assert isinstance(b, Outcome)
    assert isinstance(c, Outcome)
    assert b.turn_s == c.turn_s
    assert b.compute_s * 3 == pytest.approx(c.compute_s)
    assert b.compute_s + c.compute_s == pytest.approx(b.turn_s)


@pytest.mark.parametrize("last", [False, True])
async def test_a_long_prompt_is_read_in_parts_beside_the_others(last: bool) -> None:
    stage = FakeStage(last=last)
    begun, go_on = stage.hold()
    part, tokens = PROMPT_TOKENS_PER_TURN, 2 * PROMPT_TOKENS_PER_TURN + 5
    payload = b"".join(token(n) for n in range(tokens))
    async with trio.open_nursery() as nursery:
        sessions = Sessions(nursery, Batcher(0.0), stage)
        await sessions.start(b"long", payload)
        assert await trio.to_thread.run_sync(begun)
        await sessions.start(b"a", token(1))
        await sessions.start(b"short", prompt(10))
        go_on()
    assert stage.turns == [
        [(b"long", part, True)],
        [(b"a", 1, False), (b"short", 10, False), (b"long", part - 10, True)],
        [(b"long", 15, False)],
    ]
    assert sessions.output(b"long") == (token(tokens) if last else payload)


async def test_a_step_that_fails_is_its_own() -> None:
    stage = FakeStage(fails={b"b": MalformedError("bad")})
    begun, go_on = stage.hold()
    async with trio.open_nursery() as nursery:
        sessions = Sessions(nursery, Batcher(0.0), stage)
        await sessions.start(b"a", token(1))
        assert await trio.to_thread.run_sync(begun)
        await sessions.start(b"b", prompt(500))
        await sessions.start(b"c", token(3))
        go_on()
    assert isinstance(sessions.outcomes[b"b"], MalformedError)
    assert sessions.output(b"c") == token(3)
    assert len(stage.turns) == 2, "the rest of a prompt that failed is not read"


async def test_a_broken_engine_is_heard_of_by_all_and_blocks_nobody() -> None:
    stage = FakeStage(breaks=ZeroDivisionError())
    begun, go_on = stage.hold()
    async with trio.open_nursery() as nursery:
        batcher = Batcher(0.0)
        sessions = Sessions(nursery, batcher, stage)
        await sessions.start(b"a", token(1))
        assert await trio.to_thread.run_sync(begun)
        await sessions.start(b"b", token(2))
        await sessions.start(b"c", token(3))
        go_on()
    assert all(isinstance(outcome, ZeroDivisionError) for outcome in sessions.outcomes.values())
    assert len(sessions.outcomes) == 3
    stage.breaks = None
    assert (await batcher.compute(stage, b"a", token(4), None)).output == token(4)


async def test_an_engine_that_answers_too_little_is_broken() -> None:
    stage = FakeStage()
    stage.step_many = lambda steps, more=(): []  # type: ignore[method-assign]
    batcher = Batcher(0.0)
    for _ in range(2):
        with pytest.raises(LocalError, match="0 answers to 1 steps"):
            await batcher.compute(stage, b"a", token(1), None)


async def test_payloads_of_odd_size_are_for_the_engine_to_refuse() -> None:
    stage = FakeStage()
    batcher = Batcher(0.0)
    for payload in (b"", b"abc", prompt(3) + b"x", prompt(300) + b"x"):
        assert (await batcher.compute(stage, b"a", payload, None)).output == payload


# --- cancellation -----------------------------------------------------------------------------------------------------------


async def test_a_session_that_is_gone_is_not_computed() -> None:
    stage = FakeStage()
    begun, go_on = stage.hold()
    async with trio.open_nursery() as nursery:
        sessions = Sessions(nursery, Batcher(0.0), stage)
        await sessions.start(b"a", token(1))
        assert await trio.to_thread.run_sync(begun)
        await sessions.start(b"b", token(2))
        await sessions.start(b"c", token(3))
        sessions.scopes[b"b"].cancel()
        await wait_all_tasks_blocked()
        assert sessions.outcomes == {b"b": "cancelled"}
        go_on()
    assert stage.turns == [[(b"a", 1, False)], [(b"c", 1, False)]]


async def test_nobody_leaves_while_the_engine_is_at_its_step() -> None:
    """Whoever leaves closes the session, whose memory the engine still writes to."""
    stage = FakeStage()
    begun, go_on = stage.hold()
    async with trio.open_nursery() as nursery:
        sessions = Sessions(nursery, Batcher(0.0), stage)
        await sessions.start(b"a", token(1))
        assert await trio.to_thread.run_sync(begun)
        await sessions.start(b"b", token(2))
        await sessions.start(b"c", token(3))
        begun_again, go_on_again = stage.hold()
        go_on()
        assert await trio.to_thread.run_sync(begun_again)  # b and c
        for name in (b"b", b"c"):
            sessions.scopes[name].cancel()
        await wait_all_tasks_blocked()
        assert set(sessions.outcomes) == {b"a"}
        go_on_again()
    assert set(sessions.outcomes) == {b"a", b"b", b"c"}


async def test_a_prompt_that_is_cancelled_is_not_read_to_its_end_and_others_go_on() -> None:
    stage = FakeStage()
    begun, go_on = stage.hold()
    async with trio.open_nursery() as nursery:
        sessions = Sessions(nursery, Batcher(0.0), stage)
        await sessions.start(b"long", prompt(10_000))
        assert await trio.to_thread.run_sync(begun)
        await sessions.start(b"b", token(2))
        sessions.scopes[b"long"].cancel()
        go_on()
    assert stage.turns == [[(b"long", PROMPT_TOKENS_PER_TURN, True)], [(b"b", 1, False)]]
    assert sessions.outcomes[b"long"] == "cancelled"
    assert sessions.output(b"b") == token(2)


async def test_everyone_may_leave_at_once() -> None:
    stage = FakeStage()
    begun, go_on = stage.hold()
    async with trio.open_nursery() as nursery:
        batcher = Batcher(0.0)
        sessions = Sessions(nursery, batcher, stage)
        for number in range(4):
            await sessions.start(b"%d" % number, prompt(200))
        assert await trio.to_thread.run_sync(begun)
        nursery.cancel_scope.cancel()
        go_on()
    assert len(stage.turns) == 1
    assert (await batcher.compute(stage, b"a", token(4), None)).output == token(4)


# --- the short way ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunked", [False, True])
async def test_brief_steps_stay_on_the_trio_thread(chunked: bool) -> None:
    stage = FakeStage(chunked=chunked)
    batcher = Batcher(0.002)
    for expected_s, inline in ((0.001, True), (0.002, False), (None, False)):
        assert (await batcher.compute(stage, b"a", token(5), expected_s)).output == token(5)
        assert stage.inline[-1] is inline


async def test_together_they_may_be_too_long_for_it() -> None:
    stage = FakeStage()
    async with trio.open_nursery() as nursery:
        sessions = Sessions(nursery, Batcher(0.002), stage)
        for name in (b"a", b"b", b"c"):
            nursery.start_soon(sessions.batcher.compute, stage, name, token(1), 0.0009)
    assert [len(turn) for turn in stage.turns] == [3], "what begins at the same moment is one turn"
    assert stage.inline == [False]


async def test_nothing_runs_on_the_trio_thread_while_an_engine_is_busy() -> None:
    busy, other = FakeStage(), FakeStage()
    begun, go_on = busy.hold()
    async with trio.open_nursery() as nursery:
        batcher = Batcher(0.002)
        sessions = Sessions(nursery, batcher, busy)
        await sessions.start(b"a", token(1))
        assert await trio.to_thread.run_sync(begun)
        assert (await batcher.compute(other, b"b", token(2), 0.0)).output == token(2)
        assert other.inline == [False]
        go_on()


@pytest.mark.parametrize(("chunked", "causal"), [(False, True), (True, False)])
async def test_other_stages_take_whole_steps_one_by_one_two_at_a_time(chunked: bool, causal: bool) -> None:
    stage = FakeStage(chunked=chunked, causal=causal)
    gates = [stage.hold(), stage.hold()]
    async with trio.open_nursery() as nursery:
        sessions = Sessions(nursery, Batcher(0.0), stage)
        await sessions.start(b"long", prompt(1000))
        await sessions.start(b"b", token(2))
        await sessions.start(b"c", token(3))
        for begun, _ in gates:
            assert await trio.to_thread.run_sync(begun)
        sessions.scopes[b"c"].cancel()
        for _, go_on in gates:
            go_on()
    assert sorted(stage.turns) == [[(b"b", 1, False)], [(b"long", 1000, False)]]
    assert sessions.outcomes[b"c"] == "cancelled"
