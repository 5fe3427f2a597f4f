"""Several watchdogs at once, without a leader: each breach and each recovery is recorded once."""

from __future__ import annotations

import asyncio
from collections import Counter

import asyncpg
import httpx

from app.embedded import Stores
from tests.conftest import SystemFactory
from tests.harness import Process, System
from tests.integration.desk import Desk, differences, eventually


async def test_two_watchdogs_at_once_record_each_of_100_breaches_once(
    system: SystemFactory, desk: Desk, postgres: asyncpg.Connection, stores: Stores
) -> None:
    running = await system(api_workers=0, watchdogs=2)
    await desk.mark("50000")
    names = [f"carol-{number}" for number in range(100)]
    for some in (names[at : at + 20] for at in range(0, 100, 20)):
        await asyncio.gather(*(desk.deposit(name, "10000") for name in some))
        await asyncio.gather(*(desk.buy(name, "1", "50000") for name in some))
    for price in ("44000", "50000", "44000"):
        version = await desk.sweep(price)
        for watchdog in running.watchdogs:
            await has_swept(watchdog, version)
    rows = await postgres.fetch("SELECT account_id, mark_version FROM liquidations")
    assert Counter(row["account_id"] for row in rows) == dict.fromkeys(names, 2)
    rows = await postgres.fetch("SELECT account_id FROM recoveries")
    assert Counter(row["account_id"] for row in rows) == dict.fromkeys(names, 1)
    for watchdog in running.watchdogs:
        await shows(running, watchdog, plimsoll_liquidations_total=200, plimsoll_open_breaches=100)
        await shows(running, watchdog, plimsoll_recoveries_total=100, plimsoll_candidates=100)
    assert await differences(stores) == []


async def shows(running: System, watchdog: Process, **metrics: int) -> None:
    """Wait for the sweep after the one in which the other watchdog was first."""

    async def is_shown() -> bool:
        return all([await running.metric(watchdog, name) == value for name, value in metrics.items()])

    await eventually(is_shown, f"{watchdog.name} to show {metrics}")


async def has_swept(watchdog: Process, version: int) -> None:
    """Wait until this very watchdog has swept a mark version."""
    async with httpx.AsyncClient(base_url=watchdog.url, trust_env=False) as client:

        async def is_swept() -> bool:
            ready = (await client.get("/health/ready")).json()
            return (ready["swept_version"] or 0) >= version

        await eventually(is_swept, f"{watchdog.name} to sweep version {version}")
