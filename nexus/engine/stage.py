"""A stage: one node's share of a model at work on sessions. Bytes in, bytes out: what goes in and out is what is hashed and sent.

Payloads, all little-endian:
- into the first stage: token ids, uint32 each;
- between stages: hidden states, float32 [tokens, hidden size], row-major, whatever the stage computes in;
- out of the last stage: one token id, uint32 (causal), or one vector, float32 [hidden size] (encoder).

Importing this module imports torch and transformers, which takes 2 to 3 seconds once per process: import it when a model is loaded.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nexus.core.errors import MalformedError, ModelFormatError, NotFoundError, UsageError
from nexus.core.manifest import CAUSAL, EMBEDDING, HEAD, Manifest, layer_name
from nexus.engine.architecture import Config, Layout, layout_of, read_config
from nexus.engine.fragment import Fragment
from nexus.engine.kv import KVCache
from nexus.engine.pooling import Pooling, read_pooling
from nexus.engine.sampling import GREEDY, Sampling, not_a_number, sample
from nexus.engine.weights import read_piece

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_TOKEN_BYTES = 4
SMALL_STAGE_BYTES = 64 << 20
# What the process was given (OMP_NUM_THREADS). The setting that counts is each calling thread's own.
_THREADS = torch.get_num_threads()
_of_thread = threading.local()


@dataclass(slots=True)
class _Session:
    """`position`: tokens in the cache. `steps`: passes done, which number the draws of the sampler."""

    cache: KVCache | None
    sampling: Sampling
    position: int = 0
    steps: int = 0
    logits: NDArray[np.float32] | None = None


class Stage:
    """Made by `load_stage`. Calls for one session must not overlap; different sessions may use different threads."""

    def __init__(self, manifest: Manifest, start: int, end: int, fragment: Fragment, pooling: Pooling) -> None:
        self.start, self.end = start, end
        self.weight_bytes = fragment.weight_bytes
        self._manifest = manifest
        self._fragment = fragment
        self._pooling = pooling
        self._causal = manifest.kind == CAUSAL
        self._width = 4 * manifest.hidden_size
        self._sessions: dict[bytes, _Session] = {}

    @property
    def is_traced(self) -> bool:
        """Whether decode steps take the fast way (see `Fragment.is_traced`)."""
        return self._fragment.is_traced

    @property
    def is_fused(self) -> bool:
        """Whether they take the fastest way (see `Fragment.is_fused`)."""
        return self._fragment.is_fused

    def input_size(self, tokens: int) -> int:
        """Bytes of the payload that brings `tokens` tokens in."""
        return tokens * (_TOKEN_BYTES if self._fragment.first else self._width)

    def output_size(self, tokens: int) -> int:
        """Bytes of the payload that `step` answers an input of `tokens` tokens with."""
        if not self._fragment.last:
            return tokens * self._width
        return _TOKEN_BYTES if self._causal else self._width

    def open(self, session: bytes, sampling: Sampling | None = None) -> None:
        """Begin a session with an empty cache. `sampling` matters to the last stage of a causal model; None is greedy."""
        if session in self._sessions:
            raise UsageError("the session is open already", "Close it first, or start another")
        cache = self._fragment.new_cache() if self._causal else None
        self._sessions[session] = _Session(cache, sampling or GREEDY)

    def close(self, session: bytes) -> None:
        """Forget a session and its cache; nothing happens if it is not open."""
        self._sessions.pop(session, None)

    def kv_bytes(self, session: bytes) -> int:
        """Memory that the session's cache holds now."""
        cache = self._session(session).cache
        return 0 if cache is None else cache.nbytes

    def logits(self, session: bytes) -> NDArray[np.float32]:
        """The float32 logits [vocabulary] that the session's last token was chosen from. Last stage of a causal model only."""
        logits = self._session(session).logits
        if logits is None:
            raise UsageError("there are no logits here", "Only the last stage of a language model has them, after a step")
        return logits

    def _use_threads(self) -> None:
        """Small matrices are slower on several threads than on one: handing out the parts costs more than the parts."""
        wanted = 1 if self.weight_bytes < SMALL_STAGE_BYTES else _THREADS
        if getattr(_of_thread, "threads", None) != wanted:
            torch.set_num_threads(wanted)
            _of_thread.threads = wanted

    @torch.inference_mode()
    def step(self, session: bytes, payload: bytes) -> bytes:
        """One pass of a session through this stage: many tokens to read a prompt (or one whole text, for an encoder), one to go on.

        Raises MalformedError for a payload of the wrong size or with values that cannot be (the sender's fault), UsageError where
        the context is full, NotFoundError for a session that is not open. A step that raises leaves the session as it was.
        """
        self._use_threads()
        state = self._session(session)
        x = self._decoded(payload, state.position)
        out = self._fragment.forward(x, state.cache, state.position)
        if not (self._fragment.last and self._causal):
            if self._fragment.last:
                out = self._pooling(out)
            values = out.float().numpy()
            if not np.isfinite(values).all():
                raise not_a_number()
            answer = values.astype("<f4", copy=False).tobytes()
        else:
            state.logits = out[0, -1].float().numpy()
            answer = sample(state.logits, state.sampling, state.steps).to_bytes(_TOKEN_BYTES, "little")
        if self._causal:
            state.position += x.shape[1]
        state.steps += 1
        return answer

    def _session(self, session: bytes) -> _Session:
        try:
            return self._sessions[session]
        except KeyError:
            raise NotFoundError("the session is not open on this node", "It was closed or evicted; ask again") from None

    def _decoded(self, payload: bytes, position: int) -> torch.Tensor:
        """The payload as a checked tensor: int64 [1, n] token ids or [1, n, hidden] states in the stage's dtype."""
        unit = self.input_size(1)
        tokens, rest = divmod(len(payload), unit)
        if rest or not tokens:
            raise MalformedError(f"{len(payload)} bytes are no whole number of tokens of {unit} bytes")
        if position + tokens > self._manifest.context:
            raise UsageError(
                f"{position + tokens} tokens do not fit the model's context of {self._manifest.context}",
                "Use a shorter prompt or fewer tokens",
            )
        if self._fragment.first:
            ids = np.frombuffer(payload, "<u4")
            if int(ids.max()) >= self._manifest.vocab_size:
                raise MalformedError(f"token {int(ids.max())} is not in the vocabulary of {self._manifest.vocab_size}")
            return torch.from_numpy(ids.astype(np.int64)).view(1, tokens)
        values = np.frombuffer(payload, "<f4")
        # A tensor of torch's own: its memory is aligned, which the sums of vectorised kernels may depend on.
        x = torch.empty(1, tokens, self._manifest.hidden_size)
        np.copyto(x.view(-1).numpy(), values)
        if not np.isfinite(values).all():
            raise MalformedError("the hidden states are not all finite numbers")
        return x.to(self._fragment.dtype)


