"""The API's composition root: its clients, its lifespan, and the one table that turns errors into problem documents."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from typing import Any, Final

import orjson
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import api, background, database, errors, metrics
from app.booking import Booking
from app.config import get_settings
from app.embedded import locate_stores
from app.logging import configure_logging
from app.outbox import POSTGRES_ERRORS, Outbox
from app.reconcile import keep_reconciled
from app.redis_client import StateStore
from app.routes.context import Services

BODY_BYTES_MAX: Final = 64 * 1024
ECHO_CHARACTERS_MAX: Final = 30
ERRORS_SHOWN_MAX: Final = 4
"""Four names of thirty: no more than 128 bytes of what was sent come back."""

HTTP_CODES: Final = {HTTPStatus.BAD_REQUEST: "malformed_body", HTTPStatus.UNPROCESSABLE_ENTITY: "invalid_request"}

log = structlog.get_logger(__name__)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
    """Make the clients of this process; a store that is down makes it not ready, not dead."""
    settings = get_settings()
    configure_logging(settings.log_level, process="api")
    stores = locate_stores(settings)
    store, engine = StateStore(stores.redis_url, settings), database.create_engine(stores.database_url)
    writer = database.create_engine(stores.database_url, pool_size=database.WRITER_POOL_SIZE)
    with suppress(RedisError, OSError):
        # One that is down is looked at when it has come up, which is a restart.
        await store.check_durability(allow_unsafe=settings.allow_unsafe_redis)
    outbox = Outbox(store, writer, settings)
    await outbox.start()
    reconciling = asyncio.create_task(keep_reconciled(store, engine, settings), name="reconcile")
    services = Services(
        settings=settings,
        store=store,
        booking=Booking(store, outbox, settings),
        sessions=database.create_sessions(engine),
    )
    try:
        yield {"services": services}
    finally:
        await background.end([reconciling])
        await outbox.stop()
        await store.close()
        await writer.dispose()
        await engine.dispose()


class RequestMeter:
    """Times every request into ``plimsoll_http_request_duration_seconds``, by route and not by path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and observe how long its whole answer took."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        status = HTTPStatus.INTERNAL_SERVER_ERROR.value

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            metrics.HTTP_DURATION.labels(route, scope["method"], status).observe(time.perf_counter() - started)


def problem_response(status: int, document: dict[str, Any]) -> Response:
    """A problem document as RFC 9457 sends it; one that says *later* says when."""
    headers = {"Retry-After": str(errors.RETRY_AFTER_SECONDS)} if status == HTTPStatus.SERVICE_UNAVAILABLE else {}
    return Response(orjson.dumps(document), status, headers, media_type="application/problem+json")


async def on_plimsoll_error(_: Request, error: Exception) -> Response:
    """A refusal or a fault that has a name."""
    assert isinstance(error, errors.PlimsollError)
    if isinstance(error, errors.Refusal):
        metrics.REFUSALS.labels(error.code).inc()
    return problem_response(*errors.problem(error))


async def on_store_error(_: Request, error: Exception) -> Response:
    """A store that did not answer a read."""
    log.warning("a store did not answer", error=repr(error))
    reason = "redis" if isinstance(error, RedisError) else "postgres"
    return problem_response(*errors.problem(errors.StoreUnavailable(f"{reason} did not answer", reason=reason)))


async def on_invalid_request(_: Request, error: Exception) -> Response:
    """A request whose fields do not have the types and forms of the API."""
    assert isinstance(error, RequestValidationError)
    fields = [
        {
            "field": ".".join(str(part) for part in item["loc"][1:])[:ECHO_CHARACTERS_MAX] or "body",
            "message": item["msg"],
        }
        for item in error.errors()
    ]
    shown = fields[:ERRORS_SHOWN_MAX]
    return problem_response(
        422,
        {
            "type": "urn:plimsoll:problem:invalid_request",
            "title": "Invalid request",
            "status": 422,
            "detail": "; ".join(f"{item['field']}: {item['message']}" for item in shown),
            "code": "invalid_request",
            "field": shown[0]["field"],
            "errors": shown,
        },
    )


async def on_http_error(_: Request, error: Exception) -> Response:
    """What the framework refuses: no such route, method, media type or body."""
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    code = HTTP_CODES.get(status, status.name.lower())
    response = problem_response(
        status.value,
        {
            "type": f"urn:plimsoll:problem:{code}",
            "title": status.phrase,
            "status": status.value,
            "detail": str(error.detail)[:256],
            "code": code,
        },
    )
    response.headers.update(error.headers or {})
    return response


async def on_unexpected(_: Request, error: Exception) -> Response:
    """Our mistake: the server logs it whole, the client learns that it happened."""
    return problem_response(
        500,
        {
            "type": "urn:plimsoll:problem:internal_error",
            "title": "Internal error",
            "status": 500,
            "detail": f"an unexpected {type(error).__name__}; it is in the log",
            "code": "internal_error",
        },
    )


def create_app() -> FastAPI:
    """The application, with the routes of DESIGN section 5."""
    application = FastAPIOffline(
        title="Plimsoll",
        version="0.1.0",
        description="Margining for perpetual futures: trades, marks, margins, and the history of every breach.",
        lifespan=lifespan,
        max_body_size=BODY_BYTES_MAX,
    )
    application.include_router(api.router)
    application.add_middleware(RequestMeter)
    application.add_exception_handler(errors.PlimsollError, on_plimsoll_error)
    application.add_exception_handler(RequestValidationError, on_invalid_request)
    application.add_exception_handler(HTTPException, on_http_error)
    application.add_exception_handler(Exception, on_unexpected)
    for error in (RedisError, *POSTGRES_ERRORS):
        application.add_exception_handler(error, on_store_error)
    return application


app = create_app()
