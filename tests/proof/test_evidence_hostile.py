"""Evidence from liars: whatever is brought, an honest node is never convicted, nothing but the three errors comes out, and work is
bounded before it is done."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import product

import pytest

from nexus.core.encoding import Value, decode, encode
from nexus.core.errors import LocalError, MalformedError, NexusError, NotFoundError, VerificationError
from nexus.core.hashing import leaf_hash, merkle_root
from nexus.core.keys import Identity
from nexus.proof.accounts import PAY, Entry, Fork, Share, SignedEntry
from nexus.proof.accuse import LOG, OUTPUT, Difference, accuse, prove_difference, show_answer
from nexus.proof.arithmetic import ops
from nexus.proof.arithmetic.rows import WeightProof
from nexus.proof.audit import AuditAnswer, Cell, SignedAuditAnswer
from nexus.proof.evidence import (
    EVIDENCE_BYTES_MAX,
    FORK,
    KINDS,
    OP,
    Evidence,
    exhibits,
    operation,
    verify_evidence,
)
from nexus.proof.evidence.operation import Claim, Proof
from nexus.proof.evidence.record import MAGIC
from nexus.proof.evidence.statements import BrokenChain, Equivocation
from nexus.proof.receipts import SignedReceipt
from nexus.proof.trace import ATTENTION, LOGITS, OPS, QKV
from scripts.benchmarks.pure_session import PureSession
from tests.proof.pure import PLANS, PROMPT, model, one_bit, session

ROUNDS = 10_000
REFUSALS = (MalformedError, VerificationError, NotFoundError)


def refused(evidence: Evidence, session_: PureSession | None = None) -> NexusError:
    with pytest.raises(REFUSALS) as caught:
        verify_evidence(evidence, session_ and session_.model)
    return caught.value


# --- ten thousand lies -------------------------------------------------------------------------------------------------------


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


def fork(owner: Identity) -> Evidence:
    entry = Entry(1, owner.public_key, 0, b"", PAY, bytes(32), 1000, (Share(bytes([7]) * 32, 900),), b"")
    signed = SignedEntry.sign(entry, owner)
    return Evidence(1, FORK, owner.public_key, Fork(signed, signed).to_bytes())


@cache
def honest_material() -> tuple[Evidence, ...]:
    found: list[Evidence] = []
    for name in PLANS:
        one, other = session(name), session(name, nonce=1)
        for stage in one.values:
            found += claims(one, stage)
            found += answers(one, stage)
        found += statements(one, other)
    return (*found, fork(Identity(bytes([1]) * 32)))


CHEATER = 1


@cache
def cheater_material() -> tuple[Evidence, ...]:
    """Evidence that convicts stage 1, whose parts are put into lies about stage 0."""
    found = []
    for name in PLANS:
        for op in (*OPS, LOGITS) if PLANS[name].causal else OPS:
            one = session(name, nonce=2)
            one.cheat(CHEATER, (1, 1 if op == LOGITS else 0, op, one_bit))
            evidence = accuse(one.accused(CHEATER), one.values[CHEATER], one.model)
            assert evidence is not None
            assert verify_evidence(evidence).accused == one.identity(CHEATER).public_key
            found.append(evidence)
    return tuple(found)


def test_what_an_honest_node_signed_convicts_it_in_no_combination() -> None:
    weights = {model(name).manifest.root: model(name) for name in PLANS}

    class All:
        def range(self, model_root: bytes, piece: int, start: int, count: int):  # type: ignore[no-untyped-def]
            return weights[model_root].range(model_root, piece, start, count)

    for evidence in honest_material():
        with pytest.raises(REFUSALS):
            verify_evidence(evidence, All())


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


def lie(chance: random.Random, evidence: Evidence, other: Evidence) -> bytes:
    """A file: changed in its form, in one of its parts, or in its bytes."""
    if chance.random() < 0.12:
        content = evidence.to_file()
        at = chance.randrange(len(content))
        return chance.choice([content[:at], content[:at] + bytes([content[at] ^ (1 << chance.randrange(8))]) + content[at + 1 :]])
    body, theirs = decode(evidence.body), decode(other.body)
    for _ in range(chance.choice([1, 1, 1, 2, 4])):
        body = mutated(chance, body, theirs)
    kind = evidence.kind if chance.random() < 0.95 else chance.choice(KINDS)
    accused = evidence.accused if chance.random() < 0.9 else other.accused
    return Evidence(1, kind, accused, encode(body)).to_file()


def test_ten_thousand_lies_convict_no_honest_node() -> None:
    chance = random.Random(20)
    honest, cheated = honest_material(), cheater_material()
    by_form: dict[str, list[Evidence]] = {}
    for evidence in (*honest, *cheated):
        by_form.setdefault(evidence.kind, []).append(evidence)
    guilty = {evidence.accused for evidence in cheated}
    weights = {model(name).manifest.root: model(name) for name in PLANS}
    cheated_sessions = {verify_evidence(evidence).session for evidence in cheated}
    refusals: dict[type[NexusError], int] = {}
    convicted = 0

    class All:
        def range(self, model_root: bytes, piece: int, start: int, count: int):  # type: ignore[no-untyped-def]
            if model_root not in weights:
                raise NotFoundError("no such model")
            return weights[model_root].range(model_root, piece, start, count)

    forms = sorted(by_form)
    for _ in range(ROUNDS):
        kind = chance.choice(forms if chance.random() < 0.3 else [OP])
        evidence, other = chance.choice(by_form[kind]), chance.choice(by_form[kind])
        content = lie(chance, evidence, other)
        try:
            verdict = verify_evidence(Evidence.from_file(content), All())
        except REFUSALS as error:
            refusals[type(error)] = refusals.get(type(error), 0) + 1
            continue
        # Of the cheaters' own proofs some stay true when what does not matter is changed. Nobody else is convicted.
        convicted += 1
        assert verdict.accused in guilty
        assert verdict.session in cheated_sessions
    assert refusals[VerificationError] > ROUNDS / 4
    assert refusals[MalformedError] > ROUNDS / 20
    assert convicted < ROUNDS / 10


# --- form -----------------------------------------------------------------------------------------------------------------------


def test_a_file_is_evidence_in_one_form_only() -> None:
    content = cheater_material()[0].to_file()
    assert Evidence.from_file(content).to_file() == content
    body = content.removeprefix(MAGIC)
    for wrong in (
        b"",
        MAGIC,
        body,
        content[:-1],
        content + b"\0",
        MAGIC + b"\xd9\xd9\xf7" + body,  # a tag
        MAGIC + b"\xd8\x1c" + body,  # a value that others may refer to
        MAGIC + b"\xd8\x1d\x00",  # such a reference, the stuff of cycles
        MAGIC + b"\xbf\xff",  # a map
        MAGIC + b"\x84\x01\x62OP\x58\x20" + bytes(32) + b"\x9f\xff",  # of indefinite length
        MAGIC + b"\x84\x18\x01\x62OP\x58\x20" + bytes(32) + b"\x40",  # a number not in its shortest form
        MAGIC + b"\x84\x02\x62OP\x58\x20" + bytes(32) + b"\x40",  # another version
    ):
        with pytest.raises(MalformedError):
            Evidence.from_file(wrong)
    with pytest.raises(MalformedError, match="more than evidence may have"):
        Evidence.from_file(MAGIC + bytes(EVIDENCE_BYTES_MAX))


@pytest.mark.parametrize("kind", KINDS)
def test_a_body_that_is_none_is_refused(kind: str) -> None:
    for body in (
        b"",
        b"\x80",
        b"\x01",
        b"\xff" * 100,
        b"\x8b" + b"\x80" * 11,
        b"\x9b\xff\xff\xff\xff\xff\xff\xff\xff",
        bytes(1000),
    ):
        assert isinstance(refused(Evidence(1, kind, bytes(32), body)), MalformedError)
    nested = b"\x81" * 100_000 + b"\x80"
    assert isinstance(refused(Evidence(1, kind, bytes(32), nested)), MalformedError)


def test_an_unknown_kind_convicts_nobody() -> None:
    assert "unknown kind" in refused(replace(cheater_material()[0], kind="WITCHCRAFT")).cause


def test_another_node_is_not_convicted_by_it() -> None:
    one = cheater_material()[0]
    assert "another node" in refused(replace(one, accused=Identity(bytes([1]) * 32).public_key)).cause


def test_evidence_about_oneself_is_evidence() -> None:
    """Who verifies does not matter: it takes no identity, and gives the same verdict everywhere."""
    one = cheater_material()[0]
    assert verify_evidence(one) == verify_evidence(Evidence.from_file(one.to_file()))


def test_evidence_of_another_model_is_refused() -> None:
    """The same session, and another model put in its place."""
    one, other = Proof.from_bytes(cheater_material()[0].body), Proof.from_bytes(cheater_material()[-1].body)
    case = replace(one.case, model=other.case.model)
    assert "model" in refused(replace(one, case=case).evidence()).cause


def test_damaged_weights_of_the_verifier_s_own_convict_nobody() -> None:
    one = session("plain")
    proof = prove_difference(one.accused(1), one.values[1], Difference(0, 2, 0, QKV))

    class Damaged:
        def range(self, model_root: bytes, piece: int, start: int, count: int) -> WeightProof:
            found = one.model.range(model_root, piece, start, count)
            return replace(found, data=bytes([found.data[0] ^ 1]) + found.data[1:])

    class Broken:
        def range(self, model_root: bytes, piece: int, start: int, count: int) -> WeightProof:
            raise LocalError("the disk is broken")

    for source in (Damaged(), Broken()):
        with pytest.raises(NotFoundError, match="this node's own weights"):
            verify_evidence(proof.evidence(), source)


# --- work -------------------------------------------------------------------------------------------------------------------------


def test_openings_are_counted_before_they_are_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    one = session("plain")
    proof = prove_difference(one.accused(1), one.values[1], Difference(0, 2, 0, ATTENTION))
    with monkeypatch.context() as patched:
        patched.setattr(exhibits, "LEAVES_MAX", len(PROMPT))
        patched.setattr(exhibits, "merkle_range_root", lambda *_: pytest.fail("hashed before it counted"))
        patched.setattr(exhibits.Exhibits, "add_cell", lambda *_: None)
        patched.setattr(exhibits.Exhibits, "root", lambda *_: bytes(32))
        assert "at most" in refused(replace(proof, rows=(replace(proof.rows[0], data=proof.rows[0].data * 2),)).evidence()).cause
    weight = model("plain").range(model("plain").manifest.root, 1, 0, 1)
    huge = replace(weight, count=2**32 - 1)
    assert "weight rows" in refused(replace(proof, weights=(huge, huge)).evidence()).cause


def test_work_is_counted_before_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    one = session("plain")
    proof = prove_difference(one.accused(1), one.values[1], Difference(0, 2, 0, QKV))
    monkeypatch.setattr(operation, "WORK_MAX", 1000)
    monkeypatch.setattr(ops, "linear", lambda *_: pytest.fail("worked before it counted"))
    assert "multiplications" in refused(proof.evidence(), one).cause


def test_a_claim_outside_of_what_was_signed_for_is_refused() -> None:
    one = session("windows")
    proof = prove_difference(one.accused(1), one.values[1], Difference(1, 4, 0, QKV))
    right = proof.claim
    for wrong in (
        replace(right, step=2),
        replace(right, step=6),
        replace(right, layer=0),
        replace(right, layer=2),
        replace(right, op="nothing"),
        replace(right, op=LOGITS),
        replace(right, row=1, rows=1),
        replace(right, rows=2),
        replace(right, element=1),
        replace(right, rows=1, element=10**6, elements=1),
        replace(right, op="sample"),
        replace(right, op=OUTPUT),
    ):
        refused(replace(proof, claim=wrong).evidence(), one)
    assert isinstance(right, Claim)


# --- statements -------------------------------------------------------------------------------------------------------------------


def signed(one: PureSession, number: int, window: int, **changes: object) -> SignedReceipt:
    return SignedReceipt.sign(replace(one.receipts[number][window].receipt, **changes), one.identity(number))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["out_root", "kv_root", "trace_root", "kv_len"])
def test_two_answers_to_one_question_convict(name: str) -> None:
    one = session("plain")
    receipt = one.receipts[0][1]
    other = signed(one, 0, 1, **{name: 99 if name == "kv_len" else bytes(32)})
    evidence = Equivocation.of(receipt, other).evidence()
    verdict = verify_evidence(Evidence.from_file(evidence.to_file()))
    assert (verdict.accused, verdict.kind) == (one.identity(0).public_key, "EQUIVOCATION")
    assert evidence == Equivocation.of(other, receipt).evidence()
    turned = Equivocation(*sorted((receipt, other), key=lambda each: each.receipt.id, reverse=True))
    assert isinstance(refused(turned.evidence()), MalformedError)


@pytest.mark.parametrize("name", ["session", "model_root", "request", "parent", "prev", "in_root", "step0", "n", "stage"])
def test_an_answer_to_another_question_is_no_second_one(name: str) -> None:
    one = session("plain")
    changed: object = 1 if name in ("step0", "n", "stage") else bytes(32)
    other = signed(one, 0, 1, **{name: changed, "out_root": bytes(32)})
    assert isinstance(refused(Equivocation.of(one.receipts[0][1], other).evidence()), VerificationError)


def test_an_honest_retry_is_no_second_answer() -> None:
    """It gives the same bits, and so the same receipt."""
    one, again = session("plain"), session("plain")
    assert one.receipts[0][1] == again.receipts[0][1]
    refused(Equivocation.of(one.receipts[0][1], again.receipts[0][1]).evidence())


def test_the_float_profile_convicts_nobody() -> None:
    one = session("plain")
    first, second = signed(one, 0, 1, profile="float"), signed(one, 0, 1, profile="float", out_root=bytes(32))
    assert "float" in refused(Equivocation.of(first, second).evidence()).cause
    assert "float" in refused(BrokenChain(first, (one.receipts[0][0].receipt,), (), (), ()).evidence()).cause


def test_a_signature_by_another_key_convicts_nobody() -> None:
    one = session("plain")
    forged = replace(signed(one, 0, 1, out_root=bytes(32)), signature=one.receipts[0][1].signature)
    assert "not signed" in refused(Equivocation.of(one.receipts[0][1], forged).evidence()).cause


@pytest.mark.parametrize(
    ("stage", "named", "changes"),
    [
        (1, "parent", {"in_root": bytes(32)}),
        (1, "parent", {"n": 2}),
        (1, "parent", {"kv_len": 50}),
        (0, "prev", {"kv_len": 50}),
        (0, "prev", {"step0": 4}),
        (1, "prev", {"request": bytes(32)}),
        (0, "parent", {"kv_len": 50}),
    ],
)
def test_a_receipt_that_does_not_go_with_what_it_names_convicts(stage: int, named: str, changes: dict[str, object]) -> None:
    one = session("plain")
    before = (
        one.receipts[1][0]
        if (stage, named) == (0, "parent")
        else one.receipts[0][1]
        if named == "parent"
        else one.receipts[stage][0]
    )
    broken = signed(one, stage, 1, **changes)
    verdict = verify_evidence(BrokenChain(broken, (before.receipt,), (), (), ()).evidence())
    assert (verdict.accused, verdict.kind, verdict.stage) == (one.identity(stage).public_key, "CHAIN", stage)
    honest = BrokenChain(one.receipts[stage][1], (before.receipt,), (), (), ())
    assert "goes with all" in refused(honest.evidence()).cause


def test_a_first_stage_that_reads_other_tokens_than_came_back_convicts() -> None:
    one = session("plain")
    receipt, prev, parent = one.receipts[0][1], one.receipts[0][0].receipt, one.receipts[1][0].receipt
    inputs = tuple(leaf_hash(payload) for payload in one.inputs[0][:6])
    outputs = tuple(leaf_hash(payload) for payload in one.outputs[1][:3])
    honest = BrokenChain(receipt, (parent, prev), (), inputs, outputs)
    assert "goes with all" in refused(honest.evidence()).cause
    others = (*inputs[:3], leaf_hash(b"\1\0\0\0"), *inputs[4:])
    lied = signed(one, 0, 1, in_root=merkle_root(others[3:]))
    verdict = verify_evidence(BrokenChain(lied, (parent, prev), (), others, outputs).evidence())
    assert "other tokens" in verdict.summary
    for wrong in (inputs[:-1], (), inputs[::-1]):
        refused(BrokenChain(receipt, (parent, prev), (), wrong, outputs).evidence())


def test_another_prompt_than_the_session_s_convicts() -> None:
    one = session("plain")
    inputs = tuple(leaf_hash(payload) for payload in one.inputs[0][:3])
    assert "goes with all" in refused(BrokenChain(one.receipts[0][0], (), (one.terms,), inputs, ()).evidence()).cause
    others = (leaf_hash(b"\1\0\0\0"), *inputs[1:])
    lied = signed(one, 0, 0, in_root=merkle_root(others))
    assert "prompt" in verify_evidence(BrokenChain(lied, (), (one.terms,), others, ()).evidence()).summary
    another = session("plain", nonce=1)
    refused(BrokenChain(lied, (), (another.terms,), others, ()).evidence())


def test_two_entries_of_one_number_convict_their_owner() -> None:
    owner = Identity(bytes([5]) * 32)
    entry = Entry(1, owner.public_key, 0, b"", PAY, bytes(32), 1000, (Share(bytes([7]) * 32, 900),), b"")
    other = replace(entry, session=bytes([1]) * 32)
    body = Fork.of(SignedEntry.sign(entry, owner), SignedEntry.sign(other, owner))
    verdict = verify_evidence(Evidence(1, FORK, owner.public_key, body.to_bytes()))
    assert (verdict.accused, verdict.kind, verdict.session) == (owner.public_key, FORK, b"")
