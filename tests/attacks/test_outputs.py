"""Outputs that are not the model's, and commitments to something that was not computed."""

from __future__ import annotations

from pathlib import Path

from tests.attacks.arena import Model, open_arena
from tests.attacks.catalogue import Row


async def test_random_output(tiny: Model, tmp_path: Path, row: Row) -> None:
    """At the last stage, where it is tokens."""
    async with open_arena(tiny, tmp_path, {2: "random-output"}) as arena:
        await arena.punishes(row, 2)


async def test_a_lazy_copy(tiny: Model, tmp_path: Path, row: Row) -> None:
    async with open_arena(tiny, tmp_path, {1: "lazy-copy"}) as arena:
        await arena.punishes(row)


async def test_one_bit_sabotage(tiny: Model, tmp_path: Path, row: Row) -> None:
    async with open_arena(tiny, tmp_path, {1: "one-bit"}) as arena:
        await arena.punishes(row)


async def test_a_stale_cache(tiny: Model, tmp_path: Path, row: Row) -> None:
    async with open_arena(tiny, tmp_path, {2: "stale-cache"}) as arena:
        await arena.punishes(row, 2)


async def test_a_truncated_cache(tiny: Model, tmp_path: Path, row: Row) -> None:
    async with open_arena(tiny, tmp_path, {1: "truncated-cache"}) as arena:
        await arena.punishes(row)


async def test_a_rewritten_log(tiny: Model, tmp_path: Path, row: Row) -> None:
    async with open_arena(tiny, tmp_path, {1: "rewritten-log"}) as arena:
        await arena.punishes(row)


async def test_authentic_sums_over_a_forged_trace(tiny: Model, tmp_path: Path, row: Row) -> None:
    """It shows to the audit what it computed, and that is right: but it is not what it signed for."""
    async with open_arena(tiny, tmp_path, {1: "forged-trace"}) as arena:
        await arena.punishes(row, verify=None)


async def test_an_overflow_for_the_next_stage(tiny: Model, tmp_path: Path, row: Row) -> None:
    """The request is planned again at once, without the two stages of which one spoiled it, and answered."""
    async with open_arena(tiny, tmp_path, {1: "overflow"}) as arena:
        done = await arena.ask()
        assert list(done.bundle.outputs) == arena.right_tokens(done)
        assert arena.key(1) not in {stage.node for stage in done.bundle.plan.stages}
        assert await arena.outcome(1) == row.outcome
