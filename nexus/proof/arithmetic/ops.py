"""Every operation of docs/exact.md in numpy, line by line: what a verifier redoes to tell a right value from a wrong one.

Independent of torch and of the compiled kernel, and bit for bit the same as both. Shapes and types are checked before any work is
done (MalformedError: the caller took them from a peer); values that no honest step computes from raise OutOfBoundsError.

Rows are float32 [n, width]. Integer products go through float64, which holds every sum of them (`nexus.proof.arithmetic.bounds`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import MalformedError, OutOfBoundsError
from nexus.proof.arithmetic.plan import ATTENTION, CLS, ExactPlan, LayerPlan
from nexus.proof.arithmetic.tables import PHI_MAX, PHI_PER_UNIT, ROPE_FINE, exp_tables, phi_table

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Ints = NDArray[np.integer[Any]]
# Weight and, where there is one, bias of a norm.
Norm = tuple[Float32, Float32 | None]
# (cos, sin) of the coarse and of the fine part of a position's angles, float64 [n, rotated / 2, 2] each.
RopeRows = tuple[Float64, Float64]

STATE_MAX, STATE_MIN = np.float32(2.0**40), np.float32(2.0**-40)
MAX8, MAX16 = np.float32(127), np.float32(32512)
_SHARE_MAX, _UNIT = 32767.0, 2.0**24
_EXP_MAX, _EXP_STEPS = np.float32(31.75), np.float32(32768)
_GELU_MAX = 1e30
# Products at once: the float64 form of a weight is eight times its size.
_BLOCK_VALUES = 1 << 20


@dataclass(frozen=True, slots=True)
class Tables:
    """exp(-i/8), exp(-j/32768) and Phi(i/512), the same in every model. Computed once in a process."""

    exp_hi: Float64 = field(default_factory=lambda: exp_tables()[0])
    exp_lo: Float64 = field(default_factory=lambda: exp_tables()[1])
    phi: Float64 = field(default_factory=phi_table)


# --- rows to integers ---------------------------------------------------------------------------------------------------------


def largest(x: Float32) -> Float32:
    """The largest magnitude of each row, at least 2^-40, [..., 1]. Raises OutOfBoundsError above 2^40 or where it is no number."""
    if not x.shape[-1]:
        raise MalformedError("a row of no values")
    a = np.abs(x).max(-1, keepdims=True)
    if not (a <= STATE_MAX).all():  # also where it is not a number
        raise OutOfBoundsError
    raised: Float32 = np.maximum(a, STATE_MIN)
    return raised


def quantised(x: Float32, *, wide: bool) -> tuple[NDArray[np.int32], Float32]:
    """float32 [..., n] to integers of 8 or 16 bits and their scales [...]."""
    a = largest(_float32("values", x))
    most = MAX16 if wide else MAX8
    return np.rint(x * (most / a)).astype(np.int32), (a / most)[..., 0]


def bytes_of(q: NDArray[np.int32], *, wide: bool) -> NDArray[np.int8]:
    """The int8 rows that meet the weights: [n, K], or of 16 bits [2n, K], first all high bytes, then all low ones."""
    if not wide:
        return q.astype(np.int8)
    high = (q + 128) >> 8
    return np.concatenate((high, q - (high << 8))).astype(np.int8)


def products(q: Ints, weight: NDArray[np.int8]) -> NDArray[np.int64]:
    """Exact sums [n, N] of integers [n, K] with weights [N, K]."""
    rows, depth = _matrix("weights", weight, np.int8)
    if q.ndim != 2 or q.shape[1] != depth:
        raise MalformedError(f"rows {list(q.shape)} do not meet weights {[rows, depth]}")
    left = q.astype(np.float64)
    out = np.empty((len(q), rows), np.int64)
    step = max(1, _BLOCK_VALUES // depth)
    for at in range(0, rows, step):
        out[:, at : at + step] = left @ weight[at : at + step].T.astype(np.float64)
    return out


# --- linear layers ------------------------------------------------------------------------------------------------------------


def linear_sums(x: Float32, weight: NDArray[np.int8], *, wide: bool) -> tuple[NDArray[np.int8], NDArray[np.int64], Float32]:
    """Of rows x [n, K]: the int8 rows that meet the weights (`bytes_of`), their sums [n or 2n, N], and the scales [n]."""
    _matrix("x", x, np.float32)
    q, s = quantised(x, wide=wide)
    left = bytes_of(q, wide=wide)
    return left, products(left, weight), s


def from_sums(sums: Ints, s: Float32, scale: Float32, bias: Float32 | None, *, wide: bool) -> Float32:
    """float32 [n, N] from the sums of `linear_sums`, scales of rows [n] and of weights [N]."""
    rows = len(s) * (2 if wide else 1)
    if sums.ndim != 2 or sums.shape != (rows, len(scale)) or (bias is not None and bias.shape != scale.shape):
        raise MalformedError(f"sums {list(sums.shape)} are not those of {len(s)} rows and {len(scale)} outputs")
    if wide:
        high, low = sums[: len(s)].astype(np.float64), sums[len(s) :].astype(np.float64)
        total = (high * 256.0 + low).astype(np.float32)
    else:
        total = sums.astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # the next operation refuses them
        y: Float32 = (total * s[:, None]) * scale
        return y if bias is None else y + bias


def linear(x: Float32, weight: NDArray[np.int8], scale: Float32, bias: Float32 | None, wide: bool) -> Float32:
    """float32 [n, K] to [n, N], by rows `weight` [N, K] with their scales and biases [N]. Any rows of a part may be taken alone."""
    _matrix("x", x, np.float32)
    _vectors(len(weight), scale, bias)
    _, sums, s = linear_sums(x, weight, wide=wide)
    return from_sums(sums, s, scale, bias, wide=wide)


# --- norms --------------------------------------------------------------------------------------------------------------------


def fixed_point(x: Float32) -> tuple[Float64, Float64]:
    """Integers below 2^19 in float64, and the power of two [..., 1] that they were multiplied with."""
    exponent = np.frexp(largest(x))[1]
    c = np.ldexp(np.float32(1), 19 - exponent)
    return np.rint(x * c).astype(np.float64), c.astype(np.float64)


def _inverse_sqrt(m: Float64) -> Float32:
    with np.errstate(divide="ignore"):  # of 0: what comes of it is no number, and refused
        return (1.0 / np.sqrt(m)).astype(np.float32)


def norm(plan: ExactPlan, x: Float32, weight: Float32, bias: Float32 | None = None) -> Float32:
    """RMSNorm, or LayerNorm where there is a bias, of rows [..., n]."""
    size = _float32("x", x).shape[-1]
    _vectors(size, weight, bias)
    v, c = fixed_point(x)
    squares = (v * v).sum(-1, keepdims=True) / (c * c) / size
    with np.errstate(over="ignore", invalid="ignore"):
        if bias is None:
            return (x * _inverse_sqrt(squares + plan.eps)) * weight
        mean = v.sum(-1, keepdims=True) / c / size
        m = np.maximum(squares - mean * mean, 0.0) + plan.eps
        y: Float32 = ((x - mean.astype(np.float32)) * _inverse_sqrt(m)) * weight + bias
        return y


def after_linear(plan: ExactPlan, x: Float32, y: Float32, following: Norm | None) -> Float32:
    """x after half a layer, from x before and the linear's y. `following`: the norm behind the linear where `norm_after_linear`."""
    if x.shape != y.shape or (following is None) == plan.norm_after_linear:
        raise MalformedError(f"x {list(x.shape)} and y {list(y.shape)} do not go together in this model")
    with np.errstate(over="ignore", invalid="ignore"):
        if following is None:
            return x + y
        return x + norm(plan, y, *following) if plan.causal else norm(plan, x + y, *following)


