"""F1: an API process dies of SIGKILL at a random moment; each client id is booked once or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random

from tests.faults.checker import check
from tests.faults.conftest import CellFactory
from tests.faults.journal import Row
from tests.faults.load import Load


async def test_an_api_killed_at_any_point_books_each_client_id_once_or_never(
    cell: CellFactory, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], seed: int, random: Random
) -> None:
    result = row("F1", "kill -9 an API process")
    running = await cell(apis=2)
    load = Load(running, seed=seed)
    await load.start()
    for _ in range(rounds(200, 10)):
        result.rounds += 1
        await asyncio.sleep(random.uniform(0.01, 0.12))
        victim = random.choice(running.apis)
        moment = load.fault()
        running.kill(victim)
        replacement = running.start_worker("api")
        running.forget(replacement)
        result.recovered(await load.first_after(moment))
        await running.ready(replacement)
        running.apis.append(replacement)
    await load.stop()
    await check(running, load, result)
    result.require_green()
