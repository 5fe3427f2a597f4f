"""The watchdog's own page: metrics and health, from the loop that sweeps, so that a dead loop does not answer."""

from __future__ import annotations

import asyncio
import time
from typing import Final

import structlog
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from redis.exceptions import RedisError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from app import errors
from app import metrics as shared_metrics
from app import redis_client as keys
from app.booking import Booking
from app.problems import problem_response
from app.security import Access, Gate
from watchdog import metrics
from watchdog.sweep import Sweeper

WEDGED_INTERVALS: Final = 3

log = structlog.get_logger(__name__)


METRICS_ACCESS: Final = Access(scope="read", account_keys=False, route="GET /metrics", reads=True)


def create_server(booking: Booking, sweeper: Sweeper, gate: Gate | None) -> Starlette:
    """``/metrics``, behind ``gate`` where there is one, ``/health/live`` and ``/health/ready``."""
    limit_seconds = WEDGED_INTERVALS * booking.settings.sweep_interval_seconds
    metrics.show_settings(booking.settings)

    async def serve_metrics(request: Request) -> Response:
        if gate is not None:
            await gate.admit(request, METRICS_ACCESS)
        await _read_counters(booking)
        if sweeper.swept is not None:
            await asyncio.to_thread(metrics.show_bands, sweeper.swept, booking.contracts)
        return Response(
            generate_latest(metrics.REGISTRY) + generate_latest(shared_metrics.REGISTRY),
            headers={"Content-Type": CONTENT_TYPE_LATEST},
        )

    async def live(_: Request) -> Response:
        """Sweeps come to an end, well or not: a store that is away is no reason to restart the watchdog."""
        idle_seconds = time.monotonic() - sweeper.last_sign_of_life
        wedged = idle_seconds > limit_seconds
        return JSONResponse(
            {"status": "wedged" if wedged else "live", "last_sign_of_life_seconds": round(idle_seconds, 3)},
            status_code=503 if wedged else 200,
        )

    async def ready(_: Request) -> Response:
        """Sweeps succeed."""
        missing = []
        age_seconds = time.monotonic() - sweeper.last_success
        if sweeper.swept is None or age_seconds > limit_seconds:
            missing.append("a successful sweep")
        try:
            await booking.store.require_state()
        except errors.Unavailable as error:
            missing.append(str(error.members.get("reason", error.code)))
        return JSONResponse(
            {
                "status": "not ready" if missing else "ready",
                "mark_version": sweeper.swept.marks.version if sweeper.swept else None,
                "swept_version": sweeper.swept.version if sweeper.swept else None,
                "missing": missing,
            },
            status_code=503 if missing else 200,
        )

    return Starlette(
        routes=[
            Route("/metrics", serve_metrics),
            Route("/health/live", live),
            Route("/health/ready", ready),
        ],
        exception_handlers={errors.PlimsollError: _refuse},
    )


async def _refuse(_: Request, error: Exception) -> Response:
    """The problem document of what the gate raises."""
    assert isinstance(error, errors.PlimsollError)
    response = problem_response(*errors.problem(error))
    response.headers.update(error.headers)
    return response


async def _read_counters(booking: Booking) -> None:
    """Bring what Redis counts up to date; what cannot be read keeps its last value."""
    try:
        liquidations, recoveries = await booking.store.client.mget([keys.LIQUIDATIONS, keys.RECOVERIES])
        halted = await booking.store.client.exists(keys.STATE_HALTED)
        dead_letters = await booking.store.client.xlen(keys.OUTBOX_DEAD)
        outbox = await booking.outbox.state()
    except (RedisError, OSError) as error:
        log.warning("metrics of Redis are not up to date", error=repr(error))
        return
    metrics.COUNTERS.liquidations = int(liquidations or 0)
    metrics.COUNTERS.recoveries = int(recoveries or 0)
    metrics.HALTED.set(halted)
    metrics.OUTBOX_ENTRIES.set(outbox.entries)
    metrics.OUTBOX_OLDEST_AGE.set(outbox.oldest_age_seconds)
    metrics.DEAD_LETTER_ENTRIES.set(dead_letters)
