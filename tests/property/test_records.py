"""What Plimsoll writes it reads again, and whatever else it is handed it reads, or refuses by one name."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from app.contracts import AMOUNT_LIMIT, Contract
from app.numbers import SMALLEST_UNIT, format_decimal, is_multiple
from app.records import RecordError, Snapshot, decode_position, encode_position, pack, parse_account, parse_mark
from app.services.trading import Account
from tests.property.repeatable import repeatable
from tests.property.worlds import CONTRACTS, World, worlds
from tests.unit.cast import BTC, NOON_US


def snapshot_of(account: Account) -> Snapshot:
    """The account as it is read after it was written."""
    return Snapshot(
        account_id=account.account_id,
        operation=b"",
        balance_text=format_decimal(account.balance).encode(),
        fields=tuple(
            text
            for symbol, held in account.positions.items()
            for text in (symbol.encode(), encode_position(held).encode())
        ),
        slot=3,
        seq_text=b"1",
        breach_text=b"",
        breach_at=b"0",
        mark_version=1,
        halted=False,
        now_us=NOON_US,
        packed_balance=pack(account.balance),
        packed_breach=b"",
        packed_positions={
            symbol: (pack(account.position(symbol).quantity), pack(account.position(symbol).cost))
            for symbol in CONTRACTS
        },
        mark_texts={},
    )


@repeatable
@given(worlds())
def test_what_is_written_is_read_again_and_agrees(world: World) -> None:
    snapshot = snapshot_of(world.account)
    account = snapshot.account(CONTRACTS)
    assert account == world.account
    assert snapshot.packed_account() == world.account
    assert snapshot.agrees(account)


@repeatable
@given(worlds(open_min=1))
def test_a_position_is_written_in_one_way(world: World) -> None:
    for symbol, held in world.account.positions.items():
        text = encode_position(held)
        decoded = decode_position(text.encode(), CONTRACTS[symbol])
        assert decoded == held
        assert encode_position(decoded) == text
        assert list(json.loads(text)) == ["quantity", "avg_price", "cost"]


def _holds(contract: Contract, quantity: Decimal, cost: Decimal) -> None:
    assert is_multiple(quantity, contract.lot_size)
    assert is_multiple(cost, SMALLEST_UNIT)
    assert abs(cost) <= AMOUNT_LIMIT
    assert pack(quantity)
    assert pack(cost)


numbers = st.one_of(
    st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=8).map(str),
    st.from_regex(r"-?[0-9]{1,24}(\.[0-9]{1,24})?([eE][-+]?[0-9]{1,3})?", fullmatch=True),
    st.sampled_from(["NaN", "Infinity", "abc", "", "1e999999", "1e60", "null", "true", "[]"]),
)


@repeatable
@given(quantity=numbers, other=numbers, name=st.sampled_from(["cost", "avg_price"]), quoted=st.booleans())
def test_a_position_is_read_within_its_limits_or_refused_by_one_name(
    quantity: str, other: str, name: str, quoted: bool
) -> None:
    quote = '"' if quoted else ""
    text = f'{{"quantity": {quote}{quantity}{quote}, "{name}": {quote}{other}{quote}}}'
    try:
        held = decode_position(text.encode(), CONTRACTS[BTC])
    except RecordError:
        return
    _holds(CONTRACTS[BTC], held.quantity, held.cost)


json_values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
    lambda children: st.one_of(
        st.lists(children, max_size=3), st.dictionaries(st.text(max_size=8), children, max_size=3)
    ),
    max_leaves=8,
)


@repeatable
@given(
    st.one_of(
        st.binary(max_size=60),
        json_values.map(lambda value: json.dumps(value).encode()),
        st.fixed_dictionaries({"quantity": json_values}, optional={"cost": json_values, "avg_price": json_values}).map(
            lambda value: json.dumps(value).encode()
        ),
    )
)
@example(b'{"quantity": 1, "cost": 1e9999}')
def test_any_bytes_are_a_position_or_refused_by_one_name(text: bytes) -> None:
    try:
        held = decode_position(text, CONTRACTS[BTC])
    except RecordError:
        return
    _holds(CONTRACTS[BTC], held.quantity, held.cost)


@repeatable
@given(st.one_of(st.binary(max_size=45), numbers.map(str.encode)))
def test_any_bytes_are_a_balance_or_refused_by_one_name(text: bytes) -> None:
    try:
        account = parse_account("alice", text, [], CONTRACTS)
    except RecordError:
        return
    assert abs(account.balance) <= AMOUNT_LIMIT
    assert pack(account.balance)


@repeatable
@given(st.one_of(st.none(), st.binary(max_size=45), numbers.map(str.encode)))
def test_any_bytes_are_a_mark_or_none(text: bytes | None) -> None:
    price = parse_mark(text, CONTRACTS[BTC])
    if price is not None:
        assert 0 < price <= CONTRACTS[BTC].price_max
        assert pack(price)
