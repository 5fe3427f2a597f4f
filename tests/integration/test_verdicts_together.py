"""Many verdicts are recorded by one call, and each is judged on its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from decimal import Decimal
from typing import Any, Final

import asyncpg
import numpy as np
import pytest

from app import redis_client as keys
from app.booking import Booking
from app.columns import INT64, Chunk, read_chunk, screen
from app.config import Settings
from app.embedded import Stores
from app.services.trading import TradeOrder, TransferOrder
from tests.integration.desk import booking_on
from watchdog.breaches import BreachBook, Settled

BTC: Final = "BTC-PERP"
CROWD: Final = [f"account-{number}" for number in range(7)]


@pytest.fixture
async def booking(stores: Stores, settings: Settings) -> AsyncIterator[Booking]:
    """Seven accounts long 0.9 BTC from 50,000 with 10,000 each, all of them candidates at 43,000: 3,700 below 3,870."""
    async with booking_on(stores, settings) as made:
        await made.marks.set_mark(BTC, Decimal(50_000), confirm=True)
        for name in CROWD:
            await made.book_transfer(TransferOrder(name, "deposit", Decimal(10_000)), client_transfer_id=None)
            order = TradeOrder(name, BTC, "buy", Decimal("0.9"), Decimal(50_000))
            await made.book_trade(order, client_trade_id=None)
        await made.marks.set_mark(BTC, Decimal(43_000), confirm=True)
        yield made


async def read(booking: Booking) -> Chunk:
    return await read_chunk(booking.store.client, 0, 100, booking.contracts)


async def settle(booking: Booking, chunk: Chunk) -> Settled:
    """Judge ``chunk`` as it was read, whatever has happened since."""
    settled = Settled()
    screened = screen(chunk, booking.contracts, restore_at="initial")
    async for part in BreachBook(booking).settle(chunk, screened, {}):
        settled.add(part)
    await booking.outbox.record([*settled.opened, *settled.ended])
    return settled


def names(entries: object) -> list[str]:
    return [entry.account_id for entry in entries]  # type: ignore[attr-defined]


async def test_of_many_verdicts_those_that_are_refused_keep_no_other_from_being_recorded(
    booking: Booking, postgres: asyncpg.Connection
) -> None:
    chunk = await read(booking)
    # Since the read: one restored by a deposit, one with less cash and still a candidate, one unreadable.
    await booking.book_transfer(TransferOrder(CROWD[1], "deposit", Decimal(9_000)), client_transfer_id=None)
    await booking.book_transfer(TransferOrder(CROWD[3], "deposit", Decimal(1)), client_transfer_id=None)
    await booking.store.client.delete(keys.positions_key(CROWD[5]))
    await booking.store.client.set(keys.positions_key(CROWD[5]), "no hash")

    settled = await settle(booking, chunk)

    others = [name for name in CROWD if name not in {CROWD[1], CROWD[5]}]
    assert sorted(names(settled.opened)) == others
    assert list(settled.quarantined) == [CROWD[5]]
    assert (settled.candidates, settled.breaches_more, settled.overdue) == (5, 5, 0)
    rows = await postgres.fetch("SELECT account_id, balance FROM liquidations ORDER BY account_id")
    assert [row["account_id"] for row in rows] == others
    # The one that had moved was judged again on what it is now.
    assert {row["account_id"]: row["balance"] for row in rows}[CROWD[3]] == 10_001
    assert await booking.store.client.get(keys.LIQUIDATIONS) == b"5"


async def test_the_same_verdicts_a_second_time_make_no_row(booking: Booking, postgres: asyncpg.Connection) -> None:
    chunk = await read(booking)
    first, second = await settle(booking, chunk), await settle(booking, chunk)
    assert (len(first.opened), len(second.opened)) == (7, 0)
    assert second.candidates == 7
    assert await postgres.fetchval("SELECT count(*) FROM liquidations") == 7
    ids = [row["id"] for row in await postgres.fetch("SELECT id FROM liquidations ORDER BY id")]
    assert ids == list(range(ids[0], ids[0] + 7))
    assert int(await booking.store.client.get(keys.HISTORY_LAST_ID) or 0) == ids[-1]


async def test_breaches_and_recoveries_go_together_in_one_call(booking: Booking, postgres: asyncpg.Connection) -> None:
    await settle(booking, await read(booking))
    # At 45,000 an account of 9,000 more is restored: 14,500 against 8,100; a new one is no candidate there.
    await booking.store.client.set(keys.balance_key(CROWD[0]), "19000")
    await booking.read(CROWD[0])
    await booking.adopt(await booking.read(CROWD[0]))
    order = TransferOrder("late", "deposit", Decimal(10_000))
    await booking.book_transfer(order, client_transfer_id=None)
    await booking.marks.set_mark(BTC, Decimal(50_000), confirm=True)
    await booking.book_trade(TradeOrder("late", BTC, "buy", Decimal("0.9"), Decimal(50_000)), client_trade_id=None)
    await booking.marks.set_mark(BTC, Decimal(43_000), confirm=True)

    settled = await settle(booking, await read(booking))

    assert names(settled.opened) == ["late"]
    assert names(settled.ended) == [CROWD[0]]
    assert await postgres.fetchval("SELECT count(*) FROM recoveries") == 1
    assert await booking.store.client.get(keys.RECOVERIES) == b"1"


async def test_an_account_that_the_list_names_twice_has_one_breach(
    booking: Booking, postgres: asyncpg.Connection
) -> None:
    chunk = await read(booking)
    twice = replace(
        chunk.rows(slice(0, 2)),
        first_slot=0,
        balance=chunk.balance[[0, 0]],
        quantity={BTC: chunk.quantity[BTC][[0, 0]]},
        cost={BTC: chunk.cost[BTC][[0, 0]]},
    )
    await booking.store.client.lset(keys.ACCOUNTS, 1, CROWD[0])
    await settle(booking, twice)
    assert await postgres.fetchval("SELECT count(*) FROM liquidations WHERE account_id = $1", CROWD[0]) == 1


async def breaches(booking: Booking) -> list[int]:
    """The column, in the order of the slots."""
    packed: Any = await booking.store.client.get(keys.COLUMN_BREACH)
    found: list[int] = np.frombuffer(packed, dtype=INT64).tolist()
    return found


async def lookups(booking: Booking) -> int:
    commands: Any = await booking.store.client.info("commandstats")
    return int(commands.get("cmdstat_lindex", {"calls": 0})["calls"])


@pytest.mark.parametrize(("epoch", "looked_up"), [(None, 0), ("0", len(CROWD))], ids=["its own epoch", "another"])
async def test_a_slot_read_with_its_name_is_looked_up_again_only_in_another_epoch(
    booking: Booking, epoch: str | None, looked_up: int
) -> None:
    chunk = await read(booking)
    marks = chunk.marks if epoch is None else replace(chunk.marks, epoch=epoch)
    before = await lookups(booking)
    settled = await settle(booking, replace(chunk, marks=marks))
    assert names(settled.opened) == CROWD
    assert await lookups(booking) == before + looked_up
    assert await breaches(booking) == [entry.id for entry in settled.opened]


@pytest.mark.parametrize("slot", ["1", "6", "7", "999999"])
async def test_a_ledger_that_names_another_slot_sets_its_account_apart(booking: Booking, slot: str) -> None:
    chunk = await read(booking)
    await booking.store.client.hset(keys.ledger_key(CROWD[0]), "slot", slot)
    settled = await settle(booking, chunk)
    assert names(settled.opened) == CROWD[1:]
    assert list(settled.quarantined) == [CROWD[0]]
    assert await breaches(booking) == [0, *(entry.id for entry in settled.opened)]


async def test_an_empty_position_by_hand_is_not_taken_for_none(booking: Booking) -> None:
    await booking.store.client.delete(keys.positions_key(CROWD[0]))
    await booking.adopt(await booking.read(CROWD[0]))
    await booking.store.client.hset(keys.ledger_key(CROWD[0]), mapping={"breach": "1", "breach_version": "1"})
    chunk = await read(booking)
    flat_in_breach = replace(chunk.rows(slice(0, 1)), first_slot=0, breach=np.array([1], dtype=INT64))
    await booking.store.client.hset(keys.positions_key(CROWD[0]), BTC, "")
    settled = await settle(booking, flat_in_breach)
    assert (settled.ended, list(settled.quarantined)) == ([], [CROWD[0]])
