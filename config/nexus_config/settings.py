"""Settings: typed, validated, each with its origin. Defaults live in `default.toml` and nowhere else."""

from __future__ import annotations

import dataclasses
import ipaddress
import math
import os
import re
import socket
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import platformdirs

from nexus.core.audits import MODES
from nexus.core.errors import LocalError, NexusError, UsageError
from nexus.core.keys import parse_peer_id
from nexus.node.options import AuditOptions, LedgerOptions, MemoryOptions, NodeOptions, RelayOptions
from nexus.proof.accounts import AMOUNT_MAX
from nexus.proof.audit import CELLS_MAX
from nexus.swarm.ledger import PRICE_MAX

ENVIRONMENT_PREFIX = "NEXUS_"
CONFIG_BYTES_MAX = 1 << 20
# Linux's sockaddr_un holds 108 bytes with the final zero, macOS 104; the smaller one keeps a directory portable.
SOCKET_PATH_BYTES_MAX = 103

# A chunk of a fragment is 1 MiB, and is given up when it takes longer than 30 s.
RATE_MIN = 64 * 1024

NO_LIMIT = 1 << 50  # bytes per second

# What TOML, the environment or a flag may hand over.
Raw = object
Parse = Callable[[Raw], Any]


def _text(most: int) -> Parse:
    def parse(raw: Raw) -> str:
        if not isinstance(raw, str) or len(raw.encode("utf-8", "replace")) > most or "\0" in raw:
            raise ValueError(f"expected text of at most {most} bytes")
        return raw

    return parse


def _printable(most: int) -> Parse:
    text = _text(most)

    def parse(raw: Raw) -> str:
        name: str = text(raw)
        if not name.isprintable():
            raise ValueError("expected text without control characters, in UTF-8")
        return name

    return parse


def _choice(*words: str) -> Parse:
    def parse(raw: Raw) -> str:
        if not isinstance(raw, str) or raw not in words:
            raise ValueError("expected one of " + ", ".join(f'"{word}"' for word in words))
        return raw

    return parse


def _boolean(raw: Raw) -> bool:
    if isinstance(raw, bool):
        return raw
    if isinstance(raw, str) and raw.lower() in ("true", "1", "yes", "on"):
        return True
    if isinstance(raw, str) and raw.lower() in ("false", "0", "no", "off"):
        return False
    raise ValueError("expected true or false")


def _integer(least: int, most: int) -> Parse:
    def parse(raw: Raw) -> int:
        number = int(raw) if isinstance(raw, str) and re.fullmatch(r"-?[0-9]{1,18}", raw) else raw
        if not isinstance(number, int) or isinstance(number, bool) or not least <= number <= most:
            raise ValueError(f"expected a whole number from {least} to {most}")
        return number

    return parse


def _seconds(most: float) -> Parse:
    def parse(raw: Raw) -> float:
        try:
            number = float(raw) if isinstance(raw, (str, int, float)) and not isinstance(raw, bool) else math.nan
        except ValueError:
            number = math.nan
        if not 0 <= number <= most:
            raise ValueError(f"expected seconds from 0 to {most:g}")
        return number

    return parse


def _share(raw: Raw) -> float:
    try:
        number = float(raw) if isinstance(raw, (str, int, float)) and not isinstance(raw, bool) else math.nan
    except ValueError:
        number = math.nan
    if not 0 <= number <= 1:
        raise ValueError("expected a share from 0 to 1")
    return number


def _place(raw: Raw) -> str:
    if raw != "" and (not isinstance(raw, str) or place_of(raw) is None):
        raise ValueError('expected "latitude,longitude" in degrees, such as "52.5,13.4", or ""')
    return raw


def place_of(text: str) -> tuple[float, float] | None:
    """Latitude and longitude of `memory.place`; None for "" and for what is no place."""
    match = re.fullmatch(r"\s*(-?[0-9]{1,2}(?:\.[0-9]{1,9})?)\s*,\s*(-?[0-9]{1,3}(?:\.[0-9]{1,9})?)\s*", text)
    if match is None:
        return None
    latitude, longitude = float(match.group(1)), float(match.group(2))
    return (latitude, longitude) if -90 <= latitude <= 90 and -180 <= longitude <= 180 else None


