"""Races over two API processes and a watchdog: what must not be spent twice is not, and nothing holds a lock."""

from __future__ import annotations

import asyncio
import random
import re
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from decimal import Decimal
from itertools import cycle
from pathlib import Path
from typing import Any, Final

import asyncpg
import httpx
import pytest
import pytest_asyncio
import redis.asyncio

from app.embedded import Stores
from tests.harness import System
from tests.integration.desk import BTC_PERP, Desk, differences, expect, outcome
from tests.integration.monitor import Seen, monitored

pytestmark = pytest.mark.asyncio(loop_scope="module")

KEYS_THAT_ARE_WRITTEN: Final = {
    "account:{}:balance",
    "account:{}:equity",
    "account:{}:used_margin",
    "account:{}:ledger",
    "accounts",
    "columns:BTC-PERP:cost",
    "columns:BTC-PERP:open",
    "columns:BTC-PERP:quantity",
    "columns:balance",
    "columns:breach",
    "columns:changed",
    "counters:liquidations",
    "counters:recoveries",
    "history:last_id",
    "mark:BTC-PERP",
    "mark:version",
    "mark_price:BTC-PERP",
    "operation:{}",
    "outbox",
    "positions:{}",
    "state:swept",
}
"""All of them, of any trade, transfer, mark, breach or sweep. None is a lock."""


class Counters:
    """Two desks, each at an API process of its own."""

    def __init__(self, system: System, clients: list[httpx.AsyncClient]) -> None:
        self.system = system
        self.desks = [Desk(client) for client in clients]
        self._next = cycle(self.desks)

    @property
    def any(self) -> Desk:
        """One after the other."""
        return next(self._next)

    async def trades_of_each(self, outcome: str) -> list[float]:
        """How many trades of this outcome each process has had, by its own metrics."""
        of_each = []
        for api in self.system.apis:
            sides = [
                await self.system.metric(api, f'plimsoll_trades_total{{outcome="{outcome}",side="{side}"}}')
                for side in ("buy", "sell")
            ]
            of_each.append(sum(count or 0 for count in sides))
        return of_each


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def counters(shared_stores: Stores) -> AsyncIterator[Counters]:
    """Two API processes, a watchdog that sweeps ten times a second, and a client of each API."""
    with tempfile.TemporaryDirectory(prefix="plimsoll-") as directory:
        system = System(shared_stores, Path(directory), {"sweep_interval_seconds": "0.1"})
        clients: list[httpx.AsyncClient] = []
        try:
            processes = [await start(wait=False) for start in (system.start_api, system.start_api)]
            processes.append(await system.start_watchdog(wait=False))
            for process in processes:
                await process.wait_until_ready()
            limits = httpx.Limits(max_connections=64)
            clients += [
                httpx.AsyncClient(base_url=api.url, timeout=30, limits=limits, trust_env=False) for api in system.apis
            ]
            yield Counters(system, clients)
        finally:
            print(system.logs())  # noqa: T201 - pytest shows it with a failure
            for client in clients:
                await client.aclose()
            await system.stop()


async def all_of(*calls: Awaitable[httpx.Response]) -> list[httpx.Response]:
    return list(await asyncio.gather(*calls))


def key_shape(key: str) -> str:
    key = re.sub(r"^operation:.*", "operation:{}", key)
    return re.sub(r"account-\d+", "{}", key)


def no_lock_in(seen: Seen) -> bool:
    """Whether nothing but state was written, and nothing on the condition that it was not there before."""
    written = {key_shape(command[1]) for command in seen.flagged("write")}
    assert written <= KEYS_THAT_ARE_WRITTEN
    conditional = [command for command in seen.flagged("write") if command[0] == "SETNX" or "NX" in command[3:]]
    assert conditional == []
    return "account:{}:balance" in written


