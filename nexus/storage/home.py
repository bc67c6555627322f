"""The data directory: where a node keeps its key, its models and its lock.

<home>/                 0700
  identity.key          0600, the Ed25519 seed; whoever has it is this node
  config.toml           settings that differ from the defaults
  models/               pieces and files of models, content-addressed
  peers.json            address book
  sessions.db           receipts signed; sessions served and asked for
  audit-keys/           0600, secret keys with which layers of others are audited
  evidence.db           proofs against other nodes, and how their work went
  memory/               blocks of the shared memory, and what finds them
  fragments.db          what this node undertook to serve, and the versions of names that count here
  ledger.db             this node's account; must never be put back to an older state
  nexusd.lock           held while a daemon runs, with its pid inside
  control.sock          0600, the daemon's control API
  nexusd.log            of a detached daemon
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nexus.core.errors import LocalError, NotAllowedError, NotFoundError
from nexus.core.keys import Identity

_KEY_LINE = re.compile(r"nexus-ed25519-seed:([0-9a-f]{64})\n")


@dataclass(frozen=True, slots=True)
class Home:
    """The paths inside a data directory."""

    path: Path

    @property
    def identity_file(self) -> Path:
        return self.path / "identity.key"

    @property
    def config_file(self) -> Path:
        return self.path / "config.toml"

    @property
    def models(self) -> Path:
        return self.path / "models"

    @property
    def peers_file(self) -> Path:
        return self.path / "peers.json"

    @property
    def audit_keys(self) -> Path:
        return self.path / "audit-keys"

    @property
    def sessions_file(self) -> Path:
        return self.path / "sessions.db"

    @property
    def evidence_file(self) -> Path:
        return self.path / "evidence.db"

    @property
    def answers_file(self) -> Path:
        """Answers under way, to go on with after a crash."""
        return self.path / "answers.db"

    @property
    def ledger_file(self) -> Path:
        return self.path / "ledger.db"

    @property
    def fragments_file(self) -> Path:
        return self.path / "fragments.db"

    @property
    def memory(self) -> Path:
        return self.path / "memory"

    @property
    def lock_file(self) -> Path:
        return self.path / "nexusd.lock"

    @property
    def socket(self) -> Path:
        return self.path / "control.sock"

    @property
    def log_file(self) -> Path:
        return self.path / "nexusd.log"


def create_home(path: Path) -> Home:
    """Make the data directory and a new identity in it. Raises LocalError if one is there: no key is overwritten."""
    home = Home(path)
    if home.identity_file.exists():
        raise LocalError(f"there is a node at {path} already", "Use it as it is, or choose another directory with --home")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        home.models.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise LocalError(f"cannot make {path}: {error.strerror}", "Choose another directory with --home or NEXUS_HOME") from error
    _check_mode(path, 0o700)
    create_identity(home)
    return home


def open_home(path: Path) -> Home:
    """The data directory at `path`, if it holds a node and nobody else can read it. Raises NotFoundError, NotAllowedError."""
    home = Home(path)
    if not home.identity_file.exists():
        raise NotFoundError(f"there is no node at {path}", "Make one with: nexus init")
    _check_mode(path, 0o700)
    _check_mode(home.identity_file, 0o600)
    return home


def create_identity(home: Home) -> Identity:
    """Draw a key and store it durably before anything is signed with it. Raises LocalError if one is there."""
    seed = os.urandom(32)
    try:
        descriptor = os.open(home.identity_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except FileExistsError as error:
        raise LocalError(f"{home.identity_file} exists", "A key is never overwritten: move it away first") from error
    except OSError as error:
        raise LocalError(f"cannot write {home.identity_file}: {error.strerror}", "Make the directory writable for you") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(b"nexus-ed25519-seed:" + seed.hex().encode("ascii") + b"\n")
        file.flush()
        os.fsync(file.fileno())
    directory = os.open(home.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return Identity(seed)


def load_identity(home: Home) -> Identity:
    """The node's key. Raises NotFoundError, NotAllowedError for loose modes, LocalError for a damaged file."""
    open_home(home.path)
    try:
        text = home.identity_file.read_bytes()[:256].decode("ascii", "replace")
    except OSError as error:
        raise LocalError(f"cannot read {home.identity_file}: {error.strerror}", "Restore it from a backup") from error
    match = _KEY_LINE.fullmatch(text)
    if match is None:
        raise LocalError(f"{home.identity_file} is damaged", "Restore it from a backup, or move it away and run: nexus init")
    return Identity(bytes.fromhex(match.group(1)))


@contextmanager
def lock_home(home: Home) -> Iterator[None]:
    """Hold the data directory while the context is open; the lock file names our pid. Raises LocalError if a daemon runs here."""
    descriptor = os.open(home.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise LocalError(f"cannot lock {home.lock_file}: {error.strerror}", "Use a directory on a local disk") from error
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise LocalError(
                f"the data directory {home.path} is in use by the daemon with pid {holder}",
                "Stop it with: nexus stop, or use another directory with --home",
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
        yield
    finally:
        # Emptied, never removed: a removed lock file could be locked by one daemon while another makes a new one.
        os.close(descriptor)


def lock_holder(home: Home) -> int | None:
    """The pid of the daemon that holds the data directory, None if nobody does."""
    try:
        descriptor = os.open(home.lock_file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LocalError(f"cannot open {home.lock_file}: {error.strerror}", "Run as the user that owns it") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        text = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
        return int(text) if text.isdigit() else 0
    finally:
        os.close(descriptor)
    return None


def _check_mode(path: Path, most: int) -> None:
    try:
        info = path.stat()
    except OSError as error:
        raise LocalError(f"cannot look at {path}: {error.strerror}", "Run as the user that owns it") from error
    mode = stat.S_IMODE(info.st_mode)
    if info.st_uid != os.geteuid():
        raise NotAllowedError(f"{path} belongs to another user (uid {info.st_uid})", "Run as that user, or use another --home")
    if mode & ~most:
        raise NotAllowedError(f"{path} has mode {mode:04o}, others can get at it", f"Run: chmod {most:o} {path}")
