"""The table: one line a row, as text and as Markdown, with what was found wrong and counted below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tests.bench.ratios import Row, Spread

HEADINGS: Final = ("#", "measured", "beside", "ratio", "must reach", "aim", "reached")


def cells(row: Row) -> tuple[str, ...]:
    """The row's cells, in the order of ``HEADINGS``."""
    must, aim = (bound.text if bound else "" for bound in (row.must, row.aim))
    if row.not_measured:
        return (row.name, row.measured_what, row.beside_what, "", must or "reported", aim, row.verdict)
    measured, beside = (
        f"{what}: {Spread.of(values).show(row.value_form)} {row.unit}"
        for what, values in ((row.measured_what, row.measured), (row.beside_what, row.beside))
    )
    return (
        row.name,
        measured,
        beside,
        row.ratio.show(ratio_form(row.ratio.median)),
        must or "reported",
        aim,
        row.verdict,
    )


def ratio_form(ratio: float) -> str:
    """Three digits that say something, whatever the size."""
    return "{:,.0f}" if ratio >= 100 else "{:.1f}" if ratio >= 10 else "{:.2f}" if ratio >= 0.1 else "{:.3f}"


def remarks(row: Row) -> list[str]:
    """What has to be said of a row beside its cells, faults first."""
    said = [f"WRONG: {fault}" for fault in row.faults] + [f"NOT REACHED: {unmet}" for unmet in row.unmet]
    if row.not_measured:
        said.append(f"not measured: {row.not_measured}")
    return said + row.notes


def text_table(rows: Sequence[Row]) -> str:
    """The table for a terminal."""
    lines = [HEADINGS, *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADINGS))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    shown.insert(1, "  ".join("-" * width for width in widths))
    shown += ["", *(f"{row.name}: {remark}" for row in rows for remark in remarks(row))]
    return "\n".join(shown)


def markdown_table(rows: Sequence[Row]) -> str:
    """The table for the page."""
    lines = [f"| {' | '.join(HEADINGS)} |", f"| {' | '.join('---' for _ in HEADINGS)} |"]
    for row in rows:
        name, measured, beside, ratio, must, aim, verdict = cells(row)
        bold = f"**{ratio}**" if ratio else ""
        lines.append(f"| {name} | {measured} | {beside} | {bold} | {must} | {aim} | {verdict} |")
    return "\n".join(lines)
