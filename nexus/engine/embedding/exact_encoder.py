"""An encoder of the exact profile as an embedder: the same bits on every machine, and there in a fraction of a second.

It runs the compiled step without torch (`nexus.engine.exact.native`). Where none is right on this processor, or none was built,
stock torch operations give the same bits, more slowly. Nothing is served before the model's known answers came out bit for bit, and
they are computed again every ten minutes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from nexus.core.errors import LocalError, ModelFormatError, NexusError, NotFoundError, UsageError
from nexus.core.manifest import CHUNK_BYTES, ENCODER, EXACT, EXACT_PLAN, EXACT_TABLES, EXACT_VECTORS, Blob, Manifest, blob_root
from nexus.engine.embedding.embedder import TokenEmbedder, Vectors, processors
from nexus.engine.exact import native
from nexus.engine.exact.known_answers import KnownAnswers, table_shapes
from nexus.engine.exact.pieces import Piece, read_tables
from nexus.engine.tokenizer import Tokenizer
from nexus.proof.arithmetic import ops
from nexus.proof.arithmetic.plan import PLAN_BYTES_MAX, ExactPlan, plan_from_json

RECHECK_S = 600.0
TORCH = "torch"
_AGAIN = "Add or fetch the model again: nexus model add"

# Token ids int64 [rows] of texts of these lengths, one after another -> hidden states float32 [rows, hidden].
Compute = Callable[[Sequence[int], NDArray[np.int64]], NDArray[np.float32]]


class ExactEmbedder(TokenEmbedder):
    """Made by `load_exact_embedder`. `fingerprint` is the root of the model's manifest. `kernel`: what computes here."""

    exact = True

    def __init__(
        self,
        name: str,
        manifest: Manifest,
        plan: ExactPlan,
        tokenizer: Tokenizer,
        answers: KnownAnswers,
        kernel: str,
        compute: Compute,
        workers: int,
    ) -> None:
        super().__init__(name, manifest.root, plan.hidden, manifest.context, workers)
        self.kernel = kernel
        self._plan, self._tokenizer, self._answers, self._compute = plan, tokenizer, answers, compute
        self._checked_s = monotonic()

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [self._tokenizer.count(text) for text in texts]

    def check(self) -> None:
        """Compute the known answers once more. Raises LocalError where a single bit differs."""
        known = self._answers
        hidden = self._compute([len(known.tokens)], known.tokens)
        same = _same_bits(hidden, known.states[-1]) and _same_bits(ops.pooled(self._plan, hidden), known.answer)
        if not same:
            raise LocalError(
                f"the model {self.name!r} does not give its known answers with the kernel {self.kernel}",
                "Nothing is embedded with it. Try `nexus engine check`; if every kernel is right, add the model again",
            )
        self._checked_s = monotonic()

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._tokenizer.encode(text) for text in texts]

    def _vectors(self, batch: Sequence[Sequence[int]]) -> Vectors:
        if monotonic() - self._checked_s > RECHECK_S:
            self.check()
        lengths = [len(ids) for ids in batch]
        hidden = self._compute(lengths, np.concatenate([np.asarray(ids, np.int64) for ids in batch]))
        return np.stack([self._unit(part) for part in np.split(hidden, np.cumsum(lengths)[:-1])])

    def _unit(self, hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        """The model's own vector where that has length 1. Another is scaled in float64, one rounding after another as docs/exact.md
        asks: the bits are again the same everywhere."""
        vector = ops.pooled(self._plan, hidden)
        if self._plan.normalized:
            return vector
        v, c = ops.fixed_point(vector[None])
        length = np.sqrt((v * v).sum(-1) / (c[0] * c[0]))
        scaled: NDArray[np.float32] = (vector.astype(np.float64) / length).astype(np.float32)
        return scaled


def load_exact_embedder(
    name: str, manifest: Manifest, files: Mapping[str, Path], *, workers: int = 0, kernel: str | None = None
) -> ExactEmbedder:
    """`files`: paths by blob name, all pieces and files of the manifest, each read and compared with its root in the manifest.

    `workers`: batches that are computed at once, 0 for one per processor that this process may use. `kernel`: a variant of
    `nexus.engine.exact.native.available()` or "torch"; None takes the fastest that gives the known answers. About 0.1 s and 40 MB
    for MiniLM. Raises UsageError for a model that is not an exact encoder, NotFoundError where a part of it is not here,
    ModelFormatError where a part is not the manifest's.
    """
    manifest.check()
    if manifest.kind != ENCODER:
        raise UsageError(f"{name!r} is a language model: it makes no vectors", "Name a sentence encoder, e.g. minilm")
    if manifest.profile != EXACT:
        raise UsageError(
            f"{name!r} is in the float profile, which this embedder does not run",
            "Add it with --profile exact, or give its directory",
        )
    wanted = {blob.name: blob for blob in (*manifest.files, *manifest.pieces)}
    if missing := sorted(wanted.keys() - files.keys()):
        raise NotFoundError(f"{missing[0]} of the model {name!r} is not on this node", _AGAIN)
    workers = workers or processors()
    with ThreadPoolExecutor(2) as pool:
        # Most of the time is spent outside of Python: reading, hashing and packing go side by side.
        hashing = pool.submit(_check_roots, [(blob, files[name]) for name, blob in wanted.items()])
        tokenizing = pool.submit(Tokenizer.load, files, manifest.context)
        plan = _read_plan(manifest, files[EXACT_PLAN])
        answers = KnownAnswers.read(files[EXACT_VECTORS], plan)
        tables = read_tables(files[EXACT_TABLES], table_shapes(plan))
        pieces = {piece.name: Piece(files[piece.name], plan.piece_tensors(piece.name)) for piece in manifest.pieces}
        failures: list[str] = []
        for variant in [kernel] if kernel else [*native.available(), TORCH]:
            try:
                computes, compute = _build(plan, pieces, tables, variant)
                hashing.result()
                embedder = ExactEmbedder(name, manifest, plan, tokenizing.result(), answers, computes, compute, workers)
                embedder.check()
            except LocalError as error:
                failures.append(error.cause)
            else:
                return embedder
    raise LocalError(f"no kernel gives the known answers of {name!r}: {failures[0]}", "See `nexus engine check`")


def _same_bits(one: NDArray[np.float32], other: NDArray[np.float32]) -> bool:
    return np.array_equal(one.view(np.uint32), other.view(np.uint32))


def _read_plan(manifest: Manifest, path: Path) -> ExactPlan:
    with path.open("rb") as file:
        plan = plan_from_json(file.read(PLAN_BYTES_MAX + 1))
    shape = (len(plan.layers), plan.hidden, plan.vocab, plan.causal)
    if shape != (manifest.layers, manifest.hidden_size, manifest.vocab_size, False) or manifest.context > plan.context:
        raise ModelFormatError(f"{EXACT_PLAN} and the manifest describe different models", _AGAIN)
    return plan


def _check_roots(blobs: Sequence[tuple[Blob, Path]]) -> None:
    for blob, path in blobs:
        try:
            if _root(path) != blob.root:
                raise ModelFormatError(f"{blob.name} is not what the model's manifest names: the file is damaged", _AGAIN)
        except OSError as error:
            raise NotFoundError(f"{blob.name} cannot be read: {error.strerror}", _AGAIN) from error


def _root(path: Path) -> bytes:
    hashes: list[bytes] = []
    size = 0
    with path.open("rb", buffering=0) as file:
        while (chunk := _read_chunk(file)) or not hashes:
            hashes.append(blake3(b"\0").update(chunk).digest())  # a leaf, without a copy of the chunk
            size += len(chunk)
    return blob_root(size, hashes)


def _read_chunk(file: Any) -> bytes:
    """Up to CHUNK_BYTES; fewer only at the end."""
    parts, left = [], CHUNK_BYTES
    while left and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts) if len(parts) != 1 else parts[0]


