"""Models that were never trained, and sessions of them computed in numpy alone: what proofs are measured and tested with.

Nothing is read or written: a manifest's rows are the roots over the random weights, its other blobs are names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nexus.core.errors import NotFoundError
from nexus.core.hashing import MerkleTree, leaf_hash, merkle_root, tagged_hash
from nexus.core.keys import Identity
from nexus.core.manifest import EXACT_PLAN, EXACT_TABLES, EXACT_VECTORS, Blob, Manifest, blob_root
from nexus.core.plan import Plan, PlanStage
from nexus.proof.accuse import AccusedStage
from nexus.proof.arithmetic.plan import ExactPlan, plan_to_json
from nexus.proof.arithmetic.reference import ReferenceStage, SessionValues
from nexus.proof.arithmetic.rows import TABLES, WeightProof, leaf_hashes_of, linear_leaves, piece_names, row_layout, tensor_leaves
from nexus.proof.arithmetic.sampler import GREEDY, Sampling
from nexus.proof.arithmetic.tables import rope_tables
from nexus.proof.audit import Cell, Opening
from nexus.proof.audit_check import AuditedStage
from nexus.proof.audit_open import open_cell
from nexus.proof.bundle import request_for
from nexus.proof.receipts import Receipt, SignedReceipt, Terms, millionths, payload_root
from nexus.proof.trace import WindowTrace

Arrays = dict[str, NDArray[Any]]
COORDINATOR = Identity(bytes([99]) * 32)


@dataclass
class PureModel:
    """`pieces`: by name; those left out have rows that nobody knows."""

    plan: ExactPlan
    pieces: Mapping[str, Arrays]
    _trees: dict[str, MerkleTree] = field(default_factory=dict)
    _leaves: dict[str, list[NDArray[np.uint8]]] = field(default_factory=dict)

    @cached_property
    def exact_plan(self) -> bytes:
        return plan_to_json(self.plan)

    @cached_property
    def tables(self) -> Arrays:
        tables: Arrays = {}
        for number, rope in enumerate(self.plan.ropes):
            made = rope_tables(rope, self.plan.rotated, self.plan.context)
            tables |= {f"rope.{number}.{kind}": values for kind, values in zip(("coarse", "fine"), made, strict=True)}
        return tables

    @cached_property
    def manifest(self) -> Manifest:
        plan, names = self.plan, piece_names(self.plan)
        exact = Blob(EXACT_PLAN, len(self.exact_plan), blob_root(len(self.exact_plan), [leaf_hash(self.exact_plan)]))
        others = ("config.json", "tokenizer.json", "tokenizer_config.json", EXACT_TABLES, EXACT_VECTORS)
        return Manifest(
            spec=1,
            kind="causal" if plan.causal else "encoder",
            architecture="Made",
            profile="exact",
            dtype="int8",
            layers=len(plan.layers),
            hidden_size=plan.hidden,
            vocab_size=plan.vocab,
            context=plan.context,
            kv_bytes=plan.kv_bytes,
            tied=int(plan.tied),
            pieces=tuple(_blob(name) for name in names if name != TABLES),
            files=(*(_blob(name) for name in others), exact),
            rows=tuple(self._root(name) for name in names),
        ).check()

    def _root(self, name: str) -> bytes:
        return self._tree(name).root if name == TABLES or name in self.pieces else tagged_hash("made", name.encode())

    def _tree(self, name: str) -> MerkleTree:
        if name not in self._trees:
            tensors = self.tables if name == TABLES else self.pieces[name]
            self._leaves[name] = []
            for section in row_layout(self.plan, name).sections:
                if section.linear:
                    parts = (tensors.get(f"{section.name}.{part}") for part in ("weight", "scale", "bias"))
                    self._leaves[name].append(linear_leaves(*parts))  # type: ignore[arg-type]
                else:
                    self._leaves[name].append(tensor_leaves(tensors[section.name]))
            # An encoder has no tables: the root of no leaves.
            hashes = [one for block in self._leaves[name] for one in leaf_hashes_of(block)]
            self._trees[name] = MerkleTree(hashes) if hashes else _Empty()
        return self._trees[name]

    def range(self, model_root: bytes, piece: int, start: int, count: int) -> WeightProof:
        """As `nexus.proof.evidence.WeightSource`."""
        name = piece_names(self.plan)[piece]
        if model_root != self.manifest.root or not (name == TABLES or name in self.pieces):
            raise NotFoundError("this model is not here")
        tree, layout, data = self._tree(name), row_layout(self.plan, name), []
        for section, block in zip(layout.sections, self._leaves[name], strict=True):
            low, high = max(start - section.first, 0), min(start + count - section.first, section.count)
            if low < high:
                data.append(block[low:high].tobytes())
        return WeightProof(piece, start, count, b"".join(data), tuple(tree.range_proof(start, start + count)))

    def row(self, piece: int, index: int) -> WeightProof:
        return self.range(self.manifest.root, piece, index, 1)

    def tensors(self, piece: str) -> Mapping[str, NDArray[Any]]:
        return self.pieces[piece]


class _Empty(MerkleTree):
    def __init__(self) -> None:
        super().__init__([])

    @property
    def root(self) -> bytes:
        return merkle_root([])


def _blob(name: str) -> Blob:
    return Blob(name, 1000, tagged_hash("made-blob", name.encode()))


# What a cheater commits to instead of a value: (step, layer of the stage, operation) and a change in place.
Cheat = tuple[int, int, str, Callable[[NDArray[np.float32]], None]]


@dataclass
class PureSession:
    """One session, computed honestly, by stage; what a stage signs for may be changed after it."""

    model: PureModel
    plan: Plan
    terms: Terms
    inputs: dict[int, list[bytes]]
    values: dict[int, SessionValues]
    traces: dict[int, list[WindowTrace]] = field(default_factory=dict)
    receipts: dict[int, list[SignedReceipt]] = field(default_factory=dict)
    outputs: dict[int, list[bytes]] = field(default_factory=dict)

    def identity(self, stage: int) -> Identity:
        return Identity(bytes([stage + 1]) * 32)

    def windows(self) -> list[tuple[int, int]]:
        steps, window = len(next(iter(self.inputs.values()))), self.terms.window
        return [(step0, min(window, steps - step0)) for step0 in range(0, steps, window)]

    def commit(self) -> None:
        """Traces from the values, and receipts."""
        for stage, values in self.values.items():
            self.traces[stage] = [values.trace(step0, n) for step0, n in self.windows()]
            self.outputs[stage] = list(values.outputs)
        self.sign()

    def sign(self) -> None:
        self.receipts = {stage: [] for stage in self.values}
        for number, (step0, n) in enumerate(self.windows()):
            parent: Receipt | None = None
            if number and self.model.plan.causal:
                parent = self.receipts[max(self.values)][number - 1].receipt
            for stage in self.values:
                receipt = self._receipt(stage, number, step0, n, parent)
                self.receipts[stage].append(SignedReceipt.sign(receipt, self.identity(stage)))
                parent = receipt

    def _receipt(self, stage: int, number: int, step0: int, n: int, parent: Receipt | None) -> Receipt:
        shape, trace = self.values[stage].shape, self.traces[stage][number]
        own = self.receipts[stage]
        rows = [len(values.x) for values in self.values[stage].steps]
        return Receipt(
            spec=1,
            profile="exact",
            model_root=self.model.manifest.root,
            session=self.terms.session,
            node=self.identity(stage).public_key,
            stage=stage,
            step0=step0,
            n=n,
            kv_len=sum(rows[: step0 + n]) if self.model.plan.causal else 0,
            request=request_for(self.terms, stage).id,
            parent=parent.id if parent else b"",
            prev=own[-1].receipt.id if own else b"",
            in_root=payload_root(self.inputs[stage][step0 : step0 + n]),
            out_root=payload_root(self.outputs[stage][step0 : step0 + n]),
            kv_root=trace.kv_root(shape),
            trace_root=trace.trace_root(shape, n),
        )

    def cheat(self, stage: int, *cheats: Cheat) -> SessionValues:
        """The stage commits to other values than it computed; all of what it then claims to have computed."""
        honest = self.values[stage]
        claimed = honest
        for step, layer, op, change in cheats:
            one = claimed.steps[step]
            if op == "logits":
                assert one.logits is not None
                wrong = one.logits.copy()
                change(wrong)
                one = replace(one, logits=wrong)
            else:
                wrong = one.layers[layer][op].copy()
                change(wrong)
                layers = [dict(each) for each in one.layers]
                layers[layer][op] = wrong
                one = replace(one, layers=tuple(layers))
            claimed = replace(claimed, steps=(*claimed.steps[:step], one, *claimed.steps[step + 1 :]))
        self.traces[stage] = [claimed.trace(step0, n) for step0, n in self.windows()]
        self.sign()
        return claimed

    def accused(self, stage: int) -> AccusedStage:
        known = self.outputs[stage] if stage == len(self.plan.stages) - 1 else ()
        return AccusedStage(
            self.model.manifest,
            self.model.exact_plan,
            self.plan,
            self.terms,
            self.receipts[stage],
            self.traces[stage],
            self.inputs[stage],
            known,
        )

    def opening(self, stage: int, cell: Cell, claimed: SessionValues | None = None) -> Opening:
        """What the stage opens of a cell."""
        audited = AuditedStage(
            manifest=self.model.manifest,
            exact=self.model.plan,
            plan=self.plan,
            terms=self.terms,
            stage=stage,
            receipts=[signed.receipt for signed in self.receipts[stage]],
            traces=self.traces[stage],
            inputs=self.inputs[stage],
            results=(),
            rows=[len(values.x) for values in self.values[stage].steps],
        )
        return open_cell(audited, claimed or self.values[stage], self.model, cell)


def run_pure(
    model: PureModel,
    inputs: Sequence[bytes],
    *,
    steps: int = 0,
    edges: Sequence[int] = (),
    window: int = 4,
    sampling: Sampling = GREEDY,
    nonce: int = 0,
    only: int | None = None,
    prompt: bytes = b"",
) -> PureSession:
    """`inputs`: the prompt, or an encoder's texts. `steps`: of a decoder. `edges`: where the stages begin and end, one stage
    otherwise. `only`: the one stage that is computed, of which `inputs` are then all inputs; the session's is `prompt`."""
    spans = list(pairwise(edges or (0, len(model.plan.layers))))
    plan = Plan(
        spec=1,
        model_root=model.manifest.root,
        profile="exact",
        dtype="exact",
        stages=tuple(PlanStage(Identity(bytes([n + 1]) * 32).public_key, *span) for n, span in enumerate(spans)),
    )
    stages = [
        ReferenceStage(model.plan, *span, model.pieces, model.tables)
        for number, span in enumerate(spans)
        if only is None or number == only
    ]
    terms = Terms(
        spec=1,
        nonce=nonce.to_bytes(16, "big"),
        coordinator=COORDINATOR.public_key,
        model_root=model.manifest.root,
        plan_root=plan.root,
        prompt=leaf_hash(prompt or inputs[0]),
        steps_max=steps or len(inputs),
        window=window,
        temperature=millionths(sampling.temperature),
        top_k=sampling.top_k,
        top_p=millionths(sampling.top_p),
        min_p=millionths(sampling.min_p),
        repetition_penalty=millionths(sampling.repetition_penalty),
        seed=sampling.seed,
        end_tokens=(),
        challenge=b"",
        answered=b"",
    )
    if only is not None:
        session = PureSession(model, plan, terms, {only: list(inputs)}, {only: stages[0].run(inputs, sampling)})
        session.commit()
        return session
    fed = list(inputs)
    while True:
        values: dict[int, SessionValues] = {}
        payloads: dict[int, list[bytes]] = {}
        given = fed
        for number, stage in enumerate(stages):
            payloads[number], values[number] = given, stage.run(given, sampling)
            given = values[number].outputs
        if len(fed) >= steps:
            break
        # A decoder reads its own last token next; computed from the start again, which a few short steps can afford.
        fed = [*fed, given[-1]]
    session = PureSession(model, plan, terms, payloads, values)
    session.commit()
    return session
