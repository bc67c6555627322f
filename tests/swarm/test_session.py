"""The session state machines: every honest run verifies, and every lie on the wire or in the bundle is found."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.core.errors import CapacityError, NexusError, PeerError, VerificationError
from nexus.core.keys import Identity
from nexus.core.manifest import EXACT, FLOAT
from nexus.proof.bundle import Bundle, verify_bundle
from nexus.proof.receipts import WINDOW, WINDOW_MAX, Receipt, SignedReceipt, tokens_from_bytes, tokens_to_bytes
from nexus.proof.trace import WindowTrace, check_trace
from nexus.swarm.session import (
    Compute,
    CoordinatorSession,
    Seal,
    SendOutput,
    SendReceipt,
    SendStep,
    ShowReceipt,
    ShowTrace,
    Sign,
    StageAction,
    StageSession,
)
from tests.swarm.ring import Message, causal_ring, encoder_ring, identity, shapes_for, toy_seal

PROFILES = st.sampled_from([FLOAT, EXACT])


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


@given(stages=st.integers(1, 4), steps=st.integers(1, 30), window=st.integers(1, WINDOW_MAX), profile=PROFILES, slow=st.booleans())
@settings(max_examples=80, deadline=None)
def test_any_window_will_do(stages: int, steps: int, window: int, profile: str, slow: bool) -> None:
    ring = causal_ring(stages, steps, window=window, profile=profile)
    ring.slow_disk = slow
    bundle = ring.run()
    assert bundle is not None
    assert verify_bundle(bundle).receipts == stages * -(-steps // window)


@given(stages=st.integers(1, 4), steps=st.integers(1, 40), window=st.integers(1, 20), causal=st.booleans(), slow=st.booleans())
@settings(max_examples=80, deadline=None)
def test_exact_stages_show_what_every_receipt_commits_to(stages: int, steps: int, window: int, causal: bool, slow: bool) -> None:
    make = causal_ring if causal else encoder_ring
    ring = make(stages, steps, window=window, profile=EXACT)
    ring.slow_disk = slow
    bundle = ring.run()
    assert bundle is not None
    assert [len(traces) for traces in ring.traces] == [-(-steps // window)] * stages
    shapes = shapes_for(ring.model, ring.plan)
    for stage, shape in enumerate(shapes):
        receipts = [signed.receipt for signed in bundle.receipts if signed.receipt.stage == stage]
        for receipt, trace in zip(receipts, ring.traces[stage], strict=True):
            check_trace(trace, shape, receipt.n, receipt.trace_root, receipt.kv_root)
            assert bool(receipt.kv_root) == causal


def test_nothing_leaves_a_stage_before_the_receipt_that_is_being_signed() -> None:
    """A crash must find on the disk whatever the network has seen."""
    ring = causal_ring(1, 40, window=4, profile=EXACT)
    coordinator = CoordinatorSession(
        identity(0), "toy", ring.model, ring.plan, ring.terms, ring.inputs, shapes_for(ring.model, ring.plan)
    )
    stage = StageSession(identity(1).public_key, ring.model, ring.plan, ring.terms, coordinator.requests[0], 0)

    def step(number: int) -> list[StageAction]:
        payload = ring.inputs[0] if number == 0 else tokens_to_bytes([1])
        (compute,) = stage.feed(0, payload) if number == 0 else stage.push(number, payload)
        assert isinstance(compute, Compute)
        return stage.computed(number, tokens_to_bytes([1]))

    for number in range(3):
        step(number)
    *_, seal = step(3)
    assert seal == Seal(4)
    (sign,) = stage.sealed(toy_seal(shapes_for(ring.model, ring.plan)[0], 0, 0, 4))
    assert isinstance(sign, Sign)
    assert not stage.holds
    assert step(4) == []
    assert stage.holds
    out = stage.signed(SignedReceipt.sign(sign.receipt, identity(1)))
    assert [type(action) for action in out] == [SendReceipt, ShowTrace, ShowReceipt, SendStep, SendOutput]
    assert not stage.holds


@pytest.mark.parametrize("liar", [0, 1, 2])
@pytest.mark.parametrize("lie", ["none", "cell", "log", "short", "twice"])
def test_a_stage_that_shows_no_trace_or_another_one_is_named(liar: int, lie: str) -> None:
    ring = causal_ring(3, 20, profile=EXACT)
    sent = 0

    def tamper(sender: int, message: Message) -> Message | None:
        nonlocal sent
        match message:
            case ("trace", int() as stage, WindowTrace(cells, logs)) if sender == liar:
                sent += 1
                changed = {
                    "none": None,
                    "cell": WindowTrace(_flip(cells, 40), logs),
                    "log": WindowTrace(cells, _flip(logs, 40)),
                    "short": WindowTrace(cells[:-32], logs),
                    "twice": WindowTrace(cells, logs),
                }[lie]
                return changed and ("trace", stage, changed)
            case ("receipt", int() as stage, SignedReceipt()) if sender == liar and lie == "twice":
                return ("trace", stage, toy_seal(shapes_for(ring.model, ring.plan)[stage], stage, 0, 16).trace)
        return message

    ring.tamper = tamper
    with pytest.raises(PeerError) as caught:
        ring.run()
    assert sent == 1
    assert f"stage {liar}" in caught.value.cause or caught.value.peer == identity(liar + 1).peer_id


def test_float_receipts_commit_to_nothing_and_exact_ones_must() -> None:
    for profile, changes in (
        (FLOAT, {"trace_root": bytes(32)}),
        (FLOAT, {"kv_root": bytes(32)}),
        (EXACT, {"trace_root": b""}),
        (EXACT, {"kv_root": b""}),
    ):
        bundle = causal_ring(2, 3, profile=profile).run()
        assert bundle is not None
        first = _lie(bundle.receipts[0], identity(1), **changes)
        with pytest.raises(VerificationError, match="is not of profile"):
            verify_bundle(replace(bundle, receipts=(first, *bundle.receipts[1:])))
    encoder = encoder_ring(1, 1, profile=EXACT).run()
    assert encoder is not None
    keeps = _lie(encoder.receipts[0], identity(1), kv_root=bytes(32))
    with pytest.raises(VerificationError, match="is not of profile"):
        verify_bundle(replace(encoder, receipts=(keeps,)))


def test_what_is_kept_of_traces_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexus.swarm.session.TRACES_BYTES_MAX", 100_000)
    with pytest.raises(CapacityError, match="so long"):
        causal_ring(2, 100, profile=EXACT).run()


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
