"""Whose turn it is when: soon after news, seldom in quiet times, later after failures, late and then not at all for cheats."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nexus.memory import sync_schedule
from nexus.memory.item_set import Item
from nexus.memory.sync import Outcome
from nexus.memory.sync_conduct import DROP_MAX_S, DROP_MIN_S, FORGET_S, Conduct, Standing
from nexus.memory.sync_messages import WANT_MAX
from nexus.memory.sync_schedule import (
    ABSENT_AGAIN_S,
    BARREN_MAX,
    CHANGE_FANOUT,
    CLAIM_S,
    DEMOTED_DELAY_S,
    DEMOTED_WANT_MAX,
    GAP_S,
    HINTS_MAX,
    INTERVAL_MAX_S,
    INTERVAL_MIN_S,
    NEWS_SPREAD_S,
    PAIRS_MAX,
    PEERS_MAX,
    RETRY_MAX_S,
    RETRY_MIN_S,
    Start,
    SyncSchedule,
    SyncStatus,
)

ONE, TWO = b"\1" * 32, b"\2" * 32
SAME = Outcome(True, False, "", True, 0, 0, 0, 0, (), 0, 10)
BROKEN = Outcome.not_begun("the stream broke")
CHEATED = replace(BROKEN, offence=True, cause="bad signature")
ITEMS = [Item(2**40 + at, at.to_bytes(32, "big")) for at in range(5000)]


def _schedule(*peers: str, collection: bytes = ONE, at_once: int = 4) -> SyncSchedule:
    schedule = SyncSchedule(b"seed", at_once)
    for peer in peers:
        assert schedule.add(peer, collection, 0.0)
    return schedule


def _status(schedule: SyncSchedule, peer: str, now_s: float, collection: bytes = ONE) -> SyncStatus:
    return next(one for one in schedule.status(now_s) if (one.peer, one.collection) == (peer, collection))


def _next_try(schedule: SyncSchedule, now_s: float, peer: str = "a") -> float:
    at_s = _status(schedule, peer, now_s).next_try_s
    assert at_s is not None
    return at_s


def _through(schedule: SyncSchedule, now_s: float, outcome: Outcome) -> float:
    """Let the only pair have its turn; when that was."""
    now_s = max(now_s, _next_try(schedule, now_s))
    assert len(schedule.next(now_s)) == 1
    schedule.finished("a", ONE, outcome, now_s)
    return now_s


def test_quiet_pairs_are_compared_less_and_less_often() -> None:
    schedule, now_s, waits = _schedule("a"), 0.0, list[float]()
    for _ in range(12):
        ended_s = _through(schedule, now_s, SAME)
        now_s = _next_try(schedule, ended_s)
        assert schedule.next_due_s(ended_s) == now_s
        waits.append(now_s - ended_s)
    # Each is between half an interval and all of it, and the interval doubles to its end.
    for number, wait_s in enumerate(waits):
        interval_s = min(INTERVAL_MAX_S, INTERVAL_MIN_S * 2.0 ** (number + 1))
        assert interval_s / 2 <= wait_s <= interval_s
    schedule.changed(ONE, now_s - 20.0)
    assert _next_try(schedule, now_s - 20.0) <= now_s - 20.0 + INTERVAL_MIN_S
    ended_s = _through(schedule, now_s, replace(SAME, needed=3, accepted=3))
    assert _next_try(schedule, ended_s) - ended_s <= INTERVAL_MIN_S


def test_failures_wait_twice_as_long_each_time() -> None:
    schedule, now_s = _schedule("a"), 0.0
    for number in range(14):
        now_s = _through(schedule, now_s, BROKEN)
        wait_s = min(RETRY_MAX_S, RETRY_MIN_S * 2.0**number)
        assert wait_s / 2 <= _next_try(schedule, now_s) - now_s <= wait_s or number == 0
        status = _status(schedule, "a", now_s)
        assert (status.failures, status.state, status.cause) == (number + 1, "retrying", "the stream broke")
    # News does not shorten that, nor does a change; coming back does.
    before_s = _next_try(schedule, now_s)
    assert not schedule.heard("a", ONE, ITEMS[:1], 0, now_s)
    schedule.changed(ONE, now_s)
    assert _next_try(schedule, now_s) == before_s
    schedule.lost("a")
    assert _status(schedule, "a", now_s).state == "offline"
    assert schedule.next(before_s + 1) == []
    schedule.add("a", ONE, now_s)
    assert _next_try(schedule, now_s) <= now_s + RETRY_MIN_S
    _through(schedule, now_s, SAME)
    assert _status(schedule, "a", now_s).failures == 0


def test_at_most_so_many_at_once_and_one_per_peer() -> None:
    schedule = _schedule(*"abcdef", at_once=3)
    for peer in "abcdef":
        schedule.add(peer, TWO, 0.0)
    starts = schedule.next(1.0)
    assert len(starts) == 3
    assert len({start.peer for start in starts}) == 3
    assert max([start.collection for start in starts].count(one) for one in (ONE, TWO)) == 2
    assert schedule.next(1.0) == []
    assert schedule.next_due_s(1.0) is None
    schedule.finished(starts[0].peer, starts[0].collection, SAME, 1.0)
    assert len(schedule.next(1.0)) == 1


def test_who_asks_gets_a_comparison_now() -> None:
    schedule = _schedule("a", "b", at_once=1)
    now_s = 0.0
    schedule.remove(ONE, "b")
    for _ in range(8):
        now_s = _through(schedule, now_s, SAME)
    schedule.heard("a", ONE, ITEMS[:1], 0, now_s)
    assert schedule.begin("a", ONE, now_s) == Start("a", ONE, (), WANT_MAX)
    assert schedule.begin("a", ONE, now_s) is None
    assert schedule.claim("a", ONE, ITEMS[:1], now_s) == ITEMS[:1]
    schedule.finished("a", ONE, SAME, now_s)
    assert _next_try(schedule, now_s) > now_s + GAP_S
    assert schedule.begin("b", ONE, now_s) is None
    for _ in range(3):
        schedule.offend("a", now_s)
    assert schedule.begin("a", ONE, now_s) is None
    schedule.add("b", ONE, now_s)
    schedule.lost("b")
    assert schedule.begin("b", ONE, now_s) is None


def test_everyone_has_a_turn() -> None:
    schedule = _schedule(*"abcdefgh", at_once=1)
    seen = list[str]()
    for turn in range(24):
        # Each comparison takes longer than the shortest interval, so that all are always due.
        now_s = 1.0 + 10.0 * turn
        (start,) = schedule.next(now_s)
        schedule.finished(start.peer, ONE, replace(SAME, accepted=1, needed=1), now_s)
        seen.append(start.peer)
    assert {seen.count(peer) for peer in "abcdefgh"} == {3}


def test_news_is_pulled_soon_from_the_one_who_has_it() -> None:
    schedule = _schedule("a", "b")
    for start in schedule.next(1.0):
        schedule.finished(start.peer, ONE, SAME, 1.0)
    schedule.finished("b", ONE, SAME, 1.0)
    assert schedule.heard("a", ONE, ITEMS[:2], 0, 2.0)
    assert schedule.heard("a", ONE, ITEMS[2:3], 0, 2.1)
    due_s = schedule.next_due_s(2.1)
    assert due_s is not None
    assert due_s <= 2.0 + NEWS_SPREAD_S + GAP_S
    assert schedule.next(due_s) == [Start("a", ONE, tuple(ITEMS[:3]), WANT_MAX)]
    # More of it while it runs waits for the next turn.
    assert schedule.heard("a", ONE, ITEMS[3:4], 0, due_s)
    before = _status(schedule, "b", due_s).next_try_s
    schedule.finished("a", ONE, replace(SAME, complete=False, needed=3, accepted=3), due_s)
    assert _status(schedule, "b", due_s).next_try_s == before
    assert due_s + GAP_S <= _next_try(schedule, due_s) <= due_s + GAP_S + NEWS_SPREAD_S
    assert not schedule.heard("a", ONE, [], 0, 2.0)


def test_when_a_comparison_is_due_it_finds_the_news_as_well() -> None:
    schedule = _schedule("a")
    assert schedule.heard("a", ONE, ITEMS[:2], 0, 0.0)
    assert schedule.next(10.0) == [Start("a", ONE, (), WANT_MAX)]
    schedule.finished("a", ONE, SAME, 10.0)
    assert _next_try(schedule, 10.0) > 10.0 + GAP_S + NEWS_SPREAD_S


def test_of_much_news_there_is_a_comparison() -> None:
    schedule = _schedule("a")
    now_s = 0.0
    for _ in range(8):
        now_s = _through(schedule, now_s, SAME)
    assert _next_try(schedule, now_s) > now_s + 100
    assert schedule.heard("a", ONE, [], 1000, now_s)
    due_s = _next_try(schedule, now_s)
    # Whoever always says so has no more of it than one comparison in five seconds.
    assert now_s + INTERVAL_MIN_S <= due_s <= now_s + INTERVAL_MIN_S + NEWS_SPREAD_S
    assert schedule.next(due_s) == [Start("a", ONE, (), WANT_MAX)]


def test_news_of_strangers_starts_a_comparison_now_and_then() -> None:
    schedule = _schedule("a", "b")
    for now_s in (1.0, 11.0, 31.0, 71.0, 151.0):
        for start in schedule.next(now_s):
            schedule.finished(start.peer, ONE, SAME, now_s)
    assert min(_next_try(schedule, 151.0, peer) for peer in "ab") > 200.0
    assert schedule.heard("stranger", ONE, ITEMS[:1], 0, 160.0)
    assert not schedule.heard("stranger", ONE, ITEMS[:1], 0, 160.1)
    assert sorted(_next_try(schedule, 160.0, peer) < 161.0 for peer in "ab") == [False, True]
    assert not schedule.heard("stranger", TWO, ITEMS[:1], 0, 160.0)


def test_news_that_leads_to_nothing_is_not_listened_to() -> None:
    schedule, now_s = _schedule("a"), 1.0
    for _ in range(5):
        now_s = _through(schedule, now_s, SAME)
    for number in range(BARREN_MAX):
        assert schedule.heard("a", ONE, ITEMS[number : number + 1], 0, now_s)
        now_s += 2.0
        (start,) = schedule.next(now_s)
        assert start.items
        schedule.finished("a", ONE, replace(SAME, complete=False, needed=1, absent=(start.items[0].id,)), now_s)
    assert not schedule.heard("a", ONE, ITEMS[10:11], 0, now_s)
    assert not schedule.heard("a", ONE, [], 99, now_s)
    now_s = _through(schedule, now_s, replace(SAME, needed=2, accepted=2))
    assert schedule.heard("a", ONE, ITEMS[10:11], 0, now_s)


def test_what_a_peer_had_no_block_for_is_not_asked_of_it_again_for_a_time() -> None:
    schedule = _schedule("a")
    gone = ITEMS[0].id
    now_s = _through(schedule, 1.0, replace(SAME, needed=1, absent=(gone,)))
    status = _status(schedule, "a", now_s)
    assert (status.in_sync, status.missing) == (False, 1)
    assert not schedule.heard("a", ONE, ITEMS[:1], 0, now_s)
    later_s = max(now_s, _next_try(schedule, now_s))
    schedule.next(later_s)
    assert schedule.claim("a", ONE, ITEMS[:2], later_s) == ITEMS[1:2]
    assert schedule.claim("a", ONE, ITEMS[:2], now_s + ABSENT_AGAIN_S) == ITEMS[:2]
    schedule.finished("a", ONE, replace(SAME, needed=2, accepted=1, skipped=1), later_s)
    status = _status(schedule, "a", later_s)
    assert (status.in_sync, status.missing) == (False, 1)


def test_no_block_is_under_way_from_two_peers() -> None:
    schedule = _schedule("a", "b")
    assert len(schedule.next(1.0)) == 2
    assert schedule.claim("a", ONE, ITEMS[:3], 1.0) == ITEMS[:3]
    assert schedule.claim("a", ONE, ITEMS[:3], 1.0) == ITEMS[:3]
    assert schedule.claim("b", ONE, ITEMS[1:5], 1.0) == ITEMS[3:5]
    assert schedule.claim("c", ONE, ITEMS, 1.0) == []
    # One fails: the others' next turn gets what it was at.
    schedule.finished("a", ONE, BROKEN, 1.0)
    assert schedule.claim("b", ONE, ITEMS[:3], 1.0) == ITEMS[:3]
    schedule.finished("b", ONE, replace(SAME, needed=4, skipped=2, accepted=2), 1.0)
    status = _status(schedule, "b", 1.0)
    assert (status.in_sync, status.missing) == (False, 2)
    assert _next_try(schedule, 1.0, "b") <= 1.0 + INTERVAL_MIN_S
    assert schedule.claim("b", ONE, ITEMS[:3], 1.0) == []


def test_a_slow_peer_does_not_keep_blocks_from_others() -> None:
    schedule = _schedule("a", "b")
    schedule.next(1.0)
    assert schedule.claim("a", ONE, ITEMS[:3], 1.0) == ITEMS[:3]
    assert schedule.claim("b", ONE, ITEMS[:3], CLAIM_S) == []
    assert schedule.claim("b", ONE, ITEMS[:3], 1.0 + CLAIM_S) == ITEMS[:3]
    # The end of the first does not free what the second is at.
    schedule.finished("a", ONE, BROKEN, 2.0 + CLAIM_S)
    schedule.add("c", ONE, 0.0)
    assert [start.peer for start in schedule.next(3.0 + CLAIM_S)] == ["c"]
    assert schedule.claim("c", ONE, ITEMS[:4], 3.0 + CLAIM_S) == ITEMS[3:4]


def test_what_came_from_someone_else_is_not_missing() -> None:
    schedule = _schedule("a")
    now_s = _through(schedule, 1.0, replace(SAME, needed=4, accepted=1, skipped=3, have=2))
    status = _status(schedule, "a", now_s)
    assert (status.in_sync, status.missing, status.behind, status.last_success_s) == (True, 0, 2, now_s)


def test_a_session_that_could_not_finish_goes_on_soon_if_it_brought_something() -> None:
    schedule = _schedule("a")
    now_s = _through(schedule, 1.0, replace(SAME, complete=False, needed=5, accepted=5))
    assert _next_try(schedule, now_s) == now_s + GAP_S
    now_s = _through(schedule, now_s, replace(SAME, complete=False, needed=5))
    assert _next_try(schedule, now_s) >= now_s + INTERVAL_MIN_S
    assert not _status(schedule, "a", now_s).in_sync


def test_who_cheats_is_demoted_then_dropped_for_ever_longer() -> None:
    schedule = _schedule("a", "b")
    for start in schedule.next(1.0):
        schedule.finished(start.peer, ONE, CHEATED if start.peer == "a" else BROKEN, 1.0)
    assert schedule.standing("a", 1.0) is Standing.DEMOTED
    assert _status(schedule, "a", 1.0).state == "demoted"
    assert _next_try(schedule, 1.0) >= 1.0 + DEMOTED_DELAY_S
    assert schedule.standing("b", 1.0) is Standing.GOOD
    assert not schedule.heard("a", ONE, ITEMS[:1], 0, 1.0)
    schedule.remove(ONE, "b")
    now_s = max(1.0, _next_try(schedule, 1.0))
    assert schedule.next(now_s) == [Start("a", ONE, (), DEMOTED_WANT_MAX)]
    schedule.finished("a", ONE, CHEATED, now_s)
    now_s = _through(schedule, now_s, CHEATED)
    assert schedule.standing("a", now_s) is Standing.DROPPED
    assert _next_try(schedule, now_s) == now_s + DROP_MIN_S
    assert schedule.next(now_s + DROP_MIN_S - 1) == []
    assert schedule.next_due_s(now_s) == now_s + DROP_MIN_S
    # Connecting anew changes nothing.
    schedule.lost("a")
    schedule.add("a", ONE, now_s)
    assert _next_try(schedule, now_s) == now_s + DROP_MIN_S
    assert schedule.standing("a", now_s + DROP_MIN_S) is Standing.DEMOTED
    now_s = _through(schedule, now_s, CHEATED)
    now_s = _through(schedule, now_s, CHEATED)
    assert _next_try(schedule, now_s) == now_s + 2 * DROP_MIN_S


def test_conduct_fades() -> None:
    conduct = Conduct()
    assert conduct.standing(0.0) is Standing.GOOD
    conduct.offend(0.0)
    assert conduct.standing(FORGET_S * 0.99) is Standing.DEMOTED
    assert conduct.standing(FORGET_S * 1.01) is Standing.GOOD
    longest = 0.0
    for number in range(60):
        conduct.offend(1e7 + number)
        longest = max(longest, conduct.dropped_until_s - 1e7 - number)
    assert longest == DROP_MAX_S
    assert conduct.standing(conduct.dropped_until_s + 2 * FORGET_S) is Standing.GOOD


def test_an_offence_at_the_responder_counts_as_well() -> None:
    schedule = _schedule("a")
    for _ in range(3):
        schedule.offend("a", 1.0)
    assert schedule.next(2.0) == []
    assert _status(schedule, "a", 1.0).state == "dropped"


def test_unsubscribing_ends_everything() -> None:
    schedule = _schedule("a", "b")
    schedule.next(1.0)
    schedule.claim("a", ONE, ITEMS[:1], 1.0)
    schedule.remove(ONE)
    assert schedule.status(1.0) == []
    schedule.finished("a", ONE, SAME, 1.0)
    assert schedule.next_due_s(1.0) is None
    schedule.add("b", ONE, 1.0)
    schedule.next(2.0)
    assert schedule.claim("b", ONE, ITEMS[:1], 2.0) == ITEMS[:1]


def test_what_peers_can_make_grow_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = _schedule("a")
    _through(schedule, 1.0, replace(SAME, absent=tuple(item.id for item in ITEMS)))
    pair = schedule._pairs["a", ONE]
    assert len(pair.absent) == sync_schedule.ABSENT_MAX
    schedule.heard("a", ONE, [Item(2**40, at.to_bytes(32, "little")) for at in range(1, 3000)], 0, 1.0)
    assert len(pair.hints) == HINTS_MAX
    for number in range(PEERS_MAX + 10):
        schedule.offend(f"p{number}", 1.0)
    assert len(schedule._conducts) == PEERS_MAX
    monkeypatch.setattr(sync_schedule, "PAIRS_MAX", 3)
    assert schedule.add("b", ONE, 1.0)
    assert schedule.add("c", ONE, 1.0)
    assert not schedule.add("d", ONE, 1.0)
    schedule.lost("b")
    assert schedule.add("d", ONE, 1.0)
    assert [status.peer for status in schedule.status(1.0)] == ["a", "c", "d"]
    assert PAIRS_MAX == 4096


def test_the_same_seed_gives_the_same_times() -> None:
    times = [SyncSchedule(seed) for seed in (b"x", b"x", b"y")]
    for schedule in times:
        schedule.add("a", ONE, 0.0)
    due = [schedule.next_due_s(-1.0) for schedule in times]
    assert due[0] == due[1] != due[2]


def test_changes_look_at_a_few_peers_only() -> None:
    schedule = _schedule(*"abcdefgh", at_once=100)
    last_s = 0.0
    for now_s in (1.0, 12.0, 33.0, 74.0, 155.0, 316.0):
        while starts := schedule.next(now_s):
            for start in starts:
                schedule.finished(start.peer, ONE, SAME, now_s)
        last_s = now_s
    quiet = [_next_try(schedule, last_s, peer) for peer in "abcdefgh"]
    assert min(quiet) > last_s + 2 * INTERVAL_MIN_S
    schedule.changed(ONE, last_s + 1)
    soon = [_next_try(schedule, last_s, peer) <= last_s + 1 + INTERVAL_MIN_S for peer in "abcdefgh"]
    assert sum(soon) == CHANGE_FANOUT
