"""nexus engine check, nexus bench engine: the engine of this machine without a daemon: is it right, and how fast is it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from nexus_cli import show
from nexus_cli.options import NexusGroup, Shared, pass_shared

if TYPE_CHECKING:
    from nexus.core.manifest import Manifest
    from nexus.engine.benchmark import EngineSpeed
    from nexus.engine.exact.check import EngineReport
    from nexus.storage.blobs import BlobStore
    from nexus.storage.catalog import Catalog

EXIT_VERIFICATION = 7

engine = NexusGroup(name="engine", help="The exact engine of this machine: is it right?")
bench = NexusGroup(name="bench", help="Measure this machine, now.")


@engine.command("check")
@pass_shared
def engine_check(shared: Shared) -> None:
    """Try every kernel of the exact engine. Exit code 7 if none is right: then nothing is served."""
    from nexus_cli.client import deadline

    _prepare(shared)
    with deadline(shared.timeout_s), steps(shared, "checking") as advance:
        from nexus.engine.exact.check import DEFAULT_DEPTHS, check_engine

        used = depths_in_use(shared)
        report = check_engine(sorted({*DEFAULT_DEPTHS, *used}), advance)
    if shared.json:
        depths = [asdict(depth) | {"models": used.get(depth.depth, [])} for depth in report.depths]
        kernels = [asdict(kernel) for kernel in report.kernels]
        show.print_json(
            {"right": bool(report.kernel), "kernel": report.kernel, "kernels": kernels, "depths": depths, "digest": report.digest}
        )
    else:
        _print_report(shared, report, used)
    if not report.kernel:
        raise click.exceptions.Exit(EXIT_VERIFICATION)


def _print_report(shared: Shared, report: EngineReport, used: dict[int, list[str]]) -> None:
    screen = show.console(shared)
    kernels = [(kernel.name, "right" if kernel.right else "no", kernel.reason) for kernel in report.kernels]
    screen.print(show.table(("kernel", "verdict", "why not"), kernels, wrap=("why not",)))
    depths = [
        (str(depth.depth), ", ".join(used.get(depth.depth, [])) or "-", depth.kernel or "none", depth.reason)
        for depth in report.depths
    ]
    screen.print(show.table(("depth", "used by", "kernel", "why"), depths, right=("depth",), wrap=("used by", "why")))
    if report.kernel:
        click.echo(
            f"the exact profile computes with {report.kernel}; every right kernel gives {report.digest[:16]}, as every machine does"
        )
    else:
        click.echo("no kernel is right on this machine: it serves nothing in the exact profile", err=True)
        click.echo("fix: Install Nexus and PyTorch again; if that does not help, please report it with this table", err=True)


@bench.command("engine")
@click.argument("name", default="nano")
@pass_shared
def bench_engine(shared: Shared, name: str) -> None:
    """Measure how fast the model NAME runs in this process. All layers on this machine, no daemon and no network."""
    from nexus_cli.client import deadline

    _prepare(shared)
    with deadline(shared.timeout_s), local_model(shared, name) as (manifest, files), steps(shared, "measuring") as advance:
        from nexus.engine.benchmark import measure_speed
        from nexus.engine.stage import load_stage

        speed = measure_speed(load_stage(manifest, 0, manifest.layers, files), advance)
    if shared.json:
        show.print_json({"model": name, "profile": manifest.profile, "speed": asdict(speed) | {"share": speed.share}})
        return
    show.pairs([("model", f"{name}, profile {manifest.profile}"), *speed_rows(speed)])


def speed_rows(speed: EngineSpeed) -> list[tuple[str, str]]:
    rows = [
        ("kernel", f"{speed.kernel}, {show.count(speed.threads, 'thread')}"),
        ("weights", show.size(speed.weight_bytes)),
        ("prefill", f"{speed.prefill_tokens_per_s:.1f} tokens/s, a prompt of {speed.prompt_tokens}"),
    ]
    if (
        speed.decode_tokens_per_s is not None
        and speed.bytes_per_token
        and speed.bandwidth_bytes_per_s
        and speed.machine_bytes_per_s
    ):
        rows += [
            ("decode", f"{speed.decode_tokens_per_s:.1f} tokens/s, {speed.decoded_tokens} tokens after it"),
            ("a token reads", show.size(speed.bytes_per_token)),
            ("bandwidth", f"{show.size(int(speed.bandwidth_bytes_per_s))}/s of {show.size(int(speed.machine_bytes_per_s))}/s"),
            ("share of limit", f"{speed.share:.0%}"),
        ]
    return [*rows, ("", "best of several rounds, on this machine, now: other work on it slows all of them")]


def _prepare(shared: Shared) -> None:
    """As the daemon prepares torch. Both are read when it is first imported."""
    from nexus_config.settings import node_options

    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["OMP_NUM_THREADS"] = str(node_options(shared.settings(), shared.path).threads)


@contextmanager
def steps(shared: Shared, label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; nothing where nobody watches."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    console = show.console(shared, stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=console, transient=True, disable=shared.json or not console.is_terminal) as bars:
        task = bars.add_task(label, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)


def _stored(shared: Shared) -> tuple[Catalog, BlobStore] | None:
    """The models of this command's data directory, without changing it; None where there is none."""
    from nexus.storage.blobs import BlobStore
    from nexus.storage.catalog import Catalog
    from nexus.storage.home import Home

    models = Home(shared.path).models
    return (Catalog.open(models), BlobStore(models)) if models.is_dir() else None


