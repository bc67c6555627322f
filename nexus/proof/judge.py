"""The judge: what has to be true of a plan before it runs, proven by Z3 from the plan's own numbers (docs/judge.md).

Four groups of statements. Of the *plan*: every layer is computed exactly once per replica, stages follow one another, no node is
in it twice. Of the model's *shape*: no integer of docs/exact.md leaves the width it is kept in, whatever the weights and inputs,
so that honest machines cannot differ. Of *Freivalds' check*: how often it can be wrong. Of the *rules* that all nodes follow: the
ledger conserves credits, slashing ends the same in any order, two quorums share an honest node.

Each is proven for all values in their ranges, by showing that its negation has no solution. A plan of which something is not
proven does not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from nexus.core.errors import VerificationError
from nexus.core.manifest import CAUSAL, EXACT, Manifest
from nexus.core.plan import Plan, PlanStage
from nexus.proof.arithmetic.plan import ExactPlan
from nexus.proof.rule_proofs import rule_proofs
from nexus.proof.shape_proofs import Shape, freivalds_proofs, shape_proofs
from nexus.proof.solver import Proven, Solver, Term

PLAN_FIX = "Plan it again: `nexus model plan`; if it stays so, a node offers what it does not have"
# Of what is kept per plan, and per shape of a model.
CACHED_MAX = 64

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What was proven of a plan, `plan_root`, and of the copies of it that run beside it."""

    plan_root: bytes
    proofs: tuple[Proven, ...]


def judge(
    plan: Plan,
    manifest: Manifest,
    exact_plan: ExactPlan | None,
    replicas: int = 1,
    copies: Sequence[Plan] = (),
    trusted: frozenset[bytes] = frozenset(),
    clock: Clock | None = None,
) -> Judgement:
    """Prove everything of a plan that may run. Raises VerificationError that names the layer, node or bound that is wrong.

    `exact_plan`: what the model's exact.json says, None in the float profile, which has no bounds. `replicas`: how many times every
    layer is to be computed, by `plan` and by `copies` of it on other nodes. `trusted`: nodes that may be in several of them, which
    is the one that asks. `clock`: seconds, to time the proofs with.

    Takes some tenths of a second the first time, and next to nothing for a shape and rules that were proven before.
    """
    plans = (plan, *copies)
    for one in plans:
        if (one.model_root, one.profile) != (manifest.root, manifest.profile):
            raise VerificationError("the plan is not for this model in this profile", PLAN_FIX)
    if len(plans) != replicas:
        raise VerificationError(f"{len(plans)} of the {replicas} replicas that are asked for are planned", PLAN_FIX)
    proofs = list(_plan_proofs(plans, manifest.layers, trusted, clock))
    if manifest.profile == EXACT:
        if exact_plan is None:
            raise VerificationError("the bounds of an exact model cannot be judged without its exact.json", "Fetch the model again")
        _check_same_model(exact_plan, manifest)
        proofs += _shape_proofs(Shape.of(exact_plan), clock)
        proofs += _freivalds_proofs(clock)
    return Judgement(plan.root, (*proofs, *_rule_proofs(clock)))


def _check_same_model(exact: ExactPlan, manifest: Manifest) -> None:
    said = (exact.causal, len(exact.layers), exact.hidden, exact.vocab)
    shape = (manifest.kind == CAUSAL, manifest.layers, manifest.hidden_size, manifest.vocab_size)
    # A manifest may allow less context than the tables cover, never more: the bounds are those of exact.json.
    if said != shape or manifest.context > exact.context:
        raise VerificationError("exact.json describes a model of another shape than the manifest", "Add the model again")


def _solver(clock: Clock | None) -> Solver:
    return Solver(clock) if clock else Solver()


@lru_cache(maxsize=CACHED_MAX)
def _plan_proofs(plans: tuple[Plan, ...], layers: int, trusted: frozenset[bytes], clock: Clock | None) -> tuple[Proven, ...]:
    solver = _solver(clock)
    replicas = [plan.stages for plan in plans]
    distinct = prove_distinct(solver, replicas, trusted)
    return (prove_coverage(solver, replicas, layers), prove_chain(solver, replicas, layers), distinct)


