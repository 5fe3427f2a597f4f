"""F10: the network between the API and either store is slow, black, reset or cut into small pieces."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final
from urllib.parse import parse_qs, unquote, urlsplit

from tests.faults.checker import check
from tests.faults.conftest import CellFactory
from tests.faults.journal import Row
from tests.faults.load import Load
from tests.faults.proxy import Mode, open_proxy

MODES: Final[tuple[Mode, ...]] = ("latency", "blackhole", "reset", "sliced")
REQUEST_SECONDS_MAX: Final = 2.5
"""Two seconds for the stores, and what two shared cores add."""

HEALED_SECONDS_MAX: Final = 5.0


async def test_either_store_behind_a_bad_network_loses_nothing_and_the_pools_heal(
    cell: CellFactory, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], seed: int
) -> None:
    result = row("F10", "+200 ms, blackhole, reset, sliced; either store")
    running = await cell(apis=0)
    database = urlsplit(running.stores.database_url)
    sockets = parse_qs(database.query)["host"][0]
    redis_socket = unquote(urlsplit(running.stores.redis_url).path)
    async with open_proxy(redis_socket) as to_redis, open_proxy(f"{sockets}/.s.PGSQL.5432") as to_postgres:
        await running.start(
            "api",
            redis_url=f"redis://127.0.0.1:{to_redis.port}/0",
            database_url=f"postgresql://{database.username}@127.0.0.1:{to_postgres.port}{database.path}",
        )
        load = Load(running, seed=seed, clients=8)
        await load.start()
        for _ in range(rounds(2, 1)):
            for name, proxy in (("Redis", to_redis), ("Postgres", to_postgres)):
                for mode in MODES:
                    result.rounds += 1
                    await load.acknowledged(20)
                    load.fault()
                    proxy.become(mode)
                    await asyncio.sleep(rounds(3, 2))
                    proxy.become("pass")
                    healed = await load.first_after(time.monotonic())
                    result.recovered(healed)
                    if healed > HEALED_SECONDS_MAX:
                        result.complain(f"{name} {mode}: healed only after {healed:.1f} s")
        await load.stop()
        slowest_seconds = running.slowest_request_seconds()
        if slowest_seconds > REQUEST_SECONDS_MAX:
            result.complain(f"a request took {slowest_seconds:.2f} s")
        await check(running, load, result)
    result.require_green()
