"""A plan says which node computes which layers. It is content-addressed: every request and session names its root."""

from __future__ import annotations

from dataclasses import dataclass

from nexus.core.errors import MalformedError
from nexus.core.hashing import tagged_hash
from nexus.core.manifest import EXACT, FLOAT, LAYERS_MAX, Manifest
from nexus.core.record import Record, digest, many, nested, raw, text, uint

STAGES_MAX = 256
# What may be computed in, by profile, what is planned with first. A node signs for no arithmetic that it does not know.
DTYPES = {EXACT: ("exact",), FLOAT: ("float32", "bfloat16")}


@dataclass(frozen=True, slots=True)
class PlanStage(Record):
    """Layers [start, end) on the node with this public key."""

    node: bytes = raw(32)
    start: int = uint(LAYERS_MAX)
    end: int = uint(LAYERS_MAX)


@dataclass(frozen=True, slots=True)
class Plan(Record):
    """`profile`: the arithmetic, the model's. `dtype`: what it computes in, "exact" where the profile leaves no choice."""

    spec: int = uint(1, least=1)
    model_root: bytes = digest()
    profile: str = text(16)
    dtype: str = text(16)
    stages: tuple[PlanStage, ...] = many(nested(PlanStage), STAGES_MAX)

    @property
    def root(self) -> bytes:
        return tagged_hash("plan", self.to_bytes())

    def check(self, manifest: Manifest) -> Plan:
        """This plan, if it covers every layer of this model exactly once, in order, each node once, in arithmetic that there is.
        Raises MalformedError."""
        if self.dtype not in DTYPES.get(self.profile, ()):
            raise MalformedError(f"the plan asks for unknown arithmetic: profile {self.profile!r}, dtype {self.dtype!r}")
        if self.model_root != manifest.root:
            raise MalformedError("the plan is for another model")
        if self.profile != manifest.profile:
            raise MalformedError(f"the plan asks for profile {self.profile!r} of a model of profile {manifest.profile!r}")
        covered = 0
        for stage in self.stages:
            if stage.start != covered or stage.end <= stage.start:
                raise MalformedError(f"the plan does not cover layer {covered} exactly once")
            covered = stage.end
        if covered != manifest.layers:
            raise MalformedError(f"the plan covers {covered} of {manifest.layers} layers")
        if len({stage.node for stage in self.stages}) != len(self.stages):
            raise MalformedError("the plan names a node twice")
        return self
