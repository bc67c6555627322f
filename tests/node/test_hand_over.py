"""A node that leaves in the middle of an answer: its sessions go on over other nodes, and the answer is the undisturbed one."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path

import pytest
import trio

from nexus.core.keys import public_key_of
from nexus.core.manifest import Manifest
from nexus.node.api import Finished, GenerateRequest, Planned, Token
from nexus.node.infer.serving import InferService
from nexus.proof.bundle import verify_answer
from tests.engine.conftest import Folder
from tests.node.test_runner import Home, Models, home

REQUEST = GenerateRequest("tiny", "abc def ghi", max_tokens=60, stages=2)


def service_of(here: Home, peer_id: str) -> InferService:
    key = public_key_of(peer_id)
    return next(service for service in here.nodes.services if service._identity.public_key == key)


async def answer(here: Home, leave_after: int | None, stage: int = 0) -> tuple[list[int], list[Planned], Finished]:
    """The tokens of an answer, in whose course the node of a stage leaves after so many tokens."""
    tokens: list[int] = []
    plans: list[Planned] = []
    with trio.fail_after(60):
        async with aclosing(here.runner.generate(REQUEST)) as events:
            async for event in events:
                if isinstance(event, Planned):
                    plans.append(event)
                if isinstance(event, Token):
                    tokens.append(event.token)
                    if len(tokens) == leave_after:
                        leaver = service_of(here, plans[-1].plan.stages[stage].peer_id)
                        assert leaver.seats == 1
                        leaver.draining = True
                        assert leaver.hand_over() == 1
                if isinstance(event, Finished):
                    return tokens, plans, event
    raise AssertionError


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("after", [3, 20])
async def test_sessions_of_a_node_that_leaves_go_on_elsewhere(exact_model: Models, tmp_path: Path, stage: int, after: int) -> None:
    tiny: tuple[Manifest, Folder] = exact_model("llama")
    async with home(tiny, tmp_path / "once", others=4) as here:
        expected, _, _ = await answer(here, None)
    async with home(tiny, tmp_path / "twice", others=4) as here:
        tokens, plans, finished = await answer(here, after, stage)
        left = plans[0].plan.stages[stage].peer_id
        assert tokens == expected
        assert len(plans) == 2
        assert left not in {one.peer_id for one in finished.stages}
        assert sum(report.steps for report in verify_answer(finished.proof)) == finished.completion_tokens
        assert service_of(here, left).seats == 0
