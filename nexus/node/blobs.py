"""Fragment exchange, `/nexus/blobs/1`: manifests and blobs from peers, in verified, resumable chunks. Both ends are here.

A stream carries any number of requests, one after the other: an Ask one way, then an Answer and the frames it promises the
other way. Frames are raw: a manifest's bytes, up to HASHES_MAX leaf hashes run together, or one chunk each. Nothing that a peer
sends is kept before its hash is checked, so any peer may be asked, and the bytes of several peers make one blob.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
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
from nexus.core.manifest import CHUNK_BYTES, EMBEDDING, HEAD, Blob, Manifest, chunk_count, layer_name, stage_pieces
from nexus.core.record import MessageSet, Record, digest, text, uint
from nexus.network.transport import PeerAddress, ProtocolSpec, Stream, Transport
from nexus.storage.blobs import BLOB_BYTES_MAX, BlobStore, Partial
from nexus.storage.catalog import Catalog, parse_manifest
from nexus.swarm.membership import provider_key

log = structlog.get_logger("nexus.blobs")

CHUNKS_MAX = 16
HASHES_MAX = CHUNK_BYTES // HASH_BYTES
CHUNK_INDEX_MAX = BLOB_BYTES_MAX // CHUNK_BYTES
BLOBS = ProtocolSpec("/nexus/blobs/1", frame_max=CHUNK_BYTES + 64 * 1024, read_timeout_s=60.0, streams_per_peer_max=4)
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


class OffThread(Protocol):
    """Runs a function that waits for the disk or hashes much, away from the trio thread."""

    async def __call__(self, work: Callable[[], Result]) -> Result: ...


async def in_worker_thread(work: Callable[[], Result]) -> Result:
    return await trio.to_thread.run_sync(work)


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """`frame_timeout_s`: for a peer's next frame, so a peer is given up below CHUNK_BYTES per that time. `failures_max`: in a row,
    then a peer is left alone for the rest of the fetch; `retry_after_s` doubles from one to the next."""

    providers_max: int = 16
    workers_max: int = 4
    chunks_per_ask: int = 8
    frame_timeout_s: float = 30.0
    open_timeout_s: float = 15.0
    find_timeout_s: float = 15.0
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
    """`received_bytes`: verified bytes that came from peers in this fetch. `sources`: who sent any, sorted."""

    manifest: Manifest
    received_bytes: int
    sources: tuple[str, ...]
    dropped: tuple[Dropped, ...]


# --- the asking end -------------------------------------------------------------------------------------------------------


class _Provider:
    """One peer in one fetch: its stream, and what it did so far. Used by one task at a time."""

    def __init__(self, transport: Transport, peer_id: str, limits: FetchLimits) -> None:
        self.peer_id = peer_id
        self.failures = 0
        self.dropped: Dropped | None = None
        self.received_bytes = 0
        self._transport = transport
        self._limits = limits
        self._stream: Stream | None = None

    async def ask(self, ask: Ask, frames: int, take: Callable[[int, bytes], Awaitable[None]]) -> bool:
        """Ask, and hand every frame to `take` with its number. False: the peer does not have it.

        Raises PeerError and TimedOutError, with the stream broken off; what was taken stays taken."""
        try:
            stream = await self._opened()
            with self._deadline("take the request"):
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
        except BaseException as error:
            await self._break_off()
            if isinstance(error, PeerError) and not error.peer:
                error.peer = self.peer_id
            raise
        self.failures = 0
        return True

    async def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            with trio.move_on_after(CLOSE_TIMEOUT_S, shield=True):
                await stream.close()

    def note(self, error: NexusError) -> float | None:
        """What an error of this peer leads to: the seconds to wait before it is tried again, or None: it is dropped."""
        bad = isinstance(error, PeerError) and not isinstance(error, UnreachableError | RefusedError)
        self.failures += 1
        if bad or self.failures >= self._limits.failures_max:
            self.dropped = Dropped(self.peer_id, error.cause, bad)
            log.warning("provider_dropped", peer_id=self.peer_id, reason=error.cause, bad=bad)
            return None
        return self._limits.retry_after_s * 2.0 ** (self.failures - 1)

    async def _opened(self) -> Stream:
        if self._stream is None:
            with self._deadline("be reached", self._limits.open_timeout_s):
                self._stream = await self._transport.open_stream(self.peer_id, BLOBS)
        return self._stream

    async def _frame(self, stream: Stream) -> bytes:
        with self._deadline("send the next frame"):
            try:
                return await stream.receive()
            except trio.EndOfChannel:
                raise UnreachableError("it closed the stream before it had answered") from None

    def _deadline(self, what: str, timeout_s: float | None = None) -> _Deadline:
        return _Deadline(self._limits.frame_timeout_s if timeout_s is None else timeout_s, f"it took too long to {what}")

    async def _break_off(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            with trio.CancelScope(shield=True):
                await stream.reset()


class _Deadline:
    """trio.fail_after, with our own error."""

    def __init__(self, timeout_s: float, cause: str) -> None:
        self._scope = trio.move_on_after(timeout_s)
        self._cause = cause

    def __enter__(self) -> None:
        self._scope.__enter__()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        suppressed = self._scope.__exit__(type(error) if error else None, error, error.__traceback__ if error else None)
        if self._scope.cancelled_caught:
            raise TimedOutError(self._cause)
        return bool(suppressed)


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
        # Ties go to the first chunk, so unclaimed chunks are handed out in order.
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


@dataclass(slots=True)
class _Fetch:
    """One call of `BlobExchange.fetch`: whom it asks, and how far it is."""

    providers: list[_Provider]
    progress: ProgressSink | None
    total_bytes: int = 0
    done_bytes: int = 0
    told_bytes: int = field(default=-1)

    def live(self, turn: int = 0) -> list[_Provider]:
        """Providers not given up; `turn` decides who comes first."""
        found = [provider for provider in self.providers if provider.dropped is None]
        shift = turn % len(found) if found else 0
        return found[shift:] + found[:shift]

    async def tell(self, phase: str) -> None:
        if self.progress is not None:
            await self.progress(phase, self.done_bytes, self.total_bytes)

    async def close(self) -> None:
        for provider in self.providers:
            await provider.close()


class BlobExchange:
    """A node's part in fragment exchange. `serve` answers peers; `manifest` and `fetch` ask them."""

    def __init__(
        self,
        transport: Transport,
        store: BlobStore,
        catalog: Catalog,
        limits: FetchLimits | None = None,
        off_thread: OffThread = in_worker_thread,
    ) -> None:
        self._transport = transport
        self._store = store
        self._catalog = catalog
        self._limits = limits or FetchLimits()
        self._off_thread = off_thread
        self._fetching: dict[bytes, trio.Event] = {}
        self._answers = 0

    def serve(self) -> None:
        self._transport.serve(BLOBS, self._handle)

    async def manifest(
        self, model_root: bytes, providers: Sequence[PeerAddress] = (), progress: ProgressSink | None = None
    ) -> Manifest:
        """The model's manifest, from here or from peers; it is kept. Raises NotFoundError, LocalError."""
        if await self._off_thread(lambda: self._catalog.has(model_root)):
            return await self._off_thread(lambda: self._catalog.manifest(model_root))
        fetch = await self._begin(model_root, providers, progress)
        try:
            return await self._manifest(model_root, fetch)
        finally:
            await fetch.close()

    async def fetch(
        self,
        model_root: bytes,
        layers: tuple[int, int] | None,
        providers: Sequence[PeerAddress] = (),
        progress: ProgressSink | None = None,
    ) -> Fetched:
        """Get everything that the stage of layers [start, end) needs, and the model's files; None: the files alone.

        Asks `providers` and whoever announces the model on the DHT. `progress` is awaited with a phase ("finding", "manifest",
        "fetching"), the verified bytes and all bytes that were missing at the start. What was verified stays on disk whatever
        happens, so a later call goes on from there.

        Raises NotFoundError naming what nobody has, LocalError (disk), CapacityError (quota), MalformedError (no such layers).
        """
        if await self._off_thread(lambda: self._catalog.has(model_root)):
            manifest = await self._off_thread(lambda: self._catalog.manifest(model_root))
            if not await self._missing(manifest, layers):
                return Fetched(manifest, 0, (), ())
        fetch = await self._begin(model_root, providers, progress)
        try:
            manifest = await self._manifest(model_root, fetch)
            missing = await self._missing(manifest, layers)
            fetch.total_bytes = sum(blob.size for blob in missing)
            await fetch.tell("fetching")
            unfound = []
            for turn, blob in enumerate(missing):
                if not await self._blob(blob, fetch, turn):
                    unfound.append(blob)
            if unfound:
                raise _nobody_has(f"{_describe(unfound)} of model {model_root.hex()[:12]}", fetch.providers)
            dropped = tuple(provider.dropped for provider in fetch.providers if provider.dropped is not None)
            received = {provider.peer_id: provider.received_bytes for provider in fetch.providers if provider.received_bytes}
            return Fetched(manifest, sum(received.values()), tuple(sorted(received)), dropped)
        finally:
            await fetch.close()

    async def _begin(self, model_root: bytes, given: Sequence[PeerAddress], progress: ProgressSink | None) -> _Fetch:
        if progress is not None:
            await progress("finding", 0, 0)
        found: list[PeerAddress] = []
        with trio.move_on_after(self._limits.find_timeout_s):
            try:
                found = await self._transport.find_providers(provider_key(model_root), self._limits.providers_max)
            except (PeerError, TimedOutError, CapacityError) as error:
                log.info("find_providers_failed", model=model_root.hex()[:12], reason=error.cause)
        peer_ids: dict[str, None] = {}
        for peer in (*given, *found):
            if peer.peer_id != self._transport.peer_id and len(peer_ids) < self._limits.providers_max:
                self._transport.learn(peer)
                peer_ids[peer.peer_id] = None
        return _Fetch([_Provider(self._transport, peer_id, self._limits) for peer_id in peer_ids], progress)

    async def _missing(self, manifest: Manifest, layers: tuple[int, int] | None) -> list[Blob]:
        """The blobs to fetch, each once, files first: they are small, and nothing starts without them."""
        pieces = () if layers is None else stage_pieces(manifest, *layers)
        wanted = {blob.root: blob for blob in (*manifest.files, *pieces)}
        return await self._off_thread(lambda: [blob for root, blob in wanted.items() if not self._store.has(root)])

    async def _manifest(self, model_root: bytes, fetch: _Fetch) -> Manifest:
        if await self._off_thread(lambda: self._catalog.has(model_root)):
            return await self._off_thread(lambda: self._catalog.manifest(model_root))
        await fetch.tell("manifest")
        found: list[Manifest] = []

        async def take(_: int, frame: bytes) -> None:
            found.append(parse_manifest(frame, model_root))

        if not await self._ask_each(Ask(MANIFEST, model_root, 0, 0), 1, take, fetch, 0):
            raise _nobody_has(f"the manifest of model {model_root.hex()[:12]}", fetch.providers)
        await self._off_thread(lambda: self._catalog.keep(found[0]))
        return found[0]

    async def _ask_each(
        self, ask: Ask, frames: int, take: Callable[[int, bytes], Awaitable[None]], fetch: _Fetch, turn: int
    ) -> bool:
        """Ask one provider after the other until one has it. False: none does."""
        for provider in fetch.live(turn):
            while provider.dropped is None:
                try:
                    if await provider.ask(ask, frames, take):
                        return True
                    break
                except (PeerError, TimedOutError) as error:
                    pause_s = provider.note(error)
                    if pause_s is not None:
                        await trio.sleep(pause_s)
        return False

    async def _blob(self, blob: Blob, fetch: _Fetch, turn: int) -> bool:
        """Get one blob; two fetches that want the same one share the download. False: nobody has all of it."""
        while not await self._off_thread(lambda: self._store.has(blob.root)):
            ongoing = self._fetching.get(blob.root)
            if ongoing is not None:
                await ongoing.wait()
                continue
            self._fetching[blob.root] = ended = trio.Event()
            try:
                if not await self._download(blob, fetch, turn):
                    return False
            finally:
                del self._fetching[blob.root]
                ended.set()
            return True
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
            if not work.done:
                await self._drain_all(partial, work, fetch, turn)
            if not work.done:
                return False
            await self._off_thread(partial.commit)
            return True
        finally:
            partial.close()

    async def _hashes(self, partial: Partial, fetch: _Fetch, turn: int) -> bool:
        """Get the leaf hashes of all chunks, in one go from one peer, since they prove themselves only together."""
        count = chunk_count(partial.blob.size)
        pages = range(0, count, HASHES_MAX)
        for provider in fetch.live(turn):
            hashes: list[bytes] = []

            async def take(_: int, frame: bytes, hashes: list[bytes] = hashes) -> None:
                expected = min(HASHES_MAX, count - len(hashes))
                if len(frame) != expected * HASH_BYTES:
                    raise MalformedError(f"it sent {len(frame)} bytes of hashes where {expected * HASH_BYTES} are due")
                hashes.extend(frame[at : at + HASH_BYTES] for at in range(0, len(frame), HASH_BYTES))
                if len(hashes) == count:
                    await self._off_thread(lambda: partial.accept_hashes(hashes))

            while provider.dropped is None:
                hashes.clear()
                try:
                    for start in pages:
                        ask = Ask(HASHES, partial.blob.root, start, min(HASHES_MAX, count - start))
                        if not await provider.ask(ask, 1, take):
                            break
                    if partial.hashes_known:
                        return True
                    break
                except (PeerError, TimedOutError) as error:
                    pause_s = provider.note(error)
                    if pause_s is not None:
                        await trio.sleep(pause_s)
        return False

    async def _drain_all(self, partial: Partial, work: _Work, fetch: _Fetch, turn: int) -> None:
        """Let several providers work off the missing chunks at once; each that gives up makes room for the next."""
        waiting = iter(fetch.live(turn))

        async def worker(nursery: trio.Nursery) -> None:
            for provider in waiting:
                await self._drain(provider, partial, work, fetch)
                if work.done:
                    # Whoever still waits for a chunk that came from elsewhere need not.
                    nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for _ in range(min(self._limits.workers_max, len(fetch.providers))):
                nursery.start_soon(worker, nursery)

    async def _drain(self, provider: _Provider, partial: Partial, work: _Work, fetch: _Fetch) -> None:
        """Work with one provider until nothing is left, or it does not have the blob, or it is dropped."""
        blob = partial.blob
        while provider.dropped is None and not work.done:
            run = work.claim()
            if run is None:
                await work.wait()
                continue

            async def take(number: int, frame: bytes, first: int = run.start) -> None:
                index = first + number
                await self._off_thread(lambda: partial.write_chunk(index, frame))
                provider.received_bytes += len(frame)
                fetch.done_bytes += work.finish(index) * len(frame)
                await fetch.tell("fetching")

            pause_s: float | None = None
            try:
                if not await provider.ask(Ask(CHUNKS, blob.root, run.start, len(run)), len(run), take):
                    return
            except (PeerError, TimedOutError) as error:
                pause_s = provider.note(error)
            finally:
                work.release(run)
            if pause_s is not None:
                await trio.sleep(pause_s)

    # --- the answering end ------------------------------------------------------------------------------------------------

    async def _handle(self, stream: Stream) -> None:
        while True:
            ask = ASKS.unpack(await stream.receive())
            assert isinstance(ask, Ask)
            if self._answers >= ANSWERS_MAX:
                await _send(stream, ANSWERS.pack(Answer(CapacityError.code, 0, "it answers too many others now; try again soon")))
                continue
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
        for read in frames:
            await _send(stream, await self._off_thread(read))

    def _look_up(self, ask: Ask) -> list[Callable[[], bytes]]:
        """How to read each frame of the answer; read one by one, so that no more than one is in memory."""
        if ask.what == MANIFEST:
            raw = self._catalog.manifest(ask.root).to_bytes()
            return [lambda: raw]
        size = self._store.size(ask.root)
        if not 0 < ask.count <= chunk_count(size) - ask.start:
            raise MalformedError(f"it asks for {ask.count} chunks from {ask.start} on of a blob of {chunk_count(size)}")
        if ask.what == HASHES:
            run = self._store.chunk_hashes(ask.root)[ask.start : ask.start + ask.count]
            return [lambda: b"".join(run)]
        if ask.what == CHUNKS and ask.count <= CHUNKS_MAX:
            return [
                lambda index=index: self._store.read_chunk(ask.root, index) for index in range(ask.start, ask.start + ask.count)
            ]  # type: ignore[misc]
        raise MalformedError(f"it asks for {ask.count} of {ask.what!r}")


