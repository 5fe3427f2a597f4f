"""What cannot be meant is answered with a 4xx that names the field, books nothing, and is never our mistake."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from app.embedded import Stores
from app.marks import MarkBook
from tests.integration.desk import BTC_PERP, Desk, api_in_this_process, expect

pytestmark = pytest.mark.asyncio(loop_scope="module")

TRADE = {"account_id": "alice", "symbol": BTC_PERP, "side": "buy", "quantity": "0.1", "price": "50000"}
MARK = {"symbol": BTC_PERP, "price": "50000"}
TRANSFER = {"amount": "10"}
REASON = {"reason": "a test"}
BODIES = {
    "/trade": TRADE,
    "/mark-price": MARK,
    "/accounts/alice/deposit": TRANSFER,
    "/accounts/alice/withdraw": TRANSFER,
    "/halt": REASON,
    "/resume": REASON,
}
ECHOED_BYTES_MAX = 128

NUMBERS = (
    ("/trade", "quantity"),
    ("/trade", "price"),
    ("/mark-price", "price"),
    ("/accounts/alice/deposit", "amount"),
    ("/accounts/alice/withdraw", "amount"),
)
NO_NUMBERS = (
    *('"NaN"', '"nan"', '"Infinity"', '"-Infinity"', '"inf"', '"sNaN"', '"1e400"', '"1e999999"', "1e400", "1e-400"),
    *('"abc"', '""', '" 1 "', '"1 "', '"1_000"', '"+1"', '"0x10"', '"1,5"', '".5"', '"1."', '"01"', '"--1"'),
    # Arabic and full-width digits, a number and a NUL.
    *('"\\u0661"', '"\\uff11"', '"1\\u0000"'),
    *("true", "false", "null", "[]", '["1"]', "{}", '{"amount": "1"}'),
    *("0", "-0", "0.0", '"0"', '"-0"', "-1", '"-1"', "-0.01"),
    # More digits than are kept: exact or refused, never rounded.
    *("0.100000000000000000001", '"0.100000000000000000001"', "123456789012345678901", '"1' + "0" * 5_000 + '"'),
    "1" + "0" * 5_000,
)


async def post_text(desk: Desk, path: str, text: str | bytes, content_type: str = "application/json") -> httpx.Response:
    return await desk.client.post(path, content=text, headers={"Content-Type": content_type})


def with_member(path: str, name: str, text: str) -> str:
    """The valid body of ``path`` as JSON, with one member written as ``text``."""
    members = {**{key: json.dumps(value) for key, value in BODIES[path].items()}, name: text}
    return "{" + ", ".join(f'"{key}": {value}' for key, value in members.items()) + "}"


@pytest.mark.parametrize(("path", "name"), NUMBERS)
@pytest.mark.parametrize("text", NO_NUMBERS, ids=lambda text: text[:24].encode("unicode_escape").decode())
async def test_what_is_no_number_above_zero_is_refused_by_name(
    shared_desk: Desk, path: str, name: str, text: str
) -> None:
    refused = expect(await post_text(shared_desk, path, with_member(path, name, text)), 422)
    assert refused["field"] == name
    assert len(refused["detail"]) < 400


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize(("path", "name"), NUMBERS)
async def test_a_literal_that_python_writes_and_json_does_not_have_is_refused_by_name(
    shared_desk: Desk, path: str, name: str, literal: str
) -> None:
    refused = expect(await post_text(shared_desk, path, with_member(path, name, literal)), 422)
    assert refused["field"] == name


NO_IDENTIFIERS = (
    *(
        '"a:b"',
        '"1:balance"',
        '"a{b}"',
        '"{a}"',
        '""',
        '" "',
        '"a b"',
        '"a/b"',
        '"a\\nb"',
        '"a\\n"',
        '"a*"',
        '"\\u00e4"',
    ),
    *('"' + "a" * 65 + '"', '"' + "a" * 10_000 + '"', '"\\u0000"', '"\\ud800"', '"\\uff11"'),
    *("true", "[]", "{}", "1.5", "-1", "1e3", "NaN"),
)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/trade", "account_id"),
        ("/trade", "symbol"),
        ("/mark-price", "symbol"),
        ("/trade", "client_trade_id"),
        ("/accounts/alice/deposit", "client_transfer_id"),
        ("/accounts/alice/withdraw", "client_transfer_id"),
    ],
)
@pytest.mark.parametrize("text", NO_IDENTIFIERS, ids=lambda text: text[:24].encode("unicode_escape").decode())
async def test_what_is_no_identifier_is_refused_by_name(shared_desk: Desk, path: str, name: str, text: str) -> None:
    refused = expect(await post_text(shared_desk, path, with_member(path, name, text)), 422)
    assert refused["field"] == name
    assert len(json.dumps(refused)) < 2_000


@pytest.mark.parametrize("name", ["a:b", "a%20b", "a%0A", "%00", "a" * 65, "%C3%A4", "a%7Bb%7D", "a*"])
@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/positions/{}"), ("POST", "/accounts/{}/deposit"), ("POST", "/accounts/{}/withdraw")],
)
async def test_what_is_no_account_in_a_path_is_refused_by_name(
    shared_desk: Desk, method: str, path: str, name: str
) -> None:
    body = {"amount": "1"} if method == "POST" else None
    refused = expect(await shared_desk.client.request(method, path.format(name), json=body), 422)
    assert refused["field"] == "account_id"


@pytest.mark.parametrize("path", ["/trade", "/mark-price"])
@pytest.mark.parametrize("symbol", ["ETH-PERP", "btc-perp", "BTC"])
async def test_an_unknown_symbol_is_answered_with_the_valid_ones(shared_desk: Desk, path: str, symbol: str) -> None:
    refused = expect(await shared_desk.client.post(path, json={**BODIES[path], "symbol": symbol}), 422)
    assert (refused["field"], refused["allowed"]) == ("symbol", [BTC_PERP])


@pytest.mark.parametrize("side", ["hold", "", "long", "buy "])
async def test_an_unknown_side_is_answered_with_the_valid_ones(shared_desk: Desk, side: str) -> None:
    refused = expect(await shared_desk.trade("alice", side, "1", "50000"), 422)
    assert refused["field"] == "side"
    assert "'buy' or 'sell'" in refused["detail"]


@pytest.mark.parametrize("text", ["1", "true", "null", "[]", "{}"])
async def test_a_side_that_is_no_text_is_refused_by_name(shared_desk: Desk, text: str) -> None:
    refused = expect(await post_text(shared_desk, "/trade", with_member("/trade", "side", text)), 422)
    assert refused["field"] == "side"


@pytest.mark.parametrize("text", ['"yes"', "1", '"true"', "null"])
async def test_confirm_is_true_or_false(shared_desk: Desk, text: str) -> None:
    refused = expect(await post_text(shared_desk, "/mark-price", with_member("/mark-price", "confirm", text)), 422)
    assert refused["field"] == "confirm"


@pytest.mark.parametrize(
    "text",
    [*('""', '"a\\nb"', '"\\u0000"', '"\\ud800"', '"' + "a" * 201 + '"', '"' + "a" * 60_000 + '"'), "1", "null", "[]"],
    ids=lambda text: text[:24].encode("unicode_escape").decode(),
)
@pytest.mark.parametrize("path", ["/halt", "/resume"])
async def test_what_is_no_reason_is_refused_by_name(shared_desk: Desk, path: str, text: str) -> None:
    refused = expect(await post_text(shared_desk, path, with_member(path, "reason", text)), 422)
    assert refused["field"] == "reason"


def required() -> Iterator[tuple[str, str]]:
    for path, body in BODIES.items():
        for name in body:
            yield path, name


@pytest.mark.parametrize(("path", "name"), list(required()))
async def test_a_member_that_is_missing_is_named(shared_desk: Desk, path: str, name: str) -> None:
    body = {key: value for key, value in BODIES[path].items() if key != name}
    assert expect(await shared_desk.client.post(path, json=body), 422)["field"] == name


@pytest.mark.parametrize("path", BODIES)
async def test_a_member_that_is_unknown_is_named(shared_desk: Desk, path: str) -> None:
    answer = await shared_desk.client.post(path, json={**BODIES[path], "leverage": "100"})
    assert expect(answer, 422)["field"] == "leverage"


@pytest.mark.parametrize(("path", "name"), list(required()))
async def test_a_member_that_is_there_twice_is_refused(shared_desk: Desk, path: str, name: str) -> None:
    valid = json.dumps(BODIES[path])
    answer = await post_text(shared_desk, path, valid[:-1] + f', "{name}": "1"' + "}")
    assert answer.status_code in {400, 422}
    assert name in answer.json()["detail"]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "content",
    [
        *(b"", b" ", b"{", b"[]", b"null", b"1", b'"text"', b"{}x", b"\xff\xfe", b'{"amount": "\xff"}', b"\x00"),
        *('{"amount": "1"}'.encode("utf-16"), b"[" * 60_000, b'{"a":' * 12_000, b"{'amount': 1}", b"amount=1"),
    ],
    ids=lambda content: repr(content[:16]),
)
async def test_a_body_that_is_no_json_object_is_refused(shared_desk: Desk, path: str, content: bytes) -> None:
    answer = await post_text(shared_desk, path, content)
    assert answer.status_code in {400, 422}
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert len(answer.content) < 2_000


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded", "text/json"])
async def test_a_body_of_another_content_type_is_refused_as_such(
    shared_desk: Desk, path: str, content_type: str
) -> None:
    answer = await post_text(shared_desk, path, json.dumps(BODIES[path]), content_type)
    assert expect(answer, 415)["code"] == "unsupported_media_type"


async def test_a_body_may_say_its_character_set(shared_desk: Desk) -> None:
    answer = await post_text(shared_desk, "/mark-price", json.dumps(MARK), "application/json; charset=utf-8")
    expect(answer, 200)


HISTORIES = ("/trades", "/transfers", "/liquidations", "/recoveries")
NO_IDENTIFIER_TEXTS = ("a:b", "", " ", "a" * 65, "a\n", "\x00", "\u00e4", "\uff11")
NO_TIMES = ("yesterday", "1", "1700000000", "1e300", "2026-13-01", "2026-02-30", "", "NaN", "9" * 5_000, "\x00")
NO_QUERIES = {
    **{
        (path, name): values
        for path in HISTORIES
        for name, values in {
            "limit": ("0", "-1", "1001", "abc", "1.5", "", "1e2", "\uff11", "9" * 5_000),
            "account_id": NO_IDENTIFIER_TEXTS,
            "start": NO_TIMES,
            "end": NO_TIMES,
            "cursor": (
                *("abc", "====", "1", "1-", "-1", "1-2-3", "1:2", "-1-1", "1-\uff11", "1-1\n", "1-1\x00", ""),
                *("1" * 17 + "-1", "1-" + "1" * 19, "1" * 5_000),
            ),
        }.items()
    },
    ("/trades", "client_trade_id"): NO_IDENTIFIER_TEXTS,
    ("/transfers", "client_transfer_id"): NO_IDENTIFIER_TEXTS,
    ("/margin-report", "limit"): ("0", "-1", "abc", "1.5", "", "9" * 5_000),
    ("/margin-report", "order"): ("", "equity", "SLOT", "slot ", "\x00"),
    ("/margin-report", "cursor"): ("abc", "====", "\u00e4", "-1", "1e3", "a" * 65, "inf:nan", "\x00"),
}


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [(path, name, value) for (path, name), values in NO_QUERIES.items() for value in values],
    ids=lambda text: text[:24].encode("unicode_escape").decode(),
)
async def test_what_a_route_cannot_filter_order_or_page_by_is_refused_by_name(
    shared_desk: Desk, path: str, name: str, value: str
) -> None:
    refused = expect(await shared_desk.client.get(path, params={name: value}), 422)
    assert refused["field"] == name


@pytest.mark.parametrize("path", [*HISTORIES, "/margin-report", "/positions/alice", "/health/ready", "/metrics"])
async def test_a_parameter_that_is_unknown_is_named_with_the_valid_ones(shared_desk: Desk, path: str) -> None:
    refused = expect(await shared_desk.client.get(path, params={"acount_id": "alice"}), 422)
    assert refused["field"] == "acount_id"
    assert refused["allowed"] == sorted(name for route, name in NO_QUERIES if route == path)


@pytest.mark.parametrize(("path", "name"), NO_QUERIES)
async def test_a_parameter_that_is_given_twice_is_refused(shared_desk: Desk, path: str, name: str) -> None:
    refused = expect(await shared_desk.client.get(f"{path}?{name}=slot&{name}=slot"), 422)
    assert refused["field"] == name


async def test_every_body_and_every_parameter_of_the_api_is_tried_here(shared_desk: Desk) -> None:
    document = expect(await shared_desk.client.get("/openapi.json"), 200)
    posts = {path.replace("{account_id}", "alice") for path, methods in document["paths"].items() if "post" in methods}
    assert posts == set(BODIES)
    in_queries = {
        (path, parameter["name"])
        for path, methods in document["paths"].items()
        for operation in methods.values()
        for parameter in operation.get("parameters", [])
        if parameter["in"] == "query"
    }
    assert in_queries == set(NO_QUERIES)


def requests_with(marked: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Requests that can hardly be meant and have ``marked`` in every place where a client can put something."""
    for path, body in BODIES.items():
        yield "POST", path, {"json": dict.fromkeys([*body, *(f"{marked}{number}" for number in range(9))], marked)}
        yield "POST", path, {"json": {**body, marked: marked}}
        yield "POST", path, {"content": '{"' + marked + '": 1, "' + marked + '": 2}'}
        yield "POST", path, {"content": marked}
        yield "POST", path, {"content": '"' + marked + '"'}
        yield "POST", path, {"content": marked, "headers": {"Content-Type": "text/plain; charset=" + marked}}
    for path, name in NO_QUERIES:
        yield "GET", path, {"params": {name: marked}}
        yield "GET", path, {"params": {marked: marked}}
        yield "GET", f"{path}/", {"params": {marked: marked}}
    for method, path in (("GET", "/positions/"), ("GET", "/"), ("GET", "/docs/"), ("DELETE", "/trades/")):
        yield method, path + marked, {}
    for verb in ("deposit", "withdraw"):
        yield "POST", f"/accounts/{marked}/{verb}", {"json": {"amount": marked}}
    yield "POST", f"/accounts/{marked}/withdraw", {"json": {**TRANSFER, "client_transfer_id": marked}}
    yield "POST", "/trade", {"json": {**TRADE, "account_id": marked, "client_trade_id": marked}}


