"""Audits: who may ask a stage to show its work, which part of it, and what it answers.

Before a session begins its coordinator registers the head of a hash chain (`Terms.challenge`). When the receipts are in it
reveals the chain's elements one after the other, and what is to be shown follows from the receipt and the element alone: the
stage could not know it when it signed, the coordinator cannot choose it any more, and anyone can check it.

A *cell* is one row of one layer. Its opening holds every value on the way of the row through the layer, each with the Merkle
path to the op root that the stage committed to, the integer sums of the linear operations, and the keys and values of one head.
`nexus.proof.audit_check` says whether it is right. docs/audits.md has the same in words.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from blake3 import blake3

from nexus.core.errors import MalformedError, UsageError, VerificationError
from nexus.core.hashing import tagged_hash
from nexus.core.keys import Identity, verify_digest
from nexus.core.manifest import LAYERS_MAX
from nexus.core.record import Record, digest, many, nested, optional_digest, raw, text, uint
from nexus.proof.receipts import STEPS_MAX

# Audits of one session, each of which uses up one element of the chain.
CHAIN_LENGTH = 256
CELLS_MAX = 64
# Of an opening: half a frame of the network. What would be longer is for a replica.
OPENING_BYTES_MAX = 32 * 1024 * 1024
CONTEXT_ROWS_MAX = 8192
LOG_RECORDS_MAX = 1 << 20
SIBLINGS_MAX = 32


def _next(element: bytes) -> bytes:
    return tagged_hash("challenge-chain", element)


class ChallengeChain:
    """The elements of one session's chain, from a secret seed. `head` is published before the session, `reveal(0)` hashes to it,
    `reveal(1)` to that, and so on."""

    def __init__(self, seed: bytes, length: int = CHAIN_LENGTH) -> None:
        elements = [seed]
        for _ in range(length):
            elements.append(_next(elements[-1]))
        self._elements = elements[::-1]

    @property
    def head(self) -> bytes:
        return self._elements[0]

    def reveal(self, index: int) -> bytes:
        """Raises UsageError where the chain is used up."""
        if not 0 <= index < len(self._elements) - 1:
            raise UsageError(
                f"this session was audited {len(self._elements) - 1} times, which is all that its challenges allow",
                "Audit another session",
            )
        return self._elements[index + 1]


def chain_of(identity: Identity, nonce: bytes) -> ChallengeChain:
    """The chain of the session whose terms have this nonce, which need not be stored: it follows from the coordinator's secret."""
    return ChallengeChain(tagged_hash("challenge-seed", identity.seed, nonce))


def check_reveal(head: bytes, index: int, reveal: bytes) -> None:
    """That `reveal` is element `index` of the chain with this head. Raises VerificationError."""
    if not 0 <= index < CHAIN_LENGTH:
        raise VerificationError(f"a chain of challenges has no element {index}")
    element = reveal
    for _ in range(index + 1):
        element = _next(element)
    if not head or element != head:
        raise VerificationError("the challenge is not of the chain that the session's terms name")


def challenge(receipt_id: bytes, reveal: bytes) -> bytes:
    """What decides on everything in an audit that somebody could want to choose."""
    return tagged_hash("challenge", receipt_id, reveal)


# --- what is to be shown ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell(Record):
    """Row `row` of step `step` in layer `layer`, counted from the stage's first, and attention of key-value head `head`.

    A `layer` one past the stage's last stands for what the last stage makes of its last layer: logits and the token drawn from
    them, or an encoder's vector. `row` and `head` are 0 then.
    """

    step: int = uint(STEPS_MAX)
    row: int = uint(2**24)
    layer: int = uint(LAYERS_MAX)
    head: int = uint(2**16)


