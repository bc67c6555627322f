"""Long texts to chunks that one vector can stand for. Plain text and Markdown; every character that is not blank is in some chunk.

A text is taken apart into units (headings, paragraphs, lists, code), which are put together again in order until a chunk is full.
Only a unit that does not fit by itself is cut: a list between its items, code between its lines, prose between sentences, and where
that is not enough between lines, words, and at last characters. Where prose was cut, the next chunk repeats its last sentence if
that is short. The headings above a chunk that are not in it are its context: the vector is made of `Chunk.embedded`.

The work is linear in the text: every part of it is counted a few times at most.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from nexus.core.errors import UsageError

CHUNK_BYTES_MAX = 8 * 1024
CONTEXT_BYTES_MAX, TITLE_CHARS_MAX = 1024, 200
TOKENS_MIN = 16
SEPARATOR = " > "

# Tokens of each text, the special ones around it counted: `nexus.engine.embedding`'s `count_tokens`.
CountTokens = Callable[[Sequence[str]], Sequence[int]]
Span = tuple[int, int]
Way = Callable[[str, Span], list[Span]]

_TEXT, _LIST, _CODE, _HEADING = "text", "list", "code", "heading"
_LINE_END = re.compile(r"\r\n|\r|\n")
_ATX = re.compile(r" {0,3}(#{1,6})(?:[ \t]|$)")
_SETEXT = re.compile(r" {0,3}(=+|-+)[ \t]*$")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_ITEM = re.compile(r"[ \t]*(?:[-*+]|[0-9]{1,9}[.)])(?:[ \t]|$)")
# Full stops and the like of several scripts (Arabic, Urdu, Devanagari; CJK, which has no blank behind them), then closing quotes.
_SENTENCE_END = re.compile(
    "[.!?\u2026\u061f\u06d4\u0964]{1,3}[\"'\u201d\u2019\u00bb)\\]]{0,3}(?=\\s)|[\u3002\uff01\uff1f]{1,3}[\u201d\u2019\u300d\u300f\uff09]{0,3}"
)
_WORD = re.compile(r"\S+")
_FRONT_MATTER = "---"
_SLICE_CHARS = 64
# Of the tokens of a chunk: for its headings, and for a sentence that is repeated, at most one part of so many. A heading begins a
# new chunk where at least the last part of them is filled.
_CONTEXT_PART, _OVERLAP_PART, _FILLED_PART = 4, 8, 3
_NUDGE_MAX = 16


@dataclass(frozen=True, slots=True)
class Chunk:
    """`text`: the source's characters [start, end), neither beginning nor ending blank. `headings`: above it, outermost first."""

    text: str
    start: int
    end: int
    headings: tuple[str, ...] = ()

    @property
    def context(self) -> str:
        return SEPARATOR.join(self.headings)

    @property
    def embedded(self) -> str:
        """What its vector is made of."""
        return f"{self.context}\n\n{self.text}" if self.headings else self.text


@dataclass(frozen=True, slots=True)
class _Line:
    start: int
    end: int
    text: str

    @property
    def blank(self) -> bool:
        return not self.text.strip()


@dataclass(frozen=True, slots=True)
class _Unit:
    """`items`: where the items of a list, or the lines of code, begin. `level` and `title`: of a heading."""

    kind: str
    start: int
    end: int
    items: tuple[int, ...] = ()
    level: int = 0
    title: str = ""


@dataclass(frozen=True, slots=True)
class _Atom:
    """What is never cut again. `path`: headings above it, indices of units. `sentence`: a part of prose that had to be cut."""

    start: int
    end: int
    tokens: int
    path: tuple[int, ...]
    heading: int = -1
    sentence: bool = False


def chunks_of(source: str, count_tokens: CountTokens, tokens_max: int, *, markdown: bool = False, title: str = "") -> list[Chunk]:
    """The chunks of a text, in order. None is longer than `tokens_max` tokens (with its context, by `count_tokens`) unless a single
    character is, nor than 8 KiB of UTF-8. `title`: of the document, the first heading of every chunk.

    Raises UsageError where there are fewer than 16 tokens, or the text is not valid Unicode.
    """
    if tokens_max < TOKENS_MIN:
        raise UsageError(f"chunks of {tokens_max} tokens are too short to mean anything", f"Give at least {TOKENS_MIN}")
    try:
        source.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError("the text is not valid Unicode", "Read it as UTF-8, with errors='replace'") from error
    return _Chunker(source, count_tokens, tokens_max, markdown, _one_line(title)).chunks()


