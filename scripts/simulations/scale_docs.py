"""The table and the plots of docs/scaling.md, from a report of the scale simulation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.simulations.scale import Report, table

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "scaling.md"
BEGIN, END = "<!-- begin scale -->", "<!-- end scale -->"
INK, MUTED, BLUE, ORANGE = "#1f2430", "#8a90a0", "#2a6fbb", "#d9822b"
# The same bytes each time: ids in the SVG are drawn from the salt, and no date is written.
STYLE = {
    "svg.hashsalt": "nexus",
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "xtick.color": INK,
    "ytick.color": INK,
}


def write_docs(report: Report) -> None:
    """Replace what is between the marks, and draw docs/scaling.svg and docs/scaling.png. Raises SystemExit without matplotlib."""
    draw(report, [DOCS / "scaling.svg", DOCS / "scaling.png"])
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{markdown(report)}\n{END}{after}")


def markdown(report: Report) -> str:
    rows = table(report)
    lines = [_line(rows[0]), "|---|" + "---:|" * (len(rows[0]) - 1), *map(_line, rows[1:]), ""]
    lines += ["| goal | value | |", "|---|---:|---|"]
    lines += [f"| {goal['goal']} | {goal['value']} | {'met' if goal['met'] else 'MISSED'} |" for goal in report["goals"]]
    return "\n".join([*lines, "", f"Seed {report['seed']}."])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(report: Report, files: Sequence[Path]) -> None:
    """Throughput, lookups and traffic over the number of nodes, side by side."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("error: matplotlib draws the plots, and is not here\nfix: scripts/setup bench") from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update(STYLE)
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    _throughput(axes[0], report["inference"])
    _lookups(axes[1], report["dht"])
    _traffic(axes[2], report["membership"])
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", color="#e6e8ee", linewidth=0.8)
        each.set_axisbelow(True)
        each.set_xlabel("nodes")
    for file in files:
        svg = file.suffix == ".svg"
        figure.savefig(file, dpi=150, facecolor="white", metadata={"Date": None} if svg else {"Software": None})
    pyplot.close(figure)


def _throughput(axes: Any, rows: Sequence[Any]) -> None:
    nodes, rates = [row["nodes"] for row in rows], [row["inferences_per_s"] for row in rows]
    even = [rates[0] * count / nodes[0] for count in nodes]
    axes.plot(nodes, even, color=MUTED, linestyle=":", linewidth=1.2)
    axes.plot(nodes, rates, color=BLUE, marker="o", markersize=4)
    axes.set(xscale="log", yscale="log", title="Inferences per second")
    if len(nodes) > 2:
        _label(axes, "in proportion", nodes[1], even[1], MUTED, (66, -16))
    for count, rate in zip(nodes, rates, strict=True):
        if count in (nodes[0], 100, nodes[-1]):
            _label(axes, f"{rate:,.0f}", count, rate, BLUE, (-8, 5))
    axes.margins(x=0.16, y=0.1)
    _ticks(axes, nodes)


def _lookups(axes: Any, rows: Sequence[Any]) -> None:
    nodes = [row["nodes"] for row in rows]
    for name, label, colour, lift in (("whole", "all alive", BLUE, -14), ("after_deaths", "a fifth dead", ORANGE, 8)):
        values = [row[name]["rounds_mean"] for row in rows]
        axes.plot(nodes, values, color=colour, marker="o", markersize=4)
        _label(axes, label, nodes[-1], values[-1], colour, (0, lift))
    axes.set(xscale="log", ylim=(0, 5), title="DHT: round trips per lookup")
    _ticks(axes, nodes)


def _traffic(axes: Any, rows: Sequence[Any]) -> None:
    nodes = [row["nodes"] for row in rows]
    for name, label, colour, lift in (("exchange_bytes", "records", BLUE, 4), ("gossip_bytes", "gossip", ORANGE, -14)):
        values = [row[name] / 1000 for row in rows]
        axes.plot(nodes, values, color=colour, marker="o", markersize=4)
        _label(axes, label, nodes[-1], values[-1], colour, (-8, lift))
    axes.set(xscale="log", title="Sent by an idle node, kB/s")
    axes.set_ylim(0)
    _ticks(axes, nodes)


def _label(axes: Any, text: str, x: float, y: float, colour: str, shift: tuple[int, int]) -> None:
    axes.annotate(text, (x, y), shift, textcoords="offset points", ha="right", color=colour)


def _ticks(axes: Any, nodes: Sequence[int]) -> None:
    shown = [count for count in nodes if count in (10, 100, 1000)] or list(nodes)
    axes.set_xticks(shown, [f"{count:,}" for count in shown])
    axes.minorticks_off()
