"""What it takes to check blocks: the whole way from the bytes of a signed batch to blocks that may be kept, on one thread.

The same pipeline runs with Nexus's sky kernel, with skyfield over whole batches and with skyfield block by block, in turns; beside
it Merkle-signed batches against a signature for each block. Times and places are spread over six days and the globe.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from nexus.core.keys import Identity
from nexus.memory import collection as rules
from nexus.memory.batch import SignedBatch, open_batch, sign_batch
from nexus.memory.block import CONTENT, INT8, Block, Vector, encode_block
from nexus.memory.collection import Charter
from nexus.memory.quantise import quantise
from nexus.memory.sky.place import Cell
from nexus.memory.sky.stamp import TOLERANCE, SkyStamp
from nexus.memory.validate import Flags, validate
from nexus.storage.sky_tables import load_sky_kernel, load_sky_reference
from scripts.benchmarks.result import Result

GOAL = 5.0
SCALAR_GOAL, MERKLE_GOAL = 100.0, 4.0
BATCH = 1024
DIMENSION = 384
START_MS = 1_763_600_000_000
SPREAD_MS = 6 * 86_400_000
# Larger chunks of skyfield take gigabytes of memory, and more time.
SKYFIELD_CHUNK = 2048
TEXT = "The quick brown fox jumps over the lazy dog near the river bank at dawn, and nobody wonders why it does so every day."

CheckSky = Callable[[NDArray[np.int64], list[bytes]], Flags]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocks", type=int, default=8192, help="blocks per round [default: %(default)s]")
    parser.add_argument("--rounds", type=int, default=7, help="alternating rounds; the median counts [default: %(default)s]")


def run(options: argparse.Namespace) -> Result:
    with threadpool_limits(1):  # matrix products of numpy would take every core that is free, and wait for those that are not
        return _run(options)


def _run(options: argparse.Namespace) -> Result:
    count, rounds = (2 * BATCH, 3) if options.quick else (options.blocks, options.rounds)
    kernel, reference = load_sky_kernel(), load_sky_reference()

    def skyfield(times: NDArray[np.int64], stamps: list[bytes]) -> Flags:
        good = [
            _agree(reference.vectors, times[at : at + SKYFIELD_CHUNK], stamps[at : at + SKYFIELD_CHUNK]) for at in _chunks(times)
        ]
        return np.concatenate(good)

    def scalar(times: NDArray[np.int64], stamps: list[bytes]) -> Flags:
        return np.concatenate([_agree(reference.vectors, times[at : at + 1], stamps[at : at + 1]) for at in range(len(times))])

    identity = Identity(os.urandom(32))
    charter = rules.create(identity.public_key, "bench", rules.PUBLIC, START_MS)
    blocks = _blocks(identity, charter, count)
    batches = [sign_batch(identity, blocks[at : at + BATCH]).to_bytes() for at in range(0, count, BATCH)]
    singles = [sign_batch(identity, [block]).to_bytes() for block in blocks]

    def pipeline(wire: Sequence[bytes], check: CheckSky, group: int = 1) -> float:
        """Seconds per block. `group`: messages whose blocks are validated together."""
        checked = 0
        began = time.perf_counter()
        for at in range(0, len(wire), group):
            opened = [one for data in wire[at : at + group] for one in open_batch(SignedBatch.from_bytes(data))]
            refusals = validate(opened, {charter.id: charter}.get, check, START_MS + SPREAD_MS)
            if any(refusals):
                raise AssertionError(f"a good block was refused: {next(filter(None, refusals))}")
            checked += len(opened)
        return (time.perf_counter() - began) / checked

    few = batches[:1]
    scalar_blocks = 64 if options.quick else 256
    scalar_batch = [sign_batch(identity, blocks[:scalar_blocks]).to_bytes()]
    pipeline(few, kernel.check_stamps)
    pipeline(few, skyfield)
    ours, theirs, slow, single, bare = [], [], [], [], []
    for _ in range(rounds):
        ours.append(pipeline(batches, kernel.check_stamps))
        theirs.append(pipeline(batches, skyfield))
        single.append(pipeline(singles, kernel.check_stamps, BATCH))
        bare.append(pipeline(batches, lambda times, stamps: np.ones(len(times), np.bool_)))
        slow.append(pipeline(scalar_batch, scalar))
    over_vectorised = [their / our for our, their in zip(ours, theirs, strict=True)]
    over_scalar = [their / our for our, their in zip(ours, slow, strict=True)]
    over_singles = [one / our for our, one in zip(ours, single, strict=True)]
    return Result(
        "blocks",
        median(over_vectorised),
        GOAL,
        "higher",
        {
            "over_scalar_skyfield": {"ratio": round(median(over_scalar), 1), "goal": SCALAR_GOAL},
            "over_single_signatures": {"ratio": round(median(over_singles), 2), "goal": MERKLE_GOAL},
            "blocks_per_s": {
                "nexus": round(1 / median(ours)),
                "skyfield_vectorised": round(1 / median(theirs)),
                "skyfield_scalar": round(1 / median(slow)),
                "single_signatures": round(1 / median(single)),
                "without_sky": round(1 / median(bare)),
            },
            "block_bytes": len(blocks[0]),
            "of_float32_vector": round(len(blocks[0]) / (len(blocks[0]) - DIMENSION + 4 * DIMENSION), 3),
            "batch": BATCH,
            "blocks": count,
            "rounds": rounds,
        },
    )


def _chunks(times: NDArray[np.int64]) -> range:
    return range(0, len(times), SKYFIELD_CHUNK)


def _agree(vectors: Callable[..., NDArray[np.float64]], times: NDArray[np.int64], stamps: Sequence[bytes]) -> Flags:
    """Whether skyfield comes to what the stamps say."""
    read = [SkyStamp.from_bytes(stamp) for stamp in stamps]
    centres = np.array([stamp.cell.centre() for stamp in read])
    signed = np.frombuffer(b"".join(stamp.signature for stamp in read), "<i4").reshape(len(read), -1, 3)
    good: Flags = (np.abs(vectors(times, centres[:, 0], centres[:, 1]) - signed) <= TOLERANCE).all(axis=(1, 2))
    return good


def _blocks(identity: Identity, charter: Charter, count: int) -> list[bytes]:
    rng = np.random.default_rng(5)
    times = [START_MS + int(at) for at in rng.integers(0, SPREAD_MS, count)]
    cells = [
        Cell.of(float(lat), float(lon)) for lat, lon in zip(rng.uniform(-90, 90, count), rng.uniform(-180, 180, count), strict=True)
    ]
    stamps = load_sky_kernel().stamps(times, cells)
    vectors = rng.normal(size=(count, DIMENSION)).astype(np.float32)
    codes, scales = quantise(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    fingerprint, source = random.Random(5).randbytes(32), random.Random(6).randbytes(32)
    return [
        encode_block(
            Block(
                CONTENT,
                charter.id,
                identity.public_key,
                times[at],
                sky=stamps[at].to_bytes(),
                after=source,
                source=source,
                tags=("bench",),
                title="bench.md",
                lang="en",
                part=at % 20,
                text=TEXT,
                vectors=(Vector("minilm", fingerprint, INT8, int(scales[at]), codes[at].tobytes()),),
            )
        )
        for at in range(count)
    ]
