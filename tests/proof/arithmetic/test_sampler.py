"""The exact sampler against plain definitions: options as a few lines of Python integers, draws as float64 softmax."""

from __future__ import annotations

import ast
import inspect
import math
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy._core._multiarray_umath import __cpu_dispatch__

from nexus.core.errors import ModelFormatError, NexusError, UsageError
from nexus.core.hashing import tagged_hash
from nexus.proof.arithmetic import sampler
from nexus.proof.arithmetic.bounds import VOCAB_MAX
from nexus.proof.arithmetic.sampler import GREEDY, Sampling, candidates, ordered, sample_exact, weights_of
from nexus.proof.arithmetic.tables import exp_tables
from nexus.proof.receipts import MICRO
from tests.vectors.make import DIRECTORY

TABLES = exp_tables()
ONE = 1 << 40
# Few distinct values make many equals; wide ones make gaps beyond anything that weighs.
VALUES = st.one_of(
    st.floats(-50, 50, width=32),
    st.sampled_from([-0.0, 0.0, 1.0, 1.00001, 2.0]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
LOGITS = arrays(np.float32, st.integers(1, 60), elements=VALUES)
SAMPLINGS = st.builds(
    Sampling,
    temperature=st.integers(1, 100 * MICRO).map(lambda t: t / MICRO) | st.floats(0.1, 2),
    top_p=st.floats(0, 1, exclude_min=True) | st.just(1.0),
    seed=st.integers(0, 2**64 - 1),
    top_k=st.integers(0, 70),
    min_p=st.floats(0, 1) | st.just(0.0),
    repetition_penalty=st.floats(0.01, 100) | st.just(1.0),
)
STEPS = st.integers(0, 2**32)


def reference(logits: np.ndarray, sampling: Sampling, step: int, seen: list[int]) -> int:
    """What docs/protocol.md says, in exact rational arithmetic and Python integers but for the float operations that it names."""
    largest = float(np.finfo(np.float32).max)
    penalty = round(sampling.repetition_penalty * MICRO) / MICRO
    values = [float(value) for value in logits]
    for token in set(seen) if penalty != 1 else ():
        changed = values[token] / penalty if values[token] > 0 else values[token] * penalty
        values[token] = float(np.float32(min(max(changed, -largest), largest)))
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    temperature = round(sampling.temperature * MICRO)
    if temperature == 0:
        return order[0]
    if sampling.top_k:
        order = order[: sampling.top_k]
    units = [round(Fraction(values[token]) * 65536) for token in order]  # half to even, as rint
    weights = []
    for unit in units:
        index = min(math.floor(Fraction((units[0] - unit) * MICRO, 2 * temperature) + Fraction(1, 2)), 254 * 4096)
        weights.append(round(float(TABLES[0][index // 4096]) * float(TABLES[1][index % 4096]) * 2.0**40))
    kept, total = [], 0
    for weight in weights:
        if weight * MICRO < round(sampling.min_p * MICRO) * ONE:
            break
        kept.append(weight)
        total += weight
        if total * MICRO >= round(sampling.top_p * MICRO) * sum(weights):
            break
    digest = tagged_hash("sample", sampling.seed.to_bytes(8, "little"), step.to_bytes(8, "little"))
    point = int.from_bytes(digest[:8], "little") * total >> 64
    for token, weight in zip(order, kept, strict=False):
        if point < weight:
            return token
        point -= weight
    raise AssertionError("the point lies beyond the total")


@given(LOGITS, SAMPLINGS, STEPS, st.data())
def test_it_does_what_the_protocol_says(logits: np.ndarray, sampling: Sampling, step: int, data: st.DataObject) -> None:
    seen = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=8))
    assert sample_exact(logits, sampling, step, TABLES, seen) == reference(logits, sampling, step, seen)


@given(LOGITS, SAMPLINGS, STEPS)
def test_memory_order_and_copies_do_not_matter(logits: np.ndarray, sampling: Sampling, step: int) -> None:
    token = sample_exact(logits, sampling, step, TABLES, [0])
    strided = np.zeros((len(logits), 3), np.float32)
    strided[:, 1] = logits
    reversed_twice = logits[::-1].copy()[::-1]
    unaligned = np.frombuffer(b"\0" + logits.tobytes(), np.uint8)[1:].view(np.float32)
    for same in (logits.copy(), strided[:, 1], reversed_twice, unaligned):
        before = same.tobytes()
        assert sample_exact(same, sampling, step, TABLES, [0]) == token
        assert same.tobytes() == before, "the logits are the caller's"


@given(LOGITS, STEPS, st.integers(0, 2**64 - 1))
def test_greedy_and_its_limits_agree(logits: np.ndarray, step: int, seed: int) -> None:
    best = int(np.flatnonzero(logits == logits.max())[0])
    assert sample_exact(logits, GREEDY, step, TABLES) == best
    assert sample_exact(logits, Sampling(1.0, 1.0, seed, top_k=1), step, TABLES) == best
    assert sample_exact(logits, Sampling(1.0, 1 / MICRO, seed), step, TABLES) == best


@given(LOGITS, SAMPLINGS)
def test_each_option_only_takes_away_from_the_end(logits: np.ndarray, sampling: Sampling) -> None:
    everything = candidates(logits, Sampling(sampling.temperature), TABLES)[0]
    tokens, cumulative = candidates(logits, sampling, TABLES)
    assert len(set(tokens.tolist())) == len(tokens) >= 1
    assert tokens.tolist() == everything[: len(tokens)].tolist()
    assert np.all(np.diff(cumulative) >= 0)
    assert cumulative[0] == ONE
    if sampling.top_k:
        assert len(tokens) <= sampling.top_k


@given(LOGITS, st.floats(0.1, 10), st.floats(0.0, 1.0, exclude_min=True))
def test_top_p_is_the_fewest_that_reach_it(logits: np.ndarray, temperature: float, top_p: float) -> None:
    total = int(candidates(logits, Sampling(temperature), TABLES)[1][-1])
    cumulative = candidates(logits, Sampling(temperature, top_p), TABLES)[1].tolist()
    share = Fraction(round(top_p * MICRO), MICRO)
    assert Fraction(cumulative[-1], total) >= share
    assert all(Fraction(value, total) < share for value in cumulative[:-1])


@given(LOGITS, st.floats(0.1, 10), st.floats(0.0, 1.0))
def test_min_p_is_a_share_of_the_likeliest(logits: np.ndarray, temperature: float, min_p: float) -> None:
    tokens, cumulative = candidates(logits, Sampling(temperature, min_p=min_p), TABLES)
    everything, all_cumulative = candidates(logits, Sampling(temperature), TABLES)
    weights = np.diff(all_cumulative, prepend=0).tolist()
    least = Fraction(round(min_p * MICRO), MICRO) * ONE
    assert all(weight >= least for weight in np.diff(cumulative, prepend=0).tolist())
    assert all(weight < least for weight in weights[len(tokens) :] if weight)
    assert len(everything) >= len(tokens)


@given(LOGITS)
def test_the_order_is_that_of_a_stable_sort(logits: np.ndarray) -> None:
    assert ordered(logits, np.arange(len(logits))).tolist() == np.argsort(-logits, kind="stable").tolist()


@given(arrays(np.float32, st.integers(1, 60), elements=st.floats(-20, 20, width=32)), st.floats(0.25, 10))
def test_weights_are_those_of_the_softmax(logits: np.ndarray, temperature: float) -> None:
    logits = np.sort(logits)[::-1].copy()
    micro = round(temperature * MICRO)
    want = np.exp((logits.astype(np.float64) - logits[0]) / (micro / MICRO))
    got = weights_of(logits, micro, TABLES) / ONE
    # Two roundings of logits to 2^-17, over the temperature; one of x to 2^-16; one of the weight to 2^-41.
    assert np.all(np.abs(got - want) <= want * (2**-16 / temperature + 2**-16) * 1.01 + 2**-40)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.6),
        Sampling(1.5, top_k=7),
        Sampling(1.0, top_p=0.8),
        Sampling(1.0, min_p=0.1),
        Sampling(0.8, 0.95, 0, 20, 0.02, 1.3),
    ],
)
def test_draws_follow_the_softmax(sampling: Sampling) -> None:
    """Chi-square over 20,000 draws with fixed seeds against float64 softmax with the options in their order."""
    logits = np.random.default_rng(5).normal(0, 2, 30).astype(np.float32)
    seen = [3, 4, 5, 3]
    wide = logits.astype(np.float64)
    wide[seen] = np.where(wide > 0, wide / sampling.repetition_penalty, wide * sampling.repetition_penalty)[seen]
    shares = np.exp((wide - wide.max()) / sampling.temperature)
    order = np.argsort(-shares, kind="stable")[: sampling.top_k or None]
    kept = shares[order] / shares[order].sum()
    by_share = int(np.searchsorted(np.cumsum(kept), sampling.top_p)) + 1
    order = order[: min(by_share, int((kept >= sampling.min_p * kept[0]).sum()))]
    expected = np.zeros(len(logits))
    expected[order] = shares[order] / shares[order].sum()
    draws = 20_000
    counts = np.bincount([sample_exact(logits, sampling, step, TABLES, seen) for step in range(draws)], minlength=len(logits))
    assert not counts[expected == 0].any()
    likely = expected * draws >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    wanted = np.append(expected[likely], expected[~likely].sum()) * draws
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    freedom = len(wanted) - 1
    # The 99.9 % point of chi-square, by Wilson and Hilferty.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert ((observed - wanted) ** 2 / wanted).sum() < limit


def test_extreme_logits() -> None:
    largest = float(np.finfo(np.float32).max)
    seeds = [Sampling(100.0, seed=seed) for seed in range(200)]
    equal = np.full(8, -largest, np.float32)
    assert {sample_exact(equal, sampling, 0, TABLES) for sampling in seeds} == set(range(8))
    apart = np.array([-largest, 0.0, largest], np.float32)
    assert {sample_exact(apart, sampling, 0, TABLES) for sampling in seeds} == {2}
    close = np.array([largest, np.nextafter(np.float32(largest), np.float32(0))], np.float32)
    assert {sample_exact(close, sampling, 0, TABLES) for sampling in seeds} == {0}
    subnormal = np.array([1e-45, 0.0, -1e-45], np.float32)
    assert {sample_exact(subnormal, sampling, 0, TABLES) for sampling in seeds} == {0, 1, 2}
    coldest = Sampling(1 / MICRO)
    assert sample_exact(np.array([0.0, 1.0, 0.999], np.float32), coldest, 0, TABLES) == 1
    assert sample_exact(np.array([largest, 1.0], np.float32), Sampling(repetition_penalty=0.01), 0, TABLES, [0]) == 0


def test_the_largest_vocabulary_does_not_overflow() -> None:
    """2^22 equal logits: the total is 2^62."""
    logits = np.zeros(VOCAB_MAX, np.float32)
    assert candidates(logits, Sampling(1.0), TABLES)[1][-1] == 1 << 62
    token = sample_exact(logits, Sampling(1.0, seed=1), 0, TABLES)
    digest = tagged_hash("sample", (1).to_bytes(8, "little"), bytes(8))
    assert token == int.from_bytes(digest[:8], "little") >> 42
    with pytest.raises(ModelFormatError):
        sample_exact(np.zeros(VOCAB_MAX + 1, np.float32), GREEDY, 0, TABLES)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0), Sampling(1.0, repetition_penalty=2)])