def load_stage(manifest: Manifest, start: int, end: int, files: Mapping[str, Path], *, dtype: str = "float32") -> Stage:
    """Build layers [start, end) of a model from local files.

    `files`: paths by blob name; at least the pieces of `nexus.core.manifest.stage_pieces` and the manifest's files. `dtype`:
    "float32" or "bfloat16", what to compute in. Raises ModelFormatError where the files do not make the model of the manifest.
    """
    if dtype not in DTYPES:
        raise UsageError(f"cannot compute in {dtype!r}", f"Use one of {', '.join(DTYPES)}")
    if not 0 <= start < end <= manifest.layers:
        raise UsageError(f"layers {start} to {end} are not in a model of {manifest.layers}")
    config = read_config(_path(files, "config.json"))
    # What the manifest says is what was signed for and planned with; a config that says otherwise is not that model's.
    claimed = (manifest.kind, manifest.layers, manifest.hidden_size, manifest.vocab_size, manifest.tied, manifest.kv_bytes)
    if (
        claimed != (config.kind, config.layers, config.hidden_size, config.vocab_size, config.tied, config.kv_bytes)
        or manifest.context > config.context
    ):
        raise ModelFormatError("config.json and the manifest describe different models", "Add the model again")
    pooling = (
        read_pooling({name: path for name, path in files.items() if manifest.file(name)}) if config.kind != CAUSAL else Pooling()
    )
    tensors = _tensors(config, layout_of(config), start, end, files, DTYPES[dtype])
    return Stage(manifest, start, end, Fragment(config, start, end, tensors, DTYPES[dtype]), pooling)


def _path(files: Mapping[str, Path], name: str) -> Path:
    try:
        return files[name]
    except KeyError:
        raise NotFoundError(f"{name} is not on this node", "Fetch the model's fragment first") from None


def _tensors(
    config: Config, layout: Layout, start: int, end: int, files: Mapping[str, Path], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Every tensor of the stage under its name in the whole model, with layers counted from the stage's first."""
    tensors: dict[str, torch.Tensor] = {}
    first, last = start == 0, end == config.layers
    outside = layout.embedding_tensors()
    if first:
        tensors |= read_piece(_path(files, EMBEDDING), outside, {name: name for name in outside}, dtype)
    elif last and config.tied:
        tensors |= read_piece(
            _path(files, EMBEDDING), outside, {name: name for name in layout.tied_sources & outside.keys()}, dtype
        )
    for index in range(start, end):
        shapes = layout.layer_tensors(index)
        names = {name: f"{layout.layers}.{index - start}.{name}" for name in shapes}
        tensors |= read_piece(_path(files, layer_name(index)), shapes, names, dtype)
    if last:
        outside = layout.head_tensors()
        tensors |= read_piece(_path(files, HEAD), outside, {name: name for name in outside}, dtype)
    return tensors
