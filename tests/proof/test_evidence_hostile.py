"""Evidence from liars, case by case: its form, its work, which is bounded before it is done, and receipts put against each other.
Lies drawn at random are in tests/honest."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nexus.core.errors import LocalError, MalformedError, NexusError, NotFoundError, VerificationError
from nexus.core.hashing import leaf_hash, merkle_root
from nexus.core.keys import Identity
from nexus.proof.accounts import PAY, Entry, Fork, Share, SignedEntry
from nexus.proof.accuse import OUTPUT, Difference, prove_difference
from nexus.proof.arithmetic import ops
from nexus.proof.arithmetic.rows import WeightProof
from nexus.proof.evidence import (
    EVIDENCE_BYTES_MAX,
    FORK,
    KINDS,
    Evidence,
    exhibits,
    operation,
    verify_evidence,
)
from nexus.proof.evidence.operation import Claim, Proof
from nexus.proof.evidence.record import MAGIC
from nexus.proof.evidence.statements import BrokenChain, Equivocation
from nexus.proof.receipts import SignedReceipt, tokens_to_bytes
from nexus.proof.trace import ATTENTION, LOGITS, QKV
from scripts.benchmarks.pure_session import PureSession
from tests.honest.lies import REFUSALS, cheater_proofs
from tests.proof.pure import PROMPT, model, session


def refused(evidence: Evidence, session_: PureSession | None = None) -> NexusError:
    with pytest.raises(REFUSALS) as caught:
        verify_evidence(evidence, session_ and session_.model)
    return caught.value


# --- form -----------------------------------------------------------------------------------------------------------------------


def test_a_file_is_evidence_in_one_form_only() -> None:
    content = cheater_proofs()[0].to_file()
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
    assert "unknown kind" in refused(replace(cheater_proofs()[0], kind="WITCHCRAFT")).cause


def test_another_node_is_not_convicted_by_it() -> None:
    one = cheater_proofs()[0]
    assert "another node" in refused(replace(one, accused=Identity(bytes([1]) * 32).public_key)).cause


def test_evidence_about_oneself_is_evidence() -> None:
    """Who verifies does not matter: it takes no identity, and gives the same verdict everywhere."""
    one = cheater_proofs()[0]
    assert verify_evidence(one) == verify_evidence(Evidence.from_file(one.to_file()))


def test_evidence_of_another_model_is_refused() -> None:
    """The same session, and another model put in its place."""
    one, other = Proof.from_bytes(cheater_proofs()[0].body), Proof.from_bytes(cheater_proofs()[-1].body)
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


def test_a_prompt_s_rows_are_counted_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """One number of each row is claimed, and all of the row's embedding has to be computed for it."""
    one = session("plain")
    proof = prove_difference(one.accused(0), one.values[0], Difference(0, 0, 0, QKV))
    narrow = replace(proof, claim=replace(proof.claim, row=0, rows=len(PROMPT), element=0, elements=1))
    monkeypatch.setattr(operation, "NUMBERS_MAX", 2 * len(PROMPT))
    monkeypatch.setattr(ops, "embed", lambda *_: pytest.fail("made them before it counted"))
    assert "more than one proof may be about" in refused(narrow.evidence(), one).cause


def test_an_answer_with_a_token_that_there_is_not_is_no_error_of_the_verifier_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accused may sign for anything: no penalty can be worked out for a token that has no logit."""
    one = session("plain", penalty=1.3)
    one.outputs[1][2] = tokens_to_bytes([1]) if one.outputs[1][2] == bytes(4) else bytes(4)
    one.sign()
    proof = prove_difference(one.accused(1), one.values[1], Difference(0, 2, 0, OUTPUT))
    assert verify_evidence(proof.evidence(), one.model).step == 2
    monkeypatch.setattr(exhibits, "verify_merkle_range", lambda *_: None)
    unknown = tokens_to_bytes([1 << 20])
    outputs = tuple(payload if payload.step else replace(payload, data=unknown) for payload in proof.outputs)
    assert "none that the model knows" in refused(replace(proof, outputs=outputs).evidence(), one).cause


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
