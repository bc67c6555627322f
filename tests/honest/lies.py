"""Evidence about honest nodes as liars make it: out of what is true, out of what convicts others, and out of nothing."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from typing import cast

from nexus.core.encoding import Value, decode, encode
from nexus.core.errors import MalformedError, NotFoundError, VerificationError
from nexus.core.hashing import leaf_hash
from nexus.core.keys import Identity
from nexus.proof import accuse as accusing
from nexus.proof.accounts import PAY, Entry, Fork, Share, SignedEntry
from nexus.proof.accuse import LOG, OUTPUT, Difference, accuse, prove_difference, show_answer
from nexus.proof.audit import AuditAnswer, Cell, SignedAuditAnswer
from nexus.proof.evidence import FORK, KINDS, KV, OP, Evidence, verify_evidence
from nexus.proof.evidence.operation import Proof
from nexus.proof.evidence.statements import BrokenChain, Equivocation
from nexus.proof.receipts import Receipt, SignedReceipt
from nexus.proof.trace import LOGITS, OPS
from scripts.benchmarks.pure_session import PureSession
from tests.proof.pure import PLANS, one_bit, session

REFUSALS = (MalformedError, VerificationError, NotFoundError)
# Their keys are the liars' own: what they sign with them may convict them.
STRANGER = Identity(bytes([77]) * 32)
CHEATER = 1

# ---- what there is to make lies of -----------------------------------------------------------------------------------------------


def claims(one: PureSession, stage: int) -> Iterator[Evidence]:
    """A proof of every kind of claim, about a stage that did everything right."""
    accused, values, shape = one.accused(stage), one.values[stage], one.values[stage].shape
    for window, (step0, n) in enumerate(one.windows()):
        step = step0 + n - 1
        places = [Difference(window, step, 0, op) for op in OPS]
        places += [Difference(window, step, shape.layers, LOGITS)] if shape.logits else []
        places += [Difference(window, step0, 0, LOG, head) for head in range(shape.kv_heads)]
        places += [Difference(window, step0, 0, OUTPUT)] if not shape.logits else []
        for place in places:
            try:
                yield prove_difference(accused, values, place).evidence()
            except StopIteration:  # what left the stage is known, and there is no step that differs
                continue


def statements(one: PureSession, other: PureSession) -> Iterator[Evidence]:
    """Every two receipts of two sessions put together as if they contradicted each other."""
    signed = [each for run in (one, other) for receipts in run.receipts.values() for each in receipts]
    for first, second in product(signed, signed):
        yield Equivocation.of(first, second).evidence()
        yield BrokenChain(first, (second.receipt,), (), (), ()).evidence()


def answers(one: PureSession, stage: int) -> Iterator[Evidence]:
    identity, accused = one.identity(stage), one.accused(stage)
    for step in (0, 2):
        opened = one.opening(stage, Cell(step, 0, 0, 1))
        last = one.receipts[stage][-1].receipt.id
        said = AuditAnswer(1, bytes(32), one.terms.session, last, identity.public_key, stage, (opened.id,))
        for part in (*OPS, "x", LOG, OUTPUT):
            body = show_answer(accused, SignedAuditAnswer.sign(said, identity), opened, part)
            yield body.evidence()
            yield replace(body, is_sum=1, element=2).evidence()


def openings(one: PureSession, stage: int) -> Iterator[Evidence]:
    """Small proofs out of what the stage itself opened; the sampler's choices and an encoder's vectors among them."""
    accused, shape = one.accused(stage), one.values[stage].shape
    last = len(one.inputs[stage]) - 1
    for step, layer in product((0, last), range(shape.layers + (stage == max(one.values)))):
        result = layer == shape.layers
        opened = one.opening(stage, Cell(step, 0, layer, 0 if result else 1))
        ops = ([LOGITS, OUTPUT] if shape.logits else [OUTPUT]) if result else [*OPS, *([LOG] if shape.kv_heads else [])]
        for op in ops:
            proof = accusing._Opened(accused, opened, op).proof()
            yield proof.evidence()
            claim = proof.claim
            if op in OPS and op != "attention":
                yield replace(proof, claim=replace(claim, element=3, elements=1)).evidence()


def chains(one: PureSession) -> Iterator[Evidence]:
    """What the first stage read, and from whom."""
    first, last = one.receipts[0], one.receipts[max(one.receipts)]
    leaves = [leaf_hash(payload) for payload in one.inputs[0]]
    yield BrokenChain(first[0], (), (one.terms,), tuple(leaves[: first[0].receipt.n]), ()).evidence()
    if not one.model.plan.causal:
        return
    outputs = [leaf_hash(payload) for payload in one.outputs[max(one.outputs)]]
    for number, (prev, signed) in enumerate(pairwise(each.receipt for each in first)):
        inputs = leaves[prev.step0 : signed.step0 + signed.n]
        given = outputs[prev.step0 : prev.step0 + prev.n]
        yield BrokenChain(first[number + 1], (last[number].receipt, prev), (), tuple(inputs), tuple(given)).evidence()


def entries(owner: Identity, session_: int = 0) -> list[SignedEntry]:
    """Two of an account, one after the other."""
    first = Entry(1, owner.public_key, 0, b"", PAY, bytes([session_]) * 32, 1000, (Share(bytes([7]) * 32, 900),), b"")
    second = replace(first, seq=1, prev=first.id, session=bytes([session_ + 1]) * 32)
    return [SignedEntry.sign(each, owner) for each in (first, second)]


def fork(one: SignedEntry, other: SignedEntry) -> Evidence:
    return Evidence(1, FORK, one.entry.account, Fork.of(one, other).to_bytes())


@cache
def honest_material() -> tuple[Evidence, ...]:
    found: list[Evidence] = []
    for name in PLANS:
        one, other = session(name, penalty=1.3), session(name, nonce=1)
        for stage in one.values:
            found += [*claims(one, stage), *answers(one, stage), *openings(one, stage)]
        found += [*statements(one, other), *chains(one), *chains(other)]
    first, second = entries(Identity(bytes([1]) * 32))
    return (*found, fork(first, first), fork(first, second), fork(second, second))


def _cheater() -> Identity:
    return Identity(bytes([CHEATER + 1]) * 32)


@cache
def cheater_proofs() -> tuple[Evidence, ...]:
    """Of wrong operations, which convict stage 1."""
    found = []
    for name in PLANS:
        for op in (*OPS, LOGITS) if PLANS[name].causal else OPS:
            one = session(name, nonce=2)
            one.cheat(CHEATER, (1, 1 if op == LOGITS else 0, op, one_bit))
            evidence = accuse(one.accused(CHEATER), one.values[CHEATER], one.model)
            assert evidence is not None
            assert verify_evidence(evidence).accused == _cheater().public_key
            found.append(evidence)
    return tuple(found)


@cache
def cheater_material() -> tuple[Evidence, ...]:
    """Evidence of every kind that convicts stage 1, whose parts are put into lies about stage 0."""
    found = [fork(entries(_cheater())[0], entries(_cheater(), 5)[0])]
    for name in PLANS:
        one = session(name, nonce=3)
        part, parent = one.accused(CHEATER), one.receipts[0][1].receipt
        signed = part.receipts[1]
        found.append(Equivocation.of(signed, _instead(signed, out_root=bytes(32))).evidence())
        found.append(BrokenChain(_instead(signed, in_root=bytes(32)), (parent,), (), (), ()).evidence())
        opened = one.opening(CHEATER, Cell(2, 0, 0, 1))
        lie = replace(opened, values=tuple(replace(row, data=row.data[::-1]) for row in opened.values))
        last = part.receipts[-1].receipt.id
        said = AuditAnswer(1, bytes(32), one.terms.session, last, _cheater().public_key, CHEATER, (lie.id,))
        found.append(show_answer(part, SignedAuditAnswer.sign(said, _cheater()), lie, "down").evidence())
    for evidence in found:
        assert verify_evidence(evidence).accused == _cheater().public_key
    return (*cheater_proofs(), *found)


def _instead(signed: SignedReceipt, **changes: bytes) -> SignedReceipt:
    return SignedReceipt.sign(replace(signed.receipt, **changes), _cheater())  # type: ignore[arg-type]


# ---- lies ------------------------------------------------------------------------------------------------------------------------

Lie = Callable[[random.Random, Evidence, Evidence], bytes]


def mutated(chance: random.Random, value: Value, other: Value) -> Value:
    """`value` with one thing in it changed; `other` is of the same form, or was."""
    if isinstance(value, tuple):
        if not value or chance.random() < 0.08:
            kind = chance.randrange(4)
            if kind == 0 and value:
                at = chance.randrange(len(value))
                return (*value[:at], *value[at + 1 :])
            if kind == 1 and value:
                return (*value, chance.choice(value))
            if kind == 2 and len(value) > 1:
                one, two = chance.sample(range(len(value)), 2)
                swapped = list(value)
                swapped[one], swapped[two] = swapped[two], swapped[one]
                return tuple(swapped)
            return other
        at = chance.randrange(len(value))
        theirs = other[at] if isinstance(other, tuple) and at < len(other) else value[at]
        return (*value[:at], mutated(chance, value[at], theirs), *value[at + 1 :])
    if chance.random() < 0.3:
        return other
    if isinstance(value, int):
        return max(0, value + chance.choice([-2, -1, 1, 2, 3, 100, 2**31]))
    if isinstance(value, str):
        return chance.choice([*OPS, LOGITS, LOG, OUTPUT, "sample", "append", "exact", "float", "x", ""])
    if not value:
        return chance.choice([b"", bytes(32)])
    at = chance.randrange(len(value))
    return chance.choice(
        [value[:at] + bytes([value[at] ^ (1 << chance.randrange(8))]) + value[at + 1 :], value[:at], value[at:], value + value]
    )


def changed(chance: random.Random, evidence: Evidence, other: Evidence) -> bytes:
    """Some parts left out, repeated, exchanged, moved by one, or with other bytes."""
    body, theirs = decode(evidence.body), decode(other.body)
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        body = mutated(chance, body, theirs)
    kind = evidence.kind if chance.random() < 0.95 else chance.choice(KINDS)
    return Evidence(1, kind, evidence.accused, encode(body)).to_file()


def flipped(chance: random.Random, evidence: Evidence, other: Evidence) -> bytes:
    content = bytearray(evidence.to_file())
    for _ in range(chance.choice([1, 1, 2, 8])):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return bytes(content)


def truncated(chance: random.Random, evidence: Evidence, other: Evidence) -> bytes:
    content = evidence.to_file()
    return content[: chance.randrange(len(content))] + chance.choice([b"", b"", bytes(chance.randrange(64))])


# A tag, a value to be referred to, a reference (the stuff of cycles), a map, arrays and strings without an end, a float, null, a
# number that is too long, and lengths that nobody has.
_HEADS = """
    d9d9f7 d81c d81d00 bf 9f 5f 7f fb7ff0000000000000 f6 f5 1800 190001 5bffffffffffffffff 9bffffffffffffffff 7a7fffffff 5a7fffffff
    9a7fffffff 9affffffff 8181818181818181818181818181818180 1bffffffffffffffff 20 3bffffffffffffffff
