"""Everybody who would like to see an honest stage convicted: auditors by the book, and liars with all that they can get hold of."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest

from nexus.core.errors import MalformedError, NotFoundError, VerificationError
from nexus.core.hashing import leaf_hash, merkle_range_proof
from nexus.core.keys import Identity
from nexus.engine.exact.audit import answer, auditor_keys, compare, read_piece_keys
from nexus.engine.exact.replay import Replay
from nexus.proof.accuse import (
    LOG,
    OUTPUT,
    AccusedStage,
    Difference,
    accuse,
    accuse_answer,
    accuse_opening,
    first_difference,
    prove_difference,
    show_answer,
)
from nexus.proof.arithmetic.plan import HEAD_OP, LINEARS
from nexus.proof.arithmetic.rows import EMBED
from nexus.proof.audit import (
    CELLS,
    AuditAnswer,
    AuditRequest,
    Cell,
    Opening,
    SignedAuditAnswer,
    chain_of,
    challenge,
    check_answer,
    check_reveal,
    pick_cells,
)
from nexus.proof.audit_check import AuditedStage, AuditorKeys, find_fault
from nexus.proof.bundle import first_stage_inputs
from nexus.proof.evidence import Evidence, verify_evidence
from nexus.proof.evidence.exhibits import LogRecords
from nexus.proof.evidence.operation import APPEND, Claim
from nexus.proof.evidence.statements import BrokenChain, Equivocation, find_contradiction, is_equivocation
from nexus.proof.freivalds import PieceKeys
from nexus.proof.receipts import SignedReceipt
from nexus.proof.trace import LOGITS, OPS
from tests.honest.swarm import COORDINATOR, Model, Ran

REFUSALS = (MalformedError, VerificationError, NotFoundError)
SEED = bytes(range(32))


@dataclass(eq=False)
class Subject:
    """One honest stage's part in one session that ended, whole."""

    ran: Ran
    stage: int
    identity: Identity

    def __post_init__(self) -> None:
        asked, served = self.ran.asked, self.ran.served[self.stage]
        self.model, self.plan, self.terms = asked.model, asked.plan, asked.terms
        self.inputs, self.outputs, self.signed = served.inputs, served.outputs, served.chain
        self.traces = served.traces[: len(self.signed)]
        # Of an attempt that broke off only what was signed for can be talked about.
        steps = sum(signed.receipt.n for signed in self.signed)
        self.inputs, self.outputs = self.inputs[:steps], self.outputs[:steps]
        self.layers = asked.plan.stages[self.stage]
        self.shape = asked.shapes[self.stage]
        self.is_last = self.stage == len(asked.plan.stages) - 1
        width = 4 if self.stage == 0 else 4 * self.model.manifest.hidden_size
        self.rows = [len(payload) // width for payload in self.inputs]

    @property
    def accused(self) -> AccusedStage:
        known = self.outputs if self.is_last else ()
        return AccusedStage(
            self.model.manifest, self.model.exact_bytes, self.plan, self.terms, self.signed, self.traces, self.inputs, known
        )

    def audited(self, *, own: bool) -> AuditedStage:
        """As the coordinator knows it, or the stage itself."""
        receipts = [signed.receipt for signed in self.signed]
        inputs: Sequence[bytes] = self.inputs
        results: Sequence[bytes] = ()
        if not own and self.ran.bundle:
            bundle = self.ran.bundle
            inputs, results = first_stage_inputs(self.model.manifest, bundle.inputs, bundle.outputs), bundle.outputs
        traces = () if own else self.traces
        return AuditedStage(
            self.model.manifest, self.model.exact, self.plan, self.terms, self.stage, receipts, traces, inputs, results, self.rows
        )


class Keys:
    """An auditor's keys, made once per piece."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], PieceKeys] = {}
        self._tables: dict[str, AuditorKeys] = {}

    def of(self, subject: Subject, cells: Sequence[Cell]) -> AuditorKeys:
        model, pieces = subject.model, {}
        for name, linears in subject.audited(own=False).pieces(cells).items():
            key = model.name, name
            if key not in self._kept:
                linears = LINEARS if name.startswith("layer") else ((EMBED,) if name == "embedding" else (HEAD_OP,))
                if name == "head" and (model.exact.tied or not model.causal):
                    linears = ()
                if name == "embedding" and not model.exact.tied:
                    linears = ()
                self._kept[key] = read_piece_keys(model.folder.paths[name], model.exact, name, linears, SEED)
            pieces[name] = self._kept[key]
        if model.name not in self._tables:
            self._tables[model.name] = auditor_keys(model.exact, model.folder.paths, {})
        return replace(self._tables[model.name], pieces=pieces)


def refuse(evidence: Evidence, model: Model) -> str:
    """Nobody may be convicted by it; why not. The file is what everybody else gets."""
    with pytest.raises(REFUSALS) as caught:
        verify_evidence(Evidence.from_file(evidence.to_file()), model.weights)
    return str(caught.value)


# ---- by the book ----------------------------------------------------------------------------------------------------------------


def replicate(subject: Subject, kernel: str) -> Replay:
    """The replica's audit: everything again on another machine, and no difference."""
    stage = subject.model.stage(subject.layers.start, subject.layers.end, kernel)
    checked = compare(stage, subject.audited(own=False), subject.inputs, range(len(subject.signed)))
    roots = [signed.receipt.out_root for signed in subject.signed]
    assert first_difference(subject.shape, subject.traces, checked.replay, roots) is None
    assert not checked.differs
    assert list(checked.replay.outputs) == subject.outputs
    assert accuse(subject.accused, checked.replay, subject.model.weights) is None
    return checked.replay


def audit(subject: Subject, kernel: str, keys: Keys, index: int, count: int) -> tuple[SignedAuditAnswer, list[Opening]]:
    """The light audit, from the challenge to the last check."""
    chain, last = chain_of(COORDINATOR, subject.terms.nonce), subject.signed[-1].receipt
    reveal = chain.reveal(index)
    request = AuditRequest(
        1, COORDINATOR.public_key, subject.terms.session, subject.stage, last.id, index, reveal, CELLS, count, ()
    )
    check_reveal(subject.terms.challenge, index, reveal)
    drawn = challenge(last.id, reveal)
    heads = subject.model.exact.kv_heads
    cells = pick_cells(drawn, subject.rows, subject.shape.layers, heads, subject.is_last, count)
    loaded = subject.model.stage(subject.layers.start, subject.layers.end, kernel)
    files = subject.model.folder.stage_files(subject.model.manifest, subject.layers.start, subject.layers.end)
    openings = [Opening.from_bytes(one.to_bytes()) for one in answer(loaded, subject.audited(own=True), cells, files)]
    signed = SignedAuditAnswer.sign(
        AuditAnswer(
            1,
            request.id,
            request.session,
            request.receipt,
            subject.identity.public_key,
            subject.stage,
            tuple(opening.id for opening in openings),
        ),
        subject.identity,
    )
    assert check_answer(signed, request, subject.identity.public_key, len(cells)).openings == tuple(one.id for one in openings)
    if subject.ran.bundle:
        seen, made = subject.audited(own=False), keys.of(subject, cells)
        assert [find_fault(seen, made, opening) for opening in openings] == [None] * len(openings)
    return signed, openings


# ---- by all other means ----------------------------------------------------------------------------------------------------------


def differences(chance: random.Random, subject: Subject, count: int) -> Iterator[Difference]:
    """Places where a difference could be, and is not."""
    for _ in range(count):
        window = chance.randrange(len(subject.signed))
        receipt = subject.signed[window].receipt
        step = receipt.step0 + chance.randrange(receipt.n)
        layer = chance.randrange(subject.shape.layers)
        kind = chance.choice([*OPS, *([LOGITS] if subject.shape.logits else [OUTPUT]), *([LOG] if subject.shape.kv_heads else [])])
        match kind:
            case "logits":
                yield Difference(window, step, subject.shape.layers, LOGITS)
            case "log":
                yield Difference(window, receipt.step0, layer, LOG, chance.randrange(subject.shape.kv_heads))
            case "output":
                yield Difference(window, receipt.step0, subject.shape.layers - 1, OUTPUT)
            case op:
                yield Difference(window, step, layer, op)


def accuse_of_values(chance: random.Random, subject: Subject, replayed: Replay, count: int) -> list[Evidence]:
    """Proofs as an accuser makes them, of differences that are none."""
    made = []
    accused = replace(subject.accused, outputs=())
    for difference in differences(chance, subject, count):
        evidence = prove_difference(accused, replayed, difference).evidence()
        assert "is right" in refuse(evidence, subject.model)
        made.append(evidence)
    return made


def accuse_of_openings(
    chance: random.Random, subject: Subject, signed: SignedAuditAnswer, openings: Sequence[Opening], count: int
) -> list[Evidence]:
    """What the stage itself showed, turned against it."""
    accused, weights, made = subject.accused, subject.model.weights, []
    for opened in chance.sample(openings, min(count, len(openings))):
        result = opened.cell.layer == subject.shape.layers
        if not result or subject.model.causal:
            op = chance.choice([LOGITS, OUTPUT] if result else list(OPS))
            with pytest.raises(VerificationError, match="is right"):
                accuse_opening(accused, opened, op, weights)
        for op in () if result else (LOG, OUTPUT):
            with pytest.raises(REFUSALS):
                accuse_opening(accused, opened, op, weights)
        for part in chance.sample((*OPS, "x", LOG, OUTPUT), 3):
            with pytest.raises(REFUSALS):
                accuse_answer(accused, signed, opened, part, weights, sums=chance.random() < 0.5 and part in LINEARS)
        if not result:
            body = show_answer(accused, signed, opened, chance.choice([*OPS, LOG]))
            made += [body.evidence(), replace(body, is_sum=1, part=chance.choice(LINEARS), element=chance.randrange(40)).evidence()]
    for evidence in made:
        refuse(evidence, subject.model)
    return made


def accuse_of_rewriting(chance: random.Random, subject: Subject, replayed: Replay) -> list[Evidence]:
    """A record of one window's end against the same one of the next, as if they differed."""
    if len(subject.signed) < 2 or not subject.shape.kv_heads:
        return []
    window = chance.randrange(1, len(subject.signed))
    layer, head = chance.randrange(subject.shape.layers), chance.randrange(subject.shape.kv_heads)
    position = chance.randrange(subject.signed[window - 1].receipt.kv_len)
    proof = prove_difference(subject.accused, replayed, Difference(window, subject.signed[window].receipt.step0, layer, LOG, head))

    def opened(before: int) -> LogRecords:
        number = window - before
        records = replayed.records(layer, head, subject.signed[number].receipt.kv_len)
        siblings = merkle_range_proof([leaf_hash(record) for record in records], position, position + 1)
        logs, at = subject.traces[number].logs, layer * subject.shape.kv_heads + head
        path = merkle_range_proof([logs[n : n + 32] for n in range(0, len(logs), 32)], at, at + 1)
        return LogRecords(before, proof.claim.layer, head, position, records[position], tuple(siblings), tuple(path))

    claim = Claim(APPEND, proof.claim.step, proof.claim.layer, position, 1, head, 0)
    shown = replace(proof, claim=claim, logs=(), cells=(), rows=(), records=(opened(0), opened(1)))
    assert "is right" in refuse(shown.evidence(), subject.model)
    return [shown.evidence()]


def accuse_of_receipts(chance: random.Random, ran: Ran, others: Sequence[SignedReceipt], model: Model, most: int) -> list[Evidence]:
    """Everything that was ever signed in a session, by all attempts at it, two and two; and against other sessions' receipts."""
    own = [signed for served in ran.served.values() for signed in served.signed.values()]
    pairs = [(one, other) for one in own for other in (*own, *others) if one is not other]
    assert not any(is_equivocation(one.receipt, other.receipt) for one, other in pairs)
    by_id = {signed.receipt.id: signed for signed in (*own, *others)}
    named = [(one, by_id[name]) for one in own for name in (one.receipt.parent, one.receipt.prev) if name in by_id]
    chosen = chance.sample(pairs, min(most, len(pairs))) + chance.sample(named, min(most, len(named)))
    made = []
    for one, other in chosen:
        assert find_contradiction(one, other, other, other) is None
        made += [Equivocation.of(one, other).evidence(), BrokenChain(one, (other.receipt,), (), (), ()).evidence()]
    for evidence in made:
        refuse(evidence, model)
    return made + [each for served in ran.served.values() for each in _of_inputs(ran, served.chain, by_id, model)]


def _of_inputs(ran: Ran, chain: Sequence[SignedReceipt], by_id: dict[bytes, SignedReceipt], model: Model) -> list[Evidence]:
    """What the first stage read: the session's prompt, and what came back to it."""
    served = ran.served.get(0)
    if served is None or chain is not served.chain or not chain:
        return []
    leaves, made = [leaf_hash(payload) for payload in served.inputs], []
    first = chain[0]
    made.append(BrokenChain(first, (), (ran.asked.terms,), tuple(leaves[: first.receipt.n]), ()).evidence())
    for prev, signed in pairwise(chain):
        parent = by_id.get(signed.receipt.parent)
        if parent is None or len(ran.asked.plan.stages) - 1 not in ran.served:
            continue
        here = slice(prev.receipt.step0, signed.receipt.step0 + signed.receipt.n)
        last = ran.served[len(ran.asked.plan.stages) - 1]
        outputs = tuple(leaf_hash(payload) for payload in last.outputs[parent.receipt.step0 :][: parent.receipt.n])
        made.append(BrokenChain(signed, (parent.receipt, prev.receipt), (), tuple(leaves[here]), outputs).evidence())
    for evidence in made:
        assert "goes with all" in refuse(evidence, model)
    return made
