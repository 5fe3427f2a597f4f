"""F21: every wrong type and unreadable value in every key a script touches."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

import redis.asyncio

from app import redis_client as keys
from tests.faults.cell import Cell, until
from tests.faults.checker import check
from tests.faults.conftest import CellFactory
from tests.faults.journal import Row
from tests.faults.load import SYMBOL, Load

RECOVERY_SECONDS_MAX: Final = 10.0
VICTIM: Final = "victim-0"
TEXTS: Final = ("abc", "NaN", "1e999", "-")
TYPES: Final = ("string", "list", "set", "zset", "hash", "stream")
OPERATION: Final = "the operation"
REFRESHED: Final = {keys.equity_key(VICTIM), keys.used_margin_key(VICTIM)}
OF_THE_ACCOUNT: Final = {
    keys.balance_key(VICTIM): "string",
    keys.positions_key(VICTIM): "hash",
    keys.ledger_key(VICTIM): "hash",
    keys.equity_key(VICTIM): "string",
    keys.used_margin_key(VICTIM): "string",
    OPERATION: "string",
}
OF_ALL: Final = {
    keys.STATE_EPOCH: "hash",
    keys.STATE_RUN_ID: "string",
    keys.STATE_HALTED: "string",
    keys.HISTORY_LAST_ID: "string",
    keys.OUTBOX: "stream",
    keys.ACCOUNTS: "list",
    keys.COLUMN_BALANCE: "string",
    keys.COLUMN_BREACH: "string",
    keys.RECOVERIES: "string",
    keys.MARK_VERSION: "string",
    keys.mark_key(SYMBOL): "hash",
    keys.quantity_column(SYMBOL): "string",
    keys.cost_column(SYMBOL): "string",
    keys.open_positions_key(SYMBOL): "string",
}
TEXTS_OF_ALL: Final = (keys.HISTORY_LAST_ID, keys.RECOVERIES, keys.MARK_VERSION, keys.open_positions_key(SYMBOL))


async def put(client: redis.asyncio.Redis, key: str, kind: str, text: str, *, aside: str = "") -> None:
    """Make ``key`` a ``kind`` in the place of what it was, which is kept ``aside`` if that names a key."""
    async with client.pipeline(transaction=True) as pipeline:
        if aside:
            pipeline.rename(key, aside)
        pipeline.delete(key)
        match kind:
            case "string":
                pipeline.set(key, text)
            case "list":
                pipeline.rpush(key, text)
            case "set":
                pipeline.sadd(key, text)
            case "zset":
                pipeline.zadd(key, {text: 1})
            case "hash":
                pipeline.hset(key, SYMBOL if key.startswith("positions:") else "seq", text)
            case _:
                pipeline.xadd(key, {"kind": text})
        await pipeline.execute()


async def test_a_wrong_type_in_a_key_of_an_account_quarantines_that_account_alone(
    cell: CellFactory, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], seed: int
) -> None:
    result = row("F21", "every wrong type in every key of an account")
    running = await cell(watchdogs=1, sweep_interval_seconds="0.2")
    load, victim = Load(running, seed=seed, clients=4), Load(running, seed=seed, clients=0, accounts=1, name="victim")
    await load.start()
    await victim.send(victim.new("deposit", VICTIM, {"amount": "100000"}))
    await victim.send(victim.new("trade", VICTIM, _trade()))
    wrong = [(key, kind, "abc") for key, right in OF_THE_ACCOUNT.items() for kind in TYPES if kind != right]
    wrong += [(key, "string", text) for key in (keys.balance_key(VICTIM), OPERATION) for text in TEXTS]
    wrong += [(key, "hash", text) for key in (keys.positions_key(VICTIM), keys.ledger_key(VICTIM)) for text in TEXTS]
    for key, kind, text in wrong:
        result.rounds += 1
        load.fault()
        await _break_one(running, victim, key, kind, text, result)
    await load.stop()
    await _release(running, result)
    await check(running, [load, victim], result)
    result.require_green()


def _trade() -> dict[str, Any]:
    return {"account_id": VICTIM, "symbol": SYMBOL, "side": "buy", "quantity": "0.01", "price": "50000"}


async def _break_one(running: Cell, victim: Load, key: str, kind: str, text: str, result: Row) -> None:
    # The refreshed keys may be overwritten, by design: no decision reads them.
    refreshed = key in REFRESHED
    operation = victim.new("trade", VICTIM, _trade())
    if key == OPERATION:
        key = keys.operation_key("trade", VICTIM, operation.client_id)
    good = await running.client.dump(key)
    await put(running.client, key, kind, text)
    before = await _dump(running)
    await victim.send(operation)
    wanted = {"account_quarantined", "state_damaged"} if key.startswith("operation:") else {"account_quarantined"}
    if operation.code not in wanted and not (refreshed and operation.outcome == "ok"):
        result.complain(f"{key} as {kind} {text}: a trade answers {operation.status} {operation.code}")
    after = await _dump(running)
    for name, value in before.items():
        if after.get(name) != value and not refreshed:
            result.complain(f"{key} as {kind} {text}: {name} was changed")
    report = await running.http.get(f"{running.apis[0].url}/margin-report", params={"limit": 100})
    listed = {str(item["account_id"]) for item in report.json().get("accounts", [])} if report.is_success else set()
    if not listed >= {f"load-{number}" for number in range(6)}:
        result.complain(f"{key} as {kind} {text}: the report is {report.status_code} and lists {sorted(listed)}")
    if key in {keys.balance_key(VICTIM), keys.positions_key(VICTIM), keys.ledger_key(VICTIM)}:
        result.recovered(await until(lambda: _is_quarantined(running), f"{key} as {kind} is not quarantined"))
        others = [name for name in await running.client.hkeys(keys.QUARANTINED) if name != VICTIM.encode()]
        if others:
            result.complain(f"{key} as {kind} {text}: {others} are quarantined too")
    if good is None:
        await running.client.delete(key)
    else:
        await running.client.restore(key, 0, good, replace=True)


async def _is_quarantined(running: Cell) -> bool:
    return bool(await running.client.hexists(keys.QUARANTINED, VICTIM))


async def _release(running: Cell, result: Row) -> None:
    async def released() -> bool:
        return not await _is_quarantined(running)

    result.recovered(await until(released, "the account stays in quarantine", running.logs))


async def _dump(running: Cell) -> dict[str, object]:
    """The victim's keys, and its place in the columns."""
    slot = await running.client.lpos(keys.ACCOUNTS, VICTIM)
    assert isinstance(slot, int)
    found: dict[str, object] = {key: await running.client.dump(key) for key in OF_THE_ACCOUNT if key not in REFRESHED}
    for column in (keys.COLUMN_BALANCE, keys.COLUMN_BREACH, keys.quantity_column(SYMBOL), keys.cost_column(SYMBOL)):
        found[column] = await running.client.getrange(column, 8 * slot, 8 * slot + 7)
    return found


