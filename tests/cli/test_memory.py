"""nexus memory, collection, witness, against a real control API with a fake memory behind it."""

from __future__ import annotations

import io
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.errors import UsageError, VerificationError
from nexus.node.memory.api import EXPORT_PART_BYTES_MAX, AddRequest, Filters, HitView, SearchRequest
from nexus.storage.home import Home
from nexus_cli import documents, show, values
from nexus_cli.documents import decode, find_documents, fit_title, split_text
from nexus_cli.memory_file import MAGIC, read_parts
from nexus_cli.memory_search import block_list, cut_title, excerpt, hit_lines, is_meant, words_of
from tests.cli.conftest import Cli
from tests.gateway.fake_memory import DANUBE, NOW_MS, OTHER, block_view, identifier
from tests.gateway.fake_node import FakeNode

BLOCK = identifier(DANUBE)


def adds(node: FakeNode) -> list[AddRequest]:
    return [request for name, request in node.memory.calls if name == "add" and isinstance(request, AddRequest)]


# --- add --------------------------------------------------------------------------------------------------------------------


def test_a_file_is_added_and_its_ids_printed(cli: Cli, node: FakeNode, tmp_path: Path) -> None:
    file = tmp_path / "notes.md"
    file.write_text("one\r\n\n\ntwo é e\u0301", newline="")
    first = cli(
        "memory", "add", str(file), "--tag", "b", "--tag", "a", "--tag", "b", "--lang", "en", "--ttl", "1.5h", "--link", BLOCK
    )
    assert first.code == 0
    ids = first.out.split()
    assert len(ids) == 2
    assert first.err == "1 file, 2 new blocks\n"
    given = adds(node)[0]
    # Neither line ends nor accents are changed.
    assert given == AddRequest(
        "one\r\n\n\ntwo é e\u0301", title="notes.md", tags=("b", "a"), lang="en", ttl_s=5400.0, links=(BLOCK,)
    )
    again = cli("memory", "add", str(file))
    assert (again.code, again.out, again.err) == (0, "", "1 file, 0 new blocks, 2 were here already\n")
    made = cli("memory", "add", str(file), "--json", "--collection", "notes@12D3", "--title", "T").json
    assert (made["files"], made["blocks"], made["known"], made["skipped"]) == (1, 0, 2, [])
    assert made["added"] == [{"file": str(file), "title": "T", "collection": "notes@12D3", "ids": [], "known": 2}]


def test_standard_input_is_added(cli: Cli, node: FakeNode) -> None:
    result = cli("memory", "add", "-", "--replaces", BLOCK[:16], stdin=b"\xef\xbb\xbfhello")
    assert (result.code, result.out.strip()) == (0, identifier("hello"))
    assert adds(node) == [AddRequest("hello", replaces=BLOCK[:16])]


def test_a_directory_is_added_in_order_and_what_is_no_text_is_said(cli: Cli, node: FakeNode, tmp_path: Path) -> None:
    root = tmp_path / "docs"
    (root / "sub").mkdir(parents=True)
    (root / ".git").mkdir()
    (tmp_path / "secret").write_text("secret")
    for name, content in {
        "b.md": b"bee",
        "a.txt": b"ay",
        "sub/c": "cé".encode(),
        ".hidden": b"hidden",
        ".git/config": b"hidden",
        "latin.txt": "é".encode("latin-1"),
        "image": b"\x89PNG\0",
        "paper.pdf": b"%PDF-1.7",
        "empty": b" \n",
    }.items():
        (root / name).write_bytes(content)
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe")
    result = cli("memory", "add", str(root))
    assert result.code == 0
    assert [request.title for request in adds(node)] == ["a.txt", "b.md", "sub/c"]
    assert result.out.split() == [identifier(text) for text in ("ay", "bee", "cé")]
    assert result.err.count("skipped: ") == 7
    for said in ("link is a link", "loop is a link", "pipe is no file", "latin.txt is not text in UTF-8", "paper.pdf is a PDF"):
        assert said in result.err
    assert result.err.endswith("3 files, 3 new blocks, 7 skipped\n")
    skipped = cli("memory", "add", str(root), "--json").json["skipped"]
    assert {Path(one["file"]).name for one in skipped} == {"link", "loop", "pipe", "latin.txt", "image", "paper.pdf", "empty"}
    assert "secret" not in str(adds(node))