# --- functions ----------------------------------------------------------------------------------------------------------------


def exp_neg(x: Float32, tables: Tables) -> Float64:
    """e^-x of float32 x >= 0."""
    i = np.rint(np.minimum(x, _EXP_MAX) * _EXP_STEPS).astype(np.int32)
    e: Float64 = tables.exp_hi[i >> 12] * tables.exp_lo[i & 4095]
    return e


def _sigmoid(v: Float32, tables: Tables) -> Float64:
    e = exp_neg(np.abs(v), tables)
    return np.where(v >= 0, 1.0, e) / (1.0 + e)


def capped(v: Float32, cap: float, tables: Tables) -> Float32:
    """cap * tanh(v / cap)."""
    e = exp_neg(np.abs(v / np.float32(cap)) * np.float32(2), tables)
    return np.copysign(((1.0 - e) / (1.0 + e) * cap).astype(np.float32), v)


def _phi(v: Float32, tables: Tables) -> Float64:
    t = np.minimum(np.abs(v), np.float32(PHI_MAX - 0.002)).astype(np.float64) * PHI_PER_UNIT
    i = t.astype(np.int64)
    p = tables.phi[i] + (t - i) * (tables.phi[i + 1] - tables.phi[i])
    return np.where(v < 0, 1.0 - p, p)


