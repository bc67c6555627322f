"""Tiny models of the exact profile, made as the engine's tests make them, and the row that a test is about."""

from __future__ import annotations

import pytest

from nexus.core.manifest import Manifest
from tests.attacks.catalogue import Row, row_of
from tests.engine.conftest import Folder, make_model
from tests.engine.exact.conftest import Models, exact_model

__all__ = ["exact_model", "make_model"]


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Row:
    return row_of(f"{request.path.name}::{request.function.__name__}")


@pytest.fixture
def tiny(exact_model: Models) -> tuple[Manifest, Folder]:
    return exact_model("llama")
