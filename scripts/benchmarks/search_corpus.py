"""Real sentences and their vectors: from the documentation that is on the machine, by the built-in MiniLM.

The sentences come from the .rst, .md and .txt files and the docstrings of installed Python packages and from the system's
documentation, each sentence once. Embedding takes minutes, so the vectors are kept in the user's cache directory, under the hash of
the sentences and the model; delete them whenever you like.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import json
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import platformdirs
from numpy.typing import NDArray

from nexus.core.errors import LocalError
from nexus.engine.embedding.library import load_library_embedder
from nexus.models import MINILM, builtin_path

QUERIES = 2000
_PLACES = ("/usr/share/doc", "/usr/share/perl", "/usr/share/perl5")
_TEXTS = (".rst", ".md", ".txt", ".pod")
_CHARS_MIN, _CHARS_MAX = 40, 300
_WORDS_MIN = 7
_FILE_BYTES_MAX = 1 << 20
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")
_SENTENCE = re.compile(r"[A-Z][\w'\",;:()\-/ ]+[.!?]")
_AT_ONCE = 1024


class Corpus(NamedTuple):
    """`vectors`: float32 [n, d] of `sentences`, `queries`: float32 [m, d] of other sentences. Of length 1 each."""

    sentences: list[str]
    vectors: NDArray[np.float32]
    queries: NDArray[np.float32]
    model: str


def load(count: int) -> Corpus:
    """`count` sentences, fewer if there are no more here, and queries."""
    found = _kept_sentences()[: count + QUERIES]
    if len(found) <= 2 * QUERIES:
        raise LocalError(
            f"there are only {len(found)} sentences in the documentation on this machine", "Install some more packages"
        )
    path = builtin_path(MINILM)
    embedder = load_library_embedder(MINILM, path)
    digest = hashlib.sha256("\n".join([embedder.fingerprint.hex(), *found]).encode()).hexdigest()
    cached = _cache() / f"search-{digest[:16]}.npy"
    if cached.is_file():
        vectors = np.load(cached, allow_pickle=False)
    else:
        parts = []
        for at in range(0, len(found), _AT_ONCE):
            parts.append(embedder.embed(found[at : at + _AT_ONCE]))
            print(f"embedding {at} of {len(found)}", file=sys.stderr, flush=True)
        vectors = np.concatenate(parts)
        cached.parent.mkdir(parents=True, exist_ok=True)
        np.save(cached, vectors, allow_pickle=False)
    return Corpus(found[:-QUERIES], vectors[:-QUERIES], vectors[-QUERIES:], f"{MINILM} by {type(embedder).__name__}")


def _kept_sentences() -> list[str]:
    """All sentences, kept in the cache for as long as the same packages are installed: to read them takes a minute or more."""
    installed = sorted(f"{each.name}=={each.version}" for each in importlib.metadata.distributions())
    key = hashlib.sha256("\n".join(installed).encode()).hexdigest()[:16]
    kept = _cache() / f"sentences-{key}.json"
    if kept.is_file():
        found: list[str] = json.loads(kept.read_text("utf-8"))
        return found
    found = sentences()
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found), "utf-8")
    return found


def _cache() -> Path:
    return Path(platformdirs.user_cache_dir("nexus-bench"))


def sentences() -> list[str]:
    """All sentences, each once, in the order of their hashes: the same for the same packages, whatever the order of files."""
    found: set[str] = set()
    for text in _texts():
        for piece in _END.split(" ".join(text.split())):
            if _CHARS_MIN <= len(piece) <= _CHARS_MAX and len(piece.split()) >= _WORDS_MIN and _SENTENCE.fullmatch(piece):
                found.add(piece)
    return sorted(found, key=lambda sentence: hashlib.sha256(sentence.encode()).digest())


def _texts() -> Iterator[str]:
    roots = [Path(sysconfig.get_path("purelib")), Path(sysconfig.get_path("stdlib")), *map(Path, _PLACES)]
    for root in roots:
        for path in root.rglob("*"):
            if path.suffix in (*_TEXTS, ".py") and path.is_file() and path.stat().st_size <= _FILE_BYTES_MAX:
                text = path.read_text("utf-8", "ignore")
                if path.suffix == ".py":
                    yield from _docstrings(text)
                else:
                    yield from re.split(r"\n\s*\n", text)


def _docstrings(source: str) -> Iterator[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield from re.split(r"\n\s*\n", text)
