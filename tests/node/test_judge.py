"""The judge of a node: over a real model's own exact.json, once per plan, and for nodes that are only imagined."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from nexus.core.errors import CapacityError, VerificationError
from nexus.core.manifest import Manifest
from nexus.core.plan import Plan, PlanStage
from nexus.network.simulated import SimulatedNetwork
from nexus.node.blobs import Fetcher
from nexus.node.judge import Judge, imagined_placement
from nexus.node.models import Models
from nexus.storage.blobs import BlobStore
from nexus.storage.catalog import Catalog
from tests.engine.conftest import Folder
from tests.swarm.node_records import node_record
from tests.swarm.ring import identity

OWN, SECOND, THIRD = (identity(number) for number in range(3))
MakeModel = Callable[[str], tuple[Manifest, Folder]]


@asynccontextmanager
async def judge_of(model: tuple[Manifest, Folder], directory: Path) -> AsyncIterator[Judge]:
    manifest, folder = model
    blobs, catalog = BlobStore.open(directory), Catalog.open(directory)
    for blob in manifest.files:
        blobs.put(blob.name, blob.size, [folder.paths[blob.name].read_bytes()])
    catalog.add("tiny", manifest)
    async with SimulatedNetwork(1).open(OWN) as transport:
        models = Models(
            catalog, blobs, Fetcher(transport, blobs, catalog), auto_fetch=True, memory_max_bytes=1 << 30, changed=lambda: None
        )
        yield Judge(OWN.public_key, models, lambda root: [])


def plan_of(manifest: Manifest, *cuts: tuple[bytes, int, int]) -> Plan:
    return Plan(1, manifest.root, "exact", "exact", tuple(PlanStage(*cut) for cut in cuts))


async def test_a_plan_is_proven_from_the_models_own_numbers(exact_model: MakeModel, tmp_path: Path) -> None:
    model = exact_model("llama")
    manifest = model[0]
    half = manifest.layers // 2
    plan = plan_of(manifest, (OWN.public_key, 0, half), (SECOND.public_key, half, manifest.layers))
    async with judge_of(model, tmp_path) as judge:
        judgement = await judge(plan, manifest)
        assert judgement.plan_root == plan.root
        squares = next(proof for proof in judgement.proofs if proof.name == "norm.squares")
        assert squares.value == manifest.hidden_size << 38
        # Proven before: the same proofs, times and all.
        assert await judge(plan, manifest) == judgement


async def test_a_plan_that_is_not_sound_names_what_is_not(exact_model: MakeModel, tmp_path: Path) -> None:
    model = exact_model("llama")
    manifest = model[0]
    async with judge_of(model, tmp_path) as judge:
        with pytest.raises(VerificationError, match=f"layer {manifest.layers - 1} is computed 0 times"):
            await judge(plan_of(manifest, (OWN.public_key, 0, manifest.layers - 1)), manifest)


async def test_two_replicas_may_share_this_node_and_no_other(exact_model: MakeModel, tmp_path: Path) -> None:
    model = exact_model("llama")
    manifest = model[0]
    whole = plan_of(manifest, (OWN.public_key, 0, manifest.layers))
    first = plan_of(manifest, (OWN.public_key, 0, 1), (SECOND.public_key, 1, manifest.layers))
    second = plan_of(manifest, (SECOND.public_key, 0, 1), (THIRD.public_key, 1, manifest.layers))
    async with judge_of(model, tmp_path) as judge:
        assert await judge(first, manifest, (whole,))
        with pytest.raises(VerificationError, match="in the plan twice"):
            await judge(first, manifest, (second,))


def test_imagined_nodes_are_like_this_one_and_all_have_a_part(exact_model: MakeModel) -> None:
    manifest, _ = exact_model("llama")
    own = node_record(OWN.public_key, name="own")
    for nodes in (1, 2, manifest.layers, manifest.layers + 3):
        plan = imagined_placement(manifest, own, nodes, 64).plan
        assert len(plan.stages) == min(nodes, manifest.layers)
        assert own.node in {stage.node for stage in plan.stages} or nodes > manifest.layers
    with pytest.raises(CapacityError):
        imagined_placement(manifest, replace(own, memory_bytes=1), 2, 64)
