"""Whom this node works with, and what it shows of why: evidence, standings and the ledger, put together.

The parts are `nexus.node.evidence`, `nexus.node.standing` and `nexus.node.ledger`; here they are opened, run, asked and shown.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import structlog
import trio

from nexus.core.errors import LocalError, NexusError, NotAllowedError, NotFoundError, PeerError, UsageError
from nexus.core.keys import Identity, peer_id_of, public_key_of
from nexus.network.transport import Transport
from nexus.node.api import EntryView, EvidenceFile, EvidenceView, LedgerView, SlashedView
from nexus.node.environment import Environment
from nexus.node.evidence import EvidenceService
from nexus.node.ledger import Chain, LedgerService
from nexus.node.options import LedgerOptions
from nexus.node.standing import Standings
from nexus.proof.accounts import Entry
from nexus.proof.bundle import Bundle
from nexus.proof.evidence import Evidence, Verdict
from nexus.storage.evidence import EvidenceStore, StoredEvidence
from nexus.storage.home import Home
from nexus.storage.ledger import LedgerStore
from nexus.swarm.membership import NodeRecord
from nexus.swarm.standing import DEMOTED, GOOD, Fuse, Standing

log = structlog.get_logger("nexus.trust")

PREFIX_MIN = 4
DEMOTED_SLOWDOWN = 16
BELIEVED, WAITING, NOT_BELIEVED = "believed", "waiting", "not believed"


class Trust:
    """Opened by `open_trust`. `names`: what peers call themselves, by peer id. `price_max`: what other nodes may ask."""

    def __init__(
        self,
        identity: Identity,
        store: EvidenceStore,
        standings: Standings,
        evidence: EvidenceService,
        ledger: LedgerService,
        names: Callable[[], dict[str, str]],
        price_max: int,
    ) -> None:
        self._identity = identity
        self._store = store
        self.standings = standings
        self.evidence = evidence
        self.ledger = ledger
        self._names = names
        self._price_max = price_max

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Exchange evidence and payments until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.evidence.run)
            await nursery.start(self.ledger.run)
            task_status.started()

    def may_open(self, node: bytes) -> None:
        """Whether this node works for, and with, the one with this key. Raises NotAllowedError that says why not."""
        if node == self._identity.public_key:
            return
        standing = self.standings.of(node)
        if not standing.may_work:
            raise NotAllowedError(f"{peer_id_of(node)} is {standing.state}: {standing.cause}", "Plan without it")
        refusal = self.ledger.refusal(node)
        if refusal:
            raise NotAllowedError(refusal, "It takes payments at once: `nexus ledger` on that node shows what keeps it from paying")

    def workers(self, records: Iterable[NodeRecord]) -> list[NodeRecord]:
        """The nodes that may be planned with: neither convicted nor suspended, and not dearer than this node pays. One that is
        demoted counts as much slower than it says, so that it gets little where others can do the work."""
        found = []
        for record in records:
            if record.price > self._price_max and record.node != self._identity.public_key:
                continue
            standing = self.standings.of(record.node)
            if standing.state == DEMOTED:
                exact, floating = (max(1, speed // DEMOTED_SLOWDOWN) for speed in (record.exact_speed, record.float_speed))
                found.append(replace(record, exact_speed=exact, float_speed=floating))
            elif standing.may_work:
                found.append(record)
        return found

    # --- what sessions and audits come to ----------------------------------------------------------------------------------------

    async def settle(self, bundle: Bundle, prices: Mapping[bytes, int], forfeited: Collection[bytes]) -> None:
        """A session of this node's users is over and verified: note that its stages came to the end of it, and pay them.

        Call it once per session. `prices`: by node, as its record said when the plan was made. `forfeited`: stages that were proven
        wrong or did not answer an audit. That a payment fails is logged: the answer stands.
        """
        for stage in bundle.plan.stages:
            if stage.node != self._identity.public_key:
                self.standings.note_run(stage.node)
        # A record may have changed since: nobody is paid more than was meant to be.
        due = {node: min(price, self._price_max) for node, price in prices.items()}
        try:
            await self.ledger.pay_for(bundle, due, forfeited)
        except NexusError as error:
            log.warning("session_not_paid", session=bundle.terms.session.hex()[:16], reason=error.cause, fix=error.fix)

    # --- what is shown -----------------------------------------------------------------------------------------------------------

    async def evidence_views(self) -> list[EvidenceView]:
        listed = await trio.to_thread.run_sync(self._store.listed)
        return [self._kept(stored) for stored in listed] + [self._waiting(*pending) for pending in self.evidence.pending]

    async def evidence_view(self, prefix: str) -> EvidenceView:
        """Raises NotFoundError, UsageError."""
        return _one(await self.evidence_views(), prefix)

    async def evidence_file(self, prefix: str) -> EvidenceFile:
        """Raises NotFoundError, UsageError, LocalError."""
        view = await self.evidence_view(prefix)
        waiting = {evidence.id: evidence for evidence, _ in self.evidence.pending}
        if view.id in waiting:
            return EvidenceFile(view.id, waiting[view.id].to_file())
        content = await trio.to_thread.run_sync(self._store.content, view.id)
        if content is None:
            raise NotFoundError(f"the evidence {prefix!r} is not here any more", "`nexus evidence list` shows what is")
        return EvidenceFile(view.id, Evidence.from_bytes(content).to_file())

    async def slashed_views(self) -> list[SlashedView]:
        names, convicted = self._names(), self.standings.slashed
        views = []
        for stored in await trio.to_thread.run_sync(self._store.listed):
            if convicted.evidence_of(stored.offender) != stored.id:
                continue
            verdict, peer_id = self.evidence.verdict(stored.id), peer_id_of(stored.offender)
            views.append(
                SlashedView(
                    peer_id=peer_id,
                    name=names.get(peer_id, ""),
                    state=self.standings.of(stored.offender).state,
                    kind=stored.kind,
                    evidence=stored.id,
                    known_ms=stored.known_ms,
                    summary=verdict.summary if verdict is not None else _UNREPEATED,
                )
            )
        return views

    async def resume_burning(self) -> int:
        burned = await trio.to_thread.run_sync(self.standings.resume)
        log.warning("burning_resumed", bonds=burned)
        return burned

    async def ledger_view(self, peer_id: str, price: int) -> LedgerView:
        """Raises PeerError, TimedOutError where the account cannot be read, VerificationError where it does not hold."""
        node = public_key_of(peer_id)
        chain = await self.ledger.fetch(peer_id)
        standing, tally, account = self.standings.of(node), self.standings.tally(node), chain.account
        own = peer_id == self._identity.peer_id
        if own and standing.may_work:
            standing = Standing(GOOD)  # a node does not audit itself: all that counts is whether it is convicted
        return LedgerView(
            peer_id=peer_id,
            name=self._names().get(peer_id, ""),
            standing=standing.state,
            cause=standing.cause,
            until_ms=standing.until_ms,
            balance=account.balance,
            bond=0 if node in self.standings.burned else account.bond,
            earned=account.earned,
            paid=account.paid,
            entries=chain.entries,
            checked=account.entries,
            owed=self.ledger.owed(node),
            audits_ok=tally.audits_ok,
            audits_bad=tally.audits_bad,
            reputation=tally.reputation,
            price=price,
            frozen=self.ledger.frozen if own else "",
            chain=entry_views(chain),
        )

    def _kept(self, stored: StoredEvidence) -> EvidenceView:
        verdict = self.evidence.verdict(stored.id)
        believed = self.standings.slashed.evidence_of(stored.offender) == stored.id
        return self._view(
            stored.id,
            stored.kind,
            stored.offender,
            stored.known_ms,
            stored.sender,
            stored.size,
            BELIEVED if believed else NOT_BELIEVED,
            verdict,
        )

    def _waiting(self, evidence: Evidence, sender: bytes) -> EvidenceView:
        return self._view(evidence.id, evidence.kind, evidence.accused, 0, sender, len(evidence.to_bytes()), WAITING, None)

    def _view(
        self, id: bytes, kind: str, accused: bytes, known_ms: int, sender: bytes, size: int, state: str, verdict: Verdict | None
    ) -> EvidenceView:
        peer_id = peer_id_of(accused)
        summary = {
            BELIEVED: _UNREPEATED,
            WAITING: "nothing yet: it takes weights of a model that is not here",
            NOT_BELIEVED: "nothing: it did not hold when it was verified again; the daemon's log says why",
        }[state]
        return EvidenceView(
            id=id,
            kind=kind,
            accused=peer_id,
            name=self._names().get(peer_id, ""),
            known_ms=known_ms,
            sender=peer_id_of(sender) if sender else "",
            size=size,
            state=state,
            summary=verdict.summary if verdict is not None else summary,
            session=verdict.session if verdict is not None else b"",
            model_root=verdict.model_root if verdict is not None else b"",
            stage=verdict.stage if verdict is not None else None,
            step=verdict.step if verdict is not None else None,
            layer=verdict.layer if verdict is not None else None,
            op=verdict.op if verdict is not None else "",
        )


_UNREPEATED = "verified when it came; not again since this node started, for want of the model's weights or of time"


def entry_views(chain: Chain) -> tuple[EntryView, ...]:
    def view(entry: Entry) -> EntryView:
        return EntryView(
            entry.seq, entry.kind, entry.amount, entry.session, tuple(peer_id_of(share.account) for share in entry.shares)
        )

    return tuple(view(signed.entry) for signed in chain.latest)


def _one(views: list[EvidenceView], prefix: str) -> EvidenceView:
    """The one evidence that a user means by the start of its id."""
    fits = [view for view in views if len(prefix) >= PREFIX_MIN and view.id.hex().startswith(prefix.lower())]
    if len(fits) > 1:
        raise UsageError(f"{prefix!r} fits {len(fits)} pieces of evidence", "Give more of the id")
    if not fits:
        raise NotFoundError(f"no evidence {prefix!r} is kept here", "`nexus evidence list` shows what is; give at least 4 digits")
    return fits[0]


@asynccontextmanager
async def open_trust(
    home: Home,
    identity: Identity,
    transport: Transport,
    options: LedgerOptions,
    probation_sessions: int,
    verify: Callable[[Evidence], Verdict],
    names: Callable[[], dict[str, str]],
    environment: Environment,
) -> AsyncIterator[Trust]:
    """Files open, kept evidence verified again, the own account read; `run` comes next. `verify`: as `verify_evidence`, blocking.

    A ledger that cannot be used is no reason not to start: it is frozen, and says so. Raises LocalError for evidence.db.
    """
    async with AsyncExitStack() as stack:
        store = EvidenceStore(home.evidence_file)
        stack.callback(store.close)
        fuse = Fuse(options.burn_max, round(options.burn_window_s * 1000))
        standings = Standings(store, fuse, probation_sessions, environment.now_ms)
        stack.callback(_save, standings)
        evidence = EvidenceService(
            transport,
            identity.public_key,
            store,
            standings,
            verify,
            environment,
            is_known=lambda node: peer_id_of(node) in names(),
        )
        accounts, frozen = _open_ledger(home, identity)
        if accounts is not None:
            stack.callback(accounts.close)
        ledger = LedgerService(
            transport,
            identity,
            accounts,
            options.price_per_token,
            options.credit_max,
            standings.is_slashed,
            evidence.submit,
            frozen,
        )
        stack.callback(ledger.save)
        await evidence.load()
        await ledger.load()
        yield Trust(identity, store, standings, evidence, ledger, names, options.price_max)


def _open_ledger(home: Home, identity: Identity) -> tuple[LedgerStore | None, str]:
    try:
        return LedgerStore(home.ledger_file, identity.public_key), ""
    except LocalError as error:
        log.error("ledger_frozen", reason=error.cause, fix=error.fix)
        return None, f"{error.cause}. {error.fix}"


def _save(standings: Standings) -> None:
    try:
        standings.save()
    except (LocalError, PeerError) as error:
        log.warning("standings_not_saved", reason=error.cause)
