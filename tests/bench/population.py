"""A million accounts at a mark of 50,000, one in a hundred of them at the edge.

Each account has one position. At the mark, 1 % of the accounts have an equity within 0.1 % of their maintenance
margin; a tenth of those lie below it and are candidates, a few lie exactly on it and are none, all others above. Among
those above, longs stand in steps: each step of the mark down takes ``STEP_ACCOUNTS`` more of them below.

The numbers are integers of 1e-8, so nothing here is rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Final

import numpy as np
from numpy.typing import NDArray

from app.columns import INT64
from app.contracts import BTC_PERP
from app.numbers import UNITS_PER_ONE, from_units
from app.services.trading import Account, Position

SYMBOL: Final = BTC_PERP.symbol
MARK: Final = Decimal(50_000)
MARK_TICKS: Final = 5_000_000
STEP: Final = Decimal("0.006")
"""What the mark falls by from one step of longs to the next, in USDT: 490 steps of a million accounts' longs lie within
0.1 % of their line."""

STEP_ACCOUNTS: Final = 10
LONG_SHARE: Final = 0.7
SEED: Final = 20220124
PAIRS: Final = 20_000
"""So many different positions (quantity and cost) are shared out among the accounts; balances are each one's own."""

Units = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Population:
    """The accounts, by slot: balance, quantity and cost in units of 1e-8."""

    balance: Units
    quantity: Units
    cost: Units

    def __len__(self) -> int:
        return len(self.balance)

    @property
    def steps(self) -> int:
        """How many steps down the mark can go, each of them below ``STEP_ACCOUNTS`` more lines."""
        near = len(self) // 100 - len(self) // 1000 - _at_line(len(self))
        return _near_longs(near) // STEP_ACCOUNTS

    def candidates(self, mark: Decimal) -> set[int]:
        """The slots of the candidates at ``mark``, by brute force: every account, in Decimal, one after the other."""
        # Written out apart from the product's own formula: equity < maintenance, in units of 1e-8.
        rate = BTC_PERP.maintenance_rate
        return {
            slot
            for slot, (balance, quantity, cost) in enumerate(
                zip(self.balance.tolist(), self.quantity.tolist(), self.cost.tolist(), strict=True)
            )
            if quantity and balance + quantity * mark - cost < rate * abs(quantity) * mark
        }

    def account(self, slot: int) -> Account:
        """The account in ``slot``, as the product has it."""
        positions = {}
        if self.quantity[slot]:
            positions[SYMBOL] = Position(from_units(int(self.quantity[slot])), from_units(int(self.cost[slot])))
        return Account(account_name(slot), from_units(int(self.balance[slot])), positions)

    def healthy(self) -> list[int]:
        """The slots of the accounts whose equity at ``MARK`` is over a hundredth above their maintenance margin."""
        maintenance = self._notional() // 10
        return _slots(self._equity() > maintenance + maintenance // 100)

    def traders(self, *, free_margin_min: int) -> list[int]:
        """The slots of the accounts that have more free margin than so many USDT at ``MARK``."""
        return _slots(self._equity() - self._notional() // 5 > free_margin_min * UNITS_PER_ONE)

    def _equity(self) -> Units:
        return self.balance + self.quantity * int(MARK) - self.cost

    def _notional(self) -> Units:
        return np.abs(self.quantity) * int(MARK)

    def mark_that_breaches(self, longs: int, *, below: Decimal) -> Decimal:
        """The highest mark, in whole cents, at which ``longs`` more longs are candidates than at ``below``."""
        long = self.quantity > 0
        line = (self.cost[long] - self.balance[long]) / (0.9 * self.quantity[long])
        lines = np.sort(line[line < float(below)])[::-1]
        return Decimal(int(lines[longs - 1] * 100)) / 100


def account_name(slot: int) -> str:
    """The account in ``slot``."""
    return f"account-{slot:07d}"


def populate(count: int, *, seed: int = SEED) -> Population:
    """``count`` accounts, the same ones for the same seed."""
    random = np.random.default_rng(seed)
    near, below, at_line = count // 100, count // 1000, _at_line(count)
    # Quantities in lots of a millionth, whole thousandths; prices within 2 % of the mark, in ticks of a cent.
    lots = random.integers(1, 2_000, PAIRS) * 1_000
    ticks = random.integers(MARK_TICKS * 98 // 100, MARK_TICKS * 102 // 100, PAIRS)
    pair = random.integers(0, PAIRS, count)
    lots, ticks = lots[pair], ticks[pair]
    side = np.where(random.random(count) < LONG_SHARE, 1, -1)
    near_longs = _near_longs(near - below - at_line)
    side[:near_longs] = 1
    side[near_longs : near - below] = -1
    lots[near_longs : near_longs + at_line] = 1_000_000
    ticks[near_longs : near_longs + at_line] = MARK_TICKS
    maintenance = lots * MARK_TICKS // 10
    room = (maintenance * random.uniform(0.05, 8.5, count)).astype(np.int64)
    room[:near] = (maintenance[:near] * random.uniform(0.00001, 0.001, near)).astype(np.int64)
    # A long falls below its line at step n: room = 0.9 x quantity x (n - 1/2) x STEP, exactly.
    step = np.arange(near_longs) // STEP_ACCOUNTS + 1
    room[:near_longs] = lots[:near_longs] * (54 * step - 27) // 100
    room[near_longs : near_longs + at_line] = 0
    room[near - below : near] *= -1
    quantity = side * lots * 100
    cost = side * lots * ticks
    balance = maintenance + room - (side * lots * MARK_TICKS - cost)
    slot = random.permutation(count)
    return Population(balance[slot].astype(INT64), quantity[slot].astype(INT64), cost[slot].astype(INT64))


def _slots(chosen: NDArray[np.bool_]) -> list[int]:
    found: list[int] = np.flatnonzero(chosen).tolist()
    return found


def _at_line(count: int) -> int:
    return count // 10_000


def _near_longs(near_above: int) -> int:
    return near_above * 55 // 100 // STEP_ACCOUNTS * STEP_ACCOUNTS
