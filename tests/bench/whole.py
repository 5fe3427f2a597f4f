"""B12: the whole service beside the textbook version of it: trades, reads, and one check of every account."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Final

import asyncpg
from redis.asyncio import Redis
from sqlalchemy.engine import make_url

from app.booking import Booking
from app.services.trading import TradeOrder, TransferOrder
from tests.bench.load import MARK, Kind
from tests.bench.ratios import Row
from tests.bench.requests import (
    FUNDS,
    Count,
    Say,
    Scale,
    booked,
    first_position,
    loaded,
    market,
    trades_recorded,
)
from tests.bench.stage import booking_on
from tests.bench.textbook import DATABASE_VARIABLE, REDIS_VARIABLE, TABLES, check_accounts
from tests.harness import Process, System, free_port
from watchdog.refresh import Refresher
from watchdog.sweep import Sweeper

WEAK: Final = "account-weak"
WEAK_FUNDS: Final = Decimal(10_100)
CRASH: Final = Decimal(44_000)
"""A mark at which the weak account, long one coin from 50,000, is the only candidate: 4,100 < 4,400."""


async def measure_whole(scale: Scale, say: Say) -> list[Row]:
    """B12, in three rows: each a ratio of its own."""
    async with market("b12", scale, say) as system, _textbook(system, scale) as textbook:
        product = await system.start_api()
        rows = [
            await _requests("B12 trades", "trade", system, product, textbook, scale, say),
            await _requests("B12 reads", "positions", system, product, textbook, scale, say),
        ]
        product.terminate()
        system.apis.remove(product)
        async with booking_on(system, refresh_accounts_per_sweep=1) as booking:
            rows.append(await _checks(booking, textbook, scale, say))
    return rows


@dataclass(frozen=True, slots=True)
class _Textbook:
    """The textbook's process, and connections to what it keeps."""

    process: Process
    redis: Redis
    pool: asyncpg.Pool
    database_url: str


@asynccontextmanager
async def _textbook(system: System, scale: Scale) -> AsyncIterator[_Textbook]:
    """The textbook on the same two servers, in a database of its own in each, with the same accounts."""
    redis_url = system.stores.redis_url.replace("db=0", "db=1")
    database_url = make_url(system.stores.owner_url).set(database="textbook").render_as_string(hide_password=False)
    connection = await asyncpg.connect(system.stores.owner_url)
    await connection.execute("CREATE DATABASE textbook")
    await connection.close()
    pool = await asyncpg.create_pool(database_url)
    await pool.execute(TABLES)
    port = free_port()
    process = Process(
        "textbook",
        [sys.executable, "-m", "tests.bench.textbook"],
        system.environment(api_host="127.0.0.1", api_port=str(port), api_workers="1")
        | {REDIS_VARIABLE: redis_url, DATABASE_VARIABLE: database_url},
        f"http://127.0.0.1:{port}",
        system.directory / "textbook.log",
    )
    async with Redis.from_url(redis_url, decode_responses=True) as redis:
        try:
            await redis.set("mark_price:BTC-PERP", MARK)
            for number in range(scale.accounts):
                quantity, price, side = first_position(number)
                await _write(redis, f"account-{number:07d}", FUNDS, quantity if side == "buy" else -quantity, price)
            await process.wait_until_ready()
            yield _Textbook(process, redis, pool, database_url)
        finally:
            process.terminate()
            await pool.close()


async def _write(redis: Redis, name: str, balance: Decimal, quantity: Decimal, price: Decimal) -> None:
    await redis.set(f"account:{name}:balance", str(balance))
    await redis.hset(f"positions:{name}", "BTC-PERP", f'{{"quantity": "{quantity}", "avg_price": "{price}"}}')


async def _requests(
    name: str, kind: Kind, system: System, product: Process, textbook: _Textbook, scale: Scale, say: Say
) -> Row:
    what = {"trade": "durable POST /trade", "positions": "GET /positions"}[kind]
    row = Row(name, what, "textbook version", "requests/s")
    both: tuple[tuple[Process, Count], ...] = (
        (product, partial(trades_recorded, system.stores.owner_url)),
        (textbook.process, partial(trades_recorded, textbook.database_url)),
    )
    for number in range(scale.rounds + 1):
        rates = []
        for process, count in both:
            run = f"{kind}{number}-"
            if kind == "trade":
                found = await booked(row, count, process, scale, run=run)
            else:
                found = await loaded(row, process, kind, scale, run=run)
            rates.append(found.rate)
        if number:  # the first round warms up
            row.add(measured=rates[0], beside=rates[1])
            say(f"{name} round {number}: {rates[0]:,.0f} / {rates[1]:,.0f}")
    return row


async def _checks(booking: Booking, textbook: _Textbook, scale: Scale, say: Say) -> Row:
    """One check of every account, with a single candidate among them that both sides must find."""
    row = Row("B12 check", f"sweep of {scale.accounts + 1:,} accounts", "textbook version", "ms", value_form="{:,.1f}")
    row.notes.append("the ratio is how many times faster the sweep is")
    await booking.book_transfer(TransferOrder(WEAK, "deposit", WEAK_FUNDS), client_transfer_id=None)
    await booking.book_trade(TradeOrder(WEAK, "BTC-PERP", "buy", Decimal(1), Decimal(MARK)), client_trade_id=None)
    await _write(textbook.redis, WEAK, WEAK_FUNDS, Decimal(1), Decimal(MARK))
    await booking.marks.set_mark("BTC-PERP", CRASH, confirm=True)
    await textbook.redis.set("mark_price:BTC-PERP", str(CRASH))
    sweeper = Sweeper(booking, Refresher(booking))
    task = asyncio.create_task(sweeper.run())
    try:
        await sweeper.request("mark")
        for number in range(scale.rounds):
            await asyncio.sleep(0.3)
            started = time.perf_counter()
            await sweeper.request("mark")
            swept = time.perf_counter()
            candidates = await check_accounts(textbook.redis, textbook.pool)
            checked = time.perf_counter()
            row.add(
                measured=(swept - started) * 1_000,
                beside=(checked - swept) * 1_000,
                ratio=(checked - swept) / (swept - started),
            )
            if candidates != [WEAK] or sweeper.swept is None or sweeper.swept.states["candidate"] != 1:
                row.faults.append(f"the candidates are {candidates} and {sweeper.swept and sweeper.swept.states}")
            say(f"B12 check {number + 1}: {row.measured[-1]:.1f} ms / {row.beside[-1]:.1f} ms")
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    return row
