"""A stage: one node's share of a model at work on sessions. Bytes in, bytes out: what goes in and out is what is hashed and sent.

Payloads, all little-endian:
- into the first stage: token ids, uint32 each;
- between stages: hidden states, float32 [tokens, hidden size], row-major, whatever the stage computes in;
- out of the last stage: one token id, uint32 (causal), or one vector, float32 [hidden size] (encoder).

`Stage` keeps the sessions and checks what comes in. How a pass is computed is the profile's: `nexus.engine.float_stage` runs the
model's own code in floating point, `nexus.engine.exact.stage` gives the same bits everywhere.

Importing this module is cheap; loading a stage imports torch and transformers, which takes 2 to 3 seconds once per process.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import MalformedError, ModelFormatError, NexusError, NotFoundError, UsageError
from nexus.core.manifest import CAUSAL, EXACT, Manifest
from nexus.engine.architecture import Config, read_config
from nexus.engine.pooling import Pooling, read_pooling
from nexus.proof.arithmetic.sampler import GREEDY, Sampling, not_a_number
from nexus.proof.trace import TraceShape, WindowTrace

_TOKEN_BYTES = 4


class Cache(Protocol):
    """The keys and values of one session in one stage."""

    @property
    def nbytes(self) -> int: ...


class Commitments(Protocol):
    """What a session that is to be receipted in the exact profile commits to: `nexus.engine.exact.commit.Commitments`."""

    def check_room(self) -> None: ...

    def accept(self, complete: bool) -> None: ...

    def seal(self, steps: int) -> WindowTrace: ...


@dataclass(slots=True)
class Session:
    """`position`: tokens in the cache. `steps`: answers given, which number the draws of the sampler. `tokens`: those answers.
    `commitments`: None for a session that commits to nothing."""

    cache: Cache | None
    sampling: Sampling
    commitments: Commitments | None = None
    position: int = 0
    steps: int = 0
    logits: NDArray[np.float32] | None = None
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Pass:
    """One session's part of a step. `inputs`: int64 ids [tokens] for the first stage, else float32 [tokens, hidden size].

    `wanted` is False for a part of a prompt with more to come: it fills the cache, and the last stage need not choose a token.
    """

    session: Session
    inputs: NDArray[np.int64] | NDArray[np.float32]
    wanted: bool = True

    @property
    def tokens(self) -> int:
        return len(self.inputs)


class Stage(ABC):
    """Made by `load_stage`. Calls for one session must not overlap; different sessions may use different threads.

    `chunked`: whether a prompt may be read in parts, with the same bits as at once.
    """

    chunked = False

    def __init__(self, manifest: Manifest, start: int, end: int, pooling: Pooling) -> None:
        self.start, self.end = start, end
        self.first, self.last = start == 0, end == manifest.layers
        self.manifest = manifest
        self.pooling = pooling
        self.causal = manifest.kind == CAUSAL
        self._width = 4 * manifest.hidden_size
        self._sessions: dict[bytes, Session] = {}

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Memory of the weights."""

    @property
    @abstractmethod
    def kernel(self) -> str:
        """Which implementation computes here, e.g. "native (amx)"."""

    @property
    def trace_shape(self) -> TraceShape:
        """Of what it commits to. Raises UsageError for a profile that commits to nothing."""
        raise self._commits_to_nothing()

    @abstractmethod
    def _new_cache(self) -> Cache | None: ...

    def _new_commitments(self) -> Commitments:
        raise self._commits_to_nothing()

    def _commits_to_nothing(self) -> UsageError:
        return UsageError(
            f"the profile {self.manifest.profile!r} commits to no operations",
            "Only models of the exact profile can be proven wrong",
        )

    @abstractmethod
    def _compute(self, passes: Sequence[Pass]) -> list[NDArray[np.float32] | NexusError]:
        """Of each pass: float32 hidden states [tokens, hidden size], from the last stage the logits [vocabulary] of the last token,
        or an encoder's vector [hidden size]; or why it failed."""

    @abstractmethod
    def _choose(self, session: Session) -> int:
        """The next token of a session from its logits."""

    def input_size(self, tokens: int) -> int:
        """Bytes of the payload that brings `tokens` tokens in."""
        return tokens * (_TOKEN_BYTES if self.first else self._width)

    def output_size(self, tokens: int) -> int:
        """Bytes of the payload that `step` answers an input of `tokens` tokens with."""
        if not self.last:
            return tokens * self._width
        return _TOKEN_BYTES if self.causal else self._width

    def open(self, session: bytes, sampling: Sampling | None = None, commit: bool = False) -> None:
        """Begin a session with an empty cache. `sampling` matters to the last stage of a causal model; None is greedy. `commit`:
        whether the session's steps will be sealed. Raises UsageError for a profile whose arithmetic cannot be committed to."""
        if session in self._sessions:
            raise UsageError("the session is open already", "Close it first, or start another")
        commitments = self._new_commitments() if commit else None
        self._sessions[session] = Session(self._new_cache() if self.causal else None, sampling or GREEDY, commitments)

    def close(self, session: bytes) -> None:
        """Forget a session and its cache; nothing happens if it is not open."""
        self._sessions.pop(session, None)

    def seal(self, session: bytes, steps: int) -> WindowTrace:
        """What the session's oldest `steps` steps that were not sealed yet commit to (nexus.proof.trace).

        Call it for every window of a session opened with `commit`, before 256 steps have come together. Raises UsageError where the
        session does not commit or has not so many steps, NotFoundError where it is not open.
        """
        commitments = self._session(session).commitments
        if commitments is None:
            raise UsageError("the session commits to nothing", "Open it with commit=True")
        return commitments.seal(steps)

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

    def step(self, session: bytes, payload: bytes) -> bytes:
        """One pass of a session through this stage: many tokens to read a prompt (or one whole text, for an encoder), one to go on.

        Raises MalformedError for a payload of the wrong size or with values that cannot be (the sender's fault), UsageError where
        the context is full, NotFoundError for a session that is not open. A step that raises leaves the session as it was.
        """
        (answer,) = self.step_many([(session, payload)])
        if isinstance(answer, NexusError):
            raise answer
        return answer

    def step_many(self, steps: Sequence[tuple[bytes, bytes]], more: Sequence[bool] = ()) -> list[bytes | NexusError]:
        """One pass each of several different sessions. Of each its answer, or the error that `step` would have raised.

        `more`: per step, whether it is a part of a prompt and the rest follows (`chunked` stages only): the last stage of a causal
        model then answers with no bytes.
        """
        answers: list[bytes | NexusError | None] = [None] * len(steps)
        passes: dict[int, Pass] = {}
        for number, (session, payload) in enumerate(steps):
            try:
                state = self._session(session)
                if state.commitments:
                    state.commitments.check_room()
                wanted = not (more and more[number])
                passes[number] = Pass(state, self._decoded(payload, state.position), wanted)
            except NexusError as error:
                answers[number] = error
        results = self._compute(list(passes.values())) if passes else []
        for (number, one), result in zip(passes.items(), results, strict=True):
            try:
                answers[number] = result if isinstance(result, NexusError) else self._answer(one, result)
            except NexusError as error:
                answers[number] = error
        return [answer for answer in answers if answer is not None]

    def _answer(self, one: Pass, values: NDArray[np.float32]) -> bytes:
        session = one.session
        if self.last and self.causal:
            if one.wanted:
                session.logits = values
                token = self._choose(session)
                session.tokens.append(token)
                answer = token.to_bytes(_TOKEN_BYTES, "little")
            else:
                answer = b""
        else:
            if not np.isfinite(values).all():
                raise not_a_number()
            answer = values.astype("<f4", copy=False).tobytes()
        if self.causal:
            session.position += one.tokens
        session.steps += one.wanted
        if session.commitments:
            session.commitments.accept(complete=one.wanted)
        return answer

    def _session(self, session: bytes) -> Session:
        try:
            return self._sessions[session]
        except KeyError:
            raise NotFoundError("the session is not open on this node", "It was closed or evicted; ask again") from None

    def _decoded(self, payload: bytes, position: int) -> NDArray[np.int64] | NDArray[np.float32]:
        """The payload checked: token ids [n], or hidden states [n, hidden size]."""
        unit = self.input_size(1)
        tokens, rest = divmod(len(payload), unit)
        if rest or not tokens:
            raise MalformedError(f"{len(payload)} bytes are no whole number of tokens of {unit} bytes")
        if position + tokens > self.manifest.context:
            raise UsageError(
                f"{position + tokens} tokens do not fit the model's context of {self.manifest.context}",
                "Use a shorter prompt or fewer tokens",
            )
        if self.first:
            ids = np.frombuffer(payload, "<u4")
            if int(ids.max()) >= self.manifest.vocab_size:
                raise MalformedError(f"token {int(ids.max())} is not in the vocabulary of {self.manifest.vocab_size}")
            return ids.astype(np.int64)
        values = np.frombuffer(payload, "<f4")
        self._check_states(values)
        return values.reshape(tokens, -1)

    def _check_states(self, values: NDArray[np.float32]) -> None:
        if not np.isfinite(values).all():
            raise MalformedError("the hidden states are not all finite numbers")


