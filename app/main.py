"""The API's composition root: its clients, its lifespan, and the one table that turns errors into problem documents."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from typing import Any, Final

import structlog
from asgi_correlation_id import CorrelationIdMiddleware, correlation_id
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException

from app import api, background, database, errors, metrics, openapi
from app.body_limit import BodyLimit
from app.booking import Booking
from app.collector import spare_the_collector
from app.config import get_settings
from app.direct_route import DirectWay
from app.draining import Drain, DrainMiddleware
from app.embedded import locate_stores
from app.logging import configure_logging
from app.outbox import POSTGRES_ERRORS, Outbox
from app.problems import echoed, http_problem, problem_response
from app.reconcile import keep_reconciled
from app.redis_client import StateStore
from app.request_meter import REQUEST_ID_HEADER, RequestMeter, is_request_id, new_request_id
from app.routes.context import Services
from app.security import open_gate
from app.shared_accounts import SharedAccounts

ERRORS_SHOWN_MAX: Final = 4

OPENAPI_TAGS: Final = [
    {"name": "trading", "description": "What changes accounts and marks."},
    {"name": "risk", "description": "Accounts as they stand, at the present marks."},
    {"name": "history", "description": "What happened, newest first."},
    {"name": "operation", "description": "Halting, resuming, and whether the process works."},
]

log = structlog.get_logger(__name__)


@asynccontextmanager
async def lifespan(application: FastAPI) -> AsyncIterator[dict[str, Any]]:
    """Make the clients of this process; a store that is down makes it not ready, not dead."""
    configure_logging("info", process="api")
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
    try:
        # The writer's pool: whoever reads much of history must not keep a revocation from being read.
        drain: Drain = application.state.drain
        async with open_gate(settings, writer, redis_url=stores.redis_url) as gate:
            services = Services(
                settings=settings,
                store=store,
                booking=Booking(store, outbox, settings, SharedAccounts.found()),
                sessions=database.create_sessions(engine),
                gate=gate,
                drain=drain,
            )
            spare_the_collector()
            with drain.upon_sigterm(settings.drain_seconds):
                yield {"services": services}
    finally:
        await background.end([reconciling])
        await outbox.stop()
        await store.close()
        await writer.dispose()
        await engine.dispose()


async def on_plimsoll_error(_: Request, error: Exception) -> Response:
    """A refusal or a fault that has a name."""
    assert isinstance(error, errors.PlimsollError)
    if isinstance(error, errors.Refusal):
        metrics.REFUSALS.labels(error.code).inc()
    response = problem_response(*errors.problem(error))
    response.headers.update(error.headers)
    return response


async def on_store_error(_: Request, error: Exception) -> Response:
    """A store that did not answer a read."""
    structlog.contextvars.bind_contextvars(error=repr(error))
    reason = "redis" if isinstance(error, RedisError) else "postgres"
    return problem_response(*errors.problem(errors.StoreUnavailable(f"{reason} did not answer", reason=reason)))


async def on_invalid_request(_: Request, error: Exception) -> Response:
    """A request whose fields do not have the types and forms of the API."""
    assert isinstance(error, RequestValidationError)
    # A name that no field has is the client's own text: the first one is enough of it.
    known = [item for item in error.errors() if item["type"] != "extra_forbidden"]
    unknown = [item for item in error.errors() if item["type"] == "extra_forbidden"]
    shown = [
        {"field": echoed(".".join(str(part) for part in item["loc"][1:])) or "body", "message": item["msg"]}
        for item in [*known[:ERRORS_SHOWN_MAX], *unknown[:1]]
    ]
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
    response = problem_response(status, http_problem(status, str(error.detail)))
    response.headers.update(error.headers or {})
    return response


async def on_unexpected(_: Request, error: Exception) -> Response:
    """Our mistake: the server logs it whole, the client learns that it happened."""
    response = problem_response(
        500,
        {
            "type": "urn:plimsoll:problem:internal_error",
            "title": "Internal error",
            "status": 500,
            "detail": f"an unexpected {type(error).__name__}; it is in the log",
            "code": "internal_error",
        },
    )
    # This answer is sent from outside of all middleware, so nobody else adds it.
    response.headers[REQUEST_ID_HEADER] = correlation_id.get() or ""
    return response


def create_app() -> FastAPI:
    """The application, with the routes of DESIGN section 5."""
    application = FastAPIOffline(
        title="Plimsoll",
        version="0.1.0",
        description="Margining for perpetual futures: trades, marks, margins, and the history of every breach.",
        lifespan=lifespan,
        # A redirect would send back the whole address that was asked for, and to the host that the client named.
        redirect_slashes=False,
        openapi_tags=OPENAPI_TAGS,
        routes=api.ROUTES,
    )
    application.state.drain = Drain()
    application.add_middleware(BodyLimit)
    application.add_middleware(RequestMeter)
    application.add_middleware(
        CorrelationIdMiddleware,
        header_name=REQUEST_ID_HEADER,
        validator=is_request_id,
        generator=new_request_id,
        # These two would cost 3 µs a request.
        transformer=None,
        update_request_header=False,
    )
    application.add_middleware(DrainMiddleware, drain=application.state.drain)
    application.add_exception_handler(errors.PlimsollError, on_plimsoll_error)
    application.add_exception_handler(RequestValidationError, on_invalid_request)
    application.add_exception_handler(HTTPException, on_http_error)
    application.add_exception_handler(Exception, on_unexpected)
    for error in (RedisError, *POSTGRES_ERRORS):
        application.add_exception_handler(error, on_store_error)
    describe = application.openapi

    application.openapi = lambda: openapi.complete(describe(), get_settings().contracts)  # type: ignore[method-assign]  # as FastAPI documents it
    return application


app = DirectWay(create_app())
