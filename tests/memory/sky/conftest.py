"""One set of tables, and one kernel over them, for all tests of the sky."""

from __future__ import annotations

import pytest

from nexus.memory.sky.kernel import SkyKernel
from nexus.memory.sky.reference import SkyReference
from nexus.memory.sky.tables import SkyTables
from nexus.storage import sky_tables


@pytest.fixture(scope="session")
def tables() -> SkyTables:
    return sky_tables.load_sky_tables()


@pytest.fixture(scope="session")
def kernel(tables: SkyTables) -> SkyKernel:
    return SkyKernel(tables)


@pytest.fixture(scope="session")
def reference() -> SkyReference:
    return sky_tables.load_sky_reference()
