"""What every rule of the simulation does: let a process do something, and hold what came of it against the model."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any, ClassVar, Final, TypeVar

from hypothesis.stateful import RuleBasedStateMachine

from app import errors, reconcile
from app import redis_client as keys
from app.history import FencedError
from app.services.trading import TradeOrder
from tests.property.simulation import checks
from tests.property.simulation.lost_tail import Image
from tests.property.simulation.model import BTC, Model, Operation
from tests.property.simulation.processes import Arena, Ended, SimulatedProcess
from tests.property.simulation.steps import Stop

WATCHDOGS: Final = 2
PAUSED_MAX: Final = 4

Found = TypeVar("Found")


class Driver(RuleBasedStateMachine):
    """An API, two watchdogs, and what is known of them. ``arena`` is set by the test that runs it."""

    arena: ClassVar[Arena]

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.operations: list[Operation] = []
        self.paused: list[tuple[Ended, Operation | None]] = []
        self.edited: set[str] = set()
        self.image: Image | None = None
        self.stores: tuple[Any, ...] = ()
        self.at_rest = False
        self.run(self.arena.clean())
        self.api = self.run(self.arena.start())
        self.watchdogs = [self.run(self.arena.start()) for _ in range(WATCHDOGS)]

    def run(self, work: Awaitable[Found]) -> Found:
        """Do something on the arena's loop."""

        async def main() -> Found:
            return await work

        return self.arena.loop.run_until_complete(main())

    async def _reconcile(self) -> None:
        await reconcile.reconcile(self.api.store, self.arena.engine, self.arena.settings)

    def _mark(self, price: Decimal, stop: Stop | None) -> None:
        ended = self._perform("mark", self.api, lambda: self.api.booking.marks.set_mark(BTC, price, confirm=True), stop)
        if ended.paused or ended.crashed:
            self.api = self.run(self.arena.start())

    def _audit(self, stop: Stop | None) -> None:
        ended = self._perform("audit", self.watchdogs[1], self.watchdogs[1].audit.step, stop)
        if ended.paused or ended.crashed:
            self.watchdogs[1] = self.run(self.arena.start())
        elif ended.error is None:
            self.edited.clear()

    def _book(self, operation: Operation, stop: Stop | None, *, settle: bool = True) -> Ended:
        if operation not in self.operations:
            self.operations.append(operation)
        order, booking = operation.order, self.api.booking
        ended = self._perform(
            "booking",
            self.api,
            lambda: (
                booking.book_trade(order, client_trade_id=operation.id)
                if isinstance(order, TradeOrder)
                else booking.book_transfer(order, client_transfer_id=operation.id)
            ),
            stop,
            operation,
            settle=settle,
        )
        if ended.paused or ended.crashed:
            self.api = self.run(self.arena.start())
        return ended

    def _perform(
        self,
        doing: str,
        process: SimulatedProcess,
        work: Callable[[], Awaitable[Any]],
        stop: Stop | None,
        operation: Operation | None = None,
        *,
        settle: bool = True,
    ) -> Ended:
        """Let ``process`` do something, and hold what came of it against the model."""
        self.at_rest = False
        if stop is not None and stop.how == "pause" and len(self.paused) >= PAUSED_MAX:
            stop = Stop(stop.gap, "crash", stop.passes)
        ended = self.run(self.arena.perform(doing, process, work, stop))
        if ended.paused:
            self.paused.append((ended, operation))
        if settle:
            self._ended(ended, operation, expected_now=stop is None)
        return ended

    def _ended(self, ended: Ended, operation: Operation | None, *, expected_now: bool = False) -> None:
        """Bring the model up to date, and compare."""
        self.at_rest = False
        self.run(self._note_mark())
        if operation is not None:
            self.run(self._note_operation(ended, operation, expected_now=expected_now))
        elif not ended.paused and ended.error is not None and not ended.crashed:
            away = isinstance(ended.error, OSError) and self.arena.weather.postgres_away
            # A drain that was paused over a restart is fenced; it is tried again later.
            assert away or isinstance(ended.error, (errors.Unavailable, FencedError)), repr(ended.error)
        self._step(ended.steps.doing)

    def _step(self, change: str) -> None:
        self.at_rest = False
        self.run(checks.check_records(self.arena, self.model))
        before, self.stores = self.stores, self.run(self.arena.fingerprint())
        unchanged = before == self.stores and change != "edit"
        counted = self.arena.unchanged if unchanged else self.arena.changes
        counted[change] += 1
        self.at_rest = True

    async def _note_mark(self) -> None:
        version = int(await self.arena.redis.get(keys.MARK_VERSION) or 0)
        accepted, current = (
            await self.arena.redis.hget(keys.mark_key(BTC), "price"),
            await self.arena.redis.get(keys.mark_price_key(BTC)),
        )
        if accepted is not None and current is not None:
            self.model.marked(version, Decimal(keys.as_text(accepted)))
            self.model.set_price(Decimal(keys.as_text(current)))

    async def _note_operation(self, ended: Ended, operation: Operation, *, expected_now: bool) -> None:
        """Apply what was committed; what was answered has to agree with it."""
        remembered: Any = await self.arena.redis.get(operation.key)
        known_before = operation.history_id is not None
        if remembered is not None:
            self.model.apply(operation, remembered)
        if ended.paused or ended.crashed:
            return
        error = ended.error
        if error is None:
            booked = ended.task.result()
            assert remembered is not None, f"{operation} was answered, and Redis does not know it"
            assert not (expected_now and known_before) or booked.outcome == "replayed", operation
            identity = booked.answer.get("trade_id", booked.answer.get("transfer_id"))
            assert int(identity) == operation.history_id, (booked.answer, operation)
            operation.acknowledged = True
        elif isinstance(error, errors.Refusal):
            assert remembered is None, f"{operation} was refused and booked: {error!r}"
            if expected_now:
                expected = self.model.expect(operation)
                assert expected.code == error.code, f"{operation}: {error!r}, the rules say {expected}"
        else:
            assert isinstance(error, errors.Unavailable), repr(error)

    def teardown(self) -> None:
        """Let everything come to rest, and look at all of it."""
        if not self.at_rest:
            return
        self.arena.weather.postgres_away = False
        while self.paused:
            ended, operation = self.paused.pop()
            self.run(self.arena.finish(ended, kill=False))
            self._ended(ended, operation)
        self.run(self._rest())

    async def _rest(self) -> None:
        watchdog = await self.arena.start()
        await watchdog.audit.step()
        await watchdog.outbox.drain()
        await watchdog.sweep()
        await watchdog.outbox.drain()
        await watchdog.store.batcher.close()
        await checks.check_breaches(self.arena, self.model)
        await checks.check_records(self.arena, self.model)
        await checks.check_at_rest(self.arena, self.model, self.operations)
