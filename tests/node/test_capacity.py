"""Speeds are measured again when there is nothing else to do, and uploads as they happen."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import trio
import trio.testing

from nexus.engine.exact import native
from nexus.engine.speed import Speeds, measure_speeds
from nexus.node.capacity import AGAIN_LATEST_S, LOAD_EVERY_S, UPLOAD_SAMPLE_BYTES, Capacity, LoadNews, UploadMeter, load_step
from nexus.node.live import Live

Clock = trio.testing.MockClock


class Machine:
    """Gives the speeds of a list, one after the other, and then the last one for ever."""

    def __init__(self, nursery: trio.Nursery, *speeds: Speeds) -> None:
        self.speeds = list(speeds)
        self.measured_s: list[float] = []
        self.told = 0
        self.live = Live()
        self.during: Callable[[], None] = lambda: None
        self.capacity = Capacity(
            speeds[0], self._measure, lambda: not self.live.count, self.live.wait_idle, self._tell, random.Random(1)
        )
        nursery.start_soon(self.capacity.run)

    async def _measure(self) -> Speeds:
        self.measured_s.append(trio.current_time())
        await trio.sleep(0.5)
        self.during()
        if len(self.speeds) > 1:
            self.speeds.pop(0)
        return self.speeds[0]

    def _tell(self) -> None:
        self.told += 1


async def test_a_node_that_started_beside_others_is_not_misjudged_for_long(nursery: trio.Nursery, autojump_clock: Clock) -> None:
    machine = Machine(nursery, Speeds(500, 100), Speeds(50_000, 10_000))
    assert machine.capacity.speeds == Speeds(500, 100)
    await trio.sleep(60)
    assert machine.capacity.speeds == Speeds(50_000, 10_000)
    assert machine.told == 1
    await trio.sleep(86_400)
    assert machine.told == 1  # nothing new
    assert len(machine.measured_s) < 40


async def test_the_best_of_late_counts_and_a_machine_that_stays_slow_is_known_as_slow(
    nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    machine = Machine(nursery, Speeds(1000, 1000), Speeds(100, 100))
    await trio.sleep(60)
    assert machine.measured_s
    assert machine.capacity.speeds == Speeds(1000, 1000)
    await trio.sleep(8 * AGAIN_LATEST_S)
    assert machine.capacity.speeds == Speeds(100, 100)


async def test_a_busy_node_does_not_measure_itself(nursery: trio.Nursery, autojump_clock: Clock) -> None:
    machine = Machine(nursery, Speeds(1000, 1000), Speeds(2000, 2000))
    with machine.live.one():
        await trio.sleep(7200)
        assert not machine.measured_s
    await trio.sleep(1)
    assert len(machine.measured_s) == 1


async def test_what_was_measured_beside_work_that_began_meanwhile_does_not_count(
    nursery: trio.Nursery, autojump_clock: Clock
) -> None:
    machine = Machine(nursery, Speeds(1000, 1000), Speeds(10_000, 10_000))
    work = machine.live.one()
    machine.during = work.__enter__
    await trio.sleep(60)
    assert machine.measured_s
    assert machine.capacity.speeds == Speeds(1000, 1000)
    machine.during = lambda: None
    work.__exit__(None, None, None)
    await trio.sleep(120)
    assert machine.capacity.speeds == Speeds(10_000, 10_000)


def test_this_machine_is_measured_with_the_real_kernels() -> None:
    """No figures: machines differ. But a slow answer of a clock is no speed, and more weights take longer."""
    speeds = measure_speeds(1)
    assert speeds.exact > 10
    assert speeds.float > 10
    if native.available():
        # int8 is a quarter of the bytes; a kernel that were slower than floats would be the wrong one.
        assert speeds.exact > speeds.float / 4


def test_a_clock_that_stands_still_gives_a_number() -> None:
    assert measure_speeds(1, lambda: 0.0).exact > 0


class Uploads:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.meter = UploadMeter(lambda: self.now_s)

    def send(self, bytes_per_s: float, n_bytes: int = UPLOAD_SAMPLE_BYTES) -> None:
        with self.meter.busy():
            self.now_s += n_bytes / bytes_per_s
            self.meter.sent(n_bytes)


def test_uploads_are_measured_while_there_is_something_to_send() -> None:
    uploads = Uploads()
    uploads.send(1e9, n_bytes=1000)
    assert uploads.meter.bytes_per_s == 0  # it may all be in a buffer
    uploads.now_s += 1000  # nobody asks for anything
    uploads.send(10e6)
    assert uploads.meter.bytes_per_s == pytest.approx(10e6, rel=0.01)


def test_a_reader_that_trickles_hardly_lowers_what_this_node_can_give() -> None:
    uploads = Uploads()
    uploads.send(10e6)
    uploads.send(1e3)
    assert uploads.meter.bytes_per_s == pytest.approx(9e6, rel=0.02)
    for _ in range(60):
        uploads.send(1e6)
    assert uploads.meter.bytes_per_s == pytest.approx(1e6, rel=0.1)


def test_receivers_at_the_same_time_are_counted_together() -> None:
    uploads = Uploads()
    with uploads.meter.busy(), uploads.meter.busy():
        for _ in range(2 * UPLOAD_SAMPLE_BYTES >> 10):
            uploads.now_s += 1024 / 20e6
            uploads.meter.sent(1024)
    assert uploads.meter.bytes_per_s == pytest.approx(20e6, rel=0.01)


def test_load_is_told_in_steps() -> None:
    assert [load_step(sessions) for sessions in (0, 1, 2, 3, 4, 7, 8, 9)] == [0, 1, 2, 2, 4, 4, 8, 8]


@pytest.mark.parametrize("members", [3, 1000])
async def test_a_load_that_wavers_is_told_seldom_and_at_last_right(
    nursery: trio.Nursery, autojump_clock: Clock, members: int
) -> None:
    live, told = Live(), list[tuple[float, int]]()
    news = LoadNews(lambda: live.count, lambda: members, lambda: told.append((trio.current_time(), live.count)))
    live.on_change.append(news.note)
    nursery.start_soon(news.run)
    await trio.testing.wait_all_tasks_blocked()
    with live.one():
        await trio.testing.wait_all_tasks_blocked()
        assert told == [(0.0, 1)]
        for _ in range(1000):
            with live.one():
                await trio.sleep(0.1)
            await trio.sleep(0.1)
        await trio.sleep(100)
        assert load_step(told[-1][1]) == 1
    await trio.sleep(100)
    assert told[-1][1] == 0
    assert all(later[0] - earlier[0] >= max(LOAD_EVERY_S, members / 20) - 1e-6 for earlier, later in pairwise(told))
    count, seconds = len(told), told[-1][0]
    assert count <= 3 + seconds / LOAD_EVERY_S
    await trio.sleep(3600)
    assert len(told) == count
