"""A small swarm of real memory services over the simulated network, each with a real store on the disk."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import trio
import trio.testing

from nexus.core.keys import Identity
from nexus.engine.embedding.embedder import Vectors
from nexus.engine.embedding.external import ExternalVectors
from nexus.memory.batch import SignedBatch, sign_batch
from nexus.memory.block import CONTENT, INT8, Block, Vector, encode_block, parse_id
from nexus.memory.collection import Charter
from nexus.memory.quantise import quantise
from nexus.memory.sky.kernel import SkyKernel
from nexus.network.simulated import SimulatedNetwork, SimulatedTransport
from nexus.node.environment import SYSTEM
from nexus.node.memory.api import AddedView, AddRequest, BlockView, Filters, SearchRequest, SearchView, SyncView
from nexus.node.memory.messages import SearchAsk
from nexus.node.memory.service import Memory
from nexus.node.options import MemoryOptions
from nexus.node.progress import Progress
from nexus.storage.memory.store import MemoryStore

T = TypeVar("T")
Clock = trio.testing.MockClock

EPOCH_MS = 1_780_000_000_000
DIMENSION = 8
MODEL = "test"
OPTIONS = MemoryOptions(
    enabled=True,
    model=MODEL,
    disk_max_bytes=64 * 1024 * 1024,
    author_max_bytes=16 * 1024 * 1024,
    place=(48.0, 11.0),
    place_step=1.0,
    witness_every_s=10.0,
    witnesses=1,
    trusted_witnesses=(),
    blocks_per_peer_s=1000,
)


def vector_of(text: str) -> tuple[float, ...]:
    drawn = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.int8)[:DIMENSION].astype(float) + 0.5
    return tuple((drawn / np.linalg.norm(drawn)).tolist())


class Embeds:
    """An embedder without a model: a text's vector is drawn from its hash."""

    name, dimension, exact, tokens_max = MODEL, DIMENSION, True, 64
    fingerprint = ExternalVectors(MODEL, DIMENSION).fingerprint

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) + 2 for text in texts]

    def embed(self, texts: Sequence[str], progress: Callable[[int, int], None] | None = None) -> Vectors:
        return np.array([vector_of(text) for text in texts], np.float32)


def block_of(author: Identity, collection: bytes, text: str, created_ms: int, **fields: Any) -> Block:
    codes, scales = quantise(np.array([vector_of(text)], np.float32))
    vector = Vector(MODEL, Embeds.fingerprint, INT8, int(scales[0]), codes[0].tobytes())
    return Block(CONTENT, collection, author.public_key, created_ms, text=text, vectors=(vector,), **fields)


def batch_of(author: Identity, *blocks: Block) -> SignedBatch:
    return sign_batch(author, list(map(encode_block, blocks)))


class Node:
    """A running memory. `skew_ms`: how far its clock is ahead."""

    def __init__(
        self, swarm: Swarm, identity: Identity, path: Path, sky: SkyKernel, options: MemoryOptions, skew_ms: int = 0
    ) -> None:
        self._swarm = swarm
        self.identity = identity
        self.path = path
        self.sky = sky
        self.options = options
        self.skew_ms = skew_ms
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self.transport: SimulatedTransport
        self.memory: Memory
        self.store: MemoryStore

    @property
    def peer_id(self) -> str:
        return self.identity.peer_id

    def now_ms(self) -> int:
        return EPOCH_MS + int(trio.current_time() * 1000) + self.skew_ms

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self.store = MemoryStore(self.path, bytes_max=self.options.disk_max_bytes, author_bytes_max=self.options.author_max_bytes)
        try:
            with self._scope:
                async with self._swarm.network.open(self.identity) as self.transport, trio.open_nursery() as nursery:
                    self.memory = Memory(
                        self.transport,
                        self.identity,
                        self.store,
                        self.sky,
                        self.options,
                        _no_models,
                        _no_model,
                        1,
                        _itself,
                        dict,
                        partial(_told, nursery),
                        replace(SYSTEM, now_ms=self.now_ms),
                    )
                    self.memory._embedders._loaded[MODEL] = Embeds()
                    await nursery.start(self.memory.run)
                    task_status.started()
                    await trio.sleep_forever()
        finally:
            self.store.close()
            self._ended.set()

    async def stop(self) -> None:
        self._scope.cancel()
        await self._ended.wait()

    async def start(self) -> None:
        await self._swarm.nursery.start(self.run)

    async def connect(self, *others: Node) -> None:
        for other in others:
            await self.transport.connect(other.transport.addresses[0])

    # What users do.

    async def create(self, name: str, mode: str = "public", writers: Sequence[str] = ()) -> Charter:
        await self.memory.create_collection(name, mode, writers)
        return self.charter(name)

    def charter(self, name: str) -> Charter:
        return self.memory._charters.resolve(name)

    async def follow(self, name: str, of: Node) -> None:
        await self.memory.subscribe(name, of.peer_id)

    async def add(self, text: str, collection: str, **fields: Any) -> str:
        request = AddRequest(text, collection=collection, vector=vector_of(text), vector_model=MODEL, **fields)
        added = None
        async for event in self.memory.add(request):
            added = event
        assert isinstance(added, AddedView)
        assert len(added.ids) == 1
        return added.ids[0]

    async def write(self, collection: bytes, *texts: str, author: Identity | None = None, created_ms: int | None = None) -> None:
        """Blocks straight into the store, as fast as it takes them, by whoever it is."""
        author = author or self.identity
        when = created_ms if created_ms is not None else self.now_ms()
        batch = batch_of(author, *(block_of(author, collection, text, when) for text in texts))
        await self.memory._accepting.take([batch], b"")

    async def texts(self, *collections: str) -> set[str]:
        """Of all blocks that it shows."""
        return {view.text for view in await self.views(*collections)}

    async def views(self, *collections: str) -> list[BlockView]:
        return await self.memory.listed(Filters(collections=collections), 1000)

    async def search(self, text: str, *collections: str, **fields: Any) -> SearchView:
        return await self.memory.search(SearchRequest(text, Filters(collections=collections), **fields))

    def ids(self, charter: Charter) -> set[bytes]:
        """What its set of a collection has: what other nodes see of it."""
        known = self.memory._syncing._sets.get(charter.id, ())
        return {item.id for item in known}

    def knows(self, block: str) -> bool:
        return bool(self.store.known([parse_id(block)]))

    async def pair(self, other: Node) -> SyncView:
        (found,) = [view for view in await self.memory.sync_status() if view.peer_id == other.peer_id]
        return found