def activation(plan: ExactPlan, gate: Float32 | None, up: Float32, tables: Tables | None = None) -> Float32:
    """h = act(gate) * up, or act(up) in a model without gates, whose `gate` is None."""
    if (gate is not None) != plan.gated or (gate is not None and gate.shape != up.shape):
        raise MalformedError("gate and up do not go together in this model")
    g = _float32("gate", up if gate is None else gate)
    # Larger ones are possible where a weight's scale is large; what is not a number has no activation.
    if not np.isfinite(g).all():
        raise OutOfBoundsError
    tables = tables or Tables()
    d = g.astype(np.float64)
    match plan.activation:
        case "silu":
            factor = _sigmoid(g, tables)
        case "gelu_tanh":
            z = (d + ((d * d) * d) * 0.044715) * 1.5957691216057308
            factor = _sigmoid(np.clip(z, -_GELU_MAX, _GELU_MAX).astype(np.float32), tables)
        case "gelu":
            factor = _phi(g, tables)
        case name:
            raise MalformedError(f"no activation {name!r}")
    with np.errstate(over="ignore", invalid="ignore"):
        h = (d * factor).astype(np.float32)
        return h if gate is None else h * up


# --- attention ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Heads:
    """Queries, keys and values of n tokens as integers [n, heads, head_dim], and their scales [n, heads]; keys and values have as
    many heads as the model has key-value heads."""

    q: NDArray[np.int32]
    sq: Float32
    k: NDArray[np.int32]
    sk: Float32
    v: NDArray[np.int32]
    sv: Float32


