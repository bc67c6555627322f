"""Both ends of a session, message by message: what is asked, what is refused, what is the peer's fault."""

from __future__ import annotations

import random
from collections.abc import Sequence
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.errors import (
    LocalError,
    MalformedError,
    NexusError,
    RefusedError,
    TimedOutError,
    UnreachableError,
    VerificationError,
)
from nexus.core.record import Record
from nexus.memory import sync
from nexus.memory.item_set import Item, ItemSet, View, pack_item
from nexus.memory.reconcile import ROUNDS_MAX
from nexus.memory.sync import Check, Checked, Heard, Load, Loaded, Outcome, Phase, SyncResponder, SyncSession
from nexus.memory.sync_messages import (
    BATCHES_BYTES_MAX,
    FRAME_MAX,
    MESSAGES,
    NEWS_MAX,
    TELL_MAX,
    WANT_MAX,
    Batches,
    News,
    Open,
    Query,
    Refuse,
    Reply,
    Tell,
    Told,
    Want,
    told_items,
)
from tests.memory.test_item_set import items

COLLECTION, OTHER = bytes(32), b"\1" * 32
SALT = bytes(16)


class Store:
    """Blocks by id; a batch is one block."""

    def __init__(self, blocks: Sequence[bytes] = ()) -> None:
        self.blocks = {sha256(block).digest(): block for block in blocks}
        self.set = ItemSet(map(item_of, blocks))

    def view(self, collection: bytes, salt: bytes, /) -> View | None:
        return self.set.view(salt) if self.serves(collection) else None

    def serves(self, collection: bytes, /) -> bool:
        return collection == COLLECTION

    def accept(self, check: Check) -> Checked:
        taken = [item_of(batch) for batch in check.batches]
        assert all(item.id in check.wanted for item in taken)
        self.blocks.update(zip((item.id for item in taken), check.batches, strict=True))
        self.set.add(taken)
        return Checked(taken)


def item_of(block: bytes) -> Item:
    return Item(2**40 + block[0], sha256(block).digest())


def _blocks(count: int, seed: int = 0, size: int = 20) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(size) for _ in range(count)]


def _session(store: Store, **more: object) -> SyncSession:
    return SyncSession(COLLECTION, store.set.missing, 0.0, store.set.view(SALT), **more)  # type: ignore[arg-type]


def _run(session: SyncSession, mine: Store, theirs: Store) -> tuple[list[Record], list[Heard]]:
    """To the end; what was sent, and what the peer heard."""
    responder, sent, heard = SyncResponder(theirs), list[Record](), list[Heard]()
    while (request := session.generate(1.0)) is not None:
        assert session.generate(1.0) is None
        sent.append(request)
        answer = responder.receive(MESSAGES.unpack(MESSAGES.pack(request)))
        if isinstance(answer, Load):
            answer = responder.loaded([Loaded(theirs.blocks[id_], (id_,)) for id_ in answer.ids if id_ in theirs.blocks])
        elif isinstance(answer, Heard):
            heard.append(answer)
            answer = Told()
        sent.append(answer)
        frame = MESSAGES.pack(answer)
        assert len(frame) <= FRAME_MAX
        check = session.receive(MESSAGES.unpack(frame), 1.0)
        if check is not None:
            assert session.generate(1.0) is None
            session.checked(mine.accept(check))
    assert session.ended
    return sent, heard


def test_a_session_pulls_what_is_lacking_and_tells_the_rest() -> None:
    blocks = _blocks(700)
    mine, theirs = Store(blocks[:400]), Store(blocks[100:])
    sent, heard = _run(session := _session(mine), mine, theirs)
    assert set(mine.blocks) == {sha256(block).digest() for block in blocks}
    assert [len(message.ids) for message in sent if isinstance(message, Want)] == [256, 44]
    assert [(sorted(one.items), one.more) for one in heard] == [(sorted(map(item_of, blocks[:100])), 0)]
    assert session.outcome() == Outcome(True, False, "", True, 300, 300, 0, 0, (), 100, 600)
    # Oldest first: what a block refers to is there before it.
    asked = [id_ for message in sent if isinstance(message, Want) for id_ in message.ids]
    assert asked == [item.id for item in sorted(map(item_of, blocks[400:]))]


