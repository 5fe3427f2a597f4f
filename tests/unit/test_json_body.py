"""Request bodies: numbers keep their digits, and what is ambiguous is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from decimal import Decimal
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI, HTTPException

from app.json_body import ExactJSONRequest, ExactJSONRoute, NumberText
from app.numbers import parse_decimal
from app.schemas import TradeRequest

router = APIRouter(route_class=ExactJSONRoute)


@router.post("/trade")
async def _echo(trade: TradeRequest) -> dict[str, str]:
    return {"quantity": str(trade.quantity), "price": str(trade.price), "account_id": trade.account_id}


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """A client of an application in memory that reads its bodies as ours does."""
    application = FastAPI()
    application.include_router(router)
    transport = httpx.ASGITransport(application)
    async with httpx.AsyncClient(transport=transport, base_url="http://plimsoll") as connected:
        yield connected


async def parsed(body: str | bytes) -> Any:  # noqa: ANN401  # whatever JSON says
    """The body as a route sees it."""
    content = body.encode() if isinstance(body, str) else body

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content, "more_body": False}

    return await ExactJSONRequest({"type": "http", "headers": []}, receive).json()


async def refused(body: str | bytes, *, status: int = 400) -> str:
    with pytest.raises(HTTPException) as refusal:
        await parsed(body)
    assert refusal.value.status_code == status
    return str(refusal.value.detail)


@pytest.mark.parametrize(
    "digits",
    [
        "0.1", "12345678901234567890", "1234567890.123456789012345678", "0.10000000000000000001", "9007199254740993",
        "1e-8", "-0", "1E+2",
    ],
)  # fmt: skip
async def test_a_json_number_keeps_its_own_digits(digits: str) -> None:
    number = await parsed(digits)
    assert isinstance(number, NumberText)
    assert number == digits


async def test_a_number_in_a_string_stays_a_string() -> None:
    body = await parsed('{"quantity": "0.10"}')
    assert body == {"quantity": "0.10"}
    assert not isinstance(body["quantity"], NumberText)


async def test_true_false_and_null_are_themselves() -> None:
    assert await parsed("[true, false, null]") == [True, False, None]


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
async def test_a_literal_that_is_no_json_number_is_left_to_its_field_to_refuse(literal: str) -> None:
    value = (await parsed(f'{{"quantity": {literal}}}'))["quantity"]
    assert isinstance(value, NumberText)
    with pytest.raises(ValueError, match="plain decimal"):
        parse_decimal(value)


@pytest.mark.parametrize(
    "body",
    [
        '{"price": 1, "price": 2}',
        '{"price": 1, "price": 1}',
        '{"outer": {"price": 1, "price": 2}}',
        '[{"price": 1, "price": 2}]',
        r'{"price": 1, "pric\u0065": 2}',
    ],
)
async def test_a_member_that_is_named_twice_is_refused(body: str) -> None:
    assert "twice" in await refused(body, status=422)


async def test_a_name_may_stand_in_two_objects() -> None:
    assert await parsed('[{"price": 1}, {"price": 2}]') == [{"price": "1"}, {"price": "2"}]


@pytest.mark.parametrize(
    "body",
    ["", " ", "{", "{} {}", "{'a': 1}", "{a: 1}", '{"a": 01}', '{"a": .5}', '{"a": +1}', '{"a": 1,}', b"\xff\xfe",
     b'{"a": "\xe9"}', "\ufeff{}", '{"a": "\n"}'],
)  # fmt: skip
async def test_a_body_that_is_not_one_json_value_in_utf_8_is_refused(body: str | bytes) -> None:
    assert "JSON" in await refused(body)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
async def test_a_body_that_is_nested_too_deeply_is_refused(opening: str) -> None:
    assert "deeply" in await refused(opening * 100_000)


async def test_a_body_is_parsed_once() -> None:
    calls = 0

    async def receive() -> dict[str, Any]:
        nonlocal calls
        calls += 1
        return {"type": "http.request", "body": b"[1.50]", "more_body": False}

    request = ExactJSONRequest({"type": "http", "headers": []}, receive)
    assert await request.json() is await request.json()
    assert calls == 1


TRADE = '{"account_id": "alice", "symbol": "BTC-PERP", "side": "buy", "quantity": 0.1, "price": 12345678901.123456789}'


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
async def test_a_number_reaches_the_route_with_all_of_its_digits(client: httpx.AsyncClient, content_type: str) -> None:
    answer = await client.post("/trade", content=TRADE, headers={"content-type": content_type})
    assert answer.json() == {"quantity": "0.1", "price": "12345678901.123456789", "account_id": "alice"}
    assert Decimal(answer.json()["price"]) == Decimal("12345678901.123456789")


@pytest.mark.parametrize("content_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "text/json"])
async def test_a_body_of_another_type_is_refused(client: httpx.AsyncClient, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    assert (await client.post("/trade", content=TRADE, headers=headers)).status_code == 415


async def test_a_body_that_is_no_json_is_refused_before_any_route_sees_it(client: httpx.AsyncClient) -> None:
    answer = await client.post("/trade", content="{", headers={"content-type": "application/json"})
    assert answer.status_code == 400
