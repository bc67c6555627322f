"""Versions: which of several blocks that replace one another is shown. The same answer on every node that has the same blocks.

A block names the earlier versions that it replaces, and a tombstone those that it takes away. A link counts where both ends are
known and the rules of the collection (`nexus.memory.collection`) allow it; any other says nothing, so nobody can replace or hide
what is not theirs. Nothing depends on the order of arrival or on a node's clock: the answer is a function of the set of versions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from nexus.memory.block import PARENTS_MAX, TOMBSTONE, Block, split_ids


class Version(NamedTuple):
    """What of a block decides which version counts."""

    id: bytes
    parents: tuple[bytes, ...]
    author: bytes
    created_ms: int
    is_tombstone: bool

    @classmethod
    def of(cls, identifier: bytes, block: Block) -> Version:
        return cls(identifier, split_ids(block.parents), block.author, block.created_ms, block.kind == TOMBSTONE)


Rule = Callable[[Version, Version], bool]


class Resolution(NamedTuple):
    """`heads`: versions that nothing replaces, the one that is shown first; more than one where they were made concurrently.
    `winner`: that first one, None if nothing is left. `superseded`: replaced by a later version. `removed`: taken away by a
    tombstone. Tombstones themselves are in none of these; they are kept, or what they took away would come back."""

    winner: bytes | None
    heads: tuple[bytes, ...]
    superseded: frozenset[bytes]
    removed: frozenset[bytes]


def same_author(child: Version, parent: Version) -> bool:
    """The rule for taking away, everywhere: only what one wrote oneself."""
    return child.author == parent.author


def resolve(versions: Collection[Version], may_replace: Rule, may_remove: Rule = same_author) -> Resolution:
    """Which versions of one family (see `families`) count.

    A version is superseded once another replaces it. Of concurrent ones the greatest (depth, time, id) wins, depth being the
    longest chain of known versions that it builds on. A tombstone removes its parents and all that these replaced; a version
    that was made beside it, of the same parent, stays; one that builds on it brings the text back. Takes time in proportion to
    the versions and their links, whatever graph it is given; versions that replace one another in a circle are all superseded.
    """
    known = {version.id: version for version in versions}
    below = _links(known, may_replace, may_remove)
    tombstones = [identifier for identifier, version in known.items() if version.is_tombstone]
    reached = _reachable(tombstones, below)
    removed = frozenset(identifier for identifier in reached if not known[identifier].is_tombstone)
    # What a tombstone names is removed.
    replaced = {parent for parents in below.values() for parent in parents}
    superseded = frozenset(identifier for identifier in replaced - removed if not known[identifier].is_tombstone)
    depths = _depths(below)
    heads = [
        identifier
        for identifier, version in known.items()
        if not version.is_tombstone and identifier not in removed and identifier not in superseded
    ]
    heads.sort(key=lambda identifier: (depths[identifier], known[identifier].created_ms, identifier), reverse=True)
    return Resolution(heads[0] if heads else None, tuple(heads), superseded, removed)


def families(versions: Iterable[Version], may_replace: Rule, may_remove: Rule = same_author) -> list[list[Version]]:
    """The versions in groups that links which count hold together, each sorted by id, and the groups by their first.

    A block that names somebody else's as its parent without leave is in a family of its own: it does not compete with it.
    """
    known = {version.id: version for version in versions}
    beside: dict[bytes, list[bytes]] = {identifier: [] for identifier in known}
    for identifier, parents in _links(known, may_replace, may_remove).items():
        for parent in parents:
            beside[identifier].append(parent)
            beside[parent].append(identifier)
    groups, seen = [], set()
    for identifier in sorted(known):
        if identifier not in seen:
            group = {identifier} | _reachable((identifier,), beside)
            seen |= group
            groups.append([known[member] for member in sorted(group)])
    return groups


def to_remove(versions: Collection[Version], target: bytes, may_replace: Rule, may_remove: Rule = same_author) -> list[bytes]:
    """The `parents` fields of the tombstones that `target`'s author has to sign to take it away, with all that it replaced.

    They name each version and not only the last: a node that never saw the versions between can apply them all the same, and
    cannot bring an old one back. One tombstone holds PARENTS_MAX of them. Versions by others are left out, only their
    authors can name those; they go with what replaced them where that is known.
    """
    known = {version.id: version for version in versions}
    below = _links(known, may_replace, may_remove)
    gone = [target, *sorted(_reachable((target,), below) - {target})]
    own = [
        identifier for identifier in gone if known[identifier].author == known[target].author and not known[identifier].is_tombstone
    ]
    return [b"".join(own[at : at + PARENTS_MAX]) for at in range(0, len(own), PARENTS_MAX)]


def _links(known: dict[bytes, Version], may_replace: Rule, may_remove: Rule) -> dict[bytes, list[bytes]]:
    """Of every version the parents that count, each once."""
    links = {}
    for identifier, version in known.items():
        may = may_remove if version.is_tombstone else may_replace
        parents = [known[parent] for parent in dict.fromkeys(version.parents) if parent in known and parent != identifier]
        links[identifier] = [parent.id for parent in parents if may(version, parent)]
    return links


def _reachable(starts: Iterable[bytes], links: dict[bytes, list[bytes]]) -> set[bytes]:
    """All that one or more links lead to."""
    found: set[bytes] = set()
    pending = list(starts)
    while pending:
        for identifier in links[pending.pop()]:
            if identifier not in found:
                found.add(identifier)
                pending.append(identifier)
    return found


def _depths(below: dict[bytes, list[bytes]]) -> dict[bytes, int]:
    """The longest chain under each version. In a circle, and above one, only what does not lead through it counts."""
    above: dict[bytes, list[bytes]] = {identifier: [] for identifier in below}
    waiting = {}
    for identifier, parents in below.items():
        waiting[identifier] = len(parents)
        for parent in parents:
            above[parent].append(identifier)
    depths = dict.fromkeys(below, 0)
    ready = [identifier for identifier, count in waiting.items() if not count]
    while ready:
        parent = ready.pop()
        for child in above[parent]:
            depths[child] = max(depths[child], depths[parent] + 1)
            waiting[child] -= 1
            if not waiting[child]:
                ready.append(child)
    return depths
