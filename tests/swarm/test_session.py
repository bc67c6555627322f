"""The session state machines: every honest run verifies, and every lie on the wire or in the bundle is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.core.errors import NexusError, PeerError, VerificationError
from nexus.core.keys import Identity
from nexus.proof.bundle import Bundle, verify_bundle
from nexus.proof.receipts import WINDOW, WINDOW_MAX, Receipt, SignedReceipt, tokens_from_bytes
from tests.swarm.ring import Message, causal_ring, encoder_ring, identity


@given(stages=st.integers(1, 8), steps=st.integers(1, 3 * WINDOW + 1), prompt=st.lists(st.integers(0, 255), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_every_step_of_every_stage_is_receipted(stages: int, steps: int, prompt: list[int]) -> None:
    ring = causal_ring(stages, steps, prompt)
    bundle = ring.run()
    assert bundle is not None
    report = verify_bundle(Bundle.from_bytes(bundle.to_bytes()))
    assert report.steps == steps == len(ring.results)
    assert report.receipts == stages * -(-steps // WINDOW)
    assert report.prompt_tokens == len(prompt)


@given(stages=st.integers(1, 4), steps=st.integers(1, 30), window=st.integers(1, WINDOW_MAX))
@settings(max_examples=40, deadline=None)
def test_any_window_will_do(stages: int, steps: int, window: int) -> None:
    bundle = causal_ring(stages, steps, window=window).run()
    assert bundle is not None
    assert verify_bundle(bundle).receipts == stages * -(-steps // window)


def test_a_session_without_receipts_runs_and_never_verifies() -> None:
    ring = causal_ring(3, 40, window=0)
    bundle = ring.run()
    assert bundle is not None
    assert len(ring.results) == 40
    assert not bundle.receipts
    with pytest.raises(VerificationError, match="asked for no receipts"):
        verify_bundle(bundle)


@given(stages=st.integers(1, 5), texts=st.integers(1, 2 * WINDOW + 3))
@settings(max_examples=30, deadline=None)
def test_an_encoder_session_verifies(stages: int, texts: int) -> None:
    bundle = encoder_ring(stages, texts).run()
    assert bundle is not None
    assert verify_bundle(bundle).steps == texts


def test_an_end_token_ends_the_session() -> None:
    free = causal_ring(3, 40)
    free.run()
    tokens = [tokens_from_bytes(result)[0] for result in free.results]
    ring = causal_ring(3, 40, end_tokens=(tokens[20],))
    bundle = ring.run()
    assert bundle is not None
    assert [tokens_from_bytes(result)[0] for result in ring.results] == [
        *(tokens_from_bytes(result)[0] for result in ring.results[:-1]),
        tokens[20],
    ]
    assert verify_bundle(bundle).steps == len(ring.results) <= 21


@given(stages=st.integers(1, 4), stop_at=st.integers(0, 2 * WINDOW + 2))
@settings(max_examples=40, deadline=None)
def test_the_coordinator_may_stop_at_any_step(stages: int, stop_at: int) -> None:
    ring = causal_ring(stages, 100)
    ring.stop_at = stop_at
    bundle = ring.run()
    assert bundle is not None
    assert stop_at < verify_bundle(bundle).steps <= stop_at + 3


def _flip(data: bytes, at: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@given(stages=st.integers(2, 4), victim=st.integers(0, 10_000), at=st.integers(0, 10_000))
@settings(max_examples=150, deadline=None)
def test_a_flipped_bit_on_the_wire_is_found(stages: int, victim: int, at: int) -> None:
    """Whatever message is hit, payload or receipt, the session does not verify."""
    ring = causal_ring(stages, 2 * WINDOW + 5)
    seen = 0

    def tamper(_: int, message: Message) -> Message:
        nonlocal seen
        seen += 1
        if seen - 1 != victim % 150:
            return message
        match message:
            case (kind, int() as step, bytes() as payload):
                return (kind, step, _flip(payload, at))
            case ("receipt", *stage, SignedReceipt() as signed):
                return ("receipt", *stage, replace(signed, signature=_flip(signed.signature, at)))
        return message

    ring.tamper = tamper
    untouched = causal_ring(stages, 2 * WINDOW + 5).run()
    try:
        bundle = ring.run()
    except PeerError:
        return
    # Messages without a payload are passed on as they are.
    assert bundle is not None
    assert untouched is not None
    assert bundle.outputs == untouched.outputs


def _lie(signed: SignedReceipt, liar: Identity, **changes: object) -> SignedReceipt:
    return SignedReceipt.sign(replace(signed.receipt, **changes), liar)  # type: ignore[arg-type]


LIES: list[dict[str, object]] = [
    {"out_root": bytes(32)},
    {"in_root": bytes(32)},
    {"n": 15},
    {"step0": 16},
    {"kv_len": 3},
    {"stage": 0},
    {"session": bytes(32)},
    {"model_root": bytes(32)},
    {"request": bytes(32)},
    {"parent": b""},
    {"parent": bytes(32)},
    {"prev": bytes(32)},
    {"profile": "exact"},
    {"kv_root": bytes(32)},
    {"node": identity(9).public_key},
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: next(iter(lie)))
@pytest.mark.parametrize("liar", [0, 1, 2])
def test_a_stage_that_signs_a_lie_is_found_by_the_next_one(lie: dict[str, object], liar: int) -> None:
    ring = causal_ring(3, 2 * WINDOW + 5)
    reached_the_end = False

    def tamper(sender: int, message: Message) -> Message:
        nonlocal reached_the_end
        if message[0] == "done":
            reached_the_end = True
        match message:
            case ("receipt", *stage, SignedReceipt() as own) if sender == liar:
                if lie == {"stage": 0} and liar == 0:
                    return ("receipt", *stage, _lie(own, identity(1), stage=1))
                return ("receipt", *stage, _lie(own, identity(liar + 1), **lie))
        return message

    ring.tamper = tamper
    with pytest.raises(VerificationError):
        ring.run()
    assert not reached_the_end


def test_a_receipt_replayed_from_another_session_is_refused() -> None:
    other = causal_ring(2, WINDOW, prompt=(9, 9))
    foreign = other.run()
    assert foreign is not None
    ring = causal_ring(2, WINDOW)

    def tamper(_: int, message: Message) -> Message:
        match message:
            case ("receipt", *stage, SignedReceipt()):
                return ("receipt", *stage, foreign.receipts[0])
        return message

    ring.tamper = tamper
    with pytest.raises(VerificationError):
        ring.run()


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_no_bit_of_a_bundle_can_be_changed_unnoticed(data: st.DataObject) -> None:
    bundle = causal_ring(3, WINDOW + 3).run()
    assert bundle is not None
    raw = bundle.to_bytes()
    at = data.draw(st.integers(0, len(raw) - 1))
    bit = data.draw(st.integers(0, 7))
    changed = raw[:at] + bytes([raw[at] ^ (1 << bit)]) + raw[at + 1 :]
    try:
        report = verify_bundle(Bundle.from_bytes(changed))
    except NexusError:
        return
    # The local name is the one thing that nothing signs: the root says what the model is.
    assert report.model_name != bundle.model_name


def test_dropped_reordered_or_repeated_receipts_are_found() -> None:
    bundle = causal_ring(3, 2 * WINDOW + 3).run()
    assert bundle is not None
    receipts = bundle.receipts
    for changed in (receipts[:-1], receipts[3:], receipts[1:], receipts[::-1], (*receipts, receipts[-1]), receipts[:3] * 3, ()):
        with pytest.raises(VerificationError):
            verify_bundle(replace(bundle, receipts=changed))


@pytest.mark.parametrize("sender", [0, 1, 2])
def test_a_window_without_its_receipts_goes_no_further(sender: int) -> None:
    """Nobody takes a step of the next window from a stage that has not signed the last one."""
    ring = causal_ring(3, 3 * WINDOW)
    reached = 0

    def tamper(by: int, message: Message) -> Message | None:
        nonlocal reached
        if message[0] == "output":
            reached = max(reached, int(message[1]))  # type: ignore[call-overload]
        return None if by == sender and message[0] == "receipt" else message

    ring.tamper = tamper
    with pytest.raises(VerificationError, match="without having signed"):
        ring.run()
    assert reached <= WINDOW


def test_an_answer_cut_short_is_found() -> None:
    """The last stage cannot pass off a part of the answer as the whole."""
    ring = causal_ring(2, 40)

    def tamper(sender: int, message: Message) -> Message:
        if sender == 1 and message[0] == "push" and message[1] == 7:
            return ("finish",)
        return message

    ring.tamper = tamper
    with pytest.raises(VerificationError, match="before the answer was over"):
        ring.run()


def test_a_receipt_takes_about_400_bytes() -> None:
    bundle = causal_ring(2, WINDOW).run()
    assert bundle is not None
    assert len(bundle.receipts[1].to_bytes()) < 430
    assert Receipt.from_bytes(bundle.receipts[1].receipt.to_bytes()).id == bundle.receipts[1].receipt.id
