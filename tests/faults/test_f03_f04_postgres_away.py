"""F3 and F4: Postgres is stopped and restarted under load, or stays away until the outbox is full."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from decimal import Decimal
from random import Random
from typing import Any, Final

from app import database, errors
from app import redis_client as keys
from app.booking import Booking
from app.outbox import Outbox, entry_from_stream
from app.redis_client import StateStore
from app.services.trading import TransferOrder
from tests.faults.cell import Cell, until
from tests.faults.checker import check
from tests.faults.history_server import open_history_server
from tests.faults.journal import Operation, Row
from tests.faults.load import Load
from tests.faults.zygote import Zygote

SOFT_LIMIT: Final = 4_000
HARD_LIMIT: Final = 4_400
AT_ONCE_SECONDS: Final = 1.0
BREAKER_SECONDS: Final = 3.0
"""The record timeout and what a busy machine adds: so long may the one round of answers take that opens the breaker."""

HISTORY_SECONDS_MAX: Final = 10.0


async def test_trades_go_on_while_postgres_restarts_and_history_is_complete_soon_after(
    zygote: Zygote, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], seed: int, random: Random
) -> None:
    result = row("F3", "Postgres stopped immediate, restarted under load")
    async with open_history_server(zygote, apis=2, watchdogs=1) as history:
        load = Load(history.cell, seed=seed, clients=8)

        def no_fault_of_the_server(operation: Operation) -> None:
            if operation.kind == "trade" and operation.status >= 500:
                result.complain(f"/trade answered {operation.status} {operation.code}")

        load.on_answer = no_fault_of_the_server
        await load.start()
        for _ in range(rounds(20, 3)):
            result.rounds += 1
            await asyncio.sleep(random.uniform(0.05, 0.4))
            moment = load.fault()
            await history.stop_immediately()
            await load.first_after(moment)
            await asyncio.sleep(random.uniform(0.1, 0.8))
            await history.start()
            returned = time.monotonic()
            await until(lambda: _recorded_up_to_now(history.cell), "history is incomplete", history.cell.logs)
            result.recovered(time.monotonic() - returned)
        await load.stop()
        await check(history.cell, load, result)
    if result.recovery_seconds > HISTORY_SECONDS_MAX:
        result.complain(f"history was complete only after {result.recovery_seconds:.1f} s")
    result.require_green()


async def _recorded_up_to_now(cell: Cell) -> bool:
    """Whether nothing waits that is older than a second: under load something younger always does."""
    seconds, microseconds = await cell.client.time()
    oldest: Any = await cell.client.xrange(keys.OUTBOX, count=1)
    return not oldest or seconds * 10**6 + microseconds - entry_from_stream(*oldest[0]).time_us < 10**6


async def test_a_full_outbox_refuses_in_steps_and_at_once_and_drops_nothing(
    zygote: Zygote, row: Callable[[str, str], Row], seed: int
) -> None:
    result = row("F4", "Postgres away until the outbox is full")
    limits = {"outbox_soft_limit": str(SOFT_LIMIT), "outbox_hard_limit": str(HARD_LIMIT)}
    async with open_history_server(zygote, apis=1, watchdogs=1, **limits) as history:
        cell = history.cell
        load = Load(cell, seed=seed, clients=8)
        await load.start()
        await load.acknowledged(120)
        long = await _funded_long(load)
        result.rounds += 1
        moment = load.fault()
        # Silent, and not gone: only the breaker keeps each answer from waiting for it.
        history.fall_silent()
        await load.first_after(moment)
        await load.acknowledged(100)
        await load.stop()
        _require_prompt(load, moment, result)
        await history.stop_silent()
        # One load goes on while the breaker is open; then the outbox is filled from here.
        away = Load(cell, seed=seed, clients=8, name="away")
        await away.start()
        await away.acknowledged(100)
        await away.stop()
        await _fill(cell, SOFT_LIMIT)
        at_soft = [await _trade(away, long, "buy"), await _trade(away, long, "sell")]
        assert [(item.status, item.code) for item in at_soft] == [(503, "outbox_full"), (201, "")], at_soft
        await _fill(cell, HARD_LIMIT)
        at_hard = [
            await _trade(away, long, "buy"),
            await _trade(away, long, "sell"),
            away.new("deposit", long, {"amount": "1"}),
        ]
        await away.send(at_hard[-1])
        assert [(item.status, item.code) for item in at_hard] == [(503, "outbox_full")] * 3, at_hard
        assert await load.set_mark(41_000)
        await until(lambda: _has_breach(cell, long), "the breach does not fit into the outbox", cell.logs)
        slowest = max(item.slowest_seconds for item in away.journal)
        if slowest > AT_ONCE_SECONDS:
            result.complain(f"with the breaker open an answer took {slowest:.2f} s")
        waiting = await cell.client.xlen(keys.OUTBOX)
        await history.start()
        seconds = await cell.drained()
        result.recovered(seconds)
        result.what += f"; {waiting:,} rows drained, {waiting / seconds:,.0f}/s"
        away.accounts.append(long)
        load.journal, moved = (
            [item for item in load.journal if item.account_id != long],
            [item for item in load.journal if item.account_id == long],
        )
        away.journal += moved
        await check(cell, [load, away], result)
    result.require_green()


def _require_prompt(load: Load, moment: float, result: Row) -> None:
    """From the fault at ``moment`` on, only answers under way when the breaker opened may have waited for Postgres."""
    since = [item for item in load.journal if item.answered_at > moment]
    opened = min((item.answered_at for item in since if item.outcome == "ok" and not item.recorded), default=None)
    if opened is None:
        result.complain("nothing was acknowledged without its row in history: the breaker did not open")
        return
    slowest = max(item.slowest_seconds for item in since)
    if slowest > BREAKER_SECONDS:
        result.complain(f"when Postgres went an answer took {slowest:.2f} s")
    slowest = max((item.slowest_seconds for item in since if item.sent_at > opened), default=0.0)
    if slowest > AT_ONCE_SECONDS:
        result.complain(f"after the breaker had opened an answer took {slowest:.2f} s")
    result.what += f"; breaker open after {opened - moment:.1f} s"


async def _funded_long(load: Load) -> str:
    """An account with 10,000 and 0.9 BTC long at 50,000: a candidate at 41,000, and not before."""
    account = f"{load.name}-long"
    load.accounts.append(account)
    deposit = load.new("deposit", account, {"amount": "10000"})
    await load.send(deposit)
    # The load must not trade on it: it would not be the candidate that it has to be.
    load.accounts.remove(account)
    await load.set_mark(50_000)
    bought = await _trade(load, account, "buy", "0.9")
    assert bought.outcome == "ok", bought
    return account


async def _trade(load: Load, account: str, side: str, quantity: str = "0.001") -> Operation:
    body = {"account_id": account, "symbol": "BTC-PERP", "side": side, "quantity": quantity, "price": "50000"}
    operation = load.new("trade", account, body)
    await load.send(operation)
    return operation


async def _fill(cell: Cell, entries: int) -> None:
    """Book deposits of other accounts until so many rows wait."""
    settings = cell.settings(outbox_hard_limit=str(entries))
    store, engine = StateStore(cell.stores.redis_url, settings), database.create_engine(cell.stores.database_url)
    outbox = Outbox(store, engine, settings)
    outbox.postgres_away = True
    booking = Booking(store, outbox, settings)

    async def fill(account: str) -> None:
        try:
            while True:
                await booking.book_transfer(TransferOrder(account, "deposit", Decimal(1)), client_transfer_id=None)
        except errors.OutboxFull:
            return

    try:
        await asyncio.gather(*(fill(f"filler-{number}") for number in range(32)))
    finally:
        await store.close()
        await engine.dispose()


async def _has_breach(cell: Cell, account: str) -> bool:
    return bool(await cell.client.hget(keys.ledger_key(account), "breach"))
