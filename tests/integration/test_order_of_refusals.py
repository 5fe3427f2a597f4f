"""Which refusal is named when several apply, and what a stale mark lets through."""

from __future__ import annotations

import pytest
import redis.asyncio

from tests.integration.conftest import DeskFactory
from tests.integration.desk import BTC_PERP, Desk, outcome

ACCEPTED_AT = f"mark:{BTC_PERP}"


async def test_of_several_reasons_to_refuse_the_first_of_the_contract_is_named(
    open_desk: DeskFactory, redis_client: redis.asyncio.Redis
) -> None:
    """One order that everything speaks against; what the answer names is put right, and the next reason shows."""
    desk = await open_desk(mark_max_age_seconds="60")
    await desk.deposit("alice", "1")
    order = {"account_id": "alice", "symbol": BTC_PERP, "side": "buy", "quantity": "1500", "price": "120"}
    named = []

    async def ask() -> None:
        named.append(outcome(await desk.client.post("/trade", json=order)))

    await redis_client.set("state:halted", "1")
    await ask()
    await redis_client.delete("state:halted")
    await ask()
    await desk.mark("100")
    await redis_client.hset(ACCEPTED_AT, "timestamp", 1)
    await ask()
    await desk.mark("100")
    await ask()
    order["price"] = "100"
    await ask()
    order["quantity"] = "1000"
    await ask()
    await desk.deposit("alice", "19999")
    await ask()
    assert named == [
        "trading_halted",
        "no_mark_price",
        "stale_mark_price",
        "price_out_of_band",
        "position_limit",
        "insufficient_initial_margin",
        "booked",
    ]


async def age_mark(client: redis.asyncio.Redis, seconds: float) -> None:
    """Have the mark accepted so long ago, by the clock of Redis."""
    now_seconds, microseconds = await client.time()
    accepted_us = now_seconds * 1_000_000 + microseconds - int(seconds * 1_000_000)
    await client.hset(ACCEPTED_AT, "timestamp", accepted_us)


@pytest.fixture
async def alice_long_1_btc(open_desk: DeskFactory) -> Desk:
    """A desk that takes a mark for stale after 60 s, and an account with plenty of margin."""
    desk = await open_desk(mark_max_age_seconds="60")
    await desk.deposit("alice", "100000")
    await desk.mark("50000")
    await desk.buy("alice", "1", "50000")
    return desk


@pytest.mark.parametrize(
    ("age_seconds", "expected"),
    # 5 s of room for a slow machine below the limit of 60 s; none is needed above.
    [(60.001, "stale_mark_price"), (55, "booked")],
)
async def test_an_increase_needs_a_mark_that_is_not_older_than_the_limit(
    alice_long_1_btc: Desk, redis_client: redis.asyncio.Redis, age_seconds: float, expected: str
) -> None:
    await age_mark(redis_client, age_seconds)
    assert outcome(await alice_long_1_btc.trade("alice", "buy", "1", "50000")) == expected


async def test_a_withdrawal_beside_an_open_position_needs_a_mark_that_is_not_stale(
    alice_long_1_btc: Desk, redis_client: redis.asyncio.Redis
) -> None:
    await age_mark(redis_client, 61)
    assert outcome(await alice_long_1_btc.transfer("withdraw", "alice", "1")) == "stale_mark_price"


@pytest.mark.parametrize(
    ("quantity", "expected"), [("0.5", "booked"), ("1", "booked"), ("1.000001", "stale_mark_price")]
)
async def test_on_a_stale_mark_reductions_pass_and_a_flip_does_not(
    alice_long_1_btc: Desk, redis_client: redis.asyncio.Redis, quantity: str, expected: str
) -> None:
    await age_mark(redis_client, 61)
    assert outcome(await alice_long_1_btc.trade("alice", "sell", quantity, "50000")) == expected


async def test_a_mark_of_any_age_is_fresh_enough_unless_a_limit_is_set(
    desk: Desk, redis_client: redis.asyncio.Redis
) -> None:
    await desk.deposit("alice", "10000")
    await desk.mark("50000")
    await age_mark(redis_client, 30 * 24 * 3600)
    await desk.buy("alice", "1", "50000")
