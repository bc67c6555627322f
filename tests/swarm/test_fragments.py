"""Decisions of serving: which version counts, what to take, and that the last replica is never let go."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.core.errors import MalformedError, UsageError, VerificationError
from nexus.core.keys import Identity
from nexus.swarm.fragments import (
    CALM_S,
    LOST_S,
    SHORT_S,
    TAKEN_MAX,
    Pending,
    Promise,
    Publication,
    Share,
    SignedPublication,
    Taken,
    VersionState,
    check_promise,
    confirmed,
    consider,
    divide,
    layers_of,
    may_retire,
    needed_elsewhere,
    next_version,
    parse_fragment,
    ranges_of,
    replica_counts,
    rollback_target,
    to_withdraw,
    version_to_use,
)

PUBLISHER, OTHER = Identity(b"p" * 32), Identity(b"o" * 32)
R1, R2, R3 = (bytes([number]) * 32 for number in (1, 2, 3))


# --- words of a user --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_text", "found"), [("auto", None), ("0-11", (0, 12)), ("3", (3, 4)), ("11", (11, 12)), ("4-4", (4, 5))]
)
def test_a_fragment_is_auto_or_layers_with_the_last_one_included(given_text: str, found: tuple[int, int] | None) -> None:
    assert parse_fragment(given_text, 12) == found


@pytest.mark.parametrize(
    "bad", ["", "-", "a-b", "5-", "-5", "5-4", "0-12", "12", "1-2-3", "0x1", "1.5", "\u0663", "9" * 30, "auto "]
)
def test_what_is_no_fragment_is_refused_with_the_layers_that_there_are(bad: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_fragment(bad, 12)
    assert caught.value.fix


# --- versions ---------------------------------------------------------------------------------------------------------------


def history(*roots: bytes) -> list[Publication]:
    return [Publication(PUBLISHER.public_key, "m", number, root) for number, root in enumerate(roots, 1)]


def test_a_publication_counts_only_as_its_publisher_signed_it() -> None:
    signed = SignedPublication.sign(history(R1)[0], PUBLISHER)
    assert SignedPublication.from_bytes(signed.to_bytes()).verify() == history(R1)[0]
    with pytest.raises(VerificationError):
        SignedPublication.sign(history(R1)[0], OTHER).verify()
    with pytest.raises(VerificationError):
        SignedPublication(Publication(PUBLISHER.public_key, "m", 2, R1), signed.signature).verify()


def test_versions_are_numbered_one_after_the_other_and_the_same_content_twice_is_no_version() -> None:
    assert next_version([], PUBLISHER.public_key, "m", R1) == history(R1)[0]
    assert next_version(history(R1, R2), PUBLISHER.public_key, "m", R1).version == 3
    with pytest.raises(UsageError):
        next_version(history(R1, R2), PUBLISHER.public_key, "m", R2)


def test_a_rollback_goes_back_one_content_and_twice_two() -> None:
    assert rollback_target(history(R1, R2)).model_root == R1
    assert rollback_target(history(R1, R2, R3)).model_root == R2
    assert rollback_target(history(R1, R2, R3, R2)).model_root == R1
    assert rollback_target(history(R1, R2, R3), to=1).model_root == R1
    for bad, to in ((history(R1), None), ([], None), (history(R1, R2, R1), None), (history(R1, R2), 7), (history(R1, R2), 2)):
        with pytest.raises(UsageError) as caught:
            rollback_target(bad, to)
        assert caught.value.fix


def test_a_request_gets_the_newest_version_that_is_served_in_whole() -> None:
    old = VersionState(1, R1, served=(2, 2), held=(3, 3))
    new = VersionState(2, R2, served=(1, 0), held=(1, 1))
    assert version_to_use([old, new]) == old
    assert version_to_use([new, old, VersionState(3, R3, served=(1, 1), held=(1, 1))]).model_root == R3  # type: ignore[union-attr]
    # Where nobody serves the name, what is held counts, and then the newest, of which nothing may be known.
    idle = VersionState(1, R1, served=(0, 0), held=(1, 1))
    assert version_to_use([idle, new]) == new
    begun = VersionState(1, R1, served=(1, 0), held=(1, 1))
    assert version_to_use([begun, VersionState(2, R2, served=(0, 0), held=(1, 1))]) == begun
    assert version_to_use([idle, VersionState(2, R2, served=(0, 0), held=(1, 0))]) == idle
    assert version_to_use([VersionState(1, R1, (), ()), VersionState(2, R2, (), ())]).version == 2  # type: ignore[union-attr]
    assert version_to_use([]) is None


def test_an_old_version_is_served_until_the_new_one_is_as_safe() -> None:
    assert not may_retire((2, 2, 2), (2, 1, 2), 2)
    assert may_retire((2, 2, 2), (2, 2, 2), 2)
    assert may_retire((5, 5, 5), (2, 2, 3), 2)
    assert may_retire((1, 1, 1), (1, 1, 1), 2)
    assert not may_retire((0, 0, 0), (0, 1, 1), 2)
    assert not may_retire((1, 1), (), 2)


# --- letting go -------------------------------------------------------------------------------------------------------------


@dataclass
class Server:
    """`served`: what it could compute now. `withdrawn`: of that, what its record does not name any longer."""

    served: set[int]
    withdrawn: frozenset[int] = frozenset()
    views: dict[int, frozenset[int]] = field(default_factory=dict)
    fresh: dict[int, frozenset[int]] = field(default_factory=dict)

    @property
    def announced(self) -> frozenset[int]:
        return frozenset(self.served) - self.withdrawn


def let_go_at_random(seed: int, *, confirm: bool) -> tuple[list[int], list[int]]:
    """Nodes that give up what they can, each with records of the others as old as can be. How many nodes each layer needs, and
    has in the end."""
    rng = random.Random(seed)
    layers, count, needed = rng.randint(1, 4), rng.randint(2, 5), rng.randint(1, 2)
    servers = [Server({layer for layer in range(layers) if rng.random() < 0.8}) for _ in range(count)]
    before = [sum(layer in server.served for server in servers) for layer in range(layers)]
    for number, server in enumerate(servers):
        server.views = {other: servers[other].announced for other in range(count) if other != number}

    def counts(views: dict[int, frozenset[int]]) -> list[int]:
        return [sum(layer in view for view in views.values()) for layer in range(layers)]

    for _ in range(300):
        number = rng.randrange(count)
        server, other = servers[number], rng.choice([one for one in range(count) if one != number])
        match rng.randrange(4):
            case 0:  # gossip comes, in its own time
                server.views[other] = servers[other].announced
            case 1 if not server.withdrawn:
                wanted = frozenset(layer for layer in server.served if rng.random() < 0.3)
                server.withdrawn = to_withdraw(frozenset(server.served), wanted, counts(server.views), [needed] * layers)
                server.fresh = {}
            case 2 if server.withdrawn:  # another node is asked, first-hand
                server.fresh[other] = servers[other].announced
            case 3 if server.withdrawn and rng.random() < 0.5:
                seen = server.fresh if confirm else server.views
                server.served -= confirmed(server.withdrawn, counts(seen), [needed] * layers)
                server.withdrawn = frozenset()
    after = [sum(layer in server.served for server in servers) for layer in range(layers)]
    return [min(needed, number) for number in before], after


@settings(max_examples=300)
@given(st.integers(0, 2**32))
def test_however_late_the_records_are_enough_replicas_are_left(seed: int) -> None:
    least, left = let_go_at_random(seed, confirm=True)
    assert all(have >= need for have, need in zip(left, least, strict=True)), (least, left)


def test_without_asking_first_hand_the_last_replica_is_lost() -> None:
    outcomes = [let_go_at_random(seed, confirm=False) for seed in range(200)]
    assert any(0 in left and least[left.index(0)] for least, left in outcomes)


def test_nothing_is_let_go_that_is_wanted_or_short() -> None:
    served, wanted = frozenset(range(4)), frozenset({3})
    assert to_withdraw(served, wanted, (2, 1, 0, 5), (2, 2, 1, 1)) == {0}
    assert to_withdraw(served, served, (9, 9, 9, 9), (1, 1, 1, 1)) == frozenset()
    assert confirmed(frozenset({0, 1}), (1, 0, 0, 0), (1, 1, 1, 1)) == {0}


def test_as_many_are_needed_elsewhere_as_there_should_be_or_as_there_is_room_for() -> None:
    assert needed_elsewhere((0, 1, 2, 3), 2) == (1, 1, 2, 2)


# --- taking -----------------------------------------------------------------------------------------------------------------


def test_who_has_nothing_takes_at_once_and_who_has_what_is_wanted_stays() -> None:
    rng = random.Random(1)
    assert consider(None, frozenset(), frozenset({1}), (0, 0), 2, 0.0, rng.uniform) == (None, True)
    assert consider(Pending(frozenset({2}), 1.0), frozenset({1}), frozenset({1}), (1, 1), 2, 9.0, rng.uniform) == (None, False)


@given(st.integers(0, 2), st.floats(0, 1e6), st.integers(0, 2**32))
def test_a_move_waits_for_a_random_time_and_is_made_only_if_it_is_still_wanted(there: int, now_s: float, seed: int) -> None:
    rng = random.Random(seed)
    taken, wanted, counts = frozenset({0}), frozenset({1}), (2, there)
    pending, act = consider(None, taken, wanted, counts, 2, now_s, rng.uniform)
    assert pending is not None
    assert not act
    longest_s = {0: LOST_S, 1: SHORT_S, 2: 2 * CALM_S}[there]
    assert now_s <= pending.due_s <= now_s + longest_s
    if there == 2:
        assert pending.due_s >= now_s + CALM_S
    assert consider(pending, taken, wanted, counts, 2, pending.due_s, rng.uniform) == (None, True)
    # Another node took it meanwhile: the layout wants something else, and the clock starts again.
    again, act = consider(pending, taken, frozenset({0, 1}), (2, 2), 2, pending.due_s, rng.uniform)
    assert not act
    assert again is not None
    assert again.due_s >= pending.due_s + CALM_S
    # A layer that is lost meanwhile hastens it.
    hurried, act = consider(Pending(wanted, now_s + 100), taken, wanted, (2, 0), 2, now_s, rng.uniform)
    assert not act
    assert hurried is not None
    assert hurried.due_s <= now_s + LOST_S


shares = st.lists(
    st.builds(
        Share,
        st.text("abcdef", min_size=1, max_size=3),
        st.none() | st.integers(0, 100),
        st.integers(0, 100),
        st.integers(0, 20),
    ),
    max_size=6,
    unique_by=lambda share: share.name,
)


@given(st.integers(0, 500), shares)
def test_memory_is_divided_within_what_there_is_and_every_limit(total: int, claims: list[Share]) -> None:
    given_bytes = divide(total, claims)
    assert set(given_bytes) == {share.name for share in claims}
    assert sum(given_bytes.values()) <= total
    assert all(amount >= 0 for amount in given_bytes.values())
    for share in claims:
        if share.most:
            assert given_bytes[share.name] <= share.most
        if share.fixed is not None:
            assert given_bytes[share.name] <= share.fixed
    unlimited = [share for share in claims if share.fixed is None and not share.most]
    if unlimited:
        assert sum(given_bytes.values()) == total
    assert divide(total, claims[::-1]) == given_bytes


def test_a_hot_model_gets_more_of_the_memory_than_a_cold_one() -> None:
    assert divide(90, [Share("cold", None, 0, 0), Share("hot", None, 0, 1)]) == {"cold": 30, "hot": 60}
    assert divide(90, [Share("fixed", 30, 0, 0), Share("rest", None, 0, 5)]) == {"fixed": 30, "rest": 60}


# --- forms ------------------------------------------------------------------------------------------------------------------


@given(st.sets(st.integers(0, 40)))
def test_layers_and_ranges_are_the_same_thing(layers: set[int]) -> None:
    ranges = ranges_of(layers)
    assert layers_of(ranges) == layers
    assert all(end < start for (_, end), (start, _) in pairwise(ranges))


def test_a_layer_counts_once_per_node_and_only_if_the_model_has_it() -> None:
    assert replica_counts(3, [((0, 2), (1, 2)), ((2, 9),), ()]) == (1, 1, 1)


def promise() -> Promise:
    return Promise("m", PUBLISHER.public_key, R1, 1, 0, 0, 0, 0, 0, 0, (Taken(R1, 0, 2),))


def test_what_was_taken_is_noted_per_version() -> None:
    after = promise().with_taken(R2, {3, 4, 8})
    assert after.taken_of(R1) == {0, 1}
    assert after.taken_of(R2) == {3, 4, 8}
    assert after.with_taken(R1, ()).taken_of(R1) == frozenset()
    assert len(promise().with_taken(R2, range(0, 2 * TAKEN_MAX + 2, 2)).taken) == TAKEN_MAX
    assert Promise.from_bytes(after.to_bytes()) == after


def test_a_promise_of_nothing_is_damaged() -> None:
    for bad in (
        Promise("m", b"", R1, 0, 3, 3, 0, 0, 0, 0, ()),
        Promise("m", b"", R1, 1, 0, 0, 0, 0, 0, 0, (Taken(R1, 2, 2),)),
    ):
        with pytest.raises(MalformedError):
            check_promise(bad)
