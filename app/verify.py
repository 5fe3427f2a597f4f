"""``plimsoll verify``: fold history per account and compare it with Redis to the last digit."""

from __future__ import annotations

import asyncio
import heapq
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine

from app import database, errors
from app import redis_client as keys
from app.booking import Booking
from app.config import Settings
from app.contracts import Contract
from app.models import HISTORY, Adjustment, HistoryRow, Liquidation, Recovery, Trade, Transfer
from app.numbers import exact, format_decimal
from app.outbox import Outbox
from app.records import UNIT, RecordError, Snapshot
from app.redis_client import StateStore
from app.schemas import IDENTIFIER_PATTERN
from app.services import trading
from app.services.margin import unrealised_pnl
from app.services.trading import Account, Position

if TYPE_CHECKING:
    from app.embedded import Stores

ATTEMPTS_MAX: Final = 4
"""An account that trades while it is verified may differ for a moment; it is looked at again this often."""

RETRY_SECONDS: Final = 0.5
ACCOUNTS_PER_READ: Final = 500
ROWS_PER_READ: Final = 5_000


Found = Snapshot | errors.AccountQuarantined
"""An account as Redis has it, or why it cannot be read."""


@dataclass(slots=True)
class Verification:
    """How many accounts and rows of history were compared, and a sentence for each difference."""

    accounts: int = 0
    rows: int = 0
    differences: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Fold:
    """What the history of one account adds up to, and what is wrong with that history itself."""

    account: Account
    seq: int = 0
    breach: int | None = None
    rows: int = 0
    faults: list[str] = field(default_factory=list)

    @exact
    def add(self, row: HistoryRow) -> None:
        """Apply the next row by seq, recomputing what it claims."""
        self.rows += 1
        if row.seq != self.seq + 1:
            missing = row.seq > self.seq + 1
            self.faults.append(
                f"history row {self.seq + 1} is missing before id {row.id}"
                if missing
                else f"history row {row.seq} is there twice, again as id {row.id}"
            )
        self.seq = row.seq
        match row:
            case Trade():
                self._add_trade(row)
            case Transfer():
                self._add_transfer(row)
            case Adjustment():
                self._add_adjustment(row)
            case Liquidation():
                self._add_liquidation(row)
            case Recovery():
                self._add_recovery(row)

    def _add_trade(self, row: Trade) -> None:
        signed = row.quantity if row.side == "buy" else -row.quantity
        fill = trading.apply_trade(self.account.position(row.symbol), signed_quantity=signed, price=row.price)
        positions = {**self.account.positions, row.symbol: fill.position}
        if not fill.position.quantity:
            del positions[row.symbol]
        self.account = replace(self.account, balance=self.account.balance + fill.realised_pnl, positions=positions)
        self._claim(row, "realised_pnl", row.realised_pnl, fill.realised_pnl)
        self._claim(row, "balance", row.balance_after, self.account.balance)
        self._claim(row, "quantity", row.quantity_after, fill.position.quantity)
        self._claim(row, "cost", row.cost_after, fill.position.cost)

    def _add_transfer(self, row: Transfer) -> None:
        signed = row.amount if row.kind == "deposit" else -row.amount
        self.account = replace(self.account, balance=self.account.balance + signed)
        self._claim(row, "balance", row.balance_after, self.account.balance)

    def _add_adjustment(self, row: Adjustment) -> None:
        self._claim(row, "balance before", row.balance_before, self.account.balance)
        if _positions(row.positions_before) != self.account.positions:
            self.faults.append(f"adjustment {row.id} starts from positions that history does not have")
        self.account = replace(self.account, balance=row.balance_after, positions=_positions(row.positions_after))

    def _add_liquidation(self, row: Liquidation) -> None:
        if self.breach is not None:
            self.faults.append(f"liquidation {row.id} opens a breach while {self.breach} is open")
        self.breach = row.id
        self._claim(row, "balance", row.balance, self.account.balance)
        if _positions(row.positions) != self.account.positions:
            self.faults.append(f"liquidation {row.id} judged positions that history does not have")
            return
        unrealised = sum(
            (
                unrealised_pnl(quantity=held.quantity, cost=held.cost, mark_price=Decimal(row.marks[symbol]))
                for symbol, held in self.account.positions.items()
            ),
            start=Decimal(0),
        )
        self._claim(row, "equity", row.equity, self.account.balance + unrealised)
        # By the row's own maintenance margin: the rates may have changed since.
        if not row.equity < row.maintenance_margin:
            self.faults.append(f"liquidation {row.id}: equity was not below the maintenance margin")

    def _add_recovery(self, row: Recovery) -> None:
        if row.liquidation_id != self.breach:
            self.faults.append(f"recovery {row.id} ends breach {row.liquidation_id}, open is {self.breach}")
        self.breach = None

    def _claim(self, row: HistoryRow, name: str, claimed: Decimal, computed: Decimal) -> None:
        if claimed != computed:
            self.faults.append(
                f"row {row.id} claims {name} {format_decimal(claimed)}, history makes it {format_decimal(computed)}"
            )


