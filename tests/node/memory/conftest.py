from __future__ import annotations

from pathlib import Path

import pytest
import trio

from nexus.memory.sky.kernel import SkyKernel
from nexus.storage.sky_tables import load_sky_kernel
from tests.node.memory.memory_swarm import Swarm, at_once, inline


@pytest.fixture(scope="session")
def sky() -> SkyKernel:
    return load_sky_kernel()


@pytest.fixture
def swarm(nursery: trio.Nursery, tmp_path: Path, sky: SkyKernel, monkeypatch: pytest.MonkeyPatch) -> Swarm:
    monkeypatch.setattr(trio.to_thread, "run_sync", inline)
    monkeypatch.setattr(trio.from_thread, "run_sync", at_once)
    monkeypatch.setattr(trio.from_thread, "check_cancelled", lambda: None)
    return Swarm(nursery, tmp_path, sky)