@pytest.mark.parametrize(
    "marked", ["Q" * 64, "Q" * 4_000, "\u042f" * 64, "\u042f" * 1_000], ids=lambda text: f"{len(text.encode())}-bytes"
)
async def test_no_answer_echoes_more_than_128_bytes_of_what_was_sent(shared_desk: Desk, marked: str) -> None:
    for method, path, request in requests_with(marked):
        content = request.pop("content", None)
        headers = {"Content-Type": "application/json", **request.pop("headers", {})}
        answer = await shared_desk.client.request(
            method,
            path,
            content=None if content is None else content.encode(),
            headers={name: value.encode() for name, value in headers.items()} if content is not None else {},
            **request,
        )
        if answer.status_code == 200:  # sixty-four letters may be the name of an account, which has no rows
            assert "account_id" in str(request) or "client_t" in str(request), (path, answer.text)
            continue
        assert 400 <= answer.status_code < 500, (method, path, request, answer.text)
        assert answer.headers["Content-Type"] == "application/problem+json"
        sent_back = answer.text + "".join(answer.headers.values())
        echoed = sum(len(letter.encode()) for letter in sent_back if letter == marked[0])
        assert echoed <= ECHOED_BYTES_MAX, (method, path, request, answer.text)


@pytest.mark.parametrize("path", [*BODIES, "/nothing"])
async def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_read(shared_desk: Desk, path: str) -> None:
    read = False

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        read = True
        yield b""

    headers = {"Content-Type": "application/json", "Content-Length": str(64 * 1024 + 1)}
    answer = await shared_desk.client.post(path, content=body(), headers=headers)
    assert expect(answer, 413)["code"] == "body_too_large"
    assert not read


