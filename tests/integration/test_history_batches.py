"""A batch of history is recorded whole or not at all, and only in the newest epoch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final

import orjson
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from app import database
from app.embedded import Stores
from app.history import FENCE_LOCK, FencedError, HistoryEntry, write_history
from app.outbox import POSTGRES_ERRORS

TRADE: Final = {
    "symbol": "BTC-PERP",
    "side": "buy",
    "quantity": "1",
    "price": "50000",
    "client_trade_id": "a",
    "mark_version": 1,
    "mark_price": "50000",
    "realised_pnl": "0",
    "balance_after": "10001",
    "quantity_after": "1",
    "cost_after": "50000",
    "equity_after": "10001",
    "used_margin_after": "10000",
}
DEPOSIT: Final = {
    "kind": "deposit",
    "amount": "1",
    "client_transfer_id": "b",
    "mark_version": 1,
    "balance_after": "10001",
    "equity_after": "10001",
    "used_margin_after": "0",
}


def entry(number: int, kind: str, body: dict[str, Any], *, epoch: int = 1) -> HistoryEntry:
    return HistoryEntry(number, kind, "alice", number, epoch, 1_700_000_000_000_000 + number, orjson.dumps(body))


@pytest.fixture
async def engine(stores: Stores) -> AsyncIterator[AsyncEngine]:
    made = database.create_engine(stores.database_url)
    yield made
    await made.dispose()


async def recorded(engine: AsyncEngine) -> list[int]:
    async with engine.connect() as connection:
        return list((await connection.scalars(text("SELECT id FROM trades UNION SELECT id FROM transfers"))).all())


async def test_rows_of_two_kinds_are_recorded_together(engine: AsyncEngine) -> None:
    assert await write_history(engine, [entry(1, "transfer", DEPOSIT), entry(2, "trade", TRADE)], epoch=1) == []
    assert sorted(await recorded(engine)) == [1, 2]


async def test_a_later_row_is_not_recorded_without_the_earlier_one_of_another_kind(engine: AsyncEngine) -> None:
    """Trades are inserted before transfers."""
    spoilt = entry(1, "transfer", {**DEPOSIT, "amount": "-1"})
    with pytest.raises(POSTGRES_ERRORS):
        await write_history(engine, [spoilt, entry(2, "trade", TRADE)], epoch=1)
    assert await recorded(engine) == []


@pytest.mark.parametrize("kinds", [1, 2])
async def test_a_writer_that_waited_for_a_new_epoch_is_fenced_by_it(engine: AsyncEngine, kinds: int) -> None:
    rows = [entry(1, "transfer", DEPOSIT), entry(2, "trade", TRADE)][:kinds]
    async with engine.begin() as connection:
        await connection.execute(text(f"SELECT pg_advisory_xact_lock({FENCE_LOCK})"))
        writing = asyncio.create_task(write_history(engine, rows, epoch=1))
        await asyncio.sleep(0.2)
        assert not writing.done(), "it waits for the lock"
        await connection.execute(
            text("INSERT INTO epochs SELECT epoch + 1, signature, 'a test', timestamp FROM epochs WHERE epoch = 1")
        )
    with pytest.raises(FencedError):
        await writing
    assert await recorded(engine) == []
    assert await write_history(engine, rows, epoch=2) == []


async def test_the_service_may_ask_for_the_fence(engine: AsyncEngine) -> None:
    async with engine.connect() as connection:
        try:
            assert await connection.scalar(text("SELECT fenced_epoch()")) == 1
        except DBAPIError as error:
            pytest.fail(str(error))
