"""A stage of the exact profile: pieces loaded into a kernel, which must give the model's known answers before it serves.

A model carries the hidden state before every layer for a short text (`vectors.safetensors`). A stage that does not give the next
ones bit for bit, because of a wrong kernel, a wrong table or damaged memory, is not served; the answers are checked again from
time to time while it serves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np
import torch
from numpy.typing import NDArray

from nexus.core.errors import LocalError, MalformedError, ModelFormatError, NexusError, NotFoundError, UsageError
from nexus.core.manifest import EMBEDDING, EXACT_PLAN, EXACT_TABLES, EXACT_VECTORS, HEAD, Manifest, layer_name
from nexus.engine.architecture import Config
from nexus.engine.exact import gemm, torch_step
from nexus.engine.exact.commit import Commitments, Kernel, committed_step
from nexus.engine.exact.known_answers import KnownAnswers, table_shapes
from nexus.engine.exact.pieces import STATE_MAX, Piece, read_tables
from nexus.engine.exact.plan import plan_of
from nexus.engine.exact.row_roots import check_rows
from nexus.engine.float_stage import use_threads
from nexus.engine.pooling import Pooling
from nexus.engine.safetensors_check import check_safetensors
from nexus.engine.stage import Cache, Pass, Session, Stage, check_config, path_of
from nexus.proof.arithmetic.plan import PLAN_BYTES_MAX, ExactPlan, plan_from_json, trace_shape
from nexus.proof.arithmetic.sampler import GREEDY, sample_exact
from nexus.proof.trace import TraceShape

# A bit that flips in memory is found with the first step after so many seconds.
RECHECK_S = 600.0
TORCH = "torch"

Tables = Mapping[str, NDArray[np.float64]]


class ExactStage(Stage):
    """Sessions of one call are computed as one batch; the bits are those of each alone."""

    def __init__(
        self,
        manifest: Manifest,
        start: int,
        end: int,
        plan: ExactPlan,
        model: Kernel,
        tables: Tables,
        answers: StageAnswers,
        pooling: Pooling,
        embedding: Piece | None = None,
    ) -> None:
        """`embedding`: its piece, for `embedded`; a stage that nobody audits with needs none."""
        super().__init__(manifest, start, end, pooling)
        self.plan = plan
        self._embedding = embedding
        self.model = model
        self.chunked = plan.causal
        self._exp_tables = tables["exp_hi"], tables["exp_lo"]
        self._answers = answers
        self._checked_s = monotonic()

    @property
    def kernel(self) -> str:
        return self.model.kernel

    @property
    def weight_bytes(self) -> int:
        return self.model.weight_bytes

    @property
    def trace_shape(self) -> TraceShape:
        return trace_shape(self.plan, self.start, self.end)

    def check(self) -> None:
        """Compute the model's known answers once more. Raises LocalError where a single bit differs."""
        self._answers.check(self)
        self._checked_s = monotonic()

    def embedded(self, ids: NDArray[np.int64], position: int) -> NDArray[np.float32]:
        """Hidden states before the first layer, [n, hidden], of tokens [n] from `position` on; read from the piece on disk."""
        piece = self._embedding
        if piece is None:
            raise UsageError("the stage has no embedding", "Only the first stage of a model has it")
        try:
            weight = np.concatenate([piece.rows("embed.weight", int(token), 1) for token in ids])
            scale = piece.tensor("embed.scale")[ids]
            names = () if self.causal else ("type.weight", "embed_norm.weight", "embed_norm.bias")
            extras = {name: torch.from_numpy(piece.tensor(name)) for name in names}
            places = None if self.causal else torch.from_numpy(piece.rows("position.weight", position, len(ids)))
        except FileNotFoundError:
            raise NotFoundError("the embedding is not on this node any more", "Fetch the model's fragment again") from None
        x = torch_step.embed(self.plan, torch.from_numpy(weight), torch.from_numpy(scale), extras, places)
        values: NDArray[np.float32] = x.numpy()
        return values

    def _new_cache(self) -> Cache | None:
        cache: Cache | None = self.model.new_cache()
        return cache

    def _new_commitments(self) -> Commitments:
        return Commitments(self.trace_shape)

    def _compute(self, passes: Sequence[Pass]) -> list[NDArray[np.float32] | NexusError]:
        if monotonic() - self._checked_s > RECHECK_S:
            self.check()
        try:
            return list(self._batch(passes))
        except NexusError as error:
            # One session's values must not stop the others: each alone then tells whose they were.
            return [error] if len(passes) == 1 else [result for one in passes for result in self._compute([one])]

    @torch.inference_mode()
    def _batch(self, passes: Sequence[Pass]) -> list[NDArray[np.float32]]:
        use_threads(self.weight_bytes)
        if not self.causal:
            # An encoder sees the whole of a text: texts go one by one.
            return [self._encoded(self._step([one])) for one in passes]
        out = self._step(passes)
        if self.last:
            logits = iter(out.numpy())
            return [next(logits) if one.wanted else _NO_VALUES for one in passes]
        return [part.numpy() for part in torch.split(out, [one.tokens for one in passes])]

    def _step(self, passes: Sequence[Pass]) -> torch.Tensor:
        """One step of the model; what it commits to is offered to the sessions that do."""
        runs = [
            self.model.run(one.session.cache, one.session.position, one.tokens, "last" if one.wanted else "none") for one in passes
        ]
        inputs = tensor_of(passes[0].inputs if len(passes) == 1 else np.concatenate([one.inputs for one in passes]))
        which = [index for index, one in enumerate(passes) if one.session.commitments]
        if not which:
            return self.model.step(runs, inputs)
        out, committed = committed_step(self.model, runs, inputs, which)
        for one, rows in zip(passes, committed, strict=True):
            if rows is not None:
                assert isinstance(one.session.commitments, Commitments)
                one.session.commitments.offer(rows)
        return out

    def _encoded(self, hidden: torch.Tensor) -> NDArray[np.float32]:
        values: NDArray[np.float32] = (pooled(hidden, self.pooling) if self.last else hidden).numpy()
        return values

    def _choose(self, session: Session) -> int:
        assert session.logits is not None
        return sample_exact(session.logits, session.sampling, session.steps, self._exp_tables, session.tokens)

    def _check_states(self, values: NDArray[np.float32]) -> None:
        if not bool((np.abs(values) <= STATE_MAX).all()):
            raise MalformedError("the hidden states are not all numbers up to 2^40, as every honest computation's are")


