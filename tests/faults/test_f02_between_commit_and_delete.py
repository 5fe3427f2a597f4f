"""F2: death between the commit in Postgres and the delete from the outbox; and a recovery that overtakes its breach."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Final, cast

from app import redis_client as keys
from tests.faults.cell import Cell, Worker, has_died, until
from tests.faults.checker import check
from tests.faults.conftest import CellFactory
from tests.faults.journal import Row
from tests.faults.load import SYMBOL, Load

OUTBOX_EMPTY_SECONDS_MAX: Final = 10.0
VICTIMS: Final = 3


async def test_a_row_that_was_committed_and_not_deleted_is_recorded_once(
    cell: CellFactory, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], seed: int, random: Random
) -> None:
    result = row("F2", "kill -9 between Postgres commit and outbox delete")
    running = await cell(apis=1)
    load = Load(running, seed=seed)
    await load.start()
    for _ in range(VICTIMS):
        await _start_victim(running, random)
    watches = []
    for _ in range(rounds(100, 8)):
        victim = await _next_death(running)
        result.rounds += 1
        watches.append(asyncio.create_task(_watch_left_over(running, result)))
        running.kill(victim)
        await _start_victim(running, random)
    await asyncio.gather(*watches)
    await load.stop()
    for victim in list(running.apis):
        running.kill(victim)
    await running.start("api")
    result.recovered(await running.drained())
    if result.recovery_seconds > OUTBOX_EMPTY_SECONDS_MAX:
        result.complain(f"rows left over stayed in the outbox for {result.recovery_seconds:.1f} s")
    load.in_flight_at_faults = load.cut_off
    await check(running, load, result)
    result.require_green()


async def _start_victim(running: Cell, random: Random) -> None:
    victim = running.start_worker("api", failpoints=f"outbox.after_postgres_commit=kill@{random.randint(1, 12)}")

    async def ready_or_dead() -> bool:
        """One that drains what another left over may die of it before it is ready."""
        return not running.is_running(victim) or await running._is_ready(victim)

    await until(ready_or_dead, "a victim neither starts nor dies", running.logs)


async def _next_death(running: Cell) -> Worker:
    """The first victim that has died at its failpoint."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for worker in running.apis[1:]:
            if not running.is_running(worker):
                return worker
        await asyncio.sleep(0.01)
    raise AssertionError(f"the failpoint is not reached\n{running.logs()}")


async def _watch_left_over(running: Cell, result: Row) -> None:
    """Measure how long what lies in the outbox at a death stays there."""
    waiting = [keys.as_text(entry) for entry, _ in cast("list[tuple[bytes, object]]", await _entries(running))]

    async def gone() -> bool:
        return not waiting or not await _entries(running, waiting[0], waiting[-1])

    result.recovered(await until(gone, "rows left over stay in the outbox", running.logs))


async def _entries(running: Cell, first: str = "-", last: str = "+") -> object:
    return await running.client.xrange(keys.OUTBOX, first, last)


async def test_a_recovery_recorded_before_its_breach_leaves_one_row_of_each(
    cell: CellFactory, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], seed: int
) -> None:
    result = row("F2 order", "a recovery recorded before its breach")
    running = await cell(apis=1, sweep_interval_seconds="30")
    load = Load(running, seed=seed, clients=3)
    await load.start()
    await load.acknowledged(100)
    await load.stop()
    breached = Load(running, seed=seed, accounts=8, name="breached")
    for account in breached.accounts:
        await breached.send(breached.new("deposit", account, {"amount": "11000"}))
    for _ in range(rounds(5, 2)):
        result.rounds += 1
        await breached.set_mark(50_000)
        for account in breached.accounts:
            body = {"account_id": account, "symbol": SYMBOL, "side": "buy", "quantity": "1", "price": "50000"}
            await breached.send(breached.new("trade", account, body))
        watchdog = await running.start("watchdog", failpoints="outbox.before_postgres=kill")
        await breached.set_mark(43_000)
        await until(partial(has_died, running, watchdog), "the watchdog lives", running.logs)
        running.kill(watchdog)
        breached.in_flight_at_faults += await running.client.xlen(keys.OUTBOX)
        for account in breached.accounts:
            await breached.send(breached.new("deposit", account, {"amount": "10000"}))
        overtaken = await running.postgres(
            "SELECT count(*) FROM recoveries LEFT JOIN liquidations ON liquidations.id = liquidation_id "
            "WHERE liquidations.id IS NULL"
        )
        if not overtaken[0][0]:
            result.complain("no recovery was recorded before its breach")
        result.recovered(await running.drained())
        for account in breached.accounts:
            body = {"account_id": account, "symbol": SYMBOL, "side": "sell", "quantity": "1", "price": "43000"}
            await breached.send(breached.new("trade", account, body))
            await breached.send(breached.new("withdrawal", account, {"amount": "3000"}))
    await check(running, [load, breached], result)
    for table in ("liquidations", "recoveries"):
        (found,) = await running.postgres(f"SELECT count(*), count(DISTINCT account_id) FROM {table}")
        if tuple(found) != (expected := (result.rounds * len(breached.accounts), len(breached.accounts))):
            result.complain(f"{table} are {tuple(found)}, not {expected}")
    result.require_green()
