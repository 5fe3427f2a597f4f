"""One mistyped tick breaches nobody: it is refused, counted, and the mark stays what it was."""

from __future__ import annotations

from decimal import Decimal
from typing import Final

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from app.metrics import REGISTRY
from app.numbers import format_decimal
from tests.integration.desk import BTC_PERP, Desk, outcome
from tests.property.repeatable import repeatable

pytestmark = pytest.mark.asyncio(loop_scope="module")

EXAMPLES: Final = 25
few: Final = settings(
    repeatable, max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
prices: Final = st.integers(100_00, 1_000_000_00).map(lambda cents: Decimal(cents).scaleb(-2))
mistakes: Final = st.sampled_from([Decimal(5), Decimal("0.2"), Decimal(10), Decimal("0.1"), Decimal(0), Decimal(-1)])


def marks_refused() -> float:
    """What the counter says."""
    return REGISTRY.get_sample_value("plimsoll_marks_refused_total") or 0.0


async def at_the_limit(desk: Desk, side: str, price: Decimal) -> str:
    """An account whose whole equity is the initial margin of 1 BTC: whatever may breach anybody breaches it."""
    account = desk.new_account()
    await desk.deposit(account, format_decimal(price / 5))
    traded = await desk.trade(account, side, "1", format_decimal(price))
    assert outcome(traded) == "booked"
    return account


@few
@given(price=prices, mistake=mistakes)
@example(price=Decimal(50_000), mistake=Decimal(5))
@example(price=Decimal(50_000), mistake=Decimal("0.2"))
@example(price=Decimal(50_000), mistake=Decimal(0))
@example(price=Decimal(50_000), mistake=Decimal(-1))
async def test_one_mistyped_tick_breaches_nobody(watched_desk: Desk, price: Decimal, mistake: Decimal) -> None:
    await watched_desk.mark(format_decimal(price))
    accounts = [await at_the_limit(watched_desk, side, price) for side in ("buy", "sell")]
    before = marks_refused()

    tick = {"symbol": BTC_PERP, "price": format_decimal(price * mistake)}
    refused = await watched_desk.client.post("/mark-price", json=tick)
    too_far = price * mistake > 0
    assert outcome(refused) in ({"mark_price_jump", "invalid price"} if too_far else {"invalid price"})
    assert marks_refused() == before + 1

    await watched_desk.sweep(format_decimal(price))
    for account in accounts:
        shown = await watched_desk.account(account)
        assert (shown["state"], shown["positions"][0]["mark_price"]) == ("ok", format_decimal(price))
        assert await watched_desk.breaches(account) == []


async def test_the_same_tick_that_is_confirmed_does_breach(watched_desk: Desk) -> None:
    """Else nothing above would mean anything."""
    await watched_desk.mark("50000")
    long, short = [await at_the_limit(watched_desk, side, Decimal(50_000)) for side in ("buy", "sell")]
    before = marks_refused()
    await watched_desk.sweep("250000")
    assert [len(await watched_desk.breaches(account)) for account in (long, short)] == [0, 1]
    await watched_desk.sweep("50000")
    await watched_desk.sweep("10000")
    assert [len(await watched_desk.breaches(account)) for account in (long, short)] == [1, 1]
    assert marks_refused() == before


async def test_a_mark_of_a_symbol_that_there_is_not_is_counted_as_refused(watched_desk: Desk) -> None:
    before = marks_refused()
    refused = await watched_desk.client.post("/mark-price", json={"symbol": "BTC-PREP", "price": "50000"})
    assert outcome(refused) == "invalid symbol"
    assert marks_refused() == before + 1