_NO_VALUES = np.empty(0, np.float32)


def tensor_of(inputs: NDArray[np.int64] | NDArray[np.float32]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(inputs) if inputs.flags.writeable else inputs.copy())


def pooled(hidden: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """float32 [tokens, hidden] to one vector, by docs/exact.md ("The whole")."""
    if pooling.mode == "cls":
        vector = hidden[0]
    else:
        v, c = torch_step.fixed_point(hidden.reshape(1, -1))
        vector = (v.view(hidden.shape).sum(0) / c[0] / len(hidden)).float()
    if not pooling.normalize:
        return vector
    v, c = torch_step.fixed_point(vector[None])
    return vector * torch_step.inverse_sqrt((v * v).sum(-1) / (c[0] * c[0]))


@dataclass(frozen=True, slots=True)
class StageAnswers:
    """What goes into a stage, and what must come out of it: `given` int64 [n] or float32 [n, hidden]."""

    given: NDArray[np.int64] | NDArray[np.float32]
    expected: NDArray[np.float32]

    def check(self, stage: ExactStage) -> None:
        """Raises LocalError where the stage does not give these answers, bit for bit."""
        got = stage._batch([Pass(Session(stage._new_cache() if stage.causal else None, GREEDY), self.given)])[0]
        if not np.array_equal(got.view(np.uint32), self.expected.view(np.uint32)):
            raise LocalError(
                f"layers {stage.start} to {stage.end - 1} do not give the model's known answers with the kernel {stage.kernel}",
                "Nothing is served from them. Try `nexus engine check`; if every kernel is right, fetch the model again",
            )


def stage_answers(known: KnownAnswers, start: int, end: int) -> StageAnswers:
    """Those of the stage of layers [start, end), in memory of their own."""
    last = end == len(known.states) - 1
    given, expected = known.tokens if start == 0 else known.states[start], known.answer if last else known.states[end]
    return StageAnswers(given.copy(), expected.copy())


def read_plan(config: Config, pooling: Pooling, path: Path) -> ExactPlan:
    """The plan of a model from its exact.json, which must be what its config.json asks for. Raises ModelFormatError."""
    with path.open("rb") as file:
        plan = plan_from_json(file.read(PLAN_BYTES_MAX + 1))
    if plan.widened({}) != plan_of(config, pooling):
        raise ModelFormatError(f"{path.name} and config.json describe different models", "Add the model again")
    return plan


def load_exact_stage(
    manifest: Manifest, config: Config, start: int, end: int, files: Mapping[str, Path], pooling: Pooling, kernel: str | None
) -> ExactStage:
    """See `nexus.engine.stage.load_stage`. `kernel`: "torch" for stock torch operations, "torch:NAME" for one of
    `gemm.KERNELS`, or a variant of the compiled one ("amx", "avx512", ...); None takes the fastest that is right here.
    """
    plan = read_plan(config, pooling, path_of(files, EXACT_PLAN))
    check_config(manifest, config, plan.kv_bytes)
    tables = read_tables(path_of(files, EXACT_TABLES), table_shapes(plan))
    answers = stage_answers(KnownAnswers.read(path_of(files, EXACT_VECTORS), plan), start, end)
    pieces = open_pieces(plan, start, end, files)
    check_rows(manifest, plan, pieces, tables)
    model = build_model(plan, start, end, pieces, tables, kernel)
    stage = ExactStage(manifest, start, end, plan, model, tables, answers, pooling, pieces.get(EMBEDDING) if start == 0 else None)
    stage.check()
    return stage


def open_pieces(plan: ExactPlan, start: int, end: int, files: Mapping[str, Path]) -> dict[str, Piece]:
    """The pieces of layers [start, end) by name."""
    last = end == len(plan.layers)
    names = [layer_name(index) for index in range(start, end)]
    names += [EMBEDDING] if start == 0 or (last and plan.tied) else []
    names += [HEAD] if last else []
    return {name: Piece(path_of(files, name), plan.piece_tensors(name)) for name in names}


def build_model(
    plan: ExactPlan, start: int, end: int, pieces: Mapping[str, Piece], tables: Tables, kernel: str | None = None
) -> Kernel:
    """The layers in memory, ready to compute, by the kernel asked for. Raises LocalError where it is not right here."""
    if kernel is None or not kernel.startswith(TORCH):
        from nexus.engine.exact import native
        from nexus.engine.exact.check import compiled_kernel

        variants = native.available()
        if kernel is not None and kernel not in variants:
            raise UsageError(f"there is no kernel {kernel!r} here", f"There are: {', '.join([*variants, TORCH])}")
        if chosen := kernel or compiled_kernel():
            return native.build(plan, start, end, pieces, tables, chosen)
    return build_torch(plan, start, end, pieces, tables, kernel and kernel.removeprefix(TORCH).removeprefix(":"))


def loaded_bytes(pieces: Sequence[Path]) -> int:
    """Memory of these pieces' weights with the kernel that is taken here: the compiled one fills blocks up, which makes little of
    a model's weights and much of a matrix one column wide. Raises ModelFormatError for a file that is no sound piece."""
    from nexus.engine.exact.check import compiled_kernel

    specs = [item for path in pieces for item in check_safetensors(path).items()]
    if compiled_kernel():
        from nexus.engine.exact.native import linear_bytes

        # Gate and up are filled up each by itself: at most one block more than both together.
        return sum(
            linear_bytes(spec.shape[0] + 32 * (name == "gate_up.weight"), spec.shape[1])
            if spec.dtype == "I8" and len(spec.shape) == 2
            else spec.size
            for name, spec in specs
        )
    factor = 4 if gemm.choose([gemm.F32_DEPTH_MAX]) is gemm.Float32Blocks else 1
    return factor * sum(spec.size for _, spec in specs)


def build_torch(
    plan: ExactPlan, start: int, end: int, pieces: Mapping[str, Piece], tables: Tables, kernel: str | None
) -> torch_step.TorchModel:
    """The layers for the reference implementation, with the integer products of the name given, or the fastest right here."""
    depths = [depth for _, depth in plan.linear_shapes().values()]
    chosen = _named(kernel, depths) if kernel else gemm.choose(depths)
    tensors = {name: {key: torch.from_numpy(piece.tensor(key)) for key in piece.names} for name, piece in pieces.items()}
    return torch_step.build(plan, start, end, tensors, tables, chosen)


def _named(name: str, depths: Sequence[int]) -> gemm.Kernel:
    for kernel, verdict in zip(gemm.KERNELS, gemm.verdicts(depths), strict=True):
        if kernel.name == name:
            if not verdict.right:
                raise LocalError(f"the kernel {name} is not right on this processor: {verdict.reason}", "Use another one")
            return kernel
    raise UsageError(f"torch has no kernel {name!r}", f"There are: {', '.join(kernel.name for kernel in gemm.KERNELS)}")
