"""How fast this machine reads memory, for the limit of decoding: every token reads every weight once.

Usage: python -m scripts.benchmarks.engine_bandwidth BYTES THREADS; see `engine_sides.serve` for the protocol.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

from scripts.benchmarks.engine_sides import Answer, claim_stdout, serve

_REPEATS = 5
_ROW = 1024


class Reader:
    """A buffer of `size` bytes: as large as the weights of the model in question, so that the caches help both alike."""

    def __init__(self, size: int, threads: int) -> None:
        torch.set_num_threads(threads)
        rows = size // (8 * _ROW)
        self._size = rows * 8 * _ROW
        integers = torch.ones(rows, _ROW, dtype=torch.int64)
        floats = integers.view(torch.float32).fill_(1)
        vector = torch.ones(2 * _ROW)
        # No single one is the fastest everywhere; all of them read each byte once and write next to nothing.
        self._reductions: tuple[Callable[[], object], ...] = (
            lambda: torch.mv(floats, vector),
            floats.sum,
            floats.view(torch.float64).sum,
            integers.sum,
            integers.view(torch.int8).amax,
        )

    def read(self) -> Answer:
        """Bytes per second of the fastest of all passes: what the machine can do, not what it does on average."""
        best_s = min(self._seconds(reduce) for _ in range(_REPEATS) for reduce in self._reductions)
        return {"bytes_per_s": self._size / best_s}

    @staticmethod
    def _seconds(reduce: Callable[[], object]) -> float:
        begin = time.perf_counter()
        reduce()
        return time.perf_counter() - begin


def main() -> None:
    answer = claim_stdout()
    reader = Reader(int(sys.argv[1]), int(sys.argv[2]))
    serve(lambda operation, arguments: reader.read(), answer)


if __name__ == "__main__":
    main()
