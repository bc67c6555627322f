"""The CLI's end of the control API."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus_cli.client import _lines
from tests.cli.conftest import Cli
from tests.gateway import fake_node
from tests.gateway.fake_node import FakeNode


@given(st.lists(st.text().map(lambda text: text.replace("\n", ""))), st.lists(st.integers(1, 30), min_size=1))
def test_lines_end_in_line_feeds_alone_wherever_the_stream_is_cut(lines: list[str], sizes: list[int]) -> None:
    whole = "".join(f"{line}\n" for line in lines).encode()
    chunks, at = [], 0
    while at < len(whole):
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(whole[at : at + size])
        at += size
    assert list(_lines(chunks)) == lines


def test_an_answer_may_have_any_character(cli: Cli, node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that Unicode, and other readers, take for ends of lines."""
    monkeypatch.setattr(fake_node, "ANSWER", ("a", "\u2028", "\x85", "\x0b", "\u2029"))
    assert cli("run", "nano", "x", "--json", "--no-receipts").json["text"] == "a\u2028\x85\x0b\u2029"
