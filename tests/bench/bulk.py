"""A population written into both stores in seconds: columns whole, keys by mass insertion, history by COPY.

The texts and packed values are those of the product's own functions, and a sample of what was written is read back by
the product's own reader.
"""

from __future__ import annotations

import asyncio
import io
import socket
from collections.abc import Iterable, Iterator
from contextlib import closing
from decimal import Decimal
from functools import cache
from random import Random
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import hiredis
import orjson
import psycopg2

from app import redis_client as keys
from app.booking import Booking
from app.evidence import shown_record
from app.numbers import format_decimal, from_units
from app.records import NOTHING, encode_position
from app.restore import RestoredAccount
from app.services.trading import Account, Position
from tests.bench.population import MARK, SEED, SYMBOL, Population, account_name
from tests.harness import System

ACCOUNTS_AT_ONCE: Final = 10_000
VALUES_AT_ONCE: Final = 4_000_000
SAMPLE: Final = 200

Batch = tuple[int, bytes]
"""Commands as Redis reads them, and how many answers they will get."""


async def write_columns(booking: Booking, population: Population) -> None:
    """The packed columns and the list of accounts, without the accounts' own keys: all that a sweep reads."""
    await _write_packed(booking, population)
    await asyncio.to_thread(_insert, booking.store.url, _names(len(population)))


async def write_all(system: System, booking: Booking, population: Population) -> None:
    """Everything that so many accounts are: keys, columns, and for each a row of history that explains it.

    Raises ``RuntimeError`` when the product's reader finds another account than was written.
    """
    client = booking.store.client
    await _write_packed(booking, population)
    epoch = int(await client.hget(keys.STATE_EPOCH, "epoch") or 0)
    await client.set(keys.HISTORY_LAST_ID, len(population))
    await asyncio.gather(
        asyncio.to_thread(_insert, booking.store.url, _records(population)),
        asyncio.to_thread(_write_history, system.stores.owner_url, population, epoch),
    )
    for slot in Random(SEED).sample(range(len(population)), min(SAMPLE, len(population))):
        snapshot = await booking.read(account_name(slot))
        account = booking.parse(snapshot)
        if snapshot.slot != slot or account != population.account(slot) or not snapshot.agrees(account):
            raise RuntimeError(f"{account_name(slot)} was not written as it is read: {snapshot}")


async def _write_packed(booking: Booking, population: Population) -> None:
    client = booking.store.client
    for key, column in (
        (keys.COLUMN_BALANCE, population.balance),
        (keys.quantity_column(SYMBOL), population.quantity),
        (keys.cost_column(SYMBOL), population.cost),
    ):
        for first in range(0, len(column), VALUES_AT_ONCE):
            await client.setrange(key, first * 8, column[first : first + VALUES_AT_ONCE].tobytes())
    await client.setrange(keys.COLUMN_BREACH, len(population) * 8 - 8, NOTHING)
    await client.set(keys.open_positions_key(SYMBOL), int((population.quantity != 0).sum()))


def _ranges(count: int) -> Iterator[tuple[int, int]]:
    return ((first, min(count, first + ACCOUNTS_AT_ONCE)) for first in range(0, count, ACCOUNTS_AT_ONCE))


def _names(count: int) -> Iterator[Batch]:
    for first, end in _ranges(count):
        yield (
            1,
            _command(b"RPUSH", keys.ACCOUNTS.encode(), *(account_name(slot).encode() for slot in range(first, end))),
        )


def _records(population: Population) -> Iterator[Batch]:
    """What a commit leaves of each account: its five keys and its place in the list."""
    symbol, mark = SYMBOL.encode(), int(MARK)
    for (_, names), (first, end) in zip(_names(len(population)), _ranges(len(population)), strict=True):
        commands, strings = [names], []
        rows = zip(*(column[first:end].tolist() for column in _columns(population)), strict=True)
        for slot, (balance, quantity, cost) in enumerate(rows, first):
            name = account_name(slot)
            for key, units in (
                (keys.balance_key(name), balance),
                (keys.equity_key(name), balance + quantity * mark - cost),
                (keys.used_margin_key(name), abs(quantity) * mark // 5),
            ):
                strings += [key.encode(), format_decimal(from_units(units)).encode()]
            position = _position_texts(quantity, cost)[0]
            commands.append(_command(b"HSET", keys.positions_key(name).encode(), symbol, position))
            commands.append(_command(b"HSET", keys.ledger_key(name).encode(), *_ledger(slot, balance, quantity, cost)))
        commands.append(_command(b"MSET", *strings))
        yield len(commands), b"".join(commands)


def _ledger(slot: int, balance: int, quantity: int, cost: int) -> list[bytes]:
    """The fields and values of an account's ledger after its one row of history, as a rebuild writes them."""
    account = RestoredAccount("", seq=1, balance=from_units(balance), positions={SYMBOL: _position(quantity, cost)})
    texts = (text for pair in account.ledger(slot).items() for text in pair)
    return [text if isinstance(text, bytes) else str(text).encode() for text in texts]


@cache
def _position(quantity: int, cost: int) -> Position:
    return Position(from_units(quantity), from_units(cost))


def _columns(population: Population) -> tuple[Any, Any, Any]:
    return population.balance, population.quantity, population.cost


@cache
def _position_texts(quantity: int, cost: int) -> tuple[bytes, str]:
    """The JSON of a position, as its key has it and as history shows it."""
    position = _position(quantity, cost)
    shown = orjson.dumps(shown_record(Account("", Decimal(0), {SYMBOL: position}))).decode()
    return encode_position(position).encode(), shown


def _command(*words: bytes) -> bytes:
    return b"*%d\r\n" % len(words) + b"".join([b"$%d\r\n%b\r\n" % (len(word), word) for word in words])


def _insert(redis_url: str, batches: Iterable[Batch]) -> None:
    """Send ``batches`` over a unix socket and read every answer. Raises ``RuntimeError`` for an error among them."""
    with closing(socket.socket(socket.AF_UNIX)) as connection:
        connection.connect(unquote(urlsplit(redis_url).path))
        for answers, commands in batches:
            connection.sendall(commands)
            reader, read = hiredis.Reader(replyError=RuntimeError), 0
            while read < answers:
                reader.feed(connection.recv(1 << 16))
                while (answer := reader.gets()) is not False:
                    if isinstance(answer, RuntimeError):
                        raise answer
                    read += 1


def _write_history(database_url: str, population: Population, epoch: int) -> None:
    """One row of history an account: an adjustment, which says all of it at once."""
    with closing(psycopg2.connect(database_url)) as connection, connection, connection.cursor() as cursor:
        for first, end in _ranges(len(population)):
            text = io.StringIO()
            rows = zip(*(column[first:end].tolist() for column in _columns(population)), strict=True)
            for slot, (balance, quantity, cost) in enumerate(rows, first):
                shown = _position_texts(quantity, cost)[1]
                text.write(
                    f"{slot + 1}\t{account_name(slot)}\t1\t{epoch}\t2026-01-01\t1\twritten by the bench\t0\t"
                    f"{format_decimal(from_units(balance))}\t{{}}\t{shown}\n"
                )
            text.seek(0)
            cursor.copy_expert(
                "COPY adjustments (id, account_id, seq, epoch, timestamp, mark_version, reason, balance_before, "
                "balance_after, positions_before, positions_after) FROM STDIN",
                text,
            )
    with closing(psycopg2.connect(database_url)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("VACUUM ANALYZE")
