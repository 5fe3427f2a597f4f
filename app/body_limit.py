"""A bound on the size of a request's body and on the time it may take to arrive, before anything reads it."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Final

from fastapi import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.problems import http_problem, problem_response

BODY_BYTES_MAX: Final = 64 * 1024
BODY_SECONDS_MAX: Final = 8.0
LENGTH_DIGITS: Final = 20
"""Of a declared length no more are read: the number is too large by then."""

TOO_LARGE: Final = f"a body may have {BODY_BYTES_MAX} bytes"
TOO_SLOW: Final = f"a body has to arrive within {BODY_SECONDS_MAX:g} s"


class BodyLimit:
    """Answers 413 to a body that says it is too large, unread, or turns out to be; 408 to one that does not come."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with a ``receive`` that raises ``HTTPException`` beyond either bound."""
        if scope["type"] != "http" or scope["method"] == "GET":
            await self._app(scope, receive, send)
            return
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value[:LENGTH_DIGITS]) > BODY_BYTES_MAX:
                status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
                await problem_response(status, http_problem(status, TOO_LARGE))(scope, receive, send)
                return
        deadline = asyncio.get_running_loop().time() + BODY_SECONDS_MAX
        size = 0
        complete = False

        async def receive_within_bounds() -> Message:
            nonlocal size, complete
            if complete:  # what is waited for now is the client's leaving
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError as error:
                # What is still to come would be taken for the next request.
                raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, TOO_SLOW, {"Connection": "close"}) from error
            complete = not message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > BODY_BYTES_MAX:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, TOO_LARGE)
            return message

        await self._app(scope, receive_within_bounds, send)
