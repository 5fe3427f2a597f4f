"""Halting and resuming: at once, on record, and not undone by a store that forgets."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import asyncpg
import redis.asyncio

from app.config import Settings
from app.database import format_timestamp
from app.embedded import Servers, Stores
from app.rebuild import rebuild
from tests.integration.conftest import DeskFactory, KeyMaker
from tests.integration.desk import Desk, bearer, command, eventually, expect, outcome
from tests.integration.test_keys import postgres_away

WHY = {"reason": "the feed of marks is being checked"}


async def rows(postgres: asyncpg.Connection, table: str) -> list[tuple[str, str | None]]:
    """Reason and key of every row, oldest first."""
    return [tuple(row) for row in await postgres.fetch(f"SELECT reason, key_id FROM {table} ORDER BY timestamp")]


async def test_while_halted_nothing_adds_risk_and_the_record_says_who_and_why(
    open_desk: DeskFactory, make_key: KeyMaker, postgres: asyncpg.Connection
) -> None:
    desk = await open_desk(auth="on")
    key = await make_key("operate", "trade", "mark", "read")
    desk.client.headers.update(bearer(key))
    await desk.mark("60000")
    await desk.deposit("alice", "100000")
    await desk.buy("alice", "1", "60000")

    first = expect(await desk.client.post("/halt", json=WHY), 200)
    assert (first["halted"], first["reason"], first["recorded"]) == (True, WHY["reason"], True)
    again = expect(await desk.client.post("/halt", json={"reason": "another"}), 200)
    assert again == first
    assert (await desk.report())["halted"] is True
    assert outcome(await desk.trade("alice", "buy", "0.1", "60000")) == "trading_halted"
    assert outcome(await desk.transfer("withdraw", "alice", "1")) == "trading_halted"
    await desk.sell("alice", "0.5", "60000")
    await desk.deposit("alice", "1")
    await desk.mark("60001")

    resumed = expect(await desk.client.post("/resume", json={"reason": "checked"}), 200)
    assert (resumed["halted"], resumed["id"]) == (False, first["id"])
    assert expect(await desk.client.post("/resume", json={"reason": "checked"}), 200)["halted"] is False
    assert (await desk.report())["halted"] is False
    await desk.buy("alice", "0.1", "60000")
    key_id = key.split("_")[1]
    assert await rows(postgres, "halts") == [(WHY["reason"], key_id)]
    assert await rows(postgres, "resumptions") == [("checked", key_id)]


async def test_a_halt_does_not_wait_for_postgres_and_a_resumption_does(
    desk: Desk, servers: Servers, stores: Stores, postgres: asyncpg.Connection
) -> None:
    await desk.deposit("alice", "5")
    async with postgres_away(servers, stores):
        assert expect(await desk.client.post("/halt", json=WHY), 200)["recorded"] is False
        assert expect(await desk.client.post("/resume", json=WHY), 503)["code"] == "store_unavailable"
        assert outcome(await desk.transfer("withdraw", "alice", "1")) == "trading_halted"
        assert expect(await desk.client.post("/halt", json=WHY), 200)["halted"] is True

    async def is_recorded() -> bool:
        return bool(expect(await desk.client.post("/halt", json={"reason": "once more"}), 200)["recorded"])

    await eventually(is_recorded, "the halt to be recorded")
    connection = await asyncpg.connect(stores.database_url)
    try:
        assert await rows(connection, "halts") == [(WHY["reason"], None)]
    finally:
        await connection.close()


async def test_a_halt_that_was_set_by_hand_is_put_on_record_when_it_is_resumed(
    desk: Desk, redis_client: redis.asyncio.Redis, postgres: asyncpg.Connection
) -> None:
    lookalike = '{"id": "%s", "reason": "x", "key_id": 5, "timestamp": "2026-01-01T00:00:00Z"}' % ("0" * 32)
    for value in ("1", "maintenance", '{"id": 1}', "[]", lookalike):
        await redis_client.set("state:halted", value)
        shown = expect(await desk.client.post("/halt", json=WHY), 200)
        assert shown == {"halted": True, "id": None, "since": None, "reason": None, "recorded": False}
        assert expect(await desk.client.post("/resume", json=WHY), 200)["halted"] is False
        assert await redis_client.exists("state:halted") == 0
    assert await rows(postgres, "halts") == [("set by hand in Redis", None)] * 5
    assert await rows(postgres, "resumptions") == [(WHY["reason"], None)] * 5


async def test_many_who_halt_and_resume_at_once_leave_a_record_that_adds_up(
    desk: Desk, redis_client: redis.asyncio.Redis, postgres: asyncpg.Connection
) -> None:
    async def act(number: int) -> None:
        answer = await desk.client.post("/halt" if number % 2 else "/resume", json={"reason": str(number)})
        assert answer.status_code == 200, answer.text

    await asyncio.gather(*(act(number) for number in range(40)))
    expect(await desk.client.post("/resume", json=WHY), 200)
    assert await redis_client.exists("state:halted") == 0
    unresumed = "SELECT count(*) FROM halts WHERE id NOT IN (SELECT halt_id FROM resumptions)"
    assert await postgres.fetchval(unresumed) == 0
    assert await postgres.fetchval("SELECT count(*) FROM halts") >= 1


async def test_a_rebuild_puts_back_the_halt_that_redis_has_lost(
    desk: Desk, stores: Stores, settings: Settings, redis_client: redis.asyncio.Redis
) -> None:
    await desk.deposit("alice", "5")
    expect(await desk.client.post("/halt", json={"reason": "first"}), 200)
    expect(await desk.client.post("/resume", json={"reason": "over"}), 200)
    halted = expect(await desk.client.post("/halt", json=WHY), 200)
    await command(redis_client, "FLUSHALL")
    await asyncio.to_thread(rebuild, settings, stores, lambda _stage, _count: None)
    assert outcome(await desk.transfer("withdraw", "alice", "1")) == "trading_halted"
    assert expect(await desk.client.post("/halt", json=WHY), 200) == halted


async def test_a_resumption_that_was_recorded_and_given_up_is_the_one_that_is_answered(
    desk: Desk, postgres: asyncpg.Connection
) -> None:
    """Its COMMIT came after its request had been told that it failed, and one halt has one end."""
    halted = expect(await desk.client.post("/halt", json=WHY), 200)
    recorded = datetime(2026, 1, 1, tzinfo=UTC)
    statement = "INSERT INTO resumptions (halt_id, reason, timestamp) VALUES ($1, 'the first', $2)"
    await postgres.execute(statement, halted["id"], recorded)
    answer = expect(await desk.client.post("/resume", json={"reason": "the second"}), 200)
    assert answer == {
        "halted": False,
        "id": halted["id"],
        "since": format_timestamp(recorded),
        "reason": "the first",
        "recorded": True,
    }
