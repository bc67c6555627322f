from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from nexus.core.errors import LocalError, NotAllowedError, NotFoundError
from nexus.storage.home import Home, create_home, create_identity, load_identity, lock_holder, lock_home, open_home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return create_home(tmp_path / "a" / "home")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_home_is_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        home = create_home(tmp_path / "home")
    finally:
        os.umask(before)
    assert (mode(home.path), mode(home.identity_file)) == (0o700, 0o600)
    assert home.models.is_dir()


def test_the_key_stays_the_same(home: Home) -> None:
    first = load_identity(home)
    assert load_identity(open_home(home.path)).peer_id == first.peer_id
    assert first.peer_id.startswith("12D3KooW")


def test_two_homes_have_two_keys(tmp_path: Path) -> None:
    ids = {load_identity(create_home(tmp_path / name)).peer_id for name in "ab"}
    assert len(ids) == 2


def test_a_key_is_never_overwritten(home: Home) -> None:
    before = home.identity_file.read_bytes()
    with pytest.raises(LocalError, match="already"):
        create_home(home.path)
    with pytest.raises(LocalError, match="never overwritten"):
        create_identity(home)
    assert home.identity_file.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "loose", "fix"), [("", 0o750, "chmod 700"), ("", 0o701, "chmod 700"), ("identity.key", 0o640, "chmod 600")]
)
def test_loose_modes_are_refused_with_the_fix(home: Home, name: str, loose: int, fix: str) -> None:
    (home.path / name).chmod(loose)
    with pytest.raises(NotAllowedError, match=fix):
        load_identity(home)


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"nexus-ed25519-seed:" + b"0" * 63 + b"\n", b"nexus-ed25519-seed:" + b"0" * 64, b"\xff" * 99]
)
def test_a_damaged_key_is_not_used(home: Home, content: bytes) -> None:
    home.identity_file.write_bytes(content)
    with pytest.raises(LocalError, match="damaged"):
        load_identity(home)


def test_no_home(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="nexus init"):
        open_home(tmp_path)


def test_a_home_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalError, match="cannot make"):
        create_home(tmp_path / "file" / "home")


def test_one_daemon_per_home(home: Home) -> None:
    assert lock_holder(home) is None
    with lock_home(home):
        assert lock_holder(home) == os.getpid()
        with pytest.raises(LocalError, match=f"pid {os.getpid()}"), lock_home(home):
            pass
    assert lock_holder(home) is None
    with lock_home(home):
        pass


def test_the_lock_goes_with_its_process(home: Home) -> None:
    code = "import sys, pathlib; from nexus.storage.home import *; lock = lock_home(Home(pathlib.Path(sys.argv[1])))"
    code += "; lock.__enter__(); print('locked', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, str(home.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        assert lock_holder(home) == other.pid
        with pytest.raises(LocalError, match=f"pid {other.pid}"), lock_home(home):
            pass
        other.kill()
    with lock_home(home):
        assert lock_holder(home) == os.getpid()