@lru_cache(maxsize=CACHED_MAX)
def _shape_proofs(shape: Shape, clock: Clock | None) -> tuple[Proven, ...]:
    return shape_proofs(_solver(clock), shape)


@lru_cache(maxsize=1)
def _freivalds_proofs(clock: Clock | None) -> tuple[Proven, ...]:
    return freivalds_proofs(_solver(clock))


@lru_cache(maxsize=1)
def _rule_proofs(clock: Clock | None) -> tuple[Proven, ...]:
    return rule_proofs(_solver(clock))


# --- the plan ---------------------------------------------------------------------------------------------------------------


def prove_coverage(solver: Solver, replicas: Sequence[Sequence[PlanStage]], layers: int) -> Proven:
    """Whatever layer one takes, each replica computes it in exactly one stage."""
    layer = solver.integer("layer")
    times = [
        sum((solver.choose(_is_in(solver, layer, stage), solver.number(1), solver.number(0)) for stage in stages), solver.number(0))
        for stages in replicas
    ]

    def explain(example: dict[str, str]) -> str:
        index = int(example.get("layer", "0"))
        counts = [sum(stage.start <= index < stage.end for stage in stages) for stages in replicas]
        return f"layer {index} is computed " + " and ".join("once" if count == 1 else f"{count} times" for count in counts)

    return solver.prove(
        "plan.coverage",
        f"every one of {layers} layers is computed exactly once" + (f" by each of {len(replicas)} replicas" * (len(replicas) > 1)),
        [([layer >= 0, layer < layers], solver.all(*(count == 1 for count in times)))],
        fix=PLAN_FIX,
        explain=explain,
    )


def _is_in(solver: Solver, layer: Term, stage: PlanStage) -> Term:
    return solver.all(layer >= stage.start, layer < stage.end)


def prove_chain(solver: Solver, replicas: Sequence[Sequence[PlanStage]], layers: int) -> Proven:
    """No stage is empty, and each begins with the layer after the last one of the stage before: the output of one is the input of
    the next."""
    stage, begins, ends, before = solver.integers("stage begins ends before")
    obligations = []
    for stages in replicas:
        starts = [one.start for one in stages]
        edges = [0, *(one.end for one in stages)]
        facts = [
            stage >= 0,
            stage <= len(stages),
            begins == _entry(solver, stage, [*starts, layers]),
            before == _entry(solver, stage, edges),
            ends == _entry(solver, stage, [*edges[1:], layers + 1]),
        ]
        obligations.append((facts, solver.all(begins == before, ends > begins)))
    return solver.prove(
        "plan.chain",
        f"the stages follow one another from layer 0 to layer {layers - 1}",
        obligations,
        fix=PLAN_FIX,
        explain=lambda example: (
            f"stage {example.get('stage', '0')} begins with layer {example['begins']} and ends before {example['ends']}, "
            f"where layer {example['before']} is next"
        ),
    )


def _entry(solver: Solver, index: Term, values: Sequence[int]) -> Term:
    """values[index]."""
    term = solver.number(values[-1])
    for number in reversed(range(len(values) - 1)):
        term = solver.choose(index == number, solver.number(values[number]), term)
    return term


def prove_distinct(solver: Solver, replicas: Sequence[Sequence[PlanStage]], trusted: frozenset[bytes] = frozenset()) -> Proven:
    """No node computes in two places: neither twice in a replica, nor, unless it is `trusted`, in two replicas, where it could
    answer twice with one lie."""
    nodes = [stage.node for stages in replicas for stage in stages]
    # One that is trusted counts as another one in every replica.
    places = [(stage.node, replica if stage.node in trusted else 0) for replica, stages in enumerate(replicas) for stage in stages]
    numbers = {place: number for number, place in enumerate(dict.fromkeys(places))}
    here, there, node = solver.integers("here there node")
    named = [numbers[place] for place in places]
    obligations = []
    if len(nodes) > 1:
        within = [here >= 0, here < there, there < len(nodes), node == _entry(solver, here, named)]
        obligations.append((within, node != _entry(solver, there, named)))
    return solver.prove(
        "plan.nodes",
        f"no node has more than one of the {len(nodes)} places",
        obligations,
        fix="Ask for fewer replicas or stages, or add a node",
        explain=lambda example: f"node {nodes[int(example['there'])].hex()[:16]} is in the plan twice",
    )
