"""Node records for tests: everything that a test does not say has a plain value."""

from __future__ import annotations

from typing import Any

from nexus.swarm.links import NOWHERE
from nexus.swarm.membership import Holding, LayerRange, NodeRecord


def node_record(node: bytes, **fields: Any) -> NodeRecord:
    """`speed`: of both profiles."""
    speed = fields.pop("speed", 1000)
    memory_bytes = fields.get("memory_bytes", 1 << 30)
    plain = {
        "spec": 1,
        "issued_ms": 0,
        "agent": "test",
        "name": "",
        "addresses": (),
        "memory_bytes": memory_bytes,
        "memory_free_bytes": memory_bytes,
        "exact_speed": speed,
        "float_speed": speed,
        "upload": 0,
        "load": 0,
        "coordinate": NOWHERE,
        "serves": 1,
        "leaving": 0,
        "models": (),
        "price": 0,
    }
    return NodeRecord(node=node, **{**plain, **fields})


def holding(name: str, model_root: bytes, *held: tuple[int, int], serving: tuple[tuple[int, int], ...] = ()) -> Holding:
    ranges = [tuple(LayerRange(start, end) for start, end in one) for one in (held, serving)]
    return Holding(name, model_root, ranges[0], ranges[1], 0)
