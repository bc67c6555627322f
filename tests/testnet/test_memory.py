"""The shared memory among real daemons: partitions, absence, private collections, and what is found at others."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nexus.core.errors import NotFoundError
from tests.testnet.memory_nodes import Node, end, meet, until

pytestmark = pytest.mark.slow

SAME_TIMEOUT_S = 60.0
# Shorter than until nodes ask one another for charters by themselves.
KEYS_TIMEOUT_S = 30.0
LATE = 300


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, taken_in: Path) -> Iterator[list[Node]]:
    """Three that know each other."""
    three = [Node(tmp_path_factory.mktemp("nodes") / name, taken_in) for name in ("ada", "ben", "cleo")]
    try:
        for at, node in enumerate(three):
            node.spawn(three[:at])
        for node in three:
            until(node.is_ready, SAME_TIMEOUT_S, f"{node.home.name} is ready")
        join(*three)
        yield three
    finally:
        end(three)


def join(*nodes: Node) -> None:
    """Every one of them is connected to every other, as users connect them."""
    for at, node in enumerate(nodes):
        for other in nodes[:at]:
            if other.peer_id not in node.connected():
                node.nexus("peers", "add", other.address)
    for at in range(len(nodes)):
        meet(*nodes[at:])


def vector(*numbers: float) -> dict[str, Any]:
    """With a text, so that nothing has to be embedded."""
    return {"vector": numbers, "vector_model": "by-hand", "vector_fingerprint": "ab" * 32}


def listed(node: Node, collection: str) -> dict[str, Any]:
    """What `nexus memory ls` says of each block that does not depend on who looks."""
    kept = ("text", "title", "author", "state", "winner", "heads", "parents", "tags", "created_ms", "kind")
    blocks = node.nexus("memory", "ls", "--collection", collection, "--limit", "10000")["blocks"]
    return {block["id"]: {key: block[key] for key in kept} for block in blocks}


def same(nodes: list[Node], collection: str) -> dict[str, Any]:
    """What all of them have in the end."""

    def ids() -> list[list[str]]:
        return [sorted(block["id"] for block in node.blocks(collection)) for node in nodes]

    until(lambda: all(one == ids()[0] for one in ids()), SAME_TIMEOUT_S, f"all have the same blocks in {collection}")
    found = [listed(node, collection) for node in nodes]
    assert all(one == found[0] for one in found)
    return found[0]


def hits(node: Node, question: str, collection: str, **more: Any) -> list[tuple[str, float]]:
    return [(hit["block"]["id"], hit["score"]) for hit in node.search(question, collection, **more)["hits"]]


def test_partitioned_while_both_write_then_healed(nodes: list[Node]) -> None:
    ada, ben, cleo = nodes
    ada.nexus("collection", "create", "river", "--write", ben.peer_id, "--write", cleo.peer_id)
    for node in (ben, cleo):
        assert node.nexus("collection", "subscribe", "river", "--from", ada.peer_id)["collection"]["may_write"]
    (first,) = ada.add("The gauge at the bridge reads two metres.", "river", title="gauge")
    (mistaken,) = ben.add("The ferry runs at night.", "river")
    (stays,) = cleo.add("Herons nest on the island.", "river", tags=["birds"])
    assert set(same(nodes, "river")) == {first, mistaken, stays}

    # Nobody has a way to anybody: Ada and Ben are elsewhere and know no address, Cleo knows where they were.
    end((ada, ben))
    for node in (ada, ben):
        node.isolate()
        node.spawn()
    for node in (ada, ben):
        until(node.is_ready, SAME_TIMEOUT_S, f"{node.home.name} is ready")
    written = {node: node.add(f"{node.home.name} saw the river rise at noon.", "river")[0] for node in nodes}
    versions = [
        ada.add("The gauge at the bridge reads three metres.", "river", replaces=first)[0],
        ben.add("The gauge at the bridge reads four metres.", "river", replaces=first)[0],
    ]
    # Ben corrects himself once more: his version builds on more, so it is the one that is shown.
    versions.append(ben.add("The gauge at the bridge reads four metres and a half.", "river", replaces=versions[1])[0])
    assert ben.nexus("memory", "rm", mistaken, "--yes")["removed"] == [mistaken]
    assert not any(node.connected() for node in nodes)
    assert mistaken in listed(ada, "river")
    assert not {written[ben], *versions[1:]} & set(listed(ada, "river"))

    # Cleo is the only one who is told where the others are.
    for node in (ada, ben):
        cleo.nexus("peers", "add", node.address)
    blocks = same(nodes, "river")
    assert {stays, *written.values(), versions[2]} <= set(blocks)
    assert mistaken not in blocks
    for node in nodes:
        view = node.get(f"/v0/memory/blocks/{first}")
        assert (view["winner"], view["heads"]) == (versions[2], [versions[2], versions[0]])
        assert view["state"] == "superseded"
        assert node.get(f"/v0/memory/blocks/{mistaken}")["text"] == ""
        assert node.get(f"/v0/memory/blocks/{mistaken}")["state"] == "removed"

    for question in ("How high is the water at the bridge?", "birds on the island", "Does the ferry run at night?"):
        for more in ({}, {"hybrid": True}):
            found = [hits(node, question, "river", **more) for node in nodes]
            assert found[0] == found[1] == found[2]
            assert not {mistaken, first, versions[1]} & set(dict(found[0]))

    # A later version settles it, for all.
    (settled,) = ada.add("The gauge at the bridge reads five metres.", "river", replaces=first)
    until(lambda: all(n.get(f"/v0/memory/blocks/{first}")["heads"] == [settled] for n in nodes), SAME_TIMEOUT_S, "it is settled")
    same(nodes, "river")


def test_a_node_that_was_away_for_long_catches_up(nodes: list[Node]) -> None:
    ada, ben, cleo = nodes
    ada.nexus("collection", "create", "diary")
    for node in (ben, cleo):
        node.nexus("collection", "subscribe", "diary", "--from", ada.peer_id)
    ada.add("The first day.", "diary", **vector(1, 0))
    same(nodes, "diary")
    cleo.stop()
    for day in range(LATE // 2):
        ada.add(f"Ada's day {day}.", "diary", **vector(day, 1))
        ben.add(f"Ben's day {day}.", "diary", **vector(1, day))
    cleo.start([ada])
    assert len(same(nodes, "diary")) == LATE + 1
    assert cleo.nexus("memory", "verify", "--all")["verified"]["damaged"] == 0


def test_a_private_collection_shows_nothing_to_others(nodes: list[Node]) -> None:
    owner, member, stranger = nodes
    secret = "The key to the boathouse hangs behind the oak."
    owner.nexus("collection", "create", "keys", "--private")
    owner.nexus("collection", "grant", "keys", member.peer_id)
    (block,) = owner.add(secret, "keys", title="boathouse")
    member.nexus("collection", "subscribe", "keys", "--from", owner.peer_id)
    same([owner, member], "keys")
    question = "Where is the key to the boathouse?"
    until(lambda: hits(member, question, "keys"), SAME_TIMEOUT_S, "the member finds it")
    assert hits(member, question, "keys") == hits(owner, question, "keys")
    assert member.nexus("memory", "get", block)["block"]["text"] == secret
    # A reader is no writer.
    assert "may not write" in member.nexus("memory", "add", "-", "--collection", "keys", code=4, stdin="I was here.")["cause"]

    # Neither by name, nor by id, nor in a search, whoever is asked.
    for source in (owner, member):
        assert stranger.nexus("collection", "subscribe", "keys", "--from", source.peer_id, code=5)["fix"]
    assert stranger.nexus("collection", "subscribe", "keys", code=5)["fix"]
    assert stranger.nexus("memory", "get", block, "--network", code=5)["fix"]
    everywhere = stranger.nexus("memory", "search", question, "--network", "--hybrid")["search"]
    assert {peer["outcome"] for peer in everywhere["asked"]} <= {"answered"}
    assert block not in [hit["block"]["id"] for hit in everywhere["hits"]]
    assert secret not in str(everywhere)
    assert stranger.nexus("memory", "search", question, "--network", "--collection", "keys", code=5)["fix"]
    # Who is taken out reads what there was, and nothing that comes after.
    owner.nexus("collection", "grant", "keys", member.peer_id, "--revoke")
    (later,) = owner.add("The key now hangs under the mat.", "keys")
    assert hits(owner, "Where does the key hang now?", "keys")[0][0] == later
    assert owner.nexus("memory", "get", later)["block"]["text"] == "The key now hangs under the mat."
    status = member.nexus("collection", "sync", "keys")["sync"]
    assert isinstance(status, list)
    with pytest.raises(NotFoundError):
        member.get(f"/v0/memory/blocks/{later}")
    assert member.nexus("memory", "get", later, "--network", code=5)["fix"]
    assert later not in dict(hits(member, "Where does the key hang now?", "keys"))
    assert member.nexus("memory", "get", block)["block"]["text"] == secret
    # Another one who is let in reads all of it, and who comes back as well.
    owner.nexus("collection", "grant", "keys", member.peer_id)
    until(lambda: later in dict(hits(member, "Where does the key hang now?", "keys")), KEYS_TIMEOUT_S, "the member is back")
    owner.nexus("collection", "grant", "keys", stranger.peer_id, "--write")
    stranger.nexus("collection", "subscribe", "keys", "--from", owner.peer_id)
    same([owner, stranger], "keys")
    until(
        lambda: hits(stranger, question, "keys") == hits(owner, question, "keys"), SAME_TIMEOUT_S, "the new member finds the same"
    )
    # Whoever goes takes nothing from those who stay: they get the new key at once.
    owner.nexus("collection", "grant", "keys", member.peer_id, "--revoke")
    owner.add("The oak was cut down.", "keys")
    tree = "What happened to the oak?"
    until(lambda: hits(stranger, tree, "keys") == hits(owner, tree, "keys"), KEYS_TIMEOUT_S, "who stays reads what is new")
    assert "cut down" not in str(member.search(tree, "keys"))
    (theirs,) = stranger.add("The mat is at the back door.", "keys")
    until(lambda: theirs in listed(owner, "keys"), SAME_TIMEOUT_S, "the owner has what the new member wrote")
    assert theirs not in dict(hits(member, "Where is the mat?", "keys"))


def test_found_at_others_without_following(nodes: list[Node]) -> None:
    ada, ben, cleo = nodes
    ada.nexus("collection", "create", "weather")
    (block,) = ada.add("A storm comes up from the west in the evening.", "weather", title="forecast")
    assert "weather" not in [one["name"] for one in cleo.nexus("collection", "ls")["collections"]]
    assert cleo.nexus("memory", "get", block, "--local", code=5)["fix"]
    view = cleo.nexus("memory", "get", block, "--network")["block"]
    assert (view["text"], view["author"]) == ("A storm comes up from the west in the evening.", ada.peer_id)
    found = cleo.nexus("memory", "search", "Will there be a storm?", "--network", "--collection", "weather")["search"]
    assert found["complete"]
    assert [(hit["block"]["id"], hit["found_at"]) for hit in found["hits"]] == [(block, ada.peer_id)]
    assert found["hits"][0]["score"] == pytest.approx(ada.search("Will there be a storm?", "weather")["hits"][0]["score"], abs=1e-6)

    # Both have the collection; one of them does not get its turn: what the other has is shown, and said to be a part.
    ben.nexus("collection", "subscribe", "weather", "--from", ada.peer_id)
    same([ada, ben], "weather")
    ben.signal(signal.SIGSTOP)
    try:
        # Before the transport gives the silent one up.
        found = ada.nexus("memory", "search", "Will there be a storm?", "--network", "--collection", "weather", "--deadline", "1")
    finally:
        ben.signal(signal.SIGCONT)
    found = found["search"]
    assert not found["complete"]
    assert [(peer["peer_id"], peer["outcome"]) for peer in found["asked"]] == [(ben.peer_id, "no answer in time")]
    assert [hit["block"]["id"] for hit in found["hits"]] == [block]
