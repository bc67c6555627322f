"""Chunks lose nothing, keep together what belongs together, and are never too long."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from itertools import pairwise
from types import FrameType

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nexus.core.errors import UsageError
from nexus.memory.chunk import CHUNK_BYTES_MAX, CONTEXT_BYTES_MAX, TOKENS_MIN, Chunk, chunks_of

_TOKEN = re.compile(r"\w{1,6}|[^\w\s]")


def count(texts: Sequence[str]) -> list[int]:
    """Six letters are a token, and any other sign; two more are around every text."""
    return [2 + len(_TOKEN.findall(text)) for text in texts]


def refusing(texts: Sequence[str]) -> list[int]:
    """A tokenizer that takes no more than a chunk and its context."""
    assert all(len(text.encode("utf-8")) <= CHUNK_BYTES_MAX + CONTEXT_BYTES_MAX + 8 for text in texts)
    return count(texts)


def check(source: str, chunks: Sequence[Chunk], tokens_max: int) -> None:
    """What holds of any chunks of any text."""
    covered = bytearray(len(source))
    last_start = last_end = -1
    for chunk in chunks:
        assert chunk.text == source[chunk.start : chunk.end]
        assert chunk.text == chunk.text.strip() != ""
        assert len(chunk.text.encode("utf-8")) <= CHUNK_BYTES_MAX
        assert len(chunk.context.encode("utf-8")) <= CONTEXT_BYTES_MAX
        assert count([chunk.embedded])[0] <= tokens_max or (len(chunk.text) == 1 and not chunk.headings)
        assert chunk.start > last_start
        assert chunk.end > last_end
        last_start, last_end = chunk.start, chunk.end
        covered[chunk.start : chunk.end] = b"\1" * (chunk.end - chunk.start)
    assert all(covered[at] or char.isspace() for at, char in enumerate(source))


pieces = st.sampled_from(
    [
        *(
            "# Title",
            "## Section",
            "### Deep",
            "Setext",
            "=====",
            "-----",
            "---",
            "```python",
            "```",
            "~~~",
            "- item",
            "  - inner",
            "1. one",
        ),
        *(
            "    code",
            "> quote",
            "| a | b |",
            "A sentence. Another one! And e.g. a third?",
            "漢字。仮名\uff01",
            "שלום עולם.",
            "👩‍👩‍👧‍👦" * 9,
        ),
        *("word " * 40, "x" * 700, "\0", "\r", "a\u0301" * 90, "مرحبا؟ نعم\u06d4 "),
    ]
)
texts = st.lists(st.one_of(pieces, st.text(max_size=30)), max_size=30).flatmap(
    lambda parts: st.lists(st.sampled_from(["\n", "\r\n", "\n\n", "\r", " ", ""]), min_size=len(parts), max_size=len(parts)).map(
        lambda ends: "".join(part + end for part, end in zip(parts, ends, strict=True))
    )
)


@given(texts, st.integers(TOKENS_MIN, 200), st.booleans(), st.sampled_from(["", "The document", "t" * 5000]))
@example("", 16, True, "")
@example("#", 16, True, "")
@example("---\n---", 16, True, "")
@example("# " + "long heading " * 900 + "\ntext", 30, True, "")
@example("- a\n" * 300 + "```\n" + "code\n" * 3000, 50, True, "t")
def test_nothing_is_lost_and_nothing_is_too_long(source: str, tokens_max: int, markdown: bool, title: str) -> None:
    check(source, chunks_of(source, refusing, tokens_max, markdown=markdown, title=title), tokens_max)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=3000), st.booleans())
def test_any_text(source: str, markdown: bool) -> None:
    check(source, chunks_of(source, refusing, 24, markdown=markdown), 24)


@given(texts, st.booleans())
def test_the_same_text_has_the_same_chunks(source: str, markdown: bool) -> None:
    assert chunks_of(source, count, 40, markdown=markdown) == chunks_of(source, count, 40, markdown=markdown)


def test_a_short_text_is_one_chunk() -> None:
    assert chunks_of("  Hello.\r\n\r\nWorld \n", count, 50) == [Chunk("Hello.\r\n\r\nWorld", 2, 17)]
    assert chunks_of(" \r\n\t\n", count, 50) == []


MANUAL = """\
# Manual

Some words about it, enough of them to fill a good part of a chunk by themselves.

## Install

Run this first:

```sh
# this is no heading
make

make install
```

## Use

- open it
- close it

  and wait
- go home

### Details

