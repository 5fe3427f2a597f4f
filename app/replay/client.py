"""The REST API as the replay uses it: requests that are sent until they are answered, and the wait for a sweep."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

import orjson

from app.replay.connection import HttpConnections, HttpResponse
from app.replay.trader import Answer, Request

UNANSWERED_SECONDS_MAX: Final = 30.0
RETRY_PAUSE_SECONDS: Final = 0.2
SWEEP_DEADLINE_SECONDS: Final = 10.0
POLL_PAUSE_SECONDS: Final = 0.001
PAGE_ITEMS: Final = 500


class ReplayError(RuntimeError):
    """The replay cannot go on; the message says what to do about it."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and what came back; ``seconds`` is the time between. No answer at all is a status of 0."""

    request: Request
    answer: Answer
    seconds: float

    def to_json(self) -> bytes:
        """One line of the log."""
        return orjson.dumps(
            {
                "method": self.request.method,
                "path": self.request.path,
                "body": self.request.body,
                "status": self.answer.status,
                "answer": self.answer.body,
            },
            option=orjson.OPT_APPEND_NEWLINE,
        )


class Connections(Protocol):
    """What carries a request; ``HttpConnections``, or a model of the API in a test."""

    async def request(self, method: str, target: str, body: object = None) -> HttpResponse:
        """Answer, or raise ``OSError``."""

    def close(self) -> None:
        """Let go of what is held."""


class ApiClient:
    """Sends requests one way: with a timeout, and again while the answer is 429, 503 or missing, for a bounded time.

    Sending again is safe: trades and transfers carry operation ids, and a mark sent twice is an equal mark.
    """

    def __init__(self, connections: Connections) -> None:
        self._connections = connections
        self._sweep_seconds = 0.0

    @classmethod
    def connect(cls, api_url: str, *, api_key: str | None = None) -> ApiClient:
        """A client of the API at ``api_url``; to be closed. Raises ``ReplayError`` if that is no URL, or no key."""
        try:
            return cls(HttpConnections(api_url, api_key=api_key))
        except ValueError as error:
            raise ReplayError(str(error)) from error

    def close(self) -> None:
        """Close the connections."""
        self._connections.close()

    async def send(self, request: Request) -> list[Exchange]:
        """Every attempt at ``request`` in order; the last one has the answer.

        Raises ``ReplayError`` when there is none for ``UNANSWERED_SECONDS_MAX``, or one that blames the server or the
        API key.
        """
        attempts: list[Exchange] = []
        given_up_at = time.monotonic() + UNANSWERED_SECONDS_MAX
        while True:
            exchange, pause_seconds = await self._attempt(request)
            attempts.append(exchange)
            status = exchange.answer.status
            if status in {0, 429, 503}:
                if time.monotonic() + pause_seconds > given_up_at:
                    raise ReplayError(f"{request.method} {request.path}: {_detail(exchange.answer)}")
                await asyncio.sleep(pause_seconds)
            elif status in {401, 403}:
                raise ReplayError(
                    f"{request.method} {request.path} answered {status}: {_detail(exchange.answer)}. It takes a key "
                    "with the scopes read, trade, mark and operate for every account: --key, or PLIMSOLL_API_KEY"
                )
            elif status >= 500:
                raise ReplayError(f"{request.method} {request.path} answered {status}: {_detail(exchange.answer)}")
            else:
                return attempts

    async def versions(self) -> tuple[int, int]:
        """The newest mark version and the newest that a sweep has judged; 0 where there is none.

        Raises ``ReplayError`` when the API does not say.
        """
        answer = (await self._attempt(Request("GET", "/health/ready")))[0].answer
        if answer.status == 0:
            raise ReplayError(f"the API does not answer ({_detail(answer)}); is it running, and is --api right?")
        if "mark_version" not in answer.body:
            raise ReplayError(f"GET /health/ready: {_detail(answer)}")
        return int(answer.body["mark_version"] or 0), int(answer.body["swept_version"] or 0)

    async def until_swept(self, version: int) -> float:
        """Wait until a sweep has judged the mark of ``version``; answers the seconds it took.

        The first question is asked when the sweep is usually done, and the next ones a millisecond apart: asking all
        the time would take from the sweep the very processor it needs. A first question that comes late enough lowers
        the estimate a little, one that comes too early raises it. Raises ``ReplayError`` past the deadline.
        """
        started_at = time.monotonic()
        await asyncio.sleep(self._sweep_seconds)
        questions = 0
        while True:
            questions += 1
            asked_after_seconds = time.monotonic() - started_at
            try:
                _, swept_version = await self.versions()
            except ReplayError:
                if asked_after_seconds > SWEEP_DEADLINE_SECONDS:
                    raise
                swept_version = 0  # A restart of the API is waited for here as elsewhere.
            if swept_version >= version:
                if questions == 1:
                    self._sweep_seconds *= 0.97
                else:
                    self._sweep_seconds += 0.15 * (min(asked_after_seconds, 0.05) - self._sweep_seconds)
                return time.monotonic() - started_at
            if asked_after_seconds > SWEEP_DEADLINE_SECONDS:
                raise ReplayError(
                    f"mark version {version} is not swept after {SWEEP_DEADLINE_SECONDS:.0f} s (swept: "
                    f"{swept_version}). Is the watchdog running? `plimsoll watchdog` starts one."
                )
            await asyncio.sleep(POLL_PAUSE_SECONDS)

    async def items_since(self, path: str, version: int) -> AsyncIterator[dict[str, Any]]:
        """The items of a history route that were found on a mark after ``version``, newest first."""
        cursor: str | None = None
        while True:
            query = f"?limit={PAGE_ITEMS}" + (f"&cursor={cursor}" if cursor else "")
            page = (await self.send(Request("GET", path + query)))[-1].answer.body
            for item in page["items"]:
                if int(item["mark_version"]) <= version:
                    return
                yield item
            cursor = page["next_cursor"]
            if cursor is None:
                return

    async def _attempt(self, request: Request) -> tuple[Exchange, float]:
        """One attempt, and the seconds to wait before another."""
        started_at = time.perf_counter()
        try:
            response = await self._connections.request(request.method, request.path, request.body)
        except OSError as error:
            lost = Answer(0, {"detail": f"{type(error).__name__}: {error}"})
            return Exchange(request, lost, time.perf_counter() - started_at), RETRY_PAUSE_SECONDS
        seconds = time.perf_counter() - started_at
        try:
            body = orjson.loads(response.content)
        except ValueError:
            body = {"detail": response.content[:200].decode(errors="replace")}
        exchange = Exchange(request, Answer(response.status, body), seconds)
        return exchange, float(response.headers.get("retry-after", RETRY_PAUSE_SECONDS))


def _detail(answer: Answer) -> str:
    return str(answer.body.get("detail") or answer.body.get("title") or answer.body)
