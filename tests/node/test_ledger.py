"""Payments between nodes: taken once, durable before they leave, and no entry that contradicts another is ever signed or missed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import trio
import trio.testing

from nexus.core.errors import LocalError, NexusError, VerificationError
from nexus.core.keys import Identity
from nexus.core.plan import Plan, PlanStage
from nexus.core.record import Record
from nexus.network.simulated import SimulatedNetwork, SimulatedTransport
from nexus.network.transport import Stream
from nexus.node import ledger as ledger_module
from nexus.node.ledger import (
    LEDGER,
    MESSAGES,
    OFFER_EVERY_S,
    ChainAsk,
    ChainPage,
    Declined,
    Earned,
    Head,
    HeadAsk,
    LedgerService,
    PageItem,
    Pay,
    tokens_of,
)
from nexus.proof.accounts import Share, SignedEntry
from nexus.proof.bundle import Bundle
from nexus.proof.evidence import Evidence, verify_evidence
from nexus.storage.ledger import LedgerStore
from nexus.swarm.ledger import Account, Cost, check_chain, pay_entry
from tests.node.test_evidence import Clock, inline, until

PRICE = 10
SESSIONS = [bytes([number]) * 32 for number in range(100)]


def identity_of(number: int) -> Identity:
    return Identity(number.to_bytes(32, "big"))


class Node:
    def __init__(self, transport: SimulatedTransport, identity: Identity, path: Path) -> None:
        self.transport = transport
        self.identity = identity
        self.key = identity.public_key
        self.store = LedgerStore(path, identity.public_key)
        self.slashed: set[bytes] = set()
        self.reported: list[Evidence] = []
        self.service = LedgerService(
            transport,
            identity,
            self.store,
            PRICE,
            1000,
            lambda key: key in self.slashed,
            self._report,
            offload=inline,
        )

    async def _report(self, evidence: Evidence) -> None:
        verify_evidence(evidence)
        self.reported.append(evidence)

    @property
    def account(self) -> Account:
        return self.service.account

    async def pay(self, session: bytes, *stages: Node, tokens: int = 10) -> SignedEntry | None:
        return await self.service.pay_for(bundle(session, self, *stages, tokens=tokens), {stage.key: PRICE for stage in stages})


def bundle(session: bytes, *nodes: Node, tokens: int = 10) -> Bundle:
    """What paying looks at: every node has one layer, the first one is the coordinator."""
    plan = Plan(1, b"m" * 32, "exact", "exact", tuple(PlanStage(node.key, at, at + 1) for at, node in enumerate(nodes)))
    terms, manifest = SimpleNamespace(session=session), SimpleNamespace(kind="causal")
    return cast(Bundle, SimpleNamespace(plan=plan, terms=terms, manifest=manifest, inputs=(bytes(4 * tokens),), outputs=(b"",)))


class Swarm:
    def __init__(self, nursery: trio.Nursery, directory: Path) -> None:
        self._nursery = nursery
        self._directory = directory
        self.network = SimulatedNetwork(3)
        self.nodes: list[Node] = []
        self._count = 0

    async def transport(self) -> tuple[SimulatedTransport, Identity]:
        self._count += 1
        identity = identity_of(self._count)
        return await self._nursery.start(self._hold, identity), identity

    async def node(self, path: Path | None = None, to: Node | None = None) -> Node:
        transport, identity = await self.transport()
        node = await self.start(transport, identity, path or self._directory / f"{self._count}.db")
        if to is not None:
            await node.transport.connect(to.transport.addresses[0])
        return node

    async def start(self, transport: SimulatedTransport, identity: Identity, path: Path) -> Node:
        node = Node(transport, identity, path)
        self.nodes.append(node)
        await node.service.load()
        await self._nursery.start(node.service.run)
        return node

    async def hostile(self, answer: Callable[[Record], Record], to: Node) -> tuple[SimulatedTransport, Identity]:
        async def handle(stream: Stream) -> None:
            while True:
                await stream.send(MESSAGES.pack(answer(MESSAGES.unpack(await stream.receive()))))

        transport, identity = await self.transport()
        transport.serve(LEDGER, handle)
        await transport.connect(to.transport.addresses[0])
        return transport, identity

    async def _hold(self, identity: Identity, *, task_status: trio.TaskStatus[SimulatedTransport]) -> None:
        async with self.network.open(identity) as transport:
            task_status.started(transport)
            await trio.sleep_forever()


@pytest.fixture
def swarm(nursery: trio.Nursery, tmp_path: Path) -> Iterator[Swarm]:
    swarm = Swarm(nursery, tmp_path)
    yield swarm
    for node in swarm.nodes:
        node.store.close()


async def ask(transport: SimulatedTransport, node: Node, message: Record) -> Record:
    stream = await transport.open_stream(node.transport.peer_id, LEDGER)
    await stream.send(MESSAGES.pack(message))
    try:
        return MESSAGES.unpack(await stream.receive())
    finally:
        await stream.close()


def payment(
    owner: Identity, *to: bytes, account: Account | None = None, session: bytes = SESSIONS[0], cost: int = 100
) -> SignedEntry:
    account = account or Account(owner.public_key)
    entry = pay_entry(account, session, Cost(cost * len(to), tuple(Share(key, cost * 90 // 100) for key in to)))
    account.apply(entry)
    return SignedEntry.sign(entry, owner)


def serving(*items: SignedEntry) -> Callable[[Record], Record]:
    """Somebody who shows this chain, whatever was offered."""

    def answer(message: Record) -> Record:
        match message:
            case ChainAsk(start):
                return ChainPage(tuple(PageItem(one, ()) for one in items[start:]), len(items))
            case HeadAsk():
                return Head(())
        return Declined("no")

    return answer


class TestPaying:
    async def test_stages_earn_what_the_coordinator_paid(self, swarm: Swarm, autojump_clock: Clock) -> None:
        payer = await swarm.node()
        one, two = await swarm.node(to=payer), await swarm.node(to=payer)
        paid = await payer.pay(SESSIONS[0], one, two)
        assert paid is not None
        assert (paid.entry.amount, paid.entry.vault, payer.account.balance) == (200, 20, -200)
        await until(lambda: one.account.entries == two.account.entries == 1, 20)
        assert one.account.bond == two.account.bond == 90
        await until(lambda: not payer.store.offers(10), 20)
        chain = await payer.service.fetch(one.transport.peer_id)
        assert (chain.account.bond, chain.complete) == (90, True)
        assert [signed.entry.payment for signed in chain.latest] == [paid.entry.id]
        assert (await two.service.fetch(payer.transport.peer_id)).account.paid == 200
        assert (await one.service.fetch(one.transport.peer_id)).account.earned == 90

    async def test_a_long_chain_is_read_page_by_page_and_taken_up_where_it_was(self, swarm: Swarm, autojump_clock: Clock) -> None:
        payer = await swarm.node()
        stage = await swarm.node(to=payer)
        for session in SESSIONS[:70]:
            await payer.pay(session, stage)
        await until(lambda: stage.account.entries == 70, 600)
        assert stage.account.earned == 70 * 90
        assert stage.account.balance == 6 * 90
        check_chain(Account(stage.key), stage.store.chain(0, 1000))
        chain = await payer.service.fetch(stage.transport.peer_id)
        assert (chain.account.entries, chain.entries) == (70, 70)

    async def test_what_cannot_be_delivered_is_offered_again(self, swarm: Swarm, autojump_clock: Clock) -> None:
        payer, stage = await swarm.node(), await swarm.node()
        await payer.pay(SESSIONS[0], stage)
        await trio.sleep(1)
        assert payer.store.offers(10)
        await payer.transport.connect(stage.transport.addresses[0])
        await until(lambda: not payer.store.offers(10), 2 * OFFER_EVERY_S)
        assert stage.account.entries == 1

    async def test_the_same_offer_is_answered_with_the_same_entry(self, swarm: Swarm, autojump_clock: Clock) -> None:
        payer = await swarm.node()
        stage = await swarm.node(to=payer)
        paid = await payer.pay(SESSIONS[0], stage)
        assert paid is not None
        await until(lambda: stage.account.entries == 1, 20)
        answers = [await ask(payer.transport, stage, Pay(paid)) for _ in range(2)]
        assert answers[0] == answers[1] == Earned(stage.store.chain(0, 1)[0][0])
        assert stage.account.entries == 1

    async def test_own_forfeited_and_convicted_stages_get_nothing(self, swarm: Swarm, autojump_clock: Clock) -> None:
        payer, one, two, three = [await swarm.node() for _ in range(4)]
        payer.slashed.add(one.key)
        everyone = bundle(SESSIONS[0], payer, one, two, three)
        paid = await payer.service.pay_for(everyone, {node.key: PRICE for node in swarm.nodes}, {two.key})
        assert paid is not None
        assert [share.account for share in paid.entry.shares] == [three.key]
        assert await payer.service.pay_for(bundle(SESSIONS[1], payer), {payer.key: PRICE}) is None
        assert await payer.service.pay_for(everyone, {}) is None
        assert tokens_of(everyone) == 10

    async def test_a_disk_that_is_full_lets_nothing_out(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        payer = await swarm.node()
        stage = await swarm.node(to=payer)

        def full(*_: object) -> None:
            raise LocalError("the disk is full", "Free some space")

        with monkeypatch.context() as patch:
            patch.setattr(payer.store, "append", full)
            with pytest.raises(LocalError, match="disk is full"):
                await payer.pay(SESSIONS[0], stage)
        assert payer.account == Account(payer.key)
        with monkeypatch.context() as patch:
            patch.setattr(stage.store, "append", full)
            await payer.pay(SESSIONS[0], stage)
            await trio.sleep(5)
            assert stage.account == Account(stage.key)
            assert payer.store.offers(10)
        await until(lambda: stage.account.entries == 1, 2 * OFFER_EVERY_S)

    async def test_a_coordinator_that_does_not_pay_loses_its_credit(self, swarm: Swarm, autojump_clock: Clock) -> None:
        payer = await swarm.node()
        stage = await swarm.node(to=payer)
        for _ in range(2):
            stage.service.note_served(payer.key, layers=6, tokens=10)
        assert stage.service.owed(payer.key) == 1080
        assert "owes this node" in stage.service.refusal(payer.key)
        await payer.pay(SESSIONS[0], stage)
        await until(lambda: not stage.service.refusal(payer.key), 20)
        assert stage.service.owed(payer.key) == 990
        await trio.sleep(60)
        assert stage.store.tabs() == {payer.key: 990}


class TestOwnAccount:
    async def test_it_goes_on_after_a_restart(self, swarm: Swarm, autojump_clock: Clock, tmp_path: Path) -> None:
        payer = await swarm.node()
        stage = await swarm.node(to=payer)
        await payer.pay(SESSIONS[0], stage)
        before = replace(payer.account)
        again = Node(payer.transport, payer.identity, tmp_path / "copy.db")
        for signed, paid in payer.store.chain(0, 10):
            again.store.append(signed, paid)
        await again.service.load()
        assert again.account == before
        swarm.nodes.append(again)

    async def test_a_node_put_back_to_an_old_state_signs_nothing(self, swarm: Swarm, autojump_clock: Clock, tmp_path: Path) -> None:
        payer = await swarm.node()
        stage = await swarm.node(to=payer)
        await payer.pay(SESSIONS[0], stage)
        await until(lambda: stage.account.entries == 1, 20)
        old = LedgerService(
            payer.transport,
            payer.identity,
            LedgerStore(tmp_path / "old.db", payer.key),
            PRICE,
            0,
            lambda _: False,
            payer._report,
            offload=inline,
        )
        await old.load()
        with pytest.raises(LocalError, match="older than what this node signed"):
            await old.pay_for(bundle(SESSIONS[1], payer, stage), {stage.key: PRICE})
        assert old.frozen
        assert old.account.entries == 0
        assert (await ask(stage.transport, payer, HeadAsk(stage.key))) != Head(())

    async def test_a_damaged_ledger_is_frozen_and_the_node_lives(self, swarm: Swarm, autojump_clock: Clock) -> None:
        payer = await swarm.node()
        stage = await swarm.node(to=payer)
        await payer.pay(SESSIONS[0], stage)
        with payer.store._database.transaction() as connection:
            connection.execute("UPDATE chain SET content = x'00'")
        again = LedgerService(
            payer.transport, payer.identity, payer.store, PRICE, 0, lambda _: False, payer._report, offload=inline
        )
        await again.load()
        assert "damaged" in again.frozen
        with pytest.raises(LocalError, match="damaged"):
            await again.pay_for(bundle(SESSIONS[1], payer, stage), {stage.key: PRICE})

    async def test_overspending_is_refused_before_anything_is_signed(self, swarm: Swarm, autojump_clock: Clock) -> None:
        payer, stage = await swarm.node(), await swarm.node()
        with pytest.raises(VerificationError, match="overspends"):
            await payer.pay(SESSIONS[0], stage, tokens=10**9)
        assert payer.store.entries() == 0


class TestHostilePeers:
    @pytest.mark.parametrize("case", ["stranger", "forged", "earn", "not-mine", "nothing", "answer"])
    async def test_what_is_no_payment_earns_nothing(self, swarm: Swarm, autojump_clock: Clock, case: str) -> None:
        stage = await swarm.node()
        hostile, identity = await swarm.hostile(serving(), stage)
        good = payment(identity, stage.key)
        message: Record = {
            "stranger": Pay(payment(identity_of(77), stage.key)),
            "forged": Pay(SignedEntry(good.entry, bytes(64))),
            "earn": Pay(SignedEntry.sign(replace(good.entry, kind="EARN", shares=(), payment=b"p" * 32), identity)),
            "not-mine": Pay(payment(identity, b"x" * 32)),
            "nothing": Pay(good),  # it stands in no chain
            "answer": Declined("no"),
        }[case]
        try:
            answer = await ask(hostile, stage, message)
        except (NexusError, trio.EndOfChannel):
            answer = None
        assert answer is None or isinstance(answer, Declined)
        assert stage.account.entries == 0
        assert not stage.reported

    async def test_a_payment_beyond_all_credit_earns_nothing(self, swarm: Swarm, autojump_clock: Clock) -> None:
        """A signature is not enough: the payer's chain has to hold up to the payment."""
        stage = await swarm.node()
        identity = identity_of(2)
        account = Account(identity.public_key, balance=10**15)
        items = [payment(identity, stage.key, account=account, cost=10**9, session=one) for one in SESSIONS[:3]]
        shown = items[:1]
        hostile, _ = await swarm.hostile(lambda message: serving(*shown)(message), stage)
        assert isinstance(await ask(hostile, stage, Pay(items[0])), Earned)
        shown += items[1:]
        answer = await ask(hostile, stage, Pay(items[1]))
        assert isinstance(answer, Declined)
        assert "overspends" in answer.cause
        assert stage.account.entries == 1

    async def test_a_convicted_payer_is_declined(self, swarm: Swarm, autojump_clock: Clock) -> None:
        stage = await swarm.node()
        identity = identity_of(2)
        good = payment(identity, stage.key)
        hostile, _ = await swarm.hostile(serving(good), stage)
        stage.slashed.add(identity.public_key)
        assert isinstance(await ask(hostile, stage, Pay(good)), Declined)
        assert stage.account.entries == 0

    async def test_a_fork_is_reported_as_evidence(self, swarm: Swarm, autojump_clock: Clock) -> None:
        stage = await swarm.node()
        identity = identity_of(2)
        one, other = payment(identity, stage.key), payment(identity, stage.key, session=SESSIONS[1])
        shown = [one]
        hostile, _ = await swarm.hostile(lambda message: serving(*shown)(message), stage)
        assert isinstance(await ask(hostile, stage, Pay(one)), Earned)
        shown[:] = [other]
        assert isinstance(await ask(hostile, stage, Pay(other)), Declined)
        assert {evidence.accused for evidence in stage.reported} == {identity.public_key}
        assert stage.account.entries == 1

    async def test_a_fork_is_found_in_the_chain_of_somebody_else(self, swarm: Swarm, autojump_clock: Clock) -> None:
        """A double spender shows each stage another story; the stages' own chains give it away."""
        one, two = await swarm.node(), await swarm.node()
        identity = identity_of(3)
        stories = [payment(identity, node.key, session=SESSIONS[at]) for at, node in enumerate((one, two))]
        shown = [stories[0]]
        hostile, _ = await swarm.hostile(lambda message: serving(*shown)(message), one)
        await hostile.connect(two.transport.addresses[0])
        assert isinstance(await ask(hostile, one, Pay(stories[0])), Earned)
        shown[:] = [stories[1]]
        assert isinstance(await ask(hostile, two, Pay(stories[1])), Earned)
        await one.transport.connect(two.transport.addresses[0])
        assert not one.reported
        await one.service.fetch(two.transport.peer_id)
        assert [evidence.accused for evidence in one.reported] == [identity.public_key]

    @pytest.mark.parametrize("case", ["gap", "swapped", "foreign", "endless", "silent", "unpaid"])
    async def test_a_chain_that_does_not_hold_is_refused(self, swarm: Swarm, autojump_clock: Clock, case: str) -> None:
        node = await swarm.node()
        identity = identity_of(2)
        account = Account(identity.public_key)
        items = [payment(identity, node.key, account=account, session=one) for one in SESSIONS[:3]]
        other = payment(identity_of(9), node.key)
        earn = SignedEntry.sign(replace(items[0].entry, kind="EARN", shares=(), payment=other.entry.id, amount=90), identity)
        shown = {
            "gap": [items[0], items[2]],
            "swapped": [items[1], items[0]],
            "foreign": [other],
            "unpaid": [earn],
        }
        answers = {
            "endless": lambda _: ChainPage((), 5),
            "silent": lambda _: Head(()),
        }
        hostile, _ = await swarm.hostile(answers.get(case) or serving(*shown[case]), node)
        with pytest.raises(NexusError):
            await node.service.fetch(hostile.peer_id)
        assert not node.reported

    async def test_a_long_chain_is_paid_for_by_whoever_has_it_read(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Entries cost their maker nothing, and here a signature to check and a place on the disk each."""
        monkeypatch.setattr(ledger_module, "PAYMENTS_BURST", 4.0)
        stage, account = await swarm.node(), Account(identity_of(2).public_key)
        items = [payment(identity_of(2), stage.key, account=account) for _ in range(6 * ledger_module.PAGE_MAX)]
        asked: list[int] = []

        def answer(message: Record) -> Record:
            if isinstance(message, ChainAsk):
                asked.append(message.start)
                return ChainPage(tuple(PageItem(one, ()) for one in items[message.start :][: ledger_module.PAGE_MAX]), len(items))
            return Head(()) if isinstance(message, HeadAsk) else Declined("no")

        transport, owner = await swarm.hostile(answer, stage)
        assert owner.public_key == account.public_key
        assert isinstance(await ask(transport, stage, Pay(items[-1])), Earned)
        assert len(asked) == 6
        with pytest.raises((trio.EndOfChannel, NexusError)):
            await ask(transport, stage, Pay(items[0]))
        assert len(asked) == 6

    async def test_a_flood_of_payments_is_slowed(
        self, swarm: Swarm, autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ledger_module, "PAYMENTS_BURST", 5.0)
        stage = await swarm.node()
        identity = identity_of(2)
        account = Account(identity.public_key)
        items = [payment(identity, stage.key, account=account, session=one) for one in SESSIONS[:20]]
        hostile, _ = await swarm.hostile(serving(*items), stage)
        answers = 0
        for one in items:
            try:
                answers += isinstance(await ask(hostile, stage, Pay(one)), Earned)
            except (NexusError, trio.EndOfChannel):
                continue
        assert 5 <= answers == stage.account.entries <= 7
