"""The task's text taken literally: key by key, one INSERT a trade, a liquidation check account by account.

A plain and honest FastAPI program, as one would write it in an afternoon: asynchronous clients, a pool of connections,
``Decimal`` for money, an answer when the row is in Postgres. What it leaves out is what the text does not say: two
trades of one account at once may both spend its margin, a crash between two keys leaves one of them, a repeated request
trades twice, and each check records a breach again.

``python -m tests.bench.textbook`` serves it on the product's own server settings.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any, Final, Literal

import asyncpg
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel
from redis.asyncio import Redis

from tests.bench.bare import serve_in_place

REDIS_VARIABLE: Final = "BENCH_TEXTBOOK_REDIS"
DATABASE_VARIABLE: Final = "BENCH_TEXTBOOK_DATABASE"
INITIAL_RATE: Final = Decimal("0.20")
MAINTENANCE_RATE: Final = Decimal("0.10")
TABLES: Final = """
    CREATE TABLE trades (
        id bigserial PRIMARY KEY, account_id text NOT NULL, symbol text NOT NULL, side text NOT NULL,
        quantity numeric NOT NULL, price numeric NOT NULL, timestamp timestamptz NOT NULL DEFAULT now()
    );
    CREATE TABLE liquidations (
        id bigserial PRIMARY KEY, account_id text NOT NULL, reason text NOT NULL,
        timestamp timestamptz NOT NULL DEFAULT now()
    );
"""


class Trade(BaseModel):
    """A trade to book."""

    account_id: str
    symbol: str
    side: Literal["buy", "sell"]
    quantity: Decimal
    price: Decimal
    client_trade_id: str | None = None


class Mark(BaseModel):
    """A mark price."""

    symbol: str
    price: Decimal


async def mark_price(redis: Redis, symbol: str) -> Decimal:
    """The mark of ``symbol``."""
    price = await redis.get(f"mark_price:{symbol}")
    if price is None:
        raise HTTPException(409, "no mark price")
    return Decimal(str(price))


async def margin(redis: Redis, account_id: str) -> tuple[Decimal, Decimal, Decimal, list[dict[str, Any]]]:
    """An account's balance, equity, notional and positions, read key by key."""
    balance_text = await redis.get(f"account:{account_id}:balance")
    if balance_text is None:
        raise HTTPException(404, "unknown account")
    balance = equity = Decimal(str(balance_text))
    notional = Decimal(0)
    positions = []
    fields: Any = await redis.hgetall(f"positions:{account_id}")
    for symbol, text in fields.items():
        position = json.loads(text)
        quantity, average = Decimal(position["quantity"]), Decimal(position["avg_price"])
        mark = await mark_price(redis, symbol)
        equity += quantity * (mark - average)
        notional += abs(quantity) * mark
        positions.append({"symbol": symbol, "quantity": quantity, "avg_price": average, "mark_price": mark})
    return balance, equity, notional, positions


def trade_position(
    quantity: Decimal, average: Decimal, signed: Decimal, price: Decimal
) -> tuple[Decimal, Decimal, Decimal]:
    """The position after a trade, and the pnl that it realised."""
    after = quantity + signed
    if quantity * signed >= 0:
        return after, (quantity * average + signed * price) / after, Decimal(0)
    closed = min(abs(quantity), abs(signed)) * (1 if quantity > 0 else -1)
    realised = closed * (price - average)
    if not after:
        return after, Decimal(0), realised
    return after, average if after * quantity > 0 else price, realised


async def check_accounts(redis: Redis, pool: asyncpg.Pool) -> list[str]:
    """The watchdog's check: every account, one after the other; each candidate is recorded. Answers the candidates."""
    found = []
    async for key in redis.scan_iter(match="account:*:balance", count=1_000):
        account_id = key.removeprefix("account:").removesuffix(":balance")
        _, equity, notional, _ = await margin(redis, account_id)
        if notional and equity < MAINTENANCE_RATE * notional:
            await pool.execute(
                "INSERT INTO liquidations (account_id, reason) VALUES ($1, $2)",
                account_id,
                f"equity {equity} is below maintenance margin {MAINTENANCE_RATE * notional}",
            )
            found.append(account_id)
    return found


