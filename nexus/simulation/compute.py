"""Processors: what work costs in virtual time, and pure results that all nodes of a process share.

Stages are the real ones. A stage's weights are loaded once per process; each node has sessions of its own over them. What a node
computes is charged to its host: so a slow machine is slow, and what it measures of itself is what others wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import trio
from nacl.signing import VerifyKey

from nexus.core import keys
from nexus.core.manifest import Manifest
from nexus.engine.exact.stage import ExactStage
from nexus.engine.stage import Stage, load_stage
from nexus.engine.tokenizer import Tokenizer
from nexus.node import models
from nexus.proof.arithmetic.plan import plan_from_json
from nexus.simulation.determinism import HOST, Host

# What one token costs in one layer on a host of factor 1.
LAYER_S = 0.002
_SIGNATURES_MAX = 200_000


class Slowness:
    """How slow hosts are, by host: a factor on what work costs."""

    def __init__(self) -> None:
        self._factors: dict[Host, float] = {}

    def set(self, host: Host, factor: float) -> None:
        self._factors[host] = factor

    def charge(self, seconds: float) -> None:
        host = HOST.get()
        if host is not None:
            host.charged_s += seconds * self._factors.get(host, 1.0)


def perf_counter() -> float:
    """Seconds of the host that asks: what it has waited and what it has been charged. One function for all, since what is proven
    once is kept by the clock that it was timed with."""
    host = HOST.get()
    return trio.current_time() + (host.charged_s if host is not None else 0.0)


class _NodeStage(ExactStage):
    """The sessions of one node on layers that others of this process share."""

    _slowness: Slowness

    @classmethod
    def over(cls, shared: ExactStage, slowness: Slowness) -> _NodeStage:
        stage = cls.__new__(cls)
        stage.__dict__ |= shared.__dict__
        stage._sessions, stage._slowness = {}, slowness
        return stage

    def step(self, session: bytes, payload: bytes) -> bytes:
        self._charge([payload])
        return super().step(session, payload)

    def step_many(self, steps: Sequence[tuple[bytes, bytes]], more: Sequence[bool] = ()) -> Any:
        self._charge([payload for _, payload in steps])
        return super().step_many(steps, more)

    def _charge(self, payloads: Sequence[bytes]) -> None:
        tokens = sum(max(1, len(payload) // self.input_size(1)) for payload in payloads)
        self._slowness.charge(tokens * (self.end - self.start) * LAYER_S)


_shared: dict[tuple[bytes, int, int], ExactStage] = {}
_tokenizers: dict[tuple[str, int], Tokenizer] = {}
_plans: dict[bytes, Any] = {}
_bytes: dict[tuple[str, ...], int] = {}
_verified: dict[tuple[bytes, bytes, bytes], None] = {}


class _VerifyKey:
    """Ed25519 by libsodium; a signature that held once in this process holds."""

    _real = VerifyKey

    def __init__(self, public_key: bytes) -> None:
        self._public_key = public_key

    def verify(self, digest: bytes, signature: bytes) -> None:
        what = (self._public_key, digest, signature)
        if what not in _verified:
            self._real(self._public_key).verify(digest, signature)
            if len(_verified) >= _SIGNATURES_MAX:
                _verified.clear()
            _verified[what] = None


@contextmanager
def shared_processors(slowness: Slowness) -> Iterator[None]:
    """What nodes load, parse and verify is loaded, parsed and verified once. Everything shared is immutable, and what is wrong is
    judged anew each time."""
    load_tokenizer, read_plan, count_bytes = Tokenizer.load, plan_from_json, models._exact_bytes

    def load(manifest: Manifest, start: int, end: int, paths: dict[str, Path], dtype: str) -> Stage:
        key = (manifest.root, start, end)
        if key not in _shared:
            stage = load_stage(manifest, start, end, paths, dtype=dtype)
            assert isinstance(stage, ExactStage)
            _shared[key] = stage
        return _NodeStage.over(_shared[key], slowness)

    def tokenizer(files: Mapping[str, Path], tokens_max: int = 0) -> Tokenizer:
        key = ("/".join(sorted(path.name for path in files.values())), tokens_max)
        if key not in _tokenizers:
            _tokenizers[key] = load_tokenizer(files, tokens_max)
        return _tokenizers[key]

    def plan(content: bytes) -> Any:
        if content not in _plans:
            _plans[content] = read_plan(content)
        return _plans[content]

    def exact_bytes(pieces: Sequence[Path]) -> int:
        key = tuple(path.name for path in pieces)
        if key not in _bytes:
            _bytes[key] = count_bytes(pieces)
        return _bytes[key]

    replacements: list[tuple[object, str, Callable[..., Any]]] = [
        (models, "_load_stage", load),
        (models, "plan_from_json", plan),
        (models, "_exact_bytes", exact_bytes),
        (Tokenizer, "load", staticmethod(tokenizer)),
        (keys, "VerifyKey", _VerifyKey),
    ]
    with ExitStack() as stack:
        for owner, name, value in replacements:
            stack.enter_context(patch.object(owner, name, value))
        yield
