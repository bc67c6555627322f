"""The words for audits: how a stage is audited, and what came of it."""

from __future__ import annotations

# A few cells with small secret keys; everything computed again; two sets of nodes compared; nothing.
LIGHT, REPLICA, DUAL, OFF = "light", "replica", "dual", "off"
MODES = (LIGHT, REPLICA, DUAL, OFF)
# Of a session that is over: it cannot be run twice any more.
SESSION_MODES = (LIGHT, REPLICA)
# "mismatch": something differs, and nobody is proven to be at fault. "unaudited": not looked at, or it could not be.
# "own": computed by the auditor itself.
OK, CONVICTED, UNANSWERED, MISMATCH, UNAUDITED, OWN = "ok", "convicted", "unanswered", "mismatch", "unaudited", "own"
VERDICTS = (OK, CONVICTED, UNANSWERED, MISMATCH, UNAUDITED, OWN)
