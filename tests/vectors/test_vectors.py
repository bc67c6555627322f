"""The committed vectors are what this implementation produces, and what it accepts."""

from __future__ import annotations

import json

import pytest

from nexus.core.encoding import decode
from nexus.core.errors import MalformedError
from nexus.proof.bundle import Bundle, verify_bundle
from nexus.proof.receipts import SignedReceipt
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


def test_what_the_vectors_call_no_encoding_is_refused() -> None:
    vectors = json.loads((DIRECTORY / "core.json").read_text(encoding="utf-8"))
    for data in vectors["not encodings"]:
        with pytest.raises(MalformedError):
            decode(bytes.fromhex(data))
