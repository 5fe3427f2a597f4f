"""F6 and F7: Redis dies of SIGKILL under load, and comes back with all it had, or without the last it was told."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Final

from tests.faults.cell import Cell
from tests.faults.checker import check
from tests.faults.conftest import CellFactory
from tests.faults.journal import Row
from tests.faults.load import Load

HELD: Final = "outbox.before_postgres=0.15"
"""One API holds its rows this long before it writes them: Redis is back before, without them."""


async def test_a_killed_redis_loses_nothing_that_was_acknowledged(
    cell: CellFactory, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], seed: int, random: Random
) -> None:
    result = row("F6", "kill -9 Redis, restart from its AOF")
    running = await cell(apis=2)
    load = Load(running, seed=seed)
    await load.start()
    for _ in range(rounds(50, 5)):
        result.rounds += 1
        await asyncio.sleep(random.uniform(0.05, 0.3))
        await running.stutter(random)
        load.fault()
        await running.kill_redis()
        await running.start_redis()
        result.recovered(await load.first_after(time.monotonic()))
    await load.stop()
    await check(running, load, result)
    result.require_green()


async def test_a_power_loss_gives_no_id_twice_and_loses_nothing_that_is_in_history(
    cell: CellFactory, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], seed: int, random: Random
) -> None:
    result = row("F7", "power loss: the AOF cut at a random offset")
    running = await cell(apis=1, watchdogs=1)
    await running.start("api", failpoints=HELD)
    load = Load(running, seed=seed)
    await load.start()
    cuts = 0
    for _ in range(rounds(60, 6)):
        result.rounds += 1
        await load.acknowledged(5)
        before = _append_only_file(running).stat().st_size
        await asyncio.sleep(random.uniform(0.05, 0.4))
        await running.stutter(random)
        load.fault()
        await running.kill_redis()
        cuts += _cut(running, before, random)
        await running.start_redis()
        result.recovered(await load.first_after(time.monotonic()))
    await load.stop()
    if not cuts:
        result.complain("no cut took anything away")
    await check(running, load, result)
    result.require_green()


def _append_only_file(running: Cell) -> Path:
    return running.redis.directory / "appendonly.aof"


def _cut(running: Cell, first: int, random: Random) -> int:
    """Cut the file anywhere after ``first``; how many bytes that took away.

    One that was written anew since, and is shorter, stays whole: where its last second begins nobody can tell.
    """
    path = _append_only_file(running)
    size = path.stat().st_size
    offset = random.randint(min(first, size), size)
    os.truncate(path, offset)
    return size - offset
