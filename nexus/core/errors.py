"""Errors, by whose fault they are. Each says the cause and what to do, and maps to one exit code and one HTTP status.

Exit codes: 0 ok, 1 failed, 2 usage, 3 daemon not running, 4 not allowed, 5 not found, 6 timed out, 7 verification failed.
"""

from __future__ import annotations

from typing import ClassVar


class NexusError(Exception):
    """Base of every error that a user may see.

    `cause` says what is wrong, `fix` what to do about it. `code` is stable: scripts and other implementations match on it.
    """

    code: ClassVar[str] = "failed"
    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, cause: str, fix: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.cause}. {self.fix}" if self.fix else self.cause


# The caller's fault.
class UsageError(NexusError):
    code, exit_code, http_status = "usage", 2, 400


class NotAllowedError(NexusError):
    code, exit_code, http_status = "not-allowed", 4, 403


class NotFoundError(NexusError):
    code, exit_code, http_status = "not-found", 5, 404


class ModelFormatError(NexusError):
    """A model directory that Nexus does not take in: corrupt, unsafe or of an unsupported form."""

    code, exit_code, http_status = "bad-model", 1, 422


class OutOfBoundsError(NexusError):
    """A value that no honest computation of the model has. `run`: which of a batch's sessions it came up in."""

    code = "out-of-bounds"

    def __init__(
        self,
        cause: str = "a value of the computation is not a number or beyond 2^40",
        fix: str = "The model is damaged, or was never sound: `nexus model show`",
        run: int = 0,
    ) -> None:
        super().__init__(cause, fix)
        self.run = run


# A peer's fault.
class PeerError(NexusError):
    """A peer broke the protocol, refused, or cannot be reached. `peer` is its id, or empty where it is not known."""

    code, exit_code, http_status = "peer", 1, 502

    def __init__(self, cause: str, fix: str = "", peer: str = "") -> None:
        super().__init__(cause, fix)
        self.peer = peer


class MalformedError(PeerError):
    """Bytes that are not the one encoding of what they should be."""

    code = "malformed"


class UnreachableError(PeerError):
    code = "unreachable"


class RefusedError(PeerError):
    """A peer declined, with its reason."""

    code, http_status = "refused", 503


class VerificationError(PeerError):
    """A hash, signature, chain or root does not hold."""

    code, exit_code = "verification-failed", 7


# Time and capacity.
class TimedOutError(NexusError):
    code, exit_code, http_status = "timed-out", 6, 504


class CapacityError(NexusError):
    """A bound of this node is reached: memory, sessions, disk."""

    code, exit_code, http_status = "capacity", 1, 503


# This machine's fault.
class LocalError(NexusError):
    """This node's own files, ports or settings stand in the way."""

    code = "local"


class DaemonNotRunningError(LocalError):
    code, exit_code, http_status = "daemon-not-running", 3, 503
