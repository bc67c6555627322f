"""Laws of the slashed set and the fuse; who suspends whom; what statistics can and cannot do."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.errors import CapacityError, MalformedError, VerificationError
from nexus.core.keys import Identity
from nexus.core.manifest import Manifest
from nexus.core.plan import Plan, PlanStage
from nexus.swarm.standing import (
    DEMOTED,
    GOOD,
    PROBATION,
    SILENT,
    SLASHED,
    SUSPENDED,
    SUSPENSION_MS,
    TALLY_MAX,
    WITNESS_SPREAD_MS,
    Conviction,
    Fuse,
    SignedStatement,
    SlashedSet,
    Statement,
    Suspension,
    SuspensionCase,
    Tally,
    check_suspension,
    failure_rate_at_least,
    quorum_of,
    standing_of,
)
from tests.swarm.ring import terms_for

KEYS = st.integers(0, 8).map(lambda number: bytes([number]) * 32)
FOUND = st.lists(st.tuples(KEYS, KEYS), max_size=30)
HOUR_MS = 3_600_000


def slashed(entries: list[tuple[bytes, bytes]]) -> SlashedSet:
    found = SlashedSet()
    for offender, evidence_id in entries:
        found.add(offender, evidence_id)
    return found


class TestSlashedSet:
    @given(FOUND, st.randoms(use_true_random=False), st.integers(1, 4))
    def test_order_partition_and_duplication_do_not_matter(self, found, random, parts) -> None:  # type: ignore[no-untyped-def]
        shuffled = [*found, *random.sample(found, len(found) // 2)]
        random.shuffle(shuffled)
        merged = SlashedSet()
        pieces = [slashed(shuffled[part::parts]) for part in range(parts)]
        for piece in [*pieces, *reversed(pieces)]:
            merged.merge(piece)
        assert merged == slashed(found)

    @given(FOUND, FOUND, FOUND)
    def test_merging_is_commutative_associative_and_idempotent(self, one, two, three) -> None:  # type: ignore[no-untyped-def]
        def union(*parts: SlashedSet) -> SlashedSet:
            merged = SlashedSet()
            for part in parts:
                merged.merge(part)
            return merged

        a, b, c = slashed(one), slashed(two), slashed(three)
        assert union(a, b) == union(b, a)
        assert union(union(a, b), c) == union(a, union(b, c))
        assert union(a, a) == a

    @given(FOUND)
    def test_it_never_shrinks_and_keeps_the_least_evidence(self, found) -> None:  # type: ignore[no-untyped-def]
        kept = SlashedSet()
        for number, (offender, evidence_id) in enumerate(found):
            before = set(dict(kept.entries()))
            changes = kept.wants(offender, evidence_id)
            assert kept.add(offender, evidence_id) is changes
            assert before <= set(dict(kept.entries()))
            least = min(one for who, one in found[: number + 1] if who == offender)
            assert kept.evidence_of(offender) == least

    @given(FOUND, st.integers(1, 4))
    def test_pages_hold_all_of_it_once(self, found, size) -> None:  # type: ignore[no-untyped-def]
        kept, after, seen, more = slashed(found), b"", [], True
        while more:
            page, more = kept.page(after, size)
            assert len(page) <= size
            seen += page
            after = page[-1][0] if page else after
        assert seen == list(kept.entries())

    def test_it_is_bounded(self) -> None:
        kept = SlashedSet(most=1)
        kept.add(b"a" * 32, b"2" * 32)
        with pytest.raises(CapacityError):
            kept.add(b"b" * 32, b"2" * 32)
        assert kept.add(b"a" * 32, b"1" * 32)


CONVICTIONS = st.lists(st.builds(Conviction, KEYS, st.sampled_from(["exact", "ledger"]), st.integers(1, 50)), max_size=20)


class TestFuse:
    @given(CONVICTIONS, st.randoms(use_true_random=False), st.integers(0, 60))
    def test_what_it_holds_does_not_depend_on_the_order(self, found, random, resumed) -> None:  # type: ignore[no-untyped-def]
        fuse = Fuse(bonds_max=2, window_ms=10)
        shuffled = [*found, *found]
        random.shuffle(shuffled)
        assert fuse.held(shuffled, resumed) == fuse.held(found, resumed)

    def test_many_bonds_at_once_are_held_and_few_are_not(self) -> None:
        fuse = Fuse(bonds_max=2, window_ms=100)
        two = [Conviction(bytes([n]) * 32, "exact", 1000 + n) for n in range(2)]
        assert not fuse.held(two)
        third = Conviction(b"c" * 32, "exact", 1050)
        assert fuse.held([*two, third]) == {one.offender for one in (*two, third)}
        assert not fuse.held([*two, replace(third, profile="ledger")])
        assert not fuse.held([*two, replace(third, known_ms=1201)])
        assert not fuse.held([*two, replace(two[0], known_ms=1050)])  # one offender, convicted twice

    def test_once_blown_it_holds_until_somebody_looks(self) -> None:
        fuse = Fuse(bonds_max=1, window_ms=100)
        found = [Conviction(bytes([n]) * 32, "exact", at) for n, at in enumerate((1000, 1050, 9000))]
        assert len(fuse.held(found)) == 3
        assert not fuse.held(found, resumed_ms=9000)


WITNESSES = [Identity(bytes([number]) * 32) for number in range(1, 6)]
ACCUSED, COORDINATOR = WITNESSES[0], WITNESSES[4]
NOW_MS = 1_700_000_000_000
# All that terms say of a model.
MODEL = SimpleNamespace(root=b"m" * 32)


def case(speakers: list[Identity], issued_ms: int = NOW_MS, spread_ms: int = 0, **changes: object) -> SuspensionCase:
    stages = tuple(PlanStage(node.public_key, number, number + 1) for number, node in enumerate(WITNESSES[:4]))
    plan = Plan(1, b"m" * 32, "float", "float32", stages)
    terms = replace(terms_for(cast(Manifest, MODEL), plan, [b"\0" * 4], 8), coordinator=COORDINATOR.public_key)
    statements = []
    for number, speaker in enumerate(speakers):
        said = Statement(1, speaker.public_key, ACCUSED.public_key, terms.session, SILENT, issued_ms + number * spread_ms)
        statements.append(SignedStatement.sign(replace(said, **changes), speaker))  # type: ignore[arg-type]
    return SuspensionCase(1, terms, plan, tuple(statements))


EVERYBODY = {witness.public_key for witness in WITNESSES}


class TestSuspension:
    def test_a_quorum_suspends_for_a_time(self) -> None:
        found = check_suspension(case(WITNESSES[1:4]), EVERYBODY, NOW_MS)
        assert (found.node, found.cause, found.until_ms) == (ACCUSED.public_key, SILENT, NOW_MS + SUSPENSION_MS)
        assert SuspensionCase.from_bytes(case(WITNESSES[1:4]).to_bytes()).id == case(WITNESSES[1:4]).id

    @pytest.mark.parametrize(
        ("said", "standing", "now_ms", "because"),
        [
            (case(WITNESSES[1:3]), EVERYBODY, NOW_MS, "3 have to"),
            (case([WITNESSES[1]] * 3), EVERYBODY, NOW_MS, "3 have to"),
            (case([*WITNESSES[1:3], ACCUSED]), EVERYBODY, NOW_MS, "3 have to"),
            (case([*WITNESSES[1:3], Identity(b"s" * 32)]), EVERYBODY, NOW_MS, "3 have to"),
            (case(WITNESSES[1:4]), EVERYBODY - {WITNESSES[1].public_key}, NOW_MS, "suspend nobody"),
            (case(WITNESSES[1:4]), EVERYBODY, NOW_MS + SUSPENSION_MS, "is over"),
            (case(WITNESSES[1:4]), EVERYBODY, NOW_MS - HOUR_MS, "from the future"),
            (case(WITNESSES[1:4], spread_ms=WITNESS_SPREAD_MS), EVERYBODY, NOW_MS + 2 * WITNESS_SPREAD_MS, "the same time"),
            (case(WITNESSES[1:4], cause="ugly"), EVERYBODY, NOW_MS, "no cause"),
            (case(WITNESSES[1:4], session=b"x" * 32), EVERYBODY, NOW_MS, "the same event"),
            (case(WITNESSES[1:4], accused=b"x" * 32), EVERYBODY, NOW_MS, "no stage"),
            (case(WITNESSES[1:4], witness=WITNESSES[1].public_key), EVERYBODY, NOW_MS, "not signed"),
            (case([]), EVERYBODY, NOW_MS, "nobody"),
        ],
    )
    def test_anything_less_suspends_nobody(self, said, standing, now_ms, because) -> None:  # type: ignore[no-untyped-def]
        with pytest.raises((VerificationError, MalformedError), match=because):
            check_suspension(said, standing, now_ms)

    def test_terms_of_another_plan_have_no_witnesses(self) -> None:
        said = case(WITNESSES[1:4])
        with pytest.raises(VerificationError, match="not about this plan"):
            check_suspension(replace(said, plan=replace(said.plan, dtype="bfloat16")), EVERYBODY, NOW_MS)

    def test_a_word_repeated_later_does_not_prolong_it(self) -> None:
        once = check_suspension(case(WITNESSES[1:4]), EVERYBODY, NOW_MS)
        both = case(WITNESSES[1:4]).statements + case(WITNESSES[1:4], NOW_MS + 1000).statements
        again = check_suspension(replace(case([]), statements=both), EVERYBODY, NOW_MS)
        assert again == once

    @given(st.integers(4, 400))
    def test_two_quorums_share_an_honest_witness(self, n: int) -> None:
        f = (n - 1) // 3
        assert 2 * quorum_of(n) - n >= f + 1
        assert quorum_of(n) <= n - f


def test_statistics_demote_only_what_is_clear() -> None:
    tally = Tally(audits_ok=100)
    for _ in range(7):
        tally = tally.ran(flaky=True)
    assert not tally.demoted_because
    assert "8 of its last 8" in tally.ran(flaky=True).demoted_because
    steady = Tally(audits_ok=100)
    for number in range(10 * TALLY_MAX):
        steady = steady.ran(slow=number % 10 == 0)
    assert steady.runs < TALLY_MAX
    assert not steady.demoted_because
    for _ in range(TALLY_MAX):
        steady = steady.ran(mismatched=True)
    assert "float results differed" in steady.demoted_because


@given(st.integers(0, 300), st.integers(0, 300))
def test_the_bound_on_a_rate_is_below_the_rate(failures: int, successes: int) -> None:
    runs = failures + successes
    assert 0 <= failure_rate_at_least(failures, runs) <= (failures / runs if runs else 0) + 1e-12


def test_the_worst_state_that_applies_counts() -> None:
    suspension = Suspension(b"a" * 32, b"s" * 32, SILENT, 0, 1000)
    flaky = Tally(audits_ok=20, runs=10, flaky=9)

    def state(tally: Tally, evidence: bytes | None = None, held: bool = False, until: int = 0) -> str:
        suspended = replace(suspension, until_ms=until) if until else None
        return standing_of(tally, evidence_id=evidence, held=held, suspension=suspended, probation_runs=20, now_ms=500).state

    assert state(Tally()) == PROBATION
    assert state(Tally(audits_ok=20)) == GOOD
    assert state(flaky) == DEMOTED
    assert state(flaky, until=1000) == SUSPENDED
    assert state(flaky, until=500) == DEMOTED
    assert state(flaky, b"e" * 32, until=1000) == SLASHED
    assert state(Tally(audits_ok=20), b"e" * 32, held=True) == SUSPENDED
    assert Tally().reputation == 0.5
    assert Tally().audited(True).reputation > 0.5 > Tally().audited(False).reputation
