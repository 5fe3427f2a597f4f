"""Read, decide, commit, and again if the account moved: how a trade, a transfer or an edit by hand changes an account.

The decision is pure and lives in ``services/trading.py``; the commit is one script that compares what was read with
what is there. Nothing else ever writes an account.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final, Literal

import orjson
import structlog

from app import errors, metrics
from app import redis_client as keys
from app.config import Settings
from app.contracts import Contract
from app.database import format_timestamp
from app.evidence import recovery_body, shown_record
from app.history import HistoryEntry, timestamp_of
from app.marks import MarkBook
from app.numbers import format_decimal
from app.outbox import Outbox
from app.records import NOTHING, RecordError, Snapshot, encode_position, pack, snapshot_from
from app.redis_client import StateStore
from app.services import trading
from app.services.margin import AccountMargin
from app.services.trading import FLAT, Account, Market, Position, TradeOrder, TransferOrder

ATTEMPTS_MAX: Final = 200
"""Of n simultaneous commits of one account one wins a round, so this is how many may meet; each round is two calls."""

log = structlog.get_logger(__name__)

Outcome = Literal["booked", "replayed"]


@dataclass(frozen=True, slots=True)
class Booked:
    """The answer to a booked operation, and whether it is the first one or a repeat of it."""

    outcome: Outcome
    answer: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Change:
    """One decided change of an account, ready to commit. One that ``adds_risk`` meets the outbox's soft limit."""

    kind: str
    adds_risk: bool
    after: Account
    margin: AccountMargin[Decimal] | None
    body: dict[str, Any]
    operation: bytes = b""


