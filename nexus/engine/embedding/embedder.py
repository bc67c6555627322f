"""What an embedder is, whatever runs behind it, and what all of them share: checks of texts, batches of like length."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import LocalError, UsageError
from nexus.memory.quantise import Codes, Scales, quantise, restore, unit

# A text has some hundred tokens before it is cut; what is so much longer was meant to be chunked first (nexus.memory.chunk).
TEXT_BYTES_MAX = 64 * 1024
# Texts whose tokens are held at once, and tokens that are computed at once: they bound the memory, whatever is asked for.
WINDOW_TEXTS, BATCH_TOKENS = 512, 1024
# Between vectors of one text that two machines or two batches made with one model. Of an exact model the bits are the same.
SAME_COSINE = 0.999

Vectors = NDArray[np.float32]
# Told the texts that are done, and all of them, between batches, in the thread that embeds; what it raises ends the work.
Progress = Callable[[int, int], None]


class Embedder(Protocol):
    """`fingerprint`: 32 bytes, the same for the same model wherever it runs. `exact`: a text's vector has the same bits on every
    machine, so a vector from a peer is checked by equality; else by a cosine of at least SAME_COSINE. `tokens_max`: of a text, the
    special ones around it counted; what follows is not read."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> bytes: ...

    @property
    def dimension(self) -> int: ...

    @property
    def tokens_max(self) -> int: ...

    @property
    def exact(self) -> bool: ...

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Of each whole text, the special tokens counted: more than `tokens_max` is cut when it is embedded. Raises UsageError."""

    def embed(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        """float32 [len(texts), dimension], each of length 1. May be called from any thread, from several at once. Raises UsageError
        for what is no text, and whatever `progress` raises."""


class TokenEmbedder(ABC):
    """An embedder that turns texts into token ids and these, in batches of like length, into vectors."""

    exact = False

    def __init__(self, name: str, fingerprint: bytes, dimension: int, tokens_max: int, workers: int = 1) -> None:
        """`workers`: batches of one call that are computed at once, each by one thread."""
        self.name, self.fingerprint, self.dimension, self.tokens_max = name, fingerprint, dimension, tokens_max
        self._workers = workers

    @abstractmethod
    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, at least one and at most `tokens_max`."""

    @abstractmethod
    def _vectors(self, batch: Sequence[Sequence[int]]) -> Vectors:
        """float32 [n, dimension] of the texts with these ids."""

    @abstractmethod
    def count_tokens(self, texts: Sequence[str]) -> list[int]: ...

    def embed(self, texts: Sequence[str], progress: Progress | None = None) -> Vectors:
        check_texts(texts)
        vectors = np.empty((len(texts), self.dimension), np.float32)
        told = progress or _nobody
        done = 0
        told(done, len(texts))
        with closing(self._computed(texts)) as computed:
            for which, batch in computed:
                vectors[which] = batch
                done += len(which)
                told(done, len(texts))
        return checked(vectors)

    def _computed(self, texts: Sequence[str]) -> Generator[tuple[list[int], Vectors], None, None]:
        """Which texts, and their vectors, batch by batch."""
        work = self._batches(texts)
        if self._workers == 1 or len(texts) == 1:
            for which, ids in work:
                yield which, self._vectors(ids)
            return
        # Batches are computed whole by one thread each: threads that share one would wait for each other at every layer, and for
        # whatever else the machine does.
        with ThreadPoolExecutor(self._workers) as pool:
            running: deque[tuple[list[int], Future[Vectors]]] = deque()
            try:
                for which, ids in work:
                    if len(running) >= self._workers:
                        first, future = running.popleft()
                        yield first, future.result()
                    running.append((which, pool.submit(self._vectors, ids)))
                while running:
                    first, future = running.popleft()
                    yield first, future.result()
            finally:
                for _, future in running:
                    future.cancel()

    def _batches(self, texts: Sequence[str]) -> Iterator[tuple[list[int], list[list[int]]]]:
        for start in range(0, len(texts), WINDOW_TEXTS):
            ids = self._tokens(texts[start : start + WINDOW_TEXTS])
            for which in batches([len(one) for one in ids]):
                yield [start + index for index in which], [ids[index] for index in which]


def _nobody(done: int, total: int) -> None:
    """Progress that nobody asked for."""


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of all texts, those of like length together, each batch at most BATCH_TOKENS long unless one text alone is longer."""
    batch: list[int] = []
    rows = 0
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and rows + lengths[index] > BATCH_TOKENS:
            yield batch
            batch, rows = [], 0
        batch.append(index)
        rows += lengths[index]
    if batch:
        yield batch


def check_texts(texts: Sequence[str]) -> None:
    """Raises UsageError for what is not text, or too long to be meant for one vector."""
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise UsageError(f"text {number} is of type {type(text).__name__}", "Give text")
        try:
            size = len(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise UsageError(f"text {number} is not valid Unicode", "Send it as UTF-8") from error
        if size > TEXT_BYTES_MAX:
            raise UsageError(f"text {number} has {size} bytes; one vector is for at most {TEXT_BYTES_MAX}", "Split it into chunks")


def checked(vectors: Vectors) -> Vectors:
    """The vectors, if they are finite and of length 1. Raises LocalError: an embedder never hands out anything else."""
    lengths = np.linalg.norm(vectors, axis=1)
    if not (np.abs(lengths - 1) <= 1e-3).all():  # NaN is not
        raise LocalError(
            "the model gave a vector that is not of length 1", "The model is damaged, or no sentence encoder: try another"
        )
    return vectors


def made_by(embedder: Embedder, texts: Sequence[str], codes: Codes, scales: Scales) -> list[bool]:
    """Of each of these vectors (`nexus.memory.quantise`), whether the model makes it of its text: its very codes where the model is
    exact, else one with a cosine of at least SAME_COSINE. `codes` [n, dimension] and `scales` [n] are checked ones. Raises as
    `embed`, and UsageError for vectors of another dimension."""
    if codes.shape != (len(texts), embedder.dimension) or scales.shape != (len(texts),):
        raise UsageError(
            f"vectors of shape {list(codes.shape)} are not those of {len(texts)} texts", "Was another model used for them?"
        )
    vectors = embedder.embed(texts)
    if embedder.exact:
        own_codes, own_scales = quantise(vectors)
        return [bool(same) for same in (own_codes == codes).all(axis=1) & (own_scales == scales)]
    cosines = np.einsum("nd,nd->n", vectors, unit(restore(codes, scales)))
    return [bool(cosine >= SAME_COSINE) for cosine in cosines]


def processors() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
