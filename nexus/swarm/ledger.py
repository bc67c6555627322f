"""What the entries of the ledger come to: balances, bonds, the vault, and what a session costs. Mutual credit, in micro-credits.

There is no coin and nobody issues credits: whoever pays goes into debt by what the others earn. Of every payment the stages get
90 % in proportion to layers, tokens and their own price; 10 %, and what rounding leaves over, goes to the network's vault. What an
account earned last, over BOND_ENTRIES entries, is its *bond*: it cannot be spent yet, and evidence against the account burns it.

Conservation: at any time, over all accounts of a book,

    sum of balances + sum of bonds + unclaimed + vault + burned = 0

where `unclaimed` is paid and not yet taken by an EARN entry, and balances may be negative. Burning is no entry: who is slashed is a
set, and what is burned is the sum of the bonds of those in it. So neither the order of entries of different accounts nor that of
convictions matters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from nexus.core.errors import CapacityError, MalformedError, NotFoundError, VerificationError
from nexus.core.keys import peer_id_of
from nexus.core.plan import Plan
from nexus.proof.accounts import AMOUNT_MAX, EARN, MICRO_CREDITS, PAY, STAGES_PERCENT, Entry, Share, SignedEntry, is_fork

BOND_ENTRIES = 64
# The deepest debt that an account may be in, whoever lends: an entry beyond it does not count anywhere.
DEBT_MAX = 1000 * MICRO_CREDITS
PRICE_MAX = 1_000_000_000
# A payment may be taken that is so many entries older than the newest one taken from that payer: each is counted once, by a window
# as IPsec has it against replay (RFC 4303, section 3.4.3), whatever the number of entries.
CLAIM_WINDOW = 1024
PAYERS_MAX = 65_536
BOOK_PAYMENTS_MAX = 1 << 20
TABS_MAX = 4096


@dataclass(slots=True)
class _Claims:
    """Which entries of one payer are taken: the newest one's number, and a bit for each of the CLAIM_WINDOW up to it."""

    newest: int = -1
    bits: int = 0

    def is_open(self, seq: int) -> bool:
        return seq > self.newest or (seq > self.newest - CLAIM_WINDOW and not self.bits >> (self.newest - seq) & 1)

    def take(self, seq: int) -> None:
        if seq > self.newest:
            self.bits = self.bits << min(seq - self.newest, CLAIM_WINDOW) & ((1 << CLAIM_WINDOW) - 1) | 1
            self.newest = seq
        else:
            self.bits |= 1 << (self.newest - seq)


