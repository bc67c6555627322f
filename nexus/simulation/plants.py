"""Bugs to put into a node, so that it can be shown that a simulation finds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

from nexus.core.plan import Plan as ModelPlan
from nexus.node import runner
from nexus.proof import bundle
from nexus.proof.receipts import Receipt, Terms
from nexus.storage import database
from nexus.swarm import session


@dataclass(frozen=True, slots=True)
class Plant:
    """`rule`: the invariant that it breaks. The others: of a small scenario that shows it soon; no
    `faults`: all."""

    name: str
    summary: str
    rule: str
    planted: Callable[[], AbstractContextManager[None]]
    nodes: int = 8
    faults: tuple[str, ...] = ()
    cheats: tuple[str, ...] = ()
    questions: int = 9


@contextmanager
def _lost_fsync() -> Iterator[None]:
    """A database is opened without PRAGMA synchronous=EXTRA, and does not sync."""
    careless = tuple(pragma.replace("synchronous=EXTRA", "synchronous=OFF") for pragma in database.PRAGMAS)
    with patch.object(database, "PRAGMAS", careless):
        yield


@contextmanager
def _stale_receipt() -> Iterator[None]:
    """Nobody looks which session and which request a receipt names."""
    real = bundle.check_place

    def check_place(
        receipt: Receipt, kind: str, plan: ModelPlan, terms: Terms, stage: int, request_id: bytes, prev: Receipt | None
    ) -> None:
        real(replace(receipt, session=terms.session, request=request_id), kind, plan, terms, stage, request_id, prev)

    with patch.object(bundle, "check_place", check_place), patch.object(session, "check_place", check_place):
        yield


@contextmanager
def _missing_retry() -> Iterator[None]:
    """A request whose nodes fail is not planned again without them."""
    with patch.object(runner, "ATTEMPTS_MAX", 1):
        yield


PLANTS = {
    plant.name: plant
    for plant in (
        Plant("lost-fsync", "commits are not synced", "no acknowledged write is lost", _lost_fsync),
        Plant(
            "stale-receipt",
            "a receipt of an earlier session counts",
            "no receipt of another session counts",
            _stale_receipt,
            faults=("byzantine",),
            cheats=("replayed-receipts",),
            questions=1,
        ),
        Plant(
            "missing-retry",
            "a request whose nodes fail is not planned again",
            "whoever asks is answered",
            _missing_retry,
            faults=("crash",),
        ),
    )
}
