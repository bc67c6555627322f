"""The model that texts are embedded with, taken in once for all tests of the memory here."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.testnet.memory_nodes import Node


@pytest.fixture(scope="session")
def taken_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `models` directory of a node that has embedded a text before."""
    node = Node(tmp_path_factory.mktemp("first") / "n")
    node.start()
    try:
        node.search("Is anything here?")
    finally:
        node.stop()
    return node.home / "models"
