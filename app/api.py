"""The routes: parse, call one service, shape the answer."""

from __future__ import annotations

import asyncio
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Final, Literal, cast

import orjson
from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from redis.exceptions import RedisError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from app import columns, errors, metrics, schemas
from app import redis_client as keys
from app.booking import Booked, Booking
from app.config import Settings
from app.database import Cursor, HistoryFilter, format_timestamp, list_history, list_liquidations
from app.history import UNIX_EPOCH
from app.json_body import ExactJSONRoute
from app.models import HistoryRow, Recovery, Trade, Transfer
from app.numbers import format_decimal
from app.redis_client import StateStore
from app.services import reports
from app.services.trading import TradeOrder, TransferKind, TransferOrder

SWEEP_OVERDUE_INTERVALS: Final = 3
"""A sweep this many intervals old means that nobody sweeps."""

REPORT_CHUNK_ACCOUNTS: Final = 131_072
HISTORY_LIMIT_MAX: Final = 1_000

PROBLEMS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": schemas.Problem, "description": description, "content": {"application/problem+json": {}}}
    for status, description in {
        400: "The body is not JSON",
        404: "Unknown account",
        409: "Refused by the rules; `code` says which",
        415: "Not JSON by its content type",
        422: "A field cannot be meant; `field` names it",
        503: "Cannot answer now; retry with the same operation id",
    }.items()
}


@dataclass(frozen=True, slots=True)
class Services:
    """What the routes call, made once per process."""

    settings: Settings
    store: StateStore
    booking: Booking
    sessions: async_sessionmaker[AsyncSession]


async def services(request: Request) -> Services:
    """The services of this process, from the lifespan."""
    return cast(Services, request.state.services)


ServicesDependency = Annotated[Services, Depends(services)]
AccountPath = Annotated[str, Path(pattern=schemas.IDENTIFIER_PATTERN, examples=["alice"])]

router = APIRouter(route_class=ExactJSONRoute)


def _json(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, media_type="application/json")


def _booked(booked: Booked) -> Response:
    if booked.outcome == "replayed":
        return _json(booked.answer, 200, {"Idempotency-Replayed": "true"})
    return _json(booked.answer, 201)


@router.post(
    "/trade",
    status_code=201,
    responses={
        201: {"model": schemas.TradeAnswer, "description": "Booked"},
        200: {"model": schemas.TradeAnswer, "description": "Booked before under this client_trade_id"},
        **PROBLEMS,
    },
)
async def post_trade(trade: schemas.TradeRequest, to: ServicesDependency) -> Response:
    """Book a trade. No position is opened or increased without initial margin."""
    outcome = "unavailable"
    try:
        booked = await to.booking.book_trade(
            TradeOrder(
                account_id=trade.account_id,
                symbol=trade.symbol,
                side=trade.side,
                quantity=trade.quantity,
                price=trade.price,
            ),
            client_trade_id=trade.client_trade_id,
        )
        outcome = booked.outcome
    except (errors.Refusal, errors.UnknownAccount, errors.InvalidField):
        outcome = "refused"
        raise
    finally:
        metrics.TRADES.labels(trade.side, outcome).inc()
    return _booked(booked)


@router.post("/mark-price", responses={200: {"model": schemas.MarkAnswer, "description": "Accepted"}, **PROBLEMS})
async def post_mark_price(mark: schemas.MarkRequest, to: ServicesDependency) -> Response:
    """Set the price at which open positions are valued; every accepted mark is swept."""
    return _json(await to.booking.marks.set_mark(mark.symbol, mark.price, confirm=mark.confirm))


@router.post(
    "/accounts/{account_id}/deposit",
    status_code=201,
    responses={
        201: {"model": schemas.TransferAnswer, "description": "Booked"},
        200: {"model": schemas.TransferAnswer, "description": "Booked before under this client_transfer_id"},
        **PROBLEMS,
    },
)
async def post_deposit(account_id: AccountPath, transfer: schemas.TransferRequest, to: ServicesDependency) -> Response:
    """Add USDT to an account; the first deposit makes the account."""
    return await _transfer("deposit", account_id, transfer, to)


@router.post(
    "/accounts/{account_id}/withdraw",
    status_code=201,
    responses={
        201: {"model": schemas.TransferAnswer, "description": "Booked"},
        200: {"model": schemas.TransferAnswer, "description": "Booked before under this client_transfer_id"},
        **PROBLEMS,
    },
)
async def post_withdraw(account_id: AccountPath, transfer: schemas.TransferRequest, to: ServicesDependency) -> Response:
    """Take USDT out of an account, at most ``min(balance, free margin)``."""
    return await _transfer("withdrawal", account_id, transfer, to)


async def _transfer(kind: TransferKind, account_id: str, transfer: schemas.TransferRequest, to: Services) -> Response:
    return _booked(
        await to.booking.book_transfer(
            TransferOrder(account_id=account_id, kind=kind, amount=transfer.amount),
            client_transfer_id=transfer.client_transfer_id,
        )
    )


