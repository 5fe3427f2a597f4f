"""The checker: every ok is in Redis and once in Postgres, every refused in neither, every unknown is resolved.

And each account equals the fold of its history, to the last digit.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Final

import httpx

from app import redis_client as keys
from app.verify import verify
from tests.faults.cell import Cell
from tests.faults.journal import Operation, Row
from tests.faults.load import Load

DEAD_LETTERS_SHOWN: Final = 3
RESOLVE_SECONDS: Final = 20.0
RETRIED: Final = 40
"""So many of the acknowledged operations are sent again: each has to answer its first id."""


async def check(cell: Cell, loads: list[Load] | Load, row: Row) -> None:
    """Resolve what is unknown, count everything, and add it to ``row``."""
    for load in loads if isinstance(loads, list) else [loads]:
        await resolve(load, row)
        await _repeat(load, row)
    await cell.drained()
    for load in loads if isinstance(loads, list) else [loads]:
        await _count(cell, load, row)
    found = await asyncio.to_thread(verify, cell.settings(), cell.stores)
    for difference in found.differences:
        row.complain(f"verify: {difference}")
    for _, letter in await cell.client.xrange(keys.OUTBOX_DEAD, count=DEAD_LETTERS_SHOWN) or ():
        row.complain(f"a dead letter: {letter}")


async def resolve(load: Load, row: Row) -> None:
    """Ask for the client id of every unknown, then send it again: both have to say the same."""
    for operation in load.journal:
        if operation.outcome != "unknown":
            continue
        deadline = time.monotonic() + RESOLVE_SECONDS
        while time.monotonic() < deadline and not await _resolved(load, operation, row):
            await asyncio.sleep(0.1)


async def _resolved(load: Load, operation: Operation, row: Row) -> bool:
    try:
        listed = await load.cell.http.get(
            load.cell.apis[0].url + operation.listing,
            params={"account_id": operation.account_id, operation.id_field: operation.client_id},
        )
    except httpx.TransportError:
        return False
    if not listed.is_success:
        return False
    rows = [int(item["id"]) for item in listed.json()["items"]]
    operation.history_ids |= set(rows)
    await load.send(operation)
    if operation.status in {404, 409}:
        operation.outcome = "refused"
        if rows:
            row.complain(f"{operation.client_id} is row {rows} and a retry is refused: {operation.code}")
    return operation.outcome != "unknown"


async def _repeat(load: Load, row: Row) -> None:
    acknowledged = [operation for operation in load.journal if operation.outcome == "ok"]
    for operation in acknowledged[:: max(1, len(acknowledged) // RETRIED)]:
        await load.send(operation)
        if operation.status != 200:
            row.complain(f"a retry of {operation.client_id} answered {operation.status} {operation.code}")


async def _count(cell: Cell, load: Load, row: Row) -> None:
    booked: Counter[tuple[str, str, str]] = Counter()
    ids: dict[tuple[str, str, str], int] = {}
    for kind, query in (
        ("trade", "SELECT account_id, client_trade_id AS client_id, 'trade' AS kind, id FROM trades"),
        ("transfer", "SELECT account_id, client_transfer_id AS client_id, kind, id FROM transfers"),
    ):
        for record in await cell.postgres(f"{query} WHERE account_id = ANY($1)", load.accounts):
            name = (record["account_id"], record["kind"], record["client_id"])
            booked[name] += 1
            ids[name] = record["id"]
            assert kind in {"trade", "transfer"}
    remembered = await _remembered(cell, load)
    owners: dict[int, Operation] = {}
    for operation in load.journal:
        name = (operation.account_id, operation.kind, operation.client_id)
        rows = booked.pop(name, 0)
        match operation.outcome:
            case "ok":
                missing = rows == 0 or remembered.get(operation) != ids.get(name)
                row.lost += missing
                if missing:
                    row.complain(f"lost {operation}: Postgres {ids.get(name)}, Redis {remembered.get(operation)}")
                row.doubled += rows > 1 or len(operation.history_ids | {ids.get(name)} - {None}) > 1
            case "refused":
                row.doubled += rows > 0 or operation in remembered
                if rows or operation in remembered:
                    row.complain(f"refused and yet booked: {operation}")
            case _:
                row.unknown_left += 1
                row.complain(f"left unknown: {operation}")
        for history_id in operation.history_ids:
            other = owners.setdefault(history_id, operation)
            if other is not operation:
                row.doubled += 1
                row.complain(f"id {history_id} was given to {other.client_id} and {operation.client_id}")
    row.doubled += sum(booked.values())
    for name in booked:
        row.complain(f"nobody sent {name}")
    row.operations += len(load.journal)
    row.acknowledged += sum(operation.outcome == "ok" for operation in load.journal)
    row.in_flight += load.in_flight_at_faults
    row.problems += load.complaints


async def _remembered(cell: Cell, load: Load) -> dict[Operation, int]:
    """The history id that Redis knows each operation of the journal by."""
    found: dict[Operation, int] = {}
    for first in range(0, len(load.journal), 1_000):
        some = load.journal[first : first + 1_000]
        values = await cell.client.mget(
            [keys.operation_key(operation.kind, operation.account_id, operation.client_id) for operation in some]
        )
        for operation, value in zip(some, values, strict=True):
            if value is not None:
                found[operation] = int(keys.as_text(value).partition("\n")[0])
    return found
