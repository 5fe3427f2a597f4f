"""``GET /margin-report``: every account at the present marks, streamed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse

from app import columns, errors, schemas
from app import redis_client as keys
from app.numbers import format_decimal
from app.routes.context import PROBLEMS, Services, ServicesDependency
from app.security import GuardedRoute, needs
from app.services import reports

SWEEP_OVERDUE_INTERVALS: Final = 3
"""A sweep this many intervals old means that nobody sweeps."""

REPORT_CHUNK_ACCOUNTS: Final = 131_072

router = APIRouter(route_class=GuardedRoute, tags=["risk"])


@router.get(
    "/margin-report",
    summary="Report the margin of every account",
    openapi_extra=needs("read"),
    responses={
        200: {"model": schemas.MarginReport, "description": "Candidates first and whole, then all accounts"},
        **{status: PROBLEMS[status] for status in (422, 503)},
    },
)
async def get_margin_report(
    to: ServicesDependency,
    limit: Annotated[int | None, Query(ge=1, description="All accounts when left out")] = None,
    cursor: Annotated[str | None, Query(max_length=64)] = None,
    order: reports.Order = "slot",
) -> Response:
    """Every account's margin at the present marks, streamed."""
    store, contracts = to.store, to.booking.contracts
    with suppress(errors.StateUnreconciled):  # reading is safe before Redis has been compared with history
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
        names=lambda slots: columns.packed_names(store.client, slots),
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

    async def body() -> AsyncIterator[bytes | memoryview]:
        yield opening
        async for piece in pieces:
            yield piece
            await asyncio.sleep(0)

    return StreamingResponse(body(), media_type="application/json")


async def _report_head(to: Services, marks: columns.Marks) -> dict[str, Any]:
    now_us, swept = await to.store.swept()
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
        "halted": bool(await to.store.client.exists(keys.STATE_HALTED)),
    }
