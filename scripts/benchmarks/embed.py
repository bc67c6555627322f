"""The default embedder beside sentence-transformers on torch, MiniLM both: time to the first vector, sentences a second, memory.

How near their vectors are is said too.
Every start is a process of its own, in turn; what it measures begins at its first line, before anything is imported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus.engine.importer import import_model
from nexus.models import MINILM, builtin_path, held_out_text
from nexus.storage.blobs import BlobStore
from scripts.benchmarks.result import Result

START_GOAL = 20.0
QUICK_SENTENCES = 100
# Of all sentences, each in a process that has just started.
LONG_ROUNDS = 3

_COMMON = """
import json, sys
def peak():
    status = open("/proc/self/status").read()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
settings = json.load(open(sys.argv[1]))
def report(embed):
    embed(["What is the nearest star?"])
    started = time.perf_counter() - begin
    memory = peak()
    rates = []
    for _ in range(settings["rounds"]):
        at = time.perf_counter()
        vectors = embed(settings["texts"])
        rates.append(len(settings["texts"]) / (time.perf_counter() - at))
    if rates:
        import numpy
        numpy.save(settings["vectors"], vectors)
    print(json.dumps({"start_s": started, "start_bytes": memory, "rates": rates,
                      "bytes": peak()}))
"""
_OURS = (
    "import time; begin = time.perf_counter()"
    + _COMMON
    + """
from pathlib import Path
from nexus.core.manifest import Manifest
from nexus.engine.embedding.opening import open_embedder
manifest = Manifest.from_bytes(Path(settings["manifest"]).read_bytes())
files = {name: Path(path) for name, path in settings["files"].items()}
report(open_embedder("minilm", lambda name: (manifest, files), workers=settings["threads"]).embed)
"""
)
_THEIRS = (
    "import time; begin = time.perf_counter()"
    + _COMMON
    + """
from sentence_transformers import SentenceTransformer
import torch
torch.set_num_threads(settings["threads"])
model = SentenceTransformer(settings["directory"], device="cpu")
report(lambda texts: model.encode(texts, batch_size=32, normalize_embeddings=True, show_progress_bar=False))
"""
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="starts of each, in turn; the median counts [default: %(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="[default: %(default)s]")


def run(options: argparse.Namespace) -> Result:
    rounds = 1 if options.quick else options.rounds
    texts = held_out_text("encoder")[1].splitlines()[: QUICK_SENTENCES if options.quick else None]
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        store = BlobStore.open(root / "blobs")
        manifest = import_model(builtin_path(MINILM), store, lambda *_: None, profile="exact")
        (root / "manifest").write_bytes(manifest.to_bytes())
        settings: dict[str, object] = {
            "texts": texts,
            "rounds": 0,
            "threads": options.threads,
            "manifest": str(root / "manifest"),
            "files": {blob.name: str(store.path(blob.root)) for blob in (*manifest.files, *manifest.pieces)},
            "directory": str(builtin_path(MINILM)),
        }
        sides = {"nexus": _OURS, "sentence-transformers": _THEIRS}
        for program in sides.values():  # files come into the system's cache
            _child(program, root, settings)
        starts = [{name: _child(program, root, settings) for name, program in sides.items()} for _ in range(rounds)]
        longer = [
            {
                name: _child(program, root, {**settings, "rounds": 1, "vectors": str(root / f"{name}.npy")})
                for name, program in sides.items()
            }
            for _ in range(min(rounds, LONG_ROUNDS))
        ]
        vectors = [np.load(root / f"{name}.npy") for name in sides]
    start_s = {name: median(float(one[name]["start_s"]) for one in starts) for name in sides}
    ours, theirs = start_s.values()
    parts: dict[str, object] = {
        name: {
            "start_s": round(start_s[name], 3),
            "start_mb": round(median(one[name]["start_bytes"] for one in starts) / 1e6),
            "sentences_per_s": round(median(one[name]["rates"][0] for one in longer)),
            "mb": round(median(one[name]["bytes"] for one in longer) / 1e6),
        }
        for name in sides
    }
    parts["between them"] = _agreement(*vectors)
    parts["threads"] = options.threads
    return Result("embed", theirs / ours, START_GOAL, "higher", parts)


def _child(program: str, root: Path, settings: dict[str, object]) -> dict[str, Any]:
    path = root / "settings.json"
    path.write_text(json.dumps(settings))
    limits = {"OMP_NUM_THREADS": str(settings["threads"]), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True, env={**os.environ, **limits}
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _agreement(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> dict[str, float]:
    cosines = (ours * theirs).sum(1)
    both = []
    for vectors in (ours, theirs):
        scores = vectors @ vectors.T
        np.fill_diagonal(scores, -1)
        both.append(np.argsort(-scores, axis=1)[:, :10])
    shared = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(*both, strict=True)])
    return {
        "cosine_mean": round(float(cosines.mean()), 5),
        "cosine_least": round(float(cosines.min()), 5),
        "top_10_shared": round(float(shared), 4),
    }
