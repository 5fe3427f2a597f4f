"""Health, metrics, and where a browser is led."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Response
from fastapi.responses import RedirectResponse
from prometheus_client import CONTENT_TYPE_LATEST

from app import errors, metrics, schemas
from app.routes.context import PROBLEMS, Services, ServicesDependency, json_response
from app.security import OPEN, GuardedRoute, needs

router = APIRouter(route_class=GuardedRoute, tags=["operation"])


@router.get("/health/live", summary="Is the process alive?", openapi_extra=OPEN, responses={422: PROBLEMS[422]})
async def get_live() -> Response:
    """The process answers."""
    return json_response({"status": "live"})


@router.get(
    "/health/ready",
    summary="Can the process do its work?",
    openapi_extra=OPEN,
    responses={
        200: {"model": schemas.Readiness, "description": "Ready"},
        422: PROBLEMS[422],
        503: {"model": schemas.Readiness, "description": "Not ready; `missing` says what"},
    },
)
async def get_ready(to: ServicesDependency) -> Response:
    """Whether trades can be booked, with the mark version and the version swept."""
    (mark_version, swept_version, fault), has_postgres = await asyncio.gather(
        _state(to), to.booking.outbox.has_postgres(within_seconds=to.settings.request_seconds)
    )
    missing = ["draining"] if to.drain.begun else []
    missing += [fault] if fault else []
    missing += [] if has_postgres else ["postgres"]
    status = "not ready" if missing else "ready"
    content = schemas.Readiness(status=status, mark_version=mark_version, swept_version=swept_version, missing=missing)
    return json_response(content.model_dump(), 503 if missing else 200)


async def _state(to: Services) -> tuple[int | None, int | None, str]:
    """The mark version, the version swept, and what keeps this process from writing, if anything does."""
    try:
        return *(await to.store.require_state()), ""
    except errors.Unavailable as error:
        return None, None, str(error.members.get("reason", error.code))


@router.get("/metrics", include_in_schema=False, openapi_extra=needs("read"))
async def get_metrics() -> Response:
    """Prometheus' text format."""
    return Response(metrics.exposition(), headers={"Content-Type": CONTENT_TYPE_LATEST})


@router.get("/", include_in_schema=False, openapi_extra=OPEN)
async def get_root() -> Response:
    """Lead a browser to the documentation."""
    return RedirectResponse("/docs")
