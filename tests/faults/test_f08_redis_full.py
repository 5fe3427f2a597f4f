"""F8: Redis has no memory left, or no disk, or is set up to forget."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from app.embedded import Servers
from app.server_process import ServerFailed
from tests.conftest import execute
from tests.faults.cell import Cell, history_in, open_cell, until
from tests.faults.checker import check
from tests.faults.conftest import CellFactory
from tests.faults.journal import Row
from tests.faults.load import Load
from tests.faults.zygote import Zygote

DISK_MEGABYTES: Final = 12
RECOVERED_SECONDS_MAX: Final = 10.0


async def test_a_redis_without_memory_refuses_whole_operations_and_recovers_by_itself(
    cell: CellFactory, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], seed: int
) -> None:
    result = row("F8", "Redis reaches maxmemory")
    running = await cell(apis=1, watchdogs=1)
    load = Load(running, seed=seed, clients=8)
    await load.start()
    for _ in range(rounds(10, 2)):
        result.rounds += 1
        await load.acknowledged(60)
        load.fault()
        used = int((await running.client.info("memory"))["used_memory"])
        await running.client.config_set("maxmemory", used // 2)
        refused = await _refused(load)
        if refused != (503, "store_unavailable"):
            result.complain(f"without memory a deposit was answered {refused}")
        if await running._is_ready(running.apis[0]):
            result.complain("the API is ready although nothing can be written")
        await asyncio.sleep(0.5)
        await running.client.config_set("maxmemory", 0)
        result.recovered(await load.first_after(time.monotonic()))
    await load.stop()
    await check(running, load, result)
    result.require_green()


async def _refused(load: Load) -> tuple[int, str]:
    operation = load.new("deposit", load.accounts[0], {"amount": "1"})
    await load.send(operation)
    return operation.status, operation.code


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of a few megabytes."""
    path = Path(tempfile.mkdtemp(prefix="plimsoll-"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_MEGABYTES}m,mode=0755", "tmpfs", str(path)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        path.rmdir()
        pytest.skip("a small file system can be mounted by root only")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)
    shutil.rmtree(path, ignore_errors=True)


async def test_a_redis_whose_disk_is_full_exits_and_loses_nothing_once_it_is_started_with_room(
    servers: Servers,
    template_database: str,
    zygote: Zygote,
    small_disk: Path,
    row: Callable[[str, str], Row],
    rounds: Callable[[int, int], int],
    seed: int,
) -> None:
    result = row("F8 disk", "Redis' disk full; it exits and is started again")
    name = "plimsoll_fault_full_disk"
    execute(servers.database_url, f"CREATE DATABASE {name} TEMPLATE {template_database}")
    try:
        async with open_cell(small_disk, history_in(servers, name), zygote) as running:
            await running.start("api")
            load = Load(running, seed=seed, clients=8)
            await load.start()
            for _ in range(rounds(3, 1)):
                result.rounds += 1
                await load.acknowledged(60)
                filler = running.directory / "filler"
                load.fault()
                _fill(filler)
                await until(lambda: _is_gone(running), "Redis writes on although its disk is full")
                if await running._is_ready(running.apis[0]):
                    result.complain("the API is ready without Redis")
                await _supervise(running, filler)
                result.recovered(await load.first_after(time.monotonic()))
            await load.stop()
            await check(running, load, result)
    finally:
        execute(servers.database_url, f"DROP DATABASE {name} WITH (FORCE)")
    if result.recovery_seconds > RECOVERED_SECONDS_MAX:
        result.complain(f"recovered only after {result.recovery_seconds:.1f} s")
    result.require_green()


def _fill(path: Path) -> None:
    """Take all the room there is, but for what a few operations need."""
    free = shutil.disk_usage(path.parent).free
    path.write_bytes(bytes(max(0, free - 65_536)))


async def _is_gone(running: Cell) -> bool:
    return not running.redis.is_running()


async def _supervise(running: Cell, filler: Path) -> None:
    """Start it again as its supervisor does, first without room, then with."""
    with suppress(ServerFailed):
        await running.start_redis()
    await asyncio.sleep(1)
    filler.unlink()
    if not running.redis.is_running():
        await running.start_redis()


@pytest.mark.parametrize(
    ("option", "value", "other"),
    [("appendonly", "no", None), ("maxmemory-policy", "allkeys-lru", ("maxmemory", "100mb"))],
)
async def test_a_redis_that_would_forget_is_refused_at_start_unless_told(
    cell: CellFactory, option: str, value: str, other: tuple[str, str] | None
) -> None:
    running = await cell(apis=0)
    await running.client.config_set(option, value)
    if other:
        await running.client.config_set(*other)
    refused = running.start_worker("api")
    await asyncio.sleep(3)
    is_ready = await running._is_ready(refused)
    told = await running.start("api", allow_unsafe_redis="1")
    assert await running._is_ready(told)
    assert not is_ready, "an API is ready on a Redis that would forget"
