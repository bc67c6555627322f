"""Fragments from peers, over `/nexus/blobs/1`: manifests, and blobs in verified, resumable chunks, from many peers at once.

A stream carries any number of requests, answered in order: an Ask one way, then an Answer and the frames it promises the other way;
a few are under way at once, so that no round trip is waited for. Frames are raw: a manifest's bytes, a have-map, leaf hashes run
together, or one chunk each. Nothing that a peer sends is kept before its hash is checked, so any peer may be asked, and the bytes
of several peers make one blob. What a node has of a model while it fetches it others may fetch from it.

Which chunk to ask whom for is decided by `nexus.node.blobs_schedule`.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np
import structlog
import trio

from nexus.core.errors import (
    CapacityError,
    MalformedError,
    NexusError,
    NotFoundError,
    PeerError,
    RefusedError,
    TimedOutError,
    UnreachableError,
)
from nexus.core.hashing import HASH_BYTES, tagged_hash
from nexus.core.keys import public_key_of
from nexus.core.manifest import CHUNK_BYTES, EMBEDDING, HEAD, Blob, Manifest, chunk_count
from nexus.network.rates import Pace
from nexus.network.transport import PeerAddress, Stream, Transport
from nexus.node.blobs_schedule import Run, Schedule
from nexus.node.blobs_serving import BlobService
from nexus.node.blobs_threads import OffThread, Result, deadline, in_worker_thread
from nexus.node.blobs_wire import (
    ANSWERS,
    ASKS,
    BLOBS,
    CHUNKS,
    CHUNKS_MAX,
    HASHES,
    HASHES_MAX,
    HAVE,
    MANIFEST,
    OK,
    Answer,
    Ask,
    blobs_of,
    unpack_chunk,
    unpack_have,
)
from nexus.storage.blobs import BLOB_BYTES_MAX, BlobStore, Partial, chunk_length
from nexus.storage.catalog import Catalog, parse_manifest
from nexus.swarm.membership import provider_key

__all__ = ["BlobService", "Dropped", "FetchLimits", "Fetched", "Fetcher", "OffThread", "Result", "in_worker_thread"]

log = structlog.get_logger("nexus.blobs")

CLOSE_TIMEOUT_S = 5.0
# Chunks that are checked and written at once; what else has arrived waits in the network.
WRITES_MAX = 4
# Requests under way on a stream, and how long one of them should take at the source's pace.
ASKS_MAX = 2
RUN_S = 1.0
# A source from which nothing came for as long as four chunks of the others take, within these bounds, loses its turn: what
# it was asked for is asked of others. Below this a hiccup would do.
TURN_S = (2.0, 10.0)
TURN_CHUNKS = 4.0
WATCH_EVERY_S = 0.25
# What is smaller takes the time of a round trip, and says nothing of a pace.
PACE_BYTES_MIN = CHUNK_BYTES // 4
# After that it is given work again, later each time.
REST_S = (1.0, 30.0)
# What it had may be evicted while it is asked for it, but not often.
DENIED_MAX = 3
# How often a source that has only a part is asked what it has by now; how often more sources are looked for.
HAVE_EVERY_S = (1.0, 8.0)
FIND_EVERY_S = 5.0
# A fetch that takes longer than this is announced: others may fetch from it.
ANNOUNCE_AFTER_S = 1.0
# With sources that fetch the model themselves: how long nothing of what is missing may turn up before that is an error.
STARVED_S = 15.0
# A source slower than this may pack what it sends: zlib's fastest level is several times faster.
PACK_BELOW_BYTES_PER_S = 8e6

ProgressSink = Callable[[str, int, int], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """`chunks_per_ask`: at most. `frame_timeout_s`: for a peer's next frame, so one slower than a chunk in that time is given up.
    `failures_max`: in a row, then a peer is left alone for the rest of the fetch; `retry_after_s` doubles from one to the next."""

    providers_max: int = 16
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


@dataclass(slots=True)
class _Pending:
    """A request under way. `left`: frames still to come, None before the answer."""

    ask: Ask
    frames: int
    blob: int = -1
    left: int | None = None


class _Provider:
    """One peer in one fetch: its stream, and what it did so far. Used by one task at a time."""

    def __init__(self, transport: Transport, peer_id: str, limits: FetchLimits) -> None:
        self.peer_id = peer_id
        self.dropped: Dropped | None = None
        self.received_bytes = 0
        self.scope = trio.CancelScope()
        self.pending: deque[_Pending] = deque()
        # Since when the next frame is waited for; inf: it is not.
        self.waiting_s = math.inf
        self.bytes_per_s = 0.0
        self.lost_turn = False
        self.rest_until_s = -math.inf
        self.have_due_s = -math.inf
        self.have_every_s = HAVE_EVERY_S[0]
        self.grew_s = -math.inf
        self.denied = 0
        self._rest_s = REST_S[0]
        self._last_s = -math.inf
        self._failures = 0
        self._transport = transport
        self._limits = limits
        self._stream: Stream | None = None

    async def send(self, ask: Ask, frames: int, blob: int = -1) -> None:
        """Ask. Raises PeerError, TimedOutError, CapacityError."""
        stream = await self._opened()
        with deadline(self._limits.frame_timeout_s, "it took too long to take the request"):
            await stream.send(ASKS.pack(ask))
        self.pending.append(_Pending(ask, frames, blob))

    async def next(self) -> tuple[_Pending, bytes | None]:
        """The next frame, and what it belongs to; None in its place: the peer does not have that. Raises the same."""
        pending = self.pending[0]
        if pending.left is None:
            answer = ANSWERS.unpack(await self._frame())
            assert isinstance(answer, Answer)
            if answer.code == NotFoundError.code:
                self.pending.popleft()
                return pending, None
            if answer.code != OK:
                raise RefusedError(f"it declines ({_plain(answer.code)}): {_plain(answer.cause)}")
            if answer.frames != pending.frames:
                raise MalformedError(f"it promises {answer.frames} frames where {pending.frames} were asked for")
            pending.left = pending.frames
        frame = await self._frame()
        pending.left -= 1
        if not pending.left:
            self.pending.popleft()
            if pending.ask.what != HAVE:  # to say what one has is not to give it
                self._failures = 0
        return pending, frame

    def note(self, error: NexusError) -> float | None:
        """What an error of this peer leads to: the seconds to wait before it is tried again, or None: it is dropped."""
        bad = isinstance(error, PeerError) and not isinstance(error, UnreachableError | RefusedError)
        self._failures += 1
        if bad or self._failures >= self._limits.failures_max:
            self.dropped = Dropped(self.peer_id, error.cause, bad)
            log.warning("provider_dropped", peer_id=self.peer_id, reason=error.cause, bad=bad)
            return None
        return self._limits.retry_after_s * 2.0 ** (self._failures - 1)

    def note_chunk(self, size: int, now_s: float) -> None:
        """A chunk came: how fast it does, as a mean over a few."""
        since_s, self._last_s = now_s - self._last_s, now_s
        if size < PACE_BYTES_MIN:
            return
        rate = size / max(since_s, 1e-3)
        self.bytes_per_s = rate if not self.bytes_per_s else 0.7 * self.bytes_per_s + 0.3 * rate

    def idle(self) -> None:
        """It has nothing to send: the time until the next chunk says nothing of its pace."""
        self._last_s = -math.inf

    def rest(self, now_s: float) -> None:
        """It lost its turn: it gets no new work before it has sent what it owes, and some time has passed."""
        shortest_s, longest_s = REST_S
        self.lost_turn = True
        self.rest_until_s = now_s + max(shortest_s, self._rest_s)
        self._rest_s = min(longest_s, 2 * self._rest_s)

    def run_max(self, most: int) -> int:
        """How many chunks to ask it for at once: few where it is slow or not known yet, so that others do not wait for them."""
        if not self.bytes_per_s:
            return min(2, most)
        return max(1, min(most, int(self.bytes_per_s * RUN_S / CHUNK_BYTES)))

    async def close(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            with trio.move_on_after(CLOSE_TIMEOUT_S) as scope:
                scope.shield = True
                await stream.close()

    async def break_off(self) -> None:
        """Half an answer may be left in the stream."""
        self.pending.clear()
        self.waiting_s, self._last_s = math.inf, -math.inf
        stream, self._stream = self._stream, None
        if stream is not None:
            with trio.CancelScope(shield=True):
                await stream.reset()

    async def _opened(self) -> Stream:
        if self._stream is not None:
            return self._stream
        self.waiting_s = trio.current_time()
        with deadline(self._limits.open_timeout_s, "it took too long to be reached"):
            try:
                self._stream = stream = await self._transport.open_stream(self.peer_id, BLOBS)
            except UnreachableError:
                raise
            except PeerError as error:
                # It may be too old for this protocol, or have too many streams: no sign of ill will.
                raise RefusedError(error.cause, error.fix, self.peer_id) from error
        self.waiting_s = math.inf
        return stream

    async def _frame(self) -> bytes:
        assert self._stream is not None
        self.waiting_s = trio.current_time()
        with deadline(self._limits.frame_timeout_s, "it took too long to send the next frame"):
            try:
                frame = await self._stream.receive()
            except trio.EndOfChannel:
                raise UnreachableError("it closed the stream before it had answered") from None
        self.waiting_s = math.inf
        return frame


class _OwnError(Exception):
    """This node's disk, its quota, or the listener to its progress: no provider's doing, and the end of the fetch."""

    def __init__(self, error: NexusError) -> None:
        super().__init__(str(error))
        self.error = error


_PEERS_FAULT = (PeerError, TimedOutError, CapacityError)


@dataclass(slots=True)
class _Progress:
    """How far a call of `Fetcher` is, and who is told."""

    sink: ProgressSink | None
    total_bytes: int = 0
    done_bytes: int = 0
    telling: bool = False

    async def tell(self, phase: str) -> None:
        """Unless the last is still being told: a slow listener slows nothing else down. Raises _OwnError."""
        if self.sink is None or self.telling:
            return
        self.telling = True
        try:
            await self.sink(phase, self.done_bytes, self.total_bytes)
        except NexusError as error:
            raise _OwnError(error) from error
        finally:
            self.telling = False


@dataclass(slots=True)
class _Download:
    """The blobs that one call downloads itself."""

    manifest: Manifest
    blobs: list[Blob]
    schedule: Schedule
    progress: _Progress
    providers: dict[str, _Provider]
    partials: dict[int, Partial] = field(default_factory=dict)
    pages: dict[int, dict[int, bytes]] = field(default_factory=dict)
    opening: set[int] = field(default_factory=set)
    committing: set[int] = field(default_factory=set)
    writing: Counter[int] = field(default_factory=Counter)
    failures: list[BaseException] = field(default_factory=list)
    changed: trio.Event = field(default_factory=trio.Event)
    writes: trio.Semaphore = field(default_factory=lambda: trio.Semaphore(WRITES_MAX))

    def wake(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


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

        async def ask(provider: _Provider) -> None:
            while provider.dropped is None:
                try:
                    await provider.send(Ask(MANIFEST, model_root, 0, 0, 0), 1)
                    _, frame = await provider.next()
                    if frame is None:
                        return
                    found.append(parse_manifest(frame, model_root))
                    nursery.cancel_scope.cancel()
                    return
                except _PEERS_FAULT as error:
                    pause_s = provider.note(error)
                    await provider.break_off()
                    if pause_s is not None:
                        await trio.sleep(pause_s)

        async with self._providers(model_root, sources) as providers:
            # All at once: a manifest is small, and one that stalls shall not keep us from the next.
            async with trio.open_nursery() as nursery:
                for provider in providers.values():
                    nursery.start_soon(ask, provider)
            if not found:
                raise _nobody_has(f"the manifest of model {model_root.hex()[:12]}", providers.values())
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

        Asks `sources`, and whoever announces the model on the DHT, all at once. `progress` is awaited with a phase ("finding",
        "fetching"), the bytes that are here and verified, and all that were missing at the start. What was verified stays on disk
        whatever happens, so another call goes on from there.

        Raises NotFoundError naming what nobody has, LocalError (disk), CapacityError (quota), and what `progress` raises.
        """
        unique = {blob.root: blob for blob in wanted}
        with self._store.hold(unique):
            missing = await self._off_thread(lambda: self._missing(unique.values()))
            if not missing:
                return Fetched((), ())
            told = _Progress(progress)
            try:
                await told.tell("finding")
                async with self._providers(manifest.root, sources) as providers:
                    told.total_bytes = sum(blob.size for blob in missing)
                    await told.tell("fetching")
                    await self._get_all(manifest, missing, told, providers)
                    await told.tell("fetching")
                    received = sorted((one.peer_id, one.received_bytes) for one in providers.values() if one.received_bytes)
                    return Fetched(tuple(received), tuple(one.dropped for one in providers.values() if one.dropped is not None))
            except _OwnError as stopped:
                raise stopped.error from stopped

    @asynccontextmanager
    async def _providers(self, model_root: bytes, sources: Sequence[PeerAddress]) -> AsyncIterator[dict[str, _Provider]]:
        """Whom to ask; their streams stay open until the end."""
        providers: dict[str, _Provider] = {}
        self._choose(providers, sources, await self._find(model_root))
        try:
            yield providers
        finally:
            for provider in providers.values():
                await provider.close()

    async def _find(self, model_root: bytes) -> list[PeerAddress]:
        with trio.move_on_after(self._limits.find_timeout_s):
            try:
                return await self._transport.find_providers(provider_key(model_root), self._limits.providers_max)
            except _PEERS_FAULT as error:
                log.info("find_providers_failed", model=model_root.hex()[:12], reason=error.cause)
        return []

    def _choose(
        self, providers: dict[str, _Provider], sources: Sequence[PeerAddress], found: Sequence[PeerAddress]
    ) -> list[_Provider]:
        """Add those that are new, as long as there is room; them."""
        added = []
        # In turn: whoever names the sources may name none but its own, and the DHT may be full of strangers.
        for peer in itertools.chain.from_iterable(itertools.zip_longest(sources, found)):
            if (
                peer is None
                or peer.peer_id in providers
                or peer.peer_id == self._transport.peer_id
                or not _is_peer_id(peer.peer_id)
            ):
                continue
            live = sum(one.dropped is None for one in providers.values())
            # Dropped ones make room, but not for ever: strangers without end could be found.
            if live < self._limits.providers_max and len(providers) < 4 * self._limits.providers_max:
                self._transport.learn(peer)
                providers[peer.peer_id] = _Provider(self._transport, peer.peer_id, self._limits)
                added.append(providers[peer.peer_id])
        return added

    async def _get_all(
        self, manifest: Manifest, missing: Sequence[Blob], progress: _Progress, providers: dict[str, _Provider]
    ) -> None:
        """Download what no other call downloads, then see what became of the rest, again and again."""
        if any(blob.size > BLOB_BYTES_MAX for blob in missing):
            raise MalformedError(f"the model has a blob of more than {BLOB_BYTES_MAX} bytes, which none may have")
        # All of it, before a byte is fetched, and before a plan of it is made: what a manifest promises may be more than any disk.
        await self._own(lambda: self._store.require_room_for(missing))
        left = list(missing)
        while left:
            mine = [blob for blob in left if blob.root not in self._ongoing]
            theirs = [blob for blob in left if blob.root in self._ongoing]
            if mine:
                ended = trio.Event()
                self._ongoing.update((blob.root, ended) for blob in mine)
                try:
                    unfound = await self._download(manifest, mine, progress, providers)
                finally:
                    for blob in mine:
                        del self._ongoing[blob.root]
                    ended.set()
                if unfound:
                    raise _nobody_has(f"{_describe(unfound)} of model {manifest.root.hex()[:12]}", providers.values())
            for blob in theirs:
                if (event := self._ongoing.get(blob.root)) is not None:
                    await event.wait()
            left = await self._off_thread(functools.partial(self._missing, theirs))
            progress.done_bytes += sum(blob.size for blob in theirs) - sum(blob.size for blob in left)
            await progress.tell("fetching")

    def _missing(self, blobs: Iterable[Blob]) -> list[Blob]:
        return [blob for blob in blobs if not self._store.has(blob.root)]

    async def _download(
        self, manifest: Manifest, blobs: list[Blob], progress: _Progress, providers: dict[str, _Provider]
    ) -> list[Blob]:
        """Get these from all providers at once; those that nobody has."""
        key = provider_key(manifest.root)
        turn = int.from_bytes(tagged_hash("blobs turn", public_key_of(self._transport.peer_id), manifest.root)[:8], "little")
        schedule = Schedule([chunk_count(blob.size) for blob in blobs], turn)
        download = _Download(manifest, blobs, schedule, progress, providers)
        try:
            async with trio.open_nursery() as nursery:
                for provider in providers.values():
                    nursery.start_soon(self._work_with, provider, download, nursery)
                nursery.start_soon(self._look_for_more, download, nursery)
                # Others that fetch the same model at the same time find us, and we them.
                nursery.start_soon(self._announce, key)
                await self._watch(download)
                nursery.cancel_scope.cancel()
        finally:
            for partial in download.partials.values():
                partial.close()
            with trio.CancelScope(shield=True):
                await self._off_thread(lambda: self._take_back(manifest, key))
        if download.failures:
            raise download.failures[0]
        return [blobs[number] for number in schedule.undone()]

    async def _announce(self, key: bytes) -> None:
        await trio.sleep(ANNOUNCE_AFTER_S)
        try:
            await self._transport.provide(key)
        except _PEERS_FAULT as error:
            log.debug("not_announced", reason=error.cause)

    def _take_back(self, manifest: Manifest, key: bytes) -> None:
        """Nobody need ask a node of which nothing whole is left. What else it holds `nexus.node.membership` announces."""
        if not any(self._store.has(piece.root) for piece in manifest.pieces):
            self._transport.withdraw(key)

    async def _look_for_more(self, download: _Download, nursery: trio.Nursery) -> None:
        while True:
            await trio.sleep(FIND_EVERY_S)
            for provider in self._choose(download.providers, (), await self._find(download.manifest.root)):
                nursery.start_soon(self._work_with, provider, download, nursery)

    async def _watch(self, download: _Download) -> None:
        """Until all is here, or nobody has what is missing. Sources that are slow lose their turn meanwhile."""
        schedule = download.schedule
        starved_s = math.inf
        while not schedule.done and not download.failures:
            changed = download.changed
            with trio.move_on_after(WATCH_EVERY_S):
                await changed.wait()
            now_s = trio.current_time()
            live = [one for one in download.providers.values() if one.dropped is None]
            for one in live:
                if not one.lost_turn and now_s - one.waiting_s > _turn_s(one, live):
                    schedule.lose_turn(one.peer_id)
                    if not schedule.is_sole(one.peer_id):
                        log.info("provider_slow", peer_id=one.peer_id)
                        one.rest(now_s)
                    download.wake()
            busy = any(not schedule.knows(one.peer_id) or one.pending or schedule.wanted_of(one.peer_id) for one in live)
            if busy or download.opening or download.writes.value < WRITES_MAX:
                starved_s = math.inf
                continue
            growing = any(now_s - one.grew_s < STARVED_S for one in live)
            starved_s = min(starved_s, now_s)
            if not growing:
                return

    # With one provider.

    async def _work_with(self, provider: _Provider, download: _Download, nursery: trio.Nursery) -> None:
        """Until the fetch ends, or the provider is dropped."""
        schedule, key = download.schedule, provider.peer_id
        provider.scope = trio.CancelScope()
        with provider.scope:
            while provider.dropped is None:
                pause_s: float | None = None
                try:
                    await self._exchange(provider, download, nursery)
                except _PEERS_FAULT as error:
                    pause_s = provider.note(error)
                    await provider.break_off()
                except _OwnError as error:
                    download.failures.append(error)
                    break
                finally:
                    schedule.release(key)
                    # At the end of a download: what is under way belongs to it. A stream at rest may serve the next one.
                    if provider.pending:
                        await provider.break_off()
                    download.wake()
                if pause_s is not None:
                    await trio.sleep(pause_s)
        schedule.drop_source(key)
        download.wake()

    async def _exchange(self, provider: _Provider, download: _Download, nursery: trio.Nursery) -> None:
        """Raises what the provider does wrong."""
        provider.have_due_s = -math.inf
        while True:
            changed = download.changed
            if not provider.pending:
                provider.lost_turn = False
            await self._ask_more(provider, download)
            if provider.pending:
                pending, frame = await provider.next()
                await self._took(provider, download, pending, frame, nursery)
            else:
                provider.idle()
                due_s = [when_s for when_s in (provider.rest_until_s, provider.have_due_s) if when_s > trio.current_time()]
                with trio.move_on_at(min(due_s, default=math.inf)):
                    await changed.wait()

    async def _ask_more(self, provider: _Provider, download: _Download) -> None:
        """Keep a few requests under way."""
        schedule, key, now_s = download.schedule, provider.peer_id, trio.current_time()
        if now_s >= provider.have_due_s and len(provider.pending) < ASKS_MAX:
            provider.have_due_s = math.inf
            await provider.send(Ask(HAVE, download.manifest.root, 0, 0, 0), 1)
        if provider.lost_turn or now_s < provider.rest_until_s:
            return
        run_max = provider.run_max(min(self._limits.chunks_per_ask, CHUNKS_MAX))
        if (number := schedule.to_open(key, run_max)) is not None:
            await self._open(provider, download, number)
        while len(provider.pending) < ASKS_MAX and (run := schedule.claim(key, run_max)) is not None:
            packed = int(0 < provider.bytes_per_s < PACK_BELOW_BYTES_PER_S)
            root = download.blobs[run.blob].root
            await provider.send(Ask(CHUNKS, root, run.start, run.count, packed), run.count, run.blob)

    async def _open(self, provider: _Provider, download: _Download, number: int) -> None:
        """Begin with a blob: what of it is on disk counts, and its hashes are asked for unless they are there too."""
        blob = download.blobs[number]
        partial = download.partials.get(number)
        if partial is None:
            download.opening.add(number)
            try:
                partial = download.partials[number] = await self._own(lambda: self._store.begin(blob))
            finally:
                download.opening.discard(number)
        if partial.hashes_known:
            await self._opened(download, number)
            return
        download.pages[number] = {}
        count = chunk_count(blob.size)
        for start in range(0, count, HASHES_MAX):
            await provider.send(Ask(HASHES, blob.root, start, min(HASHES_MAX, count - start), 0), 1, number)

    async def _opened(self, download: _Download, number: int) -> None:
        partial = download.partials[number]
        download.schedule.opened(number, partial.missing())
        download.progress.done_bytes += partial.verified_bytes
        await self._commit(download, number)
        download.wake()
        await download.progress.tell("fetching")

    async def _took(
        self, provider: _Provider, download: _Download, pending: _Pending, frame: bytes | None, nursery: trio.Nursery
    ) -> None:
        """What to do with what came. Raises MalformedError."""
        ask = pending.ask
        if ask.what == HAVE:
            self._took_have(provider, download, frame)
        elif frame is None:
            run = Run(pending.blob, ask.start, ask.count)
            download.schedule.lacks(provider.peer_id, run)
            if ask.what == HASHES:
                download.schedule.lacks(provider.peer_id, Run(pending.blob, 0, chunk_count(download.blobs[pending.blob].size)))
            provider.denied += 1
            if provider.denied > DENIED_MAX:
                raise RefusedError("it says that it has what it then says it has not")
            download.schedule.release(provider.peer_id)
            download.wake()
        elif ask.what == HASHES:
            await self._took_hashes(download, pending, frame)
        else:
            assert pending.left is not None
            index = ask.start + pending.frames - pending.left - 1
            provider.note_chunk(len(frame), trio.current_time())
            await self._pace.spend(len(frame))
            await download.writes.acquire()
            download.writing[pending.blob] += 1
            nursery.start_soon(self._keep, provider, download, pending.blob, index, frame)

    def _took_have(self, provider: _Provider, download: _Download, frame: bytes | None) -> None:
        have = unpack_have(blobs_of(download.manifest), frame) if frame is not None else {}
        none = [np.zeros(chunk_count(blob.size), np.bool_) for blob in download.blobs]
        flags = np.concatenate([have.get(blob.root, none[number]) for number, blob in enumerate(download.blobs)])
        now_s = trio.current_time()
        shortest_s, longest_s = HAVE_EVERY_S
        if download.schedule.set_source(provider.peer_id, flags):
            provider.have_every_s = shortest_s
            # One that has a part of a blob is fetching itself. Whole ones are all that it will ever have, as far as we know.
            if any(0 < np.count_nonzero(have[blob.root]) < len(have[blob.root]) for blob in download.blobs if blob.root in have):
                provider.grew_s = now_s
        else:
            provider.have_every_s = min(longest_s, 2 * provider.have_every_s)
        provider.have_due_s = math.inf if download.schedule.is_complete(provider.peer_id) else now_s + provider.have_every_s
        download.wake()

    async def _took_hashes(self, download: _Download, pending: _Pending, frame: bytes) -> None:
        """They prove themselves only together."""
        number, ask = pending.blob, pending.ask
        partial = download.partials[number]
        if len(frame) != ask.count * HASH_BYTES:
            raise MalformedError(f"it sent {len(frame)} bytes of hashes where {ask.count * HASH_BYTES} are due")
        pages = download.pages.setdefault(number, {})
        pages[ask.start] = frame
        if partial.hashes_known or sum(map(len, pages.values())) != chunk_count(partial.blob.size) * HASH_BYTES:
            return
        joined = b"".join(pages[start] for start in sorted(pages))
        del download.pages[number]
        hashes = [joined[at : at + HASH_BYTES] for at in range(0, len(joined), HASH_BYTES)]
        await self._own(lambda: partial.accept_hashes(hashes))
        if not download.schedule.is_open(number):
            await self._opened(download, number)

    async def _keep(self, provider: _Provider, download: _Download, number: int, index: int, frame: bytes) -> None:
        """Check and write one chunk, and what follows from it. Never raises what is somebody's fault."""
        length = chunk_length(download.blobs[number].size, index)
        try:
            try:
                if download.schedule.needs(number, index):
                    partial = download.partials[number]
                    await self._own(lambda: partial.write_chunk(index, unpack_chunk(frame, length)))
                    provider.received_bytes += length
                if download.schedule.finish(provider.peer_id, number, index):
                    download.progress.done_bytes += length
            finally:
                download.writing[number] -= 1
                download.writes.release()
            await self._commit(download, number)
            await download.progress.tell("fetching")
        except _PEERS_FAULT as error:
            # What it said is not what the hash names: nothing else of it is waited for.
            if provider.dropped is None:
                provider.note(error)
            provider.scope.cancel()
        except _OwnError as error:
            download.failures.append(error)
        download.wake()

    async def _commit(self, download: _Download, number: int) -> None:
        """Make a blob whole if nothing of it is missing. Only when nobody writes to it any more: the file is closed with it."""
        if download.schedule.has_all_of(number) and not download.writing[number] and number not in download.committing:
            download.committing.add(number)
            await self._own(download.partials[number].commit)
            del download.partials[number]
            download.schedule.close(number)

    async def _own(self, work: Callable[[], Result]) -> Result:
        """Away from the trio thread. What a peer got wrong is raised as it is, trouble of this node's own as _OwnError."""
        try:
            return await self._off_thread(work)
        except PeerError:
            raise
        except NexusError as error:
            raise _OwnError(error) from error


def _turn_s(provider: _Provider, live: Sequence[_Provider]) -> float:
    """How long nothing may come from this one before others take over: a floor under its pace, by the pace of the others."""
    others = [one.bytes_per_s for one in live if one is not provider and one.bytes_per_s]
    shortest_s, longest_s = TURN_S
    if not others:
        return shortest_s if len(live) > 1 else math.inf
    return min(longest_s, max(shortest_s, TURN_CHUNKS * CHUNK_BYTES / statistics.median(others)))


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


def _nobody_has(what: str, asked_of: Iterable[_Provider]) -> NotFoundError:
    providers = list(asked_of)
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
