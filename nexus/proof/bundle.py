"""The proof bundle of one session, and the check of it that needs no network, no model and no trust in whoever wrote it.

What a bundle shows: every stage of the plan signed for every step; each stage's input was the output of the stage before; the
first input was this prompt and the last outputs are these results; all under one request and one set of terms. What it does not
show is that the arithmetic in between was done right: that is what audits are for. In the exact profile every receipt commits to
that arithmetic (`nexus.proof.trace`); the hashes behind the commitments are the coordinator's to keep and are not in the bundle.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

from nexus.core.errors import MalformedError, NexusError, VerificationError
from nexus.core.hashing import leaf_hash
from nexus.core.keys import Identity, peer_id_of
from nexus.core.manifest import CAUSAL, ENCODER, EXACT, Manifest
from nexus.core.plan import STAGES_MAX, Plan
from nexus.core.record import Record, many, nested, raw, text, uint
from nexus.proof.receipts import (
    STEPS_MAX,
    Receipt,
    Request,
    SignedReceipt,
    SignedRequest,
    Terms,
    check_parent,
    payload_root,
    tokens_from_bytes,
)

PAYLOAD_MAX = 16 * 1024 * 1024
BUNDLE_BYTES_MAX = 256 * 1024 * 1024
# Sessions that one answer may be made of.
PARTS_MAX = 64


@dataclass(frozen=True, slots=True)
class Bundle(Record):
    """Everything that anyone needs to check a session.

    `inputs`: what the coordinator fed to the first stage: the prompt's token ids (causal), or those of every text (encoder).
    `outputs`: what the last stage gave for every step: a token id each, or a vector of float32 each.
    `receipts`: windows in order, and within a window the stages in order.
    """

    spec: int = uint(1, least=1)
    model_name: str = text(64)
    manifest: Manifest = nested(Manifest)
    plan: Plan = nested(Plan)
    terms: Terms = nested(Terms)
    requests: tuple[SignedRequest, ...] = many(nested(SignedRequest), STAGES_MAX)
    inputs: tuple[bytes, ...] = many(raw(most=PAYLOAD_MAX), STEPS_MAX)
    outputs: tuple[bytes, ...] = many(raw(most=PAYLOAD_MAX), STEPS_MAX)
    receipts: tuple[SignedReceipt, ...] = many(nested(SignedReceipt), STEPS_MAX)


@dataclass(frozen=True, slots=True)
class BundleReport:
    """What a verified bundle says. `receipts_by_stage`: (peer id, layers [start, end), receipts), in stage order."""

    model_name: str
    model_root: bytes
    plan_root: bytes
    session: bytes
    coordinator: str
    profile: str
    prompt_tokens: int
    steps: int
    receipts: int
    receipts_by_stage: tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class AnswerProof(Record):
    """What proves an answer: the bundle of its session, or where nodes went away in the middle of it, of each session that had a
    part in it, in order."""

    spec: int = uint(1, least=1)
    parts: tuple[Bundle, ...] = many(nested(Bundle), PARTS_MAX)


def request_for(terms: Terms, stage: int) -> Request:
    """The request that these terms call for: all the steps they allow. The first stage's also fixes its first input."""
    return Request(
        spec=1,
        coordinator=terms.coordinator,
        session=terms.session,
        model_root=terms.model_root,
        plan_root=terms.plan_root,
        stage=stage,
        step0=0,
        n=terms.steps_max,
        in_root=terms.prompt if stage == 0 else b"",
        parent=b"",
    )


def make_requests(coordinator: Identity, terms: Terms, plan: Plan) -> tuple[SignedRequest, ...]:
    """One signed request per stage."""
    return tuple(SignedRequest.sign(request_for(terms, stage), coordinator) for stage in range(len(plan.stages)))


def check_request(signed: SignedRequest, terms: Terms, plan: Plan, stage: int) -> Request:
    """The request for `stage`, if it is signed and says what these terms and this plan say. Raises VerificationError."""
    request = signed.verify()
    if request != request_for(terms, stage) or terms.model_root != plan.model_root or terms.plan_root != plan.root:
        raise VerificationError(f"the request to stage {stage} is not the one that the terms and the plan call for")
    return request


