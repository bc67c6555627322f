"""Documents that a user names: files, directories, standard input, as text that the daemon takes in one request each."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nexus.core.errors import NotFoundError, UsageError
from nexus_cli import show

DOCUMENT_BYTES_MAX = 64 * 1024 * 1024
# Of the text in JSON. The control API takes 4 MiB, and a request has other fields.
PART_BYTES_MAX = 3 * 1024 * 1024 + 512 * 1024
TITLE_BYTES_MAX = 256
NUMBER_MAX = 1e30
KEY_FILE = "identity.key"
# What documents begin with that are no text, and what makes text of them.
_FORMS = (
    (b"%PDF-", "a PDF", "Convert it first: pdftotext FILE - | nexus memory add -"),
    (b"PK\x03\x04", "an archive or an office document", "Convert it first, for example with: pandoc --to plain"),
    (b"\xd0\xcf\x11\xe0", "an office document", "Convert it first, for example with: libreoffice --convert-to txt"),
)


@dataclass(frozen=True, slots=True)
class Source:
    """A document to read. `path` None: standard input. `shown`: what to call it."""

    path: Path | None
    shown: str
    title: str


def find_documents(names: Sequence[str]) -> tuple[list[Source], list[tuple[str, str]]]:
    """What the names stand for, and what was passed over, with the reason. A directory stands for all files under it in the order
    of their paths, but for hidden ones, links and data directories of nodes. Raises NotFoundError where a name stands for nothing.
    """
    found: list[Source] = []
    skipped: list[tuple[str, str]] = []
    for name in names:
        path = Path(name)
        if name == "-":
            found.append(Source(None, "standard input", ""))
        elif path.is_dir():
            for file in _walk(path, skipped):
                found.append(Source(file, str(file), file.relative_to(path).as_posix()))
        elif path.exists():
            found.append(Source(path, name, path.name))
        else:
            raise NotFoundError(
                f"there is no file or directory {name}", "Give a file of text, a directory, or - for standard input"
            )
    return found, skipped


def _walk(directory: Path, skipped: list[tuple[str, str]]) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError as error:
        skipped.append((str(directory), f"cannot be read: {error.strerror}"))
        return
    if any(entry.name == KEY_FILE for entry in entries):
        # Whoever adds all of their home directory must not publish the key in it.
        skipped.append((str(directory), "is the data directory of a node"))
        return
    for entry in entries:
        path = directory / entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_symlink():
            skipped.append((str(path), "is a link"))
        elif entry.is_dir(follow_symlinks=False):
            yield from _walk(path, skipped)
        elif entry.is_file(follow_symlinks=False):
            yield path
        else:
            skipped.append((str(path), "is no file"))


def read_document(source: Source) -> str:
    """Its text. Raises UsageError for what is no text or too much of it, NotFoundError, LocalError."""
    from nexus_cli.receipts import read_file

    if source.path is None:
        content = sys.stdin.buffer.read(DOCUMENT_BYTES_MAX + 1)
        if len(content) > DOCUMENT_BYTES_MAX:
            raise UsageError(f"standard input is larger than {show.size(DOCUMENT_BYTES_MAX)}", "Give it in parts")
    else:
        content = read_file(source.path, DOCUMENT_BYTES_MAX, "a document", "Split it, and add the parts")
    return decode(content, source.shown)


def decode(content: bytes, shown: str) -> str:
    """Text as it is in the file: neither line ends nor accents are changed. Raises UsageError."""
    for start, form, fix in _FORMS:
        if content.startswith(start):
            raise UsageError(f"{shown} is {form}, not text", fix)
    if b"\0" in content:
        raise UsageError(f"{shown} is not text: byte {content.index(0)} is 0", "Give text in UTF-8, or convert it first")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{shown} is not text in UTF-8 (byte {error.start})", "Convert it first, for example with iconv"
        ) from error
    if not text.strip():
        raise UsageError(f"{shown} is empty", "Give a file with text in it")
    return text


def split_text(text: str, bytes_max: int = PART_BYTES_MAX) -> list[str]:
    """The text in parts that are each at most `bytes_max` long in JSON: cut near the middle, at the end of a paragraph if there is
    one there, of a line or a word otherwise, until they are. Nothing is left out: the parts one after another are the text."""
    if len(json.dumps(text, ensure_ascii=False).encode("utf-8")) <= bytes_max or len(text) < 2:
        return [text]
    middle, reach = len(text) // 2, len(text) // 4
    for end in ("\n\n", "\n", ". ", " "):
        at = text.rfind(end, middle - reach, middle + reach)
        if at >= 0:
            middle = at + len(end)
            break
    return split_text(text[:middle], bytes_max) + split_text(text[middle:], bytes_max)


def fit_title(title: str, ending: str = "") -> str:
    """A title that a block can have: of one that is too long its end, which tells files of a directory apart."""
    title = "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in title)
    while len((title + ending).encode("utf-8")) > TITLE_BYTES_MAX:
        title = "…" + title[2:]
    return title + ending


def read_vector(file: Path) -> list[float]:
    """A vector as a JSON list of numbers. Raises NotFoundError, LocalError, UsageError."""
    from nexus_cli.receipts import read_file

    fix = "It has to be one JSON list of numbers, such as [0.25, -0.5]"
    content = read_file(file, 1 << 20, "a vector", fix)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not JSON", fix) from error
    if not isinstance(value, list) or not value:
        raise UsageError(f"{file} is not a list of numbers", fix)
    for number in value:
        if isinstance(number, bool) or not isinstance(number, int | float) or not -NUMBER_MAX <= number <= NUMBER_MAX:
            raise UsageError(f"{file} has something else in it than numbers", fix)
    return value
