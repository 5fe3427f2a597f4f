"""The invariants in production: silent while everything is right, and each violation is seen."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

import pytest
from redis.asyncio import Redis

from app import database, errors
from app import redis_client as keys
from app.booking import Booking
from app.config import Settings
from app.embedded import Stores
from app.outbox import Outbox
from app.records import UNIT
from app.redis_client import StateStore
from app.services.trading import TradeOrder, TransferOrder
from tests.conftest import SystemFactory
from tests.integration.desk import eventually
from watchdog import invariants, metrics
from watchdog.invariants import Invariants
from watchdog.refresh import Refresher
from watchdog.sweep import Sweeper

BTC: Final = "BTC-PERP"
CENT: Final = UNIT.pack(1_000_000)


@dataclass
class Bench:
    """The watchdog's parts in this process, on clean stores."""

    booking: Booking
    checked: Invariants
    redis: Redis

    async def deposit(self, account: str, amount: int) -> None:
        await self.booking.book_transfer(TransferOrder(account, "deposit", Decimal(amount)), client_transfer_id=None)

    async def trade(self, account: str, side: str, quantity: str, price: str) -> None:
        order = TradeOrder(account, BTC, side, Decimal(quantity), Decimal(price))  # type: ignore[arg-type]
        await self.booking.book_trade(order, client_trade_id=None)

    async def mark(self, price: str) -> None:
        await self.booking.marks.set_mark(BTC, Decimal(price), confirm=True)

    async def sweep(self) -> None:
        await Sweeper(self.booking, Refresher(self.booking))._sweep()


@pytest.fixture
async def bench(stores: Stores, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    """A winner, a loser whose breach is open, and one whose breach has ended."""
    monkeypatch.setattr(invariants, "RECHECK_SECONDS", 0.01)
    monkeypatch.setattr(invariants, "HISTORY_TIMEOUT_SECONDS", 0.3)
    store, engine = StateStore(stores.redis_url, settings), database.create_engine(stores.database_url)
    outbox = Outbox(store, engine, settings)
    await outbox.start()
    booking = Booking(store, outbox, settings)
    made = Bench(booking, Invariants(booking, engine), store.client)
    await made.mark("50000")
    for account in ("alice", "bob", "carol"):
        await made.deposit(account, 10_000)
    await made.trade("alice", "sell", "0.5", "50000")
    await made.trade("bob", "buy", "0.9", "50000")
    await made.trade("carol", "buy", "0.9", "50000")
    await made.mark("43000")
    await made.sweep()
    await made.trade("alice", "buy", "0.5", "43000")
    await made.deposit("carol", 10_000)
    yield made
    await outbox.stop()
    await store.close()
    await engine.dispose()


def shown() -> dict[str, float | None]:
    return {
        name: metrics.REGISTRY.get_sample_value("plimsoll_invariant_violations", {"invariant": name})
        for name in metrics.INVARIANTS
    }


async def test_nothing_is_violated_after_trades_breaches_and_recoveries(bench: Bench) -> None:
    assert await bench.checked.check() == {}
    assert shown() == {"conservation": 0, "columns": 0, "breaches": 0}
    assert await bench.redis.get(keys.LIQUIDATIONS) == b"2"


async def test_an_edit_by_hand_is_adopted_and_violates_nothing(bench: Bench) -> None:
    await bench.redis.set(keys.balance_key("alice"), "12345.67")
    assert await bench.checked.check() == {}
    assert await bench.checked.check() == {}


async def test_a_cent_that_appears_in_the_columns_violates_conservation(bench: Bench) -> None:
    before: Any = await bench.redis.getrange(keys.COLUMN_BALANCE, 0, UNIT.size - 1)
    one_cent_more = UNIT.pack(UNIT.unpack(before)[0] + UNIT.unpack(CENT)[0])
    await bench.redis.setrange(keys.COLUMN_BALANCE, 0, one_cent_more)
    violated = await bench.checked.check()
    assert "conservation" in violated
    assert shown()["conservation"] == 1


async def test_a_violation_that_is_mended_is_shown_no_longer(bench: Bench) -> None:
    last = await bench.redis.get(keys.HISTORY_LAST_ID)
    assert last is not None
    slot = await bench.redis.hget(keys.ledger_key("bob"), "slot")
    packed = await bench.redis.get(keys.COLUMN_BREACH)
    assert slot is not None
    assert packed is not None
    await bench.redis.setrange(keys.COLUMN_BREACH, int(slot) * UNIT.size, bytes(UNIT.size))
    assert set(await bench.checked.check()) == {"columns", "breaches"}
    assert shown() == {"conservation": 0, "columns": 1, "breaches": 1}
    await bench.redis.set(keys.COLUMN_BREACH, packed)
    assert await bench.checked.check() == {}
    assert shown() == {"conservation": 0, "columns": 0, "breaches": 0}


async def test_a_row_that_history_lacks_violates_conservation(bench: Bench) -> None:
    # A deposit whose row never reaches Postgres: what a lost outbox entry looks like.
    bench.booking.outbox.postgres_away = True
    await bench.deposit("alice", 77)
    await bench.redis.xtrim(keys.OUTBOX, maxlen=0, approximate=False)
    assert "conservation" in await bench.checked.check()


async def test_while_history_waits_nothing_is_checked_and_nothing_is_said(bench: Bench) -> None:
    assert await bench.checked.check() == {}
    last = int(await bench.redis.get(keys.HISTORY_LAST_ID) or 0)
    not_left_over_for_ages = str(10**18)
    await bench.redis.xadd(keys.OUTBOX, {"trade": f"alice\n9\n1\n{not_left_over_for_ages}\n{{}}"}, id=f"{last}-1")
    with pytest.raises(errors.StoreUnavailable):
        await bench.checked.check()
    assert shown() == {"conservation": 0, "columns": 0, "breaches": 0}


async def test_the_sums_of_history_go_on_from_where_the_last_check_left_them(bench: Bench) -> None:
    assert await bench.checked.check() == {}
    first = bench.checked._history.last_id
    await bench.deposit("alice", 5)
    assert await bench.checked.check() == {}
    assert bench.checked._history.last_id == first + 1


async def test_a_running_watchdog_checks_on_request(system: SystemFactory) -> None:
    running = await system(api_workers=0)
    watchdog = running.watchdogs[0]
    assert await running.metric(watchdog, "plimsoll_invariants_checked_timestamp_seconds") == 0
    os.kill(watchdog.pid, signal.SIGUSR1)

    async def checked() -> bool:
        return bool(await running.metric(watchdog, "plimsoll_invariants_checked_timestamp_seconds"))

    await eventually(checked, "the invariants to be checked")
    assert await running.metric(watchdog, 'plimsoll_invariant_violations{invariant="conservation"}') == 0
