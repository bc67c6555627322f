"""The tables of the exact profile, computed once, when a model is converted, with 120 bits: every machine computes the same bytes.

A node never computes them: it reads them from the model, whose root they are part of. Rotary frequencies follow the rules of
transformers' `modeling_rope_utils` (llama3: Llama 3.1's model card; yarn: Peng et al., arXiv:2309.00071).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nexus.proof.arithmetic.plan import ExactPlan, Rope

if TYPE_CHECKING:
    import mpmath  # type: ignore[import-untyped]

BITS = 120
ROPE_FINE = 256
PHI_PER_UNIT = 512
PHI_MAX = 8

Table = NDArray[np.float64]


def _import_mpmath() -> None:
    """When the first table is made: what only reads tables, an embedder above all, starts a tenth sooner without."""
    global mpmath
    import mpmath


@cache
def exp_tables() -> tuple[Table, Table]:
    """exp(-i/8) for 256 i, and exp(-j/32768) for 4096 j."""
    _import_mpmath()
    with mpmath.workprec(BITS):
        coarse = [float(mpmath.exp(-mpmath.mpf(i) / 8)) for i in range(256)]
        fine = [float(mpmath.exp(-mpmath.mpf(j) / 32768)) for j in range(4096)]
    return np.array(coarse), np.array(fine)


@cache
def phi_table() -> Table:
    """The normal distribution function at i/512, for 4098 i."""
    _import_mpmath()
    with mpmath.workprec(BITS):
        return np.array([float(mpmath.ncdf(mpmath.mpf(i) / PHI_PER_UNIT)) for i in range(PHI_PER_UNIT * PHI_MAX + 2)])


def tables_of(plan: ExactPlan) -> dict[str, Table]:
    """Every table of a model, by its name in exact.safetensors."""
    exp_hi, exp_lo = exp_tables()
    tables = {"exp_hi": exp_hi, "exp_lo": exp_lo, "phi": phi_table()}
    for number, rope in enumerate(plan.ropes):
        tables[f"rope.{number}.coarse"], tables[f"rope.{number}.fine"] = rope_tables(rope, plan.rotated, plan.context)
    return tables


def rope_tables(rope: Rope, rotated: int, context: int) -> tuple[Table, Table]:
    """(cos, sin) of the angles of positions 256 A, for every A in the context, times the amplitude; and of positions 0 to 255."""
    _import_mpmath()
    with mpmath.workprec(BITS):
        frequencies, amplitude = _frequencies(rope, rotated, context)

        def table(positions: range, factor: Any) -> Table:
            rows = [[mpmath.cos_sin(position * frequency) for frequency in frequencies] for position in positions]
            return np.array([[(float(c * factor), float(s * factor)) for c, s in row] for row in rows])

        coarse = table(range(0, -(-context // ROPE_FINE) * ROPE_FINE, ROPE_FINE), amplitude)
        return coarse, table(range(ROPE_FINE), mpmath.mpf(1))


def _frequencies(rope: Rope, rotated: int, context: int) -> tuple[list[Any], Any]:
    """Radians per position for each pair of dimensions, and what cosine and sine are multiplied with."""
    base = mpmath.mpf(rope.get("rope_theta"))
    plain = [mpmath.power(base, -mpmath.mpf(2 * i) / rotated) for i in range(rotated // 2)]
    one = mpmath.mpf(1)
    match rope.get("rope_type", "default"):
        case "default":
            return plain, one
        case "linear":
            return [frequency / mpmath.mpf(rope.get("factor")) for frequency in plain], one
        case "llama3":
            return [_llama3(frequency, rope) for frequency in plain], one
        case "yarn":
            return _yarn(plain, base, rope, rotated, context)
        case kind:
            raise ValueError(f"rotary embeddings of type {kind!r} have no exact form")


def _llama3(frequency: Any, rope: Rope) -> Any:
    """Long wavelengths are stretched, short ones kept, and those between interpolated."""
    factor = mpmath.mpf(rope.get("factor"))
    low, high = mpmath.mpf(rope.get("low_freq_factor")), mpmath.mpf(rope.get("high_freq_factor"))
    turns = rope.get("original_max_position_embeddings") * frequency / (2 * mpmath.pi)  # within the original context
    if turns > high:
        return frequency
    if turns < low:
        return frequency / factor
    smooth = (turns - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


def _yarn(plain: list[Any], base: Any, rope: Rope, rotated: int, context: int) -> tuple[list[Any], Any]:
    original = rope.get("original_max_position_embeddings")
    factor = mpmath.mpf(rope.get("factor") or mpmath.mpf(context) / original)

    def dimension(turns: Any) -> Any:
        """The dimension that turns so often within the original context."""
        return rotated * mpmath.log(original / (turns * 2 * mpmath.pi)) / (2 * mpmath.log(base))

    low, high = dimension(mpmath.mpf(rope.get("beta_fast") or 32)), dimension(mpmath.mpf(rope.get("beta_slow") or 1))
    if rope.get("truncate", True):
        low, high = mpmath.floor(low), mpmath.ceil(high)
    low, high = max(low, mpmath.mpf(0)), min(high, mpmath.mpf(rotated - 1))
    width = high - low or mpmath.mpf("0.001")
    frequencies = []
    for index, frequency in enumerate(plain):
        stretched = min(max((index - low) / width, mpmath.mpf(0)), mpmath.mpf(1))
        frequencies.append(frequency / factor * stretched + frequency * (1 - stretched))
    return frequencies, _yarn_amplitude(rope, factor)


def _yarn_amplitude(rope: Rope, factor: Any) -> Any:
    if rope.get("attention_factor") is not None:
        return mpmath.mpf(rope.get("attention_factor"))

    def scale(weight: Any) -> Any:
        return mpmath.mpf("0.1") * weight * mpmath.log(factor) + 1 if factor > 1 else mpmath.mpf(1)

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return scale(mpmath.mpf(rope.get("mscale"))) / scale(mpmath.mpf(rope.get("mscale_all_dim")))
    return scale(mpmath.mpf(1))
