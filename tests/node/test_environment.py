"""Nothing in a node reads a clock or draws a random number but through its environment."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import nexus
from nexus.node.environment import SYSTEM

ROOT = Path(nexus.__file__).parent
BANNED_MODULES = {"time", "secrets", "random", "uuid", "datetime"}
# What is only used to name a type, or to sleep, is no clock and no chance.
ALLOWED_NAMES = {("random", "Random")}
BANNED_ATTRIBUTES = {("os", "urandom"), ("os", "getrandom"), ("np", "random")}
SOURCES = sorted(path for layer in ("node", "swarm") for path in (ROOT / layer).rglob("*.py") if path.name != "environment.py")


def chances(source: str) -> Iterator[str]:
    """Lines of a module that reach for a clock or for randomness."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [(alias.name.split(".")[0], "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [((node.module or "").split(".")[0], alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in BANNED_ATTRIBUTES and not _seeded(source, node):
                yield f"line {node.lineno}: {node.value.id}.{node.attr}"
            continue
        else:
            continue
        for module, name in names:
            if module in BANNED_MODULES and (module, name) not in ALLOWED_NAMES:
                yield f"line {node.lineno}: {module}.{name}"


def _seeded(source: str, node: ast.Attribute) -> bool:
    """np.random.default_rng(SEED) is as deterministic as its seed."""
    return "np.random.default_rng(" in source.splitlines()[node.lineno - 1] and "default_rng()" not in source


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_has_a_clock_or_chance_of_its_own(path: Path) -> None:
    assert list(chances(path.read_text())) == []


@pytest.mark.parametrize(
    "line",
    [
        "import time",
        "import random",
        "from secrets import token_bytes",
        "from time import perf_counter",
        "import os\nos.urandom(1)",
        "import numpy as np\nnp.random.rand()",
        "import numpy as np\nnp.random.default_rng()",
    ],
)
def test_the_ban_sees_each_way(line: str) -> None:
    assert list(chances(line))


def test_production_draws_from_the_operating_system() -> None:
    assert type(SYSTEM.rng).__name__ == "SystemRandom"
    assert SYSTEM.rng.randbytes(32) != SYSTEM.rng.randbytes(32)
