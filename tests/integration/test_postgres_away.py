"""Postgres stopped while trading goes on: what happened waits in the outbox, and is all there, once, afterwards."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import asyncpg
import httpx
import psutil
import pytest
import redis.asyncio

from app import reconcile
from app.config import Settings
from app.embedded import Servers
from app.embedded_postgres import PostgresServer
from tests.integration.desk import Desk, api_in_this_process, differences, eventually, expect

AT_ONCE_SECONDS = 1.0
RECORD_TIMEOUT_SECONDS = 2.0
DRAINED_WITHIN_SECONDS = 10.0


@pytest.fixture
async def own_desk(own_servers: Servers) -> AsyncIterator[Desk]:
    """A desk at an API in this process, on stores of this test's own."""
    stores = own_servers.stores
    settings = Settings(redis_url=stores.redis_url, database_url=stores.database_url)
    await asyncio.to_thread(reconcile.migrate, settings, stores)
    async with api_in_this_process(stores) as client:
        yield Desk(client)


@contextmanager
def silent(postgres: PostgresServer) -> Iterator[None]:
    """Every process of it stands still: connections stand, and nothing is answered."""
    assert postgres.process is not None
    server = psutil.Process(postgres.process.pid)
    processes = [server, *server.children(recursive=True)]
    for process in processes:
        process.suspend()
    try:
        yield
    finally:
        for process in processes:
            process.resume()


async def test_trades_are_booked_while_postgres_is_stopped_and_recorded_once_each_when_it_is_back(
    own_desk: Desk, own_servers: Servers
) -> None:
    await own_desk.mark("50000")
    await own_desk.deposit("alice", "100000")
    booked = [await own_desk.buy("alice", "0.1", "50000")]
    assert booked[0]["recorded"] is True

    await asyncio.to_thread(own_servers.postgres.stop)
    started = time.monotonic()
    booked.append(await own_desk.buy("alice", "0.1", "50000"))
    assert time.monotonic() - started < RECORD_TIMEOUT_SECONDS + AT_ONCE_SECONDS
    for number in range(10):
        started = time.monotonic()
        more = {"client_trade_id": f"while-away-{number}"}
        booked.append(expect(await own_desk.trade("alice", "buy", "0.1", "50000", **more), 201))
        assert time.monotonic() - started < AT_ONCE_SECONDS
    assert [answer["recorded"] for answer in booked[1:]] == [False] * 11
    # State is in Redis, so it is right without Postgres; a retry is known without it too.
    assert (await own_desk.account("alice"))["positions"][0]["quantity"] == "1.2"
    again = await own_desk.trade("alice", "buy", "0.1", "50000", client_trade_id="while-away-3")
    assert expect(again, 200)["trade_id"] == booked[5]["trade_id"]
    assert expect(await own_desk.client.get("/trades"), 503)["code"] == "store_unavailable"
    assert "postgres" in expect(await own_desk.client.get("/health/ready"), 503)["missing"]

    await asyncio.to_thread(own_servers.restart_dead)
    async with redis.asyncio.Redis.from_url(own_servers.redis_url) as client:

        async def is_drained() -> bool:
            return await client.xlen("outbox") == 0

        await eventually(is_drained, "the outbox to drain", within_seconds=DRAINED_WITHIN_SECONDS)
    connection = await asyncpg.connect(own_servers.database_url)
    rows = await connection.fetch("SELECT id FROM trades ORDER BY id")
    await connection.close()
    assert [row["id"] for row in rows] == [answer["trade_id"] for answer in booked]
    assert await differences(own_servers.stores) == []

    async def is_recorded_again() -> bool:
        return bool((await own_desk.buy("alice", "0.000001", "50000"))["recorded"])

    await eventually(is_recorded_again, "trades to be recorded at once again")
    expect(await own_desk.client.get("/health/ready"), 200)
    replayed = await own_desk.trade("alice", "buy", "0.1", "50000", client_trade_id="while-away-3")
    assert expect(replayed, 200)["recorded"] is True


async def test_a_silent_postgres_keeps_nobody_waiting_longer_than_a_request_may_take(
    own_desk: Desk, own_servers: Servers
) -> None:
    """A request that reads history makes several calls: of a connection, of a transaction, of the rows, of the end."""
    await own_desk.mark("50000")
    await own_desk.deposit("alice", "100000")
    expect(await own_desk.client.get("/trades"), 200)
    slowest = 0.0

    async def asked(verb: str, path: str, **more: object) -> httpx.Response:
        nonlocal slowest
        started = time.monotonic()
        answer = await own_desk.client.request(verb, path, **more)  # type: ignore[arg-type]
        slowest = max(slowest, time.monotonic() - started)
        return answer

    with silent(own_servers.postgres):
        # More than the pool has connections: some stand, some would have to be made, and some have to wait for one.
        paths = ("/trades", "/transfers", "/liquidations", "/recoveries") * 6
        for answer in await asyncio.gather(*(asked("GET", path) for path in paths)):
            assert expect(answer, 503)["code"] == "store_unavailable"
        halted, *ready = await asyncio.gather(
            asked("POST", "/halt", json={"reason": "silence"}), *(asked("GET", "/health/ready") for _ in range(12))
        )
        assert expect(halted, 200)["recorded"] is False
        assert [expect(answer, 503)["missing"] for answer in ready] == [["postgres"]] * 12
    assert slowest < RECORD_TIMEOUT_SECONDS + AT_ONCE_SECONDS

    async def answers_again() -> bool:
        return (await own_desk.client.get("/trades")).status_code == 200

    await eventually(answers_again, "history to be read again")
