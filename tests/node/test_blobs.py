"""Fragment exchange over the simulated network: honest peers, peers that fail, and peers that lie."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.errors import CapacityError, LocalError, MalformedError, NexusError, NotFoundError, UnreachableError
from nexus.core.keys import Identity
from nexus.core.manifest import CHUNK_BYTES, EMBEDDING, HEAD, Blob, Manifest, layer_name, stage_pieces
from nexus.network.libp2p import NetworkOptions, open_libp2p
from nexus.network.simulated import SimulatedNetwork, SimulatedTransport
from nexus.network.transport import PeerAddress, Stream
from nexus.node import blobs as blobs_module
from nexus.node.blobs import (
    ANSWERS,
    ASKS,
    BLOBS,
    CHUNKS,
    HASHES,
    MANIFEST,
    OK,
    Answer,
    Ask,
    BlobService,
    Dropped,
    Fetcher,
    FetchLimits,
    Result,
    _Work,
)
from nexus.storage.blobs import BlobStore
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
    await reply(stream, frames[::-1] if len(frames) > 1 else [bytes(len(frames[0]) or 1)])


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
                if ask.start >= 3:
                    await release.wait()
            await reply(stream, frames)

        source = await swarm.hostile(three_chunks)
        fetcher, mine = await swarm.fetcher(FetchLimits(chunks_per_ask=1))
        with trio.move_on_after(10):
            await fetcher.blobs(manifest, [big], [source])
        assert asked == [0, 1, 2, 3]
        assert not mine.store.has(big.root)
        asked.clear()
        release.set()
        again = Library.at(swarm.tmp_path / "mine")
        seen: list[int] = []

        async def progress(phase: str, done: int, total: int) -> None:
            seen.append(done)

        restarted = Fetcher(await swarm.open(), again.store, again.catalog, None, at_once)
        await restarted.blobs(manifest, [big], [source], progress)
        assert asked == [3, 4, 5]
        assert seen[2] == 3 * CHUNK_BYTES
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
            assert partial.verified_bytes == 2 * CHUNK_BYTES
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
        ask = replace(Ask(CHUNKS, manifest.piece(layer_name(1)).root, 0, 1), **change)  # type: ignore[arg-type]
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
        await stream.send(ASKS.pack(Ask(CHUNKS, manifest.piece(layer_name(1)).root, 0, 6)))
        await trio.sleep(2 * blobs_module.SEND_TIMEOUT_S)
        with pytest.raises(UnreachableError):
            await stream.receive()

    async def test_too_many_answers_at_once_are_put_off(
        self, autojump_clock: object, swarm: Swarm, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(blobs_module, "ANSWERS_MAX", 0)
        fetcher, _ = await swarm.fetcher()
        with pytest.raises(NotFoundError, match="too many others"):
            await fetcher.manifest(manifest.root, [await swarm.honest()])


class TestWork:
    @given(
        missing=st.sets(st.integers(0, 40)),
        run_max=st.integers(1, 9),
        steps=st.lists(st.tuples(st.sampled_from(["claim", "finish", "fail"]), st.integers(0, 5))),
    )
    def test_no_chunk_is_lost_and_none_is_claimed_by_more_than_two(
        self, missing: set[int], run_max: int, steps: list[tuple[str, int]]
    ) -> None:
        work = _Work(missing, run_max)
        left = set(missing)
        runs: list[range] = []
        for kind, pick in steps:
            if kind == "claim":
                run = work.claim()
                if run is not None:
                    assert 1 <= len(run) <= run_max
                    assert set(run) <= left
                    runs.append(run)
            elif runs:
                run = runs.pop(pick % len(runs))
                for index in run if kind == "finish" else ():
                    assert work.finish(index) == (index in left)
                    left.discard(index)
                work.release(run)
            assert all(sum(index in run for run in runs) <= 2 for index in left)
            assert work.done == (not left)
        # Whoever holds a run lets go of it, and one that is left alone ends the work.
        for run in runs:
            work.release(run)
        while (run := work.claim()) is not None:
            for index in run:
                work.finish(index)
                left.discard(index)
        assert not left
        assert work.done


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
