"""The audit rests between its pieces as long as there is time for it, and no longer."""

from __future__ import annotations

import pytest

from watchdog import audit


class Clock:
    """Stands in for the clock and for sleep: time passes when it is slept, or told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(audit, "time", made)
    monkeypatch.setattr(audit, "asyncio", made)
    return made


async def test_it_rests_so_many_times_as_long_as_a_piece_took_until_its_rest_is_used_up(clock: Clock) -> None:
    given_way: list[float] = []

    async def give_way() -> None:
        given_way.append(clock.now)

    pace = audit._Pace(give_way, rest_seconds=10.0)
    for took in (0.0, 1.0, 1.5, 1.0):
        clock.now += took
        await pace.next_piece()
    # Nothing after no work; 4 x 1; 4 x 1.5 is all that is left of 10; then nothing.
    assert clock.slept == [4.0, 6.0]
    assert given_way == [0.0, 5.0, 12.5, 13.5]


async def test_what_it_gave_way_to_counts_as_no_work(clock: Clock) -> None:
    async def give_way() -> None:
        clock.now += 100

    pace = audit._Pace(give_way, rest_seconds=1_000.0)
    await pace.next_piece()
    clock.now += 1
    await pace.next_piece()
    assert clock.slept == [4.0]


async def test_without_time_to_rest_it_goes_on_at_once(clock: Clock) -> None:
    pace = audit._Pace(audit._go_on, rest_seconds=0.0)
    clock.now += 1
    await pace.next_piece()
    assert clock.slept == []
