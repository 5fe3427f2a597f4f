"""Verdicts made together: of each account what Decimal finds, and the texts that are written of it by itself."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.columns import Chunk
from app.contracts import Contract
from app.evidence import liquidation_body, recovery_body
from app.numbers import format_decimal, from_units
from app.records import encode_position
from app.services import trading
from app.services.report_rows import encode_rows
from app.services.trading import Account, Position, RestoreAt
from app.services.verdict_rows import judge_rows
from tests.property.repeatable import repeatable
from tests.property.worlds import CONTRACTS, World, worlds
from tests.unit.cast import BTC, chunk_of

RESTORE_AT: list[RestoreAt] = ["initial", "maintenance"]


def alone(chunk: Chunk, index: int, restore_at: RestoreAt) -> tuple[bool, tuple[object, ...] | None]:
    """Whether the account is a candidate, and what is to be recorded of it, decided in Decimal."""
    account, breach, prices = chunk.account(index, "x"), int(chunk.breach[index]), chunk.marks.prices
    valued = trading.account_margin(account, contracts=CONTRACTS, prices=prices)
    candidate, kind, body = trading.is_candidate(valued), None, b""
    if breach and trading.is_restored(valued, restore_at=restore_at):
        kind = "recovery"
        body = recovery_body(
            account,
            valued,
            prices=prices,
            mark_version=chunk.marks.version,
            liquidation_id=breach,
            cause="the mark",
        )
    elif candidate and not breach:
        kind = "liquidation"
        body = liquidation_body(account, valued, prices=prices, mark_version=chunk.marks.version)
    if kind is None:
        return candidate, None
    held = [encode_position(account.positions[symbol]) if symbol in account.positions else "" for symbol in CONTRACTS]
    return candidate, (kind, format_decimal(account.balance), held, body)


def check(chunk: Chunk, restore_at: RestoreAt) -> int:
    """Compare every row that was judged with the account alone; answers how many verdicts there were."""
    found = judge_rows(chunk, CONTRACTS, restore_at=restore_at)
    written, texts = found.written, {}
    for row, balance, held, body in zip(written.rows, written.balances, written.positions, written.bodies, strict=True):
        kind = "recovery" if chunk.breach[row] else "liquidation"
        texts[row] = (kind, balance.decode(), [text.decode() for text in held], body)
    for index in range(len(chunk)):
        if found.judged[index]:
            assert (bool(found.candidate[index]), texts.get(index)) == alone(chunk, index, restore_at)
        else:
            assert index not in texts
    return len(texts)


@repeatable
@given(
    st.lists(st.tuples(worlds(), st.sampled_from([0, 0, 1, 12_340_000])), min_size=1, max_size=4),
    st.sets(st.sampled_from(list(CONTRACTS))),
    st.sampled_from(RESTORE_AT),
)
def test_a_verdict_made_together_is_the_one_made_alone(
    crowd: list[tuple[World, int]], marked: set[str], restore_at: RestoreAt
) -> None:
    prices = {symbol: price for symbol, price in crowd[0][0].prices.items() if symbol in marked}
    check(
        chunk_of(
            [world.account for world, _ in crowd], prices, breaches=[breach for _, breach in crowd], contracts=CONTRACTS
        ),
        restore_at,
    )


@repeatable
@given(
    st.lists(
        st.tuples(st.integers(-5 * 10**6, 5 * 10**6).filter(bool), st.integers(-3, 3), st.booleans()),
        min_size=1,
        max_size=10,
    ),
    st.integers(100, 10_000_000).map(lambda cents: Decimal(cents).scaleb(-2)),
    st.sampled_from(RESTORE_AT),
)
def test_accounts_a_unit_from_their_lines_are_judged_together_and_rightly(
    rows: list[tuple[int, int, bool]], mark: Decimal, restore_at: RestoreAt
) -> None:
    """With no pnl, equity is the balance: a few units of 1e-8 above or below the line that it is judged by."""
    lot, contract = CONTRACTS[BTC].lot_size, CONTRACTS[BTC]
    accounts, breaches = [], []
    for lots, units, in_breach in rows:
        rate = contract.initial_rate if in_breach and restore_at == "initial" else contract.maintenance_rate
        line = (abs(lots) * lot * mark * rate).quantize(Decimal("0.00000001"))
        accounts.append(
            Account("x", line + from_units(units), {BTC: Position(quantity=lots * lot, cost=lots * lot * mark)})
        )
        breaches.append(7 if in_breach else 0)
    chunk = chunk_of(accounts, {BTC: mark}, breaches=breaches, contracts=CONTRACTS)
    assert judge_rows(chunk, CONTRACTS, restore_at=restore_at).judged.all()
    check(chunk, restore_at)


@pytest.mark.parametrize(("balance", "breach", "verdicts"), [("1", 0, 1), ("5000", 0, 0), ("1", 9, 0), ("99999", 9, 1)])
def test_only_what_changes_is_a_verdict(balance: str, breach: int, verdicts: int) -> None:
    account = Account("x", Decimal(balance), {BTC: Position(quantity=Decimal(1), cost=Decimal(50_000))})
    chunk = chunk_of([account], {BTC: Decimal(50_000)}, breaches=[breach], contracts=CONTRACTS)
    assert check(chunk, "initial") == verdicts


def test_a_rate_of_so_many_decimals_that_nothing_fits_is_left_to_decimal() -> None:
    contracts = {BTC: replace(CONTRACTS[BTC], maintenance_rate=Decimal("0.1000000000000000000000001"))}
    account = Account("x", Decimal(1), {BTC: Position(quantity=Decimal(1), cost=Decimal(50_000))})
    chunk = chunk_of([account], {BTC: Decimal(50_000)}, breaches=[0], contracts=contracts)
    assert judge_rows(chunk, contracts, restore_at="initial").judged.tolist() == [False]
    assert encode_rows(chunk, [b"x"], contracts=contracts).plain.tolist() == [False]


def test_a_symbol_that_json_would_escape_is_left_to_decimal() -> None:
    symbol = 'BTC"PERP'
    contracts: dict[str, Contract] = {symbol: replace(CONTRACTS[BTC], symbol=symbol)}
    account = Account("x", Decimal(1), {symbol: Position(quantity=Decimal(1), cost=Decimal(50_000))})
    chunk = chunk_of([account], {symbol: Decimal(50_000)}, breaches=[0], contracts=contracts)
    found = judge_rows(chunk, contracts, restore_at="initial")
    assert (found.judged.tolist(), found.written.rows) == ([False], [])
