"""An account whose keys cannot be read is set apart, and everybody else is served as if it were not there."""

from __future__ import annotations

import pytest
import pytest_asyncio
import redis.asyncio

from app.embedded import Stores
from tests.integration.desk import BTC_PERP, Desk, command, differences, eventually, expect, outcome

pytestmark = pytest.mark.asyncio(loop_scope="module")

SET_APART_WITHIN_SECONDS = 5.0
POSITION = '{"quantity": "0.1", "avg_price": "50000", "cost": "5000"}'

# What somebody did to each account with redis-cli. An account is named for it; {} is its name.
BROKEN_BY: dict[str, tuple[str, ...]] = {
    "balance-is-text": ("SET account:{}:balance abc",),
    "balance-is-nan": ("SET account:{}:balance NaN",),
    "balance-is-infinite": ("SET account:{}:balance inf",),
    "balance-is-empty": ("DEL account:{}:balance",),
    "balance-is-too-large": ("SET account:{}:balance 40000000000.00000001",),
    "balance-is-too-fine": ("SET account:{}:balance 0.000000001",),
    "balance-is-a-list": ("DEL account:{}:balance", "RPUSH account:{}:balance 1"),
    "balance-is-a-hash": ("DEL account:{}:balance", "HSET account:{}:balance 1 1"),
    "positions-is-a-string": ("DEL positions:{}", "SET positions:{} long"),
    "position-is-no-json": (f"HSET positions:{{}} {BTC_PERP} long",),
    "position-is-nan": (f'HSET positions:{{}} {BTC_PERP} {{"quantity":NaN,"avg_price":1}}',),
    "position-has-no-price": (f'HSET positions:{{}} {BTC_PERP} {{"quantity":"1"}}',),
    "position-is-off-the-lot": (f'HSET positions:{{}} {BTC_PERP} {{"quantity":"0.0000001","avg_price":"1"}}',),
    "position-is-of-no-symbol": ('HSET positions:{} ETH-PERP {"quantity":"1","avg_price":"1"}',),
    "ledger-is-a-string": ("DEL account:{}:ledger", "SET account:{}:ledger 1"),
    "ledger-has-no-number": ("HSET account:{}:ledger seq abc",),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hospital(watched_desk: Desk, shared_redis: redis.asyncio.Redis) -> Desk:
    """Accounts long 0.1 BTC that then were broken, all found by the audit; and Alice, who is well."""
    await watched_desk.mark("50000")
    for name in (*BROKEN_BY, "alice"):
        await watched_desk.deposit(name, "1000")
        await watched_desk.buy(name, "0.1", "50000")
    for name, commands in BROKEN_BY.items():
        for line in commands:
            await command(shared_redis, *(word.replace("{}", name) for word in line.split()))

    async def all_are_set_apart() -> bool:
        return bool((await watched_desk.report())["totals"]["accounts"]["quarantined"] == len(BROKEN_BY))

    await eventually(all_are_set_apart, "the audit to find them all", within_seconds=SET_APART_WITHIN_SECONDS)
    return watched_desk


@pytest.mark.parametrize("name", BROKEN_BY)
async def test_an_account_that_cannot_be_read_is_shown_as_quarantined_and_nothing_is_said_of_it(
    hospital: Desk, name: str
) -> None:
    shown = await hospital.account(name)
    assert (shown["state"], shown["balance"], shown["equity"], shown["positions"]) == ("quarantined", None, None, [])


@pytest.mark.parametrize("name", BROKEN_BY)
async def test_an_account_that_cannot_be_read_takes_no_trade_and_no_transfer(hospital: Desk, name: str) -> None:
    assert outcome(await hospital.trade(name, "sell", "0.1", "50000")) == "account_quarantined"
    for verb in ("deposit", "withdraw"):
        assert outcome(await hospital.transfer(verb, name, "1")) == "account_quarantined"


async def test_the_report_lists_each_of_them_as_quarantined_and_everybody_else_as_before(hospital: Desk) -> None:
    states = {account["account_id"]: account["state"] for account in (await hospital.report())["accounts"]}
    assert states == {**dict.fromkeys(BROKEN_BY, "quarantined"), "alice": "ok"}


async def test_the_others_trade_breach_and_recover(hospital: Desk) -> None:
    account = hospital.new_account()
    await hospital.sweep("50000")
    await hospital.deposit(account, "1000")
    await hospital.buy(account, "0.1", "50000")
    await hospital.sweep("43000")
    assert len(await hospital.breaches(account)) == 1
    await hospital.sweep("50000")
    assert len(await hospital.rows("recoveries", account_id=account)) == 1
    expect(await hospital.transfer("withdraw", account, "0.00000001"), 409)
    await hospital.sell(account, "0.1", "50000")


async def test_nothing_is_recorded_of_an_account_that_cannot_be_read(hospital: Desk) -> None:
    await hospital.sweep("43000")
    await hospital.sweep("50000")
    for name in BROKEN_BY:
        assert await hospital.breaches(name) == []


async def test_an_account_whose_key_is_put_right_is_released_by_itself(
    hospital: Desk, shared_redis: redis.asyncio.Redis, shared_stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = hospital.new_account()
    await hospital.deposit(account, "1000")
    await shared_redis.set(f"account:{account}:balance", "abc")

    async def quarantined() -> bool:
        accounts = (await hospital.report())["accounts"]
        return account in {shown["account_id"] for shown in accounts if shown["state"] == "quarantined"}

    async def released() -> bool:
        return not await quarantined()

    await eventually(quarantined, "the audit to find it", within_seconds=SET_APART_WITHIN_SECONDS)
    await shared_redis.set(f"account:{account}:balance", "1234.5")
    await eventually(released, "the audit to release it", within_seconds=SET_APART_WITHIN_SECONDS)
    assert (await hospital.account(account))["balance"] == "1234.5"
    monkeypatch.setattr("app.verify.RETRY_SECONDS", 0.01)
    assert {line.split(":")[0] for line in await differences(shared_stores)} == set(BROKEN_BY)


async def test_an_account_made_by_hand_that_cannot_be_read_is_counted_and_hides_nobody(
    hospital: Desk, shared_redis: redis.asyncio.Redis
) -> None:
    await shared_redis.set("account:made-by-hand:balance", "ten thousand")

    async def is_counted() -> bool:
        return bool((await hospital.report())["totals"]["accounts"]["quarantined"] == len(BROKEN_BY) + 1)

    try:
        await eventually(is_counted, "the audit to find it", within_seconds=SET_APART_WITHIN_SECONDS)
        assert "alice" in {account["account_id"] for account in (await hospital.report())["accounts"]}
    finally:
        await shared_redis.delete("account:made-by-hand:balance")


@pytest.mark.parametrize("name", ["equity", "used_margin"])
async def test_a_displayed_key_of_the_wrong_type_is_put_right_by_a_sweep(
    hospital: Desk, shared_redis: redis.asyncio.Redis, name: str
) -> None:
    account = hospital.new_account()
    await hospital.sweep("50000")
    await hospital.deposit(account, "1000")
    key = f"account:{account}:{name}"
    await shared_redis.delete(key)
    await shared_redis.rpush(key, "1")
    await hospital.mark("50001")

    async def is_right() -> bool:
        return await shared_redis.type(key) == "string"

    await eventually(is_right, "the refresh", within_seconds=SET_APART_WITHIN_SECONDS)
    assert await shared_redis.get(key) == {"equity": "1000", "used_margin": "0"}[name]
