"""What history says the state is, written back into Redis: of every account (``rebuild``) or of a few (reconcile).

Every row carries what it left, so the newest rows of an account are enough. The caller has made sure that nothing else
writes: the epoch is frozen, or this run of Redis has not been reconciled yet.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from itertools import islice
from typing import Any, Final

from sqlalchemy import Numeric, TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection

from app import redis_client as keys
from app.history import UNIX_EPOCH
from app.models import Trade, Transfer
from app.numbers import format_decimal
from app.records import NOTHING, UNIT, encode_position, pack
from app.redis_client import StateStore
from app.services.trading import FLAT, Position

ROWS_AT_ONCE: Final = 5_000
ACCOUNTS_AT_ONCE: Final = 500
OPERATIONS_AT_ONCE: Final = 1_000

Progress = Callable[[str, int], None]
"""Told a stage and how many more items of it are done."""

_LAST_BALANCES: Final = """
    SELECT DISTINCT ON (account_id) account_id, balance_after FROM (
        SELECT account_id, seq, balance_after FROM trades WHERE {accounts}
        UNION ALL SELECT account_id, seq, balance_after FROM transfers WHERE {accounts}
        UNION ALL SELECT account_id, seq, balance_after FROM adjustments WHERE {accounts}
    ) AS changes ORDER BY account_id, seq DESC
"""
# An adjustment says all positions, so what is older than the last one says nothing any more.
_LAST_POSITIONS: Final = """
    WITH adjusted AS (
        SELECT DISTINCT ON (account_id) account_id, seq, positions_after FROM adjustments WHERE {accounts}
        ORDER BY account_id, seq DESC
    ), changes AS (
        SELECT account_id, seq, symbol, quantity_after AS quantity, cost_after AS cost FROM trades WHERE {accounts}
        UNION ALL
        SELECT account_id, seq, key, (value ->> 'quantity')::numeric, (value ->> 'cost')::numeric
        FROM adjusted, jsonb_each(positions_after)
    )
    SELECT DISTINCT ON (account_id, symbol) account_id, symbol, quantity, cost
    FROM changes LEFT JOIN adjusted USING (account_id)
    WHERE changes.seq >= coalesce(adjusted.seq, 0)
    ORDER BY account_id, symbol, changes.seq DESC
"""
_SEQS: Final = """
    SELECT account_id, max(seq) FROM (
        SELECT account_id, seq FROM trades WHERE {accounts}
        UNION ALL SELECT account_id, seq FROM transfers WHERE {accounts}
        UNION ALL SELECT account_id, seq FROM adjustments WHERE {accounts}
        UNION ALL SELECT account_id, seq FROM liquidations WHERE {accounts}
        UNION ALL SELECT account_id, seq FROM recoveries WHERE {accounts}
    ) AS history GROUP BY account_id
"""
_LAST_BREACHES: Final = """
    SELECT DISTINCT ON (liquidations.account_id) liquidations.account_id, liquidations.id, liquidations.timestamp,
        greatest(liquidations.mark_version, recoveries.mark_version), recoveries.id IS NULL
    FROM liquidations LEFT JOIN recoveries ON recoveries.liquidation_id = liquidations.id
    WHERE {liquidated}
    ORDER BY liquidations.account_id, liquidations.seq DESC
"""


@dataclass(slots=True)
class RestoredAccount:
    """An account as its newest rows of history left it."""

    account_id: str
    seq: int = 0
    balance: Decimal = Decimal(0)
    positions: dict[str, Position] = field(default_factory=dict)
    open_breach: int | None = None
    breach_at_us: int | None = None
    breach_version: int | None = None

    def ledger(self, slot: int) -> dict[Any, Any]:
        """The ledger hash of the account."""
        ledger = {"slot": slot, "seq": self.seq, "balance": pack(self.balance)}
        for symbol, position in self.positions.items():
            ledger[keys.ledger_position(symbol)] = pack(position.quantity) + pack(position.cost)
        if self.breach_version is not None:
            ledger["breach_version"] = self.breach_version
        if self.open_breach is not None and self.breach_at_us is not None:
            ledger |= {"breach": self.open_breach, "breach_at": self.breach_at_us}
        return ledger

    def fields(self) -> dict[Any, Any]:
        """The positions hash of the account."""
        return {symbol: encode_position(position) for symbol, position in self.positions.items()}

    def packed(self, symbols: Sequence[str]) -> dict[str, bytes]:
        """The account's value in each column."""
        row = {
            keys.COLUMN_BALANCE: pack(self.balance),
            keys.COLUMN_BREACH: UNIT.pack(self.open_breach) if self.open_breach is not None else NOTHING,
        }
        for symbol in symbols:
            position = self.positions.get(symbol, FLAT)
            row[keys.quantity_column(symbol)] = pack(position.quantity)
            row[keys.cost_column(symbol)] = pack(position.cost)
        return row


