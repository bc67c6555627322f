"""The answering end of `/nexus/blobs/1`: from the store and the catalog, and with nothing else."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import structlog
import trio

from nexus.core.errors import CapacityError, LocalError, MalformedError, NotFoundError
from nexus.core.manifest import CHUNK_BYTES, chunk_count
from nexus.network.limits import TokenBucket
from nexus.network.rates import Pace
from nexus.network.transport import Stream, Transport
from nexus.node.blobs_threads import OffThread, deadline, in_worker_thread
from nexus.node.blobs_wire import (
    ANSWERS,
    ASKS,
    BLOBS,
    CHUNKS,
    CHUNKS_MAX,
    HASHES,
    HAVE,
    MANIFEST,
    OK,
    Answer,
    Ask,
    blobs_of,
    pack_chunk,
    pack_have,
)
from nexus.node.capacity import UploadMeter
from nexus.storage.blobs import BlobStore
from nexus.storage.catalog import Catalog

log = structlog.get_logger("nexus.blobs")

# Answers under way at once, over all peers; each holds two chunks in memory. One more asker is told to try again later.
ANSWERS_MAX = 32
# With a limit on uploads no more than get a chunk each in this time: an asker gives up after 30 s.
CHUNK_WITHIN_S = 20.0
SEND_TIMEOUT_S = 60.0
# What is here is looked up at most this often for one model, whoever asks.
HAVE_FRESH_S = 1.0
HAVES_MAX = 64
# Chunks packed per second, over all peers, at about 25 ms of a core each. More are sent as they are.
PACKS_PER_S = 8.0
# Blobs that were tried and are not worth packing, remembered.
UNPACKABLE_MAX = 4096


class BlobService:
    """Answers peers, also from blobs that are still on their way here. `uploads` measures how fast."""

    def __init__(
        self,
        transport: Transport,
        store: BlobStore,
        catalog: Catalog,
        off_thread: OffThread = in_worker_thread,
        uploads: UploadMeter | None = None,
        upload_max: int = 0,
        pace_of: Callable[[bytes], Pace | None] = lambda blob_root: None,
    ) -> None:
        """`upload_max`: bytes per second over all peers, 0 for no limit. `pace_of`: a further limit on giving a blob."""
        self._transport = transport
        self._store = store
        self._catalog = catalog
        self._off_thread = off_thread
        self._uploads = uploads or UploadMeter()
        self._answers = 0
        self._answers_max = max(1, min(ANSWERS_MAX, int(upload_max * CHUNK_WITHIN_S / CHUNK_BYTES))) if upload_max else ANSWERS_MAX
        self._pace = Pace(upload_max)
        self._pace_of = pace_of
        self._packs: TokenBucket | None = None
        self._unpackable: OrderedDict[bytes, None] = OrderedDict()
        self._haves: OrderedDict[bytes, tuple[float, bytes]] = OrderedDict()

    def start(self) -> None:
        self._transport.serve(BLOBS, self._handle)

    async def _handle(self, stream: Stream) -> None:
        while True:
            frame = await stream.receive()
            try:
                ask = ASKS.unpack(frame)
                assert isinstance(ask, Ask)
                await self._answer_in_turn(stream, ask)
            except MalformedError as error:
                error.peer = stream.peer_id
                raise

    async def _answer_in_turn(self, stream: Stream, ask: Ask) -> None:
        if self._answers >= self._answers_max:
            await _send(stream, ANSWERS.pack(Answer(CapacityError.code, 0, "it answers too many others now")))
            return
        self._answers += 1
        try:
            await self._answer(stream, ask)
        finally:
            self._answers -= 1

    async def _answer(self, stream: Stream, ask: Ask) -> None:
        try:
            frames = await self._found(ask)
        except NotFoundError:
            await _send(stream, ANSWERS.pack(Answer(NotFoundError.code, 0, "not here")))
            return
        except LocalError as error:
            # The owner reads about the disk in the log; to the peer it is a blob that is not here.
            log.error("blob_unreadable", root=ask.root.hex(), reason=error.cause)
            await _send(stream, ANSWERS.pack(Answer(NotFoundError.code, 0, "not here")))
            return
        await _send(stream, ANSWERS.pack(Answer(OK, len(frames), "")))
        limit = self._pace_of(ask.root) if ask.what == CHUNKS else None
        with self._uploads.busy():
            if len(frames) == 1:
                await self._give(stream, await self._off_thread(frames[0]), limit)
                return
            # The next frame is read while this one is sent.
            ahead, read = trio.open_memory_channel[bytes](0)

            async def look_ahead() -> None:
                async with ahead:
                    for frame in frames:
                        await ahead.send(await self._off_thread(frame))

            failures: list[Exception] = []

            async def give_all() -> None:
                async with read:
                    async for data in read:
                        await self._give(stream, data, limit)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(_caught, look_ahead, failures)
                nursery.start_soon(_caught, give_all, failures)
            if failures:
                raise failures[0]

    async def _give(self, stream: Stream, frame: bytes, limit: Pace | None) -> None:
        await self._pace.spend(len(frame))
        if limit is not None:
            await limit.spend(len(frame))
        await _send(stream, frame)
        self._uploads.sent(len(frame))

    async def _found(self, ask: Ask) -> list[Callable[[], bytes]]:
        """How to read each frame of the answer. Raises NotFoundError, LocalError, MalformedError."""
        if ask.what == HAVE:
            have = await self._have(ask.root)
            return [lambda: have]
        packs = ask.what == CHUNKS and bool(ask.packed) and ask.root not in self._unpackable and self._may_pack(ask.count)
        return await self._off_thread(lambda: self._look_up(ask, packs))

    def _look_up(self, ask: Ask, packs: bool = False) -> list[Callable[[], bytes]]:
        """How to read each frame of the answer; they are read one by one, so that no more than two are in memory."""
        if ask.what == MANIFEST:
            return [self._catalog.manifest(ask.root).to_bytes]
        count = chunk_count(self._store.announced_size(ask.root))
        if not 0 < ask.count <= count - ask.start:
            raise MalformedError(f"it asks for {ask.count} from {ask.start} on of {count} chunks")
        indices = range(ask.start, ask.start + ask.count)
        if ask.what == HASHES:
            run = self._store.chunk_hashes(ask.root)[ask.start : ask.start + ask.count]
            return [functools.partial(b"".join, run)]
        if ask.what == CHUNKS and ask.count <= CHUNKS_MAX:
            here = self._store.here(ask.root)
            if here is False or (isinstance(here, bytes) and not all(here[index] for index in indices)):
                raise NotFoundError("not all of these chunks are here yet")
            read = self._read_packed if packs else self._store.read_chunk
            return [functools.partial(read, ask.root, index) for index in indices]
        raise MalformedError(f"it asks for {ask.count} of {ask.what!r}")

    def _read_packed(self, root: bytes, index: int) -> bytes:
        data = self._store.read_chunk(root, index)
        if root in self._unpackable:
            return data
        packed = pack_chunk(data)
        if packed is not None:
            return packed
        # What one chunk does not gain the others will not either: they are weights of one kind.
        self._unpackable[root] = None
        while len(self._unpackable) > UNPACKABLE_MAX:
            self._unpackable.popitem(last=False)
        return data

    def _may_pack(self, chunks: int) -> bool:
        """Whether there is time for it: whoever asks, it takes no more than a part of one core."""
        now_s = trio.current_time()
        if self._packs is None:
            self._packs = TokenBucket(PACKS_PER_S, 2 * CHUNKS_MAX, now_s)
        if self._packs.take(0, now_s) > 0:
            return False
        self._packs.take(chunks, now_s)
        return True

    async def _have(self, model_root: bytes) -> bytes:
        """The have-map of a model; a little old at most. Raises NotFoundError, LocalError."""
        now_s = trio.current_time()
        known = self._haves.get(model_root)
        if known is not None and known[0] > now_s:
            return known[1]

        def look() -> bytes:
            blobs = blobs_of(self._catalog.manifest(model_root))
            return pack_have(blobs, (self._store.here(blob.root) for blob in blobs))

        found = await self._off_thread(look)
        self._haves[model_root] = (trio.current_time() + HAVE_FRESH_S, found)
        self._haves.move_to_end(model_root)
        if len(self._haves) > HAVES_MAX:
            self._haves.popitem(last=False)
        return found


async def _caught(work: Callable[[], Awaitable[None]], failures: list[Exception]) -> None:
    """Run one end of a channel; what it raises is kept, not raised, so that the other end ends in order, and it is no group."""
    try:
        await work()
    except trio.BrokenResourceError:
        return  # the other end has gone, for a reason of its own
    except Exception as error:  # noqa: BLE001 - raised by whoever opened the channel
        failures.append(error)


async def _send(stream: Stream, frame: bytes) -> None:
    with deadline(SEND_TIMEOUT_S, f"peer {stream.peer_id} did not read its answer for {SEND_TIMEOUT_S:g} s"):
        await stream.send(frame)
