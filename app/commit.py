"""The commit: one decided change of an account as the one call of Redis that makes it, or finds that it moved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import orjson

from app import redis_client as keys
from app.config import Settings
from app.contracts import Contract
from app.evidence import recovery_body
from app.history import HistoryEntry
from app.numbers import format_decimal
from app.recent import Basis, KnownAccount, Recent
from app.records import NOTHING, Snapshot, encode_position, pack, snapshot_from
from app.redis_client import StateStore
from app.services import trading
from app.services.margin import AccountMargin
from app.services.trading import FLAT, Account, Position


@dataclass(slots=True)
class Change:
    """One decided change of an account, ready to commit; ``row`` is what history says of it.

    One that ``adds_risk`` meets the outbox's soft limit. ``shown`` is what its answer says beside the row, and
    ``encoded`` are the positions after it whose texts are known.
    """

    kind: str
    adds_risk: bool
    after: Account
    margin: AccountMargin[Decimal] | None
    row: dict[str, Any]
    shown: Mapping[str, Any] = field(default_factory=dict)
    encoded: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(slots=True)
class Moved:
    """Nothing was committed: the account was no longer as read; or a guess was wrong, and ``snapshot`` is the truth."""

    snapshot: Snapshot | None


class Commits:
    """Makes the commits of one process, and remembers what they left."""

    def __init__(self, store: StateStore, settings: Settings, contracts: Mapping[str, Contract]) -> None:
        self._store = store
        self._settings = settings
        self._symbols = list(contracts)
        self._columns = {
            symbol: (keys.quantity_column(symbol), keys.cost_column(symbol), keys.open_positions_key(symbol))
            for symbol in contracts
        }
        self._keys_of_symbols = keys.keys_of_symbols(contracts)
        self.recent = Recent()

    async def commit(self, basis: Basis, change: Change, *, operation: str) -> list[HistoryEntry] | bytes | Moved:
        """Commit ``change`` if the account is still as ``basis`` has it.

        Answers the rows of history it made, the operation's first result if it was booked before, or how the account
        or what was guessed has moved.
        """
        after = change.after
        account_id = after.account_id
        balance, positions, ledger, equity, used_margin = keys.account_keys(account_id)
        called_keys = [
            keys.STATE_EPOCH,
            keys.STATE_RUN_ID,
            keys.HISTORY_LAST_ID,
            keys.OUTBOX,
            operation or keys.operation_key("none", account_id, ""),
            balance,
            positions,
            ledger,
            equity,
            used_margin,
            keys.ACCOUNTS,
            keys.COLUMN_BALANCE,
            keys.COLUMN_BREACH,
            keys.RECOVERIES,
            keys.MARK_VERSION,
            keys.STATE_HALTED,
            keys.CHANGED,
        ]
        balance_text = format_decimal(after.balance).encode()
        body = orjson.dumps({"mark_version": basis.market.mark_version, **change.row})
        recovery = self._recovery(basis, change)
        touched = self._touched(basis, change)
        arguments: list[str | bytes | int] = [
            self._store.signature,
            account_id,
            change.kind,
            basis.market.mark_version,
            self._settings.outbox_soft_limit if change.adds_risk else self._settings.outbox_hard_limit,
            self._settings.operation_ttl_seconds,
            "remember" if operation else "",
            basis.balance_text,
            basis.seq_text,
            basis.breach_text,
            balance_text,
            pack(after.balance),
            change.row.get("equity_after") or "",
            change.row.get("used_margin_after") or "",
            body,
            recovery,
            basis.epoch,
            len(touched),
        ]
        for symbol, encoded, position in touched:
            called_keys += self._columns[symbol]
            arguments += (symbol, encoded)
            arguments += (NOTHING, NOTHING) if position == FLAT else (pack(position.quantity), pack(position.cost))
        arguments.append(len(basis.fields) // 2)
        arguments += basis.fields
        if basis.mark_texts is not None:
            called_keys += self._keys_of_symbols
            # A guess rests on the marks too, those that value the account before or after the change.
            for symbol, mark_text in basis.mark_texts.items():
                valued = symbol in after.positions or symbol in basis.account.positions
                arguments += (symbol, mark_text if valued else b"")
        answer = await self._store.run(keys.COMMIT, called_keys, arguments)
        if answer[0] == "duplicate":
            return bytes(answer[1])
        if answer[0] == "conflict":
            return Moved(snapshot_from(account_id, self._symbols, answer) if basis.guessed else None)
        _, history_id, seq, time_us, recovery_id, epoch = answer
        entry = HistoryEntry(int(history_id), change.kind, account_id, seq, int(epoch), int(time_us), body)
        if not recovery_id:
            if not basis.breach_text:
                fields = _fields_after(basis.fields, touched)
                self.recent.keep(KnownAccount(after, balance_text, fields, b"%d" % seq, epoch))
            return [entry]
        return [
            entry,
            HistoryEntry(int(recovery_id), "recovery", account_id, seq + 1, int(epoch), int(time_us), recovery),
        ]

    def _touched(self, basis: Basis, change: Change) -> list[tuple[str, bytes, Position]]:
        """The symbols whose rows are written, each with the text and the position after the change."""
        before, after = basis.account.positions, change.after.positions
        # A new slot is the next in every column.
        everywhere = change.kind == "adjustment" or not basis.has_slot
        touched = []
        for symbol in self._symbols:
            position = after.get(symbol, FLAT)
            if everywhere or position != before.get(symbol, FLAT):
                encoded = change.encoded.get(symbol)
                if encoded is None:
                    encoded = b"" if position == FLAT else encode_position(position).encode()
                touched.append((symbol, encoded, position))
        return touched

    def _recovery(self, basis: Basis, change: Change) -> bytes:
        """The recovery row of a change that restores an account in breach, else nothing."""
        if not basis.breach_text or change.margin is None or change.kind == "adjustment":
            return b""
        if not trading.is_restored(change.margin, restore_at=self._settings.restore_at):
            return b""
        return recovery_body(
            change.after,
            change.margin,
            prices={symbol: mark.price for symbol, mark in basis.market.marks.items()},
            mark_version=basis.market.mark_version,
            liquidation_id=int(basis.breach_text),
            cause=f"a {change.row.get('kind', change.kind)}",
        )


def _fields_after(fields: tuple[bytes, ...], touched: list[tuple[str, bytes, Position]]) -> tuple[bytes, ...]:
    """The fields of a positions hash after a commit that has ``touched`` some of them."""
    held = dict(zip(fields[::2], fields[1::2], strict=True))
    for symbol, encoded, _ in touched:
        held[symbol.encode()] = encoded
    return tuple(item for field in held.items() if field[1] for item in field)
