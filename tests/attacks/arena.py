"""Whole nodes on a simulated network, with real stages of a tiny model, cheaters among them: where attacks are tried.

Node 0 asks; it serves nothing, has the model's weights and audits as a fresh installation does. The others serve, node 1 first in
every plan. What is asserted about an attack is read from the nodes' own state afterwards, see `Arena.outcome`.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import trio

from nexus.core.errors import NotFoundError
from nexus.core.hashing import tagged_hash
from nexus.core.keys import Identity, peer_id_of
from nexus.core.manifest import Manifest
from nexus.engine.exact.weight_rows import StoredWeights
from nexus.engine.speed import Speeds
from nexus.engine.stage import load_stage
from nexus.network.simulated import SimulatedNetwork, SimulatedTransport
from nexus.node.api import Finished, GenerateRequest
from nexus.node.attacks import Means, conduct_of
from nexus.node.cheating import HONEST, Conduct
from nexus.node.environment import SYSTEM
from nexus.node.node import Node, _stored_models
from nexus.node.options import AuditOptions, LedgerOptions, MemoryOptions, NodeOptions
from nexus.node.progress import Notice
from nexus.node.trust import Trust, open_trust
from nexus.proof.arithmetic.sampler import Sampling
from nexus.proof.evidence import Evidence, Verdict, verify_evidence
from nexus.storage.blobs import BlobStore
from nexus.storage.catalog import Catalog
from nexus.storage.fragments import FragmentStore
from nexus.storage.home import Home
from nexus.storage.peers import AddressBook
from nexus.storage.sessions import SessionStore
from nexus.swarm.placement import Candidate, Placement, place
from nexus.swarm.standing import DEMOTED, SLASHED, SUSPENDED
from tests.attacks.catalogue import AVOIDED, NOBODY, Outcome, Row
from tests.engine.conftest import Folder

Model = tuple[Manifest, Folder]
MEMORY_BYTES = 1 << 30
# A node of this speed gets a stage, a slow one only where nobody else is left.
SPEED = 1000
STEPS = 20
SESSION = bytes(32)


def identities(count: int) -> list[Identity]:
    """The asker's, then those of the other nodes in the order in which plans prefer them."""
    made = [Identity(tagged_hash("arena", bytes([number]))) for number in range(count)]
    return [made[0], *sorted(made[1:], key=lambda one: one.public_key)]


