from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nexus.storage.home import Home, create_home
from nexus_cli import processes
from tests.gateway.fake_node import FakeNode, served

FAKE_NEXUSD = Path(__file__).with_name("fake_nexusd.py")


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What --json printed: one object on one line."""
        assert self.out.count("\n") == 1, self.out
        value = json.loads(self.out)
        assert value["schema"] == 1
        return value


Cli = Callable[..., Result]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    home = create_home(tmp_path / "home")
    monkeypatch.setenv("NEXUS_HOME", str(home.path))
    return home


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run `nexus` in this process, as its entry point does."""
    from nexus_cli.main import main

    def run(*arguments: str, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "argv", ["nexus", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Result(ended.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def node(home: Home) -> Iterator[FakeNode]:
    """A daemon's control API on the home's socket, with a node behind it that has no network."""
    node = FakeNode()
    with served(node, home.socket):
        yield node


@pytest.fixture
def fake_spawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let --detach start the fake nexusd."""
    popen = subprocess.Popen

    def spawn(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        python, m, module, *arguments = command
        if module == "nexus_cli.byzantine":
            at = arguments.index("--attack")
            del arguments[at : at + 2]  # what nexusd does not know
            module = "nexus_cli.daemon"
        assert [python, m, module] == [sys.executable, "-m", "nexus_cli.daemon"]
        return popen([sys.executable, str(FAKE_NEXUSD), *arguments], **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(processes.subprocess, "Popen", spawn)  # type: ignore[attr-defined]


@pytest.fixture
def nexusd(home: Home) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start nexusd around a fake node; ended at the end whatever happens."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **environ: str) -> subprocess.Popen[str]:
        import os

        process = subprocess.Popen(
            [sys.executable, str(FAKE_NEXUSD), "--home", str(home.path), *arguments],
            env=os.environ | environ,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()