class _Chunker:
    def __init__(self, source: str, count_tokens: CountTokens, tokens_max: int, markdown: bool, title: str) -> None:
        self._source, self._count_tokens, self._tokens_max = source, count_tokens, tokens_max
        # What every text has around it.
        (self._around,) = count_tokens([""])
        self._room = max(1, tokens_max - self._around)
        lines = _lines(source)
        self._units = list(_markdown_units(lines) if markdown else _paragraphs(lines))
        if title:
            self._units.insert(0, _Unit(_HEADING, 0, 0, level=0, title=title))
        self._has_title = bool(title)
        titles = [unit.title for unit in self._units if unit.kind == _HEADING]
        costs = iter(self._count(titles))
        # With what separates it from the next.
        self._title_tokens = {index: next(costs) + 1 for index, unit in enumerate(self._units) if unit.kind == _HEADING}

    def chunks(self) -> list[Chunk]:
        return list(self._fitting([self._chunk(group) for group in self._groups(self._atoms())]))

    # ---- from units to atoms

    def _atoms(self) -> list[_Atom]:
        atoms: list[_Atom] = []
        path: tuple[int, ...] = (0,) if self._has_title else ()
        placed: list[tuple[int, _Unit, tuple[int, ...]]] = []
        for index, unit in list(enumerate(self._units))[int(self._has_title) :]:
            if unit.kind == _HEADING:
                path = tuple(above for above in path if self._units[above].level < unit.level)
            placed.append((index, unit, path))
            if unit.kind == _HEADING:
                path = (*path, index)
        whole = self._measured([(unit.start, unit.end) for _, unit, _ in placed])
        for (index, unit, above), tokens in zip(placed, whole, strict=True):
            budget = self._budget(above)
            if tokens is not None and tokens <= budget:
                atoms.append(_Atom(unit.start, unit.end, tokens, above, index if unit.kind == _HEADING else -1))
            else:
                atoms += [replace(atom, path=above) for atom in self._parts(unit, budget)]
        return atoms

    def _measured(self, spans: Sequence[Span]) -> list[int | None]:
        """Tokens of each span, None for one of too many bytes, which is not even counted: a tokenizer may refuse it."""
        texts = [self._source[start:end] if end - start <= CHUNK_BYTES_MAX else None for start, end in spans]
        texts = [None if text is None or len(text.encode("utf-8")) > CHUNK_BYTES_MAX else text for text in texts]
        counted = iter(self._count([text for text in texts if text is not None]))
        return [None if text is None else next(counted) for text in texts]

    def _count(self, texts: Sequence[str]) -> list[int]:
        return [max(0, tokens - self._around) for tokens in self._count_tokens(texts)] if texts else []

    def _parts(self, unit: _Unit, budget: int) -> list[_Atom]:
        """The atoms of a unit that does not fit."""
        prose = unit.kind in (_TEXT, _HEADING)
        ways = [_at_items(unit.items)] if unit.items else []
        ways += [_lines_in] if unit.kind == _CODE else [_sentences, _lines_in]
        ways += [_words, _slices]
        return self._cut([(unit.start, unit.end)], ways, budget, prose=prose)

    def _cut(self, spans: Sequence[Span], ways: Sequence[Way], budget: int, *, prose: bool) -> list[_Atom]:
        """The spans cut in the first of these ways, the parts that still do not fit in the next; in the end they are halved."""
        way, finer = ways[0], ways[1:] or [_halves]
        parts = [part for span in spans for part in _trimmed(self._source, way(self._source, span))]
        atoms: list[_Atom] = []
        too_long: list[Span] = []
        for part, tokens in zip(parts, self._measured(parts), strict=True):
            if (tokens is None or tokens > budget) and part[1] - part[0] > 1:
                too_long.append(part)
                continue
            if too_long:
                atoms += self._cut(too_long, finer, budget, prose=prose)
                too_long = []
            atoms.append(_Atom(*part, tokens or 0, (), sentence=prose and way is _sentences))
        if too_long:
            atoms += self._cut(too_long, finer, budget, prose=prose)
        return atoms

    # ---- from atoms to chunks

    def _groups(self, atoms: Sequence[_Atom]) -> Iterator[list[_Atom]]:
        group: list[_Atom] = []
        tokens = n_bytes = budget = 0
        for atom in atoms:
            size = len(self._source[atom.start : atom.end].encode("utf-8"))
            gap = len(self._source[group[-1].end : atom.start].encode("utf-8")) if group else 0
            full = tokens + atom.tokens > budget or n_bytes + gap + size > CHUNK_BYTES_MAX
            begins = atom.heading >= 0 and tokens * _FILLED_PART >= budget and group and group[-1].heading < 0
            if group and (full or begins):
                left = _kept_back(group, atom)
                yield group
                group = left
                tokens = sum(one.tokens for one in group)
                n_bytes = len(self._source[group[0].start : group[-1].end].encode("utf-8")) if group else 0
                gap = len(self._source[group[-1].end : atom.start].encode("utf-8")) if group else 0
                budget = self._budget((group[0] if group else atom).path)
                overlaps = group and group[0].heading < 0
                too_long = tokens + atom.tokens > budget or n_bytes + gap + size > CHUNK_BYTES_MAX
                if overlaps and (tokens * _OVERLAP_PART > budget or too_long):
                    group, tokens, n_bytes, gap = [], 0, 0, 0
                elif group and too_long:
                    # Headings alone, before something that fills a chunk.
                    yield group
                    group, tokens, n_bytes, gap = [], 0, 0, 0
            if not group:
                budget = self._budget(atom.path)
            group.append(atom)
            tokens += atom.tokens
            n_bytes += gap + size
        if group:
            yield group

    def _budget(self, path: tuple[int, ...]) -> int:
        """Tokens for the text of a chunk that begins below these headings."""
        return self._room - sum(self._title_tokens[index] for index in self._context(path))

    def _context(self, path: tuple[int, ...]) -> tuple[int, ...]:
        """Those of these headings that are said with the chunk: the innermost ones where there is no room for all."""
        kept: list[int] = []
        tokens, n_bytes = 1, 0
        for index in reversed(path):
            tokens += self._title_tokens[index]
            n_bytes += len(self._units[index].title.encode("utf-8")) + len(SEPARATOR)
            if tokens > self._room // _CONTEXT_PART or n_bytes > CONTEXT_BYTES_MAX:
                break
            kept.append(index)
        return tuple(reversed(kept))

    def _chunk(self, group: Sequence[_Atom]) -> Chunk:
        headings = tuple(title for index in self._context(group[0].path) if (title := self._units[index].title))
        return Chunk(self._source[group[0].start : group[-1].end], group[0].start, group[-1].end, headings)

    def _fitting(self, chunks: Sequence[Chunk]) -> Iterator[Chunk]:
        """The chunks, those in two parts whose tokens together were more than those of their atoms."""
        if not chunks:
            return
        for chunk, tokens in zip(chunks, self._count_tokens([chunk.embedded for chunk in chunks]), strict=True):
            if tokens <= self._tokens_max:
                yield chunk
            elif chunk.end - chunk.start > 1:
                halves = _trimmed(self._source, _middle(self._source, (chunk.start, chunk.end)))
                yield from self._fitting([replace(chunk, text=self._source[a:b], start=a, end=b) for a, b in halves])
            elif chunk.headings:
                yield from self._fitting([replace(chunk, headings=())])
            else:
                yield chunk


