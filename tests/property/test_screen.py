"""One formula, two scales: whatever Decimal finds, the float64 screen lets through, and little else."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from app.columns import ScreenedChunk, screen
from app.numbers import from_units
from app.services import trading
from app.services.exact_rows import fitting_rows, tell_exactly
from app.services.trading import Account, Position
from tests.property.repeatable import repeatable
from tests.property.worlds import AMOUNT_LIMIT_UNITS, CONTRACTS, World, marks, positions, reference, units
from tests.unit.cast import BTC, ETH, chunk_of

ACCOUNTS = 10_000
SEED = 1876
"""The year of the Merchant Shipping Act that made the load line compulsory."""


@dataclass(frozen=True)
class Placed:
    """An account, and how many ticks of its first symbol's mark its equity is away from the line it was placed at."""

    account: Account
    near: bool


def place(draw: random.Random, number: int, prices: dict[str, Decimal]) -> Placed:
    """An account near, or well away from, the line where it becomes a candidate or where it is restored."""
    held: dict[str, Position] = {}
    for symbol in draw.choice([[BTC], [BTC], [ETH], [BTC, ETH]]):
        contract = CONTRACTS[symbol]
        lots_max = int(contract.position_limit / contract.lot_size)
        quantity = int(lots_max ** draw.random()) * contract.lot_size * draw.choice([1, -1])
        entry = (prices[symbol] * draw.randint(7_000, 13_000) / 10_000).quantize(contract.tick_size)
        held[symbol] = Position(quantity, quantity * entry)
    account = Account(f"account-{number}", Decimal(0), held)
    at_zero = reference(account, prices)
    line = draw.choice([at_zero.maintenance_margin, at_zero.used_margin]) - at_zero.equity
    first = next(iter(held))
    tick = max(1, units(abs(Fraction(held[first].quantity)) * Fraction(CONTRACTS[first].tick_size)))
    near = number % 2 == 0
    if near:
        away = draw.choice([0, 0, 1, -1, 2, -2, draw.randint(-tick, tick)])
        away = max(-tick, min(tick, away))
    else:
        away = draw.choice([1, -1]) * (tick + 1 + int(tick * 10 ** (6 * draw.random())))
    balance = max(-AMOUNT_LIMIT_UNITS, min(AMOUNT_LIMIT_UNITS, units(line) + away))
    return Placed(replace(account, balance=from_units(balance)), near)


def test_of_ten_thousand_accounts_the_screen_misses_none_and_passes_hardly_another() -> None:
    draw = random.Random(SEED)
    prices = {BTC: Decimal("48123.45678901"), ETH: Decimal("2400.01")}
    placed = [place(draw, number, prices) for number in range(ACCOUNTS)]
    accounts = [one.account for one in placed]
    near = np.array([one.near for one in placed])
    in_breach = np.array([draw.random() < 0.5 for _ in placed])
    screened = screen(
        chunk_of(accounts, prices, breaches=[int(breach) for breach in in_breach], contracts=CONTRACTS),
        CONTRACTS,
        restore_at="initial",
    )
    candidates, restored = verdicts(accounts, prices)
    restored &= in_breach

    assert not (candidates & ~screened.may_be_candidate).any()
    assert not (screened.surely_candidate & ~candidates).any()
    assert not (restored & ~screened.may_be_restored).any()

    away = int((~near).sum())
    assert (screened.may_be_candidate & ~candidates & ~near).sum() * 1_000 <= away
    assert (screened.may_be_restored & ~restored & ~near).sum() * 1_000 <= away
    assert (candidates & ~screened.surely_candidate & ~near).sum() * 1_000 <= away

    # The population is what it says: half near a line, and every verdict found near it and away from it.
    assert near.sum() * 2 == ACCOUNTS
    for group in (near, ~near):
        for verdict in (candidates, ~candidates, restored, in_breach & ~restored):
            assert (verdict & group).sum() >= 500


