"""History, newest first: trades, transfers, liquidations, recoveries."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BeforeValidator
from structlog.contextvars import bind_contextvars

from app import errors, schemas
from app.background import within
from app.database import Cursor, HistoryFilter, format_timestamp, list_history, list_liquidations
from app.history import UNIX_EPOCH
from app.models import HistoryRow, Recovery, Trade, Transfer
from app.numbers import format_decimal
from app.routes.context import PROBLEMS, Services, ServicesDependency, json_response
from app.security import GuardedRoute, caller_of, needs

HISTORY_LIMIT_MAX: Final = 1_000
ISO_DATE: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", re.ASCII)
CURSOR_PATTERN: Final = r"^[0-9]{1,16}-[0-9]{1,18}$"
"""The time in microseconds and the id of the last row of a page; so many digits fit the calendar and an int64."""


def _iso_8601(value: object) -> object:
    """A text that begins with a date: a bare number would be taken for the seconds, or milliseconds, since 1970."""
    if isinstance(value, str) and not ISO_DATE.match(value):
        raise ValueError("send a time as ISO 8601 has it")
    return value


Moment = Annotated[datetime, BeforeValidator(_iso_8601)]

router = APIRouter(route_class=GuardedRoute, tags=["history"])


@dataclass(frozen=True, slots=True)
class HistoryQuery:
    """The filters and the page that every history route takes."""

    history_filter: HistoryFilter
    limit: int
    cursor: Cursor | None


async def history_query(
    request: Request,
    account_id: Annotated[str | None, Query(pattern=schemas.IDENTIFIER_PATTERN)] = None,
    start: Annotated[Moment | None, Query(description="Not before; without an offset it is UTC")] = None,
    end: Annotated[Moment | None, Query(description="Before; without an offset it is UTC")] = None,
    limit: Annotated[int, Query(ge=1, le=HISTORY_LIMIT_MAX)] = 100,
    cursor: Annotated[str | None, Query(pattern=CURSOR_PATTERN)] = None,
) -> HistoryQuery:
    """The page asked for, of what the caller may see. Raises ``InvalidField`` for a time that cannot be."""
    if account_id is not None:
        bind_contextvars(account_id=account_id)
    return HistoryQuery(
        history_filter=HistoryFilter(
            account_id=account_id,
            start=_in_utc(start, name="start"),
            end=_in_utc(end, name="end"),
            reach=caller_of(request).reach,
        ),
        limit=limit,
        cursor=None if cursor is None else _decode_cursor(cursor),
    )


HistoryDependency = Annotated[HistoryQuery, Depends(history_query)]
HISTORY_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"model": schemas.HistoryPage, "description": "Rows by (timestamp, id), newest first"},
    **{status: PROBLEMS[status] for status in (422, 503)},
}
OWN_HISTORY: Final = needs("read", account_keys=True)
OperationIdQuery = Annotated[str | None, Query(pattern=schemas.IDENTIFIER_PATTERN)]


@router.get("/trades", summary="List trades", responses=HISTORY_RESPONSES, openapi_extra=OWN_HISTORY)
async def get_trades(
    to: ServicesDependency, query: HistoryDependency, client_trade_id: OperationIdQuery = None
) -> Response:
    """Booked trades."""
    return await _history_page(to, Trade, query, client_trade_id)


@router.get("/transfers", summary="List transfers", responses=HISTORY_RESPONSES, openapi_extra=OWN_HISTORY)
async def get_transfers(
    to: ServicesDependency, query: HistoryDependency, client_transfer_id: OperationIdQuery = None
) -> Response:
    """Booked deposits and withdrawals."""
    return await _history_page(to, Transfer, query, client_transfer_id)


@router.get("/recoveries", summary="List recoveries", responses=HISTORY_RESPONSES, openapi_extra=OWN_HISTORY)
async def get_recoveries(to: ServicesDependency, query: HistoryDependency) -> Response:
    """The ends of breaches."""
    return await _history_page(to, Recovery, query, None)


@router.get("/liquidations", summary="List liquidations", responses=HISTORY_RESPONSES, openapi_extra=OWN_HISTORY)
async def get_liquidations(to: ServicesDependency, query: HistoryDependency) -> Response:
    """Breaches, each with when it ended."""
    found = await within(
        to.settings.request_seconds,
        list_liquidations(to.sessions, query.history_filter, limit=query.limit + 1, cursor=query.cursor),
    )
    items = [
        {**_row(liquidation), "recovered_at": None if recovered is None else format_timestamp(recovered)}
        for liquidation, recovered in found[: query.limit]
    ]
    return _page(items, [liquidation for liquidation, _ in found], query.limit)


async def _history_page(
    to: Services, model: type[HistoryRow], query: HistoryQuery, operation_id: str | None
) -> Response:
    history_filter = replace(query.history_filter, operation_id=operation_id)
    rows = await within(
        to.settings.request_seconds,
        list_history(to.sessions, model, history_filter, limit=query.limit + 1, cursor=query.cursor),
    )
    return _page([_row(row) for row in rows[: query.limit]], rows, query.limit)


def _page(items: list[dict[str, Any]], found: list[Any], limit: int) -> Response:
    """The items, and the cursor of the last one where another row was found beyond it."""
    next_cursor = None
    if len(found) > limit:
        last = found[limit - 1]
        microseconds = (last.timestamp - UNIX_EPOCH) // timedelta(microseconds=1)
        next_cursor = f"{microseconds}-{last.id}"
    return json_response({"items": items, "next_cursor": next_cursor})


def _row(row: HistoryRow) -> dict[str, Any]:
    return {column.name: _shown(getattr(row, column.name)) for column in row.__table__.columns}


def _shown(value: object) -> object:
    if isinstance(value, Decimal):
        return format_decimal(value)
    if isinstance(value, datetime):
        return format_timestamp(value)
    return value


def _decode_cursor(cursor: str) -> Cursor:
    microseconds, _, history_id = cursor.partition("-")
    return UNIX_EPOCH + timedelta(microseconds=int(microseconds)), int(history_id)


def _in_utc(moment: datetime | None, *, name: str) -> datetime | None:
    """``moment`` in UTC, which it is where it says nothing. Raises ``InvalidField`` for one beyond the calendar."""
    if moment is None:
        return None
    try:
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError as error:
        raise errors.InvalidField(f"{name} lies beyond the calendar", field=name) from error
