"""Which models this node knows, and what their owner calls them.

    <hex root>.manifest   the manifest's bytes; the root in the name proves them
    <hex root>.notes      what this node alone knows of the model (`nexus.storage.notes`); no part of the root
    names.json            local names: a convenience, so a damaged file is moved aside and the models stay

A model without a name is one whose layers this node serves or fetched for others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from nexus.core.errors import LocalError, MalformedError, NotFoundError, UsageError
from nexus.core.hashing import HASH_BYTES
from nexus.core.manifest import Manifest
from nexus.storage.blobs import BlobStore
from nexus.storage.durable import move_aside, replace_file, storage_error, sync_directory
from nexus.storage.notes import NOTES_BYTES_MAX, ModelNotes

MANIFEST_BYTES_MAX = 1 << 20
MODELS_MAX = 4096
PREFIX_CHARS_MIN = 4
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HEX = re.compile(r"[0-9a-f]{4,64}")


def check_name(name: str) -> str:
    """A model's name as a user gave it. Raises UsageError with the allowed form."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name[:80]!r} cannot name a model",
            "Give it another name (--name): 1 to 64 letters, digits, dots, dashes and underscores, a letter or digit first",
        )
    return name


def held_layers(manifest: Manifest, store: BlobStore) -> tuple[tuple[int, int], ...]:
    """Maximal ranges [start, end) of layers that can be served from the store: embedding and head count with their layers."""
    embedding, *layers, head = (store.has(piece.root) for piece in manifest.pieces)
    ranges: list[tuple[int, int]] = []
    for layer, here in enumerate(layers):
        last = layer == manifest.layers - 1
        if here and (embedding or not (layer == 0 or (last and manifest.tied))) and (head or not last):
            if ranges and ranges[-1][1] == layer:
                ranges[-1] = (ranges[-1][0], layer + 1)
            else:
                ranges.append((layer, layer + 1))
    return tuple(ranges)


def held_bytes(manifest: Manifest, store: BlobStore) -> int:
    """Bytes of the model's pieces and files that are in the store."""
    sizes = {blob.root: blob.size for blob in (*manifest.pieces, *manifest.files)}
    return sum(size for root, size in sizes.items() if store.has(root))