@router.get(
    "/positions/{account_id}",
    responses={
        200: {"model": schemas.AccountReport, "description": "The account at the live marks"},
        **{status: PROBLEMS[status] for status in (404, 422, 503)},
    },
)
async def get_positions(account_id: AccountPath, to: ServicesDependency) -> Response:
    """One account, computed from its record and the live marks."""
    snapshot = await to.booking.read(account_id)
    try:
        account = to.booking.parse(snapshot)
    except errors.AccountQuarantined:
        return _json({**reports.quarantined_summary(account_id), "positions": []})
    market = to.booking.market(snapshot)
    return _json(
        reports.account_report(
            account,
            contracts=market.contracts,
            prices={symbol: mark.price for symbol, mark in market.marks.items()},
            breach=snapshot.breach,
            restore_at=to.settings.restore_at,
        )
    )


@router.get(
    "/margin-report",
    responses={
        200: {"model": schemas.MarginReport, "description": "Candidates first and whole, then all accounts"},
        **{status: PROBLEMS[status] for status in (422, 503)},
    },
)
async def get_margin_report(
    to: ServicesDependency,
    limit: Annotated[int | None, Query(ge=1, description="All accounts when left out")] = None,
    cursor: Annotated[str | None, Query(max_length=64)] = None,
    order: Literal["slot", "margin_ratio"] = "slot",
) -> Response:
    """Every account's margin at the present marks, streamed."""
    store, contracts = to.store, to.booking.contracts
    await store.require_state()
    chunks = [
        chunk async for chunk in columns.read_chunks(store.client, contracts, chunk_accounts=REPORT_CHUNK_ACCOUNTS)
    ]
    quarantined, without_slot = await columns.quarantined_slots(store.client)
    marks = chunks[-1].marks
    source = reports.ReportSource(
        chunks=chunks,
        marks=marks,
        quarantined=quarantined,
        quarantined_without_slot=without_slot,
        names=lambda slots: columns.account_names(store.client, slots),
        contracts=contracts,
        restore_at=to.settings.restore_at,
    )
    pieces = reports.margin_report(
        source, reports.ReportRequest(limit=limit, cursor=cursor, order=order), await _report_head(to, marks)
    )
    try:
        opening = await anext(pieces)
    except ValueError as error:
        raise errors.InvalidField("this order of the report gave out no such cursor", field="cursor") from error

    async def body() -> Any:  # noqa: ANN401  # an asynchronous iterator of bytes
        yield opening
        async for piece in pieces:
            yield piece
            await asyncio.sleep(0)

    return StreamingResponse(body(), media_type="application/json")


async def _report_head(to: Services, marks: columns.Marks) -> dict[str, Any]:
    now_us, swept = await _swept(to.store)
    swept_age = None if swept is None else (now_us - swept[1]) / 1_000_000
    overdue = SWEEP_OVERDUE_INTERVALS * to.settings.sweep_interval_seconds
    warning = None
    if swept_age is None:
        warning = "no watchdog has swept yet: breaches are not being recorded"
    elif swept_age > overdue:
        warning = f"no watchdog has swept for {swept_age:.1f} s: breaches are not being recorded"
    return {
        "marks": {symbol: format_decimal(price) for symbol, price in marks.prices.items()},
        "mark_version": marks.version,
        "mark_age_seconds": {
            symbol: max(0.0, (now_us - accepted_us) / 1_000_000) if accepted_us else 0.0
            for symbol, accepted_us in marks.timestamps_us.items()
        },
        "swept_version": 0 if swept is None else swept[0],
        "swept_age_seconds": swept_age,
        "warning": warning,
    }


async def _swept(store: StateStore) -> tuple[int, tuple[int, int] | None]:
    """Redis TIME in microseconds, and the version swept with the time of the newest sweep."""
    async with store.client.pipeline(transaction=True) as pipeline:
        pipeline.time()
        pipeline.hmget(keys.STATE_SWEPT, "version", "at")
        (seconds, microseconds), (version, at) = await pipeline.execute()
    return seconds * 1_000_000 + microseconds, None if version is None else (int(version), int(at))


@dataclass(frozen=True, slots=True)
class HistoryQuery:
    """The filters and the page that every history route takes."""

    history_filter: HistoryFilter
    limit: int
    cursor: Cursor | None


async def history_query(
    account_id: Annotated[str | None, Query(pattern=schemas.IDENTIFIER_PATTERN)] = None,
    start: Annotated[datetime | None, Query(description="Not before; without an offset it is UTC")] = None,
    end: Annotated[datetime | None, Query(description="Before; without an offset it is UTC")] = None,
    limit: Annotated[int, Query(ge=1, le=HISTORY_LIMIT_MAX)] = 100,
    cursor: Annotated[str | None, Query(max_length=128)] = None,
) -> HistoryQuery:
    """The page asked for. Raises ``InvalidField`` for a cursor that was not given out."""
    return HistoryQuery(
        history_filter=HistoryFilter(account_id=account_id, start=_in_utc(start), end=_in_utc(end)),
        limit=limit,
        cursor=None if cursor is None else _decode_cursor(cursor),
    )