def qkv_heads(
    plan: ExactPlan, layer: LayerPlan, y: Float32, q_norm: Float32 | None, k_norm: Float32 | None, rope: RopeRows | None
) -> Heads:
    """What the linear qkv gave, y [n, qkv size], as heads: normed, rotated, made integers. `rope`: of the rows' positions."""
    n, width = _matrix("qkv", y, np.float32)
    half = (n, plan.rotated // 2, 2)
    if width != plan.qkv_size or (rope is not None) != bool(plan.ropes) or (rope and {part.shape for part in rope} != {half}):
        raise MalformedError(f"queries, keys and values {[n, width]} do not go with this model and these angles")
    if (q_norm is None) == plan.qk_norm or (k_norm is None) == plan.qk_norm:
        raise MalformedError("norms of queries and keys do not go with this model")
    q, k, v = (part.reshape(n, -1, plan.head_dim) for part in np.split(y, (plan.q_size, plan.q_size + plan.kv_size), axis=1))
    if q_norm is not None and k_norm is not None:
        q, k = norm(plan, q, q_norm), norm(plan, k, k_norm)
    if rope is not None:
        q, k = _rotated(plan, q, rope), _rotated(plan, k, rope)
    wide = ATTENTION in layer.wide
    return Heads(*quantised(q, wide=wide), *quantised(k, wide=wide), *quantised(v, wide=False))


def rope_rows(coarse: Float64, fine: Float64, positions: NDArray[np.int64]) -> RopeRows:
    """The rows of a model's tables for these positions."""
    return coarse[positions // ROPE_FINE], fine[positions % ROPE_FINE]


def _rotated(plan: ExactPlan, x: Float32, rope: RopeRows) -> Float32:
    """`x`: [n, heads, head_dim]."""
    (ca, sa), (cb, sb) = (np.moveaxis(part, -1, 0) for part in rope)
    c, s = (ca * cb - sa * sb).astype(np.float32)[:, None], (sa * cb + ca * sb).astype(np.float32)[:, None]
    half = plan.rotated // 2
    one, two, rest = np.split(x, (half, 2 * half), axis=2)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.concatenate((one * c - two * s, two * c + one * s, rest), axis=2)


def record_bytes(plan: ExactPlan, wide: bool) -> int:
    """Of one token in the log of a layer and key-value head."""
    return plan.head_dim * (3 if wide else 2) + 8


def kv_record(heads: Heads, row: int, head: int, wide: bool) -> bytes:
    """The record of a token in the log of key-value head `head`: keys, values, their scales, all little-endian."""
    keys, values = heads.k[row, head].astype("<i2" if wide else "i1"), heads.v[row, head].astype("i1")
    scales = np.array([heads.sk[row, head], heads.sv[row, head]], "<f4")
    return b"".join((keys.tobytes(), values.tobytes(), scales.tobytes()))


def parse_records(raw: bytes, plan: ExactPlan, wide: bool) -> tuple[Ints, Float32, Ints, Float32]:
    """Keys [T, head_dim], their scales [T], values and theirs out of T records, one after the other. Raises MalformedError, also
    for values that no computation stores."""
    size, depth = record_bytes(plan, wide), plan.head_dim
    if len(raw) % size:
        raise MalformedError(f"{len(raw)} bytes are no whole number of records of {size} bytes")
    block = np.frombuffer(raw, np.uint8).reshape(-1, size)
    at = depth * (2 if wide else 1)
    keys = np.ascontiguousarray(block[:, :at]).view("<i2" if wide else "i1").astype(np.int32)
    values = np.ascontiguousarray(block[:, at : at + depth]).view(np.int8).astype(np.int32)
    scales = np.ascontiguousarray(block[:, at + depth :]).view("<f4").astype(np.float32, copy=False)
    low, high = float(STATE_MIN), float(STATE_MAX)
    sound = (
        (np.abs(keys) <= (MAX16 if wide else MAX8)).all()
        and (np.abs(values) <= MAX8).all()
        and ((scales > 0) & (scales >= low / float(MAX16)) & (scales <= high)).all()  # what is not a number is neither
    )
    if not sound:
        raise MalformedError("a record of keys and values holds what no computation stores")
    return keys, scales[:, 0].copy(), values, scales[:, 1].copy()


def attend_head(
    plan: ExactPlan,
    layer: LayerPlan,
    q: Ints,
    sq: np.float32,
    k: Ints,
    sk: Float32,
    v: Ints,
    sv: Float32,
    tables: Tables | None = None,
) -> Float32:
    """One query of one head over the T positions up to its own (of an encoder, all): q [head_dim], k and v [T, head_dim], scales
    [T]; float32 [head_dim]. Of a layer with a window only the last positions count."""
    seen = len(k)
    if not 0 < seen <= plan.context or q.shape != (plan.head_dim,) or k.shape != v.shape or k.shape[1:] != q.shape:
        raise MalformedError(f"a query {list(q.shape)} over keys {list(k.shape)} and values {list(v.shape)}")
    if sk.shape != (seen,) or sv.shape != (seen,):
        raise MalformedError(f"scales {list(sk.shape)} and {list(sv.shape)} of {seen} positions")
    first = max(0, seen - layer.window) if layer.window else 0
    k, sk, v, sv = k[first:], sk[first:], v[first:], sv[first:]
    tables = tables or Tables()
    sums = (k.astype(np.float64) @ q.astype(np.float64)).astype(np.float32)
    scores = (sums * (np.float32(sq) * np.float32(plan.attention_scale))) * sk
    if plan.attention_cap:
        scores = capped(scores, plan.attention_cap, tables)
    e = exp_neg(scores.max() - scores, tables)
    total = np.rint(e * _UNIT).sum()
    b = e * sv.astype(np.float64)
    most = b.max()
    p = np.rint(b * (_SHARE_MAX / most))
    out = (p @ v.astype(np.float64)).astype(np.float32)
    attended: Float32 = out * np.float32((most * _UNIT) / (total * _SHARE_MAX))
    return attended


# --- ends ---------------------------------------------------------------------------------------------------------------------


def embed(
    plan: ExactPlan,
    weight: NDArray[np.int8],
    scale: Float32,
    position: Float32 | None = None,
    kind: Float32 | None = None,
    following: Norm | None = None,
) -> Float32:
    """x before the first layer from the tokens' rows of the embedding, [n, hidden], and their scales [n]. An encoder adds the first
    row of its kinds of token, `kind` [hidden], and the rows of its positions, and has a norm."""
    n, width = _matrix("embedding", weight, np.int8)
    if width != plan.hidden or scale.shape != (n,):
        raise MalformedError(f"rows {[n, width]} with {list(scale.shape)} scales are no embedding of this model")
    x: Float32 = weight.astype(np.float32) * scale[:, None]
    if plan.causal:
        return x * np.float32(plan.embed_scale) if plan.embed_scale else x
    if position is None or kind is None or following is None or position.shape != x.shape or kind.shape != (plan.hidden,):
        raise MalformedError("an encoder's embedding has positions, a kind and a norm")
    return norm(plan, (x + kind) + position, *following)


def logits(
    plan: ExactPlan,
    x: Float32,
    weight_of_norm: Float32,
    weight: NDArray[np.int8],
    scale: Float32,
    tables: Tables | None = None,
) -> Float32:
    """Logits of the last token's x [1, hidden], for rows `weight` [N, hidden] of the head, all or some: [1, N]."""
    return cap_logits(plan, linear(norm(plan, x, weight_of_norm), weight, scale, None, plan.wide_head), tables)


def cap_logits(plan: ExactPlan, values: Float32, tables: Tables | None = None) -> Float32:
    return capped(values, plan.logit_cap, tables or Tables()) if plan.logit_cap else values


def pooled(plan: ExactPlan, hidden: Float32) -> Float32:
    """An encoder's last x [n, hidden] to one vector [hidden]."""
    n, width = _matrix("x", hidden, np.float32)
    if width != plan.hidden or not n:
        raise MalformedError(f"states {[n, width]} are not of this model")
    if plan.pooling == CLS:
        vector: Float32 = hidden[0]
    else:
        v, c = fixed_point(hidden.reshape(1, -1))
        vector = (v.reshape(hidden.shape).sum(0) / c[0] / n).astype(np.float32)
    if not plan.normalized:
        return vector
    v, c = fixed_point(vector[None])
    with np.errstate(invalid="ignore"):
        scaled: Float32 = vector * _inverse_sqrt((v * v).sum(-1) / (c[0] * c[0]))
        return scaled


# --- checks -------------------------------------------------------------------------------------------------------------------


def _float32(name: str, x: Float32) -> Float32:
    if x.dtype != np.float32 or not x.ndim or not x.size:
        raise MalformedError(f"{name} of {x.dtype} {list(x.shape)} where float32 rows are due")
    return x


def _matrix(name: str, x: NDArray[Any], dtype: type[np.generic]) -> tuple[int, int]:
    if x.dtype != dtype or x.ndim != 2 or not x.size:
        raise MalformedError(f"{name} of {x.dtype} {list(x.shape)} where {np.dtype(dtype)} rows are due")
    return x.shape[0], x.shape[1]


def _vectors(size: int, *vectors: Float32 | None) -> None:
    for vector in vectors:
        if vector is not None and (vector.dtype != np.float32 or vector.shape != (size,)):
            raise MalformedError(f"a vector of {vector.dtype} {list(vector.shape)} where float32 [{size}] is due")
