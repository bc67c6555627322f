"""Which records are believed, which one wins, and when to ask again."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.errors import MalformedError, VerificationError
from nexus.core.keys import Identity
from nexus.core.manifest import LAYERS_MAX
from nexus.swarm.links import COORDINATE_MAX_US, ERROR_MAX, Coordinate
from nexus.swarm.membership import (
    CLOCK_SKEW_MS,
    FAILURES_MAX,
    LOAD_MAX,
    PROVIDE_RENEW_S,
    PROVIDE_RETRY_S,
    RECORD_BYTES_MAX,
    RECORD_LIFETIME_MS,
    REFRESH_CONNECTED_S,
    REFRESH_OTHERS_S,
    REFRESH_SOONEST_S,
    RENEW_AFTER_MS,
    RETRY_AFTER_S,
    SPEED_MAX,
    Holding,
    LayerRange,
    MemberTable,
    NodeRecord,
    SignedNodeRecord,
    fit_record,
    is_live,
    newest,
    next_issue_ms,
    next_to_provide,
    provider_key,
    should_renew,
)
from tests.swarm.node_records import node_record

NOW_MS = 1_700_000_000_000
ALICE, BOB, CAROL = (Identity(bytes([number]) * 32) for number in (1, 2, 3))


def record_of(identity: Identity, issued_ms: int = NOW_MS, name: str = "") -> NodeRecord:
    return node_record(identity.public_key, issued_ms=issued_ms, name=name, addresses=("/ip4/192.0.2.1/tcp/4001",))


def signed_by(identity: Identity, issued_ms: int = NOW_MS, name: str = "") -> SignedNodeRecord:
    return SignedNodeRecord.sign(record_of(identity, issued_ms, name), identity)


ranges = st.lists(st.builds(LayerRange, st.integers(0, LAYERS_MAX), st.integers(0, LAYERS_MAX)), max_size=70).map(tuple)
sides = st.integers(-COORDINATE_MAX_US, COORDINATE_MAX_US)
coordinates = st.builds(Coordinate, sides, sides, sides, st.integers(0, COORDINATE_MAX_US), st.integers(0, ERROR_MAX))
records = st.builds(
    NodeRecord,
    st.just(1),
    st.binary(min_size=32, max_size=32),
    st.integers(0, 2**53),
    st.text(max_size=100),
    st.text(max_size=100),
    st.lists(st.text(max_size=300), max_size=20).map(tuple),
    st.integers(0, 2**56),
    st.integers(0, 2**56),
    st.integers(0, SPEED_MAX),
    st.integers(0, SPEED_MAX),
    st.integers(0, 2**48),
    st.integers(0, LOAD_MAX),
    coordinates,
    st.integers(0, 1),
    st.integers(0, 1),
    st.lists(
        st.builds(
            Holding,
            st.text(max_size=80),
            st.binary(min_size=32, max_size=32),
            ranges,
            ranges,
            st.integers(0, 2**32),
        ),
        max_size=8,
    ).map(tuple),
    price=st.integers(0, 10**9),
)


class TestRecords:
    def test_a_signed_record_holds_until_it_expires(self) -> None:
        signed = signed_by(ALICE)
        for now_ms in (NOW_MS, NOW_MS + RECORD_LIFETIME_MS, NOW_MS - CLOCK_SKEW_MS):
            assert SignedNodeRecord.from_bytes(signed.to_bytes()).verify(now_ms) == signed.record
        for now_ms, match in ((NOW_MS + RECORD_LIFETIME_MS + 1, "expired"), (NOW_MS - CLOCK_SKEW_MS - 1, "future")):
            with pytest.raises(VerificationError, match=match) as caught:
                signed.verify(now_ms)
            assert "clocks" in caught.value.fix

    def test_nobody_signs_for_another(self) -> None:
        forged = SignedNodeRecord.sign(record_of(ALICE), BOB)
        with pytest.raises(VerificationError):
            forged.verify(NOW_MS)

    def test_any_change_breaks_the_signature(self) -> None:
        signed = signed_by(ALICE)
        for change in ({"memory_bytes": 1}, {"serves": 0}, {"issued_ms": NOW_MS + 1}, {"name": "x"}):
            with pytest.raises(VerificationError):
                SignedNodeRecord(replace(signed.record, **change), signed.signature).verify(NOW_MS)  # type: ignore[arg-type]

    @given(st.binary(max_size=200))
    def test_any_bytes_are_one_record_or_malformed(self, raw: bytes) -> None:
        try:
            assert SignedNodeRecord.from_bytes(raw).to_bytes() == raw
        except MalformedError:
            return

    @given(records)
    def test_a_record_that_is_fit_is_taken_by_every_peer(self, record: NodeRecord) -> None:
        fit = fit_record(record)
        signed = SignedNodeRecord(fit, bytes(64))
        assert SignedNodeRecord.from_bytes(signed.to_bytes()) == signed
        assert len(signed.to_bytes()) <= RECORD_BYTES_MAX
        assert fit_record(fit) == fit

    def test_a_record_of_very_many_models_keeps_as_many_as_go_in(self) -> None:
        ranges = tuple(LayerRange(2 * index, 2 * index + 1) for index in range(64))
        models = tuple(Holding("m" * 64, bytes([index]) * 32, ranges, (), 1) for index in range(250))
        fit = fit_record(replace(record_of(ALICE), models=models))
        assert fit.models == models[: len(fit.models)]
        assert len(fit.models) > 60
        assert len(SignedNodeRecord.sign(fit, ALICE).to_bytes()) <= RECORD_BYTES_MAX

    def test_a_provider_key_is_of_one_model(self) -> None:
        assert provider_key(bytes(32)) != provider_key(b"\1" + bytes(31))
        assert len(provider_key(bytes(32))) == 32


class TestLaws:
    variants = st.builds(signed_by, st.just(ALICE), st.integers(NOW_MS, NOW_MS + 3), st.sampled_from(["", "a", "b"]))

    @given(variants, variants, variants)
    def test_the_newest_is_the_same_in_whatever_order_they_come(
        self, one: SignedNodeRecord, two: SignedNodeRecord, three: SignedNodeRecord
    ) -> None:
        assert newest(one, one) == one
        assert newest(one, two) == newest(two, one)
        assert newest(newest(one, two), three) == newest(one, newest(two, three))
        assert newest(one, two).record.issued_ms == max(one.record.issued_ms, two.record.issued_ms)

    @given(st.integers(0, 2**53), st.integers(0, 2**53))
    def test_a_record_that_needs_no_renewal_is_live_for_long(self, issued_ms: int, now_ms: int) -> None:
        if not should_renew(issued_ms, now_ms):
            assert is_live(issued_ms, now_ms + RECORD_LIFETIME_MS - RENEW_AFTER_MS)

    @given(st.integers(0, 2**50), st.integers(0, 2**50))
    def test_every_new_record_is_later_than_the_last_that_counted(self, previous_ms: int, now_ms: int) -> None:
        issued_ms = next_issue_ms(previous_ms, now_ms)
        assert issued_ms > previous_ms or not is_live(previous_ms, now_ms)
        assert issued_ms >= now_ms
        assert is_live(issued_ms, now_ms) or previous_ms + 1 == issued_ms

    def test_a_clock_that_was_years_ahead_does_not_keep_a_node_out_for_years(self) -> None:
        """Found by `scripts/simulate chaos --seed 7 --nodes 12`."""
        assert next_issue_ms(10**13, 10**12) == 10**12


class TestTable:
    def test_a_record_counts_only_from_its_own_node(self) -> None:
        table = MemberTable()
        with pytest.raises(VerificationError, match="another node"):
            table.accept(signed_by(ALICE), BOB.peer_id, NOW_MS)
        assert table.live(NOW_MS) == []

    def test_an_older_record_does_not_replace_a_newer_one(self) -> None:
        table = MemberTable()
        assert table.accept(signed_by(ALICE, NOW_MS), ALICE.peer_id, NOW_MS).issued_ms == NOW_MS
        assert table.accept(signed_by(ALICE, NOW_MS - 1000), ALICE.peer_id, NOW_MS).issued_ms == NOW_MS
        assert table.live(NOW_MS) == [record_of(ALICE)]

    @given(st.permutations([ALICE, BOB, CAROL]))
    def test_live_ones_come_sorted_by_key_and_expire(self, order: list[Identity]) -> None:
        table = MemberTable()
        for number, identity in enumerate(order):
            table.accept(signed_by(identity, NOW_MS + number), identity.peer_id, NOW_MS)
        live = table.live(NOW_MS)
        assert [record.node for record in live] == sorted(identity.public_key for identity in order)
        assert [record.node for record in table.live(NOW_MS + RECORD_LIFETIME_MS + 1)] == sorted(
            identity.public_key for identity in order[1:]
        )
        assert table.get(order[0].peer_id, NOW_MS + RECORD_LIFETIME_MS + 1) is None

    def test_it_is_bounded_and_the_oldest_makes_room(self) -> None:
        table = MemberTable(members_max=3)
        identities = [Identity(bytes([number]) * 32) for number in range(1, 8)]
        for number, identity in enumerate(identities):
            table.accept(signed_by(identity, NOW_MS + number), identity.peer_id, NOW_MS)
            table.asked(identity.peer_id, 0.0)
        assert {record.node for record in table.live(NOW_MS)} == {identity.public_key for identity in identities[-3:]}

    def test_asking_strangers_stays_bounded_too_and_pushes_no_member_out(self) -> None:
        table = MemberTable(members_max=3)
        table.accept(signed_by(ALICE), ALICE.peer_id, NOW_MS)
        for number in range(10, 30):
            table.asked(Identity(bytes([number]) * 32).peer_id, float(number))
        assert len(table._members) == 3
        assert table.live(NOW_MS) == [record_of(ALICE)]

    def test_two_failures_in_a_row_and_a_node_is_gone_until_it_answers(self) -> None:
        table = MemberTable()
        table.accept(signed_by(ALICE), ALICE.peer_id, NOW_MS)
        for _ in range(FAILURES_MAX - 1):
            table.failed(ALICE.peer_id)
        assert table.get(ALICE.peer_id, NOW_MS) is not None
        table.failed(ALICE.peer_id)
        assert table.get(ALICE.peer_id, NOW_MS) is None
        table.accept(signed_by(ALICE), ALICE.peer_id, NOW_MS)
        assert table.get(ALICE.peer_id, NOW_MS) is not None

    def test_who_is_asked_when(self) -> None:
        table, alice, bob = MemberTable(), ALICE.peer_id, BOB.peer_id
        assert table.due([alice], 0.0, NOW_MS) == [alice]
        table.asked(alice, 0.0)
        assert table.due([alice], REFRESH_CONNECTED_S - 1, NOW_MS) == []
        table.accept(signed_by(ALICE), alice, NOW_MS)
        assert table.due([alice, bob], REFRESH_CONNECTED_S, NOW_MS) == sorted([alice, bob])
        assert table.due([], REFRESH_CONNECTED_S, NOW_MS) == []
        assert table.due([], REFRESH_OTHERS_S, NOW_MS) == [alice]
        table.failed(alice)
        assert table.due([], RETRY_AFTER_S, NOW_MS) == [alice]
        table.failed(alice)
        assert table.due([], RETRY_AFTER_S, NOW_MS) == []

    def test_one_that_disconnected_is_asked_at_once(self) -> None:
        table = MemberTable()
        table.asked(ALICE.peer_id, 0.0)
        table.accept(signed_by(ALICE), ALICE.peer_id, NOW_MS)
        assert table.due([], 1.0, NOW_MS) == []
        table.disconnected(ALICE.peer_id)
        assert table.due([], 1.0, NOW_MS) == [ALICE.peer_id]
        table.disconnected(BOB.peer_id)
        assert set(table._members) == {ALICE.peer_id}

    def test_gossip_makes_nobody_ask_too_often(self) -> None:
        table, alice = MemberTable(), ALICE.peer_id
        assert table.may_ask(alice, 0.0)
        table.asked(alice, 0.0)
        assert not table.may_ask(alice, REFRESH_SOONEST_S - 1)
        assert table.may_ask(alice, REFRESH_SOONEST_S)

    def test_what_says_nothing_any_more_is_forgotten(self) -> None:
        table = MemberTable()
        table.asked(ALICE.peer_id, 0.0)
        table.accept(signed_by(BOB), BOB.peer_id, NOW_MS)
        table.forget_gone([], REFRESH_CONNECTED_S, NOW_MS)
        assert set(table._members) == {BOB.peer_id}
        table.forget_gone([BOB.peer_id], REFRESH_CONNECTED_S, NOW_MS + RECORD_LIFETIME_MS + 1)
        assert set(table._members) == {BOB.peer_id}
        table.forget_gone([], REFRESH_CONNECTED_S, NOW_MS + RECORD_LIFETIME_MS + 1)
        assert table._members == {}


class TestProvide:
    def test_new_keys_first_then_those_that_are_due(self) -> None:
        a, b = b"a", b"b"
        assert next_to_provide([b, a], {}, {}, 0.0) == a
        assert next_to_provide([b, a], {a: 0.0}, {a: 0.0}, 1.0) == b
        assert next_to_provide([b, a], {a: 0.0, b: 1.0}, {a: 0.0, b: 1.0}, 2.0) is None
        assert next_to_provide([b, a], {a: 0.0, b: 1.0}, {a: 0.0, b: 1.0}, PROVIDE_RENEW_S + 5) == a
        assert next_to_provide([], {}, {}, 0.0) is None

    def test_what_failed_is_tried_again_later(self) -> None:
        assert next_to_provide([b"a"], {b"a": 0.0}, {}, PROVIDE_RETRY_S - 1) is None
        assert next_to_provide([b"a"], {b"a": 0.0}, {}, PROVIDE_RETRY_S) == b"a"

    @given(st.sets(st.binary(min_size=1, max_size=2), max_size=20))
    def test_every_key_has_its_turn(self, wanted: set[bytes]) -> None:
        tried: dict[bytes, float] = {}
        for second in range(len(wanted)):
            key = next_to_provide(wanted, tried, tried, float(second))
            assert key is not None
            assert key not in tried
            tried[key] = float(second)
        assert set(tried) == wanted
