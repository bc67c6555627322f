"""This node's account and its payments, `/nexus/ledger/1`. Both ends are here.

A coordinator pays for a session when it has verified it: it appends a PAY entry to its own account, durably, and offers it to
every stage that has a share. A stage reads what it does not know yet of the payer's chain, up to that entry, appends an EARN entry
to its own account, durably, and sends that back. An offer that is lost is made again; one that was taken is answered with the same
entry. Anyone may read a node's chain, page by page, and checks it as it comes.

A node signs every number of its account once. Should its data come from an old backup, others hold entries that it does not know:
before it signs anything it asks every node that it is connected to, once, and signs nothing if one of them shows such an entry.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import structlog
import trio

from nexus.core.errors import (
    CapacityError,
    LocalError,
    MalformedError,
    NexusError,
    PeerError,
    RefusedError,
    TimedOutError,
    UnreachableError,
    VerificationError,
)
from nexus.core.keys import Identity, peer_id_of, public_key_of
from nexus.core.manifest import CAUSAL
from nexus.core.record import MessageSet, Record, many, nested, raw, text, uint
from nexus.network.limits import TokenBucket
from nexus.network.transport import ProtocolSpec, Stream, Transport
from nexus.node.evidence import Offload, in_thread
from nexus.proof.accounts import EARN, PAY, SEQ_MAX, STAGES_PERCENT, Entry, SignedEntry
from nexus.proof.bundle import Bundle
from nexus.proof.evidence import FORK, Evidence
from nexus.storage.ledger import ChainItem, LedgerStore
from nexus.swarm.ledger import Account, Tabs, check_chain, earn_entry, in_credits, pay_entry, session_cost

log = structlog.get_logger("nexus.ledger")

T = TypeVar("T")

PAGE_MAX = 64
FETCH_ENTRIES_MAX = 16_384
FETCH_TIMEOUT_S = 60.0
EXCHANGE_TIMEOUT_S = 15.0
ASK_TIMEOUT_S = 5.0
SERVE_TIMEOUT_S = 120.0
REQUESTS_MAX = 512
OFFERS_AT_ONCE = 4
OFFER_EVERY_S = 60.0
OFFERS_PER_ROUND = 64
SAVE_EVERY_S = 30.0
PEERS_MAX = 1024
# Accounts of payers, and payments of theirs to this node, that need not be read again.
PAYERS_MAX = 256
PAID_MAX = 16_384
# Of one peer: payments per second, each of which is a durable write here, as is every page of its chain that is read for one, and
# what it may save up; bytes of chains sent to it.
PAYMENTS_PER_S = 0.5
PAYMENTS_BURST = 32.0
SERVED_BYTES_PER_S = 256 * 1024
SERVED_BYTES_BURST = 4 * 1024 * 1024
SHOWN_MAX = 100

LEDGER = ProtocolSpec(
    "/nexus/ledger/1", frame_max=1024 * 1024, first_frame_max=32 * 1024, read_timeout_s=10.0, streams_per_peer_max=4
)


@dataclass(frozen=True, slots=True)
class Pay(Record):
    """The sender's PAY entry, with a share for the receiver."""

    entry: SignedEntry = nested(SignedEntry)


@dataclass(frozen=True, slots=True)
class Earned(Record):
    """The EARN entry that takes it."""

    entry: SignedEntry = nested(SignedEntry)


@dataclass(frozen=True, slots=True)
class Declined(Record):
    """The payment is not taken, and will not be if it is offered again."""

    cause: str = text(512)


@dataclass(frozen=True, slots=True)
class HeadAsk(Record):
    """The newest entry that the receiver knows of this account."""

    account: bytes = raw(32)


@dataclass(frozen=True, slots=True)
class Head(Record):
    entry: tuple[SignedEntry, ...] = many(nested(SignedEntry), 1)


@dataclass(frozen=True, slots=True)
class ChainAsk(Record):
    """The receiver's own account, from entry number `start` on."""

    start: int = uint(SEQ_MAX)