@asynccontextmanager
async def lifespan(application: FastAPI) -> AsyncIterator[None]:
    """One client and one pool for the process."""
    application.state.redis = Redis.from_url(os.environ[REDIS_VARIABLE], decode_responses=True)
    application.state.pool = await asyncpg.create_pool(os.environ[DATABASE_VARIABLE])
    yield
    await application.state.pool.close()
    await application.state.redis.aclose()


def create_textbook() -> FastAPI:
    """The application."""
    application = FastAPI(lifespan=lifespan)

    @application.get("/health/ready")
    async def get_ready() -> dict[str, str]:
        return {"status": "ready"}

    @application.post("/trade", status_code=201)
    async def post_trade(trade: Trade) -> dict[str, Any]:
        redis: Redis = application.state.redis
        mark = await mark_price(redis, trade.symbol)
        balance, equity, notional, positions = await margin(redis, trade.account_id)
        held = next((item for item in positions if item["symbol"] == trade.symbol), None)
        quantity, average = (held["quantity"], held["avg_price"]) if held else (Decimal(0), Decimal(0))
        signed = trade.quantity if trade.side == "buy" else -trade.quantity
        new_quantity, new_average, realised = trade_position(quantity, average, signed, trade.price)
        balance += realised
        equity += realised + new_quantity * (mark - new_average) - quantity * (mark - average)
        notional += (abs(new_quantity) - abs(quantity)) * mark
        if abs(new_quantity) > abs(quantity) and equity < INITIAL_RATE * notional:
            raise HTTPException(409, "insufficient initial margin")
        await redis.set(f"account:{trade.account_id}:balance", str(balance))
        await redis.set(f"account:{trade.account_id}:equity", str(equity))
        await redis.set(f"account:{trade.account_id}:used_margin", str(INITIAL_RATE * notional))
        if new_quantity:
            position = json.dumps({"quantity": str(new_quantity), "avg_price": str(new_average)})
            await redis.hset(f"positions:{trade.account_id}", trade.symbol, position)
        else:
            await redis.hdel(f"positions:{trade.account_id}", trade.symbol)
        row = await application.state.pool.fetchrow(
            "INSERT INTO trades (account_id, symbol, side, quantity, price) VALUES ($1, $2, $3, $4, $5) "
            "RETURNING id, timestamp",
            trade.account_id,
            trade.symbol,
            trade.side,
            trade.quantity,
            trade.price,
        )
        return {
            "trade_id": row["id"],
            "timestamp": row["timestamp"],
            **trade.model_dump(),
            "balance": balance,
            "equity": equity,
            "used_margin": INITIAL_RATE * notional,
            "recorded": True,
        }

    @application.get("/positions/{account_id}")
    async def get_positions(account_id: str) -> dict[str, Any]:
        balance, equity, notional, positions = await margin(application.state.redis, account_id)
        return {
            "account_id": account_id,
            "balance": balance,
            "equity": equity,
            "used_margin": INITIAL_RATE * notional,
            "maintenance_margin": MAINTENANCE_RATE * notional,
            "positions": positions,
        }

    @application.post("/mark-price")
    async def post_mark_price(mark: Mark) -> dict[str, Any]:
        await application.state.redis.set(f"mark_price:{mark.symbol}", str(mark.price))
        await application.state.redis.publish("mark_price", mark.symbol)
        return {"symbol": mark.symbol, "price": mark.price}

    @application.get("/margin-report")
    async def get_margin_report() -> list[dict[str, Any]]:
        redis: Redis = application.state.redis
        report = []
        async for key in redis.scan_iter(match="account:*:balance", count=1_000):
            account_id = key.removeprefix("account:").removesuffix(":balance")
            _, equity, notional, _ = await margin(redis, account_id)
            maintenance = MAINTENANCE_RATE * notional
            report.append(
                {
                    "account_id": account_id,
                    "equity": equity,
                    "maintenance_margin": maintenance,
                    "candidate": bool(notional) and equity < maintenance,
                }
            )
        return report

    return application


if __name__ == "__main__":
    serve_in_place("tests.bench.textbook:create_textbook")
