"""API keys as a process lives with them: made, revoked, while a store is away, too often, and without any."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import asyncpg
import httpx
import psycopg2
import pytest
import redis.asyncio
from sqlalchemy.engine import make_url

from app.api_keys import KeyRing
from app.database import create_engine
from app.embedded import Servers, Stores
from app.errors import RateLimited, StoreUnavailable
from app.rate_limits import RateLimits
from tests.harness import free_port
from tests.integration.conftest import KeyMaker
from tests.integration.desk import api_in_this_process, bearer, command, eventually, expect, new_key, revoke

REFRESH_SECONDS = 0.3
READING_SECONDS = 5.0
"""What one reading of the keys may take on a busy machine."""


@pytest.fixture
async def keyed(stores: Stores) -> AsyncIterator[httpx.AsyncClient]:
    """A client without a key, of an API that asks for one."""
    async with api_in_this_process(stores, auth="on", keys_refresh_seconds=str(REFRESH_SECONDS)) as client:
        yield client


@asynccontextmanager
async def postgres_away(servers: Servers, stores: Stores) -> AsyncIterator[None]:
    """Nobody gets to the test's own database, and whoever was there is thrown out."""
    name = make_url(stores.database_url).database
    with closing(psycopg2.connect(servers.database_url)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS false")
            cursor.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
            try:
                yield
            finally:
                cursor.execute(f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS true")


async def test_a_new_key_works_at_once_and_a_revoked_one_ends_within_the_stated_time(
    keyed: httpx.AsyncClient, make_key: KeyMaker, stores: Stores
) -> None:
    key = await make_key("read")
    expect(await keyed.get("/trades", headers=bearer(key)), 200)
    await revoke(stores, key)

    async def is_refused() -> bool:
        return (await keyed.get("/trades", headers=bearer(key))).status_code == 401

    await eventually(is_refused, "the key to be refused", within_seconds=REFRESH_SECONDS + READING_SECONDS)
    await revoke(stores, key)  # twice is once


async def test_rows_of_keys_and_of_halts_cannot_be_changed(
    make_key: KeyMaker, stores: Stores, postgres: asyncpg.Connection
) -> None:
    key = await make_key("read")
    await revoke(stores, key)
    assert key.split("_")[2] not in str(await postgres.fetch("SELECT * FROM api_keys"))
    for statement in (
        "UPDATE api_keys SET scopes = ARRAY['operate']",
        "DELETE FROM api_key_revocations",
        "TRUNCATE api_keys CASCADE",
        "DELETE FROM halts",
        "DELETE FROM resumptions",
    ):
        with pytest.raises(asyncpg.IntegrityConstraintViolationError, match="history is immutable"):
            await postgres.execute(statement)


async def test_known_keys_go_on_while_postgres_is_away_but_not_for_ever(
    servers: Servers, stores: Stores, make_key: KeyMaker
) -> None:
    key, engine = await make_key("read"), create_engine(stores.database_url)
    ring = KeyRing(engine, refresh_seconds=0.05, stale_seconds_max=1.0)
    await ring.start()
    try:
        assert await ring.find(key) is not None
        async with postgres_away(servers, stores):
            away_since = time.monotonic()
            try:
                assert await ring.find(key) is not None
            except StoreUnavailable:
                assert time.monotonic() - away_since > 0.9

            async def is_refused() -> bool:
                try:
                    return await ring.find(key) is None
                except StoreUnavailable:
                    return True

            await eventually(is_refused, "the copy to be too old")
            with pytest.raises(StoreUnavailable):
                await ring.find(key)

        async def is_back() -> bool:
            try:
                return await ring.find(key) is not None
            except StoreUnavailable:
                return False

        await eventually(is_back, "the keys to be read again")
    finally:
        await ring.stop()
        await engine.dispose()


async def test_a_process_that_never_read_the_keys_says_that_it_cannot_tell(stores: Stores, make_key: KeyMaker) -> None:
    key, engine = await make_key("read"), create_engine(f"postgresql://nobody@127.0.0.1:{free_port()}/none")
    ring = KeyRing(engine, refresh_seconds=60, stale_seconds_max=900)
    await ring.start()
    try:
        with pytest.raises(StoreUnavailable, match="keys"):
            await ring.find(key)
    finally:
        await ring.stop()
        await engine.dispose()


async def test_trades_go_on_with_keys_while_postgres_is_away(
    servers: Servers, stores: Stores, make_key: KeyMaker, keyed: httpx.AsyncClient
) -> None:
    headers = bearer(await make_key("operate", "read"))
    expect(await keyed.post("/accounts/alice/deposit", json={"amount": "5"}, headers=headers), 201)
    async with postgres_away(servers, stores):
        answer = await keyed.post("/accounts/alice/deposit", json={"amount": "7"}, headers=headers)
        assert expect(answer, 201)["recorded"] is False
        assert expect(await keyed.get("/positions/alice", headers=headers), 200)["balance"] == "12"
        assert expect(await keyed.get("/trades", headers=headers), 503)["code"] == "store_unavailable"


async def test_beyond_its_rate_a_key_is_told_when_to_come_back_and_nothing_is_booked(
    stores: Stores, make_key: KeyMaker
) -> None:
    first, second = bearer(await make_key("operate", "read")), bearer(await make_key("operate"))
    async with api_in_this_process(stores, auth="on", writes_per_second_max="3") as client:

        async def deposit(headers: dict[str, str]) -> httpx.Response:
            return await client.post("/accounts/alice/deposit", json={"amount": "1"}, headers=headers)

        started = time.monotonic()
        answers = await asyncio.gather(*(deposit(first) for _ in range(40)))
        windows = math.ceil(time.monotonic() - started) + 1
        booked = [answer for answer in answers if answer.status_code == 201]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert len(booked) + len(refused) == 40
        assert 3 <= len(booked) <= 3 * windows
        assert refused
        assert refused[0].json()["code"] == "rate_limited"
        assert refused[0].headers["Retry-After"] == "1"
        # Another key, and another route of the same one, have counters of their own.
        expect(await deposit(second), 201)
        account = expect(await client.get("/positions/alice", headers=first), 200)
        assert account["balance"] == str(len(booked) + 1)


async def test_workers_count_together_and_touch_no_key_of_the_state(
    stores: Stores, redis_client: redis.asyncio.Redis
) -> None:
    before = set(await redis_client.keys("*"))
    workers = [RateLimits(stores.redis_url, reads_per_second_max=5, writes_per_second_max=5) for _ in range(3)]
    started = time.monotonic()
    accepted = sum([await taken(worker) for _ in range(10) for worker in workers])
    assert 5 <= accepted <= 5 * (math.ceil(time.monotonic() - started) + 1)
    made = set(await redis_client.keys("*")) - before
    assert made
    for name in map(str, made):
        assert name.startswith("limits:")
        assert 0 < await command(redis_client, "PTTL", name) <= 2000
    for worker in workers:
        await worker.close()


async def taken(worker: RateLimits) -> bool:
    """Whether one more write of a key was within its rate."""
    try:
        await worker.count("a-key", "POST /trade", reads=False)
    except RateLimited:
        return False
    return True


async def test_a_worker_counts_for_itself_while_redis_is_away() -> None:
    worker = RateLimits(f"redis://127.0.0.1:{free_port()}/0", reads_per_second_max=5, writes_per_second_max=5)
    started = time.monotonic()
    accepted = sum([await taken(worker) for _ in range(30)])
    assert 5 <= accepted <= 5 * (math.ceil(time.monotonic() - started) + 1)
    await worker.close()


async def test_without_keys_other_machines_are_refused_however_the_application_was_started(stores: Stores) -> None:
    for peer, served in (("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("10.0.0.7", False), ("x", False)):
        async with api_in_this_process(stores, peer=peer) as client:
            answer = await client.get("/trades")
            assert answer.status_code == (200 if served else 403), peer
            if not served:
                assert answer.json()["code"] == "loopback_only"
                assert "PLIMSOLL_ALLOW_KEYLESS" in answer.json()["detail"]
            expect(await client.get("/health/live"), 200)
    async with api_in_this_process(stores, peer="10.0.0.7", allow_keyless="1") as client:
        expect(await client.get("/trades"), 200)
    async with api_in_this_process(stores, peer="10.0.0.7", auth="on") as client:
        expect(await client.get("/trades"), 401)
        expect(await client.get("/trades", headers=bearer(await new_key(stores, "read"))), 200)
