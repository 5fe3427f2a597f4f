"""The pictures of the page, as SVG: plain, the same for the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter

from tests.bench.ratios import Bound, Row, Spread

OURS: Final = "#1f5f8b"
OTHER: Final = "#b8bec5"
GOOD: Final = "#2e7d4f"
BAD: Final = "#b3372f"
INK: Final = "#24292f"
WIDTH_INCHES: Final = 8.5

STYLE: Final[Any] = {
    "svg.hashsalt": "plimsoll",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": "#8c959f",
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": "#e3e6ea",
    "axes.grid": True,
    "axes.grid.axis": "x",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def draw(rows: Sequence[Row], folder: Path) -> list[tuple[str, str]]:
    """Write every picture that there are numbers for; each one's file name and what it shows."""
    folder.mkdir(parents=True, exist_ok=True)
    by_name = {row.name: row for row in rows if row.ratios}
    drawn = []
    pictures: tuple[tuple[str, str, Callable[[dict[str, Row]], Any]], ...] = (
        ("reached", "Each ratio against what it must reach: right of the line is better", _reached),
        ("requests", "Requests a second, one worker", _requests),
        ("sweeps", "A sweep of every account, and what else could be done in its place", _sweeps),
        ("mark-to-row", "From a mark to the rows of its breaches", _mark_to_row),
        ("memory", "What an account takes in Redis", _memory),
    )
    with mpl.rc_context(STYLE):
        for name, title, picture in pictures:
            figure = picture(by_name)
            if figure is None:
                continue
            figure.axes[0].set_title(title)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
            plt.close(figure)
            drawn.append((f"{name}.svg", title))
    return drawn


def _reached(rows: dict[str, Row]) -> Any:  # noqa: ANN401 - matplotlib's Figure
    """Every bounded row as a multiple of its bound, so that all share one axis."""
    bounded = [row for row in rows.values() if row.must is not None][::-1]
    if not bounded:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH_INCHES, 0.45 * len(bounded) + 1.4))
    for place, row in enumerate(bounded):
        assert row.must is not None
        spread = row.ratio
        ends = [_times(row.must, value) for value in (spread.low, spread.high)]
        middle = _times(row.must, spread.median)
        colour = BAD if row.verdict in {"NO", "WRONG"} else GOOD
        axes.plot(ends, [place, place], color=colour, linewidth=2, alpha=0.5, solid_capstyle="round")
        axes.plot([middle], [place], "o", color=colour, markersize=7)
        if row.aim is not None:
            axes.plot([_times(row.must, row.aim.value)], [place], "|", color=INK, markersize=14)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} ×"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""))
    axes.set_yticks(range(len(bounded)), [f"{row.name}   {row.must.text}" for row in bounded if row.must])
    axes.set_xlabel("how far beyond what it must reach (dot: median, line: all rounds, tick: the aim)")
    return figure


def _times(bound: Bound, value: float) -> float:
    return value / bound.value if bound.better == "high" else bound.value / value


def _requests(rows: dict[str, Row]) -> Any:  # noqa: ANN401
    shown = [rows[name] for name in ("B3", "B1") if name in rows]
    if not shown:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH_INCHES, 1.1 * len(shown) + 1.3))
    for place, row in enumerate(shown):
        _bars(axes, place + 0.19, row.measured, OURS, "Plimsoll" if not place else None, "{:,.0f}")
        _bars(axes, place - 0.19, row.beside, OTHER, "bare endpoint" if not place else None, "{:,.0f}")
    axes.set_yticks(range(len(shown)), [row.measured_what.partition(",")[0] for row in shown])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("requests a second (median, and every round)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2)
    return figure


def _sweeps(rows: dict[str, Row]) -> Any:  # noqa: ANN401
    if "B4" not in rows:
        return None
    bars = [("Plimsoll's sweep", rows["B4"].measured, OURS), ("GETRANGE of the same bytes", rows["B4"].beside, OTHER)]
    for name, label in (("B5", "Postgres, float8, parallel"), ("B6", "key by key, pipelined")):
        if name in rows:
            bars.append((label, rows[name].beside, OTHER))
    figure, axes = plt.subplots(figsize=(WIDTH_INCHES, 0.55 * len(bars) + 1.3))
    for place, (_, values, colour) in enumerate(reversed(bars)):
        _bars(axes, place, values, colour, None, "{:,.0f} ms", height=0.6)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_yticks(range(len(bars)), [label for label, _, _ in reversed(bars)])
    axes.set_xlabel(f"milliseconds, {rows['B4'].measured_what.removeprefix('sweep of ')} (logarithmic)")
    return figure


def _mark_to_row(rows: dict[str, Row]) -> Any:  # noqa: ANN401
    row = rows.get("B8")
    if row is None or not row.samples:
        return None
    figure, axes = plt.subplots(figsize=(WIDTH_INCHES, 3.2))
    ordered = sorted(row.samples)
    axes.step(ordered, [(place + 1) / len(ordered) for place in range(len(ordered))], where="post", color=OURS)
    sweep = Spread.of(row.beside).median
    top = axes.get_xaxis_transform()
    lines = ((sweep, "median sweep", "--"), (3 * sweep, "must: 3 ×", "-"), (sweep * row.ratio.median, "p99", ":"))
    for number, (at, label, style) in enumerate(lines):
        axes.axvline(at, color=INK, linewidth=1, linestyle=style)
        axes.text(at, 0.06 + 0.1 * number, f" {label}", transform=top)
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_xlabel(f"milliseconds from the mark's acceptance to the commit of its last row, {len(ordered)} marks")
    return figure


def _memory(rows: dict[str, Row]) -> Any:  # noqa: ANN401
    row = rows.get("B13")
    if row is None or not row.parts:
        return None
    parts = sorted(row.parts.items(), key=lambda item: item[1])
    figure, axes = plt.subplots(figsize=(WIDTH_INCHES, 0.42 * len(parts) + 1.2))
    for place, (_, size) in enumerate(parts):
        axes.barh(place, size, color=OURS, height=0.6)
        axes.text(size, place, f" {size:,.0f}", va="center")
    axes.set_yticks(range(len(parts)), [name for name, _ in parts])
    axes.set_xlabel("bytes an account, names of keys and Redis' own included")
    return figure


def _bars(
    axes: Any,  # noqa: ANN401
    place: float,
    values: Sequence[float],
    colour: str,
    label: str | None,
    form: str,
    *,
    height: float = 0.36,
) -> None:
    """The median as a bar with its number, and each round as a small mark on it."""
    middle = Spread.of(values).median
    axes.barh(place, middle, color=colour, height=height, label=label)
    axes.plot(values, [place] * len(values), "|", color=INK, markersize=7, alpha=0.6)
    axes.annotate(form.format(middle), (max(values), place), xytext=(6, 0), textcoords="offset points", va="center")
