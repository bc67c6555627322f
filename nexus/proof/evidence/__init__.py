"""Evidence: proofs that a node cheated, and the one function that says whether they convict (docs/evidence.md)."""

from nexus.proof.evidence.record import (
    CHAIN,
    EQUIVOCATION,
    EVIDENCE_BYTES_MAX,
    EXTENSION,
    FALSE_RESPONSE,
    FORK,
    GOSSIP_BYTES_MAX,
    KINDS,
    KV,
    OP,
    Evidence,
    Verdict,
)
from nexus.proof.evidence.verify import verify_evidence
from nexus.proof.evidence.weights import WeightSource

__all__ = [
    "CHAIN",
    "EQUIVOCATION",
    "EVIDENCE_BYTES_MAX",
    "EXTENSION",
    "FALSE_RESPONSE",
    "FORK",
    "GOSSIP_BYTES_MAX",
    "KINDS",
    "KV",
    "OP",
    "Evidence",
    "Verdict",
    "WeightSource",
    "verify_evidence",
]
