"""Whether other nodes answer: decided from heartbeats with deadlines. Pure; the heartbeats are sent by `nexus.node.health`.

    unknown   never asked; its record alone speaks for it
    alive     answers
    slow      one answer was missing or late, or it is back only just: it is used as before
    stuck     connected, and misses one deadline after the other, as a stopped process does: plans do without it
    gone      cannot be reached, or did not answer for half a minute

One slow answer is no reason to do without a node, two missing in a row are; whoever answers again is used again at once. Health
only steers plans: it is no evidence, it is told to nobody, and nobody is punished for it.
Times are in seconds of any steady clock and end in `_s`; round trips are in microseconds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

UNKNOWN, ALIVE, SLOW, STUCK, GONE = "unknown", "alive", "slow", "stuck", "gone"
STATES = (ALIVE, SLOW, STUCK, GONE, UNKNOWN)

# A stopped process is noticed after an interval and as many deadlines as may be missed: 5 s.
HEARTBEAT_S = 2.0
DEADLINE_S = 1.5
MISSES_MAX = 2
GONE_AFTER_S = 30.0
STUCK_HEARTBEAT_S = 4.0
# Heartbeats per second of all peers together that nothing depends on now; with more peers each is asked more seldom.
IDLE_HEARTBEATS_PER_S = 3.0
IDLE_HEARTBEAT_MAX_S = 30.0
# An answer that takes longer is late, whatever the distance.
LATE_US = 1_000_000
# So many answers in time in a row, and a node that was slow is alive.
ANSWERS_WANTED = 2
VITALS_MAX = 4096


@dataclass(slots=True)
class Vitals:
    """Of one node. `misses`, `answers`: in a row. `since_s`: when it came into this state; `heard_s`: when it last answered."""

    state: str = UNKNOWN
    since_s: float = 0.0
    heard_s: float | None = None
    asked_s: float | None = None
    rtt_us: int | None = None
    misses: int = 0
    answers: int = 0


def is_usable(state: str) -> bool:
    """Whether plans may count on a node in this state."""
    return state not in (STUCK, GONE)


def interval_s(state: str, needed: bool, idle: int) -> float:
    """From one heartbeat to the next. `needed`: something depends on it now. `idle`: how many peers of which nothing does."""
    if state in (STUCK, GONE):
        return STUCK_HEARTBEAT_S
    if needed or state == SLOW:
        return HEARTBEAT_S
    return min(max(HEARTBEAT_S, idle / IDLE_HEARTBEATS_PER_S), IDLE_HEARTBEAT_MAX_S)


class HealthTable:
    """By public key. Bounded: the node asked longest ago makes room."""

    def __init__(self, most: int = VITALS_MAX) -> None:
        self._most = most
        self._vitals: OrderedDict[bytes, Vitals] = OrderedDict()

    def get(self, node: bytes) -> Vitals:
        """What is known of a node; not to be changed."""
        return self._vitals.get(node, Vitals())

    def state(self, node: bytes) -> str:
        vitals = self._vitals.get(node)
        return UNKNOWN if vitals is None else vitals.state

    def unusable(self) -> frozenset[bytes]:
        """Nodes that plans do without."""
        return frozenset(node for node, vitals in self._vitals.items() if not is_usable(vitals.state))

    def stuck(self) -> frozenset[bytes]:
        return frozenset(node for node, vitals in self._vitals.items() if vitals.state == STUCK)

    def asked(self, node: bytes, now_s: float) -> None:
        """A heartbeat is on its way."""
        self._entry(node).asked_s = now_s

    def heard(self, node: bytes, now_s: float) -> bool:
        """It answered something else than a heartbeat; whether its state changed."""
        vitals = self._entry(node)
        vitals.heard_s, vitals.misses = now_s, 0
        return False if is_usable(vitals.state) else self._turn(vitals, SLOW, now_s)

    def answered(self, node: bytes, rtt_us: int, now_s: float) -> bool:
        """It answered a heartbeat; whether its state changed."""
        vitals = self._entry(node)
        vitals.heard_s, vitals.misses = now_s, 0
        vitals.rtt_us = rtt_us if vitals.rtt_us is None else vitals.rtt_us + (rtt_us - vitals.rtt_us) // 8
        if rtt_us > LATE_US:
            vitals.answers = 0
            return self._turn(vitals, SLOW, now_s)
        vitals.answers += 1
        if vitals.state in (UNKNOWN, ALIVE) or vitals.answers >= ANSWERS_WANTED:
            return self._turn(vitals, ALIVE, now_s)
        return self._turn(vitals, SLOW, now_s)

    def missed(self, node: bytes, now_s: float) -> bool:
        """It did not answer within DEADLINE_S; whether its state changed."""
        vitals = self._entry(node)
        vitals.misses += 1
        vitals.answers = 0
        if vitals.state == GONE:
            return False
        if vitals.misses < MISSES_MAX:
            return self._turn(vitals, SLOW, now_s)
        if vitals.state == STUCK and now_s - vitals.since_s >= GONE_AFTER_S:
            return self._turn(vitals, GONE, now_s)
        return False if vitals.state == STUCK else self._turn(vitals, STUCK, now_s)

    def unreachable(self, node: bytes, now_s: float) -> bool:
        """Nobody answers where it was; whether its state changed."""
        vitals = self._entry(node)
        vitals.answers = 0
        return self._turn(vitals, GONE, now_s)

    def forget(self, node: bytes) -> None:
        self._vitals.pop(node, None)

    def due(self, nodes: Collection[bytes], needed: Collection[bytes], now_s: float) -> list[bytes]:
        """Whom of `nodes` to ask now, those that something depends on first, then whoever waited longest."""
        idle = len(nodes) - sum(node in needed for node in nodes)

        def order(node: bytes) -> tuple[bool, float, bytes]:
            asked_s = self.get(node).asked_s
            return node not in needed, float("-inf") if asked_s is None else asked_s, node

        return sorted((node for node in nodes if self._due_s(node, node in needed, idle) <= now_s), key=order)

    def next_due_s(self, nodes: Collection[bytes], needed: Collection[bytes]) -> float:
        """When the next one of `nodes` is to be asked; infinite without any."""
        idle = len(nodes) - sum(node in needed for node in nodes)
        return min((self._due_s(node, node in needed, idle) for node in nodes), default=float("inf"))

    def stale(self, nodes: Iterable[bytes], now_s: float) -> list[bytes]:
        """Those of `nodes` that are believed to be usable and have not answered within a heartbeat and its deadline."""
        found = (node for node in nodes if is_usable(self.state(node)))
        return sorted(node for node in found if now_s - (self.get(node).heard_s or float("-inf")) > HEARTBEAT_S + DEADLINE_S)

    def _due_s(self, node: bytes, needed: bool, idle: int) -> float:
        vitals = self.get(node)
        return float("-inf") if vitals.asked_s is None else vitals.asked_s + interval_s(vitals.state, needed, idle)

    def _entry(self, node: bytes) -> Vitals:
        vitals = self._vitals.setdefault(node, Vitals())
        self._vitals.move_to_end(node)
        while len(self._vitals) > self._most:
            self._vitals.popitem(last=False)
        return vitals

    @staticmethod
    def _turn(vitals: Vitals, state: str, now_s: float) -> bool:
        if vitals.state == state:
            return False
        vitals.state, vitals.since_s = state, now_s
        return True
