"""The gaps between the steps of an operation, and how a simulated process is crashed or paused in one of them.

The product's code is not changed: its calls of a store are wrapped while a simulation runs, and each wrapper passes
through the gaps before and after its call. Which process passes is known from the context of its task.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import pytest
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from app import columns, outbox, reconcile, restore
from app.history import HistoryEntry, write_history
from app.redis_client import Script, StateStore
from watchdog import kept_columns

BOOKING_GAPS: Final = (
    "read | commit",
    "commit | outbox",
    "outbox | Postgres",
    "Postgres | delete",
    "delete | answer",
)
ADOPTION_GAPS: Final = ("read | adopt", "adopt | outbox", "outbox | Postgres", "Postgres | delete", "delete | answer")
MARK_GAPS: Final = ("read | accept", "accept | answer")
SWEEP_GAPS: Final = (
    "marks | chunk",
    "chunk | breach",
    "breach | outbox",
    "outbox | Postgres",
    "Postgres | delete",
    "delete | answer",
    "recorded | swept",
    "swept | answer",
)
DRAIN_GAPS: Final = ("outbox | Postgres", "Postgres | delete")
RECONCILE_GAPS: Final = (
    "compared | accounts",
    "accounts | operations",
    "operations | counter",
    "counter | epoch",
    "epoch in Postgres | epoch in Redis",
)
GAPS: Final[dict[str, tuple[str, ...]]] = {
    "booking": BOOKING_GAPS,
    "audit": ADOPTION_GAPS,
    "mark": MARK_GAPS,
    "sweep": SWEEP_GAPS,
    "drain": DRAIN_GAPS,
    "reconcile": RECONCILE_GAPS,
}
"""Every pair of steps, by what is being done."""

_BEFORE_SCRIPT: Final = {
    "commit": "read | commit",
    "mark": "read | accept",
    "changed_rows": "marks | chunk",
    "breach": "chunk | breach",
}
_AFTER_SCRIPT: Final = {"commit": "commit | outbox", "mark": "accept | answer", "breach": "breach | outbox"}


class Crash(BaseException):
    """The process is gone: nothing of it runs on, and what it held in memory is lost."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Crash or pause in the ``gap``, the n-th time that it is passed."""

    gap: str
    how: Literal["crash", "pause"]
    passes: int = 0


@dataclass(slots=True)
class Steps:
    """One operation of one simulated process on its way through the gaps."""

    doing: str
    stop: Stop | None
    crashes: Counter[tuple[str, str]]
    dead: bool = False
    calls_under_way: int = 0
    paused: asyncio.Event = field(default_factory=asyncio.Event)
    resumed: asyncio.Event = field(default_factory=asyncio.Event)
    passed: Counter[str] = field(default_factory=Counter)
    gap: str = ""

    async def between(self, gap: str) -> None:
        """Pass through ``gap``, unless this is where the operation stops."""
        if self.stop is not None and self.stop.gap == gap and not self.paused.is_set() and not self.dead:
            self.passed[gap] += 1
            if self.passed[gap] > self.stop.passes:
                self.gap = gap
                if self.stop.how == "crash":
                    self.kill()
                else:
                    self.paused.set()
        if self.paused.is_set():
            await self.resumed.wait()
        if self.dead:
            raise Crash

    def resume(self) -> None:
        """Let a paused operation go on to its end."""
        self.stop = None
        self.paused.clear()
        self.resumed.set()

    def kill(self) -> None:
        """Crash where it stands."""
        self.dead = True
        self.crashes[self.doing, self.gap] += 1
        self.paused.clear()
        self.resumed.set()


CURRENT: Final[ContextVar[Steps | None]] = ContextVar("CURRENT", default=None)


async def between(gap: str) -> None:
    """Pass through ``gap`` with the operation of this task, if it is one of a simulated process."""
    steps = CURRENT.get()
    if steps is not None:
        await steps.between(gap)


async def _call(call: Awaitable[Any]) -> Any:  # noqa: ANN401 - whatever the wrapped call answers
    steps = CURRENT.get()
    if steps is None:
        return await call
    steps.calls_under_way += 1
    try:
        return await call
    finally:
        steps.calls_under_way -= 1


@dataclass(slots=True)
class Weather:
    """What is wrong with the stores at the moment, and every row that Postgres was ever given."""

    postgres_away: bool = False
    written: list[HistoryEntry] = field(default_factory=list)


@contextmanager
def wrapped_calls(weather: Weather) -> Iterator[None]:
    """Put gaps around every call of a store that the product makes."""
    run, read_chunk, commit = StateStore.run, columns.read_chunk, AsyncConnection.commit

    async def stepped_run(
        self: StateStore, script: Script, keys: Sequence[str], arguments: Sequence[str | bytes | int]
    ) -> list[Any]:
        name = script.name
        adopts = name == "commit" and "adjustment" in arguments
        if name == "swept":
            await between("recorded | swept")
        elif name in _BEFORE_SCRIPT:
            await between("read | adopt" if adopts else _BEFORE_SCRIPT[name])
        answer: list[Any] = await _call(run(self, script, keys, arguments))
        if name == "swept":
            await between("swept | answer")
        elif name in _AFTER_SCRIPT and answer[0] == "ok":
            await between("adopt | outbox" if adopts else _AFTER_SCRIPT[name])
        return answer

    async def stepped_write(engine: AsyncEngine, entries: Sequence[HistoryEntry], *, epoch: int) -> list[HistoryEntry]:
        await between("outbox | Postgres")
        if weather.postgres_away:
            raise ConnectionRefusedError("Postgres is away in this simulation")
        contradicted: list[HistoryEntry] = await _call(write_history(engine, entries, epoch=epoch))
        weather.written += entries
        await between("Postgres | delete")
        return contradicted

    async def stepped_chunk(*arguments: Any) -> Any:  # noqa: ANN401 - as read_chunk
        await between("marks | chunk")
        return await read_chunk(*arguments)

    async def stepped_commit(self: AsyncConnection) -> None:
        await commit(self)
        await between("epoch in Postgres | epoch in Redis")

    def before(gap: str, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def stepped(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401 - as the call
            await between(gap)
            return await call(*arguments, **named)

        return stepped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StateStore, "run", stepped_run)
        patch.setattr(outbox, "write_history", stepped_write)
        patch.setattr(kept_columns, "read_chunk", stepped_chunk)
        patch.setattr(AsyncConnection, "commit", stepped_commit)
        patch.setattr(restore, "restore_some", before("compared | accounts", restore.restore_some))
        patch.setattr(restore, "restore_operations", before("accounts | operations", restore.restore_operations))
        patch.setattr(reconcile, "newest_mark_version", before("operations | counter", reconcile.newest_mark_version))
        patch.setattr(reconcile, "advance_epoch", before("counter | epoch", reconcile.advance_epoch))
        yield