def _place_step(raw: Raw) -> float:
    try:
        step = float(raw) if isinstance(raw, (str, int, float)) and not isinstance(raw, bool) else math.nan
    except ValueError:
        step = math.nan
    hundredths = round(step * 100) if math.isfinite(step) else 0
    if not 10 <= hundredths <= 1000 or 18_000 % hundredths or not math.isclose(step * 100, hundredths):
        raise ValueError("expected degrees from 0.1 to 10 that divide 180, such as 0.5, 1 or 5")
    return step


_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024), ("", 1024))
}


def parse_size(raw: Raw, least: int = 1 << 20) -> int:
    """Bytes from a number, "1048576", "512MiB", "4 GB" or "4G" (binary). Raises ValueError."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)\s*([a-z]*)", raw.strip().lower()) if isinstance(raw, str) else None
    if match is not None and match.group(2) in _UNITS:
        size = (
            int(float(match.group(1)) * _UNITS[match.group(2)])
            if "." in match.group(1)
            else int(match.group(1)) * _UNITS[match.group(2)]
        )
    elif isinstance(raw, int) and not isinstance(raw, bool):
        size = raw
    else:
        raise ValueError('expected a size such as 1048576, "512MiB" or "4GiB"')
    if not least <= size <= 1 << 50:
        raise ValueError("expected a size from 1MiB to 1024TiB")
    return size


def _rate(raw: Raw) -> int:
    """Bytes per second, 0 for no limit. Raises ValueError."""
    if raw in (0, "0") and not isinstance(raw, bool):
        return 0
    try:
        rate = parse_size(raw, least=RATE_MIN)
    except ValueError:
        raise ValueError('expected bytes per second, at least 64KiB, such as "10MiB", or 0 for no limit') from None
    return rate


def _auto(parse: Parse) -> Parse:
    """None for "auto", which is worked out on the machine."""
    return lambda raw: None if raw == "auto" else parse(raw)


def _list(parse: Parse, most: int) -> Parse:
    def parse_all(raw: Raw) -> tuple[Any, ...]:
        entries = [entry.strip() for entry in raw.split(",") if entry.strip()] if isinstance(raw, str) else raw
        if not isinstance(entries, list) or len(entries) > most:
            raise ValueError(f"expected a list of at most {most}")
        return tuple(parse(entry) for entry in entries)

    return parse_all


_MULTIADDR = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/([^/]{1,253})/tcp/([0-9]{1,5})(?:/p2p/([^/]+))?")


_CIRCUIT = "/p2p-circuit/p2p/"


def check_multiaddr(raw: Raw, *, with_peer: bool) -> str:
    """A TCP multiaddr, ending in /p2p/<peer id> or not as `with_peer` says. Raises ValueError."""
    form = "/ip4/192.0.2.1/tcp/4510/p2p/12D3KooW..." if with_peer else "/ip4/0.0.0.0/tcp/4510"
    if with_peer and isinstance(raw, str) and _CIRCUIT in raw:
        # A peer behind a relay: the relay's own address, and after it the peer.
        relay, _, peer_id = raw.partition(_CIRCUIT)
        check_multiaddr(relay, with_peer=True)
        check_multiaddr(f"/ip4/192.0.2.1/tcp/1/p2p/{peer_id}", with_peer=True)
        return raw
    match = _MULTIADDR.fullmatch(raw) if isinstance(raw, str) else None
    if match is None or not isinstance(raw, str) or (match.group(4) is not None) != with_peer:
        raise ValueError(f"expected an address such as {form}")
    kind, host, port, peer = match.groups()
    if kind == "ip4":
        ipaddress.IPv4Address(host)
    elif kind == "ip6":
        ipaddress.IPv6Address(host)
    if int(port) > 65535:
        raise ValueError(f"port {port} is above 65535")
    if peer is not None:
        try:
            parse_peer_id(peer)
        except NexusError as error:
            raise ValueError(error.cause) from error
    return raw


def _listen_address(raw: Raw) -> str:
    return check_multiaddr(raw, with_peer=False)


def _peer_address(raw: Raw) -> str:
    return check_multiaddr(raw, with_peer=True)


def _peer_id(raw: Raw) -> str:
    try:
        return parse_peer_id(raw if isinstance(raw, str) else "")
    except NexusError as error:
        raise ValueError(error.cause) from error


def _setting(parse: Parse) -> Any:
    return dataclasses.field(metadata={"parse": parse})


@dataclass(frozen=True, slots=True)
class NodeSettings:
    name: str = _setting(_printable(64))


@dataclass(frozen=True, slots=True)
class NetworkSettings:
    listen: tuple[str, ...] = _setting(_list(_listen_address, 16))
    bootstrap: tuple[str, ...] = _setting(_list(_peer_address, 64))
    mdns: bool = _setting(_boolean)
    dht: str = _setting(_choice("server", "client"))
    announce: tuple[str, ...] = _setting(_list(_listen_address, 4))
    relay: str = _setting(_choice("off", "on"))
    relay_reservations: int = _setting(_integer(1, 4096))
    relay_circuits: int = _setting(_integer(1, 256))
    relay_circuit_bytes: int = _setting(parse_size)
    relay_circuit_s: float = _setting(_seconds(86_400))
    relay_peer_rate: int = _setting(_rate)
    fast_path: bool = _setting(_boolean)
    fast_path_port: int = _setting(_integer(0, 65535))
    upload_max: int = _setting(_rate)
    download_max: int = _setting(_rate)


@dataclass(frozen=True, slots=True)
class ControlSettings:
    socket: str = _setting(_text(4096))
    drain_timeout_s: float = _setting(_seconds(3600))


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """`memory_max_bytes` None: half of the machine's. `replicas` None: two, and three where nodes are idle."""

    enabled: bool = _setting(_boolean)
    memory_max_bytes: int | None = _setting(_auto(parse_size))
    disk_max_bytes: int = _setting(parse_size)
    sessions_max: int = _setting(_integer(1, 4096))
    auto_fetch: bool = _setting(_boolean)
    replicas: int | None = _setting(_auto(_integer(1, 16)))


