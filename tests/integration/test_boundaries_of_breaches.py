"""Where a breach opens and where it ends: one step above, at and below each line, as a watchdog finds it.

The cast is long 1 BTC from 50,000, so its equity is ``balance + mark - 50,000``.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import pytest_asyncio

from tests.integration.desk import Desk, expect

pytestmark = pytest.mark.asyncio(loop_scope="module")

# With a balance of 10,000.4 the two lines of 1 BTC from 50,000 lie at:
#   equity = maintenance margin: 10,000.4 + m - 50,000 = 0.1 m, m = 39,999.6 / 0.9 = 44,444
#   equity = used margin:        10,000.4 + m - 50,000 = 0.2 m, m = 39,999.6 / 0.8 = 49,999.5
MAINTENANCE_LINE = "44444"
RESTORE_LINE = "49999.5"


@dataclass(frozen=True)
class Cast:
    """Three accounts, the middle one just on both lines, the others the smallest amount away."""

    richer: str
    at_the_line: str
    poorer: str

    async def in_breach(self, desk: Desk) -> tuple[bool, bool, bool]:
        """Of each, whether it has an open breach."""
        richer, at_the_line, poorer = [
            bool((await desk.account(name)).get("open_breach")) for name in (self.richer, self.at_the_line, self.poorer)
        ]
        return richer, at_the_line, poorer


async def cast_of(desk: Desk, side: str, *balances: str) -> Cast:
    """Accounts that took 1 BTC at 50,000 with these balances."""
    await desk.sweep("50000")
    names = []
    for balance in balances:
        names.append(desk.new_account())
        await desk.deposit(names[-1], balance)
        expect(await desk.trade(names[-1], side, "1", "50000"), 201)
    return Cast(*names)


@pytest_asyncio.fixture(loop_scope="module")
async def longs(watched_desk: Desk) -> Cast:
    return await cast_of(watched_desk, "buy", "10000.40000001", "10000.4", "10000.39999999")


async def test_equity_below_the_maintenance_margin_by_the_smallest_amount_opens_a_breach_and_equal_equity_none(
    watched_desk: Desk, longs: Cast
) -> None:
    await watched_desk.sweep(MAINTENANCE_LINE)
    assert await longs.in_breach(watched_desk) == (False, False, True)
    assert [len(await watched_desk.breaches(name)) for name in (longs.richer, longs.at_the_line, longs.poorer)] == [
        0,
        0,
        1,
    ]


async def test_a_short_breaches_on_the_same_side_of_its_line(watched_desk: Desk) -> None:
    # Short 1 BTC: equity 10,000.6 - 4,546 = 5,454.6 at 54,546, a tenth of it.
    shorts = await cast_of(watched_desk, "sell", "10000.60000001", "10000.6", "10000.59999999")
    await watched_desk.sweep("54546")
    assert await shorts.in_breach(watched_desk) == (False, False, True)


@pytest.mark.parametrize(("mark", "breached"), [("44444.00000001", False), ("44444", False), ("44443.99999999", True)])
async def test_the_smallest_step_of_the_mark_over_the_line_opens_a_breach(
    watched_desk: Desk, longs: Cast, mark: str, breached: bool
) -> None:
    await watched_desk.sweep(mark)
    assert len(await watched_desk.breaches(longs.at_the_line)) == breached


async def test_the_row_of_a_breach_carries_the_figures_it_rests_on(watched_desk: Desk, longs: Cast) -> None:
    version = await watched_desk.sweep(MAINTENANCE_LINE)
    (row,) = await watched_desk.breaches(longs.poorer)
    assert row["mark_version"] == version
    assert row["marks"] == {"BTC-PERP": "44444"}
    assert row["positions"] == {"BTC-PERP": {"quantity": "1", "cost": "50000"}}
    assert row["balance"] == "10000.39999999"
    assert row["equity"] == "4444.39999999"
    assert row["maintenance_margin"] == "4444.4"
    assert row["used_margin"] == "8888.8"
    assert row["reason"] == ("equity 4444.39999999 is below maintenance margin 4444.4 with 1 BTC-PERP at 44444")
    assert row["recovered_at"] is None


async def test_equity_that_reaches_the_used_margin_by_the_mark_ends_a_breach_and_a_smallest_amount_less_does_not(
    watched_desk: Desk, longs: Cast
) -> None:
    await watched_desk.sweep("44000")
    assert await longs.in_breach(watched_desk) == (True, True, True)
    await watched_desk.sweep(RESTORE_LINE)
    assert await longs.in_breach(watched_desk) == (False, False, True)
    assert (await watched_desk.account(longs.poorer))["state"] == "recovering"


@pytest.mark.parametrize(("mark", "ended"), [("49999.50000001", True), ("49999.5", True), ("49999.49999999", False)])
async def test_the_smallest_step_of_the_mark_short_of_the_line_leaves_a_breach_open(
    watched_desk: Desk, longs: Cast, mark: str, ended: bool
) -> None:
    await watched_desk.sweep("44000")
    await watched_desk.sweep(mark)
    assert len(await watched_desk.rows("recoveries", account_id=longs.at_the_line)) == ended


async def breached_at_40000(desk: Desk) -> str:
    """Long 1 BTC, equity 12,000 - 10,000 = 2,000, maintenance margin 4,000, used margin 8,000; its breach is open."""
    await desk.sweep("50000")
    account = desk.new_account()
    await desk.deposit(account, "12000")
    await desk.buy(account, "1", "50000")
    await desk.sweep("40000")
    assert (await desk.account(account))["state"] == "candidate"
    return account


@pytest.mark.parametrize(
    ("amount", "state", "reasons"),
    [
        ("6000.00000001", "ok", ["a deposit restored the account: equity 8000.00000001, used margin 8000"]),
        ("6000", "ok", ["a deposit restored the account: equity 8000, used margin 8000"]),
        ("5999.99999999", "recovering", []),
    ],
)
async def test_a_deposit_up_to_the_used_margin_ends_a_breach_in_its_own_commit(
    watched_desk: Desk, amount: str, state: str, reasons: list[str]
) -> None:
    account = await breached_at_40000(watched_desk)
    await watched_desk.deposit(account, amount)
    assert (await watched_desk.account(account))["state"] == state
    assert [row["reason"] for row in await watched_desk.rows("recoveries", account_id=account)] == reasons


@pytest.mark.parametrize(
    ("quantity", "state"),
    # Equity stays 2,000 when sold at the mark; 0.25 BTC use 2,000.
    [("0.750001", "ok"), ("0.75", "ok"), ("0.749999", "recovering")],
)
async def test_a_reduction_down_to_what_equity_carries_ends_a_breach_in_its_own_commit(
    watched_desk: Desk, quantity: str, state: str
) -> None:
    account = await breached_at_40000(watched_desk)
    await watched_desk.sell(account, quantity, "40000")
    assert (await watched_desk.account(account))["state"] == state
    assert len(await watched_desk.rows("recoveries", account_id=account)) == (state == "ok")


async def test_going_flat_ends_a_breach_whatever_is_left(watched_desk: Desk) -> None:
    account = await breached_at_40000(watched_desk)
    # The lower edge of the band: 36,000 realises -14,000 of 12,000.
    await watched_desk.sell(account, "1", "36000")
    shown = await watched_desk.account(account)
    assert (shown["balance"], shown["state"], "open_breach" in shown) == ("-2000", "negative_equity", False)
    (recovery,) = await watched_desk.rows("recoveries", account_id=account)
    assert recovery["reason"] == "a trade left the account flat"


async def test_a_breach_that_no_longer_is_a_candidate_stays_open_until_the_used_margin_is_there(
    watched_desk: Desk,
) -> None:
    account = await breached_at_40000(watched_desk)
    # Back at 45,000: equity 7,000, above the maintenance margin of 4,500 and below the 9,000 in use.
    await watched_desk.sweep("45000")
    shown = await watched_desk.account(account)
    assert (shown["state"], shown["candidate"], shown["open_breach"]["restored_at_equity"]) == (
        "recovering",
        False,
        "9000",
    )


async def test_a_flat_account_with_a_negative_balance_is_no_candidate(watched_desk: Desk) -> None:
    account = await breached_at_40000(watched_desk)
    await watched_desk.sell(account, "1", "36000")
    await watched_desk.sweep("39000")
    assert (await watched_desk.account(account))["candidate"] is False
    assert len(await watched_desk.breaches(account)) == 1
