"""Fidelity of the built-in models in the exact profile, written into docs/performance.md.

Usage: python -m scripts.measure_fidelity [--print]
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from nexus.core.fidelity import Fidelity
from nexus.core.manifest import EXACT
from nexus.engine.exact.fidelity import measure
from nexus.engine.importer import import_model
from nexus.models import MINILM, NANO, builtin_path, held_out_text
from nexus.storage.blobs import BlobStore
from scripts.benchmarks.result import machine

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
_SECTION = re.compile(r"(<!-- begin fidelity -->\n).*?(<!-- end fidelity -->)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Goal:
    """One figure of a report and the bound that it should keep."""

    name: str
    value: float
    bound: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def fidelity_of(name: str) -> Fidelity:
    """Of a built-in model, converted anew, on the default text."""
    with TemporaryDirectory() as directory:
        store = BlobStore.open(Path(directory))
        manifest = import_model(builtin_path(name), store, lambda *_: None, profile=EXACT)
        files = {blob.name: store.path(blob.root) for blob in (*manifest.pieces, *manifest.files)}
        text_name, text = held_out_text(manifest.kind)
        return measure(manifest, files, builtin_path(name), text, text_name, lambda *_: None)


def goals(name: str, report: Fidelity) -> list[Goal]:
    found = [
        (f"{name}: top-1 agreement", report.top1_agreement, 0.99, True),
        (f"{name}: perplexity, exact / float", report.perplexity_ratio, 1.01, False),
        (f"{name}: cosine, mean", report.cosine_mean, 0.999, True),
        (f"{name}: cosine, worst", report.cosine_worst, 0.995, True),
        (f"{name}: top-10 overlap", report.overlap, 0.97, True),
    ]
    return [Goal(label, value, bound, at_least) for label, value, bound, at_least in found if value is not None]


def section(reports: Sequence[tuple[str, Fidelity]]) -> str:
    lines = ["| figure | measured | goal | |", "|---|---|---|---|"]
    for name, report in reports:
        for goal in goals(name, report):
            sign = ">=" if goal.at_least else "<="
            lines.append(f"| {goal.name} | {goal.value:.5f} | {sign} {goal.bound:g} | {'met' if goal.met else '**missed**'} |")
    lines.append("")
    for name, report in reports:
        worst = report.worst_layer
        lines.append(
            f"`{name}`: {report.texts} texts of `nexus/models/{report.text}`, {report.tokens} tokens, layers by {report.kernel}.\n"
            f"Largest own error: {worst.name}, {worst.error:.2%}; of all parts in order:\n"
            f"{', '.join(f'{layer.error:.2%}' for layer in report.layers)}.\n"
        )
    about = machine()
    lines.append(f"Machine: {about['cpu']}, {about['cores']} cores; Python {about['python']}, torch {about['torch']}.\n")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.measure_fidelity", description=__doc__)
    parser.add_argument("--print", action="store_true", help="print the section, and leave the page as it is")
    options = parser.parse_args()
    reports = [(name, fidelity_of(name)) for name in (NANO, MINILM)]
    text = section(reports)
    if options.print:
        print(text, end="")
    else:
        page = PAGE.read_text("utf-8")
        PAGE.write_text(_SECTION.sub(lambda match: match[1] + text + match[2], page), "utf-8")
    return 0 if all(goal.met for name, report in reports for goal in goals(name, report)) else 1


if __name__ == "__main__":
    sys.exit(main())
