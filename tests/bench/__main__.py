"""``python -m tests.bench [b1 b3 ...] [--quick] [--document docs/benchmarks.md]``: measure, and print the table.

Without names, all rows. ``--document`` writes the page, its plots and the numbers beside it; rows that were not asked
for keep the numbers of the run that measured them last.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import uvloop

from tests.bench import document
from tests.bench.plan import FULL, QUICK, ROWS, Size, measure
from tests.bench.table import text_table


def say(line: str) -> None:
    """Progress goes to standard error, the table to standard output."""
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - a command


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("rows", nargs="*", type=str.lower, help=f"which rows: {' '.join(ROWS)}")
    parser.add_argument("--quick", action="store_true", help="fewer accounts, rounds and seconds; decides nothing")
    parser.add_argument("--document", type=Path, help="the page to write")
    for name in ("traders", "accounts", "rounds", "seconds", "marks"):
        parser.add_argument(f"--{name}", type=int, help=f"{getattr(FULL, name):,} unless given")
    options = parser.parse_args()
    if unknown := set(options.rows) - set(ROWS):
        parser.error(f"no such row: {' '.join(sorted(unknown))}")
    return options


def _size(options: argparse.Namespace) -> Size:
    given = {name: value for name in Size.__slots__ if (value := getattr(options, name)) is not None}
    return replace(QUICK if options.quick else FULL, **given)


def main() -> None:
    """Measure what is asked for and show it."""
    options = _options()
    started = time.monotonic()
    rows = uvloop.run(measure(options.rows or ROWS, _size(options), say))
    say(f"{time.monotonic() - started:.0f} s")
    print(text_table(rows))  # noqa: T201 - a command
    if options.document is not None:
        document.write(options.document, rows)


if __name__ == "__main__":
    main()
