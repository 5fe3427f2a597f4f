"""``docs/benchmarks.md``: the machine, the method, the table and the pictures; and the numbers as JSON beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tests.bench import machine, plots
from tests.bench.plan import ROWS
from tests.bench.ratios import ROUNDS_MIN, Bound, Row
from tests.bench.table import markdown_table, remarks

TEMPLATE: Final = Path(__file__).with_name("benchmarks.md.in")
NUMBERS: Final = "numbers.json"


def write(page: Path, measured: Sequence[Row]) -> None:
    """Write the page; rows of an earlier run that were not measured now stay, with the day they were measured on."""
    folder = page.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    today = datetime.now(UTC).date().isoformat()
    for row in measured:
        row.measured_on = today
    known = {row.name: row for row in _read(folder / NUMBERS)} | {row.name: row for row in measured}
    rows = sorted(known.values(), key=_place)
    (folder / NUMBERS).write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    pictures = plots.draw(rows, folder)
    text = TEMPLATE.read_text()
    for name, value in {
        "machine": "\n".join(f"| {heading} | {what} |" for heading, what in machine.describe()),
        "table": markdown_table(rows),
        "remarks": "\n".join(_remarks(row) for row in rows if remarks(row)),
        "pictures": "\n\n".join(f"![{title}]({folder.name}/{file})" for file, title in pictures),
        "days": ", ".join(sorted({row.measured_on for row in rows})),
        "rounds": str(ROUNDS_MIN),
    }.items():
        text = text.replace(f"@{name}@", value)
    page.write_text(text)


def _remarks(row: Row) -> str:
    return f"* **{row.name}**: {'; '.join(remarks(row))}"


def _place(row: Row) -> tuple[int, str]:
    return ROWS.index(row.name.split()[0].lower()), row.name


def _read(numbers: Path) -> list[Row]:
    """The rows that were written last; none where there are none."""
    if not numbers.exists():
        return []
    return [_row(item) for item in json.loads(numbers.read_text())]


def _row(item: dict[str, Any]) -> Row:
    bounds = {name: Bound(**item[name]) if item[name] else None for name in ("must", "aim")}
    return Row(**{**item, **bounds})
