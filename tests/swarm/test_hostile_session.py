"""What a malicious stage or coordinator may try against the state machines, beyond flipped bits: refused where it happens."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import cast

import pytest

from nexus.core.errors import MalformedError, VerificationError
from nexus.proof.bundle import Bundle, verify_bundle
from nexus.proof.receipts import SignedReceipt, tokens_from_bytes, tokens_to_bytes
from nexus.swarm.session import EARLY_MAX, Compute, CoordinatorSession, StageSession
from tests.swarm.ring import HIDDEN, Message, Ring, causal_ring, encoder_ring, identity, toy_compute


def coordinator_of(ring: Ring) -> CoordinatorSession:
    return CoordinatorSession(identity(0), "toy", ring.model, ring.plan, ring.terms, ring.inputs)


def machine(ring: Ring, stage: int) -> StageSession:
    requests = coordinator_of(ring).requests
    return StageSession(identity(stage + 1).public_key, ring.model, ring.plan, ring.terms, requests[stage], stage)


def ready(ring: Ring) -> CoordinatorSession:
    coordinator = coordinator_of(ring)
    for stage in range(len(ring.plan.stages)):
        coordinator.accepted(stage)
    return coordinator


def state(tokens: int) -> bytes:
    return struct.pack(f"<{HIDDEN * tokens}f", *[0.5] * HIDDEN * tokens)


@pytest.mark.parametrize("tokens", [0, 2, 1000])
def test_a_later_step_brings_one_token_and_no_more(tokens: int) -> None:
    """Else one Push in the middle of an answer would make a stage compute, and keep in its cache, whatever fits a frame."""
    ring = causal_ring(3, 40)
    victim = machine(ring, 1)
    (compute,) = victim.push(0, state(3))
    assert isinstance(compute, Compute)
    victim.computed(0, state(3))
    with pytest.raises(MalformedError, match="1 to 1 tokens"):
        victim.push(1, state(tokens))
    assert victim.kv_len == 3


@pytest.mark.parametrize("payload", [b"", b"\0" * 15, state(4097)], ids=["nothing", "a part of a token", "more than the context"])
def test_a_prompt_is_whole_tokens_within_the_context(payload: bytes) -> None:
    with pytest.raises(MalformedError):
        machine(causal_ring(3, 40), 1).push(0, payload)
    with pytest.raises(MalformedError):
        machine(encoder_ring(3, 4), 1).push(0, payload)


def test_a_coordinator_cannot_feed_a_text_longer_than_the_context() -> None:
    ring = encoder_ring(2, 2)
    victim = machine(ring, 0)
    victim.feed(0, ring.inputs[0])
    victim.computed(0, toy_compute(ring.model, ring.plan, 0, 0, ring.inputs[0]))
    with pytest.raises(MalformedError):
        victim.feed(1, tokens_to_bytes(range(4097)))


def test_nothing_is_computed_for_who_pushes_on_after_the_end() -> None:
    ring = causal_ring(2, 40, end_tokens=(7,))
    last = machine(ring, 1)
    last.push(0, state(3))
    last.computed(0, tokens_to_bytes([7]))
    with pytest.raises(VerificationError, match="after the answer was over"):
        last.push(1, state(1))


def test_a_result_after_an_end_token_is_no_result() -> None:
    ring = causal_ring(2, 40, end_tokens=(7,))
    coordinator = ready(ring)
    coordinator.output(0, tokens_to_bytes([7]))
    with pytest.raises(VerificationError, match="after the answer was over"):
        coordinator.output(1, tokens_to_bytes([8]))


def test_nothing_is_shown_after_done() -> None:
    """It would reach the user beside a bundle that verifies, and not be in it."""
    junk = causal_ring(2, 100).run()
    assert junk is not None
    coordinator = ready(causal_ring(2, 100, window=0))
    coordinator.output(0, tokens_to_bytes([1]))
    coordinator.stop()
    coordinator.done()
    with pytest.raises(VerificationError):
        coordinator.output(1, tokens_to_bytes([1]))
    with pytest.raises(VerificationError):
        coordinator.receipt(0, junk.receipts[0])
    with pytest.raises(VerificationError, match="twice"):
        coordinator.done()


@pytest.mark.parametrize("payload", [tokens_to_bytes([256]), b"\xff" * 4, b"\0\0\0", b"\0" * 8])
def test_a_result_is_a_token_of_the_vocabulary(payload: bytes) -> None:
    ring = causal_ring(2, 40)
    with pytest.raises(MalformedError):
        ready(ring).output(0, payload)
    bundle = causal_ring(2, 3).run()
    assert bundle is not None
    with pytest.raises(MalformedError):
        verify_bundle(replace(bundle, outputs=(*bundle.outputs[:-1], payload)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_vector_is_finite_numbers(bad: float) -> None:
    """What is not has no JSON form: it would fail inside the daemon and not where it came in."""
    ring = encoder_ring(2, 2)
    payload = struct.pack(f"<{HIDDEN}f", 1.0, 2.0, bad, 3.0)
    with pytest.raises(MalformedError, match="finite"):
        ready(ring).output(0, payload)
    bundle = ring.run()
    assert bundle is not None
    with pytest.raises(MalformedError, match="finite"):
        verify_bundle(replace(bundle, outputs=(payload, bundle.outputs[1])))


@pytest.mark.parametrize("to_coordinator", [False, True])
def test_a_receipt_with_a_forged_signature_is_found_where_it_arrives(to_coordinator: bool) -> None:
    ring = causal_ring(4, 20)

    def forge(sender: int, message: Message) -> Message:
        match message:
            case ("receipt", *stage, SignedReceipt() as signed) if sender == 1 and bool(stage) == to_coordinator:
                return ("receipt", *stage, SignedReceipt(signed.receipt, bytes(64)))
        return message

    ring.tamper = forge
    with pytest.raises(VerificationError, match="not signed"):
        ring.run()


def test_a_stage_speaks_for_itself_alone() -> None:
    """A receipt of another stage is refused, however well it is signed."""
    bundle = causal_ring(3, 20).run()
    assert bundle is not None
    coordinator = ready(causal_ring(3, 20))
    with pytest.raises(VerificationError, match="not its own"):
        coordinator.receipt(2, bundle.receipts[1])


def test_receipts_that_wait_for_others_are_bounded() -> None:
    bundle = causal_ring(3, 20).run()
    assert bundle is not None
    coordinator = ready(causal_ring(3, 20))
    for _ in range(EARLY_MAX):
        coordinator.receipt(1, bundle.receipts[1])
    with pytest.raises(VerificationError, match="not due"):
        coordinator.receipt(1, bundle.receipts[1])


def test_the_last_stages_receipt_counts_the_tokens_that_the_first_saw() -> None:
    ring = causal_ring(2, 40)

    def lie(sender: int, message: Message) -> Message:
        match message:
            case ("receipt", SignedReceipt() as signed) if sender == 1:
                receipt = replace(signed.receipt, kv_len=signed.receipt.kv_len + 1)
                return ("receipt", SignedReceipt.sign(receipt, identity(2)))
        return message

    ring.tamper = lie
    with pytest.raises(VerificationError, match="other tokens"):
        ring.run()


def test_receipts_that_are_not_due_are_refused_before_a_signature_is_looked_at() -> None:
    junk = causal_ring(3, 40).run()
    assert junk is not None
    for stage in (0, 1):
        with pytest.raises(VerificationError, match="not due"):
            machine(causal_ring(3, 40), stage).receipt(junk.receipts[0])


def test_a_bundle_that_goes_on_after_an_end_token_does_not_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coordinator and stages together could sign on, and show more work than the terms allow."""
    ring = causal_ring(2, 20)
    ring.run()
    again = causal_ring(2, 20, end_tokens=tuple(tokens_from_bytes(ring.results[10])))
    monkeypatch.setattr(StageSession, "_ends", lambda self, step, output: step + 1 == 20)
    monkeypatch.setattr("nexus.swarm.session.ends_answer", lambda *_: False)
    with pytest.raises(VerificationError, match="went on after"):
        verify_bundle(cast(Bundle, again.run()))
