"""The columns, against Python's integers."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app import errors
from app.columns import INT64, Chunk, Marks, Sums, _column, exact_sum
from app.numbers import from_units
from app.records import UNIT, pack, unpack
from tests.property.repeatable import repeatable
from tests.property.worlds import CONTRACTS, World, reference, worlds
from tests.unit.cast import BTC, ETH, chunk_of

INT64S = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([0, 1, -1, 2**31, 2**32 - 1, 2**32, -(2**32), 2**63 - 1, -(2**63)]),
)
SYMBOLS = (BTC, ETH)


@repeatable
@given(st.lists(INT64S, max_size=50), st.integers(1, 5_000))
def test_a_sum_is_that_of_integers_which_do_not_wrap(values: list[int], repeated: int) -> None:
    column = np.tile(np.array(values, dtype=INT64), repeated)
    assert exact_sum(column) == sum(values) * repeated


@repeatable
@given(INT64S)
def test_a_packed_value_is_unpacked(value: int) -> None:
    assert unpack(UNIT.pack(value)) == value
    assert pack(from_units(value)) == UNIT.pack(value)


@repeatable
@given(values=st.lists(INT64S, max_size=20), rows=st.integers(0, 25), cut=st.integers(0, 7))
def test_a_column_is_its_values_or_short(values: list[int], rows: int, cut: int) -> None:
    packed = b"".join(UNIT.pack(value) for value in values)
    packed = packed[: len(packed) - cut] if cut and values else packed
    if len(packed) < rows * 8:
        with pytest.raises(errors.ColumnsShort):
            _column("a column", packed, rows)
    else:
        assert _column("a column", packed, rows).tolist() == values[:rows]


@repeatable
@given(
    st.lists(st.tuples(INT64S, INT64S, INT64S, INT64S, INT64S, INT64S), min_size=1, max_size=10), st.integers(0, 10**6)
)
def test_a_packed_row_is_the_values_of_its_columns_in_their_order(rows: list[tuple[int, ...]], first_slot: int) -> None:
    balance, breach, *held = (np.array(column, dtype=INT64) for column in zip(*rows, strict=True))
    chunk = Chunk(
        first_slot=first_slot,
        balance=balance,
        breach=breach,
        quantity=dict(zip(SYMBOLS, held[::2], strict=True)),
        cost=dict(zip(SYMBOLS, held[1::2], strict=True)),
        marks=Marks(prices={}, timestamps_us={}, version=0, by_hand=()),
    )
    for index, (balance_units, _, *positions) in enumerate(rows):
        assert chunk.packed_row(index) == b"".join(UNIT.pack(value) for value in (balance_units, *positions))


@repeatable
@given(st.lists(worlds(), min_size=1, max_size=5))
def test_the_totals_are_the_sums_of_the_accounts(crowd: list[World]) -> None:
    prices = crowd[0].prices
    accounts = [world.account for world in crowd]
    sums = Sums()
    for account in accounts:
        sums.add(chunk_of([account], prices, contracts=CONTRACTS))
    totals = sums.value(prices, CONTRACTS)
    each = [reference(account, prices) for account in accounts]
    assert Fraction(totals.equity) == sum(one.equity for one in each)
    assert Fraction(totals.used_margin) == sum(one.used_margin for one in each)
    assert Fraction(totals.maintenance_margin) == sum(one.maintenance_margin for one in each)
    assert Fraction(totals.long_notional) + Fraction(totals.short_notional) == sum(one.notional for one in each)
    assert totals.long_notional >= 0
    assert totals.short_notional >= 0
    assert totals.equity == Decimal(totals.equity)
