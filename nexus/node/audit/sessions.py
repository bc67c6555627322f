"""The sessions of this node's users: kept when they end, audited then or later, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import structlog
import trio

from nexus.core.audits import CONVICTED, DUAL, MISMATCH, OK, OWN, REPLICA, UNAUDITED
from nexus.core.errors import CapacityError, LocalError, NexusError, NotFoundError
from nexus.core.keys import peer_id_of
from nexus.network.transport import PeerAddress
from nexus.node.api import AuditView, SessionSummary, SessionView, StageAuditView
from nexus.node.audit.asking import Auditor, next_index
from nexus.node.models import ProgressSink
from nexus.proof.audit import AuditReport, StageAudit
from nexus.proof.bundle import Bundle
from nexus.proof.trace import WindowTrace
from nexus.storage.sessions import KeptSession, SessionStore
from nexus.swarm.audit_policy import session_mode

log = structlog.get_logger("nexus.audit")

Traces = tuple[tuple[WindowTrace, ...], ...]


class SessionAudits:
    """`sources`: peers that may have a model's weights, by its root, and the nodes in reach. `names`: by peer id. `noted`: is told
    what an audit says of a stage's node."""

    def __init__(
        self,
        auditor: Auditor,
        store: SessionStore,
        sources: Callable[[bytes], Sequence[PeerAddress]],
        names: Callable[[], Mapping[str, str]],
        noted: Callable[[StageAudit], None],
        now_ms: Callable[[], int],
    ) -> None:
        self._auditor = auditor
        self._store = store
        self._sources = sources
        self._names = names
        self._noted = noted
        self._now_ms = now_ms

    def mode(self, asked: str | None) -> str:
        """How a session is audited where the user asked for this, or for nothing."""
        return session_mode(self._auditor.policy, asked)

    async def ended(self, bundle: Bundle, traces: Traces, asked: str | None) -> AuditView | None:
        """Keep a session that just ended, and audit it. None where nothing of it can be audited.

        A failure of this node is in the view: the answer is there, and its user learns that it is unaudited.
        """
        kept = await self._keep(bundle, traces)
        if kept is None:
            return None
        return self._view(await self._audited(kept, asked))

    async def compared(
        self, bundle: Bundle, traces: Traces, second: Bundle, second_traces: Traces, took_s: float
    ) -> AuditView | None:
        """Of a dual execution: the first run's answer, and what came of comparing it with the second's, which took `took_s`. Where
        they differ, both are computed again."""
        kept, other = await self._keep(bundle, traces), await self._keep(second, second_traces)
        if kept is None or other is None:
            return None
        if bundle.outputs == second.outputs:
            report = self._agreed(kept, took_s)
            await self._note(report)
            return self._view(report)
        log.warning("dual_differs", session=bundle.terms.session.hex()[:16], other=second.terms.session.hex()[:16])
        # Every node of both runs is suspected: whoever can be convicted will be.
        report, _ = await self._audited(kept, REPLICA), await self._audited(other, REPLICA)
        if all(stage.verdict in (OK, OWN) for stage in report.stages):
            return self._view(report)
        stages = tuple(
            stage
            if stage.verdict in (OK, CONVICTED, OWN)
            else replace(stage, mode=DUAL, verdict=MISMATCH, detail=f"the two runs differ; {stage.detail}"[:300])
            for stage in report.stages
        )
        return self._view(replace(report, stages=stages))

    def _agreed(self, kept: KeptSession, took_s: float) -> AuditReport:
        bundle = kept.bundle
        count = len(bundle.plan.stages)
        stages = tuple(
            StageAudit(number, stage.node, DUAL, OK, len(bundle.outputs), 0, int(took_s * 1e6) // count, b"", "")
            for number, stage in enumerate(bundle.plan.stages)
        )
        return AuditReport(1, bundle.terms.session, self._now_ms(), next_index(kept), stages)

    async def _keep(self, bundle: Bundle, traces: Traces) -> KeptSession | None:
        if not bundle.terms.challenge or not traces:
            return None
        try:
            await trio.to_thread.run_sync(self._store.keep_session, bundle, traces)
        except (LocalError, CapacityError) as error:
            log.warning("session_not_kept", session=bundle.terms.session.hex()[:16], reason=error.cause)
        return KeptSession(bundle, traces, self._now_ms(), ())

    async def _audited(self, kept: KeptSession, asked: str | None, progress: ProgressSink | None = None) -> AuditReport:
        try:
            report = await self._auditor.audit(kept, asked, self._sources(kept.bundle.plan.model_root), progress or _ignore)
        except NexusError as error:
            log.warning("audit_failed", session=kept.bundle.terms.session.hex()[:16], reason=error.cause)
            return self._failed(kept, self.mode(asked), error)
        await self._note(report)
        return report

    def _failed(self, kept: KeptSession, mode: str, error: NexusError) -> AuditReport:
        stages = tuple(
            StageAudit(number, stage.node, mode, UNAUDITED, 0, 0, 0, b"", error.cause[:300])
            for number, stage in enumerate(kept.bundle.plan.stages)
        )
        return AuditReport(1, kept.bundle.terms.session, self._now_ms(), next_index(kept), stages)

    async def _note(self, report: AuditReport) -> None:
        for stage in report.stages:
            self._noted(stage)
        try:
            await trio.to_thread.run_sync(self._store.note_audit, report)
        except (LocalError, CapacityError, NotFoundError) as error:
            log.warning("audit_not_noted", session=report.session.hex()[:16], reason=error.cause)

    # ---- later

    async def audit(self, prefix: str, mode: str, progress: ProgressSink) -> AuditView:
        """Audit a kept session. Raises NotFoundError, UsageError, and what the audit itself fails with."""
        kept = await trio.to_thread.run_sync(self._store.session, prefix)
        report = await self._auditor.audit(kept, mode, self._sources(kept.bundle.plan.model_root), progress)
        await self._note(report)
        return self._view(report)

    async def listed(self) -> list[SessionSummary]:
        found = await trio.to_thread.run_sync(self._store.sessions)
        return [SessionSummary(one.session, one.model_name, one.ended_ms, one.size, one.audits) for one in found]

    async def shown(self, prefix: str) -> SessionView:
        """Raises NotFoundError, UsageError."""
        kept = await trio.to_thread.run_sync(self._store.session, prefix)
        bundle = kept.bundle
        return SessionView(
            session=bundle.terms.session,
            model=bundle.model_name,
            model_root=bundle.plan.model_root,
            ended_ms=kept.ended_ms,
            steps=len(bundle.outputs),
            stages=len(bundle.plan.stages),
            audits=tuple(self._view(report) for report in kept.audits),
        )

    def _view(self, report: AuditReport) -> AuditView:
        names = self._names()
        return AuditView(
            session=report.session,
            at_ms=report.at_ms,
            stages=tuple(
                StageAuditView(
                    stage=stage.stage,
                    peer_id=peer_id_of(stage.node),
                    name=names.get(peer_id_of(stage.node), ""),
                    mode=stage.mode,
                    verdict=stage.verdict,
                    steps=stage.steps,
                    cells=stage.cells,
                    cost_s=stage.cost_us / 1e6,
                    evidence=stage.evidence,
                    detail=stage.detail,
                )
                for stage in report.stages
            ),
        )


async def _ignore(phase: str, done: int, total: int) -> None:
    """The answer is there: nobody waits to see an audit fetch something."""
