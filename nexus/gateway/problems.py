"""Errors over HTTP as problem details (RFC 9457), and back into the same error at the other end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from nexus.core import errors
from nexus.core.errors import NexusError
from nexus.gateway.wire import Json

CONTENT_TYPE = "application/problem+json"
_TYPE_PREFIX = "urn:nexus:error:"


def problem_of(error: NexusError) -> dict[str, Json]:
    """`code`, `fix` and `exit_code` beside what RFC 9457 names. `type` is a URN, so that nothing has to be looked up."""
    return {
        "type": _TYPE_PREFIX + error.code,
        "title": error.code.replace("-", " "),
        "status": error.http_status,
        "detail": error.cause,
        "fix": error.fix,
        "code": error.code,
        "exit_code": error.exit_code,
    }


def internal_problem() -> dict[str, Json]:
    """For an exception that nobody foresaw: its text may hold anything, so the log gets it and the client does not."""
    error = NexusError("the daemon hit an error of its own", "Its log says more; please report it")
    return problem_of(error) | {"code": "internal", "type": _TYPE_PREFIX + "internal", "title": "internal error"}


def http_problem(status: int, cause: str, fix: str = "") -> dict[str, Json]:
    """A problem of HTTP itself: unknown path, wrong method."""
    error: NexusError = errors.UsageError(cause, fix)
    return problem_of(error) | {"status": status}


def error_of(problem: Mapping[str, Json]) -> NexusError:
    """The error that a problem stands for; one of an unknown code keeps its exit code."""
    code, exit_code = problem.get("code"), problem.get("exit_code")
    cause, fix = problem.get("detail"), problem.get("fix")
    kind = _BY_CODE.get(code, NexusError) if isinstance(code, str) else NexusError
    error = kind(
        cause if isinstance(cause, str) else "the daemon reported an error without a cause", fix if isinstance(fix, str) else ""
    )
    if kind is NexusError and isinstance(code, str) and isinstance(exit_code, int):
        # On the instance: codes and exit codes of a newer daemon pass through unchanged.
        error.code, error.exit_code = code, exit_code  # type: ignore[misc]
    return error


def _all_errors(kind: type[NexusError]) -> Iterator[type[NexusError]]:
    yield kind
    for subclass in kind.__subclasses__():
        yield from _all_errors(subclass)


# Of those that share a code the most general one, which takes a cause and a fix and nothing else.
_BY_CODE: dict[str, type[NexusError]] = {}
for _kind in _all_errors(NexusError):
    _BY_CODE.setdefault(_kind.code, _kind)
