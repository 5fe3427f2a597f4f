"""What a client may send: each field's form, and the field that is named when it has another."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from app.json_body import NumberText
from app.numbers import parse_decimal
from app.schemas import MarkRequest, TradeRequest, TransferRequest

TRADE: dict[str, Any] = {
    "account_id": "alice",
    "symbol": "BTC-PERP",
    "side": "buy",
    "quantity": "0.5",
    "price": NumberText("60000.1"),
}


def trade(**changed: object) -> TradeRequest:
    return TradeRequest.model_validate({**TRADE, **changed})


def refused_field(validate: Callable[[], BaseModel]) -> str:
    """The one field that validation names."""
    with pytest.raises(ValidationError) as refusal:
        validate()
    (error,) = refusal.value.errors()
    return str(error["loc"][0])


def test_a_trade_is_read() -> None:
    read = trade()
    assert (read.account_id, read.symbol, read.side) == ("alice", "BTC-PERP", "buy")
    assert (read.quantity, read.price) == (Decimal("0.5"), Decimal("60000.1"))
    assert read.client_trade_id is None


@pytest.mark.parametrize("text", ["1234567890.123456789012345678", "12345678901234567890", "0.100000000000000000001"])
def test_a_number_keeps_more_digits_than_a_float_has(text: str) -> None:
    assert trade(quantity=NumberText(text)).quantity == Decimal(text)
    assert trade(quantity=text).quantity == Decimal(text)


@pytest.mark.parametrize(
    "value",
    [
        True, False, None, 1, 1.5, Decimal(1), [], ["1"], {}, "", " 1", "1 ", "+1", "abc", "NaN", "Infinity", "1e999",
        "1_0", "٣", "0x1", ".5", "1" * 41, NumberText("1e999999"), NumberText("1" * 41), "\ud800",
    ],
    ids=ascii,
)  # fmt: skip
@pytest.mark.parametrize("field", ["quantity", "price"])
def test_what_is_no_plain_number_is_refused_and_its_field_named(field: str, value: object) -> None:
    assert refused_field(lambda: trade(**{field: value})) == field


@pytest.mark.parametrize("value", [True, None, 1, "abc", "NaN", NumberText("1e999999")])
def test_marks_and_transfers_read_their_numbers_the_same_way(value: object) -> None:
    assert refused_field(lambda: MarkRequest.model_validate({"symbol": "BTC-PERP", "price": value})) == "price"
    assert refused_field(lambda: TransferRequest.model_validate({"amount": value})) == "amount"


@pytest.mark.parametrize("account_id", ["a", "alice", "A.b_c-9", "0", "a" * 64, "..", "-"])
def test_an_account_id_is_one_to_sixty_four_plain_characters(account_id: str) -> None:
    assert trade(account_id=account_id).account_id == account_id


@pytest.mark.parametrize(
    "account_id",
    [
        "", "a" * 65, "al ice", " alice", "alice\n", "al:ice", "al/ice", "älice", "al{ice}", "*", "\x00", "\ud800", "٣",
        True, None, 7, 1.0, [], {},
    ],
    ids=ascii,
)  # fmt: skip
def test_anything_else_is_no_account_id(account_id: object) -> None:
    assert refused_field(lambda: trade(account_id=account_id)) == "account_id"


@pytest.mark.parametrize("digits", ["0", "1", "42", "9007199254740993", "9" * 64])
def test_an_account_id_that_is_an_integer_becomes_its_digits(digits: str) -> None:
    read = trade(account_id=NumberText(digits)).account_id
    assert read == digits
    assert type(read) is str


@pytest.mark.parametrize("number", ["-1", "1.0", "1e3", "0.5", "-0", "9" * 65])
def test_any_other_number_is_no_account_id(number: str) -> None:
    assert refused_field(lambda: trade(account_id=NumberText(number))) == "account_id"


@pytest.mark.parametrize(("side", "read"), [("buy", "buy"), ("BUY", "buy"), ("Sell", "sell"), ("sELL", "sell")])
def test_a_side_is_read_in_any_case(side: str, read: str) -> None:
    assert trade(side=side).side == read


@pytest.mark.parametrize(
    "side", ["", "long", "b", " buy", "buy ", "\uff22\uff35\uff39", True, None, NumberText("1"), ["buy"]]
)
def test_anything_else_is_no_side(side: object) -> None:
    assert refused_field(lambda: trade(side=side)) == "side"


@pytest.mark.parametrize("field", ["symbol", "client_trade_id"])
@pytest.mark.parametrize("value", ["", "a" * 65, "a b", "a\n", NumberText("1"), True, ["a"]])
def test_a_symbol_and_an_operation_id_are_plain_text(field: str, value: object) -> None:
    assert refused_field(lambda: trade(**{field: value})) == field


@pytest.mark.parametrize("field", ["account_id", "symbol", "side", "quantity", "price"])
def test_a_field_that_is_missing_is_named(field: str) -> None:
    rest = {name: value for name, value in TRADE.items() if name != field}
    assert refused_field(lambda: TradeRequest.model_validate(rest)) == field


def test_a_field_that_nobody_knows_is_refused() -> None:
    assert refused_field(lambda: trade(leverage="5")) == "leverage"
    assert refused_field(lambda: TransferRequest.model_validate({"amount": "1", "kind": "deposit"})) == "kind"


@pytest.mark.parametrize("value", ["true", NumberText("1"), 1, None])
def test_a_confirmation_is_true_or_false_and_nothing_like_it(value: object) -> None:
    mark = {"symbol": "BTC-PERP", "price": "1", "confirm": value}
    assert refused_field(lambda: MarkRequest.model_validate(mark)) == "confirm"
    assert MarkRequest.model_validate({**mark, "confirm": True}).confirm
    assert not MarkRequest.model_validate({"symbol": "BTC-PERP", "price": "1"}).confirm


@pytest.mark.parametrize("model", [TradeRequest, MarkRequest, TransferRequest])
def test_the_example_of_each_request_can_be_sent(model: type[BaseModel]) -> None:
    extra: Any = model.model_config["json_schema_extra"]
    assert model.model_validate(extra["example"]).model_fields_set == set(extra["example"])


def test_the_schema_of_a_number_says_a_string_or_a_number() -> None:
    schema = TradeRequest.model_json_schema()["properties"]["quantity"]["anyOf"]
    assert [option["type"] for option in schema] == ["string", "number"]
    assert parse_decimal("9" * schema[0]["maxLength"])
