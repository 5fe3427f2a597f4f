"""The equity and used_margin keys, which no decision reads: after a sweep of a small store all of them are right."""

from __future__ import annotations

import json
import random

import redis.asyncio

from tests.conftest import SystemFactory
from tests.integration.desk import BTC_PERP, Desk, eventually

ACCOUNTS = 1_000


async def write_accounts(client: redis.asyncio.Redis) -> list[str]:
    """Accounts by hand, flat, long and short, safe and in trouble at a mark of 45,000."""
    generator = random.Random(1_000)
    names = [f"account-{number:04d}" for number in range(ACCOUNTS)]
    async with client.pipeline(transaction=True) as pipeline:
        for name in names:
            cents = generator.randint(100_000, 3_000_000)
            pipeline.set(f"account:{name}:balance", str(cents / 100))
            lots = generator.choice([0, generator.randint(-999_999, 999_999)])
            if lots:
                position = {"quantity": f"{lots / 1_000_000:.6f}", "avg_price": "50000.01"}
                pipeline.hset(f"positions:{name}", BTC_PERP, json.dumps(position))
        await pipeline.execute()
    return names


async def test_after_a_sweep_the_keys_of_1000_accounts_equal_what_get_positions_shows(
    system: SystemFactory, desk: Desk, redis_client: redis.asyncio.Redis
) -> None:
    names = await write_accounts(redis_client)
    await system(api_workers=0, sweep_interval_seconds="0.2")

    async def all_are_adopted() -> bool:
        return await redis_client.llen("accounts") == ACCOUNTS

    await eventually(all_are_adopted, "the accounts to be adopted")
    await desk.sweep("45000.12345678")
    shown = {}
    for name in names:
        account = await desk.account(name)
        shown[name] = (account["equity"], account["used_margin"])
    assert len(set(shown.values())) > ACCOUNTS * 0.9, "the accounts are not all alike"

    async def keys_are_right() -> bool:
        keys = [key for name in names for key in (f"account:{name}:equity", f"account:{name}:used_margin")]
        texts = await redis_client.mget(keys)
        return dict(zip(names, zip(texts[::2], texts[1::2], strict=True), strict=True)) == shown

    await eventually(keys_are_right, "the keys of all accounts")