def pick_cells(drawn: bytes, rows: Sequence[int], layers: int, kv_heads: int, result: bool, count: int) -> tuple[Cell, ...]:
    """The cells that a challenge asks for: `count` of all rows and layers alike, and at a last stage (`result`) one result more.

    `rows`: how many each step has. The same for everyone; numbers come from BLAKE3 of the challenge as an extendable function,
    eight bytes little-endian each, modulo what is to be chosen from.
    """
    if not rows or min(rows) < 1 or layers < 1 or kv_heads < 1 or not 0 < count <= CELLS_MAX:
        raise ValueError("there is nothing to pick from")
    numbers = struct.unpack(f"<{3 * count + 1}Q", blake3(b"nexus/v1/cells\0" + drawn).digest(8 * (3 * count + 1)))
    total = sum(rows)
    cells = []
    for at in range(0, 3 * count, 3):
        step, row = _locate(rows, numbers[at] % total)
        cells.append(Cell(step, row, numbers[at + 1] % layers, numbers[at + 2] % kv_heads))
    if result:
        cells.append(Cell(numbers[-1] % len(rows), 0, layers, 0))
    return tuple(cells)


def _locate(rows: Sequence[int], position: int) -> tuple[int, int]:
    for step, count in enumerate(rows):
        if position < count:
            return step, position
        position -= count
    raise ValueError("a position beyond the last row")


# --- messages ---------------------------------------------------------------------------------------------------------------

CELLS, ROW = "cells", "row"


@dataclass(frozen=True, slots=True)
class AuditRequest(Record):
    """The coordinator of a session asks one of its stages to show its work.

    `receipt`: the id of the stage's last receipt of the session, which leads to all before it. `index`, `reveal`: the element
    of the session's chain that is used up by this request. `kind` "cells": show the `count` cells that the challenge picks.
    `kind` "row": show the values of the one cell given, which a difference that the auditor found led to; the challenge picks
    nothing.
    """

    spec: int = uint(1, least=1)
    coordinator: bytes = raw(32)
    session: bytes = digest()
    stage: int = uint(4095)
    receipt: bytes = digest()
    index: int = uint(CHAIN_LENGTH - 1)
    reveal: bytes = raw(32)
    kind: str = text(8)
    count: int = uint(CELLS_MAX)
    cells: tuple[Cell, ...] = many(nested(Cell), 1)

    @property
    def id(self) -> bytes:
        return tagged_hash("audit-request", self.to_bytes())

    def check(self) -> None:
        """That its parts fit together. Raises MalformedError."""
        if (self.kind, bool(self.count), len(self.cells)) not in ((CELLS, True, 0), (ROW, False, 1)):
            raise MalformedError("an audit asks for a number of cells or for one cell")


@dataclass(frozen=True, slots=True)
class SignedAuditRequest(Record):
    request: AuditRequest = nested(AuditRequest)
    signature: bytes = raw(64)

    @classmethod
    def sign(cls, request: AuditRequest, coordinator: Identity) -> SignedAuditRequest:
        return cls(request, coordinator.sign_digest(request.id))

    def verify(self) -> AuditRequest:
        verify_digest(self.request.coordinator, "audit request", self.request.id, self.signature)
        self.request.check()
        return self.request


@dataclass(frozen=True, slots=True)
class OpenedRow(Record):
    """A leaf of a tree that a receipt commits to, and the way from it to the root."""

    data: bytes = raw(most=OPENING_BYTES_MAX)
    siblings: tuple[bytes, ...] = many(digest(), SIBLINGS_MAX)


@dataclass(frozen=True, slots=True)
class Sums(Record):
    """The integer sums of a linear operation before any scale, int32 little-endian; of a wide input those of hi, then those of
    lo."""

    data: bytes = raw(most=OPENING_BYTES_MAX)


