"""A store of another form is refused, and left as it is."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from nexus.core.errors import LocalError
from nexus.storage.memory.store import MemoryStore


def test_a_store_of_another_form_is_refused(tmp_path: Path) -> None:
    MemoryStore(tmp_path, bytes_max=1 << 20, author_bytes_max=1 << 20).close()
    with closing(sqlite3.connect(tmp_path / "memory.db")) as connection:
        connection.execute("PRAGMA user_version=99")
    with pytest.raises(LocalError, match="form 99") as refused:
        MemoryStore(tmp_path, bytes_max=1 << 20, author_bytes_max=1 << 20)
    assert "move the file away" in refused.value.fix
    with closing(sqlite3.connect(tmp_path / "memory.db")) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (99,)
