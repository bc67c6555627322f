"""Challenges, cells and the messages of audits."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.audits import LIGHT, OK
from nexus.core.errors import MalformedError, UsageError, VerificationError
from nexus.core.keys import Identity
from nexus.proof.audit import (
    CELLS,
    CELLS_MAX,
    CHAIN_LENGTH,
    ROW,
    AuditAnswer,
    AuditReport,
    AuditRequest,
    Cell,
    ChallengeChain,
    OpenedRow,
    Opening,
    SignedAuditAnswer,
    SignedAuditRequest,
    StageAudit,
    Sums,
    chain_of,
    challenge,
    check_answer,
    check_reveal,
    pick_cells,
)

COORDINATOR, NODE = Identity(bytes([1]) * 32), Identity(bytes([2]) * 32)
digests = st.binary(min_size=32, max_size=32)
rows_of = st.lists(st.integers(1, 50), min_size=1, max_size=30)


@given(digests, st.integers(0, CHAIN_LENGTH - 1))
def test_every_element_of_a_chain_is_its_own(seed: bytes, index: int) -> None:
    chain = ChallengeChain(seed)
    check_reveal(chain.head, index, chain.reveal(index))
    for other in {0, CHAIN_LENGTH - 1, (index + 1) % CHAIN_LENGTH} - {index}:
        with pytest.raises(VerificationError):
            check_reveal(chain.head, other, chain.reveal(index))
    with pytest.raises(VerificationError):
        check_reveal(b"", index, chain.reveal(index))
    for beyond in (-1, CHAIN_LENGTH):
        with pytest.raises(UsageError):
            chain.reveal(beyond)
        with pytest.raises(VerificationError):
            check_reveal(chain.head, beyond, chain.reveal(index))


def test_a_chain_follows_from_the_secret_and_the_nonce() -> None:
    assert chain_of(COORDINATOR, bytes(16)).head == chain_of(COORDINATOR, bytes(16)).head
    heads = {chain_of(who, nonce).head for who in (COORDINATOR, NODE) for nonce in (bytes(16), bytes(15) + b"x")}
    assert len(heads) == 4


@given(digests, digests, rows_of, st.integers(1, 40), st.integers(1, 8), st.booleans(), st.integers(1, CELLS_MAX))
def test_cells_follow_from_the_challenge_and_are_there(
    receipt: bytes, reveal: bytes, rows: list[int], layers: int, heads: int, result: bool, count: int
) -> None:
    drawn = challenge(receipt, reveal)
    cells = pick_cells(drawn, rows, layers, heads, result, count)
    assert cells == pick_cells(drawn, rows, layers, heads, result, count)
    assert len(cells) == count + result
    for cell in cells[:count]:
        assert 0 <= cell.row < rows[cell.step]
        assert 0 <= cell.layer < layers
        assert 0 <= cell.head < heads
    if result:
        assert (cells[-1].row, cells[-1].layer, cells[-1].head) == (0, layers, 0)
        assert cells[-1].step < len(rows)
    # More cells are the same ones and others, so that nobody chooses by the count.
    assert cells[:count] == pick_cells(drawn, rows, layers, heads, False, min(CELLS_MAX, count + 1))[:count]


def test_all_rows_and_layers_are_drawn_alike() -> None:
    drawn: dict[tuple[int, int, int], int] = {}
    for number in range(600):
        for cell in pick_cells(number.to_bytes(32, "little"), [3, 1, 1], 3, 2, False, 5):
            key = cell.step, cell.row, cell.layer
            drawn[key] = drawn.get(key, 0) + 1
    assert len(drawn) == 15
    assert all(abs(count - 200) < 6 * 200**0.5 for count in drawn.values())


@pytest.mark.parametrize(("rows", "layers", "heads", "count"), [([], 1, 1, 1), ([0], 1, 1, 1), ([1], 0, 1, 1), ([1], 1, 1, 65)])
def test_nothing_is_picked_from_nothing(rows: list[int], layers: int, heads: int, count: int) -> None:
    with pytest.raises(ValueError, match="nothing to pick"):
        pick_cells(bytes(32), rows, layers, heads, False, count)


def request(**changes: object) -> AuditRequest:
    made = AuditRequest(1, COORDINATOR.public_key, b"s" * 32, 1, b"r" * 32, 0, b"v" * 32, CELLS, 2, ())
    return replace(made, **changes)  # type: ignore[arg-type]


def test_requests_and_answers_are_signed_by_whom_they_name() -> None:
    asked = request()
    assert SignedAuditRequest.sign(asked, COORDINATOR).verify() == asked
    with pytest.raises(VerificationError, match="not signed"):
        SignedAuditRequest.sign(asked, NODE).verify()
    for wrong in ({"kind": ROW}, {"kind": "all"}, {"count": 0}, {"cells": (Cell(0, 0, 0, 0),)}):
        with pytest.raises(MalformedError):
            SignedAuditRequest.sign(request(**wrong), COORDINATOR).verify()

    answer = AuditAnswer(1, asked.id, asked.session, asked.receipt, NODE.public_key, 1, (b"1" * 32, b"2" * 32))
    signed = SignedAuditAnswer.sign(answer, NODE)
    assert check_answer(signed, asked, NODE.public_key, 2) == answer
    with pytest.raises(VerificationError, match="not to this audit"):
        check_answer(signed, request(index=1), NODE.public_key, 2)
    with pytest.raises(VerificationError, match="not to this audit"):
        check_answer(signed, asked, NODE.public_key, 3)
    with pytest.raises(VerificationError, match="not to this audit"):
        check_answer(SignedAuditAnswer.sign(replace(answer, node=COORDINATOR.public_key), COORDINATOR), asked, NODE.public_key, 2)


openings = st.builds(
    Opening,
    st.builds(Cell, st.integers(0, 99), st.integers(0, 99), st.integers(0, 9), st.integers(0, 9)),
    st.builds(OpenedRow, st.binary(max_size=9), st.lists(digests, max_size=3).map(tuple)),
    st.lists(st.builds(OpenedRow, st.binary(max_size=9), st.just(())), max_size=5).map(tuple),
    st.lists(st.builds(Sums, st.binary(max_size=9)), max_size=4).map(tuple),
    st.lists(st.binary(max_size=9), max_size=4).map(tuple),
    st.binary(max_size=40),
    st.lists(st.binary(max_size=9), max_size=4).map(tuple),
    st.builds(OpenedRow, st.binary(max_size=9), st.just(())),
)


@given(openings, openings)
def test_an_opening_has_one_form_and_one_id(one: Opening, other: Opening) -> None:
    assert Opening.from_bytes(one.to_bytes()) == one
    assert (one.id == other.id) == (one == other)


def test_a_report_keeps_what_was_found() -> None:
    stage = StageAudit(0, NODE.public_key, LIGHT, OK, 0, 3, 1234, b"", "")
    report = AuditReport(1, b"s" * 32, 5, 1, (stage,))
    assert AuditReport.from_bytes(report.to_bytes()) == report
