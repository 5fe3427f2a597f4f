"""Each request once more, as a whole: how long it took goes to the metrics, and what went wrong to the log."""

from __future__ import annotations

import os
import re
import time
from functools import lru_cache
from http import HTTPStatus
from typing import Final

import structlog
from prometheus_client import Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import metrics
from app.config import get_settings
from app.start_refusal import without_traceback

REQUEST_ID_HEADER: Final = "X-Request-ID"
SLOW_SECONDS: Final = 1.0
"""A request that takes longer is in the log though it went well."""

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")

log = structlog.get_logger(__name__)


def is_request_id(text: str) -> bool:
    """Whether a client's own id of its request is one that may stand in a log."""
    return _REQUEST_ID.fullmatch(text) is not None


def new_request_id() -> str:
    """An id for a request that brought none."""
    return os.urandom(12).hex()


@lru_cache(maxsize=1024)
def _duration(route: str, method: str, status: int) -> Histogram:
    """The histogram of these labels; to look one up takes prometheus_client longer than to observe."""
    return metrics.HTTP_DURATION.labels(route, method, status)


class RequestMeter:
    """Times every request into ``plimsoll_http_request_duration_seconds``, by route and not by path.

    One that was refused, failed or was slow is a line in the log; every one with ``PLIMSOLL_ACCESS_LOG=all``. A line
    costs some 30 µs, an eighth of what a trade does, so a request that went well has none by default.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, and observe how long its whole answer took."""
        if scope["type"] != "http":
            await self._app(scope, receive, without_traceback(send))
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
            seconds = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", "unknown")
            _duration(route, scope["method"], status).observe(seconds)
            wanted = get_settings().access_log
            if wanted == "all" or (wanted == "errors" and (status >= HTTPStatus.BAD_REQUEST or seconds > SLOW_SECONDS)):
                say = log.warning if status >= HTTPStatus.INTERNAL_SERVER_ERROR else log.info
                say(
                    "request", method=scope["method"], route=route, status=status, milliseconds=round(1000 * seconds, 1)
                )
