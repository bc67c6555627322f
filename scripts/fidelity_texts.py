"""The texts that `nexus model fidelity` takes by default. Usage: python -m scripts.fidelity_texts

nexus/models/held_out.txt: conversations of nano's grammar in wordings that its training never saw. nexus/models/sentences.txt:
different sentences of natural English, one per line, from the facts that nano knows and from this project's own prose.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from scripts.nano_corpus import documents, normalised

ROOT = Path(__file__).resolve().parents[1]
HELD_OUT, SENTENCES = ROOT / "nexus" / "models" / "held_out.txt", ROOT / "nexus" / "models" / "sentences.txt"
SEED = 20
DOCUMENTS = 120
COUNT = 1000
PROSE = ("README.md", "CHANGELOG.md", "docs/**/*.md", "nexus/models/nano/README.md")
WORDS_MIN, WORDS_MAX = 4, 60
_SENTENCE_END = re.compile(r"(?<=[.!?:;])\s+(?=[A-Z\"(])")
_NOT_PROSE = re.compile(r"[{}|<>=\\`_\[\]*#]|\(\)|\d{5}")


def held_out() -> str:
    """Documents with a blank line between them, each as the model is trained to see it, with the marks of its ends."""
    return "\n\n".join(document.text.strip() for document in islice(documents(SEED, "held-out"), DOCUMENTS)) + "\n"


def sentences() -> list[str]:
    """`COUNT` different sentences: all of the facts and the documentation, and as many of the code's as are still missing."""
    whole = [sentence for text in (*_facts(), *_prose()) for sentence in _split(text)]
    more = [sentence for text in _docstrings() for sentence in _split(text)]
    # Sentences that say the same but for a sign or a number would be each other's neighbours for no reason of meaning.
    unique: dict[str, str] = {}
    for sentence in (*whole, *more):
        unique.setdefault(re.sub(r"[0-9]+", "", normalised(sentence)), sentence)
    found = list(unique.values())
    sure = len({re.sub(r"[0-9]+", "", normalised(sentence)) for sentence in whole})
    extra, missing = found[sure:], COUNT - sure
    return found[:sure][:COUNT] + [extra[index * len(extra) // missing] for index in range(missing)]


def _facts() -> Iterator[str]:
    facts = tomllib.loads((ROOT / "scripts" / "nano_facts.toml").read_text("utf-8"))
    for entry in (entry for part in facts.values() if isinstance(part, list) for entry in part):
        for key, value in entry.items():
            if key not in ("asks", "ask", "about", "term", "name", "also", "answer"):
                yield from value if isinstance(value, list) else [value]


def _prose() -> Iterator[str]:
    """Paragraphs of the documentation without code, tables and headings; links and marks of emphasis become what they show."""
    for path in sorted(path for pattern in PROSE for path in ROOT.glob(pattern)):
        text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
        for paragraph in re.split(r"\n\s*\n", text):
            for item in re.split(r"^\s*(?:[-*]|\d+\.)\s+", paragraph, flags=re.MULTILINE):
                if not re.match(r"\s*[#|]| {4}", item):
                    yield _plain(item)


def _docstrings() -> Iterator[str]:
    """What the code says about itself."""
    for path in sorted((ROOT / "nexus").rglob("*.py")):
        for text in re.findall(r'"""(.*?)"""', path.read_text("utf-8"), flags=re.DOTALL):
            for paragraph in re.split(r"\n\s*\n", text):
                yield _plain(paragraph)


def _plain(text: str) -> str:
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"\*\*|`", "", text)


def _split(text: str) -> Iterator[str]:
    for sentence in _SENTENCE_END.split(" ".join(text.split())):
        words = len(sentence.split())
        sound = WORDS_MIN <= words <= WORDS_MAX and sentence[0].isupper() and sentence[-1] in ".!?"
        if sound and not _NOT_PROSE.search(sentence) and sentence.count('"') % 2 == 0:
            yield sentence


def main() -> None:
    HELD_OUT.write_text(held_out(), "utf-8")
    found = sentences()
    SENTENCES.write_text("\n".join(found) + "\n", "utf-8")
    print(f"{HELD_OUT.name}: {DOCUMENTS} documents; {SENTENCES.name}: {len(found)} sentences")


if __name__ == "__main__":
    main()
