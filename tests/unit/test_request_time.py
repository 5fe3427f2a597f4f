"""A request has one time: it bounds what may still be begun, and whoever waits is answered at its end."""

from __future__ import annotations

import asyncio
import time
from typing import Final

import pytest
import uvloop

from app import errors
from app.request_time import VOUCH_SHARE, Deadlines, RequestTime

SECONDS: Final = 0.4
COMMITTED_BY_SECONDS: Final = SECONDS - SECONDS / VOUCH_SHARE


class Item:
    """Something that is watched, and the time at which it was ended."""

    def __init__(self, until: float, *, done: bool = False) -> None:
        self.until = until
        self.done = done
        self.ended_at: float | None = None

    def is_done(self) -> bool:
        return self.done

    def run_out(self) -> None:
        self.done = True
        self.ended_at = time.monotonic()


def called(allotted: RequestTime, *, seconds: float) -> None:
    """A call that took so long has just been answered."""
    allotted.called(since=time.monotonic() - seconds)


def test_where_nothing_was_slow_a_call_may_be_made() -> None:
    assert RequestTime(SECONDS).allows(2)


@pytest.mark.parametrize(
    ("slowest_seconds", "calls", "allowed"),
    [
        # 0.35 s are left for calls: two of 0.17 s fit, two of 0.18 s do not, and one does.
        (0.17, 2, True),
        (0.18, 2, False),
        (0.18, 1, True),
        (0.34, 1, True),
        (0.36, 1, False),
    ],
)
def test_a_call_is_made_only_if_one_as_slow_as_the_slowest_fits(
    slowest_seconds: float, calls: int, allowed: bool
) -> None:
    allotted = RequestTime(SECONDS)
    called(allotted, seconds=slowest_seconds)
    called(allotted, seconds=0.001)
    assert allotted.allows(calls) is allowed


def test_no_call_is_made_once_only_the_vouching_is_left() -> None:
    allotted = RequestTime(0.0)
    assert not allotted.allows(1)


async def test_calls_that_put_nothing_in_doubt_end_in_time_and_say_so() -> None:
    allotted = RequestTime(SECONDS)
    before = time.monotonic()
    with pytest.raises(errors.StoreUnavailable):
        async with allotted.bound():
            await asyncio.sleep(10)
    assert COMMITTED_BY_SECONDS - 0.01 <= time.monotonic() - before < 2 * SECONDS


async def test_a_time_that_a_call_has_of_its_own_is_not_taken_for_the_request_s() -> None:
    with pytest.raises(TimeoutError):
        async with RequestTime(SECONDS).bound():
            raise TimeoutError


async def test_each_is_ended_at_its_time_whatever_the_order() -> None:
    now = time.monotonic()
    deadlines = Deadlines()
    items = [Item(now + seconds) for seconds in (0.2, 0.1, 0.3)]
    for item in items:
        deadlines.watch(item)
    await asyncio.sleep(0.4)
    for item in items:
        assert item.ended_at is not None
        assert item.until <= item.ended_at < item.until + 0.1


async def test_what_is_done_is_not_ended() -> None:
    deadlines = Deadlines()
    item = Item(time.monotonic() + 0.05)
    deadlines.watch(item)
    item.done = True
    await asyncio.sleep(0.1)
    assert item.ended_at is None


def test_one_that_is_due_at_once_does_not_keep_others_from_being_watched() -> None:
    """uvloop, which serves the API, hands out another kind of handle for what is due within its millisecond."""

    async def watch() -> Item:
        deadlines = Deadlines()
        for _ in range(3):
            deadlines.watch(Item(time.monotonic()))
        last = Item(time.monotonic() + 0.05)
        deadlines.watch(last)
        await asyncio.sleep(0.15)
        return last

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(watch()).ended_at is not None