@dataclass(frozen=True, slots=True)
class AuditSettings:
    policy: str = _setting(_choice(*MODES))
    rate: float = _setting(_share)
    probation_sessions: int = _setting(_integer(0, 1_000_000))
    cells: int = _setting(_integer(1, CELLS_MAX))
    canary_every_s: float = _setting(_seconds(30 * 86400))
    timeout_s: float = _setting(_seconds(3600))
    keep_max_bytes: int = _setting(parse_size)
    keep_s: float = _setting(_seconds(365 * 86400))


@dataclass(frozen=True, slots=True)
class LedgerSettings:
    price_per_token: int = _setting(_integer(0, PRICE_MAX))
    credit_max: int = _setting(_integer(0, AMOUNT_MAX))
    price_max: int = _setting(_integer(0, PRICE_MAX))
    burn_max: int = _setting(_integer(1, 65_536))
    burn_window_s: float = _setting(_seconds(30 * 86400))


@dataclass(frozen=True, slots=True)
class MemorySettings:
    enabled: bool = _setting(_boolean)
    model: str = _setting(_printable(4096))
    disk_max_bytes: int = _setting(parse_size)
    author_max_bytes: int = _setting(parse_size)
    place: str = _setting(_place)
    place_step: float = _setting(_place_step)
    witness_every_s: float = _setting(_seconds(86400))
    witnesses: int = _setting(_integer(1, 8))
    trusted_witnesses: tuple[str, ...] = _setting(_list(_peer_id, 64))
    blocks_per_peer_s: int = _setting(_integer(1, 1_000_000))


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """`threads` None: as many as this process has cores."""

    threads: int | None = _setting(_auto(_integer(1, 1024)))


@dataclass(frozen=True, slots=True)
class LogSettings:
    level: str = _setting(_choice("debug", "info", "warning", "error"))
    format: str = _setting(_choice("auto", "text", "json"))


