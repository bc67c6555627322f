"""Versions: one answer on every node, whatever arrived first; nobody replaces or removes what is not theirs."""

from __future__ import annotations

from itertools import pairwise
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from nexus.memory.block import ID_BYTES, PARENTS_MAX, split_ids
from nexus.memory.versions import Resolution, Rule, Version, families, resolve, same_author, to_remove

AUTHORS = (b"a" * 32, b"b" * 32)


def anybody(child: Version, parent: Version) -> bool:
    return True


def name(number: int) -> bytes:
    return number.to_bytes(ID_BYTES, "big")


def version(number: int, *parents: int, author: int = 0, at: int = 0, tombstone: bool = False) -> Version:
    return Version(name(number), tuple(map(name, parents)), AUTHORS[author], at, tombstone)


def names(*numbers: int) -> tuple[bytes, ...]:
    return tuple(map(name, numbers))


@st.composite
def histories(draw: st.DrawFn) -> list[Version]:
    """Honest graphs, as hashes allow them: a version names only what was made before it, and some of that is missing here."""
    ids = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True))
    made: list[Version] = []
    for number in ids:
        earlier = st.sampled_from([*(entry.id for entry in made), name(99)])
        parents = tuple(draw(st.lists(earlier, max_size=3)))
        made.append(Version(name(number), parents, draw(st.sampled_from(AUTHORS)), draw(st.integers(0, 3)), draw(st.booleans())))
    hidden = draw(st.sets(st.sampled_from([entry.id for entry in made])))
    return [entry for entry in made if entry.id not in hidden]


@st.composite
def any_graphs(draw: st.DrawFn) -> list[Version]:
    """Circles and links to itself as well, which no hashes make."""
    ids = st.integers(0, 8).map(name)
    known = draw(st.lists(ids, max_size=9, unique=True))
    parents = st.lists(ids, max_size=4).map(tuple)
    return [Version(i, draw(parents), draw(st.sampled_from(AUTHORS)), draw(st.integers(0, 3)), draw(st.booleans())) for i in known]


graphs = st.one_of(histories(), any_graphs())
rules = st.sampled_from([anybody, same_author])


