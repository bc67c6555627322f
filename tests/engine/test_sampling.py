from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nexus.core.errors import NexusError, UsageError
from nexus.engine.sampling import nucleus, sample, uniform
from nexus.proof.arithmetic.sampler import GREEDY, Sampling, penalised
from nexus.proof.receipts import MICRO, millionths
from tests.swarm.ring import manifest, plan_for, terms_for

LOGITS = arrays(np.float32, st.integers(1, 60), elements=st.floats(-50, 50, width=32))
SEEDS = st.integers(0, 2**64 - 1)
STEPS = st.integers(0, 2**32)
TEMPERATURES = st.floats(1e-3, 50)
TOP_P = st.floats(0, 1, exclude_min=True)


@given(SEEDS, STEPS)
def test_uniform_is_in_range(seed: int, step: int) -> None:
    assert 0 <= uniform(seed, step) < 1


def test_uniform_is_pinned() -> None:
    """Other implementations draw the same numbers."""
    assert [uniform(0, 0), uniform(7, 3)] == [0.44020198224250606, 0.08953445925259873]


@given(LOGITS, STEPS)
def test_greedy_takes_the_first_of_the_highest(logits: np.ndarray, step: int) -> None:
    assert sample(logits, GREEDY, step) == int(np.flatnonzero(logits == logits.max())[0])


@given(LOGITS, TEMPERATURES, TOP_P, SEEDS, STEPS)
def test_a_draw_is_repeatable_and_in_the_nucleus(
    logits: np.ndarray, temperature: float, top_p: float, seed: int, step: int
) -> None:
    sampling = Sampling(temperature, top_p, seed)
    token = sample(logits, sampling, step)
    assert token == sample(logits.copy(), sampling, step)
    assert token in nucleus(logits, sampling)[0]


@given(LOGITS, TEMPERATURES, TOP_P)
def test_the_nucleus_is_the_smallest_that_reaches_top_p(logits: np.ndarray, temperature: float, top_p: float) -> None:
    tokens, cumulative = nucleus(logits, Sampling(temperature, top_p))
    assert len(set(tokens.tolist())) == len(tokens) >= 1
    assert np.all(np.diff(logits[tokens]) <= 0), "likeliest first"
    assert np.all(cumulative[:-1] < top_p)
    assert cumulative[-1] >= top_p or len(tokens) == len(logits)
    if len(tokens) < len(logits):
        assert np.delete(logits, tokens).max() <= logits[tokens[-1]]


@given(LOGITS, SEEDS, STEPS)
def test_a_tiny_top_p_is_greedy(logits: np.ndarray, seed: int, step: int) -> None:
    assert sample(logits, Sampling(1.0, 1e-12, seed), step) == sample(logits, GREEDY, step)


def test_draws_follow_the_softmax() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    draws = np.bincount([sample(logits, Sampling(1.0, 1.0, seed), 0) for seed in range(4000)], minlength=4) / 4000
    # Five standard deviations of a binomial share at most.
    assert np.all(np.abs(draws - [0.5, 0.3, 0.15, 0.05]) < 5 * math.sqrt(0.25 / 4000))


def test_extreme_temperatures_do_not_break() -> None:
    logits = np.array([-1e30, 3.0, 1e30], np.float32)
    assert sample(logits, Sampling(5e-324), 0) == 2
    assert sample(logits, Sampling(100.0), 0) in range(3)


@given(LOGITS, TEMPERATURES, st.integers(1, 70), st.floats(0, 1))
def test_top_k_and_min_p_take_away_from_the_end(logits: np.ndarray, temperature: float, top_k: int, min_p: float) -> None:
    everything = nucleus(logits, Sampling(temperature))[0].tolist()
    tokens = nucleus(logits, Sampling(temperature, top_k=top_k, min_p=min_p))[0].tolist()
    assert tokens == everything[: len(tokens)]
    assert 1 <= len(tokens) <= top_k
    shares = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    assert np.all(shares[tokens] >= min_p)
    left_out = [token for token in everything[:top_k] if token not in tokens]
    assert np.all(shares[left_out] < min_p)


def test_the_repetition_penalty_divides_what_is_positive_and_multiplies_what_is_not() -> None:
    logits = np.array([4.0, 3.0, -1.0, -1.5], np.float32)
    twice = Sampling(repetition_penalty=2.0)
    assert penalised(logits, [0, 2, 0], twice).tolist() == [2.0, 3.0, -2.0, -1.5]
    assert logits.tolist() == [4.0, 3.0, -1.0, -1.5]
    assert penalised(logits, [], twice) is logits
    assert penalised(logits, [0], GREEDY) is logits
    assert sample(logits, twice, 0) == 0
    assert sample(logits, twice, 0, [0]) == 1
    assert sample(np.array([3e38, -3e38], np.float32), Sampling(repetition_penalty=0.01), 0, [0, 1]) == 0


def test_terms_say_it_in_millionths() -> None:
    model = manifest()
    plan = plan_for(model, 1)
    terms = replace(
        terms_for(model, plan, [b"1234"], 1),
        temperature=700_001,
        top_k=40,
        top_p=950_003,
        min_p=49_999,
        repetition_penalty=1_100_007,
        seed=9,
    )
    assert Sampling.of(terms) == Sampling(0.700001, 0.950003, 9, 40, 0.049999, 1.100007)


@given(st.integers(0, 100 * MICRO))
def test_millionths_come_back(count: int) -> None:
    assert millionths(count / MICRO) == count


@pytest.mark.parametrize(
    "arguments",
    [
        (-0.1, 1.0, 0),
        (math.nan, 1.0, 0),
        (math.inf, 1.0, 0),
        (1.0, 0.0, 0),
        (1.0, 1.1, 0),
        (1.0, math.nan, 0),
        (1, 1, -1),
        (1, 1, 2**64),
        (100.1,),
        (1, 1, 0, -1),
        (1, 1, 0, 2**24 + 1),
        (1, 1, 0, 0, -0.1),
        (1, 1, 0, 0, 1.1),
        (1, 1, 0, 0, math.nan),
        (1, 1, 0, 0, 0, 0),
        (1, 1, 0, 0, 0, 101),
        (1, 1, 0, 0, 0, math.nan),
    ],
)
def test_impossible_settings_are_refused(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(UsageError):
        Sampling(*arguments)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0)])
def test_logits_that_are_no_numbers_are_an_error(bad: float, sampling: Sampling) -> None:
    with pytest.raises(NexusError, match="not a number"):
        sample(np.array([0.0, bad, 1.0], np.float32), sampling, 0)
