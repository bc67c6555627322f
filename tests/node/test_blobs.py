"""Fragment exchange over the simulated network: honest peers, peers that fail, and peers that lie."""

from __future__ import annotations

import errno
import functools
import os
import random
import sys
import tracemalloc
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.errors import CapacityError, LocalError, MalformedError, NexusError, NotFoundError, UnreachableError
from nexus.core.keys import Identity
from nexus.core.manifest import CHUNK_BYTES, EMBEDDING, HEAD, Blob, Manifest, chunk_count, layer_name, stage_pieces
from nexus.network.libp2p import NetworkOptions, open_libp2p
from nexus.network.simulated import SimulatedNetwork, SimulatedTransport
from nexus.network.transport import PeerAddress, Stream
from nexus.node import blobs as blobs_module
from nexus.node import blobs_serving
from nexus.node.blobs import BlobService, Dropped, Fetcher, FetchLimits, Result
from nexus.node.blobs_wire import (
    ANSWERS,
    ASKS,
    BLOBS,
    CHUNKS,
    HASHES,
    HAVE,
    MANIFEST,
    OK,
    Answer,
    Ask,
    blobs_of,
    pack_chunk,
    pack_have,
    unpack_chunk,
    unpack_have,
)
from nexus.storage.blobs import BlobStore, chunk_length
from nexus.storage.catalog import Catalog
from nexus.swarm.membership import provider_key

LAYERS = 4
SIZES = {EMBEDDING: CHUNK_BYTES + 11, layer_name(1): 5 * CHUNK_BYTES + 1, layer_name(2): 0, HEAD: 7}


async def at_once(work: Callable[[], Result]) -> Result:
    """Work for the disk in no virtual time: under the autojump clock a real thread would let hours pass."""
    await trio.lowlevel.checkpoint()
    return work()


