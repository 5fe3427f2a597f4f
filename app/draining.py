"""Connection draining: between the signal to stop and the stop, a process is not ready and still answers everything.

A server that closes its connections at once cuts off the requests that are on their way to it. A load balancer needs a
moment to see that it should send no more, and a client that keeps its connection needs an answer that ends it.
"""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLOSE: Final = (b"connection", b"close")


class Drain:
    """Whether this process is about to stop."""

    def __init__(self) -> None:
        self.begun = False

    @contextmanager
    def upon_sigterm(self, seconds: float) -> Iterator[None]:
        """Pass a SIGTERM on to whoever handled it so far (the server), but ``seconds`` later; a second one at once."""
        handler = signal.getsignal(signal.SIGTERM)
        if not callable(handler) or threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def begin(number: int, frame: FrameType | None) -> None:
            if self.begun:
                handler(number, frame)
                return
            self.begun = True
            loop.call_soon_threadsafe(loop.call_later, seconds, handler, number, frame)

        signal.signal(signal.SIGTERM, begin)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, handler)


class DrainMiddleware:
    """Makes every answer the last of its connection once ``drain`` has begun."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http" or not self._drain.begun:
            await self._app(scope, receive, send)
            return

        async def send_the_last(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), CLOSE]
            await send(message)

        await self._app(scope, receive, send_the_last)