class Booking:
    """Books trades, transfers and edits by hand for one process."""

    def __init__(self, store: StateStore, outbox: Outbox, settings: Settings) -> None:
        self.store = store
        self.outbox = outbox
        self.settings = settings
        self.contracts: Mapping[str, Contract] = {contract.symbol: contract for contract in settings.contracts}
        self.marks = MarkBook(store, self.contracts, jump_max=settings.mark_jump_max)
        self._symbols = list(self.contracts)

    async def book_trade(self, order: TradeOrder, *, client_trade_id: str | None) -> Booked:
        """Book ``order`` once. Raises the refusal or fault that kept it from being booked."""
        trading.check_order(order, self.contracts)
        operation_id = client_trade_id or uuid.uuid4().hex
        content = {
            "symbol": order.symbol,
            "side": order.side,
            "quantity": format_decimal(order.quantity),
            "price": format_decimal(order.price),
        }

        def decide(account: Account, market: Market) -> _Change:
            decision = trading.decide_trade(account, order, market)
            position = decision.account.position(order.symbol)
            answer = {
                **content,
                "mark_price": format_decimal(decision.mark_price),
                "realised_pnl": format_decimal(decision.fill.realised_pnl),
                "position": shown_position(position),
                **shown_margin(decision.margin),
            }
            return _Change(
                kind="trade",
                adds_risk=bool(decision.fill.opened),
                after=decision.account,
                margin=decision.margin,
                body={
                    **content,
                    "client_trade_id": operation_id,
                    "mark_price": answer["mark_price"],
                    "realised_pnl": answer["realised_pnl"],
                    "balance_after": answer["balance"],
                    "quantity_after": format_decimal(position.quantity),
                    "cost_after": format_decimal(position.cost),
                },
                operation=orjson.dumps({"content": content, "answer": answer}),
            )

        identity = {"client_trade_id": operation_id, "account_id": order.account_id}
        return await self._book("trade", order.account_id, operation_id, content, decide, identity)

    async def book_transfer(self, order: TransferOrder, *, client_transfer_id: str | None) -> Booked:
        """Book a deposit or withdrawal once. A deposit makes the account where there is none."""
        trading.check_amount(order.amount)
        operation_id = client_transfer_id or uuid.uuid4().hex
        content = {"kind": order.kind, "amount": format_decimal(order.amount)}

        def decide(account: Account, market: Market) -> _Change:
            decision = trading.decide_transfer(account, order, market)
            answer = {**content, "balance": format_decimal(decision.account.balance), **shown_margin(decision.margin)}
            return _Change(
                kind="transfer",
                adds_risk=order.kind == "withdrawal",
                after=decision.account,
                margin=decision.margin,
                body={**content, "client_transfer_id": operation_id, "balance_after": answer["balance"]},
                operation=orjson.dumps({"content": content, "answer": answer}),
            )

        identity = {"client_transfer_id": operation_id, "account_id": order.account_id}
        return await self._book(order.kind, order.account_id, operation_id, content, decide, identity)

    async def read(self, account_id: str, *, operation: str | None = None) -> Snapshot:
        """The account, its operation and the marks, in one call. A read may be repeated, so it simply raises."""
        operation_key = operation or keys.operation_key("none", account_id, "")
        answer = await self.store.run(
            keys.READ_ACCOUNT,
            [
                keys.STATE_EPOCH,
                keys.STATE_RUN_ID,
                operation_key,
                keys.balance_key(account_id),
                keys.positions_key(account_id),
                keys.ledger_key(account_id),
                keys.MARK_VERSION,
                keys.STATE_HALTED,
                keys.COLUMN_BALANCE,
                keys.COLUMN_BREACH,
                *(key for symbol in self._symbols for key in _symbol_keys(symbol)),
            ],
            [self.store.signature],
        )
        return snapshot_from(account_id, self._symbols, answer)

    def parse(self, snapshot: Snapshot) -> Account:
        """The record of an account that exists. Raises ``UnknownAccount`` or ``AccountQuarantined``."""
        if snapshot.balance_lost:
            raise errors.AccountQuarantined(
                f"account:{snapshot.account_id}:balance is gone, and history knows the account", reason="balance"
            )
        if not snapshot.exists:
            raise errors.UnknownAccount(
                f"there is no account {snapshot.account_id}; a deposit makes it",
                account_id=snapshot.account_id,
                next=errors.deposit_step(snapshot.account_id, Decimal(1000)),
            )
        try:
            return snapshot.account(self.contracts)
        except RecordError as error:
            raise errors.AccountQuarantined(str(error), reason="record") from error

    def market(self, snapshot: Snapshot) -> Market:
        """What a decision on ``snapshot`` is made against."""
        return Market(
            contracts=self.contracts,
            marks=snapshot.marks(self.contracts),
            mark_version=snapshot.mark_version,
            now_us=snapshot.now_us,
            mark_max_age_seconds=self.settings.mark_max_age_seconds,
            halted=snapshot.halted,
        )

    async def adopt(self, snapshot: Snapshot) -> bool:
        """Book the difference between the record and its packed row as an adjustment, and repair the row.

        False when the account moved meanwhile. Raises as ``parse`` does.
        """
        account = self.parse(snapshot)
        before = snapshot.packed_account()
        change = _Change(
            kind="adjustment",
            adds_risk=False,
            after=account,
            margin=None,
            body={
                "reason": "the keys in Redis differ from history: edited by hand",
                "balance_before": format_decimal(before.balance),
                "balance_after": format_decimal(account.balance),
                "positions_before": shown_record(before),
                "positions_after": shown_record(account),
            },
        )
        entries = await self._commit(snapshot, before, change, operation="", market=self.market(snapshot))
        if isinstance(entries, list):
            metrics.ADJUSTMENTS.inc()
            log.warning("adopted an edit by hand", account_id=account.account_id, balance=str(account.balance))
            await self.outbox.record(entries)
            return True
        return False

    async def _book(
        self,
        kind: str,
        account_id: str,
        operation_id: str,
        content: Mapping[str, str],
        decide: Callable[[Account, Market], _Change],
        identity: Mapping[str, str],
    ) -> Booked:
        operation = keys.operation_key(kind, account_id, operation_id)
        for _ in range(ATTEMPTS_MAX):
            snapshot = await self.read(account_id, operation=operation)
            if snapshot.operation:
                return await self._replayed(kind, snapshot.operation, content, identity)
            by_hand = snapshot.marks_set_by_hand(self.contracts)
            for symbol in by_hand:
                await self.marks.adopt(symbol)
            if by_hand:
                continue
            if kind == "deposit" and not snapshot.exists and not snapshot.balance_lost:
                account = Account(account_id, balance=trading.ZERO)
            else:
                account = self.parse(snapshot)
                if not snapshot.agrees(account):
                    await self.adopt(snapshot)
                    continue
            market = self.market(snapshot)
            change = decide(account, market)
            committed = await self._commit_operation(snapshot, account, change, operation, market, identity)
            if isinstance(committed, bytes):
                return await self._replayed(kind, committed, content, identity)
            if committed is None:
                metrics.CONFLICTS.inc()
                continue
            recorded = await self.outbox.record(committed)
            answer = orjson.loads(change.operation)["answer"]
            return Booked("booked", _answer(kind, committed[0].id, committed[0].time_us, identity, answer, recorded))
        raise errors.Contended(
            f"account {account_id} changed under {ATTEMPTS_MAX} attempts", reason="contended", **identity
        )

    async def _commit_operation(
        self,
        snapshot: Snapshot,
        before: Account,
        change: _Change,
        operation: str,
        market: Market,
        identity: Mapping[str, str],
    ) -> list[HistoryEntry] | bytes | None:
        try:
            return await self._commit(snapshot, before, change, operation=operation, market=market)
        except errors.OutcomeUnknown as error:
            raise errors.OutcomeUnknown(error.detail, reason="redis", **identity) from error

    async def _replayed(
        self, kind: str, operation: bytes, content: Mapping[str, str], identity: Mapping[str, str]
    ) -> Booked:
        history_id, time_us, payload = operation.split(b"\n", 2)
        first = orjson.loads(payload)
        if first["content"] != content:
            raise errors.IdempotencyConflict(
                "this operation id was used with other content; send a new id, or the first content again",
                first=first["content"],
                **identity,
            )
        recorded = await self.outbox.is_recorded(int(history_id))
        answer = _answer(kind, int(history_id), int(time_us), identity, first["answer"], recorded)
        return Booked("replayed", answer)

    async def _commit(
        self, snapshot: Snapshot, before: Account, change: _Change, *, operation: str, market: Market
    ) -> list[HistoryEntry] | bytes | None:
        """Commit ``change`` if the account is still as it was read.

        Answers the rows of history it made, the operation's first result if it was booked before, or None if the
        account moved.
        """
        after, version = change.after, snapshot.mark_version
        touched = [
            symbol
            for symbol in self._symbols
            if change.kind == "adjustment" or after.position(symbol) != before.position(symbol)
        ]
        limit = self.settings.outbox_soft_limit if change.adds_risk else self.settings.outbox_hard_limit
        body = orjson.dumps({"mark_version": version, **change.body})
        recovery = self._recovery(snapshot, change, market)
        account_id = snapshot.account_id
        answer = await self.store.run(
            keys.COMMIT,
            [
                keys.STATE_EPOCH,
                keys.STATE_RUN_ID,
                keys.HISTORY_LAST_ID,
                keys.OUTBOX,
                operation or keys.operation_key("none", account_id, ""),
                keys.balance_key(account_id),
                keys.positions_key(account_id),
                keys.ledger_key(account_id),
                keys.equity_key(account_id),
                keys.used_margin_key(account_id),
                keys.ACCOUNTS,
                keys.COLUMN_BALANCE,
                keys.COLUMN_BREACH,
                keys.RECOVERIES,
                *(
                    key
                    for symbol in touched
                    for key in (keys.quantity_column(symbol), keys.cost_column(symbol), keys.open_positions_key(symbol))
                ),
            ],
            [
                self.store.signature,
                account_id,
                change.kind,
                version,
                limit,
                self.settings.operation_ttl_seconds,
                change.operation,
                snapshot.balance_text,
                snapshot.seq_text,
                snapshot.breach_text,
                format_decimal(after.balance),
                pack(after.balance),
                format_decimal(change.margin.equity) if change.margin else "",
                format_decimal(change.margin.used_margin) if change.margin else "",
                body,
                recovery,
                len(snapshot.fields) // 2,
                *snapshot.fields,
                *(item for symbol in touched for item in _touched_arguments(symbol, after.position(symbol))),
            ],
        )
        if answer[0] == "duplicate":
            return bytes(answer[1])
        if answer[0] == "conflict":
            return None
        _, history_id, seq, time_us, recovery_id, epoch = answer
        entry = HistoryEntry(int(history_id), change.kind, account_id, seq, int(epoch), int(time_us), body)
        if not recovery_id:
            return [entry]
        return [
            entry,
            HistoryEntry(int(recovery_id), "recovery", account_id, seq + 1, int(epoch), int(time_us), recovery),
        ]

    def _recovery(self, snapshot: Snapshot, change: _Change, market: Market) -> bytes:
        """The recovery row of a change that restores an account in breach, else nothing."""
        if snapshot.breach is None or change.margin is None or change.kind == "adjustment":
            return b""
        if not trading.is_restored(change.margin, restore_at=self.settings.restore_at):
            return b""
        return recovery_body(
            change.after,
            change.margin,
            prices={symbol: mark.price for symbol, mark in market.marks.items()},
            mark_version=snapshot.mark_version,
            liquidation_id=snapshot.breach.id,
            cause=f"a {change.body.get('kind', change.kind)}",
        )


