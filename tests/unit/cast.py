"""The accounts that tests are about, with their arithmetic, and the market they meet.

BTC-PERP is the contract of the task: initial margin 20 %, maintenance 10 %, band 10 %, tick 0.01, lot 0.000001.
ETH-PERP stands for "more symbols are configuration": other rates, so that a mixed-up rate shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Final

import numpy as np

from app.columns import INT64, Chunk, Marks
from app.contracts import BTC_PERP, Contract
from app.numbers import to_units
from app.services.trading import Account, Mark, Market, Position, Side, TradeOrder, TransferKind, TransferOrder

BTC: Final = "BTC-PERP"
ETH: Final = "ETH-PERP"

ETH_PERP: Final = Contract(
    symbol=ETH,
    tick_size=Decimal("0.01"),
    lot_size=Decimal("0.0001"),
    initial_rate=Decimal("0.25"),
    maintenance_rate=Decimal("0.125"),
    price_band=Decimal("0.10"),
    price_max=Decimal(100_000),
    position_limit=Decimal(10_000),
)
CONTRACTS: Final = {BTC: BTC_PERP, ETH: ETH_PERP}

UNIT: Final = Decimal("0.00000001")
"""One step of money."""

TICK: Final = Decimal("0.01")
LOT: Final = Decimal("0.000001")

NOON_US: Final = 1_767_268_800_000_000
"""2026-01-01T12:00:00Z."""


def amounts(*values: str | int) -> tuple[Decimal, ...]:
    """Several decimals, to compare several with."""
    return tuple(Decimal(value) for value in values)


def holding_btc(account_id: str, *, balance: str, quantity: str = "1", cost: str = "50000") -> Account:
    """An account that holds BTC-PERP and nothing else; ``quantity`` and ``cost`` are below 0 for a short one."""
    return Account(account_id, Decimal(balance), {BTC: Position(Decimal(quantity), Decimal(cost))})


# Long 1 at 50,000 with a balance of 14,000: equity(m) = 14,000 + m - 50,000 = m - 36,000.
# A candidate below m - 36,000 = 0.1 m, so below m = 40,000. Restored from m - 36,000 = 0.2 m, so from m = 45,000.
ALICE_LONG_1_BTC: Final = holding_btc("alice", balance="14000")
ALICE_LINE: Final = Decimal(40_000)
ALICE_RESTORED: Final = Decimal(45_000)

# Short 1 at 50,000 with a balance of 16,000: equity(m) = 16,000 - m + 50,000 = 66,000 - m.
# A candidate above 66,000 - m = 0.1 m, so above m = 60,000. Restored from 66,000 - m = 0.2 m, so down from m = 55,000.
CAROL_SHORT_1_BTC: Final = holding_btc("carol", balance="16000", quantity="-1", cost="-50000")
CAROL_LINE: Final = Decimal(60_000)
CAROL_RESTORED: Final = Decimal(55_000)

# One tick of the mark takes 0.01 of a short BTC's equity and asks 0.001 more of maintenance margin, so with 0.011 more
# in cash than Carol the line is one tick further up: 16,000.011 + 50,000 = 1.1 x 60,000.01. Safe at 60,000.
CAROL_SHORT_1_BTC_ONE_TICK_SAFE: Final = holding_btc("carol", balance="16000.011", quantity="-1", cost="-50000")

# Long 1 BTC at 50,000 and short 10 ETH at 2,000 with a balance of 20,000. At marks of 48,000 and 2,400:
#   BTC: notional 48,000, pnl 48,000 - 50,000 = -2,000, used 0.2 x = 9,600, maintenance 0.1 x = 4,800
#   ETH: notional 24,000, pnl -24,000 + 20,000 = -4,000, used 0.25 x = 6,000, maintenance 0.125 x = 3,000
#   equity 20,000 - 2,000 - 4,000 = 14,000, used margin 15,600, maintenance margin 7,800, free margin -1,600
DAVE_LONG_1_BTC_SHORT_10_ETH: Final = Account(
    "dave",
    Decimal(20_000),
    {BTC: Position(Decimal(1), Decimal(50_000)), ETH: Position(Decimal(-10), Decimal(-20_000))},
)
DAVES_PRICES: Final = {BTC: Decimal(48_000), ETH: Decimal(2_400)}

ERIN_FLAT: Final = Account("erin", Decimal(10_000))
FRANK_FLAT_OWING_5: Final = Account("frank", Decimal(-5))


def market(
    btc: str | None = "50000",
    eth: str | None = None,
    *,
    contracts: Mapping[str, Contract] = CONTRACTS,
    age_us: int = 0,
    mark_max_age_seconds: float | None = None,
    halted: bool = False,
) -> Market:
    """Noon, with these marks; each was accepted ``age_us`` ago."""
    return Market(
        contracts=contracts,
        marks={
            symbol: Mark(Decimal(price), NOON_US - age_us)
            for symbol, price in ((BTC, btc), (ETH, eth))
            if price is not None
        },
        mark_version=7,
        now_us=NOON_US,
        mark_max_age_seconds=mark_max_age_seconds,
        halted=halted,
    )


def order(side: Side, quantity: str | Decimal, price: str | Decimal, *, symbol: str = BTC) -> TradeOrder:
    """A trade of the account it is sent for."""
    return TradeOrder("anyone", symbol, side, Decimal(quantity), Decimal(price))


def buy(quantity: str | Decimal, price: str | Decimal, *, symbol: str = BTC) -> TradeOrder:
    return order("buy", quantity, price, symbol=symbol)


def sell(quantity: str | Decimal, price: str | Decimal, *, symbol: str = BTC) -> TradeOrder:
    return order("sell", quantity, price, symbol=symbol)


def transfer(kind: TransferKind, amount: str | Decimal) -> TransferOrder:
    return TransferOrder("anyone", kind, Decimal(amount))


def chunk_of(
    accounts: Sequence[Account],
    prices: Mapping[str, Decimal],
    *,
    breaches: Sequence[int] | None = None,
    first_slot: int = 0,
    contracts: Mapping[str, Contract] = CONTRACTS,
) -> Chunk:
    """The packed rows of ``accounts``, as a sweep reads them; ``breaches`` are liquidation ids, 0 for none."""

    def column(values: Sequence[Decimal]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.array([to_units(value) for value in values], dtype=INT64)

    return Chunk(
        first_slot=first_slot,
        balance=column([account.balance for account in accounts]),
        breach=np.array([0] * len(accounts) if breaches is None else breaches, dtype=INT64),
        quantity={symbol: column([account.position(symbol).quantity for account in accounts]) for symbol in contracts},
        cost={symbol: column([account.position(symbol).cost for account in accounts]) for symbol in contracts},
        marks=Marks(prices=prices, timestamps_us=dict.fromkeys(prices, NOON_US), version=7, by_hand=()),
    )