async def test_a_wrong_type_in_a_key_of_all_refuses_everything_and_changes_nothing(
    cell: CellFactory, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], seed: int
) -> None:
    result = row("F21 all", "every wrong type in every key that all share")
    running = await cell()
    load = Load(running, seed=seed, clients=6)
    await load.start()
    wrong = [(key, kind, "abc") for key, right in OF_ALL.items() for kind in TYPES if kind != right]
    wrong += [(key, "string", text) for key in TEXTS_OF_ALL for text in TEXTS]
    for number, (key, kind, text) in enumerate(wrong):
        if number % rounds(1, 4):
            continue
        result.rounds += 1
        await load.acknowledged(3)
        load.fault()
        await _break_all(running, key, kind, text)
        result.recovered(await load.first_after(time.monotonic()))
    await load.stop()
    if result.recovery_seconds > RECOVERY_SECONDS_MAX:
        result.complain("it does not recover once the key is mended")
    await check(running, load, result)
    result.require_green()


async def _break_all(running: Cell, key: str, kind: str, text: str) -> None:
    """Put the good key aside and a wrong one in its place for a moment, and back."""
    existed = bool(await running.client.exists(key))
    aside = f"{key}:aside" if existed else ""
    await put(running.client, key, kind, text, aside=aside)
    await asyncio.sleep(0.05)
    if existed:
        await running.client.rename(aside, key)
    else:
        await running.client.delete(key)
