"""After the protocol the initiator knows both differences, whatever fits in a message; nothing that a peer sends keeps it busy."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.core.errors import MalformedError, PeerError, VerificationError
from nexus.memory import reconcile
from nexus.memory.item_set import END, FIRST, Item, ItemSet, View, pack_item
from nexus.memory.reconcile import Reconciliation, answer
from nexus.memory.reconcile_wire import (
    HANDLES_MAX,
    IDS_MAX,
    PAYLOAD_MAX,
    PAYLOAD_MIN,
    RANGES_MAX,
    Ask,
    Asked,
    Kind,
    Listed,
    QueryWriter,
    ReplyWriter,
    Same,
    Split,
    decode_query,
    decode_reply,
    pack_bits,
    unpack_bits,
)
from tests.memory.test_item_set import items

SALT = bytes(16)


def _views(mine: ItemSet, theirs: ItemSet, salt: bytes = SALT) -> tuple[View, View]:
    return mine.view(salt), theirs.view(salt)


def _reconcile(
    mine: ItemSet, theirs: ItemSet, payload_max: int = PAYLOAD_MAX, rounds_max: int = 10_000
) -> tuple[set[Item], set[Item], int, int]:
    """need, have, rounds, bytes; every message is checked against its limit."""
    view, other = _views(mine, theirs)
    session = Reconciliation(view, payload_max, rounds_max=rounds_max)
    need, have, size = list[Item](), list[Item](), 0
    while (query := session.query()) is not None:
        reply = answer(other, query, payload_max)
        assert max(len(query), len(reply)) <= payload_max
        found = session.take(reply)
        assert found.need == sorted(found.need)
        assert found.have == sorted(found.have)
        need += found.need
        have += found.have
        size += len(query) + len(reply)
    assert not session.exhausted
    assert len(set(need)) == len(need)
    assert len(set(have)) == len(have)
    return set(need), set(have), session.rounds, size


@given(st.sets(items, max_size=60), st.sets(items, max_size=60), st.sampled_from([PAYLOAD_MIN, 600, 4000, PAYLOAD_MAX]))
def test_differences_of_any_two_sets(mine: set[Item], theirs: set[Item], payload_max: int) -> None:
    need, have, rounds, _ = _reconcile(ItemSet(mine), ItemSet(theirs), payload_max)
    assert (need, have) == (theirs - mine, mine - theirs)
    assert rounds <= 12 if payload_max == PAYLOAD_MIN else 6


def _some(rng: random.Random, count: int, spread_ms: int) -> list[Item]:
    return sorted(Item(2**40 + rng.randrange(spread_ms), rng.randbytes(32)) for _ in range(count))


@pytest.mark.parametrize("payload_max", [PAYLOAD_MIN, 3000, PAYLOAD_MAX])
@pytest.mark.parametrize("shares", [(1, 1), (0.99, 0.99), (0.5, 0.5), (0, 1), (1, 0), (0.01, 1), (1, 0.01), (0, 0.3)])
def test_differences_of_larger_sets(shares: tuple[float, float], payload_max: int) -> None:
    rng = random.Random(repr((shares, payload_max)))
    # Half of them share few times, so that bounds need the starts of ids.
    all_items = _some(rng, 2000, 10**9) + _some(rng, 2000, 3)
    mine, theirs = ({item for item in all_items if rng.random() < share} for share in shares)
    need, have, rounds, _ = _reconcile(ItemSet(mine), ItemSet(theirs), payload_max)
    assert (need, have) == (theirs - mine, mine - theirs)
    # A message holds some ten ids at the least; whole sets have to go through.
    assert rounds <= (8 if payload_max == PAYLOAD_MAX else 24 + (len(mine) + len(theirs)) // (payload_max // 90))


def test_sizes_and_round_trips() -> None:
    rng = random.Random(1)
    all_items = _some(rng, 20_100, 10**10)

    def differ(where: list[int]) -> tuple[int, int]:
        rng.shuffle(where)
        mine = ItemSet(item for at, item in enumerate(all_items) if at not in where[:50])
        theirs = ItemSet(item for at, item in enumerate(all_items) if at not in where[50:])
        need, have, rounds, size = _reconcile(mine, theirs)
        assert len(need) == len(have) == 50
        return rounds, size

    rounds, size = differ(list(range(20_000, 20_100)))
    assert rounds <= 2
    assert size <= 3200
    rounds, size = differ(rng.sample(range(20_100), 100))
    assert rounds <= 3
    assert size <= 40_000
    same = ItemSet(all_items)
    assert _reconcile(same, same)[2] == 1
    assert _reconcile(same, same)[3] <= 400
    # One new block is one round trip.
    assert _reconcile(ItemSet(all_items[:-1]), same)[2] == 1


def test_it_stops_at_so_many_ids_and_the_rest_comes_next_time() -> None:
    rng = random.Random(2)
    theirs = ItemSet(_some(rng, 3000, 10**9))
    mine = ItemSet()
    for times in range(1, 5):
        view, other = _views(mine, theirs)
        session = Reconciliation(view, 20_000, need_max=800)
        need = list[Item]()
        while (query := session.query()) is not None:
            need += session.take(answer(other, query, 20_000)).need
        assert len(need) == min(800, 3000 - 800 * (times - 1))
        assert session.exhausted == (times < 4)
        mine.add(need)
    assert list(mine) == list(theirs)


def test_it_stops_after_so_many_rounds() -> None:
    rng = random.Random(3)
    view, other = _views(ItemSet(), ItemSet(_some(rng, 500, 10**9)))
    session = Reconciliation(view, PAYLOAD_MIN, rounds_max=5)
    while (query := session.query()) is not None:
        session.take(answer(other, query, PAYLOAD_MIN))
    assert session.exhausted
    assert session.rounds == 5


# Bytes.


def test_the_bytes_of_a_session_stay_what_they_are() -> None:
    def known(*numbers: int) -> View:
        return ItemSet(Item(2**40 + 1000 * number, bytes((number,)) * 32) for number in numbers).view(bytes(range(16)))

    session = Reconciliation(known(1, 2, 3))
    query = session.query()
    # HANDLES, to the end, three of them.
    assert query == bytes.fromhex("01 00 03 17265b39c53d b6ffe0c3b8c8 a8d56f235ed8")
    reply = answer(known(2, 3, 4), query)
    # None the same, listed, the first handle is lacking, one id with its time.
    assert reply == bytes.fromhex("00 02 01 01 a09f80808020") + b"\4" * 32
    assert session.take(reply) == ([Item(2**40 + 4000, b"\4" * 32)], [Item(2**40 + 1000, b"\1" * 32)])
    # Fingerprints of three parts, each up to a bound.
    assert Reconciliation(known(*range(1, 41))).query() == bytes.fromhex(
        "00 91c882808040 670f715c8b819b31 00 a19c01 12d39abe10e290b0 00 00 5733fff0b0343920"
    )


def _rewritten_query(asked: list[Asked]) -> bytes:
    writer = QueryWriter(PAYLOAD_MAX)
    assert all(writer.add(part) for part in asked)
    return writer.data


def _rewritten_reply(asked: list[Asked], answers: list[Same | Split | Ask | Listed]) -> bytes:
    writer = ReplyWriter(PAYLOAD_MAX)
    for part, one in zip(asked, answers, strict=False):
        if isinstance(one, Split):
            assert writer.add_split(part.low, one.fingerprints, one.bounds)
        elif isinstance(one, Listed):
            assert writer.add_listed(part.low, one)
        else:
            assert writer.add_same() if isinstance(one, Same) else writer.add_ask()
    return writer.data


def _broken(data: bytes, rng: random.Random) -> bytes:
    """The same with a few bytes changed, removed or put in."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(out) + 1)
        change = rng.randrange(4)
        if change == 0 and at < len(out):
            out[at] = rng.choice([0, 1, 4, 127, 128, 255, rng.randrange(256)])
        elif change == 1:
            del out[at : at + rng.choice([1, 2, 40])]
        elif change == 2:
            out[at:at] = rng.randbytes(rng.choice([1, 2, 40]))
        else:
            del out[at:]
    return bytes(out)


