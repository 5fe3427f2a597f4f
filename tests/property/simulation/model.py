"""The oracle of the simulation: what every account must be, kept by the plain rules of ``tests/oracle``.

An operation is applied when Redis says under its id that it was committed, at the mark its row names; so it is known
of a crashed one too whether it happened, and nothing but its own row decides that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final

import orjson

from app import redis_client as keys
from app.services.trading import TradeOrder, TransferOrder
from tests.oracle.rules import Expected, Oracle, Position

BTC: Final = "BTC-PERP"


@dataclass(slots=True)
class Operation:
    """A trade or a transfer that a client sent under one id, and what became of it."""

    order: TradeOrder | TransferOrder
    id: str
    history_id: int | None = None
    acknowledged: bool = False
    refused: bool = False

    @property
    def kind(self) -> str:
        """``trade``, ``deposit`` or ``withdrawal``."""
        return "trade" if isinstance(self.order, TradeOrder) else self.order.kind

    @property
    def key(self) -> str:
        """Where Redis remembers its first result."""
        return keys.operation_key(self.kind, self.order.account_id, self.id)


@dataclass(slots=True)
class Model:
    """The accounts as they must be, and every price that each mark version has had."""

    oracle: Oracle = field(default_factory=Oracle)
    prices: dict[int, set[Decimal]] = field(default_factory=dict)
    price: Decimal = Decimal(0)

    def marked(self, version: int, price: Decimal) -> None:
        """A mark was accepted or adopted."""
        self.prices.setdefault(version, set()).add(price)
        self.set_price(price)

    def set_price(self, price: Decimal) -> None:
        """The price that the next decision is made at."""
        self.price = price
        self.oracle.marks[BTC] = price

    def expect(self, operation: Operation) -> Expected:
        """What the rules answer to ``operation`` now; a booked one is part of the account afterwards."""
        order = operation.order
        if isinstance(order, TradeOrder):
            return self.oracle.trade(
                account_id=order.account_id,
                symbol=order.symbol,
                side=order.side,
                quantity=order.quantity,
                price=order.price,
                client_trade_id=operation.id,
            )
        return self.oracle.transfer(
            account_id=order.account_id, kind=order.kind, amount=order.amount, client_transfer_id=operation.id
        )

    def apply(self, operation: Operation, remembered: bytes) -> None:
        """Make a committed operation part of its account, and compare what its row says with the rules."""
        history_id, _, body = remembered.split(b"\n", 2)
        if operation.history_id is not None:
            assert operation.history_id == int(history_id), f"{operation} was booked again as {history_id!r}"
            return
        operation.history_id = int(history_id)
        row: dict[str, Any] = orjson.loads(body)
        decided_at = self.prices[row["mark_version"]]
        if "mark_price" in row:
            assert Decimal(row["mark_price"]) in decided_at, f"{row} is not on a mark of its version, {decided_at}"
            decided_at = {Decimal(row["mark_price"])}
        now = self.price
        try:
            answers = []
            for price in decided_at:
                self.set_price(price)
                answers.append(self.expect(operation))
                if answers[-1].status == 201:
                    break
            expected = answers[-1]
            assert expected.status == 201, f"{operation} was booked as {row}; the rules say {answers}"
        finally:
            self.set_price(now)
        account = self.oracle.accounts[operation.order.account_id]
        assert Decimal(row["balance_after"]) == account.balance, row
        if "realised_pnl" in row:
            held = account.positions.get(BTC, Position(Decimal(0), Decimal(0)))
            assert Decimal(row["realised_pnl"]) == expected.figures["realised_pnl"], row
            assert (Decimal(row["quantity_after"]), Decimal(row["cost_after"])) == (held.quantity, held.cost), row

    def records(self) -> dict[str, tuple[Decimal, Decimal, Decimal]]:
        """Balance, quantity and cost of every account."""
        flat = Position(Decimal(0), Decimal(0))
        return {
            name: (account.balance, held.quantity, held.cost)
            for name, account in self.oracle.accounts.items()
            for held in [account.positions.get(BTC, flat)]
        }
