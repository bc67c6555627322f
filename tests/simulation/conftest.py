"""Simulations in tests, and the world that the seeds of one test process share."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import pytest

from nexus.simulation.chaos import World, ram_directory
from nexus.simulation.determinism import simulate

T = TypeVar("T")


@pytest.fixture(name="simulate")
def _simulate() -> Callable[[int, Callable[[], Awaitable[T]]], T]:
    return simulate


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    root = ram_directory()
    yield World(root)
    shutil.rmtree(root, ignore_errors=True)
