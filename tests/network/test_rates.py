"""The limit that all streams share."""

from __future__ import annotations

import pytest
import trio

from nexus.network.rates import BURST_S, Pace


@pytest.mark.parametrize("sharers", [1, 4])
async def test_the_limit_holds_for_all_sharers_together(autojump_clock: object, sharers: int) -> None:
    pace = Pace(1 << 20)
    began = trio.current_time()

    async def spend() -> None:
        for _ in range(40 // sharers):
            await pace.spend(1 << 19)

    async with trio.open_nursery() as nursery:
        for _ in range(sharers):
            nursery.start_soon(spend)
    assert trio.current_time() - began == pytest.approx(20 - BURST_S, abs=0.6)


async def test_no_limit_waits_for_nothing(autojump_clock: object) -> None:
    began = trio.current_time()
    await Pace(0).spend(1 << 40)
    assert trio.current_time() == began