HistoryDependency = Annotated[HistoryQuery, Depends(history_query)]
HISTORY_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"model": schemas.HistoryPage, "description": "Rows by (timestamp, id), newest first"},
    **{status: PROBLEMS[status] for status in (422, 503)},
}
OperationIdQuery = Annotated[str | None, Query(pattern=schemas.IDENTIFIER_PATTERN)]


@router.get("/trades", responses=HISTORY_RESPONSES)
async def get_trades(
    to: ServicesDependency, query: HistoryDependency, client_trade_id: OperationIdQuery = None
) -> Response:
    """Booked trades."""
    return await _history_page(to, Trade, query, client_trade_id)


@router.get("/transfers", responses=HISTORY_RESPONSES)
async def get_transfers(
    to: ServicesDependency, query: HistoryDependency, client_transfer_id: OperationIdQuery = None
) -> Response:
    """Booked deposits and withdrawals."""
    return await _history_page(to, Transfer, query, client_transfer_id)


@router.get("/recoveries", responses=HISTORY_RESPONSES)
async def get_recoveries(to: ServicesDependency, query: HistoryDependency) -> Response:
    """The ends of breaches."""
    return await _history_page(to, Recovery, query, None)


@router.get("/liquidations", responses=HISTORY_RESPONSES)
async def get_liquidations(to: ServicesDependency, query: HistoryDependency) -> Response:
    """Breaches, each with when it ended."""
    found = await list_liquidations(to.sessions, query.history_filter, limit=query.limit + 1, cursor=query.cursor)
    items = [
        {**_row(liquidation), "recovered_at": None if recovered is None else format_timestamp(recovered)}
        for liquidation, recovered in found[: query.limit]
    ]
    return _page(items, [liquidation for liquidation, _ in found], query.limit)


async def _history_page(
    to: Services, model: type[HistoryRow], query: HistoryQuery, operation_id: str | None
) -> Response:
    history_filter = HistoryFilter(
        account_id=query.history_filter.account_id,
        start=query.history_filter.start,
        end=query.history_filter.end,
        operation_id=operation_id,
    )
    rows = await list_history(to.sessions, model, history_filter, limit=query.limit + 1, cursor=query.cursor)
    return _page([_row(row) for row in rows[: query.limit]], rows, query.limit)


def _page(items: list[dict[str, Any]], found: list[Any], limit: int) -> Response:
    """The items, and the cursor of the last one where another row was found beyond it."""
    next_cursor = None
    if len(found) > limit:
        last = found[limit - 1]
        microseconds = (last.timestamp - UNIX_EPOCH) // timedelta(microseconds=1)
        next_cursor = urlsafe_b64encode(f"{microseconds}:{last.id}".encode()).decode()
    return _json({"items": items, "next_cursor": next_cursor})


def _row(row: HistoryRow) -> dict[str, Any]:
    return {column.name: _shown(getattr(row, column.name)) for column in row.__table__.columns}


def _shown(value: object) -> object:
    if isinstance(value, Decimal):
        return format_decimal(value)
    if isinstance(value, datetime):
        return format_timestamp(value)
    return value


def _decode_cursor(cursor: str) -> Cursor:
    try:
        microseconds, history_id = urlsafe_b64decode(cursor.encode()).decode().split(":")
        return UNIX_EPOCH + timedelta(microseconds=int(microseconds)), int(history_id)
    except (ValueError, OverflowError) as error:
        raise errors.InvalidField("no page gave out this cursor", field="cursor") from error


def _in_utc(moment: datetime | None) -> datetime | None:
    return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment


@router.get("/health/live")
async def get_live() -> Response:
    """The process answers."""
    return _json({"status": "live"})


@router.get(
    "/health/ready",
    responses={
        200: {"model": schemas.Readiness, "description": "Ready"},
        503: {"model": schemas.Readiness, "description": "Not ready; `missing` says what"},
    },
)
async def get_ready(to: ServicesDependency) -> Response:
    """Whether trades can be booked, with the mark version and the version swept."""
    missing: list[str] = []
    mark_version = swept_version = None
    checks: dict[str, Callable[[], Awaitable[object]]] = {
        "state": to.store.require_state,
        "postgres": to.booking.outbox.ping_postgres,
    }
    try:
        mark_version = int(await to.store.client.get(keys.MARK_VERSION) or 0)
        _, swept = await _swept(to.store)
        swept_version = 0 if swept is None else swept[0]
    except (RedisError, OSError):
        missing.append("redis")
        del checks["state"]
    for name, check in checks.items():
        try:
            await check()
        except errors.Unavailable as error:
            missing.append(name if name == "postgres" else str(error.members.get("reason", error.code)))
    status = "not ready" if missing else "ready"
    content = schemas.Readiness(status=status, mark_version=mark_version, swept_version=swept_version, missing=missing)
    return _json(content.model_dump(), 503 if missing else 200)


@router.get("/metrics", include_in_schema=False)
async def get_metrics() -> Response:
    """Prometheus' text format."""
    return Response(metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})


@router.get("/", include_in_schema=False)
async def get_root() -> Response:
    """Lead a browser to the documentation."""
    return RedirectResponse("/docs")
