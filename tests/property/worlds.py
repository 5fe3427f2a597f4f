"""Accounts, marks and orders to try, most of them close to where a verdict turns; and the formulas once more.

The formulas here are in ``fractions.Fraction`` and know nothing of ``app.services.margin``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from typing import Final

from hypothesis import strategies as st

from app.contracts import AMOUNT_LIMIT, BTC_PERP, Contract
from app.numbers import UNITS_PER_ONE, from_units
from app.services.trading import Account, Mark, Market, Position, Side, TradeOrder
from tests.unit.cast import BTC, ETH, ETH_PERP, NOON_US

XXL: Final = "XXL-PERP"
CONTRACTS: Final[Mapping[str, Contract]] = {
    BTC: BTC_PERP,
    ETH: ETH_PERP,
    # The largest contract that starts: 1,000 x 40,000,000 = 4e10.
    XXL: replace(BTC_PERP, symbol=XXL, price_max=Decimal(40_000_000)),
}
AMOUNT_LIMIT_UNITS: Final = int(AMOUNT_LIMIT) * UNITS_PER_ONE


@dataclass(frozen=True)
class World:
    """An account and the marks it is valued at."""

    account: Account
    prices: Mapping[str, Decimal]

    @property
    def market(self) -> Market:
        return Market(
            contracts=CONTRACTS,
            marks={symbol: Mark(price, NOON_US) for symbol, price in self.prices.items()},
            mark_version=1,
            now_us=NOON_US,
        )


@dataclass(frozen=True)
class Reference:
    """An account's margin, exact, by another way."""

    equity: Fraction
    notional: Fraction
    used_margin: Fraction
    maintenance_margin: Fraction

    @property
    def candidate(self) -> bool:
        return self.notional != 0 and self.maintenance_margin - self.equity > 0

    @property
    def restored(self) -> bool:
        return self.notional == 0 or self.equity - self.used_margin >= 0


def reference(account: Account, prices: Mapping[str, Decimal]) -> Reference:
    """What DESIGN section 2 says of ``account``, in fractions."""
    equity, notional, used, maintenance = Fraction(account.balance), Fraction(0), Fraction(0), Fraction(0)
    for symbol, held in account.positions.items():
        value = Fraction(held.quantity) * Fraction(prices[symbol])
        equity += value - Fraction(held.cost)
        size = value if value > 0 else -value
        notional += size
        used += size * Fraction(CONTRACTS[symbol].initial_rate)
        maintenance += size * Fraction(CONTRACTS[symbol].maintenance_rate)
    return Reference(equity, notional, used, maintenance)


def units(value: Decimal | Fraction) -> int:
    """How many whole units of 1e-8 there are in ``value``, rounded down."""
    return int((Fraction(value) * UNITS_PER_ONE).__floor__())


def marks(contract: Contract) -> st.SearchStrategy[Decimal]:
    """Marks of a symbol: around 50,000, anywhere, and at the edges; with up to 8 decimals."""
    highest = units(contract.price_max)
    return st.one_of(
        st.integers(3_000_000, 7_000_000).map(lambda cents: Decimal(cents).scaleb(-2)),
        st.integers(UNITS_PER_ONE, highest).map(from_units),
        st.sampled_from([contract.price_max, Decimal(1), Decimal("12345.67890123")]),
    )