class Catalog:
    """Manifests and local names under one directory, which may be the blob store's. `warning`: what was wrong there, or ""."""

    def __init__(self, root: Path) -> None:
        """Touches no file; `open` does."""
        self._root = root
        self._names: dict[str, bytes] = {}
        self.warning = ""

    @classmethod
    def open(cls, root: Path) -> Self:
        """The catalog under `root`, made if need be. Raises LocalError."""
        catalog = cls(root)
        path = root / "names.json"
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            catalog._names = _parse_names(path.read_bytes())
        except FileNotFoundError:
            pass
        except OSError as error:
            raise storage_error(error, path) from error
        except MalformedError as error:
            aside = move_aside(path)
            catalog.warning = (
                f"{path} was damaged ({error.cause}) and is now {aside}; the models are there, by root, without their names"
            )
        return catalog

    def add(self, name: str, manifest: Manifest) -> None:
        """Keep a model under a name. Raises UsageError for a bad name or one that another model has, LocalError.

        A name whose manifest is damaged, or of an older version of Nexus, is free: adding the model again is how that is mended.
        """
        check_name(name)
        root = manifest.root
        held = self._names.get(name, root)
        if held != root and self._is_readable(held):
            raise UsageError(f"{name!r} already names another model", "Choose another name, or remove that model first")
        self.keep(manifest)
        self._write_names({**self._names, name: root})

    def point(self, name: str, root: bytes) -> None:
        """Let a name mean another model that is known here, as when a new version of it comes. Raises UsageError for a bad name,
        NotFoundError, LocalError."""
        check_name(name)
        self.manifest(root)
        if self._names.get(name) != root:
            self._write_names({**self._names, name: root})

    def keep(self, manifest: Manifest) -> None:
        """Keep a model without a name. Raises MalformedError for one whose parts do not fit, LocalError."""
        manifest.check()
        path, raw = self._file(manifest.root), manifest.to_bytes()
        if not path.exists() and len(self.roots()) >= MODELS_MAX:
            raise UsageError(
                f"this node knows {MODELS_MAX} models already",
                "Keep models that you do not need in another data directory (--home)",
            )
        # Also where it is there already: that mends a damaged one.
        replace_file(path, raw)

    def remove(self, root: bytes) -> None:
        """Forget a model and every name of it; its blobs stay until `BlobStore.collect`. Nothing happens if it is not known."""
        if root in self._names.values():
            self._write_names({name: named for name, named in self._names.items() if named != root})
        try:
            self._notes_file(root).unlink(missing_ok=True)
            self._file(root).unlink(missing_ok=True)
            sync_directory(self._root)
        except OSError as error:
            raise storage_error(error, self._file(root)) from error

    def notes(self, root: bytes) -> ModelNotes:
        """What was noted of a model. Nothing where there is nothing, or nothing sound: it is all had again by asking again."""
        try:
            with open(self._notes_file(root), "rb") as file:
                return ModelNotes.from_bytes(file.read(NOTES_BYTES_MAX + 1))
        except (OSError, MalformedError):
            return ModelNotes()

    def note(self, root: bytes, notes: ModelNotes) -> None:
        """Replace what was noted of a model. Raises LocalError."""
        replace_file(self._notes_file(root), notes.to_bytes())

    def names(self) -> dict[str, bytes]:
        """Every local name and the root it stands for, sorted by name."""
        return dict(sorted(self._names.items()))

    def name_of(self, root: bytes) -> str:
        """The first of the model's local names, or the start of its hex root where it has none."""
        return min((name for name, named in self._names.items() if named == root), default=root.hex()[:12])

    def roots(self) -> list[bytes]:
        """Every known model, named or not, sorted."""
        stems = (path.stem for path in self._root.glob("*.manifest"))
        return sorted(bytes.fromhex(stem) for stem in stems if len(stem) == 2 * HASH_BYTES and _HEX.fullmatch(stem))

    def has(self, root: bytes) -> bool:
        return self._file(root).exists()

    def manifest(self, root: bytes) -> Manifest:
        """Raises NotFoundError, and LocalError where the disk changed it."""
        path = self._file(root)
        try:
            with open(path, "rb") as file:
                raw = file.read(MANIFEST_BYTES_MAX + 1)
        except FileNotFoundError:
            raise NotFoundError(f"model {root.hex()[:16]} is not known here", "`nexus model list` shows those that are") from None
        except OSError as error:
            raise storage_error(error, path) from error
        try:
            return parse_manifest(raw, root)
        except MalformedError as error:
            raise LocalError(
                f"{path} is damaged: {error.cause}",
                "The disk may be failing: check it. Then add the model again, which replaces what is damaged",
            ) from error

    def find(self, text: str) -> bytes:
        """The root that a user means: a name, or a prefix of the hex root that fits one model. Raises NotFoundError, UsageError."""
        if text in self._names:
            return self._names[text]
        roots = [root for root in self.roots() if root.hex().startswith(text)] if _HEX.fullmatch(text) else []
        if not roots:
            known = ", ".join(self.names()) or "none yet"
            raise NotFoundError(f"no model is called {text[:80]!r}", f"Known models: {known}. Add one with `nexus model add PATH`")
        if len(roots) > 1:
            listed = ", ".join(f"{root.hex()[:16]} ({self.name_of(root)})" for root in roots[:8])
            raise UsageError(f"{text!r} fits {len(roots)} models: {listed}", "Give more of the root, or a name")
        return roots[0]

    def _is_readable(self, root: bytes) -> bool:
        try:
            self.manifest(root)
        except (NotFoundError, LocalError):
            return False
        return True

    def _file(self, root: bytes) -> Path:
        if len(root) != HASH_BYTES:
            raise ValueError(f"a root has {HASH_BYTES} bytes, not {len(root)}")
        return self._root / f"{root.hex()}.manifest"

    def _notes_file(self, root: bytes) -> Path:
        return self._file(root).with_suffix(".notes")

    def _write_names(self, names: Mapping[str, bytes]) -> None:
        listed = {name: root.hex() for name, root in sorted(names.items())}
        replace_file(self._root / "names.json", json.dumps({"spec": 1, "names": listed}, indent=1).encode() + b"\n")
        self._names = dict(names)


def parse_manifest(raw: bytes, root: bytes) -> Manifest:
    """The manifest in `raw`, checked part by part and against the root it should have. Raises MalformedError."""
    if len(raw) > MANIFEST_BYTES_MAX:
        raise MalformedError(f"a manifest of more than {MANIFEST_BYTES_MAX} bytes")
    manifest = Manifest.from_bytes(raw).check()
    if manifest.root != root:
        raise MalformedError("the manifest is of another model")
    return manifest


def _parse_names(raw: bytes) -> dict[str, bytes]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise MalformedError("not JSON") from error
    names = value.get("names") if isinstance(value, dict) and value.get("spec") == 1 else None
    if not isinstance(names, dict) or len(names) > MODELS_MAX:
        raise MalformedError("not a list of names")
    for name, root in names.items():
        if not _NAME.fullmatch(name) or not isinstance(root, str) or len(root) != 2 * HASH_BYTES or not _HEX.fullmatch(root):
            raise MalformedError(f"no name and root: {name[:80]!r}")
    return {name: bytes.fromhex(root) for name, root in names.items()}
