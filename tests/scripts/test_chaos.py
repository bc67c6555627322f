"""What scripts/chaos decides without any process: which fault comes next, and whether an answer counts as lost."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest

from scripts.chaos_runs.faults import AWAY_S, KINDS, faults
from scripts.chaos_runs.report import loss_of, report_of
from scripts.chaos_runs.streams import Answer, Request, requests_of

VICTIMS = ("node-2", "node-3", "node-4")
REQUEST = Request("Why?", 10, 0.0, 1)
WHOLE = Answer(REQUEST, 0.0, [5, 6, 7], "because it is", "length", first_s=0.1, pause_s=0.02, plans=1, verified=True)


def test_faults_follow_from_the_seed_and_every_four_have_every_kind() -> None:
    first = list(islice(faults(3, VICTIMS), 40))
    assert first == list(islice(faults(3, VICTIMS), 40))
    assert first != list(islice(faults(4, VICTIMS), 40))
    for start in range(0, 40, len(KINDS)):
        assert sorted(fault.kind for fault in first[start : start + len(KINDS)]) == sorted(KINDS)
    for fault in first:
        assert sorted(fault.order) == sorted(VICTIMS)
        low, high = AWAY_S[fault.kind]
        assert low <= fault.away_s <= high
    assert {fault.order[0] for fault in first} == set(VICTIMS)


def test_streams_ask_different_things_at_a_time_and_all_of_them() -> None:
    requests = [replace(REQUEST, seed=seed) for seed in range(8)]
    asked = [list(islice(requests_of(stream, requests), 8)) for stream in range(4)]
    assert len({each[0] for each in asked}) == 4
    assert all({one.seed for one in each} == set(range(8)) for each in asked)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (replace(WHOLE), ""),
        (replace(WHOLE, pause_s=9.0, plans=3), ""),
        (replace(WHOLE, error="UnreachableError: gone", tokens=[5]), "gone"),
        (replace(WHOLE, tokens=[5, 9, 7]), "from token 1 on"),
        (replace(WHOLE, tokens=[5, 6]), "from token 2 on (2 tokens instead of 3"),
        (replace(WHOLE, tokens=[5, 6, 6, 7]), "from token 2 on"),
        (replace(WHOLE, text="because it was"), "differs"),
        (replace(WHOLE, reason="stop"), "differs"),
        (replace(WHOLE, verified=False), "not every receipt"),
    ],
)
def test_an_answer_is_lost_unless_it_is_the_undisturbed_one(answer: Answer, says: str) -> None:
    loss = loss_of(2, answer, WHOLE)
    assert (loss is None) == (not says)
    if loss is not None:
        assert says in loss.why
        assert loss.stream == 2


def test_a_run_holds_only_where_something_was_asked_something_failed_and_nothing_was_lost() -> None:
    def held(answers: list[list[Answer]], faults: dict[str, int], problems: list[str]) -> bool:
        return report_of({"seed": 1, "minutes": 1, "nodes": 5}, {REQUEST: WHOLE}, answers, faults, problems, 0.0).held

    good, lost = [[WHOLE], [replace(WHOLE, plans=2)]], [[WHOLE], [replace(WHOLE, tokens=[5])]]
    assert held(good, {"kill": 1}, [])
    assert not held(lost, {"kill": 1}, [])
    assert not held(good, {}, [])
    assert not held([[]], {"kill": 1}, [])
    assert not held(good, {"kill": 1}, ["node-2 did not end"])
