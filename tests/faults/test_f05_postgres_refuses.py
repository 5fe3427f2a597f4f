"""F5: Postgres is read-only, or out of disk, or meets one row that it can never take."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import orjson

from app import redis_client as keys
from tests.faults.cell import Cell
from tests.faults.checker import check
from tests.faults.history_server import open_history_server
from tests.faults.journal import Row
from tests.faults.load import Load
from tests.faults.zygote import Zygote

READ_ONLY = ("ALTER SYSTEM SET default_transaction_read_only = on", "SELECT pg_reload_conf()")
WRITABLE = ("ALTER SYSTEM RESET default_transaction_read_only", "SELECT pg_reload_conf()")
DISK_FULL = (
    (
        "CREATE FUNCTION disk_full() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE EXCEPTION 'could not extend file: No space left on device' USING ERRCODE = 'disk_full'; END $$"
    ),
    "CREATE TRIGGER disk_full BEFORE INSERT ON trades FOR EACH STATEMENT EXECUTE FUNCTION disk_full()",
)
DISK_FREED = ("DROP TRIGGER disk_full ON trades", "DROP FUNCTION disk_full()")


async def test_a_postgres_that_takes_no_rows_for_a_while_gets_them_all_later(
    zygote: Zygote, row: Callable[[str, str], Row], rounds: Callable[[int, int], int], seed: int
) -> None:
    result = row("F5", "Postgres read-only, disk full")
    async with open_history_server(zygote, apis=2) as history:
        load = Load(history.cell, seed=seed, clients=8)
        await load.start()
        await load.acknowledged(50)
        for number in range(rounds(6, 2)):
            result.rounds += 1
            spoil, mend = (READ_ONLY, WRITABLE) if number % 2 == 0 else (DISK_FULL, DISK_FREED)
            moment = load.fault()
            await history.execute(*spoil)
            await load.first_after(moment)
            await asyncio.sleep(1)
            waiting = await history.cell.client.xlen(keys.OUTBOX)
            if not waiting:
                result.complain(f"round {number}: history was written although it could not be")
            await history.execute(*mend)
            mended = time.monotonic()
            await load.first_after(mended)
            result.recovered(time.monotonic() - mended)
        await load.stop()
        await check(history.cell, load, result)
    result.require_green()


async def test_a_row_that_postgres_can_never_take_is_put_aside_and_the_others_flow(
    zygote: Zygote, row: Callable[[str, str], Row], seed: int
) -> None:
    result = row("F5 row", "a row of the outbox that violates a constraint")
    async with open_history_server(zygote, apis=1) as history:
        cell = history.cell
        load = Load(cell, seed=seed, clients=8)
        await load.start()
        await load.acknowledged(100)
        for number, spoilt in enumerate(
            ({"quantity": "NaN"}, {"side": "neither"}, {"symbol": "a\x00b"}, {"price": "x"})
        ):
            load.fault()
            await _put_bad_row(cell, spoilt, number)
            await load.acknowledged(30)
            result.rounds += 1
        await load.stop()
        await cell.drained()
        dead: Any = await cell.client.xrange(keys.OUTBOX_DEAD)
        assert sorted(orjson.loads(fields[b"row"])["account_id"] for _, fields in dead) == [
            f"ghost-{number}" for number in range(4)
        ]
        assert "plimsoll_dead_letters_total 4.0" in (await cell.http.get(f"{cell.apis[0].url}/metrics")).text
        # They are seen; what the checker asks for is that there are no others.
        await cell.client.delete(keys.OUTBOX_DEAD)
        await check(cell, load, result)
    result.require_green()


async def _put_bad_row(cell: Cell, spoilt: dict[str, str], number: int) -> None:
    """Append an entry as the commit script does, with an id of its own from the counter."""
    body = {
        "mark_version": 1, "symbol": "BTC-PERP", "side": "buy", "quantity": "1", "price": "1", "client_trade_id": "x",
        "mark_price": "1", "realised_pnl": "0", "balance_after": "0", "quantity_after": "1", "cost_after": "1",
        "equity_after": "0", "used_margin_after": "0", **spoilt,
    }  # fmt: skip
    script = """
        local id = redis.call('INCR', KEYS[1])
        local time = redis.call('TIME')
        return redis.call('XADD', KEYS[2], id .. '-0', 'kind', 'trade', 'account', ARGV[1], 'seq', 1,
            'epoch', redis.call('HGET', KEYS[3], 'epoch'), 'time', string.format('%d%06d', time[1], time[2]),
            'body', ARGV[2])
    """
    arguments: list[Any] = [f"ghost-{number}", orjson.dumps(body)]
    await cell.client.eval(script, 3, keys.HISTORY_LAST_ID, keys.OUTBOX, keys.STATE_EPOCH, *arguments)