def verify(settings: Settings, stores: Stores) -> Verification:
    """Compare every account of Redis and of history. Raises the stores' errors, and ``StateMissing``."""
    return asyncio.run(_verify(settings, stores))


async def _verify(settings: Settings, stores: Stores) -> Verification:
    store, engine = StateStore(stores.redis_url, settings), database.create_maintenance_engine(stores.database_url)
    outbox = Outbox(store, engine, settings)
    booking = Booking(store, outbox, settings)
    result = Verification()
    try:
        await outbox.drain()
        snapshots: dict[str, Found] = {}
        names = await _account_names(store)
        for start in range(0, len(names), ACCOUNTS_PER_READ):
            some = names[start : start + ACCOUNTS_PER_READ]
            snapshots.update(zip(some, await _read(booking, some), strict=True))
        result.accounts = len(snapshots)
        suspects: dict[str, list[str]] = {}
        async for fold in _folds(engine):
            result.rows += fold.rows
            known = snapshots.pop(fold.account.account_id, None)
            result.accounts += known is None
            if faults := compare(fold, known, booking.contracts):
                suspects[fold.account.account_id] = faults
        for name, snapshot in snapshots.items():
            if faults := compare(Fold(Account(name, Decimal(0))), snapshot, booking.contracts):
                suspects[name] = faults
        suspects = await _look_again(suspects, booking, outbox, engine)
        result.differences += [f"{name}: {fault}" for name, faults in sorted(suspects.items()) for fault in faults]
        faults = await _count_faults(store, engine, booking.contracts)
        for _ in range(ATTEMPTS_MAX if faults else 0):
            await asyncio.sleep(RETRY_SECONDS)
            await outbox.drain()
            faults = await _count_faults(store, engine, booking.contracts)
        result.differences += faults
    finally:
        await store.close()
        await engine.dispose()
    return result


def compare(fold: Fold, found: Found | None, contracts: Mapping[str, Contract]) -> list[str]:
    """What differs between an account's history and its keys, one sentence each."""
    faults = list(fold.faults)
    if isinstance(found, errors.AccountQuarantined):
        return [*faults, found.detail]
    if found is None or not found.exists:
        return [*faults, "is in history and not in Redis"]
    if found.seq != fold.seq:
        faults.append(f"Redis counts {found.seq} rows of history, Postgres has {fold.seq}")
    try:
        account = found.account(contracts)
    except RecordError as error:
        return [*faults, str(error)]
    if account.balance != fold.account.balance:
        faults.append(
            f"balance is {format_decimal(account.balance)} in Redis, history makes it "
            f"{format_decimal(fold.account.balance)}"
        )
    for symbol in sorted({*account.positions, *fold.account.positions}):
        held, folded = account.position(symbol), fold.account.position(symbol)
        if held != folded:
            faults.append(
                f"{symbol} is {format_decimal(held.quantity)} at cost {format_decimal(held.cost)} in Redis, history "
                f"makes it {format_decimal(folded.quantity)} at cost {format_decimal(folded.cost)}"
            )
    if found.known_account() != fold.account:
        faults.append("its ledger differs from history")
    if not found.packed_agrees():
        faults.append("its row in the columns differs from its ledger")
    elif not found.agrees(account):
        faults.append("its keys are not written as Plimsoll writes them (an average price or a number edited by hand)")
    open_breach = found.breach.id if found.breach else None
    if open_breach != fold.breach:
        faults.append(f"open breach is {open_breach} in Redis, {fold.breach} in history")
    return faults


