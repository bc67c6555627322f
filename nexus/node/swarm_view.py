"""What `nexus swarm` shows: every node that this one knows, and how many replicas the layers of each model have. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from nexus.swarm.health import GONE, STUCK, Vitals, is_usable
from nexus.swarm.membership import Holding, LayerRange, NodeRecord

# Nodes say what they hold themselves: a listing is as long as its reader wants, and no longer than this.
NODES_MAX = 4096
NODES_SHOWN = 256
MODELS_SHOWN = 64
HOLDINGS_SHOWN = 16


@dataclass(frozen=True, slots=True)
class SwarmFragment:
    """Layers of a model, as ranges [start, end): what a node holds, and what of it it undertook to serve."""

    model: str
    model_root: bytes
    held: tuple[tuple[int, int], ...]
    serving: tuple[tuple[int, int], ...]
    version: int


@dataclass(frozen=True, slots=True)
class SwarmNode:
    """`state`: of `nexus.swarm.health`; "this node" for the one that was asked. `heard_s`: seconds since it last answered, None
    where nobody asked. `rtt_us`: from here. `measured`: whether that was measured, or follows from coordinates. Speeds are in
    millions of multiply-adds per second. `fragments_total`: how many there are; at most HOLDINGS_SHOWN are listed. All but `state`,
    `heard_s` and measured round trips is the node's own word."""

    peer_id: str
    name: str
    state: str
    heard_s: float | None
    rtt_us: int | None
    measured: bool
    load: int
    serves: bool
    leaving: bool
    memory_bytes: int
    memory_free_bytes: int
    exact_speed: int
    float_speed: int
    upload: int
    fragments: tuple[SwarmFragment, ...]
    fragments_total: int


@dataclass(frozen=True, slots=True)
class SwarmLayers:
    """Layers [start, end) that are on as many nodes."""

    start: int
    end: int
    replicas: int


@dataclass(frozen=True, slots=True)
class SwarmModel:
    """`replicas`: on how many nodes that answer and stay each run of layers is. `goal`: on how many it should be. `short`: how many
    replicas the layer with the fewest lacks, `spare`: how many more than that it has."""

    name: str
    model_root: bytes
    layers: int
    replicas: tuple[SwarmLayers, ...]
    goal: int
    short: int
    spare: int


@dataclass(frozen=True, slots=True)
class SwarmView:
    """`nodes`: at most as many as were asked for, this node first, those that need a look next. `nodes_total`, `models_total`: how
    many there are. `alive`: nodes that plans may count on, this one too."""

    nodes: tuple[SwarmNode, ...]
    nodes_total: int
    alive: int
    models: tuple[SwarmModel, ...]
    models_total: int


THIS_NODE = "this node"


def swarm_view(
    own: NodeRecord,
    records: Sequence[NodeRecord],
    vitals: Callable[[bytes], Vitals],
    rtt_us: Callable[[bytes, bytes], int],
    measured_us: Callable[[bytes], int | None],
    layers_of: Callable[[bytes], int | None],
    goal: int,
    now_s: float,
    limit: int,
) -> SwarmView:
    """`records`: of the other nodes. `layers_of`: how many layers a model has, by its root, None where that is not known. `goal`:
    replicas that every layer should have. `limit`: how many nodes to list."""

    def state_of(record: NodeRecord) -> str:
        return THIS_NODE if record.node == own.node else vitals(record.node).state

    def order(record: NodeRecord) -> tuple[bool, bool, str, bytes]:
        return record.node != own.node, state_of(record) not in (STUCK, GONE) and not record.leaving, record.name, record.node

    def node(record: NodeRecord) -> SwarmNode:
        heard_s, measured = vitals(record.node).heard_s, measured_us(record.node)
        is_own = record.node == own.node
        return SwarmNode(
            peer_id=record.peer_id,
            name=record.name,
            state=state_of(record),
            heard_s=None if heard_s is None or is_own else max(0.0, now_s - heard_s),
            rtt_us=None if is_own else rtt_us(own.node, record.node),
            measured=measured is not None,
            load=record.load,
            serves=bool(record.serves),
            leaving=bool(record.leaving),
            memory_bytes=record.memory_bytes,
            memory_free_bytes=record.memory_free_bytes,
            exact_speed=record.exact_speed,
            float_speed=record.float_speed,
            upload=record.upload,
            fragments=tuple(_fragment(holding) for holding in record.models[:HOLDINGS_SHOWN]),
            fragments_total=len(record.models),
        )

    everybody = sorted([own, *(record for record in records if record.node != own.node)], key=order)
    usable = [record for record in everybody if record.node == own.node or is_usable(vitals(record.node).state)]
    models = _models(usable, layers_of, goal)
    # Those whose replicas are short first: they want a look.
    shown = sorted(models, key=lambda model: (-model.short, model.name, model.model_root))[:MODELS_SHOWN]
    return SwarmView(
        nodes=tuple(node(record) for record in everybody[: min(limit, NODES_MAX)]),
        nodes_total=len(everybody),
        alive=len(usable),
        models=tuple(shown),
        models_total=len(models),
    )


def _fragment(holding: Holding) -> SwarmFragment:
    return SwarmFragment(holding.name, holding.model_root, _ranges(holding.held), _ranges(holding.serving), holding.version)


def _ranges(ranges: Iterable[LayerRange]) -> tuple[tuple[int, int], ...]:
    return tuple((one.start, one.end) for one in ranges)


def _models(records: Iterable[NodeRecord], layers_of: Callable[[bytes], int | None], goal: int) -> list[SwarmModel]:
    """What the nodes that stay and serve hold together."""
    names: dict[bytes, str] = {}
    ends: dict[bytes, int] = {}
    holders: dict[bytes, dict[bytes, list[LayerRange]]] = {}
    for record in records:
        for holding in record.models:
            names[holding.model_root] = names.get(holding.model_root) or holding.name
            ends[holding.model_root] = max([ends.get(holding.model_root, 0), *(held.end for held in holding.held)])
            found = holders.setdefault(holding.model_root, {})
            if record.serves and not record.leaving:
                found.setdefault(record.node, []).extend(holding.held)
    return [_model(root, names[root], list(found.values()), layers_of(root) or ends[root], goal) for root, found in holders.items()]


def _model(root: bytes, name: str, holders: Sequence[Sequence[LayerRange]], layers: int, goal: int) -> SwarmModel:
    """`holders`: the ranges of each node."""
    counts = [0] * layers
    for ranges in holders:
        # What a node says twice counts once, and what no model has not at all.
        for layer in {layer for held in ranges for layer in range(held.start, min(held.end, layers))}:
            counts[layer] += 1
    runs: list[SwarmLayers] = []
    for layer, count in enumerate(counts):
        if runs and runs[-1].replicas == count:
            runs[-1] = SwarmLayers(runs[-1].start, layer + 1, count)
        else:
            runs.append(SwarmLayers(layer, layer + 1, count))
    fewest = min(counts, default=0)
    return SwarmModel(name, root, layers, tuple(runs), goal, max(0, goal - fewest), max(0, fewest - goal))
