"""An account as Redis holds it: written canonically, read as people write, refused where it cannot be meant."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from app import errors
from app.records import (
    NOTHING,
    UNIT,
    OpenBreach,
    RecordError,
    Snapshot,
    decode_position,
    encode_position,
    pack,
    parse_account,
    parse_mark,
    snapshot_from,
)
from app.services.trading import Account, Mark, Position
from tests.unit.cast import (
    ALICE_LONG_1_BTC,
    BTC,
    CONTRACTS,
    DAVE_LONG_1_BTC_SHORT_10_ETH,
    ERIN_FLAT,
    ETH,
    NOON_US,
)


def decoded(text: str | bytes) -> Position:
    return decode_position(text.encode() if isinstance(text, str) else text, CONTRACTS[BTC])


def parsed(balance: str | bytes, *fields: str) -> Account:
    return parse_account(
        "alice",
        balance.encode() if isinstance(balance, str) else balance,
        [field.encode() for field in fields],
        CONTRACTS,
    )


def snapshot_of(account: Account) -> Snapshot:
    """What is read of an account that Plimsoll wrote: its keys and its packed row say the same."""
    return Snapshot(
        account_id=account.account_id,
        operation=b"",
        balance_text=format(account.balance.normalize(), "f").encode(),
        fields=tuple(
            text
            for symbol, position in account.positions.items()
            for text in (symbol.encode(), encode_position(position).encode())
        ),
        slot=0,
        seq_text=b"3",
        breach_text=b"",
        breach_at=b"0",
        mark_version=7,
        halted=False,
        now_us=NOON_US,
        packed_balance=pack(account.balance),
        packed_breach=b"",
        packed_positions={
            symbol: (pack(account.position(symbol).quantity), pack(account.position(symbol).cost))
            for symbol in CONTRACTS
        },
        mark_texts={BTC: (b"48000", b"48000", b"1767268800000000"), ETH: (b"2400", b"2400", b"1767268800000000")},
    )


def test_a_position_is_written_as_the_contract_says() -> None:
    written = encode_position(Position(Decimal("0.5"), Decimal("30000.05")))
    assert written == '{"quantity": "0.5", "avg_price": "60000.1", "cost": "30000.05"}'


def test_an_average_price_is_written_rounded_and_the_cost_exact() -> None:
    written = encode_position(Position(Decimal(-3), Decimal("-100.00000001")))
    assert written == '{"quantity": "-3", "avg_price": "33.33333334", "cost": "-100.00000001"}'


@pytest.mark.parametrize(
    "text",
    [
        '{"quantity": "0.5", "avg_price": "60000.1", "cost": "30000.05"}',
        '{"quantity": 0.5, "avg_price": 60000.1}',
        '{"quantity": "0.5", "avg_price": "60000.1"}',
        '{"avg_price": 60000.10, "quantity": 5e-1}',
        '{"quantity": "0.50", "cost": 30000.05}',
        '{"quantity":"0.5","cost":"30000.05","note":"by hand"}',
        ' {"quantity": "0.5", "avg_price": "1", "cost": "30000.05"} ',
    ],
)
def test_a_position_written_by_hand_is_read(text: str) -> None:
    assert decoded(text) == Position(Decimal("0.5"), Decimal("30000.05"))


def test_a_number_written_by_hand_keeps_all_of_its_digits() -> None:
    assert decoded('{"quantity": 123.456789, "cost": 9876543210.12345678}') == Position(
        Decimal("123.456789"), Decimal("9876543210.12345678")
    )


def test_without_a_cost_it_is_quantity_times_average_price_rounded_half_even() -> None:
    # 0.000001 x 0.005 = 0.000000005: a tie, 0 is even; 0.000003 x 0.005 = 0.000000015: a tie, 1 is odd
    assert decoded('{"quantity": "0.000001", "avg_price": "0.005"}').cost == 0
    assert decoded('{"quantity": "0.000003", "avg_price": "0.005"}').cost == Decimal("0.00000002")
    assert decoded('{"quantity": "-2", "avg_price": "50000.5"}').cost == -100_001


def test_a_flat_position_written_by_hand_is_no_position() -> None:
    assert parsed("10", BTC, '{"quantity": "0", "avg_price": "50000"}') == Account("alice", Decimal(10))
    assert parsed("10", BTC, '{"quantity": 0, "cost": 0}') == Account("alice", Decimal(10))


UNREADABLE_NUMBERS = [
    "abc", "NaN", "Infinity", "-Infinity", "1e999999", "1E+999999", "", " ", "1 ", "+1", "0x1", "1_0", "1,5", "٣",
    "1" * 41, "\x00", "--1",
]  # fmt: skip


@pytest.mark.parametrize("number", UNREADABLE_NUMBERS)
def test_a_balance_that_is_no_number_is_unreadable_and_named(number: str) -> None:
    with pytest.raises(RecordError, match="account:alice:balance"):
        parsed(number)


@pytest.mark.parametrize("number", UNREADABLE_NUMBERS)
@pytest.mark.parametrize("template", ['{{"quantity": {}, "avg_price": "1"}}', '{{"quantity": "1", "cost": {}}}'])
def test_a_position_with_a_text_that_is_no_number_is_unreadable_and_named(template: str, number: str) -> None:
    quoted = f'"{number}"'
    with pytest.raises(RecordError, match="positions:alice BTC-PERP"):
        parsed("10", BTC, template.format(quoted))


@pytest.mark.parametrize(
    "value",
    [
        "NaN", "Infinity", "-Infinity", "true", "false", "null", "[]", "[1]", "{}", '{"value": 1}', "1e999999",
        "-1e999999", "1e99", "1e9999999999999999999", "1" * 41, "0." + "1" * 41,
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "template",
    [
        '{{"quantity": {}, "avg_price": "1"}}',
        '{{"quantity": {}, "cost": "1"}}',
        '{{"quantity": "1", "cost": {}}}',
        '{{"quantity": "1", "avg_price": {}}}',
    ],
)
def test_a_position_with_a_json_value_that_is_no_number_is_unreadable(template: str, value: str) -> None:
    with pytest.raises(RecordError, match="positions:alice BTC-PERP"):
        parsed("10", BTC, template.format(value))


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "1", '"0.5"', "[]", "true", "{", "not json", "{'quantity': '1'}", "{}", '{"quantity": "1"}',
        '{"avg_price": "1"}', '{"cost": "1"}', '{"Quantity": "1", "cost": "1"}', b"\xff\xfe\xfd", b"\x00",
        "[" * 100_000, '{"quantity":' * 50_000,
    ],
    ids=lambda text: repr(text)[:24],
)  # fmt: skip
def test_a_position_that_is_no_object_of_the_right_members_is_unreadable(text: str | bytes) -> None:
    packed = text.encode() if isinstance(text, str) else text
    with pytest.raises(RecordError, match="positions:alice BTC-PERP"):
        parse_account("alice", b"10", [BTC.encode(), packed], CONTRACTS)


@pytest.mark.parametrize(
    "text",
    [
        '{"quantity": "1e60", "avg_price": "1"}',
        '{"quantity": "1e60", "cost": "1"}',
        '{"quantity": "1e90", "avg_price": "1e90"}',
        f'{{"quantity": "0.{"1" * 38}", "avg_price": "0.{"1" * 38}"}}',
        '{"quantity": "1", "avg_price": "1e99"}',
    ],
)
def test_a_position_whose_numbers_are_too_long_to_multiply_is_unreadable_like_any_other(text: str) -> None:
    """Anything else than ``RecordError`` ends the sweep, the audit or the request that meets it."""
    with pytest.raises(RecordError, match="positions:alice BTC-PERP"):
        parsed("10", BTC, text)


def test_a_number_that_is_nearly_nothing_is_off_the_lot_and_off_the_unit() -> None:
    for text in ('{"quantity": 1e-99, "cost": "1"}', '{"quantity": "1", "cost": 1e-99}'):
        with pytest.raises(RecordError, match="positions:alice BTC-PERP"):
            parsed("10", BTC, text)
    assert decoded('{"quantity": "1", "avg_price": 1e-99}').cost == 0


def test_a_quantity_lies_on_the_lot() -> None:
    for quantity, readable in (("0.0000009", False), ("0.000001", True), ("0.0000011", False)):
        text = f'{{"quantity": "{quantity}", "avg_price": "50000"}}'
        if readable:
            assert decoded(text).quantity == Decimal(quantity)
        else:
            with pytest.raises(RecordError, match="lot"):
                decoded(text)


@pytest.mark.parametrize("sign", ["", "-"])
def test_a_quantity_may_exceed_a_position_limit_that_was_lowered_but_not_its_column(sign: str) -> None:
    # An int64 of 1e-8 ends at 92,233,720,368.54775807; the last lot of 0.000001 in it ends in 8.
    for quantity, readable in (("1000.000001", True), ("92233720368.547758", True), ("92233720368.547759", False)):
        text = f'{{"quantity": "{sign}{quantity}", "avg_price": "0.1"}}'
        if readable:
            assert abs(decoded(text).quantity) == Decimal(quantity)
        else:
            with pytest.raises(RecordError, match="quantity"):
                decoded(text)


@pytest.mark.parametrize("sign", ["", "-"])
def test_a_cost_and_a_balance_are_within_forty_thousand_million(sign: str) -> None:
    for text, readable in (
        ("39999999999.99999999", True),
        ("40000000000", True),
        ("40000000000.00000001", False),
    ):
        number = sign + text
        if readable:
            assert decoded(f'{{"quantity": "{sign}1", "cost": "{number}"}}').cost == Decimal(number)
            assert parsed(number).balance == Decimal(number)
        else:
            with pytest.raises(RecordError):
                decoded(f'{{"quantity": "{sign}1", "cost": "{number}"}}')
            with pytest.raises(RecordError):
                parsed(number)


def test_a_cost_and_a_balance_have_at_most_eight_decimals() -> None:
    assert parsed("0.00000001").balance == Decimal("0.00000001")
    with pytest.raises(RecordError, match="8 decimals"):
        parsed("0.000000011")
    assert decoded('{"quantity": "1", "cost": "0.00000001"}').cost == Decimal("0.00000001")
    with pytest.raises(RecordError, match="cost"):
        decoded('{"quantity": "1", "cost": "0.000000011"}')


def test_a_cost_without_a_quantity_is_unreadable() -> None:
    with pytest.raises(RecordError, match="cost"):
        decoded('{"quantity": "0", "cost": "1"}')


@pytest.mark.parametrize("symbol", ["DOGE-PERP", "btc-perp", "", "BTC-PERP "])
def test_a_field_that_is_no_symbol_is_unreadable_and_named(symbol: str) -> None:
    with pytest.raises(RecordError, match="positions:alice"):
        parsed("10", symbol, '{"quantity": "1", "cost": "1"}')


def test_a_field_in_no_encoding_is_unreadable() -> None:
    with pytest.raises(RecordError, match="no symbol"):
        parse_account("alice", b"10", [b"\xff\xfe", b'{"quantity": "1", "cost": "1"}'], CONTRACTS)


@pytest.mark.parametrize(
    ("text", "price"),
    [
        (b"0", None),
        (b"0.00000001", "0.00000001"),
        (b"0.000000001", None),
        (b"50000.12345678", "50000.12345678"),
        (b"50000.123456789", None),
        (b"10000000", "10000000"),
        (b"10000000.00000001", None),
        (b"9999999.99999999", "9999999.99999999"),
        (b"-50000", None),
        (b"NaN", None),
        (b"1e999999", None),
        (b"abc", None),
        (b"\xff", None),
        (b"", None),
        (None, None),
    ],
)
def test_a_mark_is_a_price_above_zero_of_at_most_eight_decimals(text: bytes | None, price: str | None) -> None:
    assert parse_mark(text, CONTRACTS[BTC]) == (None if price is None else Decimal(price))


@pytest.mark.parametrize("account", [ALICE_LONG_1_BTC, DAVE_LONG_1_BTC_SHORT_10_ETH, ERIN_FLAT])
def test_what_plimsoll_wrote_agrees(account: Account) -> None:
    snapshot = snapshot_of(account)
    assert snapshot.account(CONTRACTS) == account
    assert snapshot.packed_account() == account
    assert snapshot.agrees(snapshot.account(CONTRACTS))


def edited(**changed: Any) -> Snapshot:  # noqa: ANN401  # members of a snapshot
    return replace(snapshot_of(ALICE_LONG_1_BTC), **changed)


def with_position(text: str) -> Snapshot:
    return edited(fields=(BTC.encode(), text.encode()))


HELD = '{"quantity": "1", "avg_price": "50000", "cost": "50000"}'


@pytest.mark.parametrize(
    "snapshot",
    [
        pytest.param(edited(balance_text=b"14001"), id="another-balance"),
        pytest.param(edited(balance_text=b"14000.00000001"), id="one-unit-of-balance"),
        pytest.param(edited(balance_text=b"14000.0"), id="a-balance-written-otherwise"),
        pytest.param(edited(balance_text=b"1.4e4"), id="a-balance-with-an-exponent"),
        pytest.param(with_position(HELD.replace('"1"', '"2"')), id="another-quantity"),
        pytest.param(with_position(HELD.replace('"1"', '"-1"')), id="the-other-side"),
        pytest.param(with_position(HELD.replace('"cost": "50000"', '"cost": "50000.00000001"')), id="one-unit-of-cost"),
        pytest.param(
            with_position(HELD.replace('"avg_price": "50000"', '"avg_price": "50001"')), id="an-average-price"
        ),
        pytest.param(with_position('{"quantity": "1", "avg_price": "50000"}'), id="no-cost"),
        pytest.param(with_position('{"quantity": 1, "avg_price": 50000, "cost": 50000}'), id="numbers-for-strings"),
        pytest.param(with_position(HELD.replace(" ", "")), id="other-white-space"),
        pytest.param(with_position('{"quantity": "0", "avg_price": "50000"}'), id="a-flat-field"),
        pytest.param(edited(fields=()), id="a-position-removed"),
        pytest.param(
            edited(fields=(BTC.encode(), HELD.encode(), ETH.encode(), b'{"quantity": "1", "cost": "2000"}')),
            id="a-position-added",
        ),
        pytest.param(edited(fields=(ETH.encode(), HELD.encode())), id="another-symbol"),
        pytest.param(edited(slot=None), id="no-slot-yet"),
        pytest.param(edited(packed_balance=pack(Decimal("14000.00000001"))), id="a-packed-balance"),
        pytest.param(edited(packed_balance=b""), id="no-packed-balance"),
        pytest.param(
            edited(packed_positions={BTC: (pack(Decimal("1.000001")), pack(Decimal(50_000))), ETH: (b"", b"")}),
            id="a-packed-quantity",
        ),
        pytest.param(
            edited(packed_positions={BTC: (pack(Decimal(1)), pack(Decimal("50000.00000001"))), ETH: (b"", b"")}),
            id="a-packed-cost",
        ),
        pytest.param(
            edited(
                packed_positions={
                    BTC: (pack(Decimal(1)), pack(Decimal(50_000))),
                    ETH: (pack(Decimal(1)), pack(Decimal(2_000))),
                }
            ),
            id="a-packed-position-more",
        ),
    ],
)
def test_every_kind_of_edit_by_hand_is_noticed(snapshot: Snapshot) -> None:
    assert not snapshot.agrees(snapshot.account(CONTRACTS))


def test_the_order_of_the_fields_and_columns_that_end_early_are_no_edit() -> None:
    snapshot = snapshot_of(DAVE_LONG_1_BTC_SHORT_10_ETH)
    turned = replace(snapshot, fields=(*snapshot.fields[2:], *snapshot.fields[:2]))
    assert turned.agrees(turned.account(CONTRACTS))
    short_columns = edited(packed_positions={BTC: (pack(Decimal(1)), pack(Decimal(50_000))), ETH: (b"", b"")})
    assert short_columns.agrees(short_columns.account(CONTRACTS))


def test_a_damaged_row_of_the_columns_is_no_edit_by_hand() -> None:
    nothing = [[b"48000", b"48000", b"1767268800000000", NOTHING, NOTHING], [b"", b"", b"", b"", b""]]
    for damage in ({"symbols": nothing}, {"packed_balance": b""}, {"packed_breach": NOTHING}):
        snapshot = snapshot_from("alice", [BTC, ETH], answer(**damage))
        assert snapshot.agrees(ALICE_LONG_1_BTC)
        assert not snapshot.packed_agrees()
    assert snapshot_from("alice", [BTC, ETH], answer()).packed_agrees()


def test_an_edit_by_hand_starts_from_what_the_ledger_says_whatever_the_columns_hold() -> None:
    snapshot = snapshot_from("alice", [BTC, ETH], answer(balance=b"99", packed_balance=b""))
    assert not snapshot.agrees(snapshot.account(CONTRACTS))
    assert snapshot.known_account() == ALICE_LONG_1_BTC


def test_a_mark_set_by_hand_is_one_that_was_not_accepted() -> None:
    snapshot = edited(
        mark_texts={BTC: (b"48001", b"48000", b"1767268800000000"), ETH: (b"abc", b"2400", b"1767268800000000")}
    )
    assert snapshot.marks_set_by_hand(CONTRACTS) == [BTC]
    assert snapshot.marks(CONTRACTS) == {BTC: Mark(Decimal(48_001), 1767268800000000)}


def test_a_mark_without_a_time_is_one_of_now() -> None:
    snapshot = edited(mark_texts={BTC: (b"48001", b"", b"")})
    assert snapshot.marks(CONTRACTS) == {BTC: Mark(Decimal(48_001), NOON_US)}


def answer(**changed: Any) -> list[Any]:  # noqa: ANN401  # items of an answer
    """An ``ok`` answer of the script ``read_account``."""
    parts: dict[str, Any] = {
        "outcome": "ok",
        "operation": b"",
        "balance": b"14000",
        "fields": [BTC.encode(), HELD.encode()],
        "ledger": [b"4", b"3", b"12", b"6", b"1767268800000000"],
        "mark_version": b"7",
        "halted": b"",
        "now_us": b"1767268800000001",
        "packed_balance": pack(Decimal(14_000)),
        "packed_breach": UNIT.pack(12),
        "symbols": [
            [b"48000", b"48000", b"1767268800000000", pack(Decimal(1)), pack(Decimal(50_000))],
            [b"", b"", b"", b"", b""],
        ],
        "ledger_row": [pack(Decimal(14_000)), pack(Decimal(1)) + pack(Decimal(50_000)), b""],
    }
    return list({**parts, **changed}.values())


def test_a_snapshot_is_what_one_read_found() -> None:
    snapshot = snapshot_from("alice", [BTC, ETH], answer())
    assert (snapshot.slot, snapshot.seq, snapshot.mark_version, snapshot.halted) == (4, 3, 7, False)
    assert snapshot.breach == OpenBreach(id=12, since_us=1767268800000000)
    assert snapshot.account(CONTRACTS) == ALICE_LONG_1_BTC
    assert snapshot.agrees(ALICE_LONG_1_BTC)
    assert snapshot.exists
    assert not snapshot.balance_lost


def test_an_account_that_is_not_there_has_no_slot_no_history_and_no_breach() -> None:
    nothing: dict[str, Any] = {"balance": b"", "fields": [], "ledger": [b""] * 5, "packed_balance": b""}
    snapshot = snapshot_from("nobody", [BTC, ETH], answer(**nothing, ledger_row=[b""] * 3))
    assert (snapshot.slot, snapshot.seq, snapshot.breach) == (None, 0, None)
    assert not snapshot.exists
    assert not snapshot.balance_lost


def test_a_balance_that_is_gone_although_history_knows_the_account_is_lost() -> None:
    assert snapshot_from("alice", [BTC, ETH], answer(balance=b"")).balance_lost


def test_trading_is_halted_while_the_key_holds_anything() -> None:
    assert snapshot_from("alice", [BTC, ETH], answer(halted=b"maintenance")).halted


@pytest.mark.parametrize("place", [0, 1, 2, 4])
def test_a_ledger_that_is_no_ledger_puts_the_account_in_quarantine(place: int) -> None:
    ledger = [b"4", b"3", b"12", b"6", b"1767268800000000"]
    ledger[place] = b"x"
    with pytest.raises(errors.AccountQuarantined, match="ledger of alice"):
        snapshot_from("alice", [BTC, ETH], answer(ledger=ledger))
