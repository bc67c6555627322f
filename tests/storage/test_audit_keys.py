"""Keys of auditors on disk: private, bounded, and gone rather than wrong."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from nexus.core.errors import LocalError
from nexus.proof.freivalds import PieceKeys, piece_keys
from nexus.storage.audit_keys import AuditKeys

ROOT = bytes(range(32))


def keys(number: int = 1) -> PieceKeys:
    weights = np.full((4, 8), number, np.int8)
    return piece_keys({"o.weight": weights, "o.scale": np.ones(4, np.float32)}, ["o"], bytes([number]) * 32)


def test_keys_are_kept_for_their_owner_alone(tmp_path: Path) -> None:
    store = AuditKeys(tmp_path / "audit-keys")
    assert store.get(ROOT) is None
    store.put(ROOT, keys())
    assert store.get(ROOT) == keys()
    (file,) = (tmp_path / "audit-keys").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    store.drop(ROOT)
    assert store.get(ROOT) is None
    store.drop(ROOT)


@pytest.mark.parametrize("place", [0, 40, -1])
def test_damaged_keys_count_as_none(tmp_path: Path, place: int) -> None:
    store = AuditKeys(tmp_path)
    store.put(ROOT, keys())
    (file,) = tmp_path.iterdir()
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    assert store.get(ROOT) is None
    assert not list(tmp_path.iterdir())


def test_the_longest_unused_make_room(tmp_path: Path) -> None:
    size = 32 + len(keys().to_bytes())
    store = AuditKeys(tmp_path, bytes_max=2 * size)
    roots = [bytes([n]) * 32 for n in range(3)]
    for number, root in enumerate(roots[:2]):
        store.put(root, keys(number))
        os.utime(tmp_path / f"{root.hex()}.keys", (number, number))
    assert store.get(roots[0])
    store.put(roots[2], keys(2))
    assert store.get(roots[0])
    assert store.get(roots[1]) is None
    assert store.get(roots[2])
    with pytest.raises(LocalError, match="smaller model"):
        AuditKeys(tmp_path, bytes_max=10).put(ROOT, keys())
