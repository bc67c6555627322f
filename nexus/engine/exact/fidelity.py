"""Exact against float: how much of a model's answers the exact profile changes.

Both run over the same texts, layer by layer; of each only one layer is in memory, and the head in blocks of the vocabulary. What is
kept are the hidden states of all texts, once as the exact model computes them and once as the float model does. On the way every
layer is also given the float model's own input: how far it then is from the float layer is its own error, without that of the
layers before it. The float layers are transformers' code; embedding, last norm and head are few enough to be written out here.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nexus.core.errors import ModelFormatError, UsageError
from nexus.core.fidelity import Fidelity, LayerFidelity
from nexus.core.manifest import CAUSAL, EMBEDDING, EXACT, EXACT_PLAN, EXACT_TABLES, HEAD, Manifest, layer_name
from nexus.engine.architecture import Config, read_config
from nexus.engine.exact import gemm, torch_step
from nexus.engine.exact.commit import Kernel
from nexus.engine.exact.convert import float_rows, piece_sources
from nexus.engine.exact.known_answers import table_shapes
from nexus.engine.exact.pieces import Piece, read_tables
from nexus.engine.exact.plan import plan_of
from nexus.engine.exact.stage import Tables, build_model, pooled, read_plan
from nexus.engine.float_stage import SMALL_STAGE_BYTES, use_threads
from nexus.engine.fragment import Fragment
from nexus.engine.importer import CONFIG_FILE, SourceModel, read_source
from nexus.engine.pooling import Pooling, read_pooling
from nexus.engine.safetensors_check import TensorSpec
from nexus.engine.source import TensorSource
from nexus.engine.stage import path_of
from nexus.engine.tokenizer import Tokenizer
from nexus.proof.arithmetic.plan import HEAD_OP, ExactPlan

# Tokens of a text that are read at once; each window begins at position 0.
WINDOW_TOKENS = 256
# Two hidden states per token are kept: more tokens would tell little more and could take all memory.
TOKENS_MAX = 1 << 15
# Fewer tell nothing: tokens to predict, and texts to be each other's neighbours.
PREDICTED_MIN = 32
NEAREST = 10
_BATCH_TOKENS = 512
# Logits at work at once: of a large vocabulary those of few tokens.
_LOGITS_MAX = 1 << 22
_TINY = float(np.finfo(np.float64).tiny)

Progress = Callable[[str, int, int], None]
Files = Mapping[str, Path]
Vectors = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Windows:
    """Token ids of all windows one after the other. `sizes`: tokens of each. `texts`: how many they are from."""

    ids: NDArray[np.int64]
    sizes: tuple[int, ...]
    texts: int

    def __iter__(self) -> Iterator[slice]:
        ends = list(accumulate(self.sizes))
        return (slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True))


def split_texts(content: str, *, causal: bool) -> list[str]:
    """The texts in a file: of a language model what blank lines part, of an encoder the different lines."""
    if causal:
        return [block.strip() for block in re.split(r"\n\s*\n", content) if block.strip()]
    return list(dict.fromkeys(line.strip() for line in content.splitlines() if line.strip()))


@torch.inference_mode()
def measure(
    manifest: Manifest, files: Files, source: Path, content: str, text_name: str, progress: Progress, *, kernel: str | None = None
) -> Fidelity:
    """Compare the exact model `manifest`, whose pieces and files are `files`, with the float model in directory `source`.

    `content`: the texts, see `split_texts`; of more than `TOKENS_MAX` tokens the first. `progress`: called with what is at work and
    how many bytes of the float weights are done, of how many. Raises UsageError for a model that is not exact or too little text,
    ModelFormatError where the directory does not hold the model's float weights, LocalError where no kernel is right here.
    """
    if manifest.profile != EXACT:
        raise UsageError(
            "fidelity compares the exact profile with float, and this model is in the float profile",
            "Add the model with --profile exact, then ask again",
        )
    config = read_config(path_of(files, CONFIG_FILE))
    causal = config.kind == CAUSAL
    pooling = Pooling() if causal else read_pooling({name: path for name, path in files.items() if manifest.file(name)})
    plan = read_plan(config, pooling, path_of(files, EXACT_PLAN))
    tables = read_tables(path_of(files, EXACT_TABLES), table_shapes(plan))
    model = _source_of(plan, source)
    tokenizer = Tokenizer.load(files, 0 if plan.causal else min(WINDOW_TOKENS, manifest.context))
    windows = _windows(split_texts(content, causal=plan.causal), tokenizer, plan, manifest.context)
    use_threads(SMALL_STAGE_BYTES)
    comparison = _Comparison(plan, files, tables, model, windows, progress, kernel)
    layers, exact, true = comparison.layers()
    common = Fidelity(
        text_name, str(source), windows.texts, len(windows.sizes), len(windows.ids), comparison.kernel_name, tuple(layers)
    )
    if plan.causal:
        return comparison.with_head(common, exact, true)
    vectors = [torch.stack([pooled(exact[window], pooling) for window in windows]).numpy().astype(np.float64)]
    vectors.append(torch.stack([pooling(true[window][None]) for window in windows]).numpy().astype(np.float64))
    return _with_vectors(common, *vectors)


def _source_of(plan: ExactPlan, source: Path) -> SourceModel:
    """The directory, if it is of a model of the same shape."""
    model = read_source(source)
    if plan_of(model.config, model.pooling) != plan.widened({}):
        raise ModelFormatError(
            f"{source} holds another model: its config.json asks for other layers than this one has",
            "Give the directory that the model was added from with --against DIRECTORY",
        )
    return model


def _windows(texts: Sequence[str], tokenizer: Tokenizer, plan: ExactPlan, context: int) -> _Windows:
    """Raises UsageError for too little text."""
    window = min(WINDOW_TOKENS, context)
    found: list[list[int]] = []
    total = used = 0
    for text in texts:
        encoded = tokenizer.encode(text)
        # A single token has nothing to predict. An encoder's tokenizer has cut the text already.
        parts = [encoded[at : at + window] for at in range(0, len(encoded), window)]
        parts = [part for part in parts if len(part) > plan.causal]
        if parts and total + len(encoded) > TOKENS_MAX:
            break
        found += parts
        total += sum(map(len, parts))
        used += bool(parts)
    if plan.causal and total - len(found) < PREDICTED_MIN:
        raise UsageError(
            f"the text has {total - len(found)} tokens to predict, too few to tell anything",
            f"Give a text of at least {PREDICTED_MIN} tokens, better thousands",
        )
    if not plan.causal and len(found) <= NEAREST:
        raise UsageError(
            f"the text has {len(found)} different lines, too few to tell anything",
            f"Give one sentence per line, at least {NEAREST + 1}, better a thousand",
        )
    ids = np.array([token for part in found for token in part], np.int64)
    if int(ids.max()) >= plan.vocab:
        raise ModelFormatError(f"the tokenizer gives token {int(ids.max())}, which the model does not have", "Add the model again")
    return _Windows(ids, tuple(map(len, found)), used)


class _Comparison:
    """Both models over all windows."""

    def __init__(
        self,
        plan: ExactPlan,
        files: Files,
        tables: Tables,
        model: SourceModel,
        windows: _Windows,
        progress: Progress,
        kernel: str | None,
    ) -> None:
        self._plan, self._files, self._tables, self._model, self._windows = plan, files, tables, model, windows
        self._progress, self._kernel = progress, kernel
        # Of the parts that stock torch computes in any case.
        self._product = gemm.choose(depth for _, depth in plan.linear_shapes().values())
        self._total = sum(source.spec.size for source in model.tensors.values())
        self._done = 0
        self._sources = {piece.name: piece.sources for piece in piece_sources(model.config, plan, model.layout)}
        self.kernel_name = ""

    # ---- embedding and layers

    def layers(self) -> tuple[list[LayerFidelity], torch.Tensor, torch.Tensor]:
        """The error of embedding and layers; the last hidden states [tokens, hidden] of the exact and of the float model."""
        exact, true = self._embedded()
        found = [LayerFidelity(EMBEDDING, _mean_square_root(_relative_squares(exact, true)))]
        for index in range(len(self._plan.layers)):
            name, size = layer_name(index), sum(source.spec.size for source in self._layer_sources(index).values())
            theirs = _finite(self._float_pass(self._float_layer(index), true), name)
            ours = self._exact_layer(index)
            batches, errors = list(self._batches()), []
            for count, batch in enumerate(batches):
                rows = slice(batch[0].start, batch[-1].stop)
                errors.append(_relative_squares(_exact_pass(ours, batch, true[rows]), theirs[rows]))
                # In place: what is behind is not needed again.
                exact[rows] = _exact_pass(ours, batch, exact[rows])
                self._progress(name, self._done + size * (count + 1) // len(batches), self._total)
            self._done += size
            self.kernel_name, true = ours.kernel, theirs
            found.append(LayerFidelity(name, _mean_square_root(np.concatenate(errors))))
        return found, exact, true

    def _batches(self) -> Iterator[list[slice]]:
        """Windows that the exact layers are given together; an encoder's texts go one by one."""
        batch: list[slice] = []
        for window in self._windows:
            if batch and (not self._plan.causal or window.stop - batch[0].start > _BATCH_TOKENS):
                yield batch
                batch = []
            batch.append(window)
        yield batch

    def _exact_layer(self, index: int) -> Kernel:
        layer, piece = self._plan.layers[index], Piece(path_of(self._files, layer_name(index)), self._plan.layer_tensors())
        # Between two others, so that it is neither the first of the model nor the last.
        alone = replace(self._plan, layers=(layer, layer, layer))
        return build_model(alone, 1, 2, {layer_name(1): piece}, self._tables, self._kernel)

    def _layer_sources(self, index: int) -> dict[str, TensorSource]:
        """The float tensors of a layer by their names inside it."""
        layout = self._model.layout
        return {name: self._model.tensors[f"{layout.layers}.{index}.{name}"] for name in layout.layer_tensors(index)}

    def _float_layer(self, index: int) -> Fragment:
        """transformers' layer, between two others of its kind."""
        config = Config(self._model.config.kind, copy.deepcopy(self._model.config.settings))
        config.settings.num_hidden_layers = 3
        if types := getattr(config.settings, "layer_types", None):
            config.settings.layer_types = [types[index]] * 3
        prefix = f"{self._model.layout.layers}.0."
        tensors = {prefix + name: _float_tensor(source) for name, source in self._layer_sources(index).items()}
        return Fragment(config, 1, 2, tensors, torch.float32, decodes=False)

    def _float_pass(self, layer: Fragment, x: torch.Tensor) -> torch.Tensor:
        """float32 [tokens, hidden] of all windows through a float layer; windows of one length together."""
        out = torch.empty_like(x)
        by_size: dict[int, list[slice]] = {}
        for window in self._windows:
            by_size.setdefault(window.stop - window.start, []).append(window)
        for size, windows in by_size.items():
            each = max(1, _BATCH_TOKENS // size)
            for at in range(0, len(windows), each):
                batch = windows[at : at + each]
                states = layer.model.base_model(inputs_embeds=torch.stack([x[window] for window in batch]), use_cache=False)
                for window, state in zip(batch, states.last_hidden_state, strict=True):
                    out[window] = state
        return out

    def _embedded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Before the first layer, exact and float. No more of the table than the rows in use is ever in memory, and a block."""
        plan = self._plan
        vocabulary, ids = np.unique(self._windows.ids, return_inverse=True)
        piece = Piece(path_of(self._files, EMBEDDING), plan.embedding_tensors())
        chosen = {name: piece.tensor(name) for name in piece.names if name != "embed.weight"}
        chosen["embed.scale"] = chosen["embed.scale"][vocabulary]
        chosen["embed.weight"] = _rows(piece.blocks("embed.weight"), vocabulary, plan.hidden, np.dtype(np.int8))
        tensors = {name: torch.from_numpy(values) for name, values in chosen.items()}
        model = torch_step.build(plan, 0, 0, {EMBEDDING: tensors}, self._tables, self._product)
        runs = [model.run(None, 0, size) for size in self._windows.sizes]
        exact = model.embedded(runs, torch.from_numpy(ids))
        (name,) = self._sources[EMBEDDING]["embed.weight"]
        source = self._model.tensors[name]
        table = torch.from_numpy(_rows(_float_blocks(source), vocabulary, plan.hidden, np.dtype(np.float32)))
        true = table[ids]
        if plan.embed_scale:
            true = true * plan.embed_scale
        if not plan.causal:
            positions = torch.cat([torch.arange(size) for size in self._windows.sizes])
            true = true + self._end(EMBEDDING, "type.weight")[0] + self._end(EMBEDDING, "position.weight")[positions]
            weight, bias = (self._end(EMBEDDING, f"embed_norm.{kind}") for kind in ("weight", "bias"))
            true = torch.nn.functional.layer_norm(true, (plan.hidden,), weight, bias, plan.eps)
        self._advance(EMBEDDING)
        return exact, _finite(true, EMBEDDING)

    def _end(self, piece: str, name: str) -> torch.Tensor:
        """A small float tensor of embedding or head, by the name that docs/exact.md gives it."""
        (source,) = self._sources[piece][name]
        return _float_tensor(self._model.tensors[source])

    def _advance(self, piece: str) -> None:
        self._done += sum(self._model.tensors[name].spec.size for names in self._sources[piece].values() for name in names)
        self._progress(piece, self._done, self._total)

    # ---- head

    def with_head(self, report: Fidelity, exact: torch.Tensor, true: torch.Tensor) -> Fidelity:
        """The report with what the head makes of the last hidden states, block by block of the vocabulary."""
        plan = self._plan
        # Of every window but its last token's: that one predicts nothing that is known.
        rows = np.concatenate([np.arange(window.start, window.stop - 1) for window in self._windows])
        targets = self._windows.ids[rows + 1]
        exact, true = exact[rows], true[rows]
        weight = self._end(HEAD, "norm.weight") + (1.0 if plan.norm_offset else 0.0)
        normed = true * torch.rsqrt(true.pow(2).mean(-1, keepdim=True) + plan.eps) * weight
        ours, theirs, own = _Likelihood(targets), _Likelihood(targets), np.zeros((2, len(rows)))
        for first, block, head in self._head_blocks():
            step = max(1, min(_BATCH_TOKENS, _LOGITS_MAX // len(block)))
            for at in range(0, len(rows), step):
                part = slice(at, at + step)
                logits = normed[part] @ block.T
                if plan.logit_cap:
                    logits = torch.tanh(logits / plan.logit_cap) * plan.logit_cap
                theirs.see(part, first, _finite(logits, HEAD))
                ours.see(part, first, head(exact[part]))
                own[0, part] += _squares(head(true[part]) - logits)
                own[1, part] += _squares(logits)
        self._advance(HEAD)
        error = _mean_square_root(own[0] / np.maximum(own[1], _TINY))
        return replace(
            report,
            layers=(*report.layers, LayerFidelity(HEAD, error)),
            top1_agreement=float(np.mean(ours.best == theirs.best)),
            perplexity_exact=ours.perplexity(),
            perplexity_float=theirs.perplexity(),
        )

    def _head_blocks(self) -> Iterator[tuple[int, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]]:
        """Of each block of the vocabulary: its first token, the float weights [block, hidden], and the exact head, which takes
        hidden states to logits."""
        plan, pieces = self._plan, self._sources
        head = Piece(path_of(self._files, HEAD), plan.head_tensors())
        norm = torch.from_numpy(head.tensor("norm.weight"))
        table, name = (Piece(path_of(self._files, EMBEDDING), plan.embedding_tensors()), "embed") if plan.tied else (head, HEAD_OP)
        (source,) = pieces[EMBEDDING if plan.tied else HEAD][f"{name}.weight"]
        scale = torch.from_numpy(table.tensor(f"{name}.scale"))
        count, alone = len(plan.layers), replace(plan, tied=False)
        for first, block in table.blocks(f"{name}.weight"):
            tensors = {
                "head.weight": torch.from_numpy(block),
                "head.scale": scale[first : first + len(block)],
                "norm.weight": norm,
            }
            model = torch_step.build(alone, count, count, {HEAD: tensors}, self._tables, self._product, checks=False)

            def logits(x: torch.Tensor, model: torch_step.TorchModel = model) -> torch.Tensor:
                # Every row is a run of its own: of each the logits are wanted.
                return model.logits([model.run(None, 0, 1) for _ in x], x)

            yield first, _float_tensor(_row_range(self._model.tensors[source], first, len(block))), logits


class _Likelihood:
    """What a model says of the tokens that follow, from its logits block by block: `best` token, and how likely the true one is."""

    def __init__(self, targets: NDArray[np.int64]) -> None:
        self._targets = targets
        self.best = np.zeros(len(targets), np.int64)
        self._largest = np.full(len(targets), -np.inf)
        self._sum = np.zeros(len(targets))  # of exp(logit - largest)
        self._target_logits = np.full(len(targets), -np.inf)

    def see(self, rows: slice, first: int, logits: torch.Tensor) -> None:
        """`logits` [rows, block] of the tokens from `first` on."""
        values = logits.numpy().astype(np.float64)
        here = np.arange(len(values))
        best = values.argmax(axis=1)
        largest = values[here, best]
        before = self._largest[rows].copy()
        self.best[rows] = np.where(largest > before, best + first, self.best[rows])
        after = np.maximum(before, largest)
        self._sum[rows] = self._sum[rows] * np.exp(before - after) + np.exp(values - after[:, None]).sum(axis=1)
        self._largest[rows] = after
        targets = self._targets[rows] - first
        inside = (targets >= 0) & (targets < values.shape[1])
        found = values[here, np.clip(targets, 0, values.shape[1] - 1)]
        self._target_logits[rows] = np.where(inside, found, self._target_logits[rows])

    def perplexity(self) -> float:
        return math.exp(float(np.mean(self._largest + np.log(self._sum) - self._target_logits)))


def _with_vectors(report: Fidelity, exact: Vectors, true: Vectors) -> Fidelity:
    """`exact`, `true`: float64 [texts, hidden]."""
    exact, true = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (exact, true))
    cosines = (exact * true).sum(axis=1)
    same = [len(ours & theirs) for ours, theirs in zip(_nearest(exact), _nearest(true), strict=True)]
    return replace(
        report,
        cosine_mean=float(cosines.mean()),
        cosine_worst=float(cosines.min()),
        overlap=float(np.mean(same)) / NEAREST,
    )


def _nearest(vectors: Vectors) -> Iterator[set[int]]:
    """Of each vector the others that are nearest, by number."""
    for index, vector in enumerate(vectors):
        similarities = vectors @ vector
        similarities[index] = -np.inf
        yield set(np.argpartition(-similarities, NEAREST)[:NEAREST].tolist())


def _exact_pass(layer: Kernel, windows: Sequence[slice], x: torch.Tensor) -> torch.Tensor:
    return layer.step([layer.run(layer.new_cache(), 0, window.stop - window.start) for window in windows], x)


def _finite(x: torch.Tensor, part: str) -> torch.Tensor:
    if not bool(x.isfinite().all()):
        raise ModelFormatError(
            f"the float model's {part} gives values that are not numbers", "Its weights are damaged: download the model again"
        )
    return x


def _squares(x: torch.Tensor) -> Vectors:
    """|x|^2 of each row, float64."""
    squares: Vectors = x.double().pow(2).sum(-1).numpy()
    return squares


def _relative_squares(got: torch.Tensor, true: torch.Tensor) -> Vectors:
    """|got - true|^2 / |true|^2 of each row."""
    return _squares(got - true) / np.maximum(_squares(true), _TINY)


def _mean_square_root(squares: Vectors) -> float:
    return math.sqrt(float(squares.mean()))


def _float_blocks(source: TensorSource) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """As `Piece.blocks`: (first row, rows)."""
    first = 0
    for rows in float_rows(source, _ignore):
        yield first, rows
        first += len(rows)


def _rows(blocks: Iterator[tuple[int, NDArray[Any]]], wanted: NDArray[np.int64], depth: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Rows `wanted`, sorted, of a table that comes block by block."""
    found = np.empty((len(wanted), depth), dtype)
    for first, block in blocks:
        here = slice(*np.searchsorted(wanted, (first, first + len(block))))
        found[here] = block[wanted[here] - first]
    return found


def _float_tensor(source: TensorSource) -> torch.Tensor:
    """A whole tensor as float32."""
    rows = np.concatenate(list(float_rows(source, _ignore)))
    return torch.from_numpy(rows.reshape(source.spec.shape))


def _row_range(source: TensorSource, first: int, count: int) -> TensorSource:
    """Rows [first, first + count) of a two-dimensional tensor."""
    rows, depth = source.spec.shape
    width = source.spec.size // rows
    start = source.spec.start + first * width
    return replace(source, spec=TensorSpec(source.spec.dtype, (count, depth), start, start + count * width))


def _ignore(count: int) -> None:
    pass
