"""What a node says about itself: a signed record, newest wins, believed only until it expires."""

from __future__ import annotations

from dataclasses import dataclass

from nexus.core.errors import VerificationError
from nexus.core.keys import Identity, peer_id_of, verify_signature
from nexus.core.manifest import LAYERS_MAX
from nexus.core.record import Record, digest, many, nested, raw, text, uint

RECORD_BYTES_MAX = 32 * 1024
RECORD_LIFETIME_MS = 10 * 60 * 1000
CLOCK_SKEW_MS = 5 * 60 * 1000


@dataclass(frozen=True, slots=True)
class LayerRange(Record):
    """Layers [start, end)."""

    start: int = uint(LAYERS_MAX)
    end: int = uint(LAYERS_MAX)


@dataclass(frozen=True, slots=True)
class Holding(Record):
    """A model that this node has pieces of. `name` is what its owner calls it; the root is what it is."""

    name: str = text(64)
    model_root: bytes = digest()
    held: tuple[LayerRange, ...] = many(nested(LayerRange), 64)


@dataclass(frozen=True, slots=True)
class NodeRecord(Record):
    """`issued_ms`: Unix time, also the version: the newest record of a node wins. `memory_bytes`: what it offers to models.
    `speed`: measured, in millions of multiply-adds per second. `serves`: 1 where it takes stages for others."""

    spec: int = uint(1)
    node: bytes = raw(32)
    issued_ms: int = uint(2**53)
    agent: str = text(64)
    name: str = text(64)
    addresses: tuple[str, ...] = many(text(256), 16)
    memory_bytes: int = uint(2**56)
    speed: int = uint(2**48)
    serves: int = uint(1)
    models: tuple[Holding, ...] = many(nested(Holding), 256)

    @property
    def peer_id(self) -> str:
        return peer_id_of(self.node)


@dataclass(frozen=True, slots=True)
class SignedNodeRecord(Record):
    record: NodeRecord = nested(NodeRecord)
    signature: bytes = raw(64)

    @classmethod
    def sign(cls, record: NodeRecord, node: Identity) -> SignedNodeRecord:
        return cls(record, node.sign("node-record", record.to_bytes()))

    def verify(self, now_ms: int) -> NodeRecord:
        """The record, if its signature holds and it is neither expired nor from the future. Raises VerificationError."""
        verify_signature(self.record.node, "node-record", self.record.to_bytes(), self.signature)
        age = now_ms - self.record.issued_ms
        if age > RECORD_LIFETIME_MS or age < -CLOCK_SKEW_MS:
            raise VerificationError("the node record is expired or from the future")
        return self.record