async def test_64_concurrent_trades_on_margin_for_10_book_10(
    counters: Counters, shared_postgres: asyncpg.Connection, shared_stores: Stores
) -> None:
    desk, account = counters.any, counters.any.new_account()
    await desk.mark("50000")
    # 0.1 BTC at 50,000 requires 1,000.
    await desk.deposit(account, "10000")
    before = await counters.trades_of_each("refused")
    async with monitored(shared_stores.redis_url) as seen:
        answers = await all_of(*(counters.any.trade(account, "buy", "0.1", "50000") for _ in range(64)))
    assert Counter(map(outcome, answers)) == {"booked": 10, "insufficient_initial_margin": 54}
    assert no_lock_in(seen)
    after = await counters.trades_of_each("refused")
    assert all(now > then for now, then in zip(after, before, strict=True)), "both processes took part"

    shown = await desk.account(account)
    rows = await shared_postgres.fetch("SELECT * FROM trades WHERE account_id = $1 ORDER BY seq", account)
    assert sorted(row["id"] for row in rows) == sorted(
        answer.json()["trade_id"] for answer in answers if answer.is_success
    )
    assert shown["positions"][0]["quantity"] == "1"
    assert sum(row["quantity"] for row in rows) == rows[-1]["quantity_after"] == 1
    assert rows[-1]["cost_after"] == 50_000
    assert shown["free_margin"] == "0"


async def test_64_concurrent_withdrawals_of_a_tenth_take_out_the_balance_and_no_more(counters: Counters) -> None:
    account = counters.any.new_account()
    await counters.any.deposit(account, "1000")
    answers = await all_of(*(counters.any.transfer("withdraw", account, "100") for _ in range(64)))
    assert Counter(map(outcome, answers)) == {"booked": 10, "insufficient_free_margin": 54}
    assert (await counters.any.account(account))["balance"] == "0"


async def test_one_client_trade_id_sent_64_times_at_once_is_booked_once_and_replayed_63_times(
    counters: Counters, shared_postgres: asyncpg.Connection
) -> None:
    account = counters.any.new_account()
    await counters.any.mark("50000")
    await counters.any.deposit(account, "10000")
    answers = await all_of(
        *(counters.any.trade(account, "buy", "0.1", "50000", client_trade_id="only-once") for _ in range(64))
    )
    assert Counter(answer.status_code for answer in answers) == {201: 1, 200: 63}
    assert all(answer.headers["Idempotency-Replayed"] == "true" for answer in answers if answer.status_code == 200)
    bodies = [{**answer.json(), "recorded": None} for answer in answers]
    assert all(body == bodies[0] for body in bodies)
    rows = await shared_postgres.fetch("SELECT id FROM trades WHERE account_id = $1", account)
    assert [row["id"] for row in rows] == [bodies[0]["trade_id"]]


async def test_one_client_transfer_id_sent_64_times_at_once_is_booked_once(counters: Counters) -> None:
    account = counters.any.new_account()
    answers = await all_of(
        *(counters.any.transfer("deposit", account, "5", client_transfer_id="only-once") for _ in range(64))
    )
    assert Counter(answer.status_code for answer in answers) == {201: 1, 200: 63}
    assert (await counters.any.account(account))["balance"] == "5"


async def test_one_id_with_two_contents_at_once_books_one_of_them_and_refuses_the_other(counters: Counters) -> None:
    account = counters.any.new_account()
    await counters.any.mark("50000")
    await counters.any.deposit(account, "10000")
    answers = await all_of(
        *(
            counters.any.trade(account, "buy", quantity, "50000", client_trade_id="either")
            for quantity in ("0.1", "0.2") * 8
        )
    )
    assert Counter(map(outcome, answers)) == {"booked": 1, "replayed": 7, "idempotency_conflict": 8}


async def test_16_first_deposits_at_once_make_one_account_of_their_sum(
    counters: Counters, shared_redis: redis.asyncio.Redis
) -> None:
    account = counters.any.new_account()
    answers = await all_of(*(counters.any.transfer("deposit", account, "1") for _ in range(16)))
    assert Counter(map(outcome, answers)) == {"booked": 16}
    assert (await counters.any.account(account))["balance"] == "16"
    assert (await shared_redis.lrange("accounts", 0, -1)).count(account) == 1


