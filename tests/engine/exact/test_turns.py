"""Real stages under the node's turns: whoever shares them, each session gets the tokens that it gets alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import trio

from nexus.core.errors import MalformedError, NexusError
from nexus.core.manifest import Manifest
from nexus.engine.importer import import_model
from nexus.engine.stage import Stage, load_stage
from nexus.node.batching import PROMPT_TOKENS_PER_TURN, Batcher
from nexus.proof.arithmetic.sampler import GREEDY, Sampling
from nexus.proof.receipts import tokens_from_bytes, tokens_to_bytes
from tests.engine.conftest import Folder

NEW = 12
CONTEXT = 3 * PROMPT_TOKENS_PER_TURN
Sessions = dict[bytes, tuple[list[int], Sampling]]
SESSIONS: Sessions = {
    b"a": ([5, 17, 99, 3], GREEDY),
    b"b": ([(7 * n) % 131 for n in range(2 * PROMPT_TOKENS_PER_TURN + 9)], Sampling(0.9, 0.95, 7)),
    b"c": ([42], Sampling(1.0, seed=3, top_k=20, repetition_penalty=1.3)),
    b"d": ([(11 * n) % 131 for n in range(PROMPT_TOKENS_PER_TURN + 1)], Sampling(1.2, seed=9, min_p=0.02)),
    b"e": ([1, 2, 3], Sampling(repetition_penalty=1.5)),
}


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Folder]:
    folder = Folder(tmp_path_factory.mktemp("blobs"))
    directory = make_model("qwen3", num_hidden_layers=4, max_position_embeddings=CONTEXT)
    return import_model(directory, folder, lambda *_: None, profile="exact"), folder


def chain(model: tuple[Manifest, Folder], count: int) -> list[Stage]:
    manifest, folder = model
    edges = [manifest.layers * i // count for i in range(count + 1)]
    return [
        load_stage(manifest, start, end, folder.stage_files(manifest, start, end), kernel="torch") for start, end in pairwise(edges)
    ]


def alone(stages: list[Stage], session: bytes, prompt: list[int], sampling: Sampling) -> list[int]:
    """Without turns: every step at once."""
    for stage in stages:
        stage.open(session, sampling)
    payload, tokens = tokens_to_bytes(prompt), []
    for _ in range(NEW):
        for stage in stages:
            payload = stage.step(session, payload)
        tokens += tokens_from_bytes(payload)
    for stage in stages:
        stage.close(session)
    return tokens


@pytest.fixture(scope="module")
def expected(model: tuple[Manifest, Folder]) -> dict[bytes, list[int]]:
    stages = chain(model, 1)
    return {session: alone(stages, session, *given) for session, given in SESSIONS.items()}


@pytest.mark.parametrize("count", [1, 3])
async def test_sessions_in_turns_get_the_tokens_that_they_get_alone(
    model: tuple[Manifest, Folder], expected: dict[bytes, list[int]], count: int
) -> None:
    stages = chain(model, count)
    batchers = [Batcher(0.0) for _ in stages]  # a node each
    sizes: list[int] = []
    for stage in stages:
        stage.step_many = partial(_noting, sizes, stage.step_many)  # type: ignore[method-assign]
    got: dict[bytes, list[int]] = {session: [] for session in SESSIONS}

    async def run(session: bytes, prompt: list[int], sampling: Sampling) -> None:
        for stage in stages:
            stage.open(session, sampling)
        payload = tokens_to_bytes(prompt)
        for _ in range(NEW):
            for batcher, stage in zip(batchers, stages, strict=True):
                payload = (await batcher.compute(stage, session, payload, None)).output
            got[session] += tokens_from_bytes(payload)
        for stage in stages:
            stage.close(session)

    async with trio.open_nursery() as nursery:
        for session, given in SESSIONS.items():
            nursery.start_soon(run, session, *given)
    assert got == expected
    assert max(sizes) > 1, "some turn had several sessions"


def _noting(sizes: list[int], step_many, steps, more=()):  # type: ignore[no-untyped-def]
    sizes.append(len(steps))
    return step_many(steps, more)


async def test_a_bad_prompt_beside_good_ones_fails_alone(model: tuple[Manifest, Folder], expected: dict[bytes, list[int]]) -> None:
    (stage,) = chain(model, 1)
    batcher = Batcher(0.0)
    failures: list[NexusError] = []

    async def fail() -> None:
        try:
            await batcher.compute(stage, b"bad", tokens_to_bytes([1] * 200 + [131]), None)
        except NexusError as error:
            failures.append(error)

    async def run(session: bytes) -> None:
        prompt, sampling = SESSIONS[session]
        stage.open(session, sampling)
        output = (await batcher.compute(stage, session, tokens_to_bytes(prompt), None)).output
        assert tokens_from_bytes(output) == expected[session][:1]

    stage.open(b"bad")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        for session in SESSIONS:
            nursery.start_soon(run, session)
    assert [type(error) for error in failures] == [MalformedError]
