"""uvicorn's HTTP protocol with bounds on what a client may keep it waiting with, and problem documents of its own."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Final

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.problems import MEDIA_TYPE, http_problem

REQUEST_SECONDS_MAX: Final = 9.0
"""For a request to arrive whole; a second more than a body has, so that a slow one is answered by the application."""

REQUEST_BYTES_MAX: Final = 256 * 1024
"""Of one request, head and body, that are read from the socket after its first piece. Four times what is accepted, so
that a client that sends too much finds its 413 before the connection is gone."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """Closes a connection whose next request does not arrive whole in time, or is far too large.

    uvicorn bounds only how long an idle connection is kept after an answer: one that has sent nothing yet, half a
    head, or a body that nobody reads is held for ever, and a head of any size is collected in memory.
    """

    _deadline: asyncio.TimerHandle | None = None
    _waiting_since: float | None = None
    """When the wait for the present request began, on the loop's clock; None while an answer is made."""

    _in_head = False
    _bytes_read = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a request."""
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing more."""
        super().connection_lost(exc)
        self._waiting_since = None
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def data_received(self, data: bytes) -> None:
        """Parse what came; give up on a request that is far too large."""
        self._bytes_read += len(data)
        super().data_received(data)
        if self._bytes_read > REQUEST_BYTES_MAX and self._waiting_since is not None:
            self._give_up(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the head of the request is too large")

    def on_message_begin(self) -> None:
        """Start the clock of this request."""
        super().on_message_begin()
        self._in_head = True
        self._bytes_read = 0
        self._wait()

    def on_headers_complete(self) -> None:
        """Hand the request to the application."""
        self._in_head = False
        super().on_headers_complete()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; what comes after the body is of no use to anybody."""
        if self._in_head:
            super().on_header(name, value)

    def on_message_complete(self) -> None:
        """Stop the clock."""
        super().on_message_complete()
        self._waiting_since = None

    def on_response_complete(self) -> None:
        """Start the clock of the next request, unless it is here already or the last one still is not."""
        super().on_response_complete()
        if self._waiting_since is None and self.cycle.response_complete and not self.transport.is_closing():
            self._bytes_read = 0
            self._wait()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP."""
        self._refuse(HTTPStatus.BAD_REQUEST, msg, code="malformed_request")

    def _wait(self) -> None:
        # One timer a connection, set again only when it fires: a request costs no more than reading the clock.
        self._waiting_since = self.loop.time()
        if self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_SECONDS_MAX, self._on_deadline)

    def _on_deadline(self) -> None:
        self._deadline = None
        if self._waiting_since is None:
            return
        remaining_seconds = self._waiting_since + REQUEST_SECONDS_MAX - self.loop.time()
        if remaining_seconds > 0:
            self._deadline = self.loop.call_later(remaining_seconds, self._on_deadline)
        else:
            self._give_up(HTTPStatus.REQUEST_TIMEOUT, f"a request has to arrive within {REQUEST_SECONDS_MAX:g} s")

    def _give_up(self, status: HTTPStatus, detail: str) -> None:
        """Close the connection; tell why where half a head is all there is and no answer is under way."""
        self._waiting_since = None
        if self.transport.is_closing():
            return
        if self._in_head and getattr(self.cycle, "response_complete", True):  # there is none before the first head
            self._refuse(status, detail)
        else:
            self.transport.close()

    def _refuse(self, status: HTTPStatus, detail: str, code: str | None = None) -> None:
        content = orjson.dumps(http_problem(status, detail, code=code))
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: {MEDIA_TYPE}\r\n"
            f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + content)
        self.transport.close()
