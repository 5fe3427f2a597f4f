"""The timer: APScheduler asks for a sweep every interval, and a monotonic guard notices when it did not.

APScheduler follows the wall clock: after a step back it is silent until the clock has caught up. The guard looks at the
loop's own clock, asks for the sweep that is missing, counts it, and sets the timer on the clock as it is now.

The timer's job is the sweep and nothing else: while one runs APScheduler skips the next.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Final

import structlog
from apscheduler.events import EVENT_JOB_MAX_INSTANCES, EVENT_JOB_MISSED, JobEvent
from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.interval import IntervalTrigger

from watchdog import metrics
from watchdog.sweep import Sweeper

log = structlog.get_logger(__name__)

JOB_ID: Final = "sweep"
LATE_INTERVALS: Final = 1.5
GUARD_CHECKS_PER_INTERVAL: Final = 4


class NextInterval(IntervalTrigger):  # type: ignore[misc]
    """Every so many seconds, and never for a time that has passed.

    APScheduler lists every run it has missed before it merges them into one. After a clock that was set a year ahead
    that is 31 million of them, and the event loop stands still meanwhile.
    """

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime | None:
        """The first whole interval after ``previous_fire_time`` that is still to come."""
        if previous_fire_time is None:
            first: datetime | None = super().get_next_fire_time(None, now)
            return first
        passed = max(0, (now - previous_fire_time) // self.interval)
        following: datetime = previous_fire_time + (passed + 1) * self.interval
        return following


class AfterSweep:
    """What is done after a timer's sweep, in a task of its own, so that the next sweep never waits for it.

    One that takes longer than the interval is not begun again before a sweep that follows its end.
    """

    def __init__(self, step: Callable[[], Awaitable[None]]) -> None:
        self._step = step
        self._asked = asyncio.Event()

    def ask(self) -> None:
        """A timer's sweep has ended."""
        self._asked.set()

    async def run(self) -> None:
        """Take one step whenever asked, until cancelled. One that fails is logged, and does not end it."""
        while True:
            await self._asked.wait()
            try:
                await self._step()
            except Exception:
                log.exception("what follows a sweep of the timer failed; it goes on")
            self._asked.clear()


def start_timer(after_sweep: AfterSweep, sweeper: Sweeper, *, interval_seconds: float) -> AsyncIOScheduler:
    """Sweep every ``interval_seconds``, and have ``after_sweep`` run after each; answers the running scheduler."""

    async def sweep_on_time() -> None:
        # At shutdown APScheduler cancels the job and would log that as its failure.
        with suppress(asyncio.CancelledError):
            await sweeper.request("timer")
            after_sweep.ask()

    scheduler = AsyncIOScheduler(timezone="UTC")
    scheduler.add_job(
        sweep_on_time,
        NextInterval(seconds=interval_seconds, timezone=UTC),
        id=JOB_ID,
        coalesce=True,
        max_instances=1,
        misfire_grace_time=None,
    )
    scheduler.add_listener(_count_skipped, EVENT_JOB_MAX_INSTANCES | EVENT_JOB_MISSED)
    scheduler.start()
    return scheduler


async def guard(sweeper: Sweeper, *, interval_seconds: float, scheduler: AsyncIOScheduler | None = None) -> None:
    """Ask for a sweep whenever none has ended for one and a half intervals of the loop's own clock.

    The timer of ``scheduler`` may be waiting for a time that lies an hour, or a year, ahead of a clock that was set
    back; what runs after a timer's sweep would wait as long.
    """
    while True:
        await asyncio.sleep(interval_seconds / GUARD_CHECKS_PER_INTERVAL)
        if not sweeper.running and time.monotonic() - sweeper.last_sign_of_life > LATE_INTERVALS * interval_seconds:
            metrics.SWEEPS_LATE.labels("guard").inc()
            await sweeper.request("guard")
            if scheduler is not None:
                next_run = datetime.now(UTC) + timedelta(seconds=interval_seconds)
                scheduler.modify_job(JOB_ID, next_run_time=next_run)


def _count_skipped(event: JobEvent) -> None:
    reason = "busy" if event.code == EVENT_JOB_MAX_INSTANCES else "missed"
    metrics.SWEEPS_LATE.labels(reason).inc()
