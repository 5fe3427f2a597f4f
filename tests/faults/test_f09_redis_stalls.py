"""F9: Redis stands still under load. Every request ends in time, nothing is applied twice, and each id tells."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from random import Random
from typing import Final

from tests.faults.checker import check
from tests.faults.conftest import CellFactory
from tests.faults.journal import Row
from tests.faults.load import Load

CELLS: Final = 5
STALL_SECONDS: Final = 3.0
LONG_STALL_SECONDS: Final = 12.0
REQUEST_SECONDS_MAX: Final = 2.0
RECOVERY_SECONDS_MAX: Final = 2.0


async def test_a_stalled_redis_ends_each_request_in_time_and_applies_nothing_twice(
    cell: CellFactory, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], seed: int, random: Random
) -> None:
    result = row("F9", "Redis stopped for 3 s, once for 12 s")
    stalls = [[STALL_SECONDS] * rounds(6, 1) for _ in range(rounds(CELLS, 2))]
    stalls += [[LONG_STALL_SECONDS]] * rounds(1, 0)
    loads = [Load(await cell(), seed=seed, clients=6, name=f"load{number}") for number in range(len(stalls))]
    await asyncio.gather(*(_stall(load, seconds, result, random) for load, seconds in zip(loads, stalls, strict=True)))
    for load in loads:
        await check(load.cell, load, result)
    result.require_green()


async def _stall(load: Load, stalls: list[float], result: Row, random: Random) -> None:
    await load.start()
    for seconds in stalls:
        result.rounds += 1
        await load.acknowledged(40)
        await load.cell.stutter(random)
        load.fault()
        load.cell.signal_redis(signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            load.cell.signal_redis(signal.SIGCONT)
        recovery_seconds = await load.first_after(time.monotonic())
        result.recovered(recovery_seconds)
        if recovery_seconds > RECOVERY_SECONDS_MAX:
            result.complain(f"requests piled up: {recovery_seconds:.2f} s until one was acknowledged")
    await load.stop()
    slowest_seconds = load.cell.slowest_request_seconds()
    if slowest_seconds > REQUEST_SECONDS_MAX:
        result.complain(f"a request took {slowest_seconds:.2f} s")
