from __future__ import annotations

import tomllib
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus.core.errors import UsageError
from nexus.core.keys import Identity
from nexus.network.relaying import relay_limits
from nexus_config import settings
from nexus_config.settings import check_multiaddr, control_socket, default_home, default_text, load, node_options, parse_size

PEER = Identity(b"\1" * 32).peer_id


def write(home: Path, text: str) -> Path:
    (home / "config.toml").write_text(text, "utf-8")
    return home


def test_every_setting_has_a_default_and_every_default_a_setting(tmp_path: Path) -> None:
    document = tomllib.loads(default_text())
    assert tuple(f"{section}.{key}" for section, entries in document.items() for key in entries) == settings.setting_names()
    _, origins = load({}, {}, tmp_path)
    assert origins == dict.fromkeys(settings.setting_names(), "default")


def test_every_default_has_a_comment() -> None:
    before = ""
    for line in default_text().splitlines():
        if "=" in line and not line.startswith("#"):
            assert before.startswith("#"), line
        before = line


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    home = write(tmp_path, '[node]\nname = "file"\n[log]\nlevel = "error"\n[network]\nmdns = false\n')
    environ = {"NEXUS_NODE_NAME": "environment", "NEXUS_LOG_LEVEL": "warning"}
    found, origins = load({"node.name": "flag"}, environ, home)
    assert (found.node.name, found.log.level, found.network.mdns, found.log.format) == ("flag", "warning", False, "auto")
    assert origins["node.name"] == "flag"
    assert origins["log.level"] == "environment NEXUS_LOG_LEVEL"
    assert origins["network.mdns"] == f"file {home / 'config.toml'}"
    assert origins["log.format"] == "default"


