"""nexus sky: the sky as blocks sign it, and time and place from a signature alone. Needs no daemon."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from nexus_cli import show
from nexus_cli.options import NexusCommand, NexusGroup, Shared, pass_shared

if TYPE_CHECKING:
    from rich.text import Text

    from nexus.memory.sky.place import Cell

sky = NexusGroup(name="sky", help="The sky that blocks are signed under: show, solve.")

# How the chart names the bodies: two letters, as wide as a line is high.
_LABELS = {"Sun": "Su", "Moon": "Mo", "Mercury": "Me", "Venus": "Ve", "Mars": "Ma", "Jupiter": "Ju", "Saturn": "Sa"}
_COMPASS = ("N", "NNE", "NE", "ENE", "E", "ESE", "SE", "SSE", "S", "SSW", "SW", "WSW", "W", "WNW", "NW", "NNW")
_CHART_ROWS = 10  # from the zenith to the horizon
_FILE_BYTES_MAX = 4096


class Seen(NamedTuple):
    """A body in the sky: degrees, and direction cosines in units of 1e-9. Azimuth from north through east."""

    body: str
    azimuth: float
    altitude: float
    east: int
    north: int
    up: int


@sky.command("show", cls=NexusCommand)
@click.option("--at", metavar="TIME", help="When, in UTC, as in 2026-11-30T21:30:00Z. [default: now]")
@click.option(
    "--place",
    metavar="LAT,LON",
    help="Where, in degrees north and east, as in 50.1,8.7 or -33.9,18.4. [default: memory.place, or 0,0]",
)
@click.option(
    "--cell",
    "step_degrees",
    type=float,
    metavar="DEGREES",
    help="Side of the cell that is named instead. [default: memory.place_step]",
)
@pass_shared
def sky_show(shared: Shared, at: str | None, place: str | None, step_degrees: float | None) -> None:
    """Show the sky as a block would sign it: seven bodies as seen from the centre of the cell that the place lies in.

    The place itself goes into nothing: a signature would give it away to centimetres.
    """
    from nexus.memory.sky.place import Cell
    from nexus.storage.sky_tables import load_sky_kernel
    from nexus_config.settings import place_of

    t_ms = _parse_time(at) if at is not None else round(datetime.now(UTC).timestamp() * 1000)
    memory = shared.settings().memory
    where = place_of(memory.place) if place is None else _parse_place(place)
    if where is None:
        click.echo("neither --place nor the setting memory.place says where: this is the sky of 0 N, 0 E", err=True)
    cell = Cell.of(*(where or (0.0, 0.0)), _parse_step(memory.place_step if step_degrees is None else step_degrees))
    stamp = load_sky_kernel().stamps([t_ms], [cell])[0]
    bodies = seen_in(stamp.signature)
    if shared.json:
        show.print_json(
            {
                "sky": {
                    "time": time_text(t_ms),
                    "t_ms": t_ms,
                    "model": stamp.model.hex(),
                    "cell": _cell_json(cell),
                    "bodies": [body._asdict() for body in bodies],
                    "signature": stamp.signature.hex(),
                    "stamp": stamp.to_bytes().hex(),
                }
            }
        )
        return
    screen = show.console(shared)
    show.pairs([("time", f"{time_text(t_ms)} UTC"), ("cell", cell_text(cell)), ("model", stamp.model.hex())])
    click.echo()
    for line in chart(bodies):
        screen.print(line)
    rows = [
        (
            body.body,
            _LABELS[body.body],
            f"{body.azimuth:.3f}",
            _COMPASS[round(body.azimuth / 22.5) % 16],
            f"{body.altitude:+.3f}",
            *(f"{number:+d}" for number in (body.east, body.north, body.up)),
        )
        for body in bodies
    ]
    names = ("body", "", "azimuth", "towards", "altitude", "east", "north", "up")
    screen.print(show.table(names, rows, right=("azimuth", "altitude", "east", "north", "up")))
    click.echo("East, north and up in units of 1e-9: what is signed. Angles in degrees, without refraction.")
    click.echo(f"stamp {stamp.to_bytes().hex()}")


@sky.command("solve", cls=NexusCommand)
@click.argument("source", metavar="FILE|HEX")
@pass_shared
def sky_solve(shared: Shared, source: str) -> int:
    """Find time and place from a signature alone.

    Takes the 84 bytes of a signature or the 98 of a block's stamp: as a file, as hex text in a file or here, or on standard input
    for "-". Exit code 7 if no sky of 1900 to 2053 looks like this, or if a stamp's sky is not that of its cell.
    """
    from nexus.core.errors import MalformedError, VerificationError
    from nexus.memory.sky.sight import SightTable, solve
    from nexus.memory.sky.stamp import SKY_MODEL, STAMP_BYTES, UNITS, SkyStamp
    from nexus.storage.sky_tables import load_sky_kernel

    data = _read_signature(source)
    kernel = load_sky_kernel()
    try:
        stamp = SkyStamp.from_bytes(data) if len(data) == STAMP_BYTES else None
        fix = solve(stamp.signature if stamp else data, kernel, SightTable.build(kernel.geocentre))
    except MalformedError as error:
        raise VerificationError(f"this is no sky: {error.cause}", "It may be cut off, changed, or something else") from error
    inside = stamp.cell.holds(fix.latitude, fix.longitude) if stamp else None
    # A block's sky is that of the centre, and nothing else will do.
    agrees = bool(kernel.check_stamps([round(fix.t_ms)], [SKY_MODEL + data[len(SKY_MODEL) :]])[0]) if stamp else None
    if shared.json:
        found: dict[str, object] = {
            "time": time_text(round(fix.t_ms)),
            "t_ms": fix.t_ms,
            "latitude": fix.latitude,
            "longitude": fix.longitude,
            "residual": fix.residual,
        }
        if stamp:
            found |= {"cell": _cell_json(stamp.cell), "in_cell": inside, "agrees": agrees, "model": stamp.model.hex()}
        show.print_json({"fix": found})
    else:
        off_mas = fix.residual / UNITS * 206_264_806
        lines = [
            ("time", f"{time_text(round(fix.t_ms))} UTC"),
            ("place", f"{_degrees(fix.latitude, 'NS', 6)}, {_degrees(fix.longitude, 'EW', 6)}"),
            ("fit", f"within {fix.residual:.2f} units of 1e-9 in the worst of 21 numbers ({off_mas:.2f} milliarcseconds)"),
        ]
        if stamp:
            where = (
                "the place is its centre"
                if agrees
                else f"the place lies {'inside, but is not its centre' if inside else 'OUTSIDE'}"
            )
            lines.append(("cell", f"{cell_text(stamp.cell)}: {where}"))
            if stamp.model != SKY_MODEL:
                lines.append(("model", f"{stamp.model.hex()}, which is not known here; solved with {SKY_MODEL.hex()}"))
        show.pairs(lines)
        click.echo("It says where and when this sky is seen from, and not that anybody was there, or that it was computed then.")
    return VerificationError.exit_code if agrees is False else 0


def seen_in(signature: bytes) -> list[Seen]:
    """The bodies of a signature with their angles."""
    from math import atan2, degrees, hypot

    from nexus.memory.sky.stamp import BODIES, cosines

    return [
        Seen(body, degrees(atan2(east, north)) % 360, degrees(atan2(up, hypot(east, north))), east, north, up)
        for body, (east, north, up) in zip(BODIES, cosines(signature), strict=True)
    ]


def chart(bodies: Sequence[Seen]) -> list[Text]:
    """The half of the sky above the horizon as a disk, the zenith in the middle, north up, east to the right as on a map."""
    from math import cos, radians, sin

    from rich.text import Text

    rows, columns = 2 * _CHART_ROWS + 1, 4 * _CHART_ROWS + 2
    cells = [[" "] * columns for _ in range(rows)]
    styles: dict[tuple[int, int], str] = {}

    def at(azimuth: float, altitude: float) -> tuple[int, int]:
        out = (90 - altitude) / 90 * _CHART_ROWS
        return _CHART_ROWS - round(out * cos(radians(azimuth))), 2 * _CHART_ROWS + round(2 * out * sin(radians(azimuth)))

    for altitude, mark, every in ((0, "·", 3), (30, "·", 10), (60, "·", 20)):
        for azimuth in range(0, 360, every):
            row, column = at(azimuth, altitude)
            cells[row][column] = mark
            styles[row, column] = "dim"
    centre = at(0, 90)
    cells[centre[0]][centre[1]] = "+"
    styles[centre] = "dim"
    # The lowest first: where two are in one place, the higher is seen, and the other stands in the table.
    up = sorted((body for body in bodies if body.altitude >= 0), key=lambda body: body.altitude)
    for body in up:
        row, column = at(body.azimuth, body.altitude)
        column = min(column, columns - 2)
        for offset, letter in enumerate(_LABELS[body.body]):
            cells[row][column + offset] = letter
            styles[row, column + offset] = "bold yellow" if body.body == "Sun" else "bold"
    lines = [Text(" " * (2 * _CHART_ROWS + 4) + "N")]
    for number, row_cells in enumerate(cells):
        line = Text("  W " if number == _CHART_ROWS else "    ")
        for column, letter in enumerate(row_cells):
            line.append(letter, styles.get((number, column), ""))
        line.append(" E" if number == _CHART_ROWS else "")
        line.rstrip()
        lines.append(line)
    lines.append(Text(" " * (2 * _CHART_ROWS + 4) + "S"))
    down = [body.body for body in bodies if body.altitude < 0]
    lines.append(Text(f"below the horizon: {', '.join(down)}" if down else "all of them are above the horizon"))
    return lines


def time_text(t_ms: int) -> str:
    """UTC to the millisecond: "2026-11-30 21:30:00.000"."""
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=t_ms)
    return moment.strftime("%Y-%m-%d %H:%M:%S.") + f"{t_ms % 1000:03d}"


def cell_text(cell: Cell) -> str:
    """A cell and its centre: "1 degree around 50.5 N, 8.5 E"."""
    latitude, longitude = cell.centre()
    side = cell.step / 100
    return f"{side:g} {'degree' if side == 1 else 'degrees'} around {_degrees(latitude, 'NS')}, {_degrees(longitude, 'EW')}"


def _degrees(value: float, sides: str, places: int | None = None) -> str:
    number = f"{abs(value):g}" if places is None else f"{abs(value):.{places}f}"
    return f"{number} {sides[value < 0]}"


def _cell_json(cell: Cell) -> dict[str, object]:
    latitude, longitude = cell.centre()
    return {"degrees": cell.step / 100, "row": cell.row, "column": cell.column, "latitude": latitude, "longitude": longitude}


def _parse_time(text: str) -> int:
    """Milliseconds since 1970. Without an offset it is UTC."""
    from nexus.core.errors import UsageError
    from nexus.memory.sky.tables import END_MS, FIRST_MS

    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        raise UsageError(f"{text!r} is no time", "Write it as in 2026-11-30T21:30:00Z or 2026-11-30") from None
    # By differences: at the ends of the calendar there is no other time zone to turn to.
    since = moment.replace(tzinfo=None) - datetime(1970, 1, 1) - (moment.utcoffset() or timedelta())
    t_ms = (since.days * 86_400 + since.seconds) * 1000 + since.microseconds // 1000
    if not FIRST_MS <= t_ms < END_MS:
        raise UsageError(
            f"the ephemeris does not cover {text}", f"Choose a time from {time_text(FIRST_MS)} to {time_text(END_MS - 1)}"
        )
    return t_ms


def _parse_place(text: str) -> tuple[float, float]:
    from nexus.core.errors import UsageError

    try:
        latitude, longitude = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{text!r} is no place", "Write degrees north and east with a comma between, as in 50.1,8.7 or -33.9,18.4"
        ) from None
    return latitude, longitude


def _parse_step(degrees: float) -> int:
    from nexus.core.errors import UsageError
    from nexus.memory.sky.place import check_step

    step = round(degrees * 100) if abs(degrees) < 1000 else 0  # also for NaN
    if abs(step - degrees * 100) > 1e-6 or step == 0:
        raise UsageError(
            f"cells of {degrees:g} degrees do not make a grid", "Choose a number that divides 180 evenly: 0.1, 0.5, 1, 5, 10"
        )
    return check_step(step)


def _read_signature(source: str) -> bytes:
    """The bytes that a file holds or hex text stands for, 84 or 98 of them."""
    from nexus.core.errors import UsageError
    from nexus.memory.sky.stamp import SIGNATURE_BYTES, STAMP_BYTES
    from nexus_cli.receipts import read_file

    sizes = (SIGNATURE_BYTES, STAMP_BYTES)
    fix = f"Give the {SIGNATURE_BYTES} bytes of a signature or the {STAMP_BYTES} of a stamp, as a file or as hex text"
    if source == "-":
        data = sys.stdin.buffer.read(_FILE_BYTES_MAX + 1)
    elif len(source) < 256 and Path(source).is_file():
        data = read_file(Path(source), _FILE_BYTES_MAX, "a signature of the sky", fix)
    else:
        data = source.encode("utf-8", "surrogateescape")
    if len(data) in sizes:
        return data
    try:
        parsed = bytes.fromhex(data.decode("ascii"))
    except ValueError:
        parsed = b""
    if len(parsed) not in sizes:
        what = "standard input" if source == "-" else f"{source[:60]!r}"
        raise UsageError(f"{what} is no signature of the sky, and no file that holds one", fix)
    return parsed
