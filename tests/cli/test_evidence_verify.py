"""`nexus evidence verify` in a process of its own, on files alone: no daemon, no model, neither torch nor transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nexus.core.errors import NotFoundError, VerificationError
from nexus.proof.evidence import Evidence
from nexus.proof.evidence.operation import Proof
from tests.vectors.make_evidence import FILE

VECTORS = json.loads(FILE.read_text(encoding="utf-8"))
# What the process imported goes to stderr, behind what the command said.
PROGRAM = """
import sys
from nexus_cli.main import nexus, run_command
try:
    run_command(nexus)
finally:
    print("imported:", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, "--home", str(home), "evidence", "verify", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "name", ["OP: a whole value of the prompt, from embedding rows on", "FALSE-RESPONSE: sums", "EQUIVOCATION"]
)
def test_a_file_that_convicts(name: str, tmp_path: Path) -> None:
    entry = VECTORS["convict"][name]
    file = tmp_path / "proof.evidence"
    file.write_bytes(bytes.fromhex(entry["file"]))
    done = run(tmp_path / "no-home", str(file))
    assert done.returncode == 0, done.stderr
    assert "convicts: " in done.stdout
    assert entry["id"] in done.stdout
    imported = done.stderr.split("imported:")[1].split()
    assert not {"torch", "transformers", "trio", "libp2p"} & set(imported)
    shown = json.loads(run(tmp_path, "--json", str(file)).stdout)
    assert shown["convicts"] is True
    assert shown["verdict"]["kind"] == entry["kind"]
    assert shown["verdict"]["op"] == entry["op"]


def test_what_does_not_convict_ends_with_7(tmp_path: Path) -> None:
    file = tmp_path / "proof.evidence"
    contents = [bytes.fromhex(entry["file"]) for entry in list(VECTORS["convict nobody"].values())[-3:]]
    for content in (*contents, b"", b"anything", contents[0][:-1]):
        file.write_bytes(content)
        done = run(tmp_path, str(file))
        assert done.returncode == VerificationError.exit_code
        assert str(file) in done.stderr
    problem = json.loads(run(tmp_path, "--json", str(file)).stderr.splitlines()[0])
    assert problem["error"]["exit_code"] == VerificationError.exit_code


def test_files_that_are_not_there_or_lack_their_weights(tmp_path: Path) -> None:
    assert run(tmp_path, str(tmp_path / "none")).returncode == NotFoundError.exit_code
    assert run(tmp_path).returncode == 2
    evidence = Evidence.from_file(bytes.fromhex(VECTORS["convict"]["OP: logits"]["file"]))
    proof = Proof.from_bytes(evidence.body)
    file = tmp_path / "proof.evidence"
    file.write_bytes(replace(proof, weights=()).evidence().to_file())
    done = run(tmp_path / "no-home", str(file))
    assert done.returncode == NotFoundError.exit_code
    assert proof.case.terms.model_root.hex() in done.stderr
