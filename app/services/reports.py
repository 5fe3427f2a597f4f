"""What is shown of accounts: one account whole, and the margin report of all of them, a piece at a time.

Everything here is computed from the record or its packed copy at the marks of one read. Nothing is written.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any, Final, Literal

import numpy as np
import orjson

from app.columns import Chunk, Marks, ScreenedChunk, Sums, screen, value_rows
from app.contracts import Contract
from app.history import timestamp_text
from app.numbers import exact, format_decimal
from app.records import OpenBreach
from app.services import margin, trading
from app.services.margin import AccountMargin
from app.services.report_rows import encode_rows
from app.services.trading import Account, RestoreAt

ACCOUNTS_PER_PIECE: Final = 8_192
"""How many accounts are encoded together: their characters are 3 MB, and other requests wait for 3 ms."""

CANDIDATES_AT_ONCE: Final = 200
"""So many are looked up in one call of Redis."""

ALONE_AT_ONCE: Final = 50
"""Of those that are encoded one by one, so many take 3 ms too."""

Order = Literal["slot", "margin_ratio"]
AccountState = Literal["ok", "candidate", "recovering", "negative_equity", "quarantined"]
ACCOUNT_STATES: Final[tuple[AccountState, ...]] = ("ok", "candidate", "recovering", "negative_equity", "quarantined")


def account_state(account: Account, *, candidate: bool, in_breach: bool) -> AccountState:
    """The state of an account that can be read."""
    if candidate:
        return "candidate"
    if in_breach:
        return "recovering"
    if not account.positions and account.balance < 0:
        return "negative_equity"
    return "ok"


def value_account(
    account: Account, *, contracts: Mapping[str, Contract], prices: Mapping[str, Decimal]
) -> AccountMargin[Decimal] | None:
    """The account's margin at ``prices``, or None where an open position has no mark."""
    if any(symbol not in prices for symbol in account.positions):
        return None
    return trading.account_margin(account, contracts=contracts, prices=prices)


@exact
def account_summary(account: Account, valued: AccountMargin[Decimal] | None, *, in_breach: bool) -> dict[str, Any]:
    """The members that an account has wherever it is shown."""
    candidate = valued is not None and trading.is_candidate(valued)
    summary: dict[str, Any] = {
        "account_id": account.account_id,
        "state": account_state(account, candidate=candidate, in_breach=in_breach),
        "candidate": candidate,
        "balance": format_decimal(account.balance),
    }
    if valued is None:
        return {**summary, **_NOT_VALUED}
    equity, notional = valued.equity, valued.exposure.notional
    return {
        **summary,
        "equity": format_decimal(equity),
        "used_margin": format_decimal(valued.used_margin),
        "maintenance_margin": format_decimal(valued.maintenance_margin),
        "free_margin": format_decimal(valued.free_margin),
        "margin_utilisation": _optional(
            margin.margin_ratio(equity=equity, notional=notional, margin=valued.used_margin)
        ),
        "margin_ratio": _optional(
            margin.margin_ratio(equity=equity, notional=notional, margin=valued.maintenance_margin)
        ),
    }


_NOT_VALUED: Final[dict[str, None]] = dict.fromkeys(
    ("equity", "used_margin", "maintenance_margin", "free_margin", "margin_utilisation", "margin_ratio")
)


def quarantined_summary(account_id: str) -> dict[str, Any]:
    """An account whose keys cannot be read: nothing is said of it that might be wrong."""
    return {
        "account_id": account_id,
        "state": "quarantined",
        "candidate": False,
        "balance": None,
        **_NOT_VALUED,
    }


def account_report(
    account: Account,
    *,
    contracts: Mapping[str, Contract],
    prices: Mapping[str, Decimal],
    breach: OpenBreach | None,
    restore_at: RestoreAt,
) -> dict[str, Any]:
    """One account with its positions, at ``prices``."""
    valued = value_account(account, contracts=contracts, prices=prices)
    report = account_summary(account, valued, in_breach=breach is not None)
    if breach is not None:
        restored_at = None
        if valued is not None:
            restored_at = format_decimal(valued.used_margin if restore_at == "initial" else valued.maintenance_margin)
        report["open_breach"] = {
            "id": breach.id,
            "since": timestamp_text(breach.since_us),
            "restored_at_equity": restored_at,
        }
    report["positions"] = [
        _position_report(account, symbol, contracts=contracts, prices=prices) for symbol in account.positions
    ]
    return report


