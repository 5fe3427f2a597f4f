"""Read, decide, commit, and again if the account moved: how a trade, a transfer or an edit by hand changes an account.

The decision is pure and lives in ``services/trading.py``; the commit is one script that compares what was read with
what is there. Nothing else ever writes an account.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Literal

import orjson
import structlog
from redis.exceptions import RedisError

from app import answers, errors, metrics
from app import redis_client as keys
from app.column_repair import ColumnRepair
from app.commit import Change, Commits, Committed, Decide, Moved
from app.config import Settings
from app.contracts import Contract
from app.evidence import shown_record
from app.marks import MarkBook
from app.numbers import format_decimal
from app.outbox import Outbox
from app.recent import Basis
from app.records import RecordError, Snapshot, position_texts, snapshot_from
from app.redis_client import StateStore
from app.request_time import CALLS_PER_ATTEMPT, RequestTime
from app.services import trading
from app.services.trading import Account, Market, TradeOrder, TransferOrder
from app.shared_accounts import SharedAccounts

ATTEMPTS_MAX: Final = 200
"""Of n simultaneous commits of one account one wins a round, so this is how many may meet; each round is two calls."""

SLOW_CALL_SECONDS: Final = 0.1
"""Where a call to Redis takes longer nothing is guessed, so that a stall meets a read first, which can be repeated, and
not a commit of which nobody knows."""

log = structlog.get_logger(__name__)

Outcome = Literal["booked", "replayed"]


@dataclass(frozen=True, slots=True)
class Booked:
    """The answer to a booked operation, and whether it is the first one or a repeat of it."""

    outcome: Outcome
    answer: dict[str, Any]


class Booking:
    """Books trades, transfers and edits by hand for one process; its accounts are ``shared`` with the other workers."""

    def __init__(
        self, store: StateStore, outbox: Outbox, settings: Settings, shared: SharedAccounts | None = None
    ) -> None:
        self.store = store
        self.outbox = outbox
        self.settings = settings
        self.contracts: Mapping[str, Contract] = {contract.symbol: contract for contract in settings.contracts}
        self.marks = MarkBook(store, self.contracts, jump_max=settings.mark_jump_max)
        self.column_repair = ColumnRepair(store, self.contracts)
        self._commits = Commits(store, outbox, settings, self.contracts, shared)
        self._recent = self._commits.recent
        self._symbols = list(self.contracts)
        self._keys_of_symbols = keys.keys_of_symbols(self.contracts)
        self._read_arguments = [store.signature, *self._symbols]

    def book_trade(self, order: TradeOrder, *, client_trade_id: str | None) -> Coroutine[Any, Any, Booked]:
        """Book ``order`` once. Raises the refusal or fault that kept it from being booked."""
        trading.check_order(order, self.contracts)
        operation_id = client_trade_id or uuid.uuid4().hex
        content = answers.trade_content(order)

        def decide(account: Account, market: Market) -> Change:
            decision = trading.decide_trade(account, order, market)
            position = decision.account.position(order.symbol)
            texts = position_texts(position)
            margin = decision.margin
            return Change(
                kind="trade",
                adds_risk=bool(decision.fill.opened),
                after=decision.account,
                margin=margin,
                row={
                    **content,
                    "client_trade_id": operation_id,
                    "mark_price": format_decimal(decision.mark_price),
                    "realised_pnl": format_decimal(decision.fill.realised_pnl),
                    "balance_after": format_decimal(decision.account.balance),
                    "quantity_after": texts.quantity,
                    "cost_after": texts.cost,
                    **answers.margin_after(margin),
                },
                shown=answers.shown_after(equity=margin.equity, used_margin=margin.used_margin, position=texts),
                encoded={order.symbol: texts.encoded.encode() if position.quantity else b""},
            )

        operation = keys.operation_key("trade", order.account_id, operation_id)
        return self._book("trade", order.account_id, operation, {"client_trade_id": operation_id}, content, decide)

    def book_transfer(self, order: TransferOrder, *, client_transfer_id: str | None) -> Coroutine[Any, Any, Booked]:
        """Book a deposit or withdrawal once. A deposit makes the account where there is none."""
        trading.check_amount(order.amount)
        operation_id = client_transfer_id or uuid.uuid4().hex
        content = answers.transfer_content(order)

        def decide(account: Account, market: Market) -> Change:
            decision = trading.decide_transfer(account, order, market)
            margin = decision.margin
            return Change(
                kind="transfer",
                adds_risk=order.kind == "withdrawal",
                after=decision.account,
                margin=margin,
                row={
                    **content,
                    "client_transfer_id": operation_id,
                    "balance_after": format_decimal(decision.account.balance),
                    **answers.margin_after(margin),
                },
                shown=answers.shown_after(
                    equity=margin.equity if margin else None,
                    used_margin=margin.used_margin if margin else None,
                    position=None,
                ),
            )

        operation = keys.operation_key(order.kind, order.account_id, operation_id)
        identity = {"client_transfer_id": operation_id}
        return self._book("transfer", order.account_id, operation, identity, content, decide)

    async def read(self, account_id: str, *, operation: str | None = None) -> Snapshot:
        """The account, its operation and the marks, in one call. A read may be repeated, so it simply raises."""
        balance, positions, ledger, *_ = keys.account_keys(account_id)
        answer = await self.store.run(
            keys.READ_ACCOUNT,
            [
                keys.STATE_EPOCH,
                keys.STATE_RUN_ID,
                operation or keys.operation_key("none", account_id, ""),
                balance,
                positions,
                ledger,
                keys.MARK_VERSION,
                keys.STATE_HALTED,
                keys.COLUMN_BALANCE,
                keys.COLUMN_BREACH,
                *self._keys_of_symbols,
            ],
            self._read_arguments,
        )
        return snapshot_from(account_id, self._symbols, answer)

    def parse(self, snapshot: Snapshot) -> Account:
        """The record of an account that exists. Raises ``UnknownAccount`` or ``AccountQuarantined``."""
        if snapshot.balance_lost:
            raise errors.AccountQuarantined(
                f"account:{snapshot.account_id}:balance is gone, and history knows the account", reason="balance"
            )
        if not snapshot.exists:
            raise errors.unknown_account(snapshot.account_id)
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

    def basis(self, snapshot: Snapshot, account: Account) -> Basis:
        """What a decision on ``account``, as ``snapshot`` has it, is made on."""
        return Basis(
            account=account,
            market=self.market(snapshot),
            balance_text=snapshot.balance_text,
            fields=snapshot.fields,
            seq_text=snapshot.seq_text,
            breach_text=snapshot.breach_text,
            has_slot=snapshot.slot is not None,
        )

    async def adopt(self, snapshot: Snapshot, *, until: float = math.inf) -> bool:
        """Book the difference between the record and what history knows as an adjustment.

        False when the account moved meanwhile. Raises as ``parse`` does, ``ColumnsShort``, and as ``Commits.commit`` at
        ``until``.
        """
        account = self.parse(snapshot)
        before = snapshot.known_account()
        change = Change(
            kind="adjustment",
            adds_risk=False,
            after=account,
            margin=None,
            row={
                "reason": "the keys in Redis differ from history: edited by hand",
                "balance_before": format_decimal(before.balance),
                "balance_after": format_decimal(account.balance),
                "positions_before": shown_record(before),
                "positions_after": shown_record(account),
            },
        )
        outcome = await self._commits.commit(self.basis(snapshot, before), lambda *_: change, operation="", until=until)
        if isinstance(outcome, Committed):
            metrics.ADJUSTMENTS.inc()
            log.warning("adopted an edit by hand", account_id=account.account_id, balance=str(account.balance))
            return True
        return False

    async def _book(
        self,
        kind: answers.RowKind,
        account_id: str,
        operation: str,
        identity: Mapping[str, str],
        content: Mapping[str, str],
        decide: Decide,
    ) -> Booked:
        """Decide and commit on what this process knows, if it knows the account; else read first, until it held still.

        What is known is a guess: nothing is refused on it, and the commit compares all that it rests on. A fault on the
        way carries ``identity``, by which its outcome can be asked for. All of it has one ``RequestTime``.
        """
        try:
            allotted = RequestTime(self.store.request_seconds)
            guess = self._recent.take(account_id) if self.store.batcher.last_seconds < SLOW_CALL_SECONDS else None
            truth = None
            for _ in range(ATTEMPTS_MAX):
                basis, guess = guess, None
                if basis is None:
                    if truth is None and not allotted.allows(CALLS_PER_ATTEMPT):
                        break
                    creates = content.get("kind") == "deposit"
                    async with allotted.bound():
                        snapshot = truth or await self._read_in_time(account_id, operation, allotted)
                        basis = (
                            None if snapshot.operation else await self._basis_read(snapshot, allotted, creates=creates)
                        )
                    truth = None
                    if snapshot.operation:
                        return await self._replayed(
                            kind, account_id, operation, snapshot.operation, content, identity, allotted
                        )
                    if basis is None:
                        continue
                if not allotted.allows(1):
                    raise errors.StoreUnavailable("Redis is too slow for a commit in a request's time", reason="redis")
                asked = time.monotonic()
                try:
                    outcome = await self._commits.commit(
                        basis, decide, operation=operation, until=allotted.committed_by
                    )
                except errors.Refusal:
                    if basis.guessed:
                        continue
                    raise
                except errors.ColumnsShort:
                    async with allotted.bound():
                        await self._rebuild_columns()
                    continue
                if isinstance(outcome, bytes):
                    return await self._replayed(kind, account_id, operation, outcome, content, identity, allotted)
                if isinstance(outcome, Moved):
                    allotted.called(since=asked)
                    truth = outcome.snapshot
                    if truth is None:
                        metrics.CONFLICTS.inc()
                    else:
                        self._recent.forget_market()
                    continue
                entry = outcome.entries[0]
                if not outcome.recorded:
                    await self._require_booked(operation, entry.id, allotted)
                answer = answers.operation_answer(
                    kind,
                    account_id,
                    history_id=entry.id,
                    time_us=entry.time_us,
                    row=outcome.change.row,
                    shown=outcome.change.shown,
                    recorded=outcome.recorded,
                )
                return Booked("booked", answer)
            raise errors.Contended(
                f"account {account_id} changed under every attempt that its time allowed", reason="contended"
            )
        except errors.Unavailable as error:
            error.members.update(identity)
            raise

    async def _read_in_time(self, account_id: str, operation: str, allotted: RequestTime) -> Snapshot:
        asked = time.monotonic()
        snapshot = await self.read(account_id, operation=operation)
        allotted.called(since=asked)
        return snapshot

    async def _basis_read(self, snapshot: Snapshot, allotted: RequestTime, *, creates: bool) -> Basis | None:
        """What to decide on after a read; None where an edit by hand had to be adopted first: then read again."""
        by_hand = snapshot.marks_set_by_hand(self.contracts)
        for symbol in by_hand:
            await self.marks.adopt(symbol)
        if by_hand:
            return None
        if creates and not snapshot.exists and not snapshot.balance_lost:
            account = Account(snapshot.account_id, balance=trading.ZERO)
        else:
            account = self.parse(snapshot)
            try:
                if not snapshot.agrees(account):
                    await self.adopt(snapshot, until=allotted.committed_by)
                    return None
            except errors.ColumnsShort:
                await self._rebuild_columns()
                return None
        basis = self.basis(snapshot, account)
        # How old a mark is only a read can tell.
        if self.settings.mark_max_age_seconds is None:
            self._recent.keep_market(basis.market, {symbol: texts[0] for symbol, texts in snapshot.mark_texts.items()})
        return basis

    async def _rebuild_columns(self) -> None:
        await self.column_repair.rebuild(patience_seconds=self.store.call_seconds)

    async def _require_booked(self, operation: str, history_id: int, allotted: RequestTime) -> None:
        """Before a row that Postgres has not taken is acknowledged: Redis must still know it, and its replicas too.

        A Redis that came back without its last writes does not, and then nobody does.
        """
        remembered: bytes | None = None
        with suppress(RedisError, OSError):  # a TimeoutError is an OSError
            async with asyncio.timeout_at(allotted.ends):
                remembered = await self.store.batcher.execute("GET", operation, replicated=True)
        if remembered is None or int(remembered.partition(b"\n")[0]) != history_id:
            raise errors.OutcomeUnknown(
                "the row is not in history yet and Redis cannot vouch for it; ask for the operation id",
                reason="outcome_unknown",
            )

    async def _replayed(
        self,
        kind: answers.RowKind,
        account_id: str,
        operation: str,
        remembered: bytes,
        content: Mapping[str, str],
        identity: Mapping[str, str],
        allotted: RequestTime,
    ) -> Booked:
        """The first result of an operation id, if it was used for the same content."""
        try:
            history_id, time_us, body = remembered.split(b"\n", 2)
            row = orjson.loads(body)
            first = answers.content_of(kind, row)
        except (ValueError, KeyError, TypeError) as error:
            raise errors.StateDamaged(
                "what is remembered of this operation id cannot be read", reason="operation"
            ) from error
        if first != content:
            raise errors.IdempotencyConflict(
                "this operation id was used with other content; send a new id, or the first content again",
                first=first,
                next={"resend": "the same request with a new operation id, or without one"},
                **identity,
            )
        recorded = await self.outbox.is_recorded(kind, int(history_id), until=allotted.committed_by)
        if not recorded:
            await self._require_booked(operation, int(history_id), allotted)
        answer = answers.operation_answer(
            kind,
            account_id,
            history_id=int(history_id),
            time_us=int(time_us),
            row=row,
            shown=answers.shown_of_row(row),
            recorded=recorded,
        )
        return Booked("replayed", answer)
