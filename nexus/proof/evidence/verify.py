"""Whether evidence convicts: one pure function, bounded before it starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from nexus.core.errors import VerificationError
from nexus.proof.accounts import Fork
from nexus.proof.evidence.record import FORK, Evidence, Verdict

if TYPE_CHECKING:
    from nexus.proof.arithmetic.rows import WeightProof


class WeightSource(Protocol):
    """Weight rows of models that the verifier has itself."""

    def range(self, model_root: bytes, piece: int, start: int, count: int) -> WeightProof:
        """Leaves [start, start + count) of a piece's tree of rows, proven. Raises NotFoundError where the model is not here."""
        ...


def verify_evidence(evidence: Evidence, weights: WeightSource | None = None) -> Verdict:
    """What the evidence proves, if it convicts the accused.

    Raises MalformedError for what is no evidence, VerificationError for evidence that does not convict, and NotFoundError, which
    names the model, where it takes weights that neither it nor `weights` has. Anyone may call it with anything: the time it takes
    is bounded (docs/evidence.md, "Bounds").
    """
    check = _CHECKS.get(evidence.kind)
    if check is None:
        raise VerificationError(f"evidence of the unknown kind {evidence.kind!r} convicts nobody")
    verdict = check(evidence, weights)
    if verdict.accused != evidence.accused:
        raise VerificationError("the proof is about another node than the one it accuses")
    return verdict


def _fork(evidence: Evidence, weights: WeightSource | None) -> Verdict:
    fork = Fork.from_bytes(evidence.body)
    account = fork.check()
    return Verdict(account, FORK, evidence.id, fork.summary)


_CHECKS: dict[str, Callable[[Evidence, WeightSource | None], Verdict]] = {FORK: _fork}
