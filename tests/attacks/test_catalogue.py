"""The table in code, the table in docs/threats.md and the tests say the same, and no attack by name is left out."""

from __future__ import annotations

import ast
from pathlib import Path

from nexus.node.attacks import ATTACKS
from nexus.proof.evidence import KINDS
from tests.attacks.catalogue import ROWS, WORDS, table

HERE = Path(__file__).parent
THREATS = HERE.parents[1] / "docs" / "threats.md"


def functions() -> dict[str, set[str]]:
    """Of every attack's test, by file and function, the names of what it takes."""
    found = {}
    for path in sorted(HERE.glob("test_*.py")):
        if path == Path(__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                found[f"{path.name}::{node.name}"] = {argument.arg for argument in node.args.args}
    return found


def test_every_row_has_its_test_and_every_test_its_row() -> None:
    rows = [row.test for row in ROWS]
    assert len(set(rows)) == len(rows)
    assert set(rows) == set(functions())
    assert all("row" in arguments for arguments in functions().values()), "a test must assert what its row says"


def test_every_attack_by_name_is_in_one_row() -> None:
    names = [name for row in ROWS for name in row.names]
    assert sorted(names) == sorted(ATTACKS)
    source = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    assert all(f'"{name}"' in source for name in ATTACKS)


def test_the_rows_use_the_words_that_there_are() -> None:
    assert {row.consequence for row in ROWS} == set(WORDS)
    assert {row.proof for row in ROWS} - {""} == set(KINDS)


def test_the_documentation_shows_the_table() -> None:
    assert table() in THREATS.read_text()