def _build(
    plan: ExactPlan, pieces: Mapping[str, Piece], tables: Mapping[str, NDArray[np.float64]], variant: str
) -> tuple[str, Compute]:
    if variant == TORCH:
        return _build_torch(plan, pieces, tables)
    try:
        model = native.build(plan, 0, len(plan.layers), pieces, tables, variant)
    except NexusError:
        raise
    except ValueError as error:
        raise LocalError(f"the kernel {variant} does not take this model: {error}", "Use another one") from error

    def compute(lengths: Sequence[int], ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return model.compute([model.run(None, 0, length) for length in lengths], ids, threads=1)

    return model.kernel, compute


def _build_torch(plan: ExactPlan, pieces: Mapping[str, Piece], tables: Mapping[str, NDArray[np.float64]]) -> tuple[str, Compute]:
    import torch

    from nexus.engine.exact.stage import build_torch

    model = build_torch(plan, 0, len(plan.layers), pieces, tables, None)

    def compute(lengths: Sequence[int], ids: NDArray[np.int64]) -> NDArray[np.float32]:
        # An encoder sees the whole of a text: this path takes them one by one.
        with torch.inference_mode():
            parts = torch.split(torch.from_numpy(ids), list(lengths))
            return np.concatenate([model.step([model.run(None, 0, len(part))], part).numpy() for part in parts])

    return f"torch ({model.kernel})", compute
