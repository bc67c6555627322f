"""What users see of blocks and collections, made from what is stored."""

from __future__ import annotations

from collections.abc import Callable

from nexus.core.errors import MalformedError
from nexus.core.keys import peer_id_of
from nexus.memory import collection as rules
from nexus.memory.block import KIND_NAMES, id_text, split_ids
from nexus.memory.bracket import Bracket
from nexus.memory.collection import Charter
from nexus.memory.sky.stamp import SkyStamp
from nexus.node.memory.api import BlockView, CollectionView
from nexus.node.memory.charters import Charters
from nexus.storage.memory.records import Content, StoredBlock

EXCERPT_CHARS = 600

Names = Callable[[], dict[str, str]]


def block_view(stored: StoredBlock, bracket: Bracket, charters: Charters, names: Names, *, whole: bool) -> BlockView:
    """`bracket`: what is known of its time. `whole`: with all of its text."""
    block = stored.block
    content = stored.content or Content()
    author = peer_id_of(stored.author)
    place, step = _place(block.sky if block else b"")
    versions = stored.versions
    return BlockView(
        id=id_text(stored.id),
        kind=KIND_NAMES[stored.kind],
        collection=charters.name(stored.collection),
        author=author,
        author_name=names().get(author, ""),
        created_ms=stored.created_ms,
        expires_ms=stored.expires_ms,
        received_ms=stored.received_ms,
        title=content.title,
        lang=content.lang,
        tags=content.tags,
        text=content.text if whole else content.text[:EXCERPT_CHARS],
        source=content.source.hex(),
        part=content.part,
        links=_texts(content.links),
        parents=_texts(block.parents if block else b""),
        models=tuple(vector.model for vector in content.vectors),
        place=place,
        place_step=step,
        grade=bracket.label,
        not_before_ms=bracket.not_before_ms,
        not_after_ms=bracket.not_after_ms,
        witnesses=bracket.witnesses,
        state=stored.state.name.lower(),
        pinned=stored.pinned,
        winner=id_text(versions.winner) if versions and versions.winner else "",
        heads=tuple(map(id_text, versions.heads)) if versions else (),
        size=len(stored.data),
    )


def collection_view(
    charter: Charter, charters: Charters, names: Names, own_key: bytes, now_ms: int, held: tuple[int, int]
) -> CollectionView:
    """`held`: live blocks and bytes of it here."""
    owner = peer_id_of(charter.owner)
    return CollectionView(
        name=charters.name(charter.id),
        id=charter.id,
        mode=rules.MODE_NAMES[charter.mode],
        owner=owner,
        owner_name=names().get(owner, ""),
        revision=charter.revision,
        writers=tuple(peer_id_of(writer.key) for writer in charter.writers if not writer.until_ms),
        members=tuple(map(peer_id_of, charter.members)),
        may_write=rules.may_write(charter, own_key, now_ms),
        may_read=rules.may_read(charter, own_key),
        subscribed=charters.follows(charter.id),
        blocks=held[0],
        bytes=held[1],
    )


def _texts(joined: bytes) -> tuple[str, ...]:
    return tuple(map(id_text, split_ids(joined)))


def _place(sky: bytes) -> tuple[str, float]:
    """Middle and side of the cell in a stamp."""
    if not sky:
        return "", 0.0
    try:
        cell = SkyStamp.from_bytes(sky).cell
    except MalformedError:
        return "", 0.0
    latitude, longitude = cell.centre()
    return f"{latitude:g}, {longitude:g}", cell.step / 100
