"""What is shown of accounts: one account whole, and the margin report of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import orjson
import pytest

from app.columns import Chunk, Marks
from app.records import OpenBreach
from app.schemas import AccountReport, MarginReport, ReportAccount
from app.services import reports
from app.services.reports import ACCOUNT_STATES, Order, ReportRequest, ReportSource, account_state
from app.services.trading import Account, Position
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
    NOON_US,
    chunk_of,
    holding_btc,
)

HEAD = {
    "marks": {BTC: "48000", ETH: "2400"},
    "mark_version": 7,
    "mark_age_seconds": {BTC: 0.5, ETH: 0.5},
    "swept_version": 7,
    "swept_age_seconds": 0.1,
    "warning": None,
    "halted": False,
}


def report_of(account: Account, prices: Mapping[str, Decimal], breach: OpenBreach | None = None) -> dict[str, Any]:
    shown = reports.account_report(account, contracts=CONTRACTS, prices=prices, breach=breach, restore_at="initial")
    AccountReport.model_validate(shown)
    return shown


@pytest.mark.parametrize(
    ("account", "candidate", "in_breach", "state"),
    [
        (ERIN_FLAT, False, False, "ok"),
        (Account("zero", Decimal(0)), False, False, "ok"),
        (FRANK_FLAT_OWING_5, False, False, "negative_equity"),
        (FRANK_FLAT_OWING_5, False, True, "recovering"),
        (ALICE_LONG_1_BTC, False, False, "ok"),
        (ALICE_LONG_1_BTC, False, True, "recovering"),
        (ALICE_LONG_1_BTC, True, False, "candidate"),
        (ALICE_LONG_1_BTC, True, True, "candidate"),
        (replace(ALICE_LONG_1_BTC, balance=Decimal(-1)), False, False, "ok"),
    ],
)
def test_the_state_of_an_account(account: Account, candidate: bool, in_breach: bool, state: str) -> None:
    assert account_state(account, candidate=candidate, in_breach=in_breach) == state


def test_an_account_with_two_positions_is_shown_whole() -> None:
    assert report_of(DAVE_LONG_1_BTC_SHORT_10_ETH, DAVES_PRICES) == {
        "account_id": "dave",
        "state": "ok",
        "candidate": False,
        "balance": "20000",
        "equity": "14000",
        "used_margin": "15600",
        "maintenance_margin": "7800",
        "free_margin": "-1600",
        "margin_utilisation": "1.11428571",
        "margin_ratio": "0.55714286",
        "positions": [
            {
                "symbol": BTC,
                "quantity": "1",
                "avg_price": "50000",
                "mark_price": "48000",
                "notional": "48000",
                "unrealised_pnl": "-2000",
                "liquidation_price": "41111.11111111",
            },
            {
                "symbol": ETH,
                "quantity": "-10",
                "avg_price": "2000",
                "mark_price": "2400",
                "notional": "24000",
                "unrealised_pnl": "-4000",
                "liquidation_price": "2951.11111111",
            },
        ],
    }


def test_a_flat_account_has_ratios_of_zero_and_no_positions() -> None:
    shown = report_of(FRANK_FLAT_OWING_5, DAVES_PRICES)
    assert shown["state"] == "negative_equity"
    assert (shown["margin_ratio"], shown["margin_utilisation"]) == ("0", "0")
    assert (shown["equity"], shown["free_margin"], shown["positions"]) == ("-5", "-5", [])


def test_an_account_without_equity_has_no_ratios_and_is_a_candidate() -> None:
    # Alice at 36,000 has an equity of 14,000 + 36,000 - 50,000 = 0
    shown = report_of(ALICE_LONG_1_BTC, {BTC: Decimal(36_000)})
    assert (shown["equity"], shown["margin_ratio"], shown["margin_utilisation"]) == ("0", None, None)
    assert (shown["state"], shown["candidate"]) == ("candidate", True)


def test_a_position_without_a_mark_is_shown_and_not_valued() -> None:
    shown = report_of(DAVE_LONG_1_BTC_SHORT_10_ETH, {BTC: Decimal(48_000)})
    assert (shown["state"], shown["candidate"], shown["balance"]) == ("ok", False, "20000")
    for name in ("equity", "used_margin", "maintenance_margin", "free_margin", "margin_utilisation", "margin_ratio"):
        assert shown[name] is None
    btc, eth = shown["positions"]
    assert (btc["mark_price"], btc["notional"], btc["unrealised_pnl"]) == ("48000", "48000", "-2000")
    assert btc["liquidation_price"] is None
    assert (eth["quantity"], eth["avg_price"], eth["mark_price"], eth["notional"]) == ("-10", "2000", None, None)


def test_an_open_breach_is_shown_with_where_it_ends() -> None:
    # Alice at 42,000: maintenance 4,200, equity 6,000, used margin 8,400
    breach = OpenBreach(id=12, since_us=NOON_US)
    shown = report_of(ALICE_LONG_1_BTC, {BTC: Decimal(42_000)}, breach)
    assert shown["state"] == "recovering"
    assert shown["open_breach"] == {"id": 12, "since": "2026-01-01T12:00:00.000000Z", "restored_at_equity": "8400"}
    at_maintenance = reports.account_report(
        ALICE_LONG_1_BTC,
        contracts=CONTRACTS,
        prices={BTC: Decimal(42_000)},
        breach=breach,
        restore_at="maintenance",
    )
    assert at_maintenance["open_breach"]["restored_at_equity"] == "4200"
    unmarked = report_of(ALICE_LONG_1_BTC, {}, breach)
    assert unmarked["open_breach"]["restored_at_equity"] is None


def test_an_account_in_quarantine_says_nothing_that_might_be_wrong() -> None:
    shown = reports.quarantined_summary("mallory")
    assert (shown["account_id"], shown["state"], shown["candidate"]) == ("mallory", "quarantined", False)
    assert {value for name, value in shown.items() if name not in {"account_id", "state", "candidate"}} == {None}


# At 48,000 and 2,400, by slot. IRIS and JACK are candidates: IRIS long 1 from 50,000 with 6,000 has an equity of 4,000
# below 4,800; JACK with 1,000 one of -1,000. KATE with 8,000 is at 6,000, between maintenance 4,800 and used 9,600.
IRIS = holding_btc("iris", balance="6000")
JACK = holding_btc("jack", balance="1000")
KATE = holding_btc("kate", balance="8000")
EVERYBODY = [
    ERIN_FLAT, IRIS, ALICE_LONG_1_BTC, FRANK_FLAT_OWING_5, JACK, CAROL_SHORT_1_BTC, DAVE_LONG_1_BTC_SHORT_10_ETH, KATE,
]  # fmt: skip
BREACHES = [0, 0, 0, 0, 31, 0, 0, 32]


def chunks(*, size: int, accounts: Sequence[Account] = EVERYBODY, breaches: Sequence[int] = BREACHES) -> list[Chunk]:
    return [
        chunk_of(
            accounts[first : first + size], DAVES_PRICES, breaches=breaches[first : first + size], first_slot=first
        )
        for first in range(0, len(accounts), size)
    ]


def source_of(
    size: int = 3,
    *,
    quarantined: Mapping[int, str] | None = None,
    without_slot: Sequence[str] = (),
    prices: Mapping[str, Decimal] = DAVES_PRICES,
) -> ReportSource:
    async def names(slots: Sequence[int]) -> list[bytes]:
        return [EVERYBODY[slot].account_id.encode() for slot in slots]

    return ReportSource(
        chunks=chunks(size=size),
        marks=Marks(prices=prices, timestamps_us=dict.fromkeys(prices, NOON_US), version=7, by_hand=()),
        quarantined=quarantined or {},
        quarantined_without_slot=without_slot,
        names=names,
        contracts=CONTRACTS,
        restore_at="initial",
    )


async def report(
    source: ReportSource, *, limit: int | None = None, cursor: str | None = None, order: Order = "slot"
) -> dict[str, Any]:
    """The whole document, as a client reads it, checked against the model that documents it."""
    request = ReportRequest(limit=limit, cursor=cursor, order=order)
    document = orjson.loads(b"".join([piece async for piece in reports.margin_report(source, request, HEAD)]))
    MarginReport.model_validate(document)
    return document  # type: ignore[no-any-return]


def ids(accounts: Sequence[Mapping[str, Any]]) -> list[str]:
    return [account["account_id"] for account in accounts]


async def every_page(source: ReportSource, *, limit: int, order: Order) -> list[str]:
    found: list[str] = []
    cursor = None
    while True:
        page = await report(source, limit=limit, cursor=cursor, order=order)
        assert len(page["accounts"]) <= limit
        assert ids(page["liquidation_candidates"]) == ["iris", "jack"]
        found += ids(page["accounts"])
        cursor = page["next_cursor"]
        if cursor is None:
            return found


@pytest.mark.parametrize("size", [1, 3, 8, 100])
async def test_the_report_lists_candidates_first_and_then_everybody(size: int) -> None:
    document = await report(source_of(size))
    assert ids(document["liquidation_candidates"]) == ["iris", "jack"]
    assert ids(document["accounts"]) == [account.account_id for account in EVERYBODY]
    assert document["next_cursor"] is None
    assert [account["state"] for account in document["accounts"]] == [
        "ok", "candidate", "ok", "negative_equity", "candidate", "ok", "ok", "recovering",
    ]  # fmt: skip
    assert [account["open_breach_id"] for account in document["accounts"]] == [None] * 4 + [31] + [None] * 2 + [32]


async def test_the_totals_of_the_report_worked_by_hand() -> None:
    # balances 10,000 + 6,000 + 14,000 - 5 + 1,000 + 16,000 + 20,000 + 8,000 = 74,995
    # Long from 50,000: iris, alice, jack, dave, kate, five times -2,000; carol short +2,000; dave's ETH -4,000: -12,000
    # used 6 x 9,600 + 6,000; maintenance 6 x 4,800 + 3,000
    # shortfall: iris 4,800 - 4,000 and jack 4,800 + 1,000
    assert (await report(source_of()))["totals"] == {
        "equity": "62995",
        "used_margin": "63600",
        "maintenance_margin": "31800",
        "long_notional": "240000",
        "short_notional": "72000",
        "shortfall": "6600",
        "accounts": {"ok": 4, "candidate": 2, "recovering": 1, "negative_equity": 1, "quarantined": 0},
    }


async def test_the_head_of_the_report_is_what_it_was_given() -> None:
    document = await report(source_of())
    assert {name: document[name] for name in HEAD} == HEAD
    assert list(document)[-4:] == ["totals", "liquidation_candidates", "accounts", "next_cursor"]


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 9])
async def test_pages_by_slot_hold_everybody_once(limit: int) -> None:
    assert await every_page(source_of(), limit=limit, order="slot") == [account.account_id for account in EVERYBODY]


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 9])
async def test_pages_by_margin_ratio_hold_everybody_once_null_first_then_from_the_highest(limit: int) -> None:
    # jack none; iris 4,800 / 4,000; kate 4,800 / 6,000; dave 0.557; alice 4,800 / 12,000; carol 4,800 / 18,000; flat 0
    assert await every_page(source_of(), limit=limit, order="margin_ratio") == [
        "jack", "iris", "kate", "dave", "alice", "carol", "erin", "frank",
    ]  # fmt: skip


async def test_a_report_asked_by_margin_ratio_of_accounts_that_cannot_be_valued_lists_them_first() -> None:
    document = await report(source_of(prices={BTC: Decimal(48_000)}), order="margin_ratio")
    assert ids(document["accounts"])[:2] == ["jack", "dave"]
    dave = document["accounts"][1]
    assert (dave["state"], dave["equity"], dave["margin_ratio"], dave["balance"]) == ("ok", None, None, "20000")


async def test_every_row_is_judged_at_the_marks_of_the_report() -> None:
    """A chunk that was read at older marks is not a report of two moments."""
    source = source_of()
    older = {BTC: Decimal(40_000), ETH: Decimal(2_400)}
    mixed = replace(
        source, chunks=[replace(chunk, marks=replace(chunk.marks, prices=older)) for chunk in source.chunks]
    )
    assert await report(mixed) == await report(source)


async def test_an_account_in_quarantine_is_listed_counted_and_not_judged() -> None:
    document = await report(source_of(quarantined={1: "iris", 7: "kate"}, without_slot=["mallory"]))
    assert ids(document["liquidation_candidates"]) == ["jack"]
    assert document["totals"]["accounts"] == {
        "ok": 4, "candidate": 1, "recovering": 0, "negative_equity": 1, "quarantined": 3,
    }  # fmt: skip
    iris = document["accounts"][1]
    assert (iris["state"], iris["candidate"], iris["equity"]) == ("quarantined", False, None)


async def test_the_report_of_an_empty_system_is_whole() -> None:
    source = replace(source_of(), chunks=[chunk_of([], DAVES_PRICES)])
    document = await report(source)
    assert (document["accounts"], document["liquidation_candidates"], document["next_cursor"]) == ([], [], None)
    assert document["totals"]["equity"] == "0"
    assert document["totals"]["accounts"] == dict.fromkeys(ACCOUNT_STATES, 0)


async def test_a_long_report_comes_in_pieces_and_is_one_document() -> None:
    many = [Account(f"account-{number}", Decimal(number)) for number in range(1_001)]

    async def names(slots: Sequence[int]) -> list[bytes]:
        return [many[slot].account_id.encode() for slot in slots]

    source = replace(source_of(), chunks=chunks(size=100, accounts=many, breaches=[0] * len(many)), names=names)
    request = ReportRequest(limit=None, cursor=None, order="slot")
    pieces = [piece async for piece in reports.margin_report(source, request, HEAD)]
    assert len(pieces) > 1_001 // reports.ACCOUNTS_PER_PIECE
    document = orjson.loads(b"".join(pieces))
    assert ids(document["accounts"]) == [account.account_id for account in many]
    assert document["totals"]["equity"] == "500500"


@pytest.mark.parametrize(
    ("order", "cursor"),
    [
        ("slot", ""),
        ("slot", "x"),
        ("slot", "1.5"),
        ("slot", "0.5:3"),
        ("slot", "-5"),
        ("margin_ratio", ""),
        ("margin_ratio", "3"),
        ("margin_ratio", "x:3"),
        ("margin_ratio", "0.5:x"),
        ("margin_ratio", "0.5:3:1"),
    ],
)
async def test_a_cursor_that_no_page_gave_out_is_refused_at_once(order: Order, cursor: str) -> None:
    request = ReportRequest(limit=2, cursor=cursor, order=order)
    with pytest.raises(ValueError):  # noqa: PT011  # whatever its text: the route answers with its own
        await anext(reports.margin_report(source_of(), request, HEAD))


async def test_a_cursor_at_the_end_leads_to_an_empty_page() -> None:
    for order, cursor in (("slot", "7"), ("slot", "1000"), ("margin_ratio", "0.0:7")):
        document = await report(source_of(), limit=2, cursor=cursor, order=order)  # type: ignore[arg-type]
        assert (document["accounts"], document["next_cursor"]) == ([], None)


def test_an_account_in_the_report_has_the_members_that_are_documented() -> None:
    valued = reports.value_account(ALICE_LONG_1_BTC, contracts=CONTRACTS, prices=DAVES_PRICES)
    shown = reports.account_summary(ALICE_LONG_1_BTC, valued, in_breach=False)
    assert set(shown) | {"open_breach_id"} == set(ReportAccount.model_fields)
    speck = Account("speck", Decimal("0.5"), {BTC: Position(Decimal("0.000001"), Decimal("0.05"))})
    unrounded = reports.account_summary(
        speck,
        reports.value_account(speck, contracts=CONTRACTS, prices={BTC: Decimal("12345.67890123")}),
        in_breach=False,
    )
    assert unrounded["used_margin"] == "0.002469135780246"
