"""The columns: a packed copy of every account in Redis, read a chunk at a time for sweeps and reports.

Each column is a Redis string of little-endian int64 in units of 1e-8; an account's value lies at ``8 x slot``. A chunk
comes with the marks and the mark version in one MULTI, so that no row is torn and none is judged by an older mark.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from redis.asyncio import Redis

from app import errors
from app import redis_client as keys
from app.contracts import Contract
from app.numbers import UNITS_PER_ONE, exact, from_units
from app.records import UNIT, parse_mark
from app.services import margin
from app.services.margin import AccountMargin, Column, Exposure, Flags
from app.services.trading import Account, Position

INT64: Final = np.dtype("<i8")
ROUNDING_ERROR_RELATIVE: Final = 2.0**-48
"""More than float64 can lose in one symbol, relative to the sum of what was added up: a dozen roundings of 2**-53."""

SCREEN_BLOCK_ROWS: Final = 16_384
"""Of so many rows everything that the screen computes stays in a megabyte of cache."""

NO_ROWS: Final = np.empty(0, dtype=np.intp)

NAMES_SKIPPED_MAX: Final = 64
"""A name in a range costs this much less than a name asked for by itself."""


@dataclass(frozen=True, slots=True)
class Marks:
    """The marks one read found: price by symbol, when each was accepted in microseconds, and their version.

    ``by_hand`` names those that were set by hand and have no version yet: a sweep adopts them before it judges.
    ``read_at_us`` is Redis TIME and ``epoch`` the state's epoch at the moment of the read.
    """

    prices: Mapping[str, Decimal]
    timestamps_us: Mapping[str, int]
    version: int
    by_hand: tuple[str, ...]
    read_at_us: int = 0
    epoch: str = ""

    def fresh(self, max_age_seconds: float | None) -> Marks:
        """Without those older than ``max_age_seconds``: nothing is breached on a stale mark."""
        if max_age_seconds is None:
            return self
        oldest_us = self.read_at_us - max_age_seconds * 1_000_000
        prices = {symbol: price for symbol, price in self.prices.items() if self.timestamps_us[symbol] >= oldest_us}
        return replace(self, prices=prices)


@dataclass(frozen=True, slots=True)
class Chunk:
    """The packed rows of the accounts in slots ``first_slot`` and on, as int64 units of 1e-8, and their marks."""

    first_slot: int
    balance: NDArray[np.int64]
    breach: NDArray[np.int64]
    quantity: Mapping[str, NDArray[np.int64]]
    cost: Mapping[str, NDArray[np.int64]]
    marks: Marks

    def __len__(self) -> int:
        return len(self.balance)

    def account(self, index: int, account_id: str) -> Account:
        """The exact account in row ``index``."""
        positions = {
            symbol: Position(quantity=from_units(int(column[index])), cost=from_units(int(self.cost[symbol][index])))
            for symbol, column in self.quantity.items()
            if column[index] or self.cost[symbol][index]
        }
        return Account(account_id, from_units(int(self.balance[index])), positions)

    def rows(self, chosen: slice | NDArray[np.intp]) -> Chunk:
        """Some of the rows, at the same marks, without their place in the columns."""
        return Chunk(
            first_slot=-1,
            balance=self.balance[chosen],
            breach=self.breach[chosen],
            quantity={symbol: column[chosen] for symbol, column in self.quantity.items()},
            cost={symbol: column[chosen] for symbol, column in self.cost.items()},
            marks=self.marks,
        )

    def pieces(self, rows: int) -> Iterator[Chunk]:
        """All of it, so many rows at a time; one without rows has an empty piece."""
        for first in range(0, max(len(self), 1), rows):
            yield self.piece(first, rows)

    def piece(self, first: int, rows: int) -> Chunk:
        """So many rows from row ``first`` on, fewer at the end."""
        return replace(self.rows(slice(first, first + rows)), first_slot=self.first_slot + first)

    def indices_of(self, slots: Iterable[int]) -> NDArray[np.intp]:
        """The rows of those of ``slots`` that it has."""
        within = range(self.first_slot, self.first_slot + len(self))
        return np.array([slot - self.first_slot for slot in slots if slot in within], dtype=np.intp)

    def readable(self, quarantined: Iterable[int]) -> Flags:
        """Which rows are of accounts whose keys can be read: all but those in the slots ``quarantined``."""
        flags = np.ones(len(self), dtype=np.bool_)
        flags[self.indices_of(quarantined)] = False
        return flags

    def is_open(self) -> Flags:
        """Which rows have a position."""
        return self._holding(self.quantity)

    def is_unvalued(self) -> Flags:
        """Which rows have a position that has no mark: nothing is breached on a missing one."""
        return self._holding(self.quantity.keys() - self.marks.prices.keys())

    def _holding(self, symbols: Iterable[str]) -> Flags:
        flags = np.zeros(len(self), dtype=np.bool_)
        for symbol in symbols:
            flags |= self.quantity[symbol] != 0
        return flags

    def packed_row(self, index: int) -> bytes:
        """The row as it lies in the balance, quantity and cost columns, one after the other."""
        return b"".join(
            [UNIT.pack(self.balance[index])]
            + [UNIT.pack(column[symbol][index]) for symbol in self.quantity for column in (self.quantity, self.cost)]
        )


@dataclass(frozen=True, slots=True)
class ScreenedChunk:
    """What float64 says of a chunk. Verdicts are not made here: a flag says that Decimal has to look.

    ``may_be_candidate`` and ``may_be_restored`` miss no account; ``surely_candidate`` holds no account that is none. No
    row has a flag that is not ``near``.
    """

    chunk: Chunk
    near: NDArray[np.intp]
    in_breach: Flags
    surely_candidate: Flags
    may_be_candidate: Flags
    may_be_restored: Flags


@dataclass(slots=True)
class Sums:
    """Exact sums over accounts, as Python integers of 1e-8 and apart from any mark; int64 sums would wrap.

    ``in_breach`` counts accounts, and ``negative_equity`` those among the others that owe and have no position.
    """

    balance: int = 0
    in_breach: int = 0
    negative_equity: int = 0
    quantity_long: dict[str, int] = field(default_factory=dict)
    quantity_short: dict[str, int] = field(default_factory=dict)
    cost: dict[str, int] = field(default_factory=dict)

    def add(self, chunk: Chunk, *, times: int = 1) -> None:
        """Add every row of ``chunk``, or with ``times=-1`` take it away again."""
        self.balance += times * exact_sum(chunk.balance)
        in_breach = chunk.breach != 0
        owing = chunk.rows(np.flatnonzero((chunk.balance < 0) & ~in_breach))
        self.in_breach += times * int(np.count_nonzero(in_breach))
        self.negative_equity += times * int(np.count_nonzero(~owing.is_open()))
        for symbol, quantity in chunk.quantity.items():
            both, long = exact_sum(quantity), exact_sum(np.maximum(quantity, 0))
            for sums, units in (
                (self.quantity_long, long),
                (self.quantity_short, both - long),
                (self.cost, exact_sum(chunk.cost[symbol])),
            ):
                sums[symbol] = sums.get(symbol, 0) + times * units

    @exact
    def value(self, prices: Mapping[str, Decimal], contracts: Mapping[str, Contract]) -> Totals:
        """What the sums amount to at ``prices``; a symbol without a price counts its balances only."""
        long_notional = short_notional = unrealised = used = maintenance = Decimal(0)
        for symbol, price in prices.items():
            bought, sold = (
                margin.position_exposure(
                    quantity=from_units(quantities.get(symbol, 0)),
                    cost=cost,
                    mark_price=price,
                    initial_rate=contracts[symbol].initial_rate,
                    maintenance_rate=contracts[symbol].maintenance_rate,
                )
                for quantities, cost in (
                    (self.quantity_long, from_units(self.cost.get(symbol, 0))),
                    (self.quantity_short, Decimal(0)),
                )
            )
            both = bought + sold
            long_notional += bought.notional
            short_notional += sold.notional
            unrealised += both.unrealised_pnl
            used += both.used_margin
            maintenance += both.maintenance_margin
        return Totals(
            equity=from_units(self.balance) + unrealised,
            used_margin=used,
            maintenance_margin=maintenance,
            long_notional=long_notional,
            short_notional=short_notional,
        )


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over every account in USDT, exact."""

    equity: Decimal
    used_margin: Decimal
    maintenance_margin: Decimal
    long_notional: Decimal
    short_notional: Decimal


