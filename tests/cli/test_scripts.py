"""scripts/setup on machines that are not ready for it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [ROOT / "scripts" / name for name in ("setup", "quickstart", "test")] + [ROOT / ".ci" / "run"]


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A clone and a PATH with nothing but what every system has."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "bin").mkdir()
    shutil.copy(ROOT / "scripts" / "setup", tmp_path / "scripts")
    for tool in ("bash", "env", "dirname", "cat", "rm", "mv"):
        found = shutil.which(tool)
        assert found
        (tmp_path / "bin" / tool).symlink_to(found)
    return tmp_path


def python(machine: Path, text: str) -> None:
    """Put a python3 on the PATH that is this shell script."""
    file = machine / "bin" / "python3"
    file.write_text(f"#!{machine / 'bin' / 'bash'}\n{text}\n")
    file.chmod(0o755)


def setup(machine: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(machine / "bin" / "bash"), str(machine / "scripts" / "setup"), *arguments]
    return subprocess.run(command, env={"PATH": str(machine / "bin")}, capture_output=True, text=True, timeout=60)


def test_no_python(machine: Path) -> None:
    done = setup(machine)
    assert done.returncode == 1
    assert done.stderr.startswith("error: Python is not installed\nfix: Install Python 3.11")


def test_an_old_python(machine: Path) -> None:
    python(machine, 'case "$*" in *version_info*) exit 1;; *) echo 3.9.2;; esac')
    done = setup(machine)
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed, but python3 is 3.9.2" in done.stderr


def test_a_python_without_venv(machine: Path) -> None:
    python(machine, 'case "$*" in *ensurepip*) exit 1;; esac')
    done = setup(machine)
    assert done.returncode == 1
    assert "cannot make virtual environments" in done.stderr
    assert "python3-venv" in done.stderr


def test_an_unknown_kind(machine: Path) -> None:
    done = setup(machine, "everything")
    assert done.returncode == 1
    assert "unknown kind of setup" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
def test_a_script_is_strict_and_can_be_run(script: Path) -> None:
    assert "set -euo pipefail" in script.read_text()
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_constraints_pin_everything_and_name_no_place() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(line.count("==") == 1 and "/" not in line and "+" not in line for line in lines)
    assert "torch==2.13.0" in lines
