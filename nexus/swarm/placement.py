"""Placement: which node computes which layers. Pure, and the same for the same nodes in whatever order they are given.

A plan is a chain of stages, each a run of consecutive layers on a node of its own. What counts, in this order:

1. Nothing is put where it does not fit. A stage needs memory for its weights, at the dtype of computation, and for the KV cache of
   the planned context; the first stage also holds the embedding, the last the head, and the embedding where the two are tied.
2. The predicted step time max(latency, streams * slowest stage) is the least (`nexus.swarm.chains`): one token's way round the
   ring, computing and travelling, or the slowest stage times the sessions under way, whichever is longer. A stage takes its
   multiply-adds per token divided by its node's measured speed, times one more than the sessions that the node runs already. Nodes
   are used as long as that makes the step shorter: one that only slows the chain is left out.
3. Within SLACK of that, the plan with the fewest bytes to fetch: measured speeds waver by as much, and moving layers takes minutes.
4. Then nodes come in this order: the coordinator, so that the prompt may stay at home, the nearer ones, the smaller keys.

Nothing but integers decides. Of very many nodes only SHORTLIST are searched: a stranger can make up as many as it likes, and the
search must end all the same. docs/adr/0018-placement-by-step-time.md says what else was considered, docs/placement.md what is
predicted and what lies about capacities can do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nexus.core.errors import CapacityError, UsageError
from nexus.core.manifest import Manifest
from nexus.core.plan import STAGES_MAX, Plan, PlanStage
from nexus.swarm.chains import Chain, Ring, Stage, Timing
from nexus.swarm.costs import (
    SPEED_MAX,
    Candidate,
    RttUs,
    StageCosts,
    load_of,
    merged_ranges,
    rtt_default,
    speed_of,
    stage_picoseconds,
)

__all__ = ["SHORTLIST", "SLACK", "STREAMS", "Candidate", "Placement", "StageCosts", "place", "stage_picoseconds"]

# One part in so many may be given up of the step time for bytes that need not be fetched.
SLACK = 8
# Sessions under way that are planned for where nobody says how many.
STREAMS = 4
STREAMS_MAX = 1 << 16
SHORTLIST = 128


@dataclass(frozen=True, slots=True)
class Placement:
    """`memory_bytes`, `fetch_bytes`, `compute_us` and `reasons` have one entry per stage; `reason` is about the whole; both in
    plain English. Predicted, in microseconds per token: `latency_us`, once round the ring with nobody else there; `slowest_us`,
    what the slowest stage computes, which is number `slowest`; `step_us`, what each of `streams` sessions waits for a token."""

    plan: Plan
    memory_bytes: tuple[int, ...]
    fetch_bytes: tuple[int, ...]
    compute_us: tuple[float, ...]
    reasons: tuple[str, ...]
    reason: str
    streams: int
    latency_us: float
    slowest_us: float
    slowest: int

    @property
    def step_us(self) -> float:
        return max(self.latency_us, self.streams * self.slowest_us)

    @property
    def tokens_per_s(self) -> float:
        """Of one session alone."""
        return 1e6 / self.latency_us

    @property
    def streams_tokens_per_s(self) -> float:
        """Of `streams` sessions together: an upper bound, which a full pipeline comes near to."""
        return self.streams * 1e6 / self.step_us


def place(
    manifest: Manifest,
    nodes: Sequence[Candidate],
    *,
    coordinator: bytes,
    stages: int | None,
    dtype: str,
    context: int,
    streams: int = STREAMS,
    rtt_us: RttUs = rtt_default,
) -> Placement:
    """A plan for the model over the serving nodes, by the rule above. `stages`: exactly so many, None: the rule decides. `streams`:
    sessions that are to run at once. `rtt_us`: predicted round trip between two nodes in microseconds, by their public keys.

    Raises UsageError for more stages than nodes or layers, CapacityError where the model fits nowhere.
    """
    check_streams(streams)
    costs = StageCosts(manifest, dtype, context)
    serving = in_preference(nodes, coordinator, manifest.layers)
    _check_count(stages, serving, manifest.layers)
    ring = Ring(costs, _shortlist(costs, serving, stages), rtt_us=rtt_us, streams=streams, stages=stages)
    fastest = ring.fastest()
    if fastest is None:
        raise _no_room(costs, serving, stages)
    step_ps = ring.step_ps(fastest)
    rank = {node.node: number for number, node in enumerate(serving)}

    def merit(chain: Chain) -> tuple[int, int, int, list[int]]:
        """What is compared between chains that are all fast enough; the least is the best."""
        return fetched(costs, chain), ring.step_ps(chain), len(chain), [rank[stage.node.node] for stage in chain]

    chain = min([fastest, *ring.frugal(step_ps + step_ps // SLACK)], key=merit)
    reason = _whole_reason(costs, chain, serving, nodes, stages, streams, ring.timing(chain))
    return as_placement(manifest, costs, chain, dtype, streams, ring.timing(chain), reason)


def as_placement(
    manifest: Manifest, costs: StageCosts, chain: Chain, dtype: str, streams: int, predicted: Timing, reason: str
) -> Placement:
    plan = Plan(1, manifest.root, manifest.profile, dtype, tuple(PlanStage(one.node.node, one.start, one.end) for one in chain))
    return Placement(
        plan=plan.check(manifest),
        memory_bytes=tuple(costs.memory(one.start, one.end) for one in chain),
        fetch_bytes=tuple(costs.to_fetch(one.start, one.end, one.node.held) for one in chain),
        compute_us=tuple(stage_picoseconds(costs, one.node, one.start, one.end) / 10**6 for one in chain),
        reasons=tuple(_stage_reason(costs, one, chain) for one in chain),
        reason=reason,
        streams=streams,
        latency_us=predicted.latency_ps / 10**6,
        slowest_us=predicted.slowest_ps / 10**6,
        slowest=predicted.slowest,
    )


def least_step_us(manifest: Manifest, nodes: Sequence[Candidate], *, dtype: str, context: int, streams: int) -> float:
    """What no plan over the serving nodes goes below: all layers on the fastest with no link, or shared by all in proportion."""
    work = StageCosts(manifest, dtype, context).work(0, manifest.layers)
    speeds = [speed_of(node) / (1 + load_of(node)) for node in nodes if node.serves]
    return max(work / max(speeds), streams * work / sum(speeds)) if speeds else 0.0


def check_streams(streams: int) -> None:
    """Raises UsageError."""
    if not 1 <= streams <= STREAMS_MAX:
        raise UsageError(f"{streams} streams are to be planned for", f"Say 1 to {STREAMS_MAX}")


def fetched(costs: StageCosts, chain: Chain) -> int:
    """Bytes that a chain's nodes have to fetch before it can run."""
    return sum(costs.to_fetch(one.start, one.end, one.node.held) for one in chain)