@given(graphs, rules, st.randoms(use_true_random=False))
def test_the_order_of_arrival_does_not_matter(versions: list[Version], rule: Rule, shuffle: Random) -> None:
    expected, grouped = resolve(versions, rule), families(versions, rule)
    shuffle.shuffle(versions)
    arrived_twice = versions + versions[: len(versions) // 2]
    assert resolve(versions, rule) == resolve(arrived_twice, rule) == expected
    assert families(arrived_twice, rule) == grouped


@given(graphs, rules)
def test_every_version_is_one_of_head_superseded_removed_or_tombstone(versions: list[Version], rule: Rule) -> None:
    found = resolve(versions, rule)
    tombstones = {entry.id for entry in versions if entry.is_tombstone}
    parts = [set(found.heads), found.superseded, found.removed, tombstones]
    assert sum(map(len, parts)) == len(versions)
    assert set().union(*parts) == {entry.id for entry in versions}
    assert found.winner == (found.heads[0] if found.heads else None)


@given(histories(), rules)
def test_it_agrees_with_the_definition(versions: list[Version], rule: Rule) -> None:
    known = {entry.id: entry for entry in versions}

    def counts(child: Version, parent: bytes) -> bool:
        return parent in known and (same_author if child.is_tombstone else rule)(child, known[parent])

    def under(entry: Version) -> set[bytes]:
        return {found for parent in entry.parents if counts(entry, parent) for found in {parent} | under(known[parent])}

    def depth(entry: Version) -> int:
        return max((1 + depth(known[parent]) for parent in entry.parents if counts(entry, parent)), default=0)

    content = [entry for entry in versions if not entry.is_tombstone]
    removed = {below for entry in versions if entry.is_tombstone for below in under(entry)} & {entry.id for entry in content}
    replaced = {parent for entry in content for parent in entry.parents if counts(entry, parent)}
    heads = [entry for entry in content if entry.id not in removed and entry.id not in replaced]
    heads.sort(key=lambda entry: (depth(entry), entry.created_ms, entry.id))
    found = resolve(versions, rule)
    assert found.removed == removed
    assert found.heads == tuple(entry.id for entry in reversed(heads))
    assert found.superseded == {entry.id for entry in content if entry.id in replaced} - removed


@given(histories(), st.integers(0, 12), rules)
def test_what_is_removed_or_replaced_stays_so_whatever_else_arrives(versions: list[Version], cut: int, rule: Rule) -> None:
    before, after = resolve(versions[:cut], rule), resolve(versions, rule)
    assert before.removed <= after.removed
    assert before.superseded <= after.superseded | after.removed


@given(graphs, rules)
def test_families_share_nothing_and_resolve_alone_as_they_do_together(versions: list[Version], rule: Rule) -> None:
    groups = families(versions, rule)
    assert sorted(entry for group in groups for entry in group) == sorted(versions)
    together, apart = resolve(versions, rule), [resolve(group, rule) for group in groups]
    assert set(together.heads) == {head for found in apart for head in found.heads}
    assert together.superseded == frozenset().union(*(found.superseded for found in apart))
    assert together.removed == frozenset().union(*(found.removed for found in apart))
    assert together.winner in {found.winner for found in apart} | {None}


@given(graphs)
def test_a_stranger_changes_nothing(versions: list[Version]) -> None:
    """Whatever others post onto an author's blocks: the author's own are shown as they would be without."""
    own = [entry for entry in versions if entry.author == AUTHORS[0]]
    alone = [resolve(group, same_author) for group in families(own, same_author)]
    beside_others = [resolve(group, same_author) for group in families(versions, same_author)]
    assert all(found in beside_others for found in alone)


@given(graphs, st.data())
def test_tombstones_of_a_version_take_it_away_with_what_it_replaced(versions: list[Version], data: st.DataObject) -> None:
    content = [entry for entry in versions if not entry.is_tombstone]
    if not content:
        return
    target = data.draw(st.sampled_from(content))
    fields = to_remove(versions, target.id, same_author)
    stones = [Version(name(200 + at), split_ids(field), target.author, 9, True) for at, field in enumerate(fields)]
    found = resolve([*versions, *stones], same_author)
    assert target.id in found.removed
    gone = {parent for stone in stones for parent in stone.parents}
    assert gone <= found.removed
    # A node that knows no more than one of these versions comes to the same about it.
    for entry in content:
        if entry.id in found.removed - resolve(versions, same_author).removed:
            assert resolve([entry, *stones], same_author).heads == ()


def test_the_newest_version_wins_and_the_one_before_is_superseded() -> None:
    found = resolve([version(1), version(2, 1), version(3, 2)], same_author)
    assert found == Resolution(name(3), names(3), frozenset(names(1, 2)), frozenset())


def test_of_concurrent_versions_depth_counts_before_time_and_time_before_the_id() -> None:
    base = [version(1, at=9), version(2, 1, at=5), version(3, 2, at=1)]
    assert resolve([*base, version(4, 1, at=8)], same_author).heads == names(3, 4)
    assert resolve([version(1), version(4, 1, at=8), version(5, 1, at=7)], same_author).heads == names(4, 5)
    assert resolve([version(1), version(4, 1, at=8), version(5, 1, at=8)], same_author).heads == names(5, 4)


def test_a_version_made_beside_a_tombstone_stays_and_one_on_top_of_it_comes_back() -> None:
    removed = [version(1), version(2, 1), version(3, 2, tombstone=True)]
    assert resolve(removed, same_author) == Resolution(None, (), frozenset(), frozenset(names(1, 2)))
    beside = resolve([*removed, version(4, 2)], same_author)
    assert (beside.heads, beside.removed) == (names(4), frozenset(names(1, 2)))
    back = resolve([*removed, version(4, 3)], same_author)
    assert (back.heads, back.removed) == (names(4), frozenset(names(1, 2)))


def test_a_tombstone_of_a_tombstone_brings_nothing_back() -> None:
    stones = [version(1), version(2, 1, tombstone=True), version(3, 2, tombstone=True)]
    assert resolve(stones, same_author).removed == frozenset(names(1))


def test_nobody_removes_or_replaces_what_is_not_theirs() -> None:
    mine, foreign = version(1), version(2, 1, author=1, at=9)
    stone = version(3, 1, author=1, tombstone=True)
    assert resolve([mine, stone], anybody).heads == names(1)
    assert [resolve(group, same_author).winner for group in families([mine, foreign], same_author)] == [name(1), name(2)]


def test_while_a_version_is_missing_both_ends_stand_and_when_it_comes_the_later_one() -> None:
    assert resolve([version(1), version(3, 2, at=1)], same_author).heads == names(3, 1)
    assert resolve([version(1), version(2, 1), version(3, 2, at=1)], same_author).heads == names(3)


def test_a_tombstone_names_every_version_in_parts_that_fit_a_block() -> None:
    chain = [version(1), *(version(number, number - 1) for number in range(2, 41))]
    fields = to_remove(chain, name(40), same_author)
    assert [len(split_ids(field)) for field in fields] == [PARENTS_MAX, PARENTS_MAX, 8]
    assert {parent for field in fields for parent in split_ids(field)} == {entry.id for entry in chain}


def test_what_others_wrote_is_not_named() -> None:
    chain = [version(1), version(2, 1, author=1)]
    assert to_remove(chain, name(2), anybody) == [name(2)]
    stone = version(3, 2, author=1, tombstone=True)
    assert resolve([*chain, stone], anybody).removed == frozenset(names(1, 2))


def test_long_chains_and_wide_merges_take_no_stack_and_little_time() -> None:
    count = 20_000
    chain = [version(0), *(version(number, number - 1) for number in range(1, count))]
    found = resolve(chain[::-1], same_author)
    assert found.heads == names(count - 1)
    assert len(found.superseded) == count - 1
    stone = version(count, count - 1, tombstone=True)
    assert len(resolve([*chain, stone], same_author).removed) == count
    assert len(families(chain, same_author)) == 1


def test_circles_end() -> None:
    ring = [version(low, high) for low, high in [*pairwise(range(2000)), (1999, 0)]]
    assert resolve(ring, anybody).heads == ()
    assert resolve([*ring, version(5000, 3)], anybody).winner == name(5000)
    assert resolve([version(1, 1)], anybody).heads == names(1)
