"""B10: what sweeps cost those who trade meanwhile.

Trades come at a fixed rate, whether or not earlier ones were answered, and each one's latency counts from the moment
it was due. Marks come ten times a second on both sides; on one of them the watchdog that would sweep each is stopped.
"""

from __future__ import annotations

import asyncio
import time
from decimal import Decimal
from random import Random
from typing import Final

import orjson

from app.replay.connection import HttpConnections
from tests.bench.breaches import Market, market, percentile_99
from tests.bench.population import MARK, SEED, SYMBOL, account_name
from tests.bench.ratios import Bound, Row
from tests.bench.requests import GOOD_SHARE_MIN, trades_recorded
from tests.bench.sweeps import MARKS, Say, World

TRADES_PER_SECOND: Final = 100
CLIENTS: Final = 5
"""Of eight connections each: a trade that is due does not wait for one."""

MARKS_PER_SECOND: Final = 10
SWEEPS_SHARE_MIN: Final = 0.9
"""Marks that come while a sweep runs share the one after it: fewer sweeps than this is another load than the row's."""

SETTLE_SECONDS: Final = 1.5
FREE_MARGIN_MIN: Final = 1_000
"""USDT: the accounts that trade have room for any trade of the load."""


async def measure_crowded_trades(of: World, say: Say, *, rounds: int = 5, seconds: int = 5) -> Row:
    """B10. The accounts of the population change; ``of.population`` follows."""
    row = Row(
        "B10",
        f"POST /trade p99 with {MARKS_PER_SECOND} sweeps/s of {len(of.population):,} accounts",
        "without sweeps",
        "ms",
        must=Bound(2, "low", "≤ 2 ×"),
        aim=Bound(1.2, "low", "1.2 ×"),
        value_form="{:,.1f}",
    )
    traders = of.population.traders(free_margin_min=FREE_MARGIN_MIN)
    random = Random(SEED)
    swept = 0.0
    async with market(of) as running:
        load = _Load(running, traders, random)
        await load.run(2)
        recorded, load.booked, load.sent = await trades_recorded(of.system.stores.owner_url), 0, 0
        for number in range(rounds):
            await asyncio.sleep(SETTLE_SECONDS)
            before, _ = await running.sweeps()
            measured = percentile_99(await load.run(seconds))
            after, _ = await running.sweeps()
            swept += after - before
            running.watchdog.pause()
            await asyncio.sleep(SETTLE_SECONDS)
            beside = percentile_99(await load.run(seconds))
            running.watchdog.resume()
            row.add(measured=measured * 1_000, beside=beside * 1_000)
            say(f"B10 round {number + 1}: p99 {measured * 1_000:.1f} ms with sweeps, {beside * 1_000:.1f} ms without")
        load.close()
        new = await trades_recorded(of.system.stores.owner_url) - recorded
        if new != load.booked or load.booked < GOOD_SHARE_MIN * load.sent:
            row.faults.append(f"of {load.sent} trades {load.booked} were booked; Postgres has {new} new rows")
    await of.follow()
    sweeps_per_second = swept / (rounds * seconds)
    row.notes.append(f"{TRADES_PER_SECOND} trades/s; {sweeps_per_second:.1f} sweeps/s were made")
    if sweeps_per_second < SWEEPS_SHARE_MIN * MARKS_PER_SECOND:
        row.unmet.append(f"only {sweeps_per_second:.1f} sweeps/s were made")
    return row


class _Load:
    """Trades and marks at their rates through one market."""

    def __init__(self, running: Market, traders: list[int], random: Random) -> None:
        self._running = running
        self._traders = traders
        self._random = random
        self._clients = [HttpConnections(running.api.url) for _ in range(CLIENTS)]
        self.sent = self.booked = 0
        self._numbers = 0

    def close(self) -> None:
        """Close the connections."""
        for client in self._clients:
            client.close()

    async def run(self, seconds: int) -> list[float]:
        """The latencies of the trades that were due in ``seconds``."""
        started = time.perf_counter() + 0.05
        trades = [self._trade(started + number / TRADES_PER_SECOND) for number in range(seconds * TRADES_PER_SECOND)]
        marks = [
            self._mark(started + number / MARKS_PER_SECOND, number) for number in range(seconds * MARKS_PER_SECOND)
        ]
        results = await asyncio.gather(*trades, *marks)
        return [latency for latency in results if latency is not None]

    async def _trade(self, due: float) -> float:
        await asyncio.sleep(due - time.perf_counter())
        self._numbers += 1
        self.sent += 1
        answer = await self._clients[self._numbers % CLIENTS].request(
            "POST",
            "/trade",
            {
                "account_id": account_name(self._random.choice(self._traders)),
                "symbol": SYMBOL,
                "side": self._random.choice(("buy", "sell")),
                "quantity": "0.001",
                "price": str(MARK + Decimal(self._random.randint(-1_000, 1_000)) / 100),
                "client_trade_id": f"crowd-{self._numbers}",
            },
        )
        latency = time.perf_counter() - due
        self.booked += answer.status == 201 and orjson.loads(answer.content)["recorded"] is True
        return latency

    async def _mark(self, due: float, number: int) -> None:
        await asyncio.sleep(due - time.perf_counter())
        await self._running.mark(MARKS[number % 2])
