"""One pipeline for all the Redis commands that became ready in the same turn of the event loop.

A round trip costs redis-py about as much as a small batch does, so a busy process pays it once for many requests. The
commands of one batch are independent: nothing relies on their order.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import hiredis
from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

COMMANDS_PER_PIPELINE_MAX: Final = 256
PIPELINES_MAX: Final = 2
"""Two in flight: while one is answered the next is sent; what comes meanwhile makes the batches larger."""

DEFERRED_SECONDS_MAX: Final = 0.02

Command = tuple[str | bytes | float, ...]


class NotSentError(RedisConnectionError):
    """No connection could be had: the command was not sent, so it was not applied."""


class NotReplicatedError(RedisConnectionError):
    """Too few replicas have confirmed the write in time: it is lost if they outlive the master."""


class Batcher:
    """Sends what ``execute`` is given during one loop turn as one pipeline, without retries.

    With ``replicas``, a batch that has to outlive the master ends in a WAIT for so many of them.
    """

    def __init__(self, pool: ConnectionPool, *, timeout_seconds: float, replicas: int = 0) -> None:
        self._pool = pool
        self._timeout_seconds = timeout_seconds
        self._wait: Command = ("WAIT", replicas, int(timeout_seconds * 1000 / 2)) if replicas else ()
        self.replicas = replicas
        self._waiting: deque[tuple[Command, asyncio.Future[Any]]] = deque()
        self._to_replicate: set[asyncio.Future[Any]] = set()
        self._scheduled = False
        self._deferral: asyncio.TimerHandle | None = None
        self._pipelines: set[asyncio.Task[None]] = set()
        self._kept: list[AbstractConnection] = []
        self.last_seconds = 0.0
        """How long the newest pipeline took, or was waited for."""

    def execute(self, *command: str | bytes | float, replicated: bool = False) -> asyncio.Future[Any]:
        """The answer to ``command``, as redis-py parses it, with bytes left as bytes.

        One to be ``replicated`` is answered once the replicas have all that it has written, or seen.

        Raises ``ResponseError`` for Redis's own refusal, ``NotSentError`` when no connection could be had, and a
        redis ``ConnectionError`` or ``TimeoutError`` when the command was sent and its outcome is unknown; one of
        these is ``NotReplicatedError``.
        """
        return self._send_soon(command, replicated=replicated)

    def defer(self, *command: str | bytes | float) -> asyncio.Future[Any]:
        """As ``execute``, for what nobody waits for: it goes with the next pipeline, or with its own after a while."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        self._waiting.append((command, answer))
        if self._deferral is None:
            self._deferral = loop.call_later(DEFERRED_SECONDS_MAX, self._flush)
        return answer

    async def evaluate(
        self,
        sha: str,
        text: str | bytes,
        keys: Sequence[str],
        arguments: Sequence[str | bytes | float],
        *,
        replicated: bool = False,
    ) -> Any:  # noqa: ANN401  # whatever the script answers
        """The answer of the script ``text``, which Redis knows as ``sha`` once it has run. Raises as ``execute``."""
        try:
            return await self._send_soon(("EVALSHA", sha, len(keys), *keys, *arguments), replicated=replicated)
        except NoScriptError:
            # Redis answers this before it runs anything, so sending the call again cannot apply it twice. It goes with
            # the text: what was only loaded may be flushed before it is called.
            return await self._send_soon(("EVAL", text, len(keys), *keys, *arguments), replicated=replicated)

    async def close(self) -> None:
        """Send what was deferred, wait for the pipelines in flight, and give the connections back."""
        self._flush()
        while self._pipelines:
            await asyncio.gather(*self._pipelines, return_exceptions=True)
        await self._give_back()

    async def _give_back(self) -> None:
        """End the connections that are kept, and let the pool have them."""
        while self._kept:
            connection = self._kept.pop()
            await connection.disconnect(nowait=True)
            await self._pool.release(connection)

    def _send_soon(self, command: Command, *, replicated: bool) -> asyncio.Future[Any]:
        """As ``execute``; a command of a script has hundreds of arguments, which nobody copies on the way here."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Any] = loop.create_future()
        if replicated and self.replicas:
            self._to_replicate.add(answer)
            answer.add_done_callback(self._to_replicate.discard)
        self._waiting.append((command, answer))
        if not self._scheduled:
            self._scheduled = True
            loop.call_soon(self._flush)
        return answer

    def _flush(self) -> None:
        self._scheduled = False
        if self._deferral is not None:
            self._deferral.cancel()
            self._deferral = None
        while self._waiting and len(self._pipelines) < PIPELINES_MAX:
            size = min(len(self._waiting), COMMANDS_PER_PIPELINE_MAX)
            batch = [self._waiting.popleft() for _ in range(size)]
            pipeline = asyncio.get_running_loop().create_task(self._send(batch))
            self._pipelines.add(pipeline)
            pipeline.add_done_callback(self._finished)

    def _finished(self, pipeline: asyncio.Task[None]) -> None:
        self._pipelines.discard(pipeline)
        self._flush()

    async def _send(self, batch: list[tuple[Command, asyncio.Future[Any]]]) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            await self._send_timed(batch)
        finally:
            self.last_seconds = loop.time() - started

    async def _send_timed(self, batch: list[tuple[Command, asyncio.Future[Any]]]) -> None:
        unanswered = deque(answer for _, answer in batch)
        commands = [command for command, _ in batch]
        held: list[tuple[asyncio.Future[Any], Any]] = []
        if waits := not self._to_replicate.isdisjoint(unanswered):
            commands.append(self._wait)
        connection: AbstractConnection | None = None
        try:
            # One time bounds the whole pipeline, so that no answer needs a timer of its own.
            async with asyncio.timeout(self._timeout_seconds):
                connection = await self._take_connection()
                # The stub of pack_command means a tuple of any length and says one of length 1.
                packed = [hiredis.pack_command(command) for command in commands]  # type: ignore[arg-type]
                await connection.send_packed_command(packed)
                while unanswered:
                    try:
                        response = await connection.read_response(timeout=math.inf)
                    except ResponseError as error:
                        _fail([unanswered.popleft()], error)
                    else:
                        answer = unanswered.popleft()
                        if answer in self._to_replicate:
                            held.append((answer, response))
                        elif not answer.done():
                            answer.set_result(response)
                if waits:
                    self._release(held, confirmed=await _replicas_in(connection))
        except (RedisConnectionError, RedisTimeoutError, OSError, TimeoutError) as error:
            await _give_up(
                connection, [*unanswered, *(answer for answer, _ in held)], str(error) or "no answer in time"
            )
            self._fail_waiting(str(error) or "Redis does not answer")
            # Those that are kept reach the same Redis, or reach it no more either: the next pipeline asks the pool.
            await self._give_back()
        except BaseException as error:
            # Our mistake, or the end of the loop: whoever waits must hear of it all the same.
            missing = [*unanswered, *(answer for answer, _ in held)]
            await _give_up(connection, missing, f"the call failed: {error!r}")
            raise
        finally:
            if connection is not None:
                self._kept.append(connection)

    async def _take_connection(self) -> AbstractConnection:
        """A connection that nothing has been heard on: one that was used before, or else one of the pool.

        The pool takes longer to hand one out than Redis does to answer on it; it mends those that have ended.
        """
        while self._kept:
            connection = self._kept.pop()
            with suppress(RedisConnectionError, OSError):
                if await _is_ready(connection):
                    return connection
            await self._pool.release(connection)
        taken: AbstractConnection = await self._pool.get_connection()  # type: ignore[no-untyped-call]
        return taken

    def _release(self, held: list[tuple[asyncio.Future[Any], Any]], *, confirmed: int) -> None:
        """Give the answers that waited for the replicas, if enough of those have ``confirmed``."""
        if confirmed < self.replicas:
            _fail(
                [answer for answer, _ in held], NotReplicatedError(f"{confirmed} of {self.replicas} replicas have it")
            )
        for answer, response in held:
            if not answer.done():
                answer.set_result(response)

    def _fail_waiting(self, reason: str) -> None:
        """Give up what has not been sent when Redis stalls: waiting its turn would only pile it up."""
        waiting = [answer for _, answer in self._waiting]
        self._waiting.clear()
        _fail(waiting, NotSentError(reason))


async def _give_up(connection: AbstractConnection | None, missing: list[asyncio.Future[Any]], reason: str) -> None:
    """Fail the answers that are ``missing``: without a connection nothing was sent, else nobody knows."""
    if connection is None:
        _fail(missing, NotSentError(reason))
        return
    # They may still arrive on this connection: it must not serve anybody else.
    await connection.disconnect(nowait=True)
    _fail(missing, RedisTimeoutError(reason))


async def _is_ready(connection: AbstractConnection) -> bool:
    """Whether ``connection`` stands, nothing has arrived on it, and its pool does not want it made anew."""
    wanted = not connection.should_reconnect()  # type: ignore[no-untyped-call]
    return wanted and connection.is_connected and not await connection.can_read()


async def _replicas_in(connection: AbstractConnection) -> int:
    """The answer to WAIT; a master that has been made a replica has none itself."""
    try:
        return int(await connection.read_response())
    except ResponseError:
        return 0


def _fail(answers: list[asyncio.Future[Any]] | deque[asyncio.Future[Any]], error: Exception) -> None:
    for answer in answers:
        if not answer.done():
            answer.set_exception(error)
