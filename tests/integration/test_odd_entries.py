"""What somebody adds to the outbox by hand is put aside, and rows go on.

Redis gives it the time for an id, far beyond those of rows, and a stream takes no id below its last one.
"""

from __future__ import annotations

import asyncio

import pytest
import redis.asyncio

from app import reconcile
from app import redis_client as keys
from app.config import Settings
from app.embedded import Servers, Stores
from app.outbox import DRAIN_INTERVAL_SECONDS
from tests.integration.desk import Desk, api_in_this_process, differences, eventually, expect

PUT_ASIDE_WITHIN_SECONDS = 15.0
BATCH_ROWS = 2

NAMES = (keys.OUTBOX, keys.OUTBOX_DEAD, keys.HISTORY_LAST_ID, keys.OUTBOX_ANEW)
ROW = {"trade": 'alice\n7\n1\n1795876224939641\n{"price":"1"}'}
"""As a script writes it."""


async def books_again(desk: Desk) -> None:
    """Wait until a trade is booked, whatever became of those before."""

    async def is_booked() -> bool:
        return (await desk.trade("alice", "buy", "0.001", "50000")).status_code == 201

    await eventually(is_booked, "a trade to be booked", within_seconds=PUT_ASIDE_WITHIN_SECONDS)


@pytest.mark.parametrize("taken_back", [False, True], ids=["left there", "taken back"])
@pytest.mark.parametrize("what", [{"what": "by hand"}, {"kind": "trade", "row": "{}"}], ids=["odd", "a dead letter"])
async def test_an_entry_that_somebody_adds_to_the_outbox_stops_no_commit_for_long(
    desk: Desk, redis_client: redis.asyncio.Redis, stores: Stores, what: dict[str, str], *, taken_back: bool
) -> None:
    await desk.mark("50000")
    await desk.deposit("alice", "10000")
    odd = await redis_client.xadd("outbox", what)  # type: ignore[arg-type]
    if taken_back:
        await redis_client.xdel("outbox", odd)
    await books_again(desk)
    aside = [fields for _, fields in await redis_client.xrange("outbox:dead") or ()]
    assert aside == ([] if taken_back else [{"reason": "not a row", **what}])
    assert await differences(stores) == []


async def test_one_behind_more_rows_than_a_batch_has_is_put_aside_while_postgres_is_away(own_servers: Servers) -> None:
    stores = own_servers.stores
    settings = Settings(redis_url=stores.redis_url, database_url=stores.database_url)
    await asyncio.to_thread(reconcile.migrate, settings, stores)
    async with (
        api_in_this_process(stores, outbox_batch_rows=str(BATCH_ROWS)) as client,
        redis.asyncio.Redis.from_url(stores.redis_url, decode_responses=True) as redis_client,
    ):
        desk = Desk(client)
        await desk.mark("50000")
        await desk.deposit("alice", "10000")
        await asyncio.to_thread(own_servers.postgres.stop)
        for _ in range(2 * BATCH_ROWS):
            await desk.buy("alice", "0.001", "50000")
        waiting = await redis_client.xrange("outbox") or []
        assert len(waiting) == 2 * BATCH_ROWS
        await redis_client.xadd("outbox", {"what": "by hand"})
        await books_again(desk)
        # Made anew, the stream holds what it held.
        assert (await redis_client.xrange("outbox") or [])[: len(waiting)] == waiting
        assert await redis_client.xlen("outbox:dead") == 1
        await asyncio.to_thread(own_servers.restart_dead)
        await eventually(lambda: _is_empty(redis_client), "the outbox to be drained", within_seconds=10)
    assert await differences(stores) == []


async def _is_empty(client: redis.asyncio.Redis) -> bool:
    return await client.xlen("outbox") == 0


async def test_where_the_counter_was_set_back_no_id_is_given_twice(
    desk: Desk, redis_client: redis.asyncio.Redis, stores: Stores
) -> None:
    """The rows are drained, so only the last id of the stream knows them; each commit it refuses takes an id."""
    await desk.mark("50000")
    await desk.deposit("alice", "10000")
    for _ in range(3):
        await desk.buy("alice", "0.001", "50000")
    await eventually(lambda: _is_empty(redis_client), "the outbox to be drained", within_seconds=10)
    await redis_client.decr("history:last_id", 3)
    await asyncio.sleep(3 * DRAIN_INTERVAL_SECONDS)
    await books_again(desk)
    assert await redis_client.xlen("outbox:dead") == 0
    assert await differences(stores) == []


async def test_an_entry_of_more_words_than_a_command_takes_costs_no_row(redis_client: redis.asyncio.Redis) -> None:
    many = {str(number): "" for number in range(5_000)}
    script = redis_client.register_script(keys.PUT_ASIDE.text)
    await redis_client.set("history:last_id", 6)
    await redis_client.xadd("outbox", ROW, id="6-0")  # type: ignore[arg-type]
    await redis_client.xadd("outbox", many)  # type: ignore[arg-type]
    assert await script(keys=NAMES) == ["ok", 1]
    assert await redis_client.xrange("outbox") == [("6-0", ROW)]
    assert await redis_client.xlen("outbox:dead") == 1
    await redis_client.delete("outbox")
    await redis_client.xadd("outbox", many, id="5-1")  # type: ignore[arg-type]
    await redis_client.xadd("outbox", ROW, id="6-0")  # type: ignore[arg-type]
    await redis_client.xadd("outbox", {"what": "by hand"})
    assert await script(keys=NAMES) == ["ok", 0]
    assert await redis_client.xlen("outbox") == 3


async def test_rows_of_a_counter_that_was_a_time_for_a_while_are_recorded(
    desk: Desk, redis_client: redis.asyncio.Redis
) -> None:
    """They are nobody's but the drain's: set aside, they would be acknowledged and in no store."""
    script = redis_client.register_script(keys.PUT_ASIDE.text)
    await desk.mark("50000")
    await desk.deposit("alice", "10000")
    last_id = await redis_client.get("history:last_id")
    await redis_client.set("history:last_id", 1795876224939)
    await desk.buy("alice", "0.001", "50000")
    await redis_client.set("history:last_id", last_id or "")
    await books_again(desk)
    recorded = expect(await desk.client.get("/trades"), 200)["items"]
    assert {item["id"] for item in recorded} >= {1795876224940}
    assert await redis_client.xlen("outbox:dead") == 0
    await redis_client.xadd("outbox", ROW, id="1795876229999-0")  # type: ignore[arg-type]
    assert await script(keys=NAMES) == ["ok", 0]
