"""`nexus sky`: the sky on screen, and time and place from a signature."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from nexus.memory.sky.place import Cell
from nexus.memory.sky.stamp import SIGNATURE_BYTES, STAMP_BYTES
from nexus.storage.home import Home
from nexus.storage.sky_tables import load_sky_kernel
from nexus_cli.sky import Seen, chart, time_text
from tests.cli.conftest import Cli

pytestmark = pytest.mark.usefixtures("home")

AT, T_MS, PLACE = "1987-02-03T04:05:06.789Z", 539_323_506_789, "-33.9,18.4"
CELL = Cell.of(-33.9, 18.4)


def stamp_bytes() -> bytes:
    return load_sky_kernel().stamps([T_MS], [CELL])[0].to_bytes()


def test_the_sky_that_a_block_would_sign(cli: Cli) -> None:
    value = cli("sky", "show", "--at", AT, "--place", PLACE, "--json").json["sky"]
    assert (value["t_ms"], value["time"]) == (T_MS, "1987-02-03 04:05:06.789")
    assert value["stamp"] == stamp_bytes().hex()
    assert value["stamp"] == value["model"] + CELL.to_bytes().hex() + value["signature"]
    assert (value["cell"]["latitude"], value["cell"]["longitude"], value["cell"]["degrees"]) == (-33.5, 18.5, 1)
    for body in value["bodies"]:
        azimuth, altitude = math.radians(body["azimuth"]), math.radians(body["altitude"])
        assert abs(math.cos(altitude) * math.sin(azimuth) * 1e9 - body["east"]) < 2
        assert abs(math.cos(altitude) * math.cos(azimuth) * 1e9 - body["north"]) < 2
        assert abs(math.sin(altitude) * 1e9 - body["up"]) < 2


def test_the_sun_at_noon_on_the_equator(cli: Cli) -> None:
    # Noon of the equinox of 2024, in the middle of the cell at 0.5 N, 0.5 E.
    sun = cli("sky", "show", "--at", "2024-03-20T12:05:00+00:00", "--place", "0.5,0.5", "--json").json["sky"]["bodies"][0]
    assert sun["body"] == "Sun"
    assert sun["altitude"] > 89
    result = cli("sky", "show", "--at", "2024-03-20T13:05:00+01:00", "--place", "0.5,0.5")
    assert result.code == 0
    assert result.err == ""
    lines = result.out.splitlines()
    assert lines[1] == "cell   1 degree around 0.5 N, 0.5 E"
    assert "Su" in lines[15]  # the middle of the chart
    for shown in ("Mercury", "altitude", "below the horizon", "stamp "):
        assert shown in result.out


def test_the_place_and_the_cell_of_the_settings(cli: Cli, home: Home) -> None:
    home.config_file.write_text('[memory]\nplace = "-33.9,18.4"\nplace_step = 0.5\n')
    result = cli("sky", "show", "--json")
    assert result.err == ""
    cell = result.json["sky"]["cell"]
    assert (cell["degrees"], cell["latitude"], cell["longitude"]) == (0.5, -33.75, 18.25)
    cell = cli("sky", "show", "--place", "50.1,8.7", "--cell", "1", "--json").json["sky"]["cell"]
    assert (cell["degrees"], cell["latitude"], cell["longitude"]) == (1, 50.5, 8.5)


def test_now_and_null_island_unless_told_otherwise(cli: Cli) -> None:
    result = cli("sky", "show", "--json")
    assert "0 N, 0 E" in result.err
    assert result.json["sky"]["cell"]["latitude"] == 0.5
    assert result.json["sky"]["t_ms"] > 1_700_000_000_000


def test_the_size_of_the_cells(cli: Cli) -> None:
    cell = cli("sky", "show", "--place", PLACE, "--cell", "0.1", "--json").json["sky"]["cell"]
    assert (cell["degrees"], cell["latitude"], cell["longitude"]) == (0.1, -33.85, 18.45)
    for wrong in ("0.7", "0", "-1", "20", "nan", "inf", "0.001"):
        assert cli("sky", "show", "--place", PLACE, "--cell", wrong).code == 2


@pytest.mark.parametrize(
    ("option", "value", "cause"),
    [
        ("--at", "yesterday", "is no time"),
        ("--at", "", "is no time"),
        ("--at", "1899-12-31T23:59:59Z", "does not cover"),
        ("--at", "2053-10-01", "does not cover"),
        ("--at", "9999-12-31T23:59:59-23:59", "does not cover"),
        ("--at", "0001-01-01T00:00:00+23:59", "does not cover"),
        ("--place", "50", "is no place"),
        ("--place", "50,8,2", "is no place"),
        ("--place", "here", "is no place"),
        ("--place", "91,0", "no place on the Earth"),
        ("--place", "0,nan", "no place on the Earth"),
        ("--place", "", "is no place"),
    ],
)
def test_what_cannot_be_shown(cli: Cli, option: str, value: str, cause: str) -> None:
    result = cli("sky", "show", option, value, *(() if option == "--place" else ("--place", PLACE)))
    assert (result.code, result.out) == (2, "")
    assert cause in result.err
    assert "fix: " in result.err


def test_time_and_place_of_a_signature(cli: Cli, tmp_path: Path) -> None:
    stamp = stamp_bytes()
    raw, text = tmp_path / "sky.bin", tmp_path / "sky.txt"
    raw.write_bytes(stamp[-SIGNATURE_BYTES:])
    text.write_text(stamp.hex() + "\n")
    for source, stdin in (
        (stamp[-SIGNATURE_BYTES:].hex(), b""),
        (stamp.hex(), b""),
        (str(raw), b""),
        (str(text), b""),
        ("-", stamp),
        ("-", stamp.hex().encode()),
    ):
        result = cli("sky", "solve", source, "--json", stdin=stdin)
        assert result.code == 0
        fix = result.json["fix"]
        assert abs(fix["t_ms"] - T_MS) < 1
        assert abs(fix["latitude"] - -33.5) < 1e-5
        assert abs(fix["longitude"] - 18.5) < 1e-5
        assert fix["residual"] < 1.5
        assert fix.get("in_cell", True) is True
        assert fix.get("agrees", True) is True
    shown = cli("sky", "solve", stamp.hex()).out
    for expected in (
        "1987-02-03 04:05:06.789 UTC",
        "33.500000 S, 18.500000 E",
        "the place is its centre",
        "not that anybody was there",
    ):
        assert expected in shown


def test_a_stamp_whose_sky_is_elsewhere(cli: Cli) -> None:
    stamp = stamp_bytes()
    other = stamp[:8] + Cell.of(50, 8).to_bytes() + stamp[14:]
    result = cli("sky", "solve", other.hex())
    assert result.code == 7
    assert "OUTSIDE" in result.out
    assert cli("sky", "solve", other.hex(), "--json").json["fix"]["in_cell"] is False
    finer = stamp[:8] + Cell.of(-33.9, 18.4, 1000).to_bytes() + stamp[14:]
    result = cli("sky", "solve", finer.hex())
    assert result.code == 7
    assert "inside, but is not its centre" in result.out


def test_a_stamp_of_an_unknown_model(cli: Cli) -> None:
    result = cli("sky", "solve", (b"\1" * 8 + stamp_bytes()[8:]).hex())
    assert result.code == 0
    assert "0101010101010101, which is not known here" in result.out


def test_what_is_no_sky(cli: Cli, tmp_path: Path) -> None:
    for data in (bytes(SIGNATURE_BYTES), bytes(STAMP_BYTES), b"\x7f" * SIGNATURE_BYTES):
        result = cli("sky", "solve", data.hex())
        assert (result.code, result.out) == (7, "")
        assert "fix: " in result.err
    for source in ("1234", "no-such-file", "", "ü", "00" * 85):
        assert cli("sky", "solve", source).code == 2
    large = tmp_path / "large"
    large.write_bytes(bytes(5000))
    assert cli("sky", "solve", str(large)).code == 2
    assert cli("sky", "solve", "-", stdin=bytes(5000)).code == 2
    assert cli("sky", "solve", str(tmp_path)).code == 2


@pytest.mark.parametrize(
    ("azimuth", "altitude", "row", "column"), [(0, 0, 1, 24), (90, 0, 11, 44), (180, 0, 21, 24), (270, 0, 11, 4), (123, 90, 11, 24)]
)
def test_where_the_chart_puts_a_body(azimuth: float, altitude: float, row: int, column: int) -> None:
    lines = [line.plain for line in chart([Seen("Mars", azimuth, altitude, 0, 0, 0), Seen("Venus", 10, -0.1, 0, 0, 0)])]
    assert lines[row][column : column + 2] == "Ma"
    assert sum(line.count("Ma") for line in lines) == 1
    assert lines[-1] == "below the horizon: Venus"


def test_times_as_text() -> None:
    assert time_text(-1) == "1969-12-31 23:59:59.999"
    assert time_text(T_MS) == "1987-02-03 04:05:06.789"
