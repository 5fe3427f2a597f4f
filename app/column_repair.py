"""The columns made anew: they are a copy, and what they copy lies in the accounts' ledgers.

A column that was lost, or cut, is short: it does not reach to the last slot. No script writes into one, and no sweep
judges by it, so what it has to hold stands still until it is there again, whole.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import structlog

from app import errors, metrics
from app import redis_client as keys
from app.contracts import Contract
from app.records import UNIT, RecordError, pack, parse_account
from app.redis_client import StateStore
from app.services.trading import FLAT, Account

LEDGERS_AT_ONCE: Final = 500
"""Read by one call of a script: about a millisecond of Redis."""

PIECE_BYTES: Final = 2**20
ASIDE_SECONDS: Final = 600
ATTEMPTS_MAX: Final = 5

log = structlog.get_logger(__name__)


class ColumnRepair:
    """Makes columns anew for one process."""

    def __init__(self, store: StateStore, contracts: Mapping[str, Contract]) -> None:
        self._store = store
        self._contracts = contracts
        self._fields = [keys.ledger_position(symbol) for symbol in contracts]
        self._names = [keys.COLUMN_BALANCE, keys.COLUMN_BREACH]
        for symbol in contracts:
            self._names += [keys.quantity_column(symbol), keys.cost_column(symbol)]
        self._counters = {keys.quantity_column(symbol): keys.open_positions_key(symbol) for symbol in contracts}
        self._running: asyncio.Task[None] | None = None

    async def rebuild(self, *, patience_seconds: float | None = None) -> None:
        """Make every short column anew; whoever asks meanwhile waits for the same.

        Raises ``ColumnsShort`` when that takes longer than ``patience_seconds`` (it goes on), and the store's errors.
        """
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._rebuild(), name="column repair")
        done, _ = await asyncio.wait([self._running], timeout=patience_seconds)
        if not done:
            raise errors.ColumnsShort("a column was lost and is being made anew", reason="columns")
        self._running.result()

    async def repack(self, account_id: str) -> None:
        """Write one account's row into the columns again, as its ledger has it."""
        answer = await self._store.run(
            keys.REPACK,
            [
                keys.STATE_EPOCH,
                keys.STATE_RUN_ID,
                keys.ACCOUNTS,
                keys.ledger_key(account_id),
                keys.CHANGED,
                *self._names,
            ],
            [self._store.signature, account_id, *self._fields],
        )
        if answer[0] == "ok":
            metrics.COLUMN_REPAIRS.inc()
            log.warning("wrote a damaged row of the columns again", account_id=account_id)

    async def _rebuild(self) -> None:
        for _ in range(ATTEMPTS_MAX):
            accounts, short = await self._short()
            if not short:
                return
            log.error("columns were lost; they are made anew", columns=short, accounts=accounts)
            columns = await self._from_ledgers(accounts)
            touched: list[str] = []
            opened: list[str | int] = []
            for name in short:
                counter = self._counters.get(name)
                touched += [name, await self._put_aside(name, columns[name]), counter or name]
                opened.append(int(np.count_nonzero(np.frombuffer(columns[name], dtype="<i8"))) if counter else "")
            answer = await self._store.run(
                keys.COLUMNS,
                [keys.STATE_EPOCH, keys.STATE_RUN_ID, keys.ACCOUNTS, keys.CHANGED, *touched],
                [self._store.signature, accounts, *opened],
            )
            if answer[0] == "ok":
                metrics.COLUMN_REPAIRS.inc(int(answer[1]))
                log.warning("made columns anew", columns=short, accounts=accounts)
                return
        raise errors.ColumnsShort("accounts come faster than the columns can be made anew", reason="columns")

    async def _put_aside(self, name: str, column: bytearray) -> str:
        """Write what is to replace a column under a key of its own, in pieces; left there by a death, it expires."""
        aside = f"{name}:{uuid.uuid4().hex}"
        await self._store.client.set(aside, b"", ex=ASIDE_SECONDS)
        for first in range(0, len(column), PIECE_BYTES):
            await self._store.client.setrange(aside, first, bytes(column[first : first + PIECE_BYTES]))
        return aside

    async def _short(self) -> tuple[int, list[str]]:
        """How many accounts there are, and the columns that do not reach to the last."""
        async with self._store.client.pipeline(transaction=True) as pipeline:
            pipeline.llen(keys.ACCOUNTS)
            for name in self._names:
                pipeline.strlen(name)
            accounts, *lengths = await pipeline.execute()
        short = [name for name, length in zip(self._names, lengths, strict=True) if length < accounts * UNIT.size]
        return int(accounts), short

    async def _from_ledgers(self, accounts: int) -> dict[str, bytearray]:
        """What each column has to hold of the first ``accounts`` accounts."""
        columns = {name: bytearray() for name in self._names}
        for first in range(0, accounts, LEDGERS_AT_ONCE):
            last = min(first + LEDGERS_AT_ONCE, accounts) - 1
            names = [keys.as_text(name) for name in await self._store.client.lrange(keys.ACCOUNTS, first, last)]
            _, unknown, *packed = await self._store.run(
                keys.LEDGER_ROWS,
                [keys.STATE_EPOCH, keys.STATE_RUN_ID, *(keys.ledger_key(name) for name in names)],
                [self._store.signature, *self._fields],
            )
            for column, values in zip(columns.values(), packed, strict=True):
                column.extend(values)
            for number in unknown:
                await self._from_record(columns, first + int(number) - 1, names[int(number) - 1])
        return columns

    async def _from_record(self, columns: Mapping[str, bytearray], slot: int, account_id: str) -> None:
        """The row of an account whose ledger does not say what history knows: its keys are all there is."""
        async with self._store.client.pipeline(transaction=True) as pipeline:
            pipeline.get(keys.balance_key(account_id))
            pipeline.hgetall(keys.positions_key(account_id))
            balance, fields = await pipeline.execute(raise_on_error=False)
        account = _read(account_id, balance, fields, self._contracts)
        row: list[bytes] = [pack(account.balance)]
        for symbol in self._contracts:
            held = account.positions.get(symbol, FLAT)
            row += [pack(held.quantity), pack(held.cost)]
        without_breach = [column for name, column in columns.items() if name != keys.COLUMN_BREACH]
        for column, value in zip(without_breach, row, strict=True):
            column[slot * UNIT.size : (slot + 1) * UNIT.size] = value


def _read(account_id: str, balance: Any, fields: Any, contracts: Mapping[str, Contract]) -> Account:  # noqa: ANN401
    """The record, or an empty account where it cannot be read: such a one is quarantined when it is met."""
    texts: Sequence[bytes] = [text for pair in fields.items() for text in pair] if isinstance(fields, dict) else []
    try:
        return parse_account(account_id, balance if isinstance(balance, bytes) else b"", texts, contracts)
    except RecordError:
        return Account(account_id, balance=FLAT.cost)
