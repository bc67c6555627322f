"""The judge proves what is so and finds what is not: its proofs are only worth as much as the mistakes that they catch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.core.errors import MalformedError, ModelFormatError, VerificationError
from nexus.core.hashing import leaf_hash
from nexus.core.keys import Identity
from nexus.core.manifest import EXACT, FLOAT, Blob, Manifest
from nexus.core.plan import Plan, PlanStage
from nexus.engine.exact.gemm import F32_DEPTH_MAX
from nexus.proof.accounts import EARN, PAY, Entry, Share, SignedEntry, check_split
from nexus.proof.arithmetic.bounds import BYTE_MAX, FIXED_MAX, FLOAT64_LIMIT, WEIGHT_MAX, check_bounds
from nexus.proof.arithmetic.plan import ExactPlan, LayerPlan, Rope
from nexus.proof.freivalds import random_rows
from nexus.proof.judge import Judgement, judge, prove_chain, prove_coverage, prove_distinct
from nexus.proof.rule_proofs import Credits, burn, earn, pay, prove_order, prove_quorums, slash
from nexus.proof.shape_proofs import KEY_BITS, RING_BITS, Shape, products, prove_freivalds, shape_proofs, square
from nexus.proof.solver import Disproven, Solver, Term, Undecided
from nexus.swarm.ledger import Book, session_cost
from nexus.swarm.standing import SlashedSet, quorum_of

FLOAT24_LIMIT = 1 << 24
NODES = [bytes([number]) * 32 for number in range(1, 9)]


def exact_plan(layers: int = 4, **shape: object) -> ExactPlan:
    plan = ExactPlan(
        causal=True,
        layers=(LayerPlan(),) * layers,
        hidden=64,
        ffn=128,
        heads=4,
        kv_heads=2,
        head_dim=16,
        rotated=16,
        vocab=256,
        context=512,
        eps=1e-6,
        activation="silu",
        gated=True,
        tied=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        post_norms=False,
        norm_offset=False,
        attention_scale=0.25,
        attention_cap=0.0,
        logit_cap=0.0,
        embed_scale=0.0,
        ropes=(Rope((("rope_theta", 10000.0),)),),
    )
    return replace(plan, **shape)  # type: ignore[arg-type]


def manifest(profile: str = EXACT, layers: int = 4, hidden: int = 64) -> Manifest:
    dtype = "int8" if profile == EXACT else "float32"
    pieces = tuple(Blob(f"piece {number}", 1, leaf_hash(bytes([number]))) for number in range(layers + 2))
    return Manifest(1, "causal", "LlamaForCausalLM", profile, dtype, layers, hidden, 256, 512, 0, 0, pieces, (), ())


def plan_over(model: Manifest, *stages: tuple[bytes, int, int]) -> Plan:
    dtype = "exact" if model.profile == EXACT else "float32"
    return Plan(1, model.root, model.profile, dtype, tuple(PlanStage(*stage) for stage in stages))


def stages(*ranges: tuple[int, int], nodes: Sequence[bytes] = NODES) -> list[PlanStage]:
    return [PlanStage(node, start, end) for node, (start, end) in zip(nodes, ranges, strict=False)]


MODEL = manifest()
SOUND = plan_over(MODEL, (NODES[0], 0, 1), (NODES[1], 1, 4))
COPY = plan_over(MODEL, (NODES[2], 0, 3), (NODES[3], 3, 4))


def refusal(work: Callable[[], object]) -> str:
    with pytest.raises(Disproven) as refused:
        work()
    assert refused.value.fix
    return refused.value.cause


def test_a_sound_plan_is_proven_whole() -> None:
    names = [proof.name for proof in judge(SOUND, MODEL, exact_plan()).proofs]
    assert len(set(names)) == len(names)
    assert {name.partition(".")[0] for name in names} == {
        *("plan", "integers", "linear", "attention", "norm", "freivalds", "sampler", "slashing", "quorums", "ledger")
    }
    assert all(proof.value < proof.limit for proof in judge(SOUND, MODEL, exact_plan()).proofs if proof.limit)


def test_a_float_plan_has_no_bounds_but_the_rest() -> None:
    model = manifest(FLOAT)
    plan = plan_over(model, (NODES[0], 0, 4))
    groups = {proof.name.partition(".")[0] for proof in judge(plan, model, None).proofs}
    assert groups == {"plan", "slashing", "quorums", "ledger"}


def test_wide_operations_and_encoders_have_proofs_of_their_own() -> None:
    wide = exact_plan(layers=1).widened({"down": [0], "attention": [0]})
    names = {proof.name for proof in shape_proofs(Solver(), Shape.of(wide))}
    assert {"integers.wide", "integers.halves", "linear.wide", "attention.scores-wide"} <= names
    encoder = {proof.name for proof in shape_proofs(Solver(), Shape.of(exact_plan(causal=False)))}
    assert "pooling" in encoder
    assert not any(name.startswith("sampler") or name == "linear.head" for name in encoder)


def test_what_was_proven_once_is_not_proven_again() -> None:
    ticks: list[float] = []

    def clock() -> float:
        ticks.append(0.001 * len(ticks))
        return ticks[-1]

    first: Judgement = judge(SOUND, MODEL, exact_plan(), clock=clock)
    assert all(proof.ms > 0 for proof in first.proofs)
    asked = len(ticks)
    assert judge(SOUND, MODEL, exact_plan(), clock=clock) == first
    assert len(ticks) == asked


# --- plans that do not hold -------------------------------------------------------------------------------------------------


def test_a_missing_layer_is_named() -> None:
    cause = refusal(lambda: prove_coverage(Solver(), [stages((0, 2), (3, 5))], 5))
    assert "layer 2 is computed 0 times" in cause
    assert "layer 4 is computed 0 times" in refusal(lambda: prove_coverage(Solver(), [stages((0, 2), (2, 4))], 5))


def test_an_overlapping_layer_is_named() -> None:
    assert "layer 2 is computed 2 times" in refusal(lambda: prove_coverage(Solver(), [stages((0, 3), (2, 5))], 5))


def test_a_layer_that_only_one_replica_lacks_is_named() -> None:
    cause = refusal(lambda: prove_coverage(Solver(), [stages((0, 5)), stages((0, 4))], 5))
    assert "layer 4 is computed once and 0 times" in cause


@pytest.mark.parametrize("ranges", [((3, 5), (0, 3)), ((0, 3), (3, 3), (3, 5)), ((0, 3), (2, 5)), ((1, 5),), ((0, 4),), ((0, 6),)])
def test_stages_that_do_not_follow_one_another_are_found(ranges: tuple[tuple[int, int], ...]) -> None:
    assert "begins with layer" in refusal(lambda: prove_chain(Solver(), [stages(*ranges)], 5))


def test_a_node_that_is_there_twice_is_named() -> None:
    twice = [NODES[0], NODES[1], NODES[0]]
    cause = refusal(lambda: prove_distinct(Solver(), [stages((0, 1), (1, 2), (2, 3), nodes=twice)]))
    assert NODES[0].hex()[:16] in cause


def test_a_node_in_two_replicas_is_named_also_with_other_layers() -> None:
    one, other = stages((0, 2), (2, 5)), stages((0, 3), (3, 5), nodes=[NODES[4], NODES[0]])
    assert NODES[0].hex()[:16] in refusal(lambda: prove_distinct(Solver(), [one, other]))


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=4), st.lists(st.integers(0, 4), min_size=4))
@settings(max_examples=60, deadline=None)
def test_the_judge_and_the_plans_own_check_agree(ranges: list[tuple[int, int]], picks: list[int]) -> None:
    model = manifest(FLOAT, layers=6)
    plan = plan_over(model, *((NODES[pick], *bounds) for bounds, pick in zip(ranges, picks, strict=False)))

    def holds(check: Callable[[], object]) -> bool:
        try:
            check()
        except (VerificationError, MalformedError):
            return False
        return True

    assert holds(lambda: plan.check(model)) == holds(lambda: judge(plan, model, None))


def test_replicas_that_are_asked_for_must_be_there() -> None:
    assert judge(SOUND, MODEL, exact_plan(), 2, (COPY,))
    with pytest.raises(VerificationError, match="1 of the 2 replicas"):
        judge(SOUND, MODEL, exact_plan(), 2)
    with pytest.raises(Disproven, match="in the plan twice"):
        judge(SOUND, MODEL, exact_plan(), 2, (SOUND,))


def test_only_the_node_that_asks_may_be_in_both_replicas() -> None:
    shared = plan_over(MODEL, (NODES[0], 0, 3), (NODES[3], 3, 4))
    assert judge(SOUND, MODEL, exact_plan(), 2, (shared,), frozenset({NODES[0]}))
    with pytest.raises(Disproven, match="in the plan twice"):
        judge(SOUND, MODEL, exact_plan(), 2, (shared,), frozenset({NODES[1]}))
    with pytest.raises(Disproven, match="in the plan twice"):
        prove_distinct(Solver(), [stages((0, 1), (1, 2), nodes=[NODES[0]] * 2)], frozenset({NODES[0]}))


def test_a_plan_for_another_model_or_a_model_of_another_shape_is_refused() -> None:
    with pytest.raises(VerificationError, match="not for this model"):
        judge(SOUND, manifest(hidden=128), exact_plan(hidden=128))
    with pytest.raises(VerificationError, match="another shape"):
        judge(SOUND, MODEL, exact_plan(hidden=128))
    with pytest.raises(VerificationError, match=r"without its exact\.json"):
        judge(SOUND, MODEL, None)


# --- bounds that do not hold ------------------------------------------------------------------------------------------------


def test_a_norm_without_its_fixed_point_overflows() -> None:
    """The residual of a model of 70 billion weights, in integers as the linear layers leave them: no cap, so no bound."""

    def uncapped(solver: Solver) -> tuple[Term, list[Term]]:
        value = solver.real("value")
        residual = (1 << 22) + 2 * 80 * (28672 * BYTE_MAX * WEIGHT_MAX // 64)
        return value * value, [solver.within(value, residual)]

    def work() -> object:
        return Solver().sum_stays_below("squares", "the squares", 8192, FIXED_MAX**2, 1 << 63, uncapped, "fix")

    assert "value = " in refusal(work)
    assert Solver().sum_stays_below("squares", "the squares", 8192, FIXED_MAX**2, FLOAT64_LIMIT, square, "fix")


def test_a_sum_of_squares_too_many_is_found() -> None:
    def work() -> object:
        return Solver().sum_stays_below("squares", "the squares", 32768, FIXED_MAX**2, FLOAT64_LIMIT, square, "fix")

    assert "32,768 terms" in refusal(work)


def test_a_block_of_float32_products_too_deep_is_found() -> None:
    def blocks(depth: int) -> object:
        return products(Solver(), "blocks", "the sums", depth, BYTE_MAX, WEIGHT_MAX, FLOAT24_LIMIT)

    assert blocks(F32_DEPTH_MAX)
    assert "1,100 terms" in refusal(lambda: blocks(1100))


def test_the_message_of_a_shape_names_the_bound_and_the_way_out() -> None:
    model = manifest(hidden=40_000)
    plan = plan_over(model, (NODES[0], 0, 4))
    with pytest.raises(Disproven, match=r"norm\.squares does not hold") as refused:
        judge(plan, model, exact_plan(hidden=40_000))
    assert "--profile float" in refused.value.fix


DEPTH_MAX = (1 << 31) // (BYTE_MAX * WEIGHT_MAX)


@given(
    hidden=st.one_of(st.integers(1, 40_000), st.sampled_from([32_767, 32_768])),
    ffn=st.one_of(st.integers(1, 200_000), st.sampled_from([DEPTH_MAX, DEPTH_MAX + 1])),
    head_dim=st.integers(1, 256),
    context=st.one_of(st.integers(1, 1 << 25), st.sampled_from([1 << 24, (1 << 24) + 1])),
    causal=st.booleans(),
    wide=st.sampled_from([{}, {"down": [0]}, {"attention": [1]}]),
)
@settings(max_examples=60, deadline=None)
def test_the_judge_and_the_bounds_of_the_converter_agree(wide: dict[str, list[int]], **shape: int) -> None:
    plan = exact_plan(layers=2, **shape).widened(wide)

    def converter() -> bool:
        try:
            check_bounds(plan)
        except ModelFormatError:
            return False
        return True

    def solver() -> bool:
        try:
            shape_proofs(Solver(), Shape.of(plan))
        except VerificationError:
            return False
        return True

    assert converter() == solver()


def test_the_values_in_the_table_are_those_of_the_converter() -> None:
    plan = exact_plan()
    proven = {proof.name: proof.value for proof in shape_proofs(Solver(), Shape.of(plan))}
    said = check_bounds(plan)
    names = {"norm": "norm.squares", "scores": "attention.scores"} | {
        op: f"linear.{op}" for op in ("qkv", "o", "gate_up", "down", "head")
    }
    names |= {"attention_values": "attention.values", "attention_weights": "attention.weights"}
    assert {op: said[op] for op in names} == {op: proven[name] for op, name in names.items()}


def test_freivalds_check_is_not_said_to_be_better_than_it_is() -> None:
    assert prove_freivalds(Solver())
    # With numbers two bits longer some of them miss together: they differ by 2^(n/2+1).
    assert "difference6" in refusal(lambda: prove_freivalds(Solver(), longer=2))


def test_the_keys_are_those_that_the_proof_is_about() -> None:
    drawn = random_rows(bytes(32), 0, 4096)
    assert int(drawn.max()) < 1 << KEY_BITS
    assert drawn.dtype == np.uint64
    assert drawn.dtype.itemsize * 8 == RING_BITS


# --- rules that do not hold -------------------------------------------------------------------------------------------------


def test_fines_in_per_cent_depend_on_their_order() -> None:
    assert prove_order(Solver(), slash)
    assert "first = " in refusal(lambda: prove_order(Solver(), lambda solver, bond, percent: bond * (100 - percent) / 100))


def test_fines_that_add_up_go_below_nothing_or_count_twice() -> None:
    refusal(lambda: prove_order(Solver(), lambda solver, bond, fine: bond - fine))
    refusal(lambda: prove_order(Solver(), lambda solver, bond, fine: solver.choose(bond < fine, 0, bond - fine)))


def test_quorums_of_half_of_the_witnesses_are_not_enough() -> None:
    assert "n = " in refusal(lambda: prove_quorums(Solver(), faulty_of=2))


@pytest.mark.parametrize("witnesses", range(4, 40))
def test_the_quorum_of_the_code_is_the_one_that_is_proven(witnesses: int) -> None:
    f = (witnesses - 1) // 3
    assert quorum_of(witnesses) == witnesses - f
    assert 2 * quorum_of(witnesses) - witnesses >= f + 1


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=12), st.randoms(use_true_random=False))
def test_the_slashed_set_of_the_code_keeps_the_least_id_in_any_order(found: list[tuple[int, int]], rng: object) -> None:
    shuffled = sorted(found, key=lambda _: rng.random())  # type: ignore[attr-defined]
    sets = [SlashedSet(), SlashedSet()]
    for known, order in zip(sets, (found, shuffled), strict=True):
        for node, number in order:
            known.add(NODES[node], bytes([number]) * 32)
    assert sets[0] == sets[1]
    least = {node: min(number for other, number in found if other == node) for node, _ in found}
    assert dict(sets[0].entries()) == {NODES[node]: bytes([number]) * 32 for node, number in least.items()}


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 400), st.integers(1, 3)), min_size=1, max_size=20), st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_the_ledger_of_the_code_makes_the_transitions_that_are_proven(payments: list[tuple[int, int, int]], guilty: int) -> None:
    owners = [Identity(bytes([number]) * 32) for number in range(1, 5)]
    keys = [owner.public_key for owner in owners]
    book, model = Book(), Credits(0, 0, 0, 0, 0)
    plan = Plan(1, MODEL.root, EXACT, "exact", tuple(PlanStage(key, at, at + 1) for at, key in enumerate(keys)))

    def put(entry: Entry, owner: Identity) -> None:
        book.apply(SignedEntry.sign(entry, owner))

    for number, (payer, price, tokens) in enumerate(payments):
        cost = session_cost(plan, tokens, dict.fromkeys(keys, price * 7), keys[payer])
        assert cost is not None
        check_split(cost.amount, [share.amount for share in cost.shares])
        account = book.account(keys[payer])
        session = leaf_hash(number.to_bytes(4, "little"))
        payment = Entry(1, account.public_key, account.entries, account.head, PAY, session, cost.amount, cost.shares, b"")
        put(payment, owners[payer])
        model = pay(model, cost.amount, sum(share.amount for share in cost.shares))
        for share in cost.shares:
            model = take(book, owners, keys, share, payment, model)
        totals = book.totals()
        assert Credits(totals.balances, totals.bonds, totals.unclaimed, totals.vault, totals.burned) == model
        assert model.sum == 0
    model = burn(model, book.account(keys[guilty]).bond)
    totals = book.totals({keys[guilty]})
    assert Credits(totals.balances, totals.bonds, totals.unclaimed, totals.vault, totals.burned) == model


def take(book: Book, owners: list[Identity], keys: list[bytes], share: Share, payment: Entry, model: Credits) -> Credits:
    earner = book.account(share.account)
    before = earner.balance
    entry = Entry(1, earner.public_key, earner.entries, earner.head, EARN, payment.session, share.amount, (), payment.id)
    book.apply(SignedEntry.sign(entry, owners[keys.index(share.account)]))
    return earn(model, share.amount, book.account(share.account).balance - before)


# --- the solver -------------------------------------------------------------------------------------------------------------


def test_what_the_solver_does_not_decide_is_not_proven() -> None:
    with pytest.raises(Undecided):
        Solver(steps_max=1).sum_stays_below("squares", "the squares", 64, FIXED_MAX**2, FLOAT64_LIMIT, square, "fix")


def test_assumptions_that_exclude_each_other_prove_nothing() -> None:
    solver = Solver()
    value = solver.integer("value")
    with pytest.raises(Undecided, match="exclude each other"):
        solver.prove("nonsense", "anything", [([value > 0, value < 0], value == 7)], fix="fix")


def test_importing_nexus_does_not_import_z3() -> None:
    code = "import sys, nexus.proof.judge, nexus_cli.main; sys.exit('z3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