@dataclass
class Library:
    """What one node has on disk."""

    store: BlobStore
    catalog: Catalog

    @classmethod
    def at(cls, path: Path, quota_bytes: int | None = None) -> Library:
        return cls(BlobStore.open(path, quota_bytes), Catalog.open(path))

    def frames(self, ask: Ask) -> list[bytes]:
        if ask.what == HAVE:
            blobs = blobs_of(self.catalog.manifest(ask.root))
            return [pack_have(blobs, [self.store.here(blob.root) for blob in blobs])]
        return [read() for read in BlobService(None, self.store, self.catalog)._look_up(ask)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library.at(tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def manifest(library: Library) -> Manifest:
    rng = random.Random(1)

    def put(name: str) -> Blob:
        size = SIZES.get(name, 1000)
        return library.store.put(name, size, [rng.randbytes(size)])

    pieces = tuple(put(name) for name in (EMBEDDING, *(layer_name(index) for index in range(LAYERS)), HEAD))
    files = (put("config.json"), put("vocab.txt"))
    manifest = Manifest(1, "causal", "LlamaForCausalLM", "float", "float32", LAYERS, 8, 16, 64, 32, 0, pieces, files, ())
    library.catalog.add("nano", manifest)
    return manifest


@pytest.fixture(scope="module")
def wide(library: Library) -> Manifest:
    """A model of 24 chunks in 6 blobs."""
    rng = random.Random(2)

    def put(name: str) -> Blob:
        size = 6 * CHUNK_BYTES if name.startswith("layer") else 100
        return library.store.put(name, size, [rng.randbytes(size)])

    pieces = tuple(put(name) for name in (EMBEDDING, *(layer_name(index) for index in range(LAYERS)), HEAD))
    manifest = Manifest(
        1, "causal", "LlamaForCausalLM", "float", "float32", LAYERS, 8, 16, 64, 32, 0, pieces, (put("config.json"),), ()
    )
    library.catalog.add("wide", manifest)
    return manifest


Twist = Callable[[Stream, Ask, list[bytes]], Awaitable[None]]


class Swarm:
    """Nodes on one simulated network; `me` is the one that fetches."""

    def __init__(self, nursery: trio.Nursery, library: Library, tmp_path: Path) -> None:
        self._nursery = nursery
        self._library = library
        self.network = SimulatedNetwork(3)
        self._nodes = 0
        self.tmp_path = tmp_path

    async def open(self) -> SimulatedTransport:
        self._nodes += 1
        return await self._nursery.start(self._hold, Identity(bytes([self._nodes]) * 32))  # type: ignore[no-any-return]

    async def _hold(self, identity: Identity, *, task_status: trio.TaskStatus[SimulatedTransport]) -> None:
        async with self.network.open(identity) as node:
            task_status.started(node)
            await trio.sleep_forever()

    async def honest(self, library: Library | None = None) -> PeerAddress:
        node = await self.open()
        library = library or self._library
        BlobService(node, library.store, library.catalog, at_once).start()
        return PeerAddress(node.peer_id, (node.endpoint,))

    async def capped(self, upload_max: int) -> PeerAddress:
        node = await self.open()
        BlobService(node, self._library.store, self._library.catalog, at_once, upload_max=upload_max).start()
        return PeerAddress(node.peer_id, (node.endpoint,))

    async def hostile(self, twist: Twist) -> PeerAddress:
        """A node that answers as `twist` does; it is told what an honest one would send."""
        node = await self.open()

        async def handle(stream: Stream) -> None:
            while True:
                ask = ASKS.unpack(await stream.receive())
                assert isinstance(ask, Ask)
                await twist(stream, ask, self._library.frames(ask))

        node.serve(BLOBS, handle)
        return PeerAddress(node.peer_id, (node.endpoint,))

    async def fetcher(
        self, limits: FetchLimits | None = None, quota_bytes: int | None = None, path: str = "mine"
    ) -> tuple[Fetcher, Library]:
        mine = Library.at(self.tmp_path / path, quota_bytes)
        return Fetcher(await self.open(), mine.store, mine.catalog, limits, at_once), mine


@pytest.fixture
def swarm(library: Library, manifest: Manifest, tmp_path: Path, nursery: trio.Nursery) -> Swarm:
    return Swarm(nursery, library, tmp_path)


def everything(manifest: Manifest) -> list[Blob]:
    return [*manifest.files, *manifest.pieces]


def check_whole(mine: Library, blobs: list[Blob]) -> None:
    for blob in blobs:
        mine.store.verify(blob.root)


async def reply(stream: Stream, frames: list[bytes]) -> None:
    await stream.send(ANSWERS.pack(Answer(OK, len(frames), "")))
    for frame in frames:
        await stream.send(frame)


class TestHonest:
    async def test_a_stage_gets_its_own_pieces_and_no_others(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest
    ) -> None:
        source = await swarm.honest()
        fetcher, mine = await swarm.fetcher()
        assert await fetcher.manifest(manifest.root, [source]) == manifest
        assert mine.catalog.manifest(manifest.root) == manifest
        wanted = [*manifest.files, *stage_pieces(manifest, 1, 3)]
        fetched = await fetcher.blobs(manifest, wanted, [source])
        check_whole(mine, wanted)
        assert mine.store.roots() == sorted(blob.root for blob in wanted)
        assert fetched.received_bytes == ((source.peer_id, sum(blob.size for blob in wanted)),)
        assert fetched.dropped == ()
        assert await fetcher.blobs(manifest, wanted, []) == blobs_module.Fetched((), ())

    async def test_providers_are_found_by_the_model_alone(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest, library: Library
    ) -> None:
        node = await swarm.open()
        BlobService(node, library.store, library.catalog, at_once).start()
        await node.provide(provider_key(manifest.root))
        fetcher, mine = await swarm.fetcher()
        await fetcher.blobs(await fetcher.manifest(manifest.root), everything(manifest))
        check_whole(mine, everything(manifest))

    async def test_progress_counts_every_byte_once(self, autojump_clock: object, swarm: Swarm, manifest: Manifest) -> None:
        sources = [await swarm.honest() for _ in range(3)]
        fetcher, _ = await swarm.fetcher()
        seen: list[tuple[str, int, int]] = []

        async def progress(phase: str, done: int, total: int) -> None:
            await trio.sleep(0.001)
            seen.append((phase, done, total))

        await fetcher.blobs(manifest, everything(manifest), sources, progress)
        total = sum(blob.size for blob in everything(manifest))
        assert seen[0] == ("finding", 0, 0)
        assert seen[1] == ("fetching", 0, total)
        assert seen[-1] == ("fetching", total, total)
        done = [step[1] for step in seen[1:]]
        assert done == sorted(done)

    async def test_several_providers_share_the_work(self, autojump_clock: object, swarm: Swarm, manifest: Manifest) -> None:
        sources = [await swarm.honest() for _ in range(3)]
        fetcher, mine = await swarm.fetcher(FetchLimits(chunks_per_ask=1))
        fetched = await fetcher.blobs(manifest, everything(manifest), sources)
        check_whole(mine, everything(manifest))
        assert len(fetched.received_bytes) == 3

    async def test_one_that_fetched_serves_what_it_has(self, autojump_clock: object, swarm: Swarm, manifest: Manifest) -> None:
        source = await swarm.honest()
        fetcher, mine = await swarm.fetcher(path="first")
        first = [*manifest.files, *stage_pieces(manifest, 0, 2)]
        await fetcher.manifest(manifest.root, [source])
        await fetcher.blobs(manifest, first, [source])
        relay = await swarm.honest(mine)
        second, other = await swarm.fetcher(path="second")
        assert await second.manifest(manifest.root, [relay]) == manifest
        await second.blobs(manifest, everything(manifest), [relay, source])
        check_whole(other, everything(manifest))

    async def test_two_that_want_the_same_blob_download_it_once(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest
    ) -> None:
        asked: list[Ask] = []

        async def counting(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
            asked.append(ask)
            await reply(stream, frames)

        source = await swarm.hostile(counting)
        fetcher, mine = await swarm.fetcher()
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(fetcher.blobs, manifest, everything(manifest), [source])
        check_whole(mine, everything(manifest))
        assert len(asked) == len(set(asked))

    async def test_when_the_one_that_downloads_gives_up_the_one_that_waits_goes_on(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest
    ) -> None:
        source = await swarm.honest()
        fetcher, mine = await swarm.fetcher()
        stalling = await swarm.hostile(stall)
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as inner:
                    inner.start_soon(fetcher.blobs, manifest, everything(manifest), [stalling])
                    await trio.sleep(1)
                    nursery.start_soon(fetcher.blobs, manifest, everything(manifest), [source])
                    await trio.sleep(1)
                    scope.cancel()
        check_whole(mine, everything(manifest))


async def flip_a_bit(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
    if ask.what == CHUNKS and frames[-1]:
        frames[-1] = frames[-1][:-1] + bytes((frames[-1][-1] ^ 1,))
    await reply(stream, frames)


async def cut_short(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
    await reply(stream, [frame[:-1] for frame in frames])


async def add_a_byte(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
    await reply(stream, [frame + b"x" for frame in frames])


async def over_the_cap(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
    """Past our own cap, which only a peer that cheats gets around."""
    stream._protocol = replace(BLOBS, frame_max=1 << 30)  # type: ignore[attr-defined]
    await reply(stream, [bytes(BLOBS.frame_max + 1)])


async def swap_frames(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
    if ask.what != HAVE:  # of which zeros say that it has nothing, and that is no lie that harms
        frames = frames[::-1] if len(frames) > 1 else [bytes(len(frames[0]) or 1)]
    await reply(stream, frames)


async def promise_more(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
    await stream.send(ANSWERS.pack(Answer(OK, len(frames) + 1, "")))


async def promise_nothing(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
    await stream.send(ANSWERS.pack(Answer(OK, 0, "")))


async def send_more_than_promised(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
    await reply(stream, frames)
    await stream.send(frames[0])


async def wrong_hashes(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
    await reply(stream, [bytes(len(frame)) for frame in frames] if ask.what == HASHES else frames)


async def hashes_of_another_length(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
    await reply(stream, [frame + bytes(32) for frame in frames] if ask.what == HASHES else frames)


async def garbage(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
    await stream.send(b"\xff" * 100)


async def empty_frames(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
    await stream.send(b"")


LIARS = [
    flip_a_bit,
    cut_short,
    add_a_byte,
    over_the_cap,
    swap_frames,
    promise_more,
    promise_nothing,
    send_more_than_promised,
    wrong_hashes,
    hashes_of_another_length,
    garbage,
    empty_frames,
]


async def stall(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
    await trio.sleep_forever()


async def stall_in_the_middle(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
    await stream.send(ANSWERS.pack(Answer(OK, len(frames), "")))
    for frame in frames[: len(frames) // 2]:
        await stream.send(frame)
    await trio.sleep_forever()


async def close_in_the_middle(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
    await stream.send(ANSWERS.pack(Answer(OK, len(frames), "")))
    await stream.close()


async def break_off_in_the_middle(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
    await stream.send(ANSWERS.pack(Answer(OK, len(frames), "")))
    await stream.reset()


async def refuse(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
    await stream.send(ANSWERS.pack(Answer("capacity", 0, "busy \x1b[31m with \n others")))


FLAKY = [stall, stall_in_the_middle, close_in_the_middle, break_off_in_the_middle, refuse]


class TestHostile:
    @pytest.mark.parametrize("twist", LIARS, ids=lambda twist: twist.__name__)
    async def test_a_liar_is_named_and_the_rest_comes_from_others(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest, twist: Twist
    ) -> None:
        liar, source = await swarm.hostile(twist), await swarm.honest()
        fetcher, mine = await swarm.fetcher(FetchLimits(chunks_per_ask=2))
        fetched = await fetcher.blobs(manifest, everything(manifest), [liar, source])
        check_whole(mine, everything(manifest))
        assert [(one.peer_id, one.bad) for one in fetched.dropped] == [(liar.peer_id, True)]
        assert fetched.dropped[0].reason

    @pytest.mark.parametrize("twist", FLAKY, ids=lambda twist: twist.__name__)
    async def test_one_that_fails_holds_nothing_up_and_is_not_called_a_liar(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest, twist: Twist
    ) -> None:
        flaky, source = await swarm.hostile(twist), await swarm.honest()
        fetcher, mine = await swarm.fetcher()
        with trio.fail_after(600):
            fetched = await fetcher.blobs(manifest, everything(manifest), [flaky, source])
        check_whole(mine, everything(manifest))
        assert not any(one.bad for one in fetched.dropped)

    @pytest.mark.parametrize("twist", [*LIARS, *FLAKY], ids=lambda twist: twist.__name__)
    async def test_alone_it_leads_to_an_error_with_the_cause_and_nothing_wrong_is_kept(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest, twist: Twist
    ) -> None:
        peer = await swarm.hostile(twist)
        fetcher, mine = await swarm.fetcher()
        with trio.fail_after(600), pytest.raises(NotFoundError) as caught:
            await fetcher.blobs(manifest, everything(manifest), [peer])
        assert peer.peer_id in caught.value.cause
        assert caught.value.cause.isprintable()
        assert "nexus model add" in caught.value.fix
        for root in mine.store.roots():
            mine.store.verify(root)

    async def test_a_peer_that_dies_in_the_middle_is_replaced(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest
    ) -> None:
        async def die(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
            if ask.what == CHUNKS and ask.start:
                swarm.network.crash(dying.peer_id)
            await reply(stream, frames)

        dying, source = await swarm.hostile(die), await swarm.honest()
        fetcher, mine = await swarm.fetcher(FetchLimits(chunks_per_ask=1))
        with trio.fail_after(600):
            await fetcher.blobs(manifest, everything(manifest), [dying, source])
        check_whole(mine, everything(manifest))

    async def test_what_liars_say_of_a_manifest_is_not_believed(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest
    ) -> None:
        other = replace(manifest, context=65)

        async def lie(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
            await reply(stream, [other.to_bytes()] if ask.what == MANIFEST else frames)

        liar = await swarm.hostile(lie)
        fetcher, mine = await swarm.fetcher()
        with pytest.raises(NotFoundError, match="another model"):
            await fetcher.manifest(manifest.root, [liar])
        assert mine.catalog.roots() == []
        assert await fetcher.manifest(manifest.root, [liar, await swarm.honest()]) == manifest

    @pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "config.json"])
    async def test_a_manifest_with_path_tricks_is_refused_even_if_its_root_was_asked_for(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest, name: str
    ) -> None:
        tricky = replace(manifest, files=(*manifest.files, Blob(name, 3, bytes(32))))

        async def serve_it(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
            await reply(stream, [tricky.to_bytes()])

        node = await swarm.open()

        async def handle(stream: Stream) -> None:
            await stream.receive()
            await reply(stream, [tricky.to_bytes()])

        node.serve(BLOBS, handle)
        fetcher, mine = await swarm.fetcher()
        with pytest.raises(NotFoundError, match=r"out of the model's directory|not unique"):
            await fetcher.manifest(tricky.root, [PeerAddress(node.peer_id, (node.endpoint,))])
        assert mine.catalog.roots() == []

    async def test_one_that_stalls_keeps_nobody_from_the_manifest(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest
    ) -> None:
        async def stall(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
            await trio.sleep_forever()

        sources = [*[await swarm.hostile(stall) for _ in range(5)], await swarm.honest()]
        fetcher, _ = await swarm.fetcher()
        began = trio.current_time()
        assert await fetcher.manifest(manifest.root, sources) == manifest
        assert trio.current_time() - began < FetchLimits().frame_timeout_s

    async def test_named_sources_do_not_crowd_out_those_of_the_dht(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest, library: Library
    ) -> None:
        """Whoever has a node fetch for it names the sources: they may all be its own, there to keep the fetch going for ever."""
        node = await swarm.open()
        BlobService(node, library.store, library.catalog, at_once).start()
        await node.provide(provider_key(manifest.root))
        bogus = [PeerAddress(Identity(bytes([100 + n]) * 32).peer_id, ("/ip4/192.0.2.1/tcp/9",)) for n in range(32)]
        fetcher, mine = await swarm.fetcher()
        await fetcher.blobs(await fetcher.manifest(manifest.root, bogus), everything(manifest), bogus)
        check_whole(mine, everything(manifest))

    async def test_sources_that_are_no_peers_are_ignored(self, autojump_clock: object, swarm: Swarm, manifest: Manifest) -> None:
        fetcher, mine = await swarm.fetcher()
        bogus = [PeerAddress("not a peer", ("/ip4/10.0.0.1/tcp/1",)), PeerAddress("", ())]
        await fetcher.blobs(manifest, everything(manifest), [*bogus, await swarm.honest()])
        check_whole(mine, everything(manifest))


class TestMissing:
    async def test_what_nobody_has_is_named_and_the_rest_is_kept(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest, library: Library, tmp_path: Path
    ) -> None:
        part = Library.at(tmp_path / "part")
        for blob in (*manifest.files, manifest.piece(layer_name(0)), manifest.piece(layer_name(3))):
            part.store.put(blob.name, blob.size, [library.store.path(blob.root).read_bytes()])
        part.catalog.keep(manifest)
        source = await swarm.honest(part)
        fetcher, mine = await swarm.fetcher()
        with pytest.raises(NotFoundError, match=r"layers 1-2, the embedding and the head of model") as caught:
            await fetcher.blobs(manifest, everything(manifest), [source])
        assert f"{source.peer_id} lacks it" in caught.value.cause
        assert mine.store.roots() == part.store.roots()
        await fetcher.blobs(manifest, everything(manifest), [await swarm.honest()])
        check_whole(mine, everything(manifest))

    async def test_nobody_at_all(self, autojump_clock: object, swarm: Swarm, manifest: Manifest) -> None:
        fetcher, _ = await swarm.fetcher()
        with pytest.raises(NotFoundError, match="no node announces this model"):
            await fetcher.manifest(manifest.root)
        with pytest.raises(NotFoundError, match="layer 1 of model"):
            await fetcher.blobs(manifest, stage_pieces(manifest, 1, 2))

    async def test_peers_that_are_gone_cost_no_more_than_their_deadline(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest
    ) -> None:
        gone = await swarm.honest()
        swarm.network.crash(gone.peer_id)
        fetcher, _ = await swarm.fetcher()
        with trio.fail_after(120), pytest.raises(NotFoundError, match="refused"):
            await fetcher.manifest(manifest.root, [gone])


class TestResume:
    async def test_a_fetch_that_was_cancelled_goes_on_where_it_was(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest
    ) -> None:
        big = manifest.piece(layer_name(1))
        asked: list[int] = []
        release = trio.Event()

        async def three_chunks(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
            if ask.what == CHUNKS:
                asked.extend(range(ask.start, ask.start + ask.count))
                if len(asked) > 3:
                    await release.wait()
            await reply(stream, frames)

        source = await swarm.hostile(three_chunks)
        fetcher, mine = await swarm.fetcher(FetchLimits(chunks_per_ask=1))
        with trio.move_on_after(10):
            await fetcher.blobs(manifest, [big], [source])
        first = asked[:3]
        assert len(asked) == 4
        assert not mine.store.has(big.root)
        asked.clear()
        release.set()
        again = Library.at(swarm.tmp_path / "mine")
        seen: list[int] = []

        async def progress(phase: str, done: int, total: int) -> None:
            seen.append(done)

        restarted = Fetcher(await swarm.open(), again.store, again.catalog, None, at_once)
        await restarted.blobs(manifest, [big], [source], progress)
        assert sorted(asked) == sorted({0, 1, 2, 3, 4, 5} - set(first))
        assert seen[2] == sum(chunk_length(big.size, index) for index in first)
        check_whole(again, [big])

    async def test_a_full_disk_ends_the_fetch_with_the_fix_and_loses_nothing(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        big = manifest.piece(layer_name(1))
        sources = [await swarm.honest() for _ in range(2)]
        fetcher, mine = await swarm.fetcher(FetchLimits(chunks_per_ask=1))
        real = os.pwrite
        written: list[int] = []

        def filling(handle: int, data: bytes, offset: int) -> int:
            if len(data) == CHUNK_BYTES:
                written.append(offset)
                if len(written) > 2:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(handle, data, offset)

        monkeypatch.setattr(os, "pwrite", filling)
        with pytest.raises(LocalError, match="full") as caught:
            await fetcher.blobs(manifest, [big], sources)
        assert "Free some space" in caught.value.fix
        monkeypatch.undo()
        with mine.store.begin(big) as partial:
            assert partial.verified_bytes in (2 * CHUNK_BYTES, 2 * CHUNK_BYTES + 1)  # the last chunk is a byte long
        await fetcher.blobs(manifest, [big], sources)
        check_whole(mine, [big])

    async def test_the_quota_is_checked_before_a_byte_is_fetched(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest
    ) -> None:
        fetcher, _ = await swarm.fetcher(quota_bytes=1 << 20)
        with pytest.raises(CapacityError, match="do not fit"):
            await fetcher.blobs(manifest, [manifest.piece(layer_name(1))], [await swarm.honest()])

    async def test_a_listener_that_goes_away_ends_the_fetch_with_its_own_error(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest
    ) -> None:
        async def progress(phase: str, done: int, total: int) -> None:
            if done > CHUNK_BYTES:
                raise UnreachableError("the coordinator is gone")

        source = await swarm.honest()
        fetcher, mine = await swarm.fetcher()
        with pytest.raises(UnreachableError, match="the coordinator is gone"):
            await fetcher.blobs(manifest, everything(manifest), [source], progress)
        await fetcher.blobs(manifest, everything(manifest), [source])
        check_whole(mine, everything(manifest))


class TestServing:
    @pytest.mark.parametrize(
        "change",
        [
            {"what": "everything"},
            {"what": CHUNKS, "count": 0},
            {"what": CHUNKS, "count": 17},
            {"what": CHUNKS, "start": 6},
            {"what": CHUNKS, "start": 5, "count": 2},
            {"what": HASHES, "count": 7},
            {"what": HASHES, "start": 60_000, "count": 32_768},
        ],
    )
    async def test_requests_out_of_bounds_end_the_stream(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest, change: dict[str, object]
    ) -> None:
        source = await swarm.honest()
        node = await swarm.open()
        node.learn(source)
        stream = await node.open_stream(source.peer_id, BLOBS)
        ask = replace(Ask(CHUNKS, manifest.piece(layer_name(1)).root, 0, 1, 0), **change)  # type: ignore[arg-type]
        await stream.send(ASKS.pack(ask))
        with pytest.raises(UnreachableError):
            await stream.receive()

    @given(raw=st.binary(max_size=80))
    def test_any_bytes_are_a_request_or_malformed(self, raw: bytes) -> None:
        for messages in (ASKS, ANSWERS):
            try:
                assert messages.pack(messages.unpack(raw)) == raw
            except MalformedError:
                continue

    async def test_a_damaged_blob_is_not_served(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest, library: Library, tmp_path: Path
    ) -> None:
        ill = Library.at(tmp_path / "ill")
        for blob in everything(manifest):
            ill.store.put(blob.name, blob.size, [library.store.path(blob.root).read_bytes()])
        big = manifest.piece(layer_name(1))
        path = ill.store.path(big.root)
        path.write_bytes(b"!" + path.read_bytes()[1:])
        fetcher, mine = await swarm.fetcher(FetchLimits(chunks_per_ask=1))
        sick, well = await swarm.honest(ill), await swarm.honest()
        fetched = await fetcher.blobs(manifest, everything(manifest), [sick, well])
        check_whole(mine, everything(manifest))
        assert not any(one.bad for one in fetched.dropped)

    async def test_a_peer_that_does_not_read_gets_its_stream_broken_off(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = await swarm.honest()
        node = await swarm.open()
        node.learn(source)
        stream = await node.open_stream(source.peer_id, BLOBS)
        await stream.send(ASKS.pack(Ask(CHUNKS, manifest.piece(layer_name(1)).root, 0, 6, 0)))
        await trio.sleep(2 * blobs_serving.SEND_TIMEOUT_S)
        with pytest.raises(UnreachableError):
            await stream.receive()

    async def test_too_many_answers_at_once_are_put_off(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(blobs_serving, "ANSWERS_MAX", 0)
        fetcher, _ = await swarm.fetcher()
        with pytest.raises(NotFoundError, match="too many others"):
            await fetcher.manifest(manifest.root, [await swarm.honest()])


def test_a_provider_is_dropped_for_lies_at_once_and_for_failures_in_the_end() -> None:
    limits = FetchLimits(failures_max=3, retry_after_s=1.0)

    def provider() -> blobs_module._Provider:
        return blobs_module._Provider(None, "peer", limits)  # type: ignore[arg-type]

    def notes(*errors: NexusError) -> tuple[list[float | None], Dropped | None]:
        one = provider()
        return [one.note(error) for error in errors], one.dropped

    gone = UnreachableError("gone")
    assert notes(MalformedError("bad")) == ([None], Dropped("peer", "bad", True))
    assert notes(gone, gone, gone) == ([1.0, 2.0, None], Dropped("peer", "gone", False))


async def test_the_same_over_the_real_network_and_real_threads(library: Library, manifest: Manifest, tmp_path: Path) -> None:
    options = NetworkOptions(listen=("/ip4/127.0.0.1/tcp/0",), mdns=False)
    mine = Library.at(tmp_path / "mine")
    async with (
        open_libp2p(Identity(bytes([1]) * 32), options) as one,
        open_libp2p(Identity(bytes([2]) * 32), options) as two,
        open_libp2p(Identity(bytes([3]) * 32), options) as me,
    ):
        for node in (one, two):
            BlobService(node, library.store, library.catalog).start()
        sources = [PeerAddress(node.peer_id, tuple(text.rpartition("/p2p/")[0] for text in node.addresses)) for node in (one, two)]
        fetcher = Fetcher(me, mine.store, mine.catalog)
        with trio.fail_after(60):
            assert await fetcher.manifest(manifest.root, sources) == manifest
            fetched = await fetcher.blobs(manifest, everything(manifest), sources)
    check_whole(mine, everything(manifest))
    assert fetched.dropped == ()


class TestSwarm:
    async def bootstrap(self, swarm: Swarm, manifest: Manifest, nodes: int, share: bool = True) -> tuple[float, list[Library]]:
        """Virtual seconds in which so many nodes have a model that one capped node had; and what they have then."""
        # Of its own: who has the model from an earlier time must not be in reach.
        swarm.network = SimulatedNetwork(nodes)
        began = trio.current_time()
        seed = await swarm.capped(512 * 1024)
        libraries = []
        async with trio.open_nursery() as nursery:
            for number in range(nodes):
                path = swarm.tmp_path / f"{share}-{nodes}-{number}"
                mine = Library.at(path)
                libraries.append(mine)
                node = await swarm.open()
                if share:
                    BlobService(node, mine.store, mine.catalog, at_once).start()
                fetcher = Fetcher(node, mine.store, mine.catalog, FetchLimits(chunks_per_ask=1, frame_timeout_s=300.0), at_once)

                async def get(fetcher: Fetcher = fetcher) -> None:
                    await fetcher.manifest(manifest.root, [seed])
                    await fetcher.blobs(manifest, everything(manifest), [seed])

                nursery.start_soon(get)
        return trio.current_time() - began, libraries

    async def test_a_swarm_gets_a_model_from_one_capped_node_in_much_less_than_n_times_the_time(
        self, autojump_clock: object, swarm: Swarm, wide: Manifest
    ) -> None:
        alone_s, _ = await self.bootstrap(swarm, wide, 1)
        together_s, libraries = await self.bootstrap(swarm, wide, 5)
        for mine in libraries:
            check_whole(mine, everything(wide))
        assert together_s < 2.2 * alone_s

    async def test_without_exchange_it_would_take_n_times_the_time(
        self, autojump_clock: object, swarm: Swarm, wide: Manifest
    ) -> None:
        """So that the test above can fail."""
        alone_s, _ = await self.bootstrap(swarm, wide, 1)
        apart_s, _ = await self.bootstrap(swarm, wide, 3, share=False)
        assert apart_s > 2.5 * alone_s

    async def test_chunks_of_a_blob_that_is_on_its_way_are_served(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest, library: Library
    ) -> None:
        big = manifest.piece(layer_name(1))
        part = Library.at(swarm.tmp_path / "part")
        part.catalog.keep(manifest)
        with part.store.begin(big) as partial:
            partial.accept_hashes(library.store.chunk_hashes(big.root))
            for index in (1, 5):
                partial.write_chunk(index, library.store.read_chunk(big.root, index))
            relay, source = await swarm.honest(part), await swarm.honest()
            node = await swarm.open()
            node.learn(relay)
            stream = await node.open_stream(relay.peer_id, BLOBS)
            for ask, ok in [
                (Ask(CHUNKS, big.root, 1, 1, 0), True),
                (Ask(CHUNKS, big.root, 1, 2, 0), False),
                (Ask(HASHES, big.root, 0, 6, 0), True),
            ]:
                await stream.send(ASKS.pack(ask))
                answer = ANSWERS.unpack(await stream.receive())
                assert isinstance(answer, Answer)
                assert (answer.code == OK) == ok
                if ok:
                    assert await stream.receive() == library.frames(ask)[0]
            fetcher, mine = await swarm.fetcher(FetchLimits(chunks_per_ask=1))
            fetched = await fetcher.blobs(manifest, [big], [relay, source])
        check_whole(mine, [big])
        assert fetched.dropped == ()

    async def test_those_that_have_only_parts_are_asked_again_and_given_up_when_nothing_comes(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest, library: Library
    ) -> None:
        big = manifest.piece(layer_name(1))
        part = Library.at(swarm.tmp_path / "part")
        part.catalog.keep(manifest)
        with part.store.begin(big) as partial:
            partial.accept_hashes(library.store.chunk_hashes(big.root))
            partial.write_chunk(0, library.store.read_chunk(big.root, 0))
            relay = await swarm.honest(part)
            fetcher, mine = await swarm.fetcher()
            with trio.fail_after(60), pytest.raises(NotFoundError, match="layer 1"):
                await fetcher.blobs(manifest, [big], [relay])
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fetcher.blobs, manifest, [big], [relay])
                await trio.sleep(3)
                for index in range(1, 6):
                    partial.write_chunk(index, library.store.read_chunk(big.root, index))
        check_whole(mine, [big])


class TestSlow:
    @pytest.mark.parametrize("twist", [stall, stall_in_the_middle], ids=lambda twist: twist.__name__)
    async def test_one_that_stalls_costs_seconds_at_most(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest, twist: Twist
    ) -> None:
        async def late(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
            """It says what it has, and then nothing more."""
            if ask.what == HAVE:
                await reply(stream, frames)
            else:
                await twist(stream, ask, frames)

        sources = [await swarm.hostile(late) for _ in range(3)] + [await swarm.honest()]
        fetcher, mine = await swarm.fetcher()
        began = trio.current_time()
        await fetcher.blobs(manifest, everything(manifest), sources)
        check_whole(mine, everything(manifest))
        assert trio.current_time() - began < 3 * blobs_module.TURN_S[0]

    async def test_one_that_trickles_loses_its_turn_and_the_others_do_the_work(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest
    ) -> None:
        async def trickle(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
            await stream.send(ANSWERS.pack(Answer(OK, len(frames), "")))
            for frame in frames:
                await trio.sleep(20 if ask.what == CHUNKS else 0.1)
                await stream.send(frame)

        trickling, source = await swarm.hostile(trickle), await swarm.honest()
        fetcher, mine = await swarm.fetcher(FetchLimits(chunks_per_ask=1))
        began = trio.current_time()
        fetched = await fetcher.blobs(manifest, everything(manifest), [trickling, source])
        check_whole(mine, everything(manifest))
        assert trio.current_time() - began < 3 * blobs_module.TURN_S[0]
        assert fetched.dropped == ()

    async def test_one_that_is_slow_and_alone_is_good_enough(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest
    ) -> None:
        async def slow(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
            await stream.send(ANSWERS.pack(Answer(OK, len(frames), "")))
            for frame in frames:
                await trio.sleep(15)
                await stream.send(frame)

        fetcher, mine = await swarm.fetcher()
        await fetcher.blobs(manifest, [manifest.piece(layer_name(1))], [await swarm.hostile(slow)])
        check_whole(mine, [manifest.piece(layer_name(1))])

    async def test_one_that_denies_what_it_says_it_has_is_given_up(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest
    ) -> None:
        async def deny(stream: Stream, ask: Ask, frames: list[bytes]) -> None:
            if ask.what == HAVE:
                await reply(stream, frames)
            else:
                await stream.send(ANSWERS.pack(Answer(NotFoundError.code, 0, "")))

        denying = await swarm.hostile(deny)
        fetcher, _ = await swarm.fetcher()
        with trio.fail_after(300), pytest.raises(NotFoundError, match="says it has not"):
            await fetcher.blobs(manifest, everything(manifest), [denying])

    async def test_limits_on_both_ends_hold(self, autojump_clock: object, swarm: Swarm, manifest: Manifest) -> None:
        big = manifest.piece(layer_name(1))
        for number, (up, down) in enumerate([(1 << 19, 0), (0, 1 << 19)]):
            sources = [await swarm.capped(up) for _ in range(2)] if up else [await swarm.honest() for _ in range(2)]
            mine = Library.at(swarm.tmp_path / f"limit-{number}")
            fetcher = Fetcher(await swarm.open(), mine.store, mine.catalog, None, at_once, download_max=down)
            began = trio.current_time()
            await fetcher.blobs(manifest, [big], sources)
            took_s = trio.current_time() - began
            rate = (2 if up else 1) * (1 << 19)
            assert took_s > 0.6 * big.size / rate


class TestPacked:
    async def test_a_slow_source_packs_and_what_comes_is_right(self, autojump_clock: object, swarm: Swarm, tmp_path: Path) -> None:
        """Weights that compress, over a slow link."""
        lean = Library.at(tmp_path / "lean")
        rng = random.Random(5)
        data = bytes(rng.randrange(16) for _ in range(4096)) * (8 * CHUNK_BYTES // 4096)
        blobs = [
            lean.store.put(name, len(raw), [raw])
            for name, raw in [("config.json", b"{}"), (EMBEDDING, data), (layer_name(0), data[:-1]), (HEAD, b"")]
        ]
        manifest = Manifest(
            1, "causal", "LlamaForCausalLM", "float", "float32", 1, 8, 16, 64, 32, 0, tuple(blobs[1:]), (blobs[0],), ()
        )
        lean.catalog.keep(manifest)
        sizes: list[tuple[int, int]] = []
        node = await swarm.open()
        service = BlobService(node, lean.store, lean.catalog, at_once)

        class Slow:
            """A link of 1 MB/s that counts."""

            def __init__(self, stream: Stream) -> None:
                self._stream = stream
                self.peer_id = stream.peer_id

            async def receive(self) -> bytes:
                frame = await self._stream.receive()
                ask = ASKS.unpack(frame)
                assert isinstance(ask, Ask)
                sizes.append((ask.packed, 0))
                return frame

            async def send(self, frame: bytes) -> None:
                await trio.sleep(len(frame) / 1e6)
                sizes.append((-1, len(frame)))
                await self._stream.send(frame)

        async def handle(stream: Stream) -> None:
            await service._handle(Slow(stream))  # type: ignore[arg-type]

        node.serve(BLOBS, handle)
        fetcher, mine = await swarm.fetcher()
        await fetcher.blobs(manifest, everything(manifest), [PeerAddress(node.peer_id, (node.endpoint,))])
        check_whole(mine, everything(manifest))
        assert any(packed == 1 for packed, _ in sizes)
        assert sum(size for _, size in sizes) < len(data)

    @given(data=st.binary(max_size=3000), repeat=st.integers(1, 50))
    def test_packing_is_undone(self, data: bytes, repeat: int) -> None:
        raw = data * repeat
        packed = pack_chunk(raw)
        if packed is not None:
            assert len(packed) < len(raw)
            assert unpack_chunk(packed, len(raw)) == raw
        assert unpack_chunk(raw, len(raw)) == raw

    def test_bombs_and_garbage_are_refused(self) -> None:
        bomb = zlib.compress(bytes(1 << 28), 9)
        for frame in (
            bomb,
            zlib.compress(bytes(CHUNK_BYTES - 1)),
            zlib.compress(bytes(CHUNK_BYTES + 1)),
            zlib.compress(bytes(CHUNK_BYTES)) + b"x",
            zlib.compress(bytes(CHUNK_BYTES))[:-1],
            b"garbage",
            b"",
        ):
            tracemalloc.start()
            with pytest.raises(MalformedError):
                unpack_chunk(frame, CHUNK_BYTES)
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert peak < 4 * CHUNK_BYTES
        with pytest.raises(MalformedError):
            unpack_chunk(bytes(CHUNK_BYTES + 1), CHUNK_BYTES)

    def test_what_is_not_worth_packing_is_not_tried_again(self, library: Library, manifest: Manifest) -> None:
        service = BlobService(None, library.store, library.catalog)  # type: ignore[arg-type]
        big = manifest.piece(layer_name(1))
        assert service._read_packed(big.root, 0) == library.store.read_chunk(big.root, 0)
        assert big.root in service._unpackable


class TestHave:
    @given(sizes=st.lists(st.integers(0, 20 * CHUNK_BYTES), min_size=1, max_size=6), seed=st.integers(0, 2**32))
    def test_a_have_map_says_what_is_here(self, sizes: list[int], seed: int) -> None:
        rng = random.Random(seed)
        blobs = [Blob(str(number), size, bytes([number]) * 32) for number, size in enumerate(sizes)]
        here: list[bool | bytes] = [
            rng.choice([True, False, bytes(rng.randrange(2) for _ in range(chunk_count(blob.size)))]) for blob in blobs
        ]
        found = unpack_have(blobs, pack_have(blobs, here))
        for blob, one in zip(blobs, here, strict=True):
            expected = [one] * chunk_count(blob.size) if isinstance(one, bool) else [byte == 1 for byte in one]
            assert found[blob.root].tolist() == expected

    @given(raw=st.binary(max_size=40))
    def test_any_bytes_are_a_have_map_or_malformed(self, raw: bytes) -> None:
        blobs = [Blob("a", 3 * CHUNK_BYTES, bytes(32)), Blob("b", 0, b"b" * 32)]
        try:
            found = unpack_have(blobs, raw)
        except MalformedError:
            return
        assert [len(flags) for flags in found.values()] == [3, 1]


async def test_a_killed_fetch_goes_on_and_fetches_no_chunk_twice(library: Library, manifest: Manifest, tmp_path: Path) -> None:
    """A process that fetches is killed in the middle; the next one asks for what is missing and for nothing else."""
    big = manifest.piece(layer_name(1))
    asked: list[int] = []
    killed = trio.Event()
    process: list[trio.Process] = []
    options = NetworkOptions(listen=("/ip4/127.0.0.1/tcp/0",), mdns=False)
    async with open_libp2p(Identity(bytes([1]) * 32), options) as node:

        async def handle(stream: Stream) -> None:
            while True:
                ask = ASKS.unpack(await stream.receive())
                assert isinstance(ask, Ask)
                frames = library.frames(ask)
                if ask.what == CHUNKS:
                    if len(asked) >= 3 and not killed.is_set():
                        # The chunks before this one have been taken: it asks for more only then.
                        await trio.sleep(0.3)
                        process[0].kill()
                        killed.set()
                        return
                    asked.extend(range(ask.start, ask.start + ask.count))
                await reply(stream, frames)

        node.serve(BLOBS, handle)
        code = (
            "import sys, trio\n"
            "from pathlib import Path\n"
            "from tests.node.test_blobs import fetch_in_a_process\n"
            "trio.run(fetch_in_a_process, *sys.argv[1:])\n"
        )
        arguments = [str(tmp_path / "mine"), node.addresses[0], manifest.to_bytes().hex(), big.name]

        async with trio.open_nursery() as nursery:
            for _ in range(2):
                process[:] = [
                    await nursery.start(functools.partial(trio.run_process, [sys.executable, "-c", code, *arguments], check=False))
                ]
                with trio.fail_after(60):
                    await process[0].wait()
                before = sorted(set(asked))
    mine = Library.at(tmp_path / "mine")
    assert before == list(range(6))
    assert killed.is_set()
    # What was on its way when it was killed may come again; what was here does not.
    assert len(asked) == len(set(asked)) <= 8
    check_whole(mine, [big])


async def fetch_in_a_process(path: str, address: str, raw: str, name: str) -> None:
    manifest = Manifest.from_bytes(bytes.fromhex(raw))
    mine = Library.at(Path(path))
    options = NetworkOptions(listen=("/ip4/127.0.0.1/tcp/0",), mdns=False)
    async with open_libp2p(Identity(bytes([2]) * 32), options) as me:
        endpoint, _, peer_id = address.rpartition("/p2p/")
        fetcher = Fetcher(me, mine.store, mine.catalog, FetchLimits(chunks_per_ask=1))
        await fetcher.blobs(manifest, [manifest.piece(name)], [PeerAddress(peer_id, (endpoint,))])
