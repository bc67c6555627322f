"""The committed vectors are what this implementation produces, and what it accepts."""

from __future__ import annotations

import json

import pytest

from nexus.core.encoding import decode
from nexus.core.errors import MalformedError
from nexus.core.manifest import EXACT
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