@exact
def _position_report(
    account: Account, symbol: str, *, contracts: Mapping[str, Contract], prices: Mapping[str, Decimal]
) -> dict[str, Any]:
    position, contract, mark_price = account.positions[symbol], contracts[symbol], prices.get(symbol)
    shown: dict[str, Any] = {
        "symbol": symbol,
        "quantity": format_decimal(position.quantity),
        "avg_price": format_decimal(margin.average_price(quantity=position.quantity, cost=position.cost)),
        "mark_price": None,
        "notional": None,
        "unrealised_pnl": None,
        "liquidation_price": None,
    }
    if mark_price is None:
        return shown
    others = {other: held for other, held in account.positions.items() if other != symbol}
    shown["mark_price"] = format_decimal(mark_price)
    shown["notional"] = format_decimal(margin.notional(quantity=position.quantity, mark_price=mark_price))
    shown["unrealised_pnl"] = format_decimal(
        margin.unrealised_pnl(quantity=position.quantity, cost=position.cost, mark_price=mark_price)
    )
    if all(other in prices for other in others):
        shown["liquidation_price"] = _optional(
            margin.liquidation_price(
                quantity=position.quantity,
                cost=position.cost,
                maintenance_rate=contract.maintenance_rate,
                balance=account.balance,
                other=trading.exposure_of(others, contracts=contracts, prices=prices),
            )
        )
    return shown


@dataclass(frozen=True, slots=True)
class ReportRequest:
    """Which accounts of the report to show: at most ``limit`` after ``cursor`` (None: all), in ``order``."""

    limit: int | None
    cursor: str | None
    order: Order


@dataclass(frozen=True, slots=True)
class ReportSource:
    """What a report is made of: the packed rows and marks of one read, and who is in quarantine.

    ``quarantined`` maps a slot to its account; ``quarantined_without_slot`` are accounts made by hand that could not
    be read. ``names`` looks up the accounts in some slots.
    """

    chunks: Sequence[Chunk]
    marks: Marks
    quarantined: Mapping[int, str]
    quarantined_without_slot: Sequence[str]
    names: Callable[[Sequence[int]], Awaitable[Sequence[bytes]]]
    contracts: Mapping[str, Contract]
    restore_at: RestoreAt


async def margin_report(
    source: ReportSource, request: ReportRequest, head: Mapping[str, Any]
) -> AsyncIterator[bytes | memoryview]:
    """The report as JSON, in pieces: ``head``, totals, candidates first and whole, then the accounts asked for.

    Raises ``ValueError`` at once for a cursor that this order does not give out.
    """
    rows = _Rows(source)
    slots, next_cursor = rows.page(request)
    candidates = [shown async for shown in rows.shown(rows.candidate_slots()) if shown["candidate"]]
    opening = orjson.dumps({**head, "totals": rows.totals(candidates), "liquidation_candidates": candidates})
    yield opening[:-1] + b',"accounts":['
    before = 1  # the comma before the first account
    async with aclosing(rows.encoded(slots)) as pieces:
        async for piece in pieces:
            yield memoryview(piece)[before:]
            before = 0
    yield b'],"next_cursor":' + orjson.dumps(next_cursor) + b"}"


