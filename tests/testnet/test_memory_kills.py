"""Two daemons write and sync while both are killed at random times: what was acknowledged is there on both, once, and is found.

`NEXUS_TEST_KILLS` says how many kills, `NEXUS_TEST_SEED` which.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nexus.core.errors import NexusError
from nexus.engine.embedding.embedder import Embedder
from nexus.engine.embedding.opening import open_embedder
from nexus.storage.blobs import BlobStore
from nexus.storage.catalog import Catalog
from tests.testnet.memory_nodes import Node, end, meet, until

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("NEXUS_TEST_KILLS", "6"))
SEED = int(os.environ.get("NEXUS_TEST_SEED", "5"))
# Of kills, those that do not wait until the daemon is up: that meets the opening of the store, and its repairs.
EARLY = 0.2
EARLY_MAX_S = 3.0
LIFE_MAX_S = 2.5
SEARCHED_MAX = 40
EMBEDDED_AT_ONCE = 16
COLLECTION = "log"


@pytest.fixture(scope="module")
def embedder(taken_in: Path) -> Embedder:
    """The nodes' own model, here: texts come with their vectors, so that a daemon has nothing to load before it can store them."""
    catalog, blobs = Catalog.open(taken_in), BlobStore(taken_in)
    manifest = catalog.manifest(catalog.names()["minilm"])
    files = {blob.name: blobs.path(blob.root) for blob in (*manifest.pieces, *manifest.files)}
    return open_embedder("minilm", lambda _: (manifest, files))


@pytest.fixture
def nodes(tmp_path: Path, taken_in: Path) -> Iterator[tuple[Node, Node]]:
    pair = (Node(tmp_path / "a", taken_in), Node(tmp_path / "b", taken_in))
    try:
        yield pair
    finally:
        end(pair)


@dataclass
class Written:
    """What a node was asked to keep. `acknowledged`: the texts of which it said so. `again`: how often a text was sent again, since
    the daemon went away before it answered. `known`: how often it was there all the same."""

    acknowledged: list[str] = field(default_factory=list)
    again: int = 0
    known: int = 0


def entries(name: str, embedder: Embedder) -> Iterator[tuple[str, list[float]]]:
    """Texts without end, none twice, with their vectors."""
    choice = random.Random(name)
    for start in itertools.count(step=EMBEDDED_AT_ONCE):
        texts = [f"Entry {start + at} of {name}: the gauge reads {choice.random():.9f}." for at in range(EMBEDDED_AT_ONCE)]
        yield from zip(texts, embedder.embed(texts).tolist(), strict=True)


def write(node: Node, embedder: Embedder, written: Written, over: threading.Event) -> None:
    """One text after the other. One that was not acknowledged is sent again until it is."""
    for text, vector in entries(node.home.name, embedder):
        external = {"vector": vector, "vector_model": "minilm", "vector_fingerprint": embedder.fingerprint.hex()}
        while True:
            try:
                new = node.add(text, COLLECTION, **external)
            except (NexusError, ValueError):
                # It was killed: what it had done by then is not known.
                written.again += 1
                if over.wait(0.05):
                    return
                continue
            written.known += not new
            written.acknowledged.append(text)
            break
        if over.is_set():
            return


def kill(node: Node, other: Node, count: int, choice: random.Random, early: list[int]) -> None:
    """Kill and start a node, some times; it runs in the end."""
    for _ in range(count):
        if choice.random() < EARLY:
            early[0] += 1
            time.sleep(choice.uniform(0, EARLY_MAX_S))
        else:
            until(node.is_ready, 60, f"{node.home.name} is ready")
            time.sleep(choice.uniform(0, LIFE_MAX_S))
        node.kill()
        node.spawn([other])
    until(node.is_ready, 60, f"{node.home.name} is ready")


def test_killed_at_any_time_nothing_acknowledged_is_lost_or_there_twice(nodes: tuple[Node, Node], embedder: Embedder) -> None:
    first, second = nodes
    first.start()
    second.start([first])
    meet(first, second)
    first.post("/v0/collections", {"name": COLLECTION, "mode": "public", "writers": []})
    second.post(f"/v0/collections/{COLLECTION}/subscribe", {"peer": first.peer_id})

    over, early, began_s = threading.Event(), [0], time.monotonic()
    written = {node: Written() for node in nodes}
    with ThreadPoolExecutor() as threads:
        writers = [threads.submit(write, node, embedder, written[node], over) for node in nodes]
        killers = [
            threads.submit(kill, node, other, KILLS // 2 + (at < KILLS % 2), random.Random(SEED * 2 + at), early)
            for at, (node, other) in enumerate((nodes, nodes[::-1]))
        ]
        try:
            for killer in killers:
                killer.result()
        finally:
            over.set()
        for writer in writers:
            writer.result()
    took_s = time.monotonic() - began_s
    synced = {node: sum(block["author"] != node.peer_id for block in everything(node)) for node in nodes}

    first.post("/v0/peers", {"address": second.address})
    until(lambda: ids(first) == ids(second), 60, "both have the same blocks")
    acknowledged = [text for node in nodes for text in written[node].acknowledged]
    texts = Counter(block["text"] for block in everything(first))
    lost = set(acknowledged) - set(texts)
    twice = {text for text, count in texts.items() if count > 1}
    figures = {
        "seed": SEED,
        "kills": KILLS,
        "while_starting": early[0],
        "seconds": round(took_s, 1),
        "acknowledged": len(acknowledged),
        "blocks": len(ids(first)),
        "sent_again": sum(each.again for each in written.values()),
        "there_all_the_same": sum(each.known for each in written.values()),
        "from_the_other_before_healing": [synced[node] for node in nodes],
        "lost": len(lost),
        "twice": len(twice),
    }
    print(json.dumps(figures))
    assert not lost
    assert not twice
    assert all(len(written[node].acknowledged) > KILLS // 4 for node in nodes), figures

    # What the disk holds is whole, and the index has all of it and nothing else.
    for node in nodes:
        assert node.nexus("memory", "verify", "--all")["verified"]["damaged"] == 0
        stats = next(one for one in node.get("/v0/memory/stats")["collections"] if one["collection"].startswith(COLLECTION))
        assert stats["live"] == sum(texts.values()) == dict(stats["vectors"])["minilm"]
    asked = random.Random(SEED).sample(acknowledged, min(SEARCHED_MAX, len(acknowledged)))
    for text in asked:
        found = [node.search(text, COLLECTION, k=3, hybrid=True)["hits"] for node in nodes]
        assert found[0][0]["block"]["text"] == text
        assert [(hit["block"]["id"], hit["score"]) for hit in found[0]] == [(hit["block"]["id"], hit["score"]) for hit in found[1]]


def everything(node: Node) -> list[dict[str, str]]:
    return node.blocks(COLLECTION)


def ids(node: Node) -> set[str]:
    return {block["id"] for block in everything(node)}
