"""What a node is told when it is opened: already validated, no defaults (those live in `nexus_config/default.toml` alone)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class AuditOptions:
    """How answers are checked: see `[audit]` in `default.toml`, which says what each means."""

    policy: str
    rate: float
    probation_sessions: int
    cells: int
    canary_every_s: float
    timeout_s: float
    keep_max_bytes: int
    keep_s: float


@dataclass(frozen=True, slots=True)
class LedgerOptions:
    """What work costs and when burning pauses: see `[ledger]` in `default.toml`, which says what each means."""

    price_per_token: int
    credit_max: int
    burn_max: int
    burn_window_s: float
    price_max: int


@dataclass(frozen=True, slots=True)
class MemoryOptions:
    """The shared memory: see `[memory]` in `default.toml`, which says what each means. `place`: latitude and longitude."""

    enabled: bool
    model: str
    disk_max_bytes: int
    author_max_bytes: int
    place: tuple[float, float] | None
    place_step: float
    witness_every_s: float
    witnesses: int
    trusted_witnesses: tuple[str, ...]
    blocks_per_peer_s: int


@dataclass(frozen=True, slots=True)
class RelayOptions:
    """What this node lends to others as a relay: see `[network]` in `default.toml`, which says what each means."""

    reservations: int
    circuits: int
    circuit_bytes: int
    circuit_s: float
    bytes_per_peer_s: int


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """Everything that `open_node` needs to know.

    `home`: the data directory (mode 0700, see `nexus.storage.home`), already locked by the caller.
    `listen`: multiaddrs without /p2p; `bootstrap`: multiaddrs that end in /p2p/<peer id>.
    `dht`: "server" or "client". `relay`: None: be no relay. `announce`: more multiaddrs at which others reach this node.
    `fast_path_port`: 0 for any free one. `upload_max`, `download_max`: of fragments, bytes per second
    over all peers, 0 for no limit. `serve`: whether this node takes stages for others.
    `memory_max_bytes`: weights and KV caches together. `disk_max_bytes`: everything under `models/`; never 0, already resolved.
    `sessions_max`: sessions at once, own and served. `auto_fetch`: fetch fragments that a plan asks of this node.
    `replicas`: how many nodes each layer of a model that is served should be on, None: as many as the swarm allows.
    `threads`: of the engine; at least 1, already resolved.
    """

    home: Path
    name: str
    listen: tuple[str, ...]
    bootstrap: tuple[str, ...]
    mdns: bool
    dht: str
    relay: RelayOptions | None
    announce: tuple[str, ...]
    fast_path: bool
    fast_path_port: int
    upload_max: int
    download_max: int
    serve: bool
    memory_max_bytes: int
    disk_max_bytes: int
    sessions_max: int
    auto_fetch: bool
    replicas: int | None
    audit: AuditOptions
    ledger: LedgerOptions
    memory: MemoryOptions
    threads: int
