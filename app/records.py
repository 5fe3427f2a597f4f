"""An account as Redis holds it: the user's keys parsed, compared with the packed row, and written back.

The user's keys are the record and may be edited by hand. A record *agrees* when its texts are the ones Plimsoll writes
and the ledger holds the same numbers, which are those of the account's last row of history; a record that can be read
but does not agree is adopted; one that cannot be read is quarantined. The packed row is a copy of what the ledger
holds: where it differs it is damaged, and written again.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache
from typing import Any, Final

from app import errors
from app.contracts import AMOUNT_LIMIT, QUANTITY_MAX, Contract
from app.numbers import SMALLEST_UNIT, exact, format_decimal, from_units, is_multiple, parse_decimal, to_units
from app.services import margin
from app.services.trading import FLAT, Account, Mark, Position

UNIT: Final = struct.Struct("<q")
"""One value of a column: a little-endian int64 in units of 1e-8."""

NOTHING: Final = UNIT.pack(0)
_POSITION: Final = struct.Struct("<qq")

POSITIONS_REMEMBERED: Final = 16_384
"""Of the positions decoded last; about half a kilobyte each."""


class RecordError(ValueError):
    """A key of the record that cannot be read as what it should be."""


@dataclass(frozen=True, slots=True)
class OpenBreach:
    """The breach an account is in: the id of its liquidation row and its time in microseconds."""

    id: int
    since_us: int


@dataclass(slots=True)
class Snapshot:
    """What one call of ``read_account`` found. Texts are kept as they were read: a commit compares them.

    It is not frozen because every read makes one: to set seventeen attributes of a frozen one takes twice as long.
    """

    account_id: str
    operation: bytes
    balance_text: bytes
    fields: tuple[bytes, ...]
    slot: int | None
    seq_text: bytes
    breach_text: bytes
    breach_at: bytes
    mark_version: int
    halted: bool
    now_us: int
    packed_balance: bytes
    packed_breach: bytes
    packed_positions: Mapping[str, tuple[bytes, bytes]]
    mark_texts: Mapping[str, tuple[bytes, bytes, bytes]]
    ledger_balance: bytes = b""
    ledger_positions: Mapping[str, tuple[bytes, bytes]] = field(default_factory=dict)

    @property
    def seq(self) -> int:
        """How many rows of history the account has."""
        return int(self.seq_text or 0)

    @property
    def breach(self) -> OpenBreach | None:
        """The open breach, if there is one."""
        return OpenBreach(int(self.breach_text), int(self.breach_at)) if self.breach_text else None

    @property
    def exists(self) -> bool:
        """An account exists iff its balance key does."""
        return bool(self.balance_text)

    @property
    def balance_lost(self) -> bool:
        """Whether the balance key is gone although history knows the account."""
        return not self.exists and self.seq > 0

    def prices(self, contracts: Mapping[str, Contract]) -> dict[str, Decimal]:
        """The mark prices by symbol; one that is missing or cannot be a price is left out."""
        found = {}
        for symbol, (text, _, _) in self.mark_texts.items():
            price = parse_mark(text, contracts[symbol])
            if price is not None:
                found[symbol] = price
        return found

    def marks(self, contracts: Mapping[str, Contract]) -> dict[str, Mark]:
        """The marks by symbol, as ``prices``."""
        return {
            symbol: Mark(price, int(timestamp) if (timestamp := self.mark_texts[symbol][2]).isdigit() else self.now_us)
            for symbol, price in self.prices(contracts).items()
        }

    def marks_set_by_hand(self, contracts: Mapping[str, Contract]) -> list[str]:
        """The symbols whose mark is a price that no version accounts for yet."""
        return [
            symbol
            for symbol, (text, accepted, timestamp) in self.mark_texts.items()
            if (text != accepted or not timestamp.isdigit()) and parse_mark(text, contracts[symbol]) is not None
        ]

    def account(self, contracts: Mapping[str, Contract]) -> Account:
        """The record, parsed. Raises ``RecordError``."""
        return parse_account(self.account_id, self.balance_text, self.fields, contracts)

    def known_account(self) -> Account:
        """The account as history has it: by its ledger, or by its packed row where the ledger does not say.

        All zeros where it has no slot yet.
        """
        if not self.ledger_balance:
            return self.packed_account()
        return self._account(self.ledger_balance, self.ledger_positions)

    def packed_account(self) -> Account:
        """The account as its packed row has it; all zeros where it has no slot yet."""
        return self._account(self.packed_balance, self.packed_positions)

    def _account(self, balance: bytes, positions: Mapping[str, tuple[bytes, bytes]]) -> Account:
        """The account whose packed values these are; by symbol, a quantity and a cost."""
        held = {symbol: _position(quantity, cost) for symbol, (quantity, cost) in positions.items()}
        return Account(
            self.account_id,
            balance=from_units(unpack(balance)),
            positions={symbol: position for symbol, position in held.items() if position != FLAT},
        )

    def packed_agrees(self) -> bool:
        """Whether the packed row is what the ledger says."""
        same_breach = unpack(self.packed_breach) == int(self.breach_text or 0)
        return same_breach and self.packed_account() == self.known_account()

    def agrees(self, account: Account) -> bool:
        """Whether the record is written as Plimsoll writes ``account``, and history has the same."""
        if self.slot is None or self.balance_text != format_decimal(account.balance).encode():
            return False
        written = dict(zip(self.fields[::2], self.fields[1::2], strict=True))
        return account == self.known_account() and written == {
            symbol.encode(): encode_position(position).encode() for symbol, position in account.positions.items()
        }


def _position(quantity: bytes, cost: bytes) -> Position:
    return Position(quantity=from_units(unpack(quantity)), cost=from_units(unpack(cost)))


def unpack(packed: bytes) -> int:
    """The units in one packed value; a column may end before the slot, which then holds nothing."""
    return int(UNIT.unpack(packed)[0]) if packed else 0


def pack(value: Decimal) -> bytes:
    """``value`` as one packed value."""
    return UNIT.pack(to_units(value))


def pack_position(position: Position) -> bytes:
    """Quantity and cost of ``position``, packed, as a ledger holds them."""
    return _POSITION.pack(to_units(position.quantity), to_units(position.cost))


def snapshot_from(account_id: str, symbols: Sequence[str], answer: Sequence[Any]) -> Snapshot:
    """The snapshot in an answer of ``read_account``, or in that of a commit whose guess was wrong.

    Raises ``AccountQuarantined`` for an unreadable ledger.
    """
    _, operation, balance, fields, ledger, mark_version, halted, now_us, *packed = answer
    packed_balance, packed_breach, marks, (ledger_balance, *ledger_positions) = packed
    slot, seq, breach, _, breach_at = ledger
    if (texts := b"".join(ledger)) and not texts.isdigit():
        raise errors.AccountQuarantined(f"the ledger of {account_id} cannot be read", reason="ledger")
    if not mark_version.isdigit():
        raise errors.StateDamaged("the key mark:version is not a whole number", reason="state_damaged")
    return Snapshot(
        account_id=account_id,
        operation=operation,
        balance_text=balance,
        fields=tuple(fields),
        slot=int(slot) if slot else None,
        seq_text=seq,
        breach_text=breach,
        breach_at=breach_at or b"0",
        mark_version=int(mark_version),
        halted=bool(halted),
        now_us=int(now_us),
        packed_balance=packed_balance,
        packed_breach=packed_breach,
        packed_positions={symbol: (item[3], item[4]) for symbol, item in zip(symbols, marks, strict=True)},
        mark_texts={symbol: tuple(item[:3]) for symbol, item in zip(symbols, marks, strict=True)},
        ledger_balance=ledger_balance,
        ledger_positions={
            symbol: (row[: UNIT.size], row[UNIT.size :]) for symbol, row in zip(symbols, ledger_positions, strict=True)
        },
    )


def parse_account(
    account_id: str, balance_text: bytes, fields: Sequence[bytes], contracts: Mapping[str, Contract]
) -> Account:
    """The account that the texts of its balance and positions spell. Raises ``RecordError`` naming the key."""
    positions = {}
    for name, text in zip(fields[::2], fields[1::2], strict=True):
        symbol = name.decode(errors="replace")
        contract = contracts.get(symbol)
        if contract is None:
            raise RecordError(f"positions:{account_id} has a field {symbol[:64]!r}, which is no symbol")
        try:
            position = decode_position(text, contract)
        except RecordError as error:
            raise RecordError(f"positions:{account_id} {symbol} {error}") from error
        if position != FLAT:
            positions[symbol] = position
    try:
        balance = _number(balance_text)
    except RecordError as error:
        raise RecordError(f"account:{account_id}:balance {error}") from error
    if balance.copy_abs() > AMOUNT_LIMIT or not is_multiple(balance, SMALLEST_UNIT):
        raise RecordError(f"account:{account_id}:balance is beyond {AMOUNT_LIMIT:f} or has more than 8 decimals")
    return Account(account_id, balance=balance, positions=positions)


@lru_cache(maxsize=64)
def parse_mark(text: bytes | None, contract: Contract) -> Decimal | None:
    """The mark that ``text`` spells, or None where it cannot be one. Between two marks every read finds the same."""
    try:
        price = _number(text or b"")
    except RecordError:
        return None
    return price if 0 < price <= contract.price_max and is_multiple(price, SMALLEST_UNIT) else None


@dataclass(slots=True)
class PositionTexts:
    """The numbers of a position as they are shown; a flat one has no average price."""

    quantity: str
    average_price: str | None
    cost: str

    @property
    def encoded(self) -> str:
        """The JSON of an open position, with its average price for the reader; ``cost`` is the record."""
        return f'{{"quantity": "{self.quantity}", "avg_price": "{self.average_price}", "cost": "{self.cost}"}}'


def position_texts(position: Position) -> PositionTexts:
    """``position``, each number written once."""
    quantity, cost = position.quantity, position.cost
    average_price = format_decimal(margin.average_price(quantity=quantity, cost=cost)) if quantity else None
    return PositionTexts(format_decimal(quantity), average_price, format_decimal(cost))


def encode_position(position: Position) -> str:
    """As ``PositionTexts.encoded``."""
    return position_texts(position).encoded


@lru_cache(maxsize=POSITIONS_REMEMBERED)
@exact
def decode_position(text: bytes, contract: Contract) -> Position:
    """The position that ``text`` spells; without ``cost`` it is ``quantity x avg_price``. Raises ``RecordError``.

    What was read before is not parsed again: an account is read more often than it trades.
    """
    try:
        written = _POSITION_JSON.decode(text.decode())
    except (ValueError, RecursionError) as error:
        raise RecordError("is not JSON") from error
    if not isinstance(written, dict) or "quantity" not in written or not ({"cost", "avg_price"} & written.keys()):
        raise RecordError("lacks quantity and avg_price or cost")
    quantity = _number(written["quantity"])
    # The position limit is for what opens: a position from before it was lowered is read, and can be reduced.
    if abs(quantity) > QUANTITY_MAX or not is_multiple(quantity, contract.lot_size):
        raise RecordError(f"has a quantity off the lot or beyond {QUANTITY_MAX:f}")
    if "cost" in written:
        cost = _number(written["cost"])
    else:
        average_price = _number(written["avg_price"])
        if abs(average_price) > contract.price_max:
            raise RecordError(f"has an average price beyond {contract.price_max:f}")
        cost = margin.divide_half_even(quantity * average_price, Decimal(1))
    if abs(cost) > AMOUNT_LIMIT or not is_multiple(cost, SMALLEST_UNIT) or (not quantity and cost):
        raise RecordError("has a cost that cannot be kept")
    return Position(quantity=quantity, cost=cost)


def _number(value: object) -> Decimal:
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    try:
        if not isinstance(value, str):
            raise RecordError("is not a number")
        return parse_decimal(value)
    except ValueError as error:
        raise RecordError("is not a number") from error


def _refuse_constant(name: str) -> None:
    raise ValueError(name)


_POSITION_JSON: Final = json.JSONDecoder(parse_float=str, parse_int=str, parse_constant=_refuse_constant)
