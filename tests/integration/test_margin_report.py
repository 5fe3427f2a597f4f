"""The margin report: its totals are the sum of its accounts, and its pages show each of them once."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
import pytest_asyncio
import redis.asyncio

from tests.integration.desk import Desk, expect

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Everybody trades at 50,000; then the mark is 44,000. Maintenance margin per BTC: 4,400; used margin: 8,800.
ACCOUNTS: dict[str, tuple[str, str, str]] = {
    # name: balance before, side, quantity                        equity    ratio
    "alice-flat": ("1000", "", "0"),  # 1,000    0
    "bob-long-safe": ("20000", "buy", "1"),  # 14,000   0.31428571
    "carol-long-candidate": ("10000", "buy", "1"),  # 4,000    1.1
    "dora-short-gains": ("10000", "sell", "1"),  # 16,000   0.275
    "emil-long-insolvent": ("5000.5", "buy", "0.5"),  # 2,000.5  1.09972507
    "fay-long-below-zero": ("20000", "buy", "2"),  # 8,000    1.1
    "gus-long-tiny": ("0.01", "buy", "0.000001"),  # 0.004    1.1
    "hal-long-safe-too": ("30000", "buy", "2"),  # 18,000   0.48888889
}
CANDIDATES = {"carol-long-candidate", "emil-long-insolvent", "fay-long-below-zero", "gus-long-tiny"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def market(shared_desk: Desk) -> Desk:
    """The eight accounts after the fall of the mark. No watchdog runs, so no breach is open."""
    await shared_desk.mark("50000")
    for name, (balance, side, quantity) in ACCOUNTS.items():
        await shared_desk.deposit(name, balance)
        if side:
            expect(await shared_desk.trade(name, side, quantity, "50000"), 201)
    await shared_desk.mark("44000")
    return shared_desk


def decimals(accounts: list[dict[str, Any]], name: str) -> Decimal:
    return sum((Decimal(account[name]) for account in accounts), start=Decimal(0))


async def pages(desk: Desk, limit: int, **parameters: str) -> list[dict[str, Any]]:
    """Every page of the report, of ``limit`` accounts each."""
    found = [await desk.report(limit=str(limit), **parameters)]
    while found[-1]["next_cursor"] is not None:
        found.append(await desk.report(limit=str(limit), cursor=found[-1]["next_cursor"], **parameters))
        assert len(found) <= 2 * len(ACCOUNTS)
    return found


async def test_its_totals_are_the_sums_of_its_accounts(market: Desk) -> None:
    report = await market.report()
    accounts, totals = report["accounts"], report["totals"]
    assert {account["account_id"] for account in accounts} == set(ACCOUNTS)
    for name in ("equity", "used_margin", "maintenance_margin"):
        assert Decimal(totals[name]) == decimals(accounts, name), name
    candidates = [account for account in accounts if account["candidate"]]
    assert Decimal(totals["shortfall"]) == decimals(candidates, "maintenance_margin") - decimals(candidates, "equity")
    # Long 1 + 1 + 0.5 + 2 + 0.000001 + 2, short 1, at 44,000.
    assert (totals["long_notional"], totals["short_notional"]) == ("286000.044", "44000")
    assert totals["accounts"] == {
        "ok": 4,
        "candidate": 4,
        "recovering": 0,
        "negative_equity": 0,
        "quarantined": 0,
    }


async def test_each_account_is_shown_as_get_positions_shows_it(market: Desk) -> None:
    for shown in (await market.report())["accounts"]:
        alone = await market.account(shown["account_id"])
        del alone["positions"], shown["open_breach_id"]
        assert shown == alone


async def test_candidates_come_first_and_whole_however_short_the_page(market: Desk) -> None:
    answer = await market.client.get("/margin-report", params={"limit": "1"})
    report = expect(answer, 200)
    assert {account["account_id"] for account in report["liquidation_candidates"]} == CANDIDATES
    assert len(report["accounts"]) == 1
    assert list(report).index("liquidation_candidates") < list(report).index("accounts")


@pytest.mark.parametrize("order", ["slot", "margin_ratio"])
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 7, 8, 9])
async def test_its_pages_show_each_account_once(market: Desk, limit: int, order: str) -> None:
    shown = [account["account_id"] for page in await pages(market, limit, order=order) for account in page["accounts"]]
    assert sorted(shown) == sorted(ACCOUNTS)
    whole = await market.report(order=order)
    assert shown == [account["account_id"] for account in whole["accounts"]]


@pytest.mark.parametrize("order", ["slot", "margin_ratio"])
async def test_a_page_that_ends_with_the_last_account_leads_nowhere(market: Desk, order: str) -> None:
    assert len(await pages(market, len(ACCOUNTS), order=order)) == 1


async def test_by_margin_ratio_those_without_one_come_first_and_then_the_highest(market: Desk) -> None:
    # At 39,000 Fay's equity is -2,000, Emil's -499.5, Carol's -1,000 and Gus's -0.001: no ratio.
    await market.mark("39000")
    try:
        ratios = [account["margin_ratio"] for account in (await market.report(order="margin_ratio"))["accounts"]]
    finally:
        await market.mark("44000")
    assert ratios[:4] == [None] * 4
    known = [Decimal(ratio) for ratio in ratios[4:]]
    assert known == sorted(known, reverse=True)
    assert len(set(known)) == 4


async def test_pages_by_margin_ratio_lead_on_past_those_without_one(market: Desk) -> None:
    await market.mark("39000")
    try:
        found = await pages(market, 3, order="margin_ratio")
    finally:
        await market.mark("44000")
    assert sorted(account["account_id"] for page in found for account in page["accounts"]) == sorted(ACCOUNTS)


async def test_without_a_watchdog_it_warns_that_breaches_are_not_recorded(
    market: Desk, shared_redis: redis.asyncio.Redis
) -> None:
    await shared_redis.delete("state:swept")
    report = await market.report()
    assert (report["swept_version"], report["swept_age_seconds"]) == (0, None)
    assert report["warning"] == "no watchdog has swept yet: breaches are not being recorded"


@pytest.mark.parametrize(("age_seconds", "warned"), [(3.001, True), (2, False)])
async def test_it_warns_when_the_last_sweep_is_three_intervals_old(
    market: Desk, shared_redis: redis.asyncio.Redis, age_seconds: float, warned: bool
) -> None:
    # Timer sweeps come every second; a second of room below three for a slow machine.
    seconds, microseconds = await shared_redis.time()
    swept_at_us = seconds * 1_000_000 + microseconds - int(age_seconds * 1_000_000)
    await shared_redis.hset("state:swept", mapping={"version": 1, "at": swept_at_us})
    try:
        assert bool((await market.report())["warning"]) == warned
    finally:
        await shared_redis.delete("state:swept")


async def test_it_names_its_marks_their_version_and_their_age(market: Desk) -> None:
    version = await market.mark("44000")
    report = await market.report()
    assert report["marks"] == {"BTC-PERP": "44000"}
    assert report["mark_version"] == version
    assert 0 <= report["mark_age_seconds"]["BTC-PERP"] < 60


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"limit": "0"}, "limit"),
        ({"limit": "-1"}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"order": "equity"}, "order"),
        ({"cursor": "abc"}, "cursor"),
        ({"cursor": "-2"}, "cursor"),
        ({"cursor": "-5"}, "cursor"),
        ({"cursor": "1:2"}, "cursor"),
        ({"cursor": "5", "order": "margin_ratio"}, "cursor"),
        ({"cursor": "abc:1", "order": "margin_ratio"}, "cursor"),
        ({"cursor": "nan:1", "order": "margin_ratio"}, "cursor"),
    ],
)
async def test_it_refuses_by_name_what_it_cannot_page_by(market: Desk, parameters: dict[str, str], name: str) -> None:
    refused = expect(await market.client.get("/margin-report", params=parameters), 422)
    assert refused["field"] == name


@pytest.mark.parametrize("cursor", ["8", "1000", "99999999999999999999"])
async def test_a_cursor_behind_the_last_account_shows_no_more(market: Desk, cursor: str) -> None:
    report = await market.report(cursor=cursor)
    assert (report["accounts"], report["next_cursor"]) == ([], None)
