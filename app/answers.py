"""The answer to an operation, made from its row of history: the first time, and every time it is asked again.

A row says all that its answer says, so Redis remembers the row alone under the operation id, and a state that was
restored from history answers as the lost one did.
"""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal

from app.history import timestamp_text
from app.numbers import EXACT, format_decimal
from app.records import PositionTexts, position_texts
from app.services.margin import AccountMargin
from app.services.trading import Position, TradeOrder, TransferOrder

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


def shown_after(
    *, equity: Decimal | None, used_margin: Decimal | None, position: PositionTexts | None
) -> dict[str, Any]:
    """The members of an answer that its row says only together: what follows from the numbers in it."""
    shown: dict[str, Any] = {"free_margin": None}
    if equity is not None and used_margin is not None:
        shown["free_margin"] = format_decimal(EXACT.subtract(equity, used_margin))
    if position is not None:
        shown["position"] = {"quantity": position.quantity, "avg_price": position.average_price}
    return shown


def shown_of_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """``shown_after`` of a row of history."""
    equity, used_margin = row["equity_after"], row["used_margin_after"]
    return shown_after(
        equity=None if equity is None else Decimal(equity),
        used_margin=None if used_margin is None else Decimal(used_margin),
        position=position_texts(Position(Decimal(row["quantity_after"]), Decimal(row["cost_after"])))
        if "quantity_after" in row
        else None,
    )


def operation_answer(
    kind: RowKind,
    account_id: str,
    *,
    history_id: int,
    time_us: int,
    row: Mapping[str, Any],
    shown: Mapping[str, Any],
    recorded: bool,
) -> dict[str, Any]:
    """The body of the 201, and of every 200 that repeats it; ``shown`` is what ``shown_of_row`` makes of ``row``."""
    timestamp = timestamp_text(time_us)
    if kind == "transfer":
        return {
            "transfer_id": history_id,
            "client_transfer_id": row["client_transfer_id"],
            "account_id": account_id,
            "timestamp": timestamp,
            "kind": row["kind"],
            "amount": row["amount"],
            "balance": row["balance_after"],
            "equity": row["equity_after"],
            "used_margin": row["used_margin_after"],
            "free_margin": shown["free_margin"],
            "recorded": recorded,
        }
    return {
        "trade_id": history_id,
        "client_trade_id": row["client_trade_id"],
        "account_id": account_id,
        "timestamp": timestamp,
        "symbol": row["symbol"],
        "side": row["side"],
        "quantity": row["quantity"],
        "price": row["price"],
        "mark_price": row["mark_price"],
        "realised_pnl": row["realised_pnl"],
        "position": shown["position"],
        "balance": row["balance_after"],
        "equity": row["equity_after"],
        "used_margin": row["used_margin_after"],
        "free_margin": shown["free_margin"],
        "recorded": recorded,
    }
