"""Search through the memory store beside usearch by itself, chroma and lancedb: queries per second and recall@10, in one run.

The vectors are those of real sentences (`scripts.benchmarks.search_corpus`). Everything is measured in one process that is held to
one processor, with one thread for each library that lets itself be told; round by round, each in turn answers the same queries, one
call each. What is to be found are the exact nearest of the float32 vectors.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from nexus.core.errors import LocalError
from scripts.benchmarks import search_corpus
from scripts.benchmarks.result import Result

GOAL, RECALL_GOAL, OTHERS_GOAL = 0.7, 0.97, 3.0
COUNT, QUICK_COUNT = 100_000, 5_500  # the store indexes from 5,000 on
ROUNDS, QUICK_ROUNDS = 15, 3
ONE_THREAD = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "RAYON_NUM_THREADS",
    "LANCE_CPU_THREADS",
    "TOKIO_WORKER_THREADS",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--count", type=int, default=COUNT, help="sentences [default: %(default)s]")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="alternating rounds; the median counts [default: %(default)s]")


def run(options: argparse.Namespace) -> Result:
    count = min(options.count, QUICK_COUNT) if options.quick else options.count
    rounds = min(options.rounds, QUICK_ROUNDS) if options.quick else options.rounds
    corpus = search_corpus.load(count)
    with tempfile.TemporaryDirectory(prefix="nexus-bench-search-") as directory:
        root = Path(directory)
        np.save(root / "vectors.npy", corpus.vectors)
        np.save(root / "queries.npy", corpus.queries)
        (root / "sentences.json").write_text(json.dumps(corpus.sentences))
        command = [sys.executable, "-m", "scripts.benchmarks.search_child", str(root), str(rounds)]
        environment = {**os.environ, **dict.fromkeys(ONE_THREAD, "1"), "ANONYMIZED_TELEMETRY": "False", "LANCE_LOG": "error"}
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
        if ended.returncode:
            raise LocalError("the benchmark's child failed; its own words are above", "scripts/setup bench installs what it needs")
        found = json.loads(ended.stdout.splitlines()[-1])
    texts = {
        "sentences": len(corpus.sentences),
        "from": "documentation and docstrings of what is installed here",
        "by": corpus.model,
    }
    parts = {"goals": {"recall": RECALL_GOAL, "over_best_of_others": OTHERS_GOAL}, "texts": texts, **found["parts"]}
    return Result("search", found["ratio"], GOAL, "higher", parts)