The first sentence of the details is here. The second sentence follows it closely. A third one ends it.
"""


def test_headings_are_context() -> None:
    chunks = chunks_of(MANUAL, count, 42, markdown=True, title="manual.md")
    check(MANUAL, chunks, 42)
    by_start = {chunk.text.split("\n")[0]: chunk for chunk in chunks}
    assert by_start["# Manual"].headings == ("manual.md",)
    assert by_start["## Install"].headings == ("manual.md", "Manual")
    assert by_start["### Details"].headings == ("manual.md", "Manual", "Use")
    assert by_start["## Install"].embedded.startswith("manual.md > Manual\n\n## Install\n")
    assert not any("this is no heading" in heading for chunk in chunks for heading in chunk.headings)


def test_code_and_lists_are_kept_whole_where_they_fit() -> None:
    for tokens_max in (26, 40, 60):
        chunks = chunks_of(MANUAL, count, tokens_max, markdown=True)
        for whole in (
            MANUAL[MANUAL.index("```sh") : MANUAL.index("## Use")],
            MANUAL[MANUAL.index("- open") : MANUAL.index("### D")],
        ):
            assert any(whole.strip() in chunk.text for chunk in chunks), tokens_max


def test_a_heading_is_with_what_follows_it() -> None:
    source = "word " * 20 + "\n\n# Heading\n\n" + "other " * 20
    chunks = chunks_of(source, count, 26, markdown=True)
    assert [chunk.text.split()[0] for chunk in chunks] == ["word", "#"]


def test_paragraphs_are_not_cut_where_they_fit() -> None:
    paragraphs = [f"paragraph {n} " + "word " * (5 + n % 9) for n in range(60)]
    chunks = chunks_of("\n\n".join(paragraphs), count, 40)
    for paragraph in paragraphs:
        assert sum(paragraph.strip() in chunk.text for chunk in chunks) == 1
    assert all(a.end <= b.start for a, b in pairwise(chunks))
    assert len(chunks) < 40  # and they are put together


def test_prose_is_cut_between_sentences_and_repeats_a_short_one() -> None:
    sentences = [
        f"Now number {n} is here." if n % 3 == 2 else f"Sentence number {n} says a little, e.g. this much of it." for n in range(40)
    ]
    chunks = chunks_of(" ".join(sentences), count, 60)
    assert len(chunks) > 5
    for chunk in chunks:
        assert chunk.text.startswith(("Sentence", "Now"))
        assert chunk.text.endswith(("it.", "here."))
    repeated = [a.end - b.start for a, b in pairwise(chunks) if b.start < a.end]
    assert repeated
    assert max(repeated) < 60
    lists = chunks_of("\n".join(f"- item number {n} of many" for n in range(60)), count, 40, markdown=True)
    assert all(a.end <= b.start for a, b in pairwise(lists))
    assert all(chunk.text.startswith("- item") for chunk in lists)


def test_setext_headings_and_front_matter() -> None:
    source = "---\ntitle: x\n---\n\nBig\n===\n\n" + "word " * 30 + "\n\nSmall\n-----\n\n" + "more " * 30
    chunks = chunks_of(source, count, 40, markdown=True)
    assert chunks[-1].text.startswith("Small")
    assert chunks[-1].headings == ("Big",)
    assert chunks[0].text.startswith("---\ntitle")


def test_plain_text_has_no_headings() -> None:
    assert all(not chunk.headings for chunk in chunks_of("# a\n\n" + "word " * 300, count, 50))


@pytest.mark.parametrize("text", ["👩‍👩‍👧‍👦", "e\u0301\u0323", "👍🏽"])
def test_what_is_one_sign_is_not_parted(text: str) -> None:
    source = "x" * 61 + text * 400
    chunks = chunks_of(source, lambda parts: [2 + len(part) for part in parts], 40)
    assert "".join(chunk.text for chunk in chunks) == source
    parted = [chunk.text for chunk in chunks if chunk.text[0] in "\u200d\u0301\u0323\U0001f3fd" or chunk.text.endswith("\u200d")]
    assert not parted


def test_too_few_tokens_and_broken_unicode_are_refused() -> None:
    with pytest.raises(UsageError, match="15 tokens"):
        chunks_of("text", count, 15)
    with pytest.raises(UsageError, match="Unicode"):
        chunks_of("\ud800", count, 50)


@pytest.mark.parametrize(
    "unit",
    ["word ", "word. ", "x", "- item\n", "# h\n", "....", "\n", "```\n", "a\n---\n", "漢", "\u0301", "> \r\n", "  - a\n\n"],
    ids=lambda unit: ascii(unit),
)
def test_the_work_is_linear(unit: str) -> None:
    """Every character is counted a bounded number of times, and steps of Python grow no faster than the text."""

    def work(size: int) -> tuple[int, int]:
        counted = steps = 0

        def counting(parts: Sequence[str]) -> list[int]:
            nonlocal counted
            counted += sum(map(len, parts))
            return count(parts)

        def step(frame: FrameType, event: str, argument: object) -> None:
            nonlocal steps
            steps += 1

        source = unit * (size // len(unit))
        sys.setprofile(step)
        try:
            chunks_of(source, counting, 64, markdown=True)
        finally:
            sys.setprofile(None)
        return counted, steps

    size = 10_000
    counted, steps = work(size)
    assert counted < 12 * size
    assert work(4 * size)[1] < 5 * steps + 1000
