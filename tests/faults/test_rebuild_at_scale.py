"""Rebuild at scale: a million trades over ten thousand accounts, interrupted once, in under two minutes.

``PLIMSOLL_FAULTS_TRADES=1000000`` is that size; without it there are fewer, because to generate and verify a
million takes longer than to rebuild it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from random import Random
from typing import Final

import httpx

from app import redis_client as keys
from app.rebuild import rebuild
from app.verify import verify
from tests.faults.cell import Cell
from tests.faults.conftest import CellFactory
from tests.faults.journal import Row
from tests.faults.long_history import TRADES_PER_ACCOUNT, LongHistory
from tests.harness import environment

REBUILD_SECONDS_MAX: Final = 120.0
TRADES: Final = int(os.environ.get("PLIMSOLL_FAULTS_TRADES", "0"))


async def test_a_long_history_is_rebuilt_in_two_minutes_and_an_old_client_id_still_answers(
    cell: CellFactory, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], random: Random
) -> None:
    accounts = TRADES // TRADES_PER_ACCOUNT or rounds(2_000, 500)
    result = row("F12 scale", f"rebuild {accounts * TRADES_PER_ACCOUNT:,} trades, interrupted once")
    running = await cell()
    history = LongHistory(random, accounts=accounts)
    history.write(running.stores.owner_url)
    await running.client.flushall()
    result.rounds, result.operations = 1, history.trades
    result.in_flight = await _interrupt(running)
    status = await running.client.hget(keys.STATE_EPOCH, "status")
    if status == b"ready":
        result.complain("the rebuild was over before it was interrupted")
    told: dict[str, int] = {}

    def progress(stage: str, count: int) -> None:
        told[stage] = told.get(stage, 0) + count

    started = time.monotonic()
    rebuilt = await asyncio.to_thread(rebuild, running.settings(), running.stores, progress)
    result.recovered(time.monotonic() - started)
    if result.recovery_seconds > REBUILD_SECONDS_MAX:
        result.complain(f"a rebuild took {result.recovery_seconds:.0f} s")
    result.acknowledged = rebuilt.accounts
    if told.get("accounts") != accounts or not told.get("operation ids"):
        result.complain(f"the progress told {told}")
    await _compare(running, history, result)
    found = await asyncio.to_thread(verify, running.settings(), running.stores)
    if found.accounts != accounts or found.rows != history.rows:
        result.complain(f"verify saw {found.accounts} accounts and {found.rows} rows")
    for difference in found.differences[:10]:
        result.complain(f"verify: {difference}")
    result.lost += len(found.differences)
    result.require_green()


async def _interrupt(running: Cell) -> int:
    """Kill a rebuild once it has restored some accounts; how many it had."""
    variables = {
        "PLIMSOLL_REDIS_URL": running.stores.redis_url,
        "PLIMSOLL_DATABASE_URL": running.stores.database_url,
        "PLIMSOLL_DATA_DIR": str(running.directory),
    }
    process = subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-m", "app.cli", "rebuild"],
        env=environment(variables),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not await running.client.llen(keys.ACCOUNTS):
        await asyncio.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return int(await running.client.llen(keys.ACCOUNTS))


async def _compare(running: Cell, history: LongHistory, result: Row) -> None:
    """Some accounts' open breaches, and the answers to trades that were booked before the loss."""
    url = running.apis[0].url
    (open_breaches,) = await running.postgres(
        "SELECT count(*) FROM liquidations LEFT JOIN recoveries ON liquidation_id = liquidations.id "
        "WHERE recoveries.id IS NULL"
    )
    column = await running.client.get(keys.COLUMN_BREACH) or b""
    held = sum(any(column[first : first + 8]) for first in range(0, len(column), 8))
    if held != open_breaches[0] or not held:
        result.complain(f"{held} open breaches in Redis, {open_breaches[0]} in history")
    await running.ready(running.apis[0])
    samples = await running.postgres("SELECT * FROM trades ORDER BY md5(id::text) LIMIT 25")
    async with httpx.AsyncClient(timeout=10, trust_env=False) as client:
        for trade in samples:
            answer = await client.post(
                f"{url}/trade",
                json={
                    "account_id": trade["account_id"],
                    "symbol": trade["symbol"],
                    "side": trade["side"],
                    "quantity": f"{trade['quantity']:f}",
                    "price": f"{trade['price']:f}",
                    "client_trade_id": trade["client_trade_id"],
                },
            )
            if answer.status_code != 200 or answer.json()["trade_id"] != trade["id"]:
                result.doubled += 1
                result.complain(f"a retry of {trade['client_trade_id']} answers {answer.status_code} {answer.text}")