@dataclass(slots=True)
class Account:
    """One account after its first `entries` entries. `head`: the id of the last one. `balance`: may be spent, and may be negative;
    `escrow`: the last amounts earned, oldest first, which may not."""

    public_key: bytes
    entries: int = 0
    head: bytes = b""
    balance: int = 0
    escrow: list[int] = field(default_factory=list)
    paid: int = 0
    earned: int = 0
    _claims: dict[bytes, _Claims] = field(default_factory=dict)

    @property
    def bond(self) -> int:
        return sum(self.escrow)

    def check(self, entry: Entry, payment: Entry | None) -> None:
        """That `entry`, whose signature and form are checked, is the next one of this account. `payment`: of EARN, the PAY entry
        that it takes from, checked likewise. Raises VerificationError that says what is wrong: owner, order, chain, amount."""
        if entry.account != self.public_key:
            raise VerificationError("the entry is of another account")
        if entry.seq != self.entries:
            order = "comes again or too late" if entry.seq < self.entries else "leaves a gap"
            raise VerificationError(f"entry {entry.seq} {order}: the account has {self.entries}, so number {self.entries} is next")
        if entry.prev != self.head:
            raise VerificationError(f"entry {entry.seq} does not follow entry {entry.seq - 1} as it is known here: a fork")
        if entry.kind == PAY:
            self._check_pay(entry)
        else:
            self._check_earn(entry, payment)

    def apply(self, entry: Entry, payment: Entry | None = None) -> None:
        """Append an entry. Raises as `check` does, and then nothing has changed."""
        self.check(entry, payment)
        if entry.kind == PAY:
            self.balance -= entry.amount
            self.paid += entry.amount
        else:
            assert payment is not None
            self._claims.setdefault(payment.account, _Claims()).take(payment.seq)
            self.escrow.append(entry.amount)
            self.earned += entry.amount
            if len(self.escrow) > BOND_ENTRIES:
                self.balance += self.escrow.pop(0)
        self.entries += 1
        self.head = entry.id

    def is_open(self, payment: Entry) -> bool:
        """Whether a payment was not taken yet, and is not too old to tell."""
        claims = self._claims.get(payment.account)
        return claims is None or claims.is_open(payment.seq)

    def _check_pay(self, entry: Entry) -> None:
        if self.balance - entry.amount < -DEBT_MAX:
            raise VerificationError(
                f"entry {entry.seq} overspends: {in_credits(entry.amount)} from a balance of {in_credits(self.balance)} "
                f"is more debt than {in_credits(DEBT_MAX)}",
                "Earn first: serve stages of other nodes' sessions",
            )

    def _check_earn(self, entry: Entry, payment: Entry | None) -> None:
        if payment is None or payment.id != entry.payment or payment.kind != PAY:
            raise VerificationError(f"entry {entry.seq} earns without the payment that it names")
        if payment.session != entry.session or payment.share_of(self.public_key) != entry.amount:
            raise VerificationError(f"entry {entry.seq} earns something else than the payment gives this account")
        if not self.is_open(payment):
            raise VerificationError(f"entry {entry.seq} earns a payment a second time, or one too old to tell")
        if payment.account not in self._claims and len(self._claims) >= PAYERS_MAX:
            raise VerificationError(f"entry {entry.seq} names payer number {PAYERS_MAX + 1}, one more than an account may have")


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a book. They add up to 0."""

    balances: int
    bonds: int
    unclaimed: int
    vault: int
    burned: int

    @property
    def sum(self) -> int:
        return self.balances + self.bonds + self.unclaimed + self.vault + self.burned


class Book:
    """Many accounts together: whoever earns takes from a payment that is in the book, and everything adds up.

    Bounded: raises CapacityError beyond BOOK_PAYMENTS_MAX payments that somebody has yet to take from.
    """

    def __init__(self, payments_max: int = BOOK_PAYMENTS_MAX) -> None:
        self._payments_max = payments_max
        self._accounts: dict[bytes, Account] = {}
        self._last: dict[bytes, SignedEntry] = {}
        self._open: dict[bytes, tuple[Entry, set[bytes]]] = {}
        self._unclaimed = 0
        self._vault = 0

    def account(self, public_key: bytes) -> Account:
        """As it is now; an empty one where there is none yet."""
        return self._accounts.get(public_key) or Account(public_key)

    def apply(self, signed: SignedEntry) -> Entry:
        """Check an entry whole and take it in. Raises NotFoundError where its payment is not in the book yet, VerificationError,
        MalformedError for one that must never be; then nothing has changed."""
        entry = signed.verify()
        account = self.account(entry.account)
        payment: Entry | None = None
        takers: set[bytes] = set()
        if entry.kind == EARN:
            if entry.payment not in self._open:
                raise NotFoundError("the payment that is earned is not in the book", "Apply the payer's entries first")
            payment, takers = self._open[entry.payment]
        elif len(self._open) >= self._payments_max:
            raise CapacityError(f"{self._payments_max} payments are open", "Apply the entries that earn them first")
        account.apply(entry, payment)
        self._accounts[entry.account] = account
        self._last[entry.account] = signed
        if entry.kind == PAY:
            self._open[entry.id] = entry, {share.account for share in entry.shares}
            self._unclaimed += entry.amount - entry.vault
            self._vault += entry.vault
        else:
            takers.discard(entry.account)
            self._unclaimed -= entry.amount
            if not takers:
                del self._open[entry.payment]
        return entry

    def contradicts(self, signed: SignedEntry) -> SignedEntry | None:
        """The newest entry of the account, if this one is of the same number and another: a fork."""
        last = self._last.get(signed.entry.account)
        return last if last is not None and is_fork(last, signed) else None

    def bond(self, public_key: bytes, slashed: Collection[bytes]) -> int:
        return 0 if public_key in slashed else self.account(public_key).bond

    def totals(self, slashed: Collection[bytes] = frozenset()) -> Totals:
        """What everything adds up to with these accounts slashed."""
        bonds = burned = 0
        for public_key, account in self._accounts.items():
            if public_key in slashed:
                burned += account.bond
            else:
                bonds += account.bond
        balances = sum(account.balance for account in self._accounts.values())
        return Totals(balances, bonds, self._unclaimed, self._vault, burned)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a session costs, and who gets what. `amount` is all of it, the vault's part included."""

    amount: int
    shares: tuple[Share, ...]


