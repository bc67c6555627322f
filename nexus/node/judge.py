"""Runs the judge for a node: off the event loop, one proof at a time, with the model's plan read from its own exact.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import trio

from nexus.core.hashing import tagged_hash
from nexus.core.manifest import EXACT, Manifest
from nexus.core.plan import DTYPES, STAGES_MAX, Plan
from nexus.network.transport import PeerAddress
from nexus.node.environment import SYSTEM
from nexus.node.models import Models
from nexus.proof.judge import Judgement, judge
from nexus.swarm.membership import NodeRecord
from nexus.swarm.placement import Candidate, Placement, place


class Judge:
    """Proves a plan before it runs. What was proven of a shape and a plan is not proven again; see `nexus.proof.judge`.

    `own`: this node's key. `sources`: peers that have pieces of a model, by its root. `perf_counter`: how long a proof takes.
    """

    def __init__(
        self,
        own: bytes,
        models: Models,
        sources: Callable[[bytes], Sequence[PeerAddress]],
        perf_counter: Callable[[], float] = SYSTEM.perf_counter,
    ) -> None:
        self._trusted = frozenset({own})
        self._models = models
        self._sources = sources
        self._perf_counter = perf_counter
        # Proofs take all of a core: two at once would only be in each other's way.
        self._limiter = trio.CapacityLimiter(1)

    async def __call__(self, plan: Plan, manifest: Manifest, copies: Sequence[Plan] = ()) -> Judgement:
        """`copies`: the plans of the other replicas, in which this node alone may have a part as well.

        Raises VerificationError that names what is not so; NotFoundError or TimedOutError where exact.json cannot be had.
        """
        exact = None
        if manifest.profile == EXACT:
            exact = await self._models.exact_plan(manifest, self._sources(manifest.root))
        replicas = 1 + len(copies)
        work = partial(judge, plan, manifest, exact, replicas, tuple(copies), self._trusted, clock=self._perf_counter)
        return await trio.to_thread.run_sync(work, limiter=self._limiter)


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
            speed=own.speed(manifest.profile),
            rtt_ms=None,
            held=(),
            serves=True,
        )
        for number in range(nodes)
    ]
    stages = min(nodes, manifest.layers, STAGES_MAX)
    dtype = DTYPES[manifest.profile][0]
    return place(manifest, candidates, coordinator=own.node, stages=stages, dtype=dtype, context=context)