@given(st.binary(max_size=80))
def test_a_query_has_one_form(data: bytes) -> None:
    try:
        asked = decode_query(data)
    except MalformedError:
        return
    assert _rewritten_query(asked) == data


ASKED = [
    Asked(FIRST, pack_item(Item(2**33, bytes(32))), Kind.FINGERPRINT, fingerprint=7),
    Asked(pack_item(Item(2**33, bytes(32))), pack_item(Item(2**34, b"\1".ljust(32, b"\0"))), Kind.HANDLES, handles=(1, 2, 3)),
    Asked(pack_item(Item(2**35, bytes(32))), END, Kind.TELL),
]


@given(st.binary(max_size=120))
def test_a_reply_has_one_form(data: bytes) -> None:
    try:
        answers = decode_reply(data, ASKED)
    except MalformedError:
        return
    assert _rewritten_reply(ASKED, answers) == data


@settings(max_examples=40)
@given(st.integers(0, 2**32))
def test_broken_messages_are_refused_or_mean_something(seed: int) -> None:
    rng = random.Random(seed)
    all_items = _some(rng, 400, rng.choice([3, 10**9]))
    mine, theirs = (ItemSet(item for item in all_items if rng.random() < 0.8) for _ in range(2))
    view, other = _views(mine, theirs)
    session = Reconciliation(view, rng.choice([PAYLOAD_MIN, PAYLOAD_MAX]))
    while (query := session.query()) is not None:
        broken = _broken(query, rng)
        try:
            asked = decode_query(broken)
        except MalformedError:
            pass
        else:
            assert _rewritten_query(asked) == broken
            answers = answer(other, broken)
            assert decode_reply(answers, asked)
        reply = answer(other, query)
        asked = decode_query(query)
        if rng.random() < 0.3:
            reply = _broken(reply, rng)
            try:
                assert _rewritten_reply(asked, decode_reply(reply, asked)) == reply
                session.take(reply)
            except (MalformedError, VerificationError):
                return
        else:
            session.take(reply)


