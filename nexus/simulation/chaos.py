"""The scenario `chaos`: a swarm under load in which everything goes wrong that may, and then nothing any more.

First the nodes find each other. Then, for some half a minute, faults befall them while askers ask. At last every fault ends, and
all must come right: whoever asks is answered rightly, all know each other, and all know who cheated.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, chdir
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from nexus.core.errors import NexusError
from nexus.network.simulated import SimulatedNetwork
from nexus.node.api import Finished, GenerateRequest, Planned, Token
from nexus.node.attacks import ATTACKS
from nexus.simulation.checks import Checker, Reference, Violation, logged_errors
from nexus.simulation.cluster import Cluster, Member, open_cluster, until
from nexus.simulation.determinism import simulate
from nexus.simulation.disk import RAM
from nexus.simulation.faults import (
    BYZANTINE,
    FAULTS,
    GOSSIP,
    LEAVE,
    SKEW,
    STANDING,
    SURVIVED,
    YEAR_MS,
    Injector,
    draw_faults,
)
from nexus.simulation.model import LAYERS, NAME, ModelFiles, make_model
from nexus.simulation.plants import PLANTS

ALL_FAULTS = (*FAULTS, *STANDING)
WARM_UP_S = 8.0
# Few, so that questions come again: what was signed for one of them fits the next, but for whose it is.
PROMPTS = ("abc", "the quick brown fox", "why?")
ANSWERS = (3, 20, 40)
# Holders of every layer that are honest and have their clocks right, at first and when machines have left.
HOLDERS, HOLDERS_LEFT = 3, 2
SETTLE_S = 15.0
STAGED_NODES = 16
# A request under faults ends, well or not, within this; every wait on a peer has a deadline, and attempts are counted.
REQUEST_S = 240.0
# What a swarm whose faults are over has to come right in.
TAIL_REQUEST_S = 120.0
CONVERGE_S = 330.0


@dataclass(frozen=True, slots=True)
class Options:
    """`chaos_s`: virtual seconds of faults. `plant`: a bug to put in, see `nexus.simulation.plants`, or "". `cheats`: names of
    attacks, of which those that cheat have one each; none: any. `questions`: how many different ones are asked."""

    nodes: int = 50
    faults: tuple[str, ...] = ALL_FAULTS
    chaos_s: float = 30.0
    plant: str = ""
    cheats: tuple[str, ...] = ()
    questions: int = len(PROMPTS) * len(ANSWERS)
    log: bool = False

    def command(self, seed: int) -> str:
        """What runs the same again."""
        parts = [f"scripts/simulate chaos --seed {seed} --nodes {self.nodes}"]
        if self.faults != ALL_FAULTS:
            parts.append(f"--faults {','.join(self.faults) or 'none'}")
        if self.chaos_s != Options().chaos_s:
            parts.append(f"--chaos-s {self.chaos_s:g}")
        if self.cheats:
            parts.append(f"--cheats {','.join(self.cheats)}")
        if self.questions != Options().questions:
            parts.append(f"--questions {self.questions}")
        if self.plant:
            parts.append(f"--plant {self.plant}")
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Of one seed. `trace`: a hash over all that happened, in order. `asked`, `answered`: requests, under faults and after."""

    seed: int
    trace: str
    violations: tuple[Violation, ...]
    events: int
    virtual_s: float
    asked: int
    answered: int
    faults: int

    @property
    def held(self) -> bool:
        return not self.violations


class World:
    """What seeds of one process share: the model, and what it answers."""

    def __init__(self, root: Path, nodes: Path | None = None) -> None:
        """`root`: where the model is, made if it is not. `nodes`: where the nodes of this process get their homes."""
        self.nodes = nodes or root / "nodes"
        self.model: ModelFiles = make_model(root / "model")
        self.reference = Reference(self.model)


def ram_directory() -> Path:
    """A new directory, on RAM where there is some."""
    return Path(tempfile.mkdtemp(prefix="nexus-simulation-", dir=RAM if RAM.is_dir() else None))