@dataclass(frozen=True, slots=True)
class PageItem(Record):
    """An entry; of EARN also the payment that it takes from."""

    entry: SignedEntry = nested(SignedEntry)
    payment: tuple[SignedEntry, ...] = many(nested(SignedEntry), 1)


@dataclass(frozen=True, slots=True)
class ChainPage(Record):
    """`entries`: how many the account has by now, so that the reader knows how far it is."""

    items: tuple[PageItem, ...] = many(nested(PageItem), PAGE_MAX)
    entries: int = uint(SEQ_MAX + 1)


MESSAGES = MessageSet(Pay, Earned, Declined, HeadAsk, Head, ChainAsk, ChainPage)


@dataclass(frozen=True, slots=True)
class Chain:
    """An account as far as it was read and checked. `latest`: its newest entries, the oldest of them first. `entries`: how many it
    says it has; less were checked where it is longer than FETCH_ENTRIES_MAX."""

    account: Account
    latest: tuple[SignedEntry, ...]
    entries: int

    @property
    def complete(self) -> bool:
        return self.account.entries == self.entries


@dataclass(slots=True)
class _Peer:
    payments: TokenBucket
    served: TokenBucket


class LedgerService:
    """`store` None: this node's ledger cannot be used, `frozen` says why; sessions run all the same, unpaid.

    `price`: micro-credits per token and layer. `credit`: micro-credits that a coordinator may owe this node; 0 is no limit.
    `is_slashed`: by public key. `report`: takes evidence of a fork, as `EvidenceService.submit` does.
    """

    def __init__(
        self,
        transport: Transport,
        identity: Identity,
        store: LedgerStore | None,
        price: int,
        credit: int,
        is_slashed: Callable[[bytes], bool],
        report: Callable[[Evidence], Awaitable[object]],
        frozen: str = "",
        offload: Offload = in_thread,
    ) -> None:
        self._transport = transport
        self._identity = identity
        self._store = store
        self.price = price
        self._credit = credit
        self._is_slashed = is_slashed
        self._report = report
        self.frozen = frozen
        self._offload = offload
        self._account = Account(identity.public_key)
        self._tabs = Tabs()
        self._tabs_changed = False
        self._appending = trio.Lock()
        self._asked: OrderedDict[str, None] = OrderedDict()
        self._peers: OrderedDict[str, _Peer] = OrderedDict()
        self._payers: OrderedDict[bytes, Account] = OrderedDict()
        self._paid: OrderedDict[tuple[bytes, int], bytes] = OrderedDict()
        self._wake = trio.Event()

    async def load(self) -> None:
        """Read this node's own chain. One that does not hold is not written to any more: `frozen` says why."""
        if self._store is None:
            return
        try:
            self._tabs = Tabs(await self._offload(self._store.tabs))
            while items := await self._read(self._store, self._account.entries):
                for signed, payment in items:
                    self._account.apply(signed.entry, payment.entry if payment is not None else None)
                await trio.lowlevel.checkpoint()
        except (LocalError, VerificationError) as error:
            self._freeze(f"{error.cause}. {error.fix}")

    async def _read(self, store: LedgerStore, start: int) -> list[ChainItem]:
        return await self._offload(lambda: store.chain(start, 1024))

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Serve, and offer what is due, until cancelled. `load` comes first."""
        self._transport.serve(LEDGER, self._handle)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_offering)
            nursery.start_soon(self._keep_saved)
            task_status.started()

    # --- what the node asks ------------------------------------------------------------------------------------------------------

    @property
    def account(self) -> Account:
        """This node's own, as it is now. Not to be changed."""
        return self._account

    async def pay_for(
        self, bundle: Bundle, prices: Mapping[bytes, int], forfeited: Collection[bytes] = frozenset()
    ) -> SignedEntry | None:
        """Pay for a session that was verified: called once per session. The entry, or None where nothing is owed.

        `prices`: by node, as its record said when the plan was made. `forfeited`: stages that fell silent or were convicted. The
        entry is durable when this returns; it is offered to the stages from then on. Raises LocalError where this node's ledger is
        frozen or cannot be written, VerificationError where it would go deeper into debt than anyone may, CapacityError.
        """
        slashed = {stage.node for stage in bundle.plan.stages if self._is_slashed(stage.node)}
        payer = self._identity.public_key
        cost = session_cost(bundle.plan, tokens_of(bundle), prices, payer, slashed | set(forfeited))
        if cost is None:
            return None
        session = bundle.terms.session
        signed = await self._append(lambda: (pay_entry(self._account, session, cost), None))
        self._wake.set()
        log.info("paid", session=session.hex()[:16], amount=in_credits(cost.amount), stages=len(cost.shares))
        return signed

    def note_served(self, coordinator: bytes, layers: int, tokens: int) -> None:
        """This node computed so many tokens through so many layers for a coordinator, which is now to pay for it."""
        if coordinator != self._identity.public_key:
            self._tabs.served(coordinator, self.price * layers * tokens * STAGES_PERCENT // 100)
            self._tabs_changed = True

    def refusal(self, coordinator: bytes) -> str:
        """Why this coordinator gets no stage from this node, "" if it does."""
        return self._tabs.refusal(coordinator, self._credit)

    def owed(self, coordinator: bytes) -> int:
        return self._tabs.owed(coordinator)

    async def own_chain(self) -> Chain:
        """Raises LocalError."""
        if self._store is None:
            raise LocalError(f"this node's ledger cannot be used: {self.frozen}")
        store = self._store
        latest = await self._offload(lambda: store.last(SHOWN_MAX))
        return Chain(self._account, tuple(signed for signed, _ in latest), self._account.entries)

    async def fetch(self, peer_id: str) -> Chain:
        """Another node's chain, from itself, checked from its first entry on. Raises VerificationError for one that does not hold,
        other PeerErrors, TimedOutError."""
        if peer_id == self._identity.peer_id:
            return await self.own_chain()
        with _deadline(peer_id, FETCH_TIMEOUT_S):
            account, latest = Account(public_key_of(peer_id)), deque[SignedEntry](maxlen=SHOWN_MAX)
            entries = await self._exchange(peer_id, lambda stream: self._fetch(stream, account, FETCH_ENTRIES_MAX, latest.append))
            return Chain(account, tuple(latest), entries)

    # --- this node's own account -------------------------------------------------------------------------------------------------

    async def _append(self, make: Callable[[], tuple[Entry, SignedEntry | None]]) -> SignedEntry:
        """Sign the next entry and keep it. Nothing of it leaves this node before it is durable."""
        async with self._appending:
            if self._store is None or self.frozen:
                raise LocalError(f"this node's ledger cannot be used: {self.frozen}")
            store = self._store
            await self._ask_connected()
            if self.frozen:
                raise LocalError(f"this node's ledger cannot be used: {self.frozen}")
            entry, payment = make()
            signed = SignedEntry.sign(entry, self._identity)
            # Whether it was kept or not must be known before anything else happens to the account.
            with trio.CancelScope(shield=True):
                await self._offload(lambda: store.append(signed, payment))
                self._account.apply(entry, payment.entry if payment is not None else None)
            return signed

    async def _ask_connected(self) -> None:
        """Ask every peer in reach, once, what it knows of this account."""
        connected = {connection.peer_id for connection in self._transport.connections()}
        strangers = sorted(connected - self._asked.keys())[:PEERS_MAX]
        if not strangers:
            return
        with trio.move_on_after(ASK_TIMEOUT_S):
            async with trio.open_nursery() as nursery:
                for peer_id in strangers:
                    nursery.start_soon(self._ask_head, peer_id)
        for peer_id in strangers:
            self._asked[peer_id] = None
        while len(self._asked) > PEERS_MAX:
            self._asked.popitem(last=False)

    async def _ask_head(self, peer_id: str) -> None:
        async def ask(stream: Stream) -> SignedEntry | None:
            await stream.send(MESSAGES.pack(HeadAsk(self._identity.public_key)))
            answer = MESSAGES.unpack(await stream.receive())
            if not isinstance(answer, Head):
                raise MalformedError("something else than an entry where one is due", peer=peer_id)
            return answer.entry[0] if answer.entry else None

        try:
            signed = await self._exchange(peer_id, ask)
            if signed is not None:
                self._check_own(signed)
        except (PeerError, CapacityError, TimedOutError) as error:
            log.debug("head_not_asked", peer_id=peer_id, reason=error.cause)

    def _check_own(self, signed: SignedEntry) -> None:
        """Raises VerificationError, MalformedError for an entry that is none of this node's."""
        entry = signed.verify()
        if entry.account != self._identity.public_key:
            raise VerificationError("an entry of another account than the one asked for")
        if entry.seq >= self._account.entries:
            self._freeze(
                f"another node shows entry {entry.seq} of this account, and the ledger here has only {self._account.entries}: "
                "it is older than what this node signed. Restore the newest backup of ledger.db, or give this node a new identity; "
                "signing on would convict it"
            )

    def _freeze(self, cause: str) -> None:
        self.frozen = cause
        log.error("ledger_frozen", reason=cause)

    # --- serving -----------------------------------------------------------------------------------------------------------------

    async def _handle(self, stream: Stream) -> None:
        peer = self._peer(stream.peer_id)
        with _deadline(stream.peer_id, SERVE_TIMEOUT_S):
            for _ in range(REQUESTS_MAX):
                try:
                    message = MESSAGES.unpack(await stream.receive())
                    answer = await self._answer(message, public_key_of(stream.peer_id), peer)
                except PeerError as error:
                    error.peer = stream.peer_id
                    raise
                frame = MESSAGES.pack(answer)
                await trio.sleep(peer.served.take(len(frame), trio.current_time()))
                await stream.send(frame)

    async def _answer(self, message: Record, sender: bytes, peer: _Peer) -> Record:
        match message:
            case Pay(signed):
                if peer.payments.take(0.0, trio.current_time()) > 0:
                    raise RefusedError("too many payments at once", "Offer it again later")
                peer.payments.take(1.0, trio.current_time())
                return await self._take(signed, sender, peer)
            case HeadAsk(account):
                store = self._store
                known = await self._offload(lambda: store.newest_seen(account)) if store is not None else None
                return Head((known,) if known is not None else ())
            case ChainAsk(start):
                return await self._page(start)
            case _:
                raise MalformedError("an answer where a question is due")

    async def _take(self, signed: SignedEntry, payer: bytes, peer: _Peer) -> Record:
        """Take a payment that is this node's to take. Raises VerificationError, MalformedError for one that must never be sent."""
        payment = signed.verify()
        if payment.account != payer or payment.kind != PAY:
            raise VerificationError("a payment of another account than its sender's")
        if self._store is None or self.frozen:
            return Declined("this node's ledger is out of use")
        if self._is_slashed(payer):
            return Declined("nothing is taken from a convicted node")
        store = self._store
        await self._note_seen([signed])
        taken = await self._offload(lambda: store.earning_of(payment.id))
        if taken is not None:
            return Earned(taken)
        try:
            await self._check_payer(payment, peer)
            earned = await self._append(lambda: (earn_entry(self._account, payment), signed))
        except VerificationError as error:
            return Declined(error.cause[:500])
        self._tabs.paid(payer, earned.entry.amount)
        self._tabs_changed = True
        log.info("earned", payer=peer_id_of(payer), amount=in_credits(earned.entry.amount), session=payment.session.hex()[:16])
        return Earned(earned)

    async def _check_payer(self, payment: Entry, peer: _Peer) -> None:
        """That a payment stands in its owner's chain, and that all before it holds: nobody earns what nobody owes. `peer` pays for
        what is read.

        Raises VerificationError, MalformedError where it does not; other PeerErrors, TimedOutError where that cannot be read now.
        """
        payer, at = payment.account, (payment.account, payment.seq)
        # Taken out while it is read on: a second payment at the same time reads from the start.
        account = self._payers.pop(payer, None) or Account(payer)
        if payment.seq < account.entries and at not in self._paid:
            account = Account(payer)  # too long ago to remember
        entries = known_before = account.entries
        try:
            if payment.seq >= account.entries:
                with _deadline(peer_id_of(payer), FETCH_TIMEOUT_S):
                    entries = await self._exchange(
                        peer_id_of(payer), lambda stream: self._fetch(stream, account, payment.seq + 1, self._keep_payment)
                    )
        finally:
            peer.payments.take((account.entries - known_before) / PAGE_MAX, trio.current_time())
            known = self._payers.get(payer)
            if known is None or known.entries < account.entries:
                self._payers[payer] = account
            while len(self._payers) > PAYERS_MAX:
                self._payers.popitem(last=False)
        if account.entries <= payment.seq < entries:
            raise RefusedError("the payer's chain is longer than what is read at once", "Offer it again: reading goes on")
        if self._paid.get(at) != payment.id:
            raise VerificationError("the payment does not stand in its owner's chain")

    def _keep_payment(self, signed: SignedEntry) -> None:
        """Remember a checked payment to this node."""
        if signed.entry.share_of(self._identity.public_key):
            self._paid[signed.entry.account, signed.entry.seq] = signed.entry.id
            while len(self._paid) > PAID_MAX:
                self._paid.popitem(last=False)

    async def _page(self, start: int) -> ChainPage:
        if self._store is None:
            return ChainPage((), 0)
        store, entries = self._store, self._account.entries
        found = await self._offload(lambda: store.chain(start, PAGE_MAX)) if start < entries else []
        items = tuple(PageItem(signed, (payment,) if payment is not None else ()) for signed, payment in found[: entries - start])
        return ChainPage(items, entries)

    async def _note_seen(self, entries: list[SignedEntry]) -> None:
        """Remember what others signed. Two stories of one account are evidence against its owner."""
        if self._store is None:
            return
        store, own = self._store, self._identity.public_key
        others = [signed for signed in entries if signed.entry.account != own]
        fork = await self._offload(lambda: store.note_seen(others)) if others else None
        if fork is not None:
            log.warning("fork", account=peer_id_of(fork.one.entry.account), seq=fork.one.entry.seq)
            try:
                await self._report(Evidence(1, FORK, fork.one.entry.account, fork.to_bytes()))
            except NexusError as error:
                log.error("fork_not_reported", reason=error.cause, fix=error.fix)

    # --- asking others -----------------------------------------------------------------------------------------------------------

    async def _keep_offering(self) -> None:
        """Offer payments until they are taken: at once, and again now and then."""
        while True:
            self._wake = trio.Event()
            if self._store is not None:
                try:
                    await self._offer_all(self._store)
                except LocalError as error:
                    log.error("payments_not_offered", reason=error.cause, fix=error.fix)
            with trio.move_on_after(OFFER_EVERY_S):
                await self._wake.wait()

    async def _offer_all(self, store: LedgerStore) -> None:
        offers = await self._offload(lambda: store.offers(OFFERS_PER_ROUND))
        limiter = trio.CapacityLimiter(OFFERS_AT_ONCE)

        async def offer(signed: SignedEntry, payee: bytes) -> None:
            async with limiter:
                try:
                    with _deadline(peer_id_of(payee), EXCHANGE_TIMEOUT_S):
                        await self._exchange(peer_id_of(payee), lambda stream: self._offer(stream, store, signed, payee))
                except (PeerError, TimedOutError, CapacityError, LocalError) as error:
                    log.info("payment_not_taken_yet", payee=peer_id_of(payee), reason=error.cause)

        async with trio.open_nursery() as nursery:
            for signed, payee in offers:
                nursery.start_soon(offer, signed, payee)

    async def _offer(self, stream: Stream, store: LedgerStore, signed: SignedEntry, payee: bytes) -> None:
        await stream.send(MESSAGES.pack(Pay(signed)))
        answer = MESSAGES.unpack(await stream.receive())
        match answer:
            case Earned(earned):
                entry, payment = earned.verify(), signed.entry
                right = (payee, EARN, payment.id, payment.share_of(payee), payment.session)
                if (entry.account, entry.kind, entry.payment, entry.amount, entry.session) != right:
                    raise VerificationError("an entry that does not take the payment", peer=stream.peer_id)
                await self._note_seen([earned])
            case Declined(cause):
                log.info("payment_declined", payee=stream.peer_id, reason=cause)
            case _:
                raise MalformedError("something else than an entry where one is due", peer=stream.peer_id)
        await self._offload(lambda: store.delivered(signed.entry.seq, payee))

    async def _fetch(self, stream: Stream, account: Account, most: int, keep: Callable[[SignedEntry], None]) -> int:
        """Read and check an account on from where it is, to entry number `most` or a little beyond, at most FETCH_ENTRIES_MAX at
        once; every entry goes to `keep`. How many entries the account has, as its owner says."""
        began = account.entries
        while True:
            await stream.send(MESSAGES.pack(ChainAsk(account.entries)))
            page = MESSAGES.unpack(await stream.receive())
            if not isinstance(page, ChainPage) or (not page.items and account.entries < page.entries):
                raise MalformedError("something else than a page of the chain where one is due", peer=stream.peer_id)
            items = [(item.entry, item.payment[0] if item.payment else None) for item in page.items]
            try:
                await self._offload(partial(check_chain, account, items))
            finally:
                # Up to the first entry that does not hold.
                checked = [(signed, payment) for signed, payment in items if signed.entry.seq < account.entries]
                for signed, _ in checked:
                    keep(signed)
                await self._note_seen([one for pair in checked for one in pair if one is not None])
            if not items or account.entries >= min(page.entries, most, began + FETCH_ENTRIES_MAX):
                return page.entries

    async def _exchange(self, peer_id: str, talk: Callable[[Stream], Awaitable[T]]) -> T:
        stream = await self._transport.open_stream(peer_id, LEDGER)
        try:
            result = await talk(stream)
            await stream.close()
        except trio.EndOfChannel:
            await stream.reset()
            raise UnreachableError(f"peer {peer_id} closed the stream in the middle of an exchange", peer=peer_id) from None
        except BaseException:
            with trio.CancelScope(shield=True):
                await stream.reset()
            raise
        return result

    async def _keep_saved(self) -> None:
        while True:
            await trio.sleep(SAVE_EVERY_S)
            await self._offload(self.save)

    def save(self) -> None:
        """Write the tabs if they changed. Blocks for the disk; a disk that fails is only logged."""
        if self._tabs_changed and self._store is not None:
            self._tabs_changed = False
            try:
                self._store.put_tabs(self._tabs.all())
            except LocalError as error:
                self._tabs_changed = True
                log.warning("tabs_not_saved", reason=error.cause, fix=error.fix)

    def _peer(self, peer_id: str) -> _Peer:
        peer = self._peers.get(peer_id)
        if peer is None:
            now_s = trio.current_time()
            peer = self._peers[peer_id] = _Peer(
                TokenBucket(PAYMENTS_PER_S, PAYMENTS_BURST, now_s), TokenBucket(SERVED_BYTES_PER_S, SERVED_BYTES_BURST, now_s)
            )
            while len(self._peers) > PEERS_MAX:
                self._peers.popitem(last=False)
        self._peers.move_to_end(peer_id)
        return peer


def tokens_of(bundle: Bundle) -> int:
    """Tokens that went through every layer: the prompt's and, of a causal model, the answer's but for the last one."""
    read = sum(len(payload) // 4 for payload in bundle.inputs)
    return read + (len(bundle.outputs) - 1 if bundle.manifest.kind == CAUSAL else 0)


@contextmanager
def _deadline(peer_id: str, timeout_s: float) -> Iterator[None]:
    with trio.move_on_after(timeout_s) as scope:
        yield
    if scope.cancelled_caught:
        raise TimedOutError(f"peer {peer_id} did not finish an exchange about the ledger within {timeout_s:g} s")
