"""Logs: text for people on a terminal, one JSON object per line otherwise. Fields: ts, level, event, then those of the event."""

from __future__ import annotations

import logging
import sys

import structlog
from structlog.types import EventDict, Processor, WrappedLogger

_FIRST = ("ts", "level", "event")
# Libraries that are chatty at our own level.
_QUIET = ("libp2p", "hypercorn", "httpx", "httpcore", "urllib3", "transformers", "asyncio", "multiaddr", "async_service")


def configure_logging(level: str, form: str) -> None:
    """Send our own and every library's log to stderr. `form`: "text", "json", or "auto" (text if stderr is a terminal)."""
    text = form == "text" or (form == "auto" and sys.stderr.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
    ]
    render: list[Processor] = (
        [structlog.dev.ConsoleRenderer(timestamp_key="ts", colors=sys.stderr.isatty())]
        if text
        else [structlog.processors.format_exc_info, _order, structlog.processors.JSONRenderer(default=str)]
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(level.upper()),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render]
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def _order(logger: WrappedLogger, method: str, fields: EventDict) -> EventDict:
    return {key: fields[key] for key in _FIRST if key in fields} | dict(fields)