def test_of_very_many_the_peer_is_told_only_how_many() -> None:
    mine, theirs = Store(_blocks(TELL_MAX + 1)), Store()
    _, heard = _run(session := _session(mine), mine, theirs)
    assert heard == [Heard(COLLECTION, (), TELL_MAX + 1)]
    assert session.outcome().have == TELL_MAX + 1


def test_equal_sets_take_one_exchange() -> None:
    mine = Store(_blocks(100))
    sent, heard = _run(session := _session(mine), mine, mine)
    assert [type(message) for message in sent] == [Open, Reply]
    assert not heard
    assert session.outcome().complete


def test_large_blocks_come_in_several_answers() -> None:
    blocks = _blocks(70, size=60_000)
    mine, theirs = Store(), Store(blocks)
    sent, _ = _run(session := _session(mine), mine, theirs)
    answers = [message for message in sent if isinstance(message, Batches)]
    assert len(answers) == 5
    assert max(sum(map(len, message.batches)) for message in answers) <= BATCHES_BYTES_MAX
    assert session.outcome().accepted == 70


def test_a_peer_may_have_dropped_blocks() -> None:
    blocks = _blocks(20)
    mine, theirs = Store(), Store(blocks)
    gone = [sha256(block).digest() for block in blocks[:5]]
    for id_ in gone:
        del theirs.blocks[id_]
    _run(session := _session(mine), mine, theirs)
    outcome = session.outcome()
    assert outcome.ok
    assert (outcome.accepted, sorted(outcome.absent)) == (15, sorted(gone))


def test_one_that_has_hardly_anything_of_what_it_names_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "ABSENT_MAX", 32)
    mine, theirs = Store(), Store(_blocks(200))
    theirs.blocks = {}
    sent, _ = _run(session := _session(mine, want_max=16), mine, theirs)
    assert sum(isinstance(message, Want) for message in sent) == 2
    assert session.outcome().ok
    assert len(session.outcome().absent) == 32


def test_a_long_session_ends_well_and_the_rest_comes_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sync.REQUESTS_MAX > sync.PULL_REQUESTS_MAX + ROUNDS_MAX
    monkeypatch.setattr(sync, "PULL_REQUESTS_MAX", 5)
    mine, theirs = Store(), Store(_blocks(300))
    held = [0]
    while held[-1] < 300:
        sent, _ = _run(session := _session(mine, want_max=50), mine, theirs)
        assert sum(isinstance(message, Open | Query | Want) for message in sent) <= 6
        held.append(len(mine.blocks))
        assert held[-1] > held[-2]
        outcome = session.outcome()
        assert (outcome.ok, outcome.complete) == (True, held[-1] == 300)
    assert len(held) > 2
    # A slow one as well: it keeps what it has, and does not fail.
    session = _session(Store())
    session.started_s = -sync.PULL_S
    _run(session, slow := Store(), theirs)
    assert (session.outcome().ok, session.outcome().complete, len(slow.blocks)) == (True, False, 0)


def test_a_session_for_news_pulls_without_comparing() -> None:
    blocks = _blocks(10)
    mine, theirs = Store(blocks[:4]), Store(blocks)
    session = SyncSession(COLLECTION, mine.set.missing, 0.0, items=[item_of(block) for block in blocks[2:6]])
    sent, _ = _run(session, mine, theirs)
    assert [type(message) for message in sent] == [Want, Batches]
    outcome = session.outcome()
    assert (outcome.accepted, outcome.skipped, outcome.needed, outcome.complete) == (2, 2, 4, False)


def test_what_came_from_elsewhere_meanwhile_is_not_asked_for() -> None:
    blocks = _blocks(10)
    mine, theirs = Store(), Store(blocks)
    session = _session(mine)
    mine.accept(Check(tuple(blocks[:3]), frozenset(sha256(block).digest() for block in blocks)))
    sent, _ = _run(session, mine, theirs)
    assert [len(message.ids) for message in sent if isinstance(message, Want)] == [7]
    assert session.outcome().skipped == 3


# A peer that breaks the rules.


