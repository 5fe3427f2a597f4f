"""What a symbol is: its steps, rates and limits, checked once at start-up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from decimal import Decimal

from app.numbers import SMALLEST_UNIT, format_decimal

AMOUNT_LIMIT = Decimal(40_000_000_000)
"""The largest balance, notional or cost, in USDT: 4e10 is 4e18 units of 1e-8, which an int64 holds."""


QUANTITY_MAX = (2**63 - 1) * SMALLEST_UNIT
"""The largest quantity that a packed column holds."""


class ContractError(ValueError):
    """A contract that could not be kept exact, or whose band could make candidates."""


@dataclass(frozen=True, slots=True)
class Contract:
    """A linear perpetual, margined in USDT.

    ``tick_size`` and ``price_max`` are USDT per coin, ``lot_size`` and ``position_limit`` coins; the rates and
    ``price_band`` are fractions of one.
    """

    symbol: str
    tick_size: Decimal = Decimal("0.01")
    lot_size: Decimal = Decimal("0.000001")
    initial_rate: Decimal = Decimal("0.20")
    maintenance_rate: Decimal = Decimal("0.10")
    price_band: Decimal = Decimal("0.10")
    price_max: Decimal = Decimal(10_000_000)
    position_limit: Decimal = Decimal(1_000)

    def __post_init__(self) -> None:
        for number in fields(self)[1:]:
            value = getattr(self, number.name)
            if not value.is_finite() or value <= 0:
                raise ContractError(f"{self.symbol}: {number.name} must be a number above 0, not {value}")
        if (self.tick_size * self.lot_size) % SMALLEST_UNIT:
            raise ContractError(
                f"{self.symbol}: tick_size x lot_size is {self.tick_size * self.lot_size}, not a multiple of "
                f"{SMALLEST_UNIT:f}; a cash flow could not be kept exact"
            )
        if self.lot_size % SMALLEST_UNIT or self.position_limit > QUANTITY_MAX:
            raise ContractError(
                f"{self.symbol}: quantities are kept in units of {SMALLEST_UNIT:f} up to {QUANTITY_MAX:f}; "
                f"lot_size {self.lot_size} or position_limit {self.position_limit} does not fit"
            )
        if self.position_limit * self.price_max > AMOUNT_LIMIT:
            raise ContractError(
                f"{self.symbol}: position_limit x price_max is {self.position_limit * self.price_max:f}, "
                f"above {AMOUNT_LIMIT:f}"
            )
        if not self.maintenance_rate <= self.initial_rate < 1:
            raise ContractError(f"{self.symbol}: rates must be maintenance <= initial < 1")
        if self.price_band > self.maintenance_rate:
            raise ContractError(
                f"{self.symbol}: price_band {self.price_band} exceeds maintenance_rate {self.maintenance_rate}; "
                "an accepted trade could make its account a candidate"
            )


BTC_PERP = Contract(symbol="BTC-PERP")


def contracts_digest(contracts: Iterable[Contract]) -> str:
    """Sixteen hex digits that two processes share only if they judge by the same contracts."""
    described = sorted(
        (
            {name: value if name == "symbol" else format_decimal(value) for name, value in asdict(contract).items()}
            for contract in contracts
        ),
        key=lambda contract: contract["symbol"],
    )
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
