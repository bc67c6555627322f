"""Ten thousand files of evidence about honest nodes, none of which convicts one, whoever made it and of whatever."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest

from nexus.core.errors import MalformedError, NotFoundError, VerificationError
from nexus.engine.exact import native
from nexus.proof.arithmetic.rows import WeightProof
from nexus.proof.evidence import CHAIN, EQUIVOCATION, FALSE_RESPONSE, FORK, KINDS, KV, OP, Evidence, WeightSource, verify_evidence
from tests.honest.accusers import (
    Keys,
    Subject,
    accuse_of_openings,
    accuse_of_receipts,
    accuse_of_rewriting,
    accuse_of_values,
    audit,
    replicate,
)
from tests.honest.conftest import ENCODER
from tests.honest.lies import LIES, REFUSALS, STRANGER, cheater_material, honest_material, signed_by_others
from tests.honest.swarm import Model, Node, Ran, Served, Swarm, draw_plan, draw_session
from tests.proof.pure import PLANS, model

# Of the kind that each lie begins with.
FILES = {OP: 3500, KV: 1500, FALSE_RESPONSE: 2000, CHAIN: 1250, EQUIVOCATION: 1000, FORK: 750}
# Of one file; most take milliseconds. The bound of the work itself is some six seconds (docs/evidence.md, "Bounds").
CPU_MAX_S = 10.0


class All:
    """The weights of all models that there are: nothing fails for want of them."""

    def __init__(self, sources: Mapping[bytes, WeightSource]) -> None:
        self._sources = sources

    def range(self, model_root: bytes, piece: int, start: int, count: int) -> WeightProof:
        if model_root not in self._sources:
            raise NotFoundError("no such model")
        return self._sources[model_root].range(model_root, piece, start, count)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    path = tmp_path_factory.mktemp("nodes")
    made = [Node(number, path / f"{number}.db", native.available()[0]) for number in range(4)]
    yield made
    for node in made:
        node.store.close()


@pytest.fixture(scope="module")
def real_material(honest_model: Callable[[str], Model], nodes: Sequence[Node]) -> tuple[list[Evidence], dict[bytes, WeightSource]]:
    """As `honest_material`, of what real stages signed and showed; each was refused when it was made."""
    found: list[Evidence] = []
    sources: dict[bytes, WeightSource] = {}
    for name in ("llama", "gemma3", ENCODER):
        model_, chance, keys = honest_model(name), random.Random(name), Keys()
        sources[model_.manifest.root] = model_.weights
        for _ in range(4):
            asked = draw_session(chance, model_, draw_plan(chance, model_, nodes))
            ran = Ran(asked, {number: Served() for number in range(len(asked.plan.stages))})
            Swarm(chance, nodes, [ran]).run()
            found += accuse_of_receipts(chance, ran, [], model_, 10)
            for number in ran.served:
                subject = Subject(ran, number, nodes[number].identity)
                done = replicate(subject, nodes[number].kernel)
                found += accuse_of_values(chance, subject, done, 4) + accuse_of_rewriting(chance, subject, done)
                found += accuse_of_openings(chance, subject, *audit(subject, nodes[number].kernel, keys, 0, 3), 2)
    return found, sources


def test_what_an_honest_node_signed_convicts_it_in_no_combination() -> None:
    weights = All({model(name).manifest.root: model(name) for name in PLANS})
    material = honest_material()
    assert {evidence.kind for evidence in material} == set(KINDS)
    for evidence in material:
        with pytest.raises(REFUSALS):
            verify_evidence(evidence, weights)


def test_ten_thousand_files_convict_no_honest_node(
    real_material: tuple[list[Evidence], dict[bytes, WeightSource]],
) -> None:
    cheated = cheater_material()
    real, sources = real_material
    weights = All({**sources, **{model(name).manifest.root: model(name) for name in PLANS}})
    guilty = {*(evidence.accused for evidence in cheated), STRANGER.public_key}
    # What the cheater did in these sessions, and to its account, stays true whoever tells it how.
    sessions = {verify_evidence(evidence).session for evidence in cheated}
    by_kind: dict[str, list[Evidence]] = {kind: [] for kind in KINDS}
    for evidence in (*honest_material(), *real, *cheated):
        by_kind[evidence.kind].append(evidence)
    assert sum(FILES.values()) == 10_000
    outcomes: Counter[str] = Counter()
    for kind, count in FILES.items():
        chance, material = random.Random(kind), by_kind[kind]
        for number in range(count):
            evidence = chance.choice(material)
            other = chance.choice(material if chance.random() < 0.8 else by_kind[chance.choice(KINDS)])
            lie = LIES[number % len(LIES)]
            content = lie(chance, evidence, other)
            began_s = time.process_time()
            try:
                verdict = verify_evidence(Evidence.from_file(content), weights)
            except REFUSALS as error:
                outcomes[type(error).__name__] += 1
            except BaseException as error:
                error.add_note(f"file {number} of {kind}, {lie.__name__}")
                raise
            else:
                outcomes["convicted"] += 1
                assert verdict.accused in guilty, (kind, number, lie.__name__)
                # Who signs lies with a key of its own convicts itself.
                assert verdict.session in sessions or lie is signed_by_others, (kind, number, lie.__name__)
            assert time.process_time() - began_s < CPU_MAX_S, (kind, number, lie.__name__)
    # They reach all the way in: most are well formed, and fail by what they say.
    assert outcomes[VerificationError.__name__] > 2500
    assert outcomes[MalformedError.__name__] > 2500
    assert outcomes["convicted"] < 500
