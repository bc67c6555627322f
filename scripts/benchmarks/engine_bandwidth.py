"""How fast this machine reads memory, for the limit of decoding: every token reads every weight once.

Usage: python -m scripts.benchmarks.engine_bandwidth BYTES THREADS; see `engine_sides.serve` for the protocol.
"""

from __future__ import annotations

import sys

import torch

from nexus.engine.benchmark import MemoryReader
from scripts.benchmarks.engine_sides import claim_stdout, serve

_REPEATS = 5


def main() -> None:
    answer = claim_stdout()
    torch.set_num_threads(int(sys.argv[2]))
    reader = MemoryReader(int(sys.argv[1]))
    # What the machine can do, not what it does on average.
    serve(lambda operation, arguments: {"bytes_per_s": max(reader.bytes_per_s() for _ in range(_REPEATS))}, answer)


if __name__ == "__main__":
    main()