def _kept_back(group: list[_Atom], following: _Atom) -> list[_Atom]:
    """What of a full chunk the next one begins with: headings at its end are moved, the last sentence of prose that goes on is
    repeated."""
    last = len(group)
    while last > 0 and group[last - 1].heading >= 0:
        last -= 1
    if 0 < last < len(group):
        moved = group[last:]
        del group[last:]
        return moved
    if following.sentence and group[-1].sentence and len(group) > 1 and group[-1].path == following.path:
        return [group[-1]]
    return []


# ---- units


def _lines(source: str) -> list[_Line]:
    lines, at = [], 0
    for found in _LINE_END.finditer(source):
        lines.append(_Line(at, found.start(), source[at : found.start()]))
        at = found.end()
    if at < len(source):
        lines.append(_Line(at, len(source), source[at:]))
    return lines


def _unit(kind: str, lines: Sequence[_Line], items: Sequence[_Line] = ()) -> _Unit:
    """From the first character that is not blank to the last."""
    first, last = lines[0], lines[-1]
    start = first.start + len(first.text) - len(first.text.lstrip())
    end = last.start + len(last.text.rstrip())
    return _Unit(kind, start, end, tuple(line.start for line in items))


def _paragraphs(lines: Sequence[_Line]) -> Iterator[_Unit]:
    paragraph: list[_Line] = []
    for line in lines:
        if not line.blank:
            paragraph.append(line)
        elif paragraph:
            yield _unit(_TEXT, paragraph)
            paragraph = []
    if paragraph:
        yield _unit(_TEXT, paragraph)


