"""History, newest first: trades, transfers, liquidations, recoveries."""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Query, Response

from app import errors, schemas
from app.database import Cursor, HistoryFilter, format_timestamp, list_history, list_liquidations
from app.history import UNIX_EPOCH
from app.models import HistoryRow, Recovery, Trade, Transfer
from app.numbers import format_decimal
from app.routes.context import PROBLEMS, Services, ServicesDependency, json_response

HISTORY_LIMIT_MAX: Final = 1_000
HISTORY_ID_MAX: Final = 2**63 - 1

router = APIRouter()


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
        history_filter=HistoryFilter(
            account_id=account_id, start=_in_utc(start, name="start"), end=_in_utc(end, name="end")
        ),
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
    history_filter = replace(query.history_filter, operation_id=operation_id)
    rows = await list_history(to.sessions, model, history_filter, limit=query.limit + 1, cursor=query.cursor)
    return _page([_row(row) for row in rows[: query.limit]], rows, query.limit)


def _page(items: list[dict[str, Any]], found: list[Any], limit: int) -> Response:
    """The items, and the cursor of the last one where another row was found beyond it."""
    next_cursor = None
    if len(found) > limit:
        last = found[limit - 1]
        microseconds = (last.timestamp - UNIX_EPOCH) // timedelta(microseconds=1)
        next_cursor = urlsafe_b64encode(f"{microseconds}:{last.id}".encode()).decode()
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
    try:
        microseconds, history_id = (int(part) for part in urlsafe_b64decode(cursor.encode()).split(b":"))
        if not 0 <= history_id <= HISTORY_ID_MAX:
            raise ValueError(cursor)
        return UNIX_EPOCH + timedelta(microseconds=microseconds), history_id
    except (ValueError, OverflowError) as error:
        raise errors.InvalidField("no page gave out this cursor", field="cursor") from error


def _in_utc(moment: datetime | None, *, name: str) -> datetime | None:
    """``moment`` in UTC, which it is where it says nothing. Raises ``InvalidField`` for one beyond the calendar."""
    if moment is None:
        return None
    try:
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError as error:
        raise errors.InvalidField(f"{name} lies beyond the calendar", field=name) from error