def shown_position(position: Position) -> dict[str, str | None]:
    """A position in an answer; a flat one has no average price."""
    return {
        "quantity": format_decimal(position.quantity),
        "avg_price": (
            format_decimal(trading.margin.average_price(quantity=position.quantity, cost=position.cost))
            if position.quantity
            else None
        ),
    }


def shown_margin(valued: AccountMargin[Decimal] | None) -> dict[str, str | None]:
    """Balance, equity, used and free margin in an answer; null where a mark is missing."""
    if valued is None:
        return {"equity": None, "used_margin": None, "free_margin": None}
    return {
        "balance": format_decimal(valued.balance),
        "equity": format_decimal(valued.equity),
        "used_margin": format_decimal(valued.used_margin),
        "free_margin": format_decimal(valued.free_margin),
    }


def _answer(
    kind: str,
    history_id: int,
    time_us: int,
    identity: Mapping[str, str],
    answer: Mapping[str, Any],
    recorded: bool,  # noqa: FBT001  # a value of the answer, not a switch
) -> dict[str, Any]:
    return {
        "trade_id" if kind == "trade" else "transfer_id": history_id,
        **identity,
        "timestamp": format_timestamp(timestamp_of(time_us)),
        **answer,
        "recorded": recorded,
    }


def _symbol_keys(symbol: str) -> tuple[str, str, str, str]:
    return (
        keys.mark_price_key(symbol),
        keys.mark_key(symbol),
        keys.quantity_column(symbol),
        keys.cost_column(symbol),
    )


def _touched_arguments(symbol: str, position: Position) -> tuple[str | bytes, ...]:
    if position == FLAT:
        return (symbol, "", NOTHING, NOTHING)
    return (symbol, encode_position(position), pack(position.quantity), pack(position.cost))