def near_rows(chunk: Chunk, contracts: Mapping[str, Contract]) -> NDArray[np.intp]:
    """The rows in breach, those that may be candidates, and a few others: there is one room for all rows of a block.

    A block at a time: what is computed of it stays in the processor's cache.
    """
    found = [NO_ROWS]
    for block in chunk.pieces(SCREEN_BLOCK_ROWS):
        valued, magnitude = value_rows(block, contracts, one_magnitude=True)
        near = (block.breach != 0) | _may_be_candidate(valued, room_for(magnitude, contracts))
        found.append(np.flatnonzero(near) + (block.first_slot - chunk.first_slot))
    return np.concatenate(found)


def screen(
    chunk: Chunk, contracts: Mapping[str, Contract], *, restore_at: str, near: NDArray[np.intp] | None = None
) -> ScreenedChunk:
    """Flag the rows of ``chunk`` at its marks, with room for what float64 rounds away.

    The first look is that of ``near_rows``; somebody who keeps the rows may have had it already (:mod:`app.headroom`).
    The second, at the rows found ``near``, leaves each its own room.
    """
    near = near_rows(chunk, contracts) if near is None else near
    in_breach, may_be_candidate, surely_candidate, may_be_restored = (
        np.zeros(len(chunk), dtype=np.bool_) for _ in range(4)
    )
    in_breach[near] = chunk.breach[near] != 0
    rows = near[~chunk.rows(near).is_unvalued()]
    valued, magnitude = value_rows(chunk.rows(rows), contracts)
    room, exposure = room_for(magnitude, contracts), valued.exposure
    may_be_candidate[rows] = _may_be_candidate(valued, room)
    surely_candidate[rows] = margin.is_candidate(
        notional=exposure.notional, equity=valued.equity + room, maintenance_margin=exposure.maintenance_margin
    )
    may_be_restored[rows] = in_breach[rows] & margin.is_restored(
        notional=exposure.notional,
        equity=valued.equity + room,
        restore_margin=exposure.used_margin if restore_at == "initial" else exposure.maintenance_margin,
    )
    return ScreenedChunk(
        chunk,
        near,
        in_breach=in_breach,
        surely_candidate=surely_candidate,
        may_be_candidate=may_be_candidate,
        may_be_restored=may_be_restored,
    )


