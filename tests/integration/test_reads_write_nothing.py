"""A GET reads: no state in Redis, no row in Postgres, whatever is asked and however often."""

from __future__ import annotations

import asyncpg
import pytest
import redis.asyncio

from app.embedded import Stores
from tests.integration.desk import BTC_PERP, Desk, command, expect
from tests.integration.monitor import monitored

READS = (
    "/positions/alice",
    "/positions/carol",
    "/positions/nobody",
    "/positions/broken",
    "/margin-report",
    "/margin-report?limit=1",
    "/margin-report?order=margin_ratio",
    "/trades",
    "/trades?account_id=alice&limit=1",
    "/transfers",
    "/liquidations",
    "/recoveries",
    "/health/live",
    "/health/ready",
    "/metrics",
    "/docs",
    "/openapi.json",
    "/",
)
TABLES = ("trades", "transfers", "liquidations", "recoveries", "adjustments", "epochs")


@pytest.fixture
async def busy_desk(desk: Desk, redis_client: redis.asyncio.Redis) -> Desk:
    """Alice is fine, Carol is a candidate that nobody has swept, an edit of Alice waits, and one account is broken.

    All of it would give a read that writes something to do.
    """
    await desk.mark("50000")
    for account in ("alice", "carol"):
        await desk.deposit(account, "10000")
    await desk.buy("carol", "1", "50000")
    await desk.mark("44000")
    await redis_client.set("account:alice:balance", "10001")
    await redis_client.set("account:by-hand:balance", "10000")
    await redis_client.set("account:broken:balance", "abc")
    await redis_client.set(f"mark_price:{BTC_PERP}", "43999")
    return desk


async def rows_by_table(postgres: asyncpg.Connection) -> dict[str, int]:
    return {table: await postgres.fetchval(f"SELECT count(*) FROM {table}") for table in TABLES}


async def test_the_reads_of_this_test_are_all_the_get_routes_there_are(desk: Desk) -> None:
    paths = expect(await desk.client.get("/openapi.json"), 200)["paths"]
    documented = {path for path, methods in paths.items() if "get" in methods}
    assert documented == {
        "/positions/{account_id}",
        "/margin-report",
        "/trades",
        "/transfers",
        "/liquidations",
        "/recoveries",
        "/health/live",
        "/health/ready",
    }


@pytest.mark.parametrize("read", READS)
async def test_a_read_runs_no_command_of_redis_that_writes(busy_desk: Desk, stores: Stores, read: str) -> None:
    async with monitored(stores.redis_url) as seen:
        for _ in range(2):
            answer = await busy_desk.client.get(read)
            assert answer.status_code < 500, answer.text
    assert seen.flagged("write") == []
    assert seen.flagged("pubsub") == []


async def test_the_monitor_of_these_tests_would_see_a_write_inside_of_a_script(busy_desk: Desk, stores: Stores) -> None:
    async with monitored(stores.redis_url) as seen:
        await busy_desk.deposit("alice", "1")
    assert ["MSET", "account:alice:balance", "10002"] in [command[:3] for command in seen.flagged("write")]


async def test_all_reads_together_leave_every_row_count_and_the_whole_of_redis_as_they_were(
    busy_desk: Desk, postgres: asyncpg.Connection, redis_client: redis.asyncio.Redis
) -> None:
    rows = await rows_by_table(postgres)
    digest = await command(redis_client, "DEBUG DIGEST")
    for _ in range(3):
        for read in READS:
            await busy_desk.client.get(read)
    assert await rows_by_table(postgres) == rows
    assert await command(redis_client, "DEBUG DIGEST") == digest
    assert rows["liquidations"] == 0