@dataclass(frozen=True, slots=True)
class Settings:
    """All sections of `default.toml`, which documents each key."""

    node: NodeSettings
    network: NetworkSettings
    control: ControlSettings
    serve: ServeSettings
    audit: AuditSettings
    ledger: LedgerSettings
    memory: MemorySettings
    engine: EngineSettings
    log: LogSettings


_SECTIONS: dict[str, type] = {
    "node": NodeSettings,
    "network": NetworkSettings,
    "control": ControlSettings,
    "serve": ServeSettings,
    "audit": AuditSettings,
    "ledger": LedgerSettings,
    "memory": MemorySettings,
    "engine": EngineSettings,
    "log": LogSettings,
}
_PARSERS: dict[str, Parse] = {
    f"{section}.{field.name}": field.metadata["parse"] for section, kind in _SECTIONS.items() for field in dataclasses.fields(kind)
}


def setting_names() -> tuple[str, ...]:
    """Every key as "section.key", in the order of `default.toml`."""
    return tuple(_PARSERS)


def default_text() -> str:
    """The text of `default.toml`, comments and all."""
    return (resources.files("nexus_config") / "default.toml").read_text("utf-8")


def default_home(environ: Mapping[str, str]) -> Path:
    """NEXUS_HOME, or the user's data directory by the XDG rules (or what stands for them on this system)."""
    given = environ.get("NEXUS_HOME", "")
    return Path(given).expanduser().absolute() if given else Path(platformdirs.user_data_path("nexus"))


def load(flags: Mapping[str, object], environ: Mapping[str, str], home: Path) -> tuple[Settings, dict[str, str]]:
    """The settings and, per key, where each came from: flag > environment > `home`/config.toml > default.

    `flags`: by "section.key". Raises UsageError for what is unknown or of the wrong form, naming its place, its key and the fix.
    """
    file = home / "config.toml"
    raw: dict[str, tuple[Raw, str]] = {key: (value, "default") for key, value in _flatten(default_text(), "default.toml").items()}
    for key, value in _flatten(_read(file), str(file)).items():
        raw[key] = (value, f"file {file}")
    for key, name in ((key, environment_name(key)) for key in _PARSERS):
        if name in environ:
            raw[key] = (environ[name], f"environment {name}")
    _refuse_unknown_environment(environ)
    for key, value in flags.items():
        if key not in _PARSERS:
            raise UsageError(f"there is no setting {key!r}", _suggest(key))
        raw[key] = (value, "flag")
    parsed: dict[str, Any] = {}
    for key, parse in _PARSERS.items():
        value, origin = raw[key]
        try:
            parsed[key] = parse(value)
        except ValueError as error:
            raise UsageError(f"{key} = {value!r} (from {origin}) is not valid: {error}", _fix(key, origin)) from error
    sections = {
        section: kind(**{field.name: parsed[f"{section}.{field.name}"] for field in dataclasses.fields(kind)})
        for section, kind in _SECTIONS.items()
    }
    return Settings(**sections), {key: raw[key][1] for key in _PARSERS}


def environment_name(key: str) -> str:
    """NEXUS_NETWORK_LISTEN for "network.listen"."""
    return ENVIRONMENT_PREFIX + key.replace(".", "_").upper()


def _read(file: Path) -> str:
    try:
        if not file.exists():
            return ""
        with file.open("rb") as stream:
            content = stream.read(CONFIG_BYTES_MAX + 1)
        if len(content) > CONFIG_BYTES_MAX:
            raise UsageError(f"{file} is larger than {CONFIG_BYTES_MAX} bytes", "Keep only settings in it")
        return content.decode("utf-8")
    except OSError as error:
        raise LocalError(f"cannot read {file}: {error.strerror}", "Make it readable for you") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 text", "Write it anew with: nexus config show > config.toml") from error


def _flatten(text: str, place: str) -> dict[str, Raw]:
    """{"section.key": value} of a TOML text. Raises UsageError for keys that are not settings."""
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{place} is not TOML: {error}", "Correct that line; docs/configuration.md shows the form") from error
    flat: dict[str, Raw] = {}
    for section, entries in document.items():
        if section not in _SECTIONS:
            raise UsageError(f"{place}: there is no section [{section}]", _suggest(section))
        if not isinstance(entries, dict):
            raise UsageError(f"{place}: {section} is a section", f"Write it as [{section}] with its keys below")
        for key, value in entries.items():
            if f"{section}.{key}" not in _PARSERS:
                raise UsageError(f"{place}: there is no setting {section}.{key}", _suggest(f"{section}.{key}"))
            flat[f"{section}.{key}"] = value
    return flat


