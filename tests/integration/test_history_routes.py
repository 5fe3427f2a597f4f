"""What happened: filtered, paged newest first without gaps or doubles, and never changed."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta
from typing import Any

import asyncpg
import pytest
import pytest_asyncio

from tests.integration.desk import Desk, expect

pytestmark = pytest.mark.asyncio(loop_scope="module")

TABLES = ("trades", "transfers", "liquidations", "recoveries", "adjustments", "epochs")
MANY = 25


async def page(desk: Desk, route: str, **parameters: str) -> dict[str, Any]:
    return expect(await desk.client.get(f"/{route}", params=parameters), 200)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def history(watched_desk: Desk) -> Desk:
    """Alice's and Bob's trades and transfers, and two breaches of Carol's, the first of them over."""
    await watched_desk.mark("50000")
    for account in ("alice", "bob"):
        await watched_desk.deposit(account, "100000", client_transfer_id="first-deposit")
        for number in range(5):
            expect(await watched_desk.trade(account, "buy", "0.1", "50000", client_trade_id=f"{account}-{number}"), 201)
        expect(await watched_desk.transfer("withdraw", account, "0.5"), 201)
    await watched_desk.deposit("carol", "10000")
    await watched_desk.buy("carol", "1", "50000")
    for price in ("44000", "50000", "44000"):
        await watched_desk.sweep(price)
    return watched_desk


async def test_a_trade_s_row_says_what_its_answer_said(history: Desk) -> None:
    await history.mark("45000")
    answer = await history.sell("bob", "0.05", "45000.01")
    row = (await history.rows("trades", account_id="bob"))[0]
    assert row["id"] == answer["trade_id"]
    names = ("account_id", "symbol", "side", "quantity", "price", "timestamp", "client_trade_id", "mark_price")
    assert {name: row[name] for name in (*names, "realised_pnl")} == {
        name: answer[name] for name in (*names, "realised_pnl")
    }
    assert (row["balance_after"], row["quantity_after"]) == (answer["balance"], answer["position"]["quantity"])


@pytest.mark.parametrize("route", ["trades", "transfers", "liquidations", "recoveries"])
async def test_rows_come_newest_first(history: Desk, route: str) -> None:
    rows = await history.rows(route)
    assert len(rows) >= 1
    order = [(row["timestamp"], row["id"]) for row in rows]
    assert order == sorted(order, reverse=True)


@pytest.mark.parametrize(
    ("route", "account", "count"),
    [("trades", "alice", 5), ("transfers", "alice", 2), ("liquidations", "carol", 2), ("recoveries", "carol", 1)],
)
async def test_an_account_s_rows_are_its_own(history: Desk, route: str, account: str, count: int) -> None:
    rows = await history.rows(route, account_id=account)
    assert [row["account_id"] for row in rows] == [account] * count


@pytest.mark.parametrize("route", ["trades", "transfers", "liquidations", "recoveries"])
async def test_an_account_without_rows_has_an_empty_page(history: Desk, route: str) -> None:
    assert await page(history, route, account_id="nobody") == {"items": [], "next_cursor": None}


async def test_an_operation_id_finds_its_one_trade_or_transfer(history: Desk) -> None:
    (row,) = await history.rows("trades", client_trade_id="alice-3")
    assert (row["account_id"], row["client_trade_id"]) == ("alice", "alice-3")
    rows = await history.rows("transfers", client_transfer_id="first-deposit", account_id="bob")
    assert [row["account_id"] for row in rows] == ["bob"]
    assert await history.rows("trades", client_trade_id="alice-3", account_id="bob") == []


async def test_the_id_that_the_server_made_finds_its_trade_too(history: Desk) -> None:
    await history.mark("45000")
    answer = await history.sell("alice", "0.000001", "45000")
    (row,) = await history.rows("trades", client_trade_id=answer["client_trade_id"])
    assert row["id"] == answer["trade_id"]


async def test_start_is_in_and_end_is_out(history: Desk) -> None:
    rows = await history.rows("trades", account_id="alice")
    third = rows[2]["timestamp"]
    assert await history.rows("trades", account_id="alice", start=third) == rows[:3]
    assert await history.rows("trades", account_id="alice", end=third) == rows[3:]
    assert await history.rows("trades", account_id="alice", start=third, end=rows[0]["timestamp"]) == rows[1:3]


async def test_a_time_without_an_offset_is_utc_and_one_with_another_is_understood(history: Desk) -> None:
    rows = await history.rows("trades", account_id="alice")
    third = datetime.fromisoformat(rows[2]["timestamp"])
    assert third.utcoffset() == timedelta(0)
    naive = third.replace(tzinfo=None).isoformat()
    elsewhere = (third + timedelta(hours=5, minutes=30)).replace(tzinfo=None).isoformat() + "+05:30"
    for start in (naive, elsewhere):
        assert await history.rows("trades", account_id="alice", start=start) == rows[:3]