def depths_in_use(shared: Shared) -> dict[int, list[str]]:
    """The depths of all products in the exact models that are here, with the models' names."""
    from nexus.core.errors import NexusError
    from nexus.core.manifest import EXACT_PLAN
    from nexus.proof.arithmetic.plan import plan_from_json

    stored = _stored(shared)
    used: dict[int, list[str]] = {}
    if stored is None:
        return used
    catalog, blobs = stored
    for root in catalog.roots():
        try:
            manifest = catalog.manifest(root)
            stored_plan = manifest.file(EXACT_PLAN)
            if stored_plan is None or not blobs.has(stored_plan.root):
                continue
            plan = plan_from_json(blobs.path(stored_plan.root).read_bytes())
        except NexusError as error:
            click.echo(show.printable(f"left out {catalog.name_of(root)}: {error.cause}"), err=True)
            continue
        for depth in {plan.hidden, *(depth for _, depth in plan.linear_shapes().values())}:
            used.setdefault(depth, []).append(catalog.name_of(root))
    return used


@contextmanager
def local_model(shared: Shared, name: str) -> Iterator[tuple[Manifest, dict[str, Path]]]:
    """Manifest and blobs by name of a model that is whole on this machine. A built-in one that is not is made for the moment.

    Raises NotFoundError.
    """
    from nexus.core.errors import NotFoundError
    from nexus.models import BUILTIN_NAMES, builtin_path
    from nexus.storage.blobs import BlobStore

    stored = _stored(shared)
    if stored is not None and (name not in BUILTIN_NAMES or name in stored[0].names()):
        catalog, blobs = stored
        manifest = catalog.manifest(catalog.find(name))
        parts = (*manifest.pieces, *manifest.files)
        if not all(blobs.has(blob.root) for blob in parts):
            raise NotFoundError(f"{name!r} is not whole on this node", "Add it here: nexus model add DIRECTORY")
        yield manifest, {blob.name: blobs.path(blob.root) for blob in parts}
    elif name in BUILTIN_NAMES:
        from nexus.engine.importer import import_model

        with TemporaryDirectory() as directory:
            blobs = BlobStore.open(Path(directory))
            manifest = import_model(builtin_path(name), blobs, lambda *_: None)
            yield manifest, {blob.name: blobs.path(blob.root) for blob in (*manifest.pieces, *manifest.files)}
    else:
        raise NotFoundError(f"no model is called {name!r}", "Add it with: nexus model add PATH")