def test_if_nothing_could_be_added_the_exit_code_is_1_or_2(cli: Cli, node: FakeNode, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\0")
    nothing = cli("memory", "add", str(tmp_path))
    assert nothing.code == 1
    assert "nothing was added" in nothing.err
    # The home of this node is there too: its key is not published.
    assert "home is the data directory of a node" in nothing.err
    (tmp_path / "empty").mkdir()
    assert cli("memory", "add", str(tmp_path / "empty")).code == 1
    alone = cli("memory", "add", str(tmp_path / "image"))
    assert (alone.code, adds(node)) == (2, [])
    assert "is not text" in alone.err


@pytest.mark.parametrize(
    ("content", "says", "fix"),
    [
        (b"%PDF-1.4\n", "is a PDF", "pdftotext"),
        (b"PK\x03\x04..", "archive", "pandoc"),
        (b"abc\0", "byte 3 is 0", "convert"),
        (b"abc\xff", "(byte 3)", "iconv"),
        (b"\n \t", "is empty", "text"),
        (b"", "is empty", "text"),
    ],
)
def test_what_is_no_text_is_refused_with_the_way_out(content: bytes, says: str, fix: str) -> None:
    with pytest.raises(UsageError) as error:
        decode(content, "x")
    assert says in error.value.cause
    assert fix in error.value.fix


def test_files_that_cannot_be_read(cli: Cli, node: FakeNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("memory", "add", str(tmp_path / "nowhere")).code == 5
    assert cli("memory", "add").code == 2
    monkeypatch.setattr(documents, "DOCUMENT_BYTES_MAX", 10)
    (tmp_path / "large").write_text("x" * 11)
    for arguments, stdin in (((str(tmp_path / "large"),), b""), (("-",), b"x" * 11)):
        result = cli("memory", "add", *arguments, stdin=stdin)
        assert result.code == 2
        assert "larger than" in result.err
    assert adds(node) == []


def test_a_long_document_goes_in_parts(cli: Cli, node: FakeNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents.split_text, "__defaults__", (60,))
    text = "\n\n".join(f"paragraph {number} of them" for number in range(6))
    (tmp_path / "long.md").write_text(text)
    result = cli("memory", "add", str(tmp_path / "long.md"))
    assert result.code == 0
    parts = adds(node)
    assert len(parts) > 1
    assert [part.title for part in parts] == [f"long.md (part {number})" for number in range(1, len(parts) + 1)]
    assert "".join(part.text for part in parts) == text
    assert all(part.text.startswith("paragraph") for part in parts)
    assert result.err == "1 file, 6 new blocks\n"
    assert cli("memory", "add", str(tmp_path / "long.md"), "--replaces", BLOCK).code == 2


def test_parts_of_a_long_document_pass_the_control_api(cli: Cli, node: FakeNode) -> None:
    """Also of one that takes twice its bytes in JSON."""
    text = '"\\' * (2 << 20)
    assert cli("memory", "add", "-", stdin=text.encode()).code == 0
    assert "".join(request.text for request in adds(node)) == text


@given(st.text(max_size=400), st.integers(8, 100))
def test_parts_of_a_text_are_the_text_and_fit(text: str, bytes_max: int) -> None:
    text = text.encode("utf-8", "ignore").decode()
    parts = split_text(text, bytes_max)
    assert "".join(parts) == text
    assert all(len(json.dumps(part, ensure_ascii=False).encode()) <= bytes_max or len(part) == 1 for part in parts)


@given(st.text(max_size=600), st.sampled_from(["", " (part 12)"]))
def test_any_file_name_makes_a_title_that_a_block_can_have(name: str, ending: str) -> None:
    title = fit_title(name, ending)
    assert len(title.encode("utf-8")) <= 256
    assert title.isprintable()
    assert title.endswith(ending)


def test_a_vector_from_elsewhere(cli: Cli, node: FakeNode, tmp_path: Path) -> None:
    file, model = tmp_path / "v.json", ("--vector-model", "mine", "--vector-fingerprint", "ab" * 32)
    file.write_text("[0.5, -1]")
    assert cli("memory", "add", "-", "--vector", str(file), *model, stdin=b"text").code == 0
    assert cli("memory", "add", "--vector", str(file), *model).code == 0
    wanted = {"vector": (0.5, -1.0), "vector_model": "mine", "vector_fingerprint": "ab" * 32}
    assert adds(node) == [AddRequest("text", **wanted), AddRequest("", **wanted)]  # type: ignore[arg-type]
    node.memory.calls.clear()
    assert cli("memory", "add", "--vector", str(file)).code == 2
    assert cli("memory", "add", "-", *model, stdin=b"text").code == 2
    assert cli("memory", "add", str(tmp_path), "--vector", str(file), *model).code == 2
    for content in ("", "{}", "[]", "[1, null]", "[true]", "[NaN]", "[1e999]", '["1"]', "[" * 100_000, f"[1{'0' * 400}]"):
        file.write_text(content)
        assert cli("memory", "add", "--vector", str(file), *model).code == 2, content
    assert cli("memory", "add", "--vector", str(tmp_path / "none"), *model).code == 5
    assert adds(node) == []


def test_what_fails_while_adding_keeps_what_is_in(cli: Cli, node: FakeNode, tmp_path: Path) -> None:
    for name, text in {"a": "good", "b": "fail half way", "c": "never sent"}.items():
        (tmp_path / name).write_text(text)
    result = cli("memory", "add", str(tmp_path))
    assert (result.code, result.out.strip()) == (1, identifier("good"))
    assert "the disk is full (after 1 of 3 files: what was added stays" in result.err
    assert len(adds(node)) == 2
    alone = cli("memory", "add", "-", stdin=b"fail at once")
    assert (alone.code, alone.out) == (4, "")
    assert "after" not in alone.err


def test_arguments_that_are_not_utf_8_are_refused(cli: Cli, node: FakeNode, tmp_path: Path) -> None:
    bad = os.fsdecode(b"\xff")
    for arguments in (
        ("memory", "search", bad),
        ("memory", "ls", "--tag", bad),
        ("memory", "get", bad),
        ("memory", "add", "-", "--title", bad),
        ("collection", "create", bad),
        ("collection", "subscribe", "x", "--from", bad),
    ):
        result = cli(*arguments, stdin=b"x")
        assert (result.code, result.out) == (2, ""), arguments
    (tmp_path / bad).write_text("text")
    assert cli("memory", "add", str(tmp_path)).code == 0
    assert adds(node)[0].title == "\N{REPLACEMENT CHARACTER}"


# --- search and ls ----------------------------------------------------------------------------------------------------------


def test_hits_are_shown_with_what_matters(cli: Cli, node: FakeNode) -> None:
    node.memory.put(block_view("short", title="", id=identifier("short"), state="superseded", created_ms=1000))
    result = cli("memory", "search", "floods of rivers")
    assert result.code == 0
    assert "\x1b" not in result.out  # neither colour, nor what steers a terminal
    lines = result.out.splitlines()
    assert lines[0].startswith(" 1. 0.900  Rivers of Europe")
    assert lines[0].endswith("  main")
    for part in ("ice, bounded, ", "ago, ", BLOCK[:16]):
        assert part in lines[1]
    assert len(lines) == 2 + 3 + 1 + 3
    assert "floods" in "".join(lines[2:5])
    assert lines[6].startswith(" 2. 0.800 by its words  main")
    assert f"on 1970-01-01, {identifier('short')[:16]}, from {OTHER.peer_id[:16]}, superseded" in lines[7]
    assert result.err == "2 hits in 12.3 ms, by minilm\n"


def test_every_option_of_a_search_arrives(cli: Cli, node: FakeNode) -> None:
    options = "--collection main --collection b --tag x --tag y --author bob --lang en --k 3 --hybrid --model m --network"
    more = "--since 2026-11-01 --until 2026-11-02T12:30+02:00 --near -33.9,151.25 --near-km 5 --deadline 0.5"
    view = cli("memory", "search", "q", *options.split(), *more.split(), "--json").json["search"]
    assert view["hits"][0]["block"]["id"] == BLOCK
    filters = Filters(("main", "b"), ("x", "y"), ("bob",), "en", 1_793_491_200_000, 1_793_615_400_000, (-33.9, 151.25), 5.0)
    assert node.memory.calls == [("search", SearchRequest("q", filters, 3, True, "m", True, 0.5))]
    node.memory.calls.clear()
    assert cli("memory", "search", "q").code == 0
    assert node.memory.calls == [("search", SearchRequest("q"))]


def test_a_partial_result_is_said_to_be_one(cli: Cli, node: FakeNode) -> None:
    node.memory.complete = False
    result = cli("memory", "search", "q", "--network", "--explain")
    assert result.code == 0
    assert "partial: 1 of 2 peers did not answer in time (carol)" in result.err
    for said in ("- the question was embedded by minilm in 3 ms", "answered", "timed out", "5.0 s"):
        assert said in result.out
    assert "\x1b" not in result.out
    assert cli("memory", "search", "q", "--network", "--json").json["search"]["complete"] is False


def test_nothing_found_is_no_failure(cli: Cli, node: FakeNode) -> None:
    result = cli("memory", "search", "nothing")
    assert (result.code, result.out, result.err) == (0, "", "nothing found\n")
    assert cli("memory", "search", "nothing", "--json").json["search"]["hits"] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ("search", ""),
        ("search", "q", "--k", "0"),
        ("search", "q", "--since", "yesterday"),
        ("search", "q", "--since", "1969-12-31"),
        ("search", "q", "--since", "1d", "--until", "2d"),
        ("search", "q", "--near", "91,0"),
        ("search", "q", "--near", "nan,0"),
        ("search", "q", "--near", "1"),
        ("search", "q", "--near-km", "5"),
        ("search", "q", "--near", "1,2", "--near-km", "nan"),
        ("search", "q", "--near", "1,2", "--near-km", "0"),
        ("search", "q", "--deadline", "nan"),
        ("search", "q", "--collection", "a/b"),
        ("ls", "--limit", "0"),
        ("ls", "--author", "a\nb"),
        ("add", "-", "--ttl", "0d"),
        ("add", "-", "--ttl", "30"),
        ("add", "-", "--link", "zzz"),
        ("prune",),
        ("prune", "--older-than", "-1d"),
        ("prune", "--max-bytes", "1"),
        ("verify", BLOCK, "--all"),
        ("reindex",),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(cli: Cli, node: FakeNode, arguments: tuple[str, ...]) -> None:
    result = cli("memory", *arguments, stdin=b"text")
    assert (result.code, result.out) == (2, "")
    assert node.memory.calls == []


def test_ls_shows_a_line_per_block(cli: Cli, node: FakeNode) -> None:
    node.memory.put(block_view("long " * 100, id=identifier("long"), pinned=True, title=""))
    result = cli("memory", "ls", "--collection", "main", "--near", "48.5,16", "--since", "1970-01-02", "--limit", "2")
    assert "\x1b" not in result.out
    lines = [line for line in result.out.splitlines() if "bafkrei" in line]
    assert len(lines) == 2
    assert lines[0].split()[0] == BLOCK[:16]
    assert "pinned, live" in lines[1]
    assert lines[1].rstrip().endswith("…")
    assert max(map(len, result.out.splitlines())) <= 120
    assert "these are the newest 2" in result.err
    filters = Filters(("main",), since_ms=86_400_000, near=(48.5, 16.0))
    assert node.memory.calls == [("listed", (filters, 2))]
    assert len(cli("memory", "ls", "--json").json["blocks"]) == 2
    assert node.memory.calls[-1] == ("listed", (Filters(), 50))
    node.memory.known.clear()
    assert cli("memory", "ls").err == "no blocks; add some with: nexus memory add\n"


@given(st.text(max_size=500), st.text(max_size=40), st.text(max_size=20), st.integers(30, 150))
def test_a_hit_takes_few_lines_that_fit(text: str, title: str, question: str, width: int) -> None:
    from rich.console import Console

    view = replace(block_view(text), title=title)
    lines = hit_lines(1, HitView(view, 0.5, None, ""), words_of(question), Console(width=width, file=io.StringIO()))
    assert len(lines) <= 5
    assert all(line.cell_len <= width for line in [lines[0], *lines[2:]] if width >= 60)
    assert all(line.plain == show.printable(line.plain) for line in lines)


def test_words_of_the_question_are_emphasised() -> None:
    from rich.console import Console

    lines = hit_lines(1, HitView(block_view(), 0.5, None, ""), words_of("Vienna?"), Console(width=100, file=io.StringIO()))
    assert [line.plain[span.start : span.end] for line in lines[2:] for span in line.spans if span.style == "bold"] == ["Vienna"]


@pytest.mark.parametrize("width", [40, 80, 120, 200])
def test_a_list_fits_its_terminal(width: int) -> None:
    from rich.console import Console

    out = io.StringIO()
    blocks = [block_view("漢字 " * 60, title="a > b", id=identifier(str(number))) for number in range(3)]
    Console(width=width, file=out).print(block_list(blocks, width))
    lines = out.getvalue().splitlines()
    assert sum("b: 漢字" in line for line in lines) == 3
    assert sum(line.strip().startswith("bafkrei") for line in lines) == 3
    assert sum(identifier(str(number))[:16] in out.getvalue() for number in range(3)) == 3


def test_the_middle_of_a_title_goes_first() -> None:
    title = "file.md > Chapter one > Section of it"
    assert cut_title(title, 40) == title
    assert cut_title(title, 30) == "file.md > … > Section of it"
    assert cut_title(title, 20) == "Section of it"
    assert cut_title(title, 8) == "Section…"
    assert cut_title("漢字漢字", 5) == "漢字…"


def test_the_excerpt_is_where_the_words_are() -> None:
    words = words_of("When do towns FLOOD?")
    assert words == {"when", "towns", "flood"}
    assert is_meant("Floods", words)
    assert is_meant("town", words)
    assert not is_meant("to", words)
    text = "Nothing of it here at all. " * 20 + "Towns build walls against floods. " + "The end. " * 40
    shown = excerpt(text, words, 100)
    assert shown.startswith("… Towns build walls against floods.")
    assert shown.endswith(" …")
    assert excerpt("a\n\n b", words, 100) == "a b"
    assert excerpt("x" * 50, words, 10) == "x" * 10 + " …"
    assert excerpt("one two three", frozenset(), 8) == "one two …"


@given(st.text(max_size=300), st.text(max_size=30), st.integers(1, 80))
def test_an_excerpt_is_never_much_longer_than_asked(text: str, question: str, chars: int) -> None:
    assert len(excerpt(text, words_of(question), chars)) <= chars + 4


# --- one block --------------------------------------------------------------------------------------------------------------


def test_get_shows_a_block_whole(cli: Cli, node: FakeNode) -> None:
    result = cli("memory", "get", BLOCK[:12])
    assert result.code == 0
    head, text = result.out.split("\n\n", 1)
    assert text == DANUBE + "\n"
    assert "\x1b" not in head
    for said in (BLOCK, "bounded: not before 2026-11-14", "attested by 2 other nodes", "a cell of 1°", "geography, water"):
        assert said in head
    assert cli("memory", "get", BLOCK, "--local", "--json").json["block"]["text"] == DANUBE
    assert [call[1] for call in node.memory.calls] == [True, False]
    assert cli("memory", "get", "bafkreia").code == 5
    assert cli("memory", "get", "../stats").code == 5
    assert cli("memory", "get", "").code == 5


def test_versions_of_a_block(cli: Cli, node: FakeNode) -> None:
    old, mine, other = (identifier(name) for name in ("old", "mine", "other"))
    heads = (mine, other)
    node.memory.put(block_view("old", id=old, state="superseded", created_ms=NOW_MS - 9, winner=mine, heads=heads))
    node.memory.put(block_view("mine", id=mine, parents=(old, identifier("lost")), winner=mine, heads=heads))
    node.memory.put(block_view("other", id=other, parents=(old,), winner=mine, heads=heads, created_ms=NOW_MS - 8))
    result = cli("memory", "get", old, "--versions")
    assert result.code == 0
    assert f"in conflict: 2 versions that nothing replaces; searches show {mine}" in result.err
    assert [line.split()[0] for line in result.out.splitlines() if line.strip().startswith("bafkrei")] == [other[:16], mine[:16]]
    found = cli("memory", "get", old, "--versions", "--json").json["versions"]
    assert [one["id"] for one in found] == [other, mine]
    assert "no other version of it is here" in cli("memory", "get", BLOCK, "--versions").err


def test_rm_says_what_goes_and_wants_to_be_sure(cli: Cli, node: FakeNode) -> None:
    asked = cli("memory", "rm", BLOCK)
    assert (asked.code, asked.out) == (2, "")
    assert f"{BLOCK}  main, made" in asked.err
    assert "Give --yes" in asked.err
    assert BLOCK in node.memory.known
    assert json.loads(cli("memory", "rm", BLOCK, "--json").err)["error"]["exit_code"] == 2
    assert cli("memory", "rm", BLOCK[:20], "--yes").out == BLOCK + "\n"
    assert BLOCK not in node.memory.known
    assert cli("memory", "rm", BLOCK, "--yes").code == 5
    node.memory.put(block_view("foreign", author=OTHER.peer_id))
    assert cli("memory", "rm", identifier("foreign"), "--yes", "--json").code == 4


def test_pins(cli: Cli, node: FakeNode) -> None:
    assert cli("memory", "pin", BLOCK[:10]).out == f"{BLOCK}  pinned\n"
    assert cli("memory", "unpin", BLOCK, "--json").json["block"]["pinned"] is False
    assert cli("memory", "pin", "x y").code == 5


# --- all blocks -------------------------------------------------------------------------------------------------------------


def test_prune_says_what_goes_and_wants_to_be_sure(cli: Cli, node: FakeNode) -> None:
    asked = cli("memory", "prune", "--older-than", "30d")
    assert asked.code == 2
    assert json.loads(cli("memory", "prune", "--older-than", "30d", "--json").err)["error"]["exit_code"] == 2
    assert "would go: 3 blocks, 3.9 KiB" in asked.err
    dry = cli("memory", "prune", "--max-bytes", "0", "--dry-run", "--json")
    assert (dry.json["pruned"]["dry_run"], dry.err) == (True, "")
    assert all(getattr(request, "dry_run", None) is True for _, request in node.memory.calls)
    done = cli("memory", "prune", "--older-than", "30d", "--max-bytes", "1GiB", "--yes")
    assert (done.code, done.err) == (0, "given up: 3 blocks, 3.9 KiB\n")
    assert cli("memory", "prune", "--older-than", "1d", "--yes", "--json").json["pruned"]["dry_run"] is False


def test_stats_and_witness(cli: Cli, node: FakeNode) -> None:
    stats = cli("memory", "stats")
    assert "minilm 12" in stats.out
    assert "12 live, 2 removed" in stats.out
    assert "the index is being built anew" in stats.err
    assert "\x1b" not in stats.err
    assert cli("memory", "stats", "--json").json["stats"]["collections"][0]["live"] == 12
    shown = cli("witness").out
    assert "120 under one root" in shown
    assert "previous" not in shown
    assert cli("witness", "--json").json["witness"]["root"] == bytes(range(32)).hex()


def test_verify_ends_with_7_if_something_is_damaged(cli: Cli, node: FakeNode) -> None:
    assert (cli("memory", "verify").code, cli("memory", "verify", "--all").code) == (0, 0)
    assert cli("memory", "verify", BLOCK, "--json").json["verified"]["checked"] == 12
    assert [call[1] for call in node.memory.calls] == [None, None, BLOCK]
    node.memory.damaged = 1
    damaged = cli("memory", "verify")
    assert damaged.code == 7
    assert "another hash" in damaged.out
    assert "\x1b" not in damaged.out
    assert "12 blocks checked, 1 damaged, 1 repaired" in damaged.err
    assert cli("memory", "verify", "--json").code == 7


def test_reindex(cli: Cli, node: FakeNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = cli("memory", "reindex", "--model", "other", "--collection", "main")
    assert result.err == "11 blocks got a vector of other; 1 without a text here were left out; 2 maps between models published\n"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert cli("memory", "reindex", "--model", "model", "--json").json["reindexed"]["embedded"] == 11
    assert [call[1] for call in node.memory.calls] == [("other", "main"), (str(tmp_path / "model"), None)]


def test_an_export_comes_back(cli: Cli, node: FakeNode, tmp_path: Path) -> None:
    file = tmp_path / "blocks"
    result = cli("memory", "export", str(file), "--collection", "notes")
    assert (result.code, result.out) == (0, "")
    assert result.err.startswith("4 blocks, 7.8 KiB in ")
    assert list(tmp_path.glob("*.part")) == []
    assert node.memory.calls == [("export", ("notes",))]
    taken = cli("memory", "import", str(file))
    assert (taken.code, taken.err) == (0, "4 new blocks, 2 were here already, 0 refused\n")
    assert node.memory.imported == node.memory.content
    assert cli("memory", "export", str(file), "--json").json["blocks"] == 4
    assert cli("memory", "import", "-", "--json", stdin=file.read_bytes()).json["imported"]["new"] == 4
    assert cli("memory", "export", "-", "--json").code == 2


def test_an_export_to_standard_output(node: FakeNode) -> None:
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-m", "nexus_cli.main", "memory", "export", "-"], capture_output=True, check=True)
    assert list(read_parts(io.BytesIO(done.stdout), "x")) == node.memory.content
    assert done.stderr == b"4 blocks, 7.8 KiB\n"


def test_an_export_that_fails_leaves_what_was_there(cli: Cli, node: FakeNode, tmp_path: Path) -> None:
    file = tmp_path / "blocks"
    file.write_text("precious")
    assert cli("memory", "export", str(file), "--collection", "missing").code == 5
    assert cli("memory", "export", str(file), "--collection", "broken").code == 7
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["blocks"]
    assert file.read_text() == "precious"
    assert cli("memory", "export", str(tmp_path)).code == 1
    assert cli("memory", "export", str(tmp_path / "no" / "x")).code == 1
    assert cli("memory", "import", str(tmp_path / "nowhere")).code == 5
    assert cli("memory", "import", str(tmp_path)).code == 1


def test_what_an_import_refuses_is_said(cli: Cli, node: FakeNode, tmp_path: Path) -> None:
    file = tmp_path / "blocks"
    assert cli("memory", "export", str(file)).code == 0
    node.memory.refused = 1
    result = cli("memory", "import", str(file))
    assert result.code == 7
    assert "refused: the signature of a batch does not hold" in result.err
    assert "\x1b" not in result.err
    assert "2 blocks of" in result.err
    assert cli("memory", "import", str(file), "--json").code == 7


def test_a_damaged_export_is_taken_as_far_as_it_holds(cli: Cli, node: FakeNode, tmp_path: Path) -> None:
    file = tmp_path / "blocks"
    assert cli("memory", "export", str(file)).code == 0
    whole = file.read_bytes()
    for content, parts in ((b"", 0), (whole[:20], 0), (whole[:-5], 1), (whole[:-1], 2), (whole[:-4], 2), (whole + b"x", 2)):
        node.memory.imported.clear()
        file.write_bytes(content)
        result = cli("memory", "import", str(file))
        assert (result.code, len(node.memory.imported)) == (7, parts), content[-8:]


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=5), st.binary(max_size=20), st.data())
def test_a_container_is_read_as_written_or_refused(parts: list[bytes], noise: bytes, data: st.DataObject) -> None:
    content = MAGIC + b"".join(len(part).to_bytes(4, "big") + part for part in parts) + bytes(4)
    assert list(read_parts(io.BytesIO(content), "x")) == parts
    cut = data.draw(st.integers(0, len(content) - 1))
    with pytest.raises(VerificationError):
        list(read_parts(io.BytesIO(content[:cut]), "x"))
    if noise:
        with pytest.raises(VerificationError):
            list(read_parts(io.BytesIO(content + noise), "x"))
    with pytest.raises(VerificationError, match="damaged"):
        list(read_parts(io.BytesIO(MAGIC + (EXPORT_PART_BYTES_MAX + 1).to_bytes(4, "big")), "x"))


# --- collections ------------------------------------------------------------------------------------------------------------


def test_collections_are_made(cli: Cli, node: FakeNode) -> None:
    made = cli("collection", "create", "my notes", "--private", "--write", "bob", "--write", OTHER.peer_id)
    assert made.code == 0
    assert "the owner and the members" in made.out
    for arguments, mode, writers in (
        ((), "public", ()),
        (("--writers",), "writers", ()),
        (("--write", "bob"), "writers", ("bob",)),
        (("--private",), "private", ()),
    ):
        assert cli("collection", "create", "n", *arguments, "--json").json["collection"]["mode"] == mode
        assert node.memory.calls[-1] == ("create", ("n", mode, writers))
    assert node.memory.calls[0] == ("create", ("my notes", "private", ("bob", OTHER.peer_id)))
    for arguments in (("n", "--private", "--writers"), ("a/b",), ("a@b",), ("",), (" a",)):
        assert cli("collection", "create", *arguments).code == 2


def test_collections_are_listed(cli: Cli, node: FakeNode) -> None:
    listed = cli("collection", "ls")
    assert "\x1b" not in listed.out
    assert "read and write" in listed.out
    assert [one["name"] for one in cli("collection", "ls", "--json").json["collections"]] == ["main", "no\x1btes"]


def test_collections_are_shared_and_followed(cli: Cli, node: FakeNode) -> None:
    assert cli("collection", "grant", "notes@12D3", "bob").code == 0
    assert cli("collection", "grant", "my notes", "bob", "--write", "--revoke", "--json").json["collection"]["name"] == "my notes"
    assert cli("collection", "subscribe", "sync", "--from", "bob").code == 0
    assert cli("collection", "subscribe", "ünï", "--json").json["collection"]["subscribed"] is True
    assert "followed    no" in cli("collection", "unsubscribe", "notes").out
    assert node.memory.calls == [
        ("grant", ("notes@12D3", "bob", False, False)),
        ("grant", ("my notes", "bob", True, True)),
        ("subscribe", ("sync", "bob")),
        ("subscribe", ("ünï", None)),
        ("unsubscribe", "notes"),
    ]
    assert cli("collection", "subscribe", "missing").code == 5
    for name in ("a/b", "..", "", "a@"):
        assert cli("collection", "subscribe", name).code == 2, name


def test_sync_and_its_status(cli: Cli, node: FakeNode) -> None:
    result = cli("collection", "sync")
    assert "\x1b" not in result.out
    for said in ("in sync", "demoted", "never", "in 8 min", "it sent 2 blocks"):
        assert said in result.out
    assert cli("collection", "sync", "notes", "--json").json["sync"][1]["state"] == "demoted"
    assert node.memory.calls == [("sync", None), ("sync", "notes")]
    assert len(cli("collection", "sync", "--status", "--json").json["sync"]) == 2
    assert [one["collection"] for one in cli("collection", "sync", "notes", "--status", "--json").json["sync"]] == ["notes"]
    assert "nobody in reach follows it" in cli("collection", "sync", "else", "--status").err
    assert node.memory.calls == [("sync", None), ("sync", "notes")]


@pytest.mark.parametrize(
    "arguments",
    [
        ("memory", "add", "-"),
        ("memory", "search", "x"),
        ("memory", "ls"),
        ("memory", "get", "bafkrei"),
        ("memory", "rm", "bafkrei", "--yes"),
        ("memory", "verify"),
        ("memory", "prune", "--older-than", "1d"),
        ("memory", "reindex", "--model", "x"),
        ("collection", "ls"),
        ("collection", "sync"),
        ("collection", "subscribe", "x"),
        ("witness",),
    ],
)
def test_without_a_daemon_the_exit_code_is_3(cli: Cli, home: Home, arguments: tuple[str, ...]) -> None:
    result = cli(*arguments, stdin=b"text")
    assert (result.code, result.out) == (3, "")


# --- values -----------------------------------------------------------------------------------------------------------------


def test_spans_and_moments() -> None:
    spans = {"30d": 2_592_000, "12h": 43_200, "1.5h": 5400, "90m": 5400, "90min": 5400, "2w": 1_209_600, "1y": 31_536_000}
    assert {text: values.span(text) for text in spans} == spans
    now_ms = time.time() * 1000
    assert abs(values.moment("7d") - (now_ms - 7 * 86_400_000)) < 60_000
    assert values.moment("1970-01-01") == 0
    assert values.moment("2026-11-30T12:00Z") == values.moment("2026-11-30T14:00+02:00") == values.moment("2026-11-30 12:00")
    assert values.place("-90,180") == (-90.0, 180.0)
    assert values.size("1MiB") == 1 << 20


@given(st.text(max_size=20))
def test_no_text_is_more_than_a_bad_parameter(text: str) -> None:
    for read in (values.span, values.moment, values.place, values.size):
        try:
            assert read(text) is not None
        except click.BadParameter as error:
            assert error.message  # noqa: PT017 - either is right


def test_a_directory_that_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("x")

    def scandir(path: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(documents.os, "scandir", scandir)
    assert find_documents([str(tmp_path)]) == ([], [(str(tmp_path), "cannot be read: Permission denied")])


def test_help_is_quick(home: Home) -> None:
    """Nothing heavy is imported before a command runs."""
    import subprocess
    import sys

    code = "import sys, nexus_cli.main; print(sorted({'numpy', 'httpx', 'rich', 'trio', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
