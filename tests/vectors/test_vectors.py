"""The committed vectors are what this implementation produces, and what it accepts."""

from __future__ import annotations

import json

import pytest

from nexus.core.encoding import decode
from nexus.core.errors import MalformedError
from nexus.core.manifest import EXACT
from nexus.memory.batch import SignedBatch, open_batch
from nexus.memory.block import decode_block, encode_block, parse_id
from nexus.memory.bracket import Receipt
from nexus.memory.collection import SignedCharter
from nexus.memory.sealing import unseal
from nexus.proof.accounts import SignedEntry
from nexus.proof.bundle import Bundle, verify_bundle
from nexus.proof.evidence import Evidence, verify_evidence
from nexus.proof.receipts import SignedReceipt
from nexus.proof.trace import TraceShape, WindowTrace, check_trace
from nexus.swarm.ledger import Book
from tests.vectors.make import DIRECTORY, FILES, text_of


@pytest.mark.parametrize("name", sorted(FILES))
def test_the_vectors_are_unchanged(name: str) -> None:
    assert (DIRECTORY / name).read_text(encoding="utf-8") == text_of(name)


def test_the_session_in_the_vectors_verifies() -> None:
    vectors = json.loads((DIRECTORY / "session.json").read_text(encoding="utf-8"))
    report = verify_bundle(Bundle.from_bytes(bytes.fromhex(vectors["bundle"])))
    assert (report.steps, report.receipts) == (18, 4)
    assert report.session.hex() == vectors["terms"]["session"]
    for entry in vectors["receipts"]:
        signed = SignedReceipt.from_bytes(bytes.fromhex(entry["bytes"]))
        assert signed.verify().id.hex() == entry["id"]
    assert verify_bundle(Bundle.from_bytes(bytes.fromhex(vectors["encoder bundle"]))).steps == 3


def test_the_traces_in_the_vectors_lead_to_the_roots_of_their_receipts() -> None:
    exact = json.loads((DIRECTORY / "session.json").read_text(encoding="utf-8"))["exact"]
    bundle = Bundle.from_bytes(bytes.fromhex(exact["bundle"]))
    assert verify_bundle(bundle).profile == EXACT
    for stage, (shape, traces) in enumerate(zip(exact["shapes"], exact["traces"], strict=True)):
        receipts = [signed.receipt for signed in bundle.receipts if signed.receipt.stage == stage]
        for receipt, trace in zip(receipts, traces, strict=True):
            shown = WindowTrace.from_bytes(bytes.fromhex(trace))
            check_trace(shown, TraceShape(**shape), receipt.n, receipt.trace_root, receipt.kv_root)


def test_what_the_vectors_call_no_encoding_is_refused() -> None:
    vectors = json.loads((DIRECTORY / "core.json").read_text(encoding="utf-8"))
    for data in vectors["not encodings"]:
        with pytest.raises(MalformedError):
            decode(bytes.fromhex(data))


def test_the_ledger_in_the_vectors_holds_and_its_fork_convicts() -> None:
    vectors = json.loads((DIRECTORY / "ledger.json").read_text(encoding="utf-8"))
    book = Book()
    for entry in vectors["entries"]:
        signed = SignedEntry.from_bytes(bytes.fromhex(entry["bytes"]))
        assert book.apply(signed).id.hex() == entry["id"]
    assert (book.totals().vault, book.totals().sum) == (16, 0)
    evidence = Evidence.from_file(bytes.fromhex(vectors["fork"]["file"]))
    verdict = verify_evidence(evidence)
    assert (verdict.evidence.hex(), verdict.peer_id) == (vectors["fork"]["id"], vectors["fork"]["accused"])


def test_the_blocks_in_the_vectors_open_and_say_what_was_sealed() -> None:
    vectors = json.loads((DIRECTORY / "memory.json").read_text(encoding="utf-8"))
    opened = open_batch(SignedBatch.from_bytes(bytes.fromhex(vectors["batch"])))
    assert [one.id.hex() for one in opened] == [block["id"] for block in vectors["blocks"]]
    assert [parse_id(block["cid"]).hex() for block in vectors["blocks"]] == [block["id"] for block in vectors["blocks"]]
    (part,) = open_batch(SignedBatch.from_bytes(bytes.fromhex(vectors["part of the batch"])))
    assert (part.place, part.id) == (1, opened[1].id)
    for charter in vectors["charters"]:
        assert SignedCharter.from_bytes(bytes.fromhex(charter["bytes"])).verify().id.hex() == charter["collection"]
    sealed = vectors["sealed"]
    content = unseal(decode_block(bytes.fromhex(sealed["bytes"])), {1: bytes.fromhex(sealed["key"])})
    assert encode_block(content).hex() == sealed["content"]
    receipt = Receipt.from_bytes(bytes.fromhex(vectors["receipt"]["bytes"]))
    attestation = receipt.verify(bytes.fromhex(vectors["receipt"]["block"]), receipt.signed.attestation.at_ms)
    assert attestation.id.hex() == vectors["attestations"][0]["id"]
