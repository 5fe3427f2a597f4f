"""B1 to B3: requests a second of the product, beside those of an endpoint that does nothing."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any, Final

import asyncpg
import httpx
import orjson

from app.booking import Booking
from app.services.trading import Side, TradeOrder, TransferOrder
from tests.bench.bare import ANSWERS_VARIABLE
from tests.bench.load import MARK, Kind, Load, load
from tests.bench.ratios import Bound, Row, Spread
from tests.bench.stage import booking_on, require_durable, stage
from tests.harness import Process, System, free_port

ACCOUNTS: Final = 5_000
FUNDS: Final = Decimal(10_000_000)
"""Enough for a random walk of thousands of trades below one coin: no trade of the load is refused."""

BOOKED_AT_ONCE: Final = 200
GOOD_SHARE_MIN: Final = 0.99
BYTES_TOLERANCE: Final = 0.05
Say = Callable[[str], None]
Count = Callable[[], Awaitable[int]]
"""How many trades Postgres has now."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much to measure: rounds of each side in turn, and seconds of load in each."""

    rounds: int = 5
    seconds: int = 4
    accounts: int = ACCOUNTS


async def measure_trades(scale: Scale, say: Say) -> Row:
    """B1."""
    row = Row(
        "B1",
        "durable POST /trade, one worker",
        "bare FastAPI endpoint",
        "requests/s",
        must=Bound(0.60, "high", "≥ 0.60"),
        aim=Bound(0.80, "high", "0.80"),
    )
    async with market("b1", scale, say) as system:
        row.notes.append(await _durability(system))
        await _beside_bare(row, system, "trade", scale, say)
    return row


async def measure_reads(scale: Scale, say: Say) -> Row:
    """B3."""
    row = Row(
        "B3",
        "GET /positions",
        "bare FastAPI endpoint",
        "requests/s",
        must=Bound(0.70, "high", "≥ 0.70"),
        aim=Bound(0.85, "high", "0.85"),
    )
    async with market("b3", scale, say) as system:
        await _beside_bare(row, system, "positions", scale, say)
    return row


async def measure_two_workers(scale: Scale, say: Say) -> Row:
    """B2."""
    row = Row(
        "B2",
        "durable POST /trade, two workers",
        "with one worker",
        "requests/s",
        must=Bound(1.2, "high", "≥ 1.2"),
        aim=Bound(1.5, "high", "1.5"),
    )
    async with market("b2", scale, say) as system:
        row.notes.append(await _durability(system))
        recorded = partial(trades_recorded, system.stores.owner_url)
        one, two = await system.start_api(), await system.start_api(workers=2)
        for process in (one, two):
            await load(process.url, "trade", accounts=scale.accounts, seconds=2, run=f"warm-{process.name}-")
        for number in range(scale.rounds):
            measured = await booked(row, recorded, two, scale, run=f"two-{number}-")
            beside = await booked(row, recorded, one, scale, run=f"one-{number}-")
            row.add(measured=measured.rate, beside=beside.rate)
            say(f"B2 round {number + 1}: {measured.rate:,.0f} / {beside.rate:,.0f} = {row.ratios[-1]:.3f}")
    return row


async def _durability(system: System) -> str:
    async with booking_on(system) as booking:
        return await require_durable(booking.store.client)


async def _beside_bare(row: Row, system: System, kind: Kind, scale: Scale, say: Say) -> None:
    """The product, the bare endpoint and a plain FastAPI one, in turn."""
    product = await system.start_api()
    answers = await _answers(product)
    bare, plain, direct = [await _start_bare(system, which, answers) for which in ("bare", "plain", "direct")]
    for process in (product, bare, plain, direct):
        await load(process.url, kind, accounts=scale.accounts, seconds=2, run=f"warm-{process.name}-")
    rates: list[tuple[float, float, float]] = []
    beside_direct: list[float] = []
    recorded = partial(trades_recorded, system.stores.owner_url)
    for number in range(scale.rounds):
        if kind == "trade":
            measured = await booked(row, recorded, product, scale, run=f"r{number}-")
        else:
            measured = await loaded(row, product, kind, scale, run=f"r{number}-")
        barely = await loaded(row, bare, kind, scale, run=f"b{number}-")
        plainly = await loaded(row, plain, kind, scale, run=f"p{number}-")
        directly = await loaded(row, direct, kind, scale, run=f"d{number}-")
        rates.append((measured.rate, barely.rate, plainly.rate))
        beside_direct.append(measured.rate / directly.rate)
        if abs(measured.bytes_per_answer / barely.bytes_per_answer - 1) > BYTES_TOLERANCE:
            row.faults.append(
                f"the answers are not of the same size: {measured.bytes_per_answer:.0f} and "
                f"{barely.bytes_per_answer:.0f} bytes"
            )
        say(
            f"{row.name} round {number + 1}: product {measured.rate:,.0f}, bare {barely.rate:,.0f}, plain FastAPI "
            f"{plainly.rate:,.0f}; {measured.rate / barely.rate:.3f} of bare ({measured.bytes_per_answer:.0f} and "
            f"{barely.bytes_per_answer:.0f} bytes an answer)"
        )
    compare(row, rates)
    row.notes.append(
        f"beside a bare endpoint that goes around FastAPI's solver too: {Spread.of(beside_direct).show('{:.2f}')}"
    )