KEY = pack_item(Item(2**33 + 5, bytes(31) + b"\1"))
TIME_33 = b"\x81\x80\x80\x80\x40"  # the bound 2**33 behind FIRST: 1 + 2 * 2**33


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\3\0",
        b"\2",
        b"\2\0\2\0",  # behind the end
        b"\2" + TIME_33 + b"\2\1",  # an empty range
        b"\6" + TIME_33 + b"\1",  # empty, and not where the one before ended
        b"\2" + TIME_33 + b"\6\1\0",  # a gap of nothing
        b"\6\0\0",  # begins at the end
        b"\2\x81\x80\x80\x80\x80\x00",  # a number not in its shortest form
        b"\2" + b"\xff" * 9,  # too long a number
        b"\2" + b"\xff" * 7 + b"\x7f",  # behind all times
        b"\2\x82\x80\x80\x80\x40\0",  # the start of an id, of no bytes
        b"\2\x82\x80\x80\x80\x40\1\0",  # with a zero at its end
        b"\2\x82\x80\x80\x80\x40\x21" + b"\1" * 33,
        b"\0\0" + bytes(7),
        b"\1\0\0",  # no handles
        b"\1\0\1" + bytes(5),
        b"\2\0\0",
    ],
)
def test_bad_queries(data: bytes) -> None:
    with pytest.raises(MalformedError):
        decode_query(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",  # goes on without an answer
        b"\2",  # the handles are not the same
        b"\x81\0",
        b"\0\3",
        b"\0\4",  # a split that is cut
        b"\0\5",
        b"\0\0\1" + bytes(8),  # one part
        b"\0\0\x11" + bytes(8),
        b"\0\0\2" + bytes(8) + TIME_33 + bytes(8),  # a part that is empty
        b"\0\0\2" + bytes(8) + b"\0" + bytes(8),  # a bound outside
        b"\0\0\3" + bytes(8) + b"\x05" + bytes(8) + b"\1" + bytes(8),  # bounds that stand still
        b"\1\1",  # asks for what it was told
        b"\1\0\2",
        b"\1\2\x08\0",  # a bit for a fourth handle
        b"\0\2\1\x05" + bytes(32),  # a time that no block has
        b"\0\2\1\x80\x80\x80\x80\x20" + bytes(32),  # outside its range
        b"\0\6\x81\x80\x80\x80\x20\0",  # cut before its first id
        b"\0\6\x81\x80\x80\x80\x20\1\x80\x80\x80\x80\x10" + bytes(32) + b"\1",  # goes on behind the cut
        b"\0\6\x81\x80\x80\x80\x20\1\x80\x80\x80\x80\x18" + bytes(32),  # behind its own cut
        b"\0\2\2\x80\x80\x80\x80\x10" + bytes(32) + b"\0" + bytes(32),  # twice the same id
        b"\0\2\1\x80\x80\x80\x80\x10" + bytes(31),
        b"\0\2\x81\x80\2",  # more ids than there may be
        b"\1\2\0\0\0\2\0\0",  # four answers
    ],
)
def test_bad_replies(data: bytes) -> None:
    with pytest.raises(MalformedError):
        decode_reply(data, ASKED)


