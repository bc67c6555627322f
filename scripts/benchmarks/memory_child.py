"""A process whose memory `bench memory` looks at (Linux). See `engine_sides.serve` for the protocol.

Usage: python -m scripts.benchmarks.memory_child
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nexus.core.manifest import stage_pieces
from nexus.storage.blobs import BlobStore
from scripts.benchmarks import engine_store
from scripts.benchmarks.engine_sides import Answer, claim_stdout, serve

_STATUS = Path("/proc/self/status")
_SESSION = bytes(16)


def resident_bytes(field: str) -> int:
    """`field`: VmRSS (now) or VmHWM (the most so far)."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def convert(source: str, store: str, profile: str) -> Answer:
    before = resident_bytes("VmRSS")
    manifest = engine_store.add(Path(source), Path(store), profile)
    return {"before_bytes": before, "peak_bytes": resident_bytes("VmHWM"), "stored_bytes": manifest.weight_bytes}


def load(warm_store: str, store: str, start: int, end: int, kernel: str, tokens: int, incoming: str, outgoing: str) -> Answer:
    """Memory that the stage of layers [start, end) adds, with `tokens` tokens of one session in its cache.

    `warm_store`: a tiny model that is used and dropped first, so that libraries and buffers of the first use are not counted.
    `incoming`: file with the payload of the tokens, token ids or hidden states; what comes out is written to `outgoing`.
    """
    warm = engine_store.load(Path(warm_store), kernel=kernel or None)
    warm.open(_SESSION)
    warm.step(_SESSION, np.arange(2, dtype="<u4").tobytes())
    warm.close(_SESSION)
    del warm
    gc.collect()
    before = resident_bytes("VmRSS")
    stage = engine_store.load(Path(store), start, end, kernel or None)
    loaded = resident_bytes("VmRSS")
    stage.open(_SESSION)
    payload = Path(incoming).read_bytes()
    whole = stage.input_size(tokens)
    # The last token on its own, as in decoding.
    parts = [payload[: whole - stage.input_size(1)], payload[whole - stage.input_size(1) : whole]]
    Path(outgoing).write_bytes(b"".join(stage.step(_SESSION, part) for part in parts))
    del payload, parts
    gc.collect()
    return {
        "weights_bytes": _int8_bytes(Path(store), start, end) or stage.weight_bytes,
        "kv_bytes": stage.kv_bytes(_SESSION),
        "loaded_bytes": loaded - before,
        "serving_bytes": resident_bytes("VmRSS") - before,
        "peak_bytes": resident_bytes("VmHWM") - before,
    }


def _int8_bytes(store: Path, start: int, end: int) -> int:
    """Bytes of int8 weights in the stage's pieces, by their own headers; scales and norms are part of the allowance."""
    manifest, blobs = engine_store.read_manifest(store), BlobStore(store)
    total = 0
    for piece in stage_pieces(manifest, start, end):
        with blobs.path(piece.root).open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__" and tensor["dtype"] == "I8":
                begin, stop = tensor["data_offsets"]
                total += stop - begin
    return total


OPERATIONS: dict[str, Callable[..., Answer]] = {"convert": convert, "load": load}


def main() -> None:
    answer = claim_stdout()
    # Imported before anything is measured.
    import nexus.engine.importer
    import nexus.engine.stage  # noqa: F401

    serve(lambda operation, arguments: OPERATIONS[operation](**arguments), answer)


if __name__ == "__main__":
    main()
