"""A gigabyte from one node to another, beside plain TCP and TLS by Python's ssl; from several at once; resumed; in how much memory.

Both sides move the same bytes from a file in one process to a file in another, with an fsync at the end, in turn. The node checks
every chunk against its hash before it is sent and before it is kept; the comparison checks nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nexus.core.manifest import CHUNK_BYTES, EMBEDDING, HEAD, Blob, Manifest, chunk_count, layer_name
from nexus.storage.blobs import BlobStore
from nexus.storage.catalog import Catalog
from scripts.benchmarks.engine_child import Child
from scripts.benchmarks.result import Result

MODULE = "scripts.benchmarks.transfer_child"
GOAL = 0.8
FALLBACK_GOAL = 0.6
SOURCES_GOAL = 1.5
GROWTH_GOAL_BYTES = 64 << 20
LAYERS = 8
SOURCES = 3

SIDES = ("fast", "tls", "libp2p", "tls_thrown_away")

Part = dict[str, object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--megabytes", type=int, default=1024, help="to move, in MiB [default: %(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds; the median counts [default: %(default)s]")
    parser.add_argument(
        "--cap", type=int, default=32, help="of each of the several sources, in MiB per second [default: %(default)s]"
    )


def run(options: argparse.Namespace) -> Result:
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("bench transfer reads /proc, which only Linux has")
    if options.quick:
        options.megabytes, options.rounds, options.cap = 32, 1, 8
    with tempfile.TemporaryDirectory(prefix="nexus-bench-transfer-") as text:
        bench = Bench(Path(text), options.megabytes << 20)
        headline, parts = bench.side_by_side(options.rounds)
        parts["three_sources"] = bench.sources(options.cap << 20, 1 if options.quick else 4)
        parts["resumed"] = bench.resumed()
    return Result("transfer", headline, GOAL, "higher", {"megabytes": options.megabytes, "rounds": options.rounds, **parts})


class Bench:
    def __init__(self, directory: Path, size: int) -> None:
        self._directory = directory
        self._manifest = make_model(directory / "source", size)
        self._size = self._manifest.weight_bytes
        self._flat = directory / "flat"
        store = BlobStore(directory / "source")
        with self._flat.open("wb") as out:
            for piece in self._manifest.pieces:
                with store.path(piece.root).open("rb") as part:
                    shutil.copyfileobj(part, out, CHUNK_BYTES)

    def node(self, name: str = "source", upload_max: int = 0) -> Child:
        return Child(MODULE, "node", self._directory / name, upload_max, threads=1)

    def fetch(self, child: Child, sources: Sequence[Child], *, fast: bool = True, keep: bool = False) -> dict[str, object]:
        into = self._directory / "into"
        if not keep:
            shutil.rmtree(into, ignore_errors=True)
        answer = child.ask("fetch", **self.request(sources, into, fast=fast))
        for piece in self._manifest.pieces:
            BlobStore(into).size(piece.root)
        shutil.rmtree(into)
        return answer

    def request(self, sources: Sequence[Child], into: Path, *, fast: bool = True, tell: bool = False) -> dict[str, object]:
        return {
            "manifest": self._manifest.to_bytes().hex(),
            "sources": [[source.greeting["peer_id"], source.greeting["addresses"]] for source in sources],
            "into": str(into),
            "fast": fast,
            "tell": tell,
        }

    def side_by_side(self, rounds: int) -> tuple[float, Part]:
        """Nexus over the fast path and over libp2p, and plain TLS between files and from memory to nowhere, in turn."""
        sides: dict[str, list[float]] = {side: [] for side in SIDES}
        growth: list[int] = []
        cpu: list[float] = []
        with (
            self.node() as source,
            self.node("other") as other,
            Child(MODULE, "tls", threads=1) as near,
            Child(MODULE, "tls", threads=1) as far,
        ):
            near.ask("serve", file=str(self._flat))
            before = source.ask("resident")["resident"]
            for number in range(rounds + 1):
                took = {}
                # Another one begins each time: what a side leaves to the disk slows the next one down.
                for side in (*SIDES[number % len(SIDES) :], *SIDES[: number % len(SIDES)]):
                    say(f"round {number} of {rounds}: {side}")
                    if side in ("fast", "libp2p"):
                        answer = self.fetch(other, [source], fast=side == "fast")
                        if (side == "fast") != bool(answer["fast"]):
                            raise RuntimeError(f"{side}: the bytes went the other way")
                        took[side] = float(str(answer["seconds"]))
                        growth += [int(str(answer["growth"]))] if number else []
                        cpu += [float(str(answer["cpu_seconds"]))] if number and side == "fast" else []
                    else:
                        into = str(self._directory / "flat-copy") if side == "tls" else ""
                        took[side] = far.ask("fetch", port=near.greeting["port"], into=into, size=self._size)["seconds"]
                        if into:
                            Path(into).unlink()
                if number:  # the first warms up: files in the page cache, modules, connections
                    for side, seconds in took.items():
                        sides[side].append(seconds)
            served = source.ask("peak")["peak"] - before
        ratios = [tls / fast for tls, fast in zip(sides["tls"], sides["fast"], strict=True)]
        fallback = [tls / slow for tls, slow in zip(sides["tls"], sides["libp2p"], strict=True)]
        peak = max(max(growth), served)
        rates = {side: round(self._size / 1e6 / statistics.median(seconds), 1) for side, seconds in sides.items()}
        return statistics.median(ratios), {
            "megabytes_per_s": rates,
            "ratios": [round(ratio, 3) for ratio in ratios],
            "over_thrown_away": round(statistics.median(sides["tls_thrown_away"]) / statistics.median(sides["fast"]), 3),
            "receiver_cpu_seconds": round(statistics.median(cpu), 2),
            "libp2p": judged(statistics.median(fallback), FALLBACK_GOAL),
            "peak_growth_bytes": {
                "receiver": max(growth),
                "sender": served,
                "goal": GROWTH_GOAL_BYTES,
                "better": "lower",
                "met": peak < GROWTH_GOAL_BYTES,
            },
        }

    def sources(self, cap: int, share: int) -> Part:
        """From three sources, each with a limit on what it gives, over from one of them; a part of the model."""
        with Pieces(self, share) as part, self.node("other") as other:
            capped = [self.node(upload_max=cap) for _ in range(SOURCES)]
            try:
                rates = {}
                for count in (1, SOURCES):
                    say(f"from {count} of {SOURCES} capped sources")
                    answer = self.fetch(other, capped[:count])
                    rates[count] = part.size / float(str(answer["seconds"]))
            finally:
                for child in capped:
                    child.close()
        ratio = rates[SOURCES] / rates[1]
        return judged(ratio, SOURCES_GOAL) | {
            "cap_megabytes_per_s": round(cap / 1e6, 1),
            "megabytes_per_s": {str(count): round(rate / 1e6, 1) for count, rate in rates.items()},
        }

    def resumed(self) -> Part:
        """A process that fetches is killed half-way; the next one fetches what is missing and nothing else."""
        into = self._directory / "into"
        shutil.rmtree(into, ignore_errors=True)
        say("killed half-way, then resumed")
        with self.node() as source:
            with self.node("other") as other:
                answer = other.ask("fetch", **self.request([source], into, tell=True))
                while "done" in answer and answer["done"] < self._size // 2:
                    answer = other._answer()
            # The process is dead by SIGKILL now.
            here = chunks_here(into, self._manifest)
            with self.node("other") as other:
                answer = self.fetch(other, [source], keep=True)
        received = sum(answer["received"].values())  # type: ignore[attr-defined]
        total = sum(chunk_count(blob.size) for blob in blobs_of(self._manifest))
        fetched = -(-received // CHUNK_BYTES)
        return {
            "chunks": total,
            "here_after_the_kill": here,
            "fetched_after_it": fetched,
            "twice": max(0, here + fetched - total),
            "met": here > 0 and here + fetched <= total,
        }


class Pieces:
    """While the context is open, the benchmark moves only the first of the model's layers."""

    def __init__(self, bench: Bench, share: int) -> None:
        self._bench = bench
        self._whole = bench._manifest
        keep = max(1, LAYERS // share)
        self._part = part_of(self._whole, keep)
        self.size = self._part.weight_bytes

    def __enter__(self) -> Pieces:
        Catalog(self._bench._directory / "source").keep(self._part)
        self._bench._manifest = self._part
        return self

    def __exit__(self, *_: object) -> None:
        self._bench._manifest = self._whole


def part_of(manifest: Manifest, layers: int) -> Manifest:
    pieces = (manifest.pieces[0], *manifest.pieces[1 : 1 + layers], manifest.pieces[-1])
    return Manifest(1, "causal", "LlamaForCausalLM", "float", "float32", layers, 8, 16, 64, 32, 0, pieces, manifest.files, ())


def make_model(directory: Path, size: int) -> Manifest:
    """A model of random bytes, which no compression makes smaller."""
    say(f"making {size >> 20} MiB")
    store, catalog = BlobStore.open(directory), Catalog.open(directory)

    def put(name: str, length: int) -> Blob:
        return store.put(name, length, (os.urandom(min(CHUNK_BYTES, length - at)) for at in range(0, length, CHUNK_BYTES)))

    pieces = (put(EMBEDDING, 1000), *(put(layer_name(index), size // LAYERS) for index in range(LAYERS)), put(HEAD, 1001))
    files = (put("config.json", 100),)
    manifest = Manifest(1, "causal", "LlamaForCausalLM", "float", "float32", LAYERS, 8, 16, 64, 32, 0, pieces, files, ())
    catalog.add("bench", manifest)
    return manifest


def blobs_of(manifest: Manifest) -> list[Blob]:
    return [*manifest.files, *manifest.pieces]


def chunks_here(directory: Path, manifest: Manifest) -> int:
    store = BlobStore.open(directory)
    count = 0
    for blob in blobs_of(manifest):
        if store.has(blob.root):
            count += chunk_count(blob.size)
        else:
            with store.begin(blob) as partial:
                count += partial.here().count(1)
    return count


def judged(ratio: float, goal: float) -> Part:
    return {"ratio": round(ratio, 4), "goal": goal, "better": "higher", "met": ratio >= goal}


def say(text: str) -> None:
    print(text, file=sys.stderr)
