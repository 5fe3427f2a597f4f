"""Tasks that run until the process ends."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

CANCEL_AGAIN_SECONDS: Final = 0.5


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
