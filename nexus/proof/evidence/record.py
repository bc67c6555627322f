"""The form of evidence: one signed-for contradiction in one file, and what a verdict on it says."""

from __future__ import annotations

from dataclasses import dataclass

from nexus.core.errors import MalformedError
from nexus.core.hashing import tagged_hash
from nexus.core.keys import peer_id_of
from nexus.core.record import Record, raw, text, uint

OP, EQUIVOCATION, CHAIN, KV, FALSE_RESPONSE, FORK = "OP", "EQUIVOCATION", "CHAIN", "KV", "FALSE-RESPONSE", "FORK"
KINDS = (OP, EQUIVOCATION, CHAIN, KV, FALSE_RESPONSE, FORK)
# A proof may carry the rows of one operation on a long prompt, and the weights that go with it.
EVIDENCE_BYTES_MAX = 64 * 1024 * 1024
# What a node passes on unasked.
GOSSIP_BYTES_MAX = 8 * 1024 * 1024
EXTENSION = ".evidence"
MAGIC = b"nexus evidence 1\n"


@dataclass(frozen=True, slots=True)
class Evidence(Record):
    """`accused`: the public key of who is said to have cheated. `body`: the record of the kind (docs/evidence.md).

    Nobody signs evidence: whoever brings it, it convicts by itself or not at all.
    """

    spec: int = uint(1, least=1)
    kind: str = text(16)
    accused: bytes = raw(32)
    body: bytes = raw(most=EVIDENCE_BYTES_MAX)

    @property
    def id(self) -> bytes:
        return tagged_hash("evidence", self.to_bytes())

    @property
    def peer_id(self) -> str:
        """Of the accused."""
        return peer_id_of(self.accused)

    def to_file(self) -> bytes:
        """The content of an evidence file."""
        return MAGIC + self.to_bytes()

    @classmethod
    def from_file(cls, content: bytes) -> Evidence:
        """Raises MalformedError for anything but the one file of an evidence."""
        if len(content) > EVIDENCE_BYTES_MAX:
            raise MalformedError(f"{len(content)} bytes are more than evidence may have")
        if not content.startswith(MAGIC):
            raise MalformedError("it does not begin as evidence does")
        return cls.from_bytes(content[len(MAGIC) :])


@dataclass(frozen=True, slots=True)
class Verdict:
    """Evidence that convicts. `accused`: public key. `evidence`: its id. `summary`: what was done, in words.

    `session` is empty for a FORK. `stage`, `step`, `layer` (of the whole model), `op` and, where one row was opened, `element`, the
    first wrong one, say where; None or empty where nothing fits.
    """

    accused: bytes
    kind: str
    evidence: bytes
    summary: str
    session: bytes = b""
    model_root: bytes = b""
    stage: int | None = None
    step: int | None = None
    layer: int | None = None
    op: str = ""
    element: int | None = None

    @property
    def peer_id(self) -> str:
        """Of the accused."""
        return peer_id_of(self.accused)
