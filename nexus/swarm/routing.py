"""Routing: the fastest chain over what nodes hold already. Nothing is fetched, so it can be asked anew for every request.

The layers are a graph: from where one stage ends, every node that holds the next layer leads on to any layer up to which it holds
them, at the cost of the link to it and of its computing, shared with the sessions that it runs already. The way through it with the
least predicted step time is the route (`nexus.swarm.chains`); a node is passed once. A way on which every node computes just the
range that it holds is taken if it is not much slower (`nexus.swarm.whole`): only those who share a range share its weights and its
batches.

What nodes say of their load is some seconds old, and whoever asks in the meantime sees the same numbers: all would run to the same
idle node. So every stage is then drawn anew among the nodes that could compute it as fast if all were idle: two at random, and the
less loaded of the two takes it. That keeps the longest queue short with little knowledge (Mitzenmacher, The power of two choices in
randomized load balancing, 2001). This node's own stage stays here: its load is known to the moment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from nexus.core.manifest import Manifest
from nexus.swarm.chains import Chain, Ring, Stage, timing
from nexus.swarm.costs import Candidate, RttUs, StageCosts, load_of, rtt_default, work_picoseconds
from nexus.swarm.placement import SHORTLIST, SLACK, STREAMS, Placement, as_placement, check_streams, expected, in_preference
from nexus.swarm.whole import fastest_of_whole

# Of every layer so many holders are looked at before the rest of the shortlist is filled.
HOLDERS = 2
# A chain of whole fragments may be predicted to take longer than the fastest one, by one part in so many: its stages are loaded,
# and their steps are batched with those of others.
WHOLE_SLACK = 2


def route(
    manifest: Manifest,
    candidates: Sequence[Candidate],
    *,
    coordinator: bytes,
    stages: int | None,
    dtype: str,
    context: int,
    streams: int = STREAMS,
    rtt_us: RttUs = rtt_default,
    below: Callable[[int], int],
) -> Placement | None:
    """The fastest chain of stages that need fetch nothing; None where held layers do not cover the model, or not within the memory
    or in as many `stages` as are asked for. `below`: a random number from 0 to below its argument."""
    check_streams(streams)
    costs = StageCosts(manifest, dtype, context)
    holders = _shortlist(costs, [node for node in in_preference(candidates, coordinator, manifest.layers) if node.held])
    if not holders or (stages is not None and not 1 <= stages <= min(len(holders), manifest.layers)):
        return None
    ring = Ring(costs, holders, rtt_us=rtt_us, streams=streams, stages=stages, held_only=True)
    fastest = ring.fastest()
    if fastest is None:
        return None
    whole = fastest_of_whole(costs, holders, rtt_us=rtt_us, streams=streams, stages=stages)
    step_ps = ring.step_ps(fastest)
    if whole is not None and ring.step_ps(whole) <= step_ps + step_ps // WHOLE_SLACK:
        fastest = whole
    chain = _spread(costs, fastest, holders, coordinator, streams, rtt_us, below)
    predicted = timing(costs, chain, rtt_us)
    changed = sum(one.node.node != other.node.node for one, other in zip(chain, fastest, strict=True))
    reason = f"{len(chain)} {'stage' if len(chain) == 1 else 'stages'} over layers that nodes hold already, nothing to fetch; "
    reason += expected(chain, streams, predicted)
    if changed:
        reason += f"; {changed} drawn from replicas as good, so that not all run to the same"
    return as_placement(manifest, costs, chain, dtype, streams, predicted, reason)


def _shortlist(costs: StageCosts, holders: Sequence[Candidate]) -> list[Candidate]:
    """Those to search among, in the same order: of every layer the HOLDERS that would compute it soonest, then whoever is fastest.
    Empty where a layer has no holder."""
    if not _covered(holders, costs.layers):
        return []
    if len(holders) <= SHORTLIST:
        return list(holders)
    rank = {node.node: number for number, node in enumerate(holders)}
    soonest = sorted(holders, key=lambda node: (work_picoseconds(node, 1 << 20), rank[node.node]))
    lacking = [HOLDERS] * costs.layers
    chosen: set[bytes] = set()
    for node in soonest:
        if len(chosen) >= SHORTLIST // 2:
            break
        layers = [layer for low, high in node.held for layer in range(low, high) if lacking[layer]]
        if layers:
            chosen.add(node.node)
            for layer in layers:
                lacking[layer] -= 1
    # Long ranges next: if many short ones took the places, these still lead through the model.
    longest = sorted(holders, key=lambda node: (max(low - high for low, high in node.held), rank[node.node]))
    for node in (*longest[: SHORTLIST // 4], *soonest):
        if len(chosen) >= SHORTLIST:
            break
        chosen.add(node.node)
    return [node for node in holders if node.node in chosen]


def _covered(holders: Sequence[Candidate], layers: int) -> bool:
    held = sorted(span for node in holders for span in node.held)
    upto = 0
    for low, high in held:
        if low > upto:
            return False
        upto = max(upto, high)
    return upto >= layers


def _spread(
    costs: StageCosts,
    fastest: Chain,
    holders: Sequence[Candidate],
    coordinator: bytes,
    streams: int,
    rtt_us: RttUs,
    below: Callable[[int], int],
) -> Chain:
    """Stage by stage: two of those that could take it, drawn at random, and of these the less loaded."""
    chain = list(fastest)
    idle_step = timing(costs, _idle(fastest), rtt_us).step_ps(streams)
    for number, stage in enumerate(fastest):
        if stage.node.node == coordinator:
            continue
        used = {other.node.node for other in chain if other is not chain[number]}
        group = []
        for node in holders:
            if node.node == stage.node.node:
                group.append(node)
            elif node.node not in used and node.node != coordinator and _can_take(costs, node, stage):
                other = (*chain[:number], Stage(node, stage.start, stage.end), *chain[number + 1 :])
                if timing(costs, _idle(other), rtt_us).step_ps(streams) <= idle_step + idle_step // SLACK:
                    group.append(node)
        if len(group) > 1:
            first = below(len(group))
            second = below(len(group) - 1)
            pair = group[first], group[second + (second >= first)]
            chosen = min(pair, key=lambda node: (load_of(node), node.node != stage.node.node))
            chain[number] = Stage(chosen, stage.start, stage.end)
    return tuple(chain)


def _can_take(costs: StageCosts, node: Candidate, stage: Stage) -> bool:
    span = stage.start, stage.end
    if span in stage.node.held:
        holds = span in node.held  # a whole fragment, as everyone has it loaded who holds it
    else:
        holds = any(low <= stage.start and stage.end <= high for low, high in node.held)
    return holds and costs.memory(stage.start, stage.end) <= node.memory_bytes


def _idle(chain: Chain) -> Chain:
    return tuple(Stage(replace(stage.node, load=0), stage.start, stage.end) for stage in chain)
