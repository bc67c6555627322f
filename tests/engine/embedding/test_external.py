"""Vectors that are handed in are taken as directions, and refused where they have none."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.errors import UsageError
from nexus.engine.embedding.external import ExternalVectors


def test_what_is_taken_has_length_one() -> None:
    model = ExternalVectors("ours", 3)
    taken = model.take([[3, 0, 4], [1e-200, 0, 0], [0, -1e300, 1e300]])
    assert taken.dtype == np.float32
    assert np.allclose(taken, [[0.6, 0, 0.8], [1, 0, 0], [0, -(0.5**0.5), 0.5**0.5]])


@pytest.mark.parametrize(
    ("vectors", "cause"),
    [
        ([[1, 2]], "not of dimension 3"),
        ([1, 2, 3], "not of dimension 3"),
        ([[1, 2, 3], [1, 2]], "one length"),
        ([["a", "b", "c"]], "not numbers"),
        ([[1, 2, 3], [0, 0, 0]], "vector 1 is all zero"),
        ([[1, 2, 3], [1, float("nan"), 3]], "vector 1 holds"),
        ([[float("inf"), 2, 3]], "vector 0 holds"),
    ],
)
def test_what_has_no_direction_is_refused(vectors: object, cause: str) -> None:
    with pytest.raises(UsageError, match=cause):
        ExternalVectors("ours", 3).take(vectors)  # type: ignore[arg-type]


def test_the_fingerprint_is_the_declared_one_or_made_of_the_name() -> None:
    assert ExternalVectors("ours", 3, b"f" * 32).fingerprint == b"f" * 32
    assert ExternalVectors("ours", 3).fingerprint == ExternalVectors("ours", 3).fingerprint
    prints = {ExternalVectors(name, dimension).fingerprint for name in ("ours", "theirs") for dimension in (3, 4)}
    assert len(prints) == 4


@pytest.mark.parametrize(
    "settings", [("", 3), ("x" * 65, 3), ("ours", 0), ("ours", 4097), ("ours", 3, b"short")], ids=["", "long", "0", "4097", "short"]
)
def test_what_is_no_model_is_refused(settings: tuple[str, int]) -> None:
    with pytest.raises(UsageError):
        ExternalVectors(*settings)


def test_nothing_embeds_here() -> None:
    model = ExternalVectors("ours", 3)
    with pytest.raises(UsageError, match="made elsewhere"):
        model.embed(["text"])
    with pytest.raises(UsageError, match="made elsewhere"):
        model.count_tokens(["text"])


@given(st.lists(st.lists(st.floats(allow_nan=True), min_size=2, max_size=2), max_size=4))
def test_it_gives_unit_vectors_or_refuses(vectors: list[list[float]]) -> None:
    try:
        taken = ExternalVectors("ours", 2).take(np.array(vectors).reshape(-1, 2))
    except UsageError:
        return
    assert np.allclose(np.linalg.norm(taken, axis=1), 1, atol=1e-6)
