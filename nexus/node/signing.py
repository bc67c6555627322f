"""A stage's signature: given only for a receipt that is durable, so that no crash makes this node contradict itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import trio

from nexus.core.errors import LocalError
from nexus.core.keys import Identity
from nexus.proof.receipts import SignedReceipt
from nexus.storage.sessions import SessionStore, Window


class Signer(Protocol):
    """Who signs for a stage."""

    async def sign(self, window: Window) -> SignedReceipt:
        """The signed receipt, which may leave the node. Raises LocalError where it may not."""
        ...


@dataclass(eq=False, slots=True)
class _Waiting:
    window: Window
    error: LocalError | None = None
    written: bool = False


class DurableSigner:
    """Receipts of different sessions that wait while the disk is busy go into one commit together."""

    def __init__(self, identity: Identity, store: SessionStore) -> None:
        self._identity = identity
        self._store = store
        self._waiting: list[_Waiting] = []
        self._disk = trio.Lock()

    async def sign(self, window: Window) -> SignedReceipt:
        own = _Waiting(window)
        self._waiting.append(own)
        try:
            async with self._disk:
                if not own.written:
                    await self._write()
        finally:
            if own in self._waiting:
                self._waiting.remove(own)
        if own.error:
            raise own.error
        return SignedReceipt.sign(window.receipt, self._identity)

    async def _write(self) -> None:
        """Everything that waits now."""
        batch, self._waiting = self._waiting, []
        with trio.CancelScope(shield=True):  # some of it is others'
            errors = await trio.to_thread.run_sync(self._store.sign_all, [waiting.window for waiting in batch])
        for waiting, error in zip(batch, errors, strict=True):
            waiting.error, waiting.written = error, True
