"""Who waits for a row of history is answered, whatever becomes of the writer and of Postgres."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Final, cast

import pytest

from app.config import Settings
from app.history import HistoryEntry
from app.outbox import Outbox, Waiting

PATIENCE_SECONDS: Final = 0.2
Write = Callable[[list[Waiting]], Coroutine[Any, Any, None]]


def row(number: int) -> HistoryEntry:
    return HistoryEntry(number, "trade", "alice", number, 1, 1, b"{}")


@pytest.fixture
def outbox() -> Outbox:
    """One whose writes are the test's."""
    nothing: Any = None
    return Outbox(nothing, nothing, Settings(record_timeout_seconds=PATIENCE_SECONDS))


@contextmanager
def writing(outbox: Outbox, write: Write) -> Iterator[None]:
    cast(Any, outbox)._write_batch = write
    task = asyncio.get_running_loop().create_task(outbox._write_forever())
    try:
        yield
    finally:
        task.cancel()


async def test_a_mistake_of_the_writer_answers_its_rows_and_does_not_end_it(outbox: Outbox) -> None:
    async def fail_once(batch: list[Waiting]) -> None:
        if batch[0].entries[0].id == 1:
            raise RuntimeError("a mistake")
        batch[0].answer.set_result(True)

    with writing(outbox, fail_once):
        assert await outbox.record([row(1)]) is False
        outbox.postgres_away = False
        assert await outbox.record([row(2)]) is True


async def test_a_row_is_given_up_in_its_time_and_not_before(outbox: Outbox) -> None:
    started = asyncio.Event()

    async def hang(_: list[Waiting]) -> None:
        started.set()
        await asyncio.Event().wait()

    loop = asyncio.get_running_loop()
    with writing(outbox, hang):
        before = loop.time()
        in_hand = asyncio.create_task(outbox.record([row(1)]))
        await started.wait()
        behind = asyncio.create_task(outbox.record([row(2)]))
        assert [await in_hand, await behind] == [False, False]
        assert PATIENCE_SECONDS <= loop.time() - before < 5 * PATIENCE_SECONDS
        assert outbox.postgres_away


async def test_rows_that_were_given_up_cost_the_next_ones_no_patience(outbox: Outbox) -> None:
    slow = asyncio.Event()

    async def write(batch: list[Waiting]) -> None:
        if batch[0].entries[0].id == 1:
            await slow.wait()
            outbox.postgres_away = False
        await asyncio.sleep(PATIENCE_SECONDS / 4)
        for item in batch:
            if not item.answer.done():
                item.answer.set_result(True)

    with writing(outbox, write):
        in_hand = asyncio.create_task(outbox.record([row(1)]))
        await asyncio.sleep(0.01)
        behind = asyncio.create_task(outbox.record([row(2)]))
        assert [await in_hand, await behind] == [False, False]
        slow.set()
        await asyncio.sleep(PATIENCE_SECONDS / 3)
        assert await outbox.record([row(3)]) is True
        assert not outbox.postgres_away


async def test_a_row_that_comes_while_a_batch_hangs_is_given_up_in_its_own_time(outbox: Outbox) -> None:
    async def hang(_: list[Waiting]) -> None:
        await asyncio.Event().wait()

    loop = asyncio.get_running_loop()
    with writing(outbox, hang):
        assert await outbox.record([row(1)]) is False
        outbox.postgres_away = False
        before = loop.time()
        assert await outbox.record([row(2)]) is False
        assert loop.time() - before < 5 * PATIENCE_SECONDS
