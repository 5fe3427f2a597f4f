"""Tasks that run until the process ends, and work that is waited for only so long."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, Final, TypeVar

import structlog

CANCEL_AGAIN_SECONDS: Final = 0.5

Answer = TypeVar("Answer")

_left: set[asyncio.Future[Any]] = set()
"""Work that nobody waits for any more: a task that nothing refers to may vanish before it has ended."""

log = structlog.get_logger(__name__)


async def end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel ``tasks`` until every one has ended.

    Once is not enough on Python 3.11: ``asyncio.wait_for``, which redis-py sends with, swallows a cancellation that
    arrives as what it waits for ends.
    """
    waiting = set(tasks)
    while waiting:
        for task in waiting:
            task.cancel()
        _, waiting = await asyncio.wait(waiting, timeout=CANCEL_AGAIN_SECONDS)


async def within(seconds: float, work: Awaitable[Answer]) -> Answer:
    """The answer of ``work``, which bounds each of its own calls. Raises ``TimeoutError`` when it takes longer.

    It is left to end by itself then: one that is cancelled has to clean up first, a connection to Postgres say, and
    whoever waits would wait for that as well.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait({task}, timeout=seconds)
    finally:
        if not task.done():
            _left.add(task)
            task.add_done_callback(_let_go)
    if not done:
        raise TimeoutError
    return task.result()


def _let_go(task: asyncio.Future[Any]) -> None:
    _left.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        log.info("what nobody waited for any more failed", error=repr(error))
