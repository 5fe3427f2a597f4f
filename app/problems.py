"""Problem documents (RFC 9457) for what goes wrong before a route is reached, and how any of them is answered."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final

import orjson
import structlog
from fastapi import Response

from app.errors import RETRY_AFTER_SECONDS

MEDIA_TYPE: Final = "application/problem+json"
DETAIL_CHARACTERS_MAX: Final = 256
ECHO_BYTES_MAX: Final = 32
"""Of what a client has sent, at most so much comes back in one member, and in three of them at most."""

HTTP_CODES: Final = {
    HTTPStatus.BAD_REQUEST: "malformed_body",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "body_too_large",
    HTTPStatus.UNPROCESSABLE_ENTITY: "invalid_request",
}
"""The codes that are not the name of their status."""


def echoed(text: str) -> str:
    """The beginning of what a client sent, to tell it what is meant."""
    return text.encode(errors="replace")[:ECHO_BYTES_MAX].decode(errors="ignore")


def http_problem(status: HTTPStatus, detail: str, *, code: str | None = None) -> dict[str, Any]:
    """The document of what HTTP itself refuses: a route, a method, a media type, a body, a head."""
    code = code or HTTP_CODES.get(status, status.name.lower())
    return {
        "type": f"urn:plimsoll:problem:{code}",
        "title": status.phrase,
        "status": status.value,
        "detail": detail[:DETAIL_CHARACTERS_MAX],
        "code": code,
    }


def problem_response(status: int, document: dict[str, Any]) -> Response:
    """A problem document as RFC 9457 sends it; one that says *later* says when. The request's line gets its code."""
    structlog.contextvars.bind_contextvars(code=document["code"])
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status == HTTPStatus.SERVICE_UNAVAILABLE else {}
    return Response(orjson.dumps(document), status, headers, media_type=MEDIA_TYPE)