def _pulling(store: Store, blocks: list[bytes]) -> SyncSession:
    """A session that has just asked for these blocks."""
    session = SyncSession(COLLECTION, store.set.missing, 0.0, items=list(map(item_of, blocks)))
    assert isinstance(session.generate(0.0), Want)
    return session


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Told(), MalformedError),
        (Reply(0, b"\1"), MalformedError),
        (Batches((), ()), VerificationError),
        (Batches((), (OTHER,)), VerificationError),
        (Batches((b"x",), tuple(sha256(block).digest() for block in _blocks(3))), VerificationError),
        (Batches((), (sha256(_blocks(1)[0]).digest(),) * 2), VerificationError),
        (Refuse("no"), RefusedError),
    ],
)
def test_answers_that_end_a_session(answer: Record, error: type[NexusError]) -> None:
    session = _pulling(Store(), _blocks(3))
    with pytest.raises(error) as caught:
        session.receive(answer, 0.0)
    session.fail(caught.value)
    outcome = session.outcome()
    assert (outcome.ok, outcome.offence) == (False, error is not RefusedError)
    assert session.ended
    assert session.generate(0.0) is None


def test_an_answer_to_nothing() -> None:
    with pytest.raises(MalformedError, match="nothing"):
        _session(Store()).receive(Told(), 0.0)
    session = _pulling(Store(), _blocks(2))
    session.receive(Batches((b"x",), ()), 0.0)
    with pytest.raises(MalformedError, match="nothing"):
        session.receive(Batches((b"x",), ()), 0.0)


@pytest.mark.parametrize(
    "result",
    [
        Checked((), (), 1, "bad signature"),
        Checked((item_of(_blocks(1)[0]),), (), 1, ""),
        Checked((Item(2**40, OTHER),)),
        Checked((item_of(_blocks(1)[0])._replace(t_ms=2**39),)),
        Checked(),
    ],
)
def test_bad_blocks_end_a_session(result: Checked) -> None:
    session = _pulling(Store(), _blocks(3))
    assert session.receive(Batches((b"x",), ()), 0.0) == Check((b"x",), frozenset(sha256(block).digest() for block in _blocks(3)))
    with pytest.raises(VerificationError) as caught:
        session.checked(result)
    session.fail(caught.value)
    assert session.outcome().offence


def test_what_this_node_does_not_take_is_nobodys_fault() -> None:
    blocks = _blocks(3)
    session = _pulling(Store(), blocks)
    session.receive(Batches((b"x",), ()), 0.0)
    session.checked(Checked((), [sha256(block).digest() for block in blocks]))
    assert session.generate(0.0) is None
    outcome = session.outcome()
    assert (outcome.ok, outcome.declined, outcome.accepted) == (True, 3, 0)


@pytest.mark.parametrize("error", [UnreachableError("broke"), LocalError("disk full"), TimedOutError("slow")])
def test_other_ends_are_no_offence(error: NexusError) -> None:
    session = _pulling(Store(), _blocks(3))
    session.fail(error)
    outcome = session.outcome()
    assert (outcome.ok, outcome.offence, outcome.cause) == (False, False, error.cause)


def test_patience_ends() -> None:
    session = _pulling(Store(), _blocks(3))
    assert session.deadline_s == sync.EXCHANGE_TIMEOUT_S
    with pytest.raises(TimedOutError):
        session.receive(Batches((b"x",), ()), sync.EXCHANGE_TIMEOUT_S + 1)
    session = _session(Store())
    with pytest.raises(TimedOutError):
        session.generate(sync.SESSION_TIMEOUT_S + 1)
    session.fail(TimedOutError("slow"))
    assert session.phase is Phase.FAILED


def test_checked_without_a_check() -> None:
    with pytest.raises(ValueError, match="nothing to check"):
        _session(Store()).checked(Checked())


# The responder.


def _opening(store: Store) -> Open:
    opening = _session(store).generate(0.0)
    assert isinstance(opening, Open)
    return opening


