"""The columns are a copy: one that is lost is made anew before a row is written into it, and is no edit by hand."""

from __future__ import annotations

from typing import Any

import asyncpg
import orjson
import pytest
import redis.asyncio

from app import redis_client as keys
from app.records import unpack
from tests.conftest import SystemFactory
from tests.harness import System
from tests.integration.desk import BTC_PERP

BOB_SLOT = 1
BOB_QUANTITY_UNITS = 20_000_000


@pytest.fixture
async def running(system: SystemFactory) -> System:
    """An API and no watchdog: nobody mends but the trade itself. Alice holds 0.1 and Bob 0.2."""
    running = await system(watchdogs=0)
    await running.client.post("/mark-price", json={"symbol": BTC_PERP, "price": "50000"})
    for account, quantity in (("alice", "0.1"), ("bob", "0.2")):
        await running.client.post(f"/accounts/{account}/deposit", json={"amount": "10000"})
        await buy(running, account, quantity)
    return running


async def buy(running: System, account: str, quantity: str) -> None:
    trade = {"account_id": account, "symbol": BTC_PERP, "side": "buy", "quantity": quantity, "price": "50000"}
    (await running.client.post("/trade", json=trade)).raise_for_status()


async def test_a_trade_writes_into_a_lost_column_only_when_it_is_whole_again(
    running: System, redis_client: redis.asyncio.Redis, postgres: asyncpg.Connection
) -> None:
    await redis_client.delete(keys.quantity_column(BTC_PERP))
    await buy(running, "alice", "0.1")
    async with redis.asyncio.Redis.from_url(running.stores.redis_url) as raw:
        packed: Any = await raw.getrange(keys.quantity_column(BTC_PERP), 8 * BOB_SLOT, 8 * BOB_SLOT + 7)
    assert unpack(packed) == BOB_QUANTITY_UNITS
    assert await postgres.fetchval("SELECT count(*) FROM adjustments") == 0


async def test_an_edit_by_hand_beside_a_damaged_column_starts_from_what_history_has(
    running: System, redis_client: redis.asyncio.Redis, postgres: asyncpg.Connection
) -> None:
    await redis_client.setrange(keys.quantity_column(BTC_PERP), 0, "\0" * 8)
    await redis_client.set(keys.balance_key("alice"), "12345")
    await buy(running, "alice", "0.1")
    row = await postgres.fetchrow("SELECT balance_before, balance_after, positions_before FROM adjustments")
    assert row is not None
    assert (row["balance_before"], row["balance_after"]) == (10_000, 12_345)
    assert orjson.loads(row["positions_before"])[BTC_PERP]["quantity"] == "0.1"
