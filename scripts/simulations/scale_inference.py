"""How many inferences a second a swarm gives: real layout and routes, and a discrete-event simulation of its nodes and links.

An inference is one token-step: one token of one stream through the whole model. The loop is closed: each stream wants its next
token when it has the last, and goes round the ring of its chain. A node takes what waits for one fragment as one batch, one batch
at a time; what it sends waits for its line; then half a round trip passes. Prompts, audits and faults are not in it.
"""

from __future__ import annotations

import random
import time
from collections import deque
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from statistics import mean, median

from nexus.swarm.costs import StageCosts
from nexus.swarm.layout import Member, layout
from nexus.swarm.placement import STREAMS, place
from nexus.swarm.routing import route
from scripts.simulations.scale_machine import (
    BATCH,
    FRAME_BYTES,
    HOP_S,
    MEMORY_BYTES,
    PAYLOAD_BYTES,
    PROVER_SHARE,
    SESSION_TOKENS,
    UPLOAD_BYTES_PER_S,
    Machines,
    batch_factor,
    manifest,
)

DTYPE = "exact"
# A plan is made for so many streams under way (placement's STREAMS), and so many run over it.
GROUP = STREAMS
GROUPS_PER_NODE = 3
# A node that a stream begins at knows so many holders of the model.
KNOWN = 64
# The load that others see is so old: records go round every few seconds.
LOAD_AGE_S = 5.0
OPEN_WITHIN_S = 30.0
WARM_UP_S = 10.0
WINDOW_S = 10.0
# What nodes of a busy swarm say of their time: all of it, and as much again waits. Layout gives such layers more replicas.
BUSY = 1.5
ROUNDS_MAX = 16


@dataclass(frozen=True, slots=True)
class InferenceFigures:
    """`inferences_per_s`: token-steps of all streams. `step_ms`: of one stream, median. `stages`: in the mean chain. `busy`: share
    of their time that nodes compute, mean and of the busiest. `batch`: mean steps taken at once. `line`: of the busiest line, the
    share of its time. `layout_rounds`: until every node served. `place_s`, `route_s`, `layout_s`: wall clock of one call here."""

    nodes: int
    streams: int
    inferences_per_s: float
    step_ms: float
    stages: float
    busy_mean: float
    busy_max: float
    batch: float
    line_max: float
    serving: int
    layout_rounds: int
    place_s: float
    route_s: float
    layout_s: float


@dataclass(slots=True)
class _Stream:
    """`chain`: the stages' nodes, by number. `spans`: their layers. `at`: which one has it now."""

    chain: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    at: int = 0
    last_s: float = 0.0


class _Node:
    """`waiting`: streams by the layers they are here for, in order of arrival of the first of each."""

    __slots__ = ("busy", "busy_s", "free_s", "line_s", "speed", "waiting")

    def __init__(self, speed: float) -> None:
        self.speed = speed
        self.waiting: dict[tuple[int, int], deque[int]] = {}
        self.busy = False
        self.busy_s = self.line_s = self.free_s = 0.0


_ARRIVE, _DONE = 0, 1