def verdicts(accounts: Sequence[Account], prices: dict[str, Decimal]) -> tuple[np.ndarray, np.ndarray]:
    """Candidate and restored for each account, decided in Decimal and once more in fractions."""
    candidates, restored = [], []
    for account in accounts:
        valued = trading.account_margin(account, contracts=CONTRACTS, prices=prices)
        expected = reference(account, prices)
        candidates.append(trading.is_candidate(valued))
        restored.append(trading.is_restored(valued, restore_at="initial"))
        assert (candidates[-1], restored[-1]) == (expected.candidate, expected.restored)
    return np.array(candidates), np.array(restored)


@st.composite
def crowds(draw: st.DrawFn) -> tuple[list[Account], dict[str, Decimal]]:
    """A few accounts at the same marks, each within a few units of one of its lines, up to the largest sizes."""
    prices = {symbol: draw(marks(contract)) for symbol, contract in CONTRACTS.items()}
    accounts = []
    for number in range(draw(st.integers(1, 4))):
        held = {
            symbol: draw(positions(CONTRACTS[symbol], prices[symbol]))
            for symbol in draw(st.lists(st.sampled_from(list(CONTRACTS)), unique=True))
        }
        account = Account(f"account-{number}", Decimal(0), held)
        at_zero = reference(account, prices)
        line = draw(st.sampled_from([at_zero.maintenance_margin, at_zero.used_margin])) - at_zero.equity
        balance = units(line) + draw(st.one_of(st.integers(-2, 2), st.integers(-(10**6), 10**6)))
        balance = max(-AMOUNT_LIMIT_UNITS, min(AMOUNT_LIMIT_UNITS, balance))
        accounts.append(replace(account, balance=from_units(balance)))
    return accounts, prices


@repeatable
@given(crowds(), st.sampled_from(["initial", "maintenance"]))
def test_the_screen_misses_nobody_of_any_size(
    crowd: tuple[list[Account], dict[str, Decimal]], restore_at: trading.RestoreAt
) -> None:
    accounts, prices = crowd
    screened: ScreenedChunk = screen(
        chunk_of(accounts, prices, breaches=[1] * len(accounts), contracts=CONTRACTS), CONTRACTS, restore_at=restore_at
    )
    told = screen(screened.chunk, CONTRACTS, restore_at=restore_at)
    tell_exactly(told, CONTRACTS)
    fits = fitting_rows(screened.chunk, CONTRACTS)
    for index, account in enumerate(accounts):
        valued = trading.account_margin(account, contracts=CONTRACTS, prices=prices)
        candidate = trading.is_candidate(valued)
        assert told.may_be_candidate[index] or not candidate
        assert candidate or not told.surely_candidate[index]
        assert not fits[index] or told.may_be_candidate[index] == candidate == told.surely_candidate[index]
        assert screened.may_be_candidate[index] or not candidate
        assert candidate or not screened.surely_candidate[index]
        assert screened.may_be_restored[index] or not trading.is_restored(valued, restore_at=restore_at)
        # A flag beside the verdict is one within the room that is left for rounding.
        if screened.may_be_candidate[index] and not candidate:
            room = abs(valued.balance) + sum(
                (abs(held.quantity) * prices[symbol] + abs(held.cost) for symbol, held in account.positions.items()),
                start=Decimal(0),
            )
            assert valued.equity - valued.maintenance_margin <= room * len(CONTRACTS) * Decimal(2) ** -47


@repeatable
@given(crowds())
def test_a_row_judged_from_the_columns_is_the_account(crowd: tuple[list[Account], dict[str, Decimal]]) -> None:
    accounts, prices = crowd
    chunk = chunk_of(accounts, prices, contracts=CONTRACTS)
    assert [chunk.account(index, account.account_id) for index, account in enumerate(accounts)] == accounts
    assert World(accounts[0], prices).market.marks.keys() == set(CONTRACTS)
