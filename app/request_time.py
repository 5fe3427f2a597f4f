"""The time of a request: one end for all its calls of the stores, made when it begins.

Each call is bounded by itself as well, but a request makes several, and each of them may have to wait for its turn.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, Protocol

from app import errors

VOUCH_SHARE: Final = 8
"""One part in so many of a request's time is kept for Redis to vouch for a row that Postgres has not taken."""

CALLS_PER_ATTEMPT: Final = 2
"""A read and a commit."""


class RequestTime:
    """What is left of the time of one request that takes ``seconds`` at most, and how slow its calls of Redis were.

    By ``committed_by`` its last commit is answered, and in Postgres or given up; at ``ends`` it is answered itself.
    Both are by ``time.monotonic``, which is the clock of the loop.
    """

    __slots__ = ("_slowest_seconds", "committed_by", "ends")

    def __init__(self, seconds: float) -> None:
        self.ends = time.monotonic() + seconds
        self.committed_by = self.ends - seconds / VOUCH_SHARE
        self._slowest_seconds = 0.0

    def allows(self, calls: int) -> bool:
        """Whether ``calls`` more can be answered in time if each takes as long as the slowest has.

        A commit that is sent and not answered is an unknown outcome, one that is not sent is only a request in vain.
        """
        return time.monotonic() + calls * self._slowest_seconds < self.committed_by

    def called(self, *, since: float) -> None:
        """A call that was made at ``since`` has just been answered."""
        self._slowest_seconds = max(self._slowest_seconds, time.monotonic() - since)

    @asynccontextmanager
    async def bound(self) -> AsyncIterator[None]:
        """Calls after which nothing of the request itself is in doubt. Raises ``StoreUnavailable`` at their end."""
        scope = asyncio.timeout_at(self.ends)
        try:
            async with scope:
                yield
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise errors.StoreUnavailable("the stores did not answer in time", reason="redis") from error


class Watched(Protocol):
    """Something to end when its time has run out, unless it is done."""

    until: float

    def is_done(self) -> bool:
        """Whether its time does not matter any more."""

    def run_out(self) -> None:
        """End it."""


class Deadlines:
    """Ends what has run out of time, with one timer for all: one for each trade would cost it 3 µs of processor.

    Almost all have their answer long before, and are forgotten when the next one comes.
    """

    def __init__(self) -> None:
        self._watched: deque[Watched] = deque()
        self._timer: asyncio.Handle | None = None
        self._due = math.inf

    def watch(self, item: Watched) -> None:
        """End ``item`` at its time."""
        watched = self._watched
        while watched and watched[0].is_done():
            watched.popleft()
        watched.append(item)
        if item.until < self._due:
            self._set_timer(item.until)

    def _set_timer(self, due: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        # The time is noted here, for uvloop hands out a handle that does not know its own when it is due at once.
        self._due, self._timer = due, asyncio.get_running_loop().call_at(due, self._end_those_due)

    def _end_those_due(self) -> None:
        self._due, self._timer = math.inf, None
        now = time.monotonic()
        for item in self._watched:
            if item.until <= now and not item.is_done():
                item.run_out()
        self._watched = deque(item for item in self._watched if not item.is_done())
        if self._watched:
            self._set_timer(min(item.until for item in self._watched))
