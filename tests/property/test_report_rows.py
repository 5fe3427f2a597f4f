"""The accounts of the report, encoded together: to the last digit what Decimal shows of each."""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import orjson
from hypothesis import given
from hypothesis import strategies as st

from app.columns import Chunk
from app.numbers import format_decimal, from_units
from app.services import reports
from app.services.exact_rows import number_texts, ratio, side_by_side
from app.services.margin import divide_half_even
from app.services.report_rows import encode_rows
from app.services.trading import Account, Position
from tests.property.repeatable import repeatable
from tests.property.worlds import CONTRACTS, World, worlds
from tests.unit.cast import BTC, chunk_of


def alone(chunk: Chunk, index: int, name: bytes) -> bytes:
    """One account as it is shown by itself after a comma, decided in Decimal."""
    account, breach = chunk.account(index, name.decode()), int(chunk.breach[index])
    valued = reports.value_account(account, contracts=CONTRACTS, prices=chunk.marks.prices)
    return b"," + orjson.dumps(
        {**reports.account_summary(account, valued, in_breach=bool(breach)), "open_breach_id": breach or None}
    )


@repeatable
@given(
    st.lists(st.tuples(worlds(), st.sampled_from([0, 0, 1, 999, 12_340_000])), min_size=1, max_size=3),
    st.sets(st.sampled_from(list(CONTRACTS))),
)
def test_rows_encoded_together_are_the_accounts_shown_alone(crowd: list[tuple[World, int]], marked: set[str]) -> None:
    prices = {symbol: price for symbol, price in crowd[0][0].prices.items() if symbol in marked}
    chunk = chunk_of(
        [world.account for world, _ in crowd], prices, breaches=[breach for _, breach in crowd], contracts=CONTRACTS
    )
    names = [b"account-%d" % number for number in range(len(crowd))]
    encoded = encode_rows(chunk, names, contracts=CONTRACTS)
    for index in np.flatnonzero(encoded.plain).tolist():
        assert encoded.text(index, index + 1) == alone(chunk, index, names[index])


@repeatable
@given(
    st.lists(
        st.tuples(st.integers(-(2**61), 2**61), st.integers(0, 18)).map(lambda drawn: drawn[0] // 10 ** drawn[1]),
        min_size=1,
        max_size=10,
    ),
    st.integers(0, 18),
)
def test_a_number_of_any_size_and_places_reads_as_its_decimal(units: list[int], places: int) -> None:
    records = side_by_side(len(units), [b",", *number_texts(np.array(units, dtype=np.int64), places)])
    texts = bytes(records.translate(None, b"\0")).decode().split(",")[1:]
    assert texts == [format_decimal(Decimal(number).scaleb(-places)) for number in units]


CENTS = st.integers(1, 10_000_000).map(lambda cents: Decimal(cents).scaleb(-2))


@repeatable
@given(
    st.lists(
        st.tuples(st.integers(-(10**15), 10**15), st.integers(-5 * 10**6, 5 * 10**6), st.integers(-(10**15), 10**15)),
        min_size=1,
        max_size=10,
    ),
    CENTS,
)
def test_accounts_of_everyday_size_at_a_mark_in_cents_are_all_encoded_together(
    rows: list[tuple[int, int, int]], mark: Decimal
) -> None:
    accounts = [
        Account(
            f"account-{number}",
            from_units(balance),
            {BTC: Position(lots * CONTRACTS[BTC].lot_size, from_units(cost))} if lots else {},
        )
        for number, (balance, lots, cost) in enumerate(rows)
    ]
    chunk = chunk_of(accounts, {BTC: mark}, contracts=CONTRACTS)
    names = [account.account_id.encode() for account in accounts]
    encoded = encode_rows(chunk, names, contracts=CONTRACTS)
    for index in np.flatnonzero(~encoded.plain).tolist():
        # Only a ratio above a million is left to Decimal.
        valued = reports.value_account(accounts[index], contracts=CONTRACTS, prices={BTC: mark})
        assert valued is not None
        assert valued.used_margin > 10**6 * valued.equity > 0
    assert all(
        encoded.text(index, index + 1) == alone(chunk, index, names[index])
        for index in np.flatnonzero(encoded.plain).tolist()
    )


@repeatable
@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(0, 2**61), st.integers(1, 2**61)),
            # Ties: an odd multiple of half a unit of 1e-8.
            st.tuples(st.integers(0, 10**9), st.integers(1, 9)).map(
                lambda drawn: ((2 * drawn[0] + 1) * drawn[1], 2 * drawn[1] * 10**8)
            ),
        ),
        min_size=1,
        max_size=50,
    )
)
def test_a_ratio_in_int64_is_rounded_half_even_as_in_decimal(pairs: list[tuple[int, int]]) -> None:
    parts, equities = (np.array(column, dtype=np.int64) for column in zip(*pairs, strict=True))
    units, fits = ratio(parts, equities)
    for index, (part, equity) in enumerate(pairs):
        assert fits[index] == (part / equity * 10**8 < 2**50) or abs(part / equity * 10**8 / 2**50 - 1) < 1e-9
        if fits[index]:
            assert from_units(int(units[index])) == divide_half_even(Decimal(part), Decimal(equity))
