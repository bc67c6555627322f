"""nexus memory export, nexus memory import: blocks as a file, with all that proves them.

The file begins with MAGIC. Then comes every part: its length in four bytes, big-endian, and its bytes. A length of 0 ends the file,
so that one that was cut off is told from a whole one. What a part holds is checked by the node that imports it.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from nexus_cli import show, values
from nexus_cli.options import NexusCommand, Shared, pass_shared

if TYPE_CHECKING:
    from nexus.node.memory.api import ImportView

MAGIC = b"nexus memory 1\n"
_LENGTH = struct.Struct(">I")
REASONS_MAX = 20


@click.command("export", cls=NexusCommand)
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@click.option(
    "--collection",
    "collections",
    type=values.text,
    multiple=True,
    metavar="NAME",
    help="Only this collection; may be given several times. [default: all]",
)
@pass_shared
def memory_export(shared: Shared, file: Path, collections: tuple[str, ...]) -> None:
    """Write blocks to a file. With all that proves them, so that another node can import FILE; - is standard output."""
    from nexus.node.memory.api import ExportPart
    from nexus_cli.bars import bars
    from nexus_cli.client import connected

    if str(file) == "-" and shared.json:
        raise click.UsageError("--json and an export to standard output exclude each other")
    blocks = written = 0
    with connected(shared, None) as daemon, _output(file) as stream, bars(shared) as advance:
        stream.write(MAGIC)
        for event in daemon.stream("/v0/memory/export", {"collections": list(collections)}):
            if isinstance(event, ExportPart):
                if not event.content:
                    continue
                stream.write(_LENGTH.pack(len(event.content)) + event.content)
                blocks += event.blocks
                written += len(event.content)
                advance("export", "writing", 0, 0, f"{show.count(blocks, 'block')}, {show.size(written)}")
        stream.write(_LENGTH.pack(0))
    if shared.json:
        show.print_json({"file": str(file), "blocks": blocks, "bytes": written})
    else:
        click.echo(f"{show.count(blocks, 'block')}, {show.size(written)}" + ("" if str(file) == "-" else f" in {file}"), err=True)


@contextmanager
def _output(file: Path) -> Iterator[BinaryIO]:
    """A file that is there when all of it is, or standard output. Raises LocalError."""
    from nexus.core.errors import LocalError

    if str(file) == "-":
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    temporary = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        if file.is_dir():
            raise IsADirectoryError(21, "is a directory")
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError as error:
        raise LocalError(f"cannot write {file}: {error.strerror}", "Give another file, or make room") from error
    finally:
        temporary.unlink(missing_ok=True)


@click.command("import", cls=NexusCommand)
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@pass_shared
def memory_import(shared: Shared, file: Path) -> None:
    """Take in blocks from a file. FILE is an export, - standard input. Every block is verified; what does not hold is refused.

    Exit code 7 if something was refused, or if the file ends too early.
    """
    from nexus.core.errors import NexusError, VerificationError
    from nexus.gateway.wire import to_json
    from nexus.node.memory.api import ImportView
    from nexus_cli.bars import bars
    from nexus_cli.client import connected

    total = ImportView(0, 0, 0, ())
    failed: NexusError | None = None
    with connected(shared, None) as daemon, _input(file) as stream, bars(shared) as advance:
        size = os.fstat(stream.fileno()).st_size if str(file) != "-" else 0
        done = 0
        try:
            for part in read_parts(stream, str(file)):
                total = _sum(total, _import_part(daemon.post_bytes("/v0/memory/import", part)))
                done += len(part)
                amount = f"{show.count(total.new, 'new block')}, {show.size(done)}"
                advance("import", "reading", done, size, amount)
        except NexusError as error:
            failed = error
    if failed is not None and total == ImportView(0, 0, 0, ()):
        raise failed
    if shared.json:
        show.print_json({"imported": to_json(total)})
    else:
        for reason in total.reasons:
            click.echo(f"refused: {show.printable(reason)}", err=True)
        click.echo(f"{show.count(total.new, 'new block')}, {total.known} were here already, {total.refused} refused", err=True)
    if failed is not None:
        raise failed
    if total.refused:
        raise VerificationError(
            f"{show.count(total.refused, 'block')} of {file} {'does' if total.refused == 1 else 'do'} not hold",
            "Those were not taken in; the others were",
        )


@contextmanager
def _input(file: Path) -> Iterator[BinaryIO]:
    """Raises NotFoundError, LocalError."""
    from nexus.core.errors import LocalError, NotFoundError

    if str(file) == "-":
        yield sys.stdin.buffer
        return
    try:
        stream = file.open("rb")
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file {file}", "Write one with: nexus memory export FILE") from error
    except OSError as error:
        raise LocalError(f"cannot read {file}: {error.strerror}", "Give a file that you may read") from error
    with stream:
        yield stream


def read_parts(stream: BinaryIO, name: str) -> Iterator[bytes]:
    """The parts of an export. Raises VerificationError for what is none, or not all of one."""
    from nexus.core.errors import VerificationError
    from nexus.node.memory.api import EXPORT_PART_BYTES_MAX

    if stream.read(len(MAGIC)) != MAGIC:
        raise VerificationError(f"{name} is not an export of the memory", "Write one with: nexus memory export FILE")
    cut = VerificationError(f"{name} ends too early", "What came before is taken in; get the file again for the rest")
    while True:
        head = stream.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            raise cut
        (length,) = _LENGTH.unpack(head)
        if length == 0:
            break
        if length > EXPORT_PART_BYTES_MAX:
            raise VerificationError(
                f"{name} is damaged: one of its parts would have {length} bytes", "What came before is taken in; get the file again"
            )
        part = stream.read(length)
        if len(part) < length:
            raise cut
        yield part
    if stream.read(1):
        raise VerificationError(f"{name} goes on after its end", "All before the end is taken in; the rest is none of it")


def _import_part(answer: object) -> ImportView:
    from typing import cast

    from nexus.gateway.wire import Json, from_json
    from nexus.node.memory.api import ImportView

    return from_json(ImportView, cast("Json", answer))


def _sum(total: ImportView, more: ImportView) -> ImportView:
    from nexus.node.memory.api import ImportView

    reasons = (*total.reasons, *more.reasons)[:REASONS_MAX]
    return ImportView(total.new + more.new, total.known + more.known, total.refused + more.refused, reasons)