def in_preference(nodes: Sequence[Candidate], coordinator: bytes, layers: int) -> list[Candidate]:
    """The nodes to choose from, the preferred ones first; what they say they hold put in order."""
    if len({node.node for node in nodes}) != len(nodes):
        raise UsageError("a node is named twice among those to place on")

    def preference(node: Candidate) -> tuple[bool, int, float, bytes]:
        held = sum(end - start for start, end in node.held)
        return node.node != coordinator, -held, float("inf") if node.rtt_ms is None else node.rtt_ms, node.node

    return sorted((replace(node, held=merged_ranges(node.held, layers)) for node in nodes if node.serves), key=preference)


def _shortlist(costs: StageCosts, serving: Sequence[Candidate], stages: int | None) -> list[Candidate]:
    """Those to search among, in the same order: half of them the first in preference, which hold most, the others the fastest; and
    if all these together have too little memory, also those with the most."""
    count = max(SHORTLIST, stages or 0)
    if len(serving) <= count:
        return list(serving)
    chosen = {node.node for node in serving[: count // 2]}
    rest = sorted(serving[count // 2 :], key=lambda node: (-speed_of(node), -node.memory_bytes, node.node))
    chosen |= {node.node for node in rest[: count - len(chosen)]}
    free = sum(node.memory_bytes for node in serving if node.node in chosen)
    for node in sorted(serving, key=lambda node: (-node.memory_bytes, node.node)):
        if free >= 2 * costs.memory(0, costs.layers) or len(chosen) >= STAGES_MAX:
            break
        if node.node not in chosen:
            chosen.add(node.node)
            free += node.memory_bytes
    return [node for node in serving if node.node in chosen]


def _check_count(stages: int | None, serving: Sequence[Candidate], layers: int) -> None:
    if stages is None:
        return
    if not 1 <= stages <= STAGES_MAX:
        raise UsageError(f"{stages} stages are asked for", f"Ask for 1 to {min(len(serving), layers, STAGES_MAX)}")
    if stages > layers:
        raise UsageError(f"{stages} stages are asked for and the model has {layers} layers", f"Ask for at most {layers}")
    if stages > len(serving):
        raise UsageError(
            f"{stages} stages are asked for and {len(serving)} {'node serves' if len(serving) == 1 else 'nodes serve'}",
            "Ask for fewer, or start more nodes; `nexus peers` lists those in reach",
        )


# --- the reasons ------------------------------------------------------------------------------------------------------------


def _no_room(costs: StageCosts, serving: Sequence[Candidate], stages: int | None) -> CapacityError:
    if not serving:
        return CapacityError(
            "no node serves stages", "Start a node with serve.enabled = true, or connect to one with `nexus peers add MULTIADDR`"
        )
    offered = sum(node.memory_bytes for node in serving)
    needed = costs.memory(0, costs.layers)
    listed = ", ".join(f"{_name(node)} offers {shown_bytes(node.memory_bytes)}" for node in serving[:8])
    more = f" and {len(serving) - 8} more" if len(serving) > 8 else ""
    least = min(costs.memory(layer, layer + 1) for layer in range(costs.layers))
    if offered < needed:
        what = f"it needs {shown_bytes(needed)} and {shown_bytes(needed - offered)} are missing"
    else:
        ends = f"the first stage needs at least {shown_bytes(costs.memory(0, 1))}"
        ends += f", the last {shown_bytes(costs.memory(costs.layers - 1, costs.layers))}"
        count = f"into {stages} stages " if stages else ""
        what = f"it needs {shown_bytes(needed)} and no split {count}fits: the smallest stage has {shown_bytes(least)}, {ends}"
    return CapacityError(
        f"the model has no room: {what} ({listed}{more})",
        "Raise serve.memory_max_bytes, add a node" + (", or ask for another number of stages" if stages else ""),
    )


def _stage_reason(costs: StageCosts, one: Stage, chain: Chain) -> str:
    work = costs.work(one.start, one.end) / max(1, costs.work(0, costs.layers))
    takes = stage_picoseconds(costs, one.node, one.start, one.end)
    memory = costs.memory(one.start, one.end)
    fetch = costs.to_fetch(one.start, one.end, one.node.held)
    ends = [name for name, has in (("embedding", one.start == 0), ("head", one.end == costs.layers)) if has]
    parts = [
        f"{one.end - one.start} of {costs.layers} layers{''.join(f' and the {name}' for name in ends)}",
        f"{work:.0%} of the work in {_time(takes)}{_speed_note(one.node)}",
        f"{shown_bytes(memory)} of {shown_bytes(one.node.memory_bytes)} memory",
        "holds it already" if not fetch else f"fetches {shown_bytes(fetch)}",
    ]
    return "; ".join(parts)


def _speed_note(node: Candidate) -> str:
    notes = [] if 0 < node.speed <= SPEED_MAX else ["speed assumed, not measured"]
    if node.load > 0:
        notes.append(f"shared with {node.load} {'session' if node.load == 1 else 'sessions'}")
    return f" ({', '.join(notes)})" if notes else ""


def _whole_reason(
    costs: StageCosts,
    chain: Chain,
    serving: Sequence[Candidate],
    nodes: Sequence[Candidate],
    stages: int | None,
    streams: int,
    predicted: Timing,
) -> str:
    fetch = fetched(costs, chain)
    used = {one.node.node for one in chain}
    asked = ", as asked" if stages else ""
    parts = [
        f"{len(chain)} {'stage' if len(chain) == 1 else 'stages'} of {len(serving)} serving {_nodes(len(serving))}{asked}, "
        + expected(chain, streams, predicted),
        f"{shown_bytes(costs.memory(0, costs.layers))} of weights and KV cache",
        "nothing to fetch" if not fetch else f"{shown_bytes(fetch)} to fetch",
    ]
    least = min(costs.memory(layer, layer + 1) for layer in range(costs.layers))
    idle = [node for node in serving if node.node not in used]
    small = [node for node in idle if node.memory_bytes < least]
    parts += _left_out(small, f"too small, a layer needs {shown_bytes(least)}")
    parts += _left_out(
        [node for node in idle if node not in small],
        "with another stage a step would take longer" if not stages else "not needed for so many stages",
    )
    parts += _left_out(sorted((node for node in nodes if not node.serves), key=lambda node: node.node), "not serving")
    return "; ".join(parts)


def expected(chain: Chain, streams: int, predicted: Timing) -> str:
    """What is predicted, in words."""
    compute = predicted.latency_ps - predicted.hops_ps
    latency = f"{_time(predicted.latency_ps)} round the ring ({_time(compute)} of computing, {_time(predicted.hops_ps)} of links)"
    slowest = f"{_time(predicted.slowest_ps)} in the slowest stage ({_name(chain[predicted.slowest].node)})"
    step = predicted.step_ps(streams)
    bound = "the ring" if predicted.latency_ps >= streams * predicted.slowest_ps else "the slowest stage"
    sessions = "one session" if streams == 1 else f"{streams} sessions"
    return f"a token takes {latency} and {slowest}: {_time(step)} a step with {sessions}, bound by {bound}"


def _left_out(nodes: Sequence[Candidate], why: str) -> list[str]:
    if not nodes:
        return []
    names = ", ".join(_name(node) for node in nodes[:4]) + (f" and {len(nodes) - 4} more" if len(nodes) > 4 else "")
    return [f"left out: {names} ({why})"]


def _nodes(count: int) -> str:
    return "node" if count == 1 else "nodes"


def _name(node: Candidate) -> str:
    return node.name or node.node.hex()[:8]


def shown_bytes(count: int) -> str:
    """For people."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _time(picoseconds: int) -> str:
    for unit, size in (("s", 10**12), ("ms", 10**9)):
        if picoseconds >= size:
            return f"{picoseconds / size:.1f} {unit}"
    return f"{picoseconds / 10**6:.1f} µs"