def value_rows(
    chunk: Chunk, contracts: Mapping[str, Contract], *, one_magnitude: bool = False
) -> tuple[AccountMargin[Column], Column]:
    """Every row in float64, in USDT, and the sum of what was added up for it, or one that no row's exceeds.

    A symbol without a mark is left out.
    """
    size: Callable[[Column], Any] = largest if one_magnitude else np.abs
    balance = in_usdt(chunk.balance)
    magnitude, exposure = size(balance), None
    for symbol, price in chunk.marks.prices.items():
        cost = in_usdt(chunk.cost[symbol])
        here: Exposure[Column] = margin.position_exposure(
            quantity=in_usdt(chunk.quantity[symbol]),
            cost=cost,
            mark_price=for_every_row(price),
            initial_rate=for_every_row(contracts[symbol].initial_rate),
            maintenance_rate=for_every_row(contracts[symbol].maintenance_rate),
        )
        exposure = here if exposure is None else exposure + here
        magnitude = magnitude + size(here.notional) + size(cost)
    if exposure is None:
        zeros = np.zeros(len(chunk))
        exposure = Exposure(zeros, zeros, zeros, zeros)
    return AccountMargin(balance=balance, exposure=exposure), magnitude


def _may_be_candidate(valued: AccountMargin[Column], room: Column) -> Flags:
    return margin.is_candidate(
        notional=valued.exposure.notional,
        equity=valued.equity - room,
        maintenance_margin=valued.exposure.maintenance_margin,
    )


