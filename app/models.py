"""History in Postgres: rows are only ever added. What is true now is in Redis, never here."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Any, ClassVar, Final

from sqlalchemy import ARRAY, BigInteger, CheckConstraint, ForeignKey, Index, MetaData, Numeric, Text, UniqueConstraint
from sqlalchemy.dialects.postgresql import JSONB, TIMESTAMP
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.schema import SchemaItem


class Base(DeclarativeBase):
    """Tables with predictable constraint names, so that migrations can speak of them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        str: Text,
        int: BigInteger,
        Decimal: Numeric,
        datetime: TIMESTAMP(timezone=True),
        dict[str, Any]: JSONB,
        list[str]: ARRAY(Text),
    }


class HistoryRow(Base):
    """What every row of history has: its id from the one counter, and its place in its account's history.

    ``seq`` counts an account's rows, of all kinds, from 1 without a gap; ``epoch`` is the state's when it was booked;
    ``timestamp`` is Redis TIME; ``mark_version`` says on which marks it was decided.
    """

    __abstract__ = True

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False, sort_order=-2)
    account_id: Mapped[str] = mapped_column(sort_order=-1)
    seq: Mapped[int]
    epoch: Mapped[int]
    timestamp: Mapped[datetime]
    mark_version: Mapped[int]


def _history_table(*more: SchemaItem) -> tuple[SchemaItem, ...]:
    return (
        UniqueConstraint("account_id", "seq"),
        Index(None, "timestamp", "id"),
        *_bounds(id="> 0", seq="> 0", epoch="> 0", mark_version=">= 0"),
        *more,
    )


def _bounds(**columns: str) -> list[CheckConstraint]:
    """What the numbers of a row may be: ``id="> 0"``."""
    return [CheckConstraint(f"{column} {bound}", name=f"{column}_bound") for column, bound in columns.items()]


def _finite(*columns: str) -> list[CheckConstraint]:
    """A numeric column of Postgres takes NaN and infinities; history does not."""
    return [CheckConstraint(f"{column} - {column} = 0", name=f"{column}_finite") for column in columns]


class Trade(HistoryRow):
    """A booked trade, and the balance, position and margin it left."""

    __tablename__ = "trades"

    symbol: Mapped[str]
    side: Mapped[str]
    quantity: Mapped[Decimal]
    price: Mapped[Decimal]
    client_trade_id: Mapped[str]
    mark_price: Mapped[Decimal]
    realised_pnl: Mapped[Decimal]
    balance_after: Mapped[Decimal]
    quantity_after: Mapped[Decimal]
    cost_after: Mapped[Decimal]
    equity_after: Mapped[Decimal]
    used_margin_after: Mapped[Decimal]
    __table_args__ = _history_table(
        Index(None, "account_id", "client_trade_id"),
        CheckConstraint("side IN ('buy', 'sell')", name="side"),
        CheckConstraint("quantity > 0", name="quantity_positive"),
        CheckConstraint("price > 0", name="price_positive"),
        *_finite("quantity", "price", "mark_price", "realised_pnl", "balance_after", "quantity_after", "cost_after"),
        *_finite("equity_after", "used_margin_after"),
        *_bounds(mark_price="> 0", used_margin_after=">= 0"),
    )


class Transfer(HistoryRow):
    """A deposit or a withdrawal, and what it left; the margin is null where an open position had no mark."""

    __tablename__ = "transfers"

    kind: Mapped[str]
    amount: Mapped[Decimal]
    client_transfer_id: Mapped[str]
    balance_after: Mapped[Decimal]
    equity_after: Mapped[Decimal | None]
    used_margin_after: Mapped[Decimal | None]
    __table_args__ = _history_table(
        Index(None, "account_id", "client_transfer_id"),
        CheckConstraint("kind IN ('deposit', 'withdrawal')", name="kind"),
        CheckConstraint("amount > 0", name="amount_positive"),
        *_finite("amount", "balance_after", "equity_after", "used_margin_after"),
        *_bounds(used_margin_after=">= 0"),
    )


