"""F12: Redis is emptied under load, comes up empty, or comes up as it was long ago."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from random import Random

from redis.exceptions import RedisError

from app.rebuild import rebuild
from tests.faults.cell import Cell, until
from tests.faults.checker import check
from tests.faults.conftest import CellFactory
from tests.faults.journal import Row
from tests.faults.load import SYMBOL, Load


async def test_an_empty_redis_is_said_to_be_one_and_rebuilt_from_history(
    cell: CellFactory, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], seed: int, random: Random
) -> None:
    result = row("F12", "Redis flushed, empty, or of another day")
    running = await cell(apis=2, watchdogs=1)
    load = Load(running, seed=seed)
    await load.start()
    await load.acknowledged(50)
    old = running.directory / "another-day.aof"
    shutil.copyfile(running.redis.directory / "appendonly.aof", old)
    for number in range(rounds(12, 3)):
        result.rounds += 1
        await load.acknowledged(30)
        await asyncio.sleep(random.uniform(0, 0.1))
        load.fault()
        kind = ("flushed", "empty", "another day")[number % 3]
        if kind == "flushed":
            await running.client.flushall()
        else:
            await running.kill_redis()
            if kind == "empty":
                (running.redis.directory / "appendonly.aof").unlink()
            else:
                shutil.copyfile(old, running.redis.directory / "appendonly.aof")
            await running.start_redis()
        if kind != "another day":
            await _require_missing(running, load, result)
            moment = time.monotonic()
            await asyncio.to_thread(rebuild, running.settings(), running.stores, lambda _stage, _count: None)
            await load.set_mark(50_000)
        else:
            moment = time.monotonic()
        result.recovered(await load.first_after(moment))
    await load.stop()
    await check(running, load, result)
    result.require_green()


async def _require_missing(running: Cell, load: Load, result: Row) -> None:
    """Everything that would have to know the state says that it is missing, and what to do."""
    url = running.apis[0].url
    account = load.accounts[0]
    trade = {"account_id": account, "symbol": SYMBOL, "side": "buy", "quantity": "0.001", "price": "50000"}
    requests = (
        ("POST", "/trade", trade),
        ("POST", "/accounts/nobody/deposit", {"amount": "1"}),
        ("POST", "/mark-price", {"symbol": SYMBOL, "price": "50000"}),
        ("GET", f"/positions/{account}", None),
    )

    async def is_missing() -> bool:
        answer = await running.http.post(f"{url}/trade", json=trade)
        return bool(answer.json().get("code") == "state_missing")

    await until(is_missing, "the state is not missing", running.logs)
    for method, path, body in requests:
        answer = await running.http.request(method, url + path, json=body)
        said = answer.json()
        if answer.status_code != 503 or said.get("code") != "state_missing":
            result.complain(f"{path} answers {answer.status_code} {said}")
        elif "rebuild" not in said["detail"] or "reset" not in said["detail"]:
            result.complain(f"{path} does not say what to do: {said['detail']}")
    report = await running.http.get(f"{url}/margin-report")
    if report.is_success and report.json()["accounts"]:
        result.complain(f"the report shows accounts: {report.text[:200]}")
    try:
        created = [key async for key in running.client.scan_iter("account:*")]
    except RedisError as error:
        created = [repr(error).encode()]
    if created:
        result.complain(f"accounts were made without a state: {created[:5]}")