def _refuse_unknown_environment(environ: Mapping[str, str]) -> None:
    """A misspelt NEXUS_NETWORK_... is an error; NEXUS_ variables of other software (another product has this name) are not ours."""
    known = {environment_name(key) for key in _PARSERS}
    for name in sorted(environ):
        section = name.removeprefix(ENVIRONMENT_PREFIX).split("_")[0].lower()
        if name.startswith(ENVIRONMENT_PREFIX) and name.count("_") > 1 and section in _SECTIONS and name not in known:
            raise UsageError(f"the environment variable {name} is not a setting", f"Known: {', '.join(sorted(known))}")


def _suggest(key: str) -> str:
    import difflib

    close = difflib.get_close_matches(key, [*_PARSERS, *_SECTIONS], n=1)
    return (f"Did you mean {close[0]}? " if close else "") + "docs/configuration.md lists every setting"


def _fix(key: str, origin: str) -> str:
    where = {"flag": "Correct the flag", "default": "Reinstall: a default is broken"}.get(origin)
    return f"{where or 'Correct ' + key + ' in ' + origin.split(' ', 1)[1]}; docs/configuration.md explains {key}"


def control_socket(settings: Settings, home: Path) -> Path:
    """The control API's socket. Raises UsageError for a path that no Unix socket can have."""
    path = Path(settings.control.socket).expanduser() if settings.control.socket else home / "control.sock"
    if not path.is_absolute():
        raise UsageError(f"control.socket = {str(path)!r} is not an absolute path", "Start it with /")
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES_MAX:
        raise UsageError(
            f"the socket path {path} is longer than {SOCKET_PATH_BYTES_MAX} bytes, more than a Unix socket takes",
            "Set control.socket to a shorter path, or use a shorter --home",
        )
    return path


def node_options(settings: Settings, home: Path) -> NodeOptions:
    """What `nexus.node.node.open_node` takes, with everything that is automatic worked out for this machine."""
    return NodeOptions(
        home=home,
        name=settings.node.name or _host_name(),
        listen=settings.network.listen,
        bootstrap=settings.network.bootstrap,
        mdns=settings.network.mdns,
        dht=settings.network.dht,
        relay=_relay_options(settings.network),
        announce=settings.network.announce,
        fast_path=settings.network.fast_path,
        fast_path_port=settings.network.fast_path_port,
        upload_max=settings.network.upload_max,
        download_max=settings.network.download_max,
        serve=settings.serve.enabled,
        memory_max_bytes=settings.serve.memory_max_bytes or machine_memory_bytes() // 2,
        disk_max_bytes=settings.serve.disk_max_bytes,
        sessions_max=settings.serve.sessions_max,
        auto_fetch=settings.serve.auto_fetch,
        replicas=settings.serve.replicas,
        audit=AuditOptions(**dataclasses.asdict(settings.audit)),
        ledger=LedgerOptions(**dataclasses.asdict(settings.ledger)),
        memory=MemoryOptions(**(dataclasses.asdict(settings.memory) | {"place": place_of(settings.memory.place)})),
        threads=settings.engine.threads or core_count(),
    )


def _relay_options(network: NetworkSettings) -> RelayOptions | None:
    if network.relay == "off":
        return None
    return RelayOptions(
        reservations=network.relay_reservations,
        circuits=network.relay_circuits,
        circuit_bytes=network.relay_circuit_bytes,
        circuit_s=network.relay_circuit_s,
        bytes_per_peer_s=network.relay_peer_rate or NO_LIMIT,
    )


def _host_name() -> str:
    return socket.gethostname().split(".")[0][:64] or "node"


def core_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_memory_bytes() -> int:
    """Physical memory, or what the container allows where that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text("ascii").strip()
    except OSError:
        return physical
    return min(physical, int(limit)) if limit.isdigit() else physical
