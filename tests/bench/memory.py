"""B13: what an account takes in Redis, beside the bytes that it is."""

from __future__ import annotations

from decimal import Decimal
from random import Random
from statistics import mean
from typing import Final

from app import redis_client as keys
from app.services.trading import TradeOrder
from tests.bench.population import MARK, SEED, SYMBOL, account_name
from tests.bench.ratios import ROUNDS_MIN, Row
from tests.bench.sweeps import Say, World

SAMPLE: Final = 200


async def measure_memory(of: World, say: Say) -> Row:
    """B13."""
    client, count = of.booking.store.client, len(of.population)
    row = Row("B13", "Redis memory per account", "the bytes of its record", "bytes")
    per_account = of.redis_bytes / count
    random = Random(SEED)
    parts: dict[str, list[int]] = {}
    for _ in range(ROUNDS_MIN):
        record_bytes = []
        for slot in random.sample(range(count), min(SAMPLE, count)):
            name = account_name(slot)
            balance = await client.get(keys.balance_key(name)) or b""
            fields = await client.hgetall(keys.positions_key(name))
            record_bytes.append(len(balance) + sum(len(key) + len(value) for key, value in fields.items()))
            for part, key in (
                ("balance key", keys.balance_key(name)),
                ("equity key", keys.equity_key(name)),
                ("used_margin key", keys.used_margin_key(name)),
                ("positions key", keys.positions_key(name)),
                ("ledger key", keys.ledger_key(name)),
            ):
                parts.setdefault(part, []).append(int(await client.memory_usage(key) or 0))
        row.add(measured=per_account, beside=mean(record_bytes))
    columns = 0
    for key in (keys.COLUMN_BALANCE, keys.COLUMN_BREACH, keys.quantity_column(SYMBOL), keys.cost_column(SYMBOL)):
        columns += int(await client.memory_usage(key) or 0)
    names = int(await client.memory_usage(keys.ACCOUNTS, samples=0) or 0)
    row.parts = {part: mean(sizes) for part, sizes in parts.items()}
    row.parts |= {"its place in the columns": columns / count, "its name in the list": names / count}
    row.parts["the table of keys"] = per_account - sum(row.parts.values())
    row.notes.append("bytes by part: " + ", ".join(f"{part} {size:.0f}" for part, size in row.parts.items()))
    row.notes.append(f"each trade's operation id takes {await _operation_bytes(of):,} more for 24 hours")
    say(f"B13: {per_account:.0f} bytes an account")
    return row


async def _operation_bytes(of: World) -> int:
    """What Redis keeps of one trade under its client's id."""
    name = account_name(of.population.traders(free_margin_min=1_000)[0])
    operation = "f47ac10b-58cc-4372-a567-0e02b2c3d479"
    await of.booking.marks.set_mark(SYMBOL, MARK, confirm=True)
    order = TradeOrder(name, SYMBOL, "buy", Decimal("0.001"), MARK)
    await of.booking.book_trade(order, client_trade_id=operation)
    await of.follow()
    return int(await of.booking.store.client.memory_usage(keys.operation_key("trade", name, operation)) or 0)
