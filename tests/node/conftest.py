"""Tiny models of the exact profile, made as the engine's tests make them."""

from __future__ import annotations

from tests.engine.conftest import imported, make_model
from tests.engine.exact.conftest import exact_model

__all__ = ["exact_model", "imported", "make_model"]