"""
HEADS = tuple(map(bytes.fromhex, _HEADS.split()))


def otherwise_encoded(chance: random.Random, evidence: Evidence, other: Evidence) -> bytes:
    """What is no CBOR of ours, in place of something or before it."""
    content, head = evidence.to_file(), chance.choice(HEADS)
    # The heads of a proof's parts are near the start; somewhere in the middle there is data, for the most part.
    at = chance.randrange(chance.choice([20, 60, 400, len(content)]) % len(content) or 1)
    return content[:at] + head * chance.choice([1, 1, 3]) + content[at + chance.choice([0, 1, len(head)]) :]


def repeated(chance: random.Random, evidence: Evidence, other: Evidence) -> bytes:
    """A list of parts with some of it twice, or a great many times."""
    body = decode(evidence.body)
    assert isinstance(body, tuple)
    lists = [at for at, value in enumerate(body) if isinstance(value, tuple) and value]
    if not lists:
        return evidence.to_file() * 2
    at = chance.choice(lists)
    value = cast("tuple[Value, ...]", body[at])
    more = chance.choice([value * 2, (*value, chance.choice(value)), value[::-1], (chance.choice(value),) * 3000])
    return Evidence(1, evidence.kind, evidence.accused, encode((*body[:at], more, *body[at + 1 :]))).to_file()


def spliced(chance: random.Random, evidence: Evidence, other: Evidence) -> bytes:
    """Halves of two."""
    if chance.random() < 0.2:
        one, two = evidence.to_file(), other.to_file()
        return one[: chance.randrange(len(one))] + two[chance.randrange(len(two)) :]
    body, theirs = decode(evidence.body), decode(other.body)
    assert isinstance(body, tuple)
    assert isinstance(theirs, tuple)
    mixed = tuple(chance.choice(pair) for pair in zip(body, theirs, strict=False)) + body[len(theirs) :]
    return Evidence(1, evidence.kind, chance.choice([evidence, other]).accused, encode(mixed)).to_file()


def replayed(chance: random.Random, evidence: Evidence, other: Evidence) -> bytes:
    """True or not, but about another node, session, model, plan or receipt."""
    if evidence.kind not in (OP, KV) or chance.random() < 0.2:
        return replace(evidence, accused=other.accused).to_file()
    proof = Proof.from_bytes(evidence.body)
    if other.kind in (OP, KV):
        theirs = Proof.from_bytes(other.body)
        field = chance.choice(["model", "plan", "terms", "receipt", "case"])
        case = theirs.case if field == "case" else replace(proof.case, **{field: getattr(theirs.case, field)})
        proof = replace(proof, case=case)
    else:
        case = replace(proof.case, terms=replace(proof.case.terms, nonce=bytes(16)))
        proof = replace(proof, case=case)
    return replace(proof.evidence(), accused=evidence.accused).to_file()


_LISTS = ("previous", "cells", "rows", "inputs", "outputs", "records", "logs", "weights")


def fabricated(chance: random.Random, evidence: Evidence, other: Evidence) -> bytes:
    """One thing said otherwise, which an honest stage did not say: where the fault is, and what is shown for it."""
    if evidence.kind not in (OP, KV):
        return changed(chance, evidence, other)
    proof = Proof.from_bytes(evidence.body)
    case, claim = proof.case, proof.claim
    receipt = case.receipt.receipt
    near = {
        "op": chance.choice([*OPS, LOGITS, LOG, OUTPUT, "sample", "append"]),
        "step": chance.choice([0, receipt.step0, receipt.step0 + receipt.n - 1, receipt.step0 + receipt.n, claim.step + 1]),
        "layer": chance.randrange(4),
        "row": chance.randrange(9),
        "rows": chance.choice([0, 1, 2, 7]),
        "element": chance.choice([0, 1, 8, 12, 31]),
        "elements": chance.choice([0, 1, 8, 12, 2**20]),
    }
    lists = [name for name in _LISTS if getattr(proof, name)]
    match chance.randrange(6):
        case 0 | 1:
            names = chance.sample(sorted(near), chance.choice([1, 1, 2]))
            proof = replace(proof, claim=replace(claim, **{name: near[name] for name in names}))
        case 2 if lists:
            name = chance.choice(lists)
            parts: Sequence[object] = getattr(proof, name)
            left_out = chance.randrange(len(parts))
            proof = replace(proof, **{name: (*parts[:left_out], *parts[left_out + 1 :])})
        case 3 if proof.rows:
            at = chance.randrange(len(proof.rows))
            other_place = {"row": near["row"], "step": near["step"], "layer": near["layer"], "op": chance.choice(OPS)}
            name = chance.choice(sorted(other_place))
            moved = replace(proof.rows[at], **{name: other_place[name]})
            proof = replace(proof, rows=(*proof.rows[:at], moved, *proof.rows[at + 1 :]))
        case 4 if proof.records:
            at = chance.randrange(len(proof.records))
            one = proof.records[at]
            moved_log = chance.choice(
                [replace(one, before=1 - one.before), replace(one, position=one.position + 1), replace(one, head=one.head + 1)]
            )
            proof = replace(proof, records=(*proof.records[:at], moved_log, *proof.records[at + 1 :]))
        case _:
            layers = [
                replace(stage, start=max(0, stage.start + chance.choice([-1, 0, 1])), end=stage.end + chance.choice([-1, 0, 1]))
                for stage in case.plan.stages
            ]
            told = replace(case.plan, stages=tuple(layers))
            proof = replace(proof, case=replace(case, plan=told, terms=replace(case.terms, plan_root=told.root)))
    return Evidence(1, chance.choice([proof.kind, evidence.kind]), evidence.accused, proof.to_bytes()).to_file()


def signed_by_others(chance: random.Random, evidence: Evidence, other: Evidence) -> bytes:
    """What is signed says something else, and somebody else signed it: a stranger, or the cheater."""
    liar = chance.choice([STRANGER, _cheater()])
    own_name = chance.random() < 0.3
    body = _signed_again(chance, decode(evidence.body), liar, own_name)
    return Evidence(1, evidence.kind, evidence.accused, encode(body)).to_file()


def _signed_again(chance: random.Random, value: Value, liar: Identity, own_name: bool) -> Value:
    if not isinstance(value, tuple):
        return value
    if len(value) == 2 and isinstance(value[0], tuple) and isinstance(value[1], bytes) and len(value[1]) == 64:
        for kind, key in ((Receipt, "node"), (AuditAnswer, "node"), (Entry, "account")):
            try:
                statement = kind.from_value(value[0])
            except MalformedError:
                continue
            said = mutated(chance, statement.to_value(), statement.to_value())
            with suppress(MalformedError):
                statement = kind.from_value(said)
            if own_name:
                statement = replace(statement, **{key: liar.public_key})
            return (statement.to_value(), liar.sign_digest(statement.id))
    return tuple(_signed_again(chance, each, liar, own_name) for each in value)


LIES: tuple[Lie, ...] = (
    changed,
    flipped,
    truncated,
    otherwise_encoded,
    repeated,
    spliced,
    replayed,
    fabricated,
    signed_by_others,
)
