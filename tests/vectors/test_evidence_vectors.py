"""The committed evidence is what this implementation makes, and gets the verdicts that stand beside it."""

from __future__ import annotations

import json

import pytest

from nexus.core.errors import NexusError
from nexus.proof.evidence import KINDS, Evidence, verify_evidence
from tests.vectors.make_evidence import FILE, text_of

VECTORS = json.loads(FILE.read_text(encoding="utf-8"))


def test_the_evidence_is_unchanged() -> None:
    assert FILE.read_text(encoding="utf-8") == text_of()


@pytest.mark.parametrize("name", VECTORS["convict"])
def test_what_convicts(name: str) -> None:
    entry = VECTORS["convict"][name]
    evidence = Evidence.from_file(bytes.fromhex(entry["file"]))
    verdict = verify_evidence(evidence)
    assert evidence.id.hex() == verdict.evidence.hex() == entry["id"]
    assert (verdict.accused.hex(), verdict.session.hex(), verdict.kind) == (entry["accused"], entry["session"], entry["kind"])
    assert [getattr(verdict, key) for key in ("stage", "step", "layer", "op", "element")] == [
        entry[key] for key in ("stage", "step", "layer", "op", "element")
    ]


@pytest.mark.parametrize("name", VECTORS["convict nobody"])
def test_what_does_not(name: str) -> None:
    entry = VECTORS["convict nobody"][name]
    with pytest.raises(NexusError) as caught:
        verify_evidence(Evidence.from_file(bytes.fromhex(entry["file"])))
    assert caught.value.code == entry["error"]


def test_there_is_one_of_every_kind() -> None:
    assert {entry["kind"] for entry in VECTORS["convict"].values()} == set(KINDS)