@dataclass(frozen=True, slots=True)
class Opening(Record):
    """Everything on the way of one cell's row.

    `x`: what goes into the layer: the row of "down" of the layer before; at a stage's first layer the payload of the step,
    whose tree is that of `in_root` (empty at the first stage, whose inputs the coordinator knows). `values`: the rows of
    "qkv", "attention", "o", "gate_up" and "down"; `sums`: of the linears "qkv", "o", "gate_up" and "down". `context`: in an
    encoder, which keeps no log, the rows of "qkv" of the whole text, in order; `records`: in a decoder the log of the cell's
    head to the end of the window, one record after the other. `weights`: encoded `WeightProof`s of the embedding's rows, at
    the first layer of the first stage. `output`: at the stage's last layer the payload of the step, whose tree is that of
    `out_root`.

    Of a result cell there are `x`, the row of the last layer ("down", of an encoder the `context` rows instead), in `values`
    the logits and in `sums` those of the head, of a decoder, and `output`.
    """

    cell: Cell = nested(Cell)
    x: OpenedRow = nested(OpenedRow)
    values: tuple[OpenedRow, ...] = many(nested(OpenedRow), 5)
    sums: tuple[Sums, ...] = many(nested(Sums), 4)
    context: tuple[bytes, ...] = many(raw(most=OPENING_BYTES_MAX), CONTEXT_ROWS_MAX)
    records: bytes = raw(most=OPENING_BYTES_MAX)
    weights: tuple[bytes, ...] = many(raw(most=OPENING_BYTES_MAX), 4)
    output: OpenedRow = nested(OpenedRow)

    @property
    def id(self) -> bytes:
        return tagged_hash("opening", self.to_bytes())


@dataclass(frozen=True, slots=True)
class AuditAnswer(Record):
    """What a stage answers, and stands by: `openings` are the ids of what it sends after this, in the order of the cells."""

    spec: int = uint(1, least=1)
    request: bytes = digest()
    session: bytes = digest()
    receipt: bytes = digest()
    node: bytes = raw(32)
    stage: int = uint(4095)
    openings: tuple[bytes, ...] = many(digest(), CELLS_MAX + 1)

    @property
    def id(self) -> bytes:
        return tagged_hash("audit-answer", self.to_bytes())


@dataclass(frozen=True, slots=True)
class SignedAuditAnswer(Record):
    answer: AuditAnswer = nested(AuditAnswer)
    signature: bytes = raw(64)

    @classmethod
    def sign(cls, answer: AuditAnswer, node: Identity) -> SignedAuditAnswer:
        return cls(answer, node.sign_digest(answer.id))

    def verify(self) -> AuditAnswer:
        verify_digest(self.answer.node, "audit answer", self.answer.id, self.signature)
        return self.answer


def check_answer(signed: SignedAuditAnswer, request: AuditRequest, node: bytes, cells: int) -> AuditAnswer:
    """The answer, if it is the node's own and to this request. Raises VerificationError."""
    answer = signed.verify()
    asked = (request.id, request.session, request.receipt, node, request.stage)
    if (answer.request, answer.session, answer.receipt, answer.node, answer.stage) != asked or len(answer.openings) != cells:
        raise VerificationError("an answer came that is not to this audit")
    return answer


# --- what came of it --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StageAudit(Record):
    """What came of the audit of one stage. `steps`, `cells`: how much was checked: all steps by a replica, some cells by a
    light audit.
    `detail`: why there is no "ok", in a sentence. `evidence`: the id of the proof, where there is one."""

    stage: int = uint(4095)
    node: bytes = raw(32)
    mode: str = text(16)
    verdict: str = text(16)
    steps: int = uint(STEPS_MAX)
    cells: int = uint(CELLS_MAX + 1)
    cost_us: int = uint()
    evidence: bytes = optional_digest()
    detail: str = text(1024)


@dataclass(frozen=True, slots=True)
class AuditReport(Record):
    """One audit of one session. `at_ms`: when it ended. `index`: the first element of the session's chain that is not used up
    by it."""

    spec: int = uint(1, least=1)
    session: bytes = digest()
    at_ms: int = uint()
    index: int = uint(CHAIN_LENGTH)
    stages: tuple[StageAudit, ...] = many(nested(StageAudit), 256)

    @property
    def id(self) -> bytes:
        return tagged_hash("audit-report", self.to_bytes())
