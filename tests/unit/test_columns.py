"""The columns: packed values, rows, and sums that do not wrap."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import numpy as np
import pytest

from app import errors
from app.columns import INT64, Chunk, Marks, Sums, _column, marks_from
from app.numbers import UNITS_PER_ONE
from app.records import NOTHING, UNIT, pack, unpack
from tests.unit.cast import (
    ALICE_LONG_1_BTC,
    BTC,
    CAROL_SHORT_1_BTC,
    CONTRACTS,
    DAVE_LONG_1_BTC_SHORT_10_ETH,
    DAVES_PRICES,
    ERIN_FLAT,
    ETH,
    FRANK_FLAT_OWING_5,
    amounts,
    chunk_of,
)

CAST = [ALICE_LONG_1_BTC, CAROL_SHORT_1_BTC, DAVE_LONG_1_BTC_SHORT_10_ETH, ERIN_FLAT, FRANK_FLAT_OWING_5]
NO_MARKS = Marks(prices={}, timestamps_us={}, version=0, by_hand=())


def sums_of(*chunks: Chunk) -> Sums:
    sums = Sums()
    for chunk in chunks:
        sums.add(chunk)
    return sums


def rows(count: int, *, balance: int, quantity: int = 0, cost: int = 0) -> Chunk:
    """``count`` times the same row, in units of 1e-8."""
    return Chunk(
        first_slot=0,
        balance=np.full(count, balance, dtype=INT64),
        breach=np.zeros(count, dtype=INT64),
        quantity={BTC: np.full(count, quantity, dtype=INT64)},
        cost={BTC: np.full(count, cost, dtype=INT64)},
        marks=NO_MARKS,
    )


def test_a_value_is_packed_as_a_little_endian_int64_of_units() -> None:
    assert pack(Decimal("0.00000001")) == b"\x01\0\0\0\0\0\0\0"
    assert pack(Decimal("-0.00000001")) == b"\xff" * 8
    assert pack(Decimal(0)) == NOTHING == b"\0" * 8
    assert unpack(pack(Decimal(-40_000_000_000))) == -4 * 10**18
    assert unpack(b"") == 0


def test_a_row_is_the_account_that_was_packed() -> None:
    chunk = chunk_of(CAST, DAVES_PRICES)
    assert len(chunk) == 5
    assert [chunk.account(index, account.account_id) for index, account in enumerate(CAST)] == CAST


def test_a_packed_row_is_balance_then_quantity_and_cost_of_each_symbol() -> None:
    chunk = chunk_of(CAST, DAVES_PRICES)
    # 20,000; BTC 1 for 50,000; ETH -10 for -20,000
    assert chunk.packed_row(2) == b"".join(
        UNIT.pack(value * UNITS_PER_ONE) for value in (20_000, 1, 50_000, -10, -20_000)
    )


def test_a_million_balances_of_95_000_do_not_wrap() -> None:
    """95,000 is 9.5e12 units; a million of them is 9.5e18, beyond the 9.22e18 of an int64."""
    chunk = rows(1_000_000, balance=95_000 * UNITS_PER_ONE)
    assert int(chunk.balance.sum()) < 0
    assert sums_of(chunk).balance == 95_000_000_000 * UNITS_PER_ONE


@pytest.mark.parametrize("value", [2**63 - 1, -(2**63), -1, 0, 1, 2**32, -(2**32), 2**32 - 1])
def test_sums_of_the_largest_values_are_exact(value: int) -> None:
    sums = sums_of(rows(1_000, balance=value, quantity=value, cost=value))
    assert sums.balance == 1_000 * value
    assert sums.cost == {BTC: 1_000 * value}
    assert sums.quantity_long == {BTC: 1_000 * max(value, 0)}
    assert sums.quantity_short == {BTC: 1_000 * min(value, 0)}


def test_sums_add_up_over_chunks() -> None:
    assert sums_of(chunk_of(CAST[:2], {}), chunk_of(CAST[2:], {}), chunk_of([], {})) == sums_of(chunk_of(CAST, {}))


def test_the_sums_count_who_is_in_breach_and_who_owes_without_a_position() -> None:
    in_breach = chunk_of([*CAST, FRANK_FLAT_OWING_5], DAVES_PRICES, breaches=[0, 7, 0, 0, 0, 8])
    sums = sums_of(in_breach)
    assert (sums.in_breach, sums.negative_equity) == (2, 1)
    sums.add(in_breach, times=-1)
    assert sums == sums_of(in_breach.rows(slice(0, 0)))


def test_the_pieces_of_a_chunk_know_their_slots() -> None:
    chunk = replace(chunk_of(CAST, DAVES_PRICES), first_slot=100)
    pieces = list(chunk.pieces(2))
    assert [(piece.first_slot, len(piece)) for piece in pieces] == [(100, 2), (102, 2), (104, 1)]
    assert pieces[1].account(0, "dave") == DAVE_LONG_1_BTC_SHORT_10_ETH
    assert [piece.indices_of([99, 103, 100, 105]).tolist() for piece in pieces] == [[0], [1], []]
    assert [len(piece) for piece in chunk_of([], DAVES_PRICES).pieces(2)] == [0]


def test_the_totals_of_the_cast_worked_by_hand() -> None:
    # At 48,000 and 2,400. Alice long 1, Carol short 1, Dave long 1 and short 10 ETH.
    # balances 14,000 + 16,000 + 20,000 + 10,000 - 5 = 59,995
    # pnl: Alice -2,000, Carol +2,000, Dave -2,000 - 4,000: -6,000 in all
    totals = sums_of(chunk_of(CAST, DAVES_PRICES)).value(DAVES_PRICES, CONTRACTS)
    assert totals.equity == 53_995
    assert totals.long_notional == 2 * 48_000
    assert totals.short_notional == 48_000 + 24_000
    # used 3 x 9,600 + 6,000; maintenance 3 x 4,800 + 3,000
    assert totals.used_margin == 34_800
    assert totals.maintenance_margin == 17_400


def test_a_symbol_without_a_mark_counts_its_cash_only() -> None:
    totals = sums_of(chunk_of(CAST, {})).value({BTC: Decimal(48_000)}, CONTRACTS)
    assert totals.equity == 59_995 - 2_000
    assert totals.short_notional == 48_000
    assert sums_of(chunk_of(CAST, {})).value({}, CONTRACTS).equity == 59_995


def test_totals_of_nobody_are_zero() -> None:
    totals = Sums().value(DAVES_PRICES, CONTRACTS)
    assert (totals.equity, totals.used_margin, totals.long_notional, totals.short_notional) == amounts(0, 0, 0, 0)


def test_nobody_is_judged_by_a_column_that_ends_early() -> None:
    packed = UNIT.pack(1) + UNIT.pack(-2)
    assert _column("balance", packed, 2).tolist() == [1, -2]
    assert _column("balance", packed, 1).tolist() == [1]
    assert _column("balance", b"", 0).tolist() == []
    for short, rows in ((packed, 3), (packed[:-1], 2), (b"", 1)):
        with pytest.raises(errors.ColumnsShort, match="balance was lost"):
            _column("balance", short, rows)


def test_marks_are_read_with_their_version_and_what_was_set_by_hand() -> None:
    marks = marks_from(
        [
            (1767268800, 5),
            b"3",
            [b"48000", b"2400.5", b"17"],
            [b"48000", b"1767268800000000"],
            [b"2400", b"1767268700000000"],
        ],
        CONTRACTS,
    )
    assert (marks.read_at_us, marks.epoch) == (1767268800000005, "3")
    assert marks.prices == {BTC: Decimal(48_000), ETH: Decimal("2400.5")}
    assert marks.timestamps_us == {BTC: 1767268800000000, ETH: 1767268700000000}
    assert marks.version == 17
    assert marks.by_hand == (ETH,)


def test_a_mark_that_is_missing_or_no_price_is_left_out() -> None:
    marks = marks_from([(0, 0), None, [None, b"abc", None], [None, None], [b"2400", b"1"]], CONTRACTS)
    assert (marks.prices, marks.version, marks.by_hand) == ({}, 0, ())