@st.composite
def positions(draw: st.DrawFn, contract: Contract, mark: Decimal) -> Position:
    """A position in a symbol, bought or sold somewhere around the mark and perhaps reduced since."""
    lots_max = int(contract.position_limit / contract.lot_size)
    lots = draw(st.one_of(st.integers(1, 5_000_000), st.integers(1, lots_max), st.sampled_from([1, lots_max])))
    ticks_max = int(contract.price_max / contract.tick_size)
    at_mark = int(mark / contract.tick_size)
    ticks = draw(st.integers(max(1, at_mark // 2), max(1, min(ticks_max, at_mark * 3 // 2))))
    quantity = min(lots, lots_max) * contract.lot_size
    # Cost that a partial close rounded: up to a few units beside a multiple of the tick.
    cost = quantity * ticks * contract.tick_size + from_units(draw(st.integers(0, 3)))
    side = draw(st.sampled_from([1, -1]))
    return Position(side * quantity, side * min(cost, AMOUNT_LIMIT))


@st.composite
def worlds(
    draw: st.DrawFn, *, symbols: Sequence[str] = tuple(CONTRACTS), open_min: int = 0, near: bool = False
) -> World:
    """An account with positions in some of ``symbols``, its cash such that equity is near one of its lines.

    ``near`` keeps it within a few units of the line.
    """
    prices = {symbol: draw(marks(CONTRACTS[symbol])) for symbol in symbols}
    held = draw(st.lists(st.sampled_from(list(symbols)), unique=True, min_size=open_min, max_size=len(symbols)))
    account = Account(
        "somebody", Decimal(0), {symbol: draw(positions(CONTRACTS[symbol], prices[symbol])) for symbol in held}
    )
    at_zero = reference(account, prices)
    line = draw(st.sampled_from([at_zero.maintenance_margin, at_zero.used_margin, Fraction(0)])) - at_zero.equity
    few = st.integers(-3, 3)
    away = (
        few
        if near
        else st.one_of(
            few,
            st.integers(-(10**8), 10**8),
            st.integers(-(10**13), 10**13),
            st.integers(-AMOUNT_LIMIT_UNITS, AMOUNT_LIMIT_UNITS),
        )
    )
    balance = max(-AMOUNT_LIMIT_UNITS, min(AMOUNT_LIMIT_UNITS, units(line) + draw(away)))
    return World(replace(account, balance=from_units(balance)), prices)


def prices_in_band(contract: Contract, mark: Decimal) -> st.SearchStrategy[Decimal]:
    """Prices of the tick within the band around the mark, both edges often."""
    tick = Fraction(contract.tick_size)
    lowest = -int((-(1 - Fraction(contract.price_band)) * Fraction(mark) / tick).__floor__())
    highest = min(
        int(((1 + Fraction(contract.price_band)) * Fraction(mark) / tick).__floor__()),
        int(Fraction(contract.price_max) / tick),
    )
    assert lowest <= highest
    return st.one_of(st.integers(lowest, highest), st.sampled_from([lowest, highest])).map(
        lambda ticks: ticks * contract.tick_size
    )


@st.composite
def orders_in_band(draw: st.DrawFn, world: World) -> TradeOrder:
    """A trade within band and limit of the symbol: any size, and often exactly, or a lot beside, what is held."""
    symbol = draw(st.sampled_from(list(world.prices)))
    contract, held = CONTRACTS[symbol], world.account.position(symbol).quantity
    price = draw(prices_in_band(contract, world.prices[symbol]))
    side: Side = draw(st.sampled_from(["buy", "sell"]))
    room = contract.position_limit - (held if side == "buy" else -held)
    lots_max = int(room / contract.lot_size)
    if not lots_max:
        side, lots_max = ("sell" if side == "buy" else "buy"), 2 * int(contract.position_limit / contract.lot_size)
    held_lots = int(abs(held) / contract.lot_size)
    sizes = [st.integers(1, min(lots_max, 1_000_000)), st.integers(1, lots_max)]
    if held_lots:
        sizes += [st.integers(1, min(held_lots, lots_max)), st.sampled_from([held_lots - 1, held_lots, held_lots + 1])]
    lots = max(1, min(draw(st.one_of(sizes)), lots_max))
    return TradeOrder("somebody", symbol, side, lots * contract.lot_size, price)


@st.composite
def reductions_in_band(draw: st.DrawFn, world: World) -> TradeOrder:
    """A trade that takes part or all of an open position away, at any price the band allows."""
    symbol = draw(st.sampled_from(list(world.account.positions)))
    contract, held = CONTRACTS[symbol], world.account.position(symbol).quantity
    lots = draw(st.integers(1, int(abs(held) / contract.lot_size)))
    price = draw(prices_in_band(contract, world.prices[symbol]))
    return TradeOrder("somebody", symbol, "sell" if held > 0 else "buy", lots * contract.lot_size, price)