async def accounts_in_history(
    connection: AsyncConnection, account_ids: Sequence[str] | None = None
) -> dict[str, RestoredAccount]:
    """The accounts named, or all there are, as history left them, in the order of their names."""
    accounts: dict[str, RestoredAccount] = {}
    for account_id, seq in await _rows(connection, _SEQS, account_ids):
        accounts[account_id] = RestoredAccount(account_id, seq=seq)
    for account_id, balance in await _rows(connection, _LAST_BALANCES, account_ids):
        accounts[account_id].balance = balance
    for account_id, symbol, quantity, cost in await _rows(connection, _LAST_POSITIONS, account_ids):
        if quantity:
            accounts[account_id].positions[symbol] = Position(quantity=quantity, cost=cost)
    for account_id, breach, opened, version, is_open in await _rows(connection, _LAST_BREACHES, account_ids):
        account = accounts[account_id]
        account.breach_version = version
        if is_open:
            account.open_breach, account.breach_at_us = breach, microseconds(opened)
    return dict(sorted(accounts.items()))


async def restore_all(
    store: StateStore, accounts: Mapping[str, RestoredAccount], symbols: Sequence[str], progress: Progress
) -> None:
    """Write every account into a Redis that holds none, in slots by name; columns whole, keys in batches."""
    columns: dict[str, bytearray] = {}
    for account in accounts.values():
        for column, value in account.packed(symbols).items():
            columns.setdefault(column, bytearray()).extend(value)
    async with store.client.pipeline(transaction=False) as pipeline:
        for column, packed in columns.items():
            pipeline.set(column, bytes(packed))
        for symbol in symbols:
            opened = sum(symbol in account.positions for account in accounts.values())
            pipeline.set(keys.open_positions_key(symbol), opened)
        await pipeline.execute()
    for batch in _batches(enumerate(accounts.values()), ACCOUNTS_AT_ONCE):
        async with store.client.pipeline(transaction=False) as pipeline:
            for slot, account in batch:
                pipeline.rpush(keys.ACCOUNTS, account.account_id)
                pipeline.set(keys.balance_key(account.account_id), format_decimal(account.balance))
                if account.positions:
                    pipeline.hset(keys.positions_key(account.account_id), mapping=account.fields())
                pipeline.hset(keys.ledger_key(account.account_id), mapping=account.ledger(slot))
            await pipeline.execute()
        progress("accounts", len(batch))


async def restore_some(store: StateStore, accounts: Iterable[RestoredAccount], symbols: Sequence[str]) -> None:
    """Write ``accounts`` over what Redis has of them, each in one transaction; new ones get the next slots."""
    for account in accounts:
        ledger_key = keys.ledger_key(account.account_id)
        slot_text = await store.client.hget(ledger_key, "slot")
        slot = int(slot_text) if slot_text is not None else int(await store.client.llen(keys.ACCOUNTS))
        async with store.client.pipeline(transaction=True) as pipeline:
            if slot_text is None:
                pipeline.rpush(keys.ACCOUNTS, account.account_id)
            pipeline.set(keys.balance_key(account.account_id), format_decimal(account.balance))
            pipeline.delete(keys.positions_key(account.account_id), ledger_key)
            if account.positions:
                pipeline.hset(keys.positions_key(account.account_id), mapping=account.fields())
            pipeline.hset(ledger_key, mapping=account.ledger(slot))
            for column, value in account.packed(symbols).items():
                pipeline.setrange(column, slot * UNIT.size, value)
            # Without any change noted every row counts as changed.
            pipeline.delete(keys.CHANGED)
            await pipeline.execute()
    await count_open_positions(store, symbols)


