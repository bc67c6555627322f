"""The benchmark of verification checks what it times: a faster prover of something else would be no prover."""

from __future__ import annotations

import argparse

import pytest

from nexus.proof.receipts import WINDOW
from scripts.benchmarks import engine_store, models, verify
from scripts.benchmarks.verify_child import Bench

PROMPT = [5, 17, 99]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    directory = tmp_path_factory.mktemp("bench")
    engine_store.add(models.endless_nano(directory / "model"), directory / "store", "exact")
    return Bench(directory / "store")


def test_both_sides_of_the_overhead_decode_the_same(bench: Bench) -> None:
    answer = bench.overhead(PROMPT, WINDOW + 2)
    assert answer["same_tokens"]
    assert answer["proving_ms"] > answer["sealing_and_signing_ms"] > 0


def test_an_audit_finds_what_the_session_signed(bench: Bench) -> None:
    answer = bench.audit(PROMPT, 2 * WINDOW + 3)
    assert answer["same"]
    assert answer["traced_windows"] == 1
    assert answer["receipt_bytes"] < 8 * WINDOW * 4


def test_a_cells_products_pass_their_check(bench: Bench) -> None:
    answer = bench.cell(PROMPT, 3)
    assert answer["right"]
    assert answer["key_bytes"] < answer["weight_bytes"]


def test_a_summary_is_of_medians_and_says_whether_its_goal_is_met() -> None:
    answers = [{"ratio": ratio, "right": True, "ms": 2.0} for ratio in (0.01, 0.05, 0.9)]
    assert verify.summary(answers, 0.05) == {"ratio": 0.05, "goal": 0.05, "better": "lower", "met": True, "ms": 2.0}
    assert verify.summary(answers, 0.04)["met"] is False


def test_a_run_that_computed_wrongly_is_no_figure() -> None:
    good = {"same_tokens": True, "same": True, "right": True}
    assert all(verify._verdicts([good], [good], [good]).values())
    assert not all(verify._verdicts([good], [good, good | {"same": False}], [good]).values())


def test_shapes_that_there_are_not_are_named() -> None:
    with pytest.raises(SystemExit, match="abacus"):
        verify.run(argparse.Namespace(shapes="nano,abacus", quick=True, rounds=1, tokens=1, threads=1))