async def _send(stream: Stream, frame: bytes) -> None:
    with trio.move_on_after(SEND_TIMEOUT_S) as scope:
        await stream.send(frame)
    if scope.cancelled_caught:
        raise TimedOutError(f"peer {stream.peer_id} did not read its answer for {SEND_TIMEOUT_S:g} s")


def _plain(text: str) -> str:
    """A peer's text, fit to be shown: no control characters."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _describe(blobs: Sequence[Blob]) -> str:
    """What is missing, for a reader: runs of layers first."""
    names = {blob.name for blob in blobs}
    layers = sorted(int(name.removeprefix("layer.")) for name in names if name.startswith("layer."))
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    parts = []
    if runs:
        spans = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
        parts.append(f"{'layer' if len(layers) == 1 else 'layers'} {spans}")
    parts += [f"the {name}" for name in (EMBEDDING, HEAD) if name in names]
    parts += sorted(names - {EMBEDDING, HEAD, *(layer_name(layer) for layer in layers)})
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _nobody_has(what: str, providers: Sequence[_Provider]) -> NotFoundError:
    if not providers:
        asked = "no node announces this model"
    else:
        told = [
            f"{one.peer_id}: {_plain(one.dropped.reason)}" if one.dropped else f"{one.peer_id} lacks it" for one in providers[:8]
        ]
        asked = f"asked {len(providers)} ({'; '.join(told)})"
    return NotFoundError(
        f"nobody in reach has {what}: {asked}",
        "Start a node that holds it and connect to it with `nexus peers add`, or add the model here with `nexus model add PATH`; "
        "what was fetched is kept, and the next try goes on from there",
    )
