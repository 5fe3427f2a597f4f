"""F17: watchdogs die mid-sweep, run beside each other, or wake with an old verdict in hand: one row per breach."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Final

from tests.faults.cell import Cell, Worker, has_died, until
from tests.faults.checker import check
from tests.faults.conftest import CellFactory
from tests.faults.herd import Busy, Herd
from tests.faults.journal import Row

SWEEP_SECONDS: Final = 1.0
PLACES: Final = ("breach.verdict", "outbox.before_postgres", "outbox.after_postgres_commit")


async def test_a_watchdog_killed_mid_sweep_leaves_one_row_per_breach(
    cell: CellFactory, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], seed: int, random: Random
) -> None:
    result = row("F17", "kill -9 the watchdog mid-sweep")
    running = await cell(watchdogs=1)
    herd, busy = Herd(running, seed), Busy(running, seed)
    await herd.start(busy)
    for number in range(rounds(100, 6)):
        result.rounds += 1
        watchdog = running.watchdogs[0]
        if number % 3 == 2:
            running.kill(watchdog)
            await herd.flip()
            watchdog = running.start_worker("watchdog", failpoints=f"{random.choice(PLACES)}=kill")
            await until(partial(has_died, running, watchdog), "the failpoint is not reached", running.logs)
        else:
            await herd.flip()
            await asyncio.sleep(random.uniform(0, 0.03))
        busy.in_flight_at_faults += busy.in_flight + await herd.missing()
        running.kill(watchdog)
        replacement = await running.start("watchdog")
        moment = time.monotonic()
        await herd.settled()
        result.recovered(time.monotonic() - moment)
        assert replacement in running.watchdogs
    if result.recovery_seconds > SWEEP_SECONDS + 1:
        result.complain(f"a breach was recorded {result.recovery_seconds:.2f} s after the watchdog was back")
    await _finish(running, herd, busy, result)


async def _finish(running: Cell, herd: Herd, busy: Busy, result: Row) -> None:
    await busy.stop()
    await herd.count(result)
    await check(running, [herd, busy], result)
    result.require_green()


async def test_two_and_three_watchdogs_record_each_breach_once(
    cell: CellFactory, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], seed: int
) -> None:
    result = row("F17 many", "two, then three watchdogs at once")
    running = await cell(watchdogs=2)
    herd, busy = Herd(running, seed), Busy(running, seed)
    await herd.start(busy)
    for number in range(2 * rounds(20, 4)):
        if number == rounds(20, 4):
            await running.start("watchdog")
        result.rounds += 1
        await herd.flip()
        busy.in_flight_at_faults += busy.in_flight + await herd.missing()
        moment = time.monotonic()
        await herd.settled()
        result.recovered(time.monotonic() - moment)
    await asyncio.sleep(SWEEP_SECONDS)
    await _finish(running, herd, busy, result)


async def test_a_watchdog_that_wakes_with_an_old_verdict_records_nothing(
    cell: CellFactory, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], seed: int
) -> None:
    result = row("F17 paused", "a watchdog paused with a verdict in hand")
    running = await cell(watchdogs=1)
    herd, busy = Herd(running, seed), Busy(running, seed)
    await herd.start(busy)
    (other,) = running.watchdogs
    for _ in range(rounds(8, 2)):
        result.rounds += 1
        running.signal(other, signal.SIGSTOP)
        # An account that trades is judged by whoever comes first, so the pause waits for a verdict on any.
        paused = running.start_worker("watchdog", failpoints="breach.verdict=stop@1")
        await running.ready(paused)
        await herd.flip()
        await until(partial(_is_stopped, paused), "no verdict is in hand", running.logs)
        busy.in_flight_at_faults += busy.in_flight + await herd.missing()
        running.signal(other, signal.SIGCONT)
        moment = time.monotonic()
        await herd.settled()
        result.recovered(time.monotonic() - moment)
        await herd.flip()
        await herd.settled()
        running.signal(paused, signal.SIGCONT)
        await running.ready(paused)
        await asyncio.sleep(0.2)
        running.kill(paused)
    await _finish(running, herd, busy, result)


async def _is_stopped(worker: Worker) -> bool:
    with open(f"/proc/{worker.pid}/stat") as described:  # noqa: ASYNC230, PTH123
        return described.read().rpartition(")")[2].split()[0] == "T"
