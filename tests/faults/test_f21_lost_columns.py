"""F21, the columns: they are a copy. One that is lost, cut or damaged costs no breach, and is nobody's edit by hand."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Final

from app import redis_client as keys
from app.records import UNIT
from tests.faults.cell import Cell, until
from tests.faults.checker import check
from tests.faults.conftest import CellFactory
from tests.faults.journal import Row
from tests.faults.load import SYMBOL
from tests.faults.watched import BREACHING_MARK, MARK, SteadyLoad, on_the_edge, recorded

INTERVAL_SECONDS: Final = 1.0
COLUMNS: Final = (
    keys.quantity_column(SYMBOL),
    keys.COLUMN_BALANCE,
    keys.cost_column(SYMBOL),
    keys.COLUMN_BREACH,
)
DAMAGES: Final = ("lost", "cut", "a row zeroed")


async def test_a_lost_column_is_made_anew_and_costs_neither_a_breach_nor_an_adjustment(
    cell: CellFactory, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], seed: int
) -> None:
    result = row("F21 columns", "a column lost or cut, a row of it zeroed, under load")
    running = await cell(apis=2, watchdogs=1)
    load = SteadyLoad(running, seed=seed, clients=6)
    await load.start()
    await load.acknowledged(100)
    damages = [(column, damage) for damage in DAMAGES for column in COLUMNS]
    for column, damage in damages[:: rounds(1, 5)]:
        result.rounds += 1
        assert await load.set_mark(MARK)
        account = await on_the_edge(load)
        load.fault()
        await _damage(running, column, damage, account)
        damaged = time.monotonic()
        if damage == "a row zeroed":
            # Its length tells nothing: the audit's walk finds it.
            await until(partial(_is_right, running, account), f"{column} stays damaged", running.logs)
        assert await load.set_mark(BREACHING_MARK)
        moment = time.monotonic()
        await recorded(running, account)
        seconds = time.monotonic() - moment
        result.recovered(seconds)
        if seconds > INTERVAL_SECONDS + 1:
            result.complain(f"{column} {damage}: the breach was recorded only after {seconds:.1f} s")
        await until(lambda: _are_whole(running), f"{column} stays short", running.logs)
        result.recovered(await load.first_after(damaged))
    edited = load.accounts[0]
    await running.client.set(keys.balance_key(edited), "54321")
    await running.client.delete(keys.COLUMN_BALANCE)
    await until(lambda: _adjusted(running, edited), "an edit by hand beside a lost column is not adopted", running.logs)
    await load.set_mark(MARK)
    await load.stop()
    adjusted = await running.postgres("SELECT account_id FROM adjustments")
    if [str(found["account_id"]) for found in adjusted] != [edited]:
        result.complain(f"adjustments were booked for {[found['account_id'] for found in adjusted]}")
    await check(running, load, result)
    result.require_green()


async def _damage(running: Cell, column: str, damage: str, account: str) -> None:
    slot = await running.client.lpos(keys.ACCOUNTS, account)
    assert isinstance(slot, int)
    match damage:
        case "lost":
            await running.client.delete(column)
        case "cut":
            packed = await running.client.get(column) or b""
            await running.client.set(column, packed[: len(packed) // 2 + 3])
        case _:
            await running.client.setrange(column, slot * UNIT.size, bytes(UNIT.size))


async def _is_right(running: Cell, account: str) -> bool:
    """Whether the account's row in the columns is what its ledger says."""
    slot, balance, held = await running.client.hmget(
        keys.ledger_key(account), "slot", "balance", keys.ledger_position(SYMBOL)
    )
    wanted = {keys.COLUMN_BALANCE: balance, keys.quantity_column(SYMBOL): (held or b"")[: UNIT.size]}
    wanted[keys.cost_column(SYMBOL)] = (held or b"")[UNIT.size :]
    first = int(slot or 0) * UNIT.size
    found = [await running.client.getrange(column, first, first + UNIT.size - 1) for column in wanted]
    return found == list(wanted.values())


async def _are_whole(running: Cell) -> bool:
    accounts = int(await running.client.llen(keys.ACCOUNTS))
    return all([int(await running.client.strlen(column)) >= accounts * UNIT.size for column in COLUMNS])


async def _adjusted(running: Cell, account: str) -> bool:
    return bool(await running.postgres("SELECT 1 FROM adjustments WHERE account_id = $1", account))