class Arena:
    def __init__(self, network: SimulatedNetwork, model: Model, nodes: list[Node], trusts: list[Trust], homes: list[Home]) -> None:
        self.network = network
        self.manifest, self.folder = model
        self.nodes = nodes
        self.trusts = trusts
        self.homes = homes
        self.transports: list[SimulatedTransport] = []
        self.cheats: set[int] = set()
        self.notices: list[str] = []  # of the latest request

    def key(self, number: int) -> bytes:
        return self.identity(number).public_key

    def identity(self, number: int) -> Identity:
        return identities(len(self.nodes))[number]

    async def ask(self, verify: str | None = None, asker: int = 0, steps: int = STEPS, stages: int = 2) -> Finished:
        """Run a request on a node as its user does."""
        request = GenerateRequest("tiny", "abc def ghi", max_tokens=steps, stages=stages, verify=verify)
        self.notices = []
        with trio.fail_after(60):
            async for event in self.nodes[asker].generate(request):
                if isinstance(event, Notice):
                    self.notices.append(event.text)
                if isinstance(event, Finished):
                    return event
        raise AssertionError("no end came")

    async def meet(self, number: int) -> None:
        """Have a node know the others, so that it can plan."""
        for transport in self.transports:
            if transport is not self.transports[number]:
                await self.nodes[number]._membership.refresh(transport.peer_id)

    async def is_planned(self, number: int, asker: int = 0) -> bool:
        view = await self.nodes[asker].plan("tiny", 2)
        return peer_id_of(self.key(number)) in {stage.peer_id for stage in view.stages}

    def state(self, number: int, observer: int = 0) -> str:
        return self.trusts[observer].standings.of(self.key(number)).state

    async def evidence(self, observer: int = 0) -> list[Evidence]:
        """What an observer keeps, out of the files that it gives to its user."""
        trust = self.trusts[observer]
        views = await trust.evidence_views()
        return [Evidence.from_file((await trust.evidence_file(view.id.hex())).content) for view in views]

    async def outcome(self, number: int = 1, observer: int = 0) -> Outcome:
        """What became of a node in the eyes of another one. Whoever is convicted is so by bytes alone, and nobody is but those that
        cheat."""
        proofs = [evidence for evidence in await self.evidence(observer) if evidence.accused == self.key(number)]
        for evidence in proofs:
            assert self.verify(evidence).accused == self.key(number)
        kind = proofs[0].kind if proofs else ""
        for other in range(len(self.nodes)):
            honest = other != number and other not in self.cheats
            assert not honest or self.state(other, observer) not in (DEMOTED, SUSPENDED, SLASHED), f"node {other} is blamed"
        return Outcome(kind, await self._consequence(number, observer))

    async def _consequence(self, number: int, observer: int) -> str:
        state, planned = self.state(number, observer), await self.is_planned(number, observer)
        if state in (SUSPENDED, SLASHED):
            assert not planned
            return state
        if self.key(number) in self.nodes[observer]._runner._doubted:
            assert not planned
            return AVOIDED
        return state if state == DEMOTED else NOBODY

    def verify(self, evidence: Evidence) -> Verdict:
        """What somebody says of the file who has nothing else; of a large proof, which leaves its weights out, with the model."""
        again = Evidence.from_file(evidence.to_file())
        try:
            return verify_evidence(again)
        except NotFoundError:
            return verify_evidence(again, StoredWeights(lambda _: (self.manifest, self.folder.paths)))

    def right_tokens(self, done: Finished) -> list[bytes]:
        """What the model itself answers to the question of a finished request."""
        start, end = 0, self.manifest.layers
        stage = load_stage(self.manifest, start, end, self.folder.stage_files(self.manifest, start, end))
        stage.open(SESSION, Sampling.of(done.bundle.terms))
        fed, outputs = done.bundle.inputs[0], list[bytes]()
        for _ in done.bundle.outputs:
            fed = stage.step(SESSION, fed)
            outputs.append(fed)
        return outputs

    async def punishes(self, row: Row, number: int = 1, verify: str | None = "replica") -> None:
        """That an attack goes as its row says: asked for an audit, the cheater is caught, gets no pay for its answer and no further
        work, and what the others answer is right."""
        await self.ask(verify)
        assert await self.outcome(number) == row.outcome
        after = await self.ask()
        assert list(after.bundle.outputs) == self.right_tokens(after)
        assert self.key(number) not in {stage.node for stage in after.bundle.plan.stages}
        assert await self.outcome(number) == row.outcome
        assert not self.trusts[number].ledger.account.earned

    async def avoids(self, row: Row, number: int = 1, names: int | None = None) -> None:
        """That a session is given up as the attack's row says, and the answer goes on without node `names`, which is named."""
        done = await self.ask()
        assert list(done.bundle.outputs) == self.right_tokens(done)
        left = peer_id_of(self.key(number if names is None else names))
        assert left not in {stage.peer_id for stage in done.stages}
        assert any(left in notice for notice in self.notices)
        assert await self.outcome(number) == row.outcome
        after = await self.ask()
        assert list(after.bundle.outputs) == self.right_tokens(after)
        assert await self.outcome(number) == row.outcome