def test_text_of_the_environment_becomes_every_type(tmp_path: Path) -> None:
    environ = {
        "NEXUS_NETWORK_LISTEN": "/ip4/127.0.0.1/tcp/1, /ip6/::1/tcp/2",
        "NEXUS_NETWORK_MDNS": "no",
        "NEXUS_SERVE_MEMORY_MAX_BYTES": "4GiB",
        "NEXUS_SERVE_SESSIONS_MAX": "3",
        "NEXUS_CONTROL_DRAIN_TIMEOUT_S": "1.5",
        "NEXUS_NETWORK_BOOTSTRAP": "",
    }
    found, _ = load({}, environ, tmp_path)
    assert found.network.listen == ("/ip4/127.0.0.1/tcp/1", "/ip6/::1/tcp/2")
    assert (found.network.mdns, found.network.bootstrap) == (False, ())
    assert (found.serve.memory_max_bytes, found.serve.sessions_max, found.control.drain_timeout_s) == (4 << 30, 3, 1.5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[nodes]\n", r"no section \[nodes\].*Did you mean node\?"),
        ('[node]\nnmae = "x"\n', r"no setting node\.nmae.*Did you mean node\.name\?"),
        ("[node]\nname = 5\n", r"node\.name = 5 .*expected text.*Correct node\.name in .*config\.toml"),
        ("node = 5\n", r"node is a section"),
        ('[network]\nmdns = "maybe"\n', "expected true or false"),
        ('[network]\nlisten = ["/ip4/1.2.3.4/udp/5"]\n', "expected an address such as"),
        ('[network]\nlisten = ["/ip4/1.2.3.400/tcp/5"]\n', "1.2.3.400"),
        ('[network]\nlisten = ["/ip4/1.2.3.4/tcp/70000"]\n', "above 65535"),
        ('[network]\nbootstrap = ["/ip4/1.2.3.4/tcp/5"]\n', "p2p/12D3KooW"),
        ('[network]\nbootstrap = ["/ip4/1.2.3.4/tcp/5/p2p/12D3KooWrong"]\n', "peer"),
        ('[network]\ndht = "yes"\n', 'expected one of "server", "client"'),
        ("[serve]\nsessions_max = 0\n", "from 1 to 4096"),
        ("[serve]\nsessions_max = true\n", "from 1 to 4096"),
        ('[serve]\ndisk_max_bytes = "lots"\n', "expected a size"),
        ("[serve]\ndisk_max_bytes = 5\n", "1MiB"),
        ("[control]\ndrain_timeout_s = nan\n", "expected seconds"),
        ("[engine]\nthreads = 0\n", "from 1 to 1024"),
        ("[node\n", "is not TOML"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_place_and_fix(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){says}") as caught:
        load({}, {}, write(tmp_path, text))
    assert "config.toml" in str(caught.value)
    assert caught.value.fix


def test_a_file_that_is_not_text_or_too_long(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_bytes(b"\xff\xfe\0")
    with pytest.raises(UsageError, match="UTF-8"):
        load({}, {}, tmp_path)
    (tmp_path / "config.toml").write_bytes(b"#" * (settings.CONFIG_BYTES_MAX + 1))
    with pytest.raises(UsageError, match="larger"):
        load({}, {}, tmp_path)


def test_a_misspelt_variable_is_an_error_and_another_products_is_not(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="NEXUS_NETWORK_LISTN"):
        load({}, {"NEXUS_NETWORK_LISTN": "x"}, tmp_path)
    load({}, {"NEXUS_USER": "x", "NEXUS_CONTEXT_PATH": "/", "NEXUS_HOME": "/x", "NEXUS_NODE": "x"}, tmp_path)


def test_an_unknown_flag_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"network\.mdsn.*Did you mean network\.mdns"):
        load({"network.mdsn": "x"}, {}, tmp_path)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1 << 20, 1 << 20),
        ("1048576", 1 << 20),
        ("512MiB", 512 << 20),
        ("4 GB", 4 * 10**9),
        ("4G", 4 << 30),
        ("1.5gib", 3 << 29),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@given(st.one_of(st.text(max_size=20), st.integers(), st.floats(), st.booleans(), st.none(), st.lists(st.integers())))
def test_any_size_is_in_range_or_refused(raw: object) -> None:
    with suppress(ValueError):
        assert 1 << 20 <= parse_size(raw) <= 1 << 50


@given(st.text(max_size=60), st.booleans())
def test_text_that_is_no_address_is_refused(text: str, with_peer: bool) -> None:
    with pytest.raises(ValueError, match="expected an address"):
        check_multiaddr(text, with_peer=with_peer)


def test_addresses() -> None:
    for address in ("/ip4/0.0.0.0/tcp/0", "/ip6/::/tcp/4510", "/dns4/example.org/tcp/1", "/dns/node/tcp/65535"):
        assert check_multiaddr(address, with_peer=False) == address
        assert check_multiaddr(f"{address}/p2p/{PEER}", with_peer=True)
        with pytest.raises(ValueError, match="expected an address"):
            check_multiaddr(f"{address}/p2p/{PEER}", with_peer=False)


def test_automatic_values_are_worked_out(tmp_path: Path) -> None:
    options = node_options(load({}, {}, tmp_path)[0], tmp_path)
    assert options.name
    assert options.threads >= 1
    assert 0 < options.memory_max_bytes <= settings.machine_memory_bytes() // 2
    fixed = node_options(
        load({"serve.memory_max_bytes": "2GiB", "engine.threads": "3", "node.name": "n"}, {}, tmp_path)[0], tmp_path
    )
    assert (fixed.memory_max_bytes, fixed.threads, fixed.name, fixed.home) == (2 << 30, 3, "n", tmp_path)


def test_the_home_is_nexus_home_or_a_standard_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_home({"NEXUS_HOME": str(tmp_path)}) == tmp_path
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert default_home({}).name == "nexus"


def test_a_socket_path_that_cannot_be_is_refused(tmp_path: Path) -> None:
    found, _ = load({}, {}, tmp_path)
    assert control_socket(found, Path("/home")) == Path("/home/control.sock")
    with pytest.raises(UsageError, match="longer than"):
        control_socket(found, Path("/" + "x" * 100))
    relative, _ = load({"control.socket": "here.sock"}, {}, tmp_path)
    with pytest.raises(UsageError, match="absolute"):
        control_socket(relative, tmp_path)


@pytest.mark.parametrize(("raw", "rate"), [("0", 0), ("10MiB", 10 << 20), ("65536", 65536)])
def test_a_rate_is_bytes_per_second_or_no_limit(tmp_path: Path, raw: str, rate: int) -> None:
    settings, _ = load({"network.upload_max": raw, "network.download_max": 0}, {}, tmp_path)
    assert node_options(settings, tmp_path).upload_max == rate
    assert node_options(settings, tmp_path).download_max == 0


@pytest.mark.parametrize("raw", ["-1", "10", "fast", 1000, True, False])
def test_what_is_no_rate_is_refused_with_the_form(tmp_path: Path, raw: object) -> None:
    with pytest.raises(UsageError, match="bytes per second"):
        load({"network.upload_max": raw}, {}, tmp_path)


RELAY = Identity(b"\7" * 32).peer_id


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (f"/ip4/192.0.2.1/tcp/4510/p2p/{RELAY}/p2p-circuit/p2p/{PEER}", True),
        (f"/ip4/192.0.2.1/tcp/4510/p2p/{RELAY}/p2p-circuit", False),
        (f"/ip4/192.0.2.1/tcp/4510/p2p-circuit/p2p/{PEER}", False),
        (f"/ip4/192.0.2.1/tcp/99999/p2p/{RELAY}/p2p-circuit/p2p/{PEER}", False),
        (f"/ip4/192.0.2.1/tcp/4510/p2p/{RELAY}/p2p-circuit/p2p/Qm123", False),
    ],
)
def test_a_peer_behind_a_relay_can_be_named(text: str, good: bool) -> None:
    with nullcontext() if good else pytest.raises(ValueError, match=r"expected|port|peer"):
        assert check_multiaddr(text, with_peer=True) == text
    with pytest.raises(ValueError, match="expected"):
        check_multiaddr(text, with_peer=False)


def test_being_a_relay_is_a_choice_with_limits(tmp_path: Path) -> None:
    assert node_options(load({}, {}, tmp_path)[0], tmp_path).relay is None
    flags = {"network.relay": "on", "network.relay_circuit_bytes": "64MiB", "network.relay_peer_rate": 0}
    relay = node_options(load(flags, {}, tmp_path)[0], tmp_path).relay
    assert relay is not None
    assert (relay.reservations, relay.circuits, relay.circuit_bytes, relay.circuit_s) == (128, 64, 64 << 20, 3600.0)
    assert relay.bytes_per_peer_s >= 1 << 40  # no limit
    limits = relay_limits(**asdict(relay))
    assert (limits.reservations_per_ip, limits.circuits_per_peer, limits.circuits_per_ip) == (16, 16, 32)
