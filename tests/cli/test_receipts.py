"""`nexus receipts verify` on files that somebody changed: nothing but the name, which nothing signs, can be changed unnoticed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from nexus.core.errors import NexusError, VerificationError
from nexus.proof.bundle import AnswerProof, Bundle
from nexus_cli.receipts import verify_file
from tests.cli.conftest import Cli
from tests.gateway.fake_node import bundle


def proof(*parts: Bundle) -> bytes:
    return AnswerProof(1, parts).to_bytes()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "proof"
    path.write_bytes(proof(bundle()))
    return path


def code_of(file: Path) -> int:
    """The exit code that the command would end with."""
    try:
        verify_file(file)
    except NexusError as error:
        return error.exit_code
    return 0


def test_no_byte_but_those_of_the_name_can_be_changed(file: Path) -> None:
    raw = file.read_bytes()
    unsigned = range(raw.index(b"nano"), raw.index(b"nano") + len(b"nano"))
    for at in range(len(raw)):
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        assert code_of(file) == (0 if at in unsigned else VerificationError.exit_code), at


def test_a_file_that_is_cut_off_or_longer_does_not_hold(file: Path) -> None:
    raw = file.read_bytes()
    for content in (b"", *(raw[:size] for size in range(1, len(raw), 7)), raw + b"\0", raw + raw):
        file.write_bytes(content)
        assert code_of(file) == VerificationError.exit_code


Forgery = Callable[[Bundle], Bundle]
FORGERIES: dict[str, Forgery] = {
    "a receipt is missing": lambda it: dataclasses.replace(it, receipts=it.receipts[:-1]),
    "all receipts are missing": lambda it: dataclasses.replace(it, receipts=()),
    "a receipt comes twice": lambda it: dataclasses.replace(it, receipts=(*it.receipts, it.receipts[-1])),
    "receipts are swapped": lambda it: dataclasses.replace(it, receipts=it.receipts[::-1]),
    "receipts of another session": lambda it: dataclasses.replace(it, receipts=bundle(3).receipts),
    "signatures are swapped": lambda it: dataclasses.replace(
        it,
        receipts=(dataclasses.replace(it.receipts[0], signature=it.receipts[1].signature), it.receipts[1]),
    ),
    "another answer": lambda it: dataclasses.replace(it, outputs=it.outputs[::-1]),
    "a shorter answer": lambda it: dataclasses.replace(it, outputs=it.outputs[:-1]),
    "no answer": lambda it: dataclasses.replace(it, outputs=()),
    "another prompt": lambda it: dataclasses.replace(it, inputs=(b"\1\0\0\0",)),
    "no prompt": lambda it: dataclasses.replace(it, inputs=()),
    "more steps than were asked for": lambda it: dataclasses.replace(it, terms=dataclasses.replace(it.terms, steps_max=1)),
    "terms without receipts": lambda it: dataclasses.replace(it, terms=dataclasses.replace(it.terms, window=0)),
    "requests are missing": lambda it: dataclasses.replace(it, requests=()),
    "requests are swapped": lambda it: dataclasses.replace(it, requests=it.requests[::-1]),
    "stages are swapped": lambda it: dataclasses.replace(it, plan=dataclasses.replace(it.plan, stages=it.plan.stages[::-1])),
    "another model": lambda it: dataclasses.replace(it, manifest=dataclasses.replace(it.manifest, context=1)),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_or_replayed_receipt_ends_with_exit_code_7(cli: Cli, file: Path, forgery: str) -> None:
    file.write_bytes(proof(FORGERIES[forgery](bundle())))
    result = cli("receipts", "verify", str(file))
    assert (result.code, result.out) == (7, "")
    assert "error: " in result.err


def test_a_name_that_nothing_signs_is_not_shown_as_proven(cli: Cli, file: Path) -> None:
    file.write_bytes(proof(dataclasses.replace(bundle(), model_name="gpt-9")))
    result = cli("receipts", "verify", str(file))
    assert result.code == 0
    assert "gpt-9 (by whoever wrote the file: nothing signs the name)" in result.out
