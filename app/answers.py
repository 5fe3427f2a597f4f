"""The answer to an operation, made from its row of history: the first time, and every time it is asked again.

A row says all that its answer says, so Redis remembers the row alone under the operation id, and a state that was
restored from history answers as the lost one did.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal

from app.database import format_timestamp
from app.history import timestamp_of
from app.numbers import EXACT, format_decimal
from app.services.margin import AccountMargin, average_price
from app.services.trading import TradeOrder, TransferOrder

RowKind = Literal["trade", "transfer"]

_CONTENT: dict[RowKind, tuple[str, ...]] = {
    "trade": ("symbol", "side", "quantity", "price"),
    "transfer": ("kind", "amount"),
}


def trade_content(order: TradeOrder) -> dict[str, str]:
    """What makes two trades under one operation id the same."""
    return {
        "symbol": order.symbol,
        "side": order.side,
        "quantity": format_decimal(order.quantity),
        "price": format_decimal(order.price),
    }


def transfer_content(order: TransferOrder) -> dict[str, str]:
    """What makes two transfers under one operation id the same."""
    return {"kind": order.kind, "amount": format_decimal(order.amount)}


def content_of(kind: RowKind, row: Mapping[str, Any]) -> dict[str, str]:
    """What was asked for, as a row of history has it."""
    return {name: row[name] for name in _CONTENT[kind]}


def margin_after(valued: AccountMargin[Decimal] | None) -> dict[str, str | None]:
    """The members of a row that say what margin it left; null where an open position had no mark."""
    if valued is None:
        return {"equity_after": None, "used_margin_after": None}
    return {"equity_after": format_decimal(valued.equity), "used_margin_after": format_decimal(valued.used_margin)}


def operation_answer(
    kind: RowKind, account_id: str, *, history_id: int, time_us: int, row: Mapping[str, Any], recorded: bool
) -> dict[str, Any]:
    """The body of the 201, and of every 200 that repeats it."""
    equity, used_margin = row["equity_after"], row["used_margin_after"]
    free_margin = None
    if equity is not None:
        free_margin = format_decimal(EXACT.subtract(Decimal(equity), Decimal(used_margin)))
    head = {"account_id": account_id, "timestamp": format_timestamp(timestamp_of(time_us)), **content_of(kind, row)}
    margin = {
        "balance": row["balance_after"],
        "equity": equity,
        "used_margin": used_margin,
        "free_margin": free_margin,
        "recorded": recorded,
    }
    if kind == "transfer":
        return {"transfer_id": history_id, "client_transfer_id": row["client_transfer_id"], **head, **margin}
    return {
        "trade_id": history_id,
        "client_trade_id": row["client_trade_id"],
        **head,
        "mark_price": row["mark_price"],
        "realised_pnl": row["realised_pnl"],
        "position": _position(Decimal(row["quantity_after"]), Decimal(row["cost_after"])),
        **margin,
    }


def _position(quantity: Decimal, cost: Decimal) -> dict[str, str | None]:
    """A position in an answer; a flat one has no average price."""
    average = format_decimal(average_price(quantity=quantity, cost=cost)) if quantity else None
    return {"quantity": format_decimal(quantity), "avg_price": average}
