"""Each trigger of a sweep alone: a mark's message, the timer, a new subscription; each has a breach recorded in 2 s."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest
import redis.asyncio
from redis.exceptions import NoPermissionError

from app.embedded import Stores
from tests.conftest import SystemFactory
from tests.harness import System
from tests.integration.desk import BTC_PERP, Desk, command, eventually

DEADLINE_SECONDS = 2.0


async def carol_long_1_btc(desk: Desk) -> None:
    """Long 1 BTC from 50,000 with 10,000: a candidate below 44,444.44."""
    await desk.mark("50000")
    await desk.deposit("carol", "10000")
    await desk.buy("carol", "1", "50000")


async def recorded_in_time(postgres: asyncpg.Connection) -> None:
    """Carol's one row is committed in Postgres within two seconds from now."""

    async def is_recorded() -> bool:
        return bool(await postgres.fetchval("SELECT count(*) = 1 FROM liquidations WHERE account_id = 'carol'"))

    await eventually(is_recorded, "the row", within_seconds=DEADLINE_SECONDS)


async def sweeps(system: System, trigger: str) -> float:
    sample = f'plimsoll_sweeps_total{{result="ok",trigger="{trigger}"}}'
    return await system.metric(system.watchdogs[0], sample) or 0


async def test_with_the_timer_at_60_s_the_message_of_a_mark_has_its_breach_recorded_within_2_s(
    system: SystemFactory, desk: Desk, postgres: asyncpg.Connection
) -> None:
    running = await system(api_workers=0, sweep_interval_seconds="60")
    await carol_long_1_btc(desk)
    before = await sweeps(running, "mark")
    await desk.mark("44000")
    await recorded_in_time(postgres)
    assert await sweeps(running, "mark") > before
    assert await sweeps(running, "timer") == 0


@pytest.fixture
async def deaf_user(redis_client: redis.asyncio.Redis, stores: Stores) -> AsyncIterator[str]:
    """The URL of a user of Redis who may do everything but listen to a channel."""
    await command(redis_client, "ACL SETUSER", "deaf", "on", "nopass", "~*", "+@all", "resetchannels")
    yield stores.redis_url.replace("://", "://deaf:any@", 1)
    await command(redis_client, "ACL DELUSER", "deaf")


async def test_with_pub_sub_cut_the_timer_at_1_s_has_a_breach_recorded_within_2_s(
    system: SystemFactory, desk: Desk, postgres: asyncpg.Connection, deaf_user: str
) -> None:
    async with redis.asyncio.Redis.from_url(deaf_user) as client, client.pubsub() as subscription:
        await subscription.subscribe("mark_price")
        with pytest.raises(NoPermissionError):
            await subscription.get_message(timeout=1)
    running = await system(api_workers=0, redis_url=deaf_user, sweep_interval_seconds="1")
    await carol_long_1_btc(desk)
    before = await sweeps(running, "timer")
    await desk.mark("44000")
    await recorded_in_time(postgres)
    assert await sweeps(running, "timer") > before
    assert await sweeps(running, "mark") == 0
    assert await sweeps(running, "subscribe") == 0


async def test_a_subscription_that_broke_is_made_anew_and_followed_by_a_sweep_of_what_it_may_have_missed(
    system: SystemFactory, desk: Desk, postgres: asyncpg.Connection, redis_client: redis.asyncio.Redis
) -> None:
    running = await system(api_workers=0, sweep_interval_seconds="60")
    await carol_long_1_btc(desk)
    await desk.swept(1)
    before = await sweeps(running, "subscribe")
    # A mark set by hand sends no message, so only the sweep after the new subscription can find it.
    await redis_client.set(f"mark_price:{BTC_PERP}", "44000")
    await command(redis_client, "CLIENT KILL", "TYPE", "pubsub")
    await recorded_in_time(postgres)
    assert await sweeps(running, "subscribe") == before + 1
    assert await sweeps(running, "timer") == 0
