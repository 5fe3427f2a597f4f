"""F19, F20 and F22: stores that are down at the start, scripts that vanish, another release, a rolling restart."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from functools import partial
from typing import Final

import httpx
import pytest

from app import redis_client as keys
from tests.faults.cell import Cell, Worker, until
from tests.faults.checker import check
from tests.faults.conftest import CellFactory
from tests.faults.history_server import HistoryServer, open_history_server
from tests.faults.journal import Row
from tests.faults.load import Load
from tests.faults.zygote import Zygote

READY_SECONDS_MAX: Final = 5.0
LIVE_SECONDS_MAX: Final = 10.0
STOP_SECONDS_MAX: Final = 12.0
SEEN_SECONDS: Final = 0.02
"""How often a load balancer looks at readiness."""


@pytest.mark.parametrize("order", [("redis", "postgres"), ("postgres", "redis")], ids=" then ".join)
async def test_processes_start_without_their_stores_and_are_ready_soon_after_those_come(
    zygote: Zygote, row: Callable[[str, str], Row], seed: int, order: tuple[str, str]
) -> None:
    result = row("F19", f"both stores down at the start; {' then '.join(order)}")
    async with open_history_server(zygote, apis=1) as history:
        cell = history.cell
        load = Load(cell, seed=seed, clients=6)
        await load.start()
        await load.acknowledged(100)
        result.rounds += 1
        load.fault()
        await cell.kill_redis()
        await history.stop_immediately()
        await load.stop()
        for worker in list(cell.apis):
            cell.kill(worker)
        api, watchdog = cell.start_worker("api"), cell.start_worker("watchdog")
        for worker in (api, watchdog):
            await until(partial(_is_live, cell, worker), "not live without stores", cell.logs)
        missing = set((await cell.http.get(f"{api.url}/health/ready")).json()["missing"])
        assert missing == {"redis", "postgres"}, missing
        for store in order:
            await _start(history, store)
            if store != order[-1]:
                await asyncio.sleep(1)
                answer = await cell.http.get(f"{api.url}/health/ready")
                assert answer.status_code == 503, answer.text
                assert order[-1] in answer.json()["missing"] or store == "redis", answer.text
        came = time.monotonic()
        for worker in (api, watchdog):
            await cell.ready(worker)
        result.recovered(time.monotonic() - came)
        if result.recovery_seconds > READY_SECONDS_MAX:
            result.complain(f"ready only {result.recovery_seconds:.1f} s after the stores")
        await check(cell, load, result)
    result.require_green()


async def _start(history: HistoryServer, store: str) -> None:
    if store == "redis":
        await history.cell.start_redis()
    else:
        await history.start()


async def _is_live(cell: Cell, worker: Worker) -> bool:
    try:
        return (await cell.http.get(f"{worker.url}/health/live")).is_success
    except httpx.TransportError:
        return False


async def test_scripts_that_were_flushed_are_loaded_again(
    cell: CellFactory, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], seed: int
) -> None:
    result = row("F20", "SCRIPT FLUSH under load")
    running = await cell(apis=2, watchdogs=1)
    load = Load(running, seed=seed, clients=8)
    load.on_answer = lambda operation: (
        result.complain(f"answered {operation.status} {operation.code}") if operation.status >= 500 else None
    )
    await load.start()
    for _ in range(rounds(50, 10)):
        result.rounds += 1
        await load.acknowledged(5)
        moment = load.fault()
        await running.client.script_flush()
        result.recovered(await load.first_after(moment))
    await load.stop()
    await check(running, load, result)
    result.require_green()


async def test_a_process_of_another_release_refuses_to_write_and_the_signature_back_lets_it(
    cell: CellFactory, row: Callable[[str, str], Row], seed: int
) -> None:
    result = row("F20 mix", "state of another release, or other contracts")
    running = await cell(apis=1, watchdogs=1)
    load = Load(running, seed=seed, clients=6)
    await load.start()
    await load.acknowledged(100)
    signature = await running.client.hget(keys.STATE_EPOCH, "signature")
    for other in (b"0:another-layout", b""):
        result.rounds += 1
        load.fault()
        await running.client.hset(keys.STATE_EPOCH, "signature", other)
        last_id = await running.client.get(keys.HISTORY_LAST_ID)
        await asyncio.sleep(1)
        operation = load.new("deposit", load.accounts[0], {"amount": "1"})
        await load.send(operation)
        assert (operation.status, operation.code) == (503, "state_mismatch"), operation
        assert await running.client.get(keys.HISTORY_LAST_ID) == last_id, "something was written"
        ready = await running.http.get(f"{running.apis[0].url}/health/ready")
        assert "state_mismatch" in ready.json()["missing"], ready.text
        await running.client.hset(keys.STATE_EPOCH, "signature", signature)
        result.recovered(await load.first_after(time.monotonic()))
    await load.stop()
    await check(running, load, result)
    result.require_green()


async def test_a_rolling_restart_leaves_no_request_without_an_answer(
    cell: CellFactory, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], seed: int
) -> None:
    result = row("F22", "rolling restart under load, SIGTERM")
    running = await cell(apis=2, watchdogs=1)
    load = Load(running, seed=seed, clients=8)
    await load.start()
    for _ in range(rounds(12, 3)):
        result.rounds += 1
        await load.acknowledged(20)
        replacement = running.start_worker("api")
        running.forget(replacement)
        await running.ready(replacement)
        running.apis.append(replacement)
        old = running.apis[0]
        moment = load.fault()
        running.signal(old, signal.SIGTERM)
        not_ready = 0.0
        while running.is_running(old):
            if old in running.apis and not await running._is_ready(old):
                not_ready = time.monotonic() - moment
                running.forget(old)
            await asyncio.sleep(SEEN_SECONDS)
            assert time.monotonic() - moment < STOP_SECONDS_MAX, f"it does not stop\n{running.logs()}"
        if not not_ready:
            result.complain("it was gone before anyone could see that it was not ready")
        running.forget(old)
        result.recovered(await load.first_after(moment))
    await load.stop()
    cut_off = load.cut_off
    if cut_off:
        result.complain(f"{cut_off} requests were cut off without an answer")
    await check(running, load, result)
    result.require_green()