def verify_bundle(bundle: Bundle) -> BundleReport:
    """Replay every check on a session, offline. Raises VerificationError or MalformedError that name the first thing wrong."""
    bundle.manifest.check()
    bundle.plan.check(bundle.manifest)
    plan, terms = bundle.plan, bundle.terms
    if not terms.window:
        raise VerificationError("the session asked for no receipts, so nothing in this bundle is proven")
    stages = len(plan.stages)
    steps = len(bundle.outputs)
    if len(bundle.requests) != stages:
        raise VerificationError(f"the bundle has {len(bundle.requests)} requests for {stages} stages")
    requests = [check_request(signed, terms, plan, stage) for stage, signed in enumerate(bundle.requests)]
    inputs = first_stage_inputs(bundle.manifest, bundle.inputs, bundle.outputs)
    if leaf_hash(inputs[0]) != terms.prompt:
        raise VerificationError("the bundle's prompt is not the one that the session's terms name")
    check_answered(bundle.manifest, terms, inputs[0])
    if not 0 < steps <= terms.steps_max:
        raise VerificationError(f"the session ran {steps} steps where its terms allow {terms.steps_max}")

    if any(ends_answer(bundle.manifest, terms, payload) for payload in bundle.outputs[:-1]):
        raise VerificationError("the session went on after a token that ends it")
    chain = ChainVerifier(bundle.manifest, plan, terms, requests)
    for number, signed in enumerate(bundle.receipts):
        try:
            chain.accept(signed)
        except NexusError as error:
            raise VerificationError(f"receipt {number + 1} of {len(bundle.receipts)}: {error.cause}") from error
    chain.finish(inputs, bundle.outputs)
    counts = Counter(signed.receipt.stage for signed in bundle.receipts)
    return BundleReport(
        model_name=bundle.model_name,
        model_root=plan.model_root,
        plan_root=plan.root,
        session=terms.session,
        coordinator=peer_id_of(terms.coordinator),
        profile=plan.profile,
        prompt_tokens=sum(len(payload) // 4 for payload in bundle.inputs),
        steps=steps,
        receipts=len(bundle.receipts),
        receipts_by_stage=tuple(
            (peer_id_of(stage.node), stage.start, stage.end, counts[number]) for number, stage in enumerate(plan.stages)
        ),
    )


def first_stage_inputs(manifest: Manifest, inputs: Sequence[bytes], outputs: Sequence[bytes]) -> list[bytes]:
    """The first stage's input for every step. A causal model reads the prompt, then each token as the last stage gave it."""
    if manifest.kind == ENCODER:
        if len(inputs) != len(outputs):
            raise VerificationError(f"{len(inputs)} texts went in and {len(outputs)} vectors came out")
    elif len(inputs) != 1:
        raise VerificationError("a session of a causal model has one prompt")
    for payload in inputs:
        tokens = tokens_from_bytes(payload)
        if not tokens or max(tokens) >= manifest.vocab_size:
            raise MalformedError("a prompt or text without tokens, or with one that the model does not know")
    for payload in outputs:
        check_output(manifest, payload)
    if manifest.kind == ENCODER:
        return list(inputs)
    return [inputs[0], *outputs[:-1]]


def check_answered(manifest: Manifest, terms: Terms, first: bytes) -> None:
    """That a session's first input ends with the answer that it goes on from, and has a prompt before. Raises VerificationError."""
    said = terms.answered
    if said and (manifest.kind != CAUSAL or len(said) % 4 or len(first) <= len(said) or not first.endswith(said)):
        raise VerificationError("the session goes on from an answer that its prompt does not end with")


def verify_answer(proof: AnswerProof) -> tuple[BundleReport, ...]:
    """Verify every part, and that each goes on exactly where the one before stopped: the same question under the same terms, put to
    other nodes. Raises VerificationError or MalformedError that name the first thing wrong."""
    if not proof.parts:
        raise VerificationError("the proof is empty")
    reports = tuple(verify_bundle(part) for part in proof.parts)
    answered: list[bytes] = []
    for number, part in enumerate(proof.parts):
        first, terms = proof.parts[0], part.terms
        if (part.plan.model_root, _asked(terms)) != (first.plan.model_root, _asked(first.terms)):
            raise VerificationError(f"part {number + 1} of the answer is of another question than the first")
        if part.manifest.kind == CAUSAL:
            said = b"".join(answered)
            if terms.answered != first.terms.answered + said or part.inputs[0] != first.inputs[0] + said:
                raise VerificationError(f"part {number + 1} of the answer does not go on where part {number} stopped")
            # Less it may be: the asker saw enough.
            if terms.steps_max + len(answered) > first.terms.steps_max:
                raise VerificationError(f"part {number + 1} of the answer allows more than the first")
            if number and answered and ends_answer(part.manifest, terms, answered[-1]):
                raise VerificationError(f"part {number + 1} of the answer goes on after a token that ends it")
        answered += part.outputs
    return reports


def _asked(terms: Terms) -> tuple[object, ...]:
    """What the sessions of one answer have in common."""
    sampling = (terms.temperature, terms.top_k, terms.top_p, terms.min_p, terms.repetition_penalty, terms.seed)
    return (terms.coordinator, *sampling, terms.end_tokens)


def check_output(manifest: Manifest, payload: bytes) -> None:
    """That a last stage's payload is a token of the model, or a vector of finite numbers. Raises MalformedError."""
    expected = 4 if manifest.kind == CAUSAL else 4 * manifest.hidden_size
    if len(payload) != expected:
        raise MalformedError(f"a result of {len(payload)} bytes where {expected} are due")
    if manifest.kind == CAUSAL:
        (token,) = tokens_from_bytes(payload)
        if token >= manifest.vocab_size:
            raise MalformedError(f"token {token} came out of a vocabulary of {manifest.vocab_size}")
    elif not all(map(isfinite, struct.unpack(f"<{manifest.hidden_size}f", payload))):
        raise MalformedError("a vector came out that is not all finite numbers")


def ends_answer(manifest: Manifest, terms: Terms, payload: bytes) -> bool:
    """Whether a result is one of the tokens that no other may follow."""
    return manifest.kind == CAUSAL and tokens_from_bytes(payload)[0] in terms.end_tokens


class ChainVerifier:
    """Checks the receipts of one session as they come: windows in order, and within a window the stages in order.

    Used by the coordinator while a session runs, and by `verify_bundle` afterwards, so that both hold to the same rules.
    """

    def __init__(self, manifest: Manifest, plan: Plan, terms: Terms, requests: Sequence[Request]) -> None:
        self._manifest = manifest
        self._plan = plan
        self._terms = terms
        self._request_ids = [request.id for request in requests]
        self._prev: list[Receipt | None] = [None] * len(plan.stages)
        self._stage = 0
        self._roots: list[tuple[int, int, bytes, bytes, int]] = []
        self._parent: Receipt | None = None
        self.accepted = 0

    @property
    def steps(self) -> int:
        """Steps that every stage has signed for."""
        last = self._prev[-1]
        return last.step0 + last.n if last else 0

    @property
    def due_stage(self) -> int:
        """Whose receipt comes next."""
        return self._stage

    def covers(self, steps: int) -> bool:
        """Whether every stage has signed for the first `steps` steps, and none is halfway through a window."""
        return not self._stage and self.steps >= steps

    def accept(self, signed: SignedReceipt) -> Receipt:
        """The next receipt of the session, checked against its stage's place, its parent and its predecessor."""
        receipt = signed.verify()
        stage, plan = self._stage, self._plan
        prev = self._prev[stage]
        check_place(receipt, self._manifest.kind, plan, self._terms, stage, self._request_ids[stage], prev)
        if stage == 0 and self._manifest.kind == ENCODER:
            self._parent = None  # nothing is fed back, so every window starts a chain of its own
        check_parent(receipt, self._parent)
        if stage > 0 and self._parent:
            check_input(receipt, self._parent)
        self._prev[stage] = self._parent = receipt
        self._stage = (stage + 1) % len(plan.stages)
        if self._stage == 0:
            first = self._prev[0]
            assert first is not None
            self._roots.append((receipt.step0, receipt.n, first.in_root, receipt.out_root, receipt.kv_len))
        self.accepted += 1
        return receipt

    def finish(self, inputs: Sequence[bytes], outputs: Sequence[bytes]) -> None:
        """All receipts are in. `inputs`, `outputs`: payloads at both ends of the chain, one per step.
        Raises VerificationError if a step is missing or the roots do not lead to them."""
        if not self._terms.window:
            return  # no receipts were asked for: the session says so itself, and `verify_bundle` refuses it
        if self._stage:
            raise VerificationError(f"the receipt of stage {self._stage} for the last window is missing")
        if self.steps != len(outputs):
            raise VerificationError(f"{self.steps} of {len(outputs)} steps are receipted")
        kv_len = 0
        for step0, n, in_root, out_root, kv_claimed in self._roots:
            window = slice(step0, step0 + n)
            if payload_root(inputs[window]) != in_root:
                raise VerificationError(f"the first stage's input of steps {step0} to {step0 + n - 1} is not what was sent to it")
            if payload_root(outputs[window]) != out_root:
                raise VerificationError(f"the results of steps {step0} to {step0 + n - 1} are not what the last stage signed")
            if self._manifest.kind == CAUSAL:
                kv_len += sum(len(payload) // 4 for payload in inputs[window])
            if kv_claimed != kv_len:
                raise VerificationError(f"after step {step0 + n - 1} the cache holds {kv_len} tokens, not {kv_claimed}")


def check_place(receipt: Receipt, kind: str, plan: Plan, terms: Terms, stage: int, request_id: bytes, prev: Receipt | None) -> None:
    """That `receipt` is stage `stage`'s, in this session of a model of this kind, and goes on where `prev` ended. Raises
    VerificationError."""
    if receipt.stage != stage or receipt.node != plan.stages[stage].node:
        raise VerificationError(f"a receipt of stage {receipt.stage} stands where the one of stage {stage} is due")
    if not terms.window:
        raise VerificationError("a receipt came that the session did not ask for")
    if receipt.session != terms.session or receipt.model_root != terms.model_root or receipt.request != request_id:
        raise VerificationError(f"the receipt of stage {stage} belongs to another session, model or request")
    exact = plan.profile == EXACT
    if (receipt.profile, bool(receipt.trace_root), bool(receipt.kv_root)) != (plan.profile, exact, exact and kind == CAUSAL):
        raise VerificationError(f"the receipt of stage {stage} is not of profile {plan.profile!r}")
    if receipt.prev != (prev.id if prev else b""):
        raise VerificationError(f"the receipt of stage {stage} does not follow its previous one")
    step0 = prev.step0 + prev.n if prev else 0
    # Only the last window may be short: one that starts off the grid would leave out steps unnoticed.
    if receipt.step0 != step0 or step0 % terms.window or not 0 < receipt.n <= terms.window:
        raise VerificationError(f"the receipt of stage {stage} is for steps {receipt.step0}+{receipt.n}, not from step {step0}")
    if step0 + receipt.n > terms.steps_max:
        raise VerificationError(f"stage {stage} signed for steps that its request does not allow")


def check_input(receipt: Receipt, parent: Receipt) -> None:
    """That a stage's input is its parent's output, for the same steps. Raises VerificationError."""
    if (receipt.step0, receipt.n, receipt.kv_len) != (parent.step0, parent.n, parent.kv_len):
        raise VerificationError(f"stages {parent.stage} and {receipt.stage} signed for different steps")
    if receipt.in_root != parent.out_root:
        raise VerificationError(f"the input of stage {receipt.stage} is not the output of stage {parent.stage}")