class Swarm:
    def __init__(self, nursery: trio.Nursery, directory: Path, sky: SkyKernel) -> None:
        self.nursery = nursery
        self._directory = directory
        self._sky = sky
        self.network = SimulatedNetwork(11, break_after_s=5.0)
        self._count = 0

    def identity(self) -> Identity:
        self._count += 1
        return Identity(self._count.to_bytes(32, "big"))

    async def node(self, *, skew_ms: int = 0, **options: Any) -> Node:
        identity = self.identity()
        node = Node(self, identity, self._directory / str(self._count), self._sky, replace(OPTIONS, **options), skew_ms)
        await node.start()
        return node

    async def nodes(self, count: int, **options: Any) -> list[Node]:
        """Each connected with every other."""
        nodes: list[Node] = []
        for _ in range(count):
            node = await self.node(**options)
            await node.connect(*nodes)
            nodes.append(node)
        return nodes

    async def stranger(self) -> SimulatedTransport:
        """A peer that runs none of our code."""
        return await self.nursery.start(self._hold, self.identity())  # type: ignore[no-any-return]

    async def _hold(self, identity: Identity, *, task_status: trio.TaskStatus[SimulatedTransport]) -> None:
        async with self.network.open(identity) as transport:
            task_status.started(transport)
            await trio.sleep_forever()


async def until(condition: Callable[[], Awaitable[bool] | bool], within_s: float = 30.0) -> None:
    """In virtual time, so looking again and again costs little."""
    with trio.fail_after(within_s):
        while True:
            holds = condition()
            if not isinstance(holds, bool):
                holds = await holds
            if holds:
                return
            await trio.sleep(0.25)


async def until_same(charter: Charter, *nodes: Node, size: int, within_s: float = 30.0) -> None:
    """Until all of these nodes have the same set, of this size."""

    def same() -> bool:
        sets = [node.ids(charter) for node in nodes]
        return len(sets[0]) == size and all(each == sets[0] for each in sets)

    await until(same, within_s)


async def inline(work: Callable[..., T], *args: Any, **_: Any) -> T:
    """Work for a thread, done here: virtual time must not leap while a real thread works."""
    await trio.lowlevel.checkpoint()
    return work(*args)


def at_once(work: Callable[..., T], *args: Any, **_: Any) -> T:
    return work(*args)


def search_ask(collection: bytes) -> SearchAsk:
    return SearchAsk(collection, 10, b"", 0, b"", "secret", (), (), "", 0, 0, 0, 0, 0)


async def _told(
    nursery: trio.Nursery, work: Callable[[Callable[[Progress], None]], Awaitable[T]]
) -> AsyncGenerator[Progress | T, None]:
    """As a node does: in a task of its own, which ends when nobody wants its result any more."""
    send, receive = trio.open_memory_channel[Progress](256)
    done: list[T] = []
    failure: list[Exception] = []
    scope = trio.CancelScope()

    async def run() -> None:
        with scope, send:
            try:
                done.append(await work(send.send_nowait))
            except Exception as error:  # noqa: BLE001 - raised where it was asked for
                failure.append(error)

    nursery.start_soon(run)
    async with receive:
        try:
            async for event in receive:
                yield event
        finally:
            scope.cancel()
    if failure:
        raise failure[0]
    yield done[0]


def _no_models(name: str) -> Any:
    raise AssertionError(f"no test loads a model: {name}")


async def _no_model(name: str) -> None:
    raise AssertionError(f"no test takes in a model: {name}")


def _itself(name: str) -> str:
    return name
