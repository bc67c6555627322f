"""Integer matrix products in stock torch, and the known-answer test that tells which of them are right on this processor.

On x86 without VNNI, oneDNN's int8 products saturate and are wrong without a word (pytorch#136746): nothing is used untested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch

from nexus.core.errors import LocalError

# 128 * 127 * 1024 < 2^24: a float32 sum of so many products is exact in any order.
F32_DEPTH_MAX = 1024
_TEST_ROWS = (1, 3, 17, 64)
_SMALL = 512
_TEST_OUT = 64


class Product(Protocol):
    """One weight, ready to be multiplied with int8 rows [M, K]. `wide` asks for the sums themselves, int32 [M, N]; otherwise they
    come as float32, each rounded once."""

    nbytes: int

    def __call__(self, x: torch.Tensor) -> torch.Tensor: ...

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        """int32 [M, N] in any case."""
        ...


class Float32Blocks:
    """float32 products over blocks of the depth, each exact: right everywhere, with four bytes per weight."""

    name = "float32 blocks"

    def __init__(self, weight: torch.Tensor, wide: bool) -> None:
        """`weight`: int8 [N, K]."""
        self._wide = wide
        self._blocks = [block.float().contiguous() for block in torch.split(weight, F32_DEPTH_MAX, 1)]
        self.nbytes = sum(block.nbytes for block in self._blocks)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(self._blocks) == 1 and not self._wide:
            # A sum of nothing but -1 * 0 is -0; an integer has one zero.
            return torch.nn.functional.linear(x.float(), self._blocks[0]) + 0.0
        total = self.sums(x)
        return total if self._wide else total.float()

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        first, *rest = zip(torch.split(x.float(), F32_DEPTH_MAX, 1), self._blocks, strict=True)
        total = torch.nn.functional.linear(*first).to(torch.int32)
        for part, block in rest:
            total += torch.nn.functional.linear(part, block).to(torch.int32)
        return total


class IntMM:
    """torch._int_mm on the row-major weight: one byte per weight."""

    name = "int_mm"

    def __init__(self, weight: torch.Tensor, wide: bool) -> None:
        self._wide = wide
        self._weight = weight.t()
        self.nbytes = weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        total = self.sums(x)
        return total if self._wide else total.float()

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        return torch._int_mm(x, self._weight)


class OneDNN(IntMM):
    """oneDNN's prepacked int8 product, which gives float32: the fastest of the three for few rows. One byte per weight.

    Where the sums themselves are needed it is `IntMM`.
    """

    name = "onednn"

    def __init__(self, weight: torch.Tensor, wide: bool) -> None:
        super().__init__(weight, wide)
        rows, depth = weight.shape
        # For one row and few outputs or little depth oneDNN takes a kernel that is a hundred times slower than the one for two.
        self._is_small = min(rows, depth) <= _SMALL
        if not wide:
            self._weight = torch.ops.onednn.qlinear_prepack(weight, [1, depth])
            self._one, self._zero = torch.ones(rows), torch.zeros(rows, dtype=torch.int64)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._wide:
            return super().__call__(x)
        if self._is_small and len(x) == 1:
            return self(x.expand(2, -1).contiguous())[:1]
        out: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
            x, 1.0, 0, self._weight, self._one, self._zero, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return out

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        if self._wide:
            return super().sums(x)
        total = torch.zeros(len(x), len(self._one), dtype=torch.int32)
        for at in range(0, x.shape[1], F32_DEPTH_MAX):
            part = torch.zeros_like(x)
            part[:, at : at + F32_DEPTH_MAX] = x[:, at : at + F32_DEPTH_MAX]
            total += self(part).to(torch.int32)
        return total


Kernel = type[OneDNN] | type[IntMM] | type[Float32Blocks]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a kernel gave the right sums for every depth tried, and if not, why."""

    name: str
    right: bool
    reason: str


KERNELS: tuple[Kernel, ...] = (OneDNN, IntMM, Float32Blocks)


def known_answer(make: Callable[[torch.Tensor, bool], Product], depth: int) -> str:
    """Multiply extreme and mixed values of this depth and compare with integers. The empty string where all is right."""
    counted = np.arange(_TEST_OUT * depth, dtype=np.int64)
    mixed = ((counted * 2654435761 >> 7) % 255 - 127).astype(np.int8).reshape(_TEST_OUT, depth)
    extreme = np.full((_TEST_OUT, depth), 127, np.int8)
    extreme[1::2] = -127
    for weight in (extreme, mixed):
        products = {wide: make(torch.from_numpy(weight), wide) for wide in (False, True)}
        for rows in _TEST_ROWS:
            x = np.full((rows, depth), 127, np.int8)
            x[1::3] = -128
            x[2::3] = mixed[: len(x[2::3])] if depth else 0
            # Integers below 2^53 are exact in float64, in any order, and a hundred times faster than numpy's integer product.
            expected = (x.astype(np.float64) @ weight.astype(np.float64).T).astype(np.int64)
            for wide, product in products.items():
                wanted = expected if wide else expected.astype(np.int32).astype(np.float32)
                given = torch.from_numpy(x)
                if not (np.array_equal(product(given).numpy(), wanted) and np.array_equal(product.sums(given).numpy(), expected)):
                    return f"wrong sums at depth {depth}, {rows} rows{', wide' if wide else ''}"
    return ""


@cache
def _verdict(number: int, depth: int) -> str:
    try:
        return known_answer(KERNELS[number], depth)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        return f"not available: {str(error).splitlines()[0][:100]}"


def verdicts(depths: Iterable[int]) -> list[Verdict]:
    """What the known-answer test says of every kernel for these depths."""
    unique = sorted(set(depths))
    return [
        Verdict(kernel.name, not reason, reason)
        for number, kernel in enumerate(KERNELS)
        for reason in [next(filter(None, (_verdict(number, depth) for depth in unique)), "")]
    ]


def choose(depths: Iterable[int]) -> Kernel:
    """The fastest kernel that is right for every depth. Raises LocalError where none is."""
    found = verdicts(depths)
    for kernel, verdict in zip(KERNELS, found, strict=True):
        if verdict.right:
            return kernel
    reasons = "; ".join(f"{verdict.name}: {verdict.reason}" for verdict in found)
    raise LocalError(f"no integer product of torch is right on this processor ({reasons})", "See `nexus engine check`")
