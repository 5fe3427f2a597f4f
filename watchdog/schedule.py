"""The timer: APScheduler asks for a sweep every interval, and a monotonic guard notices when it did not.

APScheduler follows the wall clock: after a step back it is silent until the clock has caught up. The guard looks at the
loop's own clock, asks for the sweep that is missing, and counts it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

from apscheduler.events import EVENT_JOB_MAX_INSTANCES, EVENT_JOB_MISSED, JobEvent
from apscheduler.schedulers.asyncio import AsyncIOScheduler

from watchdog import metrics
from watchdog.sweep import Sweeper

LATE_INTERVALS: Final = 1.5
GUARD_CHECKS_PER_INTERVAL: Final = 4


def start_timer(
    after_sweep: Callable[[], Awaitable[None]], sweeper: Sweeper, *, interval_seconds: float
) -> AsyncIOScheduler:
    """Sweep every ``interval_seconds``, and run ``after_sweep`` after each; answers the running scheduler."""

    async def sweep_on_time() -> None:
        await sweeper.request("timer")
        await after_sweep()

    scheduler = AsyncIOScheduler(timezone="UTC")
    scheduler.add_job(
        sweep_on_time,
        "interval",
        seconds=interval_seconds,
        id="sweep",
        coalesce=True,
        max_instances=1,
        misfire_grace_time=None,
    )
    scheduler.add_listener(_count_skipped, EVENT_JOB_MAX_INSTANCES | EVENT_JOB_MISSED)
    scheduler.start()
    return scheduler


async def guard(sweeper: Sweeper, *, interval_seconds: float) -> None:
    """Ask for a sweep whenever none has ended for one and a half intervals of the loop's own clock."""
    while True:
        await asyncio.sleep(interval_seconds / GUARD_CHECKS_PER_INTERVAL)
        if not sweeper.running and time.monotonic() - sweeper.last_sign_of_life > LATE_INTERVALS * interval_seconds:
            metrics.SWEEPS_LATE.labels("guard").inc()
            await sweeper.request("guard")


def _count_skipped(event: JobEvent) -> None:
    reason = "busy" if event.code == EVENT_JOB_MAX_INSTANCES else "missed"
    metrics.SWEEPS_LATE.labels(reason).inc()