def _markdown_units(lines: Sequence[_Line]) -> Iterator[_Unit]:
    at = 0
    if lines and lines[0].text.strip() == _FRONT_MATTER:
        end = next((n for n, line in enumerate(lines[1:], 1) if line.text.strip() == _FRONT_MATTER), 0)
        if end:
            yield _unit(_CODE, lines[: end + 1])
            at = end + 1
    while at < len(lines):
        line = lines[at]
        if line.blank:
            at += 1
        elif fence := _FENCE.match(line.text):
            end = _fence_end(lines, at, fence.group(1))
            yield _unit(_CODE, _without_blank_end(lines[at:end]))
            at = end
        elif atx := _ATX.match(line.text):
            title = line.text.strip().lstrip("#").strip().rstrip("#").strip()
            yield replace(_unit(_HEADING, [line]), level=len(atx.group(1)), title=_one_line(title))
            at += 1
        elif _ITEM.match(line.text):
            end = _list_end(lines, at)
            block = _without_blank_end(lines[at:end])
            indent = _indent(line.text)
            yield _unit(_LIST, block, [one for one in block if _ITEM.match(one.text) and _indent(one.text) <= indent])
            at = end
        else:
            end = at + 1
            while end < len(lines) and not _ends_paragraph(lines[end]):
                end += 1
            underline = _SETEXT.match(lines[end].text) if end < len(lines) and end == at + 1 else None
            if underline:
                unit = _unit(_HEADING, lines[at : end + 1])
                yield replace(unit, level=1 if "=" in underline.group(1) else 2, title=_one_line(line.text))
                at = end + 1
            else:
                yield _unit(_TEXT, lines[at:end])
                at = end


def _ends_paragraph(line: _Line) -> bool:
    text = line.text
    return line.blank or any(form.match(text) for form in (_FENCE, _ATX, _SETEXT, _ITEM))


def _fence_end(lines: Sequence[_Line], at: int, fence: str) -> int:
    for number in range(at + 1, len(lines)):
        text = lines[number].text.strip()
        if len(text) >= len(fence) and not text.strip(fence[0]):
            return number + 1
    return len(lines)


def _list_end(lines: Sequence[_Line], at: int) -> int:
    """Items, and between them what is indented or follows without a blank line."""
    end, after_blank = at + 1, False
    while end < len(lines):
        line = lines[end]
        if line.blank:
            after_blank = True
        elif _ITEM.match(line.text) or (after_blank and line.text[0] in " \t") or not (after_blank or _ends_paragraph(line)):
            after_blank = False
        else:
            break
        end += 1
    return end


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip(" \t"))


def _without_blank_end(lines: Sequence[_Line]) -> Sequence[_Line]:
    end = len(lines)
    while end > 1 and lines[end - 1].blank:
        end -= 1
    return lines[:end]


def _one_line(title: str) -> str:
    """At most some words, however long it is."""
    return " ".join(title[: 4 * TITLE_CHARS_MAX].split())[:TITLE_CHARS_MAX].rstrip()


# ---- ways to cut


def _trimmed(source: str, spans: Sequence[Span]) -> list[Span]:
    """Without blank ends, and without those that are all blank."""
    found = []
    for start, end in spans:
        text = source[start:end]
        if text.strip():
            found.append((start + len(text) - len(text.lstrip()), start + len(text.rstrip())))
    return found


def _between(span: Span, cuts: Sequence[int]) -> list[Span]:
    start, end = span
    return list(pairwise([start, *(cut for cut in cuts if start < cut < end), end]))


def _at_items(items: Sequence[int]) -> Way:
    return lambda source, span: _between(span, items)


def _lines_in(source: str, span: Span) -> list[Span]:
    return _between(span, [found.end() for found in _LINE_END.finditer(source, *span)])


def _sentences(source: str, span: Span) -> list[Span]:
    """A full stop before a small letter is one of an abbreviation."""
    cuts = []
    for found in _SENTENCE_END.finditer(source, *span):
        after = _WORD.search(source, found.end(), min(span[1], found.end() + _NUDGE_MAX))
        if after is None or not after.group()[0].islower():
            cuts.append(found.end())
    return _between(span, cuts)


def _words(source: str, span: Span) -> list[Span]:
    return [found.span() for found in _WORD.finditer(source, *span)]


def _slices(source: str, span: Span) -> list[Span]:
    start, end = span
    return _between(span, [_nudged(source, cut, end) for cut in range(start + _SLICE_CHARS, end, _SLICE_CHARS)])


def _halves(source: str, span: Span) -> list[Span]:
    start, end = span
    cut = _nudged(source, (start + end) // 2, end)
    return _between(span, [cut if cut < end else (start + end) // 2])


def _middle(source: str, span: Span) -> list[Span]:
    """In two, at a blank near the middle where there is one."""
    start, end = span
    middle = (start + end) // 2
    quarter = (end - start) // 4
    after = _WORD.search(source, middle, end)
    blank = next((at for at in range(middle, middle + quarter) if source[at].isspace()), None) if after else None
    return _between(span, [blank]) if blank is not None else _halves(source, span)


def _nudged(source: str, cut: int, end: int) -> int:
    """A little later where the cut would part a character from what belongs to it: accents, variants, joined emoji."""
    for at in range(cut, min(end, cut + _NUDGE_MAX)):
        if not (_joins(source[at]) or source[at - 1] == "\u200d"):
            return at
    return cut


def _joins(char: str) -> bool:
    return char in "\u200d\n" or unicodedata.category(char) in ("Mn", "Me", "Mc") or "\U0001f3fb" <= char <= "\U0001f3ff"