class _Rows:
    """Every packed row of one read, by slot, valued at the marks of the report."""

    def __init__(self, source: ReportSource) -> None:
        self._source = source
        self._starts = [chunk.first_slot for chunk in source.chunks]
        self._chunks = [replace(chunk, marks=source.marks) for chunk in source.chunks]

    def candidate_slots(self) -> list[int]:
        """The slots in which Decimal may find a candidate."""
        return [
            chunk.first_slot + int(index)
            for chunk in self._chunks
            for index in np.flatnonzero(self._screened(chunk).may_be_candidate)
            if chunk.first_slot + int(index) not in self._source.quarantined
        ]

    def _screened(self, chunk: Chunk) -> ScreenedChunk:
        return screen(chunk, self._source.contracts, restore_at=self._source.restore_at)

    def page(self, request: ReportRequest) -> tuple[Sequence[int], str | None]:
        """The slots to show, and the cursor of the page after them."""
        ordered = self._by_margin_ratio(request) if request.order == "margin_ratio" else self._by_slot(request)
        if request.limit is None or len(ordered) <= request.limit:
            return ordered, None
        page = ordered[: request.limit]
        last = int(page[-1])
        return page, f"{self._ratio(last)!r}:{last}" if request.order == "margin_ratio" else str(last)

    async def shown(self, slots: Sequence[int]) -> AsyncIterator[dict[str, Any]]:
        """The accounts in ``slots``, as they are shown, a bounded number of names at a time."""
        for first in range(0, len(slots), CANDIDATES_AT_ONCE):
            some = [int(slot) for slot in slots[first : first + CANDIDATES_AT_ONCE]]
            for shown in orjson.loads(b"[" + (await self._encode(some))[1:] + b"]"):
                yield shown

    async def encoded(self, slots: Sequence[int]) -> AsyncGenerator[bytes | bytearray]:
        """The accounts in ``slots`` as JSON, each after a comma, some thousands at a time."""
        for first in range(0, len(slots), ACCOUNTS_PER_PIECE):
            piece = slots[first : first + ACCOUNTS_PER_PIECE]
            yield await self._encode(piece if isinstance(piece, range) else [int(slot) for slot in piece])

    async def _encode(self, slots: Sequence[int]) -> bytes | bytearray:
        """Some accounts as JSON: most of them together, those in quarantine or not plain one by one.

        In the loop's own thread: numpy's calls are so short here that two threads would spend as much again on waiting
        for each other.
        """
        names = await self._source.names(slots)
        encoded = encode_rows(self._take(slots), names, contracts=self._source.contracts)
        alone = ~encoded.plain
        if self._source.quarantined:
            alone |= np.isin(slots, list(self._source.quarantined))
        if not alone.any():
            return encoded.text(0, len(slots))
        parts: list[bytes | bytearray] = []
        first = 0
        for number, index in enumerate([*np.flatnonzero(alone).tolist(), len(slots)]):
            if number % ALONE_AT_ONCE == ALONE_AT_ONCE - 1:
                await asyncio.sleep(0)
            if index > first:
                parts.append(encoded.text(first, index))
            if index < len(slots):
                parts += [b",", orjson.dumps(self._shape(slots[index], names[index]))]
            first = index + 1
        return b"".join(parts)

    def _take(self, slots: Sequence[int]) -> Chunk:
        """The rows in ``slots``, in their order, at the marks of the report."""
        chunk, first = self._at(slots[0])
        if isinstance(slots, range) and first + len(slots) <= len(chunk):
            return replace(chunk.rows(slice(first, first + len(slots))), marks=self._source.marks)
        wanted = np.array(slots)
        numbers = np.searchsorted(self._starts, wanted, side="right") - 1
        taken = [
            self._source.chunks[number].rows(wanted[numbers == number] - self._starts[number])
            for number in np.unique(numbers)
        ]
        back = np.argsort(np.argsort(numbers, kind="stable"), kind="stable")
        symbols = self._source.contracts
        return Chunk(
            first_slot=-1,
            balance=np.concatenate([rows.balance for rows in taken])[back],
            breach=np.concatenate([rows.breach for rows in taken])[back],
            quantity={symbol: np.concatenate([rows.quantity[symbol] for rows in taken])[back] for symbol in symbols},
            cost={symbol: np.concatenate([rows.cost[symbol] for rows in taken])[back] for symbol in symbols},
            marks=self._source.marks,
        )

    def totals(self, candidates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Exact sums, and how many accounts are in each state."""
        sums, left_out = Sums(), Sums()
        states: Counter[str] = Counter(
            candidate=len(candidates),
            quarantined=len(self._source.quarantined) + len(self._source.quarantined_without_slot),
        )
        readable = -len(self._source.quarantined)
        for chunk in self._source.chunks:
            sums.add(chunk)
            left_out.add(chunk.rows(chunk.indices_of(self._source.quarantined)))
            readable += len(chunk)
        candidates_in_breach = sum(1 for shown in candidates if shown["open_breach_id"])
        states["recovering"] = sums.in_breach - left_out.in_breach - candidates_in_breach
        states["negative_equity"] = sums.negative_equity - left_out.negative_equity
        states["ok"] = readable - states["candidate"] - states["recovering"] - states["negative_equity"]
        totals = sums.value(self._source.marks.prices, self._source.contracts)
        return {
            "equity": format_decimal(totals.equity),
            "used_margin": format_decimal(totals.used_margin),
            "maintenance_margin": format_decimal(totals.maintenance_margin),
            "long_notional": format_decimal(totals.long_notional),
            "short_notional": format_decimal(totals.short_notional),
            "shortfall": format_decimal(_shortfall(candidates)),
            "accounts": {state: states[state] for state in ACCOUNT_STATES},
        }

    def _shape(self, slot: int, packed_name: bytes) -> dict[str, Any]:
        chunk, index = self._at(slot)
        name, breach = packed_name.decode(errors="replace"), int(chunk.breach[index])
        if slot in self._source.quarantined:
            shown = quarantined_summary(name)
        else:
            account = chunk.account(index, name)
            valued = value_account(account, contracts=self._source.contracts, prices=self._source.marks.prices)
            shown = account_summary(account, valued, in_breach=bool(breach))
        shown["open_breach_id"] = breach or None
        return shown

    def _at(self, slot: int) -> tuple[Chunk, int]:
        number = int(np.searchsorted(self._starts, slot, side="right")) - 1
        return self._source.chunks[number], slot - self._starts[number]

    def _by_slot(self, request: ReportRequest) -> Sequence[int]:
        first = 0 if request.cursor is None else _slot_of(request.cursor) + 1
        return range(first, sum(len(chunk) for chunk in self._source.chunks))

    def _by_margin_ratio(self, request: ReportRequest) -> Sequence[int]:
        """Slots from the highest ratio down, those without one first. The order is for the eye: floats serve."""
        ratios = np.concatenate([self._ratios(chunk) for chunk in self._chunks])
        order = np.lexsort((np.arange(len(ratios)), -ratios))
        if request.cursor is not None:
            ratio, slot = request.cursor.split(":")
            if np.isnan(float(ratio)):
                raise ValueError(request.cursor)
            after = (-ratios[order] > -float(ratio)) | ((ratios[order] == float(ratio)) & (order > _slot_of(slot)))
            order = order[after]
        return order  # type: ignore[return-value]  # an array of slots is sliced and iterated like a sequence

    def _ratio(self, slot: int) -> float:
        number = int(np.searchsorted(self._starts, slot, side="right")) - 1
        return float(self._ratios(self._chunks[number])[slot - self._starts[number]])

    def _ratios(self, chunk: Chunk) -> margin.Column:
        valued, _ = value_rows(chunk, self._source.contracts)
        equity = valued.equity
        ratios = np.zeros(len(equity))
        solvent = equity > 0
        np.divide(valued.maintenance_margin, equity, out=ratios, where=solvent)
        ratios[chunk.is_unvalued() | (chunk.is_open() & ~solvent)] = np.inf
        return ratios


@exact
def _shortfall(candidates: Sequence[Mapping[str, Any]]) -> Decimal:
    """What candidates lack to the maintenance margin, in all."""
    return sum(
        (Decimal(shown["maintenance_margin"]) - Decimal(shown["equity"]) for shown in candidates), start=Decimal(0)
    )


def _optional(value: Decimal | None) -> str | None:
    return None if value is None else format_decimal(value)


def _slot_of(text: str) -> int:
    """The slot in a cursor. Raises ``ValueError`` for what is none."""
    if not (text.isascii() and text.isdigit()):
        raise ValueError(text)
    return int(text)
