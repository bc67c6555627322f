"""Nothing comes from nothing: conservation over every history, and an account takes no entry that it must not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.core.errors import CapacityError, MalformedError, NotFoundError, VerificationError
from nexus.core.keys import Identity
from nexus.core.plan import Plan, PlanStage
from nexus.proof.accounts import EARN, FORK_BYTES_MAX, Entry, Fork, Share, SignedEntry, is_fork
from nexus.swarm.ledger import (
    BOND_ENTRIES,
    CLAIM_WINDOW,
    DEBT_MAX,
    Account,
    Book,
    Cost,
    Tabs,
    check_chain,
    earn_entry,
    in_credits,
    pay_entry,
    session_cost,
)

NODES = [Identity(bytes([number]) * 32) for number in range(1, 6)]
KEYS = [node.public_key for node in NODES]
PAYER, EARNER, OTHER = NODES[:3]
SESSION = b"s" * 32


def plan(*layers: int) -> Plan:
    cuts = [sum(layers[:number]) for number in range(len(layers) + 1)]
    stages = tuple(PlanStage(KEYS[number], cuts[number], cuts[number + 1]) for number in range(len(layers)))
    return Plan(1, b"m" * 32, "exact", "exact", stages)


def payment(book: Book, cost: int = 100, payer: Identity = PAYER, *earners: Identity, session: bytes = SESSION) -> SignedEntry:
    shares = tuple(Share(earner.public_key, cost * 90 // 100) for earner in earners or (EARNER,))
    entry = pay_entry(book.account(payer.public_key), session, Cost(cost * len(shares), shares))
    return SignedEntry.sign(entry, payer)


def earning(book: Book, paid: SignedEntry, earner: Identity = EARNER) -> SignedEntry:
    return SignedEntry.sign(earn_entry(book.account(earner.public_key), paid.entry), earner)


class History:
    """Random payments and earnings; what is paid may be earned later or never, in any order."""

    def __init__(self, moves: list[tuple[int, int, int, int]]) -> None:
        self.book = Book()
        self.entries: list[SignedEntry] = []
        due: list[tuple[SignedEntry, Identity]] = []
        for payer, tokens, price, pick in moves:
            if due and pick % 2:
                paid, earner = due.pop(pick % len(due))
                self._apply(earning(self.book, paid, earner))
                continue
            prices = {key: price + number for number, key in enumerate(KEYS)}
            cost = session_cost(plan(1, 2, 3, 1, 1), tokens, prices, KEYS[payer])
            if cost is None:
                continue
            entry = pay_entry(self.book.account(KEYS[payer]), bytes([pick % 256]) * 32, cost)
            signed = SignedEntry.sign(entry, NODES[payer])
            self._apply(signed)
            due += [(signed, node) for node in NODES if entry.share_of(node.public_key)]

    def _apply(self, signed: SignedEntry) -> None:
        self.book.apply(signed)
        self.entries.append(signed)


MOVES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 50), st.integers(0, 40), st.integers(0, 1000)), max_size=60)


@settings(max_examples=60, deadline=None)
@given(MOVES, st.sets(st.sampled_from(KEYS)))
def test_credits_are_conserved_whoever_is_slashed(moves: list[tuple[int, int, int, int]], slashed: set[bytes]) -> None:
    book = History(moves).book
    totals = book.totals(slashed)
    assert totals.sum == 0
    assert min(totals.bonds, totals.unclaimed, totals.vault, totals.burned) >= 0
    assert totals.burned == book.totals().bonds - totals.bonds
    assert all(book.bond(key, slashed) == 0 for key in slashed)


@settings(max_examples=30, deadline=None)
@given(MOVES, st.randoms(use_true_random=False))
def test_the_order_between_accounts_does_not_matter(moves, random) -> None:  # type: ignore[no-untyped-def]
    history = History(moves)
    again, waiting = Book(), list(history.entries)
    while waiting:
        # Any entry whose own predecessor and payment are in may be the next.
        ready = []
        for signed in waiting:
            account = again.account(signed.entry.account)
            known = signed.entry.kind != EARN or signed.entry.payment in again._open
            if signed.entry.seq == account.entries and known:
                ready.append(signed)
        chosen = random.choice(ready)
        again.apply(chosen)
        waiting.remove(chosen)
    assert again.totals(KEYS[:2]) == history.book.totals(KEYS[:2])
    assert [again.account(key) for key in KEYS] == [history.book.account(key) for key in KEYS]


@settings(max_examples=40, deadline=None)
@given(MOVES)
def test_chains_are_checked_alone_with_the_payments_they_name(moves: list[tuple[int, int, int, int]]) -> None:
    history = History(moves)
    by_id = {signed.entry.id: signed for signed in history.entries}
    for key in KEYS:
        chain = [(one, by_id.get(one.entry.payment)) for one in history.entries if one.entry.account == key]
        account = Account(key)
        check_chain(account, chain)
        assert account == history.book.account(key)


@given(st.lists(st.integers(0, 30), min_size=2, max_size=5), st.integers(0, 10**6), st.integers(0, 10**6))
def test_stages_get_nine_tenths_in_proportion_and_the_vault_the_rest(layers: list[int], tokens: int, price: int) -> None:
    layers = [count + 1 for count in layers]
    prices = dict.fromkeys(KEYS, price)
    cost = session_cost(plan(*layers), tokens, prices, PAYER.public_key)
    owed = {KEYS[number]: price * count * tokens for number, count in enumerate(layers) if number}
    if cost is None:
        assert all(one * 90 < 100 for one in owed.values())
        return
    assert cost.shares == tuple(Share(key, one * 90 // 100) for key, one in owed.items() if one * 90 >= 100)
    assert cost.amount * 90 - 100 * len(cost.shares) < sum(share.amount for share in cost.shares) * 100 <= cost.amount * 90
    if cost.amount <= DEBT_MAX:
        assert pay_entry(Account(PAYER.public_key), SESSION, cost).vault >= cost.amount // 10


def test_the_payers_own_and_forfeited_stages_cost_nothing() -> None:
    prices = dict.fromkeys(KEYS, 100)
    cost = session_cost(plan(1, 1, 1), 10, prices, PAYER.public_key, forfeited=[EARNER.public_key])
    assert cost == Cost(1000, (Share(OTHER.public_key, 900),))
    assert session_cost(plan(1), 10, prices, PAYER.public_key) is None
    assert session_cost(plan(1, 1), 10, {}, PAYER.public_key) is None
    with pytest.raises(CapacityError):
        session_cost(plan(1, 1000), 10**9, dict.fromkeys(KEYS, 10**9), PAYER.public_key)


class TestRefusals:
    def test_out_of_order_gap_and_replay(self) -> None:
        book = Book()
        first = payment(book)
        book.apply(first)
        second = payment(book)
        with pytest.raises(VerificationError, match="leaves a gap"):
            Book().apply(second)
        book.apply(second)
        for old in (first, second):
            with pytest.raises(VerificationError, match="comes again or too late"):
                book.apply(old)

    def test_another_past(self) -> None:
        book, elsewhere = Book(), Book()
        book.apply(payment(book, 100))
        elsewhere.apply(payment(elsewhere, 200))
        with pytest.raises(VerificationError, match="a fork"):
            book.apply(payment(elsewhere))

    def test_a_signature_of_somebody_else(self) -> None:
        book = Book()
        good = payment(book)
        for bad in (replace(good, signature=bytes(64)), SignedEntry.sign(good.entry, OTHER)):
            with pytest.raises(VerificationError, match="not signed"):
                book.apply(bad)
        assert book.totals().sum == book.account(PAYER.public_key).entries == 0

    def test_overspending(self) -> None:
        book = Book()
        book.apply(payment(book, DEBT_MAX))
        with pytest.raises(VerificationError, match="overspends"):
            payment(book, 100)
        entry = replace(payment(Book()).entry, seq=1, prev=book.account(PAYER.public_key).head)
        with pytest.raises(VerificationError, match="overspends"):
            book.apply(SignedEntry.sign(entry, PAYER))
        assert book.account(PAYER.public_key).balance == -DEBT_MAX

    def test_earning_what_was_not_paid(self) -> None:
        book = Book()
        paid = payment(book)
        with pytest.raises(NotFoundError, match="payer's entries first"):
            book.apply(earning(book, paid))
        book.apply(paid)
        good = earning(book, paid).entry
        wrong = [
            replace(good, amount=good.amount + 1),
            replace(good, session=b"x" * 32),
            replace(good, account=OTHER.public_key),
        ]
        for entry in wrong:
            with pytest.raises(VerificationError, match="something else"):
                book.apply(SignedEntry.sign(entry, EARNER if entry.account == EARNER.public_key else OTHER))
        with pytest.raises(VerificationError, match="nothing to this account"):
            earn_entry(book.account(OTHER.public_key), paid.entry)
        with pytest.raises(VerificationError, match="without the payment"):
            Account(EARNER.public_key).apply(good, payment(book).entry)

    def test_earning_twice(self) -> None:
        book = Book()
        paid = payment(book, 100, PAYER, EARNER, OTHER)
        book.apply(paid)
        book.apply(earning(book, paid))
        account = book.account(EARNER.public_key)
        with pytest.raises(VerificationError, match="a second time"):
            earn_entry(account, paid.entry)
        again = replace(earn_entry(Account(EARNER.public_key), paid.entry), seq=1, prev=account.head)
        with pytest.raises(VerificationError, match="a second time"):
            book.apply(SignedEntry.sign(again, EARNER))

    @pytest.mark.parametrize(
        "changes",
        [
            {"kind": "MINT"},
            {"prev": b"p" * 32},
            {"payment": b"p" * 32},
            {"shares": ()},
            {"shares": (Share(EARNER.public_key, 45), Share(EARNER.public_key, 45))},
            {"shares": (Share(PAYER.public_key, 90),)},
            {"shares": (Share(EARNER.public_key, 91),)},
            {"shares": (Share(EARNER.public_key, 88),)},
            {"kind": EARN},
            {"kind": EARN, "shares": ()},
        ],
    )
    def test_entries_that_no_account_holds(self, changes: dict[str, object]) -> None:
        entry = replace(payment(Book()).entry, **changes)  # type: ignore[arg-type]
        with pytest.raises(MalformedError):
            Book().apply(SignedEntry.sign(entry, PAYER))

    def test_a_pay_entry_brings_no_payment(self) -> None:
        one = payment(Book())
        with pytest.raises(MalformedError):
            check_chain(Account(PAYER.public_key), [(one, one)])

    def test_a_book_is_bounded(self) -> None:
        book = Book(payments_max=1)
        paid = payment(book)
        book.apply(paid)
        with pytest.raises(CapacityError):
            book.apply(payment(book))
        book.apply(earning(book, paid))
        book.apply(payment(book))


def test_the_bond_is_what_was_earned_last() -> None:
    book = Book()
    for number in range(BOND_ENTRIES + 3):
        paid = payment(book, 1000 + 10 * number)
        book.apply(paid)
        book.apply(earning(book, paid))
    account = book.account(EARNER.public_key)
    assert account.balance == 900 + 909 + 918
    assert len(account.escrow) == BOND_ENTRIES
    assert account.bond == account.earned - account.balance
    assert book.totals([EARNER.public_key]).burned == account.bond


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 3 * CLAIM_WINDOW), max_size=60))
def test_no_payment_is_taken_twice_in_whatever_order_they_come(order: list[int]) -> None:
    from nexus.swarm.ledger import _Claims

    claims, taken = _Claims(), set()
    for seq in order:
        if claims.is_open(seq):
            assert seq not in taken
            claims.take(seq)
            taken.add(seq)
        else:
            assert seq in taken or seq <= max(taken) - CLAIM_WINDOW
        assert claims.bits.bit_length() <= CLAIM_WINDOW


class TestForks:
    def test_two_entries_of_one_number_convict(self) -> None:
        one, other = payment(Book(), 100), payment(Book(), 200)
        fork = Fork.of(one, other)
        assert fork == Fork.of(other, one)
        assert fork.check() == PAYER.public_key
        assert Fork.from_bytes(fork.to_bytes()) == fork
        assert len(fork.to_bytes()) < FORK_BYTES_MAX
        assert PAYER.peer_id in fork.summary
        assert "100 micro-credits" in fork.summary
        book = Book()
        book.apply(one)
        assert book.contradicts(other) == one
        assert book.contradicts(one) is None

    def test_everything_else_convicts_nobody(self) -> None:
        book = Book()
        one = payment(book, 100)
        book.apply(one)
        later, foreign = payment(book, 200), payment(Book(), 100, OTHER)
        forged = SignedEntry.sign(replace(one.entry, amount=110, shares=(Share(EARNER.public_key, 99),)), OTHER)
        good = Fork.of(one, payment(Book(), 200))
        for fork in (
            Fork.of(one, one),
            Fork.of(one, later),
            Fork.of(one, foreign),
            Fork.of(one, forged),
            Fork(good.other, good.one),
        ):
            with pytest.raises((VerificationError, MalformedError)):
                fork.check()
        assert not is_fork(one, later)
        # The same statement with another signature is no second story.
        assert not is_fork(one, replace(one, signature=bytes(64)))

    def test_a_fork_of_the_largest_entries_fits(self) -> None:
        shares = tuple(Share(bytes([n]) * 32, 2**40) for n in range(256))
        entry = Entry(1, PAYER.public_key, 2**32, b"p" * 32, "PAY", SESSION, 2**53 - 1, shares, b"")
        assert len(Fork.of(SignedEntry(entry, bytes(64)), SignedEntry(entry, bytes(64))).to_bytes()) < FORK_BYTES_MAX


class TestTabs:
    def test_credit_for_strangers_ends_somewhere(self) -> None:
        tabs = Tabs()
        tabs.served(KEYS[0], 600)
        assert not tabs.refusal(KEYS[0], credit=1000)
        tabs.served(KEYS[0], 600)
        assert "owes this node 0.0012 credits" in tabs.refusal(KEYS[0], credit=1000)
        assert not tabs.refusal(KEYS[0], credit=0)
        tabs.paid(KEYS[0], 700)
        assert tabs.owed(KEYS[0]) == 500
        tabs.paid(KEYS[0], 1500)  # before the end of the session that it is for is noted
        assert tabs.owed(KEYS[0]) == -1000
        tabs.served(KEYS[0], 2001)
        assert tabs.refusal(KEYS[0], credit=1000)
        tabs.paid(KEYS[0], 1001)
        assert tabs.all() == []

    def test_it_is_bounded(self) -> None:
        tabs = Tabs(most=2)
        for number, key in enumerate(KEYS):
            tabs.served(key, number + 1)
        assert [tabs.owed(key) for key in KEYS] == [0, 0, 0, 4, 5]


def test_amounts_for_people() -> None:
    assert [in_credits(micro) for micro in (0, 1, -1_250_000, 2_000_000)] == [
        "0 credits",
        "0.000001 credits",
        "-1.25 credits",
        "2 credits",
    ]