class _Flow:
    """The events. All times are virtual seconds."""

    def __init__(self, machines: Machines, costs: StageCosts) -> None:
        self._machines = machines
        self._costs = costs
        self.nodes = [_Node(machine.speed) for machine in machines.all]
        self.streams: list[_Stream] = []
        self._events: list[tuple[float, int, int, int, tuple[int, ...]]] = []
        self._order = 0
        self.now_s = 0.0
        self.window = (0.0, 0.0)
        self.steps = self.batches = self.batched = 0
        self.step_s: list[float] = []

    def open(self, stream: _Stream, at_s: float) -> None:
        stream.last_s = at_s
        self.streams.append(stream)
        self._push(at_s, _ARRIVE, stream.chain[0], (len(self.streams) - 1,))

    def _push(self, at_s: float, kind: int, node: int, streams: tuple[int, ...]) -> None:
        self._order += 1
        heappush(self._events, (at_s, self._order, kind, node, streams))

    def run_to(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, kind, number, streams = heappop(self._events)
            node = self.nodes[number]
            if kind == _ARRIVE:
                stream = self.streams[streams[0]]
                node.waiting.setdefault(stream.spans[stream.at], deque()).append(streams[0])
            else:
                node.busy = False
                for one in streams:
                    self._send(number, one)
            if not node.busy and node.waiting:
                self._begin(number, node)
        self.now_s = until_s

    def _in_window(self) -> bool:
        return self.window[0] <= self.now_s < self.window[1]

    def _begin(self, number: int, node: _Node) -> None:
        """The batch whose first step has waited longest among the spans that came first."""
        span = next(iter(node.waiting))
        queue = node.waiting.pop(span)
        batch = tuple(queue.popleft() for _ in range(min(BATCH, len(queue))))
        if queue:
            # What is left goes to the end: the other fragment of this node has its turn.
            node.waiting[span] = queue
        arithmetic_s = self._costs.work(*span) / node.speed * batch_factor(len(batch)) * (1 + PROVER_SHARE)
        taken_s = arithmetic_s + HOP_S * len(batch)
        node.busy = True
        if self._in_window():
            node.busy_s += min(taken_s, self.window[1] - self.now_s)
            self.batches += 1
            self.batched += len(batch)
        self._push(self.now_s + taken_s, _DONE, number, batch)

    def _send(self, number: int, which: int) -> None:
        stream, node = self.streams[which], self.nodes[number]
        stream.at += 1
        if stream.at == len(stream.chain):
            stream.at = 0
            if self._in_window():
                self.steps += 1
                self.step_s.append(self.now_s - stream.last_s)
            stream.last_s = self.now_s
        target = stream.chain[stream.at]
        arrives_s = self.now_s
        if target != number:
            # The last stage sends a token, the others the values of one.
            sent_s = ((PAYLOAD_BYTES if stream.at else 4) + FRAME_BYTES) / UPLOAD_BYTES_PER_S
            node.free_s = max(node.free_s, self.now_s) + sent_s
            arrives_s = node.free_s + self._machines.rtt_s(number, target) / 2
            if self._in_window():
                node.line_s += sent_s
        self._push(arrives_s, _ARRIVE, target, (which,))

    def loads(self) -> list[int]:
        """Streams that each node has a stage of."""
        loads = [0] * len(self.nodes)
        for stream in self.streams:
            for number in stream.chain:
                loads[number] += 1
        return loads


def inference_figures(seed: int, count: int) -> InferenceFigures:
    model = manifest()
    costs = StageCosts(model, DTYPE, SESSION_TOKENS)
    machines = Machines(seed, count, costs.work(0, costs.layers))
    rng = random.Random(f"inference {seed} {count}")
    rtt_us = machines.rtt_us
    everyone = [machine.candidate for machine in machines.all]

    began = time.perf_counter()
    place(model, everyone, coordinator=everyone[0].node, stages=None, dtype=DTYPE, context=SESSION_TOKENS, rtt_us=rtt_us)
    place_s = time.perf_counter() - began

    # The swarm as it grows under load: busy fragments gain replicas until every node serves.
    serving: dict[bytes, tuple[tuple[int, int], ...]] = {node.node: () for node in everyone}
    layout_s, rounds = 0.0, 0
    while rounds < ROUNDS_MAX and not all(serving.values()):
        members = [Member(node, MEMORY_BYTES, serving[node.node], None, BUSY if serving[node.node] else 0.0) for node in everyone]
        began = time.perf_counter()
        laid = layout(model, members, replicas=None, dtype=DTYPE, context=SESSION_TOKENS, rtt_us=rtt_us)
        layout_s = max(layout_s, time.perf_counter() - began)
        rounds += 1
        now: dict[bytes, list[tuple[int, int]]] = {}
        for fragment in laid.fragments:
            now.setdefault(fragment.node, []).append((fragment.start, fragment.end))
        before, serving = serving, {node.node: tuple(now.get(node.node, ())) for node in everyone}
        if serving == before:
            break

    flow = _Flow(machines, costs)
    holders = [number for number, node in enumerate(everyone) if serving[node.node]]
    groups = GROUPS_PER_NODE * count
    seen, seen_s = [0] * count, 0.0
    route_times: list[float] = []
    for number in range(groups):
        at_s = OPEN_WITHIN_S * number / groups
        if at_s - seen_s >= LOAD_AGE_S:
            seen, seen_s = flow.loads(), at_s
        asker = number % count
        known = sorted({*rng.sample(holders, min(KNOWN, len(holders))), *([asker] if serving[everyone[asker].node] else [])})
        candidates = [replace(everyone[one], held=serving[everyone[one].node], load=seen[one]) for one in known]
        began = time.perf_counter()
        found = route(
            model,
            candidates,
            coordinator=everyone[asker].node,
            stages=None,
            dtype=DTYPE,
            context=SESSION_TOKENS,
            rtt_us=rtt_us,
            below=rng.randrange,
        )
        route_times.append(time.perf_counter() - began)
        if found is None:
            raise RuntimeError(f"no route over {len(known)} of {count} nodes: their layers do not cover the model")
        chain = tuple(machines.by_key[stage.node] for stage in found.plan.stages)
        spans = tuple((stage.start, stage.end) for stage in found.plan.stages)
        for _ in range(GROUP):
            flow.open(_Stream(chain, spans), at_s)
    began_s = OPEN_WITHIN_S + WARM_UP_S
    flow.window = began_s, began_s + WINDOW_S
    flow.run_to(began_s + WINDOW_S)
    busy = [node.busy_s / WINDOW_S for node in flow.nodes]
    return InferenceFigures(
        nodes=count,
        streams=GROUP * groups,
        inferences_per_s=round(flow.steps / WINDOW_S, 1),
        step_ms=round(1000 * median(flow.step_s), 1),
        stages=round(mean(len(stream.chain) for stream in flow.streams), 2),
        busy_mean=round(mean(busy), 3),
        busy_max=round(max(busy), 3),
        batch=round(flow.batched / flow.batches, 2),
        line_max=round(max(node.line_s for node in flow.nodes) / WINDOW_S, 3),
        serving=len(holders),
        layout_rounds=rounds,
        place_s=round(place_s, 3),
        route_s=round(median(route_times), 4),
        layout_s=round(layout_s, 3),
    )