class Rush:
    """One account traded, funded, drained and marked from all sides at once, by a seeded crowd."""

    operations_each = 12
    marks = ("40000", "43000", "47000", "50000", "53000", "57000")

    def __init__(self, counters: Counters, account: str) -> None:
        self.counters = counters
        self.account = account
        self.mark_by_version: dict[int, Decimal] = {}
        self.outcomes: Counter[str] = Counter()

    async def set_mark(self, price: str) -> None:
        self.mark_by_version[await self.counters.any.mark(price)] = Decimal(price)

    async def marker(self) -> None:
        for _ in range(4):
            for price in (*self.marks, *reversed(self.marks)):
                await self.set_mark(price)
                await asyncio.sleep(0.02)

    async def trader(self, seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(self.operations_each):
            side, quantity = generator.choice(["buy", "sell"]), generator.choice(["0.05", "0.1", "0.31"])
            price = generator.choice(["44000", "48000", "52000"])
            self.note("trade", await self.counters.any.trade(self.account, side, quantity, price))

    async def funder(self, verb: str, seed: int) -> None:
        generator = random.Random(seed)
        for _ in range(self.operations_each):
            amount = generator.choice(["50", "333.33333333", "1200"])
            self.note(verb, await self.counters.any.transfer(verb, self.account, amount))

    def note(self, what: str, answer: httpx.Response) -> None:
        assert answer.status_code in {201, 409}, answer.text
        self.outcomes[f"{what} {outcome(answer)}"] += 1


async def test_trades_transfers_marks_and_the_watchdog_on_one_account_never_spend_the_same_margin_twice(
    counters: Counters, shared_postgres: asyncpg.Connection, shared_stores: Stores
) -> None:
    account = counters.any.new_account()
    rush = Rush(counters, account)
    await rush.set_mark("50000")
    await counters.any.deposit(account, "2500")
    async with monitored(shared_stores.redis_url) as seen:
        await asyncio.gather(
            rush.marker(),
            *(rush.trader(seed) for seed in range(8)),
            *(rush.funder(verb, seed) for seed in range(2) for verb in ("deposit", "withdraw")),
        )
    assert no_lock_in(seen)
    await counters.any.swept(max(rush.mark_by_version))

    for wanted in ("trade booked", "trade price_out_of_band", "deposit booked", "withdraw booked"):
        assert rush.outcomes[wanted] >= 1, rush.outcomes
    assert await differences(shared_stores) == []
    spent = [
        row
        for row in await rows_with_free_margin(shared_postgres, account, rush.mark_by_version)
        if row["uses_margin"] and row["free_margin"] < 0
    ]
    assert spent == []


async def rows_with_free_margin(
    connection: asyncpg.Connection, account: str, mark_by_version: dict[int, Decimal]
) -> list[dict[str, Any]]:
    """The account's trades and transfers in order, each with the free margin after it at the mark it was decided on."""
    found = await connection.fetch(
        "SELECT seq, 'trade' AS kind, mark_version, balance_after, quantity_after, cost_after FROM trades "
        "WHERE account_id = $1 UNION ALL "
        "SELECT seq, kind, mark_version, balance_after, NULL, NULL FROM transfers WHERE account_id = $1 ORDER BY seq",
        account,
    )
    rows, quantity, cost = [], Decimal(0), Decimal(0)
    for row in found:
        before = quantity
        if row["kind"] == "trade":
            quantity, cost = row["quantity_after"], row["cost_after"]
        mark = mark_by_version[row["mark_version"]]
        rows.append(
            {
                "seq": row["seq"],
                "kind": row["kind"],
                # A reduction leaves less of the same side; everything else that takes margin is an own action.
                "uses_margin": row["kind"] == "withdrawal"
                or (row["kind"] == "trade" and (abs(quantity) > abs(before) or quantity * before < 0)),
                "free_margin": row["balance_after"] + quantity * mark - cost - abs(quantity) * mark / 5,
            }
        )
    assert len(rows) > 50, "a rush that books nothing proves nothing"
    return rows


async def test_each_process_books_its_half_of_trades_on_different_accounts(counters: Counters) -> None:
    await counters.any.mark("50000")
    accounts = [counters.any.new_account() for _ in range(32)]
    before = await counters.trades_of_each("booked")
    await all_of(*(counters.any.transfer("deposit", account, "10000") for account in accounts))
    answers = await all_of(*(counters.any.trade(account, "sell", "1", "50000") for account in accounts))
    assert Counter(map(outcome, answers)) == {"booked": 32}
    after = await counters.trades_of_each("booked")
    assert [now - then for now, then in zip(after, before, strict=True)] == [16, 16]


async def test_two_processes_setting_marks_at_once_give_each_mark_a_version_of_its_own(counters: Counters) -> None:
    answers = await all_of(
        *(
            counters.any.client.post("/mark-price", json={"symbol": BTC_PERP, "price": str(50_000 + number)})
            for number in range(16)
        )
    )
    versions = sorted(expect(answer, 200)["version"] for answer in answers)
    assert versions == list(range(versions[0], versions[0] + 16))
