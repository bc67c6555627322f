"""An answer whose reader, or whose asking node, goes away in the middle is taken up again: by its id, from the next token."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
import trio

from nexus.core.errors import NotAllowedError, NotFoundError, UsageError
from nexus.core.manifest import Manifest
from nexus.node import resuming
from nexus.node.api import Event, Finished, GenerateRequest, Planned, ResumeRequest, Token
from nexus.proof.bundle import verify_answer
from nexus.storage.answers import ANSWERS_MAX, AnswerStore
from tests.engine.conftest import Folder
from tests.node.test_failover import Watched, check_whole, watch
from tests.node.test_runner import Models, home

REQUEST = GenerateRequest("tiny", "abc def ghi", max_tokens=100, stages=2, temperature=0.0)


class Clock:
    now_ms = 1_700_000_000_000


@pytest.fixture
def tiny(exact_model: Models) -> tuple[Manifest, Folder]:
    return exact_model("llama")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AnswerStore]:
    monkeypatch.setattr(resuming, "WRITE_EVERY_S", 0.0)
    made = AnswerStore(tmp_path / "answers.db", lambda: Clock.now_ms)
    yield made
    made.close()


async def read(events: AsyncIterator[Event], until: int | None = None) -> Watched:
    """Read an answer to its end, or until so many tokens came and the reader goes away."""
    seen = Watched([], None, [], [])  # type: ignore[arg-type]
    with trio.fail_after(60):
        async with aclosing(events) as open_events:  # type: ignore[type-var]
            async for event in open_events:
                if isinstance(event, Planned):
                    seen.plans.append(event)
                elif isinstance(event, Token):
                    seen.tokens.append(event)
                    if len(seen.tokens) == until:
                        break
                elif isinstance(event, Finished):
                    seen.done = event
    return seen


@pytest.fixture
async def expected(tiny: tuple[Manifest, Folder], tmp_path: Path) -> Watched:
    async with home(tiny, tmp_path / "undisturbed", others=4) as here:
        return await watch(here, REQUEST)


@pytest.mark.parametrize("until", [20, 40, 90])
@pytest.mark.parametrize("lost", [0, 1, 30])
async def test_an_answer_goes_on_in_another_process(
    tiny: tuple[Manifest, Folder], tmp_path: Path, store: AnswerStore, expected: Watched, until: int, lost: int
) -> None:
    """`lost`: tokens that came and that the reader does not have any more."""
    async with home(tiny, tmp_path / "first", others=4, answers=store) as here:
        before = await read(here.runner.generate(REQUEST), until)
    answer = before.plans[0].answer.hex()
    known = tuple(token.token for token in before.tokens[: max(0, until - lost)])
    async with home(tiny, tmp_path / "second", others=4, answers=store) as here:
        after = await read(here.runner.resume(ResumeRequest(answer[:12], known)))
        assert [plan.answer.hex() for plan in after.plans] == [answer] * len(after.plans)
        both = Watched(before.tokens[: len(known)] + after.tokens, after.done, after.plans, [])
        check_whole(both, expected)
        assert len(after.done.earlier) == 1
        assert sum(report.steps for report in verify_answer(after.done.proof)[:1]) >= until - 32
        with pytest.raises(NotFoundError):  # the reader has it all
            await read(here.runner.resume(ResumeRequest(answer, known)))


async def test_a_crash_of_the_asker_between_crashes_of_stages(
    tiny: tuple[Manifest, Folder], tmp_path: Path, store: AnswerStore, expected: Watched
) -> None:
    tokens: list[Token] = []
    answer = ""
    for number, until in enumerate((30, 30, None)):
        async with home(tiny, tmp_path / f"life {number}", others=4, answers=store) as here:
            known = tuple(token.token for token in tokens)
            events = here.runner.resume(ResumeRequest(answer, known)) if answer else here.runner.generate(REQUEST)
            seen = await read(events, until)
            tokens += seen.tokens
            answer = seen.plans[0].answer.hex()
    check_whole(Watched(tokens, seen.done, seen.plans, []), expected)
    assert len(seen.done.earlier) == 2


async def test_who_may_take_it_up(tiny: tuple[Manifest, Folder], tmp_path: Path, store: AnswerStore) -> None:
    async with home(tiny, tmp_path, others=4, answers=store) as here:
        with pytest.raises(NotFoundError, match="no answer"):
            await read(here.runner.resume(ResumeRequest("00" * 8)))
        events = here.runner.generate(REQUEST)
        async with aclosing(events):
            planned = None
            count = 0
            async for event in events:
                if isinstance(event, Planned):
                    planned = event
                count += isinstance(event, Token)
                if count == 40:
                    break
            assert planned is not None
            again = ResumeRequest(planned.answer.hex())
            with pytest.raises(NotAllowedError, match="still on its way"):
                await read(here.runner.resume(again))
        with pytest.raises(UsageError, match="not the tokens of this answer"):
            await read(here.runner.resume(ResumeRequest(again.answer, (1, 2, 3))))
        with pytest.raises(UsageError, match="not the tokens of this answer"):
            await read(here.runner.resume(ResumeRequest(again.answer, tuple(range(200)))))
        assert (await read(here.runner.resume(again))).done.completion_tokens


async def test_a_damaged_row_costs_computing_no_more(
    tiny: tuple[Manifest, Folder], tmp_path: Path, store: AnswerStore, expected: Watched
) -> None:
    async with home(tiny, tmp_path / "first", others=4, answers=store) as here:
        before = await read(here.runner.generate(REQUEST), 60)
    with store._database.transaction() as connection:
        connection.execute("UPDATE windows SET content = CAST(x'00' || substr(content, 2) AS BLOB) WHERE number = 1")
    async with home(tiny, tmp_path / "second", others=4, answers=store) as here:
        known = tuple(token.token for token in before.tokens)
        after = await read(here.runner.resume(ResumeRequest(before.plans[0].answer.hex(), known)))
        check_whole(Watched(before.tokens + after.tokens, after.done, after.plans, []), expected)
        assert verify_answer(after.done.proof)[0].steps == 16


async def test_what_is_old_makes_room(tiny: tuple[Manifest, Folder], tmp_path: Path, store: AnswerStore) -> None:
    async with home(tiny, tmp_path, others=4, answers=store) as here:
        first = (await read(here.runner.generate(REQUEST), 40)).plans[0].answer
        _, asked = store.find(first.hex())
        for number in range(ANSWERS_MAX):
            Clock.now_ms += 1
            store.begin(bytes([number]) * 32, asked)
        with pytest.raises(NotFoundError):
            store.find(first.hex())
        assert store.parts(first) == []
        Clock.now_ms += 2 * 60 * 60 * 1000
        store.begin(bytes(32), asked)
        assert [row[0] for row in store._database.rows("SELECT id FROM answers")] == [bytes(32)]