def test_logits_that_are_no_numbers_are_an_error(bad: float, sampling: Sampling) -> None:
    with pytest.raises(NexusError, match="not a number"):
        sample_exact(np.array([0.0, bad, 1.0], np.float32), sampling, 0, TABLES, [1])


def test_other_arrays_are_refused() -> None:
    for wrong in (np.zeros(3), np.zeros((1, 3), np.float32), np.zeros(0, np.float32)):
        with pytest.raises(UsageError):
            sample_exact(wrong, GREEDY, 0, TABLES)  # type: ignore[arg-type]


def test_nothing_in_it_may_differ_between_machines() -> None:
    """Whoever adds a float sum or a math function meets this."""
    allowed = {
        "rint",
        "minimum",
        "subtract",
        "partition",
        "flatnonzero",
        "searchsorted",
        "count_nonzero",
        "nextafter",
        "cumsum",
        "errstate",
        "where",
        "clip",
        "asarray",
        "finfo",
    }
    allowed |= {"float32", "float64", "int32", "int64", "inf"}
    used = {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(sampler)))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "np"
    }
    assert used <= allowed
    weights = weights_of(np.zeros(4, np.float32), MICRO, TABLES)
    assert weights.dtype == np.int64, "what is summed are integers"


def test_the_draws_are_pinned() -> None:
    """Other implementations draw the same tokens."""
    logits = (np.arange(1000, dtype=np.float32) * np.float32(0.37)) % np.float32(11)
    sampling = Sampling(0.8, 0.95, 7, 40, 0.05, 1.1)
    drawn = [sample_exact(logits, sampling, step, TABLES, [29, 58]) for step in range(8)]
    assert drawn == [653, 862, 386, 981, 653, 505, 980, 802]


@pytest.mark.parametrize("first", range(len(__cpu_dispatch__)))
def test_numpy_without_its_vector_instructions_gives_the_golden_vectors(first: int) -> None:
    """numpy picks code by processor; older ones are had by taking instruction sets away, the newest first."""
    files = ("sampling.json", "arithmetic.json")
    program = f"import sys; from tests.vectors.make import text_of; sys.stdout.write(''.join(map(text_of, {files})))"
    disabled = {"NPY_DISABLE_CPU_FEATURES": " ".join(__cpu_dispatch__[first:])}
    command, root = [sys.executable, "-c", program], DIRECTORY.parents[1]
    done = subprocess.run(command, cwd=root, env=os.environ | disabled, capture_output=True, text=True, check=True)
    assert done.stdout == "".join((DIRECTORY / name).read_text(encoding="utf-8") for name in files)
