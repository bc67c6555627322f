"""What must hold of a swarm at every moment, whatever befalls it, and what must hold again once nothing does.

A check reads the nodes' own state and what is on their disks; it changes nothing.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Collection, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import structlog
import trio

from nexus.core.audits import CONVICTED, LIGHT, OK, OWN
from nexus.core.errors import NexusError
from nexus.core.keys import public_key_of
from nexus.engine.stage import Stage, load_stage
from nexus.node.api import AuditView, Finished, Planned
from nexus.node.membership import STRANGERS_MAX
from nexus.proof.accounts import SignedEntry
from nexus.proof.arithmetic.sampler import Sampling
from nexus.proof.bundle import Bundle, verify_bundle
from nexus.proof.receipts import tokens_from_bytes
from nexus.simulation.cluster import Cluster, Member
from nexus.simulation.model import LAYERS, ModelFiles
from nexus.swarm.standing import SLASHED, SUSPENDED

_SESSION = bytes(32)


@dataclass(frozen=True, slots=True)
class Violation:
    """`rule`: which of the invariants; `what`: in words, with the nodes that it is about."""

    at_s: float
    rule: str
    what: str


class Reference:
    """What the model itself answers: computed on all layers at once, by the engine."""

    def __init__(self, model: ModelFiles) -> None:
        self._stage: Stage = load_stage(model.manifest, 0, LAYERS, model.stage_files(0, LAYERS))
        self._known: dict[tuple[bytes, Sampling], list[bytes]] = {}

    def outputs(self, bundle: Bundle) -> list[bytes]:
        sampling = Sampling.of(bundle.terms)
        fed = bundle.inputs[0]
        known = self._known.setdefault((fed, sampling), [])
        if len(known) < len(bundle.outputs):
            self._stage.open(_SESSION, sampling)
            try:
                known.clear()
                for _ in bundle.outputs:
                    fed = self._stage.step(_SESSION, fed)
                    known.append(fed)
            finally:
                self._stage.close(_SESSION)
        return known[: len(bundle.outputs)]


@dataclass
class Acknowledged:
    """What others were given by a node, and may rely on. Receipts: (session, stage, step0, question) -> id. Entries of its account
    by number."""

    receipts: dict[tuple[bytes, int, int], bytes] = field(default_factory=dict)


class Checker:
    def __init__(self, cluster: Cluster, reference: Reference) -> None:
        self._cluster = cluster
        self._reference = reference
        self._acknowledged: dict[int, Acknowledged] = {}
        self._by_key = {member.identity.public_key: member for member in cluster.members}
        self.violations: list[Violation] = []
        self.looked = 0

    def fail(self, rule: str, what: str) -> None:
        if len(self.violations) < 100:
            self.violations.append(Violation(trio.current_time(), rule, what))

    async def run(self, troubled: Collection[int]) -> None:
        """Look at every node, again and again."""
        while True:
            self.look(troubled)
            await trio.sleep(1.0)

    def look(self, troubled: Collection[int]) -> None:
        self.looked += 1
        for member in self._cluster.members:
            if member.is_on and member.honest:
                self._standings_of(member, troubled)
                self._bounds_of(member)
        for member, error in self._cluster.broken:
            self.fail("no node breaks", f"{member.name}: {_root_of(error)!r}")
        self._cluster.broken.clear()

    # --- no honest node is convicted -------------------------------------------------------------------------------------------

    def _standings_of(self, observer: Member, troubled: Collection[int]) -> None:
        assert observer.trust is not None
        for subject in self._cluster.members:
            if not subject.honest:
                continue
            state = observer.trust.standings.of(subject.identity.public_key).state
            # A machine that is off, or cut off, may be called silent by a quorum: that is what suspension is for.
            if state == SLASHED or (state == SUSPENDED and subject.number not in troubled):
                self.fail("no honest node is slashed", f"{observer.name} holds {subject.name} for {state}")

    # --- bounds ----------------------------------------------------------------------------------------------------------------

    def _bounds_of(self, member: Member) -> None:
        node = member.node
        assert node is not None
        status = node.status()
        for what, value, most in (
            ("sessions", node._infer.live.count, node._options.sessions_max),
            ("memory", status.memory_used_bytes, status.memory_limit_bytes),
            ("strangers", len(node._membership._strangers), STRANGERS_MAX),
        ):
            if value > most:
                self.fail("every bound is kept", f"{member.name}: {what} {value} of {most}")

    # --- what a request shows --------------------------------------------------------------------------------------------------

    def planned(self, asker: Member, planned: Planned) -> None:
        at = 0
        for stage in planned.plan.stages:
            if stage.start != at or stage.end <= stage.start:
                break
            at = stage.end
        if at != LAYERS:
            self.fail("a plan covers every layer", f"{asker.name}: {[(one.start, one.end) for one in planned.plan.stages]}")

    def finished(self, asker: Member, done: Finished, shown: Sequence[int]) -> None:
        """`shown`: the tokens as they came, the one that ends the answer left out."""
        parts = [(part.bundle, part.audit) for part in done.earlier] + [(done.bundle, done.audit)]
        outputs = [output for bundle, _ in parts for output in bundle.outputs]
        if list(shown) != [token for payload in outputs for token in tokens_from_bytes(payload)][: len(shown)]:
            self.fail("what was shown is what is proven", f"{asker.name}: session {done.bundle.terms.session.hex()[:12]}")
        read = parts[0][0].inputs[0]
        for bundle, audit in parts:
            if bundle.inputs[0] != read:
                self.fail("an answer goes on where it was", f"{asker.name}: session {bundle.terms.session.hex()[:12]}")
            read += b"".join(bundle.outputs)
            self._part(asker, bundle, audit)

    def _part(self, asker: Member, bundle: Bundle, audit: AuditView | None) -> None:
        try:
            verify_bundle(bundle)
        except NexusError as error:
            self.fail("receipts hold", f"{asker.name}: {error.cause}")
        self._receipts(asker, bundle)
        nodes = [self._by_key[stage.node] for stage in bundle.plan.stages]
        verdicts = {public_key_of(stage.peer_id): stage for stage in audit.stages} if audit is not None else {}
        if list(bundle.outputs) != self._reference.outputs(bundle):
            if all(node.honest for node in nodes):
                self.fail("honest nodes answer rightly", f"{asker.name}: {[node.name for node in nodes]}")
            if verdicts and all(one.verdict in (OK, OWN) and one.mode != LIGHT for one in verdicts.values()):
                self.fail("no wrong token is shown as verified", f"{asker.name}: {[node.name for node in nodes]}")
        for node in nodes:
            found = verdicts.get(node.identity.public_key)
            if found is not None and found.verdict == CONVICTED and node.honest:
                self.fail("no honest node is slashed", f"{asker.name}: {node.name}, {found.detail}")

    def _receipts(self, asker: Member, bundle: Bundle) -> None:
        """Without the verifier that the node uses itself: that each is of this session and of the node that the plan names."""
        for signed in bundle.receipts:
            receipt = signed.receipt
            signer = bundle.plan.stages[receipt.stage].node if receipt.stage < len(bundle.plan.stages) else b""
            if receipt.session != bundle.terms.session or receipt.node != signer:
                self.fail("no receipt of another session counts", f"{asker.name}: one of session {receipt.session.hex()[:12]}")
                continue
            member = self._by_key[receipt.node]
            if member.honest:
                given = self._acknowledged.setdefault(member.number, Acknowledged())
                given.receipts[receipt.session, receipt.stage, receipt.step0] = receipt.id

    # --- durability ------------------------------------------------------------------------------------------------------------

    def crashed(self, member: Member) -> None:
        """A machine is off: what others were given by it must be on its disk."""
        if not member.honest:
            return
        self._receipts_on_disk(member)
        self._entries_on_disk(member)

    def _receipts_on_disk(self, member: Member) -> None:
        given = self._acknowledged.get(member.number)
        if given is None:
            return
        with member.disk.database(member.home.sessions_file) as connection:
            kept = _rows(connection, "SELECT session, stage, step0 FROM receipt")
            forgotten = _rows(connection, "SELECT session, stage FROM forgotten")
        lost = [key for key in given.receipts if key not in kept and key[:2] not in forgotten]
        if lost:
            self.fail(
                "no acknowledged write is lost",
                f"{member.name}: {len(lost)} of {len(given.receipts)} receipts that others have are not on its disk after a crash",
            )

    def _entries_on_disk(self, member: Member) -> None:
        key = member.identity.public_key
        with member.disk.database(member.home.ledger_file) as connection:
            kept = {seq: bytes(content) for seq, content in _rows(connection, "SELECT seq, content FROM chain")}
        for other in self._cluster.members:
            if other is member or not other.honest:
                continue
            with other.disk.database(other.home.ledger_file) as connection:
                seen = _rows(connection, "SELECT seq, content FROM seen WHERE account = ?", key)
            for seq, content in seen:
                entry = SignedEntry.from_bytes(bytes(content)).entry
                if seq not in kept:
                    self.fail("no acknowledged write is lost", f"{member.name}: entry {seq} of its account, which {other.name} has")
                    return
                if SignedEntry.from_bytes(kept[seq]).entry != entry:
                    self.fail("no honest node contradicts itself", f"{member.name}: entry {seq} of its account, for {other.name}")
                    return

    # --- once nothing befalls it any more --------------------------------------------------------------------------------------

    def apart(self, members: Sequence[Member]) -> list[str]:
        """Who does not know whom, of nodes that are on and whose clocks are right; and convictions that not all of them know."""
        found = []
        for one in members:
            assert one.node is not None
            known = {record.node for record in one.node._membership.records()}
            missing = [other.name for other in members if other is not one and other.identity.public_key not in known]
            if missing:
                found.append(f"{one.name} does not know {', '.join(missing[:4])}")
        convicted = {one.number: self._convicted_by(one) for one in members}
        everybody = set().union(*convicted.values()) if convicted else set()
        for one in members:
            lacks = sorted(everybody - convicted[one.number])
            if lacks:
                found.append(f"{one.name} has not heard that {', '.join(lacks[:4])} cheated")
        return found

    def _convicted_by(self, observer: Member) -> set[str]:
        assert observer.trust is not None
        return {
            subject.name
            for subject in self._cluster.members
            if not subject.honest and observer.trust.standings.is_slashed(subject.identity.public_key)
        }


def _rows(connection: sqlite3.Connection, query: str, *cells: bytes) -> set[Any]:
    """Of a machine that was never on long enough to make its tables: none."""
    if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        return set()
    return set(connection.execute(query, cells).fetchall())


def _root_of(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@contextmanager
def logged_errors(checker: list[str], show: bool) -> Iterator[None]:
    """What nodes log as exceptions are bugs that they survived: each is noted in `checker`. `show`: all that they log goes to
    stderr."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info:
                checker.append(f"{record.getMessage()}: {record.exc_info[1]!r}")

    def note(logger: object, method: str, event: MutableMapping[str, Any]) -> Any:
        if method == "exception" or event.get("exc_info"):
            checker.append(f"{event.get('event')}: {event.get('exc_info')!r}")
        if not show:
            raise structlog.DropEvent
        event["at"] = f"{trio.current_time():.3f}"
        return structlog.dev.ConsoleRenderer(colors=False)(logger, method, event)

    before = structlog.get_config()
    level = logging.DEBUG if show else logging.ERROR
    structlog.configure(
        processors=[note], wrapper_class=structlog.make_filtering_bound_logger(level), cache_logger_on_first_use=False
    )
    handler, root = Handler(level=logging.ERROR), logging.getLogger("nexus")
    was = root.level, root.propagate
    root.addHandler(handler)
    root.setLevel(level)
    root.propagate = show
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(was[0])
        root.propagate = was[1]
        structlog.configure(**before)