class _Evidence:
    """What a breach was opened or ended on; anyone can recompute the verdict from it."""

    reason: Mapped[str]
    marks: Mapped[dict[str, Any]]
    positions: Mapped[dict[str, Any]]
    balance: Mapped[Decimal]
    equity: Mapped[Decimal]
    used_margin: Mapped[Decimal]
    maintenance_margin: Mapped[Decimal]


class Liquidation(_Evidence, HistoryRow):
    """The opening of a breach: one row, however many sweeps, watchdogs or restarts see it."""

    __tablename__ = "liquidations"
    __table_args__ = _history_table(
        *_finite("balance", "equity", "used_margin", "maintenance_margin"),
        *_bounds(used_margin=">= 0", maintenance_margin=">= 0"),
    )


class Recovery(_Evidence, HistoryRow):
    """The end of a breach."""

    __tablename__ = "recoveries"

    liquidation_id: Mapped[int]
    __table_args__ = _history_table(
        UniqueConstraint("liquidation_id"),
        *_finite("balance", "equity", "used_margin", "maintenance_margin"),
        *_bounds(used_margin=">= 0", maintenance_margin=">= 0", liquidation_id="> 0"),
    )


class Adjustment(HistoryRow):
    """A change made by hand in Redis, adopted: what history had, and what it found."""

    __tablename__ = "adjustments"

    reason: Mapped[str]
    balance_before: Mapped[Decimal]
    balance_after: Mapped[Decimal]
    positions_before: Mapped[dict[str, Any]]
    positions_after: Mapped[dict[str, Any]]
    __table_args__ = _history_table(*_finite("balance_before", "balance_after"))


class Epoch(Base):
    """The generations of the state. Rows of history are taken only from the newest, which fences older writers."""

    __tablename__ = "epochs"

    epoch: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    signature: Mapped[str]
    reason: Mapped[str]
    timestamp: Mapped[datetime]


class ApiKey(Base):
    """A key to the routes. Of its secret only the hash is kept; ``{*}`` as its accounts is every account."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    secret_sha256: Mapped[bytes]
    scopes: Mapped[list[str]]
    accounts: Mapped[list[str]]
    timestamp: Mapped[datetime]
    __table_args__ = (
        CheckConstraint("octet_length(secret_sha256) = 32", name="secret_sha256"),
        CheckConstraint("cardinality(scopes) > 0", name="scopes_some"),
        CheckConstraint("scopes <@ ARRAY['read', 'trade', 'mark', 'operate']", name="scopes_known"),
        CheckConstraint("cardinality(accounts) > 0", name="accounts_some"),
    )


class ApiKeyRevocation(Base):
    """The end of a key. There is no way back: a new key is made instead."""

    __tablename__ = "api_key_revocations"

    key_id: Mapped[str] = mapped_column(ForeignKey("api_keys.id"), primary_key=True)
    timestamp: Mapped[datetime]


class Halt(Base):
    """Trading was halted: why, and by which key; without one, by the command or by hand."""

    __tablename__ = "halts"

    id: Mapped[str] = mapped_column(primary_key=True)
    reason: Mapped[str]
    key_id: Mapped[str | None]
    timestamp: Mapped[datetime]


class Resumption(Base):
    """The end of a halt."""

    __tablename__ = "resumptions"

    halt_id: Mapped[str] = mapped_column(ForeignKey("halts.id"), primary_key=True)
    reason: Mapped[str]
    key_id: Mapped[str | None]
    timestamp: Mapped[datetime]


HISTORY: Final[dict[str, type[HistoryRow]]] = {
    "trade": Trade,
    "transfer": Transfer,
    "liquidation": Liquidation,
    "recovery": Recovery,
    "adjustment": Adjustment,
}
"""The table of each kind of entry that the outbox carries."""