def room_for(magnitude: Column, contracts: Mapping[str, Contract]) -> Column:
    """How far float64 may be off where so much was added up."""
    return magnitude * (ROUNDING_ERROR_RELATIVE * len(contracts))


def in_usdt(units: NDArray[np.int64]) -> Column:
    """Units of 1e-8 as float64; quantities become coins."""
    return units.astype(np.float64) / UNITS_PER_ONE


def largest(column: Column) -> float:
    """The largest absolute value."""
    return max(float(column.max()), -float(column.min())) if len(column) else 0.0


async def read_marks(client: Redis, contracts: Mapping[str, Contract]) -> Marks:
    """The marks as they are now."""
    async with client.pipeline(transaction=True) as pipeline:
        _ask_for_marks(pipeline, list(contracts))
        answer = await pipeline.execute()
    return marks_from(answer, contracts)


async def read_chunk(client: Redis, first_slot: int, count: int, contracts: Mapping[str, Contract]) -> Chunk:
    """Rows ``first_slot`` to ``first_slot + count``, fewer at the end, with the marks of the same moment.

    Raises ``ColumnsShort``.
    """
    symbols, columns = list(contracts), column_names(contracts)
    async with client.pipeline(transaction=True) as pipeline:
        _ask_for_marks(pipeline, symbols)
        pipeline.llen(keys.ACCOUNTS)
        for column in columns:
            pipeline.getrange(column, first_slot * UNIT.size, (first_slot + count) * UNIT.size - 1)
        answer = await pipeline.execute()
    accounts, *packed_columns = answer[_MARK_ANSWERS + len(symbols) :]
    rows = max(0, min(count, int(accounts) - first_slot))
    found = [_column(name, packed, rows) for name, packed in zip(columns, packed_columns, strict=True)]
    return chunk_of(found, first_slot, contracts, marks_from(answer, contracts))


def column_names(symbols: Iterable[str]) -> list[str]:
    """The keys of all columns, in the order in which they are read."""
    columns = [keys.COLUMN_BALANCE, keys.COLUMN_BREACH]
    for symbol in symbols:
        columns += [keys.quantity_column(symbol), keys.cost_column(symbol)]
    return columns


def chunk_of(columns: Sequence[NDArray[np.int64]], first_slot: int, symbols: Iterable[str], marks: Marks) -> Chunk:
    """The chunk whose ``columns`` are those of ``column_names``."""
    balance, breach, *per_symbol = columns
    return Chunk(
        first_slot=first_slot,
        balance=balance,
        breach=breach,
        quantity=dict(zip(symbols, per_symbol[::2], strict=True)),
        cost=dict(zip(symbols, per_symbol[1::2], strict=True)),
        marks=marks,
    )


async def read_chunks(client: Redis, contracts: Mapping[str, Contract], *, chunk_accounts: int) -> AsyncIterator[Chunk]:
    """Every account, chunk by chunk, each with the marks of its own moment; an empty system has one empty chunk."""
    first_slot = 0
    while True:
        chunk = await read_chunk(client, first_slot, chunk_accounts, contracts)
        if len(chunk) or not first_slot:
            yield chunk
        if len(chunk) < chunk_accounts:
            return
        first_slot += chunk_accounts


async def account_names(client: Redis, slots: Sequence[int]) -> list[str]:
    """The account in each of ``slots``, in their order. Raises ``StateMissing`` when such a slot is gone."""
    return [keys.as_text(name) for name in await packed_names(client, slots)]


async def packed_names(client: Redis, slots: Sequence[int]) -> Sequence[bytes]:
    """``account_names`` as they lie in Redis: a report of every account has no need of a text for each."""
    if not slots:
        return []
    together = isinstance(slots, range)
    first, last = (slots[0], slots[-1]) if together else (min(slots), max(slots))
    if last - first < NAMES_SKIPPED_MAX * len(slots):
        names = await client.lrange(keys.ACCOUNTS, first, last)
        if together and len(names) == len(slots):
            return names  # type: ignore[return-value]  # redis-py's types allow for texts
        found = [names[slot - first] if slot - first < len(names) else None for slot in slots]
    else:
        async with client.pipeline(transaction=False) as pipeline:
            for slot in slots:
                pipeline.lindex(keys.ACCOUNTS, slot)
            found = await pipeline.execute()
    known = [name for name in found if name is not None]
    if len(known) < len(slots):
        raise errors.StateMissing("the state was emptied while it was read", reason="state_missing")
    return known  # type: ignore[return-value]  # redis-py's types allow for texts


