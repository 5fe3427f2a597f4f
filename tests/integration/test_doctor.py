"""``plimsoll doctor`` on a real system: all is well, and each fault by itself, with its mend."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import asyncpg
import pytest
import redis.asyncio

from app import doctor
from app.config import Settings
from app.doctor import Finding, examine
from app.embedded import Servers, Stores
from tests.conftest import SystemFactory
from tests.harness import System
from tests.integration.desk import Desk, command, eventually

WAITING: Final = "alice\n1\n1\n1000000\n{}"
"""A row of the first second of 1970."""

LIBFAKETIME: Final = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


async def found(stores: Stores, **overrides: Any) -> dict[str, Finding]:  # noqa: ANN401 - settings of any type
    """What the doctor finds, by check."""
    settings = Settings(redis_url=stores.redis_url, database_url=stores.database_url, **overrides)
    return {finding.check: finding for finding in await asyncio.to_thread(examine, settings, stores)}


async def swept(redis_client: redis.asyncio.Redis) -> bool:
    return bool(await redis_client.exists("state:swept"))


async def test_a_good_system_is_all_ok_and_exits_0(system: SystemFactory, redis_client: redis.asyncio.Redis) -> None:
    running = await system()
    await Desk(running.client).mark("45000")
    await eventually(lambda: swept(redis_client), "a sweep")
    told = await asyncio.to_thread(running.command, "doctor", "--json")
    findings = json.loads(told.stdout)
    assert {item["level"] for item in findings} == {"ok"}, told.stdout
    assert told.returncode == 0
    assert [item["check"] for item in findings] == [
        "redis version", "redis persistence", "redis eviction", "redis access", "clock of Redis",
        "state", "sweep", "quarantine", "trading", "outbox", "dead letters",
        "postgres version", "clock of Postgres", "migrations", "postgres role", "immutable history",
    ]  # fmt: skip
    shown = await asyncio.to_thread(running.command, "doctor")
    assert shown.returncode == 0
    assert [line.split()[0] for line in shown.stdout.splitlines()] == ["ok"] * len(findings)


@asynccontextmanager
async def configured(client: redis.asyncio.Redis, **values: str) -> AsyncIterator[None]:
    """A Redis whose configuration is another for a while."""
    before = {name: (await client.config_get(name))[name] or "" for name in values}
    for name, value in values.items():
        await client.config_set(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            await client.config_set(name, value)


@pytest.mark.parametrize(
    ("values", "check", "level", "says"),
    [
        ({"appendonly": "no"}, "redis persistence", "fail", "a restart forgets everything"),
        ({"appendfsync": "everysec"}, "redis persistence", "warn", "up to the last second"),
        ({"maxmemory-policy": "volatile-lru"}, "redis eviction", "warn", "no maxmemory is set yet"),
        (
            {"maxmemory-policy": "volatile-lru", "maxmemory": "900mb"},
            "redis eviction",
            "fail",
            "accounts will be dropped",
        ),
        ({"maxmemory": "1mb"}, "redis eviction", "warn", "of maxmemory is used"),
    ],
)
async def test_a_redis_that_would_lose_state(
    values: dict[str, str], check: str, level: str, says: str, stores: Stores, redis_client: redis.asyncio.Redis
) -> None:
    async with configured(redis_client, **values):
        finding = (await found(stores))[check]
    assert finding.level == level
    assert says in finding.says
    assert finding.mend


@pytest.mark.parametrize(
    ("spoil", "check", "level", "says"),
    [
        (["XADD", "outbox:dead", "*", "reason", "a test"], "dead letters", "fail", "1 rows that Postgres refused"),
        (["HSET", "state:quarantined", "alice", "a test"], "quarantine", "fail", "1 accounts are not judged"),
        (["SET", "state:halted", "1"], "trading", "warn", "halted"),
        (["HSET", "state:swept", "version", "0", "at", "1000000"], "sweep", "fail", "nothing has swept for"),
        (["DEL", "state:swept"], "sweep", "fail", "nothing has ever swept"),
        (["HSET", "state:epoch", "status", "frozen"], "state", "fail", "frozen"),
        (["DEL", "state:epoch"], "state", "fail", "plimsoll rebuild"),
        (["XADD", "outbox", "1-0", "trade", WAITING], "outbox", "warn", "1 rows wait for Postgres, the oldest for"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
async def test_a_fault_in_the_state(
    spoil: list[str], check: str, level: str, says: str, stores: Stores, redis_client: redis.asyncio.Redis
) -> None:
    await command(redis_client, *spoil)
    finding = (await found(stores))[check]
    assert (finding.level, says in finding.says) == (level, True), finding
    assert finding.mend


@pytest.mark.parametrize("entry", [("trade", WAITING), ("what", "no script wrote")], ids=lambda entry: entry[0])
async def test_a_full_outbox(entry: tuple[str, str], stores: Stores, redis_client: redis.asyncio.Redis) -> None:
    await command(redis_client, "XADD", "outbox", "1-0", *entry)
    finding = (await found(stores, outbox_soft_limit=1))["outbox"]
    assert finding.level == "fail"
    assert "what adds risk is refused" in finding.says


async def test_the_owner_in_the_place_of_the_service(stores: Stores) -> None:
    finding = (await found(replace(stores, database_url=stores.owner_url)))["postgres role"]
    assert finding.level == "fail"
    assert "postgres is a superuser: the service could rewrite history" in finding.says


@pytest.mark.parametrize(
    ("statement", "check", "says"),
    [
        ("GRANT UPDATE ON trades TO plimsoll", "postgres role", "plimsoll has UPDATE on trades"),
        ("REVOKE INSERT ON epochs FROM plimsoll", "postgres role", "plimsoll lacks INSERT on epochs"),
        ("ALTER TABLE transfers DISABLE TRIGGER immutable", "immutable history", "transfers may be changed"),
        ("UPDATE alembic_version SET version_num = '0001'", "migrations", "the schema is at 0001, this release is at"),
        ("REVOKE ALL ON alembic_version FROM plimsoll", "migrations", "may not read the tables"),
        ("DROP TABLE alembic_version", "migrations", "there are no tables"),
        (
            "ALTER ROLE plimsoll IN DATABASE {database} SET default_transaction_read_only = on",
            "postgres writes",
            "it takes no writes",
        ),
    ],
)
async def test_a_fault_in_postgres(
    statement: str, check: str, says: str, stores: Stores, postgres: asyncpg.Connection
) -> None:
    await postgres.execute(statement.format(database=await postgres.fetchval("SELECT current_database()")))
    finding = (await found(stores))[check]
    assert finding.level == "fail"
    assert says in finding.says
    assert finding.mend


async def test_a_store_that_is_away_is_one_line_and_the_other_is_looked_at(
    own_servers: Servers, tmp_path: Path
) -> None:
    running = System(own_servers.stores, tmp_path)
    await asyncio.to_thread(running.command, "migrate")
    await asyncio.to_thread(own_servers.redis.stop)
    told = await asyncio.to_thread(running.command, "doctor")
    assert told.returncode == 1
    assert told.stdout.startswith("fail  redis ")
    assert "ok    postgres role" in told.stdout
    await asyncio.to_thread(own_servers.redis.start)
    await asyncio.to_thread(own_servers.postgres.stop)
    told = await asyncio.to_thread(running.command, "doctor")
    assert told.returncode == 1
    assert "ok    redis persistence" in told.stdout
    assert "fail  postgres " in told.stdout


@pytest.mark.skipif(not LIBFAKETIME.exists(), reason="libfaketime is not installed")
async def test_a_clock_that_is_off(stores: Stores, tmp_path: Path) -> None:
    running = System(stores, tmp_path)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "app.cli", "doctor", "--json"),
        env={**running.environment(), "LD_PRELOAD": str(LIBFAKETIME), "FAKETIME": "-120", "DONT_FAKE_MONOTONIC": "1"},
        stdout=asyncio.subprocess.PIPE,
    )
    told, _ = await process.communicate()
    by_check = {item["check"]: item for item in json.loads(told)}
    for check in ("clock of Redis", "clock of Postgres"):
        assert by_check[check]["level"] == "fail"
        assert 118 < float(by_check[check]["says"].split()[0]) < 122


@pytest.mark.parametrize(
    ("theirs", "level", "says"),
    [
        (100.0, "ok", "0.000"),
        (101.5, "ok", "1.000"),  # from 100.5, when the answer was there
        (101.6, "warn", "1.1"),
        (99.0, "ok", "1.000"),
        (98.9, "warn", "1.1"),
        (130.5, "warn", "30.0"),
        (130.6, "fail", "30.1"),
    ],
)
def test_how_far_a_clock_may_be_off(theirs: float, level: str, says: str) -> None:
    finding = doctor._clock("Redis", theirs, 100.0, 100.5)
    assert (finding.level, finding.says.split()[0]) == (level, says)


def test_the_lines_are_to_be_read() -> None:
    findings = [Finding("sweep", "ok", "0.1 s ago"), Finding("dead letters", "fail", "2 rows", "look")]
    assert list(doctor.lines(findings)) == [
        "ok    sweep         0.1 s ago",
        "fail  dead letters  2 rows",
        "                    -> look",
    ]
