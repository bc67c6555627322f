"""Fragments served over the simulated network: taken, taken over, let go of, and versions that roll while requests are made."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
from trio.testing import MockClock

from nexus.core.errors import CapacityError, NexusError, NotAllowedError, NotFoundError, UsageError
from nexus.core.keys import Identity
from nexus.core.manifest import EMBEDDING, HEAD, Manifest, layer_name
from nexus.network.simulated import SimulatedNetwork
from nexus.node import fragments as fragments_module
from nexus.node.blobs import BlobService, Fetcher
from nexus.node.environment import Environment
from nexus.node.fragments import Fragments
from nexus.node.fragments_api import DrainView, ServeRequest, ServingView
from nexus.node.membership import Membership
from nexus.node.models import Models
from nexus.node.progress import Notice, Progress
from nexus.node.serving import Serving
from nexus.storage.blobs import BlobStore
from nexus.storage.catalog import Catalog, held_layers
from nexus.storage.fragments import FragmentStore
from nexus.swarm.fragments import Publication, SignedPublication, layers_of
from nexus.swarm.links import NOWHERE
from nexus.swarm.membership import Holding, NodeRecord

EPOCH_MS = 1_700_000_000_000
LAYERS, PIECE_BYTES = 8, 4096
# Room for half of the model: five of its layers, less what the ends take.
HALF = 5 * PIECE_BYTES + 1024
T = TypeVar("T")


async def at_once(work: Callable[..., T], *arguments: object, **options: object) -> T:
    """Work for the disk in no virtual time: under the autojump clock a real thread would let hours pass."""
    await trio.lowlevel.checkpoint()
    return work(*arguments)


@pytest.fixture(autouse=True)
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trio.to_thread, "run_sync", at_once)


def make_model(store: BlobStore, number: int) -> Manifest:
    """A float model that takes PIECE_BYTES per layer in memory and on disk, and next to nothing for its cache."""

    def blob(name: str, size: int) -> Any:
        return store.put(name, size, [bytes([number]) + name.encode().ljust(size - 1, b"\0")])

    pieces = (blob(EMBEDDING, 64), *(blob(layer_name(layer), PIECE_BYTES) for layer in range(LAYERS)), blob(HEAD, 64))
    return Manifest(
        1, "causal", "Toy", "float", "float32", LAYERS, 4, 256, 64, 4, 0, pieces, (blob("config.json", 32),), ()
    ).check()


class Node:
    """A node with everything that serving needs, and nothing that computes."""

    def __init__(self, world: World, number: int, memory: int, replicas: int | None) -> None:
        self.world = world
        self.name = f"n{number}"
        self.identity = Identity(number.to_bytes(32, "big"))
        self.home = world.directory / self.name
        self.memory = memory
        self.replicas = replicas
        self.load = 0
        self.refusing = False
        self.sessions = 0
        self.handed_over = False
        self.scope = trio.CancelScope()
        self.extra: tuple[Holding, ...] = ()

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        with self.scope:
            async with self.world.network.open(self.identity) as self.transport:
                self.blobs = BlobStore.open(self.home)
                self.catalog = Catalog.open(self.home)
                self.store = FragmentStore(self.home / "fragments.db")
                self.fetcher = Fetcher(self.transport, self.blobs, self.catalog, off_thread=at_once)
                self.models = Models(
                    self.catalog,
                    self.blobs,
                    self.fetcher,
                    auto_fetch=False,
                    memory_max_bytes=1 << 30,
                    changed=lambda: self.membership.announce_soon(),
                )
                self.membership = Membership(self.transport, self.identity, self._describe, self.world.now_ms)
                self.fragments = Fragments(
                    self.identity,
                    self.store,
                    self.models,
                    self,
                    self.world.environment,
                    serve=True,
                    replicas=self.replicas,
                    memory_bytes=self.memory,
                    disk_bytes=1 << 30,
                    off_thread=at_once,
                )
                self.models.kept = self.fragments.kept
                self.serving = Serving(
                    self.fragments, self._resolve, lambda peer: peer, self._import, self, self.membership.announce_soon
                )
                try:
                    BlobService(self.transport, self.blobs, self.catalog, at_once).start()
                    async with trio.open_nursery() as nursery:
                        await nursery.start(self.membership.run)
                        await nursery.start(self.fragments.run)
                        task_status.started()
                        await trio.sleep_forever()
                finally:
                    self.store.close()

    def _describe(self) -> NodeRecord:
        roots = sorted({*self.catalog.roots(), *self.fragments.roots()})
        holdings = []
        for root in roots:
            held = held_layers(self.catalog.manifest(root), self.blobs) if self.catalog.has(root) else ()
            holdings.append(self.fragments.holding(root, self.catalog.name_of(root), held))
        return NodeRecord(
            spec=1,
            node=bytes(32),
            issued_ms=0,
            agent="test",
            name=self.name,
            addresses=tuple(address.rpartition("/p2p/")[0] for address in self.transport.addresses),
            memory_bytes=self.memory,
            memory_free_bytes=self.memory,
            exact_speed=1000,
            float_speed=1000,
            upload=0,
            load=self.load,
            coordinate=NOWHERE,
            serves=1,
            leaving=int(self.fragments.leaving),
            models=(*self.extra, *holdings),
            price=0,
        )

    # Members
    def records(self) -> list[NodeRecord]:
        return self.membership.records()

    def own(self) -> NodeRecord:
        return self.membership.own().record

    async def refresh(self, peer_id: str) -> NodeRecord:
        return await self.membership.refresh(peer_id)

    def announce(self) -> None:
        self.membership.announce_soon()

    def rtt_us(self, one: bytes, other: bytes) -> int:
        return 1000

    # Sessions
    def refuse_new(self, refused: bool) -> None:
        self.refusing = refused

    def hand_over(self) -> None:
        self.handed_over = True

    @property
    def running(self) -> int:
        return self.sessions

    async def _resolve(self, name: str) -> tuple[str, bytes]:
        root = await self.fragments.versions.current(name)
        if root is None:
            known = self.catalog.names().get(name)
            announced = {one.model_root for record in self.records() for one in record.models if one.name == name}
            root = known or next(iter(sorted(announced)), None)
        if root is None:
            raise NotFoundError(f"no model {name!r}")
        return name, root

    async def _import(self, source: Path | str, profile: str) -> AsyncIterator[Progress | Notice | Manifest]:
        yield Progress(self.identity.peer_id, "import", 0, 0)
        manifest = make_model(self.blobs, int(str(source).rpartition("/")[2]))
        self.catalog.keep(manifest)
        yield manifest

    # What tests do.
    def served(self, root: bytes) -> frozenset[int]:
        """What this node serves in truth: announced or just withdrawn, and on its disk."""
        if self.scope.cancel_called or not self.catalog.has(root):
            return frozenset()
        held = layers_of(held_layers(self.catalog.manifest(root), self.blobs))
        taken = [work.promise.taken_of(root) for work in self.fragments._works.values()]
        return held & frozenset().union(*taken)

    def held(self, root: bytes) -> frozenset[int]:
        return layers_of(held_layers(self.catalog.manifest(root), self.blobs)) if self.catalog.has(root) else frozenset()

    async def serve(self, name: str = "m", **options: Any) -> tuple[ServingView, list[str]]:
        said: list[str] = []
        async with aclosing(self.serving.serve(ServeRequest(name, **options))) as events:
            async for event in events:
                if isinstance(event, Notice):
                    said.append(event.text)
                if isinstance(event, ServingView):
                    return event, said
        raise AssertionError

    def add(self, number: int, name: str = "m") -> Manifest:
        manifest = make_model(self.blobs, number)
        self.catalog.add(name, manifest)
        self.announce()
        return manifest


@dataclass
class World:
    directory: Path
    nursery: trio.Nursery
    seed: int = 0
    nodes: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.network = SimulatedNetwork(self.seed)
        self.environment = Environment(self.now_ms, random.Random(self.seed), trio.current_time)

    def now_ms(self) -> int:
        return EPOCH_MS + int(trio.current_time() * 1000)

    async def node(self, memory: int = 1 << 30, replicas: int | None = None) -> Node:
        node = Node(self, len(self.nodes) + 1, memory, replicas)
        await self.nursery.start(node.run)
        for other in self.nodes:
            if not other.scope.cancel_called:
                await node.transport.connect(other.transport.addresses[0])
        self.nodes.append(node)
        await trio.sleep(2)
        return node

    async def restart(self, node: Node) -> Node:
        node.scope.cancel()
        await trio.sleep(1)
        again = Node(self, self.nodes.index(node) + 1, node.memory, node.replicas)
        self.nodes[self.nodes.index(node)] = again
        await self.nursery.start(again.run)
        for other in self.nodes:
            if other is not again and not other.scope.cancel_called:
                await again.transport.connect(other.transport.addresses[0])
        return again

    def crash(self, node: Node) -> None:
        node.scope.cancel()
        self.network.crash(node.identity.peer_id)

    def coverage(self, root: bytes, without: Node | None = None) -> list[int]:
        served = [node.served(root) for node in self.nodes if node is not without]
        return [sum(layer in one for one in served) for layer in range(LAYERS)]

    async def until(self, true: Callable[[], bool], within_s: float = 120) -> float:
        began_s = trio.current_time()
        while not true():
            assert trio.current_time() - began_s < within_s, [
                (node.name, [(view.state, view.detail, view.served, view.short) for view in node.fragments.views()])
                for node in self.nodes
                if not node.scope.cancel_called
            ]
            await trio.sleep(0.1)
        return trio.current_time() - began_s


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        yield World(tmp_path, nursery)
        nursery.cancel_scope.cancel()


# --- taking and taking over -------------------------------------------------------------------------------------------------


async def test_nodes_share_a_model_that_none_could_hold_and_make_up_for_a_crash(world: World, autojump_clock: MockClock) -> None:
    first = await world.node(HALF)
    root = first.add(1).root
    for _ in range(4):
        await world.node(HALF)
    for node in world.nodes:
        await node.serve()
    await world.until(lambda: min(world.coverage(root)) >= 2)
    crashed = next(node for node in world.nodes[1:] if node.served(root))
    lost = crashed.served(root)
    world.crash(crashed)
    assert min(world.coverage(root)[layer] for layer in lost) >= 1
    await world.until(lambda: min(world.coverage(root)) >= 2)


async def test_layers_that_were_on_one_node_are_fetched_anew_by_others(world: World, autojump_clock: MockClock) -> None:
    source = await world.node()
    root = source.add(1).root
    for _ in range(3):
        await world.node(HALF, replicas=1)
    for node in world.nodes[1:]:
        await node.serve()
    await world.until(lambda: min(world.coverage(root)) >= 1)
    crashed = max(world.nodes[1:], key=lambda node: len(node.served(root)))
    world.crash(crashed)
    assert min(world.coverage(root)) == 0
    # Their layers are on no other node that serves, but the source still has them.
    await world.until(lambda: min(world.coverage(root)) >= 1)


async def test_a_promise_survives_a_restart_and_nothing_is_fetched_again(world: World, autojump_clock: MockClock) -> None:
    source = await world.node()
    root = source.add(1).root
    node = await world.node()
    view, _ = await node.serve(fragment="2-4", memory_max_bytes=HALF)
    assert view.served == ((2, 5),)
    assert view.replicas == (0, 0, 1, 1, 1, 0, 0, 0)
    world.crash(source)
    node = await world.restart(node)
    await world.until(lambda: node.served(root) == {2, 3, 4})
    again = node.fragments.view("m")
    assert (again.fragment, again.memory_max_bytes, again.served) == ("2-4", HALF, ((2, 5),))
    holding = next(one for one in node.own().models if one.model_root == root)
    assert [(one.start, one.end) for one in holding.serving] == [(2, 5)]


async def test_what_was_undertaken_can_be_changed_and_ended(world: World, autojump_clock: MockClock) -> None:
    source, node = await world.node(), await world.node()
    root = source.add(1).root
    await source.serve()
    assert (await node.serve(fragment="0-3"))[0].served == ((0, 4),)
    # The layers that it no longer has to serve are on the source, so it may let them go.
    view, _ = await node.serve(fragment="2-5")
    assert {2, 3, 4, 5} <= layers_of(view.served)
    await world.until(lambda: node.served(root) == {2, 3, 4, 5})
    assert await node.serving.unserve("m") == []
    assert node.served(root) == frozenset()
    with pytest.raises(NotFoundError):
        await node.serving.unserve("m")
    assert "nobody else" in (await source.serving.unserve("m"))[0]
    assert (await world.restart(node)).fragments.views() == []


async def test_the_last_replica_is_not_let_go_of(world: World, autojump_clock: MockClock) -> None:
    source, node = await world.node(), await world.node()
    root = source.add(1).root
    await node.serve(fragment="0-3")
    await node.serve(fragment="2-5")
    await trio.sleep(300)
    assert node.served(root) == {0, 1, 2, 3, 4, 5}
    await source.serve(fragment="0-1")
    await world.until(lambda: node.served(root) == {2, 3, 4, 5})


async def test_two_nodes_that_let_go_at_once_do_not_both(world: World, autojump_clock: MockClock) -> None:
    source = await world.node()
    root = source.add(1).root
    pair = [await world.node(replicas=1), await world.node(replicas=1)]
    for node in pair:
        await node.serve(fragment="0-3")
    async with trio.open_nursery() as nursery:
        for node in pair:
            nursery.start_soon(lambda node=node: node.serve(fragment="4-7"))
    for _ in range(400):
        await trio.sleep(0.5)
        assert min(world.coverage(root)[:4]) >= 1
    assert sum(world.coverage(root)[:4]) == 4, "one of them let go in the end"


async def test_of_a_model_too_large_for_the_swarm_is_said_what_is_missing(world: World, autojump_clock: MockClock) -> None:
    source, node = await world.node(), await world.node(HALF)
    root = source.add(1).root
    view, said = await node.serve()
    assert 0 < len(node.served(root)) < LAYERS
    assert view.short
    assert any("of 2 replicas" in text and "missing" in text for text in said)


async def test_limits_are_checked_before_anything_is_undertaken(world: World, autojump_clock: MockClock) -> None:
    source, node = await world.node(), await world.node(HALF)
    source.add(1)
    await trio.sleep(10)
    for options, error in (
        ({"fragment": "0-8"}, UsageError),
        ({"fragment": "some"}, UsageError),
        ({"memory_max_bytes": HALF + 1}, UsageError),
        ({"disk_max_bytes": (1 << 30) + 1}, UsageError),
        ({"fragment": "0-7"}, CapacityError),
        ({"fragment": "0-3", "disk_max_bytes": PIECE_BYTES}, CapacityError),
        ({"memory_max_bytes": PIECE_BYTES // 2}, CapacityError),
        ({"name": "not a name"}, UsageError),
        ({"name": "unknown"}, NotFoundError),
    ):
        with pytest.raises(error) as caught:
            await node.serve(**{"name": "m", **options})
        assert caught.value.cause
    assert node.fragments.views() == []
    assert node.store.promises() == []


async def test_an_announcement_of_layers_that_are_not_there_breaks_nothing(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, liar, node = await world.node(), await world.node(), await world.node(replicas=1)
    manifest = source.add(1)
    await node.serve(fragment="0-3")
    # It claims to serve everything and has nothing: whoever believes it and lets go has still asked the source for what it takes.
    honest = source.fragments.holding(manifest.root, "m", ((0, LAYERS),))
    liar.extra = (replace(honest, serving=honest.held),)
    liar.announce()
    await trio.sleep(10)
    await node.serve(fragment="4-7")
    await world.until(lambda: {4, 5, 6, 7} <= node.served(manifest.root))


# --- versions ---------------------------------------------------------------------------------------------------------------


async def publish(node: Node, number: int) -> bytes:
    """Update "m" on that node, and wait until requests get it."""
    async with aclosing(node.serving.update("m", f"/{number}", "auto")) as events:
        found = [event async for event in events]
    return next(event.model_root for event in found if hasattr(event, "model_root"))


async def request_all_the_while(world: World, asker: Node, roots: list[bytes], over: trio.Event) -> None:
    """Requests by name: each has to get a version that can be computed when it comes, with nothing to fetch."""
    while not over.is_set():
        root = await asker.fragments.versions.current("m")
        assert root is not None
        held = [node.held(root) for node in world.nodes if not node.scope.cancel_called]
        assert frozenset().union(*held) == set(range(LAYERS)), "a request got a version of which a layer is on no node"
        if roots[-1:] != [root]:
            roots.append(root)
        await trio.sleep(0.2)


async def test_a_version_rolls_under_load_and_back_and_no_request_is_lost(world: World, autojump_clock: MockClock) -> None:
    publisher = await world.node()
    one = publisher.add(1).root
    servers = [await world.node(HALF) for _ in range(4)]
    for node in servers:
        await node.serve()
    asker = await world.node()
    await world.until(lambda: min(world.coverage(one)) >= 2)
    two = await publish(publisher, 2)
    await world.until(lambda: min(world.coverage(two)) >= 2 and not any(world.coverage(one)))
    roots: list[bytes] = []
    over = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(request_all_the_while, world, asker, roots, over)
        three = await publish(publisher, 3)
        await world.until(lambda: min(world.coverage(three)) >= 2 and not any(world.coverage(two)))
        async with aclosing(publisher.serving.rollback("m", None)) as events:
            async for _ in events:
                pass
        await world.until(lambda: min(world.coverage(two)) >= 2 and not any(world.coverage(three)))
        await world.until(lambda: roots[-1] == two and len(roots) > 2)
        over.set()
    assert roots == [two, three, two]
    assert [view.version for view in await asker.serving.versions("m")][-1] == 4
    assert publisher.catalog.names()["m"] == two
    with pytest.raises(UsageError):
        await anext(publisher.serving.rollback("m", 9))


async def test_the_publisher_may_be_away_once_its_version_is_known(world: World, autojump_clock: MockClock) -> None:
    publisher, follower = await world.node(), await world.node()
    publisher.add(1)
    await follower.serve()
    two = await publish(publisher, 2)
    await world.until(lambda: min(world.coverage(two)) >= 1)
    world.crash(publisher)
    asker = await world.node()
    await trio.sleep(5)
    assert await asker.fragments.versions.current("m") == two
    late, _ = await asker.serve()
    assert (late.version, late.model_root, late.publisher) == (2, two, publisher.identity.peer_id)
    again = await world.restart(follower)
    assert again.fragments.view("m").version == 2


async def test_nobody_else_moves_a_name(world: World, autojump_clock: MockClock) -> None:
    publisher, follower, stranger = await world.node(), await world.node(), await world.node()
    one = publisher.add(1).root
    await follower.serve()
    other = stranger.add(7)
    # Under its own key, and under that of the publisher, which it cannot sign for.
    honest = stranger.fragments.holding(other.root, "m", ((0, LAYERS),))
    own = SignedPublication.sign(Publication(stranger.identity.public_key, "m", 99, other.root), stranger.identity)
    forged = replace(honest, publisher=publisher.identity.public_key, version=99, signature=own.signature, serving=honest.held)
    stranger.extra = (forged, replace(honest, publisher=stranger.identity.public_key, version=99, signature=own.signature))
    stranger.announce()
    await trio.sleep(60)
    assert follower.fragments.view("m").model_root == one
    assert follower.fragments.view("m").publisher == publisher.identity.peer_id
    two = await publish(publisher, 2)
    await world.until(lambda: min(world.coverage(two)) >= 1)
    assert await follower.fragments.versions.current("m") == two
    with pytest.raises(NotAllowedError):
        follower.fragments.versions.check_may_publish("m")
    # Who has chosen nobody is asked to choose, and may.
    asker = await world.node()
    await trio.sleep(5)
    with pytest.raises(UsageError, match="2 nodes publish"):
        await asker.fragments.versions.current("m")
    chosen, _ = await asker.serve(publisher=publisher.identity.peer_id)
    assert chosen.model_root == two


async def test_an_update_of_what_is_not_here_or_the_same_is_refused(world: World, autojump_clock: MockClock) -> None:
    node = await world.node()
    with pytest.raises(NotFoundError):
        await publish(node, 1)
    node.add(1)
    with pytest.raises(UsageError):
        await publish(node, 1)
    two = await publish(node, 2)
    node = await world.restart(node)
    assert [view.model_root for view in await node.serving.versions("m")][-1] == two
    assert node.fragments.kept() >= {two}
    assert {piece.root for piece in node.catalog.manifest(two).pieces} <= node.fragments.pinned()


# --- leaving ----------------------------------------------------------------------------------------------------------------


async def test_a_drained_node_leaves_when_others_serve_its_layers_and_nothing_runs(world: World, autojump_clock: MockClock) -> None:
    first = await world.node(HALF)
    root = first.add(1).root
    for _ in range(3):
        await world.node(HALF)
    for node in world.nodes:
        await node.serve()
    await world.until(lambda: min(world.coverage(root)) >= 2)
    spare = await world.node(HALF)
    await spare.serve()
    leaver = world.nodes[1]
    leaver.sessions = 2
    views: list[DrainView] = []
    async with aclosing(leaver.serving.drain(300.0)) as events:
        async for view in events:
            assert min(world.coverage(root)) >= 1
            if not any(model.waiting for model in view.models):
                leaver.sessions = 0
            else:
                assert not leaver.refusing, "it goes on serving until others do"
            views.append(view)
    assert views[-1].done
    assert leaver.refusing
    assert leaver.handed_over
    assert min(world.coverage(root, without=leaver)) >= 2
    assert trio.current_time() < 400


async def test_at_the_deadline_a_node_leaves_and_says_what_is_lost(world: World, autojump_clock: MockClock) -> None:
    source, other = await world.node(), await world.node(HALF)
    source.add(1)
    await source.serve(fragment="0-7")
    await other.serve(fragment="0-3")
    source.sessions = 1
    began_s = trio.current_time()
    async with aclosing(source.serving.drain(30.0)) as events:
        views = [view async for view in events]
    assert 30 <= trio.current_time() - began_s < 32
    assert views[-1].done
    assert views[-1].models[0].lost == ((4, 8),)
    assert views[-1].models[0].to == ("n2",)
    assert views[-1].sessions == 1


async def test_who_serves_alone_waits_for_nobody(world: World, autojump_clock: MockClock) -> None:
    node = await world.node()
    node.add(1)
    await node.serve()
    began_s = trio.current_time()
    async with aclosing(node.serving.drain(300.0)) as events:
        views = [view async for view in events]
    assert views[-1].done
    assert views[-1].models[0].lost == ((0, LAYERS),)
    assert trio.current_time() - began_s < 2


async def test_a_drain_that_is_called_off_changes_nothing(world: World, autojump_clock: MockClock) -> None:
    node = await world.node()
    node.add(1)
    await node.serve()
    node.sessions = 1
    async with aclosing(node.serving.drain(300.0)) as events:
        async for _ in events:
            break
    assert not node.refusing
    assert not node.own().leaving
    with pytest.raises(UsageError):
        await anext(node.serving.drain(-1.0))
    async with aclosing(node.serving.drain(300.0)) as events:
        await anext(events)
        second = node.serving.drain(1.0)
        with pytest.raises(NotAllowedError):
            await anext(second)


# --- churn ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_nodes_that_come_and_go_leave_the_model_whole(tmp_path: Path, autojump_clock: MockClock, seed: int) -> None:
    rng = random.Random(seed)
    async with trio.open_nursery() as nursery:
        world = World(tmp_path, nursery, seed)
        source = await world.node()
        root = source.add(1).root
        for _ in range(5):
            await world.node(HALF)
        for node in world.nodes[1:]:
            await node.serve()
        await world.until(lambda: min(world.coverage(root)) >= 2)
        for _ in range(4):
            gone = rng.choice([node for node in world.nodes[1:] if not node.scope.cancel_called])
            world.crash(gone)
            await trio.sleep(rng.uniform(1, 20))
            await (await world.node(HALF)).serve()
            await world.until(lambda: min(world.coverage(root)) >= 2, within_s=300)
        # Quiet: who serves what does not change any more, and nothing is fetched.
        before = [node.served(root) for node in world.nodes]
        await trio.sleep(300)
        assert [node.served(root) for node in world.nodes] == before
        nursery.cancel_scope.cancel()


def test_the_pauses_are_those_that_the_page_names() -> None:
    text = (Path(__file__).parents[2] / "docs" / "fragments.md").read_text("utf-8")
    from nexus.swarm.fragments import CALM_S, LOST_S, SHORT_S

    assert f"{LOST_S:.0f} s where a layer is on no node" in text.replace("\n", " ")
    assert f"{SHORT_S:.0f} s where it is on too few" in text.replace("\n", " ")
    assert CALM_S == 60
    assert fragments_module.LOOK_S <= 1


async def test_errors_are_of_the_kinds_that_have_a_cause(world: World, autojump_clock: MockClock) -> None:
    node = await world.node()
    with pytest.raises(NexusError):
        await node.serve("nothing")
