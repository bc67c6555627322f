"""How peers behave in synchronisation, and what follows: good, demoted, dropped for a time."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

# An offence counts 1 and is half forgotten after an hour.
FORGET_S = 3600.0
DEMOTED_AT = 0.5
DROPPED_AT = 2.5
DROP_MIN_S = 600.0
DROP_MAX_S = 24 * 3600.0


class Standing(Enum):
    GOOD = "good"
    DEMOTED = "demoted"
    DROPPED = "dropped"


@dataclass(slots=True)
class Conduct:
    """How a peer behaves in synchronisation, all collections together."""

    offences: float = 0.0
    at_s: float = 0.0
    drops: int = 0
    dropped_until_s: float = 0.0

    def standing(self, now_s: float) -> Standing:
        if now_s < self.dropped_until_s:
            return Standing.DROPPED
        return Standing.DEMOTED if self._left(now_s) >= DEMOTED_AT else Standing.GOOD

    def offend(self, now_s: float) -> None:
        self.offences = self._left(now_s) + 1.0
        self.at_s = now_s
        if self.offences >= DROPPED_AT:
            self.dropped_until_s = now_s + min(DROP_MAX_S, DROP_MIN_S * 2.0**self.drops)
            self.drops = min(self.drops + 1, 16)
            # Back from there it is demoted, and the next offence but one drops it again.
            self.offences, self.at_s = 1.0, self.dropped_until_s

    def _left(self, now_s: float) -> float:
        return self.offences * float(0.5 ** (max(0.0, now_s - self.at_s) / FORGET_S))
