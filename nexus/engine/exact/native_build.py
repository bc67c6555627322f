"""Compiles the step of the exact engine (native/*.c) into one shared library. Standard library only: the build hook runs it too.

The step is one source, compiled once per instruction set under another name; `native/dispatch.c` tells at run time which of
them the processor has. What the compiler does not know is left out.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).with_name("native")
LIBRARY = Path(__file__).with_name("_native.so")

# Contracting a * b + c into one rounding would change bits, and so would everything that -ffast-math stands for.
_FLAGS = (
    *("-std=c11", "-D_GNU_SOURCE", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
# Tuned for processors that gather well: gcc's generic tuning reads the tables of exponentials one by one.
_AVX512 = "-mtune=icelake-server -mavx2 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mprefer-vector-width=512"
_VARIANTS = {
    "x86_64": {
        "amx": f"{_AVX512} -mamx-tile -mamx-int8",
        "avx512": _AVX512,
        "avxvnni": "-mtune=haswell -mavx2 -mavxvnni",
        "avx2": "-mtune=haswell -mavx2",
        "sse2": "",
    },
    "aarch64": {"dotprod": "-march=armv8.2-a+dotprod", "neon": ""},
}
# Compiled once per instruction set, under its name.
_PER_VARIANT = ("step.c", "hash.c")
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}
_COMPILE_TIMEOUT_S = 300


class BuildError(Exception):
    """There is no compiler, or it failed; the message ends with its last lines."""


def compiler() -> list[str]:
    """The C compiler's command. Raises BuildError."""
    named = os.environ.get("CC")
    if named:
        return shlex.split(named)
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise BuildError("there is no C compiler (cc, gcc or clang)")


def build(target: Path = LIBRARY, machine: str | None = None, cc: Sequence[str] | None = None) -> list[str]:
    """Compile into `target`, which is replaced only by a whole library. Returns the variants in it. Raises BuildError.

    `machine` and `cc`: another processor's name and its cross compiler.
    """
    command = list(cc) if cc else compiler()
    machine = (machine or platform.machine()).lower()
    wanted = _VARIANTS.get(_MACHINES.get(machine, machine), {})
    # Threads are created by OpenMP; without it the step runs on one.
    threads = [flag for flag in ("-fopenmp", "-fopenmp-simd") if _accepts(command, [flag])][:1]
    # GCC moves single values through MMX registers now and then, which are those of the x87 unit: it is unusable after that, and
    # whatever computes with it next in the same thread, as fmod of some C libraries does, gets NaN.
    without_mmx = [flag for flag in ("-mno-mmx",) if _MACHINES.get(machine, machine) == "x86_64" and _accepts(command, [flag])]
    variants = {name: flags.split() for name, flags in wanted.items() if _accepts(command, flags.split())}
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        units = [
            *((source, ["-DNX_VARIANT=portable", "-DNX_PORTABLE"]) for source in _PER_VARIANT),
            *((source, [f"-DNX_VARIANT={name}", *flags]) for name, flags in variants.items() for source in _PER_VARIANT),
            ("dispatch.c", [f"-DNX_HAVE_{name}" for name in variants]),
        ]
        jobs = [
            [*command, *_FLAGS, *threads, *without_mmx, *flags, "-c", str(SOURCES / source), "-o", str(scratch / f"{number}.o")]
            for number, (source, flags) in enumerate(units)
        ]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for _ in pool.map(_run, jobs):
                pass
        objects = [str(scratch / f"{number}.o") for number in range(len(units))]
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        try:
            _run([*command, "-shared", *threads, "-o", str(part), *objects, "-lm"])
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
    return [*variants, "portable"]


def _accepts(command: Sequence[str], flags: Sequence[str]) -> bool:
    """Whether the compiler (and its linker: -fopenmp without a library is no use) knows these flags."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory, "empty.c")
        source.write_text("int nothing(void) { return 0; }\n")
        try:
            _run([*command, *flags, "-shared", "-fPIC", str(source), "-o", str(Path(directory, "empty.so"))])
        except BuildError:
            return False
    return True


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)  # noqa: S603 the user's compiler
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(str(error)) from None
    if done.returncode:
        raise BuildError("\n".join(done.stderr.strip().splitlines()[-12:]) or f"{command[0]} failed with {done.returncode}")


def main() -> None:
    """What `python -m nexus.engine.exact.native --build` does."""
    try:
        variants = build()
    except BuildError as error:
        sys.exit(f"error: {error}")
    sys.stderr.write(f"{LIBRARY}: {', '.join(variants)}\n")
