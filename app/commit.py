"""The commit: decided changes of accounts, in the one call of Redis that makes each or finds that its account moved."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import chain
from typing import Any, Final

import orjson

from app import errors
from app import redis_client as keys
from app.config import Settings
from app.contracts import Contract
from app.evidence import recovery_body
from app.history import HistoryEntry
from app.numbers import format_decimal
from app.outbox import Outbox
from app.recent import Basis, KnownAccount, Recent
from app.records import Snapshot, encode_position, pack, pack_position, snapshot_from
from app.redis_client import StateStore
from app.request_time import Deadlines
from app.services import trading
from app.services.margin import AccountMargin
from app.services.trading import FLAT, Account, Market, Position
from app.shared_accounts import AccountTexts, SharedAccounts

COMMITS_PER_CALL: Final = 8
"""A script holds up everybody else at Redis for as long as it runs."""

_Touched = tuple[int, bytes, Position]
"""The number of a symbol whose rows are written, and its position after the change, as text and as numbers."""


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


@dataclass(slots=True)
class Committed:
    """A change that is in Redis, its rows of history, and whether Postgres has those already."""

    change: Change
    entries: list[HistoryEntry]
    recorded: bool


Decide = Callable[[Account, Market], Change]
"""What is to become of an account in a market; raises the refusal of it."""

Outcome = Committed | Moved | bytes
"""What comes of a change: it is committed, its account has moved, or its operation was booked before, as bytes say."""


@dataclass(slots=True)
class _Asked:
    """A change that somebody waits for: what it is decided on, how, until when, and what it has made so far."""

    basis: Basis
    decide: Decide
    operation: str
    answer: asyncio.Future[Outcome]
    until: float
    made: Committed | None = None

    def settle(self, outcome: Outcome) -> None:
        """Say what came of it, unless nobody waits any more."""
        if not self.answer.done():
            self.answer.set_result(outcome)

    def fail(self, error: BaseException) -> None:
        """Say that it failed, unless what came of it is known."""
        if not self.answer.done():
            self.answer.set_exception(error)

    def is_done(self) -> bool:
        """Whether nobody waits any more."""
        return self.answer.done()

    def run_out(self) -> None:
        """Its time has: what is in Redis is committed, though Postgres may not have it; else nobody knows."""
        if self.made is not None:
            self.settle(self.made)
        else:
            self.fail(
                errors.OutcomeUnknown(
                    "Redis did not answer in time; ask for the operation id before sending anything new", reason="redis"
                )
            )


@dataclass(slots=True)
class _Part:
    """A decided change as its part of a call of the script."""

    asked: _Asked
    change: Change
    keys: tuple[str, ...]
    arguments: list[str | bytes | int]
    touched: list[_Touched]
    balance_text: bytes
    body: bytes
    recovery: bytes


class Commits:
    """Makes the commits of one process, has their rows recorded, and remembers what they left.

    What is asked for in one turn of the loop is decided one after the other and committed in one call of the script,
    some at a time: a processor that decides and a Redis that commits have the code and the keys at hand. Whoever waits
    is woken once, when Postgres has the rows: a request that waits is two dozen frames deep.
    """

    def __init__(
        self,
        store: StateStore,
        outbox: Outbox,
        settings: Settings,
        contracts: Mapping[str, Contract],
        shared: SharedAccounts | None,
    ) -> None:
        self._store = store
        self._outbox = outbox
        self._settings = settings
        self._symbols = list(contracts)
        self._field_names = [symbol.encode() for symbol in contracts]
        self._shared_keys = [
            keys.STATE_EPOCH,
            keys.STATE_RUN_ID,
            keys.HISTORY_LAST_ID,
            keys.OUTBOX,
            keys.ACCOUNTS,
            keys.COLUMN_BALANCE,
            keys.COLUMN_BREACH,
            keys.RECOVERIES,
            keys.MARK_VERSION,
            keys.STATE_HALTED,
            keys.CHANGED,
            *keys.keys_of_symbols(contracts),
            *map(keys.open_positions_key, contracts),
        ]
        self._shared_arguments: list[str | bytes | int] = [
            store.signature,
            settings.operation_ttl_seconds,
            len(self._symbols),
            *self._symbols,
        ]
        self._asked: list[_Asked] = []
        self._calls: set[asyncio.Task[None]] = set()
        self._deadlines = Deadlines()
        self.recent = Recent(contracts, shared)

    def commit(
        self, basis: Basis, decide: Decide, *, operation: str, until: float = math.inf
    ) -> asyncio.Future[Outcome]:
        """Decide on ``basis``, commit the change if the account is still so, and have Postgres record it.

        Whoever waits is answered at ``until`` whatever the stores do. Raises what ``decide`` and ``StateStore.run`` do.
        """
        loop = asyncio.get_running_loop()
        if not self._asked:
            loop.call_soon(self._make_calls)
        asked = _Asked(basis, decide, operation, loop.create_future(), until)
        self._asked.append(asked)
        if until < math.inf:
            self._deadlines.watch(asked)
        return asked.answer

    def _make_calls(self) -> None:
        asked, self._asked = self._asked, []
        for first in range(0, len(asked), COMMITS_PER_CALL):
            call = asyncio.get_running_loop().create_task(self._make_call(asked[first : first + COMMITS_PER_CALL]))
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)

    async def _make_call(self, asked: list[_Asked]) -> None:
        """Decide some changes, commit them in one call, have their rows recorded, and answer each."""
        try:
            parts = [part for each in asked if (part := self._decided(each)) is not None]
            outcomes = await self._commit(parts) if parts else []
            made = []
            for part, outcome in zip(parts, outcomes, strict=True):
                if entries := self._settled(part, outcome):
                    part.asked.made = committed = Committed(part.change, entries, recorded=False)
                    made.append((part.asked, committed))
            # One answer for all of a call: where Postgres cannot take one of its rows, Redis vouches for the others.
            recorded = bool(made) and await self._outbox.record([entry for _, done in made for entry in done.entries])
            for each, committed in made:
                committed.recorded = recorded
                each.settle(committed)
        except errors.Unavailable as error:
            for each in asked:
                each.fail(error.another())
        except BaseException as error:
            # The end of the loop, say: whoever waits must hear of it all the same.
            for each in asked:
                each.fail(error)
            raise

    async def _commit(self, parts: list[_Part]) -> list[list[Any]]:
        """What the script answers to each part."""
        called_keys, arguments = self._shared_keys.copy(), self._shared_arguments.copy()
        for part in parts:
            called_keys += part.keys
            arguments += part.arguments
        return (await self._store.run(keys.COMMIT, called_keys, arguments))[1:]

    def _decided(self, asked: _Asked) -> _Part | None:
        """The part of the call that a change is; whoever asked for one that cannot be decided is told, nobody else."""
        try:
            return self._decide(asked)
        except Exception as error:  # noqa: BLE001 - it is raised where it was asked for
            asked.fail(error)
            return None

    def _settled(self, part: _Part, outcome: list[Any]) -> list[HistoryEntry]:
        """The rows of history that a part made; whoever waits for one that made none is told, and nobody else."""
        try:
            return self._entries(part, outcome)
        except Exception as error:  # noqa: BLE001 - it is raised where it was asked for
            part.asked.fail(error)
            return []

    def _decide(self, asked: _Asked) -> _Part:
        basis = asked.basis
        change = asked.decide(basis.account, basis.market)
        after = change.after
        account_id = after.account_id
        touched = self._touched(basis, change)
        balance_text = format_decimal(after.balance).encode()
        body = orjson.dumps({"mark_version": basis.market.mark_version, **change.row})
        recovery = self._recovery(basis, change)
        arguments: list[str | bytes | int] = [
            0,
            account_id,
            change.kind,
            basis.market.mark_version,
            self._settings.outbox_soft_limit if change.adds_risk else self._settings.outbox_hard_limit,
            "remember" if asked.operation else "",
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
        for number, encoded, position in touched:
            arguments += (number, encoded, pack_position(position))
        arguments.append(len(basis.fields) // 2)
        arguments += basis.fields
        if basis.mark_texts is not None:
            # A guess rests on the marks too, those that value the account before or after the change.
            for symbol, mark_text in basis.mark_texts.items():
                valued = symbol in after.positions or symbol in basis.account.positions
                arguments.append(mark_text if valued else b"")
        arguments[0] = len(arguments)
        operation_key = asked.operation or keys.operation_key("none", account_id, "")
        called_keys = (operation_key, *keys.account_keys(account_id))
        return _Part(asked, change, called_keys, arguments, touched, balance_text, body, recovery)

    def _entries(self, part: _Part, outcome: list[Any]) -> list[HistoryEntry]:
        """The rows of history that a part made; none for one that did not pass, which is answered or raised.

        The account as the commit left it is remembered, unless it is in a breach.
        """
        account_id = part.change.after.account_id
        keys.checked(outcome)
        if outcome[0] == "conflict":
            truth = snapshot_from(account_id, self._symbols, outcome) if len(outcome) > 1 else None
            part.asked.settle(Moved(truth))
            return []
        if outcome[0] == "duplicate":
            part.asked.settle(bytes(outcome[1]))
            return []
        _, history_id, seq, time_us, recovery_id, epoch = outcome
        entry = HistoryEntry(int(history_id), part.change.kind, account_id, seq, int(epoch), int(time_us), part.body)
        if recovery_id:
            return [entry, entry._replace(id=int(recovery_id), kind="recovery", seq=seq + 1, body=part.recovery)]
        if not part.asked.basis.breach_text:
            fields = self._fields_after(part.asked.basis.fields, part.touched)
            texts = AccountTexts(account_id, epoch, b"%d" % seq, part.balance_text, fields)
            self.recent.keep(KnownAccount(part.change.after, texts))
        return [entry]

    def _touched(self, basis: Basis, change: Change) -> list[_Touched]:
        """The symbols whose rows are written."""
        before, after = basis.account.positions, change.after.positions
        # A new slot is the next in every column.
        everywhere = change.kind == "adjustment" or not basis.has_slot
        touched = []
        for number, symbol in enumerate(self._symbols, start=1):
            position = after.get(symbol, FLAT)
            if everywhere or position != before.get(symbol, FLAT):
                encoded = change.encoded.get(symbol)
                if encoded is None:
                    encoded = b"" if position == FLAT else encode_position(position).encode()
                touched.append((number, encoded, position))
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
            prices=basis.market.prices,
            mark_version=basis.market.mark_version,
            liquidation_id=int(basis.breach_text),
            cause=f"a {change.row.get('kind', change.kind)}",
        )

    def _fields_after(self, fields: tuple[bytes, ...], touched: list[_Touched]) -> tuple[bytes, ...]:
        """The fields of a positions hash after a commit that has ``touched`` some of them."""
        items = iter(fields)
        held = dict(zip(items, items, strict=True))
        for number, encoded, _ in touched:
            name = self._field_names[number - 1]
            if encoded:
                held[name] = encoded
            else:
                held.pop(name, None)
        return tuple(chain.from_iterable(held.items()))