async def test_a_liquidation_shows_when_it_ended(history: Desk) -> None:
    second, first = await history.rows("liquidations", account_id="carol")
    (recovery,) = await history.rows("recoveries", account_id="carol")
    assert (first["recovered_at"], recovery["liquidation_id"]) == (recovery["timestamp"], first["id"])
    assert second["recovered_at"] is None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def many_at_once(history: Desk, shared_postgres: asyncpg.Connection) -> list[int]:
    """Many transfers, five at each of five moments, as a burst could book them; their ids, newest first."""
    first_id = 1_000_000
    await shared_postgres.execute(
        "INSERT INTO transfers (id, account_id, seq, epoch, timestamp, mark_version, kind, amount, client_transfer_id, "
        "balance_after) SELECT $1 + n, 'burst', n, 1, '2026-01-01T00:00:00Z'::timestamptz + interval '1 s' * (n % 5), "
        "0, 'deposit', 1, 'burst-' || n, n FROM generate_series(1, $2) AS n",
        first_id,
        MANY,
    )
    numbers = sorted(range(1, MANY + 1), key=lambda number: (number % 5, number), reverse=True)
    return [first_id + number for number in numbers]


@pytest.mark.parametrize("limit", [1, 2, 4, 5, 7, 24, 25, 26])
async def test_pages_have_neither_gaps_nor_doubles_where_rows_share_their_time(
    history: Desk, many_at_once: list[int], limit: int
) -> None:
    seen: list[int] = []
    cursor: dict[str, str] = {}
    pages = 0
    while True:
        found = await page(history, "transfers", account_id="burst", limit=str(limit), **cursor)
        seen += [row["id"] for row in found["items"]]
        pages += 1
        if found["next_cursor"] is None:
            break
        assert len(found["items"]) == limit
        cursor = {"cursor": found["next_cursor"]}
    assert seen == many_at_once
    assert pages == -(-MANY // limit)


async def test_rows_that_are_booked_while_one_reads_the_pages_neither_shift_nor_double_the_older_ones(
    history: Desk,
) -> None:
    await history.mark("45000")
    before = await history.rows("trades", account_id="alice")
    first = await page(history, "trades", account_id="alice", limit="2")
    await history.sell("alice", "0.000001", "45000")
    rest = await history.rows("trades", account_id="alice", cursor=first["next_cursor"])
    assert first["items"] + rest == before


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE {table} SET epoch = epoch",
        "UPDATE {table} SET epoch = 0 WHERE false",
        "DELETE FROM {table}",
        "DELETE FROM {table} WHERE false",
        "TRUNCATE {table}",
        "TRUNCATE {table} CASCADE",
    ],
)
async def test_postgres_itself_refuses_to_change_history(
    history: Desk, shared_postgres: asyncpg.Connection, table: str, statement: str
) -> None:
    before = await shared_postgres.fetch(f"SELECT * FROM {table}")
    with pytest.raises(asyncpg.IntegrityConstraintViolationError, match="history is immutable"):
        await shared_postgres.execute(statement.format(table=table))
    assert await shared_postgres.fetch(f"SELECT * FROM {table}") == before


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO transfers SELECT * FROM again",
        "UPDATE again SET id = id + 9999, seq = seq + 9999, amount = 'NaN'; INSERT INTO transfers SELECT * FROM again",
    ],
    ids=["the same id", "not a number"],
)
async def test_postgres_itself_refuses_a_row_twice_and_an_amount_that_is_no_number(
    history: Desk, shared_postgres: asyncpg.Connection, statement: str
) -> None:
    await shared_postgres.execute("CREATE TEMPORARY TABLE again AS SELECT * FROM transfers LIMIT 1")
    try:
        with pytest.raises(asyncpg.IntegrityConstraintViolationError):
            await shared_postgres.execute(statement)
    finally:
        await shared_postgres.execute("DROP TABLE again")


async def test_ids_and_times_of_trades_booked_at_once_are_all_different_and_in_one_order(history: Desk) -> None:
    await history.mark("45000")
    account = history.new_account()
    await history.deposit(account, "100000")
    await asyncio.gather(*(history.buy(account, "0.01", "45000") for _ in range(16)))
    rows = await history.rows("trades", account_id=account)
    assert len({row["id"] for row in rows}) == 16
    by_seq = sorted(rows, key=lambda row: row["seq"], reverse=True)
    assert [row["id"] for row in by_seq] == sorted((row["id"] for row in rows), reverse=True)
    assert [row["seq"] for row in by_seq] == list(range(17, 1, -1))