def test_the_good_forms_beside_the_bad_ones() -> None:
    assert decode_query(b"\2" + TIME_33 + b"\2\3") == [
        Asked(FIRST, pack_item(Item(2**33, bytes(32))), Kind.TELL),
        Asked(pack_item(Item(2**33, bytes(32))), pack_item(Item(2**33 + 1, bytes(32))), Kind.TELL),
    ]
    listed = decode_reply(b"\0\2\1\x80\x80\x80\x80\x10" + bytes(32), ASKED)
    assert listed == [Listed((pack_item(Item(2**32, bytes(32))),), None, None)]
    assert decode_reply(b"\1\2\5\0\0\2\0", ASKED) == [Same(), Listed((), (True, False, True), None), Listed((), None, None)]


def test_messages_are_bounded() -> None:
    with pytest.raises(MalformedError, match="too long"):
        decode_query(b"\2\0".ljust(PAYLOAD_MAX + 1, b"\0"))
    with pytest.raises(MalformedError, match="too many ranges"):
        decode_query(b"\2\3" * (RANGES_MAX + 1))
    assert len(decode_query(b"\2\3" * RANGES_MAX)) == RANGES_MAX
    parts = [
        Asked(FIRST.replace(b"\0" * 8, at.to_bytes(8, "big"), 1), (at + 1).to_bytes(8, "big") + bytes(32), Kind.FINGERPRINT)
        for at in range(300)
    ]
    split = b"\0\0\2" + bytes(8) + b"\2\1\x80" + bytes(8)
    assert len(decode_reply(split * 300, parts)) == 300
    sixteen = b"\0\0\x10" + b"".join(bytes(8) + b"\2\1" + bytes((at,)) for at in range(1, 16)) + bytes(8)
    assert len(decode_reply(sixteen * 256, parts)) == 256
    with pytest.raises(MalformedError, match="too many parts"):
        decode_reply(sixteen * 257, parts)
    some = b"\1\3" + b"\x80\2" + bytes(6 * 256)
    assert len(decode_query(some * (HANDLES_MAX // 256))) == HANDLES_MAX // 256
    with pytest.raises(MalformedError, match="too great"):
        decode_query(some * (HANDLES_MAX // 256) + b"\1\3\1" + bytes(6))
    with pytest.raises(MalformedError, match="too great"):
        decode_query(b"\1\3" + b"\x81\2" + bytes(6 * 257))
    assert reconcile.HANDLES_ASKED_MAX <= 256
    assert HANDLES_MAX * 6 < PAYLOAD_MAX
    assert IDS_MAX * 40 > PAYLOAD_MAX > IDS_MAX * 33


@given(st.lists(st.booleans(), max_size=40))
def test_bits_come_back(bits: list[bool]) -> None:
    assert unpack_bits(pack_bits(bits), len(bits)) == tuple(bits)


# Lies.


def _rounds_with(liar: Callable[[list[Asked]], bytes], count: int = 3000) -> Reconciliation:
    session = Reconciliation(ItemSet(_some(random.Random(4), count, 10**9)).view(SALT))
    while (query := session.query()) is not None:
        session.take(liar(decode_query(query)))
    return session


def _between(low: bytes, high: bytes, share: float) -> bytes:
    least, most = int.from_bytes(low, "big"), int.from_bytes(high, "big")
    return min(max(least + 1, least + int((most - least) * share)), most).to_bytes(40, "big")


def test_a_range_cannot_be_divided_without_end() -> None:
    def liar(asked: list[Asked]) -> bytes:
        # The bound is as near to the beginning as it can be, so that everything is in the last part.
        writer = ReplyWriter(PAYLOAD_MAX)
        for part in asked:
            if part.kind is Kind.FINGERPRINT:
                least = (int.from_bytes(part.low, "big") + 1).to_bytes(40, "big")
                writer.add_split(part.low, (0, 1), (least,))
            else:
                writer.add_listed(part.low, Listed((), None if part.kind is Kind.TELL else (False,) * len(part.handles), None))
        return writer.data

    assert _rounds_with(liar).rounds <= 6


def test_ranges_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def liar(asked: list[Asked]) -> bytes:
        # One answer to a message, and that gives more to ask.
        writer = ReplyWriter(PAYLOAD_MAX)
        part = asked[0]
        if part.kind is Kind.FINGERPRINT:
            bounds = sorted({_between(part.low, part.high, at / 16) for at in range(1, 16)})
            writer.add_split(part.low, range(len(bounds) + 1), bounds)
        else:
            writer.add_listed(part.low, Listed((), None if part.kind is Kind.TELL else (True,) * len(part.handles), None))
        return writer.data

    assert 100 < _rounds_with(liar).rounds <= reconcile.ROUNDS_MAX
    monkeypatch.setattr(reconcile, "QUEUE_MAX", 40)
    with pytest.raises(VerificationError, match="more ranges"):
        _rounds_with(liar)


def test_contradictions_are_lies() -> None:
    rng = random.Random(6)
    mine = ItemSet(_some(rng, 20, 10**9))
    view = mine.view(SALT)
    keys = view.keys(0, 20)

    def told(session: Reconciliation, one: Split | Listed | Ask) -> None:
        query = session.query()
        assert query is not None
        session.take(_rewritten_reply(decode_query(query), [one]))

    with pytest.raises(VerificationError, match="of which it was told"):
        told(Reconciliation(view), Listed((keys[3],), (False,) * 20, None))
    many = ItemSet(_some(rng, 3000, 10**9)).view(SALT)
    first = decode_query(Reconciliation(many).query() or b"")[0]
    end = many.positions([first.high])[0]
    with pytest.raises(VerificationError, match="lists the same ids"):
        told(Reconciliation(many), Listed(tuple(many.keys(0, end)), None, None))
    halves = Split((many.fingerprint(0, 9), many.fingerprint(9, end)), (many.bound(9),))
    with pytest.raises(VerificationError, match="no part does"):
        told(Reconciliation(many), halves)


def test_a_liar_is_done_with_in_bounded_work() -> None:
    """Answers at random, each of a form that is allowed, and ever only some of them."""
    longest = 0
    for seed in range(12):
        rng = random.Random(seed)

        def liar(asked: list[Asked], rng: random.Random = rng) -> bytes:
            writer = ReplyWriter(rng.choice([2000, PAYLOAD_MAX]))
            for part in asked[: rng.choice([1, 20, RANGES_MAX])]:
                bounds = sorted({_between(part.low, part.high, rng.random() ** 9) for _ in range(15)} - {part.low, part.high})
                choice = rng.randrange(4)
                if part.kind is Kind.FINGERPRINT and choice < 3 and bounds:
                    done = writer.add_split(part.low, [rng.getrandbits(64) for _ in range(len(bounds) + 1)], bounds)
                elif part.kind is Kind.FINGERPRINT and choice == 3:
                    done = writer.add_ask()
                else:
                    lacked = tuple(rng.random() < 0.5 for _ in part.handles) if part.kind is Kind.HANDLES else None
                    keys = tuple(key for key in bounds if int.from_bytes(key[:8], "big") >= 2**32)[:3]
                    done = writer.add_listed(part.low, Listed(keys, lacked, None))
                if not done:
                    break
            return writer.data

        try:
            session = _rounds_with(liar, 1000)
        except PeerError:
            continue
        longest = max(longest, session.rounds)
        assert session.rounds <= reconcile.ROUNDS_MAX
        assert session.needed <= reconcile.NEED_MAX
    assert longest > 10


def test_a_responder_does_not_list_more_than_fits() -> None:
    view = ItemSet(_some(random.Random(7), 20_000, 10**9)).view(SALT)
    everything = _rewritten_query([Asked(FIRST, END, Kind.TELL)])
    assert PAYLOAD_MAX * 0.9 < len(answer(view, everything)) <= PAYLOAD_MAX
    assert len(answer(view, everything, PAYLOAD_MIN)) <= PAYLOAD_MIN
    parts = [Asked(view.bound(at), view.bound(at + 20), Kind.HANDLES, handles=(1,)) for at in range(0, 19_980, 20)]
    reply = answer(view, _rewritten_query(parts), 2000)
    assert len(reply) <= 2000
    assert 0 < len(decode_reply(reply, parts)) < len(parts)


def test_limits_of_payloads() -> None:
    view = ItemSet().view(SALT)
    for bad in (PAYLOAD_MIN - 1, PAYLOAD_MAX + 1):
        with pytest.raises(ValueError, match="payload"):
            Reconciliation(view, bad)
    session = Reconciliation(view)
    session.query()
    with pytest.raises(ValueError, match="no reply"):
        session.query()
    session.take(answer(view, b"\2\0"))
    with pytest.raises(MalformedError):
        session.take(b"\1")
