"""Redis in the hands of a user with ``redis-cli``: what is set by hand counts, and history learns of it."""

from __future__ import annotations

import json

import pytest
import redis.asyncio

from app.embedded import Stores
from tests.integration.desk import BTC_PERP, Desk, differences, eventually, expect

pytestmark = pytest.mark.asyncio(loop_scope="module")

ADOPTED_WITHIN_SECONDS = 5.0


async def adopted(redis_client: redis.asyncio.Redis, account: str) -> None:
    """Wait until the watchdog's audit has given the account its place."""

    async def has_a_slot() -> bool:
        return account in await redis_client.lrange("accounts", 0, -1)

    await eventually(has_a_slot, f"{account} to be adopted", within_seconds=ADOPTED_WITHIN_SECONDS)


async def test_a_balance_and_a_mark_set_by_hand_book_a_trade_and_a_falling_mark_set_by_hand_one_liquidation(
    watched_desk: Desk, shared_redis: redis.asyncio.Redis, shared_stores: Stores
) -> None:
    await shared_redis.set("account:1:balance", 10000)
    await shared_redis.set(f"mark_price:{BTC_PERP}", 50000)
    # The account id may be a number, as a user would write it.
    order = {"account_id": 1, "symbol": BTC_PERP, "side": "buy", "quantity": 1, "price": 50000}
    booked = expect(await watched_desk.client.post("/trade", json=order), 201)
    assert (booked["account_id"], booked["free_margin"]) == ("1", "0")

    await shared_redis.set(f"mark_price:{BTC_PERP}", 44000)

    async def is_breached() -> bool:
        return bool(await watched_desk.breaches("1"))

    await eventually(is_breached, "the liquidation row", within_seconds=ADOPTED_WITHIN_SECONDS)
    for price in (43900, 43800, 43700):
        await shared_redis.set(f"mark_price:{BTC_PERP}", price)
        await swept_at(watched_desk, str(price))
    (row,) = await watched_desk.breaches("1")
    assert (row["account_id"], row["marks"], row["recovered_at"]) == ("1", {BTC_PERP: "44000"}, None)
    assert await differences(shared_stores) == []


async def swept_at(desk: Desk, price: str) -> None:
    """Wait until a mark set by hand has got its version, and that has been swept."""

    async def is_swept() -> bool:
        report = await desk.report()
        # A version above the one swept is a mark, this one or another, that has not been.
        return bool(report["marks"].get(BTC_PERP) == price and report["swept_version"] >= report["mark_version"])

    await eventually(is_swept, f"a sweep at {price}")


async def test_a_mark_set_by_hand_gets_a_version_and_a_time(
    watched_desk: Desk, shared_redis: redis.asyncio.Redis
) -> None:
    version = await watched_desk.mark("50000")
    await shared_redis.set(f"mark_price:{BTC_PERP}", "50001.5")

    async def is_adopted() -> bool:
        return bool((await watched_desk.report())["mark_version"] == version + 1)

    await eventually(is_adopted, "the mark to be adopted", within_seconds=ADOPTED_WITHIN_SECONDS)
    report = await watched_desk.report()
    assert report["marks"] == {BTC_PERP: "50001.5"}
    assert report["mark_age_seconds"][BTC_PERP] < 60


@pytest.mark.parametrize("text", ["abc", "NaN", "0", "-1", "", "1e400"])
async def test_a_mark_set_by_hand_that_is_no_price_is_no_mark(
    watched_desk: Desk, shared_redis: redis.asyncio.Redis, text: str
) -> None:
    account = watched_desk.new_account()
    await watched_desk.mark("50000")
    await watched_desk.deposit(account, "10000")
    await watched_desk.buy(account, "1", "50000")
    await shared_redis.set(f"mark_price:{BTC_PERP}", text)
    refused = expect(await watched_desk.trade(account, "sell", "1", "50000"), 409)
    assert refused["code"] == "no_mark_price"
    assert (await watched_desk.account(account))["equity"] is None
    assert await watched_desk.breaches(account) == []


async def test_a_balance_edited_by_hand_is_booked_as_an_adjustment_with_the_next_trade(
    watched_desk: Desk, shared_redis: redis.asyncio.Redis, shared_stores: Stores
) -> None:
    account = watched_desk.new_account()
    await watched_desk.mark("50000")
    await watched_desk.deposit(account, "1")
    await shared_redis.set(f"account:{account}:balance", "10000")
    await watched_desk.buy(account, "1", "50000")
    assert await differences(shared_stores) == []