def run_seed(seed: int, options: Options, world: World) -> Verdict:
    """One run of the scenario. The same seed and options give the same verdict and trace in any process."""
    directory = world.nodes
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    errors: list[str] = []
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        # Paths are in messages: relative ones are the same in every process.
        stack.enter_context(chdir(directory))
        stack.enter_context(logged_errors(errors, options.log))
        if options.plant:
            stack.enter_context(PLANTS[options.plant].planted())
        scenario = _Chaos(seed, options, world, errors)
        return simulate(seed, scenario.run)


class _Chaos:
    def __init__(self, seed: int, options: Options, world: World, errors: list[str]) -> None:
        self._seed = seed
        self._options = options
        self._world = world
        self._errors = errors
        self._rng = random.Random(repr((seed, "chaos")))  # noqa: S311
        self._asked = self._answered = 0

    def _has(self, kind: str) -> bool:
        return kind in self._options.faults

    @property
    def _survivable(self) -> bool:
        return not set(self._options.faults) - SURVIVED

    async def run(self) -> Verdict:
        rng = self._rng
        network = SimulatedNetwork(self._seed, delay_s=(0.001, rng.choice((0.005, 0.03, 0.1))), break_after_s=10.0, tick_s=0.001)
        if self._has(GOSSIP):
            network.duplication, network.reordering = rng.choice((0.0, 0.2)), rng.choice((0.0, 0.3))
        async with open_cluster(self._seed, Path(), self._world.model, network) as cluster:
            askers = self._populate(cluster)
            checker = Checker(cluster, self._world.reference)
            for member in cluster.members:
                earlier = cluster.members[: member.number]
                await cluster.start(member, rng.sample(earlier, min(2, len(earlier))))
            # A request that is to get over everything needs others to go on with.
            at_once = max(1, self._options.nodes // 8) if self._survivable else self._options.nodes
            injector = Injector(cluster, frozenset(member.number for member in askers), checker.crashed, at_once)
            await trio.sleep(WARM_UP_S)
            faults = draw_faults(
                rng, self._options.faults, WARM_UP_S, WARM_UP_S + self._options.chaos_s, max(6, self._options.nodes // 2)
            )
            async with trio.open_nursery() as watching:
                watching.start_soon(checker.run, injector.troubled)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(injector.run, faults)
                    if self._has(LEAVE):
                        nursery.start_soon(self._leave, cluster, injector)
                    for asker in askers:
                        nursery.start_soon(self._keep_asking, cluster, checker, asker)
                await self._tail(cluster, checker, injector, askers)
                watching.cancel_scope.cancel()
            checker.look(injector.troubled)
            for error in self._errors:
                checker.fail("no error of its own surprises a node", error)
            return Verdict(
                self._seed,
                network.trace,
                tuple(checker.violations),
                network.events,
                trio.current_time(),
                self._asked,
                self._answered,
                len(faults),
            )

    def _populate(self, cluster: Cluster) -> list[Member]:
        """Askers with nothing, then servers with two or three layers each, so that every layer is on several."""
        rng, nodes = self._rng, self._options.nodes
        wanted = max(2, min(4, nodes // 8))
        askers = [cluster.add([], serves=False) for _ in range(wanted)]
        servers = nodes - wanted
        # A seventh, half where it is said how; of a few nodes one, now and then.
        count = servers // 2 if self._options.cheats else servers // 7 or int(rng.random() < 0.5)
        cheaters = set(rng.sample(range(servers), count)) if self._has(BYZANTINE) else set()
        skewed = set(rng.sample(range(servers), servers // 10)) if self._has(SKEW) else set()
        ranges = [(number % (LAYERS - 1), min(LAYERS, number % (LAYERS - 1) + rng.choice((2, 3)))) for number in range(servers)]
        sound = [number for number in range(servers) if number not in cheaters | skewed]
        for layer in range(LAYERS):
            # A few machines hold more each.
            holders = sum(ranges[number][0] <= layer < ranges[number][1] for number in sound)
            for number in rng.sample(sound, len(sound)):
                start, end = ranges[number]
                if holders < HOLDERS and not start <= layer < end:
                    ranges[number] = min(start, layer), max(end, layer + 1)
                    holders += 1
        for number in range(servers):
            cheat = rng.choice(self._options.cheats or sorted(ATTACKS)) if number in cheaters else ""
            skew_ms = rng.randint(-2_000, 2_000) if self._has(SKEW) else 0
            if number in skewed:
                skew_ms = rng.choice((-1, 1)) * rng.choice((600_000, YEAR_MS, 30 * YEAR_MS))
            cluster.add([ranges[number]], cheat=cheat, skew_ms=skew_ms)
        return askers

    async def _leave(self, cluster: Cluster, injector: Injector) -> None:
        """Some machines go for good."""
        for _ in range(max(1, self._options.nodes // 15)):
            await trio.sleep(self._rng.uniform(0.0, self._options.chaos_s / max(1, self._options.nodes // 15)))
            member = injector.leave(self._rng, HOLDERS_LEFT)
            if member is not None:
                await injector.crash(member)

    async def _keep_asking(self, cluster: Cluster, checker: Checker, asker: Member) -> None:
        rng = cluster.rng_of("asks", asker.number)
        until_s = WARM_UP_S + self._options.chaos_s
        while trio.current_time() < until_s:
            await trio.sleep(rng.uniform(0.2, 6.0))
            failure = await self._ask(checker, asker, self._request(rng), REQUEST_S)
            if failure and self._survivable:
                checker.fail("whoever asks is answered", f"{asker.name}: {failure}")

    def _request(self, rng: random.Random) -> GenerateRequest:
        question = rng.randrange(self._options.questions)
        return GenerateRequest(
            NAME,
            PROMPTS[question % len(PROMPTS)],
            max_tokens=ANSWERS[question // len(PROMPTS)],
            stages=rng.choice((None, 1, 2, 3)),
            verify=rng.choice((None, "light", "replica", "off")),
        )

    async def _ask(self, checker: Checker, asker: Member, request: GenerateRequest, within_s: float) -> str:
        """ "" where it was answered, else why not."""
        self._asked += 1
        shown: list[int] = []
        failure = "no end came"
        if asker.node is None:
            return "the node is not on"  # it broke, which is noted where it did
        with trio.move_on_after(within_s) as scope:
            try:
                async for event in asker.node.generate(request):
                    match event:
                        case Planned():
                            checker.planned(asker, event)
                        case Token() if event.step == len(shown):  # text that was held back comes under its last token again
                            shown.append(event.token)
                        case Finished():
                            checker.finished(asker, event, shown)
                            failure = ""
            except NexusError as error:
                failure = f"{type(error).__name__}: {error.cause}"
                if "report it" in error.fix:
                    checker.fail("no error of its own surprises a node", f"{asker.name}: {failure}")
        if scope.cancelled_caught:
            failure = f"no answer within {within_s:g} s"
            checker.fail("every wait has an end", f"{asker.name}: a request of {request.max_tokens} tokens")
        self._answered += not failure
        return failure

    async def _tail(self, cluster: Cluster, checker: Checker, injector: Injector, askers: Sequence[Member]) -> None:
        """Nothing goes wrong any more."""
        cluster.network.heal()
        cluster.network.loss = 0.0
        cluster.network.duplication = cluster.network.reordering = 0.0
        cluster.network.record("tail")
        await trio.sleep(SETTLE_S)
        request = GenerateRequest(NAME, "at last", max_tokens=6, verify="light")
        # What is not known to be gone yet is planned with, and found to be gone: a request is to get over that by itself.
        # So many stages only where a few nodes may be doubted, and as many are left.
        for asker in askers:
            stages = self._rng.choice((None, 2, 3)) if self._options.nodes >= STAGED_NODES else None
            failure = await self._ask(checker, asker, replace(request, stages=stages), TAIL_REQUEST_S)
            if failure:
                checker.fail("whoever asks is answered", f"{asker.name}: {failure}")
        right = [member for member in cluster.on() if member.sound]
        if not await until(lambda: not checker.apart(right), CONVERGE_S, 2.0):
            for what in checker.apart(right)[:4]:
                checker.fail("what all should know all come to know", what)
