"""Serving fragments of named models: what a node undertook, which version of a name counts, what to take and when to let go. Pure.

*Versions.* Whoever publishes a model under a name numbers its versions from 1 and signs each (`Publication`). A node follows one
publisher per name, chosen when it began to serve: nobody else's signature moves it. Numbers only rise; a rollback is a new version
with the content of an earlier one, so "the newest" is one rule for both ways.

*Letting go.* A node that no longer wants some layers first withdraws them: its record says that it does not serve them, while it
still does. Then it asks the others, first-hand. Only where enough of them serve a layer by a record made after the withdrawal is
the layer let go; otherwise it is taken back. Of all nodes that ever let go of a layer, the one that withdrew last saw enough others
serve it after that, and none of these has withdrawn: so enough are left, however late or out of order the records are.

*Taking.* Every node computes the same layout from the same records. They never are quite the same, so a node waits for a random
time before it acts on a layout, and acts only if it still says so by then: a short time where layers are missing, a long one where
it would only be better.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from nexus.core.errors import MalformedError, UsageError
from nexus.core.keys import Identity, verify_signature
from nexus.core.manifest import LAYERS_MAX
from nexus.core.record import Record, digest, many, nested, raw, text, uint

NAME_BYTES_MAX = 64
VERSION_MAX = 2**32
# Of a name: the versions that are remembered, and can be gone back to.
VERSIONS_KEPT = 64
# What one undertaking may have taken at once, over all versions that it still serves.
TAKEN_MAX = 16
PROMISES_MAX = 64
BYTES_MAX = 2**56
# On how many nodes each layer should be, where nothing else is asked for.
REPLICAS = 2
# How long a node waits before it acts on a layout: where a layer is on no node, on too few, and where all is well enough.
LOST_S, SHORT_S, CALM_S = 2.0, 10.0, 60.0

Range = tuple[int, int]
Ranges = tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Publication(Record):
    """That a name means this model from now on, by the word of its publisher. `version`: 1 and up, the highest counts."""

    publisher: bytes = raw(32)
    name: str = text(NAME_BYTES_MAX)
    version: int = uint(VERSION_MAX, least=1)
    model_root: bytes = digest()


@dataclass(frozen=True, slots=True)
class SignedPublication(Record):
    publication: Publication = nested(Publication)
    signature: bytes = raw(64)

    @classmethod
    def sign(cls, publication: Publication, publisher: Identity) -> SignedPublication:
        return cls(publication, publisher.sign("publication", publication.to_bytes()))

    def verify(self) -> Publication:
        """Raises VerificationError unless the publisher signed it."""
        verify_signature(self.publication.publisher, "publication", self.publication.to_bytes(), self.signature)
        return self.publication


@dataclass(frozen=True, slots=True)
class Taken(Record):
    """Layers [start, end) of one version that the node fetches or serves."""

    model_root: bytes = digest()
    start: int = uint(LAYERS_MAX)
    end: int = uint(LAYERS_MAX)


@dataclass(frozen=True, slots=True)
class Promise(Record):
    """What the owner of this node undertook for one name. `publisher`: whose versions count, empty: none but this model.
    `model_root`: what the name meant then. `auto`: 1 where the node takes what the swarm needs, 0 for just [start, end).
    `memory_max`, `disk_max`: bytes for it, `upload_max`: bytes per second; 0: no limit but the node's own. `preload`: 1 where
    layers are loaded as soon as they are here. `taken`: what came of it so far, so that a restart begins where it was."""

    name: str = text(NAME_BYTES_MAX)
    publisher: bytes = raw(0, 32)
    model_root: bytes = digest()
    auto: int = uint(1)
    start: int = uint(LAYERS_MAX)
    end: int = uint(LAYERS_MAX)
    memory_max: int = uint(BYTES_MAX)
    disk_max: int = uint(BYTES_MAX)
    upload_max: int = uint(BYTES_MAX)
    preload: int = uint(1)
    taken: tuple[Taken, ...] = many(nested(Taken), TAKEN_MAX)

    def taken_of(self, model_root: bytes) -> frozenset[int]:
        return layers_of((one.start, one.end) for one in self.taken if one.model_root == model_root)

    def with_taken(self, model_root: bytes, layers: Iterable[int]) -> Promise:
        """The same with these layers of that version; none: nothing of it."""
        others = [one for one in self.taken if one.model_root != model_root]
        added = [Taken(model_root, start, end) for start, end in ranges_of(layers)]
        return replace(self, taken=(*others, *added)[-TAKEN_MAX:])


def parse_fragment(given: str, layers: int) -> Range | None:
    """Layers [start, end) of what a user wrote: "auto" (None), "A-B" with the last one included, or a number. Raises UsageError."""
    if given == "auto":
        return None
    match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", given)
    if match is None:
        raise UsageError(f"{given[:40]!r} is no fragment", f'Give "auto", or layers such as 0-{max(0, layers // 2 - 1)}')
    start, end = int(match[1]), int(match[2] or match[1]) + 1
    if not start < end <= layers:
        raise UsageError(
            f"layers {given} are not in a model of {layers} layers" if start < end else f"layers {given} are the wrong way round",
            f"Layers are counted from 0 to {layers - 1}",
        )
    return start, end


def layers_of(ranges: Iterable[Range]) -> frozenset[int]:
    return frozenset(layer for start, end in ranges for layer in range(max(0, start), min(end, LAYERS_MAX)))


def ranges_of(layers: Iterable[int]) -> Ranges:
    """The same layers as ranges [start, end), in order."""
    found: list[list[int]] = []
    for layer in sorted(layers):
        if found and found[-1][1] == layer:
            found[-1][1] = layer + 1
        else:
            found.append([layer, layer + 1])
    return tuple((start, end) for start, end in found)


# --- replicas and versions --------------------------------------------------------------------------------------------------


def replica_counts(layers: int, serving: Iterable[Iterable[Range]]) -> tuple[int, ...]:
    """On how many nodes each layer is. `serving`: the ranges of every node, one entry per node. What nobody could serve counts for
    nothing, and a layer named twice by one node counts once."""
    counts = [0] * layers
    for ranges in serving:
        for layer in layers_of(ranges):
            if layer < layers:
                counts[layer] += 1
    return tuple(counts)


def is_covered(counts: Sequence[int], least: int = 1) -> bool:
    return bool(counts) and min(counts) >= least


@dataclass(frozen=True, slots=True)
class VersionState:
    """A version of a name and how it stands in the swarm. `served`, `held`: nodes per layer that undertook to serve it, and that
    could serve it from their disks; empty where the model itself is not known here yet."""

    version: int
    model_root: bytes
    served: tuple[int, ...]
    held: tuple[int, ...]


def version_to_use(versions: Iterable[VersionState]) -> VersionState | None:
    """The version that a request for the name gets: the newest that is served in whole. Where none is, as far as is known here, the
    newest that is held in whole, those first that anybody serves; then the newest. None without any."""
    newest_first = sorted(versions, key=lambda one: (-one.version, one.model_root))
    served = (one for one in newest_first if is_covered(one.served))
    held = [one for one in newest_first if is_covered(one.held)]
    begun = (one for one in held if any(one.served))
    return next(served, next(begun, next(iter(held), next(iter(newest_first), None))))


def may_retire(old: Sequence[int], new: Sequence[int], replicas: int) -> bool:
    """Whether an old version need not be served any longer. `old`, `new`: nodes per layer that serve each, this one too. The new
    one has to be as safe as the old one is, or as safe as anything has to be; a layer that the old one has and the new one has not
    does not count."""
    if not is_covered(new):
        return False
    return all(have >= min(replicas, had) for have, had in zip(new, old, strict=False))


def next_version(history: Sequence[Publication], publisher: bytes, name: str, model_root: bytes) -> Publication:
    """What comes after these versions, the oldest first. Raises UsageError where that is what the name means already."""
    if history and history[-1].model_root == model_root:
        raise UsageError(f"{name!r} is this model already, version {history[-1].version}", "Nothing is to be done")
    version = history[-1].version + 1 if history else 1
    if version > VERSION_MAX:
        raise UsageError(f"{name!r} has had {VERSION_MAX} versions", "Publish it under another name")
    return Publication(publisher, name, version, model_root)


def rollback_target(history: Sequence[Publication], to: int | None = None) -> Publication:
    """The version whose content a rollback brings back: the one before the content that counts now, or version `to`. Going back
    twice goes back two steps. Raises UsageError."""
    if not history:
        raise UsageError("the model has had one version only", "`nexus model update NAME PATH` makes the next one")
    name, now = history[-1].name, history[-1].model_root
    listed = ", ".join(str(one.version) for one in history)
    if to is not None:
        found = next((one for one in history if one.version == to), None)
        if found is None:
            raise UsageError(f"{name!r} has no version {to}", f"There are {listed}")
        if found.model_root == now:
            raise UsageError(f"{name!r} has the content of version {to} already", f"There are {listed}")
        return found
    # Where the content of now stood first: what came before that is what it replaced.
    first = next(index for index, one in enumerate(history) if one.model_root == now)
    if not first:
        raise UsageError(f"{name!r} has no earlier version", f"There are {listed}; say which with --to")
    return history[first - 1]


# --- letting go -------------------------------------------------------------------------------------------------------------


def needed_elsewhere(planned: Sequence[int], replicas: int) -> tuple[int, ...]:
    """Per layer, on how many other nodes it has to be before this one lets go of it: as many as there should be, or as the layout
    finds room for; one in any case. `planned`: what the layout gives every layer, this node left out."""
    return tuple(max(1, min(replicas, count)) for count in planned)


def to_withdraw(served: frozenset[int], wanted: frozenset[int], elsewhere: Sequence[int], needed: Sequence[int]) -> frozenset[int]:
    """Layers that are served, not wanted, and by the records at hand on enough other nodes. `elsewhere`: others per layer."""
    return frozenset(layer for layer in served - wanted if layer >= len(elsewhere) or elsewhere[layer] >= needed[layer])


def confirmed(withdrawn: frozenset[int], elsewhere: Sequence[int], needed: Sequence[int]) -> frozenset[int]:
    """Of what was withdrawn, the layers that may be let go. `elsewhere`: how many others serve each, by records that they gave
    first-hand after the withdrawal was announced. The rest has to be taken back."""
    return to_withdraw(withdrawn, frozenset(), elsewhere, needed)


# --- taking -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pending:
    """What a layout wants of this node and it has not done yet. `due_s`: when it does it, if the layout still wants it then."""

    wanted: frozenset[int]
    due_s: float


def consider(
    pending: Pending | None,
    taken: frozenset[int],
    wanted: frozenset[int],
    counts: Sequence[int],
    replicas: int,
    now_s: float,
    uniform: Callable[[float, float], float],
) -> tuple[Pending | None, bool]:
    """Whether to take `wanted` now instead of `taken`, and what to remember until the next look.

    `counts`: nodes per layer that serve it now, without those that leave. `uniform`: a random number between two.
    """
    if wanted == taken:
        return None, False
    if not taken:
        return None, True  # there is nothing to lose, and the first to come need not wait for anybody
    fewest = min((counts[layer] for layer in wanted - taken), default=replicas)
    longest_s = LOST_S if not fewest else SHORT_S if fewest < replicas else CALM_S
    due_s = now_s + (uniform(0.0, longest_s) if longest_s < CALM_S else uniform(CALM_S, 2 * CALM_S))
    if pending is None or pending.wanted != wanted:
        return Pending(wanted, due_s), False
    if now_s >= pending.due_s:
        return None, True
    return Pending(wanted, min(pending.due_s, due_s)), False


@dataclass(frozen=True, slots=True)
class Share:
    """One undertaking's claim on the memory or disk of its node. `fixed`: bytes that its layers take, None where it takes what it
    is given. `most`: its limit, 0: none. `demand`: sessions that run on it now."""

    name: str
    fixed: int | None
    most: int
    demand: int


def divide(total: int, shares: Sequence[Share]) -> Mapping[str, int]:
    """Bytes for each: the fixed ones first, then the others, twice as much for one with twice the sessions (in powers of two, so
    that a session more or less seldom moves anything), and nobody more than its limit."""
    given: dict[str, int] = {}
    left = total
    for share in sorted((one for one in shares if one.fixed is not None), key=lambda one: one.name):
        given[share.name] = min(share.fixed or 0, share.most or left, left)
        left -= given[share.name]
    # Those with the least limit per weight first: what they do not take is for the rest.
    rest = [(1 << one.demand.bit_length(), one) for one in shares if one.fixed is None]
    rest.sort(key=lambda entry: ((entry[1].most or BYTES_MAX) // entry[0], entry[1].name))
    weights = sum(weight for weight, _ in rest)
    for weight, share in rest:
        part = left * weight // weights
        given[share.name] = min(part, share.most) if share.most else part
        left -= given[share.name]
        weights -= weight
    return given


def check_promise(promise: Promise) -> Promise:
    """A promise as it came from the disk. Raises MalformedError where its parts do not fit."""
    if not promise.auto and not promise.start < promise.end:
        raise MalformedError("a promise of no layers")
    if any(not one.start < one.end for one in promise.taken):
        raise MalformedError("a promise that took no layers")
    return promise
