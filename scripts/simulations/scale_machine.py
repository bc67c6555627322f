"""The node and the model that the scale simulation computes with. Every number says where it was measured, or that it is
assumed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import hypot

from nexus.core.hashing import tagged_hash
from nexus.core.manifest import EMBEDDING, EXACT_PLAN, EXACT_TABLES, EXACT_VECTORS, HEAD, Blob, Manifest, layer_name
from nexus.swarm.costs import Candidate

# --- measured ---------------------------------------------------------------------------------------------------------------

# The shape of Llama-3.2-1B in the exact profile, random weights: sizes as the importer stored them
# (scripts/benchmarks/engine_store.py).
LAYERS, HIDDEN, VOCABULARY, CONTEXT = 16, 2048, 128256, 2048
EMBEDDING_BYTES, LAYER_BYTES, HEAD_BYTES, KV_BYTES = 263_181_504, 60_928_832, 8_320, 1_088
# One token of one session between two stages, as the engine returns it.
PAYLOAD_BYTES = 8_192
# docs/performance.md, scripts/bench engine: decode of the 1.2B model, exact, 2 threads of a 2-core Xeon.
TOKENS_PER_S = 21.7
# The same: 32 sessions in batched steps over one session alone. Steps in between were measured to lie near the straight line.
BATCH, BATCH_GAIN = 32, 24.5
# The same, scripts/bench verify: committing, self-check, sealing and signing over the decode itself.
PROVER_SHARE = 0.021
# The same, scripts/bench decode: 1.7 ms of a token of nano over four nodes are hops (waking up, frame, encryption, bookkeeping).
HOP_S = 0.0017 / 4
# Around a payload: frame head, Noise tag, TCP/IP.
FRAME_BYTES = 120

# --- assumed ----------------------------------------------------------------------------------------------------------------

# Home machines differ: factors on TOKENS_PER_S, their mean is 1.
SPEED_FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5)
# What a node lends to weights: less than the whole model, so that every token crosses at least one link.
MEMORY_BYTES = 1 << 30
# A home line, up; down is faster and does not count.
UPLOAD_BYTES_PER_S = 12_500_000
# Round trips: an access line at each end, and a distance in a square that is as wide as a continent.
ACCESS_RTT_S = 0.004
WIDTH_RTT_S = 0.040
# So much of a session's context is used.
SESSION_TOKENS = 256


def batch_factor(sessions: int) -> float:
    """How much longer a step of so many sessions takes than that of one: a straight line through what was measured for 32."""
    return 1.0 + (sessions - 1) * (BATCH / BATCH_GAIN - 1.0) / (BATCH - 1)


def manifest() -> Manifest:
    """Of the measured model; the blobs have its sizes and made-up roots."""

    def blob(name: str, size: int) -> Blob:
        return Blob(name, size, tagged_hash("scale-blob", name.encode()))

    pieces = [
        blob(EMBEDDING, EMBEDDING_BYTES),
        *(blob(layer_name(at), LAYER_BYTES) for at in range(LAYERS)),
        blob(HEAD, HEAD_BYTES),
    ]
    files = ("config.json", "tokenizer.json", "tokenizer_config.json", EXACT_TABLES, EXACT_VECTORS, EXACT_PLAN)
    return Manifest(
        spec=1,
        kind="causal",
        architecture="LlamaForCausalLM",
        profile="exact",
        dtype="int8",
        layers=LAYERS,
        hidden_size=HIDDEN,
        vocab_size=VOCABULARY,
        context=CONTEXT,
        kv_bytes=KV_BYTES,
        tied=1,
        pieces=tuple(pieces),
        files=tuple(blob(name, 1000) for name in files),
        rows=tuple(tagged_hash("scale-row", str(at).encode()) for at in range(len(pieces) + 1)),
    ).check()


@dataclass(frozen=True, slots=True)
class Machine:
    """`speed`: multiply-adds per second of one session. `place`: where it is, in seconds of round trip."""

    candidate: Candidate
    speed: float
    place: tuple[float, float]


class Machines:
    """So many machines, and the round trips between them."""

    def __init__(self, seed: int, count: int, work: int) -> None:
        """`work`: multiply-adds of a token through the whole model."""
        rng = random.Random(f"machines {seed}")
        self.all: list[Machine] = []
        for number in range(count):
            node = tagged_hash("scale node", f"{seed} {number}".encode())
            speed = TOKENS_PER_S * work * SPEED_FACTORS[number % len(SPEED_FACTORS)]
            place = rng.uniform(0, WIDTH_RTT_S), rng.uniform(0, WIDTH_RTT_S)
            domain = f"10.{number >> 8}.{number & 255}"
            candidate = Candidate(node, f"node-{number}", MEMORY_BYTES, round(speed / 1e6), None, (), True, 0, domain)
            self.all.append(Machine(candidate, speed, place))
        self.by_key = {machine.candidate.node: number for number, machine in enumerate(self.all)}

    def rtt_s(self, one: int, other: int) -> float:
        (x, y), (u, v) = self.all[one].place, self.all[other].place
        return 0.0 if one == other else ACCESS_RTT_S + hypot(x - u, y - v)

    def rtt_us(self, one: bytes, other: bytes) -> int:
        """As placement asks: by public key."""
        return round(1e6 * self.rtt_s(self.by_key[one], self.by_key[other]))