def session_cost(
    plan: Plan, tokens: int, prices: Mapping[bytes, int], payer: bytes, forfeited: Collection[bytes] = frozenset()
) -> Cost | None:
    """What `payer` owes for `tokens` tokens through every layer of a plan. None: nothing.

    `prices`: micro-credits per token and layer, by node; one without a price works for nothing. `forfeited`: stages that get
    nothing because they fell silent or were convicted. The payer's own stages cost nothing. Raises CapacityError beyond AMOUNT_MAX.
    """
    owed = {
        stage.node: prices.get(stage.node, 0) * (stage.end - stage.start) * tokens
        for stage in plan.stages
        if stage.node != payer and stage.node not in forfeited
    }
    shares = tuple(Share(node, cost * STAGES_PERCENT // 100) for node, cost in owed.items() if cost * STAGES_PERCENT >= 100)
    # Of a stage whose share rounds to nothing nothing is taken for the vault either.
    amount = sum(owed[share.account] for share in shares)
    if amount > AMOUNT_MAX:
        raise CapacityError(f"the session would cost {in_credits(amount)}, more than an entry holds", "Ask for less at a time")
    return Cost(amount, shares) if shares else None


def pay_entry(account: Account, session: bytes, cost: Cost) -> Entry:
    """The next entry of the payer's account. Raises VerificationError where it would overspend."""
    entry = Entry(1, account.public_key, account.entries, account.head, PAY, session, cost.amount, cost.shares, b"").check()
    account.check(entry, None)
    return entry


def earn_entry(account: Account, payment: Entry) -> Entry:
    """The next entry of the earner's account. Raises VerificationError for a payment that gives it nothing, or gave it before."""
    amount = payment.share_of(account.public_key)
    if not amount:
        raise VerificationError("the payment gives nothing to this account")
    entry = Entry(1, account.public_key, account.entries, account.head, EARN, payment.session, amount, (), payment.id).check()
    account.check(entry, payment)
    return entry


def check_chain(account: Account, items: Sequence[tuple[SignedEntry, SignedEntry | None]]) -> None:
    """Append entries that came from elsewhere, each with the payment that it takes from. Raises VerificationError, MalformedError
    at the first that does not hold; those before it are in."""
    for signed, payment in items:
        entry = signed.verify()
        if payment is not None and entry.kind != EARN:
            raise MalformedError("a PAY entry comes with a payment")
        account.apply(entry, payment.verify() if payment is not None else None)


class Tabs:
    """What others owe this node for sessions that it served and was not paid for yet: by coordinator, in micro-credits at its own
    price. This is how strangers get credit, and how much. Bounded: the smallest tab makes room."""

    def __init__(self, tabs: Mapping[bytes, int] | None = None, most: int = TABS_MAX) -> None:
        self._most = most
        self._owed = dict(tabs or {})

    def served(self, coordinator: bytes, cost: int) -> None:
        """A session's work at this node's price, its share of it only."""
        if cost > 0:
            self.paid(coordinator, -cost)

    def paid(self, coordinator: bytes, amount: int) -> None:
        """A payment may come before the session's end is noted: what is paid beyond the tab counts for what comes next."""
        left = self._owed.get(coordinator, 0) - amount
        if left:
            self._owed[coordinator] = left
        else:
            self._owed.pop(coordinator, None)
        self._trim()

    def _trim(self) -> None:
        if len(self._owed) > self._most:
            del self._owed[min(self._owed, key=lambda key: (self._owed[key], key))]

    def all(self) -> list[tuple[bytes, int]]:
        """(coordinator, what it owes), sorted."""
        return sorted(self._owed.items())

    def owed(self, coordinator: bytes) -> int:
        """Below 0: paid in advance."""
        return self._owed.get(coordinator, 0)

    def refusal(self, coordinator: bytes, credit: int) -> str:
        """Why this coordinator gets no more work; "" if it does. `credit`: how much a coordinator may owe; 0 is no limit."""
        owed = self.owed(coordinator)
        if not credit or owed <= credit:
            return ""
        return f"{peer_id_of(coordinator)} owes this node {in_credits(owed)}; it lends {in_credits(credit)} at the most"


def in_credits(micro: int) -> str:
    """For people: "1.25 credits"."""
    whole, part = divmod(abs(micro), MICRO_CREDITS)
    digits = f"{whole}.{part:06d}".rstrip("0").rstrip(".")
    return f"{'-' if micro < 0 else ''}{digits} credits"
