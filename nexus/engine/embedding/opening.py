"""From what a user calls a model to an embedder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from nexus.core.errors import NotFoundError
from nexus.core.manifest import Manifest
from nexus.engine.embedding.embedder import Embedder
from nexus.engine.embedding.exact_encoder import load_exact_embedder
from nexus.models import MINILM

DEFAULT_MODEL = MINILM

# The manifest and the paths of its blobs, by name, of a model that this node holds. Raises NotFoundError for others.
Stored = Callable[[str], tuple[Manifest, Mapping[str, Path]]]


def open_embedder(name: str, stored: Stored, *, workers: int = 0, download: bool = False) -> Embedder:
    """`name`: a model that is added here (`nexus model add`; "minilm" is there by itself), else a directory, else the id of a model
    on the Hugging Face hub that is in this machine's cache. `download`: whether such a one may be fetched.

    An exact model takes a tenth of a second, others some seconds: call it in a worker thread. Raises UsageError, NotFoundError,
    ModelFormatError, LocalError.
    """
    try:
        manifest, files = stored(name)
    except NotFoundError as error:
        return _from_elsewhere(name, error, download=download)
    return load_exact_embedder(name, manifest, files, workers=workers)


def _from_elsewhere(name: str, unknown: NotFoundError, *, download: bool) -> Embedder:
    # The library takes seconds to import: a node that embeds with its own models never pays for it.
    from nexus.engine.embedding.library import cached_directory, load_library_embedder

    path = Path(name).expanduser()
    if path.is_dir():
        return load_library_embedder(path.name, path.resolve())
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise NotFoundError(
            f"{name!r} is neither a model that was added here nor a directory", "See `nexus model list`, or give a path"
        ) from unknown
    return load_library_embedder(name.rpartition("/")[2], cached_directory(name, download=download))
