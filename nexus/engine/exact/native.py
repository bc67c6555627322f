"""The compiled step of the exact engine (native/*.c) behind ctypes: one call computes a batch of runs through all layers.

`available()` names what runs here; it is empty where the library was not built, and then the torch path serves, with the same
bits. The structures mirror native/nexus_native.h line by line. ctypes releases the interpreter lock while the step computes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from nexus.core.errors import LocalError, OutOfBoundsError
from nexus.core.hashing import HASH_BYTES
from nexus.core.manifest import EMBEDDING, HEAD, layer_name
from nexus.engine.exact import native_build
from nexus.proof.arithmetic.plan import ATTENTION, ExactPlan, LayerPlan, value_widths
from nexus.proof.trace import OPS

if TYPE_CHECKING:
    import torch

    from nexus.engine.exact.torch_step import Trace

PAGE_TOKENS = 64
_ABI = 2
_ALIGNMENT = 64
_OK, _BOUNDS, _CANCELLED, _WORKSPACE, _BAD_ARGUMENT, _WRONG = range(6)
_LEAF, _NODE = range(2)
_NO_LOGITS, _LAST_LOGITS, _ALL_LOGITS = range(3)
_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
_RMS_NORM, _LAYER_NORM = range(2)
_FREE_WORKSPACES_MAX = 4
_KEY_BITS, _CHECK_PRIME = 29, (1 << 31) - 1

Array = NDArray[Any]
Fields = list[tuple[str, Any]]
_P, _I32, _I64, _F32, _F64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_double


class _Linear(ctypes.Structure):
    _fields_: ClassVar[Fields] = [
        *[(name, _P) for name in ("weights", "scale", "bias", "check")],
        *[(name, _I32) for name in ("n", "k", "wide", "reserved")],
    ]


class _Norm(ctypes.Structure):
    _fields_: ClassVar[Fields] = [("weight", _P), ("bias", _P)]


class _Layer(ctypes.Structure):
    _fields_: ClassVar[Fields] = [
        *[(name, _Linear) for name in ("qkv", "o", "gate", "up", "down")],
        *[(name, _Norm) for name in ("attention_norm", "mlp_norm", "post_attention_norm", "post_mlp_norm", "q_norm", "k_norm")],
        *[(name, _I32) for name in ("window", "rope", "wide_attention", "reserved")],
    ]


class _Rope(ctypes.Structure):
    _fields_: ClassVar[Fields] = [("coarse", _P), ("fine", _P), ("coarse_rows", _I64)]


class _Model(ctypes.Structure):
    _fields_: ClassVar[Fields] = [
        *[(name, _I32) for name in ("hidden", "heads", "kv_heads", "head_dim", "rotated", "layers")],
        *[(name, _I32) for name in ("norm_kind", "activation", "encoder", "reserved")],
        *[(name, _F32) for name in ("attention_scale", "attention_cap", "final_cap", "embed_scale")],
        ("norm_eps", _F64),
        *[(name, _P) for name in ("exp_hi", "exp_lo", "phi")],
        ("rope", _Rope * 2),
        ("embed", _Linear),
        *[(name, _P) for name in ("position", "type")],
        ("positions", _I64),
        ("embed_norm", _Norm),
        ("head", _Linear),
        ("final_norm", _Norm),
        ("layer", ctypes.POINTER(_Layer)),
        ("key", _P),
    ]


class _Run(ctypes.Structure):
    _fields_: ClassVar[Fields] = [
        ("pages", _P),
        ("position", _I64),
        *[(name, _I32) for name in ("count", "logits", "status", "commit")],
    ]


class _Trace(ctypes.Structure):
    _fields_: ClassVar[Fields] = [(name, _P) for name in ("qkv", "o", "gate_up", "down", "attention")]


class _Commit(ctypes.Structure):
    _fields_: ClassVar[Fields] = [(name, _P) for name in ("cells", "records", "logits", "values", "logged")]


class _Batch(ctypes.Structure):
    _fields_: ClassVar[Fields] = [
        ("runs", ctypes.POINTER(_Run)),
        *[(name, _I32) for name in ("run_count", "threads")],
        *[(name, _P) for name in ("ids", "states", "states_out", "logits_out", "trace", "commit", "cancel", "workspace")],
        ("workspace_bytes", ctypes.c_uint64),
    ]


class _Variant(ctypes.Structure):
    _fields_: ClassVar[Fields] = [("name", ctypes.c_char_p), ("supported", _I32), ("reserved", _I32)]


class Tensors(Protocol):
    """One piece of a model: `nexus.engine.exact.pieces.Piece`."""

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def tensor(self, name: str) -> Array: ...

    def blocks(self, name: str) -> Iterator[tuple[int, Array]]: ...


@cache
def _library() -> ctypes.CDLL | None:
    """The library, or None where it is missing, was built for something else, or is of another version of these sources."""
    try:
        library = ctypes.CDLL(str(native_build.LIBRARY))
        if library.nx_abi() != _ABI:
            return None
    except (OSError, AttributeError):
        return None
    library.nx_packed_bytes.restype = ctypes.c_uint64
    library.nx_packed_bytes.argtypes = [_I64, _I64]
    library.nx_pack.argtypes = [_P, _I64, _I64, _I64, _I64, _P]
    library.nx_page_bytes.restype = ctypes.c_uint64
    library.nx_page_bytes.argtypes = [_P]
    library.nx_workspace_bytes.restype = ctypes.c_uint64
    library.nx_workspace_bytes.argtypes = [_P, _I64, _I64, _I64, _I32, _I64]
    library.nx_check_model.argtypes = [_P]
    library.nx_step.argtypes = [_I32, _P, _P]
    library.nx_check_rows.argtypes = [_I32, _I64, _I64, _P, _P, _P]
    library.nx_hash.argtypes = [_I32, _P, _I64, _I32]
    return library


@cache
def _built() -> dict[str, tuple[int, bool]]:
    """Index and support of every variant in the library, fastest first."""
    library = _library()
    if library is None:
        return {}
    count = library.nx_variants(None, 0)
    variants = (_Variant * count)()
    library.nx_variants(variants, count)
    return {variant.name.decode(): (index, bool(variant.supported)) for index, variant in enumerate(variants)}


def available() -> list[str]:
    """The variants that this processor runs, fastest first; none where the library is missing."""
    return [name for name, (_, supported) in _built().items() if supported]


def hash_leaves(leaves: Sequence[bytes], variant: str | None = None) -> NDArray[np.uint8]:
    """The hashes [n, 32] of Merkle leaves of any lengths: BLAKE3(0x00 data). `variant`: of `available`, or the fastest."""
    data = [np.frombuffer(leaf, np.uint8) for leaf in leaves]
    return _hashed(data, [part.ctypes.data for part in data], [part.nbytes for part in data], _LEAF, variant)


def hash_rows(rows: Array, variant: str | None = None) -> NDArray[np.uint8]:
    """The leaf hashes [n, 32] of the rows of an array [n, ...], each as its bytes in memory."""
    return _hashed_rows(rows, _LEAF, variant)


def hash_nodes(pairs: NDArray[np.uint8], variant: str | None = None) -> NDArray[np.uint8]:
    """The hashes [n, 32] of inner nodes over pairs [n, 64] of hashes: BLAKE3(0x01 left right)."""
    if pairs.dtype != np.uint8 or pairs.ndim != 2 or pairs.shape[1] != 2 * HASH_BYTES:
        raise ValueError(f"pairs of hashes are uint8 [n, {2 * HASH_BYTES}]")
    return _hashed_rows(pairs, _NODE, variant)


def merkle_roots(leaves: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The roots [m, 32] of m trees over n leaf hashes each, [m, n, 32], n >= 1: `nexus.core.hashing.merkle_root`."""
    level = np.ascontiguousarray(leaves)
    while (count := level.shape[1]) > 1:
        pairs = np.ascontiguousarray(level[:, : count // 2 * 2]).reshape(-1, 2 * HASH_BYTES)
        paired = hash_nodes(pairs).reshape(len(level), count // 2, HASH_BYTES)
        level = np.concatenate([paired, level[:, -1:]], 1) if count % 2 else paired
    return level[:, 0]


def _hashed_rows(rows: Array, prefix: int, variant: str | None) -> NDArray[np.uint8]:
    rows = np.ascontiguousarray(rows)
    size = rows.nbytes // len(rows) if len(rows) else 0
    addresses = rows.ctypes.data + np.arange(len(rows), dtype=np.uint64) * np.uint64(size)
    return _hashed(list(rows) if not _built() else [rows], addresses, size, prefix, variant)


def _hashed(
    data: Sequence[Array], addresses: NDArray[np.uint64] | list[int], sizes: int | list[int], prefix: int, variant: str | None
) -> NDArray[np.uint8]:
    """`data` keeps what is at the addresses in memory; without a library it holds each input."""
    library, hashes = _library(), np.empty((len(addresses), HASH_BYTES), np.uint8)
    if library is None:
        for index, part in enumerate(data):
            hashes[index] = np.frombuffer(blake3(bytes([prefix]) + part.tobytes()).digest(), np.uint8)
        return hashes
    inputs = np.empty((len(addresses), 3), np.uint64)
    inputs[:, 0], inputs[:, 1] = addresses, sizes
    inputs[:, 2] = hashes.ctypes.data + np.arange(len(addresses), dtype=np.uint64) * np.uint64(HASH_BYTES)
    index, _ = _built()[variant or available()[0]]
    if library.nx_hash(index, inputs.ctypes.data, len(inputs), prefix):
        raise ValueError(f"the compiled kernel {variant!r} does not run here")
    return hashes


def packed_bytes(rows: int, depth: int) -> int:
    """Memory of a weight [rows, depth]: rows are filled up to a block of 32, depth to 64 (`nx_packed_bytes`)."""
    return -(-rows // 32) * 32 * -(-depth // 64) * 64


def linear_bytes(rows: int, depth: int) -> int:
    """Memory of a linear layer's weights: packed, and the check of its sums."""
    return packed_bytes(rows, depth) + 4 * depth


def _aligned(size: int) -> Array:
    """Uninitialised bytes that begin at a multiple of 64."""
    whole = np.empty(size + _ALIGNMENT, np.uint8)
    start = -whole.ctypes.data % _ALIGNMENT
    return whole[start : start + size]


class _Arena:
    """Memory for weights in the large pages of the system, where it has them: with small ones decoding is some percent slower,
    since a processor does not read ahead from one page into the next."""

    # A small model must not claim address space for a large one: a process with many of them could not fork.
    _PIECE_BYTES_MIN, _PIECE_BYTES_MAX = 2 << 20, 64 << 20

    def __init__(self) -> None:
        self._piece = np.empty(0, np.uint8)
        self._claimed = 0

    def take(self, size: int) -> Array:
        """`size` bytes that begin at a multiple of 64; memory that is never written is never used."""
        whole = -(-size // _ALIGNMENT) * _ALIGNMENT
        if whole > len(self._piece):
            grown = min(max(self._claimed, self._PIECE_BYTES_MIN), self._PIECE_BYTES_MAX)
            region = mmap.mmap(-1, max(whole, grown), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._claimed += len(region)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # a kernel without them
                    region.madvise(mmap.MADV_HUGEPAGE)
            self._piece = np.frombuffer(region, np.uint8)
        taken, self._piece = self._piece[:size], self._piece[whole:]
        return taken


class NativeCache:
    """Keys and values of one session in one stage, in pages of 64 tokens, all layers together (layout: native/layout.h)."""

    def __init__(self, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        self._pages: list[Array] = []
        self._pointers = np.empty(0, np.uintp)

    @property
    def nbytes(self) -> int:
        return len(self._pages) * self._page_bytes

    @property
    def pages(self) -> Sequence[Array]:
        """Each uint8 [bytes of a page]."""
        return self._pages

    def reserve(self, length: int) -> int:
        """Room for `length` tokens; the address of the array of page addresses, good until the next call."""
        pages = -(-length // PAGE_TOKENS)
        if pages > len(self._pages):
            self._pages += [_aligned(self._page_bytes) for _ in range(pages - len(self._pages))]
            self._pointers = np.array([page.ctypes.data for page in self._pages], np.uintp)
        return int(self._pointers.ctypes.data)


@dataclass(frozen=True, slots=True)
class NativeRun:
    """Consecutive tokens of one session. `cache` is None for an encoder. `logits`: of the "last" token, of "all" or "none"."""

    cache: NativeCache | None
    position: int
    count: int
    logits: str = "last"


@dataclass(frozen=True, slots=True)
class Committed:
    """What a step commits to of one run: leaf hashes, and what they are the hashes of where that was asked for.

    `cells`: uint8 [layers, 5, count, 32], a leaf per row of every value, in the order of `nexus.proof.trace.OPS`.
    `logits`: uint8 [n, 32], a leaf per row of logits that the run asked for (one for "last").
    `records`: uint8 [layers, kv_heads, count, 32], a leaf per token of every log; no heads in an encoder.
    `values`: by layer and op float32 [count, width]. `record_bytes`: by layer uint8 [kv_heads, count, size of a record]. Both are
    empty unless asked for. The arrays are views of memory that all runs of the batch share.
    """

    cells: NDArray[np.uint8]
    logits: NDArray[np.uint8]
    records: NDArray[np.uint8]
    values: tuple[tuple[NDArray[np.float32], ...], ...] = ()
    record_bytes: tuple[NDArray[np.uint8], ...] = ()


class Commit:
    """Asks a step to commit to some of its runs (all unless named by index), and to check its own linear layers. After the step
    `committed` has an entry for every run, None for those that were not asked of. `values`: hand out values and records too."""

    def __init__(self, runs: Collection[int] | None = None, values: bool = False) -> None:
        self.runs, self.values = runs, values
        self.committed: list[Committed | None] = []


_LOGITS = {"none": _NO_LOGITS, "last": _LAST_LOGITS, "all": _ALL_LOGITS}


class CancelFlag:
    """Stops a step between two layers when another thread sets it."""

    def __init__(self) -> None:
        self._flag = _I32(0)

    def set(self) -> None:
        self._flag.value = 1

    @property
    def address(self) -> int:
        return ctypes.addressof(self._flag)


class CancelledError(LocalError):
    def __init__(self) -> None:
        super().__init__("the step was cancelled", "Nothing was lost: ask again")


class _Check:
    """The key times the rows of a weight, gathered as they are read (native/check.h)."""

    def __init__(self, depth: int) -> None:
        self._sums = np.zeros(depth, np.int64)

    def add(self, library: ctypes.CDLL, variant: int, key: NDArray[np.int32], rows: NDArray[np.int8]) -> None:
        """`key` [n], `rows` [n, depth]."""
        addresses = (part.ctypes.data for part in (key, rows, self._sums))
        if library.nx_check_rows(variant, *rows.shape, *addresses):
            raise LocalError("the check of a weight could not be made", "This is a bug: please report it")

    def values(self) -> NDArray[np.int32]:
        """Modulo the prime, around zero."""
        half = _CHECK_PRIME // 2
        return ((self._sums + half) % _CHECK_PRIME - half).astype(np.int32)


class NativeModel:
    """Layers [start, end) in the packed form that all variants read; see `build`."""

    def __init__(self, plan: ExactPlan, start: int, end: int, variant: str) -> None:
        """Empty; `build` fills it."""
        library = _library()
        index, supported = _built().get(variant, (-1, False))
        if library is None or not supported:
            raise LocalError(f"the compiled kernel {variant!r} does not run here", f"There are: {', '.join(available()) or 'none'}")
        self.kernel = f"native ({variant})"
        self.weight_bytes = 0
        self.plan = plan
        self._layers = plan.layers[start:end]
        self._first, self._last = start == 0, end == len(plan.layers)
        self._library, self._variant = library, index
        self._arena = _Arena()
        self._kept: list[Array] = []
        self._layer_structs = (_Layer * max(1, len(self._layers)))()
        self._model = _Model()
        self._address = ctypes.addressof(self._model)
        # Of the checks that a step makes of itself (native/check.h).
        self._key = np.frombuffer(os.urandom(4 * _most_rows(plan)), np.int32) & ((1 << _KEY_BITS) - 1)
        self._model.key = self._key.ctypes.data
        self._workspaces: list[Array] = []
        self._lock = threading.Lock()
        self.page_bytes = 0

    # ---- loading

    def _keep(self, values: Array, dtype: Any) -> int:
        """The address of a copy that lives as long as this."""
        values = np.ascontiguousarray(values, dtype)
        self._kept.append(values)
        return int(values.ctypes.data)

    def _floats(self, values: Array) -> int:
        address = self._keep(values, np.float32)
        self.weight_bytes += values.nbytes
        return address

    def _linear(self, tensors: Tensors, name: str, wide: bool, check: _Check, first: int = 0, rows: int | None = None) -> _Linear:
        """Packs rows [first, first + rows) of a weight, block by block as they are read: there is never a second copy of it."""
        total, depth = tensors.shape(f"{name}.weight")
        last = total if rows is None else first + rows
        size = int(self._library.nx_packed_bytes(last - first, depth))
        if not size:
            raise LocalError(f"{name} of {last - first} x {depth} is larger than the compiled kernel takes", "Use the torch kernel")
        packed = self._arena.take(size)
        for at, block in tensors.blocks(f"{name}.weight"):
            begin, end = max(at, first), min(at + len(block), last)
            if begin < end:
                part = np.ascontiguousarray(block[begin - at : end - at], np.int8)
                if self._library.nx_pack(packed.ctypes.data, last - first, depth, begin - first, end - first, part.ctypes.data):
                    raise LocalError(f"{name} could not be packed", "This is a bug: please report it")
                check.add(self._library, self._variant, self._key[begin:end], part)
        self._kept.append(packed)
        self.weight_bytes += size
        bias = self._floats(tensors.tensor(f"{name}.bias")[first:last]) if f"{name}.bias" in tensors else None
        scale = self._floats(tensors.tensor(f"{name}.scale")[first:last])
        return _Linear(packed.ctypes.data, scale, bias, None, last - first, depth, wide, 0)

    def _whole_linear(self, tensors: Tensors, name: str, wide: bool) -> _Linear:
        check = _Check(tensors.shape(f"{name}.weight")[1])
        linear = self._linear(tensors, name, wide, check)
        linear.check = self._checked(check)
        return linear

    def _checked(self, check: _Check) -> int:
        values = check.values()
        self.weight_bytes += values.nbytes
        return self._keep(values, np.int32)

    def _norm(self, tensors: Tensors, name: str) -> _Norm:
        if f"{name}.weight" not in tensors:
            return _Norm()
        bias = self._floats(tensors.tensor(f"{name}.bias")) if f"{name}.bias" in tensors else None
        return _Norm(self._floats(tensors.tensor(f"{name}.weight")), bias)

    def load_layer(self, index: int, tensors: Tensors) -> None:
        """`index`: of this stage."""
        plan, layer, to = self.plan, self._layers[index], self._layer_structs[index]
        for name in ("qkv", "o", "down"):
            setattr(to, name, self._whole_linear(tensors, name, name in layer.wide))
        wide, check = "gate_up" in layer.wide, _Check(plan.hidden)
        if plan.gated:
            to.gate = self._linear(tensors, "gate_up", wide, check, 0, plan.ffn)
        to.up = self._linear(tensors, "gate_up", wide, check, plan.gate_up_size - plan.ffn, plan.ffn)
        to.up.check = self._checked(check)
        for name, _ in _Layer._fields_:
            if name.endswith("_norm"):
                setattr(to, name, self._norm(tensors, name))
        to.window, to.wide_attention = layer.window, ATTENTION in layer.wide
        to.rope = layer.rope if plan.rotated and plan.ropes else -1

    def load_ends(self, embedding: Tensors | None, head: Tensors | None, tables: Mapping[str, NDArray[np.float64]]) -> None:
        """Embedding, head and tables; the last thing to load."""
        plan, model = self.plan, self._model
        model.hidden, model.heads, model.kv_heads, model.head_dim = plan.hidden, plan.heads, plan.kv_heads, plan.head_dim
        model.rotated = plan.rotated if plan.ropes else 0
        model.layers, model.layer = len(self._layers), self._layer_structs
        model.norm_kind = _RMS_NORM if plan.causal else _LAYER_NORM
        model.activation, model.encoder = _ACTIVATIONS[plan.activation], not plan.causal
        model.attention_scale, model.attention_cap = plan.attention_scale, plan.attention_cap
        model.final_cap, model.embed_scale, model.norm_eps = plan.logit_cap, plan.embed_scale, plan.eps
        for name in ("exp_hi", "exp_lo", "phi"):
            setattr(model, name, self._keep(tables[name], np.float64))
        for number in range(len(plan.ropes)):
            coarse, fine = tables[f"rope.{number}.coarse"], tables[f"rope.{number}.fine"]
            model.rope[number] = _Rope(self._keep(coarse, np.float64), self._keep(fine, np.float64), len(coarse))
        has_head = self._last and plan.causal
        if embedding is not None and (self._first or (has_head and plan.tied)):
            linear = self._whole_linear(embedding, "embed", plan.wide_head)
            if self._first:
                model.embed = linear
            if has_head and plan.tied:
                model.head = linear
            if self._first and not plan.causal:
                model.position, model.type = (self._floats(embedding.tensor(f"{name}.weight")) for name in ("position", "type"))
                model.positions = embedding.shape("position.weight")[0]
                model.embed_norm = self._norm(embedding, "embed_norm")
        if has_head and head is not None:
            model.final_norm = self._norm(head, "norm")
            if not plan.tied:
                model.head = self._whole_linear(head, "head", plan.wide_head)
        if self._library.nx_check_model(self._address):
            raise LocalError("a model of this shape is not one that the compiled kernel takes", "Use the torch kernel")
        self.page_bytes = int(self._library.nx_page_bytes(self._address))

    # ---- computing

    def new_cache(self) -> NativeCache | None:
        return NativeCache(self.page_bytes) if self.plan.causal else None

    def run(self, cache: NativeCache | None, position: int, count: int, logits: str = "last") -> NativeRun:
        return NativeRun(cache, position, count, logits)

    def step(
        self,
        runs: Sequence[NativeRun],
        x: torch.Tensor,
        trace: Trace | None = None,
        cancel: CancelFlag | None = None,
        threads: int | None = None,
        commit: Commit | None = None,
    ) -> torch.Tensor:
        """`x`: token ids, int64 [rows], for the first stage, else float32 [rows, hidden]; the rows of all runs one after the other.

        Gives float32 [rows, hidden], or, from the last stage of a causal model, the logits [n, vocab] that the runs ask for, in
        their order. `threads`: as torch's unless given. `commit`: filled with what the step commits to. Raises OutOfBoundsError,
        CancelledError, and LocalError where a step that commits finds that it computed wrongly.
        """
        import torch

        inputs = x.numpy() if self._first else x.to(torch.float32).numpy()
        return torch.from_numpy(
            self.compute(runs, inputs, torch.get_num_threads() if threads is None else threads, trace, cancel, commit)
        )

    def compute(
        self,
        runs: Sequence[NativeRun],
        x: Array,
        threads: int,
        trace: Trace | None = None,
        cancel: CancelFlag | None = None,
        commit: Commit | None = None,
    ) -> NDArray[np.float32]:
        """`step` on arrays: all of it that needs no torch."""
        rows = sum(run.count for run in runs)
        if len(x) != rows or not rows:
            raise ValueError(f"{len(x)} rows for runs of {rows} tokens")
        model, has_head = self._model, bool(self._model.head.weights)
        structs = (_Run * len(runs))()
        longest = wanted = 0
        for number, (struct, run) in enumerate(zip(structs, runs, strict=True)):
            end = run.position + run.count
            pages = run.cache.reserve(end) if run.cache is not None else None
            logits = _LOGITS[run.logits] if has_head else _NO_LOGITS
            struct.pages, struct.position, struct.count, struct.logits = pages, run.position, run.count, logits
            struct.commit = commit is not None and (commit.runs is None or number in commit.runs)
            longest = max(longest, end)
            wanted += (0, 1, run.count)[logits]
        out = np.empty((wanted, model.head.n) if has_head else (rows, self.plan.hidden), np.float32)
        batch = _Batch(structs, len(runs), threads)
        ids, states = (_ids(x, self.plan.vocab), None) if self._first else (None, np.ascontiguousarray(x, np.float32))
        batch.ids = None if ids is None else ids.ctypes.data
        batch.states = None if states is None else states.ctypes.data
        batch.logits_out, batch.states_out = (out.ctypes.data, None) if has_head else (None, out.ctypes.data)
        batch.cancel = None if cancel is None else cancel.address
        traced = _Traced(self.plan, self._layers, rows) if trace else None
        batch.trace = None if traced is None else ctypes.addressof(traced.structs)
        committing = _Committing(self.plan, self._layers, structs, commit.values) if commit else None
        batch.commit = None if committing is None else ctypes.addressof(committing.struct)
        size = int(
            self._library.nx_workspace_bytes(self._address, rows, len(runs), longest, threads, committing.rows if committing else 0)
        )
        if not size:
            raise ValueError(f"a batch of {rows} rows up to position {longest} on {threads} threads is beyond the kernel's limits")
        workspace = self._borrow(size)
        try:
            batch.workspace, batch.workspace_bytes = workspace.ctypes.data, workspace.nbytes
            result = self._library.nx_step(self._variant, self._address, ctypes.byref(batch))
        finally:
            with self._lock:
                if len(self._workspaces) < _FREE_WORKSPACES_MAX:
                    self._workspaces.append(workspace)
        if result == _BOUNDS:
            raise OutOfBoundsError(run=next(index for index, struct in enumerate(structs) if struct.status))
        if result == _CANCELLED:
            raise CancelledError
        if result == _WRONG:
            from nexus.engine.exact.torch_step import WrongSumsError

            raise WrongSumsError(self.kernel)
        if result != _OK:
            raise ValueError(f"the compiled kernel refused the batch ({result})")
        if trace and traced:
            traced.report(trace)
        if commit and committing:
            commit.committed = committing.parts(structs)
        return out

    def _borrow(self, size: int) -> Array:
        """A workspace that no other thread has, of at least `size` bytes."""
        with self._lock:
            workspace = self._workspaces.pop() if self._workspaces else None
        return workspace if workspace is not None and workspace.nbytes >= size else _aligned(size)


def _ids(ids: Array, vocab: int) -> NDArray[np.uint32]:
    if int(ids.min()) < 0 or int(ids.max()) >= vocab:
        raise ValueError(f"token ids must be from 0 to {vocab - 1}")
    return ids.astype(np.uint32)


class _Traced:
    """Memory for what a traced step puts out."""

    def __init__(self, plan: ExactPlan, layers: Sequence[LayerPlan], rows: int) -> None:
        import torch

        self.structs = (_Trace * max(1, len(layers)))()
        self._values: list[dict[str, torch.Tensor]] = []
        for layer, struct in zip(layers, self.structs, strict=False):
            values = {}
            for name, (width, _) in plan.linear_shapes().items():
                values[name] = torch.empty((2 * rows if name in layer.wide else rows, width), dtype=torch.int32)
                if name == "qkv":
                    values[ATTENTION] = torch.empty((rows, plan.q_size), dtype=torch.float32)
            for name, value in values.items():
                setattr(struct, name, value.data_ptr())
            self._values.append(values)

    def report(self, trace: Trace) -> None:
        for index, values in enumerate(self._values):
            for name, value in values.items():
                trace(index, name, value)


def _most_rows(plan: ExactPlan) -> int:
    """Of any linear layer."""
    return max(plan.vocab, *(rows for rows, _ in plan.linear_shapes().values()))


class _Committing:
    """Memory for what a step commits to."""

    def __init__(self, plan: ExactPlan, layers: Sequence[LayerPlan], runs: ctypes.Array[_Run], values: bool) -> None:
        self.rows = rows = sum(run.count for run in runs if run.commit)
        logits = sum((0, 1, run.count)[run.logits] for run in runs if run.commit)
        heads = plan.kv_heads if plan.causal else 0
        self._cells = np.empty((len(layers), len(OPS), rows, HASH_BYTES), np.uint8)
        self._records = np.empty((len(layers), heads, rows, HASH_BYTES), np.uint8)
        self._logits = np.empty((logits, HASH_BYTES), np.uint8)
        self.struct = _Commit(*(part.ctypes.data for part in (self._cells, self._records, self._logits)))
        self._values: list[list[NDArray[np.float32]]] = []
        self._logged: list[NDArray[np.uint8]] = []
        if values:
            self._hand_out(plan, layers, rows, heads)

    def _hand_out(self, plan: ExactPlan, layers: Sequence[LayerPlan], rows: int, heads: int) -> None:
        """As nx_commit has it: values of a layer one after the other, layers at the distance of the largest one's."""
        widths = value_widths(plan)
        at = np.cumsum([0, *(widths[op] for op in OPS)])
        sizes = [plan.head_dim * (3 if ATTENTION in layer.wide else 2) + 8 for layer in layers]
        values = np.empty((len(layers), rows * int(at[-1])), np.float32)
        logged = np.empty((len(layers), heads * rows * max(sizes, default=0)), np.uint8)
        self.struct.values, self.struct.logged = values.ctypes.data, logged.ctypes.data
        self._values = [[part[rows * a : rows * b].reshape(rows, b - a) for a, b in pairwise(at)] for part in values]
        self._logged = [part[: heads * rows * size].reshape(heads, rows, size) for part, size in zip(logged, sizes, strict=True)]

    def parts(self, runs: ctypes.Array[_Run]) -> list[Committed | None]:
        """What belongs to each run."""
        parts: list[Committed | None] = []
        row = logit = 0
        for run in runs:
            if not run.commit:
                parts.append(None)
                continue
            rows, logits = slice(row, row + run.count), slice(logit, logit + (0, 1, run.count)[run.logits])
            row, logit = rows.stop, logits.stop
            parts.append(
                Committed(
                    self._cells[:, :, rows],
                    self._logits[logits],
                    self._records[:, :, rows],
                    tuple(tuple(value[rows] for value in values) for values in self._values),
                    tuple(records[:, rows] for records in self._logged),
                )
            )
        return parts


def build(
    plan: ExactPlan,
    start: int,
    end: int,
    pieces: Mapping[str, Tensors],
    tables: Mapping[str, NDArray[np.float64]],
    variant: str | None = None,
) -> NativeModel:
    """`pieces`: by name, as docs/exact.md lists their tensors; "layer.N" counted in the whole model. `variant`: of `available`."""
    variants = available()
    if not variants:
        raise LocalError("the compiled kernel is not installed", "Use the torch kernel, or install a C compiler and Nexus again")
    model = NativeModel(plan, start, end, variant or variants[0])
    for index in range(start, end):
        model.load_layer(index - start, pieces[layer_name(index)])
    model.load_ends(pieces.get(EMBEDDING), pieces.get(HEAD), tables)
    return model


if __name__ == "__main__":
    if sys.argv[1:] != ["--build"]:
        sys.exit("usage: python -m nexus.engine.exact.native --build")
    native_build.main()
