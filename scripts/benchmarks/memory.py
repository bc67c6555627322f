"""Memory: a fragment that is served over its int8 weights and its cache, and the peak of converting a large model.

Each figure is that of a process of its own, from the kernel's account of resident memory (Linux).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

from scripts.benchmarks import engine_store, models
from scripts.benchmarks.engine_child import Child
from scripts.benchmarks.result import Result

FRAGMENT_GOAL = 1.15
CONVERSION_GOAL_BYTES = 6e9
CONVERSION_GOAL_SHAPE = "7b"
CACHED_TOKENS = 512
DISK_RESERVE_BYTES = 4e9

Part = dict[str, object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shapes = ", ".join(models.SHAPES)
    parser.add_argument(
        "--fragment", default="1b", choices=models.SHAPES, help=f"shape to serve, of {shapes} [default: %(default)s]"
    )
    parser.add_argument(
        "--convert", default=CONVERSION_GOAL_SHAPE, choices=models.SHAPES, help="shape to convert [default: %(default)s]"
    )
    parser.add_argument("--profile", default="exact", choices=("exact", "float"), help="of our engine [default: %(default)s]")
    parser.add_argument("--kernel", default="", help="of the exact profile, e.g. torch [default: what the engine chooses]")
    parser.add_argument("--threads", type=int, default=1, help="[default: %(default)s]")


def run(options: argparse.Namespace) -> Result:
    if not Path("/proc/self/status").exists():
        raise SystemExit("bench memory reads /proc, which only Linux has")
    if options.quick:
        options.fragment = options.convert = "135m"
    fragment = _fragments(options.fragment, options.profile, options.kernel, options.threads)
    ratio = max(float(str(part["ratio"])) for part in fragment.values())
    return Result(
        "memory",
        ratio,
        FRAGMENT_GOAL,
        "lower",
        {
            "profile": options.profile,
            "shape": options.fragment,
            "fragments": fragment,
            "conversion": _conversion(options.convert, options.profile, options.threads),
        },
    )


def _fragments(name: str, profile: str, kernel: str, threads: int) -> dict[str, Part]:
    """Both halves of the model, each in a process that loads it and reads a prompt of CACHED_TOKENS tokens."""
    shape = models.SHAPES[name]
    with tempfile.TemporaryDirectory(prefix="nexus-bench-memory-") as text:
        directory = Path(text)
        _say(f"{name}: making and converting {shape.weights / 1e6:.0f} M random weights")
        engine_store.add(models.random_llama(directory / "tiny", models.SHAPES["tiny"]), directory / "tiny-store", profile)
        manifest = engine_store.add(models.random_llama(directory / "model", shape), directory / "store", profile)
        shutil.rmtree(directory / "model")
        incoming = directory / "tokens"
        incoming.write_bytes(np.random.default_rng(0).integers(0, shape.vocabulary, CACHED_TOKENS, dtype="<u4").tobytes())
        cut = manifest.layers // 2
        parts: dict[str, Part] = {}
        for start, end in ((0, cut), (cut, manifest.layers)):
            _say(f"{name}: layers {start} to {end}")
            outgoing = directory / f"after.{end}"
            with Child("scripts.benchmarks.memory_child", threads=threads) as child:
                answer = child.ask(
                    "load",
                    warm_store=str(directory / "tiny-store"),
                    store=str(directory / "store"),
                    start=start,
                    end=end,
                    kernel=kernel,
                    tokens=CACHED_TOKENS,
                    incoming=str(incoming),
                    outgoing=str(outgoing),
                )
            ratio = answer["serving_bytes"] / (answer["weights_bytes"] + answer["kv_bytes"])
            parts[f"layers_{start}_{end}"] = {
                "ratio": round(ratio, 4),
                "goal": FRAGMENT_GOAL,
                "better": "lower",
                "met": ratio <= FRAGMENT_GOAL,
                **{key: int(value) for key, value in answer.items()},
            }
            incoming = outgoing
        return parts


def _conversion(name: str, profile: str, threads: int) -> Part:
    with tempfile.TemporaryDirectory(prefix="nexus-bench-memory-") as text:
        directory = Path(text)
        fitting = _largest_fitting(name, shutil.disk_usage(directory).free)
        if fitting is None:
            return {"ratio": None, "goal": 1.0, "better": "lower", "met": None, "reason": "the disk takes no model of any shape"}
        shape = models.SHAPES[fitting]
        _say(f"{fitting}: making {shape.weights / 1e6:.0f} M random weights")
        source = models.random_llama(directory / "model", shape)
        _say(f"{fitting}: converting")
        with Child("scripts.benchmarks.memory_child", threads=threads) as child:
            answer = child.ask("convert", source=str(source), store=str(directory / "store"), profile=profile)
    ratio = answer["peak_bytes"] / CONVERSION_GOAL_BYTES
    measured = fitting == CONVERSION_GOAL_SHAPE
    part: Part = {
        "ratio": round(ratio, 4),
        "goal": 1.0,
        "better": "lower",
        "met": ratio <= 1 if measured else None,
        "goal_bytes": int(CONVERSION_GOAL_BYTES),
        "shape": fitting,
        "source_bytes": shape.stored_bytes,
        **{key: int(value) for key, value in answer.items()},
    }
    if not measured:
        why = "asked for" if fitting == name else "the largest that the disk takes"
        part["reason"] = f"{fitting} is {why}; the goal is for {CONVERSION_GOAL_SHAPE}"
    return part


def _largest_fitting(name: str, free_bytes: int) -> str | None:
    """The shape `name`, or the largest smaller one whose bfloat16 weights and their int8 copy fit the disk."""
    names = sorted(models.SHAPES, key=lambda other: models.SHAPES[other].weights, reverse=True)
    for other in names[names.index(name) :]:
        shape = models.SHAPES[other]
        if shape.stored_bytes + 1.05 * shape.weights + DISK_RESERVE_BYTES <= free_bytes:
            return other
    return None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
