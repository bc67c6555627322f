"""How fast a model runs here, now, in one process and with no network, beside the limit that the memory of this machine sets.

Every token reads every weight once, so no machine decodes faster than it reads memory: tokens per second at most are bytes per
second over bytes per token. Both are measured in turn, round by round, since machines are noisy; of each the best round counts,
which is what the machine can do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nexus.core.manifest import EMBEDDING, EXACT, stage_pieces
from nexus.engine.float_stage import use_threads
from nexus.engine.stage import Stage

PROMPT_TOKENS, DECODED_TOKENS, ROUNDS = 128, 64, 5
# Less would fit into the caches of one core, and its speed would tell nothing of larger models either.
READ_BYTES_MIN = 1 << 20
_SESSION = b"bench engine    "
_LENGTH = 1024


@dataclass(frozen=True, slots=True)
class EngineSpeed:
    """Tokens per second of one session. `bytes_per_token`: weights and KV cache that a decoded token reads, in the mean.
    `bandwidth_bytes_per_s`: those read while decoding; `machine_bytes_per_s`: what the machine reads at most. Figures of decoding
    are None for an encoder, which does not."""

    kernel: str
    threads: int
    weight_bytes: int
    prompt_tokens: int
    prefill_tokens_per_s: float
    decoded_tokens: int = 0
    decode_tokens_per_s: float | None = None
    bytes_per_token: int | None = None
    bandwidth_bytes_per_s: float | None = None
    machine_bytes_per_s: float | None = None

    @property
    def share(self) -> float | None:
        """Bandwidth reached over what the machine can read."""
        if self.bandwidth_bytes_per_s is None or not self.machine_bytes_per_s:
            return None
        return self.bandwidth_bytes_per_s / self.machine_bytes_per_s


def measure_speed(stage: Stage, progress: Callable[[int, int], None]) -> EngineSpeed:
    """Of a whole model in one stage. `progress`: told the rounds that are done, of how many. Raises what `Stage.step` raises."""
    manifest = stage.manifest
    causal = stage.causal
    prompt = min(PROMPT_TOKENS, manifest.context // 2 if causal else manifest.context)
    decoded = min(DECODED_TOKENS, manifest.context - prompt) if causal else 0
    ids = [(7 + 31 * number) % manifest.vocab_size for number in range(prompt)]
    bytes_per_token = _bytes_per_token(stage, prompt, decoded) if causal else 0
    use_threads(stage.weight_bytes)
    reader = MemoryReader(max(bytes_per_token, READ_BYTES_MIN)) if causal else None
    prefills, decodes, reads = [], [], []
    for number in range(ROUNDS + 1):
        prefill_s, decode_s = _round(stage, ids, decoded)
        if number:  # the first one warms up
            prefills.append(prefill_s)
            decodes.append(decode_s)
            if reader:
                reads.append(reader.bytes_per_s())
        progress(number + 1, ROUNDS + 1)
    common = EngineSpeed(
        kernel=stage.kernel,
        threads=use_threads(stage.weight_bytes),
        weight_bytes=stage.weight_bytes,
        prompt_tokens=prompt,
        prefill_tokens_per_s=prompt / min(prefills),
    )
    if not causal:
        return common
    speed = decoded / min(decodes)
    return EngineSpeed(
        common.kernel,
        common.threads,
        common.weight_bytes,
        prompt,
        common.prefill_tokens_per_s,
        decoded,
        speed,
        bytes_per_token,
        speed * bytes_per_token,
        max(reads),
    )


def _round(stage: Stage, ids: Sequence[int], decoded: int) -> tuple[float, float]:
    """Seconds for the prompt, and for all tokens after the first."""
    stage.open(_SESSION)
    try:
        begin = time.perf_counter()
        answer = stage.step(_SESSION, np.array(ids, "<u4").tobytes())
        prefill_s = time.perf_counter() - begin
        begin = time.perf_counter()
        for _ in range(decoded):
            answer = stage.step(_SESSION, answer)
        return prefill_s, time.perf_counter() - begin
    finally:
        stage.close(_SESSION)


def _bytes_per_token(stage: Stage, prompt: int, decoded: int) -> int:
    """Every weight of layers and head once, a row of the embedding, and the KV cache half way through the answer."""
    manifest = stage.manifest
    stored = sum(blob.size for blob in stage_pieces(manifest, 0, manifest.layers) if manifest.tied or blob.name != EMBEDDING)
    # A model of the float profile may be stored in fewer bytes than it computes in.
    whole = sum(blob.size for blob in manifest.pieces)
    weights = stored if manifest.profile == EXACT else stored * stage.weight_bytes // whole
    return weights + manifest.layers * manifest.kv_bytes * (prompt + decoded // 2)


class MemoryReader:
    """Reads a buffer of at least `size` bytes on torch's threads: as much as a token reads, so that caches help both alike."""

    def __init__(self, size: int) -> None:
        rows = -(-size // (8 * _LENGTH))
        self._size = rows * 8 * _LENGTH
        integers = torch.ones(rows, _LENGTH, dtype=torch.int64)
        floats = integers.view(torch.float32).fill_(1)
        vector = torch.ones(2 * _LENGTH)
        # No single one is the fastest everywhere; each reads every byte once and writes next to nothing.
        self._passes: tuple[Callable[[], object], ...] = (
            lambda: torch.mv(floats, vector),
            floats.sum,
            floats.view(torch.float64).sum,
            integers.sum,
            integers.view(torch.int8).amax,
        )

    def bytes_per_s(self) -> float:
        """Of the fastest way to read."""
        return self._size / min(map(_seconds, self._passes))


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
