"""The walk of the equity and used_margin keys: whole where the budget covers the store, and on where it gave way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final

import pytest

from app import redis_client as keys
from app.booking import Booking
from app.config import Settings
from app.embedded import Stores
from app.services.trading import TradeOrder, TransferOrder
from tests.integration.desk import booking_on
from watchdog import refresh
from watchdog.refresh import ACCOUNTS_PER_CALL, Refresher
from watchdog.sweep import Sweeper, Swept

BTC: Final = "BTC-PERP"
NAMES: Final = [f"account-{number:02d}" for number in range(20)]
RICH: Final = "20000"
POOR: Final = "10000"
AT_RISK: Final = {NAMES[5], NAMES[13]}
"""Long 1 from 50,000 like all others, and with half of their money."""


@dataclass
class Keys:
    """The displayed keys of all accounts, and a booking for the refreshers of a test."""

    booking: Booking
    _texts: list[bytes | str | None] = field(default_factory=list)

    async def changed(self) -> list[int]:
        """The slots of the accounts whose equity was written with another value since the last call."""
        before, self._texts = self._texts, await self.booking.store.client.mget(map(keys.equity_key, NAMES))
        return [slot for slot, (old, new) in enumerate(zip(before, self._texts, strict=True)) if old != new]

    async def swept_at(self, price: str) -> Swept:
        """A sweep at a new mark."""
        await self.booking.marks.set_mark(BTC, Decimal(price), confirm=True)
        return await Sweeper(self.booking, Refresher(self.booking))._sweep()

    def refresher(self, *, budget: int) -> Refresher:
        """One with a budget of so many accounts a sweep."""
        self.booking.settings = self.booking.settings.model_copy(update={"refresh_accounts_per_sweep": budget})
        return Refresher(self.booking)


@pytest.fixture
async def shown(stores: Stores, settings: Settings) -> AsyncIterator[Keys]:
    """Twenty accounts in the slots of their numbers, each with a position."""
    async with booking_on(stores, settings) as booking:
        await booking.marks.set_mark(BTC, Decimal(50_000), confirm=True)
        for name in NAMES:
            deposit = TransferOrder(name, "deposit", Decimal(POOR if name in AT_RISK else RICH))
            await booking.book_transfer(deposit, client_transfer_id=None)
            await booking.book_trade(TradeOrder(name, BTC, "buy", Decimal(1), Decimal(50_000)), client_trade_id=None)
        made = Keys(booking, [None] * len(NAMES))
        assert await made.changed() == list(range(len(NAMES)))
        yield made


@pytest.fixture
def asked() -> asyncio.Event:
    """Set: a sweep was asked for."""
    event = asyncio.Event()
    event.set()
    return event


@pytest.mark.parametrize(
    ("budget", "whole"), [(len(NAMES) + 1, True), (len(NAMES), True), (len(NAMES) - 1, False)], ids=str
)
async def test_a_walk_writes_all_of_a_store_up_to_its_budget(shown: Keys, budget: int, *, whole: bool) -> None:
    refresher = shown.refresher(budget=budget)
    await refresher.refresh(await shown.swept_at("49999"), asked=asyncio.Event())
    changed = await shown.changed()
    assert (changed == list(range(len(NAMES)))) is whole
    assert len(changed) <= budget


async def test_beyond_the_budget_those_at_most_risk_are_written_and_the_others_in_turn(shown: Keys) -> None:
    refresher, seen = shown.refresher(budget=8), set[int]()
    for walk in range(6):
        await refresher.refresh(await shown.swept_at(str(49_999 - walk)), asked=asyncio.Event())
        changed = set(await shown.changed())
        assert {NAMES.index(name) for name in AT_RISK} <= changed
        assert len(changed) <= ACCOUNTS_PER_CALL
        seen |= changed
    assert seen == set(range(len(NAMES)))


async def test_a_walk_that_gave_way_goes_on_after_the_next_sweep_where_it_was(
    shown: Keys, asked: asyncio.Event
) -> None:
    refresher, walked = shown.refresher(budget=len(NAMES)), list[int]()
    for price in ("49999", "49998", "49997"):
        await refresher.refresh(await shown.swept_at(price), asked=asked)
        changed = await shown.changed()
        assert len(changed) <= ACCOUNTS_PER_CALL
        walked += changed
        await asyncio.sleep(refresher._rested - time.monotonic())
    assert walked == list(range(len(NAMES)))


async def test_nothing_is_written_before_its_rest_is_over_if_a_sweep_was_asked_for(
    shown: Keys, asked: asyncio.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refresh, "REST_TIMES", 1_000_000)
    monkeypatch.setattr(refresh, "RESTS_SECONDS_MAX", 1_000_000)
    refresher = shown.refresher(budget=len(NAMES))
    await refresher.refresh(await shown.swept_at("49999"), asked=asked)
    assert len(await shown.changed()) == ACCOUNTS_PER_CALL
    await refresher.refresh(await shown.swept_at("49998"), asked=asked)
    assert await shown.changed() == []


async def test_a_sweep_asked_for_while_it_rests_is_not_kept_waiting(
    shown: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refresh, "REST_TIMES", 1_000_000)
    monkeypatch.setattr(refresh, "RESTS_SECONDS_MAX", 1_000_000)
    refresher, asked = shown.refresher(budget=len(NAMES)), asyncio.Event()
    swept = await shown.swept_at("49999")
    asyncio.get_running_loop().call_later(0.05, asked.set)
    async with asyncio.timeout(5):
        await refresher.refresh(swept, asked=asked)
    assert len(await shown.changed()) == ACCOUNTS_PER_CALL


async def test_a_sweep_asked_for_while_the_loop_is_busy_until_the_rest_is_over_goes_first(shown: Keys) -> None:
    refresher, asked = shown.refresher(budget=len(NAMES)), asyncio.Event()
    swept = await shown.swept_at("49999")
    refresher._rested = time.monotonic() + 0.05

    def busy() -> None:
        time.sleep(0.1)
        # In the turn of the loop in which the rest ends as well.
        asyncio.get_running_loop().call_soon(asked.set)

    asyncio.get_running_loop().call_later(0.02, busy)
    await refresher.refresh(swept, asked=asked)
    assert await shown.changed() == []