@pytest.mark.parametrize("path", BODIES)
async def test_a_body_in_chunks_is_refused_as_soon_as_it_is_too_large(shared_desk: Desk, path: str) -> None:
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 1_024
            yield b" " * 1_024

    headers = {"Content-Type": "application/json"}
    answer = await shared_desk.client.post(path, content=body(), headers=headers)
    assert expect(answer, 413)["code"] == "body_too_large"
    assert read <= 66 * 1_024


@pytest.mark.parametrize(("size", "status"), [(64 * 1024 - 1, 200), (64 * 1024, 200), (64 * 1024 + 1, 413)])
async def test_a_body_may_have_64_kibibytes(shared_desk: Desk, size: int, status: int) -> None:
    answer = await post_text(shared_desk, "/mark-price", json.dumps(MARK).ljust(size))
    expect(answer, status)


@pytest.mark.parametrize("value", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "1e300", "-1e300"])
@pytest.mark.parametrize("name", ["start", "end"])
async def test_a_time_at_the_end_of_the_calendar_is_no_mistake_of_ours(
    shared_desk: Desk, name: str, value: str
) -> None:
    answer = await shared_desk.client.get("/trades", params={name: value})
    assert answer.status_code in {200, 422}, answer.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        *(("GET", "/nothing", 404), ("GET", "/trades/", 404), ("GET", "/positions/", 404)),
        *(("GET", "/trade", 405), ("DELETE", "/trades", 405), ("POST", "/positions/alice", 405)),
    ],
)
async def test_a_route_or_method_that_does_not_exist_is_answered_as_a_problem(
    shared_desk: Desk, method: str, path: str, status: int
) -> None:
    answer = await shared_desk.client.request(method, path)
    assert expect(answer, status)["status"] == status
    assert answer.headers["Content-Type"] == "application/problem+json"