@pytest.mark.parametrize(
    "requests",
    [
        [Query(b"\2\0")],
        [Told()],
        [Batches((), ())],
        [Refuse("no")],
        [Open(COLLECTION, SALT, 0, b"")],
        [_opening(Store()), _opening(Store())],
        [_opening(Store()), Query(b"\3")],
        [Want(COLLECTION, ())],
        [Want(COLLECTION, (OTHER, OTHER))],
        [Tell(COLLECTION, b"", 0)],
        [Tell(COLLECTION, b"", 1)],
        [Tell(COLLECTION, pack_item(Item(2**40, OTHER)), 2)],
        [Tell(COLLECTION, pack_item(Item(2**40, OTHER))[1:], 1)],
        [Tell(COLLECTION, bytes(40), 1)],
        [Tell(COLLECTION, pack_item(Item(2**40, OTHER)) + pack_item(Item(2**41, OTHER)), 2)],
    ],
)
def test_requests_that_break_the_protocol(requests: list[Record]) -> None:
    responder = SyncResponder(Store(_blocks(3)))
    for request in requests[:-1]:
        responder.receive(request)
    with pytest.raises(MalformedError):
        responder.receive(requests[-1])


@pytest.mark.parametrize(
    "request_", [Open(OTHER, SALT, 0, b"\2\0"), Want(OTHER, (OTHER,)), Tell(OTHER, pack_item(Item(2**40, OTHER)), 1)]
)
def test_collections_that_are_not_for_a_peer(request_: Record) -> None:
    assert SyncResponder(Store(_blocks(3))).receive(request_) == sync.NOT_SERVED


def test_a_stream_has_a_last_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sync, "REQUESTS_MAX", 3)
    responder = SyncResponder(Store())
    for _ in range(3):
        responder.receive(Want(COLLECTION, (OTHER,)))
    with pytest.raises(MalformedError, match="too many"):
        responder.receive(Want(COLLECTION, (OTHER,)))


def test_what_does_not_fit_is_left_for_the_next_answer_and_never_called_missing() -> None:
    responder = SyncResponder(Store())
    ids = tuple(bytes((at,)) * 32 for at in range(4))
    responder.receive(Want(COLLECTION, ids))
    half = bytes(BATCHES_BYTES_MAX * 2 // 3)
    answer = responder.loaded([Loaded(half, ids[:1]), Loaded(half, ids[1:2]), Loaded(b"x", ids[2:3])])
    assert answer == Batches((half, b"x"), ids[3:])
    assert responder.loaded([Loaded(bytes(BATCHES_BYTES_MAX + 1), ids[:1])]) == Batches((), ids)


def test_full_messages_fit_in_a_frame() -> None:
    ids = tuple(at.to_bytes(32, "big") for at in range(WANT_MAX))
    assert len(MESSAGES.pack(Want(COLLECTION, ids))) < FRAME_MAX
    assert len(MESSAGES.pack(Batches((bytes(BATCHES_BYTES_MAX // WANT_MAX),) * WANT_MAX, ids))) <= FRAME_MAX
    assert len(News(COLLECTION, bytes(40 * NEWS_MAX), 2**32).to_bytes()) <= 1024


# Messages.


@given(st.lists(items, max_size=5, unique_by=lambda item: item.id), st.binary(max_size=60))
def test_messages_come_back(some: list[Item], data: bytes) -> None:
    ids = tuple(item.id for item in some)
    for message in (
        Open(COLLECTION, SALT, 5, data),
        Query(data),
        Reply(7, data),
        Want(COLLECTION, ids),
        Batches((data,), ids),
        Tell.of(COLLECTION, some),
        Told(),
        Refuse("no"),
    ):
        assert MESSAGES.unpack(MESSAGES.pack(message)) == message
    news = News.of(COLLECTION, some)
    assert News.from_bytes(news.to_bytes()) == news
    assert told_items(news.items) == some == told_items(Tell.of(COLLECTION, some).items)


@given(st.binary(max_size=100))
def test_no_other_bytes_are_messages(data: bytes) -> None:
    try:
        message = MESSAGES.unpack(data)
    except MalformedError:
        return
    assert MESSAGES.pack(message) == data


def test_news_of_many_is_their_number() -> None:
    some = [Item(2**40, bytes((at,)) * 32) for at in range(NEWS_MAX + 1)]
    assert News.of(COLLECTION, some) == News(COLLECTION, b"", NEWS_MAX + 1)
    assert told_items(News.of(COLLECTION, some[1:]).items) == some[1:]
