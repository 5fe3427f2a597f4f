"""Which rows are measured, on what, in what order; a row that cannot be measured says why and holds up no other."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Final

from tests.bench import breaches, crowded, memory, report, requests, sweeps, whole
from tests.bench.ratios import ROUNDS_MIN, Row
from tests.bench.requests import Scale

ROWS: Final = tuple(f"b{number}" for number in range(1, 14))
CHEAP_TIMES: Final = 3
"""Rounds of what takes milliseconds, for each round of what takes seconds."""

Say = Callable[[str], None]
Measure = Callable[[], Awaitable[Row | list[Row]]]


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured: accounts that trade over REST, and that are swept; rounds; seconds of load; marks."""

    traders: int = 5_000
    accounts: int = 1_000_000
    rounds: int = ROUNDS_MIN
    seconds: int = 3
    marks: int = 200

    @property
    def scale(self) -> Scale:
        """Of the rows that wrk loads."""
        return Scale(rounds=self.rounds, seconds=self.seconds, accounts=self.traders)


FULL: Final = Size()
QUICK: Final = Size(traders=1_000, accounts=100_000, rounds=2, seconds=2, marks=40)


async def measure(names: Iterable[str], size: Size, say: Say) -> list[Row]:
    """The rows of these names, in their own order."""
    wanted, rows = set(names), []
    for name, measured in (
        ("b1", lambda: requests.measure_trades(size.scale, say)),
        ("b2", lambda: requests.measure_two_workers(size.scale, say)),
        ("b3", lambda: requests.measure_reads(size.scale, say)),
        ("b12", lambda: whole.measure_whole(size.scale, say)),
        ("b7", lambda: sweeps.measure_ten_times(size.accounts, say, rounds=size.rounds)),
    ):
        if name in wanted:
            rows += await _row(name, measured, say)
    if of_world := sorted(wanted & {"b4", "b5", "b6", "b8", "b9", "b10", "b11", "b13"}):
        rows += await _row(" ".join(of_world), lambda: _on_one_world(wanted, size, say), say)
    return sorted(rows, key=lambda row: (int(row.name.split()[0][1:]), row.name))


async def _on_one_world(wanted: set[str], size: Size, say: Say) -> list[Row]:
    """The rows that share one population, those that change it last."""
    rows: list[Row] = []
    cheap = CHEAP_TIMES * size.rounds
    async with sweeps.world(size.accounts, say) as world:
        for name, measured in (
            ("b4", lambda: sweeps.measure_beside_reading(world, say, rounds=cheap)),
            ("b5", lambda: sweeps.measure_beside_postgres(world, say, rounds=cheap)),
            ("b6", lambda: sweeps.measure_beside_keys(world, say, rounds=size.rounds)),
            ("b8", lambda: breaches.measure_mark_to_row(world, say, marks=size.marks)),
            ("b10", lambda: crowded.measure_crowded_trades(world, say, rounds=size.rounds)),
            ("b11", lambda: report.measure_report(world, say, rounds=size.rounds)),
            ("b13", lambda: memory.measure_memory(world, say)),
            ("b9", lambda: breaches.measure_burst(world, say, rounds=size.rounds, rows=size.accounts // 10)),
        ):
            if name in wanted:
                rows += await _row(name, measured, say)
    return rows


async def _row(name: str, measured: Measure, say: Say) -> list[Row]:
    say(f"{name.upper()} ...")
    started = time.monotonic()
    try:
        found = await measured()
        say(f"{name.upper()} took {time.monotonic() - started:.0f} s")
    except Exception as error:  # noqa: BLE001 - whatever it was, the other rows are still worth their time
        traceback.print_exc(file=sys.stderr)
        return [Row(name.upper(), "", "", "", not_measured=f"{type(error).__name__}: {error}"[:300])]
    return found if isinstance(found, list) else [found]
