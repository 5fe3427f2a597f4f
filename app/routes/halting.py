"""Halting and resuming trading."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

import structlog
from fastapi import APIRouter, Request, Response

from app import halts, schemas
from app.routes.context import PROBLEMS, Services, ServicesDependency, json_response
from app.security import GuardedRoute, caller_of, needs

router = APIRouter(route_class=GuardedRoute, tags=["operation"])

log = structlog.get_logger(__name__)

_RESPONSES: Final[dict[int | str, dict[str, Any]]] = {
    200: {"model": schemas.HaltAnswer, "description": "Done, or was so already"},
    **{status: PROBLEMS[status] for status in (400, 408, 413, 415, 422, 503)},
}


@router.post("/halt", summary="Halt trading", responses=_RESPONSES, openapi_extra=needs("operate"))
async def post_halt(why: schemas.HaltRequest, to: ServicesDependency, request: Request) -> Response:
    """Refuse trades that open and withdrawals; reductions, deposits and marks pass."""
    return await _act(halts.halt, why, to, request)


@router.post("/resume", summary="Resume trading", responses=_RESPONSES, openapi_extra=needs("operate"))
async def post_resume(why: schemas.HaltRequest, to: ServicesDependency, request: Request) -> Response:
    """Let trading go on."""
    return await _act(halts.resume, why, to, request)


async def _act(act: halts.Act, why: schemas.HaltRequest, to: Services, request: Request) -> Response:
    key_id = caller_of(request).key_id
    answer = await act(to.store, to.sessions, reason=why.reason, key_id=key_id, now=datetime.now(UTC))
    log.warning("trading is halted" if answer["halted"] else "trading goes on", halt=answer["id"], asked_for=why.reason)
    return json_response(answer)