async def quarantined_slots(client: Redis) -> tuple[dict[int, str], list[str]]:
    """The accounts in quarantine by slot, and those made by hand that have none."""
    names = [keys.as_text(name) for name in await client.hkeys(keys.QUARANTINED)]
    async with client.pipeline(transaction=False) as pipeline:
        for name in names:
            pipeline.hget(keys.ledger_key(name), "slot")
        slots = await pipeline.execute(raise_on_error=False)
    by_slot, without_slot = {}, []
    for name, slot in zip(names, slots, strict=True):
        if isinstance(slot, bytes) and slot.isdigit():
            by_slot[int(slot)] = name
        elif (found := await client.lpos(keys.ACCOUNTS, name)) is not None:
            by_slot[int(found)] = name  # type: ignore[arg-type]  # one position, as no count was asked for
        else:
            without_slot.append(name)
    return by_slot, without_slot


_MARK_ANSWERS: Final = 3
"""Redis TIME, the epoch, and the texts; after them comes one answer for each symbol."""


def _ask_for_marks(pipeline: Redis, symbols: Sequence[str]) -> None:
    pipeline.time()
    pipeline.hget(keys.STATE_EPOCH, "epoch")
    pipeline.mget([*(keys.mark_price_key(symbol) for symbol in symbols), keys.MARK_VERSION])
    for symbol in symbols:
        pipeline.hmget(keys.mark_key(symbol), "price", "timestamp")


def marks_from(answer: Sequence[Any], contracts: Mapping[str, Contract]) -> Marks:
    """The marks in the answers to ``_ask_for_marks``, which come first; a script answers in the same form.

    Raises ``StateDamaged``.
    """
    (seconds, microseconds), epoch, (*texts, version) = answer[:_MARK_ANSWERS]
    if version is not None and not version.isdigit():
        raise errors.StateDamaged("the key mark:version is not a whole number", reason="state_damaged")
    prices, timestamps, by_hand = {}, {}, []
    accepted_marks = answer[_MARK_ANSWERS : _MARK_ANSWERS + len(contracts)]
    for text, (accepted, timestamp), (symbol, contract) in zip(texts, accepted_marks, contracts.items(), strict=True):
        price = parse_mark(text, contract)
        if price is None:
            continue
        known = timestamp is not None and timestamp.isdigit()
        prices[symbol] = price
        timestamps[symbol] = int(timestamp) if known else 0
        if text != accepted or not known:
            by_hand.append(symbol)
    return Marks(
        prices=prices,
        timestamps_us=timestamps,
        version=int(version or 0),
        by_hand=tuple(by_hand),
        read_at_us=seconds * 1_000_000 + microseconds,
        epoch=keys.as_text(epoch or b""),
    )


def for_every_row(value: Decimal) -> Column:
    """One value that numpy pairs with every row of a column."""
    return np.array(float(value))


def exact_sum(column: NDArray[np.int64]) -> int:
    """The sum as a Python integer. That of int64 wraps, but is right up to a multiple of 2**64, and float64 says which.

    The float is off by less than 2**63: a chunk adds up to less than 2**90, of which it loses less than 2**-40.
    """
    wrapped = int(column.sum())
    return wrapped + (round((float(column.sum(dtype=np.float64)) - wrapped) / 2**64) << 64)


def _column(name: str, packed: bytes, rows: int) -> NDArray[np.int64]:
    """A column of ``rows`` values. Raises ``ColumnsShort`` for one that ends early: nobody may be judged by it."""
    if len(packed) < rows * UNIT.size:
        raise errors.ColumnsShort(f"{name} was lost; it is made anew", reason="columns")
    return np.frombuffer(packed, dtype=INT64, count=rows)
