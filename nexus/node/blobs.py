"""Fragment exchange, `/nexus/blobs/1`: manifests and blobs from peers, in verified, resumable chunks. Both ends are here.

A stream carries any number of requests, one after the other: an Ask one way, then an Answer and the frames it promises the
other way. Frames are raw: a manifest's bytes, up to HASHES_MAX leaf hashes run together, or one chunk each. Nothing that a peer
sends is kept before its hash is checked, so any peer may be asked, and the bytes of several peers make one blob.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import structlog
import trio

from nexus.core.errors import (
    CapacityError,
    LocalError,
    MalformedError,
    NexusError,
    NotFoundError,
    PeerError,
    RefusedError,
    TimedOutError,
    UnreachableError,
)
from nexus.core.hashing import HASH_BYTES
from nexus.core.keys import public_key_of
from nexus.core.manifest import CHUNK_BYTES, EMBEDDING, HEAD, Blob, Manifest, chunk_count
from nexus.core.record import MessageSet, Record, digest, text, uint
from nexus.network.rates import Pace
from nexus.network.transport import PeerAddress, ProtocolSpec, Stream, Transport
from nexus.node.capacity import UploadMeter
from nexus.storage.blobs import BLOB_BYTES_MAX, BlobStore, Partial
from nexus.storage.catalog import Catalog, parse_manifest
from nexus.swarm.membership import provider_key

log = structlog.get_logger("nexus.blobs")

CHUNKS_MAX = 16
HASHES_MAX = CHUNK_BYTES // HASH_BYTES
CHUNK_INDEX_MAX = BLOB_BYTES_MAX // CHUNK_BYTES
BLOBS = ProtocolSpec("/nexus/blobs/1", frame_max=CHUNK_BYTES + 64 * 1024, read_timeout_s=60.0, streams_per_peer_max=4, bulk=True)
# Answers under way at once, over all peers; each holds a chunk in memory. One more asker is told to try again later.
ANSWERS_MAX = 64
SEND_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 5.0

MANIFEST, HASHES, CHUNKS = "manifest", "hashes", "chunks"
OK = "ok"


@dataclass(frozen=True, slots=True)
class Ask(Record):
    """`what`: "manifest" (root: the model's), "hashes" or "chunks" (root: the blob's), then [start, start + count) of them."""

    what: str = text(16)
    root: bytes = digest()
    start: int = uint(CHUNK_INDEX_MAX)
    count: int = uint(HASHES_MAX)


@dataclass(frozen=True, slots=True)
class Answer(Record):
    """`code`: "ok", and then `frames` frames follow; or an error code of `nexus.core.errors` with its cause, and none do."""

    code: str = text(32)
    frames: int = uint(CHUNKS_MAX)
    cause: str = text(512)


ASKS = MessageSet(Ask)
ANSWERS = MessageSet(Answer)

Result = TypeVar("Result")
ProgressSink = Callable[[str, int, int], Awaitable[None]]
Take = Callable[[int, bytes], Awaitable[None]]


class OffThread(Protocol):
    """Runs a function that waits for the disk or hashes much, away from the trio thread."""

    async def __call__(self, work: Callable[[], Result]) -> Result: ...


async def in_worker_thread(work: Callable[[], Result]) -> Result:
    return await trio.to_thread.run_sync(work)


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """`frame_timeout_s`: for a peer's next frame, so a peer slower than a chunk in that time is given up. `failures_max`: in a
    row, then a peer is left alone for the rest of the fetch; `retry_after_s` doubles from one to the next."""

    providers_max: int = 16
    workers_max: int = 4
    chunks_per_ask: int = 8
    frame_timeout_s: float = 30.0
    open_timeout_s: float = 15.0
    find_timeout_s: float = 5.0
    failures_max: int = 3
    retry_after_s: float = 0.5


@dataclass(frozen=True, slots=True)
class Dropped:
    """A provider that was given up, and why. `bad`: it sent wrong bytes, or broke the protocol."""

    peer_id: str
    reason: str
    bad: bool


@dataclass(frozen=True, slots=True)
class Fetched:
    """`received_bytes`: verified bytes by the peer that they came from, sorted by peer."""

    received_bytes: tuple[tuple[str, int], ...]
    dropped: tuple[Dropped, ...]


# --- the asking end ---------------------------------------------------------------------------------------------------------


@contextmanager
def _deadline(timeout_s: float, cause: str) -> Iterator[None]:
    with trio.move_on_after(timeout_s) as scope:
        yield
    if scope.cancelled_caught:
        raise TimedOutError(cause)


class _Provider:
    """One peer in one fetch: its stream, and what it did so far. Used by one task at a time."""

    def __init__(self, transport: Transport, peer_id: str, limits: FetchLimits) -> None:
        self.peer_id = peer_id
        self.dropped: Dropped | None = None
        self.received_bytes = 0
        self._failures = 0
        self._transport = transport
        self._limits = limits
        self._stream: Stream | None = None

    async def ask(self, ask: Ask, frames: int, take: Take) -> bool:
        """Ask, and hand every frame to `take` with its number. False: the peer does not have it.

        Raises PeerError, TimedOutError, CapacityError, with the stream broken off; what was taken stays taken.
        """
        try:
            stream = await self._opened()
            with _deadline(self._limits.frame_timeout_s, "it took too long to take the request"):
                await stream.send(ASKS.pack(ask))
            answer = ANSWERS.unpack(await self._frame(stream))
            assert isinstance(answer, Answer)
            if answer.code == NotFoundError.code:
                return False
            if answer.code != OK:
                raise RefusedError(f"it declines ({_plain(answer.code)}): {_plain(answer.cause)}")
            if answer.frames != frames:
                raise MalformedError(f"it promises {answer.frames} frames where {frames} were asked for")
            for number in range(frames):
                await take(number, await self._frame(stream))
        except BaseException:
            # Also on cancellation: half an answer is left in the stream.
            await self._break_off()
            raise
        self._failures = 0
        return True

    def note(self, error: NexusError) -> float | None:
        """What an error of this peer leads to: the seconds to wait before it is tried again, or None: it is dropped."""
        bad = isinstance(error, PeerError) and not isinstance(error, UnreachableError | RefusedError)
        self._failures += 1
        if bad or self._failures >= self._limits.failures_max:
            self.dropped = Dropped(self.peer_id, error.cause, bad)
            log.warning("provider_dropped", peer_id=self.peer_id, reason=error.cause, bad=bad)
            return None
        return self._limits.retry_after_s * 2.0 ** (self._failures - 1)

    async def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            with trio.move_on_after(CLOSE_TIMEOUT_S) as scope:
                scope.shield = True
                await stream.close()

    async def _opened(self) -> Stream:
        if self._stream is not None:
            return self._stream
        with _deadline(self._limits.open_timeout_s, "it took too long to be reached"):
            try:
                self._stream = stream = await self._transport.open_stream(self.peer_id, BLOBS)
            except UnreachableError:
                raise
            except PeerError as error:
                # It may be too old for this protocol, or have too many streams: no sign of ill will.
                raise RefusedError(error.cause, error.fix, self.peer_id) from error
        return stream

    async def _frame(self, stream: Stream) -> bytes:
        with _deadline(self._limits.frame_timeout_s, "it took too long to send the next frame"):
            try:
                frame = await stream.receive()
            except trio.EndOfChannel:
                raise UnreachableError("it closed the stream before it had answered") from None
        return frame

    async def _break_off(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            with trio.CancelScope(shield=True):
                await stream.reset()


class _Work:
    """The chunks of one blob that are still missing, handed out in runs. A run that nobody else could take is handed out twice:
    whoever is faster ends it, so one slow peer does not hold up the end."""

    def __init__(self, missing: Iterable[int], run_max: int) -> None:
        self._claims = dict.fromkeys(missing, 0)
        self._run_max = run_max
        self._changed = trio.Event()

    @property
    def done(self) -> bool:
        return not self._claims

    def claim(self) -> range | None:
        """The next run of chunks to ask for, or None if there is nothing to add to what others do."""
        if not self._claims:
            return None
        first = min(self._claims, key=lambda index: (self._claims[index], index))
        if (claimed := self._claims[first]) >= 2:
            return None
        end = first
        while end - first < self._run_max and self._claims.get(end) == claimed:
            self._claims[end] += 1
            end += 1
        return range(first, end)

    def finish(self, index: int) -> bool:
        """Note that a chunk is here. False: it was already."""
        fresh = self._claims.pop(index, None) is not None
        if self.done:
            self._wake()
        return fresh

    def release(self, run: range) -> None:
        """Whoever claimed the run does not go on with it."""
        for index in run:
            if index in self._claims:
                self._claims[index] -= 1
        self._wake()

    async def wait(self) -> None:
        """Until there may be something to claim, or all is done."""
        await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


class _StoppedError(Exception):
    """The listener to our progress raised: its error is not the provider's that was just at work."""

    def __init__(self, error: NexusError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(slots=True)
class _Fetch:
    """One call of `Fetcher`: whom it asks, and how far it is."""

    progress: ProgressSink | None
    providers: tuple[_Provider, ...] = ()
    total_bytes: int = 0
    done_bytes: int = 0
    telling: bool = False

    def live(self, turn: int = 0) -> list[_Provider]:
        """Providers not given up; `turn` decides who comes first."""
        found = [provider for provider in self.providers if provider.dropped is None]
        shift = turn % len(found) if found else 0
        return found[shift:] + found[:shift]

    async def tell(self, phase: str) -> None:
        """Progress, unless the last is still being told: a slow listener slows nothing else down."""
        if self.progress is None or self.telling:
            return
        self.telling = True
        try:
            await self.progress(phase, self.done_bytes, self.total_bytes)
        except NexusError as error:
            raise _StoppedError(error) from error
        finally:
            self.telling = False


class Fetcher:
    """The asking end. Calls may overlap: a blob that two of them want is downloaded once."""

    def __init__(
        self,
        transport: Transport,
        store: BlobStore,
        catalog: Catalog,
        limits: FetchLimits | None = None,
        off_thread: OffThread = in_worker_thread,
        download_max: int = 0,
    ) -> None:
        """`download_max`: bytes per second over all peers, 0 for no limit."""
        self._transport = transport
        self._store = store
        self._catalog = catalog
        self._pace = Pace(download_max)
        self._limits = limits or FetchLimits()
        self._off_thread = off_thread
        self._ongoing: dict[bytes, trio.Event] = {}

    async def manifest(self, model_root: bytes, sources: Sequence[PeerAddress] = ()) -> Manifest:
        """The model's manifest, from here or from peers: `sources`, and whoever announces it on the DHT. It is kept.

        Raises NotFoundError when nobody has it, LocalError (disk).
        """
        if await self._off_thread(lambda: self._catalog.has(model_root)):
            return await self._off_thread(lambda: self._catalog.manifest(model_root))
        found: list[Manifest] = []

        async def take(_: int, frame: bytes) -> None:
            found.append(parse_manifest(frame, model_root))

        async def ask(provider: _Provider) -> None:
            if await self._ask_patiently(provider, [(Ask(MANIFEST, model_root, 0, 0), take)]):
                nursery.cancel_scope.cancel()

        async with self._fetch(model_root, sources, None) as fetch:
            # All at once: a manifest is small, and one that stalls shall not keep us from the next.
            async with trio.open_nursery() as nursery:
                for provider in fetch.live():
                    nursery.start_soon(ask, provider)
            if not found:
                raise _nobody_has(f"the manifest of model {model_root.hex()[:12]}", fetch.providers)
            await self._off_thread(lambda: self._catalog.keep(found[0]))
            return found[0]

    async def blobs(
        self,
        manifest: Manifest,
        wanted: Iterable[Blob],
        sources: Sequence[PeerAddress] = (),
        progress: ProgressSink | None = None,
    ) -> Fetched:
        """Get those of the `wanted` pieces and files of a model that are not here.

        Asks `sources`, and whoever announces the model on the DHT, several at once. `progress` is awaited with a phase ("finding",
        "fetching"), the bytes that are here and verified, and all that were missing at the start. What was verified stays on disk
        whatever happens, so another call goes on from there.

        Raises NotFoundError naming what nobody has, LocalError (disk), CapacityError (quota), and what `progress` raises.
        """
        unique = {blob.root: blob for blob in wanted}
        missing = await self._off_thread(lambda: [blob for root, blob in unique.items() if not self._store.has(root)])
        if not missing:
            return Fetched((), ())
        try:
            async with self._fetch(manifest.root, sources, progress) as fetch:
                fetch.total_bytes = sum(blob.size for blob in missing)
                await fetch.tell("fetching")
                unfound = [blob for turn, blob in enumerate(missing) if not await self._blob(blob, fetch, turn)]
                await fetch.tell("fetching")
                if unfound:
                    raise _nobody_has(f"{_describe(unfound)} of model {manifest.root.hex()[:12]}", fetch.providers)
                received = sorted((one.peer_id, one.received_bytes) for one in fetch.providers if one.received_bytes)
                return Fetched(tuple(received), tuple(one.dropped for one in fetch.providers if one.dropped is not None))
        except _StoppedError as stopped:
            raise stopped.error from stopped

    @asynccontextmanager
    async def _fetch(
        self, model_root: bytes, sources: Sequence[PeerAddress], progress: ProgressSink | None
    ) -> AsyncIterator[_Fetch]:
        """Find out whom to ask; their streams stay open until the end."""
        fetch = _Fetch(progress)
        await fetch.tell("finding")
        found: list[PeerAddress] = []
        with trio.move_on_after(self._limits.find_timeout_s):
            try:
                found = await self._transport.find_providers(provider_key(model_root), self._limits.providers_max)
            except (PeerError, TimedOutError, CapacityError) as error:
                log.info("find_providers_failed", model=model_root.hex()[:12], reason=error.cause)
        chosen: dict[str, _Provider] = {}
        # In turn: whoever names the sources may name none but its own, and the DHT may be full of strangers.
        for peer in itertools.chain.from_iterable(itertools.zip_longest(sources, found)):
            if peer is None:
                continue
            if peer.peer_id != self._transport.peer_id and _is_peer_id(peer.peer_id) and len(chosen) < self._limits.providers_max:
                self._transport.learn(peer)
                chosen.setdefault(peer.peer_id, _Provider(self._transport, peer.peer_id, self._limits))
        fetch.providers = tuple(chosen.values())
        try:
            yield fetch
        finally:
            for provider in fetch.providers:
                await provider.close()

    async def _ask_patiently(self, provider: _Provider, asks: Sequence[tuple[Ask, Take]]) -> bool:
        """Make requests of one frame each; all over again when the provider fails, until it is dropped. False: it has not all."""
        while provider.dropped is None:
            try:
                for ask, take in asks:
                    if not await provider.ask(ask, 1, take):
                        return False
                return True
            except (PeerError, TimedOutError, CapacityError) as error:
                pause_s = provider.note(error)
                if pause_s is not None:
                    await trio.sleep(pause_s)
        return False

    async def _blob(self, blob: Blob, fetch: _Fetch, turn: int) -> bool:
        """Get one blob, or wait while another call gets it. False: nobody has all of it."""
        while not await self._off_thread(lambda: self._store.has(blob.root)):
            ongoing = self._ongoing.get(blob.root)
            if ongoing is not None:
                await ongoing.wait()
                continue
            self._ongoing[blob.root] = ended = trio.Event()
            try:
                return await self._download(blob, fetch, turn)
            finally:
                del self._ongoing[blob.root]
                ended.set()
        fetch.done_bytes += blob.size
        await fetch.tell("fetching")
        return True

    async def _download(self, blob: Blob, fetch: _Fetch, turn: int) -> bool:
        partial = await self._off_thread(lambda: self._store.begin(blob))
        try:
            if not partial.hashes_known and not await self._hashes(partial, fetch, turn):
                return False
            fetch.done_bytes += partial.verified_bytes
            await fetch.tell("fetching")
            work = _Work(partial.missing(), min(self._limits.chunks_per_ask, CHUNKS_MAX))
            await self._drain_all(partial, work, fetch, turn)
            if not work.done:
                return False
            await self._off_thread(partial.commit)
            return True
        finally:
            partial.close()

    async def _hashes(self, partial: Partial, fetch: _Fetch, turn: int) -> bool:
        """Get the leaf hashes of all chunks, from one peer: they prove themselves only together."""
        root, count = partial.blob.root, chunk_count(partial.blob.size)
        asks = [Ask(HASHES, root, start, min(HASHES_MAX, count - start)) for start in range(0, count, HASHES_MAX)]
        pages: dict[int, bytes] = {}

        async def take(ask: Ask, _: int, frame: bytes) -> None:
            if len(frame) != ask.count * HASH_BYTES:
                raise MalformedError(f"it sent {len(frame)} bytes of hashes where {ask.count * HASH_BYTES} are due")
            pages[ask.start] = frame
            if len(pages) == len(asks):
                joined = b"".join(pages[page.start] for page in asks)
                hashes = [joined[at : at + HASH_BYTES] for at in range(0, len(joined), HASH_BYTES)]
                await self._off_thread(lambda: partial.accept_hashes(hashes))

        for provider in fetch.live(turn):
            pages.clear()
            if await self._ask_patiently(provider, [(ask, functools.partial(take, ask)) for ask in asks]):
                return True
        return False

    async def _drain_all(self, partial: Partial, work: _Work, fetch: _Fetch, turn: int) -> None:
        """Let several providers work off the missing chunks at once; each that gives up makes room for the next."""
        if work.done:
            return
        waiting = iter(fetch.live(turn))
        failures: list[NexusError | _StoppedError] = []

        async def worker() -> None:
            try:
                for provider in waiting:
                    await self._drain(provider, partial, work, fetch)
                    if work.done:
                        break
                else:
                    return
            except (NexusError, _StoppedError) as error:
                failures.append(error)
            # Whoever still waits for a chunk that came from elsewhere need not; and on an error of this node's own, all stop.
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for _ in range(min(self._limits.workers_max, len(fetch.providers))):
                nursery.start_soon(worker)
        if failures:
            raise failures[0]

    async def _drain(self, provider: _Provider, partial: Partial, work: _Work, fetch: _Fetch) -> None:
        """Work with one provider until nothing is left, or it does not have the blob, or it is dropped."""
        while provider.dropped is None and not work.done:
            run = work.claim()
            if run is None:
                await work.wait()
                continue

            async def take(number: int, frame: bytes, first: int = run.start) -> None:
                await self._off_thread(lambda: partial.write_chunk(first + number, frame))
                provider.received_bytes += len(frame)
                await self._pace.spend(len(frame))
                if work.finish(first + number):
                    fetch.done_bytes += len(frame)
                await fetch.tell("fetching")

            pause_s: float | None = None
            try:
                if not await provider.ask(Ask(CHUNKS, partial.blob.root, run.start, len(run)), len(run), take):
                    return
            except (PeerError, TimedOutError, CapacityError) as error:
                pause_s = provider.note(error)
            finally:
                work.release(run)
            if pause_s is not None:
                await trio.sleep(pause_s)


# --- the answering end ------------------------------------------------------------------------------------------------------


class BlobService:
    """Answers peers from the store and the catalog, and with nothing else. `uploads` measures how fast."""

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
        self._pace = Pace(upload_max)
        self._pace_of = pace_of

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
        if self._answers >= ANSWERS_MAX:
            await _send(stream, ANSWERS.pack(Answer(CapacityError.code, 0, "it answers too many others now")))
            return
        self._answers += 1
        try:
            await self._answer(stream, ask)
        finally:
            self._answers -= 1

    async def _answer(self, stream: Stream, ask: Ask) -> None:
        try:
            frames = await self._off_thread(lambda: self._look_up(ask))
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
            for read in frames:
                frame = await self._off_thread(read)
                await self._pace.spend(len(frame))
                if limit is not None:
                    await limit.spend(len(frame))
                await _send(stream, frame)
                self._uploads.sent(len(frame))

    def _look_up(self, ask: Ask) -> list[Callable[[], bytes]]:
        """How to read each frame of the answer; they are read one by one, so that no more than one is in memory."""
        if ask.what == MANIFEST:
            return [self._catalog.manifest(ask.root).to_bytes]
        count = chunk_count(self._store.size(ask.root))
        if not 0 < ask.count <= count - ask.start:
            raise MalformedError(f"it asks for {ask.count} from {ask.start} on of {count} chunks")
        if ask.what == HASHES:
            run = self._store.chunk_hashes(ask.root)[ask.start : ask.start + ask.count]
            return [functools.partial(b"".join, run)]
        if ask.what == CHUNKS and ask.count <= CHUNKS_MAX:
            return [functools.partial(self._store.read_chunk, ask.root, ask.start + number) for number in range(ask.count)]
        raise MalformedError(f"it asks for {ask.count} of {ask.what!r}")


async def _send(stream: Stream, frame: bytes) -> None:
    with _deadline(SEND_TIMEOUT_S, f"peer {stream.peer_id} did not read its answer for {SEND_TIMEOUT_S:g} s"):
        await stream.send(frame)


# --- words ------------------------------------------------------------------------------------------------------------------


def _is_peer_id(text: str) -> bool:
    try:
        public_key_of(text)
    except MalformedError:
        return False
    return True


def _plain(text: str) -> str:
    """A peer's text, fit to be shown: no control characters."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _describe(blobs: Sequence[Blob]) -> str:
    """What is missing, for a reader: runs of layers first, then embedding, head and files."""
    names = [blob.name for blob in blobs]
    layers = sorted(int(name.removeprefix("layer.")) for name in names if name.startswith("layer."))
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    spans = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    parts = [f"{'layer' if len(layers) == 1 else 'layers'} {spans}"] if runs else []
    parts += [f"the {name}" if name in (EMBEDDING, HEAD) else name for name in names if not name.startswith("layer.")]
    return " and ".join([*([", ".join(parts[:-1])] if parts[:-1] else []), *parts[-1:]])


def _nobody_has(what: str, providers: Sequence[_Provider]) -> NotFoundError:
    if providers:
        told = [
            f"{one.peer_id}: {_plain(one.dropped.reason)}" if one.dropped else f"{one.peer_id} lacks it" for one in providers[:8]
        ]
        asked = f"asked {len(providers)} ({'; '.join(told)})"
    else:
        asked = "no node announces this model"
    return NotFoundError(
        f"nobody in reach has {what}: {asked}",
        "Start a node that holds it and connect to it with `nexus peers add`, or add the model here with `nexus model add PATH`; "
        "what was fetched is kept, and the next try goes on from there",
    )
