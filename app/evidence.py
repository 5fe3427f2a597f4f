"""What a verdict rested on, written into its row of history, so that anyone can recompute it."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import orjson

from app.numbers import format_decimal
from app.services.margin import AccountMargin
from app.services.trading import Account


def shown_record(account: Account) -> dict[str, dict[str, str]]:
    """Positions as history keeps them: quantity and cost by symbol."""
    return {
        symbol: {"quantity": format_decimal(position.quantity), "cost": format_decimal(position.cost)}
        for symbol, position in account.positions.items()
    }


def liquidation_body(
    account: Account, valued: AccountMargin[Decimal], *, prices: Mapping[str, Decimal], mark_version: int
) -> bytes:
    """The row of a breach's opening, its decimals as strings."""
    held = ", ".join(
        f"{format_decimal(position.quantity)} {symbol} at {format_decimal(prices[symbol])}"
        for symbol, position in account.positions.items()
    )
    reason = (
        f"equity {format_decimal(valued.equity)} is below maintenance margin "
        f"{format_decimal(valued.maintenance_margin)} with {held}"
    )
    return orjson.dumps({**_evidence(account, valued, prices, mark_version), "reason": reason})


def recovery_body(
    account: Account,
    valued: AccountMargin[Decimal],
    *,
    prices: Mapping[str, Decimal],
    mark_version: int,
    liquidation_id: int,
    cause: str,
) -> bytes:
    """The row of a breach's end; ``cause`` says what restored the account: ``a deposit``, ``the mark``."""
    if account.positions:
        reason = (
            f"{cause} restored the account: equity {format_decimal(valued.equity)}, "
            f"used margin {format_decimal(valued.used_margin)}"
        )
    else:
        reason = f"{cause} left the account flat"
    return orjson.dumps(
        {
            **_evidence(account, valued, prices, mark_version),
            "liquidation_id": liquidation_id,
            "reason": reason,
        }
    )


def _evidence(
    account: Account, valued: AccountMargin[Decimal], prices: Mapping[str, Decimal], mark_version: int
) -> dict[str, Any]:
    return {
        "mark_version": mark_version,
        "marks": {symbol: format_decimal(prices[symbol]) for symbol in account.positions},
        "positions": shown_record(account),
        "balance": format_decimal(account.balance),
        "equity": format_decimal(valued.equity),
        "used_margin": format_decimal(valued.used_margin),
        "maintenance_margin": format_decimal(valued.maintenance_margin),
    }
