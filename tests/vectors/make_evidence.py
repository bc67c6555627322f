"""Golden vectors of evidence: files that convict, and files that do not. `python -m tests.vectors.make_evidence` writes them anew.

They are made in numpy from seeded weights, so that they are the same wherever they are made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from nexus.core.errors import NexusError
from nexus.core.hashing import leaf_hash
from nexus.proof.accounts import PAY, Entry, Fork, Share, SignedEntry
from nexus.proof.accuse import LOG, OUTPUT, Difference, accuse, accuse_answer, accuse_opening, prove_difference
from nexus.proof.arithmetic.rows import piece_names, row_layout
from nexus.proof.audit import AuditAnswer, Cell, Opening, SignedAuditAnswer
from nexus.proof.evidence import FORK, Evidence, verify_evidence
from nexus.proof.evidence.operation import Proof
from nexus.proof.evidence.statements import BrokenChain, Equivocation
from nexus.proof.receipts import SignedReceipt
from nexus.proof.trace import ATTENTION, DOWN, GATE_UP, LOGITS, QKV
from scripts.benchmarks.pure_session import PureSession
from tests.proof.pure import one_bit, session

FILE = Path(__file__).parent / "evidence.json"


def _found(one: PureSession, stage: int) -> Evidence:
    evidence = accuse(one.accused(stage), one.values[stage], one.model)
    assert evidence is not None
    return evidence


def _receipt(one: PureSession, stage: int, window: int, **changes: object) -> SignedReceipt:
    return SignedReceipt.sign(replace(one.receipts[stage][window].receipt, **changes), one.identity(stage))  # type: ignore[arg-type]


def convicting() -> Iterator[tuple[str, Evidence]]:
    """Of every kind and scope."""
    for name, plan, stage, (step, layer, op) in (
        ("a whole value of one token", "plain", 1, (4, 0, QKV)),
        ("a whole value of the prompt, from embedding rows on", "plain", 0, (0, 0, QKV)),
        ("whole attention with a window, of 16 bits", "windows", 1, (5, 0, ATTENTION)),
        ("what a norm made of the linear's result", "norms", 0, (1, 0, DOWN)),
        ("logits", "norms", 1, (3, 1, LOGITS)),
        ("an encoder's attention", "encoder", 1, (1, 0, ATTENTION)),
    ):
        one = session(plan)
        one.cheat(stage, (step, layer, op, one_bit))
        yield f"OP: {name}", _found(one, stage)
    for name, op in (("one element of gate and up, opened", GATE_UP), ("one head, opened", ATTENTION)):
        one = session("plain")
        claimed = one.cheat(1, (4, 0, op, one_bit))
        yield f"OP: {name}", accuse_opening(one.accused(1), one.opening(1, Cell(4, 0, 0, 1), claimed), op, one.model)
    one = session("plain", penalty=1.2)
    one.outputs[1][4] = b"\1\0\0\0"
    one.sign()
    yield "OP: a token, with a repetition penalty", _found(one, 1)
    one = session("plain")
    one.outputs[0][1] = bytes(len(one.outputs[0][1]))
    one.sign()
    yield "OP: what left the stage", _found(one, 0)
    one = session("plain")
    one.traces[1][1] = replace(one.traces[1][1], logs=bytes(32) + one.traces[1][1].logs[32:])
    one.sign()
    yield "KV: a log that is not the one before and what was computed since", _found(one, 1)
    one = session("plain")
    yield "EQUIVOCATION", Equivocation.of(one.receipts[0][1], _receipt(one, 0, 1, out_root=bytes(32))).evidence()
    wrong = _receipt(one, 1, 1, in_root=bytes(32))
    yield "CHAIN: the parent's output", BrokenChain(wrong, (one.receipts[0][1].receipt,), (), (), ()).evidence()
    wrong = _receipt(one, 1, 1, kv_len=40)
    yield "CHAIN: the previous receipt's cache", BrokenChain(wrong, (one.receipts[1][0].receipt,), (), (), ()).evidence()
    leaves = tuple(leaf_hash(payload) for payload in one.inputs[0][:3])
    terms = replace(one.terms, prompt=bytes(32))
    wrong = _receipt(one, 0, 0, session=terms.session)
    yield "CHAIN: another prompt", BrokenChain(wrong, (), (terms,), leaves, ()).evidence()
    opened = one.opening(1, Cell(4, 0, 0, 1))
    identity = one.identity(1)

    def answered(lie: Opening) -> SignedAuditAnswer:
        said = AuditAnswer(1, bytes(32), one.terms.session, one.receipts[1][-1].receipt.id, identity.public_key, 1, (lie.id,))
        return SignedAuditAnswer.sign(said, identity)

    row = opened.values[1]
    lies = [
        replace(opened, values=(opened.values[0], replace(row, data=bytes(len(row.data))), *opened.values[2:])),
        replace(opened, sums=(*opened.sums[:3], replace(opened.sums[3], data=bytes(len(opened.sums[3].data))))),
    ]
    yield "FALSE-RESPONSE: a row", accuse_answer(one.accused(1), answered(lies[0]), lies[0], ATTENTION, one.model)
    yield "FALSE-RESPONSE: sums", accuse_answer(one.accused(1), answered(lies[1]), lies[1], DOWN, one.model, sums=True)
    owner = one.identity(0)
    entry = Entry(1, owner.public_key, 0, b"", PAY, bytes(32), 1000, (Share(bytes([7]) * 32, 900),), b"")
    two = (SignedEntry.sign(each, owner) for each in (entry, replace(entry, session=bytes([1]) * 32)))
    yield FORK, Evidence(1, FORK, owner.public_key, Fork.of(*two).to_bytes())


def harmless() -> Iterator[tuple[str, Evidence]]:
    """Well formed, about honest nodes."""
    one = session("windows")
    for name, difference in (
        ("a value that is right", Difference(1, 4, 0, QKV)),
        ("attention that is right", Difference(1, 5, 0, ATTENTION)),
        ("a log that is right", Difference(1, 3, 0, LOG, 1)),
    ):
        yield name, _with_weights(prove_difference(one.accused(1), one.values[1], difference), one)
    yield (
        "an output that is right",
        _with_weights(prove_difference(one.accused(0), one.values[0], Difference(0, 0, 0, OUTPUT)), one),
    )
    yield "one receipt twice", Equivocation.of(one.receipts[0][1], one.receipts[0][1]).evidence()
    yield "another question", Equivocation.of(one.receipts[0][0], one.receipts[0][1]).evidence()
    yield "a chain that holds", BrokenChain(one.receipts[1][1], (one.receipts[0][1].receipt,), (), (), ()).evidence()
    cheated = session("plain")
    cheated.cheat(1, (4, 0, QKV, one_bit))
    yield "another node accused", replace(_found(cheated, 1), accused=cheated.identity(0).public_key)
    yield "of an unknown kind", replace(_found(cheated, 1), kind="NOISE")


def _with_weights(proof: Proof, one: PureSession) -> Evidence:
    """A proof of something that is right, with all the rows of the layer."""
    pieces = {each.piece for each in proof.case.model.rows} - {0, one.model.manifest.layers + 1}
    names = piece_names(one.model.plan)
    rows = tuple(
        one.model.range(one.model.manifest.root, piece, 0, row_layout(one.model.plan, names[piece]).total)
        for piece in sorted(pieces)
    )
    return replace(proof, weights=rows).evidence()


def vectors() -> dict[str, object]:
    convicts = {}
    for name, evidence in convicting():
        verdict = verify_evidence(evidence)
        convicts[name] = {
            "file": evidence.to_file().hex(),
            "id": evidence.id.hex(),
            "kind": verdict.kind,
            "accused": verdict.accused.hex(),
            "session": verdict.session.hex(),
            "stage": verdict.stage,
            "step": verdict.step,
            "layer": verdict.layer,
            "op": verdict.op,
            "element": verdict.element,
        }
    refused = {}
    for name, evidence in harmless():
        try:
            verify_evidence(evidence)
        except NexusError as error:
            refused[name] = {"file": evidence.to_file().hex(), "error": error.code}
        else:
            raise AssertionError(f"{name} convicts")
    return {"convict": convicts, "convict nobody": refused}


def text_of() -> str:
    return json.dumps(vectors(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(text_of(), encoding="utf-8")
