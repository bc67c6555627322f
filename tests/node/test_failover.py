"""An answer goes on when nodes go away in the middle of it: the same tokens, proven from the first to the last."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import pytest
import trio

from nexus.core.audits import OK, UNANSWERED
from nexus.core.errors import UnreachableError, VerificationError
from nexus.core.manifest import Manifest
from nexus.node.api import Finished, GenerateRequest, Planned, Token
from nexus.node.progress import Notice
from nexus.proof.bundle import AnswerProof, Bundle, verify_answer
from tests.engine.conftest import Folder
from tests.node.test_runner import Home, Models, home

Imported = Callable[..., tuple[Path, Manifest, Folder]]


@pytest.fixture
def tiny(exact_model: Models) -> tuple[Manifest, Folder]:
    return exact_model("llama")


@dataclass
class Watched:
    """What a user saw of an answer in whose course nodes crash."""

    tokens: list[Token]
    done: Finished
    plans: list[Planned]
    notices: list[str]

    @property
    def shown(self) -> list[tuple[int, int, str]]:
        return [(one.step, one.token, one.text) for one in self.tokens]


async def watch(here: Home, request: GenerateRequest, *crashes: tuple[int, int]) -> Watched:
    """Run a request; `crashes`: after so many tokens the node of that stage, as it is planned then, is gone."""
    seen = Watched([], cast(Finished, None), [], [])
    left = list(crashes)
    with trio.fail_after(60):
        async with aclosing(here.runner.generate(request)) as events:
            async for event in events:
                match event:
                    case Planned():
                        seen.plans.append(event)
                    case Notice(text):
                        seen.notices.append(text)
                    case Token():
                        seen.tokens.append(event)
                    case Finished():
                        seen.done = event
                while left and len(seen.tokens) >= left[0][0]:
                    here.nodes.network.crash(seen.plans[-1].plan.stages[left.pop(0)[1]].peer_id)
    assert not left
    return seen


def check_whole(seen: Watched, expected: Watched) -> None:
    """That the answer is the undisturbed one, and proven from its first token to its last."""
    assert seen.shown == expected.shown
    assert (seen.done.completion_tokens, seen.done.reason) == (expected.done.completion_tokens, expected.done.reason)
    reports = verify_answer(seen.done.proof)
    assert sum(report.steps for report in reports) == sum(report.steps for report in verify_answer(expected.done.proof))
    assert seen.done.receipts == seen.done.receipts_verified == sum(report.receipts for report in reports)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("after", [1, 15, 17, 40, 80])
async def test_an_answer_goes_on_when_a_node_crashes(
    tiny: tuple[Manifest, Folder], tmp_path: Path, after: int, stage: int, sampled: bool
) -> None:
    request = GenerateRequest("tiny", "abc def ghi", max_tokens=100, stages=2)
    if sampled:
        request = replace(request, prompt="abc def", temperature=0.9, repetition_penalty=1.3, seed=9)
    async with home(tiny, tmp_path / "once", others=4) as here:
        expected = await watch(here, request)
    async with home(tiny, tmp_path / "twice", others=4) as here:
        seen = await watch(here, request, (after, stage))
        check_whole(seen, expected)
        assert len(seen.plans) == 2
        assert len(seen.done.earlier) == (after > 16)
        assert seen.plans[0].plan.stages[stage].peer_id not in {one.peer_id for one in seen.done.stages}
        assert seen.done.audit
        assert {one.verdict for one in seen.done.audit.stages} == {OK}
        assert ["goes on without it" in notice for notice in seen.notices] == [True]


async def test_one_crash_after_another(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    request = GenerateRequest("tiny", "abc def", max_tokens=120, stages=2, temperature=0.7, seed=9)
    async with home(tiny, tmp_path / "once", others=6) as here:
        expected = await watch(here, request)
    async with home(tiny, tmp_path / "often", others=6) as here:
        seen = await watch(here, request, (40, 0), (80, 1), (81, 0), (110, 1))
        check_whole(seen, expected)
        assert len(seen.plans) == 5
        assert len(seen.done.earlier) >= 3
        assert AnswerProof.from_bytes(seen.done.proof.to_bytes()) == seen.done.proof
        assert {one.verdict for part in seen.done.earlier if part.audit for one in part.audit.stages} <= {OK, UNANSWERED}


async def test_a_float_answer_goes_on_token_for_token(
    imported: Callable[..., tuple[Path, Manifest, Folder]], tmp_path: Path
) -> None:
    _, *model = imported("llama")
    request = GenerateRequest("tiny", "abc def", max_tokens=60, stages=2)
    async with home((model[0], model[1]), tmp_path / "once", others=4) as here:
        expected = await watch(here, request)
    async with home((model[0], model[1]), tmp_path / "twice", others=4) as here:
        check_whole(await watch(here, request, (40, 1)), expected)


async def test_an_answer_without_receipts_goes_on_from_what_was_shown(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    request = GenerateRequest("tiny", "abc def ghi", max_tokens=60, stages=2, receipts=False)
    async with home(tiny, tmp_path / "once", others=4) as here:
        expected = await watch(here, request)
    async with home(tiny, tmp_path / "twice", others=4) as here:
        seen = await watch(here, request, (30, 0))
        assert seen.shown == expected.shown
        assert not seen.done.earlier


async def test_without_receipts_the_end_of_an_answer_is_computed_again(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    """All was shown when a node went away, and nothing is signed: the last token alone is made anew."""
    request = GenerateRequest("tiny", "abc def ghi", max_tokens=30, stages=2, receipts=False)
    async with home(tiny, tmp_path / "once", others=4) as here:
        expected = await watch(here, request)
    async with home(tiny, tmp_path / "twice", others=4) as here:
        seen = await watch(here, request, (30, 1))
        assert seen.shown == expected.shown
        assert seen.done.completion_tokens == 30


async def test_an_answer_that_was_to_stop_stops_there_on_the_new_nodes(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    request = GenerateRequest("tiny", "abc def", max_tokens=100, stages=2, temperature=0.7, seed=9)
    async with home(tiny, tmp_path / "once", others=4) as here:
        whole = await watch(here, request)
    stopping = replace(request, stop=("".join(one.text for one in whole.tokens[34:39]),))
    async with home(tiny, tmp_path / "stops", others=4) as here:
        expected = await watch(here, stopping)
    assert expected.done.reason == "stop"
    count = len(expected.tokens)
    async with home(tiny, tmp_path / "twice", others=4) as here:
        seen = await watch(here, stopping, (count, 1))
        assert seen.shown == expected.shown
        assert seen.done.reason == "stop"
        verify_answer(seen.done.proof)


async def test_when_nobody_is_left_the_answer_ends_with_the_reason(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    request = GenerateRequest("tiny", "abc def ghi", max_tokens=60, stages=2)
    async with home(tiny, tmp_path, others=2) as here:
        here.runner.comeback_s = 0.1
        with pytest.raises(UnreachableError, match="crashed"):
            await watch(here, request, (30, 0))
        assert not here.runner._running


async def test_parts_that_do_not_belong_together_prove_nothing(tiny: tuple[Manifest, Folder], tmp_path: Path) -> None:
    request = GenerateRequest("tiny", "abc def ghi", max_tokens=100, stages=2)
    async with home(tiny, tmp_path / "one", others=6) as here:
        proof = (await watch(here, request, (40, 0), (80, 1))).done.proof
    async with home(tiny, tmp_path / "other", others=6) as here:
        other = (await watch(here, replace(request, prompt="dd ee"), (40, 0), (80, 1))).done.proof
    assert len(proof.parts) == len(other.parts) == 3

    def refuse(*parts: Bundle) -> None:
        with pytest.raises(VerificationError):
            verify_answer(AnswerProof(1, parts))

    one, two, three = proof.parts
    verify_answer(proof)
    verify_answer(AnswerProof(1, (one, two)))  # what an answer that was cut off here would show
    refuse()
    refuse(one, three)
    refuse(two, one)
    refuse(one, two, two)
    refuse(one, other.parts[1], three)
    refuse(replace(one, outputs=one.outputs[:16], receipts=one.receipts[:2]), two)
