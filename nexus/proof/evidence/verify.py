"""Whether evidence convicts: one pure function, bounded before it starts."""

from __future__ import annotations

from nexus.core.errors import MalformedError, NexusError, NotFoundError, VerificationError
from nexus.proof.accounts import Fork
from nexus.proof.evidence.answer import answer_verdict
from nexus.proof.evidence.operation import operation_verdict
from nexus.proof.evidence.record import CHAIN, EQUIVOCATION, FALSE_RESPONSE, FORK, KV, OP, Evidence, Verdict
from nexus.proof.evidence.statements import chain_verdict, equivocation_verdict
from nexus.proof.evidence.weights import WeightSource


def verify_evidence(evidence: Evidence, weights: WeightSource | None = None) -> Verdict:
    """What the evidence proves, if it convicts the accused.

    Raises MalformedError for what is no evidence, VerificationError for evidence that does not convict, and NotFoundError, which
    names the model, where it takes weights that neither it nor `weights` has. Anyone may call it with anything: the time it takes
    is bounded (docs/evidence.md, "Bounds").
    """
    try:
        verdict = _verdict(evidence, weights)
    except (MalformedError, VerificationError, NotFoundError):
        raise
    except NexusError as error:
        # Whatever else stands in the way (values out of bounds, a plan that is none, an unreadable disk): nobody is convicted.
        raise VerificationError(f"the proof cannot be followed: {error.cause}", error.fix) from error
    if verdict.accused != evidence.accused:
        raise VerificationError("the proof is about another node than the one it accuses")
    return verdict


def _verdict(evidence: Evidence, weights: WeightSource | None) -> Verdict:
    if evidence.kind in (OP, KV):
        return operation_verdict(evidence, weights)
    if evidence.kind == EQUIVOCATION:
        return equivocation_verdict(evidence)
    if evidence.kind == CHAIN:
        return chain_verdict(evidence)
    if evidence.kind == FALSE_RESPONSE:
        return answer_verdict(evidence, weights)
    if evidence.kind == FORK:
        fork = Fork.from_bytes(evidence.body)
        return Verdict(fork.check(), FORK, evidence.id, fork.summary)
    raise VerificationError(f"evidence of the unknown kind {evidence.kind!r} convicts nobody")