async def test_a_mistake_of_ours_is_answered_as_a_problem_that_tells_nothing_of_it(
    shared_stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a secret")

    async with api_in_this_process(shared_stores, raise_app_exceptions=False) as client:
        monkeypatch.setattr(MarkBook, "set_mark", fail)
        answer = await client.post("/mark-price", json=MARK)
    assert expect(answer, 500)["code"] == "internal_error"
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert "secret" not in answer.text


async def test_nothing_of_all_this_has_been_booked(shared_desk: Desk) -> None:
    assert await shared_desk.rows("trades") == []
    assert await shared_desk.rows("transfers") == []


@pytest.mark.parametrize(
    "amount",
    ["1234567890.12345678", "0.12345678", "39999999999.99999999", "100000000.00000001", "1e2", "1.5e-7", "12e9"],
)
async def test_a_json_number_keeps_its_own_digits(shared_desk: Desk, amount: str) -> None:
    account = shared_desk.new_account()
    answer = await post_text(shared_desk, f"/accounts/{account}/deposit", '{"amount": ' + amount + "}")
    plain = {"1e2": "100", "1.5e-7": "0.00000015", "12e9": "12000000000"}.get(amount, amount)
    assert expect(answer, 201)["balance"] == plain


@pytest.mark.parametrize("side", ["buy", "BUY", "Buy", "sell", "SELL"])
async def test_a_side_is_understood_in_any_case(shared_desk: Desk, side: str) -> None:
    account = shared_desk.new_account()
    await shared_desk.mark("50000")
    await shared_desk.deposit(account, "10000")
    answer: dict[str, Any] = expect(await shared_desk.trade(account, side, "1", "50000"), 201)
    assert answer["side"] == side.lower()


async def test_an_account_id_may_be_an_integer_and_becomes_its_digits(shared_desk: Desk) -> None:
    await shared_desk.mark("50000")
    await shared_desk.deposit("18446744073709551616", "10000")
    body = with_member("/trade", "account_id", "18446744073709551616")
    answer = await post_text(shared_desk, "/trade", body)
    assert expect(answer, 201)["account_id"] == "18446744073709551616"
