"""A sweep of the timer at marks that were swept before gives way to a mark, once, until it has judged somebody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

import pytest

from app import background
from app import redis_client as keys
from app.booking import Booking
from app.config import Settings
from app.embedded import Stores
from app.records import UNIT
from app.services.trading import TransferOrder
from tests.integration.desk import booking_on
from watchdog import metrics
from watchdog.refresh import Refresher
from watchdog.sweep import Sweeper

BTC: Final = "BTC-PERP"
NAMES: Final = [f"account-{number}" for number in range(5)]


@dataclass
class Watch:
    """A running sweeper of five accounts in chunks of two, whose rows it keeps, and what it did since."""

    booking: Booking
    sweeper: Sweeper
    looked_at: int = 0
    audited: list[int] = field(default_factory=list)
    during_look: Callable[[], Any] | None = None
    """Called once, before the next sweep looks at its rows."""

    while_looking: Callable[[], Awaitable[None]] | None = None
    """Awaited once, after that."""

    _counted: dict[str, float] = field(default_factory=dict)

    async def mark(self, price: str) -> None:
        """A mark without its message."""
        await self.booking.marks.set_mark(BTC, Decimal(price), confirm=True)

    def count(self) -> None:
        """From here on."""
        self.looked_at, self._counted = 0, _sweeps()
        self.audited.clear()

    async def counted(self) -> dict[str, float]:
        """The sweeps that ended well, by trigger, once all have ended."""
        while self.sweeper.running or self.sweeper._asked.is_set():
            await asyncio.sleep(0.005)
        return {trigger: count - self._counted[trigger] for trigger, count in _sweeps().items()}


def _sweeps() -> dict[str, float]:
    return {trigger: metrics.SWEEPS.labels(trigger, "ok")._value.get() for trigger in ("timer", "mark")}


@pytest.fixture
async def watch(stores: Stores, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watch]:
    settings = settings.model_copy(update={"sweep_chunk_accounts": 2})
    async with booking_on(stores, settings) as booking:
        sweeper = Sweeper(booking, Refresher(booking))
        made = Watch(booking, sweeper)
        look_at, different_slots = sweeper._look_at, sweeper._columns._different_slots

        async def looked(*arguments: Any) -> Any:  # noqa: ANN401 - whatever the original takes
            made.looked_at += 1
            now, made.during_look = made.during_look, None
            if now is not None:
                now()
            then, made.while_looking = made.while_looking, None
            if then is not None:
                await then()
            return await look_at(*arguments)

        async def audited() -> Any:  # noqa: ANN401 - whatever the original answers
            made.audited.append(sweeper._columns._audit_slot)
            return await different_slots()

        monkeypatch.setattr(sweeper, "_look_at", looked)
        monkeypatch.setattr(sweeper._columns, "_different_slots", audited)
        await made.mark("50000")
        for name in NAMES:
            await booking.book_transfer(TransferOrder(name, "deposit", Decimal(1)), client_transfer_id=None)
        running = asyncio.create_task(sweeper.run())
        await sweeper.request("subscribe")
        await sweeper.request("subscribe")
        made.count()
        yield made
        await background.end([running])


async def test_a_mark_that_comes_while_the_timers_sweep_looks_at_its_rows_makes_one_sweep_of_both(watch: Watch) -> None:
    watch.during_look = lambda: watch.sweeper.notify("mark")
    await watch.sweeper.request("timer")
    assert await watch.counted() == {"timer": 1, "mark": 1}
    assert watch.looked_at == 2
    assert len(watch.audited) == 1, "what was audited before is not audited again"


async def test_whoever_asked_for_either_waits_for_the_sweep_of_both_at_the_newer_mark(watch: Watch) -> None:
    asking: list[asyncio.Task[None]] = []
    watch.during_look = lambda: asking.append(asyncio.create_task(set_and_ask()))

    async def set_and_ask() -> None:
        await watch.mark("50001")
        await watch.sweeper.request("mark")

    async def slow_look() -> None:
        while not watch.sweeper._asked.is_set():
            await asyncio.sleep(0)

    watch.while_looking = slow_look
    await watch.sweeper.request("timer")
    assert watch.sweeper.swept is not None
    assert watch.sweeper.swept.marks.prices[BTC] == Decimal(50_001)
    async with asyncio.timeout(1):
        await asking[0]
    assert await watch.counted() == {"timer": 1, "mark": 1}


@pytest.mark.parametrize(("trigger", "sweeps"), [("mark", {"timer": 1, "mark": 2}), ("timer", {"timer": 2, "mark": 0})])
async def test_it_is_overtaken_once_whoever_asks(watch: Watch, trigger: str, sweeps: dict[str, float]) -> None:
    def ask_and_ask_again() -> None:
        watch.sweeper.notify(trigger)
        watch.during_look = lambda: watch.sweeper.notify(trigger)

    watch.during_look = ask_and_ask_again
    await watch.sweeper.request("timer")
    assert await watch.counted() == sweeps
    assert watch.looked_at == 3


async def test_the_sweep_of_a_mark_is_overtaken_by_none(watch: Watch) -> None:
    watch.during_look = lambda: watch.sweeper.notify("mark")
    await watch.sweeper.request("mark")
    assert await watch.counted() == {"timer": 0, "mark": 2}
    assert watch.looked_at == 2


async def test_a_sweep_of_the_timer_at_a_mark_that_was_not_swept_goes_on(watch: Watch) -> None:
    """The message of that mark was lost, and nobody else may ever judge by it."""
    await watch.mark("50001")
    watch.during_look = lambda: watch.sweeper.notify("mark")
    await watch.sweeper.request("timer")
    assert watch.looked_at == 1
    assert await watch.counted() == {"timer": 1, "mark": 1}


async def test_a_sweep_of_the_timer_that_reads_every_row_goes_on(watch: Watch) -> None:
    # A row written without a note, where the audit comes next.
    await watch.booking.store.client.setrange(
        keys.COLUMN_BALANCE, watch.sweeper._columns._audit_slot % len(NAMES) * UNIT.size, UNIT.pack(1)
    )
    watch.during_look = lambda: watch.sweeper.notify("mark")
    await watch.sweeper.request("timer")
    assert watch.looked_at == 3, "three chunks, once"
    assert await watch.counted() == {"timer": 1, "mark": 1}
