"""F11: behind Sentinel the master is killed, or paused and woken when another one has taken its place."""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
from redis.exceptions import ResponseError

from app.embedded import Servers
from tests.conftest import execute, in_database_of
from tests.faults.cell import open_cell, until
from tests.faults.checker import check
from tests.faults.journal import Row
from tests.faults.load import Load
from tests.faults.sentinels import BINARIES, SentinelGroup, open_sentinel_group
from tests.faults.zygote import Zygote

GAP_SECONDS_MAX: Final = 5.0
LAG_SECONDS: Final = 0.8
"""More than a WAIT takes, and less than the sentinels and the master itself need to notice."""

PROBE: Final = "a-write-of-the-test"


@pytest.mark.skipif(
    not all(BINARIES),
    reason="redis-server and redis-sentinel 7 are not installed (Debian: apt-get install redis-sentinel)",
)
async def test_a_failover_loses_nothing_that_was_acknowledged_and_the_old_master_takes_no_writes(
    servers: Servers,
    template_database: str,
    zygote: Zygote,
    row: Callable[[str, str], Row],
    rounds: Callable[[int, int], int],
    seed: int,
) -> None:
    result = row("F11", "Sentinel: the master killed, or paused; its replicas paused")
    directory = Path(tempfile.mkdtemp(prefix="plimsoll-"))
    name = "plimsoll_fault_sentinel"
    database = in_database_of(servers, name)
    execute(servers.database_url, f"CREATE DATABASE {name} TEMPLATE {template_database}")
    try:
        async with (
            open_sentinel_group(directory) as group,
            open_cell(directory, replace(database, redis_url=group.url), zygote) as running,
        ):
            for kind in ("watchdog", "api", "api"):
                await running.start(kind)
            load = Load(running, seed=seed)
            await load.start()
            for number in range(rounds(10, 2)):
                result.rounds += 1
                await load.acknowledged(40)
                await _fail_over(group, load, result, kill=number % 2 == 0, by_hand=number > 1)
                if number % 2:
                    await load.acknowledged(40)
                    await _lag(group, load, result)
            await load.stop()
            await check(running, load, result)
    finally:
        execute(servers.database_url, f"DROP DATABASE {name} WITH (FORCE)")
        shutil.rmtree(directory, ignore_errors=True)
    result.require_green()


async def _fail_over(group: SentinelGroup, load: Load, result: Row, *, kill: bool, by_hand: bool) -> None:
    """Take the master away until there is another; what it was comes back as a replica, made one ``by_hand`` or not."""
    old = await group.master()
    moment = load.fault()
    if kill:
        await group.kill(old)
    else:
        group.signal(old, signal.SIGSTOP)
    gap_seconds = await load.first_after(moment)
    result.recovered(gap_seconds)
    if gap_seconds > GAP_SECONDS_MAX:
        result.complain(f"nothing was written for {gap_seconds:.1f} s")
    if kill:
        group.start_server(old, replica_of=await group.master())
    else:
        group.signal(old, signal.SIGCONT)
        await _require_refused(group, old, result)
        if by_hand:
            await group.follow(old, await group.master())
    await until(group.is_whole, "the old master does not follow the new one", group.logs)


async def _lag(group: SentinelGroup, load: Load, result: Row) -> None:
    """Pause every replica: the master takes writes that none has, until it notices, and none of those is answered."""
    master = await group.master()
    replicas = [port for port in group.ports if port != master]
    load.fault()
    for port in replicas:
        group.signal(port, signal.SIGSTOP)
    paused = time.monotonic()
    await asyncio.sleep(LAG_SECONDS)
    answered = [item for item in load.journal if item.outcome == "ok" and item.sent_at > paused]
    for port in replicas:
        group.signal(port, signal.SIGCONT)
    if answered:
        result.complain(f"acknowledged without a replica: {answered[:3]}")
    result.recovered(await load.first_after(time.monotonic()))
    await until(group.is_whole, "the replicas do not follow", group.logs)


async def _require_refused(group: SentinelGroup, old: int, result: Row) -> None:
    """The old master still believes it is one: it may take a write before it looks, but none that a replica has."""
    client = group.client(old)

    async def refuses() -> bool:
        async with client.pipeline(transaction=False) as pipeline:
            pipeline.set(PROBE, "1")
            pipeline.wait(1, 50)
            written, replicas = await pipeline.execute(raise_on_error=False)
        if isinstance(written, ResponseError):
            return str(written).startswith(("NOREPLICAS", "READONLY")) or "read only" in str(written)
        if replicas != 0:
            result.complain(f"the old master took a write and said that {replicas} replicas have it")
        await asyncio.sleep(0.05)
        return False

    await until(refuses, "the old master goes on taking writes", group.logs)
