"""Who answers is used, who misses two deadlines is not, and nobody is written off for one slow answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.swarm.health import (
    ALIVE,
    DEADLINE_S,
    GONE,
    GONE_AFTER_S,
    HEARTBEAT_S,
    IDLE_HEARTBEAT_MAX_S,
    IDLE_HEARTBEATS_PER_S,
    LATE_US,
    MISSES_MAX,
    SLOW,
    STUCK,
    STUCK_HEARTBEAT_S,
    UNKNOWN,
    HealthTable,
    interval_s,
    is_usable,
)

ONE, TWO, THREE = (bytes([number]) * 32 for number in (1, 2, 3))


def test_a_node_nobody_asked_is_used_on_its_own_word() -> None:
    assert HealthTable().state(ONE) == UNKNOWN
    assert is_usable(UNKNOWN)


def test_one_missing_answer_is_no_reason_to_do_without_a_node() -> None:
    table = HealthTable()
    assert table.answered(ONE, 1000, 0.0)
    assert table.missed(ONE, 2.0)
    assert table.state(ONE) == SLOW
    assert is_usable(SLOW)
    table.answered(ONE, 1000, 4.0)
    assert table.answered(ONE, 1000, 6.0)
    assert table.state(ONE) == ALIVE


def test_a_late_answer_is_an_answer() -> None:
    table = HealthTable()
    for second in range(10):
        table.answered(ONE, LATE_US + 1, float(second))
        assert table.state(ONE) == SLOW


def test_a_stopped_process_is_stuck_after_two_deadlines_and_back_with_its_first_answer() -> None:
    table = HealthTable()
    table.answered(ONE, 1000, 0.0)
    for number in range(MISSES_MAX):
        assert is_usable(table.state(ONE))
        table.missed(ONE, float(number))
    assert table.state(ONE) == STUCK
    assert table.unusable() == {ONE}
    assert HEARTBEAT_S + MISSES_MAX * DEADLINE_S <= 6  # with what the loop adds
    assert table.answered(ONE, 1000, 50.0)
    assert table.state(ONE) == SLOW
    assert table.answered(ONE, 1000, 52.0)
    assert table.state(ONE) == ALIVE


def test_one_that_stays_stuck_is_gone_and_may_come_back() -> None:
    table = HealthTable()
    for second in range(int(GONE_AFTER_S) + 3):
        table.missed(ONE, float(second))
    assert table.state(ONE) == GONE
    assert not table.missed(ONE, 100.0)
    assert table.heard(ONE, 101.0)
    assert table.state(ONE) == SLOW


def test_nobody_there_is_gone_at_once_and_any_answer_counts() -> None:
    table = HealthTable()
    table.answered(ONE, 1000, 0.0)
    assert table.unreachable(ONE, 1.0)
    assert table.state(ONE) == GONE
    assert not table.unreachable(ONE, 2.0)
    assert table.heard(ONE, 3.0)
    assert is_usable(table.state(ONE))
    assert not table.heard(ONE, 4.0)


def test_round_trips_are_smoothed() -> None:
    table = HealthTable()
    table.answered(ONE, 8_000, 0.0)
    table.answered(ONE, 16_000, 1.0)
    assert table.get(ONE).rtt_us == 9_000


def test_heartbeats_go_to_those_that_something_depends_on_and_seldom_to_the_many_others() -> None:
    assert interval_s(ALIVE, True, 1000) == HEARTBEAT_S
    assert interval_s(SLOW, False, 1000) == HEARTBEAT_S
    assert interval_s(ALIVE, False, 4) == HEARTBEAT_S
    assert interval_s(ALIVE, False, 30) == pytest.approx(30 / IDLE_HEARTBEATS_PER_S)
    assert interval_s(ALIVE, False, 10_000) == IDLE_HEARTBEAT_MAX_S
    assert interval_s(STUCK, True, 1) == STUCK_HEARTBEAT_S
    table = HealthTable()
    for node in (ONE, TWO):
        table.asked(node, 0.0)
    assert table.due([ONE, TWO, THREE], [TWO], 0.0) == [THREE]
    assert table.due([ONE, TWO, THREE], [TWO], HEARTBEAT_S) == [TWO, THREE, ONE]
    assert table.next_due_s([ONE, TWO], []) == HEARTBEAT_S
    assert table.next_due_s([], []) == float("inf")


def test_before_a_plan_only_those_are_asked_that_were_not_heard_lately() -> None:
    table = HealthTable()
    table.answered(ONE, 1000, 10.0)
    table.unreachable(TWO, 10.0)
    assert table.stale([ONE, TWO, THREE], 11.0) == [THREE]
    assert table.stale([ONE, TWO, THREE], 20.0) == [ONE, THREE]


@given(st.lists(st.tuples(st.sampled_from(["answered", "late", "missed", "unreachable", "heard"]), st.integers(0, 20))))
def test_whatever_happens_an_answer_makes_a_node_usable_and_changes_are_told(events: list[tuple[str, int]]) -> None:
    table, now_s = HealthTable(), 0.0
    for event, pause in events:
        now_s += pause
        before = table.state(ONE)
        match event:
            case "answered" | "late":
                changed = table.answered(ONE, 2 * LATE_US if event == "late" else 1000, now_s)
            case "missed":
                changed = table.missed(ONE, now_s)
            case "heard":
                changed = table.heard(ONE, now_s)
            case _:
                changed = table.unreachable(ONE, now_s)
        assert changed == (table.state(ONE) != before)
        if event in ("answered", "late", "heard"):
            assert is_usable(table.state(ONE))
        if event == "missed" and before in (ALIVE, UNKNOWN):
            assert is_usable(table.state(ONE))


def test_strangers_do_not_fill_the_memory() -> None:
    table = HealthTable(most=8)
    for number in range(100):
        table.missed(number.to_bytes(32, "big"), 0.0)
    assert len(table._vitals) == 8
