"""Runs the judge for a node: off the event loop, one proof at a time, with the model's plan read from its own exact.json."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import trio

from nexus.core.errors import VerificationError
from nexus.core.hashing import tagged_hash
from nexus.core.manifest import EXACT, EXACT_PLAN, Manifest
from nexus.core.plan import DTYPES, STAGES_MAX, Plan
from nexus.network.transport import PeerAddress
from nexus.node.models import Models
from nexus.proof.arithmetic.plan import ExactPlan
from nexus.proof.judge import Judgement, judge
from nexus.swarm.membership import NodeRecord
from nexus.swarm.placement import Candidate, Placement, place

EXACT_PLAN_BYTES_MAX = 4 << 20


class Judge:
    """Proves a plan before it runs. What was proven of a shape and a plan is not proven again; see `nexus.proof.judge`.

    `sources`: peers that have pieces of a model, by its root.
    """

    def __init__(self, models: Models, sources: Callable[[bytes], Sequence[PeerAddress]]) -> None:
        self._models = models
        self._sources = sources
        # Proofs take all of a core: two at once would only be in each other's way.
        self._limiter = trio.CapacityLimiter(1)

    async def __call__(self, plan: Plan, manifest: Manifest, copies: Sequence[Plan] = ()) -> Judgement:
        """`copies`: the plans of the other replicas. Raises VerificationError that names what is not so; NotFoundError or
        TimedOutError where the model's exact.json cannot be had."""
        exact = await self._exact_plan(manifest) if manifest.profile == EXACT else None
        work = partial(judge, plan, manifest, exact, 1 + len(copies), tuple(copies), clock=time.perf_counter)
        return await trio.to_thread.run_sync(work, limiter=self._limiter)

    async def _exact_plan(self, manifest: Manifest) -> ExactPlan:
        blob = manifest.file(EXACT_PLAN)
        if blob is None or blob.size > EXACT_PLAN_BYTES_MAX:
            raise VerificationError("the model's exact.json is missing or larger than any", "Add the model again")
        from nexus.proof.arithmetic.plan import plan_from_json

        files = await self._models.files(manifest, self._sources(manifest.root), _ignore_progress)
        return plan_from_json(await trio.to_thread.run_sync(files[EXACT_PLAN].read_bytes))


def imagined_placement(manifest: Manifest, own: NodeRecord, nodes: int, context: int) -> Placement:
    """The plan that `nodes` nodes would run that are all like this one, each with a stage as far as there are layers. `context`:
    tokens that memory is planned for.

    Raises CapacityError where the model does not fit so many.
    """
    candidates = [
        Candidate(
            node=own.node if number == 0 else tagged_hash("imagined node", number.to_bytes(4, "little")),
            name=own.name if number == 0 else f"imagined {number + 1}",
            memory_bytes=own.memory_bytes,
            speed=own.speed,
            rtt_ms=None,
            held=(),
            serves=True,
        )
        for number in range(nodes)
    ]
    stages = min(nodes, manifest.layers, STAGES_MAX)
    dtype = DTYPES[manifest.profile][0]
    return place(manifest, candidates, coordinator=own.node, stages=stages, dtype=dtype, context=context)


async def _ignore_progress(phase: str, done: int, total: int) -> None:
    pass
