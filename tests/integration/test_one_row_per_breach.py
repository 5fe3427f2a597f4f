"""One breach is one row, however many sweeps see it; a second breach is a second row."""

from __future__ import annotations

import pytest

from app.embedded import Stores
from tests.integration.desk import Desk, differences

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def carol_in_breach(desk: Desk) -> str:
    """Long 1 BTC from 50,000 with 10,000, at a mark of 44,000: equity 4,000, maintenance margin 4,400."""
    carol = desk.new_account()
    await desk.sweep("50000")
    await desk.deposit(carol, "10000")
    await desk.buy(carol, "1", "50000")
    await desk.sweep("44000")
    assert (await desk.account(carol))["state"] == "candidate"
    return carol


async def test_a_breach_that_goes_on_falling_is_one_row(watched_desk: Desk) -> None:
    carol = await carol_in_breach(watched_desk)
    for price in ("43000", "42000", "30000"):
        await watched_desk.sweep(price)
    assert len(await watched_desk.breaches(carol)) == 1


async def test_an_account_that_hovers_at_the_line_has_one_row(watched_desk: Desk) -> None:
    """A candidate, above the maintenance margin but not restored, a candidate again: one breach all along."""
    carol = await carol_in_breach(watched_desk)
    for _ in range(5):
        await watched_desk.sweep("44500")
        await watched_desk.sweep("44400")
    assert len(await watched_desk.breaches(carol)) == 1
    assert await watched_desk.rows("recoveries", account_id=carol) == []


async def test_after_a_recovery_a_second_breach_adds_just_the_second_row(
    watched_desk: Desk, shared_stores: Stores
) -> None:
    carol = await carol_in_breach(watched_desk)
    await watched_desk.sweep("50000")
    assert (await watched_desk.account(carol))["state"] == "ok"
    (first,) = await watched_desk.breaches(carol)
    assert first["recovered_at"] is not None
    await watched_desk.sweep("44000")
    await watched_desk.sweep("43000")
    second, again = await watched_desk.breaches(carol)
    assert (again, second["recovered_at"]) == (first, None)
    assert second["id"] > first["id"]
    (recovery,) = await watched_desk.rows("recoveries", account_id=carol)
    assert recovery["liquidation_id"] == first["id"]
    assert await differences(shared_stores) == []


async def test_a_second_breach_after_a_recovery_by_deposit_adds_just_the_second_row(watched_desk: Desk) -> None:
    carol = await carol_in_breach(watched_desk)
    await watched_desk.deposit(carol, "10000")
    assert (await watched_desk.account(carol))["state"] == "ok"
    await watched_desk.sweep("33000")
    assert len(await watched_desk.breaches(carol)) == 2
