"""Maps between MiniLM's space and others, on real sentences."""

from __future__ import annotations

import numpy as np
import pytest

from nexus.memory.space_map import fit_map, join_parts

SOURCE, TARGET = b"s" * 32, b"t" * 32


@pytest.fixture(scope="module")
def mixed(vectors: np.ndarray) -> np.ndarray:
    """In no order: neighbours in a text are alike, and those held out must not be told by them."""
    return vectors[np.random.default_rng(0).permutation(len(vectors))]


def test_a_turned_space(mixed: np.ndarray) -> None:
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((384, 384)))[0]
    made = fit_map(SOURCE, TARGET, mixed, mixed @ turn)
    assert made.recall >= 0.98
    assert len(made.to_parts()) == 4
    assert join_parts(made.to_parts()).recall_ppm == made.recall_ppm


def test_a_smaller_model(mixed: np.ndarray) -> None:
    """The first 64 principal components, as a smaller model of the same kind."""
    _, _, axes = np.linalg.svd(mixed - mixed.mean(0), full_matrices=False)
    small = mixed @ axes[:64].T
    assert fit_map(SOURCE, TARGET, mixed, small).recall >= 0.9
    back = fit_map(TARGET, SOURCE, small, mixed)
    assert 0.7 <= back.recall < 0.95  # what was left out does not come back
    assert back.may_answer


def test_a_model_that_has_nothing_to_do_with_it(mixed: np.ndarray) -> None:
    made = fit_map(SOURCE, TARGET, mixed, np.random.default_rng(2).standard_normal((1000, 64)))
    assert made.recall < 0.05
    assert not made.may_answer
