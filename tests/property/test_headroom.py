"""Headroom: a row that is kept needs a second look wherever the packed row would, whatever it was before."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from app.columns import Marks, Sums
from app.headroom import Headroom
from app.services import trading
from app.services.trading import Account
from tests.property.repeatable import repeatable
from tests.property.test_screen import crowds
from tests.property.worlds import CONTRACTS
from tests.unit.cast import BTC, chunk_of

Crowd = tuple[list[Account], dict[str, Decimal]]

FLAT = Account("flat", Decimal(-5), {})
MARK_OF_ALL = Marks(dict.fromkeys(CONTRACTS, Decimal(1)), dict.fromkeys(CONTRACTS, 0), version=1, by_hand=())


@repeatable
@given(crowds(), crowds(), st.lists(st.integers(0, 1), min_size=4, max_size=4))
def test_no_row_that_may_be_a_candidate_or_is_in_breach_is_far(
    before: Crowd, after: Crowd, breaches: list[int]
) -> None:
    """The rows of one crowd take the place of another's, which was valued at other marks."""
    accounts, prices = after
    old = chunk_of(before[0], before[1], contracts=CONTRACTS)
    new = chunk_of(accounts, prices, breaches=breaches[: len(accounts)], contracts=CONTRACTS)
    headroom = Headroom(CONTRACTS, len(old))
    headroom.put(slice(0, len(old)), old)
    if len(new) > len(headroom):
        headroom.grow(len(new))
    for index in range(len(new)):
        slots = np.array([index])
        headroom.put(slots, new.rows(slots), before=old.rows(slots) if index < len(old) else None)

    found = headroom.near_rows(new.marks, len(new))
    assert found is not None
    near = set(found.tolist())
    assert found.tolist() == sorted(near)
    for index, account in enumerate(accounts):
        valued = trading.account_margin(account, contracts=CONTRACTS, prices=prices)
        assert index in near or not (trading.is_candidate(valued) or breaches[index])
        # Little else is near: what float64 may be off at the largest sizes there were.
        room = sum((_size(one, each[1]) for each in (before, after) for one in each[0]), start=Decimal(0))
        room += sum(_size(one, prices) for one in before[0])
        headroom_of_it = valued.equity - valued.maintenance_margin
        assert index not in near or breaches[index] or headroom_of_it <= room * len(CONTRACTS) * Decimal(2) ** -46

    sums = Sums()
    sums.add(new)
    sums.add(old.rows(slice(len(new), None)))
    assert headroom.sums == sums


def _size(account: Account, prices: dict[str, Decimal]) -> Decimal:
    return abs(account.balance) + sum(
        (abs(held.quantity) * prices[symbol] + abs(held.cost) for symbol, held in account.positions.items()),
        start=Decimal(0),
    )


def test_an_account_without_a_position_is_far_from_its_line_whatever_it_owes() -> None:
    headroom = Headroom(CONTRACTS, 2)
    headroom.put(slice(0, 1), chunk_of([FLAT], {}, contracts=CONTRACTS))
    near = headroom.near_rows(MARK_OF_ALL, 2)
    assert near is not None
    assert near.tolist() == []


def test_nothing_is_said_where_a_symbol_has_no_mark() -> None:
    assert Headroom(CONTRACTS, 1).near_rows(Marks({BTC: Decimal(1)}, {BTC: 0}, version=1, by_hand=()), 1) is None