async def _look_again(
    suspects: Mapping[str, list[str]], booking: Booking, outbox: Outbox, engine: AsyncEngine
) -> dict[str, list[str]]:
    """The faults that stay when accounts are read again in an order that lets them move meanwhile.

    History up to a seq is complete once the outbox was drained after Redis was read, and never ahead of what Redis
    says afterwards.
    """
    remaining = dict(suspects)
    for _ in range(ATTEMPTS_MAX - 1):
        if not remaining:
            break
        await asyncio.sleep(RETRY_SECONDS)
        names = sorted(remaining)
        before = await _read(booking, names)
        await outbox.drain()
        histories = [await _account_history(engine, name) for name in names]
        after = await _read(booking, names)
        remaining = {}
        for name, first, rows, second in zip(names, before, histories, after, strict=True):
            fold = Fold(Account(name, Decimal(0)))
            moved = isinstance(first, Snapshot) and isinstance(second, Snapshot) and first.seq < second.seq
            for row in rows:
                if not (moved and isinstance(first, Snapshot) and row.seq > first.seq):
                    fold.add(row)
            if faults := compare(fold, first, booking.contracts):
                remaining[name] = faults
    return remaining


async def _read(booking: Booking, names: Sequence[str]) -> list[Found]:
    answers = await asyncio.gather(*(booking.read(name) for name in names), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, errors.AccountQuarantined):
            raise answer
    return list(answers)  # type: ignore[arg-type]  # every other exception was raised above


async def _account_names(store: StateStore) -> list[str]:
    """Every account that has a slot or a balance key."""
    names = {keys.as_text(name) for name in await store.client.lrange(keys.ACCOUNTS, 0, -1)}
    async for key in store.client.scan_iter(match=keys.BALANCE_PATTERN, count=5_000):
        name = keys.as_text(key).removeprefix("account:").removesuffix(":balance")
        if re.fullmatch(IDENTIFIER_PATTERN, name):
            names.add(name)
    return sorted(names)


async def _count_faults(store: StateStore, engine: AsyncEngine, contracts: Mapping[str, Contract]) -> list[str]:
    """What differs between the counters in Redis and what they count."""
    faults = []
    for key, model in ((keys.LIQUIDATIONS, Liquidation), (keys.RECOVERIES, Recovery)):
        async with engine.connect() as connection:
            recorded = await connection.scalar(select(func.count()).select_from(model)) or 0
        counted = keys.as_text(await store.client.get(key) or b"0")
        if counted != str(recorded):
            faults.append(f"{key}: is {counted} in Redis, history has {recorded} rows")
    for symbol in contracts:
        packed: Any = await store.client.get(keys.quantity_column(symbol)) or b""
        opened = sum(quantity != 0 for (quantity,) in UNIT.iter_unpack(packed))
        key = keys.open_positions_key(symbol)
        counted = keys.as_text(await store.client.get(key) or b"0")
        if counted != str(opened):
            faults.append(f"{key}: is {counted}, {opened} accounts have a position")
    return faults


async def _folds(engine: AsyncEngine) -> AsyncIterator[Fold]:
    """The fold of each account in history, one account at a time."""
    fold: Fold | None = None
    async for row in _all_history(engine):
        if fold is None or fold.account.account_id != row.account_id:
            if fold is not None:
                yield fold
            fold = Fold(Account(row.account_id, Decimal(0)))
        fold.add(row)
    if fold is not None:
        yield fold


async def _all_history(engine: AsyncEngine) -> AsyncIterator[HistoryRow]:
    """Every row of every kind by (account, seq), merged from sorted cursors, a bounded number at a time."""
    streams = [_table(engine, model) for model in HISTORY.values()]
    heads: list[tuple[str, int, int, HistoryRow]] = []
    for index, stream in enumerate(streams):
        if (row := await anext(stream, None)) is not None:
            heapq.heappush(heads, (row.account_id, row.seq, index, row))
    while heads:
        _, _, index, row = heapq.heappop(heads)
        yield row
        if (following := await anext(streams[index], None)) is not None:
            heapq.heappush(heads, (following.account_id, following.seq, index, following))


async def _table(engine: AsyncEngine, model: type[HistoryRow]) -> AsyncIterator[Any]:
    # Sorted byte by byte, as Python compares, whatever the database's own collation is.
    query = select(model).order_by(model.account_id.collate("C"), model.seq, model.id)
    async with database.create_sessions(engine)() as session:
        rows = await session.stream_scalars(query.execution_options(yield_per=ROWS_PER_READ))
        async for row in rows:
            yield row


async def _account_history(engine: AsyncEngine, account_id: str) -> list[HistoryRow]:
    rows: list[HistoryRow] = []
    async with database.create_sessions(engine)() as session:
        for model in HISTORY.values():
            rows += (await session.scalars(select(model).where(model.account_id == account_id))).all()
    return sorted(rows, key=lambda row: (row.seq, row.id))


def _positions(shown: Mapping[str, Mapping[str, str]]) -> dict[str, Position]:
    return {
        symbol: Position(quantity=Decimal(item["quantity"]), cost=Decimal(item["cost"]))
        for symbol, item in shown.items()
    }
