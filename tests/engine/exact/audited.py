"""Sessions of real stages as an auditor holds them: inputs, receipts, traces, keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from nexus.core.hashing import leaf_hash
from nexus.core.manifest import EXACT, Manifest, stage_pieces
from nexus.core.plan import Plan, PlanStage
from nexus.engine.exact.audit import answer, read_angles, read_exact_plan
from nexus.engine.exact.freivalds import piece_keys
from nexus.engine.exact.pieces import Piece
from nexus.engine.exact.stage import ExactStage
from nexus.engine.stage import Stage
from nexus.proof.arithmetic import ops
from nexus.proof.arithmetic.sampler import Sampling
from nexus.proof.audit import Cell, Opening
from nexus.proof.audit_check import AuditedStage, AuditorKeys
from nexus.proof.bundle import request_for
from nexus.proof.receipts import MICRO, Receipt, Terms, millionths, payload_root
from nexus.proof.trace import WindowTrace
from tests.engine.conftest import Folder
from tests.swarm.ring import identity

WINDOW = 4
SEED = bytes(range(32))
TABLES = ops.Tables()


@dataclass
class AuditedSession:
    """`payloads`: into every stage, and out of the last. `seen`: what the coordinator knows of every stage, `own`: what it
    knows itself."""

    model: tuple[Manifest, Folder]
    stages: Sequence[Stage]
    payloads: list[list[bytes]]
    seen: list[AuditedStage]
    own: list[AuditedStage]

    def keys(self, stage: int, cells: Sequence[Cell]) -> AuditorKeys:
        manifest, folder = self.model
        exact = self.seen[stage].exact
        files = {blob.name: folder.paths[blob.name] for blob in (*manifest.pieces, *manifest.files)}
        pieces = {
            name: piece_keys(Piece(files[name], exact.piece_tensors(name)), linears, SEED)
            for name, linears in self.seen[stage].pieces(cells).items()
        }
        return AuditorKeys(pieces, read_angles(exact, files), TABLES)

    def answer(self, stage: int, cells: Sequence[Cell], loaded: Stage | None = None) -> list[Opening]:
        manifest, folder = self.model
        layers = self.seen[stage].layers
        files = {
            blob.name: folder.paths[blob.name] for blob in (*stage_pieces(manifest, layers.start, layers.end), *manifest.files)
        }
        served = loaded or self.stages[stage]
        assert isinstance(served, ExactStage)
        return answer(served, self.own[stage], cells, files)


def run_session(
    model: tuple[Manifest, Folder],
    stages: Sequence[Stage],
    inputs: Sequence[bytes],
    steps: int,
    sampling: Sampling,
) -> AuditedSession:
    """`inputs`: the prompt, or every text of an encoder. `steps`: of a decoder."""
    manifest, folder = model
    edges = [stage.start for stage in stages] + [manifest.layers]
    plan = Plan(
        1,
        manifest.root,
        EXACT,
        "exact",
        tuple(PlanStage(identity(n + 1).public_key, *layers) for n, layers in enumerate(pairwise(edges))),
    )
    terms = Terms(
        spec=1,
        nonce=bytes(16),
        coordinator=identity(0).public_key,
        model_root=manifest.root,
        plan_root=plan.root,
        prompt=leaf_hash(inputs[0]),
        steps_max=1000,
        window=WINDOW,
        temperature=millionths(sampling.temperature),
        top_k=sampling.top_k,
        top_p=millionths(sampling.top_p),
        min_p=millionths(sampling.min_p),
        repetition_penalty=MICRO if sampling.repetition_penalty == 1 else millionths(sampling.repetition_penalty),
        seed=sampling.seed,
        end_tokens=(),
        challenge=b"",
        answered=b"",
    )
    causal = stages[0].causal
    count = steps if causal else len(inputs)
    payloads: list[list[bytes]] = [[] for _ in range(len(stages) + 1)]
    traces: list[list[WindowTrace]] = [[] for _ in stages]
    for stage in stages:
        stage.open(b"s", sampling, commit=True)
    payload = inputs[0]
    for step in range(count):
        payload = payload if causal else inputs[step]
        for index, stage in enumerate(stages):
            payloads[index].append(payload)
            payload = stage.step(b"s", payload)
            if (step + 1) % WINDOW == 0 or step + 1 == count:
                traces[index].append(stage.seal(b"s", (step % WINDOW) + 1))
        payloads[-1].append(payload)
    for stage in stages:
        stage.close(b"s")
    exact = read_exact_plan(manifest, folder.paths)
    rows = [len(given) // 4 for given in payloads[0]]
    seen, own = [], []
    parents: list[Receipt] = []
    for number in range(len(stages)):
        base = AuditedStage(manifest, exact, plan, terms, number, (), (), payloads[0], payloads[-1], rows)
        receipts: list[Receipt] = []
        for window, trace in enumerate(traces[number]):
            step0 = window * WINDOW
            n = min(WINDOW, count - step0)
            here = slice(step0, step0 + n)
            receipts.append(
                Receipt(
                    spec=1,
                    profile=EXACT,
                    model_root=manifest.root,
                    session=terms.session,
                    node=plan.stages[number].node,
                    stage=number,
                    step0=step0,
                    n=n,
                    kv_len=sum(rows[: step0 + n]) if causal else 0,
                    request=request_for(terms, number).id,
                    parent=parents[window].id if parents else b"",
                    prev=receipts[-1].id if receipts else b"",
                    in_root=payload_root(payloads[number][here]),
                    out_root=payload_root(payloads[number + 1][here]),
                    kv_root=trace.kv_root(base.shape),
                    trace_root=trace.trace_root(base.shape, n),
                )
            )
        parents = receipts
        seen.append(AuditedStage(manifest, exact, plan, terms, number, receipts, traces[number], payloads[0], payloads[-1], rows))
        own.append(AuditedStage(manifest, exact, plan, terms, number, receipts, (), payloads[number], (), rows))
    return AuditedSession(model, stages, payloads, seen, own)
