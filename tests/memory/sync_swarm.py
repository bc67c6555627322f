"""Nodes that synchronise over a network which loses, delays and partitions; with churn and one node that lies. Seeded, no I/O."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256

from nexus.core.errors import MalformedError, NexusError, UnreachableError
from nexus.core.record import Record
from nexus.memory.item_set import Item, ItemSet, View
from nexus.memory.reconcile_wire import PAYLOAD_MAX, Kind, Listed, ReplyWriter, decode_query
from nexus.memory.sync import Check, Checked, Heard, Load, Loaded, SyncResponder, SyncSession
from nexus.memory.sync_messages import MESSAGES, Batches, News, Open, Query, Reply, Told, Want, told_items
from nexus.memory.sync_schedule import Start, SyncSchedule

COLLECTION = bytes(range(32))
EPOCH_MS = 1_700_000_000_000


@dataclass
class Node:
    name: str
    rng: random.Random
    schedule: SyncSchedule
    blocks: dict[bytes, bytes] = field(default_factory=dict)
    items: ItemSet = field(default_factory=ItemSet)
    pruned: set[bytes] = field(default_factory=set)
    up: bool = True
    life: int = 0
    fetched: int = 0
    alarm: int = 0

    def add(self, block: bytes) -> Item:
        item = item_of(block)
        self.blocks[item.id] = block
        self.items.add([item])
        return item

    def lacking(self, items: list[Item]) -> list[Item]:
        return [item for item in items if item.id not in self.blocks and item.id not in self.pruned]

    # What the responder sees.

    def view(self, collection: bytes, salt: bytes, /) -> View | None:
        return self.items.view(salt) if self.serves(collection) else None

    def serves(self, collection: bytes, /) -> bool:
        return collection == COLLECTION

    def load(self, ids: tuple[bytes, ...]) -> list[Loaded]:
        return [Loaded(self.blocks[id_], (id_,)) for id_ in ids if id_ in self.blocks]

    def accept(self, check: Check) -> Checked:
        accepted, refused = [], 0
        for block in check.batches:
            item = item_of(block)
            # The form that the swarm's blocks have stands for a signature.
            if item.id not in check.wanted or not block.endswith(b"signed"):
                refused += 1
            else:
                self.fetched += item.id not in self.blocks
                accepted.append(self.add(block))
        return Checked(tuple(accepted), (), refused, "bad signature" if refused else "")

    def respond(self, responder: SyncResponder, request: Record, swarm: Swarm, peer: str) -> Record:
        answer = responder.receive(request)
        if isinstance(answer, Load):
            return responder.loaded(self.load(answer.ids))
        if isinstance(answer, Heard):
            self.schedule.heard(peer, answer.collection, self.lacking(list(answer.items)), answer.more, swarm.now_s)
            return Told()
        return answer


class Liar(Node):
    """Answers with what is not true, in every way that has the right form, and in some that do not."""

    def fakes(self, count: int) -> list[Item]:
        return sorted(Item(EPOCH_MS + self.rng.randrange(10**6), self.rng.randbytes(32)) for _ in range(count))

    def respond(self, responder: SyncResponder, request: Record, swarm: Swarm, peer: str) -> Record:
        lie = self.rng.randrange(6)
        if isinstance(request, Open | Query):
            if lie == 0:
                return Reply(1, self.rng.randbytes(60))
            if lie == 1:
                return Told()
            asked = decode_query(request.query)
            writer = ReplyWriter(PAYLOAD_MAX)
            for part in asked:
                lacked = tuple(self.rng.random() < 0.5 for _ in part.handles) if part.kind is Kind.HANDLES else None
                keys = [
                    key for key in (item.t_ms.to_bytes(8, "big") + item.id for item in self.fakes(4)) if part.low <= key < part.high
                ]
                if part.kind is Kind.FINGERPRINT and self.rng.random() < 0.5:
                    writer.add_same()
                else:
                    writer.add_listed(part.low, Listed(tuple(keys), lacked, None))
            return Reply(7, writer.data)
        if isinstance(request, Want):
            if lie < 2:
                return Batches((), request.ids)
            return Batches(tuple(self.rng.randbytes(50) + b"signed"[: lie + 1] for _ in request.ids[:3]), ())
        return super().respond(responder, request, swarm, peer)


def item_of(block: bytes) -> Item:
    return Item(EPOCH_MS + int.from_bytes(block[:4], "big") % 10**6, sha256(block).digest())


class Swarm:
    """`now_s` is virtual. Until `faults_end_s` messages get lost, links fail, nodes go down and write."""

    def __init__(self, seed: int, honest: int, liars: int, faults_end_s: float) -> None:
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.faults_end_s = faults_end_s
        self.trace = sha256()
        self.largest_frame = 0
        self.sessions = 0
        self.running: dict[str, int] = {}
        self.islands: dict[str, int] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.nodes: dict[str, Node] = {}
        for number in range(honest + liars):
            kind = Node if number < honest else Liar
            name = f"node{number}"
            self.nodes[name] = kind(name, random.Random(self.rng.random()), SyncSchedule(self.rng.randbytes(8)))
        self.honest = [node for node in self.nodes.values() if type(node) is Node]
        for node in self.nodes.values():
            for peer in self.nodes.values():
                if node is not peer:
                    node.schedule.add(peer.name, COLLECTION, 0.0)
            self._at(self.rng.random(), lambda node=node: self._turn(node))
        self._at(5.0, self._fault)

    def run(self, until_s: float) -> None:
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, event = heapq.heappop(self._events)
            event()

    def write(self, node: Node) -> None:
        """A new block, or the older of them: the time in it is any."""
        at = int(self.now_s * 1000) if self.rng.random() < 0.8 else self.rng.randrange(10**6)
        item = node.add(at.to_bytes(4, "big") + self.rng.randbytes(12) + b"signed")
        self._note("write", node.name, item.id.hex())
        node.schedule.changed(COLLECTION, self.now_s)
        self._publish(node, News.of(COLLECTION, [item]))

    def _publish(self, node: Node, news: News) -> None:
        packed = news.to_bytes()
        assert len(packed) <= 1024
        for peer in self.nodes.values():
            if peer is not node and not self._lost(node.name, peer.name):
                self._at(self.rng.random(), lambda peer=peer: self._hear(peer, node.name, News.from_bytes(packed)))

    def _hear(self, node: Node, publisher: str, news: News) -> None:
        if node.up:
            node.schedule.heard(publisher, news.collection, node.lacking(told_items(news.items)), news.more, self.now_s)
            self._turn(node)

    def _turn(self, node: Node) -> None:
        """What a node's sync task does: start what is due, and be back when the next is."""
        if not node.up:
            return
        for start in node.schedule.next(self.now_s):
            self._begin(node, start)
        due_s = node.schedule.next_due_s(self.now_s)
        if due_s is not None:
            # One alarm per node: a later turn sets it anew.
            node.alarm += 1
            self._at(due_s - self.now_s, lambda alarm=node.alarm: self._turn(node) if node.alarm == alarm else None)

    def _begin(self, node: Node, start: Start) -> None:
        self.sessions += 1
        self.running[node.name] = self.running.get(node.name, 0) + 1
        assert self.running[node.name] <= 4
        self._note("begin", node.name, start.peer, str(len(start.items)))

        def wanted(items: list[Item]) -> list[Item]:
            return node.schedule.claim(start.peer, start.collection, node.lacking(items), self.now_s)

        view = None if start.items else node.items.view(self.rng.randbytes(16))
        session = SyncSession(start.collection, wanted, self.now_s, view, start.items, start.want_max)
        peer = self.nodes[start.peer]
        responder = SyncResponder(peer)
        lives = node.life, peer.life

        def end() -> None:
            self.running[node.name] -= 1
            outcome = session.outcome()
            self._note("end", node.name, peer.name, repr(outcome))
            if node.life == lives[0]:
                node.schedule.finished(peer.name, start.collection, outcome, self.now_s)
                self._turn(node)

        def fail(error: NexusError) -> None:
            session.fail(error)
            end()

        def carry(frame: bytes, then: Callable[[Record], None]) -> None:
            self.largest_frame = max(self.largest_frame, len(frame))

            def arrive() -> None:
                if (node.life, peer.life) != lives or not (node.up and peer.up) or self._lost(node.name, peer.name):
                    fail(UnreachableError("the stream broke"))
                    return
                try:
                    then(MESSAGES.unpack(frame))
                except NexusError as error:
                    fail(error)

            self._at(0.005 + 0.2 * self.rng.random() ** 3, arrive)

        def step() -> None:
            request = session.generate(self.now_s)
            if request is not None:
                carry(MESSAGES.pack(request), served)
            elif session.ended:
                end()

        def served(request: Record) -> None:
            try:
                answer = peer.respond(responder, request, self, node.name)
            except MalformedError:
                peer.schedule.offend(node.name, self.now_s)
                raise UnreachableError("the stream was closed") from None
            self._turn(peer)
            carry(MESSAGES.pack(answer), answered)

        def answered(message: Record) -> None:
            check = session.receive(message, self.now_s)
            if check is not None:
                session.checked(node.accept(check))
            step()

        step()

    def _lost(self, one: str, other: str) -> bool:
        if self.now_s >= self.faults_end_s:
            return False
        return self.islands.get(one, 0) != self.islands.get(other, 0) or self.rng.random() < 0.05

    def _fault(self) -> None:
        """Something happens to the network or to a node, every few seconds; at the end all comes back."""
        if self.now_s >= self.faults_end_s:
            for node in self.nodes.values():
                if not node.up:
                    self._rise(node)
            return
        what = self.rng.randrange(10)
        node = self.rng.choice(list(self.nodes.values()))
        if what == 0:
            self.islands = {name: self.rng.randrange(2) for name in self.nodes}
        elif what == 1:
            self.islands = {}
        elif what == 2 and node.up:
            node.up = False
            node.life += 1
            for other in self.nodes.values():
                other.schedule.lost(node.name)
            self._at(10 + 30 * self.rng.random(), lambda: self._rise(node))
        elif node.up and isinstance(node, Liar):
            self._publish(node, News.of(COLLECTION, node.fakes(3)))
        elif node.up:
            for _ in range(self.rng.choice([1, 1, 3, 30])):
                self.write(node)
        self._at(1 + 4 * self.rng.random(), self._fault)

    def _rise(self, node: Node) -> None:
        """After a crash: the blocks are there, the schedule begins anew."""
        if node.up:
            return
        node.up = True
        node.schedule = SyncSchedule(self.rng.randbytes(8))
        for peer in self.nodes.values():
            if peer is not node and peer.up:
                node.schedule.add(peer.name, COLLECTION, self.now_s)
                peer.schedule.add(node.name, COLLECTION, self.now_s)
        self._turn(node)

    def _at(self, delay_s: float, event: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now_s + delay_s, self._count, event))

    def _note(self, *words: str) -> None:
        self.trace.update(" ".join((f"{self.now_s:.6f}", *words, "\n")).encode())
