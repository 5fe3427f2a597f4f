"""Connections that are kept from one use to the next, past their pools: what ends one costs nobody an answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import orjson
import pytest
import uvloop
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from app import database
from app.batcher import PIPELINES_MAX
from app.config import Settings
from app.embedded import Stores
from app.history import FENCE_LOCK, FencedError, HistoryEntry, KeptConnection, write_history
from app.redis_client import StateStore
from app.sentinel import connection_pool
from tests.integration.desk import command, eventually

TRANSFER: dict[str, Any] = {
    "mark_version": 0,
    "kind": "deposit",
    "amount": "1",
    "client_transfer_id": "a",
    "balance_after": "1",
    "equity_after": "1",
    "used_margin_after": "0",
}


def deposit(number: int, **changes: str) -> HistoryEntry:
    body = {**TRANSFER, "client_transfer_id": f"deposit-{number}", **changes}
    return HistoryEntry(number, "transfer", "alice", number, 1, 1_700_000_000_000_000 + number, orjson.dumps(body))


@pytest.fixture
async def engine(stores: Stores) -> AsyncIterator[AsyncEngine]:
    made = database.create_engine(stores.database_url)
    yield made
    await made.dispose()


@pytest.fixture
async def kept(engine: AsyncEngine) -> AsyncIterator[KeptConnection]:
    made = KeptConnection(engine)
    yield made
    await made.close()


@pytest.fixture
async def observer(stores: Stores) -> AsyncIterator[Redis]:
    """A connection of somebody else's."""
    async with Redis.from_url(stores.redis_url) as client:
        yield client


@pytest.fixture
async def store(stores: Stores, settings: Settings) -> AsyncIterator[StateStore]:
    made = StateStore(stores.redis_url, settings)
    yield made
    await made.close()


async def backend(kept: KeptConnection) -> int:
    """The process of Postgres at the other end."""
    return (await kept.open()).get_server_pid()


async def test_batches_of_history_go_over_one_connection(kept: KeptConnection) -> None:
    before = await backend(kept)
    for number in (1, 2, 3):
        assert await write_history(kept, [deposit(number)], epoch=1) == []
    assert await backend(kept) == before


async def test_a_session_that_may_not_write_is_not_kept(kept: KeptConnection) -> None:
    driver = await kept.open()
    await driver.execute("SET default_transaction_read_only = on")
    with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
        await write_history(kept, [deposit(1)], epoch=1)
    assert await write_history(kept, [deposit(1)], epoch=1) == []


async def test_a_session_in_a_transaction_that_failed_is_not_kept(kept: KeptConnection) -> None:
    driver = await kept.open()
    await driver.execute("BEGIN")
    with pytest.raises(asyncpg.CheckViolationError):
        await write_history(kept, [deposit(1, amount="-1")], epoch=1)
    assert await write_history(kept, [deposit(1)], epoch=1) == []


async def test_rows_of_an_older_epoch_do_not_cost_the_connection(kept: KeptConnection) -> None:
    before = await backend(kept)
    with pytest.raises(FencedError):
        await write_history(kept, [deposit(1)], epoch=0)
    assert await backend(kept) == before


async def test_a_connection_that_the_server_has_ended_is_made_anew(kept: KeptConnection, stores: Stores) -> None:
    await write_history(kept, [deposit(1)], epoch=1)
    before, driver = await backend(kept), await kept.open()
    owner = await asyncpg.connect(stores.owner_url)
    await owner.execute("SELECT pg_terminate_backend($1)", before)
    await owner.close()

    async def is_closed() -> bool:
        return driver.is_closed()

    await eventually(is_closed, "the driver to hear of the end")
    assert await write_history(kept, [deposit(2)], epoch=1) == []
    assert await backend(kept) != before


async def test_a_write_that_is_given_up_leaves_nothing_behind_for_the_next(
    kept: KeptConnection, engine: AsyncEngine
) -> None:
    async with engine.begin() as connection:
        await connection.execute(text(f"SELECT pg_advisory_xact_lock({FENCE_LOCK})"))
        writing = asyncio.create_task(write_history(kept, [deposit(1)], epoch=1))
        await asyncio.sleep(0.2)
        assert not writing.done(), "it waits for the lock"
        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing
    assert await write_history(kept, [deposit(2)], epoch=1) == []
    async with engine.connect() as connection:
        assert (await connection.scalars(text("SELECT id FROM transfers"))).all() == [2]


async def test_a_connection_that_redis_has_closed_costs_no_answer(store: StateStore, observer: Redis) -> None:
    for _ in range(3):
        await asyncio.gather(*(store.batcher.execute("PING") for _ in range(3)))
        await command(observer, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        await asyncio.sleep(0.05)
    assert await store.batcher.execute("PING") == b"PONG"


async def test_pipelines_share_as_many_connections_as_may_be_under_way(store: StateStore, observer: Redis) -> None:
    before = int((await observer.info("clients"))["connected_clients"])
    for _ in range(5):
        # The second half comes while the first is under way.
        first = [store.batcher.execute("PING") for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.gather(*first, *(store.batcher.execute("PING") for _ in range(3)))
    assert int((await observer.info("clients"))["connected_clients"]) - before <= PIPELINES_MAX
    await store.batcher.close()
    assert await store.batcher.execute("PING") == b"PONG"


async def test_a_connection_that_still_has_an_answer_to_give_serves_nobody(store: StateStore, observer: Redis) -> None:
    await store.batcher.execute("PING")
    await command(observer, "CLIENT", "PAUSE", int(store.call_seconds * 1000) + 300)
    with pytest.raises(RedisTimeoutError):
        await store.batcher.execute("ECHO", "late")
    await asyncio.sleep(0.5)
    assert await store.batcher.execute("ECHO", "mine") == b"mine"


def test_to_write_to_what_was_reset_is_a_lost_connection_under_uvloop_too(stores: Stores) -> None:
    """uvloop, which serves the API, raises a RuntimeError: a mark that met one was answered 500."""

    async def write_after_the_end() -> None:
        pool = connection_pool(stores.redis_url, max_connections=1, timeout_seconds=1)
        connection: Any = await pool.get_connection()  # type: ignore[no-untyped-call]
        connection._writer.transport.abort()
        await asyncio.sleep(0.01)
        with pytest.raises(RedisConnectionError):
            await connection.send_command("PING", check_health=False)
        await pool.release(connection)
        await pool.disconnect()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(write_after_the_end())