def load_stage(
    manifest: Manifest, start: int, end: int, files: Mapping[str, Path], *, dtype: str = "float32", kernel: str | None = None
) -> Stage:
    """Build layers [start, end) of a model from local files.

    `files`: paths by blob name; at least the pieces of `nexus.core.manifest.stage_pieces` and the manifest's files. `dtype`: what a
    model of the float profile computes in, "float32" or "bfloat16". `kernel`: of the exact profile, see `nexus.engine.exact.stage`;
    None is the fastest that is right here. Raises ModelFormatError where the files do not make the model of the manifest.
    """
    if not 0 <= start < end <= manifest.layers:
        raise UsageError(f"layers {start} to {end} are not in a model of {manifest.layers}")
    config = read_config(path_of(files, "config.json"))
    pooling = (
        read_pooling({name: path for name, path in files.items() if manifest.file(name)}) if config.kind != CAUSAL else Pooling()
    )
    if manifest.profile == EXACT:
        from nexus.engine.exact.stage import load_exact_stage

        return load_exact_stage(manifest, config, start, end, files, pooling, kernel)
    from nexus.engine.float_stage import load_float_stage

    return load_float_stage(manifest, config, start, end, files, pooling, dtype)


def check_config(manifest: Manifest, config: Config, kv_bytes: int) -> None:
    """What the manifest says is what was signed for and planned with; a config that says otherwise is not that model's."""
    claimed = (manifest.kind, manifest.layers, manifest.hidden_size, manifest.vocab_size, manifest.tied, manifest.kv_bytes)
    if (
        claimed != (config.kind, config.layers, config.hidden_size, config.vocab_size, config.tied, kv_bytes)
        or manifest.context > config.context
    ):
        raise ModelFormatError("config.json and the manifest describe different models", "Add the model again")


def path_of(files: Mapping[str, Path], name: str) -> Path:
    try:
        return files[name]
    except KeyError:
        raise NotFoundError(f"{name} is not on this node", "Fetch the model's fragment first") from None