@asynccontextmanager
async def open_arena(
    model: Model,
    directory: Path,
    cheats: Mapping[int, str | Conduct] | None = None,
    others: int = 4,
    policy: str = "light",
    burn_max: int = 8,
) -> AsyncIterator[Arena]:
    """`cheats`: by node, an attack's name or a conduct. `others`: nodes that serve, from node 1 on; the last one is slow, so that
    it is planned with only when it has to be."""
    network = SimulatedNetwork(1, delay_s=(0.0, 0.001))
    template = _template(model)
    keys = identities(1 + others)
    async with AsyncExitStack() as stack:
        stack.enter_context(patch("nexus.node.runner.choose", _choose))
        arena = Arena(network, model, [], [], [])
        arena.cheats = set(cheats or {})
        nursery = await stack.enter_async_context(trio.open_nursery())
        stack.callback(nursery.cancel_scope.cancel)
        for number, identity in enumerate(keys):
            cheat = (cheats or {}).get(number, HONEST)
            means = Means(identity, model[1].stage_files)
            conduct = conduct_of(cheat, means) if isinstance(cheat, str) else cheat
            home = Home(directory / f"node-{number}")
            shutil.copytree(template, home.models)
            options = _options(home, number, policy, burn_max)
            transport = await stack.enter_async_context(network.open(identity))
            sessions = SessionStore(home.sessions_file, keep_max_bytes=1 << 30, keep_s=1e6, now_ms=SYSTEM.now_ms)
            stack.callback(sessions.close)
            fragments = FragmentStore(home.fragments_file)
            stack.callback(fragments.close)
            verify = partial(verify_evidence, weights=StoredWeights(_stored_models(home)))
            probation = options.audit.probation_sessions
            trust = await stack.enter_async_context(
                open_trust(home, identity, transport, options.ledger, probation, verify, dict, SYSTEM)
            )
            speed = SPEED if number < others else SPEED // 4
            speeds = Speeds(speed, speed)
            book = AddressBook.open(home.peers_file)
            node = Node(options, identity, transport, book, sessions, trust, nursery, speeds, None, fragments, conduct)
            await nursery.start(node.run)
            arena.nodes.append(node)
            arena.trusts.append(trust)
            arena.homes.append(home)
            arena.transports.append(transport)
        for node in arena.nodes:
            for transport in arena.transports:
                if transport is not node._transport:
                    await node._transport.connect(transport.addresses[0])
        await arena.meet(0)
        yield arena
        nursery.cancel_scope.cancel()


def _choose(manifest: Manifest, candidates: Sequence[Candidate], *, seed: bytes, **options: Any) -> Placement:
    """The placement, which takes the first of equals, and not a route, which leaves it to chance. All count as idle: news of a load
    comes when it comes."""
    return place(manifest, [replace(candidate, load=0) for candidate in candidates], **options)


def _options(home: Home, number: int, policy: str, burn_max: int) -> NodeOptions:
    return NodeOptions(
        home=home.path,
        name=f"node-{number}",
        listen=(),
        bootstrap=(),
        mdns=False,
        dht="server",
        relay=None,
        announce=(),
        fast_path=False,
        fast_path_port=0,
        upload_max=0,
        download_max=0,
        serve=number > 0,
        memory_max_bytes=MEMORY_BYTES,
        disk_max_bytes=MEMORY_BYTES,
        sessions_max=8,
        auto_fetch=True,
        replicas=None,
        audit=AuditOptions(policy, 0.1, 20, 3, 0.0, 60.0, 1 << 30, 1e6),
        ledger=LedgerOptions(10, 0, burn_max, 3600.0, 1000),
        memory=MemoryOptions(False, "minilm", 1 << 20, 1 << 20, None, 1.0, 0.0, 2, (), 100),
        threads=1,
    )


def _template(model: Model) -> Path:
    """The model as a node keeps it, made once."""
    manifest, folder = model
    path = folder.root / "as-a-node-keeps-it"
    if not path.exists():
        blobs, catalog = BlobStore.open(path), Catalog.open(path)
        for blob in (*manifest.files, *manifest.pieces):
            blobs.put(blob.name, blob.size, [folder.paths[blob.name].read_bytes()])
        catalog.add("tiny", manifest)
    return path