def compare(row: Row, rates: list[tuple[float, float, float]]) -> None:
    """Put the rounds into ``row``, beside the bare endpoint, or the plain one where that is faster."""
    compared = Spread.of([bare / plain for _, bare, plain in rates])
    row.notes.append(f"bare beside plain FastAPI: {compared.show('{:.2f}')}")
    faster = 1 if compared.median >= 1 else 2
    if faster == 2:
        row.beside_what = "plain FastAPI endpoint, which is faster than the bare one"
    for rate in rates:
        row.add(measured=rate[0], beside=rate[faster])


async def loaded(row: Row, process: Process, kind: Kind, scale: Scale, *, run: str) -> Load:
    """One run of wrk, of whose requests nearly all were answered as they should."""
    found = await load(process.url, kind, accounts=scale.accounts, seconds=scale.seconds, run=run)
    if found.share_good < GOOD_SHARE_MIN:
        row.faults.append(f"{process.name}: {found.good} of {found.sent} answers were good; another: {found.other}")
    return found


async def booked(row: Row, count: Count, process: Process, scale: Scale, *, run: str) -> Load:
    """As ``loaded``, of trades; and Postgres has exactly as many new ones as were answered with ``recorded: true``."""
    before = await count()
    found = await loaded(row, process, "trade", scale, run=run)
    new = await count() - before
    # What was not answered, or before Postgres had it, may be there by now or not; usually there is none of it.
    if not found.good <= new <= found.good + found.late + found.unanswered:
        row.faults.append(
            f"{process.name}: {found.good} trades were answered as recorded, {found.late} as not yet, "
            f"{found.unanswered} not at all, and Postgres has {new} new rows"
        )
    return found


async def trades_recorded(database_url: str) -> int:
    """How many trades Postgres has."""
    connection = await asyncpg.connect(database_url)
    try:
        return int(await connection.fetchval("SELECT count(*) FROM trades"))
    finally:
        await connection.close()


@asynccontextmanager
async def market(name: str, scale: Scale, say: Say) -> AsyncIterator[System]:
    """Stores with a mark and ``scale.accounts`` accounts, each with funds and a position; no process yet."""
    async with stage(name) as system:
        say(f"{name}: {scale.accounts:,} accounts, each with a deposit and a trade")
        async with booking_on(system) as booking:
            await booking.marks.set_mark("BTC-PERP", Decimal(MARK), confirm=True)
            await _open_accounts(booking, scale.accounts)
        yield system


def first_position(number: int) -> tuple[Decimal, Decimal, Side]:
    """Quantity, price and side of the trade that the account of this number begins with."""
    quantity = Decimal(1 + number * 7919 % 999) / 1000
    return quantity, Decimal(MARK) + Decimal(number % 10_000 - 5_000) / 100, "buy" if number % 2 else "sell"


async def _open_accounts(booking: Booking, accounts: int) -> None:
    async def open_one(number: int) -> None:
        name = f"account-{number:07d}"
        await booking.book_transfer(TransferOrder(name, "deposit", FUNDS), client_transfer_id=None)
        quantity, price, side = first_position(number)
        await booking.book_trade(TradeOrder(name, "BTC-PERP", side, quantity, price), client_trade_id=None)

    for first in range(0, accounts, BOOKED_AT_ONCE):
        await asyncio.gather(*(open_one(number) for number in range(first, min(accounts, first + BOOKED_AT_ONCE))))


async def _answers(product: Process) -> dict[str, Any]:
    """What the product answers to a typical trade and read."""
    async with httpx.AsyncClient(base_url=product.url, trust_env=False, timeout=10) as client:
        body = {
            "account_id": "account-0000001",
            "symbol": "BTC-PERP",
            "side": "buy",
            "quantity": "0.217",
            "price": "50013.37",
            "client_trade_id": "sample-1-10000",
        }
        trade = await client.post("/trade", json=body)
        positions = await client.get("/positions/account-0000001")
        if trade.status_code != 201 or positions.status_code != 200:
            raise RuntimeError(f"the product does not answer: {trade.text} {positions.text}")
        return {"trade": trade.json(), "positions": positions.json()}


async def _start_bare(system: System, which: str, answers: dict[str, Any]) -> Process:
    """One of the endpoints of ``tests/bench/bare.py``, ready."""
    port = free_port()
    process = Process(
        which,
        [sys.executable, "-m", "tests.bench.bare", which],
        system.environment(api_host="127.0.0.1", api_port=str(port), api_workers="1")
        | {ANSWERS_VARIABLE: orjson.dumps(answers).decode()},
        f"http://127.0.0.1:{port}",
        system.directory / f"{which}.log",
    )
    system.apis.append(process)
    await process.wait_until_ready()
    return process
