"""Where a dishonest stage differs from an honest one: the one seam for attacks in tests and testnets.

`InferService` builds every served session through a `Conduct`. A node has `HONEST`; nothing that comes over the network changes it,
testnets and tests/attacks give others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from nexus.core.errors import NotFoundError
from nexus.core.record import Record
from nexus.node.signing import Signer
from nexus.swarm.session import StageSession

if TYPE_CHECKING:
    from pathlib import Path

    from nexus.core.manifest import Manifest
    from nexus.engine.stage import Stage
    from nexus.node.infer.messages import Open
    from nexus.proof.audit import Cell, Opening
    from nexus.proof.audit_check import AuditedStage


class Conduct(Protocol):
    """How a stage behaves in one session. Subclass `Honest` and change what the attack is about."""

    def stage(self, opened: Open, manifest: Manifest, stage: Stage) -> Stage:
        """Who computes and seals: other weights, other outputs, traces of what was not computed."""
        ...

    def machine(self, opened: Open, manifest: Manifest, node: bytes) -> StageSession:
        """Who decides what is checked, claimed in a receipt and said next."""
        ...

    def signer(self, opened: Open, signer: Signer) -> Signer:
        """Who signs: other receipts than were asked for, or several."""
        ...

    def send(self, opened: Open, message: Record, *, to_coordinator: bool) -> Sequence[Record]:
        """What goes out in place of a message to the coordinator, or else to the next stage: nothing, another one, or more."""
        ...

    def show(self, stage: Stage, subject: AuditedStage, cells: tuple[Cell, ...], files: dict[str, Path]) -> list[Opening]:
        """What an audit of a session is shown. `stage`: the model's own. Blocks; called in a thread."""
        ...


class Honest:
    def stage(self, opened: Open, manifest: Manifest, stage: Stage) -> Stage:
        return stage

    def machine(self, opened: Open, manifest: Manifest, node: bytes) -> StageSession:
        return StageSession(node, manifest, opened.plan, opened.terms, opened.request, opened.stage)

    def signer(self, opened: Open, signer: Signer) -> Signer:
        return signer

    def send(self, opened: Open, message: Record, *, to_coordinator: bool) -> Sequence[Record]:
        return (message,)

    def show(self, stage: Stage, subject: AuditedStage, cells: tuple[Cell, ...], files: dict[str, Path]) -> list[Opening]:
        from nexus.engine.exact.audit import answer
        from nexus.engine.exact.stage import ExactStage

        if not isinstance(stage, ExactStage):
            raise NotFoundError("the stage is not one of the exact profile")
        return answer(stage, subject, cells, files)


HONEST = Honest()