async def count_open_positions(store: StateStore, symbols: Sequence[str]) -> None:
    """Set each symbol's number of open positions to what its column holds."""
    for symbol in symbols:
        packed = await store.client.get(keys.quantity_column(symbol)) or b""
        assert isinstance(packed, bytes)
        opened = sum(value != 0 for (value,) in UNIT.iter_unpack(packed))
        await store.client.set(keys.open_positions_key(symbol), opened)


async def operations_in_history(
    connection: AsyncConnection, *, since: datetime, after_id: int = 0
) -> AsyncIterator[tuple[str, bytes, datetime]]:
    """The operation keys of trades and transfers booked from ``since`` on with ids above ``after_id``.

    Each with the value Redis remembers it by, and when it was booked.
    """
    kinds: tuple[tuple[str, type[Trade | Transfer], str], ...] = (
        ("'trade'", Trade, "client_trade_id"),
        ("kind", Transfer, "client_transfer_id"),
    )
    for kind, model, operation_id in kinds:
        # Postgres writes the bodies: in Python a million of them would take minutes.
        query = text(
            f"SELECT {kind}, account_id, {operation_id}, id, {_body(model)}, timestamp FROM {model.__tablename__} "  # noqa: S608
            "WHERE timestamp >= :since AND id > :after_id"
        )
        rows = await connection.stream(query, {"since": since, "after_id": after_id})
        async for some in rows.partitions(ROWS_AT_ONCE):
            for operation, account_id, client_id, history_id, body, booked in some:
                value = f"{history_id}\n{microseconds(booked)}\n{body}".encode()
                yield keys.operation_key(operation, account_id, client_id), value, booked


def _body(model: type[Trade | Transfer]) -> str:
    """What a commit remembers of a row, as an SQL expression: JSON with its decimals as plain strings."""
    members = ", ".join(
        f"'{column.name}', {f'trim_scale({column.name})::text' if isinstance(column.type, Numeric) else column.name}"
        for column in model.__table__.columns
        if column.name not in _NOT_IN_BODY
    )
    return f"json_build_object({members})::text"


async def restore_operations(
    store: StateStore,
    operations: AsyncIterator[tuple[str, bytes, datetime]],
    *,
    now: datetime,
    seconds_kept: int,
    progress: Progress,
) -> None:
    """Remember ``operations`` for what is left of their ``seconds_kept``."""
    batch: list[tuple[str, bytes, int]] = []

    async def write() -> None:
        names = [name for name, _, _ in batch]
        arguments = [item for _, value, seconds in batch for item in (value, seconds)]
        # One call for many keys: redis-py takes longer over a command than Redis does.
        await store.client.eval(_REMEMBER, len(names), *names, *arguments)
        progress("operation ids", len(batch))
        batch.clear()

    async for name, value, booked in operations:
        seconds = seconds_kept - int((now - booked).total_seconds())
        if seconds > 0:
            batch.append((name, value, min(seconds, seconds_kept)))
        if len(batch) >= OPERATIONS_AT_ONCE:
            await write()
    if batch:
        await write()


def microseconds(moment: datetime) -> int:
    """``moment`` in microseconds since the Unix epoch, without a float in between."""
    return (moment - UNIX_EPOCH) // timedelta(microseconds=1)


_REMEMBER: Final = """
    for i = 1, #KEYS do redis.call('SET', KEYS[i], ARGV[2 * i - 1], 'EX', ARGV[2 * i]) end
"""
_NOT_IN_BODY: Final = frozenset({"id", "account_id", "seq", "epoch", "timestamp"})


async def _rows(connection: AsyncConnection, statement: str, account_ids: Sequence[str] | None) -> Sequence[Any]:
    query, parameters = _of_accounts(statement, account_ids)
    return (await connection.execute(query, parameters)).all()


def _of_accounts(statement: str, account_ids: Sequence[str] | None) -> tuple[TextClause, dict[str, Any]]:
    """``statement`` over the accounts named, or over all."""
    if account_ids is None:
        return text(statement.format(accounts="true", liquidated="true")), {}
    named = "account_id = ANY(:account_ids)"
    query = text(statement.format(accounts=named, liquidated=f"liquidations.{named}"))
    return query, {"account_ids": list(account_ids)}


def _batches(items: Iterable[Any], size: int) -> Iterable[list[Any]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