async def test_an_account_made_by_hand_is_adopted_without_any_request(
    watched_desk: Desk, shared_redis: redis.asyncio.Redis, shared_stores: Stores
) -> None:
    await shared_redis.set("account:by-hand:balance", "123.45")
    await adopted(shared_redis, "by-hand")
    assert "by-hand" in {shown["account_id"] for shown in (await watched_desk.report())["accounts"]}
    assert await differences(shared_stores) == []


async def test_a_position_written_by_hand_without_its_cost_is_read_as_quantity_times_average_price(
    watched_desk: Desk, shared_redis: redis.asyncio.Redis, shared_stores: Stores
) -> None:
    await watched_desk.mark("60000")
    position = json.dumps({"quantity": "0.5", "avg_price": "60000.1"})
    async with shared_redis.pipeline(transaction=True) as pipeline:
        pipeline.set("account:dora:balance", "7000")
        pipeline.hset("positions:dora", BTC_PERP, position)
        await pipeline.execute()
    shown = await watched_desk.account("dora")
    # 0.5 x (60,000 - 60,000.1)
    assert shown["positions"][0]["unrealised_pnl"] == "-0.05"
    await adopted(shared_redis, "dora")
    written = json.loads(await shared_redis.hget("positions:dora", BTC_PERP) or "")
    assert written == {"quantity": "0.5", "avg_price": "60000.1", "cost": "30000.05"}
    assert await differences(shared_stores) == []


async def test_a_position_written_by_hand_with_json_numbers_is_read_too(
    watched_desk: Desk, shared_redis: redis.asyncio.Redis
) -> None:
    await watched_desk.mark("60000")
    async with shared_redis.pipeline(transaction=True) as pipeline:
        pipeline.set("account:emil:balance", "7000")
        pipeline.hset("positions:emil", BTC_PERP, '{"quantity": -0.5, "avg_price": 60000.1}')
        await pipeline.execute()
    closed = await watched_desk.buy("emil", "0.5", "60000")
    assert (closed["realised_pnl"], closed["balance"]) == ("0.05", "7000.05")


async def test_a_position_written_by_hand_that_is_below_maintenance_margin_is_recorded_once(
    watched_desk: Desk, shared_redis: redis.asyncio.Redis, shared_stores: Stores
) -> None:
    await watched_desk.mark("50000")
    async with shared_redis.pipeline(transaction=True) as pipeline:
        pipeline.set("account:faith:balance", "1000")
        pipeline.hset("positions:faith", BTC_PERP, '{"quantity": "1", "avg_price": "50000"}')
        await pipeline.execute()

    async def is_breached() -> bool:
        return bool(await watched_desk.breaches("faith"))

    await eventually(is_breached, "the liquidation row", within_seconds=ADOPTED_WITHIN_SECONDS)
    await watched_desk.sweep("49999")
    assert len(await watched_desk.breaches("faith")) == 1
    assert await differences(shared_stores) == []


async def test_the_task_s_keys_hold_what_the_api_shows(watched_desk: Desk, shared_redis: redis.asyncio.Redis) -> None:
    account = watched_desk.new_account()
    await watched_desk.mark("60000")
    await watched_desk.deposit(account, "7000")
    await watched_desk.buy(account, "0.5", "60000.1")
    assert await shared_redis.mget(
        f"account:{account}:balance", f"account:{account}:equity", f"account:{account}:used_margin"
    ) == ["7000", "6999.95", "6000"]
    assert await shared_redis.hgetall(f"positions:{account}") == {
        BTC_PERP: '{"quantity": "0.5", "avg_price": "60000.1", "cost": "30000.05"}'
    }
    assert await shared_redis.get(f"mark_price:{BTC_PERP}") == "60000"
    await watched_desk.sell(account, "0.5", "60000.1")
    assert await shared_redis.exists(f"positions:{account}") == 0


async def test_an_equity_or_used_margin_written_by_hand_decides_nothing_and_is_put_right_by_a_sweep(
    watched_desk: Desk, shared_redis: redis.asyncio.Redis
) -> None:
    account = watched_desk.new_account()
    equity, used_margin = f"account:{account}:equity", f"account:{account}:used_margin"
    await watched_desk.mark("50000")
    await watched_desk.deposit(account, "10000")
    await shared_redis.mset({equity: "1", used_margin: "99999999"})
    assert (await watched_desk.account(account))["equity"] == "10000"
    await watched_desk.buy(account, "1", "50000")
    await shared_redis.mset({equity: "1", used_margin: "99999999"})
    await watched_desk.mark("50001")

    async def keys_are_right() -> bool:
        return await shared_redis.mget(equity, used_margin) == ["10001", "10000.2"]

    await eventually(keys_are_right, "both keys", within_seconds=ADOPTED_WITHIN_SECONDS)
