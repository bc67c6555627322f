"""A swarm of whole nodes: each with a disk, a clock, randomness, a processor and a conduct of its own, on one simulated network."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import structlog
import trio

from nexus.core.hashing import tagged_hash
from nexus.core.keys import Identity
from nexus.engine.speed import Speeds
from nexus.network.simulated import SimulatedNetwork, SimulatedTransport
from nexus.node.attacks import Means, conduct_of
from nexus.node.cheating import HONEST
from nexus.node.environment import Environment
from nexus.node.node import Node, compose_node
from nexus.node.options import AuditOptions, LedgerOptions, MemoryOptions, NodeOptions
from nexus.node.trust import Trust
from nexus.simulation.compute import Slowness, perf_counter, shared_processors
from nexus.simulation.determinism import HOST, Host
from nexus.simulation.disk import Disk, simulated_disks
from nexus.simulation.model import ModelFiles
from nexus.storage.home import Home
from nexus.swarm.membership import CLOCK_SKEW_MS

EPOCH_MS = 1_780_000_000_000
MEMORY_BYTES = 1 << 26
SPEED = Speeds(1000, 1000)
# What a call in a thread takes beside its work: a disk, a wait for a processor.
CALL_S = 0.002

log = structlog.get_logger("nexus.simulation")


@dataclass(eq=False)
class Member:
    """A machine of the swarm, on or off. `layers`: what it holds. `cheat`: the name of an attack, or "". `skew_ms`: of its
    clock."""

    number: int
    identity: Identity
    home: Home
    disk: Disk
    host: Host
    layers: tuple[tuple[int, int], ...]
    cheat: str = ""
    skew_ms: int = 0
    serves: bool = True
    speed: Speeds = SPEED
    starts: int = 0
    state: str = "off"  # off, starting, on, stopped (SIGSTOP)
    node: Node | None = None
    trust: Trust | None = None
    transport: SimulatedTransport | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    ended: trio.Event = field(default_factory=trio.Event)

    @property
    def name(self) -> str:
        return f"node-{self.number}"

    @property
    def peer_id(self) -> str:
        return self.identity.peer_id

    @property
    def honest(self) -> bool:
        return not self.cheat

    @property
    def sound(self) -> bool:
        """Honest, with a clock that others can believe."""
        return self.honest and abs(self.skew_ms) < CLOCK_SKEW_MS // 5

    @property
    def is_on(self) -> bool:
        return self.state == "on"

    def now_ms(self) -> int:
        return EPOCH_MS + int(trio.current_time() * 1000) + self.skew_ms


class Cluster:
    """Made by `open_cluster`. `directory`: where the nodes have their homes, relative to the current one."""

    def __init__(self, seed: int, directory: Path, model: ModelFiles, network: SimulatedNetwork, nursery: trio.Nursery) -> None:
        self.seed = seed
        self.directory = directory
        self.model = model
        self.network = network
        self.nursery = nursery
        self.slowness = Slowness()
        self.disks: dict[Path, Disk] = {}
        self.members: list[Member] = []
        # Told of every node that broke off by an error of its own, which no fault excuses.
        self.broken: list[tuple[Member, BaseException]] = []
        self.policy = AuditOptions("light", 0.1, 3, 2, 0.0, 20.0, 1 << 24, 1e6)

    def rng_of(self, *names: object) -> random.Random:
        return random.Random(repr((self.seed, *names)))  # noqa: S311 - a simulation wants a seeded generator

    def add(self, layers: Sequence[tuple[int, int]], *, cheat: str = "", skew_ms: int = 0, serves: bool = True) -> Member:
        number = len(self.members)
        home = Home(self.directory / f"node-{number}")
        rng = self.rng_of("calls", number)
        member = Member(
            number=number,
            identity=Identity(tagged_hash("simulated node", repr((self.seed, number)).encode())),
            home=home,
            disk=Disk(home.path),
            host=Host(f"node-{number}", lambda: rng.uniform(0.0, CALL_S)),
            layers=tuple(layers),
            cheat=cheat,
            skew_ms=skew_ms,
            serves=serves,
        )
        home.path.mkdir(parents=True)
        self.model.store(home.models, layers)
        self.disks[home.path] = member.disk
        self.members.append(member)
        return member

    def on(self) -> list[Member]:
        return [member for member in self.members if member.is_on]

    # --- what befalls a machine ------------------------------------------------------------------------------------------------

    async def start(self, member: Member, known: Sequence[Member] = ()) -> None:
        """Power on, and dial the machines that the node was told of."""
        assert member.state == "off", member.state
        member.state, member.scope, member.ended = "starting", trio.CancelScope(), trio.Event()
        member.starts += 1
        member.disk.start()
        self.network.record("start", member.number)
        started = trio.Event()
        self.nursery.start_soon(self._run, member, started, [one.peer_id for one in known])
        await started.wait()

    async def crash(self, member: Member) -> None:
        """Power off: what was not synced is lost, nobody is told."""
        self.network.record("crash", member.number)
        member.disk.power_off()
        if self.network.alive(member.peer_id):
            self.network.crash(member.peer_id)
        await self._end(member)

    async def shut_down(self, member: Member) -> None:
        """End the process in order."""
        self.network.record("shut down", member.number)
        await self._end(member)
        member.disk.shut_down()

    async def _end(self, member: Member) -> None:
        if member.host.held:
            member.host.release()
        member.scope.cancel()
        await member.ended.wait()

    def stop(self, member: Member) -> None:
        """SIGSTOP."""
        member.state = "stopped"
        member.host.hold()
        self.network.stop(member.peer_id)

    def resume(self, member: Member) -> None:
        if member.state == "stopped":
            member.state = "on"
            self.network.resume(member.peer_id)
            member.host.release()

    # --- the process -----------------------------------------------------------------------------------------------------------

    async def _run(self, member: Member, started: trio.Event, known: Sequence[str]) -> None:
        token = HOST.set(member.host)
        try:
            with member.scope:
                async with self._open(member) as node:
                    member.node, member.trust, member.state = node, node._trust, "on"
                    started.set()
                    for peer_id in known:
                        self.nursery.start_soon(self._introduce, member, peer_id)
                    await trio.sleep_forever()
        except Exception as error:  # noqa: BLE001 - a node that breaks is what a simulation looks for
            self.broken.append((member, error))
        finally:
            HOST.reset(token)
            member.node = member.trust = member.transport = None
            member.state = "off"
            self.network.record("end", member.number)
            started.set()
            member.ended.set()

    async def _introduce(self, member: Member, peer_id: str) -> None:
        """As a bootstrap address does: dial until it answers."""
        while member.is_on and member.transport is not None and self.network.alive(peer_id):
            try:
                await member.transport.connect(f"{self.network.endpoint_of(peer_id)}/p2p/{peer_id}")
            except Exception:  # noqa: BLE001
                await trio.sleep(2.0)
            else:
                return

    @asynccontextmanager
    async def _open(self, member: Member) -> AsyncIterator[Node]:
        """The node as it is composed for the world, on the network, clock and randomness of this one."""
        environment = Environment(member.now_ms, self.rng_of("node", member.number, member.starts), perf_counter)
        means = Means(member.identity, lambda manifest, start, end: self.model.stage_files(start, end))
        conduct = conduct_of(member.cheat, means) if member.cheat else HONEST

        async def open_transport(stack: AsyncExitStack) -> SimulatedTransport:
            member.transport = await stack.enter_async_context(self.network.open(member.identity))
            return member.transport

        async with compose_node(self._options(member), member.identity, open_transport, member.speed, conduct, environment) as node:
            yield node

    def _options(self, member: Member) -> NodeOptions:
        return NodeOptions(
            home=member.home.path,
            name=member.name,
            listen=(),
            bootstrap=(),
            mdns=False,
            dht="server",
            fast_path=False,
            fast_path_port=0,
            upload_max=0,
            download_max=0,
            relay=None,
            announce=(),
            serve=member.serves,
            memory_max_bytes=MEMORY_BYTES,
            disk_max_bytes=MEMORY_BYTES,
            sessions_max=8,
            auto_fetch=True,
            replicas=None,
            audit=self.policy,
            ledger=LedgerOptions(10, 0, 64, 3600.0, 1000),
            memory=MemoryOptions(False, "minilm", 1 << 20, 1 << 20, None, 1.0, 0.0, 2, (), 100),
            threads=1,
        )


@asynccontextmanager
async def open_cluster(seed: int, directory: Path, model: ModelFiles, network: SimulatedNetwork) -> AsyncIterator[Cluster]:
    async with trio.open_nursery() as nursery:
        cluster = Cluster(seed, directory, model, network, nursery)
        with simulated_disks(cluster.disks), shared_processors(cluster.slowness), _quiet():
            yield cluster
            for member in cluster.members:
                if member.host.held:
                    member.host.release()
            nursery.cancel_scope.cancel()


@contextmanager
def _quiet() -> Iterator[None]:
    """What fifty nodes log is in nobody's interest; a failing seed is replayed with --log."""
    yield


Wait = Callable[[], bool]


async def until(condition: Wait, within_s: float, every_s: float = 0.5) -> bool:
    """Whether it came to hold in time."""
    due_s = trio.current_time() + within_s
    while not condition():
        if trio.current_time() >= due_s:
            return False
        await trio.sleep(every_s)
    return True
