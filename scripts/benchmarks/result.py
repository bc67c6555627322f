"""The one form in which every benchmark reports."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path


@dataclass
class Result:
    """`ratio`: the headline. `goal`: what it should reach. `better`: "higher" or "lower". `parts`: every other figure."""

    bench: str
    ratio: float
    goal: float
    better: str
    parts: dict[str, object] = field(default_factory=dict)

    def as_dict(self) -> dict[str, object]:
        return {
            "bench": self.bench,
            "ratio": round(self.ratio, 4),
            "goal": self.goal,
            "better": self.better,
            "parts": self.parts,
            "machine": machine(),
        }

    def show(self) -> None:
        higher = self.better == "higher"
        met = self.ratio >= self.goal if higher else self.ratio <= self.goal
        print(f"{self.bench}: {self.ratio:.3f} (goal {'>=' if higher else '<='} {self.goal}: {'met' if met else 'MISSED'})")
        _show(self.parts, "  ")
        print(f"  machine: {machine()}")


def _show(parts: Mapping[str, object], indent: str) -> None:
    """Parts of parts below them; the smallest ones on one line each."""
    for name, value in parts.items():
        if isinstance(value, Mapping) and any(isinstance(inner, Mapping) for inner in value.values()):
            print(f"{indent}{name}:")
            _show(value, indent + "  ")
        else:
            print(f"{indent}{name}: {value}")


def machine() -> dict[str, object]:
    """What the figures were taken on."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
