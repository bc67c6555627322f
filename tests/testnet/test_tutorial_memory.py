"""docs/tutorial-memory.md as a reader does it: every command in one shell, in order, and what the page shows of its output."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from nexus.storage.home import Home, lock_holder
from nexus_cli.processes import find_process, send_signal, wait_for_end

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "tutorial-memory.md"
TIMEOUT_S = 240
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Step:
    """A command, and the lines that the page shows after it. "…" stands for anything, and lines may be left out between them."""

    command: str
    shown: tuple[str, ...]

    def missing(self, output: str) -> str | None:
        """The first shown line that the output does not have behind those before it."""
        lines = iter(output.splitlines())
        for expected in self.shown:
            words = [".*".join(map(re.escape, word.split("…"))) for word in expected.split()]
            pattern = re.compile(r"\s*" + r"\s+".join(words) + r"\s*")
            if not any(pattern.fullmatch(line) for line in lines):
                return expected
        return None


def steps(page: str) -> list[Step]:
    found: list[tuple[list[str], list[str]]] = []
    for language, text in _FENCED.findall(page):
        assert language == "console", f"a block that is not run: {text}"
        assert text.startswith("$ ")
        for line in text.splitlines():
            if line.startswith("$ "):
                found.append(([line[2:]], []))
            elif line.split(" ")[0] == ">" and not found[-1][1]:
                found[-1][0].append(line[2:])
            elif line.strip():
                found[-1][1].append(line)
    return [Step("\n".join(command), tuple(shown)) for command, shown in found]


def test_a_page_is_read_as_it_is_meant() -> None:
    page = "Text\n```console\n$ cat <<END\n> one line\n>\n> END\none …\n$ true\n```\n"
    first, second = steps(page)
    assert first == Step("cat <<END\none line\n\nEND", ("one …",))
    assert second == Step("true", ())
    assert first.missing("zero\n one   line of it\n") is None
    assert first.missing("one\n") == "one …"
    assert Step("", ("b", "a")).missing("a\nb\n") == "a"
    assert Step("", ("id bafk…, now",)).missing("id bafkreia, now") is None
    with pytest.raises(AssertionError):
        steps("```sh\nls\n```\n")


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """Where the reader is; the daemons that were started there end with the test."""
    yield tmp_path
    found = [find_process(holder) for home in tmp_path.rglob("nexusd.lock") if (holder := lock_holder(Home(home.parent)))]
    left = [process for process in found if process is not None and send_signal(process, signal.SIGKILL)]
    assert wait_for_end(left, 10) == []


def test_the_tutorial_does_what_it_says(place: Path) -> None:
    listed = steps(PAGE.read_text("utf-8"))
    assert len(listed) > 20
    outputs = place / "outputs"
    outputs.mkdir()
    script = "".join(
        f"{{\n{step.command}\n}} > {outputs}/{number} 2>&1 || {{ touch {outputs}/failed; exit 1; }}\n"
        for number, step in enumerate(listed)
    )
    environ = {key: value for key, value in os.environ.items() if not key.startswith("NEXUS_")}
    environ |= {"HOME": str(place), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}", "COLUMNS": "132"}
    done = subprocess.run(
        ["bash"], input=script, text=True, cwd=place, env=environ, timeout=TIMEOUT_S, capture_output=True, check=False
    )
    for number, step in enumerate(listed):
        assert (outputs / str(number)).exists(), f"not run: {step.command}\n{done.stderr}"
        text = (outputs / str(number)).read_text("utf-8")
        last = not (outputs / str(number + 1)).exists()
        assert not (last and (outputs / "failed").exists()), f"{step.command}\n{text}"
        assert step.missing(text) is None, f"{step.command}\nhas no line {step.missing(text)!r}:\n{text}"
    assert done.returncode == 0, done.stderr
    assert not list(place.rglob("control.sock")), "the page ends with no daemon left"
